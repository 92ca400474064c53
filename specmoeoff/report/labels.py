"""Puts labels into a figure so that no two touch: one after the other, each where it hides least, as measured by the renderer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Array = np.ndarray

# Pixels at the figure's own resolution. Other writers measure text a few percent wider or narrower: GAP leaves room for it.
GAP, PAD = 4.0, 1.5
DISTANCES = (3.0, 9.0, 18.0, 32.0, 55.0, 90.0, 140.0, 220.0, 340.0)
ANGLES = 2 * np.pi * np.arange(16) / 16
UNIT = np.stack([np.cos(ANGLES), np.sin(ANGLES)], axis=-1)
LEADER = np.linspace(0.05, 0.95, 12)
LEADER_FROM = 8.0
SCALES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)


@dataclass(frozen=True)
class Label:
    """`anchors`: data coordinates it may stand at, best first. `radius`: points around them that a marker covers.
    `name` becomes its id in the SVG.
    """

    text: str
    anchors: Sequence[tuple[float, float]]
    name: str
    color: str = "#333333"
    size: float = 8.0
    radius: float = 0.0


def place(axis: "Axes", labels: Sequence[Label], avoid: Array) -> None:
    """Draw all labels inside the frame, those given first nearest to their anchors; the layout is final from here on.

    avoid  # (n, 2) data coordinates better not hidden. Ids: label-NAME, its box-NAME, and leader-NAME from a label to its anchor.
    """
    figure = axis.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    for scale in SCALES:
        found = _positions(axis, labels, avoid, scale)
        if found is not None:
            break
    else:
        raise ValueError(f"{len(labels)} labels do not fit into this figure")
    for label, (anchor, corner, far) in zip(labels, found, strict=True):
        drawn = axis.annotate(
            label.text,
            anchor,
            xytext=tuple((corner - axis.transData.transform(anchor)) * 72 / figure.dpi),
            textcoords="offset points",
            fontsize=label.size * scale,
            color=label.color,
            ha="left",
            va="bottom",
            zorder=6,
            bbox={
                "boxstyle": f"square,pad={72 * PAD / figure.dpi / label.size / scale}",
                "fc": "white",
                "ec": "none",
                "alpha": 0.8,
            },
            arrowprops={"arrowstyle": "-", "lw": 0.5, "color": label.color, "shrinkA": 0, "shrinkB": 2}
            if far
            else None,
        )
        drawn.set_gid(f"label-{label.name}")
        drawn.get_bbox_patch().set_gid(f"box-{label.name}")  # type: ignore[union-attr]
        if drawn.arrow_patch:
            drawn.arrow_patch.set_gid(f"leader-{label.name}")


def _positions(
    axis: "Axes", labels: Sequence[Label], avoid: Array, scale: float
) -> list[tuple[tuple[float, float], Array, bool]] | None:
    """Anchor, lower left corner in pixels and whether a leader is needed, of each label; None where one finds no room."""
    frame = np.array(axis.get_window_extent().extents) + GAP * np.array([1, 1, -1, -1])
    hidden, dpi = axis.transData.transform(avoid), axis.figure.dpi
    taken, found = np.empty((0, 4)), []
    # The larger part of each marker; its own label may come near its corners.
    middles = np.array([axis.transData.transform(label.anchors[0]) for label in labels if label.radius]).reshape(-1, 2)
    reach = 0.6 * dpi / 72 * np.array([[label.radius] for label in labels if label.radius]).reshape(-1, 1)
    markers = np.hstack([middles - reach, middles + reach])
    for label in labels:
        size = _size(axis, label, scale)
        anchors = axis.transData.transform(np.asarray(label.anchors, dtype=float))
        # (anchor, distance, direction): the middle of a box that keeps the distance from its anchor
        distances = np.array(DISTANCES) + label.radius * dpi / 72
        away = distances[:, None, None] * UNIT + np.sign(np.round(UNIT, 3)) * size / 2
        middle = (anchors[:, None, None, :] + away).reshape(-1, 2)
        boxes = np.hstack([middle - size / 2, middle + size / 2])
        free = (boxes[:, :2] >= frame[:2]).all(1) & (boxes[:, 2:] <= frame[2:]).all(1)
        free &= ~_meet(boxes, np.vstack([markers, taken]), GAP).any(1)
        if not free.any():
            return None
        which = np.flatnonzero(free)
        at, distance, _ = np.unravel_index(which, (len(anchors), *away.shape[:2]))
        far = np.array(DISTANCES)[distance] > LEADER_FROM
        leaders = anchors[at, None, :] + LEADER[:, None] * (middle[which] - anchors[at])[:, None, :]
        crossed = _meet(np.tile(leaders.reshape(-1, 2), 2), taken, 0.0).any(1).reshape(len(which), -1).any(1) & far
        covered = _meet(boxes[which], np.hstack([hidden, hidden]), 1.0).sum(1)
        best = int(np.argmin(np.array(DISTANCES)[distance] + 4.0 * at + 15.0 * covered + 80.0 * crossed))
        box = boxes[which[best]]
        taken = np.vstack([taken, box])
        if far[best]:
            hidden = np.vstack([hidden, leaders[best]])
        found.append((label.anchors[at[best]], box[:2] + PAD, bool(far[best])))
    return found


def _size(axis: "Axes", label: Label, scale: float) -> Array:
    """Width and height of the label's box in pixels."""
    text = axis.text(0, 0, label.text, fontsize=label.size * scale, transform=None)
    extent = text.get_window_extent()
    text.remove()
    return np.array([extent.width, extent.height]) + 2 * PAD


def _meet(boxes: Array, others: Array, gap: float) -> Array:
    """Which of `boxes` come nearer than `gap` to which of `others`; rows of x0, y0, x1, y1."""
    a, b = boxes[:, None, :], others[None, :, :]
    return np.all((a[..., :2] < b[..., 2:] + gap) & (b[..., :2] < a[..., 2:] + gap), axis=-1)
