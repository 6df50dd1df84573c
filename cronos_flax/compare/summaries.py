"""Rows of a comparison by method and cell: scores, peaks, and the cell that validation rows choose."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable

import numpy as np

from cronos_flax.compare.methods import ALTERNATION, FROZEN, PROBE, SOLVED_FIRST
from cronos_flax.compare.task import Row

NO_SCORE = -np.inf  # of a run that failed

Cell = dict[int, list[Row]]  # the checks of each run of a cell, by seed


@dataclasses.dataclass(frozen=True)
class Summary:
    """One method; scores are accuracies in %, or negative losses for regression.

    Args:
        method: its name.
        rates: of its cells, from the best mean validation peak to the worst.
        cells: the runs at each of these rates.
    """

    method: str
    rates: tuple[float | None, ...]
    cells: tuple[Cell, ...]

    @property
    def best(self) -> Cell:
        """The cell with the best mean validation peak."""
        return self.cells[0]

    def test(self, which: Callable[[list[Row]], Row]) -> dict[int, float]:
        """Test scores of the best cell by seed, at one check of each run."""
        return {seed: score(which(checks), "test") for seed, checks in sorted(self.best.items())}

    def finals(self) -> list[float]:
        """Mean final validation score of each cell, from the best to the worst."""
        return sorted((_mean(cell, last) for cell in self.cells), reverse=True)

    def runs(self) -> list[list[Row]]:
        """All runs of all cells."""
        return list(itertools.chain.from_iterable(cell.values() for cell in self.cells))


def score(row: Row, split: str) -> float:
    """The score of a check on ``"validation"`` or ``"test"`` rows."""
    if f"{split}_accuracy" in row:
        return 100 * row[f"{split}_accuracy"]
    loss = row.get(f"{split}_loss")
    return NO_SCORE if loss is None else -loss


def is_accuracy(rows: Iterable[Row]) -> bool:
    """Whether scores are accuracies; else they are negative losses, or all runs failed."""
    return any("test_accuracy" in row for row in rows)


def title(rows: list[Row]) -> str:
    """The set and the model; nothing where there is no row."""
    return f"{rows[0]['dataset']}, {rows[0]['model']}" if rows else ""


def peak(checks: list[Row]) -> Row:
    """The first check with the best validation score."""
    return max(checks, key=lambda row: score(row, "validation"))


def last(checks: list[Row]) -> Row:
    """The check at the end."""
    return checks[-1]


def _mean(cell: Cell, which: Callable[[list[Row]], Row]) -> float:
    return float(np.mean([score(which(checks), "validation") for checks in cell.values()]))


def summaries(rows: Iterable[Row]) -> list[Summary]:
    """The methods in the order in which their rows come."""
    methods: dict[str, dict[float | None, Cell]] = {}
    for row in rows:
        cells = methods.setdefault(row["method"], {})
        cells.setdefault(row["rate"], {}).setdefault(row["seed"], []).append(row)
    ordered = {
        name: sorted(cells.items(), key=lambda item: _mean(item[1], peak), reverse=True)
        for name, cells in methods.items()
    }
    return [Summary(name, *map(tuple, zip(*cells, strict=True))) for name, cells in ordered.items()]


def reference(methods: list[Summary]) -> Summary | None:
    """The method that the others are compared with: CRONOS-AM, or the solved head of a frozen backbone."""
    return next((m for name in (ALTERNATION, SOLVED_FIRST, FROZEN) for m in methods if m.method == name), None)


def default_target(methods: list[Summary]) -> float:
    """A score that the best cells of all methods reach on average: the lowest of their mean peaks.

    Linear probes are left out.
    """
    peaks = [_mean(method.best, peak) for method in methods if method.method != PROBE]
    return min((mean for mean in peaks if mean > NO_SCORE), default=NO_SCORE)


def time_to(target: float, checks: list[Row]) -> float | None:
    """Seconds until the first check at the target or above; None if there is none, or if times were not kept."""
    return next((row.get("seconds") for row in checks if score(row, "validation") >= target), None)
