"""What a kernel is not made for never reaches C: the soak finds every check that is missing."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from specmoeoff.kernels import cpu

SOAK = Path(__file__).with_name("soak.py")
# Without a check of specmoeoff.kernels.cpu: `{check}` becomes `False` there before the soak begins.
WEAKENED = """
import inspect, runpy
from specmoeoff.kernels import cpu
source = inspect.getsource(cpu)
assert {check!r} in source
exec(compile(source.replace({check!r}, "False"), cpu.__file__, "exec"), vars(cpu))
runpy.run_path({soak!r}, run_name="__main__")
"""


def soak(*arguments: str, cases: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments, "--cases", str(cases)]
    return subprocess.run(command, text=True, capture_output=True, check=False, timeout=240)


def test_every_set_is_executed_or_refused_by_name() -> None:
    done = soak(str(SOAK), cases=5000)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "5,000 sets" in done.stdout


@pytest.mark.skipif(cpu.LIBRARY_VARIABLE in os.environ, reason="sanitizers end the process before the set is judged")
@pytest.mark.parametrize(
    ("check", "outcome"),
    [
        ("np.may_share_memory(array, its)", "shared memory: accepted"),
        ("not flags.c_contiguous", "strided: accepted|the process ended with -"),
        ("address % (2 * HALVES[precision])", "misaligned: accepted"),
        ("not 0 <= value < 1", "not finite: accepted"),
        ("(pages[1:] == pages[:-1]).any()", "page_table a page twice: accepted"),
        ("joined == SLOT_TWICE", "row_slots a slot twice: accepted"),
        ("not isinstance(value, kind)", "nothing: AttributeError"),
    ],
)
def test_the_soak_finds_a_check_that_was_taken_out(tmp_path: Path, check: str, outcome: str) -> None:
    script = tmp_path / "weakened.py"
    script.write_text(WEAKENED.format(check=check, soak=str(SOAK)))
    done = soak(str(script), cases=6000)
    assert done.returncode == 1, done.stdout + done.stderr
    assert re.search(outcome, done.stdout.replace("\n", " "))


def test_a_crash_is_reported_with_the_set_that_did_it(tmp_path: Path) -> None:
    script = tmp_path / "crashing.py"
    script.write_text(
        "import os, runpy\n"
        "from specmoeoff.kernels import cpu\n"
        "cpu.pack_linear = lambda weight, out: os.abort()\n"
        f"runpy.run_path({str(SOAK)!r}, run_name='__main__')\n"
    )
    done = soak(str(script), cases=100)
    assert done.returncode == 1
    assert "the process ended with -6" in done.stdout
    assert "--seed 0 --replay" in done.stdout


def test_lengths_at_the_ends_of_int32_are_refused() -> None:
    one, most = np.array([0, 1], np.int32), np.iinfo(np.int32).max
    pages = np.arange(cpu.MAX_SIZE // cpu.PAGE_TOKENS + 1, dtype=np.int32)[None]
    with pytest.raises(ValueError, match="first_position: the number of positions must be at most"):
        cpu.Batch(one, np.array([cpu.MAX_SIZE], np.int32), pages)
    assert cpu.Batch(one, np.array([cpu.MAX_SIZE - 1], np.int32), pages).end == cpu.MAX_SIZE
    with pytest.raises(ValueError, match="first_position"):
        cpu.Batch(one, np.array([most], np.int32), np.zeros((1, 1), np.int32))
    # Differences of 32 bits would make one row of the second request.
    with pytest.raises(ValueError, match="row_start"):
        cpu.Batch(np.array([0, most, -most - 1], np.int32), np.zeros(2, np.int32), np.zeros((2, 1), np.int32))
    for size in (most, 1 << 31, (1 << 32) + 64):
        with pytest.raises(ValueError, match="n_out must be at most"):
            cpu.packed_linear_bytes(size, 64)


def test_rows_may_be_none_at_all() -> None:
    kernels, packed = cpu.Kernels(2), cpu.aligned_empty(cpu.packed_linear_bytes(5, 16))
    none, states = np.empty((0, 16), np.uint16), np.empty((0, 16), np.float32)
    kernels.linear(none, packed, 5, np.empty((0, 5), np.float32))
    kernels.rmsnorm(states, np.ones(16, np.float32), 1e-5, none)
    kernels.head_argmax(states, np.ones(16, np.float32), 1e-5, packed, 5, np.empty(0, np.int32))
    kernels.combine(states, states, np.empty((0, 1), np.float32))


def test_another_library_is_loaded_where_it_is_named(tmp_path: Path) -> None:
    environment = {**os.environ, cpu.LIBRARY_VARIABLE: str(tmp_path / "none.so")}
    command = [sys.executable, "-c", "from specmoeoff.kernels import cpu; cpu.supported_isas()"]
    done = subprocess.run(command, text=True, capture_output=True, check=False, env=environment)
    assert "MissingCapability" in done.stderr
    assert "none.so" in done.stderr
