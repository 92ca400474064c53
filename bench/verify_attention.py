"""Verification attention: our kernel beside the roof of the moment, and torch's at its best in the same process.

KV is larger than four times the L3, in pages of random order, and is walked through in full. Ours is the whole of a layer's work:
the new tokens' keys and values are appended to the pages first; what the C library takes is timed. The roof of a sample is the larger of bytes over the DRAM rate and
FLOPs over the bf16 peak, both sampled just before and just after it. Writes bench/verify_attention.csv as it goes on.
"""

import argparse
import os
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from _roofs import Roof, inside, take_turns

from specmoeoff.kernels import cpu
from specmoeoff.roofline.profile import machine
from specmoeoff.roofline.timing import paired_ratios

HEADS = ((32, 8), (32, 4), (9, 3), (16, 16))
DIMS = (64, 128)
CONTEXTS = (512, 2048, 16384)
TOKENS = (1, 2, 3, 5, 8, 16)
KV_BYTES = 192 << 20


class Case(NamedTuple):
    """One shape. n new tokens a request, the last of `context` positions."""

    n_heads: int
    n_kv_heads: int
    dim: int
    context: int
    n: int

    @property
    def n_requests(self) -> int:
        return max(1, round(KV_BYTES / (4 * self.n_kv_heads * self.dim * self.context)))

    @property
    def kv_bytes(self) -> float:
        return 4.0 * self.n_requests * self.context * self.n_kv_heads * self.dim

    @property
    def flops(self) -> float:
        pairs = sum(self.context - self.n + 1 + t for t in range(self.n))
        return 4.0 * self.n_requests * pairs * self.n_heads * self.dim

    @property
    def rows(self) -> int:
        """Of one KV head: tokens times the query heads that share it; FLOPs per byte of bf16 KV."""
        return self.n * self.n_heads // self.n_kv_heads


def ours(case: Case, n_threads: int, rng: np.random.Generator) -> Callable[[], None]:
    """Our kernels over paged KV, pages in random order."""
    heads, dim, n = case.n_kv_heads, case.dim, case.n
    pages = -(-case.context // cpu.PAGE_TOKENS)
    shape = cpu.KVShape(case.n_heads, heads, dim, dim)
    total = case.n_requests * pages
    table = rng.permutation(total).astype(np.int32).reshape(case.n_requests, pages)
    starts = (np.arange(case.n_requests + 1) * n).astype(np.int32)
    batch = cpu.Batch(starts, np.full(case.n_requests, case.context - n, np.int32), table)
    block = (rng.standard_normal(1 << 16).astype(np.float32)).view(np.uint32) >> 16
    kv = cpu.aligned_empty(total * shape.page_bytes, huge_pages=True)
    kv.view(np.uint16)[:] = np.resize(block.astype(np.uint16), len(kv) // 2)
    kv = kv.reshape(total, -1)
    query = (rng.standard_normal((case.n_requests * n, case.n_heads * dim)).astype(np.float32) / dim**0.5).view(
        np.uint32
    )
    query, out = (query >> 16).astype(np.uint16), np.zeros(query.shape, np.uint16)
    keys, values = (rng.standard_normal((case.n_requests * n, heads * dim)).astype(np.float32) for _ in range(2))
    kernels = cpu.Kernels(n_threads)

    def layer() -> None:
        kernels.append_kv(shape, batch, kv, keys, values)
        kernels.verify_attention(shape, batch, kv, query, out)

    return layer


def peers(case: Case, n_threads: int) -> dict[str, Callable[[], object]]:
    """torch, KV contiguous per head as it likes it best; the mask made outside the timer."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention as sdpa

    torch.set_num_threads(n_threads)
    b, g = case.n_requests, case.n_heads // case.n_kv_heads
    k, v = (torch.randn(b, case.n_kv_heads, case.context, case.dim, dtype=torch.bfloat16) for _ in range(2))
    q = torch.randn(b, case.n_kv_heads, g * case.n, case.dim, dtype=torch.bfloat16)
    token = torch.arange(g * case.n) // g
    seen = torch.arange(case.context)[None] <= case.context - case.n + token[:, None]
    mask = torch.zeros(g * case.n, case.context, dtype=torch.bfloat16).masked_fill(~seen, float("-inf"))
    kt, flat_v = k.reshape(-1, case.context, case.dim).transpose(1, 2), v.reshape(-1, case.context, case.dim)
    flat_q, scale = q.reshape(-1, g * case.n, case.dim), case.dim**-0.5
    hq = q.reshape(b, case.n_kv_heads, case.n, g, case.dim).transpose(2, 3).reshape(b, case.n_heads, case.n, case.dim)
    mask_of_tokens = mask[::g].contiguous()
    return {
        "sdpa_folded": lambda: sdpa(q, k, v, attn_mask=mask),
        "sdpa_gqa": lambda: sdpa(hq, k, v, attn_mask=mask_of_tokens, enable_gqa=True),
        "bmm_folded": lambda: torch.bmm(torch.softmax(torch.bmm(flat_q, kt) * scale + mask, -1), flat_v),
    }


def measure(
    case: Case, roof: Roof, n_threads: int, with_peers: bool, in_kernels: Callable[[Callable[[], object]], float]
) -> dict[str, object]:
    """One row of the table."""
    rivals = peers(case, n_threads) if with_peers else {}
    found = take_turns(
        ours(case, n_threads, np.random.default_rng(0)), rivals, roof, case.kv_bytes, case.flops, in_kernels
    )
    share, low, high, _ = paired_ratios(found.roof, found.ours)
    rate, flops_per_s = np.median(found.rates, axis=0)
    ridge = flops_per_s / rate
    name, best = found.best_peer()
    seconds, roof_s = float(np.median(found.ours)), float(np.median(found.roof))
    return {
        "heads": f"{case.n_heads}/{case.n_kv_heads}",
        "dim": case.dim,
        "context": case.context,
        "n": case.n,
        "rows": case.rows,
        "ridge": round(ridge, 1),
        "zone": "memory" if case.rows <= ridge / 2 else "ridge" if case.rows <= 2 * ridge else "compute",
        "ms": round(1e3 * seconds, 3),
        "roof_share": round(share, 3),
        "low": round(low, 3),
        "high": round(high, 3),
        "dram_gb_per_s": round(rate / 1e9, 1),
        "gflop_per_s": round(flops_per_s / 1e9),
        "best_peer": name,
        "best_peer_over_ours": round(best / seconds, 2),
        "wanted_of_peer": round(min(3, 0.75 * best / roof_s), 2),
        "pairs": len(found.ours),
        "cpu": machine().cpu,
        "threads": n_threads,
    }


def cases(quick: bool) -> Iterator[Case]:
    for (heads, kv_heads), dim, context, n in product(HEADS, DIMS, CONTEXTS, TOKENS):
        if not quick or (context == 2048 and (heads, kv_heads) in ((32, 8), (9, 3))):
            yield Case(heads, kv_heads, dim, context, n)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two shapes at one context")
    parser.add_argument("--no-peers", action="store_true")
    options = parser.parse_args()
    n_threads = len(os.sched_getaffinity(0))
    roof = Roof(n_threads, "bf16_dot")
    print(f"{machine().cpu}, {n_threads} threads")
    rows, in_kernels = [], inside("smo_append_kv", "smo_verify_attention")
    for case in cases(options.quick):
        rows.append(measure(case, roof, n_threads, not options.no_peers, in_kernels))
        print("  ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
        if not options.quick:
            pd.DataFrame(rows).to_csv(Path(__file__).with_suffix(".csv"), index=False)


if __name__ == "__main__":
    main()
