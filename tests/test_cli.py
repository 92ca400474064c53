"""The command line as people meet it: instant help, one sentence for bad input, the right exit code, nothing half-written."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from specmoeoff.cli import parse_bytes
from specmoeoff.errors import BadInput
from specmoeoff.specs.plan import Plan
from specmoeoff.specs.profile import HardwareProfile
from specmoeoff.specs.workload import Workload
from specmoeoff.tuner.tune import TuneRequest, tune


def run(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-m", "specmoeoff", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, timeout=120)


def refused(done: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in " ".join(done.stderr.split())


@pytest.fixture
def plan(made_up_profile: HardwareProfile, made_up_workload: Workload, target_spec, draft_spec, tmp_path: Path) -> Path:
    found = tune(
        TuneRequest(
            profile=made_up_profile,
            model=target_spec,
            workload=made_up_workload,
            model_source=str(tmp_path / "model"),
            host_memory_bytes=8 << 30,
            draft=draft_spec,
            draft_source=str(tmp_path / "draft"),
        )
    )
    found.save(tmp_path / "plan.toml")
    return tmp_path / "plan.toml"


HEAVY = ("torch", "cupy", "matplotlib", "pandas", "scipy", "optuna", "transformers", "gguf")


@pytest.mark.parametrize(
    "module", ["specmoeoff.cli", "specmoeoff.runtime.validate", "specmoeoff.runtime.batch_run", "specmoeoff.auto"]
)
def test_what_runs_stays_small(module: str) -> None:
    code = f"import sys, {module}; print([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_command_has_help() -> None:
    for command in ("doctor", "profile", "workload", "tune", "run", "validate", "report", "auto"):
        assert run(command, "--help").returncode == 0


def test_version_and_doctor() -> None:
    assert run("--version").stdout.startswith("specmoeoff ")
    findings = json.loads(run("doctor", "--json").stdout)
    assert {"CPU", "kernels", "direct reads", "GPU"} <= {f["name"] for f in findings}


def test_an_unknown_option_is_exit_2() -> None:
    refused(run("tune", "--frobnicate"), 2, "No such option")


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [("24GiB", 24 << 30), ("512MiB", 512 << 20), ("1.5GB", 1_500_000_000), ("4096", 4096), ("1,024KiB", 1 << 20)],
)
def test_byte_sizes(text: str, n_bytes: int) -> None:
    assert parse_bytes(text, "--fast-memory") == n_bytes


@pytest.mark.parametrize("text", ["", "many", "-1GiB", "5XB", "nan"])
def test_bad_byte_sizes_name_the_option(text: str) -> None:
    with pytest.raises(BadInput, match="--fast-memory"):
        parse_bytes(text, "--fast-memory")


def test_models_that_are_not_there(tmp_path: Path) -> None:
    arguments = ("workload", "--prompts", tmp_path / "p.jsonl", "-o", tmp_path / "w.json")
    refused(run(*arguments, "--model", tmp_path / "nothing"), 2, "no such folder")
    refused(run(*arguments, "--model", "mistralai/Mixtral-8x7B"), 2, "download it first")
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text(json.dumps({"architectures": ["GPT2LMHeadModel"]}))
    refused(run(*arguments, "--model", tmp_path / "m"), 2, "config.json", "GPT2LMHeadModel")
    assert not (tmp_path / "w.json").exists()


def test_plans_that_cannot_be_read(plan: Path, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text(json.dumps({"custom_id": "a", "body": {"prompt": "x"}}) + "\n")
    rest = ("--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl")
    refused(run("run", tmp_path / "absent.toml", *rest), 2, "absent.toml", "no such plan")
    text = plan.read_text()
    broken = tmp_path / "broken.toml"
    broken.write_text(text[: len(text) // 2])
    refused(run("run", broken, *rest), 2, "broken.toml", "not a")
    broken.write_text(text.replace("schema_version = 1", "schema_version = 99"))
    refused(run("run", broken, *rest), 2, "schema_version is 99")
    broken.write_text(text.replace("draft_length = ", "draft_lenght = ", 1))
    refused(run("run", broken, *rest), 2, "decode.draft")
    assert not (tmp_path / "out.jsonl").exists()


def test_prompts_that_are_not_json_lines(plan: Path, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text("hello\n")
    done = run("run", plan, "--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl")
    refused(done, 2, "line 1", "not JSON")
    assert not list(tmp_path.glob("out.jsonl*"))


def test_a_plan_of_another_machine_is_a_warning(plan: Path, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text(json.dumps({"custom_id": "a", "body": {"prompt": "x"}}) + "\n")
    done = run("run", plan, "--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl")
    refused(done, 2, "warning: the plan was made from a profile of another machine")


def test_too_little_memory_is_exit_1_with_the_smallest_change(
    made_up_profile: HardwareProfile, made_up_workload: Workload, save_tiny, tmp_path: Path
) -> None:
    folder, fingerprint = save_tiny
    made_up_profile.save(tmp_path / "profile.json")
    made_up_workload.model_copy(update={"model_fingerprint": fingerprint}).save(tmp_path / "workload.json")
    arguments = ("--profile", tmp_path / "profile.json", "--model", folder, "--workload", tmp_path / "workload.json")
    done = run("tune", *arguments, "-o", tmp_path / "plan.toml", "--fast-memory", "1KiB")
    refused(done, 1, "fast memory", "bytes", "smallest change", "--fast-memory")
    assert not (tmp_path / "plan.toml").exists()
    refused(run("tune", *arguments, "-o", tmp_path / "no" / "plan.toml"), 2, "does not exist")


@pytest.fixture
def save_tiny(tmp_path: Path) -> tuple[Path, str]:
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM
    from transformers.utils import logging

    from specmoeoff.runtime.checkpoint import read_model_spec

    logging.disable_progress_bar()
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        max_position_embeddings=256,
    )
    folder = tmp_path / "tiny"
    MixtralForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder, read_model_spec(folder).fingerprint


def test_a_full_disk_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from specmoeoff import files

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(BadInput, match="the disk is full"):
        files.write_atomic(tmp_path / "plan.toml", "x")
    assert list(tmp_path.iterdir()) == []


def test_reports_say_what_is_missing(made_up_profile: HardwareProfile, plan: Path, tmp_path: Path) -> None:
    made_up_profile.save(tmp_path / "profile.json")
    done = run("report", "--profile", tmp_path / "profile.json", "-o", tmp_path / "r.html")
    assert done.returncode == 0, done.stderr
    html = (tmp_path / "r.html").read_text()
    assert "No plan was given" in html
    assert "http" not in html.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    ).replace("https://matplotlib.org", "")
    done = run("report", "--profile", tmp_path / "profile.json", "--plan", plan, "-o", tmp_path / "r.html")
    assert done.returncode == 0, done.stderr
    assert {p.name for p in (tmp_path / "r_files").iterdir()} >= {
        "roofline.svg",
        "throughput.png",
        "memory.csv",
        "numbers.csv",
    }
    (tmp_path / "points.csv").write_text("name,flops_per_byte,gflop_per_s\nmine,4,abc\n")
    done = run(
        "report", "--profile", tmp_path / "profile.json", "--points", tmp_path / "points.csv", "-o", tmp_path / "r.html"
    )
    refused(done, 2, "points.csv", "line 2", "gflop_per_s")


def test_a_plan_file_says_the_same_after_reading(plan: Path) -> None:
    assert Plan.load(plan).text(".toml") == plan.read_text()
