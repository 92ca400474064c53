"""One request while it is alive."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Request:
    """Prompt tokens and when to stop."""

    request_id: str
    prompt: tuple[int, ...]
    max_tokens: int
    stop_ids: tuple[int, ...] = ()


@dataclass(eq=False)
class Sequence:
    """`tokens` are prompt and output; the first `kv_tokens` of them are in the target's KV cache.

    While decoding, exactly the last token is not.
    """

    request: Request
    slot: int
    tokens: list[int] = field(default_factory=list)
    kv_tokens: int = 0
    finish_reason: str = ""

    @property
    def output(self) -> list[int]:
        return self.tokens[len(self.request.prompt) :]

    @property
    def n_output(self) -> int:
        return len(self.tokens) - len(self.request.prompt)

    @property
    def prefilling(self) -> bool:
        return self.kv_tokens < len(self.request.prompt)

    @property
    def n_remaining(self) -> int:
        return self.request.max_tokens - self.n_output

    def emit(self, tokens: list[int]) -> int:
        """Append until a stop token or the length limit; returns how many were taken."""
        for count, token in enumerate(tokens, 1):
            self.tokens.append(token)
            if token in self.request.stop_ids:
                self.finish_reason = "stop"
            elif self.n_remaining == 0:
                self.finish_reason = "length"
            if self.finish_reason:
                return count
        return len(tokens)
