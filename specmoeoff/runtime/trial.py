"""A short measured run of a plan, for the tuner's second opinion: `python -m specmoeoff.runtime.trial plan.toml`."""

import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from specmoeoff.errors import BadInput, SpecMoEOffError, TrialFailed
from specmoeoff.runtime.engine import Engine
from specmoeoff.runtime.loading import Opened, open_plan
from specmoeoff.runtime.sequence import Request
from specmoeoff.specs.plan import Plan


def decode_rate(plan: Plan, opened: Opened, n_windows: int = 6) -> float:
    """Median tokens per second over windows with every place decoding."""
    text = "The history of the steam engine begins long before the first railway, with pumps that kept mines dry."
    prompt = tuple(opened.tokenizer.encode(text))
    decode, limit = plan.decode, plan.limits.disk_limit_gb_per_s
    with Engine(opened.target, opened.draft, decode, plan.experts, plan.threads, limit) as engine:
        room = decode.context_tokens - len(prompt)
        if room < 2:
            raise BadInput(
                f"--measure needs a context of at least {len(prompt) + 2} tokens, not {decode.context_tokens}."
            )
        engine.submit(Request(str(i), prompt, room) for i in range(decode.batch))
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
