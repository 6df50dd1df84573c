"""Pictures of a comparison: scores during training, and the score to expect for a budget that includes tuning."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from cronos_flax.compare import style
from cronos_flax.compare.budget import Budget, budget, is_timed
from cronos_flax.compare.methods import FROZEN, PROBE
from cronos_flax.compare.style import OTHER, OURS, QUIET, Label
from cronos_flax.compare.summaries import Summary, is_accuracy, reference, score, summaries, title
from cronos_flax.compare.task import Row

_LOW, _HIGH = 5, 95  # percentiles of the band, as in the paper
_WHITE = {"facecolor": "white", "edgecolor": "none", "pad": 1}
_BESIDE = 0.85  # where runs at the usual rate are drawn, as a fraction of the compute of one run
_POINTS = 200  # of the time axis
_FAILED = -1e9  # drawn for a run without a score
_LOWEST_SHARE = 0.75  # of the height of an axis, at most, that lies below the worst of the methods' best scores


def draw_curves(rows: list[Row], path: Path) -> Figure:
    """Save the validation scores during training, a panel for each method.

    A panel shows the method's median over its grid and seeds with the 5th to 95th percentile, its best cell, and in
    grey the best cells of the other methods. The x axis is training time or, if times were not kept, epochs.

    Args:
        rows: of :func:`cronos_flax.compare.sweep.sweep`.
        path: of the picture.

    Returns:
        The figure, saved.
    """
    methods = summaries(row for row in rows if "error" not in row)
    ours, timed = reference(methods), is_timed(methods)
    curves = [_Curves.of(method, timed) for method in methods]
    bottom, top = _y_limits(curves)
    left, right = _x_limits(curves, bottom)
    columns = _columns(len(methods))
    lines = -(-max(len(methods), 1) // columns)
    with style.styled(1.4 + 2.1 * max(columns, 2), 1.5 + 1.9 * lines) as figure:
        panels = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
        for place, ax in enumerate(panels.flat):
            if place >= len(curves):
                ax.set_axis_off()
                continue
            each = curves[place]
            for other in curves:
                is_ours = ours is not None and other.name == ours.method
                if other is not each:
                    _draw_best(ax, other, left, right, OURS if is_ours else QUIET, 1.4 if is_ours else 0.9)
            color = OURS if ours is not None and each.name == ours.method else OTHER
            _draw_all(ax, each, (left, right), (bottom, top), color)
            ax.set_title(each.name, color=color, fontweight="bold")
            if place + columns >= len(curves):  # the lowest of its column
                ax.tick_params(labelbottom=True)
                ax.set_xlabel("training time, s" if timed else "epochs")
        first = panels[0, 0]
        if timed:
            style.log_axis(first, left, right)
        elif left < right:
            first.set_xlim(left, right)
            first.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        if bottom < top:
            first.set_ylim(bottom, top)
        first.yaxis.set_major_locator(MaxNLocator(5, steps=(1, 2, 5, 10)))
        figure.supylabel(f"validation {_unit(rows)}", fontsize=10)
        figure.legend(handles=_key(curves, ours), loc="outside lower center", ncols=min(max(columns, 2), 3))
        figure.suptitle(title(rows) if curves else "no run has ended well", fontsize=10, color="0.35")
        style.save(figure, path)
    return figure


def draw_budget(rows: list[Row], path: Path) -> Figure:
    """Save the test score to expect for a compute budget that includes tuning.

    Args:
        rows: of :func:`cronos_flax.compare.sweep.sweep`.
        path: of the picture.

    Returns:
        The figure, saved.
    """
    methods = summaries(rows)
    timed, ours = is_timed(methods), reference(methods)
    budgets = [budget(method, timed=timed) for method in methods]
    with style.styled(7.2, 4.4) as figure:
        ax = figure.subplots()
        labels = budget_panel(ax, budgets, None if ours is None else ours.method, is_accuracy=is_accuracy(rows))
        unit = f"{_unit(rows)} (error on a log scale)" if is_accuracy(rows) else _unit(rows)
        ax.set_ylabel(f"expected test {unit}")
        ax.set_xlabel(f"total training time, tuning included, {'s' if timed else 'epochs'}")
        ax.set_title(title(rows), color="0.35")
        note = "markers: 1, 2, … runs drawn from the grid,\nthe best chosen by validation; ± standard error"
        if any(each.usual for each in budgets):
            note += "\nhollow: one run at the usual rate"
        ax.text(0.98, 0.04, note, transform=ax.transAxes, ha="right", fontsize=9, color="0.35", bbox=_WHITE)
        style.label_ends(ax, labels)
        style.save(figure, path)
    return figure


def budget_panel(ax: Axes, budgets: Sequence[Budget], ours: str | None = None, *, is_accuracy: bool) -> list[Label]:
    """Draw budget curves into axes whose limits end where the curves end.

    Args:
        ax: the axes.
        budgets: one for each method; points that are not finite are left out. Left of all, a hollow marker shows one
            run at the usual rate.
        ours: the reference method. A method without a grid goes on as a level line to the right end.
        is_accuracy: whether scores are accuracies in %, whose error is drawn on a logarithmic scale.

    Returns:
        Labels for :func:`cronos_flax.compare.style.label_ends`.
    """
    shown = [each for each in budgets if each.per_run > 0 and np.any(np.isfinite(each.mean))]
    if not shown:
        return []
    left = min(each.spent[np.isfinite(each.mean)][0] for each in shown)
    right = max(each.spent[-1] for each in shown)
    if any(each.usual for each in shown):
        left *= _BESIDE
    looks = itertools.cycle(zip(style.COLORS, style.MARKERS, strict=True))
    labels: list[Label] = []
    lows: list[float] = []
    highs: list[float] = []
    for each in shown:
        is_ours = each.method == ours
        color, marker = (OURS, "*") if is_ours else next(looks)
        finite = np.isfinite(each.mean)
        spent, mean, error = each.spent[finite], each.mean[finite], np.nan_to_num(each.error[finite])
        ax.plot(
            spent, mean, marker, color=color, markersize=11 if is_ours else 4.5,
            markeredgecolor="white", markeredgewidth=0.5, zorder=5, clip_on=False,
        )  # fmt: skip
        if each.usual and np.isfinite(each.usual[0]):
            ax.plot(
                left, each.usual[0], marker, color=color, markersize=5.5,
                markerfacecolor="white", markeredgewidth=1.3, zorder=6, clip_on=False,
            )  # fmt: skip
            lows.append(each.usual[0])
            highs.append(each.usual[0])
        if len(each.mean) == 1 and spent[-1] < right:  # there is nothing to tune: more compute changes nothing
            spent, mean, error = np.append(spent, right), np.repeat(mean, 2), np.repeat(error, 2)
        if is_ours:
            ax.fill_between(spent, mean - error, mean + error, color=color, alpha=0.18, linewidth=0, zorder=1)
        else:
            ax.errorbar(spent, mean, error, fmt="none", ecolor=color, elinewidth=0.8, alpha=0.5, zorder=2)
        ax.plot(spent, mean, color=color, linewidth=2.4 if is_ours else 1.3, zorder=4 if is_ours else 3)
        labels.append(Label(spent[-1], mean[-1], each.method, color, is_ours))
        lows.append(float(np.min(mean - error)))
        highs.append(float(np.max(mean + error)))
    style.log_axis(ax, left, right)
    margin = 0.03 * (max(highs) - min(lows)) or 0.01 * abs(max(highs)) or 1.0
    if is_accuracy:
        style.error_axis(ax)
        ax.set_ylim(min(lows) - margin, min(max(highs) + margin / 3, 100))
    else:
        ax.set_ylim(min(lows) - margin, max(highs) + margin)
    return labels


class _Curves(NamedTuple):
    """What is drawn of a method.

    Args:
        name: the method.
        level: whether it has no course: scores of a single check, from one place on.
        place: the x of the curves, ``(points,)``.
        all: scores of all runs there, ``(runs, points)``.
        best_place: the x of the best cell's curve.
        best: scores of the best cell's runs there.
        searched: whether there is a grid.
    """

    name: str
    level: bool
    place: np.ndarray
    all: np.ndarray
    best_place: np.ndarray
    best: np.ndarray
    searched: bool

    @classmethod
    def of(cls, method: Summary, timed: bool) -> "_Curves":
        runs, best = method.runs(), list(method.best.values())
        searched = len(method.cells) > 1
        if all(len(run) == 1 for run in runs) or (not timed and method.method in (FROZEN, PROBE)):
            level, at_best = (
                np.array([[max(score(run[-1], "validation"), _FAILED)] for run in r]) for r in (runs, best)
            )
            place = np.array([np.median([run[-1]["seconds"] for run in runs]) if timed else 0.0])
            return cls(method.method, True, place, level, place, at_best, searched)
        along = "seconds" if timed else "epoch"
        return cls(method.method, False, *_reached(runs, along), *_reached(best, along), searched)


def _reached(runs: list[list[Row]], along: str) -> tuple[np.ndarray, np.ndarray]:
    """Places, and the score of each run there: interpolated between its checks, and level before the first."""
    places = [[row[along] for row in run] for run in runs]
    scores = [np.maximum([score(row, "validation") for row in run], _FAILED) for run in runs]
    if along == "epoch":
        first, end = max(p[0] for p in places), min(p[-1] for p in places)
        grid = np.arange(min(first, end), end + 1)
    else:
        grid = np.geomspace(np.median([p[0] for p in places]), np.median([p[-1] for p in places]), _POINTS)
    return grid, np.array([np.interp(grid, p, s) for p, s in zip(places, scores, strict=True)])


def _x_limits(curves: list[_Curves], bottom: float) -> tuple[float, float]:
    """From where the first line or band comes into sight to where the last one ends; levels only if alone."""
    starts: list[float] = []
    ends: list[float] = []
    for each in [each for each in curves if not each.level] or curves:
        in_sight = np.percentile(each.all, _HIGH, axis=0) >= bottom
        starts.append(float(each.place[int(np.argmax(in_sight))]))
        ends.append(float(max(each.place[-1], each.best_place[-1])))
    return min(starts, default=0.0), max(ends, default=0.0)


def _y_limits(curves: list[_Curves]) -> tuple[float, float]:
    """Leave most of the height to what works: best cells after a quarter of their course, of half the methods."""
    best = [np.median(each.best, axis=0) for each in curves]
    ends = [float(course[-1]) for course in best if course[-1] > _FAILED]
    if not ends:
        return 0.0, 0.0
    top = max(float(np.percentile(each.all, _HIGH, axis=0).max()) for each in curves)
    top = max(top, *(float(course.max()) for course in best))
    early = float(np.median([course[len(course) // 4] for course in best]))
    below = max(top - min(ends), 0.02 * abs(top)) * _LOWEST_SHARE / (1 - _LOWEST_SHARE)
    lowest = min(float(each.all[each.all > _FAILED].min()) for each in curves if np.any(each.all > _FAILED))
    bottom = max(lowest, min(min(ends) - below, early))
    return bottom, top + 0.03 * (top - bottom)


def _draw_best(
    ax: Axes, curves: _Curves, left: float, right: float, color: str, width: float, dashes: str = "-"
) -> None:
    place, values = curves.best_place, np.median(curves.best, axis=0)
    if curves.level:
        place, values = np.array([max(place[0], left), right]), np.repeat(values, 2)
    ax.plot(place, values, dashes, color=color, linewidth=width, zorder=3 if color == QUIET else 4)


def _draw_all(ax: Axes, curves: _Curves, x: tuple[float, float], y: tuple[float, float], color: str) -> None:
    """The band and the median of all runs; and the best cell, if there is a grid."""
    values = np.maximum(curves.all, y[0] - (y[1] - y[0]))  # a run that failed is below the axis
    low, middle, high = np.percentile(values, (_LOW, 50, _HIGH), axis=0)
    place = curves.place
    if curves.level:
        place = np.array([max(place[0], x[0]), x[1]])
        ax.errorbar(place[:1], middle, (middle - low, high - middle), fmt="none", ecolor=color)
        ax.plot(place[:1], middle, "D", color=color, clip_on=False)
        low, middle, high = (np.repeat(side, 2) for side in (low, middle, high))
    ax.fill_between(place, low, high, color=color, alpha=0.2, linewidth=0, zorder=1)
    ax.plot(place, middle, color=color, linewidth=2, zorder=5)
    if curves.searched:
        _draw_best(ax, curves, *x, color, 1.6, "--")


def _key(curves: list[_Curves], ours: Summary | None) -> list[Line2D | Patch]:
    """The kinds of lines; which method a panel shows, its title says."""
    color = OURS if ours is not None and len(curves) == 1 else OTHER
    searched = any(each.searched for each in curves)
    over = "grid and seeds" if searched else "seeds"
    key: list[Line2D | Patch] = []
    if any(len(each.all) > 1 for each in curves):
        key.append(Line2D([], [], color=color, linewidth=2, label=f"median of {over}"))
        key.append(Patch(color=color, alpha=0.2, linewidth=0, label=f"5th–95th percentile of {over}"))
    if searched:
        key.append(Line2D([], [], color=color, linestyle="--", label="best rate, median of seeds"))
    if len(curves) > 1:
        if ours is not None:
            key.append(Line2D([], [], color=OURS, label=ours.method))
        if len(curves) > 1 + (ours is not None):
            key.append(Line2D([], [], color=QUIET, linewidth=0.9, label="other methods" + ", best rate" * searched))
    return key


def _columns(methods: int) -> int:
    """Panels side by side, so that few places stay empty."""
    return {0: 1, 1: 1, 2: 2, 4: 2, 7: 4, 8: 4}.get(methods, 3 if methods < 10 else 4)


def _unit(rows: list[Row]) -> str:
    return "accuracy, %" if is_accuracy(rows) else "score, minus the loss"
