"""From final states to tokens: norm, output matrix and argmax on the GPU, some rows at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from specmoeoff.kernels.cuda import launches
from specmoeoff.kernels.cuda.launches import Array
from specmoeoff.runtime.gpu.device import Stream
from specmoeoff.runtime.gpu.weights import GpuWeights

if TYPE_CHECKING:
    from specmoeoff.runtime.gpu.model import GpuModel

U16, I32, F32 = np.uint16, np.int32, np.float32
HEAD_ROWS = 256  # rows whose logits are made at a time, as estimate/gpu_memory.py plans


class Head:
    """A model's. `matrix`: the output matrix and its address."""

    def __init__(self, model: GpuModel, weights: GpuWeights, matrix: tuple[Array, Array]) -> None:
        device, spec = model.device, model.spec
        self._model, self._device = model, device
        self._norm, self.matrix = model.upload(weights.dense("norm")), matrix
        self._rows_host, self._rows = device.pinned((HEAD_ROWS,), I32), device.empty((HEAD_ROWS,), I32)
        self._normed, self._normed_host = (
            make((HEAD_ROWS, spec.hidden), U16) for make in (device.empty, device.pinned)
        )
        self._logits, self._logits_host = (make((HEAD_ROWS, spec.vocab), F32) for make in (device.empty, device.pinned))
        self._tokens, self._tokens_host = (make((HEAD_ROWS,), I32) for make in (device.empty, device.pinned))
        self._n_accepted = device.empty((HEAD_ROWS,), I32)
        # Each row is a request that drafted nothing, decoded greedily: verification is then the argmax.
        self._row_start = model.upload(np.arange(HEAD_ROWS + 1, dtype=I32))
        self._nothing, self._seeds, self._greedy = (
            model.upload(np.zeros(HEAD_ROWS, dtype)) for dtype in (I32, np.uint64, np.float64)
        )

    def norm(self, stream: Stream, rows: np.ndarray) -> None:
        """Features of the model's `rows` (n,), n at most HEAD_ROWS; what the last call led to must have been fetched."""
        n, model, launch = len(rows), self._model, self._device.launch
        padded = np.zeros(HEAD_ROWS, I32)
        padded[:n] = rows
        self._device.put(self._rows_host, padded)
        launch(stream, launches.copy(self._rows_host, self._rows))
        launch(stream, launches.rmsnorm(model.x, self._norm, model.spec.rms_eps, self._normed[:n], self._rows[:n]))

    def send_features(self, stream: Stream, n: int) -> None:
        """The first n to the host."""
        self._device.copy(stream, self._normed_host[:n], self._normed[:n])

    def fetch_features(self, n: int) -> np.ndarray:
        """What was sent, (n, hidden) bf16."""
        return self._device.get(self._normed_host[:n])

    def compute(self, stream: Stream, rows: np.ndarray) -> None:
        """Logits and tokens of `rows`, as `norm` takes them."""
        n, model, launch = len(rows), self._model, self._device.launch
        self.norm(stream, rows)
        model.linear(stream, self._normed[:n], self.matrix, self._logits[:n])
        numbers = (self._nothing[:n], self._row_start[: n + 1], self._nothing[:n], self._seeds[:n], self._greedy[:n])
        launch(stream, launches.verify(self._logits[:n], None, *numbers, self._n_accepted[:n], self._tokens[:n]))

    def send(self, stream: Stream, n: int, logits: bool) -> None:
        """The first n tokens to the host, with their logits if wanted."""
        self._device.copy(stream, self._tokens_host[:n], self._tokens[:n])
        if logits:
            self._device.copy(stream, self._logits_host[:n], self._logits[:n])

    def fetch(self, n: int, logits: np.ndarray | None) -> np.ndarray:
        """What was sent: tokens (n,), and logits (n, vocab) into an array."""
        if logits is not None:
            logits[:] = self._device.get(self._logits_host[:n])
        return self._device.get(self._tokens_host[:n])
