"""Times of the nodes of one window, as they run."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

from specmoeoff.pipeline import Builder, Node


class Trace:
    """The graph of the window at hand with the start and end of every node executed so far."""

    def __init__(self, stream_slots: int = 0) -> None:
        self.builder = Builder(stream_slots)
        self.start_s = time.perf_counter()
        self.times: dict[int, tuple[float, float]] = {}
        self.phases_s: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def run(self, node: Node) -> Iterator[None]:
        """Time a node of the compute lane."""
        start_s = time.perf_counter()
        yield
        self.note(node, start_s, time.perf_counter())

    def note(self, node: Node, start_s: float, end_s: float) -> None:
        """A node ran from start_s to end_s."""
        self.times[node.index] = (start_s, end_s)
        if node.lane == "cpu":
            self.phases_s[node.kind] += end_s - start_s
