"""The disk lane: what arrives, in which slots, and what happens when the disk fails."""

import errno
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from specmoeoff.errors import BadInput
from specmoeoff.runtime import expert_store
from specmoeoff.runtime.expert_store import ExpertStore, Load

N_LAYERS, N_EXPERTS, STRIDE = 3, 4, 8192


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Expert e of layer l is filled with 10 l + e."""
    numbers = np.repeat(np.arange(N_LAYERS), N_EXPERTS) * 10 + np.tile(np.arange(N_EXPERTS), N_LAYERS)
    (tmp_path / "experts").write_bytes(np.repeat(numbers.astype(np.uint8), STRIDE).tobytes())
    return tmp_path / "experts"


def store(path: Path, n_slots: int) -> ExpertStore:
    return ExpertStore(path, N_EXPERTS, STRIDE, n_slots, n_readers=2, chunk_bytes=4096)


def test_residents_stay_and_the_rest_passes_through(path: Path) -> None:
    lane = store(path, 4)
    lane.hold([[1], [2], []], stream_slots=2, demand_reserve=0)
    assert {key: int(lane.packed(slot)[0]) for key, slot in lane.resident.items()} == {(0, 1): 1, (1, 2): 12}
    for window in range(3):
        loads = lane.request(window, 2, [0, 1, 2, 3], demand=False)
        for _ in range(4):
            load = lane.wait_any(loads)
            loads.remove(load)
            assert set(lane.packed(load.slot)) == {20 + load.expert}
            lane.release(load)
    assert lane.bytes_planned == (2 + 12) * STRIDE
    lane.close()


def test_the_reserve_is_kept_for_the_layer_at_hand_after_every_change_of_placement(path: Path) -> None:
    """Counting windows anew must not let reads ahead take what the first layer's demand needs."""
    lane = store(path, 3)
    for _ in range(2):
        lane.hold([[], [], []], stream_slots=3, demand_reserve=2)
        ahead = lane.request(0, 2, [0, 1, 2, 3], demand=False)
        lane.enter(0, 0)
        wanted = lane.request(0, 0, [3], demand=True)
        assert lane.wait_any(wanted).expert == 3
        lane.enter(25, 2)  # as after many windows
        for load in ahead:
            lane.drop(load)
    lane.quiesce()
    lane.close()


def read_one(lane: ExpertStore, layer: int, expert: int) -> Load:
    (load,) = lane.request(0, layer, [expert], demand=False)
    assert lane.wait_any([load]) is load
    lane.release(load)
    return load


def use(lane: ExpertStore) -> Iterator[ExpertStore]:
    lane.hold([[], [], []], stream_slots=2, demand_reserve=0)
    yield lane
    lane.quiesce()
    lane.close()


@pytest.fixture
def lane(path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ExpertStore]:
    monkeypatch.setattr(expert_store, "RETRY_S", (0.0, 0.0))
    yield from use(store(path, 2))


def test_a_read_that_fails_is_tried_again(lane: ExpertStore, monkeypatch: pytest.MonkeyPatch) -> None:
    preadv, calls = os.preadv, []

    def broken(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        calls.append(offset)
        if len(calls) < 3:
            raise OSError(errno.EIO, "Input/output error")
        return preadv(descriptor, buffers, offset)

    monkeypatch.setattr(expert_store.os, "preadv", broken)
    load = read_one(lane, 1, 2)
    assert load.error is None
    assert set(lane.packed(load.slot)) == {12}


def test_a_read_that_goes_on_failing_names_the_expert_and_spares_the_others(
    lane: ExpertStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    preadv, bad = os.preadv, (1 * N_EXPERTS + 2) * STRIDE

    def broken(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        if bad <= offset < bad + STRIDE:
            raise OSError(errno.EIO, "Input/output error")
        return preadv(descriptor, buffers, offset)

    monkeypatch.setattr(expert_store.os, "preadv", broken)
    assert "expert 2 of layer 1 cannot be read (Input/output error); check the disk" in str(read_one(lane, 1, 2).error)
    for expert in (0, 1, 3):
        load = read_one(lane, 1, expert)
        assert load.error is None
        assert set(lane.packed(load.slot)) == {10 + expert}
    with pytest.raises(BadInput, match="expert 2 of layer 1 cannot be read"):
        lane.hold([[], [2], []], stream_slots=1, demand_reserve=0)


def test_short_reads_are_put_together(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ending anywhere, also between blocks, where O_DIRECT cannot go on."""
    preadv, lengths = os.preadv, iter([5000, 100, 4096] * 100)

    def short(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        assert offset % 4096 == 0
        return min(preadv(descriptor, buffers, offset), next(lengths))

    monkeypatch.setattr(expert_store.os, "preadv", short)
    monkeypatch.setattr(expert_store, "RETRY_S", (0.0, 0.0))
    for lane in use(ExpertStore(path, N_EXPERTS, STRIDE, 2, n_readers=1, chunk_bytes=STRIDE)):
        for expert in range(N_EXPERTS):
            load = read_one(lane, 2, expert)
            assert load.error is None
            assert set(lane.packed(load.slot)) == {20 + expert}


def test_a_file_that_ends_early_names_the_expert(path: Path, lane: ExpertStore) -> None:
    os.truncate(path, STRIDE * 2 + 4096)
    assert "expert 2 of layer 0 is cut short" in str(read_one(lane, 0, 2).error)


def test_a_flipped_bit_is_found_when_its_expert_is_first_read(path: Path) -> None:
    data = np.fromfile(path, np.uint8)
    sums = [
        [hashlib.sha256(data[(la * N_EXPERTS + e) * STRIDE :][:STRIDE]).hexdigest() for e in range(N_EXPERTS)]
        for la in range(N_LAYERS)
    ]
    data[(1 * N_EXPERTS + 3) * STRIDE + 5000] ^= 4
    data.tofile(path)
    for lane in use(ExpertStore(path, N_EXPERTS, STRIDE, 2, n_readers=2, chunk_bytes=4096, sha256=sums)):
        found = {(la, e): read_one(lane, la, e).error for la in range(N_LAYERS) for e in range(N_EXPERTS)}
        assert [key for key, error in found.items() if error] == [(1, 3)]
        assert "expert 3 of layer 1 differs from what was packed" in str(found[1, 3])


@pytest.mark.timeout(20)
def test_an_interrupt_that_leaves_the_lock_held_does_not_keep_the_store_from_closing(path: Path) -> None:
    """As KeyboardInterrupt does between `Condition.__enter__` and the block: seen once in some hundred runs ended by Ctrl-C."""
    held = store(path, 4)
    held._change.acquire()
    held.close()
    assert not any(reader.is_alive() for reader in held._readers)
