"""`run --ray` over a local cluster of two workers, of which one is killed."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from specmoeoff.errors import BadInput
from specmoeoff.runtime import ray_run
from specmoeoff.specs.plan import Plan

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.filterwarnings("default")]
N_REQUESTS = 60


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    pytest.importorskip("ray", reason="the `ray` extra is not installed")
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    quickly = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 4}
    small = {"object_store_memory": 80 << 20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "_system_config": quickly, **small})
    cluster.workers = [cluster.add_node(num_cpus=1, object_store_memory=80 << 20) for _ in range(2)]
    yield cluster
    cluster.shutdown()


@pytest.fixture
def words(speaking_model: Path, plan_for: Callable[..., Plan], tmp_path: Path) -> list[str]:
    """The words of a `run` without its output."""
    plan_for(speaking_model).save(tmp_path / "plan.toml")
    bodies = [{"prompt": f"number {i}", "max_tokens": 60 + i % 30, "ignore_eos": True} for i in range(N_REQUESTS)]
    lines = [json.dumps({"custom_id": f"r{i}", "body": body}) for i, body in enumerate(bodies)]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    return [
        sys.executable,
        "-m",
        "specmoeoff",
        "run",
        str(tmp_path / "plan.toml"),
        "--input",
        str(tmp_path / "in.jsonl"),
    ]


def start_and_wait(command: list[str], journal: Path, n_lines: int) -> subprocess.Popen[str]:
    """A run, slow enough to be disturbed, once its journal has some lines."""
    slow = [*command, "--disk-limit-gb-per-s", "0.02"]
    process = subprocess.Popen(slow, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 100
    while not journal.exists() or journal.read_bytes().count(b"\n") < n_lines:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return process


def test_killed_workers_lose_no_request_and_answer_none_twice(cluster: Any, words: list[str], tmp_path: Path) -> None:
    output, journal = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial"
    spread = [*words, "--output", str(output), "--ray", cluster.address]
    process = start_and_wait(spread, journal, 6)
    cluster.remove_node(cluster.workers[0], allow_graceful=False)
    n_kept = journal.read_bytes().count(b"\n")
    while journal.read_bytes().count(b"\n") < n_kept + 8:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    cluster.remove_node(cluster.workers[1], allow_graceful=False)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 1, said
    assert "its requests go to the others" in said
    assert "no node is left; what is finished is kept, run again to go on" in said
    assert "Traceback" not in said
    assert not output.exists()

    cluster.add_node(num_cpus=1, object_store_memory=80 << 20)
    kept = journal.read_bytes().count(b"\n") - 1
    resumed = subprocess.run([*spread, "--json"], capture_output=True, text=True, check=True)
    assert json.loads(resumed.stdout)["requests"] == N_REQUESTS - kept
    subprocess.run([*words, "--output", str(tmp_path / "alone.jsonl")], check=True, capture_output=True)
    assert output.read_bytes() == (tmp_path / "alone.jsonl").read_bytes()
    assert not journal.exists()


def test_a_machine_without_a_plan_makes_its_own_once(
    speaking_model: Path, plan_for: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = plan_for(speaking_model)
    assert ray_run.plan_here(given, "") == given
    elsewhere = given.model_copy(update={"inputs": given.inputs.model_copy(update={"machine_fingerprint": "other"})})
    with pytest.raises(BadInput, match="workload the plan was made from is not on the machine"):
        ray_run.plan_here(elsewhere, "")
    commands = []

    def command(*words: str | Path) -> None:
        commands.append(words)
        if words[0] == "tune":
            assert Path(words[words.index("--workload") + 1]).read_text() == "the workload"
            given.save(words[words.index("-o") + 1])

    monkeypatch.setattr(ray_run, "_command", command)
    for _ in range(2):
        assert ray_run.plan_here(elsewhere, "the workload") == given
    assert [words[0] for words in commands] == ["profile", "tune"]
    assert commands[1][-4:] == ("--fast-memory", str(1 << 30), "--context", "192")


def test_no_cluster_is_one_sentence(words: list[str], tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="the `ray` extra is not installed")
    for address in ("127.0.0.1:1", "auto"):
        command = [*words, "--output", str(tmp_path / "out.jsonl"), "--ray", address]
        refused = subprocess.run(command, capture_output=True, text=True, check=False)
        assert refused.returncode == 2, refused.stderr
        assert f"--ray {address}:" in refused.stderr
        assert "start a cluster with `ray start --head`" in " ".join(refused.stderr.split())
        assert "Traceback" not in refused.stderr
