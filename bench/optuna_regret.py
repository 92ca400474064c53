"""Claim: Optuna's hundred trials find what exhaustive search finds, and that search takes less than two seconds.

Three shipped machines x three shipped shapes, ten seeds, cold: only plain decoding and the paper's closed form are enqueued.
Prints a table, writes bench/optuna_regret.csv and docs/optuna_regret.png: `python bench/optuna_regret.py`.
"""

import time
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd

from specmoeoff.estimate.gpu_memory import GIB
from specmoeoff.profiles import find
from specmoeoff.specs.model import ModelShape
from specmoeoff.specs.profile import HardwareProfile
from specmoeoff.specs.workload import Workload
from specmoeoff.tuner.gpu_tune import GpuTuner, price_points
from specmoeoff.tuner.search import optuna_trials
from specmoeoff.tuner.tune import TuneRequest

mpl.use("Agg")
from matplotlib import pyplot as plt

FOLDER = Path(__file__).parent
MACHINES = {"a30": (24, 250), "4090d": (24, 190), "h100": (80, 512)}  # GiB of fast and host memory
MODELS = ("mixtral-8x7b", "qwen3-30b-a3b", "gpt-oss-120b")
N_SEEDS, N_TRIALS = 10, 100


def tuner_of(machine: str, model: str) -> GpuTuner:
    """Of APPS with 1,024 output tokens."""
    fast, host = MACHINES[machine]
    return GpuTuner(
        TuneRequest(
            profile=HardwareProfile.load(find("machines", machine)),
            model=ModelShape.load(find("models", model)).model,
            workload=Workload.load(find("workloads", "apps")).with_output_tokens(1024),
            model_source=model,
            fast_memory_bytes=fast * GIB,
            host_memory_bytes=host * GIB,
        )
    )


def regrets(tuner: GpuTuner, best: float, seed: int, starts: list[dict[str, int]]) -> tuple[np.ndarray, int]:
    """After each trial, how far the best so far is below the best of all; and how many trials did not fit."""
    names = list(tuner.space.axes)

    def value(index: dict[str, int]) -> float | None:
        found = price_points(tuner.space, tuner.estimator, np.array([[index[name] for name in names]]))
        return float(found.tokens_per_s[0]) if len(found.choices) else None

    values = [v for _, v in optuna_trials(tuner.space.axes, value, starts, N_TRIALS, seed, "bench")]
    return 1 - np.maximum.accumulate([v or 0.0 for v in values]) / best, values.count(None)


def main() -> None:
    rows, curves = [], []
    for machine in MACHINES:
        for model in MODELS:
            tuner = tuner_of(machine, model)
            begin = time.perf_counter()
            everything = tuner.everything
            exhaustive_s = time.perf_counter() - begin
            top = int(np.argmax(everything.tokens_per_s))
            best = float(everything.tokens_per_s[top])
            starts = [tuner.space.plain(), tuner.space.closed_form()]
            points = tuner.space.points()
            fits = np.flatnonzero(tuner.space.choices(points).batch > 0)
            warm = {name: int(i) for name, i in zip(tuner.space.axes, points[fits[top]], strict=True)}
            for seed in range(N_SEEDS):
                curve, n_infeasible = regrets(tuner, best, seed, starts)
                curves.append(curve)
                rows.append(
                    {
                        "machine": machine,
                        "model": model,
                        "seed": seed,
                        "n_configurations": len(everything.choices),
                        "exhaustive_s": round(exhaustive_s, 3),
                        "best_tokens_per_s": round(best, 2),
                        "regret_25": round(curve[24], 5),
                        "regret_50": round(curve[49], 5),
                        "regret_100": round(curve[99], 5),
                        "regret_warm": round(float(regrets(tuner, best, seed, [*starts, warm])[0][-1]), 5)
                        if seed == 0
                        else None,
                        "n_infeasible": n_infeasible,
                    }
                )
            mine = [c[-1] for c in curves[-N_SEEDS:]]
            print(
                f"{machine:6} {model:14} {len(everything.choices):,} configurations in {exhaustive_s:.2f} s, best {best:,.0f} "
                f"tokens/s; regret median {np.median(mine):.2%}, p90 {np.percentile(mine, 90):.2%}",
                flush=True,
            )
    table = pd.DataFrame(rows)
    table.to_csv(FOLDER / "optuna_regret.csv", index=False)
    final = table.regret_100
    print(f"all: median {final.median():.2%}, p90 {final.quantile(0.9):.2%}, infeasible {table.n_infeasible.sum()}")
    plot(np.array(curves))


def plot(curves: np.ndarray) -> None:
    """Regret over trials: median and 90th percentile of all studies."""
    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    trials = np.arange(1, curves.shape[1] + 1)
    for quantile, name in ((50, "median"), (90, "90th percentile")):
        axes.plot(trials, 100 * np.percentile(curves, quantile, axis=0), label=name)
    axes.axhline(1, color="0.6", linewidth=0.8, linestyle=":")
    axes.set_yscale("symlog", linthresh=0.1)
    axes.set_ylim(0, 100)
    axes.set(xlabel="trial", ylabel="below the best of all (%)", title="Optuna against exhaustive search, cold")
    axes.legend(frameon=False)
    figure.savefig(FOLDER.parent / "docs" / "optuna_regret.png", dpi=150)


if __name__ == "__main__":
    main()
