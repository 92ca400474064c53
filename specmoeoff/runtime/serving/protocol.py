"""OpenAI's requests and answers as JSON, beyond what a batch file has."""

import json
import time
import uuid
from typing import Any

from pydantic import BaseModel

from specmoeoff.errors import BadInput
from specmoeoff.runtime.batch_files import BatchLine, Body, find_problem, to_request, to_response
from specmoeoff.runtime.sequence import Request, Sequence
from specmoeoff.runtime.tokenizer import Tokenizer
from specmoeoff.specs.model import ModelSpec


class BadField(BadInput):
    """A field of a request that cannot be served; `param` names it."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(message)
        self.param = param


class StreamOptions(BaseModel):
    include_usage: bool = False


class ServedBody(Body):
    """A request's body."""

    stream_options: StreamOptions | None = None


class Exchange:
    """One request with its identity, and the shapes of its answer."""

    def __init__(self, url: str, body: ServedBody, model: str) -> None:
        self.body, self._model, self._created = body, model, int(time.time())
        self.id = f"{'chatcmpl' if url.endswith('chat/completions') else 'cmpl'}-{uuid.uuid4().hex}"
        self._line = BatchLine(custom_id=self.id, url=url, body=body)
        wanted, other = ("messages", "prompt") if self._line.is_chat else ("prompt", "messages")
        if getattr(body, wanted) is None or getattr(body, other) is not None:
            raise BadField(wanted, f"{url} takes `{wanted}`, and not `{other}`.")
        if body.model not in (None, model):
            raise BadField("model", f"the model {body.model!r:.80} is not served here; ask for {model!r}.")
        if problem := find_problem(url, body):
            raise BadInput(problem)
        try:
            json.dumps(body.model_dump(), ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise BadField(wanted, "the text holds half of a surrogate pair, which is no character.") from None

    def request(self, tokenizer: Tokenizer, spec: ModelSpec) -> Request:
        """For the engine. Takes a while where the prompt is long."""
        return to_request(self._line, tokenizer, spec)

    def response(self, sequence: Sequence, tokenizer: Tokenizer) -> dict[str, Any]:
        """The whole answer."""
        body = to_response(sequence, self._line, self._model, tokenizer)["response"]["body"]
        return {"id": self.id, "created": self._created, **body}

    def chunk(self, text: str, first: bool = False) -> dict[str, Any]:
        """One event of a streamed answer."""
        delta = {"role": "assistant", "content": text} if first else {"content": text}
        content = {"delta": delta} if self._line.is_chat else {"text": text}
        return self._event([{"index": 0, **content, "logprobs": None, "finish_reason": None}])

    def last_chunk(self, response: dict[str, Any]) -> dict[str, Any]:
        """The event that says why the answer ended; with all log-probabilities, where they were asked for."""
        choice = response["choices"][0]
        content: dict[str, Any] = {"delta": {}} if self._line.is_chat else {"text": ""}
        told = {"logprobs": choice.get("logprobs"), "finish_reason": choice["finish_reason"]}
        return self._event([{"index": 0, **content, **told}])

    def usage_chunk(self, response: dict[str, Any]) -> dict[str, Any]:
        """The event after the last, where usage was asked for."""
        return self._event([]) | {"usage": response["usage"]}

    def _event(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self._line.is_chat else "text_completion"
        return {"id": self.id, "object": kind, "created": self._created, "model": self._model, "choices": choices}


def error_body(message: str, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """OpenAI's shape of an error."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
