"""Where Optuna's trials are kept, and who works on them: a journal file or a database, shared by workers that may die."""

import fcntl
import os
import platform
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from specmoeoff.errors import BadInput

CLAIMED_S, LONGEST_TRIAL_S = 1.0, 3600.0


class FileLock:
    """Ends with the process that holds it; Optuna's own locks are files that a killed process leaves for half a minute."""

    def __init__(self, path: str) -> None:
        self._path = path

    def acquire(self) -> bool:
        self._held = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
        fcntl.flock(self._held, fcntl.LOCK_EX)
        return True

    def release(self) -> None:
        os.close(self._held)


def open_study(url: str | None, name: str) -> optuna.Study:
    """A study to maximise, made or resumed, in memory where no URL or journal file is given. Raises BadInput."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    url = url and url.replace("postgresql://", "postgresql+psycopg://", 1)
    return _open(url, name, n_tries=5)


def _open(url: str | None, name: str, n_tries: int) -> optuna.Study:
    try:
        lock: Any = FileLock(url or "")  # Optuna asks for its methods, not for a class it keeps private
        journal = url if url is None or "://" in url else JournalStorage(JournalFileBackend(url, lock))
        return optuna.create_study(direction="maximize", storage=journal, study_name=name, load_if_exists=True)
    except Exception as error:  # of whichever database library
        lost_a_race = type(error).__name__ in ("IntegrityError", "ProgrammingError")  # of workers that make the tables
        if lost_a_race and n_tries > 1:
            return _open(url, name, n_tries - 1)
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BadInput(
            f"--storage {url}: cannot be opened ({reason}); give a journal file or a database URL."
        ) from None


def worker(pid: int) -> list[object]:
    """A process that no other is, by machine, number and start; the start is empty where there is none."""
    try:
        start = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        start = ""
    return [platform.node(), pid, start]


def fail_dead(study: optuna.Study) -> None:
    """Fail running trials of dead processes; another machine's after a time that no trial takes. One that no worker has
    claimed is waited for a moment: its worker does that at once, or died."""
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        begun = trial.datetime_start
        age_s = (datetime.now() - begun).total_seconds() if begun else 0.0
        match trial.user_attrs.get("worker"):
            case None if age_s < CLAIMED_S:
                time.sleep(0.02)
                return fail_dead(study)
            case [node, int(pid), _] as found if node == platform.node():
                alive = found == worker(pid)
            case found:
                alive = found is not None and age_s < LONGEST_TRIAL_S
        if not alive:
            study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
