"""A GPU played by a CPU, which is as unkind as a GPU may be: work runs in any order its events allow, and whoever touches memory
without an event between him and whoever touched it before is told so.

Every stream, and the host, has a clock: how much of each other's work it knows to be over. Two pieces of work touch the same bytes
rightly where both only read, or where the later one's clock holds the earlier one.
"""

import random
import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np

from specmoeoff.kernels.cuda import FOLDER, KERNELS
from specmoeoff.kernels.cuda.launches import Launch
from specmoeoff.kernels.cuda.on_cpu import Host

HOST = -1
MARGIN, MARGIN_BYTES = 0xA5, 256
POISON = 0xFF  # NaN in every floating type, and no sensible number


class Race(AssertionError):
    """Two pieces of work touch the same bytes and nothing orders them."""


class Overrun(AssertionError):
    """Memory that nobody asked for was written."""


class Parameter(NamedTuple):
    """A pointer a kernel takes: what it may do with it, and whether it finds further pointers there."""

    writes: bool
    addresses: bool


@cache
def parameters() -> dict[str, tuple[Parameter | None, ...]]:
    """By kernel and argument, from the sources: None is no pointer."""
    found = {}
    for name in KERNELS:
        source = FOLDER.joinpath(f"{name}.cu").read_text().replace("\\\n", "\n")
        pattern = (
            r'extern "C" __global__ void\s+(?:cluster\s+)?(?:__launch_bounds__\([^)]*\)\s+)?(\w+?)(?:##\w+)*\(([^)]*)\)'
        )
        for kernel, listed in re.findall(pattern, source):
            arguments = [a.strip() for a in listed.split(",")]
            found[kernel] = tuple(
                Parameter(not a.startswith("const"), a.count("*") > 1) if "*" in a else None for a in arguments
            )
    return found


def of_kernel(name: str) -> tuple[Parameter | None, ...]:
    """Its parameters; of one that exists in sizes, those of all."""
    known = parameters()
    return known[name] if name in known else known[name.rstrip("0123456789x")]


class Access(NamedTuple):
    """Bytes first..last, by `tick` of a stream."""

    first: int
    last: int
    stream: int
    tick: int
    writes: bool
    what: str


class Event(NamedTuple):
    """The end of a stream's first `tick` pieces of work, and all that is over by then."""

    stream: int
    tick: int
    clock: dict[int, int]


class Memory:
    """All allocations, and who touched what last."""

    def __init__(self, content: int) -> None:
        self._content = content
        self._first: list[int] = []
        self._arrays: list[np.ndarray] = []
        self._accesses: list[list[Access]] = []
        self._margins: list[np.ndarray] = []

    def check(self, what: str) -> None:
        """Raises Overrun where something was written past an array's end."""
        if any((margin != MARGIN).any() for margin in self._margins):
            raise Overrun(f"{what} wrote past the end of an array")

    def add(self, shape: tuple[int, ...], dtype: type) -> np.ndarray:
        """A new array, with a margin that must stay as it is."""
        n = int(np.prod(shape)) * np.dtype(dtype).itemsize
        array = np.full(n + 2 * MARGIN_BYTES, self._content, np.uint8)
        offset = -array.ctypes.data % 16
        array[offset + n :] = MARGIN
        self._margins.append(array[offset + n :])
        at = bisect_right(self._first, array.ctypes.data)
        self._first.insert(at, array.ctypes.data)
        self._arrays.insert(at, array)
        self._accesses.insert(at, [])
        return array[offset : offset + n].view(dtype).reshape(shape)

    def touch(self, new: Access, clock: dict[int, int]) -> None:
        """Raises Race."""
        at = bisect_right(self._first, new.first) - 1
        if at < 0 or new.last > self._first[at] + len(self._arrays[at]):
            raise Race(f"{new.what} touches memory that is not the device's")
        kept = []
        for old in self._accesses[at]:
            if old.first < new.last and new.first < old.last:
                ordered = clock.get(old.stream, 0) >= old.tick
                if (old.writes or new.writes) and not ordered:
                    raise Race(f"nothing orders {new.what} after {old.what}, which touched the same memory")
                covered = new.first <= old.first and old.last <= new.last
                if ordered and covered and (new.writes or (new.stream == old.stream and not old.writes)):
                    continue
            kept.append(old)
        self._accesses[at] = [*kept, new]


class Piece(NamedTuple):
    """Work on a stream, and what it waits for: the n-th pieces of streams."""

    what: str
    call: Callable[[], object]
    after: tuple[tuple[int, int], ...]


class RehearsalDevice:
    """See Device. Without a `host` nothing is run, only checked, with memory full of zeros. Waits are numbered; one can be left out."""

    def __init__(self, host: Host | None = None, seed: int = 0, without: int | None = None) -> None:
        self._host, self._random, self._without = host, random.Random(seed), without
        self.n_waits = 0
        self.memory_bytes = 0
        self._memory = Memory(POISON if host else 0)
        self._clocks: dict[int, dict[int, int]] = {HOST: {HOST: 0}}
        self._pieces: dict[int, list[Piece]] = {}
        self._waits: dict[int, list[tuple[int, int]]] = {}
        self._ran: dict[int, int] = {}

    def stream(self) -> int:
        """See Device."""
        stream = len(self._pieces)
        self._pieces[stream], self._waits[stream], self._ran[stream] = [], [], 0
        self._clocks[stream] = {}
        return stream

    def record(self, stream: int) -> Event:
        """See Device."""
        return Event(stream, self._clocks[stream].get(stream, 0), dict(self._clocks[stream]))

    def wait(self, stream: int, event: Event) -> None:
        """See Device."""
        if self._counted():
            _join(self._clocks[stream], event.clock)
            self._waits[stream].append((event.stream, event.tick))

    def synchronize(self, event: Event) -> None:
        """See Device."""
        if self._counted():
            _join(self._clocks[HOST], event.clock)
        self._run_until(event.stream, event.tick)

    def seconds(self, start: Event, end: Event) -> float:
        """Nothing here takes a time that means anything."""
        return 1e-6

    def empty(self, shape: tuple[int, ...], dtype: type) -> np.ndarray:
        """See Device."""
        self.memory_bytes += int(np.prod(shape)) * np.dtype(dtype).itemsize
        return self._memory.add(shape, dtype)

    def pinned(self, shape: tuple[int, ...], dtype: type) -> np.ndarray:
        """See Device."""
        return self._memory.add(shape, dtype)

    def address(self, array: np.ndarray) -> int:
        """See Device."""
        return array.ctypes.data

    def put(self, to: np.ndarray, values: np.ndarray) -> None:
        """See Device."""
        self._by_host(to, True)
        to[...] = values

    def get(self, source: np.ndarray) -> np.ndarray:
        """See Device."""
        self._by_host(source, False)
        return source.copy()

    def copy(self, stream: int, to: np.ndarray, source: np.ndarray) -> None:
        """See Device."""
        assert to.nbytes == source.nbytes
        assert to.flags.c_contiguous
        assert source.flags.c_contiguous
        ranges = [(*_range(source), False), (*_range(to), True)]
        self._add(
            stream,
            "a copy",
            ranges,
            lambda: np.copyto(to.reshape(-1).view(np.uint8), source.reshape(-1).view(np.uint8)),
        )

    def launch(self, stream: int, launch: Launch) -> None:
        """See Device."""
        ranges = []
        for argument, parameter in zip(launch.arguments, of_kernel(launch.kernel), strict=True):
            if not isinstance(argument, np.ndarray):
                assert parameter is None or argument == 0, f"{launch.kernel}: a pointer's argument must be an array"
                continue
            assert parameter is not None
            assert argument.flags.c_contiguous
            if argument.nbytes:
                ranges.append((*_range(argument), False))
            if parameter.writes and argument.nbytes:
                ranges.append((*_range(argument), True))
            if parameter.addresses:
                ranges += [(int(a), int(a) + weight_bytes(launch), False) for a in argument if a]
        self._add(stream, f"kernel {launch.kernel}", ranges, lambda: self._host.run(launch) if self._host else None)

    def host(
        self, stream: int, call: Callable[[], None], reads: Sequence[np.ndarray], writes: Sequence[np.ndarray]
    ) -> None:
        """See Device."""
        ranges = [
            (*_range(a), writing) for writing, arrays in ((False, reads), (True, writes)) for a in arrays if a.nbytes
        ]
        self._add(stream, f"host function {getattr(call, '__qualname__', call)}", ranges, call)

    def _counted(self) -> bool:
        self.n_waits += 1
        return self.n_waits - 1 != self._without

    def _by_host(self, array: np.ndarray, writes: bool) -> None:
        clock = self._clocks[HOST]
        clock[HOST] += 1
        self._memory.touch(Access(*_range(array), HOST, clock[HOST], writes, "the host"), clock)

    def _add(self, stream: int, what: str, ranges: list[tuple[int, int, bool]], call: Callable[[], object]) -> None:
        clock = self._clocks[stream]
        _join(clock, self._clocks[HOST])
        tick = clock.get(stream, 0) + 1
        for first, last, writes in ranges:
            self._memory.touch(Access(first, last, stream, tick, writes, what), clock | {stream: tick})
        clock[stream] = tick
        if self._host:
            self._pieces[stream].append(Piece(what, call, tuple(self._waits[stream])))
        self._waits[stream].clear()

    def _run_until(self, stream: int, tick: int) -> None:
        """Anything that may run does, in random order, until that piece has."""
        while self._host and self._ran[stream] < tick:
            ready = [
                s
                for s, pieces in self._pieces.items()
                if self._ran[s] < len(pieces) and all(self._ran[o] >= t for o, t in pieces[self._ran[s]].after)
            ]
            chosen = self._random.choice(ready)
            piece = self._pieces[chosen][self._ran[chosen]]
            piece.call()
            self._memory.check(piece.what)
            self._pieces[chosen][self._ran[chosen]] = None  # type: ignore[call-overload]
            self._ran[chosen] += 1


def _join(clock: dict[int, int], other: dict[int, int]) -> None:
    for stream, tick in other.items():
        clock[stream] = max(clock.get(stream, 0), tick)


def _range(array: np.ndarray) -> tuple[int, int]:
    return array.ctypes.data, array.ctypes.data + array.nbytes


def weight_bytes(launch: Launch) -> int:
    """From a group's address on: of gate_up the expert's first two matrices, of linear all up to its own."""
    numbers = [int(a) for a in launch.arguments if isinstance(a, (np.int32, np.int64))]
    if launch.kernel.startswith("gate_up"):
        hidden, intermediate, _ = numbers
        return 4 * hidden * intermediate
    offset, depth, features = numbers
    return 16 * offset + 2 * depth * (-(-features // 16) * 16)
