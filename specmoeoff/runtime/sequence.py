"""One request while it is alive."""

from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from specmoeoff.runtime.sampling import GREEDY, Sampling


@dataclass(frozen=True)
class Request:
    """Prompt tokens, how to sample, and when to stop.

    `ends` looks at the output so far after every token: stop strings live there, since only text has them.
    `top_logprobs`: how many likely tokens to tell beside each chosen one's log-probability; None tells nothing.
    """

    request_id: str
    prompt: tuple[int, ...]
    max_tokens: int
    stop_ids: tuple[int, ...] = ()
    sampling: Sampling = GREEDY
    top_logprobs: int | None = None
    ends: Callable[[list[int]], bool] | None = None

    @property
    def needs_logits(self) -> bool:
        return not self.sampling.greedy or self.top_logprobs is not None


class TokenLogprob(NamedTuple):
    """A token's natural log-probability under the model itself (temperature 1, nothing filtered), and the likeliest tokens'."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(eq=False)
class Sequence:
    """`tokens` are prompt and output; the first `kv_tokens` of them are in the target's KV cache.

    While decoding, exactly the last token is not. `slot` is its place in the batch, -1 while it has none.
    """

    request: Request
    slot: int = -1
    tokens: list[int] = field(default_factory=list)
    kv_tokens: int = 0
    finish_reason: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    error: Exception | None = None

    @property
    def output(self) -> list[int]:
        return self.tokens[len(self.request.prompt) :]

    @property
    def n_output(self) -> int:
        return len(self.tokens) - len(self.request.prompt)

    @property
    def n_prefill(self) -> int:
        """Tokens to go through the target before decoding: the prompt; after a preemption the output too but its last."""
        return len(self.tokens) - (self.n_output > 0)

    @property
    def prefilling(self) -> bool:
        return self.kv_tokens < self.n_prefill

    @property
    def n_remaining(self) -> int:
        return self.request.max_tokens - self.n_output

    def emit(self, tokens: Items[int], logits: np.ndarray | None = None) -> int:
        """Append until something ends the request; returns how many were taken. logits (>= len(tokens), vocab) if at hand."""
        for row, token in enumerate(tokens):
            self.tokens.append(token)
            if logits is not None and self.request.top_logprobs is not None:
                self.logprobs.append(_logprob(logits[row], token, self.request.top_logprobs))
            if token in self.request.stop_ids or (self.request.ends and self.request.ends(self.output)):
                self.finish_reason = "stop"
            elif self.n_remaining == 0:
                self.finish_reason = "length"
            if self.finish_reason:
                return row + 1
        return len(tokens)

    def rewind(self) -> None:
        """Back to the first token after the prompt."""
        n_prompt = len(self.request.prompt)
        del self.tokens[n_prompt + 1 :], self.logprobs[1:]
        self.kv_tokens = min(self.kv_tokens, n_prompt)


def _logprob(logits: np.ndarray, token: int, n_top: int) -> TokenLogprob:
    values = logits.astype(np.float64)
    total = values.max() + np.log(np.exp(values - values.max()).sum())
    top = np.argsort(-values, kind="stable")[:n_top]
    return TokenLogprob(token, float(values[token] - total), tuple((int(t), float(values[t] - total)) for t in top))
