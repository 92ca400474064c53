"""The shipped prompts are a valid batch file of the promised mix."""

import json

from specmoeoff.demo import prompts_path
from specmoeoff.runtime.batch_files import read_batch


def test_prompts_are_a_batch_file_of_code_and_chat_in_turn() -> None:
    lines = read_batch(prompts_path())
    assert len(lines) == 64
    assert {line.custom_id.split("-")[0] for line in lines[0::2]} == {"code"}
    assert {line.custom_id.split("-")[0] for line in lines[1::2]} == {"chat"}
    assert all(line.body.max_tokens == 64 for line in lines)


def test_prompts_vary_in_length_and_are_all_different() -> None:
    texts = [json.loads(line)["body"]["messages"][0]["content"] for line in prompts_path().read_text().splitlines()]
    assert len(set(texts)) == 64
    n_words = sorted(len(text.split()) for text in texts)
    assert n_words[0] < 15
    assert n_words[-1] > 100


def test_the_quoted_prompts_come_with_their_licence() -> None:
    notice = prompts_path().with_name("NOTICE").read_text()
    assert "HumanEval" in notice
    assert "MIT License" in notice
