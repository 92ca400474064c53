"""A short measured run of a plan, for the tuner's second opinion: `python -m specmoeoff.runtime.trial plan.toml`."""

import json
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import cycle
from pathlib import Path
from statistics import fmean, median
from tempfile import TemporaryDirectory

from specmoeoff.demo import prompts_path
from specmoeoff.errors import BadInput, SpecMoEOffError, TrialFailed
from specmoeoff.estimate.speculation import expected_tokens
from specmoeoff.runtime.batch_files import read_batch, to_request
from specmoeoff.runtime.engine import Engine
from specmoeoff.runtime.loading import Opened, open_plan
from specmoeoff.runtime.sequence import Request
from specmoeoff.runtime.verify import accept
from specmoeoff.specs.plan import Plan, PlanDecode
from specmoeoff.specs.workload import Acceptance

N_GROUPS = 4


@dataclass(frozen=True)
class Trial:
    """Median seconds of a window with every place decoding, and mean tokens of a request's round over so many rounds."""

    window_s: float
    tokens_per_round: float
    n_rounds: int

    def tokens_per_s(self, decode: PlanDecode, known: Acceptance | None = None) -> float:
        """`known` rounds count beside the trial's own: which rounds happen to be tried makes more of a difference than most
        settings do."""
        tokens = self.tokens_per_round
        if known and 0 < decode.draft_length <= len(known.conditional):
            expected = expected_tokens(known.conditional, decode.draft_length, known.of_text)
            n_all = self.n_rounds + known.n_rounds
            tokens = (self.n_rounds * tokens + known.n_rounds * expected) / n_all
        return decode.batch * tokens / self.window_s


def run_trial(plan: Plan, opened: Opened, n_windows: int = 6) -> Trial:
    """Windows in which each request is another of the shipped prompts.

    Equal requests would all use the same experts, and requests that begin their answers together nearly so: they begin in
    groups, two windows apart, with the disk uncapped until all have. Their rounds before all have begun count as rounds.
    """
    decode, limit = plan.decode, plan.limits.disk_limit_gb_per_s
    requests = []
    for i, prompt in zip(range(decode.batch), cycle(_prompts(opened)), strict=False):
        begun = prompt[-(decode.context_tokens // 2) :]
        requests.append(Request(str(i), begun, decode.context_tokens - len(begun)))
    with Engine(opened.target, opened.draft, decode, plan.experts, plan.threads, gpu=plan.gpu) as engine:
        accepted: list[int] = []

        def counted(drafted: list[int], answers: list[int]) -> int:
            accepted.append(accept(drafted, answers))
            return accepted[-1]

        engine.accept = counted
        for first in range(0, decode.batch, size := -(-decode.batch // N_GROUPS)):
            engine.submit(requests[first : first + size])
            while len(engine.live) < min(first + size, decode.batch) or any(s.prefilling for s in engine.live):
                engine.step("warm-up")
                if engine.finished:
                    raise BadInput(
                        f"a context of {decode.context_tokens} tokens ends while requests begin; raise --context."
                    )
            engine.step("warm-up")
        engine.store.bucket.gb_per_s = limit
        engine.step("warm-up")
        seconds = [engine.step("trial").duration_s for _ in range(n_windows) if len(engine.live) == decode.batch]
    if not seconds:
        raise BadInput(
            f"a context of {decode.context_tokens} tokens ends before one measured window of k = {decode.draft_length}; raise --context."
        )
    return Trial(median(seconds), 1.0 + fmean(accepted), len(accepted))


def _prompts(opened: Opened) -> list[tuple[int, ...]]:
    """As chats where the model has a template for them."""
    lines, tokenizer = read_batch(prompts_path()), opened.tokenizer
    if tokenizer.has_chat_template:
        return [to_request(line, tokenizer, opened.target.spec).prompt for line in lines]
    return [tuple(tokenizer.encode(str(m.content))) for line in lines for m in line.body.messages or ()]


def rate_in_own_process(
    plan: Plan, acceptance: Mapping[str, Acceptance] | None = None, timeout_s: float = 600.0
) -> float:
    """Tokens per second of `run_trial` in a process that may crash or be killed for its memory. Raises TrialFailed."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "plan.toml"
        plan.save(path)
        command = [sys.executable, "-m", "specmoeoff.runtime.trial", str(path)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout_s)
        except subprocess.TimeoutExpired:
            raise TrialFailed("timeout", f"not done after {timeout_s:g} s.") from None
    if done.returncode == 0:
        trial = Trial(**json.loads(done.stdout))
        return trial.tokens_per_s(plan.decode, (acceptance or {}).get(plan.decode.drafter))
    last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    if done.returncode == -signal.SIGKILL or "MemoryError" in last:
        raise TrialFailed("out_of_memory", last)
    raise TrialFailed("crash" if "Traceback" in done.stderr or done.returncode < 0 else "constraint", last)


def main() -> None:
    """Print what a trial of the plan named found."""
    with suppress(OSError):  # where memory runs out the kernel shall end this process, not the tuner
        Path("/proc/self/oom_score_adj").write_text("1000")
    try:
        plan = Plan.load(sys.argv[1])
        print(json.dumps(asdict(run_trial(plan, open_plan(plan)))))
    except SpecMoEOffError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
