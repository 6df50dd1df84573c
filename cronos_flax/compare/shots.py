"""Few-shot comparisons: one sweep for each number of rows of a class, a table and a picture of them all."""

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from cronos_flax.compare import style
from cronos_flax.compare.style import OURS, Label
from cronos_flax.compare.summaries import Summary, last, peak, reference, summaries, title
from cronos_flax.compare.tables import markdown, spread
from cronos_flax.compare.task import Row


def table(sweeps: Mapping[int, list[Row]]) -> str:
    """Test scores and seconds of all methods as Markdown.

    Args:
        sweeps: the rows of the sweep of each number of rows of a class.
    """
    found = _found(sweeps)
    seeds = {len(method.best) for methods in found.values() for method in methods.values()}
    text = (
        "Rows of each class to fit, and the test score at the peak of the best cell, mean ± standard deviation over "
        f"{_listed(seeds)} draws. Cell and peak are chosen on validation rows, which are as many whatever the shots: "
        "methods with a grid use them more than others."
    )
    lines = [text, "", *_lines(found, _scores), ""]
    text = "Seconds of one run in the best cell, from the first pass through the backbone on, × runs of the grid."
    return "\n".join([*lines, text, "", *_lines(found, _seconds)]) + "\n"


def draw(sweeps: Mapping[int, list[Row]], path: Path) -> Figure:
    """Save the test scores over the rows of each class, a line for each method, ± standard error over draws.

    Args:
        sweeps: the rows of the sweep of each number of rows of a class.
        path: of the picture.

    Returns:
        The figure, saved.
    """
    found = _found(sweeps)
    names = dict.fromkeys(itertools.chain.from_iterable(found.values()))
    ours = next((made.method for methods in found.values() if (made := reference(list(methods.values())))), None)
    looks = itertools.cycle(zip(style.COLORS, style.MARKERS, strict=True))
    with style.styled(7.2, 4.4) as figure:
        ax, labels = figure.subplots(), []
        for name in names:
            color, marker = (OURS, "*") if name == ours else next(looks)
            each = {shots: _tests(methods[name]) for shots, methods in found.items() if name in methods}
            each = {shots: tests for shots, tests in each.items() if np.all(np.isfinite(tests))}
            if not each:
                continue
            means = [np.mean(tests) for tests in each.values()]
            errors = [np.std(tests, ddof=1) / np.sqrt(len(tests)) if len(tests) > 1 else 0 for tests in each.values()]
            width, size = (2.4, 11) if name == ours else (1.3, 5)
            ax.errorbar(list(each), means, errors, color=color, linewidth=width, elinewidth=0.8)
            ax.plot(list(each), means, marker, color=color, markersize=size, markeredgecolor="white", clip_on=False)
            labels.append(Label(list(each)[-1], float(means[-1]), name, color, name == ours))
        style.log_axis(ax, min(found), max(found))
        ax.set_xticks(list(found), [str(shots) for shots in found])
        ax.set_xlabel("rows of each class to fit")
        ax.set_ylabel("test accuracy, %")
        ax.set_title(title(next(iter(sweeps.values()))), color="0.35")
        style.label_ends(ax, labels)
        style.save(figure, path)
    return figure


def _found(sweeps: Mapping[int, list[Row]]) -> dict[int, dict[str, Summary]]:
    return {shots: {method.method: method for method in summaries(rows)} for shots, rows in sorted(sweeps.items())}


def _tests(method: Summary) -> np.ndarray:
    return np.array(list(method.test(peak).values()))


def _lines(found: dict[int, dict[str, Summary]], cell: Callable[[Summary], str]) -> list[str]:
    rows = [
        [name, *(cell(methods[name]) if name in methods else "" for methods in found.values())]
        for name in dict.fromkeys(itertools.chain.from_iterable(found.values()))
    ]
    return markdown(["method", *map(str, found)], rows)


def _scores(method: Summary) -> str:
    return spread(_tests(method))


def _seconds(method: Summary) -> str:
    ends = [last(checks).get("seconds") for checks in method.best.values()]
    seconds = [end for end in ends if end is not None]
    if len(seconds) < len(ends):
        return "–"
    return f"{np.mean(seconds):.2f} × {len(method.cells)}"


def _listed(counts: set[int]) -> str:
    low, high = min(counts), max(counts)
    return str(low) if low == high else f"{low} to {high}"
