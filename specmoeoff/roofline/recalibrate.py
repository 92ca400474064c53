"""The disk's and the compute's speed of the moment, in slices of a sixth of a second beside what is judged."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median

from specmoeoff.estimate.tables import find_table, has_table
from specmoeoff.roofline.probes.disk import SAMPLE_S, Reader
from specmoeoff.roofline.probes.operators import Bench, Pass
from specmoeoff.specs.model import ModelSpec
from specmoeoff.specs.profile import HardwareProfile
from specmoeoff.specs.record import Slice

FEW_ROWS, MANY_ROWS = (2, 4, 8), (48, 64, 96)  # around what costs.py takes for bound by memory, and by arithmetic
FEW_S, MANY_S = 0.03, 0.08
OPERATORS = ("layers.attention_block", "layers.experts")
OF_EARLY_PROFILES = ("attention_block", "experts")


def typical(slices: Sequence[Slice]) -> Slice:
    """The median of each: bursts of other guests of the machine lengthen some slices, nothing shortens one."""
    return Slice(
        disk_gb_per_s=median(s.disk_gb_per_s for s in slices),
        memory_scale=median(s.memory_scale for s in slices),
        compute_scale=median(s.compute_scale for s in slices),
    )


class Recalibrator:
    """Made once, with its own weights; `slice` measures, sizes taking turns: one alone would pass on what the profile is off by
    there. Raises BadInput where the profile has no operators of this model."""

    def __init__(self, profile: HardwareProfile, spec: ModelSpec, n_threads: int, disk_file: Path) -> None:
        where = spec.shape_key, n_threads
        names = OPERATORS if has_table(profile, OPERATORS[-1], *where) else OF_EARLY_PROFILES
        self._stored = {name: find_table(profile, name, *where) for name in names}
        bench, disk = Bench(spec, n_threads), profile.disk
        self._n_active = spec.n_active
        self._reader = Reader(disk_file, disk.n_readers if disk else 2, disk.chunk_bytes if disk else 1 << 20)
        self._passes = {rows: Pass(bench, rows) for rows in FEW_ROWS + MANY_ROWS}
        for one in self._passes.values():
            one.run(0.0)
        self.slices: list[Slice] = []

    def slice(self) -> Slice:
        """Measure now."""
        # Compute first: cores that waited for the disk are slow to come back.
        turn = len(self.slices)
        few = self._scale(FEW_ROWS[turn % len(FEW_ROWS)], FEW_S)
        many = self._scale(MANY_ROWS[turn % len(MANY_ROWS)], MANY_S)
        found = Slice(disk_gb_per_s=self._reader.read(SAMPLE_S) / 1e9, memory_scale=few, compute_scale=many)
        self.slices.append(found)
        return found

    def _scale(self, rows: int, seconds: float) -> float:
        """Seconds of a layer over those of the profile. A window is a sum: it feels the mean."""
        one = self._passes[rows]
        samples = (one.runs if OPERATORS[-1] in self._stored else one.layers)(seconds)
        now = stored = 0.0
        for name, table in self._stored.items():
            n = self._n_active if name.endswith("experts") else 1
            now += n * fmean(samples[name])
            stored += n * table(rows)
        return now / stored
