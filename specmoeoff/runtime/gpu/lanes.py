"""The lanes of a graph on a device: a stream for each, and of the waits its edges ask for only those that nothing implies."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

from specmoeoff.pipeline import Lane, Node
from specmoeoff.runtime.gpu.device import Device, Event, Stream

LANES: tuple[Lane, ...] = ("gpu", "cpu", "h2d", "d2h")
HOST = "host"  # knows of lanes what it waited for
KEPT_NODES = 1 << 14  # an edge reaches back one window at the most

Clock = dict[str, int]  # of every lane, how many pieces of work have ended
Work = Callable[[Stream], None]


class End(NamedTuple):
    """Of a piece of work: when it began (if that is wanted) and ended, and what had ended by then."""

    start: Event | None
    event: Event
    clock: Clock


class Lanes:
    """Give it nodes in the graph's order. The `cpu` lane is a stream too, whose work is functions of the host."""

    def __init__(self, device: Device, timed: bool = False) -> None:
        self.device, self.timed = device, timed
        self.alone = False  # every node begins when all others are over, so that its time is its own
        self.streams = {lane: device.stream() for lane in LANES}
        self._before: dict[str, Clock] = {lane: dict.fromkeys(LANES, 0) for lane in (*LANES, HOST)}
        self._ends: dict[tuple[str, int], End] = {}
        self._done: dict[int, Clock] = {}
        self._last: dict[int, tuple[str, int]] = {}

    def run(self, node: Node, work: Work | None) -> None:
        """Enqueue a node; without work it is over when what it depends on is."""
        need = _latest(self._done[dep] for dep in node.deps)
        if work is not None:
            need = self._enqueue(node.lane, need, work)
            self._last[node.index] = node.lane, need[node.lane]
            if self.alone:
                self.drain()
        self._done[node.index] = need
        for old in (self._done, self._last):
            old.pop(node.index - KEPT_NODES, None)

    def synchronize(self, index: int) -> None:
        """The host waits for a node's work, unless there was none or it is known to be over."""
        lane, tick = self._last.get(index, (HOST, 0))
        if self._before[HOST].get(lane, 0) < tick:
            end = self._ends[lane, tick]
            self.device.synchronize(end.event)
            self._before[HOST] = _latest([self._before[HOST], end.clock])

    def drain(self) -> None:
        """The host waits for everything."""
        for stream in self.streams.values():
            self.device.synchronize(self.device.record(stream))

    def seconds(self, node: Node) -> float:
        """Of a node that is over, where lanes are timed; 0 without work."""
        if node.index not in self._last:
            return 0.0
        end = self._ends[self._last[node.index]]
        return self.device.seconds(end.start, end.event)

    def _enqueue(self, lane: Lane, need: Clock, work: Work) -> Clock:
        before, stream = self._before[lane], self.streams[lane]
        before.update(
            _latest([before, self._before[HOST]])
        )  # what is enqueued now begins after what the host waited for
        late = [(other, tick) for other, tick in need.items() if tick > before[other]]
        for other, tick in late:
            clocks = [self._ends[end].clock for end in late if end != (other, tick)]
            if all(clock[other] < tick for clock in clocks):
                self.device.wait(stream, self._ends[other, tick].event)
        before.update(_latest([before, *(self._ends[end].clock for end in late)]))
        start = self.device.record(stream) if self.timed else None
        work(stream)
        before[lane] += 1
        clock = dict(before)
        self._ends[lane, before[lane]] = End(start, self.device.record(stream), clock)
        self._ends.pop((lane, before[lane] - KEPT_NODES), None)
        return clock


def _latest(clocks: Iterable[Clock]) -> Clock:
    merged: Clock = dict.fromkeys(LANES, 0)
    for clock in clocks:
        for lane, tick in clock.items():
            merged[lane] = max(merged[lane], tick)
    return merged
