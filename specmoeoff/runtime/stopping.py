"""Stop strings: looked for in decoded text, since they begin and end anywhere in tokens."""

from dataclasses import dataclass

from specmoeoff.runtime.tokenizer import Tokenizer


@dataclass(frozen=True)
class StopText:
    """Whether an output's text holds one of `stops`, and that text without it."""

    tokenizer: Tokenizer
    stops: tuple[str, ...]

    def __call__(self, output: list[int]) -> bool:
        text = self.tokenizer.decode(output)
        return any(stop in text for stop in self.stops)

    def cut(self, text: str) -> str:
        """Up to the first stop string."""
        return text[: min((at for stop in self.stops if (at := text.find(stop)) >= 0), default=len(text))]
