"""What all figures share: colours (Okabe and Ito's, safe for the colour-blind), sizes, and what comes with a figure."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Mark:
    """What the page tells of a drawn thing when pointed at, and the groups it can be hidden with."""

    tip: str
    groups: tuple[str, ...]


@dataclass(frozen=True)
class Picture:
    """A figure with its numbers and the sentence it shows. `marks` by id in the SVG."""

    name: str
    caption: str
    figure: "Figure"
    table: "pd.DataFrame"
    marks: dict[str, Mark] = field(default_factory=dict)

    @property
    def groups(self) -> list[str]:
        """In the order drawn."""
        return list(dict.fromkeys(g for mark in self.marks.values() for g in mark.groups))


KINDS = {
    "draft": "#56B4E9",
    "attention": "#E69F00",
    "experts": "#009E73",
    "expert": "#66C2A5",
    "head": "#CC79A7",
    "verify": "#333333",
    "load": "#0072B2",
    "wait": "#DDDDDD",
}
NAMES = {
    "draft": "drafting",
    "attention": "attention",
    "experts": "resident experts",
    "expert": "streamed experts",
    "head": "head",
    "verify": "accepting",
    "load": "reading experts",
    "wait": "waiting for disk",
}
BEFORE, AFTER, MEASURED = "#D55E00", "#009E73", "#0072B2"
CPU, GPU, LINK = "#444444", "#8E4A7C", "#0072B2"


def new_figure(
    width: float = 8.0, height: float = 4.6, rows: int = 1, columns: int = 1, **options: object
) -> "tuple[Figure, list[Axes]]":
    """A figure without pyplot's global state, and its axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **options)  # type: ignore[call-overload]
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=9)
    return figure, list(axes.flat)


def title(axis: "Axes", text: str) -> None:
    """A finding, left above the axes."""
    axis.set_title(text, loc="left", fontsize=11, fontweight="bold")
