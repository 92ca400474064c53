"""Batch files: bad lines are named, and an interrupted run neither loses nor repeats a request."""

import errno
import fcntl
import io
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import pytest

from specmoeoff.errors import BadInput
from specmoeoff.runtime import batch_files
from specmoeoff.runtime.batch_files import BatchLine, Journal, read_batch, to_request
from specmoeoff.runtime.sampling import Sampling
from specmoeoff.specs.model import ModelSpec


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
        ("[" * 200_000, "line 2: not JSON (it is nested too deeply)"),
        ('{"custom_id": ' + "9" * 5000 + "}", "line 2: not JSON (a number has too many digits)"),
        ('{"custom_id": "b", "body": {"prompt": "x\\ud800"}}', "line 2: holds half of a surrogate pair"),
        ('{"custom_id": "\\udc00", "body": {"prompt": "x"}}', "line 2: holds half of a surrogate pair"),
        (line("b", messages=[{"role": "user", "content": "\ud83d"}]), "line 2: holds half of a surrogate pair"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(BadInput, match=r"in\.jsonl") as error:
        read_batch(write(tmp_path / "in.jsonl", line("a"), text))
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (line("b", n=2), "body.n is 2; one answer per request"),
        (line("b", stream=True), "body.stream is true"),
        (line("b", max_tokens=0), "body.max_tokens: Input should be greater"),
        (line("b", temperature=-1), "body.temperature: Input should be greater"),
        (line("b", top_p=0), "body.top_p: Input should be greater"),
        (line("b", stop=["a", "b", "c", "d", "e"]), "body.stop"),
        (line("b", stop=""), "body.stop"),
        (line("b", top_logprobs=3), "body.top_logprobs needs body.logprobs"),
        (line("b", logit_bias={"5": 1}), "body: logit_bias is not supported; leave it out"),
        (line("b", tools=[{"type": "function"}]), "body: tools is not supported"),
        (line("b", beam_width=4), "body: beam_width is not supported"),
        (line("b", messages=[{"role": "user", "content": "x"}]), "exactly one of"),
        (json.dumps({"custom_id": "b", "url": "/v1/embeddings", "body": {"prompt": "x"}}), "is not served"),
    ],
)
def test_a_request_that_is_wrong_by_itself_spoils_no_other(
    tmp_path: Path, target_spec: ModelSpec, text: str, words: str
) -> None:
    good, bad, other = read_batch(write(tmp_path / "in.jsonl", line("a"), text, line("c")))
    assert (good.problem, other.problem) == ("", "")
    with pytest.raises(BadInput, match=r"in\.jsonl: line 2: ") as error:
        to_request(bad, Fixed(), target_spec)  # type: ignore[arg-type]
    assert words in str(error.value)


def test_fields_that_ask_for_nothing_are_taken(tmp_path: Path) -> None:
    asked = {"user": "u", "n": None, "presence_penalty": 0, "tools": [], "response_format": {"type": "text"}}
    (only,) = read_batch(write(tmp_path / "in.jsonl", line("a", **asked)))
    assert only.problem == ""


def test_sampling_is_what_the_line_asks_for(tmp_path: Path) -> None:
    asked = {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "seed": -1}
    first, second, third = read_batch(
        write(tmp_path / "in.jsonl", line("a", **asked), line("b", temperature=1), line("c"))
    )
    assert first.body.sampling("a") == Sampling(0.7, 5, 0.9, 0.1, (1 << 64) - 1)
    assert second.body.sampling("b").seed == second.body.sampling("b").seed != second.body.sampling("c").seed
    assert third.body.sampling("c").greedy


def test_files_that_are_not_batch_files(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no such batch file"):
        read_batch(tmp_path / "absent.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(BadInput, match="holds no request"):
        read_batch(tmp_path / "empty.jsonl")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BadInput, match="not UTF-8"):
        read_batch(tmp_path / "binary.jsonl")


def test_only_a_newline_ends_a_line(tmp_path: Path) -> None:
    texts = ["a\u2028b", "a\u0085b", "a\u2029b", "a\x0bb\x1cb"]
    lines = [json.dumps({"custom_id": str(i), "body": {"prompt": t}}, ensure_ascii=False) for i, t in enumerate(texts)]
    (tmp_path / "in.jsonl").write_text("\r\n".join(lines), encoding="utf-8", newline="")
    assert [read.body.prompt for read in read_batch(tmp_path / "in.jsonl")] == texts


class Fixed:
    """Stands for a tokenizer: every text becomes these tokens."""

    def encode(self, text: str) -> list[int]:
        return [3, 95, 96]


def test_tokens_the_model_does_not_have_are_refused(tmp_path: Path, target_spec: ModelSpec) -> None:
    (only,) = read_batch(write(tmp_path / "in.jsonl", line("r0")))
    request = to_request(only, Fixed(), target_spec.model_copy(update={"vocab": 97}))  # type: ignore[arg-type]
    assert (request.prompt, request.stop_ids) == ((3, 95, 96), target_spec.eos_token_ids)
    with pytest.raises(BadInput, match=r"'r0': its prompt becomes token 96, and target has 96; tokenizer\.json is"):
        to_request(only, Fixed(), target_spec.model_copy(update={"vocab": 96}))  # type: ignore[arg-type]


@pytest.fixture
def lines(tmp_path: Path) -> list[BatchLine]:
    return read_batch(write(tmp_path / "in.jsonl", *(line(f"r{i}") for i in range(4))))


@pytest.fixture
def open_journal(tmp_path: Path, lines: list[BatchLine]) -> Iterator[Callable[..., Journal]]:
    made: list[Journal] = []

    def make(plan: str = "plan", ignore_eos: bool = False, among: list[BatchLine] = lines) -> Journal:
        made.append(Journal(tmp_path / "out.jsonl", among, plan, ignore_eos))
        return made[-1]

    yield make
    for journal in made:
        journal.close()


@pytest.fixture
def partial(tmp_path: Path, open_journal: Callable[..., Journal]) -> Path:
    """The journal of a run that finished r2 and r0 and was interrupted."""
    journal = open_journal()
    journal.add({"custom_id": "r2", "n": 1})
    journal.add({"custom_id": "r0", "n": 1})
    journal.close()
    assert not journal.output.exists()
    return journal.path


@pytest.mark.parametrize("torn", ["", '{"custom_id": "r1", "to', '{"custom_id": "r1"}', "\0\0\0"])
def test_an_interrupted_run_goes_on_where_it_stopped(
    open_journal: Callable[..., Journal], partial: Path, torn: str
) -> None:
    with partial.open("a") as stream:
        stream.write(torn)  # killed while writing
    number = partial.stat().st_ino
    journal = open_journal()
    assert partial.stat().st_ino == number
    assert journal.missing == ["r1", "r3"]
    for name in journal.missing:
        journal.add({"custom_id": name, "n": 2})
    journal.finish()
    answers = [json.loads(text) for text in journal.output.read_text().splitlines()]
    assert [(a["custom_id"], a["n"]) for a in answers] == [("r0", 1), ("r1", 2), ("r2", 1), ("r3", 2)]
    assert not partial.exists()


def test_a_journal_of_another_run_is_not_mixed_in(
    open_journal: Callable[..., Journal], partial: Path, lines: list[BatchLine]
) -> None:
    before = partial.read_bytes()
    for changes, words in (
        ({"plan": "other"}, "another plan;"),
        ({"among": lines[:1]}, "another input;"),
        ({"ignore_eos": True}, "another --ignore-eos;"),
        ({"plan": "other", "ignore_eos": True}, "another plan and another --ignore-eos;"),
    ):
        with pytest.raises(BadInput, match=f"begun with {words} finish that run"):
            open_journal(**changes)
    assert partial.read_bytes() == before


def test_a_journal_without_answers_gives_way(open_journal: Callable[..., Journal]) -> None:
    open_journal().close()
    journal = open_journal("other plan")
    journal.add({"custom_id": "r1"})
    journal.close()
    assert open_journal("other plan").missing == ["r0", "r2", "r3"]


@pytest.mark.parametrize(
    "text",
    ["my notes\n", "my notes", '{"custom_id": "r0"}\n', "[1]\n", "\n\n", '{"plan": "plan"}\n{"custom_id": "r0"}\n'],
)
def test_a_file_that_is_no_journal_is_left_alone(
    open_journal: Callable[..., Journal], partial: Path, text: str
) -> None:
    partial.write_text(text)
    with pytest.raises(BadInput, match="is not the journal of a run"):
        open_journal()
    assert partial.read_text() == text


@pytest.mark.parametrize(
    "text", ["{broken", "", '{"n": 1}', '{"custom_id": ["r0"]}', '{"custom_id": "r9"}', "3", "[" * 200_000]
)
def test_a_damaged_journal_is_left_alone(open_journal: Callable[..., Journal], partial: Path, text: str) -> None:
    header, first, second = partial.read_text().splitlines()
    for contents in ([header, text, first, second], [header, first, second, text]):
        damaged = "".join(f"{c}\n" for c in contents)
        partial.write_text(damaged)
        with pytest.raises(BadInput, match=f"line {contents.index(text) + 1} is damaged; delete that line"):
            open_journal()
        assert partial.read_text() == damaged


def test_a_header_torn_by_a_kill_is_begun_anew(open_journal: Callable[..., Journal], partial: Path) -> None:
    header = partial.read_text().splitlines()[0]
    partial.write_text(header[:20])
    open_journal().close()
    assert partial.read_text() == header + "\n"


def test_two_runs_on_one_output_are_refused(open_journal: Callable[..., Journal], partial: Path) -> None:
    first = open_journal()
    before = partial.read_bytes()
    with pytest.raises(BadInput, match=r"out\.jsonl: another run is writing it"):
        open_journal()
    assert partial.read_bytes() == before
    first.close()
    open_journal().close()


def test_a_run_that_ends_while_another_opens_its_journal_does_not_take_the_lock_with_it(
    open_journal: Callable[..., Journal], partial: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flock = fcntl.flock

    def ended_meanwhile(stream: IO[bytes], how: int) -> None:
        monkeypatch.setattr(batch_files.fcntl, "flock", flock)
        partial.unlink()
        flock(stream, how)

    monkeypatch.setattr(batch_files.fcntl, "flock", ended_meanwhile)
    journal = open_journal()
    assert partial.exists()
    assert journal.missing == ["r0", "r1", "r2", "r3"]
    with pytest.raises(BadInput, match="another run is writing"):
        open_journal()


def test_every_answer_and_every_rename_reaches_the_disk(
    open_journal: Callable[..., Journal], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[Path] = []
    fsync = os.fsync

    def watch(descriptor: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watch)
    journal = open_journal()
    assert synced == [journal.path, tmp_path]
    for name in journal.missing:
        synced.clear()
        journal.add({"custom_id": name})
        assert synced == [journal.path]
    synced.clear()
    journal.finish()
    assert [path.parent for path in synced] == [tmp_path, tmp_path.parent]  # the output, then its folder


class FullDisk(io.BytesIO):
    """A stream on a full disk: every way to bring bytes out fails, closing included."""

    def flush(self) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def close(self) -> None:
        self.flush()


def test_a_full_disk_is_one_sentence_and_loses_no_answer(open_journal: Callable[..., Journal], partial: Path) -> None:
    journal = open_journal()
    stream, journal._stream = journal._stream, FullDisk()
    with pytest.raises(BadInput, match=r"out\.jsonl\.partial: cannot write: the disk is full"):  # noqa: PT012 as `run` does
        try:
            journal.add({"custom_id": "r1"})
        finally:
            journal.close()
    stream.close()
    assert not journal.output.exists()
    assert open_journal().missing == ["r1", "r3"]
