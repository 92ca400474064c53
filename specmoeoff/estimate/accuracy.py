"""How right predictions were: bias, which a refit removes, apart from scatter, which it cannot."""

from collections.abc import Sequence
from statistics import fmean
from typing import NamedTuple

import numpy as np

from specmoeoff.specs.plan import Plan
from specmoeoff.specs.record import RunRecord

FEW = 5  # below this many pairs a correlation says nothing


class Accuracy(NamedTuple):
    """Of predictions against measurements of the same quantity; errors are predicted / measured - 1.

    bias: geometric mean of the ratios - 1; scatter: mean absolute error once the bias is divided out; pearson_r and
    rank_r (Spearman): None below three pairs or where one side does not vary.
    """

    name: str
    n: int
    mean_error: float
    mape: float
    largest: float
    bias: float
    scatter: float
    pearson_r: float | None
    rank_r: float | None

    @property
    def verdict(self) -> str:
        """Which of the two is the larger part."""
        return "bias" if abs(self.bias) > self.scatter else "scatter"


def accuracy(name: str, predicted: Sequence[float], measured: Sequence[float]) -> Accuracy:
    """Both of equal length, above 0."""
    from scipy.stats import rankdata

    p, m = np.asarray(predicted, float), np.asarray(measured, float)
    errors = p / m - 1.0
    ratio = float(np.exp(np.log(p / m).mean()))
    return Accuracy(
        name,
        len(p),
        float(errors.mean()),
        float(np.abs(errors).mean()),
        float(np.abs(errors).max()),
        ratio - 1.0,
        float(np.abs(p / ratio / m - 1.0).mean()),
        _correlation(p, m),
        _correlation(rankdata(p), rankdata(m)),
    )


def _correlation(a: np.ndarray, b: np.ndarray) -> float | None:
    return float(np.corrcoef(a, b)[0, 1]) if len(a) > 2 and np.ptp(a) and np.ptp(b) else None


def top_n_recall(predicted: Sequence[float], measured: Sequence[float], n: int) -> float:
    """Share of the n highest measured that are among the n highest predicted."""
    best = [set(np.argsort(-np.asarray(values), kind="stable")[:n].tolist()) for values in (predicted, measured)]
    return len(best[0] & best[1]) / n


class Report(NamedTuple):
    """`rows`: end to end, then by kind of node. `recall`: of the two best draft lengths, None where fewer than three are known
    on both sides. `limitations`: what this cannot tell, one sentence each."""

    rows: tuple[Accuracy, ...]
    recall: float | None
    limitations: tuple[str, ...]


def report(record: RunRecord, plan: Plan | None = None) -> Report:
    """Of a validation: windows end to end by where the prediction came from, the nodes of its timeline by kind, and, with
    the plan, throughput over draft length."""
    rows, limitations = [], ["One machine, one model, the prompts of one validation."]
    for provenance in dict.fromkeys(c.provenance for c in record.comparisons if c.provenance.startswith("predicted")):
        known = [c for c in record.comparisons if c.provenance == provenance]
        rows.append(accuracy(f"window, {provenance}", [c.predicted for c in known], [c.measured for c in known]))
    rows += [accuracy(kind, *map(list, zip(*pairs, strict=True))) for kind, pairs in node_pairs(record).items()]
    if not (record.timeline_predicted or record.nodes):
        limitations.append("The record holds no timeline: kinds of nodes cannot be told apart.")
    curve = {c.draft_length: c.prediction.tokens_per_s for c in plan.curve} if plan else {}
    swept = [s for s in record.sweep if s.draft_length in curve]
    recall = None
    if len(swept) > 2:
        sides = [curve[s.draft_length] for s in swept], [s.tokens_per_s for s in swept]
        rows.append(accuracy("throughput over draft length", *sides))
        recall = top_n_recall(*sides, 2)
        limitations.append(
            "Throughput is predicted for the best plan of each length, measured under the tuned placement."
        )
    few = [r.name for r in rows if r.n < FEW]
    if few:
        limitations.append(f"Fewer than {FEW} pairs: {'; '.join(few)}.")
    return Report(tuple(rows), recall, tuple(limitations))


def node_pairs(record: RunRecord) -> dict[str, list[tuple[float, float]]]:
    """By kind on the compute lane, (predicted, measured) seconds of the nodes of each layer and of each draft step.

    Which experts a window uses is chance, so a layer's are summed.
    """
    if record.nodes:  # of a machine with a GPU: means over windows
        return {
            kind: [(n.predicted_s, n.measured_s) for n in record.nodes if n.kind == kind]
            for kind in dict.fromkeys(n.kind for n in record.nodes)
        }
    sides = []
    for events in (record.timeline_predicted, record.timeline_measured):
        spent: dict[tuple[str, str], float] = {}
        for event in events:
            if event.lane != "disk":
                kind = "experts" if event.kind == "expert" else event.kind
                key = kind, event.name if event.layer < 0 else str(event.layer)
                spent[key] = spent.get(key, 0.0) + event.end_s - event.start_s
        sides.append(spent)
    pairs: dict[str, list[tuple[float, float]]] = {}
    for key, predicted in sides[0].items():
        if predicted > 0 and sides[1].get(key, 0.0) > 0:
            pairs.setdefault(key[0], []).append((predicted, sides[1][key]))
    return pairs


def kind_ratios(record: RunRecord) -> dict[str, float]:
    """By kind, measured over predicted seconds of all its nodes together."""
    return {kind: fmean(m for _, m in pairs) / fmean(p for p, _ in pairs) for kind, pairs in node_pairs(record).items()}
