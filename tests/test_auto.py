"""`auto` without its stages: what it asks of them, what it keeps, and what it refuses before the first."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from specmoeoff import auto
from specmoeoff.errors import AnswerIsNo, BadInput, MissingCapability, SpecMoEOffError
from specmoeoff.files import sha256_text
from specmoeoff.specs.model import ModelSpec
from specmoeoff.specs.workload import Workload


class Words:
    """Stands for a tokenizer: a token a word."""

    def __init__(self, folder: Path) -> None:
        pass

    def encode(self, text: str) -> list[int]:
        return [1] * len(text.split())


class Stages:
    """Stands for our own commands: notes the words of each, makes its file, ends with the code wanted of it."""

    def __init__(self, workload: Workload) -> None:
        self.workload, self.codes = workload, {}
        self.said: dict[str, list[str]] = {}
        self.there: dict[str, set[str]] = {}

    def __call__(self, command: list[str], check: bool) -> SimpleNamespace:
        name, *words = command[3:]
        self.said[name] = words
        folder = Path(words[words.index("-o" if "-o" in words else "--output") + 1]).parent
        self.there[name] = {path.name for path in folder.iterdir()}
        if name == "workload" and not self.codes.get(name):
            prompts = Path(words[words.index("--prompts") + 1])
            found = self.workload.model_copy(update={"prompts_sha256": sha256_text(prompts.read_text())})
            found.save(folder / "workload.json")
        return SimpleNamespace(returncode=self.codes.get(name, 0))

    def value(self, stage: str, option: str) -> str:
        words = self.said[stage]
        return words[words.index(option) + 1]


@pytest.fixture
def stages(made_up_workload: Workload, target_spec: ModelSpec, monkeypatch: pytest.MonkeyPatch) -> Stages:
    stages = Stages(made_up_workload)
    monkeypatch.setattr(subprocess, "run", stages)
    monkeypatch.setattr(auto, "model_folder", Path)
    monkeypatch.setattr(auto, "read_model_spec", lambda folder: target_spec)
    monkeypatch.setattr(auto, "Tokenizer", Words)
    monkeypatch.setattr(auto, "_summary", lambda *_: None)
    monkeypatch.setattr(auto.Plan, "load", lambda path: None)
    monkeypatch.setattr(auto.RunRecord, "load", lambda path: None)
    return stages


def write_prompts(path: Path, n: int, n_words: int = 5, max_tokens: int = 64, **more: object) -> Path:
    body = {"prompt": "word " * n_words, "max_tokens": max_tokens}
    path.write_text("".join(json.dumps({"custom_id": f"r{i}", "body": body} | more) + "\n" for i in range(n)))
    return path


@pytest.fixture
def go(stages: Stages, tmp_path: Path) -> Callable[..., None]:
    def go(prompts: Path | None = None, fresh: bool = False) -> None:
        stages.said.clear()
        prompts = prompts or write_prompts(tmp_path / "prompts.jsonl", 3)
        auto.run_all("model", prompts, tmp_path / "out", None, fresh)

    return go


def test_the_run_takes_the_first_sixteen_and_validation_all(
    stages: Stages, go: Callable[..., None], tmp_path: Path
) -> None:
    prompts = write_prompts(tmp_path / "prompts.jsonl", 40)
    go(prompts)
    lines = Path(stages.value("run", "--input")).read_text().splitlines()
    assert [json.loads(line)["custom_id"] for line in lines] == [f"r{i}" for i in range(16)]
    assert stages.value("validate", "--prompts") == str(prompts)


def test_a_separator_within_a_prompt_does_not_cut_its_line(
    stages: Stages, go: Callable[..., None], tmp_path: Path
) -> None:
    line = json.dumps({"custom_id": "a", "body": {"prompt": "a\u2028b\u0085c"}}, ensure_ascii=False)
    (tmp_path / "prompts.jsonl").write_text(line + "\n")
    go(tmp_path / "prompts.jsonl")
    assert Path(stages.value("run", "--input")).read_text() == line + "\n"


@pytest.mark.parametrize(
    ("n_words", "max_tokens", "context"),
    [(5, 64, 304), (300, 100, 400), (5, 1000, 1005), (7192, 1000, 8192)],  # the workload's longest: 240 + 64
)
def test_the_plan_has_room_for_the_longest_request(
    stages: Stages, go: Callable[..., None], tmp_path: Path, n_words: int, max_tokens: int, context: int
) -> None:
    go(write_prompts(tmp_path / "prompts.jsonl", 2, n_words, max_tokens))
    assert stages.value("tune", "--context") == str(context)


def test_what_cannot_work_is_refused_before_the_first_stage(
    stages: Stages, go: Callable[..., None], tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    for make, words in (
        (lambda: tmp_path / "absent.jsonl", "no such batch file"),
        (
            lambda: write_prompts(prompts, 2, max_tokens=8188),
            "5 prompt and 8188 output tokens exceed the 8192 positions",
        ),
        (lambda: write_prompts(prompts, 2, method="POST", custom_id="a"), "occurs twice"),
        (lambda: write_prompts(tmp_path / "out" / "requests.jsonl", 20), "give the prompts another name"),
    ):
        (tmp_path / "out").mkdir(exist_ok=True)
        with pytest.raises(BadInput, match=words):
            go(make())
        assert stages.said == {}


def test_a_workload_is_kept_while_the_prompts_are_the_same(
    stages: Stages, go: Callable[..., None], tmp_path: Path
) -> None:
    go()
    assert "workload" in stages.said
    go()
    assert "workload" not in stages.said
    go(write_prompts(tmp_path / "prompts.jsonl", 4))
    assert "workload" in stages.said
    go(tmp_path / "prompts.jsonl", fresh=True)
    assert "workload" in stages.said


@pytest.mark.parametrize(
    ("code", "kind"), [(1, AnswerIsNo), (2, BadInput), (3, MissingCapability), (-9, BadInput), (130, BadInput)]
)
def test_a_stage_that_fails_ends_it_with_its_own_code(
    stages: Stages, go: Callable[..., None], code: int, kind: type[SpecMoEOffError]
) -> None:
    for stage in ("profile", "workload", "tune", "run", "report"):
        stages.codes = {stage: code}
        with pytest.raises(kind, match=f"`specmoeoff {stage}` ended with exit code {code}"):
            go()


def test_a_plan_that_does_not_hold_is_reported_first(stages: Stages, go: Callable[..., None]) -> None:
    stages.codes = {"validate": 1}
    with pytest.raises(AnswerIsNo, match="the plan did not hold"):
        go()
    assert "report" in stages.said
    stages.codes = {"validate": 3}
    with pytest.raises(MissingCapability, match="`specmoeoff validate` ended with exit code 3"):
        go()


def test_what_an_earlier_plan_led_to_is_gone_before_it_is_made_anew(
    stages: Stages, go: Callable[..., None], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    made = {"answers.jsonl", "answers.jsonl.partial", "run.json", "trace.json", "validation.json", "report.html"}
    for name in made:
        (out / name).write_text("old")
    go()
    assert made <= stages.there["tune"]
    assert not made & stages.there["run"]
