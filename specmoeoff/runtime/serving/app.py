"""The routes of OpenAI's API that this engine answers."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from specmoeoff.errors import BadInput, SpecMoEOffError
from specmoeoff.runtime.batch_files import text_of
from specmoeoff.runtime.engine_thread import EngineThread, QueueFull, ShuttingDown
from specmoeoff.runtime.sequence import Sequence
from specmoeoff.runtime.serving.answer import Answer
from specmoeoff.runtime.serving.gate import Gate
from specmoeoff.runtime.serving.metrics import Metrics
from specmoeoff.runtime.serving.protocol import BadField, Exchange, ServedBody, error_body
from specmoeoff.runtime.text_stream import TextStream
from specmoeoff.runtime.tokenizer import Tokenizer
from specmoeoff.specs.model import ModelSpec

RETRY_AFTER_S = 2
CODES = {401: "invalid_api_key", 404: "not_found", 405: "method_not_allowed", 413: "request_too_large"}


def create_app(
    thread: EngineThread,
    tokenizer: Tokenizer,
    spec: ModelSpec,
    model: str,
    metrics: Metrics,
    api_key: str | None,
    max_body_bytes: int,
) -> FastAPI:
    """The ASGI application over a running engine; `model` is the name clients ask for."""
    app = FastAPI(title="specmoeoff", docs_url=None, redoc_url=None, openapi_url=None)
    refused = metrics.requests.labels("refused").inc
    app.add_middleware(Gate, api_key=api_key, max_body_bytes=max_body_bytes, count=refused)

    async def refuse(_: Request, error: Exception) -> JSONResponse:
        status, body = describe(error)
        if status < 500:
            refused()
        return JSONResponse(body, status, {"Retry-After": str(RETRY_AFTER_S)} if status in (429, 503) else None)

    for kind in (RequestValidationError, HTTPException, QueueFull, SpecMoEOffError, Exception, 404, 405):
        app.add_exception_handler(kind, refuse)

    @app.get("/health")
    async def health() -> dict[str, str]:
        if not thread.alive:
            raise ShuttingDown("the engine has stopped.")
        return {"status": "ok"}

    @app.get("/metrics")
    async def expose() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": model, "object": "model", "created": 0, "owned_by": "specmoeoff"}]}

    @app.post("/v1/chat/completions")
    @app.post("/v1/completions")
    async def complete(body: ServedBody, http: Request) -> Response:
        exchange = Exchange(http.url.path, body, model)
        request = await asyncio.to_thread(exchange.request, tokenizer, spec)
        answer = Answer(thread, request)
        if body.stream:
            return EventStream(_events(exchange, answer, tokenizer), answer, metrics)
        try:
            sequence = await _unless_gone(answer, http)
            return JSONResponse(exchange.response(sequence, tokenizer)) if sequence else Response(status_code=499)
        finally:
            answer.close()
            metrics.ended(answer)

    return app


class EventStream(StreamingResponse):
    """Server-sent events. However it ends, the request leaves the engine with it."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[str], answer: Answer, metrics: Metrics) -> None:
        super().__init__(events, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._answer, self._metrics = answer, metrics

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answer.close()
            self._metrics.ended(self._answer)


async def _events(exchange: Exchange, answer: Answer, tokenizer: Tokenizer) -> AsyncIterator[str]:
    stream = TextStream(tokenizer, exchange.body.stops)
    yield _event(exchange.chunk("", first=True))
    try:
        async for tokens, sequence in answer.parts():
            response = exchange.response(sequence, tokenizer) if sequence else None
            piece = stream.finish(text_of(response)) if response else stream.push(tokens)
            if piece:
                yield _event(exchange.chunk(piece))
            if response:
                yield _event(exchange.last_chunk(response))
                if exchange.body.stream_options and exchange.body.stream_options.include_usage:
                    yield _event(exchange.usage_chunk(response))
        yield "data: [DONE]\n\n"
    except Exception as error:  # the status was sent long ago
        yield _event(describe(error)[1])


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data)}\n\n"


async def _unless_gone(answer: Answer, http: Request) -> Sequence | None:
    """The finished sequence, or None where the client went away first."""

    async def gone() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(answer.whole()), asyncio.ensure_future(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return tasks[0].result() if tasks[0].done() else None
    finally:
        for task in tasks:
            task.cancel()


def describe(error: Exception) -> tuple[int, dict[str, Any]]:
    """Status and body for what went wrong."""
    bad = "invalid_request_error"
    if isinstance(error, RequestValidationError):
        first = error.errors()[0]
        param = ".".join(str(part) for part in first["loc"][1:])
        if first["type"] == "json_invalid":
            return 400, error_body(f"the body is not JSON: {first['ctx']['error']}.", bad)
        param = param or first.get("ctx", {}).get("name", "")
        return 400, error_body(f"{param or 'body'}: {first['msg']}.", bad, param or None)
    if isinstance(error, BadField):
        unknown_model = error.param == "model"
        code = "model_not_found" if unknown_model else "unsupported_value"
        return 404 if unknown_model else 400, error_body(str(error), bad, error.param, code)
    if isinstance(error, BadInput):
        return 400, error_body(str(error), bad)
    if isinstance(error, HTTPException):
        return error.status_code, error_body(str(error.detail), bad, code=CODES.get(error.status_code))
    if isinstance(error, QueueFull):
        message = "as many requests are waiting as may; try again later."
        return 429, error_body(message, "rate_limit_error", code="queue_full")
    if isinstance(error, ShuttingDown):
        return 503, error_body(str(error), "server_error")
    message = str(error) if isinstance(error, SpecMoEOffError) else "the engine failed; its log says why."
    return 500, error_body(message, "server_error")
