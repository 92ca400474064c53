"""The one thread that owns an engine: requests join and leave between its windows, from any other thread."""

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass

from specmoeoff.errors import SpecMoEOffError
from specmoeoff.runtime.engine import Engine
from specmoeoff.runtime.sequence import Request, Sequence
from specmoeoff.specs.record import Window

End = Sequence | Exception | None
Deliver = Callable[[list[int], End], object]
Observe = Callable[[Window, int, int], None]


class QueueFull(Exception):
    """As many requests are open as may be."""


class ShuttingDown(SpecMoEOffError):
    """The engine stopped before the request was answered."""


class RequestFailed(SpecMoEOffError):
    """The machine is to blame and not the request, such as where an expert cannot be read."""


@dataclass(eq=False)
class _Ticket:
    deliver: Deliver
    n_delivered: int = 0


class EngineThread:
    """Use as a context manager; leaving it ends what is open with ShuttingDown.

    `observe(window, drafted, accepted)` is called in the thread after every window.
    """

    def __init__(self, engine: Engine, max_open: int, observe: Observe = lambda *_: None) -> None:
        self._engine, self._max_open, self._observe = engine, max_open, observe
        self._changed = threading.Condition()
        self._open: dict[str, _Ticket] = {}
        self._new: list[Request] = []
        self._cancelled: list[str] = []
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def __enter__(self) -> "EngineThread":
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify()
        self._thread.join()
        self._engine.cancel_all()
        self._fail(ShuttingDown("the server is shutting down; send the request again later."))

    @property
    def alive(self) -> bool:
        """Whether requests are still being run."""
        return self._thread.is_alive()

    @property
    def n_open(self) -> int:
        """Requests waiting or live."""
        return len(self._open)

    @property
    def n_live(self) -> int:
        """Requests in the engine's batch."""
        return len(self._engine.live)

    def submit(self, request: Request, deliver: Deliver) -> None:
        """Queue a request. `deliver(new tokens, end)` is called in the engine's thread and must return at once; `end` is the
        finished sequence, or what went wrong. BadInput where the request does not fit the context."""
        self._engine.check_fits(request, self._engine.decode.context_tokens)
        with self._changed:
            if self._stopped:
                raise ShuttingDown("the server is shutting down; send the request again later.")
            if len(self._open) >= self._max_open:
                raise QueueFull
            self._open[request.request_id] = _Ticket(deliver)
            self._new.append(request)
            self._changed.notify()

    def cancel(self, request_id: str) -> bool:
        """Forget a request and deliver no more; whether it was still open."""
        with self._changed:
            if self._open.pop(request_id, None) is None:
                return False
            self._cancelled.append(request_id)
            self._changed.notify()
            return True

    def _run(self) -> None:
        while self._take_in():
            if not self._engine.busy:
                self._engine.pause()
                continue
            try:
                self._step()
            except Exception as error:
                known = isinstance(error, SpecMoEOffError)
                logging.getLogger(__name__).error("a window failed: %s", error, exc_info=not known)
                self._engine.cancel_all()
                self._fail(error)

    def _take_in(self) -> bool:
        """Sleeps while there is nothing to do; False when stopped."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or self._new or self._cancelled or self._engine.busy)
            new, self._new = self._new, []
            cancelled, self._cancelled = self._cancelled, []
        self._engine.submit(new)
        for request_id in cancelled:
            self._engine.cancel(request_id)
        return not self._stopped

    def _step(self) -> None:
        decoding = [(s, s.n_output) for s in self._engine.live if not s.prefilling]
        window = self._engine.step("serve")
        n_emitted = [s.n_output - before for s, before in decoding if s.n_output > before]  # not set aside, not failed
        drafted = max(0, window.rows - window.prefill_rows - len(n_emitted))
        self._observe(window, drafted, sum(n_emitted) - len(n_emitted))
        for sequence in [*self._engine.live, *self._engine.finished]:
            self._hand_out(sequence)
        self._engine.finished.clear()

    def _hand_out(self, sequence: Sequence) -> None:
        request_id = sequence.request.request_id
        ticket = self._open.get(request_id)
        if ticket is None:
            return
        tokens = sequence.output[ticket.n_delivered :]
        ticket.n_delivered += len(tokens)
        if sequence.finish_reason:
            with self._changed:
                self._open.pop(request_id, None)
        if tokens or sequence.finish_reason:
            ended = RequestFailed(str(sequence.error)) if sequence.error else sequence
            ticket.deliver(tokens, ended if sequence.finish_reason else None)

    def _fail(self, error: Exception) -> None:
        with self._changed:
            tickets, self._new = list(self._open.values()), []
            self._open.clear()
        for ticket in tickets:
            ticket.deliver([], error)
