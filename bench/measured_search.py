"""Claim: twelve measured trials of Optuna reach a plan within 3 % of the best of a measured grid, and the estimator's own draft
length is within 3 % of the best measured from 0 to 15.

The demo model on the machine of the given profile, its disk capped. The grid is draft length x live requests x residents, all
else as predicted best; then the study's plan, the grid's best, the predicted plan and the best draft length take turns in
pairs. Prints both claims with the 95 % interval of the paired ratios and writes bench/measured_search.csv:
`python bench/measured_search.py profile.json workload.json`, about half an hour; `--quick` rehearses it.
"""

import argparse
import time
from dataclasses import replace
from functools import cache
from itertools import islice
from pathlib import Path
from statistics import median

import pandas as pd

from specmoeoff.roofline.profile import machine
from specmoeoff.roofline.timing import paired_ratios
from specmoeoff.runtime.checkpoint import read_model_spec
from specmoeoff.runtime.loading import default_draft, model_folder, open_plan
from specmoeoff.runtime.process import available_bytes
from specmoeoff.runtime.trial import run_trial
from specmoeoff.specs.plan import Plan
from specmoeoff.specs.profile import HardwareProfile
from specmoeoff.specs.workload import Workload
from specmoeoff.tuner.measure import Trials, best_by_optuna
from specmoeoff.tuner.search import exhaustive, lengths_once
from specmoeoff.tuner.space import Choice, make_space
from specmoeoff.tuner.tune import Tuner, TuneRequest

CAP_GB_PER_S, CONTEXT_TOKENS, TRIALS = 1.0, 320, 12
LENGTHS, LONGEST, BATCHES, SLOTS = (0, 2, 5, 8, 11, 15), 15, (4, 8, 16), 2
PAIRS = 6


class Measured:
    """A tuner of the demo, and its plans' measured rates."""

    def __init__(self, profile: HardwareProfile, workload: Workload, windows: int) -> None:
        draft = default_draft("demo")
        assert draft
        self.request = TuneRequest(
            profile=profile,
            model=read_model_spec(model_folder("demo")),
            workload=workload,
            model_source="demo",
            host_memory_bytes=int(0.9 * available_bytes()),
            draft=read_model_spec(model_folder(draft)),
            draft_source=draft,
            context_tokens=CONTEXT_TOKENS,
            disk_limit_gb_per_s=CAP_GB_PER_S,
        )
        self.tuner, self.windows = Tuner(self.request), windows
        r = self.request
        space = make_space(profile, r.model, r.draft, workload, self.tuner.n_slots, None)
        known = len(workload.acceptance["model"].conditional)
        lengths = {"none": (0,), "model": tuple(range(1, min(LONGEST, known) + 1))}
        self.space = replace(space, draft_lengths=lengths, batches=BATCHES, n_threads=(max(space.n_threads),))
        self.plain = cache(lambda batch: self.best(draft_lengths={"none": (0,)}, batches=(batch,))[0])
        self.rows: list[dict[str, object]] = []
        self.begun = time.perf_counter()

    def best(self, **axes: object) -> list[Choice]:
        """Predicted, best first, of the space with some axes narrowed."""
        return exhaustive(replace(self.space, **axes), self.tuner.price, self.tuner.bound)  # type: ignore[arg-type]

    def plan(self, choice: Choice) -> Plan:
        plain = self.plain(choice.batch)
        return self.tuner.plan(choice, plain, [choice, plain])

    def rate(self, plan: Plan) -> float:
        """In this process: opening is for free once it is cached, so that trials are short. As `tune --measure` has it: windows
        are timed here, and the workload's rounds count beside the trial's."""
        trial = run_trial(plan, open_plan(plan), self.windows)
        return trial.tokens_per_s(plan.decode, self.request.workload.acceptance.get(plan.decode.drafter))

    def tell(self, what: str, choice: Choice, rate: float) -> None:
        predicted = self.tuner.part(choice).predicted.tokens_per_s
        row = {"what": what, "drafter": choice.drafter, "draft_length": choice.draft_length, "batch": choice.batch}
        row |= {"stream_slots": choice.stream_slots, "prefetch_threshold": choice.prefetch_threshold}
        row |= {"tokens_per_s": round(rate, 2), "predicted_tokens_per_s": round(predicted, 2)}
        self.rows.append(row | {"cpu": machine().cpu, "threads": choice.n_threads})
        print(
            f"{time.perf_counter() - self.begun:6.0f} s  " + "  ".join(f"{k} {v}" for k, v in row.items()), flush=True
        )


def grid(m: Measured, lengths: tuple[int, ...], batches: tuple[int, ...]) -> list[tuple[float, Choice]]:
    """Every draft length and batch with the predicted number of residents and one of a third more stream slots."""
    found = []
    for batch in batches:
        for k in lengths:
            drafts = {"model": (k,)} if k else {"none": (0,)}
            best = m.best(draft_lengths=drafts, batches=(batch,))[0]
            at = m.space.stream_slots.index(best.stream_slots)
            for slots in m.space.stream_slots[at : at + SLOTS]:
                choice = replace(best, stream_slots=slots)
                found.append((m.rate(m.plan(choice)), choice))
                m.tell("grid", choice, found[-1][0])
    return found


def study(m: Measured, ranked: list[Choice], n_trials: int) -> Choice:
    """The plan `tune --search optuna --measure N` would take."""
    starts = [m.plain(ranked[0].batch), *islice(lengths_once(ranked), n_trials // 3)]
    trials = Trials(m.plan, m.rate)
    chosen = best_by_optuna(trials, m.space, m.tuner.price, starts, n_trials, 0, "bench", None, lambda share: None)
    for choice, rates in trials._rates.items():
        m.tell("study", choice, median(rates))
    return chosen


def in_pairs(m: Measured, what: str, ours: Choice, theirs: Choice, n: int) -> None:
    """The ratio of two choices' rates, measured in turn."""
    if ours == theirs:
        print(f"{what}: the same plan")
        return
    rates = [(m.rate(m.plan(ours)), m.rate(m.plan(theirs))) for _ in range(n)]
    middle, low, high, confidence = paired_ratios(*zip(*rates, strict=True))
    print(f"{what}: {middle:.3f}x ({low:.3f} to {high:.3f}, {confidence:.1%} interval of {n} pairs)")
    for one, other in rates:
        m.tell(f"pair: {what}", ours, one)
        m.tell(f"pair: {what}", theirs, other)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("profile", type=Path)
    parser.add_argument("workload", type=Path)
    parser.add_argument("--quick", action="store_true", help="A few short runs, to see that everything works.")
    options = parser.parse_args()
    quick = options.quick
    m = Measured(HardwareProfile.load(options.profile), Workload.load(options.workload), 1 if quick else 3)
    if quick:
        m.space = replace(m.space, draft_lengths={"none": (0,), "model": (8,)}, batches=BATCHES[:1])
    ranked = m.best()
    chosen, predicted = study(m, ranked, 2 if quick else TRIALS), ranked[0]
    found = grid(m, (0, 8) if quick else LENGTHS, BATCHES[:1] if quick else BATCHES)
    n_pairs = 1 if quick else PAIRS
    in_pairs(m, "Optuna's plan over the grid's best", chosen, max(found, key=lambda f: f[0])[1], n_pairs)
    same = [f for f in found if f[1].batch == predicted.batch] or found
    in_pairs(
        m, "the predicted draft length over the best measured", predicted, max(same, key=lambda f: f[0])[1], n_pairs
    )
    if not quick:
        pd.DataFrame(m.rows).to_csv(Path(__file__).with_suffix(".csv"), index=False)


if __name__ == "__main__":
    main()
