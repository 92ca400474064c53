"""`run`: a batch file through the engine, every finished answer kept at once."""

import time
from collections import deque
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from specmoeoff import __version__
from specmoeoff.estimate.trace import Span, chrome_trace
from specmoeoff.files import sha256_text, write_atomic
from specmoeoff.roofline.profile import machine
from specmoeoff.runtime.batch_files import Journal, read_batch, to_request, to_response
from specmoeoff.runtime.engine import Engine
from specmoeoff.runtime.loading import Progress, open_plan
from specmoeoff.runtime.process import disk_bytes_read, peak_rss_bytes
from specmoeoff.runtime.trace import Trace
from specmoeoff.specs.plan import Plan
from specmoeoff.specs.record import RunRecord, Window

TRACED_WINDOWS = 8


class BatchRun:
    """One batch file under one plan. Bad input is refused before anything is written."""

    def __init__(
        self,
        plan: Plan,
        input_file: Path,
        output: Path,
        disk_limit_gb_per_s: float | None,
        ignore_eos: bool,
        progress: Progress,
    ) -> None:
        self._plan = plan
        lines = read_batch(input_file)
        opened = self._opened = open_plan(plan, progress)
        self._requests = [to_request(line, opened.tokenizer, opened.target.spec, ignore_eos) for line in lines]
        for request in self._requests:
            Engine.check_fits(request, plan.decode.context_tokens)
        self._urls = {line.custom_id: line.url for line in lines}
        self._limit = disk_limit_gb_per_s or plan.limits.disk_limit_gb_per_s
        self._journal = Journal(output, lines, sha256_text(plan.text()), ignore_eos)
        self._traces: deque[tuple[Window, Trace]] = deque(maxlen=TRACED_WINDOWS)

    def run(self, progress: Callable[[int, int], None], say: Callable[[str], None] | None) -> RunRecord:
        """Finish what is missing; an interruption keeps what was finished."""
        plan, opened, journal = self._plan, self._opened, self._journal
        missing = set(journal.missing)
        todo = [r for r in self._requests if r.request_id in missing]
        windows: list[Window] = []
        planned_bytes = read_bytes = n_tokens = 0
        begun = time.perf_counter()
        try:
            if todo:
                before = disk_bytes_read()
                with Engine(
                    opened.target, opened.draft, plan.decode, plan.experts, plan.threads, self._limit
                ) as engine:
                    loaded = disk_bytes_read() - before - engine.store.bytes_planned
                    engine.submit(todo)
                    begun = time.perf_counter()
                    for window in engine.run():
                        windows.append(window)
                        self._traces.append((window, engine.last_trace))
                        for sequence in engine.finished:
                            request = sequence.request
                            journal.add(
                                to_response(sequence, self._urls[request.request_id], plan.model.name, opened.tokenizer)
                            )
                            n_tokens += sequence.n_output
                            if say:
                                say(f"{request.request_id}: {opened.tokenizer.decode(sequence.output)}")
                        engine.finished.clear()
                        progress(len(journal.answers), len(self._requests))
                    planned_bytes = engine.store.bytes_planned
                read_bytes = disk_bytes_read() - before - loaded
            duration_s = time.perf_counter() - begun
            journal.finish()
        finally:
            journal.close()
        return RunRecord(
            kind="run",
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            tool_version=__version__,
            plan_sha256=sha256_text(plan.text()),
            model_name=opened.target.spec.name,
            machine_fingerprint=machine().fingerprint,
            n_requests=len(todo),
            n_tokens=n_tokens,
            duration_s=duration_s,
            disk_bytes_planned=planned_bytes,
            disk_bytes_read=read_bytes,
            rss_planned_bytes=plan.memory.rss_bytes,
            rss_peak_bytes=peak_rss_bytes(),
            windows=tuple(windows),
        )

    def save_trace(self, path: Path) -> None:
        """The last windows in Chrome trace format."""
        spans = [
            Span(trace.builder.graph.nodes[index], start_s, end_s, window.label)
            for window, trace in self._traces
            for index, (start_s, end_s) in trace.times.items()
        ]
        write_atomic(path, chrome_trace(spans, self._traces[0][0].start_s if self._traces else 0.0))
