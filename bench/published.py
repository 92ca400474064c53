"""Published numbers replayed: what our formulas and estimators give for the same setting, the ratio, and what had to be assumed.

Prints every row with its replay or the reason why there is none, and writes bench/published.csv. Nothing is measured here.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from statistics import fmean, median
from typing import NamedTuple

import numpy as np
import pandas as pd

from specmoeoff.errors import SpecMoEOffError
from specmoeoff.estimate.accuracy import accuracy
from specmoeoff.estimate.gpu_choices import Choices, eagle_head, make_problem
from specmoeoff.estimate.gpu_memory import largest_batch, split_kv
from specmoeoff.estimate.gpu_window import GpuEstimator
from specmoeoff.estimate.hrm import HrmMachine, hrm
from specmoeoff.estimate.rates import rates_of
from specmoeoff.estimate.speculation import expected_tokens, moesd_speedup, verified_share
from specmoeoff.profiles import find
from specmoeoff.profiles.published import Row, names, rows
from specmoeoff.roofline.fits import fit_transfer
from specmoeoff.specs.model import ModelShape, ModelSpec
from specmoeoff.specs.profile import HardwareProfile
from specmoeoff.specs.workload import Workload
from specmoeoff.tuner.gpu_space import LONGEST_DRAFT, GpuSpace

GIB = 1 << 30
N_KEYS = Row._fields.index("value")  # the columns before it name the number
# As the optimizer of MoE-Lightning's artifact states them; S1's RAM and its bandwidth are not stated: S2's are taken.
MACHINES = {
    "S1": HrmMachine(15 * GIB, 197_880_360_960, 16 * GIB, 300 * GIB, 76 * GIB, 65e12, 0.8e12),
    "S2": HrmMachine(24 * GIB, 197_880_360_960, 16 * GIB, 285 * GIB, 76 * GIB, 104e12, 1.6e12),
}
A30_GFLOPS, A30_LINK_GB_PER_S = 165e3, 25.0  # SpecMoEOff, Table 1
KV_BUDGET = {"A30": 160 * GIB, "4090D": 100 * GIB}  # of 250 and 190 GB of DRAM


class Replay(NamedTuple):
    """`value` is None where nothing can be said; then `assumes` is the reason."""

    value: float | None
    by: str
    assumes: str


def not_modelled(reason: str) -> Iterator[Replay]:
    """A row that stands without a replay."""
    yield Replay(None, "not modelled", reason)


@cache
def mixtral() -> ModelSpec:
    """Its shipped shape."""
    return ModelShape.load(find("models", "mixtral-8x7b")).model


@cache
def table(name: str) -> list[Row]:
    """Rows of a source, read once."""
    return rows(name)


def same(name: str, row: Row, **fields: str) -> float:
    """The value of the row that differs from this one in these fields only."""
    wanted = row._replace(**fields)[:N_KEYS]
    return next(r.value for r in table(name) if r[:N_KEYS] == wanted)


# ---- SpecMoEOff ----------------------------------------------------------------------------------------------------------


@cache
def speculation_gain(host: str, workload: str, output_tokens: int, fast_gib: int, host_gib: int) -> float:
    """Best decode throughput with drafts over the best without, each with its own batch and placement."""
    lengths = Workload.load(find("workloads", workload)).with_output_tokens(output_tokens)
    problem = make_problem(mixtral(), lengths, None, LONGEST_DRAFT)
    estimator = GpuEstimator(problem, rates_of(HardwareProfile.load(find("machines", host))))
    space = GpuSpace(problem, {"fast": fast_gib * GIB, "host": host_gib * GIB})
    choices = space.choices(space.points())
    choices = choices.take(np.flatnonzero(choices.batch > 0))
    rate, drafts = estimator.tokens_per_s(choices), problem.of_draft(choices, "length") > 0
    return float(rate[drafts].max() / rate[~drafts].max())


def specmoeoff(row: Row) -> Iterator[Replay]:
    """The paper's arithmetic, its error row, and its speculation gain by our estimator."""
    spec, host = mixtral(), row.setting.split()[0]
    match row.quantity:
        case "largest batch":
            tokens = round(float(row.prompt_tokens)) + int(row.output_tokens)
            fits = largest_batch(KV_BUDGET[host], spec.kv_bytes_per_token, tokens)
            budget = KV_BUDGET[host] // GIB
            yield Replay(
                fits, "memory model", f"{budget} GiB for KV, {spec.kv_bytes_per_token:,} bytes and {tokens} tokens"
            )
        case "GPU utilisation of MoE" if row.batch == "1":
            share = 100 * A30_LINK_GB_PER_S / A30_GFLOPS
            yield Replay(
                share,
                "roofline",
                "one token for each streamed expert: a fiftieth of what is printed; 0.2 misses give a tenth",
            )
        case "GPU utilisation of MoE":
            flops_per_byte = int(row.batch) * spec.n_active / spec.n_experts
            yield Replay(
                100 * flops_per_byte * A30_LINK_GB_PER_S / A30_GFLOPS,
                "roofline",
                "the link is the roof; all experts streamed",
            )
        case "target KV" | "draft KV":
            target, draft = split_kv(KV_BUDGET["A30"], spec, eagle_head(spec))
            yield Replay((target if row.quantity == "target KV" else draft) / GIB, "memory model", "160 GiB for both")
        case "experts":
            yield Replay(spec.n_all_experts * spec.expert_bytes / GIB, "memory model", "32 layers of 8")
        case "two-layer expert buffer":
            yield Replay(2 * spec.n_experts * spec.expert_bytes / GIB, "memory model", "2 layers of 8")
        case "error":
            actual, estimated = (same("specmoeoff", row, quantity=q) for q in ("actual", "estimated"))
            found = accuracy(row.system, [estimated], [actual])
            yield Replay(
                100 * found.mape, "its own seconds", "of the actual (the paper divides attention's by the estimate)"
            )
        case "actual" if row.system == "iteration":
            parts = (same("specmoeoff", row, system=s) for s in ("target", "draft", "others"))
            yield Replay(sum(parts), "its own seconds", "target + draft + others")
        case "actual" if row.system == "HtoD":
            seconds = spec.n_all_experts * spec.expert_bytes / (A30_LINK_GB_PER_S * 1e9)
            yield Replay(seconds, "roofline", "all experts at the stated 25 GB/s")
        case q if q.startswith("over itself without speculation"):
            name = "apps" if q.endswith("APPS") else "cnn-dailymail"
            gain = speculation_gain("a30", name, 1024, 24, 250)
            yield Replay(
                gain,
                "our estimator, decode only",
                "1024 output tokens, EAGLE's MT-bench acceptance (chain), efficiencies from its Table 3",
            )
        case "actual" | "estimated":
            yield from not_modelled("a measurement of one operator; its error row is replayed")
        case _:
            yield from not_modelled("the other side is another runtime, or no setting is stated")


# ---- MoE-Lightning -------------------------------------------------------------------------------------------------------


def policy(row: Row) -> tuple[int, int]:
    """Micro-batch and how many."""
    micro, n = map(int, row.batch.split("x"))
    return micro, n


@cache
def plain_rate(host: str, prompt: int, output: int, micro: int, n: int) -> float:
    """Our estimator's plain decoding of that batch, all experts streamed, attention on the CPU."""
    lengths = Workload.load(find("workloads", "mt-bench"))
    lengths = lengths.model_copy(update={"acceptance": {}})
    lengths = lengths if lengths.output_tokens else lengths.with_output_tokens(output)
    problem = replace(make_problem(mixtral(), lengths, None, 0), context_tokens=prompt + output / 2)
    one = {name: np.zeros(1, int) for name in ("draft", "on_host", "resident")}
    zero, batch = np.zeros(1), np.full(1, float(micro * n))
    choices = Choices(
        micro_batches=np.full(1, min(n, 4)),
        on_demand=np.zeros(1, bool),
        kv_share=zero,
        draft_kv_share=zero,
        batch=batch,
        **one,
    )
    return float(GpuEstimator(problem, rates_of(HardwareProfile.load(find("machines", host)))).tokens_per_s(choices)[0])


@cache
def operator_points(quantity: str) -> list[tuple[int, float]]:
    """(KV bytes of one layer, seconds)."""
    per_token = mixtral().kv_bytes_per_token // mixtral().n_layers
    found = [r for r in table("moe-lightning") if r.quantity == quantity]
    return [(int(r.batch) * int(r.prompt_tokens) * per_token, r.value) for r in found]


def moe_lightning(row: Row) -> Iterator[Replay]:
    """Its model from its constants, its operators by our fits from the other 19 points, its runs by both models."""
    spec, setting = mixtral(), row.setting[:2]
    if row.system == "HRM":
        found = hrm(MACHINES["S2"], spec, 77, 32, *policy(row))
        value = {
            "decode only": found.tokens_per_s,
            "experts over the link, one layer": found.transfer_s,
            "one token of every request": found.transfer_s * spec.n_layers,
            "CPU home": found.cpu_home_bytes / GIB,
            "CPU pinned": found.cpu_pinned_bytes / GIB,
            "resident share of experts": found.resident_share,
        }[row.quantity]
        yield Replay(value, "HRM", "its constants")
    elif row.quantity in ("KV copy", "CPU attention"):
        points = operator_points(row.quantity)
        i = points.index(
            (int(row.batch) * int(row.prompt_tokens) * spec.kv_bytes_per_token // spec.n_layers, row.value)
        )
        fit = fit_transfer(*zip(*(p for j, p in enumerate(points) if j != i), strict=True))
        yield Replay(fit.latency_s + points[i][0] / fit.bytes_per_s, "our fit", "from the other 19 points")
    elif row.quantity == "MoE FFN":
        yield Replay(
            spec.n_experts * spec.expert_bytes / 300e9, "roofline", "one layer's experts at the datasheet's 300 GB/s"
        )
    elif (row.system, row.quantity) == ("MoE-Lightning", "end to end") and setting in MACHINES:
        prompt, output = int(row.prompt_tokens), int(row.output_tokens)
        found = hrm(MACHINES[setting], spec, prompt, output, *policy(row))
        yield Replay(found.tokens_per_s, "HRM, decode only", "the published number includes prefill")
        if setting == "S2":
            rate = plain_rate("l4", prompt, output, *policy(row))
            yield Replay(
                rate, "our estimator, decode only", "batch as published, all experts streamed, stated efficiencies"
            )
    elif row.quantity == "wall time":
        yield from not_modelled("number of requests not at hand")
    else:
        yield from not_modelled("another runtime, more than one GPU, or a model without a shipped shape")


# ---- the others ----------------------------------------------------------------------------------------------------------


def moesd(row: Row) -> Iterator[Replay]:
    """Speed-up from its times, and sigma of longer drafts from the one rate that explains two."""
    k = int(row.draft_length)
    if row.quantity == "speedup":
        sigma, plain, speculative = (same("moesd", row, quantity=q) for q in ("sigma", "plain", "speculative"))
        yield Replay(
            moesd_speedup(sigma, k, 0.0, speculative * sigma * (k + 1), plain),
            "its own times",
            "a round is sigma (k+1) tokens",
        )
    elif row.quantity == "sigma" and k > 2:
        at_two = same("moesd", row, draft_length="2")
        grid = np.linspace(0.01, 0.999, 2000)
        rate = float(min(grid, key=lambda a: abs(verified_share([a] * 2, 2) - at_two)))
        yield Replay(
            verified_share([rate] * k, k), "one acceptance rate", f"{rate:.3f} for every token, from two drafted"
        )
    else:
        yield from not_modelled("an input of the other rows")


def eagle(row: Row) -> Iterator[Replay]:
    """Tokens per round of a chain."""
    if row.quantity == "tokens per round":
        rates = [r.value for r in table("eagle") if r.quantity == "conditional acceptance"]
        yield Replay(
            expected_tokens(rates, len(rates)), "our formula", "a chain of 5, where the published number is of trees"
        )
    else:
        yield from not_modelled("an input of the other rows" if row.unit == "" else "trees on another machine")


REPLAYS: dict[str, Callable[[Row], Iterator[Replay]]] = {
    "specmoeoff": specmoeoff,
    "moe-lightning": moe_lightning,
    "moe-gen": lambda row: not_modelled("no profile of an A5000, and its module batching is another runtime"),
    "flexgen": lambda row: not_modelled("dense models"),
    "moesd": moesd,
    "eagle": eagle,
}


def main() -> None:
    """Replay everything."""
    told = []
    for name in names():
        for row in table(name):
            try:
                found = list(REPLAYS[name](row))
            except SpecMoEOffError as error:
                found = list(not_modelled(str(error)))
            for value, by, assumes in found:
                ratio = None if value is None else value / row.value
                told.append(
                    {"file": name, **row._asdict(), "replayed": value, "ratio": ratio, "by": by, "assumes": assumes}
                )
                setting = " ".join(filter(None, (row.setting, row.model, row.system, row.batch, row.output_tokens)))
                what = f"{name}: {setting}: {row.quantity}"
                seen = f"{row.value:g} {row.unit}".strip()
                print(
                    f"{what}: {seen}; "
                    + (f"{by} {value:.5g}, ratio {ratio:.3f} ({assumes})" if ratio else f"{by} ({assumes})")
                )
    print()
    by_model: dict[tuple[str, str], list[float]] = {}
    for one in told:
        if one["ratio"] is not None:
            by_model.setdefault((one["file"], one["by"]), []).append(one["ratio"])
    for (name, by), ratios in by_model.items():
        errors = fmean(abs(r - 1) for r in ratios)
        print(
            f"{name} by {by}: {len(ratios)} rows, median ratio {median(ratios):.3f}, mean absolute error {errors:.1%}"
        )
    print(f"{sum(one['ratio'] is None for one in told)} rows not modelled")
    pd.DataFrame(told).to_csv(Path(__file__).with_suffix(".csv"), index=False)


if __name__ == "__main__":
    main()
