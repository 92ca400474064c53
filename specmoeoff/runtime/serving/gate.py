"""What a request must pass before anything reads it: the API key and the size limit."""

import hmac
from collections.abc import Callable
from typing import Any

from fastapi import HTTPException
from fastapi.responses import JSONResponse

from specmoeoff.runtime.serving.protocol import error_body

TOO_LARGE = "the request exceeds {:,} bytes; send a shorter one."


class Gate:
    """ASGI middleware. The key guards /v1; health and metrics tell nothing of anybody's requests. `count` is called for each
    that is refused here; what is too long without saying so before is the app's to count."""

    def __init__(self, app: Any, api_key: str | None, max_body_bytes: int, count: Callable[[], None]) -> None:
        self._app, self._api_key, self._max_body_bytes, self._count = app, api_key, max_body_bytes, count

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        refusal = self._refusal(scope) if scope["type"] == "http" else None
        if refusal:
            self._count()
        n_bytes = 0

        async def counted() -> Any:
            nonlocal n_bytes
            message = await receive()
            n_bytes += len(message.get("body", b""))
            if n_bytes > self._max_body_bytes:
                raise HTTPException(413, TOO_LARGE.format(self._max_body_bytes))
            return message

        await (refusal or self._app)(scope, counted, send)

    def _refusal(self, scope: Any) -> JSONResponse | None:
        headers = dict(scope["headers"])
        if self._api_key and scope["path"].startswith("/v1"):
            given = headers.get(b"authorization", b"")
            if not hmac.compare_digest(given, b"Bearer " + self._api_key.encode()):
                body = error_body("the API key is missing or wrong.", "invalid_request_error", code="invalid_api_key")
                return JSONResponse(body, 401, {"WWW-Authenticate": "Bearer"})
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length[:20]) > self._max_body_bytes:
            return JSONResponse(error_body(TOO_LARGE.format(self._max_body_bytes), "invalid_request_error"), 413)
        return None
