"""Claims: a window takes at most 1.10 times what its busiest lane measurably did, and drafting by prompt lookup is never
slower than 0.97 of not drafting.

The demo model on the machine of the given profile, its disk capped, 16 live requests: plain decoding, the tuned draft model and
prompt lookup at several lengths take turns in blocks that begin anew after the same prompts. Lanes run side by side, so no
schedule of the same nodes is shorter than its busiest lane. Prints both with intervals and writes bench/engine_overhead.csv; exit 1
where a claim does not hold: `python bench/engine_overhead.py profile.json workload.json`, about five minutes.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from statistics import median

import pandas as pd
from window_prediction import CAP_GB_PER_S, answers, tuner_of

from specmoeoff.demo import prompts_path
from specmoeoff.roofline.profile import machine
from specmoeoff.roofline.timing import paired_ratios
from specmoeoff.runtime.batch_files import read_batch, to_request
from specmoeoff.runtime.loading import open_plan
from specmoeoff.runtime.validate import Block, Options, Validator
from specmoeoff.specs.plan import PlainPlan
from specmoeoff.specs.profile import HardwareProfile
from specmoeoff.specs.workload import Workload
from specmoeoff.tuner.search import exhaustive
from specmoeoff.tuner.space import make_space

BATCH, TURNS, WINDOWS, NGRAM_LENGTHS = 16, 7, 6, (1, 2, 4, 8)
LONGEST_WINDOW, SLOWEST_NGRAM = 1.10, 0.97


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("profile", type=Path)
    parser.add_argument("workload", type=Path)
    options = parser.parse_args()
    profile, workload = HardwareProfile.load(options.profile), Workload.load(options.workload)
    tuner = tuner_of(profile, workload, BATCH)
    r = tuner.request
    space = make_space(r.profile, r.model, r.draft, r.workload, tuner.n_slots, r.batch)
    space = replace(space, n_threads=(max(space.n_threads),))
    wanted = {"plain": {"none": (0,)}, "model": {"model": space.draft_lengths["model"]}}
    wanted |= {f"ngram {k}": {"ngram": (k,)} for k in NGRAM_LENGTHS}
    chosen = {
        name: exhaustive(replace(space, draft_lengths=lengths), tuner.price, tuner.bound)[0]  # type: ignore[arg-type]
        for name, lengths in wanted.items()
    }
    plan = tuner.plan(chosen["model"], chosen["plain"], list(chosen.values()))
    parts: dict[str, PlainPlan] = {name: tuner.part(choice) for name, choice in chosen.items()}
    opened = open_plan(plan)
    requests = [
        to_request(line, opened.tokenizer, opened.target.spec, ignore_eos=True)
        for line in read_batch(prompts_path())[:32]
    ]
    validator = Validator(plan, opened, profile, workload, requests, Options(block_windows=WINDOWS))
    validator.answers = answers(validator)
    blocks: dict[str, list[Block]] = {name: [] for name in parts}
    with validator._engine(parts, room=True) as engine:
        engine.store.bucket.gb_per_s = None
        validator._warm(engine, 0)
        engine.store.bucket.gb_per_s = CAP_GB_PER_S
        for turn in range(TURNS):
            validator._pair(engine, parts, blocks, turn, "blocks", WINDOWS)

    rates = {
        name: [sum(w.tokens for w in b.windows) / sum(w.duration_s for w in b.windows) for b in of]
        for name, of in blocks.items()
    }
    rows = []
    for name, of in blocks.items():
        windows = [w for b in of for w in b.windows]
        busiest_s = [max(sum(s for p, s in w.phases_s.items() if p != "wait"), w.busy_s["disk"]) for w in windows]
        ratio, low, high, _ = paired_ratios(rates[name], rates["plain"])
        rows.append(
            {
                "drafter": name,
                "draft_length": parts[name].decode.draft_length,
                "tokens_per_s": round(median(rates[name]), 1),
                "over_plain": round(ratio, 3),
                "low": round(low, 3),
                "high": round(high, 3),
                "window_ms": round(1e3 * median(w.duration_s for w in windows), 1),
                "window_over_busiest_lane": round(
                    median(w.duration_s / s for w, s in zip(windows, busiest_s, strict=True)), 3
                ),
                "cpu": machine().cpu,
            }
        )
    table = pd.DataFrame(rows)
    table.to_csv(Path(__file__).with_suffix(".csv"), index=False)
    print(table.drop(columns="cpu").to_string(index=False))
    slow = table[(table.window_over_busiest_lane > LONGEST_WINDOW) | (table.over_plain < SLOWEST_NGRAM)]
    sys.exit(bool(len(slow)))


if __name__ == "__main__":
    main()
