"""Continuous batching over windows: draft, run the target once over everything, accept, refill."""

import time
from collections import deque
from collections.abc import Callable, Iterable

import numpy as np

from specmoeoff.errors import BadInput
from specmoeoff.kernels.cpu import Kernels
from specmoeoff.runtime.drafters import Drafter
from specmoeoff.runtime.drafters.eagle import EagleDrafter, EagleHead
from specmoeoff.runtime.drafters.model import ModelDrafter
from specmoeoff.runtime.drafters.ngram import NgramDrafter
from specmoeoff.runtime.drafters.none import NoDrafter
from specmoeoff.runtime.execute import Executor
from specmoeoff.runtime.expert_store import ExpertStore
from specmoeoff.runtime.kv_cache import PageTable
from specmoeoff.runtime.model import Model, Rows, make_rows
from specmoeoff.runtime.pack import PackedModel
from specmoeoff.runtime.sequence import Request, Sequence
from specmoeoff.runtime.trace import Trace
from specmoeoff.runtime.verify import accept
from specmoeoff.specs.plan import PlanDecode, PlanExperts, PlanThreads
from specmoeoff.specs.record import Window


def max_window_rows(decode: PlanDecode) -> int:
    """The most tokens one window can hold: every place decoding, and a prefill chunk."""
    return decode.batch * (decode.draft_length + 1) + decode.prefill_chunk_tokens


class Engine:
    """Runs requests on one target model under a plan's settings. Use as a context manager."""

    def __init__(
        self,
        target: PackedModel,
        draft: PackedModel | EagleHead | None,
        decode: PlanDecode,
        experts: PlanExperts,
        threads: PlanThreads,
        disk_limit_gb_per_s: float | None = None,
        n_slots: int | None = None,
    ) -> None:
        spec = self.spec = target.spec
        kernels = Kernels(threads.compute)
        self._pages = PageTable(decode.batch, decode.context_tokens)
        n_positions = min(spec.max_positions, decode.context_tokens)
        max_rows = max_window_rows(decode)
        self.model = Model(target, kernels, self._pages.n_pages, n_positions, max_rows)
        self.store = ExpertStore(
            target.expert_path,
            spec.n_experts,
            target.expert_stride,
            n_slots or experts.n_resident + experts.stream_slots,
            threads.disk_readers,
            threads.disk_chunk_bytes,
            disk_limit_gb_per_s,
            target.expert_bytes,
        )
        self._drafters: dict[str, Drafter] = {"none": NoDrafter(), "ngram": NgramDrafter()}
        if isinstance(draft, EagleHead):
            self._drafters["eagle"] = EagleDrafter(draft, self.model, kernels, self._pages, max_rows)
        elif draft is not None:
            self._drafters["model"] = ModelDrafter(draft, kernels, self._pages, max_rows)
        self._executor = Executor(self.model, self.store)
        self._free_places = list(range(decode.batch))[::-1]
        self._waiting: deque[Request] = deque()
        self.live: list[Sequence] = []
        self.finished: list[Sequence] = []
        self.last_trace = Trace()
        self.last_counts: list[int] = []
        self.accept: Callable[[list[int], list[int]], int] = accept
        self._window = 0
        self.configure(decode, experts)

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *exc: object) -> None:
        self.store.quiesce()
        self.store.close()

    def configure(self, decode: PlanDecode, experts: PlanExperts) -> None:
        """Change draft length, drafter and placement between windows; requests go on where they were."""
        if max_window_rows(decode) > self.model.work.max_rows:
            raise ValueError("the new settings need a larger workspace than the engine was made with")
        if decode.drafter not in self._drafters:
            raise BadInput(
                f"the plan's drafter is {decode.drafter}, but it names no draft; make the plan anew with `tune`."
            )
        self.decode = decode
        self._drafter = self._drafters[decode.drafter]
        self._executor.place(experts)
        self._window = 0

    @property
    def drafters(self) -> dict[str, Drafter]:
        """By name; one's own can be put in."""
        return self._drafters

    @property
    def uses(self) -> list[dict[int, int]]:
        """Rows of every used expert by layer, in the window last run."""
        return self._executor.uses

    def log_routing(self) -> list[np.ndarray]:
        """A list that gets expert_index (rows, n_active) of every layer from now on; the caller empties it."""
        self._executor.routing_log = []
        return self._executor.routing_log

    def submit(self, requests: Iterable[Request]) -> None:
        """Queue requests; one that cannot fit the context is refused."""
        for request in requests:
            self.check_fits(request, self.decode.context_tokens)
            self._waiting.append(request)

    @staticmethod
    def check_fits(request: Request, context_tokens: int) -> None:
        """BadInput where a request is empty or longer than the context."""
        needed = len(request.prompt) + request.max_tokens
        if needed > context_tokens:
            raise BadInput(
                f"request {request.request_id!r}: {len(request.prompt)} prompt and {request.max_tokens} output tokens "
                f"exceed the plan's context of {context_tokens}; shorten it, or make a plan with "
                f"`tune --context {needed}`."
            )
        if not request.prompt:
            raise BadInput(f"request {request.request_id!r}: the prompt is empty.")

    @property
    def busy(self) -> bool:
        """Whether anything is left to do."""
        return bool(self.live or self._waiting)

    def pause(self) -> None:
        """Stop reading ahead, so that something else can be measured; the next window begins anew."""
        self._executor.idle()

    def rewind(self) -> None:
        """Take every live request back to the first token after its prompt, to run the same work again."""
        for sequence in self.live:
            n_prompt = len(sequence.request.prompt)
            del sequence.tokens[n_prompt + 1 :]
            sequence.kv_tokens = min(sequence.kv_tokens, n_prompt)
            for drafter in self._drafters.values():
                drafter.roll_back(sequence)

    def cancel(self, request_id: str) -> None:
        """Forget one request, waiting or live, between windows."""
        self._waiting = deque(r for r in self._waiting if r.request_id != request_id)
        for sequence in [s for s in self.live if s.request.request_id == request_id]:
            self._retire(sequence)

    def cancel_all(self) -> None:
        """Forget every request."""
        self._waiting.clear()
        for sequence in list(self.live):
            self._retire(sequence)
        self.finished.clear()
        self._executor.idle()

    def run(self, label: str = "run") -> Iterable[Window]:
        """Windows until nothing is left."""
        while self.busy:
            yield self.step(label)
        self._executor.idle()

    def step(self, label: str = "run") -> Window:
        """One window: draft, verify, accept."""
        bytes_before, busy_before = self.store.bytes_planned, self.store.busy_s
        self._admit()
        trace = Trace(self.store.n_slots)
        self._executor.read_ahead(self._window)
        decoding = [s for s in self.live if not s.prefilling]
        lengths = [min(self.decode.draft_length, s.n_remaining - 1) for s in decoding]
        proposals = dict(zip(map(id, decoding), self._drafter.propose(decoding, lengths, trace), strict=True))
        chunks = self._prefill_chunks()
        inputs = [[s.tokens[-1], *proposals[id(s)]] if id(s) in proposals else chunks[id(s)] for s in self.live]
        live = [(s, tokens) for s, tokens in zip(self.live, inputs, strict=True) if tokens]
        micro_batches = self._micro_batches(live)
        tokens = np.concatenate([np.asarray(t, np.int32) for _, t in live])
        contexts = [s.kv_tokens for s, _ in live]
        self.last_counts = [len(t) for _, t in live]
        self._executor.forward(self._window, tokens, micro_batches, trace)
        for drafter in self._drafters.values():
            drafter.see([s for s, _ in live], self.last_counts)

        starts = np.concatenate([[0], np.cumsum([len(t) for _, t in live])])
        wanted = [self._head_rows(s, int(a), int(b)) for (s, _), a, b in zip(live, starts, starts[1:], strict=False)]
        rows = np.concatenate(wanted)
        with trace.run(trace.builder.head(len(rows))):
            chosen = self.model.choose(rows).tolist() if len(rows) else []
        with trace.run(trace.builder.verify(len(rows))):
            n_emitted, position = 0, 0
            for (sequence, given), wanted_rows in zip(live, wanted, strict=True):
                answers = chosen[position : position + len(wanted_rows)]
                position += len(wanted_rows)
                n_emitted += self._advance(sequence, given, answers)
        end_s = time.perf_counter()
        prefill_rows = sum(len(c) for c in chunks.values())
        self.last_trace = trace
        self._window += 1
        phases = dict(trace.phases_s)
        cpu_busy_s = sum(phases.values())
        return Window(
            label=label,
            start_s=trace.start_s,
            duration_s=end_s - trace.start_s,
            draft_length=self.decode.draft_length,
            live=len(live),
            prefill_rows=prefill_rows,
            rows=len(tokens),
            tokens=n_emitted,
            mean_context=float(np.mean(contexts)),
            disk_bytes=self.store.bytes_planned - bytes_before,
            busy_s={"cpu": cpu_busy_s, "disk": self.store.busy_s - busy_before},
            phases_s={**phases, "wait": end_s - trace.start_s - cpu_busy_s},
            experts_used=self._executor.experts_used,
        )

    def _admit(self) -> None:
        while self._waiting and self._free_places:
            request = self._waiting.popleft()
            sequence = Sequence(request, self._free_places.pop(), list(request.prompt))
            self._pages.reserve(sequence.slot, len(request.prompt) + request.max_tokens)
            self.live.append(sequence)

    def _retire(self, sequence: Sequence) -> None:
        self.live.remove(sequence)
        self._pages.release(sequence.slot)
        for drafter in self._drafters.values():
            drafter.forget(sequence)
        self._free_places.append(sequence.slot)
        self.finished.append(sequence)

    def _prefill_chunks(self) -> dict[int, list[int]]:
        """Prompt tokens that ride along in this window, oldest request first."""
        room = self.decode.prefill_chunk_tokens
        chunks = {}
        for sequence in self.live:
            if sequence.prefilling:
                chunk = sequence.request.prompt[sequence.kv_tokens : sequence.kv_tokens + room]
                room -= len(chunk)
                chunks[id(sequence)] = list(chunk)
        return chunks

    def _micro_batches(self, live: list[tuple[Sequence, list[int]]]) -> list[Rows]:
        """Contiguous groups of requests with about equal rows."""
        counts = np.array([len(tokens) for _, tokens in live])
        n_parts = min(self.decode.micro_batches, len(live))
        middle = (np.cumsum(counts) - counts / 2) / counts.sum()
        parts = np.minimum((middle * n_parts).astype(int), n_parts - 1)
        batches, first = [], 0
        for part in np.unique(parts):
            members = [live[i] for i in np.flatnonzero(parts == part)]
            rows = make_rows(
                first,
                [len(tokens) for _, tokens in members],
                [s.kv_tokens for s, _ in members],
                self._pages.table[[s.slot for s, _ in members]],
            )
            batches.append(rows)
            first = rows.last
        return batches

    @staticmethod
    def _head_rows(sequence: Sequence, first: int, last: int) -> np.ndarray:
        """Rows whose next token matters: all while decoding, the last of a finished prompt, none before."""
        if not sequence.prefilling:
            return np.arange(first, last)
        complete = sequence.kv_tokens + last - first == len(sequence.request.prompt)
        return np.array([last - 1] if complete else [], np.int64)

    def _advance(self, sequence: Sequence, given: list[int], answers: list[int]) -> int:
        """Take the accepted tokens and the target's own next one; returns tokens emitted."""
        if sequence.prefilling:
            sequence.kv_tokens += len(given)
            emitted = sequence.emit(answers)
        else:
            drafted = given[1:]
            n_accepted = self.accept(drafted, answers)
            emitted = sequence.emit([*drafted[:n_accepted], answers[n_accepted]])
            sequence.kv_tokens = len(sequence.tokens) - 1
        self._drafter.roll_back(sequence)
        if sequence.finish_reason:
            self._retire(sequence)
        return emitted
