"""What the host tells the GPU of a window: tokens and where they belong, all in one buffer that one copy brings."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from specmoeoff.kernels.cpu import Batch
from specmoeoff.kernels.cuda import launches
from specmoeoff.kernels.cuda.launches import Array
from specmoeoff.runtime.gpu.device import Device, Stream
from specmoeoff.runtime.rows import Rows

WORD_INTS = 4  # the copy moves words of 16 bytes


class Half(NamedTuple):
    """Rows first..last, whose keys and values lie in GPU memory (near) or beside the CPU (far). Pages count from their own pool's
    first; `batch` is for the CPU's kernels."""

    first: int
    last: int
    rows: launches.Rows
    table: Array
    batch: Batch | None


class Part(NamedTuple):
    """A micro-batch: rows first..last."""

    first: int
    last: int
    near: Half | None
    far: Half | None


class Inputs:
    """Room for `max_rows` tokens of `max_requests`. Raises ValueError where a window needs more."""

    def __init__(self, device: Device, max_rows: int, max_requests: int, max_pages: int, n_near_pages: int) -> None:
        n_ints = max_rows * 6 + max_requests * (3 + max_pages) + 4
        n_ints += -n_ints % WORD_INTS
        self._device, self._n_near_pages = device, n_near_pages
        self._pinned, self._here = device.pinned((n_ints,), np.int32), device.empty((n_ints,), np.int32)

    def send(self, stream: Stream, tokens: np.ndarray, micro_batches: Sequence[Rows]) -> tuple[Array, list[Part]]:
        """Tokens (M,) and parts as kernels take them, on the GPU once the stream is so far. The last call's copy must be over."""
        self._filled: list[np.ndarray] = []
        self._n_ints = 0
        here = self._add(tokens)
        parts = [self._part(rows) for rows in micro_batches]
        n_ints = self._n_ints + -self._n_ints % WORD_INTS
        if n_ints > len(self._pinned):
            raise ValueError(f"a window of {len(tokens)} rows is more than was planned for")
        everything = np.zeros(n_ints, np.int32)
        np.concatenate(self._filled, out=everything[: self._n_ints])
        self._device.put(self._pinned[:n_ints], everything)
        self._device.launch(stream, launches.copy(self._pinned[:n_ints], self._here[:n_ints]))
        return here, parts

    def _add(self, values: np.ndarray) -> Array:
        first, self._n_ints = self._n_ints, self._n_ints + values.size
        self._filled.append(np.ascontiguousarray(values, np.int32).reshape(-1))
        return self._here[first : self._n_ints].reshape(values.shape)

    def _part(self, rows: Rows) -> Part:
        n = rows.n_near
        middle = rows.first + sum(int(r.n_tokens) for r in rows.requests[:n])
        far_pages = np.maximum(rows.pages[n:] - self._n_near_pages, 0)
        near = self._half(rows.first, middle, rows, slice(n), rows.pages[:n], far=False) if n else None
        far = (
            self._half(middle, rows.last, rows, slice(n, None), far_pages, far=True) if n < len(rows.requests) else None
        )
        return Part(rows.first, rows.last, near, far)

    def _half(self, first: int, last: int, rows: Rows, which: slice, pages: np.ndarray, far: bool) -> Half:
        requests = rows.requests[which]
        chain = launches.chain([int(r.n_tokens) for r in requests], [r.context for r in requests])
        batch = Batch(chain.row_start, chain.first_position, pages) if far else None
        arrays = {name: self._add(getattr(chain, name)) for name in chain._fields[:7]}
        return Half(first, last, chain._replace(**arrays), self._add(pages), batch)
