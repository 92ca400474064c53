"""The command line as people meet it: instant help, one sentence for bad input, the right exit code, nothing half-written."""

import io
import json
import os
import subprocess
import sys
import warnings
from contextlib import chdir, redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

import pytest

from specmoeoff.cli import main, parse_bytes
from specmoeoff.errors import BadInput
from specmoeoff.specs.plan import Plan
from specmoeoff.specs.profile import HardwareProfile
from specmoeoff.specs.workload import Workload


def run(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The program, in this process: a new one takes a second to start."""
    command, told, wrong = ["specmoeoff", *map(str, arguments)], io.StringIO(), io.StringIO()
    with (
        chdir(cwd or "."),
        redirect_stdout(told),
        redirect_stderr(wrong),
        mock.patch.object(sys, "argv", command),
        mock.patch.dict(os.environ),
        warnings.catch_warnings(action="error"),
        pytest.raises(SystemExit) as ended,
    ):
        main()
    return subprocess.CompletedProcess(command, int(ended.value.code or 0), told.getvalue(), wrong.getvalue())


def started(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The program as it is started from a shell."""
    command = [sys.executable, "-W", "error", "-m", "specmoeoff", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def refused(done: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in " ".join(done.stderr.split())


@pytest.fixture
def plan(plan: Plan, tmp_path: Path) -> Path:
    assert plan.draft
    at = {name: getattr(plan, name).model_copy(update={"source": str(tmp_path / name)}) for name in ("model", "draft")}
    plan.model_copy(update=at).save(tmp_path / "plan.toml")
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
    for command in (
        "doctor",
        "profile",
        "workload",
        "tune",
        "run",
        "validate",
        "report",
        "compare",
        "export",
        "serve",
        "auto",
    ):
        assert run(command, "--help").returncode == 0


def test_version_and_doctor() -> None:
    assert started("--version").stdout.startswith("specmoeoff ")
    findings = json.loads(started("doctor", "--json").stdout)
    assert {"CPU", "kernels", "direct reads", "GPU"} <= {f["name"] for f in findings}


def test_an_unknown_option_is_exit_2() -> None:
    refused(started("tune", "--frobnicate"), 2, "No such option")


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


def test_models_that_are_not_there(prompts: Path, tmp_path: Path) -> None:
    arguments = ("workload", "--prompts", prompts, "-o", tmp_path / "w.json")
    refused(run(*arguments, "--model", tmp_path / "nothing"), 2, "no such folder")
    refused(run(*arguments, "--model", "mistralai/Mixtral-8x7B"), 2, "download it first")
    refused(
        run(*arguments, "--model", "~nouser-of-this-name/m"), 2, "~nouser-of-this-name/m", "give a checkpoint folder"
    )
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text(json.dumps({"architectures": ["GPT2LMHeadModel"]}))
    refused(run(*arguments, "--model", tmp_path / "m"), 2, "config.json", "GPT2LMHeadModel")
    assert not (tmp_path / "w.json").exists()


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    path.write_text(json.dumps({"custom_id": "a", "body": {"prompt": "x"}}) + "\n")
    return path


def test_plans_that_cannot_be_read(plan: Path, prompts: Path, tmp_path: Path) -> None:
    rest = ("--input", prompts, "--output", tmp_path / "out.jsonl")
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


def test_no_output_replaces_an_input_or_another_output(plan: Path, prompts: Path, tmp_path: Path) -> None:
    (tmp_path / "link.jsonl").symlink_to(prompts)
    out, other = tmp_path / "out.jsonl", tmp_path / "x" / ".." / "out.jsonl"
    (tmp_path / "x").mkdir()
    before = {path: path.read_bytes() for path in (plan, prompts)}
    for outputs, words in (
        (("--output", prompts), ("--output", "is also --input")),
        (("--output", tmp_path / "link.jsonl"), ("--output", "is also --input")),
        (("--output", plan), ("--output", "is also PLAN")),
        (("--output", out, "--record", prompts), ("--record", "is also --input")),
        (("--output", out, "--record", other), ("--record", "is also --output")),
        (("--output", out, "--trace", out), ("--trace", "is also --output")),
        (("--output", out, "--record", tmp_path / "r", "--trace", tmp_path / "r"), ("--trace", "is also --record")),
    ):
        refused(run("run", plan, "--input", prompts, *outputs), 2, *words, "give a file of its own")
    refused(run("workload", "--model", tmp_path, "--prompts", prompts, "-o", prompts), 2, "is also --prompts")
    assert {path: path.read_bytes() for path in before} == before
    assert not out.exists()


def test_an_output_that_cannot_be_written_is_refused_before_any_work(plan: Path, prompts: Path, tmp_path: Path) -> None:
    for output, words in (
        (".", "is a folder"),
        (tmp_path, "is a folder"),
        (tmp_path / "no" / "out", "does not exist; create it first"),
        (prompts / "out", "does not exist; create it first"),
        ("/proc/out", "cannot write"),
        (tmp_path / ("x" * 300), "cannot write"),
    ):
        refused(run("run", plan, "--input", prompts, "--output", output, cwd=tmp_path), 2, str(output), words)
    refused(run("report", "--profile", "a30", "-o", ".", cwd=tmp_path), 2, "--output .: is a folder")
    refused(run("profile", "-o", "/proc/p.json"), 2, "/proc/p.json: cannot write")
    refused(run("tune", "--profile", plan, "--model", "m", "--workload", plan, "-o", tmp_path), 2, "is a folder")
    refused(run("validate", plan, "-o", tmp_path), 2, "is a folder")


def test_an_absurd_disk_limit_is_refused(plan: Path, prompts: Path, tmp_path: Path) -> None:
    output = ("-o", tmp_path / "x.toml")
    run_it = ("run", plan, "--input", prompts, "--output", tmp_path / "out.jsonl")
    tune_it = ("tune", "--profile", plan, "--model", "m", "--workload", plan, *output)
    all_of_it = ("auto", "--model", "m", "--prompts", prompts, "-o", tmp_path / "auto")
    for command, value in ((run_it, "inf"), (tune_it, "nan"), (all_of_it, "1e9"), (tune_it, "0.001"), (run_it, "-1")):
        done = run(*command, f"--disk-limit-gb-per-s={value}")
        refused(done, 2, "--disk-limit-gb-per-s", "give a number from 0.01 to 1000")
    refused(run("profile", "--budget", "nan", *output), 2, "--budget nan: give a number from 5 to 86400")


def test_a_context_of_nothing_is_refused(plan: Path, tmp_path: Path) -> None:
    arguments = ("--profile", plan, "--model", "m", "--workload", plan, "-o", tmp_path / "x.toml")
    refused(run("tune", *arguments, "--context", 0), 2, "--context")


@pytest.mark.parametrize("command", ["profile", "workload"])
def test_a_model_without_a_tokenizer_is_refused_before_measuring(
    command: str, save_tiny, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPECMOEOFF_CACHE", str(tmp_path / "cache"))
    arguments = ("--prompts", prompts) if command == "workload" else ()
    done = run(command, "--model", save_tiny[0], "-o", tmp_path / "x.json", *arguments)
    refused(done, 2, "tokenizer.json: no such tokenizer")
    assert not (tmp_path / "x.json").exists()
    assert not (tmp_path / "cache" / "packed").exists()


def test_a_plan_of_another_machine_is_a_warning(plan: Path, prompts: Path, tmp_path: Path) -> None:
    done = run("run", plan, "--input", prompts, "--output", tmp_path / "out.jsonl")
    refused(done, 2, "warning: the plan was made from a profile of another machine")


def test_too_little_memory_is_exit_1_with_the_smallest_change(
    made_up_profile: HardwareProfile, made_up_workload: Workload, save_tiny, tmp_path: Path
) -> None:
    folder, fingerprint = save_tiny
    made_up_profile.save(tmp_path / "profile.json")
    its = {"model_fingerprint": fingerprint, "popularity": ((0.5,) * 4,) * 2}
    made_up_workload.model_copy(update=its).save(tmp_path / "workload.json")
    arguments = ("--profile", tmp_path / "profile.json", "--model", folder, "--workload", tmp_path / "workload.json")
    done = run("tune", *arguments, "-o", tmp_path / "plan.toml", "--fast-memory", "1KiB")
    refused(done, 1, "fast memory", "bytes", "smallest change", "--fast-memory")
    assert not (tmp_path / "plan.toml").exists()
    refused(run("tune", *arguments, "-o", tmp_path / "no" / "plan.toml"), 2, "does not exist")
    for option, value in (("--trials", 5), ("--storage", "study")):
        refused(run("tune", *arguments, "-o", tmp_path / "plan.toml", option, value), 2, option, "--search optuna")


def test_a_plan_names_its_model_so_that_it_is_found_from_anywhere(
    made_up_profile: HardwareProfile, made_up_workload: Workload, save_tiny, tmp_path: Path, monkeypatch
) -> None:
    """And a cache folder that cannot be written costs a warning, not the plan."""
    from specmoeoff.runtime.checkpoint import read_model_spec

    folder, fingerprint = save_tiny
    # Only the identity of the tiny model: the made-up profile prices another shape.
    spec = read_model_spec(folder)
    fitting = made_up_workload.model_copy(update={"model_fingerprint": fingerprint})
    shape = {old.shape: spec.shape_key for old in made_up_profile.operators if "-e8a" in old.shape}
    tables = tuple(t.model_copy(update={"shape": shape.get(t.shape, t.shape)}) for t in made_up_profile.operators)
    made_up_profile.model_copy(update={"operators": tables}).save(tmp_path / "profile.json")
    popularity = ((0.5,) * spec.n_experts,) * spec.n_layers
    fitting.model_copy(update={"popularity": popularity}).save(tmp_path / "workload.json")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SPECMOEOFF_CACHE", str(tmp_path / "file" / "cache"))
    done = run(
        *("tune", "--profile", tmp_path / "profile.json", "--model=~/tiny", "--workload", tmp_path / "workload.json"),
        *("-o", tmp_path / "plan.toml", "--fast-memory", "1MiB", "--host-memory", "8GiB", "--context", 64),
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "cannot write" in done.stderr
    assert "will need --profile and --workload" in done.stderr
    assert Plan.load(tmp_path / "plan.toml").model.source == str(folder)


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


def test_a_plan_is_exported_as_a_script_and_as_json_or_refused(plan: Path) -> None:
    script, told = (run("export", plan, "--to", "llama.cpp", *json_) for json_ in ((), ("--json",)))
    assert "llama-server" in script.stdout
    assert "# Not expressed:" in script.stdout
    found = json.loads(told.stdout)
    assert found["command"][0] == "llama-server"
    assert found["not_expressed"]
    refused(run("export", plan, "--to", "exllama"), 2, "--to exllama: choose llama.cpp, vllm, sglang, ktransformers")
    refused(run("export", plan, "--to", "ktransformers"), 1, "needs a GPU")
