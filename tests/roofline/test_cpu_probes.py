"""The probes reach what the instructions are known to do, and are not fooled by what a hypervisor tells of its caches."""

import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from statistics import median

import numpy as np
import pytest

from specmoeoff.kernels.cpu import aligned_empty
from specmoeoff.kernels.cpu.probes import MOVES, Chase, Move, Peak, is_supported, n_forms
from specmoeoff.roofline.probes import cpu
from specmoeoff.roofline.probes.cpu import KIB, MIB, Tally

TOLD = {"l1": 32 * KIB, "l2": MIB, "l3": 32 * MIB}


def best(name: str, n_threads: int = 1) -> float:
    roofs, _ = cpu.peaks([n_threads], Tally())
    return next(r.rate.value for r in roofs if r.name == name)


@pytest.mark.skipif(not is_supported("int8_dot") or not is_supported("bf16_dot"), reason="no AVX512-BF16 or VNNI here")
def test_a_bf16_dot_does_twice_and_an_int8_dot_four_times_the_work_of_an_fma() -> None:
    rates = {r.name: r.rate.value for r in cpu.peaks([1], Tally())[0]}
    assert rates["bf16_dot"] / rates["fp32_fma"] == pytest.approx(2.0, rel=0.03)
    assert rates["int8_dot"] / rates["fp32_fma"] == pytest.approx(4.0, rel=0.03)


def test_the_fp32_peak_is_a_whole_number_of_operations_a_cycle() -> None:
    per_cycle = best("fp32_fma") / cpu.clock_ghz()
    assert per_cycle == pytest.approx(round(per_cycle / 16) * 16, rel=0.05)


def test_what_the_cpu_cannot_do_is_waived_with_a_reason() -> None:
    roofs, missing = cpu.peaks([1], Tally())
    assert {r.name for r in roofs} | set(missing) >= {"fp32_fma", "bf16_dot", "int8_dot", "fp16_fma", "bf16_amx"}
    assert all("this CPU" in reason for reason in missing.values())


def spin(seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass


@contextmanager
def busy(n: int, seconds: float) -> Iterator[None]:
    context = get_context("spawn")
    # All have come up before the first does anything.
    with ProcessPoolExecutor(n, mp_context=context, initializer=context.Barrier(n).wait) as pool:
        list(pool.map(spin, [0.01] * n))
        waiting = [pool.submit(spin, seconds) for _ in range(n)]
        time.sleep(0.2)
        yield
        for one in waiting:
            one.result()


@pytest.mark.alone
def test_a_busy_machine_is_noticed_and_its_peak_found_all_the_same() -> None:
    def a_cycle(tally: Tally) -> float:
        """By the clock of the moment: where other guests heat the package, it moves by itself. A turn takes a fifth of a second
        where a CPU has but one kind to measure, which the scheduler lets a newcomer have: so several."""
        turns = []
        for _ in range(7):
            before = max(cpu.clock_ghz() for _ in range(3))
            peak = next(r.rate.value for r in cpu.peaks([1], tally)[0] if r.name == "fp32_fma")
            turns.append(peak / max(before, *(cpu.clock_ghz() for _ in range(3))))
        return median(turns)

    alone, tally = a_cycle(Tally()), Tally()
    with busy(2 * len(os.sched_getaffinity(0)), 6.0):
        beside = a_cycle(tally)
    assert beside == pytest.approx(alone, rel=0.03)
    assert tally.waited_share > cpu.CONTENDED_SHARE


FORMS = [(move, form) for move in MOVES for form in range(n_forms(move))]


@pytest.mark.parametrize(("move", "form"), FORMS)
@pytest.mark.parametrize("n_threads", [1, 2])
def test_moves_stay_within_their_buffer(move: str, form: int, n_threads: int) -> None:
    whole = np.full(4 * 3072 + 7 * 3072 * n_threads, 7, np.uint8)
    start = -whole.ctypes.data % 64 + 64
    part = whole[start : start + 5 * 3072 * n_threads]
    Move(move, n_threads, part, form).run(2)
    assert (whole[:start] == 7).all()
    assert (whole[start + len(part) :] == 7).all()


@pytest.mark.parametrize(("move", "form"), [f for f in FORMS if f[0].endswith("copy")])
def test_a_copy_copies(move: str, form: int) -> None:
    buffer = aligned_empty(8 * 3072)
    buffer[: 4 * 3072] = np.random.default_rng(0).integers(0, 256, 4 * 3072)
    Move(move, 1, buffer, form).run()
    assert (buffer[4 * 3072 :] == buffer[: 4 * 3072]).all()


@pytest.mark.parametrize("form", range(n_forms("triad")))
def test_a_triad_adds_what_it_reads(form: int) -> None:
    values = aligned_empty(3 * 3072).view(np.float32)
    third = len(values) // 3
    values[:third], values[third : 2 * third] = 1.0, 2.0
    scale = np.frombuffer(bytes([0x3E] * 4), np.float32)[0]
    Move("triad", 1, values.view(np.uint8), form).run()
    np.testing.assert_allclose(values[2 * third :], 1.0 + scale * 2.0, rtol=1e-6)


def test_a_buffer_too_small_for_a_share_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 3072 bytes"):
        Move("read", 2, np.zeros(3072, np.uint8))
    with pytest.raises(ValueError, match="rounds"):
        Move("read", 1, np.zeros(3072, np.uint8)).run(0)


def test_a_chase_visits_the_whole_cycle() -> None:
    links = np.roll(np.arange(1000, dtype=np.int64), -1)
    chase = Chase(links)
    chase.follow(999)
    assert chase._at == 999
    chase.follow(1)
    assert chase._at == 0


def rate_of(real_bytes: int, cached: float = 90.0, memory: float = 30.0) -> "object":
    return lambda n: cached if n <= real_bytes else memory


def test_caches_that_are_as_told_are_believed() -> None:
    assert cpu.real_caches(TOLD, rate_of(30 * MIB), 30.0) == (TOLD, [])  # type: ignore[arg-type]


@pytest.mark.parametrize("told", [64 * MIB, 320 * MIB])
def test_a_cache_larger_than_it_is_is_found_out(told: int) -> None:
    found, notes = cpu.real_caches(TOLD | {"l3": told}, rate_of(32 * MIB), 30.0)  # type: ignore[arg-type]
    assert found["l3"] <= 80 * MIB
    assert found["l3"] * 2 // 5 <= 32 * MIB
    if found["l3"] != told:
        assert f"the system tells of {told // MIB} MiB of L3" in notes[0]


def test_peaks_of_unknown_names_do_not_exist() -> None:
    with pytest.raises(KeyError):
        Peak("fp7_fma", 1)


@pytest.mark.alone
def test_a_real_machine_with_a_made_up_cache_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    if cpu.cache_bytes()["l3"] > 80 * MIB:
        pytest.skip("this L3 is really large")
    monkeypatch.setattr(cpu, "cache_bytes", lambda: TOLD | {"l3": 320 * MIB})
    # Another guest's burst may hide a plateau from one look, not from three.
    looks = [cpu.Memory([1], Tally(), caches=cpu.cache_bytes()) for _ in range(3)]
    memory = min(looks, key=lambda look: look.caches["l3"])
    assert memory.caches["l3"] <= 80 * MIB
    assert "the system tells of 320 MiB of L3" in memory.notes[0]
