"""The disk's and the compute's speed of the moment, in slices of a fifth of a second beside what is judged."""

from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from specmoeoff.estimate.tables import OperatorTimes, find_table, has_table
from specmoeoff.roofline.probes.disk import SAMPLE_S, Reader
from specmoeoff.roofline.probes.operators import Bench, Pass
from specmoeoff.specs.model import ModelSpec
from specmoeoff.specs.profile import HardwareProfile
from specmoeoff.specs.record import Slice

FEW_ROWS, MANY_ROWS = (2, 4, 8), (48, 64, 96)  # around what costs.py takes for bound by memory, and by arithmetic
DRAFT_ROWS = (4, 8, 16)
FEW_S, MANY_S, DRAFT_S = 0.03, 0.08, 0.03
OPERATORS = ("layers.attention_block", "layers.experts")
OF_EARLY_PROFILES = ("attention_block", "experts")


class Stored(NamedTuple):
    """A model's passes by rows, and the profile's tables of what they measure: operators by how often a layer has them."""

    passes: dict[int, Pass]
    tables: list[tuple[str, int, OperatorTimes]]
    in_runs: bool

    def scale(self, rows: int, seconds: float) -> float:
        """Seconds of a layer over those of the profile. A window is a sum: it feels the mean."""
        one = self.passes[rows]
        samples = (one.runs if self.in_runs else one.layers)(seconds)
        now = sum(n * fmean(samples[name]) for name, n, _ in self.tables)
        return now / sum(n * table(rows) for _, n, table in self.tables)


class Recalibrator:
    """Made once, with its own weights; `slice` measures, sizes taking turns: one alone would pass on what the profile is off by
    there. Raises BadInput where the profile has no operators of these models."""

    def __init__(
        self, profile: HardwareProfile, spec: ModelSpec, draft: ModelSpec | None, n_threads: int, disk_file: Path
    ) -> None:
        disk = profile.disk
        self._reader = Reader(disk_file, disk.n_readers if disk else 2, disk.chunk_bytes if disk else 1 << 20)
        self._target = _stored(profile, spec, n_threads, FEW_ROWS + MANY_ROWS)
        self._draft = _stored(profile, draft, n_threads, DRAFT_ROWS) if draft else None
        self.slices: list[Slice] = []

    def slice(self) -> Slice:
        """Measure now."""
        turn = len(self.slices)

        def of(rows: tuple[int, ...]) -> int:
            return rows[turn % len(rows)]

        # Compute first: cores that waited for the disk are slow to come back.
        found = Slice(
            memory_scale=self._target.scale(of(FEW_ROWS), FEW_S),
            compute_scale=self._target.scale(of(MANY_ROWS), MANY_S),
            draft_scale=self._draft.scale(of(DRAFT_ROWS), DRAFT_S) if self._draft else None,
            disk_gb_per_s=self._reader.read(SAMPLE_S) / 1e9,
        )
        self.slices.append(found)
        return found


def _stored(profile: HardwareProfile, spec: ModelSpec, n_threads: int, sizes: tuple[int, ...]) -> Stored:
    where, bench = (spec.shape_key, n_threads), Bench(spec, n_threads)
    passes = {rows: Pass(bench, rows) for rows in sizes}
    for one in passes.values():
        one.run(0.0)
    in_runs = has_table(profile, OPERATORS[-1], *where)
    block, experts = OPERATORS if in_runs else OF_EARLY_PROFILES
    tables = [
        (block, 1, find_table(profile, block, *where)),
        (experts, spec.n_active, find_table(profile, experts, *where)),
    ]
    return Stored(passes, tables, in_runs)
