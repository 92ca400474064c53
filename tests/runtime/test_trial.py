"""A measured run in a process of its own: it tells its rate, and however it ends the caller goes on."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from specmoeoff.errors import TrialFailed
from specmoeoff.runtime.trial import Trial, rate_in_own_process
from specmoeoff.specs.plan import Plan
from specmoeoff.specs.workload import Acceptance


def child() -> int | None:
    """The trial this process started."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            if parent == os.getpid() and b"runtime.trial" in (stat.parent / "cmdline").read_bytes():
                return int(stat.parent.name)
        except OSError:
            continue
    return None


def test_a_killed_run_is_told_as_out_of_memory(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    def kill() -> None:
        while (found := child()) is None:
            time.sleep(0.001)
        os.kill(found, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(TrialFailed) as failed:
        rate_in_own_process(plan)
    killer.join()
    assert failed.value.kind == "out_of_memory"


def test_what_the_run_says_is_passed_on(plan: Plan) -> None:
    with pytest.raises(TrialFailed, match="nowhere") as failed:
        rate_in_own_process(plan)
    assert failed.value.kind == "constraint"


@pytest.mark.parametrize(
    ("program", "kind"),
    [
        ("import time; time.sleep(60)", "timeout"),
        ("import numpy; numpy.empty(1 << 50)", "out_of_memory"),
        ("import os; os.abort()", "crash"),
        ("1 / 0", "crash"),
    ],
)
def test_every_end_has_a_name(
    plan: Plan, program: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\nexec {sys.executable} -c '{program}'\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(TrialFailed) as failed:
        rate_in_own_process(plan, timeout_s=1.0 if kind == "timeout" else 60.0)
    assert failed.value.kind == kind


def test_rounds_known_from_before_count_beside_the_trials_own(plan: Plan) -> None:
    decode = plan.decode.model_copy(update={"drafter": "model", "draft_length": 2, "batch": 4})
    trial = Trial(window_s=0.5, tokens_per_round=2.5, n_rounds=30)
    assert trial.tokens_per_s(decode) == pytest.approx(4 * 2.5 / 0.5)
    known = Acceptance(conditional=(0.5, 0.5), n_rounds=10, provenance="made up")
    assert trial.tokens_per_s(decode, known) == pytest.approx(4 * (30 * 2.5 + 10 * 1.75) / 40 / 0.5)
    said = known.model_copy(update={"n_rounds": 0})
    assert trial.tokens_per_s(decode, said) == trial.tokens_per_s(decode)
    longer = decode.model_copy(update={"draft_length": 3})
    assert trial.tokens_per_s(longer, known) == trial.tokens_per_s(longer)
