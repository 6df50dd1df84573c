"""Differences between CRONOS-AM and other methods of a comparison, paired by seed: ``python paired.py results.jsonl``.

What the text of am.md says beyond the table of ``cronos-flax compare``, from the same rows. Prints Markdown: points, ±
the standard error over seeds, against each method's best cell, its best at the end and, where there is one, that at 1.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from cronos_flax.compare.methods import ALTERNATION
from cronos_flax.compare.results import kept
from cronos_flax.compare.summaries import Cell, last, peak, score, summaries
from cronos_flax.compare.task import Row

COLUMNS = [("validation", peak), ("test", peak), ("validation", last), ("test", last)]


def mean(cell: Cell, split: str, which: Callable[[list[Row]], Row]) -> float:
    """The mean score of a cell on validation or test rows, each run at one of its checks."""
    return float(np.mean([score(which(checks), split) for checks in cell.values()]))


def difference(ours: Cell, theirs: Cell, split: str, which: Callable[[list[Row]], Row]) -> str:
    """Points of one cell less another, seed by seed, ± the standard error; both must have the same seeds."""
    if ours.keys() != theirs.keys():
        raise ValueError(f"`theirs` must have the seeds of `ours`, {sorted(ours)}, got {sorted(theirs)}.")
    each = [score(which(ours[seed]), split) - score(which(theirs[seed]), split) for seed in ours]
    error = f" ± {np.std(each, ddof=1) / np.sqrt(len(each)):.2f}" if len(each) > 1 else ""
    return f"{np.mean(each):+.2f}{error}"


def main(path: str) -> None:
    """Print the table."""
    methods = summaries(kept(Path(path)))
    references = [(m, "best", m.best) for m in methods if m.method.startswith(ALTERNATION)]
    references += [
        (m, "0.001", dict(zip(m.rates, m.cells, strict=True))[0.001])
        for m in methods
        if m.method.startswith(ALTERNATION) and 0.001 in m.rates
    ]
    head = ["of", "minus", "validation at peak", "test at peak", "validation at end", "test at end"]
    lines = [head, ["---"] * len(head)]
    for ours, which, cell in references:
        for theirs in methods:
            cells = dict(zip(theirs.rates, theirs.cells, strict=True))
            compared = {
                "best": theirs.best,
                "best at the end": max(theirs.cells, key=lambda cell: mean(cell, "validation", last)),
            }
            compared |= {"at 1": cells[1.0]} if 1.0 in cells else {}
            for name, other in compared.items():
                if other is not cell:
                    each = [difference(cell, other, *column) for column in COLUMNS]
                    lines.append([f"{ours.method}, {which}", f"{theirs.method}, {name}", *each])
    sys.stdout.write("".join(f"| {' | '.join(line)} |\n" for line in lines))


if __name__ == "__main__":
    main(sys.argv[1])
