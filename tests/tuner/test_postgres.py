"""Studies in a real PostgreSQL, shared by workers, and seen by optuna-dashboard."""

import json
import os
import pwd
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import mkdtemp

import pytest

from specmoeoff.errors import BadInput
from specmoeoff.tuner.study import open_study

PROGRAMS = max(Path("/usr/lib/postgresql").glob("*/bin"), default=Path("missing"), key=lambda p: int(p.parent.name))
TRIALS = 24
pytestmark = pytest.mark.skipif(
    not (PROGRAMS / "initdb").exists(), reason="no PostgreSQL here: apt-get install postgresql"
)


def as_nobody() -> dict[str, int]:
    """PostgreSQL refuses to be root."""
    if os.geteuid():
        return {}
    nobody = pwd.getpwnam("nobody")
    return {"user": nobody.pw_uid, "group": nobody.pw_gid}


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """Of a server that lives for this module, in a folder that its user may enter."""
    pytest.importorskip("psycopg", reason="pip install 'specmoeoff[postgres]'")
    folder, user = mkdtemp(dir="/tmp"), as_nobody()
    if user:
        os.chown(folder, user["user"], user["group"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def run(program: str, *arguments: str) -> None:
        command = [str(PROGRAMS / program), "-D", f"{folder}/data", *arguments]
        where = {"cwd": folder, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, **user}
        subprocess.run(command, check=True, timeout=60, **where)  # type: ignore[call-overload]

    try:
        run("initdb", "--username=tuner", "--auth=trust", "--no-sync")
        run("pg_ctl", "-w", "-o", f"-p {port} -c listen_addresses=127.0.0.1 -k {folder} -c fsync=off", "start")
        yield f"postgresql://tuner@127.0.0.1:{port}/postgres"
        run("pg_ctl", "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder)


def tune(url: str, folder: Path) -> subprocess.Popen[str]:
    arguments = (
        *("--profile", "a30", "--model", "qwen3-30b-a3b", "--workload", "apps", "--output-tokens", "256"),
        *("--fast-memory", "24GiB", "--host-memory", "64GiB", "--search", "optuna", "--trials", str(TRIALS)),
        *("--storage", url, "-o", str(folder / f"{os.urandom(4).hex()}.toml")),
    )
    command = [sys.executable, "-W", "error", "-m", "specmoeoff", "tune", *arguments]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def test_two_workers_share_a_study_and_the_dashboard_opens_it(url: str, tmp_path: Path) -> None:
    import optuna

    workers = [tune(url, tmp_path) for _ in range(2)]
    for worker in workers:
        _, errors = worker.communicate(timeout=120)
        assert worker.returncode == 0, errors
    storage = optuna.storages.RDBStorage(url.replace("://", "+psycopg://"))
    (study,) = optuna.get_all_study_summaries(storage)
    trials = optuna.load_study(study_name=study.study_name, storage=storage).get_trials()
    complete = [t for t in trials if t.state == optuna.trial.TrialState.COMPLETE]
    assert TRIALS <= len(complete) <= TRIALS + 1
    assert len({tuple(t.user_attrs["worker"]) for t in complete}) == 2
    dashboard = pytest.importorskip("optuna_dashboard", reason="pip install 'specmoeoff[dashboard]'")
    assert [s["study_name"] for s in told(dashboard.wsgi(storage))] == [study.study_name]
    storage.engine.dispose()


def told(app: object) -> list[dict[str, str]]:
    """What a dashboard answers to /api/studies."""
    from wsgiref.util import setup_testing_defaults

    environment: dict[str, object] = {"PATH_INFO": "/api/studies", "REQUEST_METHOD": "GET"}
    setup_testing_defaults(environment)
    status: list[str] = []
    body = b"".join(app(environment, lambda code, headers, *_: status.append(code)))  # type: ignore[operator]
    assert status[0].startswith("200")
    return json.loads(body)["study_summaries"]


def test_workers_that_make_the_tables_at_once_all_get_the_study(url: str) -> None:
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    import psycopg

    with psycopg.connect(url, autocommit=True) as server:
        server.execute("CREATE DATABASE fresh")
    fresh = url.rpartition("/")[0] + "/fresh"
    with ProcessPoolExecutor(6, mp_context=get_context("spawn")) as pool:
        assert set(pool.map(opened, [fresh] * 6)) == {"shared"}


def opened(url: str) -> str:
    return open_study(url, "shared").study_name


def test_a_server_that_is_not_there_is_named(url: str) -> None:
    pytest.importorskip("psycopg")
    with pytest.raises(BadInput, match=r"--storage postgresql.* cannot be opened"):
        open_study("postgresql://tuner@127.0.0.1:1/postgres", "study")
