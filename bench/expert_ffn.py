"""Expert FFN: our kernel against torch's bf16 linear, taking turns in one process, beside the DRAM roof of the moment.

Prints one row per number of rows and writes bench/expert_ffn.csv: medians, and the median of paired ratios with its
interval. Weights rotate over many experts, so that they come from memory as when they are streamed.
"""

import os
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from specmoeoff.kernels import cpu
from specmoeoff.kernels.cpu.probes import Move
from specmoeoff.roofline.profile import machine
from specmoeoff.roofline.timing import paired_ratios, seconds_of

HIDDEN, INTERMEDIATE, N_EXPERTS, ROUNDS = 576, 1536, 40, 25
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


def main() -> None:
    threads = len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    kernels, rng = cpu.Kernels(threads), np.random.default_rng(0)
    ours, theirs = [], []
    for _ in range(N_EXPERTS):
        parts = [
            torch.randn(s, dtype=torch.float32).mul(0.05).bfloat16()
            for s in [(INTERMEDIATE, HIDDEN)] * 2 + [(HIDDEN, INTERMEDIATE)]
        ]
        packed = cpu.aligned_empty(cpu.packed_expert_bytes(HIDDEN, INTERMEDIATE))
        cpu.pack_expert(*(p.view(torch.uint16).numpy() for p in parts), packed)
        ours.append(packed)
        theirs.append(parts)
    read = Move("read_ahead", threads, cpu.aligned_empty(256 << 20))
    rows = []
    for m in ROWS:
        x = torch.from_numpy(rng.standard_normal((m, HIDDEN)).astype(np.float32)).bfloat16()
        x_bits, out, slots = (
            x.view(torch.uint16).numpy(),
            np.empty((m, HIDDEN), np.float32),
            np.arange(m, dtype=np.int32),
        )

        def run_ours(i: int, x_bits: np.ndarray = x_bits, out: np.ndarray = out, slots: np.ndarray = slots) -> None:
            kernels.experts(x_bits, [ours[i % N_EXPERTS]], [slots], out, INTERMEDIATE)

        def run_torch(i: int, x: torch.Tensor = x) -> torch.Tensor:
            gate, up, down = theirs[i % N_EXPERTS]
            f = torch.nn.functional
            return f.linear(f.silu(f.linear(x, gate)) * f.linear(x, up), down)

        samples: dict[str, list[float]] = {"ours": [], "torch": [], "read": []}
        for i in range(ROUNDS + 2):
            pair = {"ours": seconds_of(lambda i=i: run_ours(i)), "torch": seconds_of(lambda i=i: run_torch(i + 7))}
            pair["read"] = read.run().seconds
            if i >= 2:
                for name, seconds in pair.items():
                    samples[name].append(seconds)
        ratio, low, high, _ = paired_ratios(samples["torch"], samples["ours"])
        seconds = float(np.median(samples["ours"]))
        n_bytes = len(ours[0])
        rows.append(
            {
                "rows": m,
                "ours_us": round(seconds * 1e6, 1),
                "torch_us": round(float(np.median(samples["torch"])) * 1e6, 1),
                "torch_over_ours": round(ratio, 2),
                "low": round(low, 2),
                "high": round(high, 2),
                "gflop_per_s": round(6 * HIDDEN * INTERMEDIATE * m / seconds / 1e9, 1),
                "weight_gb_per_s": round(n_bytes / seconds / 1e9, 1),
                "dram_gb_per_s": round(read.n_bytes / float(np.median(samples["read"])) / 1e9, 1),
                "cpu": machine().cpu,
                "isa": kernels.isa,
                "threads": threads,
            }
        )
        print("  ".join(f"{k} {v}" for k, v in rows[-1].items() if k not in ("cpu", "isa", "threads")))
    pd.DataFrame(rows).to_csv(Path(__file__).with_suffix(".csv"), index=False)


if __name__ == "__main__":
    main()
