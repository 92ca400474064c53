"""What the server counts, for Prometheus. Shares and rates are quotients of counters, taken by who reads them."""

import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from specmoeoff.runtime.engine_thread import EngineThread
from specmoeoff.runtime.serving.answer import Answer
from specmoeoff.specs.record import Window

WINDOW_S = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120)
REQUEST_S = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600, 1800, 3600)


class Metrics:
    """Lane share: specmoeoff_lane_busy_seconds_total over specmoeoff_window_seconds_sum.
    Acceptance: specmoeoff_accepted_tokens_total over specmoeoff_drafted_tokens_total."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        self.requests = Counter("specmoeoff_requests", "Requests by how they ended", ["outcome"], registry=registry)
        self.prompt_tokens = Counter("specmoeoff_prompt_tokens", "Prompt tokens run", registry=registry)
        self.output_tokens = Counter("specmoeoff_output_tokens", "Tokens emitted", registry=registry)
        self.drafted = Counter("specmoeoff_drafted_tokens", "Tokens drafted", registry=registry)
        self.accepted = Counter("specmoeoff_accepted_tokens", "Drafted tokens emitted", registry=registry)
        self.window_s = Histogram("specmoeoff_window_seconds", "Window durations", buckets=WINDOW_S, registry=registry)
        self.lane_busy_s = Counter("specmoeoff_lane_busy_seconds", "Time lanes were busy", ["lane"], registry=registry)
        self.first_token_s = Histogram(
            "specmoeoff_first_token_seconds", "From request to first token", buckets=REQUEST_S, registry=registry
        )
        self.request_s = Histogram(
            "specmoeoff_request_seconds", "From request to last token", buckets=REQUEST_S, registry=registry
        )
        self._live = Gauge("specmoeoff_live_requests", "Requests in the batch", registry=registry)
        self._waiting = Gauge("specmoeoff_waiting_requests", "Requests not yet in the batch", registry=registry)

    def watch(self, thread: EngineThread) -> None:
        """Read the gauges from this thread whenever asked."""
        self._live.set_function(lambda: thread.n_live)
        self._waiting.set_function(lambda: max(0, thread.n_open - thread.n_live))

    def observe(self, window: Window, drafted: int, accepted: int) -> None:
        """After every window, in the engine's thread."""
        self.prompt_tokens.inc(window.prefill_rows)
        self.output_tokens.inc(window.tokens)
        self.drafted.inc(drafted)
        self.accepted.inc(accepted)
        self.window_s.observe(window.duration_s)
        for lane, busy_s in window.busy_s.items():
            self.lane_busy_s.labels(lane).inc(busy_s)

    def ended(self, answer: Answer) -> None:
        """When a client has its answer, or went away."""
        self.requests.labels(answer.outcome).inc()
        if answer.outcome not in ("cancelled", "error"):
            self.request_s.observe(time.perf_counter() - answer.begun_s)
        if answer.first_token_s is not None:
            self.first_token_s.observe(answer.first_token_s)

    def text(self) -> bytes:
        """The exposition."""
        return generate_latest(self._registry)
