"""Piecewise-linear reading of measured operator tables. Outside what was measured there is an error, not a number."""

import bisect
import math
from collections.abc import Callable
from functools import cached_property

import numpy as np

from specmoeoff.errors import BadInput
from specmoeoff.specs.model import ModelSpec
from specmoeoff.specs.profile import HardwareProfile, OperatorTable

GROUP = 4  # experts that `experts` computes in one call


def layer_operators(spec: ModelSpec, layer: int) -> tuple[str, str]:
    """Names of a layer's attention block and of what a context adds to it: first layers with a dense block in place of experts
    and layers that see a window only have tables of their own."""
    block = "dense_block" if layer < spec.n_dense_layers else "attention_block"
    return block, "window_attention" if spec.window_of(layer) else "attention"


class OutOfRange(BadInput):
    """A size beyond what was measured."""


class OperatorTimes:
    """Seconds of one operator by one or two sizes, while the disk runs at this share of its full speed: it takes that
    share of memory bus and cores."""

    def __init__(self, table: OperatorTable, disk_share: float = 0.0) -> None:
        self._table = table
        slowdowns = [
            (math.log(s.size), disk_share * max(0.0, s.ratio.value - 1.0)) for s in table.beside if s.lane == "disk"
        ]
        self._slowdown = slowdowns if disk_share else []

    @cached_property
    def _rows(self) -> list[tuple[float, ...]]:
        width = len(self._table.grid[-1])
        return [tuple(self._table.seconds[i : i + width]) for i in range(0, len(self._table.seconds), width)]

    def __call__(self, *sizes: float) -> float:
        """Seconds at these sizes. Raises OutOfRange."""
        return self._alone(*sizes) * (1.0 + self._longer(sizes[0]))

    def _longer(self, size: float) -> float:
        """By what share beside the disk: between the sizes measured on their logarithm, beyond them as at the nearest."""
        if not self._slowdown:
            return 0.0
        sizes, longer = zip(*self._slowdown, strict=True)
        return float(np.interp(math.log(max(size, 1.0)), sizes, longer))

    def _alone(self, *sizes: float) -> float:
        grid = self._table.grid
        if len(sizes) == 1:
            low, share = self._bracket(0, sizes[0])
            values = self._table.seconds
            return values[low] + share * (values[min(low + 1, len(grid[0]) - 1)] - values[low])
        low, share = self._bracket(0, sizes[0])
        column, column_share = self._bracket(1, sizes[1])
        last = len(grid[1]) - 1

        def along(row: tuple[float, ...]) -> float:
            return row[column] + column_share * (row[min(column + 1, last)] - row[column])

        here, there = along(self._rows[low]), along(self._rows[min(low + 1, len(grid[0]) - 1)])
        return here + share * (there - here)

    def _bracket(self, axis: int, size: float) -> tuple[int, float]:
        points = self._table.grid[axis]
        if size < points[0] and axis == 1:
            return 0, 0.0  # a context shorter than the shortest measured costs no more than that
        if size > points[-1] or size < 0:
            raise OutOfRange(
                f"operator {self._table.operator}: {self._table.axes[axis]} = {size:g} is outside the measured "
                f"{points[0]:g} to {points[-1]:g}; choose a smaller batch, draft or context."
            )
        if size < points[0]:
            return 0, 0.0
        low = min(bisect.bisect_right(points, size) - 1, len(points) - 1)
        high = min(low + 1, len(points) - 1)
        return low, 0.0 if high == low else (size - points[low]) / (points[high] - points[low])


def find_table(
    profile: HardwareProfile, operator: str, shape: str, n_threads: int, disk_share: float = 0.0
) -> OperatorTimes:
    """The table of an operator at a model's shape, or a sentence saying how to get it."""
    for table in profile.operators:
        if (table.operator, table.shape, table.n_threads) == (operator, shape, n_threads):
            return OperatorTimes(table, disk_share)
    raise BadInput(
        f"profile {profile.name}: operator {operator} was not measured at shape {shape} with {n_threads} threads; "
        "run `specmoeoff profile --model` with this model."
    )


def has_table(profile: HardwareProfile, operator: str, shape: str, n_threads: int) -> bool:
    """Whether an operator was measured at a model's shape."""
    return any((t.operator, t.shape, t.n_threads) == (operator, shape, n_threads) for t in profile.operators)


def wake_s(profile: HardwareProfile, shape: str, n_threads: int) -> Callable[[float], float]:
    """What the first operator after a wait of so many seconds takes longer; nothing where that was not measured."""
    for table in profile.operators:
        if (table.operator, table.shape, table.n_threads) == ("wake", shape, n_threads):
            waits, longer = (0.0, *table.grid[0]), (0.0, *table.seconds)
            return lambda wait_s: float(np.interp(wait_s, waits, longer))
    return lambda wait_s: 0.0


def thread_counts(profile: HardwareProfile, shape: str) -> list[int]:
    """Thread counts for which this shape was measured, most first."""
    return sorted({t.n_threads for t in profile.operators if t.shape == shape}, reverse=True)
