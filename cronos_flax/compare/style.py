"""The look of all pictures: one palette that colour-blind readers can tell apart, quiet axes, labels at line ends."""

import io
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, NullLocator
from PIL import Image

from cronos_flax._head.files import replace

OURS, OTHER, QUIET = "#0072B2", "#D55E00", "0.72"  # the reference method, the method of a panel, all others
# Okabe and Ito, without the blue of the reference; yellow is darkened for white paper.
COLORS = ("#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#A89A00", "#7F7F7F", "#8C510A")
MARKERS = "osD^vPX<>"

_CONNECTOR = {"arrowstyle": "-", "linewidth": 0.6, "shrinkA": 1, "shrinkB": 2, "relpos": (0, 0.5)}
_LEAST_ERROR = 0.1  # %, of a logarithmic axis

_STYLE: Any = {
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.labelsize": 10,
    "axes.edgecolor": "0.35",
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "0.9",
    "grid.linewidth": 0.7,
    "xtick.color": "0.35",
    "ytick.color": "0.35",
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.6,
}


class Label(NamedTuple):
    """The end of a line, and the text to write beside it."""

    x: float
    y: float
    text: str
    color: str
    bold: bool = False


@contextmanager
def styled(width: float, height: float) -> Iterator[Figure]:
    """A figure in this style, in inches; artists must be made inside the context."""
    with matplotlib.rc_context(_STYLE):
        yield Figure(figsize=(width, height), layout="constrained")


def save(figure: Figure, path: Path, dpi: int = 150) -> None:
    """Save a figure as PNG with a palette of 256 colours, a third of the size."""
    with io.BytesIO() as buffer, io.BytesIO() as small, warnings.catch_warnings():
        # Very short runs have long numbers below a narrow panel; it is saved as it is.
        warnings.filterwarnings("ignore", "constrained_layout not applied")
        figure.savefig(buffer, dpi=dpi, format="png")
        Image.open(buffer).convert("RGB").quantize(256).save(small, format="png", optimize=True)
        replace(path, small.getvalue())


def log_axis(ax: Axes, low: float, high: float) -> None:
    """A logarithmic x axis from the one to the other, with plain numbers at 1, 2, 5, 10, … or, of many, at 1 and 3."""
    ax.set_xscale("log")
    if low < high:
        ax.set_xlim(low, high)
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 40 * low else (1, 3) if high < 400 * low else (1,)))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.xaxis.set_minor_formatter(NullFormatter())


def error_axis(ax: Axes) -> None:
    """A y axis of accuracies in % on which equal distances are equal ratios of the error, 100 minus the accuracy."""

    def forward(accuracy: np.ndarray) -> np.ndarray:
        return -np.log(np.maximum(100 - accuracy, _LEAST_ERROR))

    ax.set_yscale("function", functions=(forward, lambda value: 100 - np.exp(-value)))
    ax.yaxis.set_major_locator(MaxNLocator(7, steps=(1, 2, 5, 10)))


def label_ends(ax: Axes, labels: Sequence[Label], size: float = 9) -> None:
    """Write a label right of the axes for each line, as near to its end as the others allow.

    Limits of the axes must be final.
    """
    if not labels:
        return
    figure = ax.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()
    box = ax.get_window_extent()
    points = figure.dpi / 72
    gap, beside = 1.2 * size * points / box.height, 1 + 1.5 * size * points / box.width
    to_axes = ax.transData + ax.transAxes.inverted()
    ends = np.clip([to_axes.transform((label.x, label.y))[1] for label in labels], 0, 1)
    for label, place in zip(labels, spaced(ends, gap), strict=True):
        ax.annotate(
            label.text,
            (label.x, label.y),
            (beside, float(place)),
            textcoords="axes fraction",
            va="center",
            color=label.color,
            fontsize=size,
            fontweight="bold" if label.bold else "normal",
            arrowprops={**_CONNECTOR, "color": label.color},
            annotation_clip=False,
        )


def spaced(places: Sequence[float] | np.ndarray, gap: float) -> np.ndarray:
    """The places in [0, 1] nearest to those given (least squares) that are a gap apart, in the same order.

    Example:
        >>> spaced([0.5, 0.5, 0.1], 0.2)
        array([0.4, 0.6, 0.1])
    """
    order = np.argsort(places, kind="stable")
    offsets = gap * np.arange(len(order))
    # Isotonic regression of the places without their gaps, by pooling neighbours that are in the wrong order.
    pools: list[list[float]] = []
    for value in np.asarray(places)[order] - offsets:
        pools.append([float(value), 1.0])
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (a, n), (b, m) = pools[-2:]
            pools[-2:] = [[(a * n + b * m) / (n + m), n + m]]
    levels = np.concatenate([np.full(int(n), value) for value, n in pools])
    result = np.empty(len(order))
    result[order] = np.clip(levels, 0, max(1 - offsets[-1], 0)) + offsets
    return result
