"""A study that is killed, resumed or shared: the trials of an undisturbed one, and none twice."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

TRIALS = 40
TUNE = (
    *(sys.executable, "-W", "error", "-m", "specmoeoff", "tune", "--profile", "a30", "--model", "qwen3-30b-a3b"),
    *("--workload", "apps", "--output-tokens", "256", "--fast-memory", "24GiB", "--host-memory", "64GiB"),
    *("--search", "optuna", "--trials", str(TRIALS), "--storage", "study", "-o", "plan.toml"),
)


def finished(folder: Path) -> list[tuple[dict[str, int], float]]:
    """Parameters and value of every completed trial; the study is the only one."""
    storage = JournalStorage(JournalFileBackend(str(folder / "study")))
    study = optuna.load_study(study_name=None, storage=storage)
    assert not study.get_trials(states=(optuna.trial.TrialState.RUNNING, optuna.trial.TrialState.WAITING))
    return [(t.params, t.value) for t in study.get_trials(states=(optuna.trial.TrialState.COMPLETE,))]


def tune(folder: Path) -> None:
    done = subprocess.run(TUNE, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    tune(folder)
    return folder


def test_a_killed_study_goes_on_as_if_nothing_had_been(undisturbed: Path, tmp_path: Path) -> None:
    journal = tmp_path / "study"
    for share in (0.3, 0.6):
        enough = share * (undisturbed / "study").stat().st_size
        with subprocess.Popen(TUNE, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as child:
            while not (journal.exists() and journal.stat().st_size > enough):
                assert child.poll() is None
                time.sleep(0.002)
            os.kill(child.pid, signal.SIGKILL)
    tune(tmp_path)
    assert finished(tmp_path) == finished(undisturbed)
    assert len(finished(tmp_path)) == TRIALS
    assert (tmp_path / "plan.toml").read_bytes() == (undisturbed / "plan.toml").read_bytes()


def test_workers_share_a_studys_turns(tmp_path: Path) -> None:
    workers = [
        subprocess.Popen(TUNE, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for worker in workers:
        _, errors = worker.communicate(timeout=120)
        assert worker.returncode == 0, errors
    assert TRIALS <= len(finished(tmp_path)) <= TRIALS + 1
