"""Expert FFN: our kernel in every format beside the roof of the moment and torch's bf16, taking turns in one process.

A call computes a few experts of one shape, each for as many tokens; the weights of all calls are larger than four times the
L3. The roof of a sample is the larger of weight bytes over the DRAM rate and operations over the peak of the format's
products, both sampled just before and just after it. Of ours what the C library takes is timed. Writes bench/expert_ffn.csv, row by row.
"""

import argparse
import csv
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from _roofs import READ_BYTES, Roof, inside, take_turns

from specmoeoff.kernels import cpu
from specmoeoff.roofline.profile import machine
from specmoeoff.roofline.timing import paired_ratios


class Shape(NamedTuple):
    """Experts of one call."""

    hidden: int
    intermediate: int
    n_experts: int

    @property
    def weights(self) -> int:
        return 3 * self.hidden * self.intermediate * self.n_experts


SHAPES = {"demo": Shape(576, 1536, 8), "mixtral": Shape(4096, 14336, 1), "qwen3-30b": Shape(2048, 768, 8)}
FORMATS = ("bf16", "int8", "int4", "mxfp4")
TOKENS = (1, 4, 16, 128, 512)


def parts_of(shape: Shape) -> list[torch.Tensor]:
    """gate, up (intermediate, hidden) and down (hidden, intermediate) bf16 of one expert; a block of numbers again and again."""
    block = torch.randn(1 << 16).mul(0.05).bfloat16()
    wide, narrow = (shape.intermediate, shape.hidden), (shape.hidden, shape.intermediate)
    return [
        torch.from_numpy(np.resize(block.view(torch.int16).numpy(), s)).view(torch.bfloat16)
        for s in (wide, wide, narrow)
    ]


def n_sets(shape: Shape, bytes_per_weight: float) -> int:
    return 1 + int(READ_BYTES / (shape.weights * bytes_per_weight))


def ours(shape: Shape, format: str, n_threads: int) -> tuple[int, Callable[[torch.Tensor], Callable[[], None]]]:
    """Bytes of the weights of a call, and what makes a call for tokens (n_experts, n, hidden)."""
    n_bytes = cpu.packed_expert_bytes(shape.hidden, shape.intermediate, format)
    sets = n_sets(shape, n_bytes * shape.n_experts / shape.weights)
    packed = cpu.aligned_empty(sets * shape.n_experts * n_bytes).reshape(sets, shape.n_experts, n_bytes)
    gate, up, down = (p.view(torch.uint16).numpy() for p in parts_of(shape))
    cpu.pack_expert(gate, up, down, packed[0, 0], format)
    packed[:] = packed[0, 0]
    kernels, turn, lists = cpu.Kernels(n_threads), iter(range(1 << 30)), [list(experts) for experts in packed]

    def call_for(x: torch.Tensor) -> Callable[[], None]:
        rows, out = (
            x.reshape(-1, shape.hidden).view(torch.uint16).numpy(),
            np.empty((x.shape[0] * x.shape[1], shape.hidden), np.float32),
        )
        slots = list(np.arange(len(out), dtype=np.int32).reshape(x.shape[:2]))
        return lambda: kernels.experts(rows, lists[next(turn) % sets], slots, out, shape.intermediate, format)

    return n_bytes * shape.n_experts, call_for


def peers(shape: Shape) -> Callable[[torch.Tensor], dict[str, Callable[[], object]]]:
    """torch in bf16, gate and up in one matrix: expert by expert, and all experts of a call at once."""
    gate, up, down = parts_of(shape)
    sets, n = n_sets(shape, 2), shape.n_experts
    gate_up = torch.cat([gate, up]).repeat(sets, n, 1, 1)
    downs = down.repeat(sets, n, 1, 1)
    turn, silu, linear = iter(range(1 << 30)), torch.nn.functional.silu, torch.nn.functional.linear

    def middle(both: torch.Tensor) -> torch.Tensor:
        gates, ups = both.chunk(2, -1)
        return silu(gates) * ups

    def one_by_one(x: torch.Tensor) -> list[torch.Tensor]:
        i = next(turn) % sets
        return [linear(middle(linear(x[e], gate_up[i, e])), downs[i, e]) for e in range(n)]

    def together(x: torch.Tensor) -> torch.Tensor:
        i = next(turn) % sets
        return torch.bmm(middle(torch.bmm(x, gate_up[i].mT)), downs[i].mT)

    return lambda x: {"torch_linear": lambda: one_by_one(x)} | ({"torch_bmm": lambda: together(x)} if n > 1 else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=FORMATS)
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS, help="of each expert")
    parser.add_argument("--no-peers", action="store_true")
    options = parser.parse_args()
    n_threads = len(os.sched_getaffinity(0))
    torch.set_num_threads(n_threads)
    roofs = {kind: Roof(n_threads, kind) for kind in ("bf16_dot", "int8_dot")}
    about = {"cpu": machine().cpu, "isa": cpu.Kernels(n_threads).isa, "threads": n_threads}
    print(about)
    in_kernels = inside("smo_experts")
    with Path(__file__).with_suffix(".csv").open("w", newline="") as file:
        writer = None
        for name in options.shapes:
            shape = SHAPES[name]
            peers_for = (lambda x: {}) if options.no_peers else peers(shape)
            for format in options.formats:
                n_bytes, call_for = ours(shape, format, n_threads)
                roof = roofs["bf16_dot" if format == "bf16" else "int8_dot"]
                for n in options.tokens:
                    x = torch.randn(shape.n_experts, n, shape.hidden).bfloat16()
                    found = take_turns(call_for(x), peers_for(x), roof, n_bytes, 2 * shape.weights * n, in_kernels)
                    share, low, high, _ = paired_ratios(found.roof, found.ours)
                    seconds, (best, best_s) = float(np.median(found.ours)), found.best_peer()
                    rates = np.median(found.rates, axis=0)
                    row = {
                        "shape": name,
                        "format": format,
                        "tokens": n,
                        "us": round(seconds * 1e6, 1),
                        "roof_share": round(share, 3),
                        "low": round(low, 3),
                        "high": round(high, 3),
                        "bound": "memory" if n_bytes / rates[0] > 2 * shape.weights * n / rates[1] else "compute",
                        "weight_gb_per_s": round(n_bytes / seconds / 1e9, 1),
                        "dram_gb_per_s": round(rates[0] / 1e9, 1),
                        "gop_per_s": round(2 * shape.weights * n / seconds / 1e9, 1),
                        "peak_gop_per_s": round(rates[1] / 1e9, 1),
                        "best_peer": best,
                        "best_peer_over_ours": round(best_s / seconds, 2),
                        "pairs": len(found.ours),
                    }
                    if writer is None:
                        writer = csv.DictWriter(file, [*row, *about])
                        writer.writeheader()
                        print("  ".join(row))
                    writer.writerow(row | about)
                    file.flush()
                    print("  ".join(str(value).rjust(len(key)) for key, value in row.items()), flush=True)


if __name__ == "__main__":
    main()
