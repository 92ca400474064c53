"""A short measured run of a plan, for the tuner's second opinion."""

from statistics import median

from specmoeoff.errors import BadInput
from specmoeoff.runtime.engine import Engine
from specmoeoff.runtime.loading import Opened
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
