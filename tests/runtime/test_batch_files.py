"""Batch files: bad lines are named, and an interrupted run neither loses nor repeats a request."""

import json
from pathlib import Path

import pytest

from specmoeoff.errors import BadInput
from specmoeoff.runtime.batch_files import Journal, read_batch


def line(name: str, **body: object) -> str:
    return json.dumps({"custom_id": name, "body": {"prompt": "x", **body}})


def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{broken", "line 2: not JSON"),
        ("[1]", "line 2"),
        (json.dumps({"body": {"prompt": "x"}}), "line 2: custom_id"),
        (line("a"), "occurs twice"),
        (line("b", temperature=0.7), "body.temperature is 0.7"),
        (line("b", n=2), "body.n is 2"),
        (line("b", max_tokens=0), "line 2: body.max_tokens"),
        (line("b", messages=[{"role": "user", "content": "x"}]), "exactly one of"),
        (json.dumps({"custom_id": "b", "url": "/v1/embeddings", "body": {"prompt": "x"}}), "is not served"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(BadInput, match=r"in\.jsonl") as error:
        read_batch(write(tmp_path / "in.jsonl", line("a"), text))
    assert words in str(error.value)


def test_files_that_are_not_batch_files(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no such batch file"):
        read_batch(tmp_path / "absent.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(BadInput, match="holds no request"):
        read_batch(tmp_path / "empty.jsonl")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BadInput, match="not UTF-8"):
        read_batch(tmp_path / "binary.jsonl")


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    lines = read_batch(write(tmp_path / "in.jsonl", *(line(f"r{i}") for i in range(4))))
    output = tmp_path / "out.jsonl"
    first = Journal(output, lines, "plan")
    first.add({"custom_id": "r2", "n": 1})
    first.add({"custom_id": "r0", "n": 1})
    first.close()
    with first.path.open("a") as stream:
        stream.write('{"custom_id": "r1", "to')  # killed while writing
    assert not output.exists()

    second = Journal(output, lines, "plan")
    assert second.missing == ["r1", "r3"]
    for name in second.missing:
        second.add({"custom_id": name, "n": 2})
    second.finish()
    answers = [json.loads(text) for text in output.read_text().splitlines()]
    assert [(a["custom_id"], a["n"]) for a in answers] == [("r0", 1), ("r1", 2), ("r2", 1), ("r3", 2)]
    assert not second.path.exists()


def test_a_journal_of_another_plan_or_input_is_not_mixed_in(tmp_path: Path) -> None:
    lines = read_batch(write(tmp_path / "in.jsonl", line("a"), line("b")))
    journal = Journal(tmp_path / "out.jsonl", lines, "plan")
    journal.add({"custom_id": "a"})
    journal.close()
    with pytest.raises(BadInput, match="begun with another plan or input"):
        Journal(tmp_path / "out.jsonl", lines, "other plan")
    with pytest.raises(BadInput, match="begun with another plan or input"):
        Journal(tmp_path / "out.jsonl", lines[:1], "plan")
