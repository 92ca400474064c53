"""The disk's and the compute's speed of the moment, in slices of a tenth of a second beside what is judged."""

from collections.abc import Sequence
from pathlib import Path
from statistics import median

from specmoeoff.errors import BadInput
from specmoeoff.roofline.probes.disk import SAMPLE_S, Reader
from specmoeoff.roofline.probes.operators import Bench, Pass
from specmoeoff.specs.model import ModelSpec
from specmoeoff.specs.profile import HardwareProfile
from specmoeoff.specs.record import Slice

FEW_ROWS, MANY_ROWS = 4, 64  # bound by memory, and by arithmetic
PASS_S = {FEW_ROWS: 0.025, MANY_ROWS: 0.03}
OPERATORS = ("attention_block", "expert", "experts")


def typical(slices: Sequence[Slice]) -> Slice:
    """The median of each: bursts of other guests of the machine lengthen some slices, nothing shortens one."""
    return Slice(
        disk_gb_per_s=median(s.disk_gb_per_s for s in slices),
        memory_scale=median(s.memory_scale for s in slices),
        compute_scale=median(s.compute_scale for s in slices),
    )


class Recalibrator:
    """Made once, with its own weights; `slice` measures."""

    def __init__(self, profile: HardwareProfile, spec: ModelSpec, n_threads: int, disk_file: Path) -> None:
        tables = {(t.operator, t.shape, t.n_threads): t for t in profile.operators}
        try:
            self._stored = {name: tables[name, spec.shape_key, n_threads] for name in OPERATORS}
        except KeyError:
            raise BadInput(
                f"profile {profile.name} holds no operators of this model with {n_threads} threads; "
                "run `specmoeoff profile --model`."
            ) from None
        bench, disk = Bench(spec, n_threads), profile.disk
        self._reader = Reader(disk_file, disk.n_readers if disk else 2, disk.chunk_bytes if disk else 1 << 20)
        self._passes = {rows: Pass(bench, rows) for rows in (FEW_ROWS, MANY_ROWS)}
        for one in self._passes.values():
            one.layers(0.0)
        self.slices: list[Slice] = []

    def slice(self) -> Slice:
        """Measure now."""
        # Compute first: cores that waited for the disk are slow to come back.
        few, many = (self._scale(rows) for rows in (FEW_ROWS, MANY_ROWS))
        found = Slice(disk_gb_per_s=self._reader.read(SAMPLE_S) / 1e9, memory_scale=few, compute_scale=many)
        self.slices.append(found)
        return found

    def _scale(self, rows: int) -> float:
        samples = self._passes[rows].layers(PASS_S[rows])
        ratios = []
        for name, table in self._stored.items():
            ratios.append(median(samples[name]) / table.seconds[table.grid[0].index(rows)])
        return median(ratios)
