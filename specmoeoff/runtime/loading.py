"""Opens what a plan names, and refuses what it does not mean."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from specmoeoff.errors import AnotherModel, BadInput, MissingCapability
from specmoeoff.pipeline import DEMAND_RESERVE_SLOTS
from specmoeoff.runtime.checkpoint import read_model_spec, resolve_model
from specmoeoff.runtime.drafters.eagle import EagleHead, load_eagle_head, read_eagle_spec
from specmoeoff.runtime.gpu.device import find_gpu
from specmoeoff.runtime.gpu.weights import CheckpointWeights
from specmoeoff.runtime.pack import PackedModel, pack_model
from specmoeoff.runtime.process import available_bytes
from specmoeoff.runtime.tokenizer import Tokenizer
from specmoeoff.specs.model import ModelSpec
from specmoeoff.specs.plan import PlainPlan, Plan

DEMO_DRAFT = "demo-draft"
GPU_DRAFTERS = ("none", "ngram")
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Opened:
    """Models, the target as the plan's lanes take it, and the tokenizer of a plan's checkpoint."""

    target: PackedModel | CheckpointWeights
    draft: PackedModel | EagleHead | None
    tokenizer: Tokenizer


def model_folder(source: str) -> Path:
    """The folder of a model a person or a plan named."""
    if source == DEMO_DRAFT:
        draft = resolve_model("demo").draft
        assert draft is not None
        return draft
    return resolve_model(source).target


def default_draft(source: str) -> str | None:
    """The draft that comes with a model, if one does."""
    return DEMO_DRAFT if source == "demo" else None


def load_runnable(path: Path | str) -> Plan:
    """The plan of a file, or a sentence why this machine cannot run it."""
    plan = Plan.load(path)
    if plan.gpu:
        try:
            find_gpu()
        except MissingCapability as error:
            raise MissingCapability(
                f"{path}: the plan is for a machine with a GPU ({plan.inputs.profile_name}): {error} Here, use it with "
                "`report` or `export`, or tune with a profile of this machine."
            ) from None
    return plan


def open_plan(plan: Plan, progress: Progress = lambda *_: None) -> Opened:
    """Check that the plan can run and that the models are those it was made for, pack them if need be, open everything."""
    folder = model_folder(plan.model.source)
    spec = _same_model(plan.model.fingerprint, folder, plan.model.name)
    for name, part in (("the plan", plan), ("the plan's plain part", plan.plain)):
        check_part(name, part, spec)
    draft: PackedModel | EagleHead | None = None
    if plan.gpu and plan.decode.drafter not in GPU_DRAFTERS:
        raise MissingCapability(
            f"the plan drafts with {plan.decode.drafter}, which the GPU lanes cannot run yet (only "
            f"{' and '.join(GPU_DRAFTERS)}); tune with a workload of another drafter, or `export` the plan."
        )
    if plan.draft is not None and plan.decode.drafter == "eagle":
        draft_folder = model_folder(plan.draft.source)
        _same_model(plan.draft.fingerprint, draft_folder, plan.draft.name, read_eagle_spec)
        draft = load_eagle_head(draft_folder, spec)
    elif plan.draft is not None:
        draft_folder = model_folder(plan.draft.source)
        draft_spec = _same_model(plan.draft.fingerprint, draft_folder, plan.draft.name)
        if draft_spec.n_experts != 1 or draft_spec.vocab != spec.vocab:
            raise BadInput(
                f"{draft_folder}: a draft must be dense and share the target's {spec.vocab} tokens; tune again."
            )
        draft = pack_model(draft_folder, progress, plan.model.precision)
    elif plan.decode.drafter in ("model", "eagle"):
        raise BadInput("the plan drafts with a model, but names no draft model; make the plan anew with `tune`.")
    opened = Opened(
        CheckpointWeights(folder) if plan.gpu else pack_model(folder, progress, plan.model.precision),
        draft,
        Tokenizer(folder),
    )
    needed = sum(plan.memory.host.values()) if plan.gpu else plan.memory.rss_bytes
    available = available_bytes()
    if needed > available:
        raise MissingCapability(
            f"the plan needs {needed:,} bytes of memory, {needed - available:,} more than are free; "
            "make a smaller one with `tune --fast-memory` or `--batch`."
        )
    return opened


def check_part(name: str, part: Plan | PlainPlan, spec: ModelSpec) -> None:
    """BadInput where placement or sizes cannot be run on this model, as an edited file may have it."""

    def require(holds: bool, what: str) -> None:
        if not holds:
            raise BadInput(f"{name}: {what}; make the plan anew with `tune`.")

    decode, experts = part.decode, part.experts
    require(decode.context_tokens <= spec.max_positions, f"decode.context_tokens exceeds {spec.max_positions}")
    require((decode.drafter == "none") == (decode.draft_length == 0), "decode.drafter and draft_length disagree")
    for field in ("resident", "prefetch"):
        require(len(getattr(experts, field)) == spec.n_layers, f"experts.{field} must name {spec.n_layers} layers")
    for layer, (resident, prefetch) in enumerate(zip(experts.resident, experts.prefetch, strict=True)):
        numbers = [*resident, *prefetch]
        require(len({*numbers}) == len(numbers), f"experts: layer {layer} names an expert twice")
        require(
            all(0 <= e < spec.n_experts_of(layer) for e in numbers),
            f"experts: layer {layer} names one it does not have",
        )
    if not part.gpu and experts.n_resident < spec.n_all_experts:
        fewest = DEMAND_RESERVE_SLOTS + 1
        require(experts.stream_slots >= fewest, f"experts.stream_slots must be at least {fewest}, where any are read")


def _same_model(
    fingerprint: str, folder: Path, name: str, read: Callable[[Path], ModelSpec] = read_model_spec
) -> ModelSpec:
    found = read(folder)
    if found.fingerprint != fingerprint:
        raise AnotherModel(
            f"{folder}: the plan was made for another model ({name}, fingerprint {fingerprint[:12]}; this one has "
            f"{found.fingerprint[:12]}); make a plan for this model with `specmoeoff tune`."
        )
    return found
