"""Plans of a shape for this machine, and windows of those plans on a few of its layers: measured, bounded and predicted."""

import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple

import numpy as np
from gpu_synthetic import TINY, Synthetic

from specmoeoff.estimate.gpu_choices import Choices, make_problem
from specmoeoff.estimate.gpu_memory import tiers, total
from specmoeoff.estimate.gpu_refit import Observed, refit
from specmoeoff.estimate.gpu_window import GpuEstimator
from specmoeoff.estimate.speculation import expected_tokens
from specmoeoff.profiles import find
from specmoeoff.runtime.gpu.device import Device
from specmoeoff.specs.model import ModelShape, ModelSpec
from specmoeoff.specs.profile import HardwareProfile
from specmoeoff.specs.workload import Acceptance, Workload
from specmoeoff.tuner.gpu_tune import FEEDING_CORES, GpuTuner
from specmoeoff.tuner.tune import TuneRequest

LONGEST = 8
EAGLE = (0.67, 0.62, 0.61, 0.64, 0.63, 0.63, 0.63, 0.63)  # beyond the fifth the fifth's, which nobody measured
ACCEPTANCE = {"EAGLE on Mixtral": EAGLE, "0.8 everywhere": (0.8,) * LONGEST}
FITTED = (0, 1, 3, 5, 8)  # draft lengths that prices are refitted to; the others are predicted


class Measured(NamedTuple):
    """Windows of one draft length in a row: seconds of each, of its nodes by kind, and of enqueuing them."""

    seconds: list[float]
    kinds: list[dict[str, float]]
    enqueued: list[float]

    @property
    def mean_kinds(self) -> dict[str, float]:
        """Over the windows."""
        return {kind: fmean(k[kind] for k in self.kinds) for kind in self.kinds[0]}


class Tuned:
    """A shape's tuners, one for each table of acceptance; drafting itself costs nothing here."""

    def __init__(
        self, name: str, n_layers: int, context: int, profile: Path, limits: dict[str, int], batch: int | None
    ) -> None:
        self.spec = tiny() if name == "tiny" else ModelShape.load(find("models", name)).model
        self.few, self.context, self.limits = self.spec.model_copy(update={"n_layers": n_layers}), context, limits
        machine = HardwareProfile.load(profile)
        base = Workload.load(find("workloads", "mt-bench")).with_output_tokens(128)
        self.tuners: dict[str, GpuTuner] = {}
        for label, rates in ACCEPTANCE.items():
            imposed = Acceptance(conditional=rates, n_rounds=0, provenance="imposed")
            workload = base.model_copy(update={"acceptance": {"ngram": imposed}})
            request = TuneRequest(
                machine,
                self.spec,
                workload,
                name,
                limits["host"],
                fast_memory_bytes=limits["fast"],
                batch=batch,
                context_tokens=context + LONGEST + 1,
            )
            self.tuners[label] = GpuTuner(request)
        first = next(iter(self.tuners.values()))
        rates_of_machine = first.estimator.rates
        self.estimator = GpuEstimator(
            make_problem(self.few, workload, context + LONGEST + 1, LONGEST), rates_of_machine
        )

    def best(self, label: str, plain: bool) -> Choices:
        """The tuned choice of a table, or of k = 0."""
        tuner = self.tuners[label]
        priced = tuner.with_filled(tuner.everything)
        return tuner.best(priced, tuner.lengths(priced.choices) == 0 if plain else None)

    def refit(self, observed: list[Observed]) -> None:
        """All tuners plan with what was measured."""
        self.estimator = refit(self.estimator, observed)
        for label, tuner in self.tuners.items():
            self.tuners[label] = GpuTuner(tuner.request)
            self.tuners[label].estimator = replace(tuner.estimator, rates=self.estimator.rates)

    def at(self, choice: Choices, k: int) -> Choices:
        """The choice with another draft length."""
        return replace(choice, draft=np.array([k]))  # drafts are listed by length, plain decoding first

    def predicted_s(self, choice: Choices, k: int) -> float:
        """Of a window of the few layers."""
        return float(self.estimator.window_s(self.at(choice, k), np.array([float(self.context)]))[0])

    def planned_gib(self, choice: Choices) -> float:
        """GPU memory of the few layers, without the margin."""
        purposes = tiers(self.estimator.problem, self.at(choice, LONGEST))["fast"]
        return float((total(purposes) - purposes["margin"])[0]) / 2**30

    def synthetic(self, device: Device, choice: Choices) -> Synthetic:
        """The few layers placed as chosen."""
        batch, parts = int(choice.batch[0]), int(choice.micro_batches[0])
        return Synthetic(
            device,
            self.few,
            batch,
            self.context,
            LONGEST,
            parts=parts,
            resident=int(choice.resident[0]),
            on_host=int(choice.on_host[0]),
            on_demand=bool(choice.on_demand[0]),
            kv_share=float(choice.kv_share[0]),
            n_threads=max(1, len(os.sched_getaffinity(0)) - FEEDING_CORES),
        )


def placement(choice: Choices) -> tuple[float, ...]:
    """What a synthetic model is made with; its draft length is free."""
    names = ("micro_batches", "on_demand", "resident", "on_host", "kv_share", "batch")
    return tuple(float(getattr(choice, name)[0]) for name in names)


def tiny() -> ModelSpec:
    """See gpu_synthetic."""
    return ModelSpec(**TINY, tie_embeddings=False, eos_token_ids=(2,), fingerprint="tiny")


def measure(synthetic: Synthetic, k: int, n: int) -> Measured:
    """n windows after one that fills the lanes."""
    runs, seconds, nodes, enqueued = synthetic.runs, [], [], []
    synthetic.window(k)
    for _ in range(n):
        begin = time.perf_counter()
        synthetic.window(k)
        seconds.append(time.perf_counter() - begin)
        nodes.append(runs.nodes)
        enqueued.append(synthetic.enqueued_s)
    return Measured(seconds, [runs.seconds_by_kind(of) for of in nodes], enqueued)


def told(choice: Choices, k: int) -> str:
    """A choice in words."""
    where = f"{int(choice.resident[0])} experts of a layer resident, {int(choice.on_host[0])} on the CPU"
    rest = f"{choice.kv_share[0]:.0%} of KV on the GPU{', experts on demand' if choice.on_demand[0] else ''}"
    return f"k = {k}, {int(choice.batch[0])} requests in {int(choice.micro_batches[0])} micro-batches, {where}, {rest}"


def rows_of(
    device: Device,
    tuned: Tuned,
    n_windows: int,
    turns: int,
    lengths: tuple[int, ...],
    peak_gib: Any,
    begin: float,
    budget_s: float,
) -> Iterator[tuple[Any, ...]]:
    """Rows as gpu_sections has them. Turns through all lengths, so that what drifts meets all of them, while there is time."""
    whole = f"{tuned.few.n_layers} of {tuned.spec.n_layers} layers, random weights, {tuned.context} tokens of context"
    label = next(iter(ACCEPTANCE))
    choice = tuned.best(label, plain=False)
    yield "first plan, by roofs", told(choice, tuned.estimator.problem.drafts[int(choice.draft[0])].length), "", whole
    synthetic = tuned.synthetic(device, choice)
    yield "peak GPU memory over planned", peak_gib() / tuned.planned_gib(choice), "x", "without the plan's margin"
    yield "peak GPU memory", peak_gib(), "GiB"
    found: dict[int, Measured] = {}
    yield "seconds until the first window", time.perf_counter() - begin, "s"
    for _ in range(turns):
        for k in lengths:
            more = measure(synthetic, k, n_windows)
            before = found.get(k, Measured([], [], []))
            found[k] = Measured(*(old + new for old, new in zip(before, more, strict=True)))
        if time.perf_counter() - begin > 0.6 * budget_s:
            break
    observed = [
        Observed(tuned.at(choice, k), float(tuned.context), kinds, seconds)
        for k in FITTED
        if k in found
        for kinds, seconds in zip(found[k].kinds, found[k].seconds, strict=True)
    ]
    by_roofs = {k: tuned.predicted_s(choice, k) for k in found}
    tuned.refit(observed)
    for k, measured in sorted(found.items()):
        window_s, kinds = median(measured.seconds), measured.mean_kinds
        yield (
            f"k = {k}: window",
            window_s,
            "s",
            f"median of {len(measured.seconds)}, {min(measured.seconds):.4f} to {max(measured.seconds):.4f}",
        )
        at = tuned.at(choice, k)
        ratios = [s / tuned.estimator.period_s(at, of) for s, of in zip(measured.seconds, measured.kinds, strict=True)]
        yield f"k = {k}: window over the period of its measured nodes", median(ratios), "x"
        yield (
            f"k = {k}: enqueuing it",
            median(measured.enqueued),
            "s",
            "of the host's time, beside what it enqueued before",
        )
        yield f"k = {k}: predicted from roofs, over measured", by_roofs[k] / window_s, "x"
        note = "fitted to it" if k in FITTED else f"fitted to k = {', '.join(map(str, FITTED))}"
        yield f"k = {k}: predicted after refitting, over measured", tuned.predicted_s(choice, k) / window_s, "x", note
        for kind, seconds in kinds.items():
            if seconds > 0:
                yield f"k = {k}: {kind}", seconds, "s", "mean of the window's nodes of that kind, beside the others"
    rates: dict[tuple[str, bool], float] = {}
    windows: dict[tuple[tuple[float, ...], int], float] = {}  # tables may lead to the same plan
    kept = (placement(choice), synthetic)
    del synthetic
    for label, table in ACCEPTANCE.items():
        for plain in (False, True):
            choice = tuned.best(label, plain)
            k = tuned.estimator.problem.drafts[int(choice.draft[0])].length
            what = f"{label}: tuned{' k = 0' if plain else ''}"
            same = placement(choice), k
            if same not in windows and time.perf_counter() - begin > budget_s:
                yield what, told(choice, k), "", "not measured: the section's time was up"
                continue
            if same not in windows:
                if kept[0] != placement(choice):
                    kept = ((), None)  # its memory first
                    kept = (placement(choice), tuned.synthetic(device, choice))
                windows[same] = median(measure(kept[1], k, 3 * n_windows).seconds)
            window_s = windows[same]
            rates[label, plain] = expected_tokens(table, k) * float(choice.batch[0]) / window_s
            yield what, told(choice, k)
            note = f"{whole}; acceptance imposed, drafting not run"
            yield f"{what}: tokens per second", rates[label, plain], "tokens/s", note
            yield f"{what}: predicted window over measured", tuned.predicted_s(choice, k) / window_s, "x"
        if (label, True) in rates:
            yield f"{label}: tuned over tuned k = 0", rates[label, False] / rates[label, True], "x", note
