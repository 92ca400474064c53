"""The demo pair: a real language model made into a Mixture of Experts, and prompts to run it on."""

from importlib.resources import as_file, files
from pathlib import Path


def prompts_path() -> Path:
    """The shipped prompts, OpenAI batch-file lines, code and chat in turn."""
    with as_file(files(__name__) / "prompts.jsonl") as path:
        return path
