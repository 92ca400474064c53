"""The Python API: five names, imported when used, that answer as the command line does."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import specmoeoff
from specmoeoff.errors import BadInput
from specmoeoff.specs.plan import Plan


@pytest.fixture
def plan_file(speaking_model: Path, plan_for: Callable[..., Plan], tmp_path: Path) -> Path:
    plan_for(speaking_model).save(tmp_path / "plan.toml")
    return tmp_path / "plan.toml"


def test_the_names_are_there_and_importing_the_package_costs_nothing() -> None:
    assert set(specmoeoff.__all__) == {"load", "Plan", "Engine", "generate", "validate"}
    for name in specmoeoff.__all__:
        assert getattr(specmoeoff, name).__doc__
    with pytest.raises(AttributeError, match="nothing"):
        specmoeoff.nothing  # noqa: B018
    code = "import sys, specmoeoff; print('numpy' in sys.modules or 'pydantic' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"


def test_generate_answers_in_order_and_tells_the_text_as_it_comes(plan_file: Path) -> None:
    prompts: list[Any] = [*(f"number {i}" for i in range(6)), [{"role": "user", "content": "Grüße"}]]
    told = [""] * len(prompts)

    def on_text(index: int, text: str) -> None:
        told[index] += text

    with specmoeoff.load(plan_file) as engine:
        assert isinstance(engine, specmoeoff.Engine)
        answers = specmoeoff.generate(engine, prompts, max_tokens=20, on_text=on_text)
        assert told == answers
        assert all(answers)
        one_by_one = [specmoeoff.generate(engine, [prompt], max_tokens=20)[0] for prompt in prompts]
        assert one_by_one == answers
        assert not engine.busy
        with pytest.raises(BadInput, match=r"'prompt 1'.*exceed the plan's context"):
            specmoeoff.generate(engine, ["fits", "x" * 500])
        with pytest.raises(BadInput, match=r"prompt 0: messages\.0\.content"):
            specmoeoff.generate(engine, [[{"role": "user"}]])
        with pytest.raises(BadInput, match="temprature is not supported"):
            specmoeoff.generate(engine, ["x"], temprature=0.5)
        sampled = [specmoeoff.generate(engine, ["x"], temperature=1.0, seed=seed)[0] for seed in (1, 1, 2)]
        assert sampled[0] == sampled[1] != sampled[2]
        stop = sampled[0][10:12]
        assert specmoeoff.generate(engine, ["x"], temperature=1.0, seed=1, stop=stop)[0] == sampled[0].split(stop)[0]


def test_run_stream_prints_what_generate_answers(plan_file: Path) -> None:
    with specmoeoff.load(plan_file) as engine:
        messages = [{"role": "user", "content": "日本"}]
        expected = specmoeoff.generate(engine, [messages], max_tokens=30)[0]
    command = [sys.executable, "-W", "error", "-m", "specmoeoff", "run", str(plan_file)]
    asked = ["--stream", "--prompt", "日本", "--max-tokens", "30"]
    done = subprocess.run([*command, *asked], capture_output=True, check=True)
    assert done.stdout.decode() == expected + "\n"
    for words, wrong in (
        (["--prompt", "x"], "--prompt: goes with --stream"),
        (["--prompt", "x", "--stream", "--input", "y"], "--prompt: goes with --stream"),
        (["--input", "x"], "--input and --output: are needed"),
    ):
        refused = subprocess.run([*command, *words], capture_output=True, text=True, check=False)
        assert refused.returncode == 2
        assert wrong in " ".join(refused.stderr.split())
