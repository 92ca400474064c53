"""`run --ray`: a batch file over the nodes of a Ray cluster, one engine a node, answers kept in order of arrival."""

import asyncio
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from specmoeoff.errors import AnswerIsNo, BadInput, MissingCapability
from specmoeoff.files import cache_dir, explain_os_errors, read_text, sha256_text, write_atomic
from specmoeoff.roofline.profile import machine
from specmoeoff.runtime.batch_files import BatchLine, Journal, error_line, read_batch, to_request, to_response
from specmoeoff.runtime.batch_run import answerable
from specmoeoff.runtime.checkpoint import read_model_spec
from specmoeoff.runtime.engine import open_engine
from specmoeoff.runtime.engine_thread import End, EngineThread, RequestFailed
from specmoeoff.runtime.loading import model_folder, open_plan
from specmoeoff.runtime.tokenizer import Tokenizer
from specmoeoff.specs.plan import Plan

MAX_OPEN = 900
"""Calls under way to one node; Ray runs up to 1000 at a time in an actor."""


def plan_here(plan: Plan, workload_text: str) -> Plan:
    """The plan itself on the machine it was made for; elsewhere this machine's own, tuned now unless it was before.

    Made under the same context and fast memory, with a profile measured here and the workload of the given plan.
    """
    if plan.inputs.machine_fingerprint == machine().fingerprint:
        return plan
    folder = cache_dir() / "plans" / sha256_text(plan.text() + machine().fingerprint)[:16]
    own, profile, workload = (folder / name for name in ("plan.toml", "profile.json", "workload.json"))
    if not own.exists():
        with explain_os_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        if not workload_text:
            raise BadInput("the workload the plan was made from is not on the machine that asks; make the plan there.")
        write_atomic(workload, workload_text)
        source, limits = plan.model.source, plan.limits
        cap = ["--disk-limit-gb-per-s", str(limits.disk_limit_gb_per_s)] if limits.disk_limit_gb_per_s else []
        memory: list[str | Path] = [
            "--fast-memory",
            str(limits.fast_memory_bytes),
            "--context",
            str(plan.decode.context_tokens),
        ]
        what: list[str | Path] = [
            "--model",
            source,
            "--precision",
            plan.model.precision,
            "--experts",
            plan.model.expert_format,
        ]
        _command("profile", *what, "-o", profile)
        made_from: list[str | Path] = ["--profile", profile, *what, "--workload", workload]
        _command("tune", *made_from, "-o", own, *memory, *cap)
    return Plan.load(own)


def _command(*words: str | Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "specmoeoff", *map(str, words)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise AnswerIsNo(f"`specmoeoff {words[0]}` ended with exit code {done.returncode}: {done.stderr.strip()}")


class NodeEngine:
    """The actor of one node."""

    def __init__(self, plan_text: str, workload_text: str, disk_limit_gb_per_s: float | None, ignore_eos: bool) -> None:
        plan = self._plan = plan_here(Plan.parse(plan_text, Path("plan.json")), workload_text)
        opened = self._opened = open_plan(plan)
        engine = open_engine(plan, opened, disk_limit_gb_per_s)
        self._ignore_eos = ignore_eos
        self._thread = EngineThread(engine, MAX_OPEN).__enter__()  # ends with the actor's process

    async def batch(self) -> int:
        """Requests this node runs at once; answering says that it is ready."""
        return self._plan.decode.batch

    async def answer(self, line: dict[str, Any]) -> dict[str, Any]:
        """The output line of a batch file's line."""
        parsed, opened = BatchLine.model_validate(line), self._opened
        request = to_request(parsed, opened.tokenizer, opened.target.spec, self._ignore_eos)
        loop = asyncio.get_running_loop()
        finished: asyncio.Future[Any] = loop.create_future()

        def deliver(tokens: list[int], end: End) -> None:
            if end is not None:
                loop.call_soon_threadsafe(finished.set_result, end)

        self._thread.submit(request, deliver)
        end = await finished
        if isinstance(end, RequestFailed):
            return error_line(parsed.custom_id, 500, "server_error", str(end))
        if isinstance(end, Exception):
            raise end
        return to_response(end, parsed, self._plan.model.name, opened.tokenizer)


@dataclass(eq=False)
class _Node:
    actor: Any
    name: str
    room: int = 0
    under_way: dict[Any, str] = field(default_factory=dict)  # call: custom_id, empty for `batch`


class RayRun:
    """One batch file over a cluster, as BatchRun runs it on one machine."""

    def __init__(
        self,
        plan: Plan,
        inputs_folder: Path,
        input_file: Path,
        output: Path,
        address: str,
        disk_limit_gb_per_s: float | None,
        ignore_eos: bool,
    ) -> None:
        try:
            import ray
        except ImportError:
            raise MissingCapability("--ray needs Ray; install it with `pip install specmoeoff[ray]`.") from None
        lines = read_batch(input_file)
        folder = model_folder(plan.model.source)
        self._tokenizer, self._spec = Tokenizer(folder), read_model_spec(folder)
        self._context_tokens, self._ignore_eos = plan.decode.context_tokens, ignore_eos
        self._lines = {line.custom_id: line for line in lines}
        self._journal = Journal(output, lines, sha256_text(plan.text()), ignore_eos)
        workload = inputs_folder / f"{plan.inputs.workload_sha256}.json"
        workload_text = read_text(workload, "workload") if workload.exists() else ""
        self._settings = (plan.text(), workload_text, disk_limit_gb_per_s, ignore_eos)
        self._ray: Any = ray
        self._address = address

    def run(self, progress: Callable[[int, int], None], warn: Callable[[str], None]) -> dict[str, float]:
        """Finish what is missing; a lost node's requests go to the others. AnswerIsNo where no node is left."""
        journal, ray = self._journal, self._ray
        begun, n_tokens, n_failed = time.perf_counter(), 0, 0
        try:
            lines = [self._lines[name] for name in journal.missing]
            todo = answerable(lines, self._tokenizer, self._spec, self._context_tokens, self._ignore_eos, journal)
            waiting = deque(request.request_id for request in todo)
            nodes = self._start() if waiting else []
            while waiting or any(any(n.under_way.values()) for n in nodes):
                for node in nodes:
                    while waiting and len(node.under_way) < node.room:
                        custom_id = waiting.popleft()
                        node.under_way[node.actor.answer.remote(self._lines[custom_id].model_dump(mode="json"))] = (
                            custom_id
                        )
                done, _ = ray.wait([call for node in nodes for call in node.under_way], num_returns=1)
                node = next(n for n in nodes if done[0] in n.under_way)
                try:
                    result = ray.get(done[0])
                except ray.exceptions.RayError as error:
                    waiting.extendleft(filter(None, node.under_way.values()))
                    nodes.remove(node)
                    self._lose(node, error, bool(nodes), warn)
                    continue
                if node.under_way.pop(done[0]):
                    journal.add(result)
                    n_failed += result["error"] is not None
                    n_tokens += result["response"]["body"].get("usage", {}).get("completion_tokens", 0)
                    progress(journal.n_answers, len(self._lines))
                else:
                    node.room = min(2 * result, MAX_OPEN)
            journal.finish()
        finally:
            journal.close()
            ray.shutdown()
        seconds = round(time.perf_counter() - begun, 3)
        n_failed += len(lines) - len(todo)
        return {"requests": len(todo), "failed": n_failed, "tokens": n_tokens, "seconds": seconds}

    def _start(self) -> list[_Node]:
        ray = self._ray
        host, _, port = self._address.removeprefix("ray://").rpartition(":")
        try:
            if port.isdigit():  # Ray would try for minutes
                socket.create_connection((host, int(port)), timeout=10).close()
            ray.init(address=self._address, log_to_driver=False, logging_level="ERROR")
        except (OSError, ValueError, RuntimeError) as error:
            reason = str(error).split("\n")[0].rstrip(".")
            raise BadInput(f"--ray {self._address}: {reason}; start a cluster with `ray start --head`.") from None
        nodes = [self._start_on(n) for n in ray.nodes() if n["Alive"] and n["Resources"].get("CPU")]
        if not nodes:
            raise MissingCapability(f"--ray {self._address}: no node of the cluster has a CPU to give; add one.")
        return nodes

    def _start_on(self, found: dict[str, Any]) -> _Node:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        place = NodeAffinitySchedulingStrategy(found["NodeID"], soft=False)
        actor_class = self._ray.remote(num_cpus=found["Resources"]["CPU"], scheduling_strategy=place)(NodeEngine)
        node = _Node(actor_class.remote(*self._settings), f"{found['NodeManagerAddress']} ({found['NodeID'][:8]})")
        node.under_way[node.actor.batch.remote()] = ""
        return node

    def _lose(self, node: _Node, error: Exception, others: bool, warn: Callable[[str], None]) -> None:
        with suppress(Exception):  # it may be dead
            self._ray.kill(node.actor)
        cause = str(getattr(error, "cause", None) or error).strip().split("\n")[-1].rstrip(".")
        if not others:
            raise AnswerIsNo(
                f"node {node.name}: {cause}; no node is left; what is finished is kept, run again to go on."
            )
        warn(f"node {node.name}: {cause}; its requests go to the others.")
