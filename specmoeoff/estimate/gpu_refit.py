"""Prices of a GPU machine's nodes moved to what windows of it measured: by kind, over the tokens a request brings."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from statistics import median
from typing import NamedTuple

import numpy as np

from specmoeoff.estimate.gpu_choices import Choices
from specmoeoff.estimate.gpu_window import GpuEstimator
from specmoeoff.estimate.rates import Scale


class Observed(NamedTuple):
    """Windows of one choice at a context: seconds of a node by kind."""

    choice: Choices
    context_tokens: float
    seconds: Mapping[str, float]


def refit(estimator: GpuEstimator, observed: Iterable[Observed]) -> GpuEstimator:
    """The estimator with every kind that was seen scaled by measured over predicted: the median at each number of tokens a request
    brings (draft length + 1), between those on a line, and beyond them as at the last."""
    ratios: defaultdict[str, defaultdict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    bare = replace(estimator, rates=replace(estimator.rates, scales={}))
    for one in observed:
        n_tokens = float(estimator.problem.of_draft(one.choice, "length")[0]) + 1
        prices = bare.prices(one.choice, np.array([one.context_tokens]))
        for kind, seconds in one.seconds.items():
            predicted = float(prices[kind][0]) if kind in prices else 0.0
            if seconds > 0 and predicted > 0:
                ratios[kind][n_tokens].append(seconds / predicted)
    scales = {
        kind: Scale(*zip(*sorted((n, median(r)) for n, r in by.items()), strict=True)) for kind, by in ratios.items()
    }
    return replace(estimator, rates=replace(estimator.rates, scales={**estimator.rates.scales, **scales}))
