"""Continuous batching over windows: draft, run the target once over everything, accept, refill."""

import time
from collections import deque
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Items
from math import log
from statistics import fmean
from typing import Any

import numpy as np

from specmoeoff.errors import BadInput
from specmoeoff.kernels.cpu import Kernels
from specmoeoff.runtime.drafters import Drafter, Proposal
from specmoeoff.runtime.drafters.eagle import EagleDrafter, EagleHead, HostEagle
from specmoeoff.runtime.drafters.model import HostPasses, ModelDrafter
from specmoeoff.runtime.drafters.ngram import NgramDrafter
from specmoeoff.runtime.drafters.none import NoDrafter
from specmoeoff.runtime.execute import Executor
from specmoeoff.runtime.expert_store import ExpertStore
from specmoeoff.runtime.gpu.device import CupyDevice, Device
from specmoeoff.runtime.gpu.draft import GpuEagle, GpuPasses
from specmoeoff.runtime.gpu.target import GpuTarget, NoStore, near_slots
from specmoeoff.runtime.gpu.weights import CheckpointWeights, EagleWeights
from specmoeoff.runtime.kv_cache import PageTable
from specmoeoff.runtime.loading import Opened
from specmoeoff.runtime.model import Model
from specmoeoff.runtime.pack import PackedModel
from specmoeoff.runtime.rows import Rows, make_rows
from specmoeoff.runtime.sampling import distribution, uniforms
from specmoeoff.runtime.sequence import Request, Sequence
from specmoeoff.runtime.trace import Trace
from specmoeoff.runtime.verify import accept, verify_sampled
from specmoeoff.specs.plan import LengthAt, Plan, PlanDecode, PlanExperts, PlanGpu, PlanThreads
from specmoeoff.specs.record import Window


def max_window_rows(decode: PlanDecode) -> int:
    """The most tokens one window can hold: every place decoding, and a prefill chunk."""
    return decode.batch * (decode.draft_length + 1) + decode.prefill_chunk_tokens


class Engine:
    """Runs requests on one target model under a plan's settings. Use as a context manager.

    `draft_lengths`: the plan's table, which tells greedy requests how far to draft; sampled ones keep to `decode`, so that
    their answers follow from their seeds whatever runs beside them.
    """

    def __init__(
        self,
        target: PackedModel | CheckpointWeights,
        draft: PackedModel | EagleHead | CheckpointWeights | None,
        decode: PlanDecode,
        experts: PlanExperts,
        threads: PlanThreads,
        disk_limit_gb_per_s: float | None = None,
        n_slots: int | None = None,
        draft_lengths: Items[LengthAt] = (),
        gpu: PlanGpu | None = None,
        device: Device | None = None,
    ) -> None:
        spec = self.spec = target.spec
        self._pages = PageTable(decode.batch, decode.context_tokens, decode.kv_tokens, near_slots(gpu, decode.batch))
        max_rows = self._max_rows = max_window_rows(decode)
        self._drafters: dict[str, Drafter] = {"none": NoDrafter(), "ngram": NgramDrafter()}
        if isinstance(target, PackedModel):
            kernels = Kernels(threads.compute, precision=spec.precision)
            n_positions = min(spec.max_positions, decode.context_tokens)
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
                target.expert_sha256,
                spec.n_dense_layers,
            )
            if isinstance(draft, EagleHead):
                head = HostEagle(draft, self.model, kernels, self._pages, max_rows)
                self._drafters["eagle"] = EagleDrafter(head, self.model.features, self._pages, draft.spec)
            elif isinstance(draft, PackedModel):
                self._drafters["model"] = ModelDrafter(HostPasses(draft, kernels, self._pages, max_rows), decode.batch)
            self._executor: Executor | GpuTarget = Executor(self.model, self.store)
            self._choose = self.model.choose
        else:
            self.store = NoStore()  # type: ignore[assignment]
            device = device or CupyDevice()
            runs = GpuTarget(target, device, decode, experts, self._pages, max_rows, threads.compute)
            n_near = round(gpu.draft_kv_share * decode.batch) if gpu else 0
            if isinstance(draft, EagleWeights):
                passes = GpuEagle(draft, runs.model, decode, n_near, max_rows, threads.compute)
                self._drafters["eagle"] = EagleDrafter(passes, runs.features, self._pages, draft.spec)
            elif isinstance(draft, CheckpointWeights):
                dense = GpuPasses(draft, device, decode, n_near, max_rows, threads.compute)
                self._drafters["model"] = ModelDrafter(dense, decode.batch)
            self._executor, self._choose = runs, runs.choose
        self._device = device
        self._free_places = list(range(decode.batch))[::-1]
        self._waiting: deque[Sequence] = deque()
        self.live: list[Sequence] = []
        self.finished: list[Sequence] = []
        self.last_trace = Trace()
        self.last_counts: list[int] = []
        self.accept: Callable[[list[int], list[int]], int] = accept
        self.n_preempted = 0
        self._draft_lengths = draft_lengths
        self._window = 0
        self.configure(decode, experts)

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *exc: object) -> None:
        self._executor.idle()
        self.store.close()

    def configure(self, decode: PlanDecode, experts: PlanExperts) -> None:
        """Change draft length, drafter and placement between windows; requests go on where they were."""
        if max_window_rows(decode) > self._max_rows:
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
    def device_bytes(self) -> int:
        """GPU memory taken."""
        return self._device.memory_bytes if self._device else 0

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
            self._waiting.append(Sequence(request, tokens=list(request.prompt)))

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

    def score(self, tokens: Items[int]) -> np.ndarray:
        """Natural log-probability of each of tokens[1:] after those before it, (n - 1,) float64, while no request is live."""
        scores: list[np.ndarray] = []
        self._pages.reserve(0, len(tokens))
        for first in range(0, len(tokens) - 1, self.decode.prefill_chunk_tokens):
            given = np.asarray(tokens[first:-1][: self.decode.prefill_chunk_tokens], np.int32)
            n, rows = len(given), np.arange(len(given))
            self._executor.forward(
                self._window, given, [make_rows(0, [n], [first], self._pages.table[:1])], Trace(self.store.n_slots)
            )
            self._window += 1
            for error in self._executor.failed_rows.values():
                raise error
            logits = np.empty((n, self.spec.vocab), np.float32)
            self.model.choose(rows, logits)
            beyond = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
            scores.append(beyond[rows, tokens[first + 1 : first + 1 + n]] - np.log(np.exp(beyond).sum(axis=1)))
        self._pages.release(0)
        return np.concatenate(scores)

    def pause(self) -> None:
        """Stop reading ahead, so that something else can be measured; the next window begins anew."""
        self._executor.idle()

    def rewind(self) -> None:
        """Take every live request back to the first token after its prompt, to run the same work again."""
        for sequence in self.live:
            sequence.rewind()
            for drafter in self._drafters.values():
                drafter.roll_back(sequence)

    def cancel(self, request_id: str) -> None:
        """Forget one request, waiting or live, between windows."""
        self._waiting = deque(s for s in self._waiting if s.request.request_id != request_id)
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
        lengths = self._reserve()
        decoding = [s for s in self.live if not s.prefilling]
        drafted = self._drafter.propose(decoding, [lengths[s] for s in decoding], trace)
        proposals = dict(zip(decoding, drafted, strict=True))
        chunks = self._prefill_chunks()
        inputs = [[s.tokens[-1], *proposals[s].tokens] if s in proposals else chunks[s] for s in self.live]
        live, micro_batches = self._micro_batches([x for x in zip(self.live, inputs, strict=True) if x[1]])
        tokens = np.concatenate([np.asarray(t, np.int32) for _, t in live])
        contexts = [s.kv_tokens for s, _ in live]
        self.last_counts = [len(t) for _, t in live]
        self._executor.forward(self._window, tokens, micro_batches, trace)
        for drafter in self._drafters.values():
            drafter.see([s for s, _ in live], self.last_counts)

        starts = np.concatenate([[0], np.cumsum([len(t) for _, t in live])])
        self._fail([s for s, _ in live], starts)
        wanted = {s: self._head_rows(s, int(a), int(b)) for (s, _), a, b in zip(live, starts, starts[1:], strict=False)}
        greedy = [s for s in wanted if not s.request.needs_logits]
        n_head = sum(map(len, wanted.values()))
        with trace.run(trace.builder.head(n_head)):
            rows = np.concatenate([np.empty(0, np.int64), *(wanted[s] for s in greedy)])
            chosen = iter(self._choose(rows).tolist() if len(rows) else [])
            answers = {s: [next(chosen) for _ in wanted[s]] for s in greedy}
        with trace.run(trace.builder.verify(n_head)):
            n_emitted = sum(
                self._advance(s, given, wanted[s], proposals.get(s, Proposal([])), answers.get(s)) for s, given in live
            )
        end_s = time.perf_counter()
        prefill_rows = sum(len(c) for c in chunks.values())
        self.last_trace = trace
        self._window += 1
        busy_s, phases_s = self._executor.busy_s(trace)
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
            busy_s={**busy_s, "disk": self.store.busy_s - busy_before},
            phases_s={**phases_s, "wait": max(0.0, end_s - trace.start_s - max(busy_s.values()))},
            experts_used=self._executor.experts_used,
        )

    def _admit(self) -> None:
        while self._waiting and self._free_places:
            sequence, slot = self._waiting[0], self._free_places[-1]
            if not self._pages.reserve(slot, len(sequence.tokens)):
                return
            self._waiting.popleft()
            sequence.slot = self._free_places.pop()
            self.live.append(sequence)

    def _reserve(self) -> dict[Sequence, int]:
        """Draft lengths of this window, and the pages it fills, oldest request first: where none are left the youngest go."""
        plan_length = self.decode.draft_length
        table_length = self._table_length()
        lengths: dict[Sequence, int] = {}
        for sequence in list(self.live):
            if sequence not in self.live or sequence.prefilling:
                continue  # a prompt's pages came with its place
            length = table_length if sequence.request.sampling.greedy else plan_length
            lengths[sequence] = max(0, min(length, sequence.n_remaining - 1))
            while not self._pages.reserve(sequence.slot, len(sequence.tokens) + lengths[sequence]):
                self._preempt(self.live[-1])
                if sequence.slot < 0:
                    break
        return lengths

    def _table_length(self) -> int:
        """The table's draft length nearest to this window's requests, as far as it was planned for; else the plan's."""
        decode, n_live = self.decode, len(self.live)
        if not self._draft_lengths or decode.draft_length == 0 or not n_live:
            return decode.draft_length
        context = fmean(len(s.tokens) for s in self.live)
        nearest = min(
            self._draft_lengths, key=lambda at: abs(log(at.live / n_live)) + abs(log(at.context_tokens / context))
        )
        return min(nearest.draft_length, decode.batch * (decode.draft_length + 1) // n_live - 1)

    def _preempt(self, sequence: Sequence) -> None:
        """Set a request aside until there are pages: its tokens stay, its keys and values are computed anew."""
        self._leave(sequence)
        sequence.slot, sequence.kv_tokens = -1, 0
        self._waiting.appendleft(sequence)
        self.n_preempted += 1

    def _leave(self, sequence: Sequence) -> None:
        self.live.remove(sequence)
        self._pages.release(sequence.slot)
        for drafter in self._drafters.values():
            drafter.forget(sequence)
        self._free_places.append(sequence.slot)

    def _retire(self, sequence: Sequence) -> None:
        self._leave(sequence)
        self.finished.append(sequence)

    def _fail(self, live: Items[Sequence], starts: np.ndarray) -> None:
        """Give up the requests, from rows starts[i] on, that an expert which cannot be read was computed for."""
        for row, error in self._executor.failed_rows.items():
            sequence = live[int(np.searchsorted(starts, row, side="right")) - 1]
            sequence.error, sequence.finish_reason = error, "error"

    def _prefill_chunks(self) -> dict[Sequence, list[int]]:
        """Tokens to prefill that ride along in this window, oldest request first."""
        room = self.decode.prefill_chunk_tokens
        chunks = {}
        for sequence in self.live:
            if sequence.prefilling:
                last = min(sequence.kv_tokens + room, sequence.n_prefill)
                chunks[sequence] = sequence.tokens[sequence.kv_tokens : last]
                room -= len(chunks[sequence])
        return chunks

    def _micro_batches(
        self, live: list[tuple[Sequence, list[int]]]
    ) -> tuple[list[tuple[Sequence, list[int]]], list[Rows]]:
        """Groups of requests with about equal rows, in each those first whose pages are in GPU memory; and all in that order."""
        counts = np.array([len(tokens) for _, tokens in live])
        n_parts = min(self.decode.micro_batches, len(live))
        middle = (np.cumsum(counts) - counts / 2) / counts.sum()
        parts = np.minimum((middle * n_parts).astype(int), n_parts - 1)
        batches, ordered, first = [], [], 0
        for part in np.unique(parts):
            members = sorted((live[i] for i in np.flatnonzero(parts == part)), key=lambda x: not self._is_near(x[0]))
            rows = make_rows(
                first,
                [len(tokens) for _, tokens in members],
                [s.kv_tokens for s, _ in members],
                self._pages.table[[s.slot for s, _ in members]],
                sum(self._is_near(s) for s, _ in members),
            )
            batches.append(rows)
            ordered += members
            first = rows.last
        return ordered, batches

    def _is_near(self, sequence: Sequence) -> bool:
        return sequence.slot < self._pages.near_slots

    @staticmethod
    def _head_rows(sequence: Sequence, first: int, last: int) -> np.ndarray:
        """Rows whose next token matters: all while decoding, the last of a finished prompt, none before."""
        if sequence.error:
            return np.arange(0)
        if not sequence.prefilling:
            return np.arange(first, last)
        complete = not sequence.n_output and sequence.kv_tokens + last - first == sequence.n_prefill
        return np.arange(last - complete, last)

    def _advance(
        self, sequence: Sequence, given: list[int], rows: np.ndarray, proposal: Proposal, answers: list[int] | None
    ) -> int:
        """Take the accepted tokens and the target's own next one; returns tokens emitted.

        `rows` of the final states tell what may follow; `answers`: the likeliest, where nobody asked for more.
        """
        emitted = 0
        if sequence.prefilling:
            sequence.kv_tokens += len(given)
        if len(rows):
            logits = None
            if answers is None:
                logits = np.empty((len(rows), self.spec.vocab), np.float32)
                answers = self._choose(rows, logits).tolist()
            emitted = sequence.emit(self._verify(sequence, proposal, answers, logits), logits)
            sequence.kv_tokens = len(sequence.tokens) - 1
        self._drafter.roll_back(sequence)
        if sequence.finish_reason:
            self._retire(sequence)
        return emitted

    def _verify(
        self, sequence: Sequence, proposal: Proposal, answers: list[int], logits: np.ndarray | None
    ) -> list[int]:
        """The tokens that stand and the one after them."""
        drafted, sampling = proposal.tokens, sequence.request.sampling
        if logits is None or sampling.greedy:
            n_accepted = self.accept(drafted, answers) if sequence.n_output else 0
            return [*drafted[:n_accepted], answers[n_accepted]]
        p, uniform = distribution(logits, sampling), uniforms(sampling.seed, len(sequence.tokens), len(logits))
        n_stand, token = verify_sampled(p, proposal.q, np.asarray(drafted, np.int64), uniform)
        return [*drafted[: int(n_stand)], int(token)]


def engine_settings(plan: Plan, opened: Opened, disk_limit_gb_per_s: float | None = None) -> dict[str, Any]:
    """What a plan says of its Engine; a limit of the disk lane given here goes before the plan's."""
    return {
        "target": opened.target,
        "draft": opened.draft,
        "decode": plan.decode,
        "experts": plan.experts,
        "threads": plan.threads,
        "disk_limit_gb_per_s": disk_limit_gb_per_s or plan.limits.disk_limit_gb_per_s,
        "draft_lengths": plan.outlook.draft_lengths if plan.outlook else (),
        "gpu": plan.gpu,
    }


def open_engine(plan: Plan, opened: Opened, disk_limit_gb_per_s: float | None = None) -> Engine:
    """The engine of a plan."""
    return Engine(**engine_settings(plan, opened, disk_limit_gb_per_s))
