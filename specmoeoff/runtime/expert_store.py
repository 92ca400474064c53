"""Experts on disk, some resident, the others streamed through slots of a fixed budget.

Readers take chunks of the most urgent load: by window, then layer, demand before prefetch. A load takes a slot when it
starts and keeps it until its expert was computed. Reads are O_DIRECT into aligned slots: the page cache is never a tier.
"""

import hashlib
import heapq
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from specmoeoff.errors import BadInput, MissingCapability
from specmoeoff.kernels.cpu import aligned_empty

PENDING, ACTIVE, DONE, DROPPED = range(4)
ALIGNMENT = 4096
# waits before reading again what could not be read
RETRY_S = (0.01, 0.05, 0.2)


class TokenBucket:
    """Grants bytes at a rate. Unused time is forfeited but for a short burst, which absorbs late wake-ups."""

    def __init__(self, gb_per_s: float | None, burst_s: float = 0.004) -> None:
        self.gb_per_s = gb_per_s
        self._burst_s = burst_s
        self._next_s = 0.0
        self._lock = threading.Lock()

    def take(self, n_bytes: int) -> None:
        """Wait until `n_bytes` may be read."""
        if self.gb_per_s is None:
            return
        with self._lock:
            start = max(self._next_s, time.perf_counter() - self._burst_s)
            self._next_s = start + n_bytes / (self.gb_per_s * 1e9)
            wait_s = self._next_s - time.perf_counter()
        if wait_s > 0:
            time.sleep(wait_s)


@dataclass(eq=False)
class Load:
    """One expert on its way. Times are seconds of time.perf_counter. With an `error` its slot holds anything."""

    window: int
    layer: int
    expert: int
    demand: bool
    state: int = PENDING
    slot: int = -1
    next_chunk: int = 0
    chunks_left: int = 0
    start_s: float = 0.0
    end_s: float = 0.0
    error: Exception | None = None


@dataclass
class _Lane:
    """What the readers share; guarded by the store's condition."""

    pending: list[tuple[int, int, bool, int, Load]] = field(default_factory=list)
    active: list[Load] = field(default_factory=list)
    free_slots: list[int] = field(default_factory=list)
    current: tuple[int, int] = (0, 0)
    sequence: int = 0
    error: BaseException | None = None
    closed: bool = False


class ExpertStore:
    """`experts[layer, expert]` of one packed file within `n_slots` slots of memory.

    `sha256` by layer and expert: what every expert is compared with the first time it is read.
    """

    def __init__(
        self,
        path: Path,
        n_experts: int,
        stride: int,
        n_slots: int,
        n_readers: int,
        chunk_bytes: int,
        disk_limit_gb_per_s: float | None = None,
        expert_bytes: int | None = None,
        sha256: Sequence[Sequence[str]] | None = None,
        first_layer: int = 0,
    ) -> None:
        self._sha256 = sha256
        self._checked: set[tuple[int, int]] = set()
        self._path, self._n_experts, self.stride, self._first_layer = path, n_experts, stride, first_layer
        self._expert_bytes = expert_bytes or stride
        self._chunk_bytes = max(ALIGNMENT, chunk_bytes // ALIGNMENT * ALIGNMENT)
        self._n_chunks = -(-stride // self._chunk_bytes)
        self.bucket = TokenBucket(disk_limit_gb_per_s)
        self.bytes_planned = 0
        self._busy_s = 0.0
        self._busy_since_s = 0.0
        self.resident: dict[tuple[int, int], int] = {}
        self.demand_reserve = 0
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
        except OSError as error:
            raise MissingCapability(
                f"{path}: this file system does not allow O_DIRECT reads ({error.strerror}); "
                "set SPECMOEOFF_CACHE to a folder on a local disk."
            ) from None
        self._arena = aligned_empty(n_slots * stride).reshape(n_slots, stride)
        self._lane = _Lane(free_slots=list(range(n_slots)))
        self._stream_slots = n_slots
        # Two conditions of one lock: an arrival wakes who computes and no reader that has nothing to read.
        lock = threading.RLock()
        self._change, self._arrived = threading.Condition(lock), threading.Condition(lock)
        self._readers = [
            threading.Thread(target=self._read_loop, name=f"disk-{i}", daemon=True) for i in range(n_readers)
        ]
        for reader in self._readers:
            reader.start()

    @property
    def n_slots(self) -> int:
        return len(self._arena)

    @property
    def busy_s(self) -> float:
        """Seconds in which at least one read was on its way, the current one included."""
        with self._change:
            running = time.perf_counter() - self._busy_since_s if self._lane.active else 0.0
            return self._busy_s + running

    def packed(self, slot: int) -> np.ndarray:
        """The packed expert in a slot, (expert_bytes,) uint8."""
        return self._arena[slot, : self._expert_bytes]

    def hold(self, resident: Sequence[Sequence[int]], stream_slots: int, demand_reserve: int) -> None:
        """Make exactly these experts resident (by layer); `stream_slots` more slots are for streaming, the rest idle."""
        wanted = {(layer, expert) for layer, experts in enumerate(resident) for expert in experts}
        if len(wanted) + stream_slots > self.n_slots:
            raise BadInput(
                f"{len(wanted)} resident experts and {stream_slots} stream slots exceed {self.n_slots} slots."
            )
        self.quiesce()
        self.enter(0, -1)  # windows are counted anew: whatever comes is ahead
        self.resident = {key: slot for key, slot in self.resident.items() if key in wanted}
        self._free_all_but_resident(self.n_slots)
        self.demand_reserve = 0
        missing = sorted(wanted - set(self.resident))
        loads = [load for layer, expert in missing for load in self.request(-1, layer, [expert], demand=False)]
        for load in loads:
            self.wait_any([load])
            if load.error:
                raise load.error
            self.resident[load.layer, load.expert] = load.slot
        self._free_all_but_resident(stream_slots)
        self.demand_reserve = demand_reserve

    def quiesce(self) -> None:
        """Forget what is queued, let what is being read arrive, and free its slots."""
        with self._change:
            for *_, load in self._lane.pending:
                load.state = DROPPED
            self._lane.pending.clear()
            while self._lane.active and not self._lane.error:
                self._arrived.wait()
        self._free_all_but_resident(self._stream_slots)

    def _free_all_but_resident(self, stream_slots: int) -> None:
        self._stream_slots = stream_slots
        held = set(self.resident.values())
        with self._change:
            self._lane.free_slots = [slot for slot in range(self.n_slots) if slot not in held][:stream_slots]
            self._change.notify_all()

    def request(self, window: int, layer: int, experts: Sequence[int], demand: bool) -> list[Load]:
        """Queue loads; readers begin at once if slots allow."""
        loads = [Load(window, layer, expert, demand) for expert in experts]
        with self._change:
            for load in loads:
                self._push(load)
            self._wake_readers()
        return loads

    def enter(self, window: int, layer: int) -> None:
        """Compute has reached this layer: its loads may now take the reserved slots."""
        with self._change:
            self._lane.current = (window, layer)
            self._wake_readers()

    def drop(self, load: Load) -> None:
        """This load's expert is not used: forget it, or free its slot once read."""
        with self._change:
            if load.state == DONE:
                self._lane.free_slots.append(load.slot)
            load.state = DROPPED
            self._wake_readers()

    def release(self, load: Load) -> None:
        """The expert was computed; its slot is free."""
        with self._change:
            self._lane.free_slots.append(load.slot)
            self._wake_readers()

    def wait_any(self, loads: Sequence[Load]) -> Load:
        """The first of `loads` that has arrived or failed, in their order."""
        with self._change:
            while True:
                if self._lane.error:
                    raise self._lane.error
                for load in loads:
                    if load.state == DONE:
                        return load
                self._arrived.wait()

    def close(self) -> None:
        """Stop the readers and close the file."""
        with self._change:
            self._lane.closed = True
            self._change.notify_all()
            # Ctrl-C may come between a lock's taking and its block, and leave it held: waiting gives it up all the same.
            while any(reader.is_alive() for reader in self._readers):
                self._change.wait(0.01)
        os.close(self._descriptor)

    def _wake_readers(self) -> None:
        """Not for nothing: every one that wakes takes the lock, and Python, from the thread that computes."""
        if self._lane.pending:
            self._change.notify_all()

    def _push(self, load: Load) -> None:
        lane = self._lane
        heapq.heappush(lane.pending, (load.window, load.layer, not load.demand, lane.sequence, load))
        lane.sequence += 1

    def _begin_next(self) -> bool:
        """Move the most urgent load that may have a slot from pending to active."""
        lane = self._lane
        while lane.pending and lane.pending[0][-1].state == DROPPED:
            heapq.heappop(lane.pending)
        if not lane.pending:
            return False
        load = lane.pending[0][-1]
        ahead = (load.window, load.layer) > lane.current
        if len(lane.free_slots) <= (self.demand_reserve if ahead else 0):
            return False
        heapq.heappop(lane.pending)
        load.slot, load.state, load.chunks_left = lane.free_slots.pop(), ACTIVE, self._n_chunks
        load.start_s = time.perf_counter()
        if not lane.active:
            self._busy_since_s = load.start_s
        lane.active.append(load)
        return True

    def _next_chunk(self) -> tuple[Load, int] | None:
        """The next chunk to read, or None when the store closes."""
        with self._change:
            while True:
                if self._lane.closed:
                    return None
                for load in self._lane.active:
                    if load.next_chunk < self._n_chunks:
                        load.next_chunk += 1
                        return load, load.next_chunk - 1
                if not self._begin_next():
                    self._change.wait()

    def _finish_chunk(self, load: Load) -> None:
        with self._change:
            load.chunks_left -= 1
            if load.chunks_left:
                return
        self._check(load)
        with self._change:
            load.end_s = time.perf_counter()
            self.bytes_planned += self.stride
            self._lane.active.remove(load)
            if not self._lane.active:
                self._busy_s += load.end_s - self._busy_since_s
            if load.state == DROPPED:
                self._lane.free_slots.append(load.slot)
                self._wake_readers()
            else:
                load.state = DONE
            self._arrived.notify_all()

    def _check(self, load: Load) -> None:
        """Compare with the checksum once; what is read later passed it here or in another slot."""
        key = load.layer, load.expert
        if load.error or self._sha256 is None or key in self._checked:
            return
        if (
            hashlib.sha256(self._arena[load.slot].data).hexdigest()
            == self._sha256[load.layer - self._first_layer][load.expert]
        ):
            self._checked.add(key)
        else:
            load.error = self._unreadable(load, "differs from what was packed")

    def _unreadable(self, load: Load, reason: str) -> BadInput:
        return BadInput(
            f"{self._path}: expert {load.expert} of layer {load.layer} {reason}; check the disk, then delete the folder "
            f"{self._path.parent}: it will be packed anew."
        )

    def _read_loop(self) -> None:
        while (work := self._next_chunk()) is not None:
            try:
                self._read_chunk(*work)
                self._finish_chunk(work[0])
            except BaseException as error:
                self._fail(error)
                return

    def _fail(self, error: BaseException) -> None:
        with self._change:
            self._lane.error = error
            self._arrived.notify_all()

    def _read_chunk(self, load: Load, chunk: int) -> None:
        first = chunk * self._chunk_bytes
        view = memoryview(self._arena[load.slot])[first : first + self._chunk_bytes]
        offset = ((load.layer - self._first_layer) * self._n_experts + load.expert) * self.stride + first
        self.bucket.take(len(view))
        waits = iter(RETRY_S)
        while view and not load.error:
            try:
                # whole blocks only: O_DIRECT goes on nowhere else
                n_read = os.preadv(self._descriptor, [view], offset) // ALIGNMENT * ALIGNMENT
                reason = "is cut short"
            except OSError as error:
                n_read, reason = 0, f"cannot be read ({error.strerror})"
            view, offset = view[n_read:], offset + n_read
            if not n_read:
                wait_s = next(waits, None)
                if wait_s is None:
                    load.error = self._unreadable(load, reason)
                else:
                    time.sleep(wait_s)
