"""What the pages share: rows of a few examples of each class, a linear probe, a table and a picture of the methods."""

from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from sklearn.linear_model import LogisticRegressionCV

from cronos_flax.compare import style

_STRENGTHS = np.logspace(-3, 4, 8)
Curve = list[tuple[float, float]]  # seconds, test accuracy in %


def few(labels: np.ndarray, shots: int, seed: int) -> np.ndarray:
    """Rows of so many examples of each class, drawn at random; 0 for all rows."""
    if not shots:
        return np.arange(len(labels))
    order = np.random.default_rng(seed).permutation(len(labels))
    return np.concatenate([order[labels[order] == label][:shots] for label in np.unique(labels)])


def probe_of(features: np.ndarray, labels: np.ndarray, strengths: np.ndarray = _STRENGTHS) -> LogisticRegressionCV:
    """Logistic regression, its strength chosen by cross-validation."""
    search = {"Cs": strengths, "cv": 3, "l1_ratios": (0,), "scoring": "accuracy", "use_legacy_attributes": False}
    return LogisticRegressionCV(**search, max_iter=500).fit(features, labels)


def layer_of(probe: LogisticRegressionCV) -> tuple[np.ndarray, np.ndarray]:
    """Kernel and bias of a linear probe with a column for each class: of two classes it has the difference only."""
    kernel, bias = probe.coef_.T, probe.intercept_
    return (kernel * [-0.5, 0.5], bias * [-0.5, 0.5]) if len(bias) == 1 else (kernel, bias)


class Results:
    """How each method went, told when it ends."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._curves: dict[str, Curve] = {}

    def add(self, name: str, points: Curve, after: str | None = None) -> None:
        """Add a method, and print how it ended; if it went on from another one, after the points of that."""
        self._curves[name] = points if after is None else self._curves[after] + points
        seconds, accuracy = self._curves[name][-1]
        self._console.print(f"{name}: {accuracy:.1f} % after {seconds:.1f} s")

    def show(self, title: str) -> None:
        """Print the table."""
        table = Table(title=title)
        for column in ("method", "test accuracy, %", "seconds"):
            table.add_column(column, justify="left" if column == "method" else "right")
        for name, points in self._curves.items():
            table.add_row(name, f"{points[-1][1]:.1f}", f"{points[-1][0]:.1f}")
        self._console.print(table)

    def draw(self, title: str, path: Path) -> None:
        """Save the picture: a line for what is trained in epochs, a point for what is one fit."""
        colors = *style.COLORS[1:3], style.OTHER, style.OURS
        with style.styled(7, 4) as figure:
            axes, labels = figure.subplots(), []
            for (name, points), color in zip(self._curves.items(), colors, strict=True):
                seconds, scores = zip(*points, strict=True)
                axes.plot(seconds, scores, color=color, marker="o", markersize=4, linewidth=2 if len(points) > 1 else 0)
                labels.append(style.Label(seconds[-1], scores[-1], name, color, name == "CRONOS-AM"))
            axes.set(xlabel="seconds from the first pass on", ylabel="test accuracy, %", title=title)
            axes.set_xlim(0, max(label.x for label in labels))
            style.label_ends(axes, labels)
            style.save(figure, path)
        self._console.print(f"picture: {path}")
