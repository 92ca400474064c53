"""One answer on its way from the engine's thread to the event loop of one client."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import suppress

from specmoeoff.errors import AnswerIsNo
from specmoeoff.runtime.engine_thread import End, EngineThread
from specmoeoff.runtime.sequence import Request, Sequence

BUFFERED_WINDOWS = 256


class Answer:
    """The tokens of a request as windows yield them. A reader that falls `BUFFERED_WINDOWS` behind loses its request.

    `outcome`: the finish reason, `error`, or `cancelled` where nobody waited for the end. `first_token_s` after `begun_s`.
    """

    def __init__(self, thread: EngineThread, request: Request) -> None:
        self._thread, self._request_id = thread, request.request_id
        self._loop = asyncio.get_running_loop()
        self._parts: asyncio.Queue[tuple[list[int], End]] = asyncio.Queue(BUFFERED_WINDOWS)
        self._overrun = False
        self.outcome = "cancelled"
        self.begun_s = time.perf_counter()
        self.first_token_s: float | None = None
        thread.submit(request, self._deliver)

    def _deliver(self, tokens: list[int], end: End) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody reads any more
            self._loop.call_soon_threadsafe(self._put, tokens, end)

    def _put(self, tokens: list[int], end: End) -> None:
        if tokens and self.first_token_s is None:
            self.first_token_s = time.perf_counter() - self.begun_s
        try:
            self._parts.put_nowait((tokens, end))
        except asyncio.QueueFull:
            self._overrun = True
            self.close()

    async def parts(self) -> AsyncIterator[tuple[list[int], Sequence | None]]:
        """New tokens, and the finished sequence with the last; raises what ended the request otherwise."""
        while True:
            if self._overrun:
                raise AnswerIsNo("the answer was read too slowly and is given up; read faster or do not stream.")
            tokens, end = await self._parts.get()
            if isinstance(end, Exception):
                self.outcome = "error"
                raise end
            if end:
                self.outcome = end.finish_reason
            yield tokens, end
            if end:
                return

    async def whole(self) -> Sequence:
        """The finished sequence."""
        finished = [end async for _, end in self.parts()][-1]
        assert finished is not None
        return finished

    def close(self) -> None:
        """Cancel the request if it is unfinished."""
        self._thread.cancel(self._request_id)
