"""OpenAI batch files in and out, with a journal: an interrupted run goes on where it stopped."""

import json
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from specmoeoff.errors import BadInput
from specmoeoff.files import explain_os_errors, read_text, sha256_text, write_atomic
from specmoeoff.runtime.sequence import Request, Sequence
from specmoeoff.runtime.tokenizer import Tokenizer

DEFAULT_MAX_TOKENS = 64


class Message(BaseModel):
    """One turn of a chat."""

    model_config = ConfigDict(frozen=True)
    role: str
    content: str


class Body(BaseModel):
    """The part of a request this engine answers. Other fields are accepted as far as they change nothing."""

    model_config = ConfigDict(frozen=True)
    model: str | None = None
    messages: tuple[Message, ...] | None = Field(default=None, min_length=1)
    prompt: str | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = None
    n: int = 1
    ignore_eos: bool = False

    @property
    def token_limit(self) -> int:
        return self.max_completion_tokens or self.max_tokens or DEFAULT_MAX_TOKENS


class BatchLine(BaseModel):
    """One line of a batch file."""

    model_config = ConfigDict(frozen=True)
    custom_id: str = Field(min_length=1)
    method: str = "POST"
    url: str = "/v1/chat/completions"
    body: Body


def read_batch(path: Path | str) -> list[BatchLine]:
    """All requests of a batch file; a sentence names the line and field of the first that is wrong."""
    lines: list[BatchLine] = []
    seen: set[str] = set()
    for number, text in enumerate(read_text(path, "batch file").splitlines(), 1):
        if not text.strip():
            continue
        line = _parse_line(text, f"{path}: line {number}")
        if line.custom_id in seen:
            raise BadInput(f"{path}: line {number}: custom_id {line.custom_id!r} occurs twice; ids must be unique.")
        seen.add(line.custom_id)
        lines.append(line)
    if not lines:
        raise BadInput(f"{path}: holds no request; one JSON object a line is expected.")
    return lines


def _parse_line(text: str, where: str) -> BatchLine:
    try:
        line = BatchLine.model_validate(json.loads(text))
    except json.JSONDecodeError as error:
        raise BadInput(f"{where}: not JSON ({error.msg}); a batch file holds one JSON object a line.") from None
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "line"
        raise BadInput(f"{where}: {field}: {first['msg']}.") from None
    body = line.body
    if line.url not in ("/v1/chat/completions", "/v1/completions"):
        raise BadInput(f"{where}: url {line.url!r} is not served; use /v1/chat/completions or /v1/completions.")
    if (body.messages is None) == (body.prompt is None):
        raise BadInput(f"{where}: body: exactly one of `messages` and `prompt` is needed.")
    if body.temperature:
        raise BadInput(f"{where}: body.temperature is {body.temperature}; only greedy decoding (0) is available.")
    if body.n != 1:
        raise BadInput(f"{where}: body.n is {body.n}; one answer per request is available.")
    return line


def to_request(
    line: BatchLine, tokenizer: Tokenizer, ignore_eos: bool = False, max_tokens: int | None = None
) -> Request:
    """Tokens of a line's prompt, through the chat template if it is a chat."""
    body = line.body
    if body.messages is not None:
        prompt = tokenizer.encode_chat([m.model_dump() for m in body.messages])
    else:
        prompt = tokenizer.encode(body.prompt or "")
    stop_ids = () if ignore_eos or body.ignore_eos else tuple(tokenizer.eos_ids)
    return Request(line.custom_id, tuple(prompt), max_tokens or body.token_limit, stop_ids)


def to_response(sequence: Sequence, url: str, model: str, tokenizer: Tokenizer) -> dict[str, Any]:
    """One line of the output file."""
    request, output = sequence.request, sequence.output
    text_ids = output[:-1] if sequence.finish_reason == "stop" else output
    text = tokenizer.decode(text_ids)
    chat = url.endswith("chat/completions")
    answer = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
    body = {
        "object": "chat.completion" if chat else "text_completion",
        "model": model,
        "choices": [{"index": 0, **answer, "finish_reason": sequence.finish_reason, "token_ids": output}],
        "usage": {
            "prompt_tokens": len(request.prompt),
            "completion_tokens": len(output),
            "total_tokens": len(request.prompt) + len(output),
        },
    }
    response = {"status_code": 200, "request_id": request.request_id, "body": body}
    return {
        "id": f"batch_req_{request.request_id}",
        "custom_id": request.request_id,
        "response": response,
        "error": None,
    }


class Journal:
    """Finished answers, kept beside the output until all are there; then they become the output, in input order."""

    def __init__(self, output: Path | str, lines: Iterable[BatchLine], plan_sha256: str) -> None:
        self.output = Path(output)
        self.path = self.output.with_name(self.output.name + ".partial")
        self._ids = [line.custom_id for line in lines]
        inputs = sha256_text(json.dumps([line.model_dump(mode="json") for line in lines]))
        self._key = {"plan": plan_sha256, "input": inputs, "begun": int(time.time())}
        self.answers: dict[str, dict[str, Any]] = {}
        self._recover()
        with explain_os_errors(self.path):
            self._stream = self.path.open("a", encoding="utf-8")
            if not self.answers and self._stream.tell() == 0:
                self._append(self._key)

    def _recover(self) -> None:
        if not self.path.exists():
            return
        entries = list(_whole_lines(self.path))
        if not entries:
            self.path.unlink()
            return
        if any(entries[0].get(key) != self._key[key] for key in ("plan", "input")):
            raise BadInput(
                f"{self.path}: was begun with another plan or input; finish that run, or delete the file to start anew."
            )
        self.answers = {entry["custom_id"]: entry for entry in entries[1:]}
        # A line torn by the interruption goes; what follows it would be unreadable otherwise.
        write_atomic(self.path, "".join(json.dumps(entry) + "\n" for entry in entries))

    def _append(self, entry: dict[str, Any]) -> None:
        with explain_os_errors(self.path):
            self._stream.write(json.dumps(entry) + "\n")
            self._stream.flush()

    @property
    def missing(self) -> list[str]:
        """Ids without an answer, in input order."""
        return [i for i in self._ids if i not in self.answers]

    def add(self, answer: dict[str, Any]) -> None:
        """Keep one finished answer."""
        self._append(answer)
        self.answers[answer["custom_id"]] = answer

    def finish(self) -> None:
        """Write the output whole, in input order, and drop the journal."""
        self._stream.close()
        write_atomic(self.output, "".join(json.dumps(self.answers[i]) + "\n" for i in self._ids))
        self.path.unlink()

    def close(self) -> None:
        """Leave the journal for a later run."""
        self._stream.close()


def _whole_lines(path: Path) -> Iterator[dict[str, Any]]:
    for text in read_text(path, "journal").splitlines(keepends=True):
        if not text.endswith("\n"):
            return
        try:
            yield json.loads(text)
        except json.JSONDecodeError:
            return
