"""SpecMoEOff's Figs 10, 11 and 13 by measurement, and what a draft length that follows context and live requests adds.

The demo model on the machine of the given profile, its disk capped. Fig 10: throughput, tokens a round and window time over
the draft length; Fig 13: where a window's time goes; Fig 11: throughput end to end over input and output length, plain and
drafting. Writes bench/paper_figures.csv and docs/paper_figures.png: `python bench/paper_figures.py profile.json workload.json`,
under ten minutes; `--quick` rehearses it.
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path
from statistics import fmean, median

import matplotlib as mpl
import pandas as pd
from window_prediction import CAP_GB_PER_S, answers, measure, parts_of, tuner_of

from specmoeoff.demo import prompts_path
from specmoeoff.roofline.profile import machine
from specmoeoff.roofline.timing import paired_ratios
from specmoeoff.runtime.batch_files import read_batch, to_request
from specmoeoff.runtime.engine import Engine
from specmoeoff.runtime.loading import Opened, open_plan
from specmoeoff.runtime.sequence import Request
from specmoeoff.runtime.validate import Options, Validator
from specmoeoff.specs.plan import LengthAt, PlainPlan
from specmoeoff.specs.profile import HardwareProfile
from specmoeoff.specs.workload import Workload
from specmoeoff.tuner.search import exhaustive
from specmoeoff.tuner.space import make_space

mpl.use("Agg")
from matplotlib import pyplot as plt

FOLDER = Path(__file__).parent
BATCH, LENGTHS = 16, (0, 1, 2, 4, 6, 8, 11, 15)
INPUTS, OUTPUTS = (32, 96), (16, 48)
PAIRS, WINDOWS = 6, 3


def over_length(validator: Validator, parts: dict[int, PlainPlan]) -> pd.DataFrame:
    """Figs 10 and 13: a row for each draft length."""
    rows = []
    for name, blocks in measure(validator, {str(k): part for k, part in parts.items()}, CAP_GB_PER_S).items():
        windows = [w for block in blocks for w in block.windows]
        kinds = sorted({kind for w in windows for kind in w.phases_s})
        rows.append(
            {
                "draft_length": int(name),
                "tokens_per_s": sum(w.tokens for w in windows) / sum(w.duration_s for w in windows),
                "tokens_per_round": fmean(w.tokens / w.live for w in windows),
                "window_s": median(w.duration_s for w in windows),
                **{f"{kind}_s": fmean(w.phases_s.get(kind, 0.0) for w in windows) for kind in kinds},
            }
        )
    return pd.DataFrame(rows).fillna(0.0)


def rate(opened: Opened, part: PlainPlan, requests: list[Request], table: tuple[LengthAt, ...] = ()) -> float:
    """Tokens per second end to end."""
    with Engine(
        opened.target, opened.draft, part.decode, part.experts, part.threads, CAP_GB_PER_S, draft_lengths=table
    ) as engine:
        begun = time.perf_counter()
        engine.submit(requests)
        tokens = sum(window.tokens for window in engine.run())
        return tokens / (time.perf_counter() - begun)


def cut(requests: list[Request], n_input: int, n_output: int) -> list[Request]:
    """The last tokens of each prompt; what is too short begins again."""
    return [
        replace(r, prompt=(r.prompt * (-(-n_input // len(r.prompt))))[-n_input:], max_tokens=n_output, stop_ids=())
        for r in requests
    ]


def plot(lengths: pd.DataFrame, sizes: pd.DataFrame) -> None:
    """Four panels."""
    figure, axes = plt.subplots(2, 2, figsize=(10, 7), layout="constrained")
    top, rounds, breakdown, size = axes.flat
    k = lengths.draft_length
    top.plot(k, lengths.tokens_per_s, marker="o")
    top.set(title="Fig 10: throughput", xlabel="draft length", ylabel="tokens/s")
    rounds.plot(k, lengths.tokens_per_round, marker="o", label="tokens a round")
    rounds.plot(k, 10 * lengths.window_s, marker="s", label="window (100 ms)")
    rounds.set(title="Fig 10: tokens a round, window time", xlabel="draft length")
    rounds.legend(frameon=False)
    kinds = [c for c in lengths if c.endswith("_s") and c not in ("tokens_per_s", "window_s")]
    breakdown.stackplot(k, *(1e3 * lengths[c] for c in kinds), labels=[c[:-2] for c in kinds])
    breakdown.set(title="Fig 13: a window's time", xlabel="draft length", ylabel="ms")
    breakdown.legend(frameon=False, loc="upper left")
    names = [f"{i}/{o}" for i, o in zip(sizes.input_tokens, sizes.output_tokens, strict=True)]
    for shift, column in ((-0.2, "plain_tokens_per_s"), (0.2, "tuned_tokens_per_s")):
        size.bar([i + shift for i in range(len(sizes))], sizes[column], 0.4, label=column.split("_")[0])
    size.set_xticks(range(len(names)), names)
    size.set(title="Fig 11: end to end", xlabel="input/output tokens", ylabel="tokens/s")
    size.legend(frameon=False)
    figure.savefig(FOLDER.parent / "docs" / "paper_figures.png", dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("profile", type=Path)
    parser.add_argument("workload", type=Path)
    parser.add_argument("--quick", action="store_true", help="A few short runs, to see that everything works.")
    options = parser.parse_args()
    profile, workload = HardwareProfile.load(options.profile), Workload.load(options.workload)
    quick = options.quick
    tuner = tuner_of(profile, workload, 4 if quick else BATCH)
    batch = tuner.request.batch
    plan, parts = parts_of(tuner, (0, 4) if quick else LENGTHS)
    opened = open_plan(plan)
    lines = read_batch(prompts_path())[: 2 * BATCH]
    requests = [to_request(line, opened.tokenizer, opened.target.spec, ignore_eos=True) for line in lines]
    validator = Validator(plan, opened, profile, workload, requests, Options(block_windows=WINDOWS))
    if not quick:
        validator.answers = answers(validator)
    lengths = over_length(validator, parts)
    print(lengths.round(4).to_string(index=False), flush=True)
    best = int(lengths.draft_length[lengths.tokens_per_s.idxmax()])

    sizes = []
    for n_input in INPUTS[:1] if quick else INPUTS:
        for n_output in (4,) if quick else OUTPUTS:
            some = cut(requests[:batch], n_input, n_output)
            plain, tuned = (rate(opened, parts[k], some) for k in (0, best))
            sizes.append(
                {
                    "input_tokens": n_input,
                    "output_tokens": n_output,
                    "draft_length": best,
                    "plain_tokens_per_s": plain,
                    "tuned_tokens_per_s": tuned,
                }
            )
            print("  ".join(f"{name} {value:.4g}" for name, value in sizes[-1].items()), flush=True)

    longest = max(parts)
    r = tuner.request
    space = make_space(profile, r.model, r.draft, workload, tuner.n_slots, batch)
    drafts = {"model": (longest,)}
    choice = exhaustive(replace(space, draft_lengths=drafts), tuner.price, tuner.bound)[0]  # type: ignore[arg-type]
    table = tuner.draft_lengths(choice)
    print("draft length by (live, context):", {(at.live, at.context_tokens): at.draft_length for at in table})
    ragged = [replace(q, max_tokens=8 + 5 * i % 41, stop_ids=()) for i, q in enumerate(requests[:batch])]
    ours, fixed = [], []
    for _ in range(1 if quick else PAIRS):
        ours.append(rate(opened, tuner.part(choice), ragged, table))
        fixed.append(rate(opened, parts[best], ragged))
    middle, low, high, confidence = paired_ratios(ours, fixed)
    print(
        f"dynamic over the best fixed length {best}: {middle:.3f}x ({low:.3f} to {high:.3f}, {confidence:.1%} interval)"
    )
    if quick:
        return
    dynamic = pd.DataFrame({"dynamic_tokens_per_s": ours, "fixed_tokens_per_s": fixed, "draft_length": best})
    figures = {"10 and 13": lengths, "11": pd.DataFrame(sizes), "dynamic": dynamic}
    found = pd.concat([part.assign(figure=name) for name, part in figures.items()])
    found.assign(batch=batch, cpu=machine().cpu).to_csv(FOLDER / "paper_figures.csv", index=False)
    plot(lengths, figures["11"])


if __name__ == "__main__":
    main()
