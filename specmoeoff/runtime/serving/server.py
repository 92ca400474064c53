"""Opens a plan and a port, and serves until told to stop."""

import ipaddress
import logging
import signal
import socket
from collections.abc import Callable
from pathlib import Path

from specmoeoff.errors import BadInput, MissingCapability
from specmoeoff.files import read_text
from specmoeoff.runtime.engine import open_engine
from specmoeoff.runtime.engine_thread import EngineThread
from specmoeoff.runtime.loading import Progress, open_plan
from specmoeoff.specs.plan import Plan

DRAIN_S = 30
KEEP_ALIVE_S = 10  # longer than clients keep idle connections, 5 s: or they ask one that is just being closed
MAX_BODY_BYTES = 4 << 20
BACKLOG = 1024
STALLED_MS = 60_000
"""A client that takes nothing for this long is cut off by the kernel, and its request cancelled."""


def serve(
    plan: Plan,
    host: str,
    port: int,
    api_key: str | None,
    max_queue: int,
    disk_limit_gb_per_s: float | None,
    progress: Progress,
    say: Callable[[str], None],
) -> None:
    """Until SIGTERM or SIGINT; requests begun are then given `DRAIN_S` to finish."""
    try:
        import uvicorn

        from specmoeoff.runtime.serving.app import create_app
        from specmoeoff.runtime.serving.metrics import Metrics
    except ImportError as error:
        raise MissingCapability(
            f"`serve` needs {error.name}; install it with `pip install specmoeoff[serve]`."
        ) from None

    with _bind(host, port) as listener:
        opened = open_plan(plan, progress)
        metrics = Metrics()
        with (
            open_engine(plan, opened, disk_limit_gb_per_s) as engine,
            EngineThread(engine, plan.decode.batch + max_queue, metrics.observe) as thread,
        ):
            metrics.watch(thread)
            name = plan.model.name
            app = create_app(thread, opened.tokenizer, engine.spec, name, metrics, api_key, MAX_BODY_BYTES)
            config = uvicorn.Config(
                app,
                backlog=BACKLOG,
                log_level=logging.WARNING,
                access_log=False,
                ws="none",
                lifespan="off",
                timeout_graceful_shutdown=DRAIN_S,
                timeout_keep_alive=KEEP_ALIVE_S,
            )
            server = uvicorn.Server(config)

            def stop(*_: object) -> None:
                server.should_exit = True

            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, stop)  # uvicorn takes them over, and raises again afterwards what it has obeyed
            listener.listen(BACKLOG)
            at, bound_port = listener.getsockname()[:2]
            say(f"serving {name} at http://{f'[{at}]' if ':' in at else at}:{bound_port}/v1")
            server.run(sockets=[listener])


def _bind(host: str, port: int) -> socket.socket:
    """A socket bound before the model is opened, so that a taken port is known at once."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, STALLED_MS)
        listener.bind(address)
    except OSError as error:
        raise BadInput(f"--host {host} --port {port}: {error.strerror}; choose another.") from None
    return listener


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server there."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def read_api_key(path: Path) -> str:
    """The first line of a key file."""
    key = read_text(path, "API key").strip()
    if not key or not key.isprintable() or " " in key:
        raise BadInput(f"{path}: holds no API key; write one line without spaces into it.")
    return key
