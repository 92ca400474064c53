"""Text in pieces is the text as a whole, whatever bytes the tokens are."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from specmoeoff.runtime.stopping import StopText
from specmoeoff.runtime.text_stream import TextStream
from specmoeoff.runtime.tokenizer import Tokenizer

TEXTS = [
    "",
    "plain words",
    "日本語テキスト",
    "naïve café ☕",
    "👩‍👩‍👧‍👦 family 🏳️‍🌈",
    "\ufffd and \ufffd\ufffd",
    "ends 🙂",
]


def pieces_of(tokenizer: Tokenizer, tokens: list[int], width: int) -> list[str]:
    stream = TextStream(tokenizer)
    pieces = [stream.push(tokens[i : i + width]) for i in range(0, len(tokens), width)]
    return [*pieces, stream.finish(tokenizer.decode(tokens))]


@pytest.mark.parametrize("width", [1, 2, 5])
@pytest.mark.parametrize("text", TEXTS)
def test_no_character_is_told_before_its_last_byte(speaking_model: Path, text: str, width: int) -> None:
    tokenizer = Tokenizer(speaking_model)
    tokens = tokenizer.encode(text)
    pieces = pieces_of(tokenizer, tokens, width)
    assert "".join(pieces) == text
    assert "".join(pieces).count("\ufffd") == text.count("\ufffd")
    if text.isascii() and width == 1:
        assert pieces[:-1] == list(text)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tokens=st.lists(st.integers(0, 258), max_size=60), width=st.integers(1, 7))
def test_any_bytes_in_pieces_are_the_whole_text(speaking_model: Path, tokens: list[int], width: int) -> None:
    tokenizer = Tokenizer(speaking_model)
    assert "".join(pieces_of(tokenizer, tokens, width)) == tokenizer.decode(tokens)


def test_a_word_tokenizer_keeps_its_spaces(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Fast
    from tokenizers import decoders, models, pre_tokenizers

    fast = Fast(models.WordLevel({"▁a": 0, "▁b": 1, "?": 2}, unk_token="?"))
    fast.pre_tokenizer, fast.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    fast.save(str(tmp_path / "tokenizer.json"))
    assert pieces_of(Tokenizer(tmp_path), [0, 1, 1, 0], 1) == ["a", " b", " b", " a", ""]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text("ab", max_size=30), stops=st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3))
def test_nothing_of_a_stop_string_is_told(speaking_model: Path, text: str, stops: list[str]) -> None:
    tokenizer = Tokenizer(speaking_model)
    ends = StopText(tokenizer, tuple(stops))
    stream, told, tokens = TextStream(tokenizer, tuple(stops)), "", tokenizer.encode(text)
    for n in range(1, len(tokens) + 1):
        if ends(tokens[:n]):
            tokens = tokens[:n]
            break
        told += stream.push(tokens[n - 1 : n])
    whole = ends.cut(tokenizer.decode(tokens))
    assert whole.startswith(told)
    assert told + stream.finish(whole) == whole
