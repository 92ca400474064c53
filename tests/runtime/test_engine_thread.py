"""Requests from any thread: cancelled, failed and refused ones leave the others and the engine as they were."""

import queue
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from specmoeoff.api import Engine
from specmoeoff.errors import BadInput
from specmoeoff.runtime.engine_thread import EngineThread, QueueFull, ShuttingDown
from specmoeoff.runtime.sequence import Request, Sequence
from specmoeoff.runtime.serving.app import describe
from specmoeoff.specs.plan import Plan


@pytest.fixture
def engine(speaking_model: Path, plan_for: Callable[..., Plan]) -> Iterator[Engine]:
    with Engine(plan_for(speaking_model, batch=2)) as engine:
        yield engine


class Inbox:
    """What was delivered."""

    def __init__(self) -> None:
        self.parts: queue.Queue[tuple[list[int], Any]] = queue.Queue()

    def __call__(self, tokens: list[int], end: Any) -> None:
        self.parts.put((tokens, end))

    def end(self) -> tuple[list[int], Any]:
        tokens: list[int] = []
        while True:
            new, end = self.parts.get(timeout=30)
            tokens += new
            if end is not None:
                return tokens, end


def request(name: str, n_tokens: int = 20) -> Request:
    return Request(name, (5, 6, 7, ord(name[0])), n_tokens)


def test_parts_put_together_are_the_output_whoever_else_is_cancelled(engine: Engine) -> None:
    engine.submit([request("kept")])
    list(engine.run())
    alone = engine.finished.pop().output
    with EngineThread(engine, 10) as thread:
        inboxes = {name: Inbox() for name in ("live", "also live", "kept", "waits")}
        for name, inbox in inboxes.items():
            thread.submit(request(name, 20 if name == "kept" else 180), inbox)
        inboxes["live"].parts.get(timeout=30)
        for name in ("live", "also live", "waits"):
            assert thread.cancel(name)
        tokens, end = inboxes["kept"].end()
        assert isinstance(end, Sequence)
        assert tokens == end.output == alone
        assert not thread.cancel("kept")
        assert thread.n_open == 0
        assert inboxes["waits"].parts.empty()
    assert not engine.busy


def test_a_window_that_fails_fails_its_requests_and_the_next_are_answered(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with EngineThread(engine, 10) as thread:
        step, inbox = engine.step, Inbox()

        def broken(label: str) -> Any:
            monkeypatch.setattr(engine, "step", step)
            raise BadInput("the disk is gone.")

        monkeypatch.setattr(engine, "step", broken)
        thread.submit(request("a"), inbox)
        assert str(inbox.end()[1]) == "the disk is gone."
        thread.submit(request("b"), inbox)
        assert len(inbox.end()[0]) == 20
        assert thread.alive


def test_what_the_machine_fails_is_not_told_as_the_requests_fault(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damaged(live: list[Any], starts: object) -> None:
        live[0].error, live[0].finish_reason = BadInput("expert 3 differs from what was packed."), "error"

    monkeypatch.setattr(engine, "_fail", damaged)
    with EngineThread(engine, 10) as thread:
        inbox = Inbox()
        thread.submit(request("a"), inbox)
        status, body = describe(inbox.end()[1])
    assert (status, body["error"]["type"]) == (500, "server_error")
    assert body["error"]["message"] == "expert 3 differs from what was packed."


def test_too_many_too_long_and_too_late_are_refused(engine: Engine) -> None:
    inbox = Inbox()
    with EngineThread(engine, 1) as thread:
        with pytest.raises(BadInput, match="exceed the plan's context"):
            thread.submit(request("long", 500), inbox)
        thread.submit(request("a", 180), inbox)
        with pytest.raises(QueueFull):
            thread.submit(request("b"), inbox)
    assert isinstance(inbox.end()[1], ShuttingDown)
    with pytest.raises(ShuttingDown):
        thread.submit(request("c"), inbox)
