"""Windows in Chrome trace format, for chrome://tracing and Perfetto: one thread per lane, microseconds."""

import json
from collections.abc import Iterable
from typing import NamedTuple

from specmoeoff.estimate.simulate import Schedule
from specmoeoff.pipeline import Node


class Span(NamedTuple):
    """A node that ran from start_s to end_s."""

    node: Node
    start_s: float
    end_s: float
    label: str


def predicted_spans(schedule: Schedule) -> list[Span]:
    """What runs during the steady window, cut at its begin and end: read-ahead belongs to the window it happens in."""
    begin, end = schedule.span_s
    cut = (
        (n, max(a, begin), min(b, end))
        for n, a, b in zip(schedule.graph.nodes, schedule.start_s, schedule.end_s, strict=True)
    )
    return [Span(node, a - begin, b - begin, "predicted") for node, a, b in cut if b > a]


def chrome_trace(spans: Iterable[Span], origin_s: float = 0.0) -> str:
    """The file's text."""
    spans = list(spans)
    lanes = list(dict.fromkeys(span.node.lane for span in spans))
    names = [{"name": "thread_name", "ph": "M", "pid": 0, "tid": i, "args": {"name": n}} for i, n in enumerate(lanes)]
    events = [
        {
            "name": s.node.name,
            "cat": s.node.kind,
            "ph": "X",
            "pid": 0,
            "tid": lanes.index(s.node.lane),
            "ts": (s.start_s - origin_s) * 1e6,
            "dur": (s.end_s - s.start_s) * 1e6,
            "args": {"layer": s.node.layer, "rows": s.node.rows, "label": s.label},
        }
        for s in spans
    ]
    return json.dumps({"traceEvents": [*names, *events], "displayTimeUnit": "ms"})
