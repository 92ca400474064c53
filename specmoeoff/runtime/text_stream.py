"""Text as its tokens come: a character is told when its last byte is there, and nothing that may be a stop string's beginning."""

from collections.abc import Iterable

from specmoeoff.runtime.tokenizer import Tokenizer

INCOMPLETE = "\ufffd"


class TextStream:
    """Pieces that, put together, are the whole text.

    Tokens are decoded together with those told last, since a tokenizer may treat the first of a text differently (after
    text-generation-inference's two offsets).
    """

    def __init__(self, tokenizer: Tokenizer, stops: tuple[str, ...] = ()) -> None:
        self._tokenizer = tokenizer
        self._beginnings = tuple({stop[:n] for stop in stops for n in range(1, len(stop))})
        self._decoded: list[int] = []
        self._pending: list[int] = []
        self._held = ""
        self._n_told = 0

    def push(self, tokens: Iterable[int]) -> str:
        """The text that these tokens complete; they hold no stop string, but may end within one."""
        self._pending += tokens
        before = self._tokenizer.decode(self._decoded)
        text = self._tokenizer.decode([*self._decoded, *self._pending])[len(before) :]
        if not text or text.endswith(INCOMPLETE):
            return ""
        self._decoded, self._pending = self._pending, []
        text = self._held + text
        n_told = len(text) - max((len(b) for b in self._beginnings if text.endswith(b)), default=0)
        self._held = text[n_told:]
        self._n_told += n_told
        return text[:n_told]

    def finish(self, whole: str) -> str:
        """What is left of the whole text, though it may be no character."""
        return whole[self._n_told :]
