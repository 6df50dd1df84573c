"""Pictures of a comparison: validation against time and against epochs, with bands over each method's grid."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from cronos_flax.compare.methods import FROZEN
from cronos_flax.compare.summaries import Summary, score, summaries
from cronos_flax.compare.task import Row

_LOW, _HIGH = 5, 95  # percentiles, as in the paper
_POINTS = 200  # of the time axis
_LOWEST_SHARE = 0.25  # of the axis that what failed may take


def draw(rows: list[Row], path: Path) -> None:
    """Save ``curves.png``: for each method the median over its grid and seeds, and the 5th to 95th percentile.

    Dashed is the best cell of a grid, the median over seeds.

    Args:
        rows: of :func:`cronos_flax.compare.sweep`.
        path: where to.
    """
    methods = [m for m in summaries(row for row in rows if "error" not in row)]
    timed = all(row["seconds"] is not None for m in methods for run in m.runs() for row in run)
    figure = Figure(figsize=(12, 4.8) if timed else (7, 4.8), layout="constrained")
    axes = figure.subplots(1, 2 if timed else 1, sharey=True, squeeze=False)[0]
    for i, method in enumerate(methods):
        _draw(axes[0], method, "epoch", f"C{i}")
        if timed:
            _draw(axes[1], method, "seconds", f"C{i}")
    is_accuracy = any("validation_accuracy" in row for row in rows)
    axes[0].set_ylabel("validation accuracy, %" if is_accuracy else "minus the validation loss")
    frozen = any(method.method == FROZEN for method in methods)
    axes[0].set_xlabel(f"epochs ({FROZEN}: steps of the solver)" if frozen else "epochs")
    if timed:
        axes[1].set_xlabel("training time, s")
        axes[1].set_xscale("log")
        axes[1].xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes[1].xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes[1].xaxis.set_minor_formatter(NullFormatter())
    stepped = [row["epoch"] for m in methods if m.method != FROZEN for run in m.runs() for row in run]
    if stepped:  # of a frozen backbone the checks are steps of the solver, and there may be many more
        axes[0].set_xlim(0, 1.02 * max(stepped))
    axes[0].xaxis.set_major_locator(MaxNLocator(integer=True))
    for ax in axes:
        ax.grid(alpha=0.3)
    _limit(axes[0], methods)
    if any(len(method.cells) > 1 for method in methods):
        axes[0].plot([], [], "--", color="gray", label="best cell of a grid")
    figure.legend(
        *axes[0].get_legend_handles_labels(),
        loc="outside right upper",
        fontsize="small",
        title="median, 5th–95th percentile\nover grid and seeds",
        title_fontsize="small",
    )
    if rows:
        figure.suptitle(f"{rows[0]['dataset']}, {rows[0]['model']}")
    figure.savefig(path, dpi=150)


def _draw(ax: Axes, method: Summary, along: str, color: str) -> None:
    if all(len(run) == 1 for run in method.runs()):  # solved at once
        low, middle, high = np.percentile([score(run[0], "validation") for run in method.runs()], (_LOW, 50, _HIGH))
        place, errors = np.median([run[0][along] for run in method.runs()]), [[middle - low], [high - middle]]
        ax.errorbar([place], [middle], yerr=errors, fmt="D", color=color, capsize=3, label=method.method)
        return
    grid, values = _on_grid(method.runs(), along)
    low, middle, high = np.percentile(values, (_LOW, 50, _HIGH), axis=0)
    ax.plot(grid, middle, color=color, label=method.method)
    ax.fill_between(grid, low, high, color=color, alpha=0.15, linewidth=0)
    if len(method.cells) > 1:
        grid, values = _on_grid(list(method.best.values()), along)
        ax.plot(grid, np.median(values, axis=0), "--", color=color)


def _on_grid(runs: list[list[Row]], along: str) -> tuple[np.ndarray, np.ndarray]:
    """Places, and what each run had reached there by its last check; in time, at first what its first check says."""
    places = [[row[along] for row in run] for run in runs]
    scores = [np.asarray([score(row, "validation") for row in run]) for run in runs]
    if along == "epoch":
        grid = np.arange(max(p[0] for p in places), min(p[-1] for p in places) + 1)
    else:
        grid = np.geomspace(np.median([p[0] for p in places]), np.median([p[-1] for p in places]), _POINTS)
    reached = [s[np.maximum(np.searchsorted(p, grid, "right") - 1, 0)] for p, s in zip(places, scores, strict=True)]
    return grid, np.array(reached)


def _limit(ax: Axes, methods: list[Summary]) -> None:
    """Leave most of the axis to what works."""
    scores = [score(row, "validation") for method in methods for run in method.runs() for row in run]
    scores = [value for value in scores if np.isfinite(value)]
    if not scores:
        return
    best = [score(run[-1], "validation") for method in methods for run in method.best.values()]
    top, low = max(scores), min(value for value in best if np.isfinite(value))
    bottom = max(min(scores), low - max(top - low, 0.02 * abs(top)) / _LOWEST_SHARE * 0.75)
    if bottom < top:
        ax.set_ylim(bottom, top + 0.03 * (top - bottom))
