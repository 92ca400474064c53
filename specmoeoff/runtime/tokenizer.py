"""Text to tokens and back: tokenizer.json, and the chat template of tokenizer_config.json in a sandbox."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from specmoeoff.errors import BadInput
from specmoeoff.files import load_json, read_text


class Tokenizer:
    """The tokenizer of a checkpoint folder."""

    def __init__(self, folder: Path | str) -> None:
        from tokenizers import Tokenizer as FastTokenizer

        folder = Path(folder)
        self._folder = folder.parent if folder.is_file() else folder  # beside a GGUF file
        path = self._folder / "tokenizer.json"
        if not path.exists():
            raise BadInput(f"{path}: no such tokenizer; download it with the rest of the checkpoint.")
        text = read_text(path, "tokenizer")
        try:
            self._tokenizer = FastTokenizer.from_str(text)
        except Exception as error:  # the library raises plain Exception
            raise BadInput(f"{path}: not a tokenizer: {error}; download the file again.") from None
        self._config = self._read_config()

    def _read_config(self) -> dict[str, Any]:
        path = self._folder / "tokenizer_config.json"
        if not path.is_file():
            return {}
        try:
            data = load_json(read_text(path, "tokenizer configuration"))
        except ValueError as error:
            raise BadInput(f"{path}: not valid JSON: {error}; download the file again.") from None
        return data if isinstance(data, dict) else {}

    def _special(self, name: str) -> str:
        token = self._config.get(name)
        text = token.get("content") if isinstance(token, dict) else token
        return text if isinstance(text, str) else ""

    @property
    def has_chat_template(self) -> bool:
        """Whether `encode_chat` can be asked."""
        return (self._folder / "chat_template.jinja").is_file() or isinstance(self._config.get("chat_template"), str)

    def _template(self) -> str:
        path = self._folder / "chat_template.jinja"
        if path.is_file():
            return read_text(path, "chat template")
        template = self._config.get("chat_template")
        if not isinstance(template, str):
            raise BadInput(f"{self._folder}: the model has no chat template; send `prompt` instead of `messages`.")
        return template

    def encode(self, text: str) -> list[int]:
        """Tokens of a text, special tokens in it recognised, none added."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def encode_chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Tokens of a conversation, up to where the assistant is to speak."""
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        def refuse(message: str) -> None:
            raise TemplateError(message)

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = refuse
        try:
            text = environment.from_string(self._template()).render(
                messages=messages,
                add_generation_prompt=True,
                bos_token=self._special("bos_token"),
                eos_token=self._special("eos_token"),
            )
        except Exception as error:  # a template is a program of the checkpoint's author and may fail in any way
            raise BadInput(f"{self._folder}: the chat template refuses the messages: {error}.") from None
        return self.encode(text)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens, special ones left out."""
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True))

    def token_text(self, token: int) -> str:
        """The text of one token by itself, special ones included."""
        return str(self._tokenizer.decode([token], skip_special_tokens=False))
