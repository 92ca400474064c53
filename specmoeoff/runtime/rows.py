"""What goes through one pass: ragged rows of requests, in micro-batches."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from specmoeoff.kernels.cpu import Batch
from specmoeoff.pipeline import RequestTokens


@dataclass(frozen=True)
class Rows:
    """Rows first..last of a pass, and the ragged batch they form. The first `n_near` requests have their pages in GPU memory."""

    first: int
    last: int
    batch: Batch
    requests: tuple[RequestTokens, ...]
    pages: np.ndarray
    n_near: int = 0


def make_rows(first: int, counts: Sequence[int], positions: Sequence[int], pages: np.ndarray, n_near: int = 0) -> Rows:
    """Requests with counts[i] new tokens after positions[i] old ones; `pages` (n_requests, max_pages) int32."""
    row_start = np.zeros(len(counts) + 1, np.int32)
    np.cumsum(counts, out=row_start[1:])
    batch = Batch(row_start, np.asarray(positions, np.int32), np.ascontiguousarray(pages))
    requests = tuple(RequestTokens(n, p) for n, p in zip(counts, positions, strict=True))
    return Rows(first, first + int(row_start[-1]), batch, requests, pages, n_near)
