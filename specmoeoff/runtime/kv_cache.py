"""Paged keys and values. Target and draft share one page table: both see the same tokens of the same requests."""

import numpy as np

from specmoeoff.errors import BadInput
from specmoeoff.estimate.memory import layer_shape
from specmoeoff.kernels.cpu import PAGE_TOKENS, aligned_empty
from specmoeoff.specs.model import ModelSpec


def pages_for(n_tokens: int) -> int:
    """Pages that hold `n_tokens`."""
    return -(-n_tokens // PAGE_TOKENS)


class KVCache:
    """Keys and values of one model for all layers; allocated once, touched at once, so RSS is what was planned."""

    def __init__(self, spec: ModelSpec, n_pages: int) -> None:
        page_bytes = layer_shape(spec).kv.page_bytes
        self.pages = aligned_empty(spec.n_layers * n_pages * page_bytes).reshape(spec.n_layers, n_pages, page_bytes)


class PageTable:
    """Which pages a live request owns, of a budget that all share. Page 0 belongs to nobody: unused entries point at it.

    Requests in the first `near_slots` places have theirs in GPU memory, a whole context each, numbered before the others'.
    """

    def __init__(self, n_slots: int, context_tokens: int, kv_tokens: int | None = None, near_slots: int = 0) -> None:
        self.pages_per_request = pages_for(context_tokens)
        self.near_slots, self.n_near_pages = near_slots, near_slots * self.pages_per_request
        n_owned = pages_for(kv_tokens) if kv_tokens else (n_slots - near_slots) * self.pages_per_request
        if near_slots < n_slots and n_owned < self.pages_per_request:
            raise BadInput(
                f"the plan's decode.kv_tokens of {kv_tokens} cannot hold one context of {context_tokens}; raise it."
            )
        self.n_pages = self.n_near_pages + n_owned + 1
        self.table = np.zeros((n_slots, self.pages_per_request), np.int32)
        self._free_near = list(range(self.n_near_pages, 0, -1))
        self._free_far = list(range(self.n_pages - 1, self.n_near_pages, -1))

    def reserve(self, slot: int, n_tokens: int) -> bool:
        """Give a request the pages it lacks for `n_tokens`; False, and nothing given, where too few are free."""
        owned, free = self.table[slot], self._free(slot)
        first, last = int(np.count_nonzero(owned)), pages_for(n_tokens)
        if last - first > len(free):
            return False
        if last > first:
            owned[first:last] = [free.pop() for _ in range(last - first)]
        return True

    def release(self, slot: int) -> None:
        """Take a request's pages back."""
        owned = self.table[slot]
        self._free(slot).extend(int(page) for page in owned[owned > 0][::-1])
        owned[:] = 0

    def _free(self, slot: int) -> list[int]:
        return self._free_near if slot < self.near_slots else self._free_far
