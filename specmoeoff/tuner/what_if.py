"""What another machine or a better draft would give: the same request tuned again with one input changed."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from specmoeoff.errors import SpecMoEOffError
from specmoeoff.estimate.calibrate import rescaled
from specmoeoff.specs.plan import Plan
from specmoeoff.specs.profile import HardwareProfile, Roof
from specmoeoff.tuner.tune import TuneRequest, tune


@dataclass(frozen=True)
class WhatIf:
    """One change; `plan` is None where nothing could be planned, for the reason in `note`."""

    change: str
    plan: Plan | None
    gain: float | None
    note: str = ""

    @property
    def row(self) -> dict[str, object]:
        """For tables and JSON."""
        if self.plan is None:
            return {"change": self.change, "tokens_per_s": None, "gain": None, "note": self.note}
        p, d = self.plan.predicted, self.plan.decode
        found = {"change": self.change, "tokens_per_s": p.tokens_per_s, "gain": self.gain}
        return {**found, "draft_length": d.draft_length, "batch": d.batch, "bound": p.bound, "drafter": d.drafter}


def what_if(request: TuneRequest, plan: Plan) -> list[WhatIf]:
    """One row per change that this machine has; `gain`: tokens per second over those of `plan`, made from `request`."""
    rows = []
    for change, changed in _changes(request, plan):
        try:
            found = tune(replace(changed, storage=None, measure=None, measure_top=0))
            gain = found.predicted.tokens_per_s / plan.predicted.tokens_per_s
            rows.append(WhatIf(change, found, gain))
        except SpecMoEOffError as error:
            rows.append(WhatIf(change, None, None, str(error)))
    return rows


def _changes(r: TuneRequest, plan: Plan) -> Iterator[tuple[str, TuneRequest]]:
    profile, limits, limit = r.profile, plan.limits, r.disk_limit_gb_per_s
    if profile.disk:
        yield (
            "disk twice as fast",
            replace(r, profile=rescaled(profile, disk=2.0), disk_limit_gb_per_s=2 * limit if limit else None),
        )
    yield "fast memory doubled", replace(r, fast_memory_bytes=2 * limits.fast_memory_bytes)
    yield "host memory doubled", replace(r, host_memory_bytes=2 * limits.host_memory_bytes)
    links = tuple(link.model_copy(update={"gb_per_s": 2 * link.gb_per_s}) for link in profile.links)
    if links:
        yield "link to the GPU twice as fast", replace(r, profile=profile.model_copy(update={"links": links}))
    for device in dict.fromkeys(roof.device for roof in (*profile.peaks, *profile.memory)):
        name = device.upper()
        yield f"{name} memory twice as fast", replace(r, profile=_faster(profile, device, "memory"))
        yield f"{name} arithmetic twice as fast", replace(r, profile=_faster(profile, device, "peaks"))
    halved = {
        name: a.model_copy(update={"conditional": tuple((1 + p) / 2 for p in a.conditional)})
        for name, a in r.workload.acceptance.items()
    }
    if halved:
        yield "half as many drafts rejected", replace(r, workload=r.workload.model_copy(update={"acceptance": halved}))


def _faster(profile: HardwareProfile, device: str, roofs: str) -> HardwareProfile:
    """Roofs of one kind doubled; measured operators of the CPU as far as they are bound by them."""

    def twice(roof: Roof) -> Roof:
        if roof.device != device:
            return roof
        samples = tuple(2 * s for s in roof.rate.samples)
        return roof.model_copy(
            update={"rate": roof.rate.model_copy(update={"value": 2 * roof.rate.value, "samples": samples})}
        )

    doubled = profile.model_copy(update={roofs: tuple(map(twice, getattr(profile, roofs)))})
    if device == "gpu":
        return doubled
    return rescaled(doubled, memory=0.5) if roofs == "memory" else rescaled(doubled, compute=0.5)
