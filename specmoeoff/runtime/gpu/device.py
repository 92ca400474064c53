"""What the lanes need of a GPU: streams, events, memory, copies, kernels, and functions of the host in a stream's order."""

import gc
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np

from specmoeoff.errors import MissingCapability
from specmoeoff.kernels.cuda import KERNELS, enqueue, function
from specmoeoff.kernels.cuda.launches import Array, Launch

Stream = Any
Event = Any
NO_GPU = "no CUDA GPU answers here ({reason}); run on a machine with one, its driver and `pip install 'specmoeoff[cuda12]'` (or cuda13)."
WHICHEVER_WAY = 4  # cudaMemcpyDefault


class _Collection:
    """How many callers hold off the garbage collector."""

    lock, holders, was_enabled = threading.Lock(), 0, False


@contextmanager
def no_collection() -> Iterator[None]:
    """The driver's threads may call none of CUDA's functions, not even to free what some garbage owned: no collection begins there."""
    with _Collection.lock:
        if _Collection.holders == 0:
            _Collection.was_enabled = gc.isenabled()
            gc.disable()
        _Collection.holders += 1
    try:
        yield
    finally:
        with _Collection.lock:
            _Collection.holders -= 1
            if _Collection.holders == 0 and _Collection.was_enabled:
                gc.enable()


class Device(Protocol):
    """Everything on a stream happens in its order, and later than the call returns. Arrays are C-contiguous."""

    @property
    def memory_bytes(self) -> int:
        """Of GPU memory taken so far."""

    def stream(self) -> Stream:
        """A new one."""

    def record(self, stream: Stream) -> Event:
        """What is over when all that the stream was given so far is."""

    def wait(self, stream: Stream, event: Event) -> None:
        """What the stream is given from now on begins when the event is over."""

    def synchronize(self, event: Event) -> None:
        """The host waits. Raises what a host function raised."""

    def seconds(self, start: Event, end: Event) -> float:
        """Between two events that are over."""

    def empty(self, shape: tuple[int, ...], dtype: type) -> Array:
        """GPU memory."""

    def pinned(self, shape: tuple[int, ...], dtype: type) -> np.ndarray:
        """Host memory that GPU and host may both use."""

    def address(self, array: Array) -> int:
        """As kernels see it."""

    def put(self, to: Array, values: np.ndarray) -> None:
        """The host writes; it is written when the call returns."""

    def get(self, source: Array) -> np.ndarray:
        """The host reads: a copy."""

    def copy(self, stream: Stream, to: Array, source: Array) -> None:
        """Equal bytes between pinned and GPU memory, either way."""

    def launch(self, stream: Stream, launch: Launch) -> None:
        """A kernel; arrays may be pinned."""

    def host(
        self, stream: Stream, call: Callable[[], None], reads: Sequence[np.ndarray], writes: Sequence[np.ndarray]
    ) -> None:
        """A function of the host, which reads and writes these pinned arrays only."""


def find_gpu() -> Any:
    """CuPy, where it sees a GPU. Raises MissingCapability with the remedy."""
    try:
        import cupy

        cupy.cuda.runtime.getDeviceCount()
    except Exception as error:  # CuPy has its own kind for every failure of a driver
        raise MissingCapability(NO_GPU.format(reason=str(error).splitlines()[0])) from None
    return cupy


class CupyDevice:
    """The first CUDA GPU. Raises MissingCapability without one."""

    def __init__(self) -> None:
        self._cupy = find_gpu()
        self._runtime = self._cupy.cuda.runtime
        self._failure: BaseException | None = None
        self._pool = self._cupy.get_default_memory_pool()
        self._pool.free_all_blocks()  # what an engine before this one had
        # Now: a kernel that is loaded later waits for all streams, and so for host functions, which wait for this thread.
        for kernels in KERNELS.values():
            for kernel in kernels:
                _ = function(kernel).num_regs

    @property
    def memory_bytes(self) -> int:
        """See Device."""
        return int(self._pool.total_bytes())

    def stream(self) -> Stream:
        """See Device; apart from the default stream, which would order all."""
        return self._cupy.cuda.Stream(non_blocking=True)

    def record(self, stream: Stream) -> Event:
        """See Device. Whoever waits for it sleeps: the CPU's kernels want all cores."""
        return stream.record(self._cupy.cuda.Event(block=True))

    def wait(self, stream: Stream, event: Event) -> None:
        """See Device."""
        stream.wait_event(event)

    def synchronize(self, event: Event) -> None:
        """See Device."""
        event.synchronize()
        if self._failure:
            raise self._failure

    def seconds(self, start: Event, end: Event) -> float:
        """See Device."""
        return float(self._cupy.cuda.get_elapsed_time(start, end)) / 1e3

    def empty(self, shape: tuple[int, ...], dtype: type) -> Array:
        """See Device."""
        return self._cupy.empty(shape, dtype)

    def pinned(self, shape: tuple[int, ...], dtype: type) -> np.ndarray:
        """See Device."""
        n, cuda = int(np.prod(shape)), self._cupy.cuda
        # Not from CuPy's pool, which rounds up to powers of two and gives nothing back.
        memory = cuda.PinnedMemoryPointer(cuda.PinnedMemory(max(1, n * np.dtype(dtype).itemsize)), 0)
        return np.frombuffer(memory, dtype, n).reshape(shape)

    def address(self, array: Array) -> int:
        """See Device."""
        return int(array.ctypes.data if isinstance(array, np.ndarray) else array.data.ptr)

    def put(self, to: Array, values: np.ndarray) -> None:
        """See Device."""
        if isinstance(to, np.ndarray):
            to[...] = values
        else:
            to.set(np.ascontiguousarray(values, to.dtype).reshape(to.shape))
            self._runtime.deviceSynchronize()  # our streams do not wait for the default one

    def get(self, source: Array) -> np.ndarray:
        """See Device."""
        return source.copy() if isinstance(source, np.ndarray) else source.get()

    def copy(self, stream: Stream, to: Array, source: Array) -> None:
        """See Device."""
        self._runtime.memcpyAsync(self.address(to), self.address(source), source.nbytes, WHICHEVER_WAY, stream.ptr)

    def launch(self, stream: Stream, launch: Launch) -> None:
        """See Device."""
        pointers = [np.uint64(self.address(a)) if isinstance(a, np.ndarray) else a for a in launch.arguments]
        with stream:
            enqueue(launch._replace(arguments=tuple(pointers)))

    def host(
        self, stream: Stream, call: Callable[[], None], reads: Sequence[np.ndarray], writes: Sequence[np.ndarray]
    ) -> None:
        """See Device."""

        def guarded(_: object) -> None:
            try:
                if self._failure is None:
                    with no_collection():
                        call()
            except BaseException as error:  # nobody would see it on the driver's thread
                self._failure = error

        stream.launch_host_func(guarded, None)
