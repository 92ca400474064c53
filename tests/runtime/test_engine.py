"""Speculative output equals plain output, whatever the drafter, placement, batch and chunking."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from specmoeoff.errors import BadInput
from specmoeoff.runtime.engine import Engine
from specmoeoff.runtime.expert_store import TokenBucket
from specmoeoff.runtime.pack import PackedModel, pack_model
from specmoeoff.runtime.process import disk_bytes_read
from specmoeoff.runtime.sequence import Request
from specmoeoff.runtime.verify import accept
from specmoeoff.specs.plan import PlanDecode, PlanExperts, PlanThreads

PLACEMENTS = {
    "resident": ((0, 1, 2, 3, 4), (), 0),
    "prefetched": ((0,), (1, 2, 3, 4), 4),
    "on demand": ((), (), 3),
    "mixed": ((2,), (0, 4), 5),
}


@pytest.fixture
def pair(mixtral: Path, llama: Path) -> tuple[PackedModel, PackedModel]:
    return pack_model(mixtral), pack_model(llama)


def requests(n: int, vocab: int) -> list[Request]:
    rng = np.random.default_rng(0)
    return [
        Request(
            f"r{i}", tuple(int(t) for t in rng.integers(3, vocab, int(rng.integers(1, 70)))), int(rng.integers(1, 30))
        )
        for i in range(n)
    ]


def generate(
    pair: tuple[PackedModel, PackedModel],
    drafter: str = "none",
    k: int = 0,
    placement: str = "resident",
    batch: int = 3,
    micro_batches: int = 1,
    chunk: int = 64,
    threads: int = 2,
    accept_: Callable[[list[int], list[int]], int] = accept,
) -> dict[str, list[int]]:
    target, draft = pair
    resident, prefetch, slots = PLACEMENTS[placement]
    layers = target.spec.n_layers
    decode = PlanDecode(
        drafter=drafter,  # type: ignore[arg-type]
        draft_length=k,
        batch=batch,
        micro_batches=micro_batches,
        context_tokens=128,
        prefill_chunk_tokens=chunk,
    )
    experts = PlanExperts(resident=(resident,) * layers, prefetch=(prefetch,) * layers, stream_slots=slots)
    reading = PlanThreads(compute=threads, disk_readers=2, disk_chunk_bytes=16384)
    with Engine(target, draft, decode, experts, reading) as engine:
        engine.accept = accept_
        engine.submit(requests(7, target.spec.vocab))
        for window in engine.run():
            assert window.live <= batch
        return {s.request.request_id: s.output for s in engine.finished}


@pytest.fixture
def plain(pair: tuple[PackedModel, PackedModel]) -> dict[str, list[int]]:
    output = generate(pair)
    assert {i: len(o) for i, o in output.items()} == {
        r.request_id: r.max_tokens for r in requests(7, pair[0].spec.vocab)
    }
    return output


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("drafter", ["model", "ngram"])
def test_every_drafter_gives_the_plain_output(
    pair: tuple[PackedModel, PackedModel], plain: dict[str, list[int]], drafter: str, k: int
) -> None:
    assert generate(pair, drafter, k) == plain


@pytest.mark.parametrize("placement", list(PLACEMENTS))
@pytest.mark.parametrize(("drafter", "k"), [("none", 0), ("model", 4)])
def test_every_placement_gives_the_plain_output(
    pair: tuple[PackedModel, PackedModel], plain: dict[str, list[int]], placement: str, drafter: str, k: int
) -> None:
    assert generate(pair, drafter, k, placement, micro_batches=2) == plain


@pytest.mark.parametrize(("batch", "chunk", "threads"), [(1, 1, 1), (2, 7, 3), (7, 200, 1), (4, 5, 2)])
def test_batching_chunking_and_threads_change_nothing(
    pair: tuple[PackedModel, PackedModel], plain: dict[str, list[int]], batch: int, chunk: int, threads: int
) -> None:
    assert generate(pair, "model", 3, "mixed", batch, 2, chunk, threads) == plain


@pytest.mark.parametrize("drafter", ["none", "model", "ngram"])
def test_rewound_requests_go_the_same_way_again(pair: tuple[PackedModel, PackedModel], drafter: str) -> None:
    target, draft = pair
    k = 0 if drafter == "none" else 3
    decode = PlanDecode(
        drafter=drafter,  # type: ignore[arg-type]
        draft_length=k,
        batch=3,
        micro_batches=1,
        context_tokens=128,
        prefill_chunk_tokens=64,
    )
    experts = PlanExperts(resident=((0,),) * 3, prefetch=((1, 2, 3, 4),) * 3, stream_slots=4)
    with Engine(
        target, draft, decode, experts, PlanThreads(compute=2, disk_readers=2, disk_chunk_bytes=8192)
    ) as engine:
        engine.submit(replace(r, max_tokens=50) for r in requests(3, target.spec.vocab))
        while not engine.live or any(s.prefilling for s in engine.live):
            engine.step()
            engine.rewind()
        ways = []
        for _ in range(3):
            engine.rewind()
            assert all(s.n_output == 1 for s in engine.live)
            for _ in range(4):
                engine.step()
            engine.pause()
            ways.append([list(s.tokens) for s in engine.live])
        assert ways[0] == ways[1] == ways[2]
        assert all(s.n_output >= 5 for s in engine.live)


def test_a_draft_equal_to_the_target_is_always_accepted(llama: Path) -> None:
    packed = pack_model(llama)
    decode = PlanDecode(
        drafter="model", draft_length=4, batch=1, micro_batches=1, context_tokens=64, prefill_chunk_tokens=64
    )
    experts = PlanExperts(resident=((0,),) * 3, prefetch=((),) * 3, stream_slots=0)
    with Engine(
        packed, packed, decode, experts, PlanThreads(compute=1, disk_readers=1, disk_chunk_bytes=4096)
    ) as engine:
        engine.submit([Request("r", (5, 6, 7), 21)])
        windows = list(engine.run())
    # the prompt gives one token, then four windows of five
    assert [w.tokens for w in windows] == [1, 5, 5, 5, 5]


def test_accepting_everything_is_seen_in_the_output(
    pair: tuple[PackedModel, PackedModel], plain: dict[str, list[int]]
) -> None:
    assert generate(pair, "model", 3, accept_=lambda drafted, chosen: len(drafted)) != plain


def test_a_stop_token_ends_a_request(pair: tuple[PackedModel, PackedModel], plain: dict[str, list[int]]) -> None:
    longest = max(plain, key=lambda i: len(plain[i]))
    stop = plain[longest][len(plain[longest]) // 2]
    first = plain[longest].index(stop)
    target, draft = pair
    decode = PlanDecode(
        drafter="model", draft_length=4, batch=2, micro_batches=1, context_tokens=128, prefill_chunk_tokens=64
    )
    experts = PlanExperts(resident=(tuple(range(5)),) * 3, prefetch=((),) * 3, stream_slots=0)
    with Engine(
        target, draft, decode, experts, PlanThreads(compute=1, disk_readers=1, disk_chunk_bytes=4096)
    ) as engine:
        request = next(r for r in requests(7, target.spec.vocab) if r.request_id == longest)
        engine.submit([Request("r", request.prompt, request.max_tokens, (stop,))])
        list(engine.run())
        assert engine.finished[0].output == plain[longest][: first + 1]
        assert engine.finished[0].finish_reason == "stop"


def test_the_kernel_counts_the_bytes_the_run_asked_for(pair: tuple[PackedModel, PackedModel]) -> None:
    target, _ = pair
    decode = PlanDecode(
        drafter="none", draft_length=0, batch=2, micro_batches=1, context_tokens=128, prefill_chunk_tokens=64
    )
    experts = PlanExperts(resident=((0,),) * 3, prefetch=((1, 2),) * 3, stream_slots=5)
    with Engine(target, None, decode, experts, PlanThreads(compute=1, disk_readers=2, disk_chunk_bytes=8192)) as engine:
        before, planned = disk_bytes_read(), engine.store.bytes_planned
        engine.submit(requests(4, target.spec.vocab))
        list(engine.run())
        asked, read = engine.store.bytes_planned - planned, disk_bytes_read() - before
    if read == 0:
        pytest.skip("this file system does not count reads")
    assert read == pytest.approx(asked, rel=0.02)


def test_a_request_longer_than_the_context_is_refused(pair: tuple[PackedModel, PackedModel]) -> None:
    with pytest.raises(BadInput, match="exceed the plan's context of 128"):
        Engine.check_fits(Request("long", (3,) * 120, 9), 128)
    with pytest.raises(BadInput, match="the prompt is empty"):
        Engine.check_fits(Request("none", (), 9), 128)


def test_the_token_bucket_holds_its_rate() -> None:
    bucket = TokenBucket(0.5)
    begun = time.perf_counter()
    for _ in range(100):
        bucket.take(1_000_000)
    seconds = time.perf_counter() - begun
    assert 0.19 <= seconds < 0.5  # 0.2 s at 0.5 GB/s; a busy machine may wake late
