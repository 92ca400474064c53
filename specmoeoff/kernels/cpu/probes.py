"""The C probes behind NumPy arrays: arithmetic, moves of memory, and chains of dependent reads."""

import functools
from ctypes import c_double
from typing import NamedTuple

import numpy as np

from specmoeoff.kernels.cpu import _library, _pointer

MOVES = ("read", "read_ahead", "store", "nt_store", "copy", "nt_copy", "triad")
PEAKS = ("fp32_fma", "fp16_fma", "bf16_dot", "int8_dot", "bf16_amx", "int8_amx")
MOVE_UNIT = 3072  # bytes: a whole number of steps in halves and in thirds


class Timed(NamedTuple):
    """Seconds from the first thread's start to the last one's end; the least share of it that a thread was on a CPU."""

    seconds: float
    on_cpu: float


@functools.cache
def _supported() -> dict[str, list[int]]:
    """The forms of every probe that this CPU can run, widest first."""
    library, found = _library(), dict[str, list[int]]()
    for i in range(library.smo_probe_count()):
        if library.smo_probe_supported(i):
            found.setdefault(library.smo_probe_name(i).decode(), []).append(i)
    return found


def n_forms(name: str) -> int:
    """In how many widths this CPU can run a probe; 0: not at all."""
    return len(_supported().get(name, ()))


def is_supported(name: str) -> bool:
    """Whether this CPU has the instructions."""
    return n_forms(name) > 0


class Peak:
    """Independent multiply-adds on all threads, or `cycles`: one chain that takes a known number of clock cycles."""

    def __init__(self, name: str, n_threads: int, form: int = 0) -> None:
        self._index, self._n_threads = _supported()[name][form], n_threads
        self._each = _library().smo_probe_operations(self._index)

    def run(self, rounds: int) -> tuple[float, Timed]:
        """Operations (cycles of one thread) done, and their time."""
        n_threads = 1 if self._each == 0 else self._n_threads
        return self._each * rounds * n_threads, _run(self._index, self._n_threads, None, 0, rounds)


class Move:
    """Every thread moves its own equal share of a uint8 buffer: see MOVES."""

    def __init__(self, name: str, n_threads: int, buffer: np.ndarray, form: int = 0) -> None:
        self._index, self._n_threads = _supported()[name][form], n_threads
        self._address = _pointer(buffer, np.uint8, (None,), "buffer", write=True)
        self._share = len(buffer) // n_threads // MOVE_UNIT * MOVE_UNIT
        if self._share == 0:
            raise ValueError(f"buffer: at least {MOVE_UNIT} bytes a thread are expected")
        self._buffer = buffer

    @property
    def n_bytes(self) -> int:
        """Moved in one round by all threads; a copy counts both ways."""
        return self._share * self._n_threads

    def run(self, rounds: int = 1) -> Timed:
        """Go over the buffer `rounds` times."""
        return _run(self._index, self._n_threads, self._address, self._share, rounds)


def _run(index: int, n_threads: int, address: int | None, share: int, rounds: int) -> Timed:
    if rounds < 1 or n_threads < 1:
        raise ValueError("rounds and n_threads must be positive")
    found = (c_double * 2)()
    _library().smo_probe(index, n_threads, address, share, rounds, found)
    return Timed(found[0], found[1])


class Chase:
    """Memory latency: follows links (n,) int64 of a cycle, going on where it stopped."""

    def __init__(self, links: np.ndarray) -> None:
        self._address = _pointer(links, np.int64, (None,), "links")
        if len(links) < 1 or links.min() < 0 or links.max() >= len(links):
            raise ValueError("links: must be indices into links")
        self._links, self._at = links, 0

    def follow(self, steps: int) -> None:
        """One dependent access after another."""
        self._at = int(_library().smo_probe_chase(self._address, self._at, steps))
