"""Configurations of a machine with a GPU, as arrays: one entry for each."""

from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np

from specmoeoff.errors import BadInput
from specmoeoff.estimate.experts import zipf_popularity
from specmoeoff.estimate.speculation import expected_tokens
from specmoeoff.specs.model import ModelSpec
from specmoeoff.specs.plan import DrafterName
from specmoeoff.specs.workload import Workload


class Draft(NamedTuple):
    """A drafter with a length, and what it yields. `steps`: passes of the draft model a window."""

    drafter: DrafterName
    length: int
    steps: int
    tokens_per_round: float


@dataclass(frozen=True)
class Choices:
    """Arrays of equal length. `draft` is an index into the problem's drafts; experts are counted per layer: the most popular
    resident, the least popular computed on the host, the others streamed. Shares are of the live requests."""

    draft: np.ndarray
    micro_batches: np.ndarray
    on_demand: np.ndarray
    resident: np.ndarray
    on_host: np.ndarray
    kv_share: np.ndarray
    draft_kv_share: np.ndarray
    batch: np.ndarray

    def __len__(self) -> int:
        return len(self.batch)

    def take(self, index: np.ndarray) -> "Choices":
        """Those at `index`."""
        return Choices(*(getattr(self, f.name)[index] for f in fields(self)))

    def joined(self, other: "Choices") -> "Choices":
        """These, then others."""
        return Choices(*(np.concatenate([getattr(c, f.name) for c in (self, other)]) for f in fields(self)))


@dataclass(frozen=True)
class Problem:
    """What is planned for. popularity: (n_experts,) share of tokens, most popular first, the same in every layer.
    request_tokens: KV reserved for a request; context_tokens: what a window meets on average."""

    spec: ModelSpec
    head: ModelSpec | None
    drafts: tuple[Draft, ...]
    popularity: np.ndarray
    union_exponent: float
    request_tokens: float
    context_tokens: float

    def of_draft(self, choices: Choices, field: str) -> np.ndarray:
        """A field of every choice's draft."""
        return np.array([getattr(d, field) for d in self.drafts])[choices.draft]

    def streamed(self, choices: Choices) -> np.ndarray:
        """Experts per layer that are transferred."""
        return self.spec.n_experts - choices.resident - choices.on_host


def eagle_head(spec: ModelSpec) -> ModelSpec:
    """EAGLE's draft model for a target: one decoder layer on [embedding, hidden] projected to hidden, embedding and output
    head shared. Sized as the published head of Mixtral-8x7B (0.28 B): multi-head attention, an FFN of 3.5 hidden."""
    n_heads = spec.hidden // spec.head_dim
    return spec.model_copy(
        update={
            "name": f"EAGLE head of {spec.name}",
            "architecture": "llama",
            "n_layers": 1,
            "n_heads": n_heads,
            "n_kv_heads": n_heads,
            "intermediate": 7 * spec.hidden // 2,
            "n_experts": 1,
            "n_active": 1,
            "kv_latent": 0,
            "rope_head_dim": 0,
            "n_shared_experts": 0,
            "n_dense_layers": 0,
            "n_sliding_layers": 0,
            "expert_format": "bf16",
            "expert_bias": False,
            "other_layer_params": 2 * spec.hidden**2,
            "fingerprint": f"eagle-head-{spec.fingerprint}",
        }
    )


def make_problem(
    spec: ModelSpec,
    workload: Workload,
    request_tokens: int | None,
    longest_draft: int,
    draft: ModelSpec | None = None,
    drafter: DrafterName = "model",
) -> Problem:
    """The problem of a model under a workload; `draft`: a dense model or, by `drafter`, an EAGLE head, which drafts instead of one
    as published. Raises BadInput where the workload is another model's."""
    if workload.model_fingerprint not in (None, spec.fingerprint):
        raise BadInput(
            f"workload {workload.name} was measured on model {workload.model_name}, not on {spec.name}; take a published one."
        )
    drafts = [Draft("none", 0, 0, 1.0)]
    for name in (drafter if draft else "eagle", "ngram"):
        if known := workload.acceptance.get(name):
            for k in range(1, min(len(known.conditional), longest_draft) + 1):
                tokens = expected_tokens(known.conditional, k, known.of_text)
                drafts.append(Draft(name, k, k if name != "ngram" else 0, tokens))  # type: ignore[arg-type]
    if workload.popularity is None:
        popularity = zipf_popularity(spec.n_experts, spec.n_active, workload.popularity_zipf)
    else:
        of_experts = np.asarray(workload.popularity)[spec.n_dense_layers :]
        popularity = np.sort(of_experts, axis=1)[:, ::-1].mean(axis=0)
    context = workload.middle_context_tokens
    return Problem(
        spec=spec,
        head=(draft or eagle_head(spec)) if any(d.steps for d in drafts) else None,
        drafts=tuple(drafts),
        popularity=popularity,
        union_exponent=workload.union_exponent,
        request_tokens=request_tokens or 2 * context - workload.prompt_tokens.mean,  # the middle is half an answer in
        context_tokens=context,
    )
