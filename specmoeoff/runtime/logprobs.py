"""Log-probabilities in the shapes of OpenAI's two answers."""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from specmoeoff.runtime.sequence import TokenLogprob
from specmoeoff.runtime.tokenizer import Tokenizer


def _entry(token: int, logprob: float, tokenizer: Tokenizer) -> dict[str, Any]:
    text = tokenizer.token_text(token)
    # part of a character has no text, and its bytes are the tokenizer's secret
    return {"token": text, "logprob": logprob, "bytes": None if "\ufffd" in text else list(text.encode())}


def chat_logprobs(told: Sequence[TokenLogprob], tokenizer: Tokenizer) -> dict[str, Any]:
    """As in a chat completion's choice."""
    content = [
        {
            **_entry(one.token, one.logprob, tokenizer),
            "top_logprobs": [_entry(token, logprob, tokenizer) for token, logprob in one.top],
        }
        for one in told
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(told: Sequence[TokenLogprob], tokenizer: Tokenizer) -> dict[str, Any]:
    """As in a completion's choice."""
    tokens = [tokenizer.token_text(one.token) for one in told]
    return {
        "tokens": tokens,
        "token_logprobs": [one.logprob for one in told],
        "top_logprobs": [{tokenizer.token_text(token): logprob for token, logprob in one.top} for one in told],
        "text_offset": [0, *accumulate(map(len, tokens))][: len(tokens)],
    }
