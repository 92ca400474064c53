"""OpenAI batch files in and out, with a journal: an interrupted run goes on where it stopped."""

import fcntl
import json
import os
from collections.abc import Sequence as Items
from contextlib import suppress
from pathlib import Path
from typing import IO, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from specmoeoff.errors import BadInput
from specmoeoff.files import explain_os_errors, load_json, read_text, sha256_text, sync_folder, write_atomic
from specmoeoff.runtime.logprobs import chat_logprobs, completion_logprobs
from specmoeoff.runtime.sampling import Sampling
from specmoeoff.runtime.sequence import Request, Sequence
from specmoeoff.runtime.stopping import StopText
from specmoeoff.runtime.tokenizer import Tokenizer
from specmoeoff.specs.model import ModelSpec

DEFAULT_MAX_TOKENS = 64
# OpenAI's fields that change nothing here, and the values of others that ask for nothing
NO_EFFECT = {"metadata", "prompt_cache_key", "safety_identifier", "service_tier", "store", "stream_options", "user"}
ASK_NOTHING: dict[str, tuple[object, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tools": ([],),
}
MOST_STOPS = 4
Stop = Annotated[str, Field(min_length=1)]


class Message(BaseModel):
    """One turn of a chat."""

    model_config = ConfigDict(frozen=True)
    role: str
    content: str


class Body(BaseModel):
    """What a request asks. Without a temperature it is greedy; without a seed its own name is the seed."""

    model_config = ConfigDict(frozen=True)
    model: str | None = None
    messages: tuple[Message, ...] | None = Field(default=None, min_length=1)
    prompt: str | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=0)
    min_p: float | None = Field(default=None, ge=0, le=1)
    seed: int | None = Field(default=None, ge=-(1 << 63), lt=1 << 63)
    stop: Stop | Annotated[tuple[Stop, ...], Field(max_length=MOST_STOPS)] | None = None
    logprobs: bool | Annotated[int, Field(ge=0, le=20)] | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    n: int | None = None
    stream: bool | None = None
    ignore_eos: bool = False

    @model_validator(mode="before")
    @classmethod
    def _only_what_is_supported(cls, value: Any) -> Any:
        for field in value if isinstance(value, dict) else ():
            nothing = (None, *ASK_NOTHING.get(field, ()))
            if field not in cls.model_fields and field not in NO_EFFECT and value[field] not in nothing:
                raise PydanticCustomError("unsupported", "{name} is not supported; leave it out", {"name": field})
        return value

    @property
    def token_limit(self) -> int:
        return self.max_completion_tokens or self.max_tokens or DEFAULT_MAX_TOKENS

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else self.stop or ()

    @property
    def n_top_logprobs(self) -> int | None:
        """None where none are wanted: chats ask with true and a number, completions with the number."""
        if self.logprobs is None or self.logprobs is False:
            return None
        return self.top_logprobs or 0 if self.logprobs is True else self.logprobs

    def sampling(self, name: str) -> Sampling:
        """As asked; `name` seeds requests that give no seed."""
        seed = int(sha256_text(name)[:16], 16) if self.seed is None else self.seed % (1 << 64)
        top_p = 1.0 if self.top_p is None else self.top_p
        return Sampling(self.temperature or 0.0, self.top_k or 0, top_p, self.min_p or 0.0, seed)


# By route, the field of the body that holds its prompt.
PROMPT_FIELDS = {"/v1/chat/completions": "messages", "/v1/completions": "prompt"}


class BatchLine(BaseModel):
    """One line of a batch file; without a url its prompt's shape tells which. `problem`: why this request cannot be answered, where it can be told from the rest."""

    model_config = ConfigDict(frozen=True)
    custom_id: str = Field(min_length=1)
    method: str = "POST"
    url: str = "/v1/chat/completions"
    body: Body
    problem: str = ""

    @model_validator(mode="before")
    @classmethod
    def _url_of_the_prompt(cls, value: Any) -> Any:
        body = value.get("body") if isinstance(value, dict) else None
        if isinstance(body, dict) and body.get("messages") is None and "prompt" in body:
            return {"url": "/v1/completions", **value}
        return value

    @property
    def is_chat(self) -> bool:
        return self.url.endswith("chat/completions")


def read_batch(path: Path | str) -> list[BatchLine]:
    """All requests of a batch file. Text that is no request is refused by its line; a request that is wrong by itself has
    a `problem` and spoils no other."""
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
    problem = ""
    try:
        line = BatchLine.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "line"
        problem = f"{field}: {first['msg']}."
        if not field.startswith("body"):
            raise BadInput(f"{where}: {problem}") from None
        line = BatchLine.model_validate({**value, "body": {}})
    body = line.body
    if not problem:
        problem = find_problem(line.url, body)
        if body.stream:
            problem = "body.stream is true; a batch file's answers come whole."
    return line.model_copy(update={"problem": f"{where}: {problem}"}) if problem else line


def find_problem(url: str, body: Body) -> str:
    """Why this request cannot be answered, where its fields alone tell; empty if they do not."""
    if url not in PROMPT_FIELDS:
        return f"url {url!r} is not served; use /v1/chat/completions or /v1/completions."
    if (body.messages is None) == (body.prompt is None):
        return "body: exactly one of `messages` and `prompt` is needed."
    if getattr(body, PROMPT_FIELDS[url]) is None:
        return f"url {url} takes `{PROMPT_FIELDS[url]}`; change the body or the url."
    if body.n not in (None, 1):
        return f"body.n is {body.n}; one answer per request is available: send the request again with another seed."
    if body.top_logprobs is not None and body.logprobs is not True:
        return "body.top_logprobs needs body.logprobs to be true."
    return ""


def to_request(
    line: BatchLine, tokenizer: Tokenizer, spec: ModelSpec, ignore_eos: bool = False, max_tokens: int | None = None
) -> Request:
    """Tokens of a line's prompt, through the chat template if it is a chat; stops at the model's end tokens.

    BadInput says why this request cannot be answered.
    """
    body = line.body
    if line.problem:
        raise BadInput(line.problem)
    if body.messages is not None:
        prompt = tokenizer.encode_chat([m.model_dump() for m in body.messages])
    else:
        prompt = tokenizer.encode(body.prompt or "")
    if max(prompt, default=0) >= spec.vocab:
        raise BadInput(
            f"request {line.custom_id!r}: its prompt becomes token {max(prompt)}, and {spec.name} has {spec.vocab}; "
            "tokenizer.json is another model's, download it again."
        )
    return Request(
        line.custom_id,
        tuple(prompt),
        max_tokens or body.token_limit,
        () if ignore_eos or body.ignore_eos else spec.eos_token_ids,
        body.sampling(line.custom_id),
        body.n_top_logprobs,
        StopText(tokenizer, body.stops) if body.stops else None,
    )


def to_response(sequence: Sequence, line: BatchLine, model: str, tokenizer: Tokenizer) -> dict[str, Any]:
    """One line of the output file. A stop string and what follows it are not part of the text."""
    request, output = sequence.request, sequence.output
    if sequence.error:
        return error_line(request.request_id, 500, "server_error", str(sequence.error))
    text_ids = output[:-1] if output and output[-1] in request.stop_ids else output
    text = tokenizer.decode(text_ids)
    if isinstance(request.ends, StopText):
        text = request.ends.cut(text)
        while text_ids and tokenizer.decode(text_ids[:-1]).startswith(text):
            text_ids = text_ids[:-1]
    choice: dict[str, Any] = {
        "index": 0,
        **({"message": {"role": "assistant", "content": text}} if line.is_chat else {"text": text}),
        "finish_reason": sequence.finish_reason,
        "token_ids": output,
    }
    if request.top_logprobs is not None:
        told = sequence.logprobs[: len(text_ids)]
        choice["logprobs"] = (chat_logprobs if line.is_chat else completion_logprobs)(told, tokenizer)
    body = {
        "object": "chat.completion" if line.is_chat else "text_completion",
        "model": model,
        "choices": [choice],
        "usage": {
            "prompt_tokens": len(request.prompt),
            "completion_tokens": len(output),
            "total_tokens": len(request.prompt) + len(output),
        },
    }
    return _answer(request.request_id, 200, body, None)


def text_of(body: dict[str, Any]) -> str:
    """The text of a whole answer."""
    choice = body["choices"][0]
    return str(choice["message"]["content"] if "message" in choice else choice["text"])


def error_line(name: str, status: int, kind: str, message: str) -> dict[str, Any]:
    """The line of a request that could not be answered: in OpenAI's shape, and at the top where scripts look for it."""
    body = {"error": {"message": message, "type": kind, "param": None, "code": None}}
    return _answer(name, status, body, {"code": kind, "message": message})


def _answer(name: str, status: int, body: dict[str, Any], error: dict[str, str] | None) -> dict[str, Any]:
    response = {"status_code": status, "request_id": name, "body": body}
    return {"id": f"batch_req_{name}", "custom_id": name, "response": response, "error": error}


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
        self._places: dict[
            str, int
        ] = {}  # where in the journal an answer begins: the answers themselves stay on the disk
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
        known, place = set(self._ids), 0
        for number, text in enumerate(texts[1:], 2):
            place += len(texts[number - 2]) + 1
            answer = _object(text)
            name = answer.get("custom_id")
            if not isinstance(name, str) or name not in known:
                raise BadInput(f"{self.path}: line {number} is damaged; delete that line, or the file to start anew.")
            self._places[name] = place
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
        return [i for i in self._ids if i not in self._places]

    @property
    def n_answers(self) -> int:
        return len(self._places)

    def add(self, answer: dict[str, Any]) -> None:
        """Keep one finished answer."""
        place = self._stream.seek(0, os.SEEK_END)
        self._append(answer)
        self._places[answer["custom_id"]] = place

    def finish(self) -> None:
        """Write the output whole, in input order, and drop the journal while it is still locked."""
        write_atomic(self.output, map(self._line, self._ids))
        with explain_os_errors(self.path):
            self.path.unlink()
        self.close()

    def _line(self, name: str) -> bytes:
        self._stream.seek(self._places[name])
        return self._stream.readline()

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
