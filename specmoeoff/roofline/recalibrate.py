"""Two seconds of measuring just before a prediction is judged: the disk's and the compute's speed of the moment."""

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from specmoeoff.errors import BadInput
from specmoeoff.roofline.probes.disk import Reader
from specmoeoff.roofline.probes.operators import Bench, spread
from specmoeoff.roofline.timing import seconds_of
from specmoeoff.specs.model import ModelSpec
from specmoeoff.specs.profile import HardwareProfile

PROBE_ROWS = (16, 128)


@dataclass(frozen=True)
class Recalibration:
    """disk_samples_gb_per_s: uncapped. compute_scale: operator times now over the profile's."""

    disk_samples_gb_per_s: tuple[float, ...]
    compute_scale: float
    seconds: float

    @property
    def disk_gb_per_s(self) -> float:
        """The disk's speed of the moment."""
        return float(np.median(self.disk_samples_gb_per_s))


def recalibrate(
    profile: HardwareProfile,
    spec: ModelSpec,
    n_threads: int,
    disk_file: Path,
    seconds: float = 2.0,
) -> Recalibration:
    """Measure for at most about `seconds`, making the probes' weights not counted."""
    tables = {(t.operator, t.shape, t.n_threads): t for t in profile.operators}
    try:
        stored = {name: tables[name, spec.shape_key, n_threads] for name in ("expert", "attention_block")}
    except KeyError:
        raise BadInput(
            f"profile {profile.name} holds no operators of this model with {n_threads} threads; "
            "run `specmoeoff profile --model`."
        ) from None
    bench = Bench(spec, n_threads)
    disk = profile.disk
    reader = Reader(disk_file, disk.n_readers if disk else 2, disk.chunk_bytes if disk else 1 << 20)
    works = {("expert", n): bench.expert(n) for n in PROBE_ROWS}
    works |= {("attention_block", n): bench.attention_block(spread(n), 0) for n in PROBE_ROWS}
    for work in works.values():
        work()
    begun = time.perf_counter()
    rates, times = [], {key: [] for key in works}
    while time.perf_counter() - begun < seconds - 0.3:
        rates.append(reader.read(0.15) / 1e9)
        for key, work in works.items():
            times[key].append(float(np.median([seconds_of(work) for _ in range(15)])))
    ratios = []
    for (name, rows), samples in times.items():
        table = stored[name]
        # The lower quartile of slices: a neighbour's burst lengthens some of them, nothing shortens one.
        ratios.append(float(np.percentile(samples, 25)) / table.seconds[table.grid[0].index(rows)])
    return Recalibration(tuple(rates), float(np.median(ratios)), time.perf_counter() - begun)
