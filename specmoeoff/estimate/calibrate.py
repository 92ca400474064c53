"""Refits a CPU machine's prices to what a validation measured: a profile goes in, a profile comes out."""

from collections.abc import Mapping, Sequence
from statistics import fmean

from specmoeoff.errors import BadInput
from specmoeoff.estimate.accuracy import kind_ratios
from specmoeoff.estimate.costs import Calibration
from specmoeoff.specs.model import ModelSpec
from specmoeoff.specs.profile import HardwareProfile, OperatorTable
from specmoeoff.specs.record import RunRecord, Slice

OPERATORS = {
    "attention": (
        "attention_block",
        "dense_block",
        "layers.attention_block",
        "layers.dense_block",
        "attention",
        "window_attention",
    ),
    "experts": ("experts", "expert", "combine", "layers.experts"),
    "head": ("head",),
}


def typical(slices: Sequence[Slice]) -> Slice:
    """The mean of each, less a tenth at either end: a window is long enough to feel fast moments and slow ones, but for bursts of
    other guests of the machine that most windows are spared."""

    def mean(found: Sequence[float]) -> float:
        cut = len(found) // 10
        return fmean(sorted(found)[cut : len(found) - cut])

    drafting = [s.draft_scale for s in slices if s.draft_scale]
    return Slice(
        disk_gb_per_s=mean([s.disk_gb_per_s for s in slices]),
        memory_scale=mean([s.memory_scale for s in slices]),
        compute_scale=mean([s.compute_scale for s in slices]),
        draft_scale=mean(drafting) if drafting else None,
    )


def rescaled(
    profile: HardwareProfile,
    disk: float = 1.0,
    memory: float = 1.0,
    compute: float = 1.0,
    own: Mapping[tuple[str, str], float] | None = None,
    shapes: Mapping[str, float] | None = None,
) -> HardwareProfile:
    """The disk's rate times `disk`; operator times times `memory` for few rows and `compute` for many, or times shapes[shape]
    where given, and times own[operator, shape]."""
    speed, own, shapes = Calibration(1.0, memory, compute), own or {}, shapes or {}

    def table(t: OperatorTable) -> OperatorTable:
        if t.operator == "wake":  # neither bandwidth nor arithmetic
            return t
        width = len(t.seconds) // len(t.grid[0])
        more = own.get((t.operator, t.shape), 1.0)
        factors = [shapes.get(t.shape, speed.scale(rows)) * more for rows in t.grid[0] for _ in range(width)]
        changed = {
            name: tuple(f * s for f, s in zip(factors, getattr(t, name), strict=True))
            for name in ("seconds", "p10_s", "p95_s")
        }
        return t.model_copy(update={**changed, "provenance": "fitted"})

    link = profile.disk
    if link is not None:
        rate = link.read_gb_per_s
        changed = {"value": rate.value * disk, "samples": tuple(s * disk for s in rate.samples), "provenance": "fitted"}
        link = link.model_copy(update={"read_gb_per_s": rate.model_copy(update=changed)})
    return profile.model_copy(update={"disk": link, "operators": tuple(map(table, profile.operators))})


def refit(
    profile: HardwareProfile, record: RunRecord, target: ModelSpec, draft: ModelSpec | None
) -> tuple[HardwareProfile, dict[str, float]]:
    """The profile at the speeds a validation saw, and what was refitted by which factor.

    Disk and operators move by what the slices show that were measured beside its blocks; then each kind of node by what the
    prediction at those speeds still missed in the timeline, so only bias goes. Raises BadInput for a record that holds no
    slices, or is of another machine.
    """
    if not record.recalibration:
        raise BadInput("--calibrate: the record measured no speeds; make it with `specmoeoff validate -o`.")
    if record.machine_fingerprint != profile.machine.fingerprint:
        raise BadInput(f"--calibrate: the record is of another machine than profile {profile.name}; validate on it.")
    if profile.disk is None:
        raise BadInput(f"--calibrate: profile {profile.name} has no disk link; profile the machine again.")
    speed = typical(record.recalibration)
    disk = speed.disk_gb_per_s / profile.disk.read_gb_per_s.value
    memory, compute = speed.memory_scale, speed.compute_scale
    ratios = {kind: r for kind, r in kind_ratios(record).items() if kind in OPERATORS or (kind == "draft" and draft)}
    own = {(o, target.shape_key): ratios[kind] for kind in OPERATORS if kind in ratios for o in OPERATORS[kind]}
    if draft and "draft" in ratios:
        own |= {(t.operator, t.shape): ratios["draft"] for t in profile.operators if t.shape == draft.shape_key}
    changes = {"disk rate": disk, "memory-bound operator times": memory, "compute-bound operator times": compute}
    shapes = {}
    if draft and speed.draft_scale:
        shapes[draft.shape_key] = changes["draft operator times"] = speed.draft_scale
    changes |= {f"{kind} times": ratio for kind, ratio in ratios.items()}
    said = ", ".join(f"{name} x{factor:.3f}" for name, factor in changes.items())
    fitted = rescaled(profile, disk, memory, compute, own, shapes)
    return fitted.model_copy(update={"name": f"{profile.name}, refitted: {said}"}), changes
