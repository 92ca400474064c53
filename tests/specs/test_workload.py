"""A workload file that was edited is refused in a sentence that names the field."""

import json
from pathlib import Path

import pytest

from specmoeoff.errors import BadInput
from specmoeoff.specs.workload import Workload


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("popularity", [[0.5, 0.5], [1.0]], "popularity: every layer must list the same experts"),
        ("popularity", [], "popularity: every layer must list the same experts"),
        ("popularity", [[0.5, 1.5]], "popularity.0.1: .*less than or equal to 1"),
        ("popularity", [[0.5, -0.5]], "popularity.0.1: .*greater than or equal to 0"),
        ("union_exponent", 1.5, "union_exponent: .*less than or equal to 1"),
        ("union_exponent", -0.1, "union_exponent: .*greater than or equal to 0"),
        ("union_exponent", float("inf"), "union_exponent"),
        ("union_exponent", float("nan"), "union_exponent"),
        (
            "acceptance",
            {"ngram": {"conditional": [1.1], "n_rounds": 1, "provenance": ""}},
            "acceptance.ngram.conditional",
        ),
        (
            "acceptance",
            {"ngram": {"conditional": [-1], "n_rounds": 1, "provenance": ""}},
            "acceptance.ngram.conditional",
        ),
    ],
)
def test_values_that_cannot_be(
    made_up_workload: Workload, tmp_path: Path, field: str, value: object, words: str
) -> None:
    path = tmp_path / "workload.json"
    path.write_text(json.dumps(json.loads(made_up_workload.text()) | {field: value}))
    with pytest.raises(BadInput, match=rf"workload\.json: not a valid workload: {words}"):
        Workload.load(path)


def test_a_workload_survives_its_file(made_up_workload: Workload, tmp_path: Path) -> None:
    found = made_up_workload.model_copy(update={"prompts_sha256": "abc"})
    found.save(tmp_path / "workload.json")
    assert Workload.load(tmp_path / "workload.json") == found


def test_a_workload_written_before_prompts_were_hashed_can_be_read(made_up_workload: Workload, tmp_path: Path) -> None:
    data = json.loads(made_up_workload.text())
    del data["prompts_sha256"]
    (tmp_path / "workload.json").write_text(json.dumps(data))
    assert Workload.load(tmp_path / "workload.json") == made_up_workload


@pytest.mark.parametrize(
    ("text", "words"),
    [("[" * 100_000, "nested too deeply"), ('{"schema_version": ' + "1" * 5000 + "}", "too many digits"), ("{", "")],
)
def test_text_that_is_not_json_is_refused(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "workload.json").write_text(text)
    with pytest.raises(BadInput, match=rf"workload\.json: not a workload: .*{words}"):
        Workload.load(tmp_path / "workload.json")
