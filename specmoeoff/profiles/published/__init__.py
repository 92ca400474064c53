"""Numbers others published, one CSV per source, each row with its setting, unit and what is included in it."""

import csv
from importlib.resources import files
from typing import NamedTuple


class Row(NamedTuple):
    """Lengths and batch as the source has them: `324x14` is a micro-batch of 324, 14 times; "" where it says nothing."""

    source: str
    where: str
    setting: str
    model: str
    system: str
    prompt_tokens: str
    output_tokens: str
    batch: str
    draft_length: str
    quantity: str
    value: float
    unit: str
    includes: str


def names() -> list[str]:
    """The sources."""
    return sorted(e.name.removesuffix(".csv") for e in files(__package__).iterdir() if e.name.endswith(".csv"))


def rows(name: str) -> list[Row]:
    """Of one source."""
    text = files(__package__).joinpath(f"{name}.csv").read_text(encoding="utf-8")
    return [Row(**{**row, "value": float(row["value"])}) for row in csv.DictReader(text.splitlines())]  # type: ignore[arg-type]
