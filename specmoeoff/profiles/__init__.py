"""Shipped facts: machines as measured or as their datasheets state them, shapes of models, and workloads. A name stands for its file."""

from importlib.resources import files
from pathlib import Path
from typing import Literal

from specmoeoff.errors import BadInput

Kind = Literal["machines", "models", "workloads"]


def names(kind: Kind) -> list[str]:
    """What is shipped."""
    return sorted(Path(str(entry)).stem for entry in files(__package__).joinpath(kind).iterdir() if entry.is_file())


def find(kind: Kind, given: str) -> Path:
    """The file a person named, else the shipped one of that name."""
    if Path(given).exists():
        return Path(given)
    if given in names(kind):
        return Path(str(files(__package__).joinpath(kind, f"{given}.json")))
    raise BadInput(f"{given}: no such file, and no shipped name; shipped {kind} are {', '.join(names(kind))}.")
