"""OpenAI's requests and answers as JSON, beyond what a batch file has."""

import json
import time
import uuid
from typing import Any

from pydantic import BaseModel, ConfigDict

from specmoeoff.errors import BadInput
from specmoeoff.runtime.batch_files import BatchLine, Body, to_request, to_response
from specmoeoff.runtime.sequence import Request, Sequence
from specmoeoff.runtime.tokenizer import Tokenizer
from specmoeoff.specs.model import ModelSpec

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "temperature": (None, 0),
    "n": (None, 1),
    "best_of": (None, 1),
    "stop": (None, [], ""),
    "logprobs": (None, False),
    "top_logprobs": (None, 0),
    "echo": (None, False),
    "suffix": (None, ""),
    "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0),
    "logit_bias": (None, {}),
    "tools": (None, []),
    "functions": (None, []),
    "response_format": (None, {"type": "text"}),
    "modalities": (None, ["text"]),
}
"""Fields that would change the answer, with the values that do not."""


class BadField(BadInput):
    """A field of a request that cannot be served; `param` names it."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(message)
        self.param = param


class StreamOptions(BaseModel):
    include_usage: bool = False


class ServedBody(Body):
    """A request's body. Fields unknown here are kept, to refuse those that would change the answer."""

    model_config = ConfigDict(frozen=True, extra="allow")
    stream: bool = False
    stream_options: StreamOptions | None = None


def refuse_unsupported(body: ServedBody) -> None:
    """BadField for the first field that asks for what this engine does not do."""
    given = dict(body)
    for name, values in NEUTRAL.items():
        if given.get(name) not in values:
            raise BadField(name, f"{name} is {given[name]!r:.80}, which is not available; leave it out.")


class Exchange:
    """One request with its identity, and the shapes of its answer."""

    def __init__(self, url: str, body: ServedBody, model: str) -> None:
        self._url, self.body, self._model = url, body, model
        self._chat = url.endswith("chat/completions")
        self.id = f"{'chatcmpl' if self._chat else 'cmpl'}-{uuid.uuid4().hex}"
        self._created = int(time.time())
        wanted, other = ("messages", "prompt") if self._chat else ("prompt", "messages")
        if getattr(body, wanted) is None or getattr(body, other) is not None:
            raise BadField(wanted, f"{url} takes `{wanted}`, and not `{other}`.")
        if body.model not in (None, model):
            raise BadField("model", f"the model {body.model!r:.80} is not served here; ask for {model!r}.")
        refuse_unsupported(body)
        try:
            json.dumps(body.model_dump(), ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise BadField(wanted, "the text holds half of a surrogate pair, which is no character.") from None

    def request(self, tokenizer: Tokenizer, spec: ModelSpec) -> Request:
        """For the engine. Takes a while where the prompt is long."""
        return to_request(BatchLine(custom_id=self.id, url=self._url, body=self.body), tokenizer, spec)

    def response(self, sequence: Sequence, tokenizer: Tokenizer) -> dict[str, Any]:
        """The whole answer."""
        body = to_response(sequence, self._url, self._model, tokenizer)["response"]["body"]
        return {"id": self.id, "created": self._created, **body}

    def chunk(self, text: str, finish_reason: str | None = None, first: bool = False) -> dict[str, Any]:
        """One event of a streamed answer."""
        delta: dict[str, Any] = {"role": "assistant"} if first else {}
        content = {"delta": delta | ({"content": text} if text or first else {})} if self._chat else {"text": text}
        return self._event([{"index": 0, **content, "logprobs": None, "finish_reason": finish_reason}])

    def usage_chunk(self, response: dict[str, Any]) -> dict[str, Any]:
        """The event after the last, where usage was asked for."""
        return self._event([]) | {"usage": response["usage"]}

    def _event(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        return {"id": self.id, "object": kind, "created": self._created, "model": self._model, "choices": choices}


def text_of(response: dict[str, Any]) -> str:
    """The text of a whole answer."""
    choice = response["choices"][0]
    return str(choice["message"]["content"] if "message" in choice else choice["text"])


def error_body(message: str, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """OpenAI's shape of an error."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
