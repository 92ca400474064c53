"""Text as its tokens come: a character is told when its last byte is there."""

from collections.abc import Iterable

from specmoeoff.runtime.tokenizer import Tokenizer

INCOMPLETE = "\ufffd"


class TextStream:
    """Pieces that, put together, are the whole text.

    Tokens are decoded together with those told last, since a tokenizer may treat the first of a text differently (after
    text-generation-inference's two offsets).
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._told: list[int] = []
        self._pending: list[int] = []
        self._n_told = 0

    def push(self, tokens: Iterable[int]) -> str:
        """The text that these tokens complete; empty while they end within a character."""
        self._pending += tokens
        before = self._tokenizer.decode(self._told)
        text = self._tokenizer.decode([*self._told, *self._pending])[len(before) :]
        if not text or text.endswith(INCOMPLETE):
            return ""
        self._told, self._pending = self._pending, []
        self._n_told += len(text)
        return text

    def finish(self, whole: str) -> str:
        """What is left of the whole text, though it may be no character."""
        return whole[self._n_told :]
