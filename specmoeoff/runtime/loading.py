"""Opens what a plan names, and refuses what it does not mean."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from specmoeoff.errors import BadInput
from specmoeoff.runtime.checkpoint import read_model_spec, resolve_model
from specmoeoff.runtime.pack import PackedModel, pack_model
from specmoeoff.runtime.tokenizer import Tokenizer
from specmoeoff.specs.plan import Plan

DEMO_DRAFT = "demo-draft"
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Opened:
    """Packed models and the tokenizer of a plan's checkpoint."""

    target: PackedModel
    draft: PackedModel | None
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


def open_plan(plan: Plan, progress: Progress = lambda *_: None) -> Opened:
    """Check that the models are those the plan was made for, pack them if need be, open everything."""
    folder = model_folder(plan.model.source)
    _same_model(plan.model.fingerprint, folder, plan.model.name)
    draft = None
    if plan.draft is not None:
        draft_folder = model_folder(plan.draft.source)
        _same_model(plan.draft.fingerprint, draft_folder, plan.draft.name)
        draft = pack_model(draft_folder, progress)
    return Opened(pack_model(folder, progress), draft, Tokenizer(folder))


def _same_model(fingerprint: str, folder: Path, name: str) -> None:
    found = read_model_spec(folder)
    if found.fingerprint != fingerprint:
        raise BadInput(
            f"{folder}: the plan was made for another model ({name}, fingerprint {fingerprint[:12]}; this one has "
            f"{found.fingerprint[:12]}); make a plan for this model with `specmoeoff tune`."
        )
