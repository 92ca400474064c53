"""`specmoeoff serve` as its own process, asked with OpenAI's client, and badly treated by five hundred others."""

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from specmoeoff.runtime.serving.server import KEEP_ALIVE_S
from specmoeoff.specs.plan import Plan

openai = pytest.importorskip("openai", reason="the official client is not installed")
pytest.importorskip("fastapi", reason="the `serve` extra is not installed")

KEY = "a-key-of-this-test"
ONE_ARENA = {"MALLOC_ARENA_MAX": "1", "MALLOC_TRIM_THRESHOLD_": "131072"}  # else every thread's pool hides what is lost
MANNERS = ("whole", "streamed", "slow", "leaves", "malformed", "too long")
MESSAGES: Any = [{"role": "user", "content": "Grüße, 世界"}]


class Served:
    """A server in its own process."""

    def __init__(self, plan: Path, *options: str, **environment: str) -> None:
        command = [sys.executable, "-W", "error", "-m", "specmoeoff", "serve", str(plan), "--port", "0", *options]
        self.process = subprocess.Popen(
            command,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "SPECMOEOFF_API_KEY": "", **ONE_ARENA, **environment},
        )
        assert self.process.stderr
        self.said = ""
        while not (found := re.search(r"serving (\S+) at http://[\d.]+:(\d+)/v1", self.said)):
            line = self.process.stderr.readline()
            assert line, self.said
            self.said += line
        self.model, self.port = found[1], int(found[2])

    def client(self, **options: Any) -> "openai.OpenAI":
        return openai.OpenAI(
            **{"base_url": f"http://127.0.0.1:{self.port}/v1", "api_key": KEY, "max_retries": 0, "timeout": 60}
            | options
        )

    def post(self, path: str, body: bytes, headers: dict[str, str] | None = None) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request("POST", path, body, {"Content-Type": "application/json", **(headers or {})})
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())
        finally:
            connection.close()

    def metrics(self) -> dict[str, float]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request("GET", "/metrics")
        lines = connection.getresponse().read().decode().splitlines()
        connection.close()
        return {name: float(value) for name, value in (x.rsplit(" ", 1) for x in lines if not x.startswith("#"))}

    def size(self) -> tuple[int, int]:
        """Open files and resident bytes."""
        proc = Path(f"/proc/{self.process.pid}")
        pages = int((proc / "statm").read_text().split()[1])
        return len(list((proc / "fd").iterdir())), pages * os.sysconf("SC_PAGE_SIZE")

    def stop(self, with_signal: int = signal.SIGTERM) -> str:
        self.process.send_signal(with_signal)
        assert self.process.stderr
        said = self.process.communicate(timeout=60)[1]
        assert self.process.returncode == 0, said
        return said


@pytest.fixture
def plan_file(speaking_model: Path, plan_for: Callable[..., Plan], tmp_path: Path) -> Path:
    plan_for(speaking_model).save(tmp_path / "plan.toml")
    return tmp_path / "plan.toml"


@pytest.fixture
def served(plan_file: Path) -> Iterator[Served]:
    server = Served(plan_file)
    yield server
    if server.process.poll() is None:
        assert "Traceback" not in server.stop()


def ended(served: Served, n: float = 0) -> None:
    """Waits until no request is left."""
    deadline = time.monotonic() + 30
    while (found := served.metrics())["specmoeoff_live_requests"] + found["specmoeoff_waiting_requests"] > n:
        assert time.monotonic() < deadline, found
        time.sleep(0.05)


def test_the_official_client_gets_answers_whole_and_streamed(served: Served) -> None:
    client = served.client()
    assert [m.id for m in client.models.list()] == [served.model]
    chat = client.chat.completions.create(model=served.model, messages=MESSAGES, max_tokens=40)
    choice, usage = chat.choices[0], chat.usage
    assert choice.finish_reason in ("length", "stop")
    assert choice.message.role == "assistant"
    assert usage
    assert usage.completion_tokens == len(choice.model_extra["token_ids"])  # type: ignore[index]
    assert usage.prompt_tokens == len("user: Grüße, 世界\nassistant: ".encode())

    parts = list(
        client.chat.completions.create(
            model=served.model,
            messages=MESSAGES,
            max_tokens=40,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert parts[0].choices[0].delta.role == "assistant"
    assert "".join(p.choices[0].delta.content or "" for p in parts if p.choices) == choice.message.content
    assert parts[-2].choices[0].finish_reason == choice.finish_reason
    assert parts[-1].usage == usage
    assert len({p.id for p in parts}) == 1
    assert len(parts) > 4

    whole = client.completions.create(model=served.model, prompt="abc", max_tokens=30)
    pieces = client.completions.create(model=served.model, prompt="abc", max_tokens=30, stream=True)
    assert "".join(p.choices[0].text for p in pieces) == whole.choices[0].text

    found = served.metrics()
    assert sum(v for k, v in found.items() if k.startswith("specmoeoff_requests_total")) == 4
    assert found["specmoeoff_output_tokens_total"] >= 2 * usage.completion_tokens
    assert 0 <= found["specmoeoff_accepted_tokens_total"] <= found["specmoeoff_drafted_tokens_total"]
    assert found["specmoeoff_window_seconds_count"] > 0
    assert 0 < found['specmoeoff_lane_busy_seconds_total{lane="cpu"}'] <= found["specmoeoff_window_seconds_sum"]


def test_sampling_stops_and_log_probabilities_are_the_same_streamed(served: Served) -> None:
    client = served.client()
    asked: Any = {"model": served.model, "messages": MESSAGES, "max_tokens": 40, "temperature": 0.9}
    free = [client.chat.completions.create(**asked, seed=seed).choices[0].message.content for seed in (1, 1, 2)]
    assert free[0] == free[1] != free[2]
    stop = free[0][12:15]
    asked |= {"seed": 1, "stop": [stop, "never"], "logprobs": True, "top_logprobs": 2}
    whole = client.chat.completions.create(**asked).choices[0]
    assert whole.message.content == free[0][: free[0].index(stop)]
    assert whole.finish_reason == "stop"
    parts = [p.choices[0] for p in client.chat.completions.create(**asked, stream=True)]
    assert "".join(p.delta.content or "" for p in parts) == whole.message.content
    assert parts[-1].finish_reason == "stop"
    assert whole.logprobs
    assert parts[-1].logprobs
    assert parts[-1].logprobs.model_dump() == whole.logprobs.model_dump()
    assert all(len(token.top_logprobs) == 2 for token in whole.logprobs.content)


def test_concurrent_requests_answer_as_single_ones_do(served: Served) -> None:
    client = served.client()

    def ask(i: int) -> str:
        answer = client.completions.create(model=served.model, prompt=f"number {i}", max_tokens=10 + i)
        return str(answer.choices[0].text)

    with ThreadPoolExecutor(12) as pool:
        together = list(pool.map(ask, range(12)))
    assert together == [ask(i) for i in range(12)]


def test_bad_requests_are_refused_in_openais_shape(served: Served) -> None:
    client = served.client()
    with pytest.raises(openai.BadRequestError, match="tools is not supported; leave it out") as caught:
        client.chat.completions.create(model=served.model, messages=MESSAGES, tools=[{"type": "function"}])  # type: ignore[list-item,call-overload]
    assert caught.value.param == "tools"
    with pytest.raises(openai.BadRequestError, match="temperature") as caught:
        client.chat.completions.create(model=served.model, messages=MESSAGES, temperature=7)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.BadRequestError, match="one answer per request"):
        client.chat.completions.create(model=served.model, messages=MESSAGES, n=2)
    with pytest.raises(openai.NotFoundError, match="not served here"):
        client.chat.completions.create(model="gpt-x", messages=MESSAGES)
    with pytest.raises(openai.BadRequestError, match="exceed the plan's context"):
        client.completions.create(model=served.model, prompt="x" * 1_000_000)
    with pytest.raises(openai.BadRequestError, match="prompt is empty"):
        client.completions.create(model=served.model, prompt="")
    path = "/v1/completions"
    surrogate = b'{"prompt": "\\ud800"}'
    deep = b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    digits = b'{"prompt": "x", "max_tokens": ' + b"9" * 5000 + b"}"
    for body in (b"", b"{", b"[]", b'"x"', b'{"prompt": 5}', b'{"messages": []}', b"\xff", surrogate, deep, digits):
        status, answer = served.post(path, body)
        assert status == 400, body[:40]
        assert "error" in answer, (body[:40], answer)
        assert answer["error"]["type"] == "invalid_request_error", body[:40]
    assert served.post("/v1/nothing", b"{}")[0] == 404
    assert served.post("/v1/models", b"{}")[0] == 405
    n_refused = served.metrics()['specmoeoff_requests_total{outcome="refused"}']
    assert served.post(path, b" " * ((4 << 20) + 1))[0] == 413
    assert served.metrics()['specmoeoff_requests_total{outcome="refused"}'] == n_refused + 1
    assert client.completions.create(model=served.model, prompt="still here").choices[0].finish_reason


def test_a_body_without_a_length_is_limited_too(served: Served) -> None:
    with socket.create_connection(("127.0.0.1", served.port), timeout=30) as connection:
        head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
        connection.sendall(head)
        for _ in range(65):  # 4 MiB and one
            connection.sendall(b"10000\r\n" + b" " * 65536 + b"\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 413")
    assert served.client().models.list().data


def test_the_key_is_asked_for(plan_file: Path, tmp_path: Path) -> None:
    (tmp_path / "key").write_text(KEY + "\n")
    served = Served(plan_file, "--api-key-file", str(tmp_path / "key"))
    try:
        assert served.client().models.list().data
        with pytest.raises(openai.AuthenticationError, match="API key is missing or wrong"):
            served.client(api_key="another").models.list()
        assert served.post("/v1/completions", b'{"prompt": "x"}')[0] == 401
        assert served.metrics()['specmoeoff_requests_total{outcome="refused"}'] == 2
    finally:
        served.stop(signal.SIGINT)


def test_a_server_others_can_reach_says_so(plan_file: Path) -> None:
    served = Served(plan_file, "--host", "0.0.0.0")
    try:
        said = " ".join(served.said.split())
        assert "warning: --host 0.0.0.0: others can reach this server, and no API key is asked for" in said
        assert served.client().models.list().data
        command = [sys.executable, "-m", "specmoeoff", "serve", str(plan_file), "--port", str(served.port)]
        refused = subprocess.run(command, capture_output=True, text=True, check=False)
        assert refused.returncode == 2
        assert f"--host 127.0.0.1 --port {served.port}: Address already in use" in refused.stderr
    finally:
        served.stop()


def test_a_missing_library_is_named_with_the_remedy(plan_file: Path, tmp_path: Path) -> None:
    (tmp_path / "fastapi.py").write_text("raise ImportError(name='fastapi')")
    command = [sys.executable, "-m", "specmoeoff", "serve", str(plan_file)]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    refused = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert refused.returncode == 3
    assert "`serve` needs fastapi; install it with `pip install specmoeoff[serve]`" in " ".join(refused.stderr.split())


def test_a_full_queue_says_when_to_come_back(plan_file: Path) -> None:
    served = Served(plan_file, "--max-queue", "1", "--disk-limit-gb-per-s", "0.01")
    try:
        body = json.dumps({"prompt": "x", "max_tokens": 150, "ignore_eos": True}).encode()
        with ThreadPoolExecutor(5) as pool:
            waiting = [pool.submit(served.post, "/v1/completions", body) for _ in range(5)]
            deadline = time.monotonic() + 20
            while served.metrics()["specmoeoff_live_requests"] < 4:
                assert time.monotonic() < deadline
            with pytest.raises(openai.RateLimitError) as caught:
                served.client().completions.create(model=served.model, prompt="x")
            assert caught.value.response.headers["retry-after"].isdigit()
            # what was begun is finished before the server goes
            served.process.send_signal(signal.SIGTERM)
            assert [f.result()[0] for f in waiting] == [200] * 5
    finally:
        served.stop()


def stream_request(served: Served, n_tokens: int, receive_bytes: int | None = None) -> socket.socket:
    """A streamed request whose answer nobody reads yet."""
    connection = socket.socket()
    if receive_bytes:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    connection.settimeout(60)
    connection.connect(("127.0.0.1", served.port))
    body = json.dumps({"prompt": "slow", "max_tokens": n_tokens, "stream": True, "ignore_eos": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    connection.sendall(head.encode() + body)
    return connection


def test_a_client_that_goes_away_gives_its_place_free(plan_file: Path) -> None:
    served = Served(plan_file, "--disk-limit-gb-per-s", "0.01")
    try:
        connections = [stream_request(served, 180) for _ in range(6)]
        for connection in connections[:4]:
            assert b"200 OK" in connection.recv(1000)
        for connection in connections:
            connection.close()
        ended(served)
        found = served.metrics()
        assert found['specmoeoff_requests_total{outcome="cancelled"}'] == 6
        assert found["specmoeoff_output_tokens_total"] < 4 * 180
    finally:
        served.stop()


@pytest.mark.slow
def test_a_reader_too_slow_loses_its_answer_and_holds_nobody_up(
    speaking_model: Path, plan_for: Callable[..., Plan], tmp_path: Path
) -> None:
    plan_for(speaking_model, context_tokens=2048, draft_length=0, drafter="none").save(tmp_path / "long.toml")
    served = Served(tmp_path / "long.toml")
    try:
        with stream_request(served, 2000, receive_bytes=1024) as connection:
            client = served.client()
            for _ in range(3):
                assert client.completions.create(model=served.model, prompt="quick", max_tokens=5).choices
            ended(served)
            data = b""
            while not data.endswith(b"0\r\n\r\n"):
                data += connection.recv(1 << 16)
        assert (b"read too slowly" in data) != (b"[DONE]" in data)
    finally:
        served.stop()


@pytest.mark.slow
@pytest.mark.parametrize("n_clients", [30, pytest.param(500, marks=pytest.mark.long)])
def test_clients_of_all_manners_leave_nothing_behind(served: Served, n_clients: int) -> None:
    client = served.client()
    outcomes: Counter[str] = Counter()

    def behave(i: int) -> None:
        manner = MANNERS[i % 6]
        try:
            if manner == "whole":
                client.completions.create(model=served.model, prompt=f"{i}", max_tokens=8)
            elif manner == "streamed":
                list(client.completions.create(model=served.model, prompt=f"{i}", max_tokens=8, stream=True))
            elif manner in ("slow", "leaves"):
                with stream_request(served, 20, receive_bytes=1024) as connection:
                    if manner == "slow":
                        while data := connection.recv(64):
                            time.sleep(0.01)
                            if data.endswith(b"0\r\n\r\n"):
                                break
                    else:
                        time.sleep(i % 50 / 50)
            elif manner == "malformed":
                assert served.post("/v1/completions", b'{"prompt": ')[0] == 400
            else:
                assert served.post("/v1/completions", json.dumps({"prompt": "x" * 100_000}).encode())[0] == 400
            outcomes[manner] += 1
        except openai.RateLimitError:
            outcomes["told to come back"] += 1
        except Exception as error:
            outcomes[f"{manner}: {error!r} of {error.__cause__!r}"] += 1

    def storm() -> None:
        threads = [threading.Thread(target=behave, args=(i,)) for i in range(n_clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=100)
        assert not any(thread.is_alive() for thread in threads)
        ended(served)

    n_files = served.size()[0]
    sizes: list[int] = []
    # An allocator's arenas fill up once; what is left behind grows with every storm.
    while len(sizes) < 3 or sizes[-1] > 1.01 * sizes[-2]:
        assert len(sizes) < 9, sizes
        storm()
        sizes.append(served.size()[1])
    assert outcomes.total() == outcomes["told to come back"] + sum(outcomes[manner] for manner in MANNERS)
    assert outcomes.total() == len(sizes) * n_clients, outcomes
    deadline = time.monotonic() + 2 * KEEP_ALIVE_S
    while served.size()[0] > n_files and time.monotonic() < deadline:  # idle connections are closed
        time.sleep(0.1)
    assert served.size()[0] <= n_files
    assert client.completions.create(model=served.model, prompt="still here").choices[0].finish_reason
