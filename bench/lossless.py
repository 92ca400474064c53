"""Speculative output equals plain output, token for token: every drafter, draft length and batch, on mixed lengths.

Each cell of the grid gets requests of its own, and all are compared with one plain decoding of the whole set. Writes
bench/lossless.csv; exit 1 if a single token differs.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
from rich.progress import track

from specmoeoff.demo import prompts_path
from specmoeoff.runtime.batch_files import read_batch, to_request
from specmoeoff.runtime.drafters.eagle import EagleHead, load_eagle_head
from specmoeoff.runtime.engine import Engine
from specmoeoff.runtime.loading import default_draft, model_folder
from specmoeoff.runtime.observe import observing_experts, observing_residents
from specmoeoff.runtime.pack import PackedModel, pack_model
from specmoeoff.runtime.sequence import Request
from specmoeoff.runtime.tokenizer import Tokenizer
from specmoeoff.runtime.verify import accept
from specmoeoff.specs.plan import DrafterName, PlanDecode, PlanThreads

DRAFT_LENGTHS, BATCHES, FEWEST = range(1, 9), (1, 3, 16), 10


@dataclass
class Cell:
    """What one drafter, draft length and batch did to its requests."""

    drafter: str
    draft_length: int
    batch: int
    requests: int
    tokens: int
    different: int
    tokens_per_round: float
    seconds: float


def run_grid(
    target: PackedModel,
    draft: PackedModel,
    requests: Sequence[Request],
    head: EagleHead | None = None,
    accept_: Callable[[list[int], list[int]], int] = accept,
) -> Iterator[Cell]:
    """Cell after cell; the requests are dealt out to them in turn."""
    n_cells = (3 if head else 2) * len(DRAFT_LENGTHS) * len(BATCHES)
    context = max(len(r.prompt) + r.max_tokens for r in requests)
    experts = observing_experts(target.spec, observing_residents(target))
    threads = PlanThreads(compute=len(os.sched_getaffinity(0)), disk_readers=2, disk_chunk_bytes=1 << 20)
    plain: dict[str, list[int]] = {}
    cell = 0
    kinds: list[tuple[PackedModel | EagleHead, tuple[DrafterName, ...]]] = [(draft, ("ngram", "model"))]
    if head:
        kinds.append((head, ("eagle",)))
    for batch, (drafting, drafters) in product(sorted(BATCHES, reverse=True), kinds):
        widest = PlanDecode(
            drafter=drafters[0],
            draft_length=max(DRAFT_LENGTHS),
            batch=batch,
            micro_batches=1,
            context_tokens=context,
            prefill_chunk_tokens=256,
        )
        with Engine(target, drafting, widest, experts, threads) as engine:

            def outputs(todo: Sequence[Request], engine: Engine = engine) -> tuple[dict[str, list[int]], float]:
                """Of requests, and tokens a round, over the windows in which nobody's prompt rode along."""
                engine.submit(todo)
                rounds = tokens = 0
                for window in engine.run():
                    if not window.prefill_rows:
                        rounds, tokens = rounds + window.live, tokens + window.tokens
                found = {s.request.request_id: s.output for s in engine.finished}
                engine.finished.clear()
                return found, tokens / max(rounds, 1)

            if not plain:
                engine.configure(widest.model_copy(update={"drafter": "none", "draft_length": 0}), experts)
                plain, _ = outputs(requests)
            engine.accept = accept_
            for drafter, k in product(drafters, DRAFT_LENGTHS):
                engine.configure(widest.model_copy(update={"drafter": drafter, "draft_length": k}), experts)
                todo, begun = requests[cell::n_cells], time.perf_counter()
                found, tokens_per_round = outputs(todo)
                seconds = time.perf_counter() - begun
                different = sum(plain[r.request_id] != found.get(r.request_id) for r in todo)
                n_tokens = sum(map(len, found.values()))
                yield Cell(drafter, k, batch, len(todo), n_tokens, different, tokens_per_round, seconds)
                cell += 1


def mixed_requests(model: str, n: int) -> list[Request]:
    """Demo prompts from their first 8 tokens to the whole, answers of 4 to 48 tokens."""
    rng, folder = np.random.default_rng(0), model_folder(model)
    spec, tokenizer = pack_model(folder).spec, Tokenizer(folder)
    whole = [to_request(line, tokenizer, spec, ignore_eos=True).prompt for line in read_batch(prompts_path())]
    prompts = [whole[i % len(whole)] for i in range(n)]
    return [
        Request(f"r{i}", p[: int(rng.integers(8, max(9, len(p) + 1)))], int(rng.integers(4, 49)))
        for i, p in enumerate(prompts)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=1000, help="of all cells together")
    parser.add_argument("--eagle", type=Path, metavar="HEAD", help="also a head that tools/train_eagle.py trained")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".csv"))
    options = parser.parse_args()
    n_cells = (3 if options.eagle else 2) * len(DRAFT_LENGTHS) * len(BATCHES)
    if options.requests < FEWEST * n_cells:
        parser.error(f"--requests must be at least {FEWEST * n_cells}: {FEWEST} for each of {n_cells} cells")
    requests = mixed_requests("demo", options.requests)
    target, draft = (pack_model(model_folder(name)) for name in ("demo", default_draft("demo") or ""))
    head = load_eagle_head(options.eagle, target.spec) if options.eagle else None
    print(f"plain decoding of {len(requests)} requests first, then the cells", file=sys.stderr)
    cells = [asdict(c) for c in track(run_grid(target, draft, requests, head), "cells", n_cells, auto_refresh=False)]
    table = pd.DataFrame(cells).round({"tokens_per_round": 2, "seconds": 2})
    table.to_csv(options.output, index=False)
    print(table.to_string(index=False))
    print(f"{table.different.sum()} of {table.requests.sum()} requests ({table.tokens.sum()} tokens) differ from plain")
    sys.exit(bool(table.different.sum()))


if __name__ == "__main__":
    main()
