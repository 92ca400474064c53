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
from specmoeoff.runtime.batch_files import read_batch
from specmoeoff.runtime.engine import Engine
from specmoeoff.runtime.loading import Opened, open_plan
from specmoeoff.runtime.sequence import Request
from specmoeoff.specs.plan import Plan


def decode_rate(plan: Plan, opened: Opened, n_windows: int = 6) -> float:
    """Median tokens per second over windows with every place decoding, each request another text.

    Equal requests would all use the same experts, and requests that begin their answers together nearly so: each goes on
    from the middle of the shipped prompts' texts.
    """
    decode, limit = plan.decode, plan.limits.disk_limit_gb_per_s
    texts = [str(line.body.messages[-1].content) for line in read_batch(prompts_path()) if line.body.messages]
    longest = decode.context_tokens // 2
    tokens = [tuple(opened.tokenizer.encode(text)) for text in texts]
    prompts = [t[: min(len(t) // 2 + i // len(tokens), longest)] for i, t in zip(range(decode.batch), cycle(tokens))]
    if longest < 1:
        raise BadInput(f"--measure needs a context of at least 2 tokens, not {decode.context_tokens}.")
    with Engine(opened.target, opened.draft, decode, plan.experts, plan.threads, limit) as engine:
        engine.submit(Request(str(i), p, decode.context_tokens - len(p)) for i, p in enumerate(prompts))
        while any(s.prefilling for s in engine.live) or len(engine.live) < decode.batch:
            engine.step("warm-up")
        engine.step("warm-up")
        rates = [(w := engine.step("trial")).tokens / w.duration_s for _ in range(n_windows) if engine.live]
    if not rates:
        raise BadInput(
            f"a context of {decode.context_tokens} tokens ends before one measured window of k = {decode.draft_length}; raise --context."
        )
    return median(rates)


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
