"""What can be chosen on a machine with a GPU. A point is a handful of indices; every point that has a batch fits."""

from dataclasses import dataclass, replace

import numpy as np

from specmoeoff.estimate.gpu_choices import Choices, Problem
from specmoeoff.estimate.gpu_memory import BUFFERED_LAYERS, ROUNDING_BYTES, fitting_batch, tiers, total

MICRO_BATCHES = (1, 2, 4)
HOST_STEPS, RESIDENT_STEPS, KV_STEPS, DRAFT_KV_STEPS, BATCH_STEPS = 8, 4, 2, 2, 24
LONGEST_DRAFT = 16

Index = dict[str, int]


@dataclass(frozen=True)
class GpuSpace:
    """The axes, and what limits them. limits: bytes by tier. `batch` fixes the live requests."""

    problem: Problem
    limits: dict[str, int]
    batch: int | None = None

    @property
    def axes(self) -> dict[str, int]:
        """Points of each axis. Experts on the host and KV in GPU memory are a share of all; residents, draft KV in GPU memory
        and the batch are a share of what fits when those before are settled: so every point is feasible, and the best lies at
        the ends of most axes."""
        return {
            "draft": len(self.problem.drafts),
            "micro_batches": len(MICRO_BATCHES),
            "on_demand": 2,
            "on_host": HOST_STEPS + 1,
            "kv_share": KV_STEPS + 1,
            "resident": RESIDENT_STEPS + 1,
            "draft_kv_share": DRAFT_KV_STEPS + 1,
            "batch": 1 if self.batch else BATCH_STEPS,
        }

    def points(self) -> np.ndarray:
        """(n_points, n_axes) indices of the whole space, without what would say the same twice."""
        axes = self.axes
        grid = np.stack(np.meshgrid(*map(np.arange, axes.values()), indexing="ij"), axis=-1).reshape(-1, len(axes))
        at = {name: grid[:, i] for i, name in enumerate(axes)}
        steps = np.array([d.steps for d in self.problem.drafts])[at["draft"]]
        return grid[(steps > 0) | (at["draft_kv_share"] == 0)]

    def choices(self, points: np.ndarray) -> Choices:
        """Of (n, n_axes) indices; batch 0 where nothing fits."""
        at = {name: points[:, i] for i, name in enumerate(self.axes)}
        on_host = np.round(at["on_host"] / HOST_STEPS * self.problem.spec.n_experts).astype(int)
        choices = Choices(
            draft=at["draft"],
            micro_batches=np.array(MICRO_BATCHES)[at["micro_batches"]],
            on_demand=at["on_demand"] > 0,
            resident=np.zeros_like(on_host),
            on_host=on_host,
            kv_share=at["kv_share"] / KV_STEPS,
            draft_kv_share=np.zeros(len(points)),
            batch=np.full(len(points), float(self.batch or 1)),
        )
        resident = np.ceil(at["resident"] / RESIDENT_STEPS * self.fitting_residents(choices)).astype(int)
        choices = self._with_batch(replace(choices, resident=resident), at["batch"])
        draft_kv = at["draft_kv_share"] / DRAFT_KV_STEPS * self._fitting_draft_kv(choices)
        return self._with_batch(replace(choices, draft_kv_share=draft_kv), at["batch"])

    def filled(self, choices: Choices) -> Choices:
        """With what is left of fast memory given to more residents."""
        more = np.maximum(choices.resident, self.fitting_residents(choices))
        return replace(choices, resident=np.where(choices.batch > 0, more, choices.resident))

    def fitting_residents(self, choices: Choices) -> np.ndarray:
        """Experts per layer that fast memory holds beside everything else."""
        spec = self.problem.spec
        bare = replace(choices, resident=np.zeros_like(choices.resident))
        spare = self.limits["fast"] - total(tiers(self.problem, bare)["fast"])
        layers = spec.n_expert_layers - np.where(choices.on_demand, 1, BUFFERED_LAYERS)
        return np.clip(spare // (layers * spec.expert_bytes), 0, spec.n_experts - choices.on_host).astype(int)

    def _fitting_draft_kv(self, choices: Choices) -> np.ndarray:
        """Share of the live requests whose draft KV fast memory holds beside everything else."""
        every = tiers(self.problem, replace(choices, draft_kv_share=np.ones(len(choices))))["fast"]
        draft_kv = every.get("draft_kv", np.zeros(len(choices)))
        spare = self.limits["fast"] - ROUNDING_BYTES - (total(every) - np.ceil(draft_kv))
        return np.clip(spare / np.maximum(draft_kv, 1.0), 0.0, 1.0)

    def _with_batch(self, choices: Choices, step: np.ndarray) -> Choices:
        fits = fitting_batch(self.problem, choices, self.limits)
        wanted = np.maximum(1, np.floor(fits * (step + 1) / BATCH_STEPS))
        if self.batch:
            wanted = np.full(len(choices), float(self.batch))
        return replace(choices, batch=np.where(fits >= wanted, wanted, 0.0))

    def closed_form(self) -> Index:
        """SpecMoEOff's rule: the largest batch, two micro-batches, all KV on the host, no expert computed there, left-over GPU
        memory for the draft's KV, then for experts; the draft length is left to the search and begins in the middle."""
        axes = self.axes
        start = {**dict.fromkeys(axes, 0), "micro_batches": MICRO_BATCHES.index(2), "batch": axes["batch"] - 1}
        return {**start, "draft": axes["draft"] // 2, "draft_kv_share": DRAFT_KV_STEPS}

    def plain(self) -> Index:
        """Plain decoding with everything in GPU memory that fits there."""
        start = {**self.closed_form(), "draft": 0, "draft_kv_share": 0, "micro_batches": 0}
        return {**start, "kv_share": KV_STEPS, "resident": RESIDENT_STEPS}
