"""The disk lane: what arrives, in which slots, and what happens when the disk fails."""

import os
from pathlib import Path

import numpy as np
import pytest

from specmoeoff.errors import BadInput
from specmoeoff.runtime import expert_store
from specmoeoff.runtime.expert_store import ExpertStore

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


def test_a_read_that_fails_is_told_and_nothing_hangs(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lane = store(path, 2)
    lane.hold([[], [], []], stream_slots=2, demand_reserve=0)

    def broken(*_: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(expert_store.os, "preadv", broken)
    loads = lane.request(0, 0, [0, 1], demand=False)
    with pytest.raises(BadInput, match=r"cannot be read .*Input/output error"):
        lane.wait_any(loads)
    lane.quiesce()
    lane.close()


def test_a_file_that_ends_early_is_told(path: Path) -> None:
    os.truncate(path, STRIDE * 2 + 4096)
    lane = store(path, 2)
    lane.hold([[], [], []], stream_slots=2, demand_reserve=0)
    with pytest.raises(BadInput, match="ends early"):
        lane.wait_any(lane.request(0, 0, [2], demand=False))
    lane.quiesce()
    lane.close()
