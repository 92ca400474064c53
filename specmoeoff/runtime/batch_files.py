"""OpenAI batch files in and out, with a journal: an interrupted run goes on where it stopped."""

import fcntl
import json
import os
from collections.abc import Sequence as Items
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from specmoeoff.errors import BadInput
from specmoeoff.files import explain_os_errors, load_json, read_text, sha256_text, sync_folder, write_atomic
from specmoeoff.runtime.sequence import Request, Sequence
from specmoeoff.runtime.tokenizer import Tokenizer
from specmoeoff.specs.model import ModelSpec

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
    # Not splitlines(): it also breaks at U+2028 and others, which may stand in a JSON string.
    for number, text in enumerate(read_text(path, "batch file").split("\n"), 1):
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
        value = load_json(text)
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise BadInput(f"{where}: holds half of a surrogate pair, which is no character; correct the text.") from None
    except ValueError as error:
        reason = getattr(error, "msg", error)
        raise BadInput(f"{where}: not JSON ({reason}); a batch file holds one JSON object a line.") from None
    try:
        line = BatchLine.model_validate(value)
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
    line: BatchLine, tokenizer: Tokenizer, spec: ModelSpec, ignore_eos: bool = False, max_tokens: int | None = None
) -> Request:
    """Tokens of a line's prompt, through the chat template if it is a chat; stops at the model's end tokens."""
    body = line.body
    if body.messages is not None:
        prompt = tokenizer.encode_chat([m.model_dump() for m in body.messages])
    else:
        prompt = tokenizer.encode(body.prompt or "")
    if max(prompt, default=0) >= spec.vocab:
        raise BadInput(
            f"request {line.custom_id!r}: its prompt becomes token {max(prompt)}, and {spec.name} has {spec.vocab}; "
            "tokenizer.json is another model's, download it again."
        )
    stop_ids = () if ignore_eos or body.ignore_eos else spec.eos_token_ids
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
    """Finished answers, kept beside the output until all are there; then they become the output, in input order.

    It is locked while open, so that two runs never write one output.
    """

    def __init__(self, output: Path | str, lines: Items[BatchLine], plan_sha256: str, ignore_eos: bool) -> None:
        self.output = Path(output)
        self.path = self.output.with_name(self.output.name + ".partial")
        self._ids = [line.custom_id for line in lines]
        inputs = sha256_text(json.dumps([line.model_dump(mode="json") for line in lines]))
        self._key = {"plan": plan_sha256, "input": inputs, "--ignore-eos": ignore_eos}
        self.answers: dict[str, dict[str, Any]] = {}
        self._stream = self._open()
        try:
            self._recover()
        except BaseException:
            self.close()
            raise

    def _open(self) -> IO[bytes]:
        with explain_os_errors(self.path):
            while True:
                stream = self.path.open("a+b")
                try:
                    fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    stream.close()
                    raise BadInput(
                        f"{self.output}: another run is writing it; wait for that one or choose another --output."
                    ) from None
                if os.fstat(stream.fileno()).st_nlink:
                    return stream
                stream.close()  # the other run dropped its journal between our opening and locking it

    def _recover(self) -> None:
        """Take over what an earlier run finished. A last line without its end was torn by the interruption and goes."""
        with explain_os_errors(self.path):
            self._stream.seek(0)
            *texts, torn = self._stream.read().split(b"\n")
        header = _object(texts[0]) if texts else self._key
        torn_header = not texts and json.dumps(self._key).encode().startswith(torn)
        if header.keys() != self._key.keys() or not (texts or torn_header):
            raise BadInput(
                f"{self.path}: is not the journal of a run, which keeps its finished answers under this name; "
                "move the file away or choose another --output."
            )
        if len(texts) < 2:
            self._begin()
            return
        others = [key for key in self._key if header[key] != self._key[key]]
        if others:
            raise BadInput(
                f"{self.path}: was begun with another {' and another '.join(others)}; finish that run as it was begun, "
                "or delete the file to start anew."
            )
        known = set(self._ids)
        for number, text in enumerate(texts[1:], 2):
            answer = _object(text)
            name = answer.get("custom_id")
            if not isinstance(name, str) or name not in known:
                raise BadInput(f"{self.path}: line {number} is damaged; delete that line, or the file to start anew.")
            self.answers[name] = answer
        if torn:
            with explain_os_errors(self.path):
                self._stream.truncate(sum(len(text) + 1 for text in texts))

    def _begin(self) -> None:
        """Nothing is finished, so nothing is lost by starting anew."""
        with explain_os_errors(self.path):
            self._stream.truncate(0)
            self._append(self._key)
            sync_folder(self.path.parent)

    def _append(self, entry: dict[str, Any]) -> None:
        with explain_os_errors(self.path):
            self._stream.write(json.dumps(entry).encode() + b"\n")
            self._stream.flush()
            os.fsync(self._stream.fileno())

    @property
    def missing(self) -> list[str]:
        """Ids without an answer, in input order."""
        return [i for i in self._ids if i not in self.answers]

    def add(self, answer: dict[str, Any]) -> None:
        """Keep one finished answer."""
        self._append(answer)
        self.answers[answer["custom_id"]] = answer

    def finish(self) -> None:
        """Write the output whole, in input order, and drop the journal while it is still locked."""
        write_atomic(self.output, "".join(json.dumps(self.answers[i]) + "\n" for i in self._ids))
        with explain_os_errors(self.path):
            self.path.unlink()
        self.close()

    def close(self) -> None:
        """Leave the journal for a later run."""
        with suppress(OSError):  # closing writes what a full disk refused once more, and that was already said
            self._stream.close()


def _object(text: bytes) -> dict[str, Any]:
    """The JSON object of a journal's line; empty where it holds none."""
    try:
        value = load_json(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
