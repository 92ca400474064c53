"""A short measured run of a plan, for the tuner's second opinion: `python -m specmoeoff.runtime.trial plan.toml`."""

import signal
import subprocess
import sys
from contextlib import suppress
from itertools import cycle
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from specmoeoff.demo import prompts_path
from specmoeoff.errors import BadInput, SpecMoEOffError, TrialFailed
from specmoeoff.runtime.batch_files import read_batch, to_request
from specmoeoff.runtime.engine import Engine
from specmoeoff.runtime.loading import Opened, open_plan
from specmoeoff.runtime.sequence import Request
from specmoeoff.specs.plan import Plan

N_GROUPS = 4


def decode_rate(plan: Plan, opened: Opened, n_windows: int = 6) -> float:
    """Median tokens per second over windows with every place decoding, each request another of the shipped prompts.

    Equal requests would all use the same experts, and requests that begin their answers together nearly so: they begin in
    groups, two windows apart, with the disk uncapped until all have.
    """
    decode, limit = plan.decode, plan.limits.disk_limit_gb_per_s
    requests = []
    for i, prompt in zip(range(decode.batch), cycle(_prompts(opened)), strict=False):
        begun = prompt[-(decode.context_tokens // 2) :]
        requests.append(Request(str(i), begun, decode.context_tokens - len(begun)))
    with Engine(opened.target, opened.draft, decode, plan.experts, plan.threads, gpu=plan.gpu) as engine:
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
        rates = [(w := engine.step("trial")).tokens / w.duration_s for _ in range(n_windows) if engine.live]
    if not rates:
        raise BadInput(
            f"a context of {decode.context_tokens} tokens ends before one measured window of k = {decode.draft_length}; raise --context."
        )
    return median(rates)


def _prompts(opened: Opened) -> list[tuple[int, ...]]:
    """As chats where the model has a template for them."""
    lines, tokenizer = read_batch(prompts_path()), opened.tokenizer
    if tokenizer.has_chat_template:
        return [to_request(line, tokenizer, opened.target.spec).prompt for line in lines]
    return [tuple(tokenizer.encode(str(m.content))) for line in lines for m in line.body.messages or ()]


def rate_in_own_process(plan: Plan, timeout_s: float = 600.0) -> float:
    """`decode_rate` in a process that may crash or be killed for its memory. Raises TrialFailed."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "plan.toml"
        plan.save(path)
        command = [sys.executable, "-m", "specmoeoff.runtime.trial", str(path)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout_s)
        except subprocess.TimeoutExpired:
            raise TrialFailed("timeout", f"not done after {timeout_s:g} s.") from None
    if done.returncode == 0:
        return float(done.stdout)
    last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    if done.returncode == -signal.SIGKILL or "MemoryError" in last:
        raise TrialFailed("out_of_memory", last)
    raise TrialFailed("crash" if "Traceback" in done.stderr or done.returncode < 0 else "constraint", last)


def main() -> None:
    """Print the rate of the plan named."""
    with suppress(OSError):  # where memory runs out the kernel shall end this process, not the tuner
        Path("/proc/self/oom_score_adj").write_text("1000")
    try:
        plan = Plan.load(sys.argv[1])
        print(decode_rate(plan, open_plan(plan)))
    except SpecMoEOffError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
