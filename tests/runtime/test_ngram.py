"""The n-gram drafter finds what a search through the whole text would."""

import numpy as np
import pytest

from specmoeoff.runtime.drafters.ngram import LONGEST, SHORTEST, NgramDrafter, NgramIndex
from specmoeoff.runtime.sequence import Request, Sequence
from specmoeoff.runtime.trace import Trace


def search(tokens: list[int], length: int) -> list[int]:
    """By brute force: what follows the latest earlier occurrence of the longest suffix."""
    for n in range(LONGEST, SHORTEST - 1, -1):
        for start in range(len(tokens) - n - 1, -1, -1):
            if tokens[start : start + n] == tokens[-n:]:
                return tokens[start + n : start + n + length]
    return []


def test_the_latest_match_is_continued() -> None:
    assert NgramIndex().lookup([1, 2, 3, 9, 1, 2, 3, 4, 1, 2, 3], 3) == [4, 1, 2]
    assert NgramIndex().lookup([1, 2, 3], 3) == []
    assert NgramIndex().lookup([], 3) == []


@pytest.mark.parametrize("vocab", [2, 5, 40])
def test_the_index_equals_a_search_however_the_text_grows(vocab: int) -> None:
    rng = np.random.default_rng(vocab)
    for _ in range(20):
        text, index = rng.integers(0, vocab, 300).tolist(), NgramIndex()
        n = int(rng.integers(1, 40))
        while n <= len(text):
            assert index.lookup(text[:n], 6) == search(text[:n], 6)
            n += int(rng.integers(1, 9))


def test_places_are_kept_apart_and_taken_back() -> None:
    """Two requests of one batch; one is rewound and goes another way, the other leaves its place to a third."""
    rng, drafter = np.random.default_rng(0), NgramDrafter()

    def sequence(slot: int) -> Sequence:
        prompt = tuple(rng.integers(0, 3, 30).tolist())
        return Sequence(Request("r", prompt, 100), slot, list(prompt))

    def check(*live: Sequence) -> None:
        found = [p.tokens for p in drafter.propose(live, [5] * len(live), Trace())]
        assert found == [search(s.tokens, 5) for s in live]

    first, second, third = sequence(0), sequence(1), sequence(1)
    check(first, second)
    for s in (first, second):
        s.tokens += rng.integers(0, 3, 20).tolist()
    check(first, second)
    first.rewind()
    drafter.roll_back(first)
    first.tokens += rng.integers(0, 3, 9).tolist()
    check(first, second)
    drafter.forget(second)
    check(first, third)
