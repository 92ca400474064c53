"""What can be chosen. A choice is a handful of numbers; everything else of a plan follows from it."""

from collections.abc import Iterator
from dataclasses import astuple, dataclass
from itertools import product
from typing import Any

import numpy as np

from specmoeoff.errors import BadInput
from specmoeoff.estimate.experts import most_used, probability_used
from specmoeoff.estimate.tables import thread_counts
from specmoeoff.pipeline import DEMAND_RESERVE_SLOTS
from specmoeoff.specs.model import ModelSpec
from specmoeoff.specs.plan import DrafterName, PlanExperts
from specmoeoff.specs.profile import HardwareProfile
from specmoeoff.specs.workload import Workload

# Read ahead only what is used at least this often; above 1: nothing, the router is waited for.
PREFETCH_THRESHOLDS = (0.0, 0.5, 0.8, 0.95, 1.1)
STREAM_SHARES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.75, 0.9, 1.0)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)
LONGEST_DRAFT = 24
Index = dict[str, int]  # a point: a position on every axis


@dataclass(frozen=True)
class Choice:
    """One point of the space."""

    drafter: DrafterName
    draft_length: int
    batch: int
    micro_batches: int
    stream_slots: int
    prefetch_threshold: float
    n_threads: int


@dataclass(frozen=True)
class Space:
    """The axes for one machine, model and workload."""

    draft_lengths: dict[DrafterName, tuple[int, ...]]
    batches: tuple[int, ...]
    micro_batches: tuple[int, ...]
    stream_slots: tuple[int, ...]
    prefetch_thresholds: tuple[float, ...]
    n_threads: tuple[int, ...]

    def choices(self) -> Iterator[Choice]:
        """All points."""
        drafts = [(drafter, k) for drafter, lengths in self.draft_lengths.items() for k in lengths]
        for slots in self.stream_slots:
            # With everything resident there is nothing to read ahead.
            thresholds = self.prefetch_thresholds if slots else (0.0,)
            rest = product(drafts, self.batches, self.micro_batches, thresholds, self.n_threads)
            for (drafter, k), batch, micro_batches, threshold, n_threads in rest:
                if micro_batches <= batch:
                    yield Choice(drafter, k, batch, micro_batches, slots, threshold, n_threads)

    @property
    def _axes(self) -> dict[str, tuple[Any, ...]]:
        return {
            "draft": tuple((drafter, k) for drafter, lengths in self.draft_lengths.items() for k in lengths),
            "batch": self.batches,
            "micro_batches": self.micro_batches,
            "stream_slots": self.stream_slots,
            "prefetch": self.prefetch_thresholds,
            "threads": self.n_threads,
        }

    @property
    def sizes(self) -> dict[str, int]:
        """Positions of every axis, for a sampler."""
        return {name: len(values) for name, values in self._axes.items()}

    def choice(self, index: Index) -> Choice:
        """The choice at a point."""
        draft, *rest = (values[index[name]] for name, values in self._axes.items())
        return Choice(*draft, *rest)

    def index(self, choice: Choice) -> Index:
        """The point of a choice."""
        (drafter, k, *rest), axes = astuple(choice), self._axes
        return {name: axes[name].index(value) for name, value in zip(axes, ((drafter, k), *rest), strict=True)}


def make_space(
    profile: HardwareProfile,
    spec: ModelSpec,
    draft: ModelSpec | None,
    workload: Workload,
    n_slots: int,
    batch: int | None,
    drafter: DrafterName = "model",
) -> Space:
    """The axes: drafters with known acceptance, `drafter` being what `draft` is; enough slots for streaming, where anything is streamed.

    Raises BadInput where the profile holds no operators of this model.
    """
    threads = tuple(thread_counts(profile, spec.shape_key))
    if not threads:
        raise BadInput(
            f"profile {profile.name}: no operator was measured at the shape of {spec.name} with experts in "
            f"{spec.packed_format}; run `specmoeoff profile --model` with this model, --experts and --precision."
        )
    lengths: dict[DrafterName, tuple[int, ...]] = {"none": (0,)}
    names: tuple[DrafterName, ...] = (drafter, "ngram") if draft else ("ngram",)
    for name in names:
        if name in workload.acceptance:
            known = min(LONGEST_DRAFT, len(workload.acceptance[name].conditional))
            lengths[name] = tuple(range(1, known + 1))
    fewest = DEMAND_RESERVE_SLOTS + 1
    slots = tuple(sorted({max(fewest, min(n_slots, round(n_slots * share))) for share in STREAM_SHARES}))
    return Space(
        draft_lengths=lengths,
        batches=BATCHES if batch is None else (batch,),
        micro_batches=(1, 2),
        stream_slots=(0,) if n_slots >= spec.n_all_experts else slots,
        prefetch_thresholds=PREFETCH_THRESHOLDS,
        n_threads=threads,
    )


def place(spec: ModelSpec, workload: Workload, choice: Choice, n_slots: int) -> PlanExperts:
    """Residents are the most used; of the others those used often enough are read ahead, likeliest first."""
    popularity = np.asarray(workload.popularity)
    used = probability_used(popularity, choice.batch, choice.draft_length + 1, workload.union_exponent)
    # Once nearly all are used the order would be noise: popularity settles it, and costs nothing where it is flat.
    worth, first = used + 1e-3 * popularity, spec.n_dense_layers
    resident: list[list[int]] = [[]] * first + most_used(
        worth[first:], min(n_slots, spec.n_all_experts) - choice.stream_slots
    )
    prefetch = []
    for layer, held in enumerate(resident):
        experts = range(spec.n_experts_of(layer))
        others = [e for e in experts if e not in held and used[layer, e] >= choice.prefetch_threshold]
        prefetch.append(tuple(sorted(others, key=lambda e: -used[layer, e])))
    return PlanExperts(resident=tuple(map(tuple, resident)), prefetch=tuple(prefetch), stream_slots=choice.stream_slots)
