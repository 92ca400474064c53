"""Text to tokens and back, compared with transformers on the same folder."""

import json
from pathlib import Path

import pytest

from specmoeoff.errors import BadInput
from specmoeoff.runtime.tokenizer import Tokenizer

TEMPLATE = (
    "{% for message in messages %}\n"
    "    {%- if message['role'] not in ['system', 'user', 'assistant'] %}\n"
    "    {{ raise_exception('unknown role ' + message['role']) }}\n"
    "    {%- endif %}\n"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + eos_token + '\n' }}\n"
    "{% endfor %}\n"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Naïve 2+2? 你好 🙂\n\n  ok"}]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A byte-level tokenizer with a few merges, a template and two end tokens."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as FastTokenizer

    symbols = ["<|end|>", "<|im_start|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    merges = [("h", "e"), ("he", "l"), ("Ġ", "t"), ("Ċ", "Ċ")]
    vocab = {token: index for index, token in enumerate([*symbols, *("".join(merge) for merge in merges)])}
    tokenizer = FastTokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True), AddedToken("<|im_start|>", special=True)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": {"content": "<|end|>", "__type": "AddedToken"},
        "chat_template": TEMPLATE,
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 0}))
    return tmp_path


def test_a_chat_becomes_the_tokens_transformers_makes(folder: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast.from_pretrained(folder)
    wanted = theirs.apply_chat_template(CHAT, add_generation_prompt=True)["input_ids"]
    assert Tokenizer(folder).encode_chat(CHAT) == list(wanted)


def test_beside_a_gguf_file_it_is_found(folder: Path) -> None:
    (folder / "model.gguf").write_bytes(b"GGUF")
    assert Tokenizer(folder / "model.gguf").encode_chat(CHAT) == Tokenizer(folder).encode_chat(CHAT)


def test_a_template_in_a_file_of_its_own_wins(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}!")
    tokenizer = Tokenizer(folder)
    assert tokenizer.decode(tokenizer.encode_chat(CHAT)) == "Be brief.!"


def test_text_survives_the_way_there_and_back(folder: Path) -> None:
    tokenizer = Tokenizer(folder)
    text = "hello there\n\n\tnaïve 你好 🙂"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode([1, *tokenizer.encode(text), 0]) == text


def test_a_refusal_of_the_template_is_bad_input(folder: Path) -> None:
    with pytest.raises(BadInput, match="refuses the messages: unknown role tool"):
        Tokenizer(folder).encode_chat([{"role": "tool", "content": "x"}])


def test_a_template_cannot_reach_python(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ ''.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(BadInput, match="chat template"):
        Tokenizer(folder).encode_chat(CHAT)


@pytest.mark.parametrize("template", ["{{ 1 // 0 }}", "{{ messages[0]['content'] + 1 }}", "{% for %}"])
def test_a_template_that_fails_is_bad_input(folder: Path, template: str) -> None:
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(BadInput, match="chat template"):
        Tokenizer(folder).encode_chat(CHAT)


def test_a_special_token_of_another_form_is_empty(folder: Path) -> None:
    config = {"eos_token": {"text": "x"}, "bos_token": 5, "chat_template": "{{ bos_token }}{{ eos_token }}!"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer(folder)
    assert tokenizer.decode(tokenizer.encode_chat(CHAT)) == "!"


@pytest.mark.parametrize("text", ["{", "[" * 200_000, '{"a": ' + "9" * 5000 + "}"])
def test_a_configuration_that_is_not_json_is_named(folder: Path, text: str) -> None:
    (folder / "tokenizer_config.json").write_text(text)
    with pytest.raises(BadInput, match=r"tokenizer_config\.json: not valid JSON"):
        Tokenizer(folder)


def test_a_model_without_template_is_named(folder: Path) -> None:
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(BadInput, match="has no chat template; send `prompt`"):
        Tokenizer(folder).encode_chat(CHAT)


def test_a_missing_or_damaged_tokenizer_is_named(folder: Path) -> None:
    path = folder / "tokenizer.json"
    path.write_text("{}")
    with pytest.raises(BadInput, match=r"tokenizer\.json: not a tokenizer"):
        Tokenizer(folder)
    path.unlink()
    with pytest.raises(BadInput, match=r"tokenizer\.json: no such tokenizer"):
        Tokenizer(folder)
