"""Prices of a GPU machine's nodes moved to what windows of it measured: by kind, over the tokens a request brings."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from statistics import median
from typing import NamedTuple

import numpy as np

from specmoeoff.errors import BadInput
from specmoeoff.estimate.gpu_choices import Choices
from specmoeoff.estimate.gpu_window import GpuEstimator
from specmoeoff.estimate.rates import Scale
from specmoeoff.specs.profile import HardwareProfile
from specmoeoff.specs.record import RunRecord


class Observed(NamedTuple):
    """A window of one choice at a context: seconds of a node by kind, and of the whole where it was one of many in a row."""

    choice: Choices
    context_tokens: float
    seconds: Mapping[str, float]
    window_s: float | None = None


Ratios = Iterable[tuple[str, float, float]]  # kind of node, tokens a request brings, measured over predicted seconds


def refit(estimator: GpuEstimator, observed: Sequence[Observed]) -> GpuEstimator:
    """The estimator with every kind that was seen at what it took, and windows longer than their nodes' period as they were."""
    bare = replace(estimator, rates=replace(estimator.rates, scales={}))

    def ratios() -> Iterator[tuple[str, float, float]]:
        for one in observed:
            n_tokens = float(estimator.problem.of_draft(one.choice, "length")[0]) + 1
            prices = bare.prices(one.choice, np.array([one.context_tokens]))
            for kind, seconds in one.seconds.items():
                if kind in prices and seconds > 0 and prices[kind][0] > 0:
                    yield kind, n_tokens, seconds / float(prices[kind][0])

    longer = [one.window_s / bare.period_s(one.choice, one.seconds) for one in observed if one.window_s is not None]
    hand_over = median(longer) if longer else estimator.rates.hand_over
    scales = {**estimator.rates.scales, **_scales(ratios())}
    return replace(estimator, rates=replace(estimator.rates, scales=scales, hand_over=hand_over))


def recorded_scales(profile: HardwareProfile, record: RunRecord) -> dict[str, Scale]:
    """Of a validation on this machine. Raises BadInput for a record that has no such nodes, or is of another machine."""
    if not record.nodes:
        raise BadInput("--calibrate: the record has no times of a GPU's nodes; make it with `specmoeoff validate -o`.")
    if record.machine_fingerprint != profile.machine.fingerprint:
        raise BadInput(f"--calibrate: the record is of another machine than profile {profile.name}; validate on it.")
    return _scales((n.kind, n.draft_length + 1.0, n.measured_s / n.predicted_s) for n in record.nodes)


def _scales(ratios: Ratios) -> dict[str, Scale]:
    """By kind the median at each number of tokens; between those on a line, beyond them as at the last."""
    found: defaultdict[str, defaultdict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for kind, n_tokens, ratio in ratios:
        found[kind][n_tokens].append(ratio)
    return {
        kind: Scale(*zip(*sorted((n, median(r)) for n, r in by.items()), strict=True)) for kind, by in found.items()
    }
