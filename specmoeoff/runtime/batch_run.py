"""`run`: a batch file through the engine, every finished answer kept at once."""

import time
from collections import deque
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

from specmoeoff import __version__
from specmoeoff.errors import BadInput
from specmoeoff.estimate.trace import Span, chrome_trace
from specmoeoff.files import sha256_text, write_atomic
from specmoeoff.roofline.profile import machine
from specmoeoff.runtime.batch_files import BatchLine, Journal, error_line, read_batch, text_of, to_request, to_response
from specmoeoff.runtime.engine import Engine, open_engine
from specmoeoff.runtime.loading import Progress, open_plan
from specmoeoff.runtime.process import disk_bytes_read, peak_rss_bytes
from specmoeoff.runtime.sequence import Request
from specmoeoff.runtime.tokenizer import Tokenizer
from specmoeoff.runtime.trace import Trace
from specmoeoff.specs.model import ModelSpec
from specmoeoff.specs.plan import Plan
from specmoeoff.specs.record import RunRecord, Window

TRACED_WINDOWS, RECORDED_WINDOWS = 8, 4096


class BatchRun:
    """One batch file under one plan. A file that is none is refused before anything is written; a request that cannot be
    answered gets a line that says why."""

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
        self._opened = open_plan(plan, progress)
        self._lines = {line.custom_id: line for line in lines}
        self._ignore_eos = ignore_eos
        self._limit = disk_limit_gb_per_s
        self._journal = Journal(output, lines, sha256_text(plan.text()), ignore_eos)
        self._traces: deque[tuple[Window, Trace]] = deque(maxlen=TRACED_WINDOWS)

    def run(self, progress: Callable[[int, int], None], say: Callable[[str], None] | None) -> RunRecord:
        """Finish what is missing; an interruption keeps what was finished."""
        plan, opened, journal = self._plan, self._opened, self._journal
        windows: deque[Window] = deque(maxlen=RECORDED_WINDOWS)
        planned_bytes = read_bytes = n_tokens = 0
        begun = time.perf_counter()
        try:
            lines = [self._lines[name] for name in journal.missing]
            context_tokens = plan.decode.context_tokens
            todo = answerable(lines, opened.tokenizer, opened.target.spec, context_tokens, self._ignore_eos, journal)
            self.n_failed = len(lines) - len(todo)
            if todo:
                before = disk_bytes_read()
                with open_engine(plan, opened, self._limit) as engine:
                    loaded = disk_bytes_read() - before - engine.store.bytes_planned
                    engine.submit(todo)
                    begun = time.perf_counter()
                    for window in engine.run():
                        windows.append(window)
                        self._traces.append((window, engine.last_trace))
                        for sequence in engine.finished:
                            name = sequence.request.request_id
                            answer = to_response(sequence, self._lines[name], plan.model.name, opened.tokenizer)
                            journal.add(answer)
                            n_tokens += sequence.n_output
                            self.n_failed += sequence.error is not None
                            if say:
                                say(f"{name}: {sequence.error or text_of(answer['response']['body'])}")
                        engine.finished.clear()
                        progress(journal.n_answers, len(self._lines))
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


def answerable(
    lines: Sequence[BatchLine],
    tokenizer: Tokenizer,
    spec: ModelSpec,
    context_tokens: int,
    ignore_eos: bool,
    journal: Journal,
) -> list[Request]:
    """The requests of these lines that can be answered; the others get their error line at once."""
    found = []
    for line in lines:
        try:
            request = to_request(line, tokenizer, spec, ignore_eos)
            Engine.check_fits(request, context_tokens)
        except BadInput as error:
            journal.add(error_line(line.custom_id, 400, "invalid_request_error", str(error)))
        else:
            found.append(request)
    return found
