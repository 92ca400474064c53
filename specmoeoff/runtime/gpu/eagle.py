"""Where an EAGLE head begins: the embedding of a token and the feature of the position before it become one state, on the GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from specmoeoff.kernels.cuda import launches
from specmoeoff.runtime.gpu.device import Stream
from specmoeoff.runtime.gpu.weights import GpuWeights

if TYPE_CHECKING:
    from specmoeoff.runtime.gpu.model import GpuModel

U16, I32 = np.uint16, np.int32


class Entry:
    """A head's linear map, its two halves apart."""

    def __init__(self, model: GpuModel, weights: GpuWeights) -> None:
        device, n_rows = model.device, model.sizes.max_rows
        self._model, self._device = model, device
        self._of_embedding, self._of_feature = (
            model.addressed(weights.dense(f"fc.{part}")) for part in ("embedding", "feature")
        )
        # Looked up as if it were the embedding of token 0.
        self._bias, self._zeros = model.upload(weights.dense("fc.bias")), model.upload(np.zeros(n_rows, I32))
        shape = (n_rows, model.spec.hidden)
        self._features, self._features_host = (make(shape, U16) for make in (device.empty, device.pinned))

    def send(self, stream: Stream, features: np.ndarray) -> None:
        """Features (M, hidden) bf16 of a pass, to the GPU; the last call's copy must be over."""
        n = len(features)
        self._device.put(self._features_host[:n], features)
        self._device.launch(stream, launches.copy(self._features_host[:n], self._features[:n]))

    def compute(self, stream: Stream, mine: slice) -> None:
        """The states of some rows, which hold the tokens' embeddings."""
        model, launch = self._model, self._device.launch
        x, normed, m = model.x[mine], model.normed[mine], mine.stop - mine.start
        # Embeddings are bf16: nothing is lost.
        launch(stream, launches.rmsnorm(x, (), model.spec.rms_eps, normed))
        launch(stream, launches.embed(self._zeros[:m], self._bias, x))
        for rows, matrix in ((normed, self._of_embedding), (self._features[mine], self._of_feature)):
            model.linear(stream, rows, matrix, model.projected[:m])
            launch(stream, launches.combine(x, model.projected[:m], model.ones[:m]))
