"""The lanes on a GPU played by a CPU, against the CPU's own model: every order that events allow, and every event missed."""

import functools
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from specmoeoff.estimate.gpu_memory import activation_bytes
from specmoeoff.kernels.cpu import Kernels
from specmoeoff.kernels.cuda.on_cpu import Host
from specmoeoff.runtime.gpu import execute
from specmoeoff.runtime.gpu.device import CupyDevice, Device
from specmoeoff.runtime.gpu.draft import GpuEagle
from specmoeoff.runtime.gpu.execute import GpuExecutor, Placement, Room
from specmoeoff.runtime.gpu.rehearsal import Race, RehearsalDevice
from specmoeoff.runtime.gpu.weights import CheckpointWeights, EagleWeights
from specmoeoff.runtime.model import Model
from specmoeoff.runtime.pack import pack_model
from specmoeoff.runtime.rows import Rows, make_rows
from specmoeoff.specs.plan import PlanDecode

N_EXPERTS, N_LAYERS = {"mixtral": 5, "qwen3_moe": 6}, 3
# requests by micro-batch: (new tokens, old ones, their keys and values in GPU memory)
WINDOWS = [
    [[(5, 0, True), (4, 0, False)], [(7, 0, False), (3, 0, True)]],
    [[(3, 5, True), (1, 4, False)], [(4, 7, False), (4, 3, True)]],
    [[(1, 8, True), (1, 5, False)], [(1, 11, False), (1, 7, True)]],
]
PLACES = {
    "streamed": Placement(((),) * N_LAYERS, ((),) * N_LAYERS, False),
    "everywhere": Placement(((0,), (1, 3), ()), ((2,), (0,), (4, 1)), False),
    "on demand": Placement(((0,), (1,), ()), ((2,), (), (4,)), True),
}


def windows(merged: bool) -> list[tuple[np.ndarray, list[Rows]]]:
    """Tokens and micro-batches: two or, merged, one."""
    made = []
    for number, window in enumerate(WINDOWS):
        parts, first = [], 0
        numbered = [[(*request, 2 * p + i) for i, request in enumerate(part)] for p, part in enumerate(window)]
        for part in [[*numbered[0], *numbered[1]]] if merged else numbered:
            near_first = sorted(part, key=lambda r: not r[2])
            pages = np.array([[slot + 1] for *_, slot in near_first], np.int32)
            pages[:, 0] = [NEAR_PAGES[slot] if near else FAR_PAGES[slot] for _, _, near, slot in near_first]
            n_near = sum(near for _, _, near, _ in near_first)
            parts.append(make_rows(first, [r[0] for r in near_first], [r[1] for r in near_first], pages, n_near))
            first = parts[-1].last
        counts = [r[0] for part in window for r in part]
        slots = [
            int(p)
            for rows in parts
            for p, r in zip(rows.pages[:, 0], rows.requests, strict=True)
            for _ in range(int(r.n_tokens))
        ]
        tokens = np.array([(7 * page + 13 * i + number) % 96 for i, page in enumerate(slots)], np.int32)
        assert len(tokens) == sum(counts)
        made.append((tokens, parts))
    return made


NEAR_PAGES, FAR_PAGES = {0: 1, 3: 2}, {1: 3, 2: 4}
ROOM = Room(
    max_rows=24, part_rows=24, max_requests=4, pages_per_request=1, n_near_pages=2, n_far_pages=2, n_positions=128
)


class Remembered(CheckpointWeights):
    """Weights that are read once for many executors."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.dense = functools.cache(super().dense)  # type: ignore[method-assign]
        self.host_expert = functools.cache(super().host_expert)  # type: ignore[method-assign]
        self._packed: dict[tuple[int, int], np.ndarray] = {}

    def expert(self, layer: int, expert: int, out: np.ndarray) -> None:
        if (layer, expert) not in self._packed:
            self._packed[layer, expert] = np.empty_like(out)
            super().expert(layer, expert, self._packed[layer, expert])
        out[:] = self._packed[layer, expert]


def executor(weights: CheckpointWeights, device: Device, place: str, n_parts: int) -> GpuExecutor:
    return GpuExecutor(weights, device, PLACES[place], ROOM, n_parts, n_threads=1)


def enqueue(runs: GpuExecutor, n_parts: int) -> None:
    """All windows; nobody asks for the tokens of the first, as where prompts are only begun."""
    for number, (tokens, parts) in enumerate(windows(n_parts == 1)):
        runs.forward(tokens, parts)
        if number:
            runs.choose(np.arange(len(tokens)))


def on_cpu(checkpoint: Path, merged: bool) -> list[tuple[np.ndarray, np.ndarray]]:
    """Final states and tokens of every row of every window, by the CPU's kernels."""
    packed = pack_model(checkpoint)
    model = Model(packed, Kernels(1), n_pages=5, n_positions=128, max_rows=24)
    experts = packed.load_experts().reshape(N_LAYERS, packed.spec.n_experts, -1)
    stack = model.stack([{e: np.ascontiguousarray(one) for e, one in enumerate(layer)} for layer in experts])
    found = []
    for tokens, parts in windows(merged):
        model.begin(tokens)
        model.layers(stack, parts)
        found.append((model.work.x[: len(tokens)].copy(), model.choose(np.arange(len(tokens)))))
    return found


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("n_parts", [1, 2])
def test_the_gpus_windows_are_the_cpus(
    checkpoint: Path, make_device: Callable[[int], Device], place: str, n_parts: int
) -> None:
    with CheckpointWeights(checkpoint) as weights:
        runs = executor(weights, make_device(n_parts), place, n_parts)
    for (tokens, parts), (states, chosen) in zip(windows(n_parts == 1), on_cpu(checkpoint, n_parts == 1), strict=True):
        runs.forward(tokens, parts)
        found = runs.choose(np.arange(len(tokens)))
        assert np.abs(runs.states(len(tokens)) - states).max() < 0.02 * np.abs(states).max()
        assert np.array_equal(found, chosen)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("n_parts", [pytest.param(1, marks=pytest.mark.long), 2])
def test_no_order_that_events_allow_changes_a_bit(
    mixtral_for_gpu: Path, make_device: Callable[[int], Device], place: str, n_parts: int
) -> None:
    found = []
    with Remembered(mixtral_for_gpu) as weights:
        for seed in range(3):
            runs = executor(weights, make_device(seed), place, n_parts)
            enqueue(runs, n_parts)
            found.append(runs.states(10))
    assert all(np.array_equal(found[0], other) for other in found[1:])
    assert np.isfinite(found[0]).all()


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("n_parts", [pytest.param(1, marks=pytest.mark.long), 2])
def test_every_wait_is_needed_and_missed(mixtral_for_gpu: Path, place: str, n_parts: int) -> None:
    """Whichever is left out, two pieces of work touch the same memory in no order."""
    with Remembered(mixtral_for_gpu) as weights:
        whole = RehearsalDevice()
        enqueue(executor(weights, whole, place, n_parts), n_parts)
        assert whole.n_waits > 30
        for left_out in range(whole.n_waits):
            with pytest.raises(Race):
                enqueue(executor(weights, RehearsalDevice(without=left_out), place, n_parts), n_parts)


def test_a_single_buffer_for_streamed_layers_would_be_overwritten(
    mixtral_for_gpu: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(execute, "BUFFERED_LAYERS", 1)
    with Remembered(mixtral_for_gpu) as weights, pytest.raises(Race, match="a copy"):
        enqueue(executor(weights, RehearsalDevice(), "streamed", 2), 2)


def test_the_lanes_run_through_cupys_names(cupy: types.ModuleType, mixtral_for_gpu: Path, host: Host) -> None:
    found = []
    for device in (CupyDevice(), RehearsalDevice(host)):
        with CheckpointWeights(mixtral_for_gpu) as weights:
            runs = executor(weights, device, "everywhere", 2)
        tokens, parts = windows(merged=False)[0]
        runs.forward(tokens, parts)
        found.append((runs.choose(np.arange(len(tokens))), runs.states(len(tokens))))
    assert all(np.array_equal(a, b) for a, b in zip(*found, strict=True))


def test_memory_grows_with_rows_as_planned(mixtral_for_gpu: Path) -> None:
    """Inputs and constants, 36 bytes a row, are in the plan's margin."""

    def bytes_of(rows: int, place: str, near: int, far: int) -> int:
        device = RehearsalDevice()
        room = Room(rows, rows // 2, 4, 1, near, far, 128)
        GpuExecutor(weights, device, PLACES[place], room, 2, n_threads=1)
        return device.memory_bytes

    with Remembered(mixtral_for_gpu) as weights:
        for place, near, far in (("streamed", 0, 4), ("everywhere", 2, 2), ("streamed", 4, 0)):
            found = bytes_of(1200, place, near, far) - bytes_of(600, place, near, far)
            sides = bool(near), bool(far), place == "everywhere"
            planned = activation_bytes(weights.spec, np.float64(600), np.float64(300), *sides, 128)[0]
            assert 0 <= found - planned <= 600 * 36


def test_memory_of_an_eagle_head_grows_with_rows_as_planned(
    mixtral_for_gpu: Path, head_for_gpu: Callable[..., Path]
) -> None:
    """Also 4 bytes a row that look up the bias."""
    decode = PlanDecode(
        drafter="eagle", draft_length=2, batch=4, micro_batches=1, context_tokens=128, prefill_chunk_tokens=8
    )

    def bytes_of(rows: int) -> int:
        device = RehearsalDevice()
        target = GpuExecutor(weights, device, PLACES["streamed"], ROOM, 2, n_threads=1).model
        GpuEagle(head, target, decode, n_near=2, max_rows=rows, n_threads=1)
        return device.memory_bytes

    with Remembered(mixtral_for_gpu) as weights, EagleWeights(head_for_gpu()) as head:
        found, rows = bytes_of(1200) - bytes_of(600), np.float64(600)
        planned = activation_bytes(head.spec, rows, rows, True, True, False, 128)[0] + rows * 2 * head.spec.hidden
        assert 0 <= found - planned <= rows * 40


def test_more_rows_than_there_is_room_for_are_refused(mixtral_for_gpu: Path) -> None:
    with Remembered(mixtral_for_gpu) as weights:
        runs = GpuExecutor(weights, RehearsalDevice(), PLACES["streamed"], ROOM._replace(part_rows=9), 2, 1)
        with pytest.raises(ValueError, match="more than the 9 rows"):
            runs.forward(*windows(merged=False)[0])
