"""Claim: a window's time is predicted before it runs, at draft lengths 0 to 8 and three batches, disk-bound and CPU-bound.

The demo model on the machine of the given profile. Every draft length has the placement `tune` gives it under a disk cap, and
then every expert in memory. All draft lengths of a batch take turns in one process, each block between two slices that
recalibrate disk and memory speed; the medians of all windows are compared with the forecast at the mean of all slices, as
`validate` does. Prints a table and writes bench/window_prediction.csv: `python bench/window_prediction.py profile.json workload.json`.
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, median

import pandas as pd

from specmoeoff.demo import prompts_path
from specmoeoff.roofline.profile import machine
from specmoeoff.runtime.batch_files import read_batch, to_request
from specmoeoff.runtime.checkpoint import read_model_spec
from specmoeoff.runtime.loading import Opened, default_draft, model_folder, open_plan
from specmoeoff.runtime.process import available_bytes
from specmoeoff.runtime.validate import ANSWERED_TOKENS, Block, Options, Validator, speed_beside
from specmoeoff.specs.plan import PlainPlan, Plan
from specmoeoff.specs.profile import HardwareProfile
from specmoeoff.specs.workload import Workload
from specmoeoff.tuner.search import exhaustive
from specmoeoff.tuner.space import make_space
from specmoeoff.tuner.tune import Tuner, TuneRequest

LENGTHS, BATCHES, CAP_GB_PER_S, CONTEXT_TOKENS = range(9), (4, 8, 16), 1.0, 320
TURNS, WINDOWS, RESIDENT_TURNS, RESIDENT_WINDOWS = 6, 2, 10, 3  # many short blocks: the host is faster now, slower then
LARGE_SHARE = 0.05  # of a window: nodes that matter


def tuner_of(profile: HardwareProfile, workload: Workload, batch: int) -> Tuner:
    """Of the demo with its disk capped."""
    draft = default_draft("demo")
    assert draft
    return Tuner(
        TuneRequest(
            profile=profile,
            model=read_model_spec(model_folder("demo")),
            workload=workload,
            model_source="demo",
            host_memory_bytes=int(0.9 * available_bytes()),
            draft=read_model_spec(model_folder(draft)),
            draft_source=draft,
            batch=batch,
            context_tokens=CONTEXT_TOKENS,
            disk_limit_gb_per_s=CAP_GB_PER_S,
        )
    )


def parts_of(tuner: Tuner, lengths: Sequence[int]) -> tuple[Plan, dict[int, PlainPlan]]:
    """A plan to open, that of the longest draft, and the best settings of each draft length."""
    r = tuner.request
    space = make_space(r.profile, r.model, r.draft, r.workload, tuner.n_slots, r.batch)
    space = replace(space, n_threads=(max(space.n_threads),))
    chosen = {}
    for k in lengths:
        drafts = {"model": (k,)} if k else {"none": (0,)}
        chosen[k] = exhaustive(replace(space, draft_lengths=drafts), tuner.price, tuner.bound)[0]  # type: ignore[arg-type]
    plan = tuner.plan(chosen[lengths[-1]], chosen[0], list(chosen.values()))
    return plan, {k: tuner.part(choice) for k, choice in chosen.items()}


def answers(validator: Validator) -> dict[str, list[int]]:
    """The first tokens of every request's answer, plainly decoded."""
    with validator._engine({"plain": validator.plain}) as engine:
        engine.store.bucket.gb_per_s = None
        engine.submit(replace(r, max_tokens=ANSWERED_TOKENS) for r in validator.requests)
        list(engine.run())
        return {s.request.request_id: s.output for s in engine.finished}


def measure(validator: Validator, parts: dict[str, PlainPlan], limit: float | None) -> dict[str, list[Block]]:
    """Blocks of every part, in turns."""
    blocks: dict[str, list[Block]] = {name: [] for name in parts}
    with validator._engine(parts, room=True) as engine:
        engine.store.bucket.gb_per_s = None
        validator._warm(engine, 0)
        engine.store.bucket.gb_per_s = limit
        for turn in range(TURNS if limit else RESIDENT_TURNS):
            validator._pair(engine, parts, blocks, turn, "window prediction", WINDOWS if limit else RESIDENT_WINDOWS)
    return blocks


def rows_of(
    profile: HardwareProfile, workload: Workload, opened: Opened, plan: Plan, parts: dict[int, PlainPlan]
) -> Iterator[dict[str, object]]:
    """One row for each draft length, disk-bound and with every expert in memory."""
    lines = read_batch(prompts_path())[:32]
    requests = [to_request(line, opened.tokenizer, opened.target.spec, ignore_eos=True) for line in lines]
    validator = Validator(plan, opened, profile, workload, requests, Options(block_windows=RESIDENT_WINDOWS))
    everything = validator._everything()
    validator.answers = answers(validator)
    for regime, limit in (("disk capped", CAP_GB_PER_S), ("all resident", None)):
        if limit is None and everything is None:
            print("all experts do not fit in memory: no CPU-bound windows")
            continue
        named = {
            str(k): part if limit else part.model_copy(update={"experts": everything}) for k, part in parts.items()
        }
        measured = measure(validator, named, limit)
        moment = speed_beside(measured)
        for name, blocks in measured.items():
            windows = [w for block in blocks for w in block.windows]
            seconds = median(w.duration_s for w in windows)
            found, stored = (
                validator._forecast(named[name], blocks, limit, speed).prediction for speed in (moment, None)
            )
            kinds = {kind for w in windows for kind in w.phases_s if kind != "wait"}
            nodes = {kind: median(w.phases_s.get(kind, 0.0) for w in windows) for kind in kinds}
            worst, error = "", 0.0
            for kind, measured_s in nodes.items():
                off = found.phases_s.get(kind, 0.0) / measured_s - 1 if measured_s else 0.0
                if measured_s > LARGE_SHARE * seconds and abs(off) > abs(error):
                    worst, error = kind, off
            yield {
                "batch": named[name].decode.batch,
                "regime": regime,
                "draft_length": int(name),
                "bound": found.bound,
                "measured_ms": round(1e3 * seconds, 1),
                "predicted_ms": round(1e3 * found.window_s, 1),
                "error": round(found.window_s / seconds - 1, 4),
                "stored_profile_error": round(stored.window_s / seconds - 1, 4),
                "worst_node": worst,
                "worst_node_error": round(error, 4),
                "cpu": machine().cpu,
                "threads": named[name].threads.compute,
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("profile", type=Path)
    parser.add_argument("workload", type=Path)
    options = parser.parse_args()
    profile, workload = HardwareProfile.load(options.profile), Workload.load(options.workload)
    rows: list[dict[str, object]] = []
    for batch in BATCHES:
        plan, parts = parts_of(tuner_of(profile, workload, batch), LENGTHS)
        opened = open_plan(plan)
        for row in rows_of(profile, workload, opened, plan, parts):
            rows.append(row)
            print("  ".join(f"{k} {v}" for k, v in row.items() if k not in ("cpu", "threads")), flush=True)
    errors = [abs(float(row["error"])) for row in rows]  # type: ignore[arg-type]
    print(f"mean error {fmean(errors):.1%}, worst {max(errors):.1%} over {len(rows)} windows")
    pd.DataFrame(rows).to_csv(Path(__file__).with_suffix(".csv"), index=False)


if __name__ == "__main__":
    main()
