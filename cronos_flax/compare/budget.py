"""The test score to expect from a compute budget that includes tuning: random search over each method's grid.

Draw k runs of a method's grid, keep the one with the best validation peak, and report its test score there. The
expectation over all draws of k different runs is exact. Expected maxima as a function of the budget:
Dodge et al., *Show Your Work*, EMNLP 2019.
"""

import dataclasses
from collections.abc import Sequence
from math import comb

import numpy as np

from cronos_flax.compare.methods import BASELINES, FROZEN, PROBE
from cronos_flax.compare.summaries import NO_SCORE, Summary, last, peak, score


@dataclasses.dataclass(frozen=True)
class Budget:
    """What a method reaches with 1, 2, … runs, up to its whole grid.

    Args:
        method: its name.
        per_run: mean training seconds of a run; if times were not kept, mean epochs, NaN where there are none.
        mean: expected test score of the run that validation chooses, mean over seeds.
        error: the standard error of that mean; NaN for a single seed.
        usual: the same two of one run at the method's usual rate; None if the grid has no such rate.
    """

    method: str
    per_run: float
    mean: np.ndarray
    error: np.ndarray
    usual: tuple[float, float] | None = None

    @property
    def spent(self) -> np.ndarray:
        """Total compute, tuning included, of each number of runs."""
        return self.per_run * np.arange(1, len(self.mean) + 1)

    def runs_to(self, target: float) -> int | None:
        """The fewest runs whose expected score is the target or above; None if the whole grid does not reach it."""
        return next((k for k, mean in enumerate(self.mean, 1) if mean >= target), None)


def expected_best(chosen_by: Sequence[float], reported: Sequence[float]) -> np.ndarray:
    r"""Expected reported score of the best of k runs, drawn without replacement, for k = 1 … n.

    With the runs sorted by validation score, the i-th of n is the best of k draws with probability
    :math:`\binom{i-1}{k-1} / \binom{n}{k}`. Runs with equal validation scores share the probability of their group.

    Args:
        chosen_by: validation scores ``(n,)``.
        reported: test scores of the same runs.

    Example:
        >>> expected_best([0.0, 1.0, 2.0], [10.0, 30.0, 20.0])
        array([20.        , 23.33333333, 20.        ])
    """
    chosen, scores = np.asarray(chosen_by, float), np.asarray(reported, float)
    n, best = len(chosen), []
    for k in range(1, n + 1):
        total = 0.0
        for value in np.unique(chosen):
            group = chosen == value
            below, upto = int(np.sum(chosen < value)), int(np.sum(chosen <= value))
            share = (comb(upto, k) - comb(below, k)) / comb(n, k)
            total += share * float(np.mean(scores[group])) if share else 0.0
        best.append(total)
    return np.asarray(best)


def budget(method: Summary, *, timed: bool) -> Budget:
    """The budget curve of a method.

    Args:
        method: its runs.
        timed: count training seconds; otherwise epochs.
    """
    by_seed: dict[int, list[tuple[float, float]]] = {}
    for cell in method.cells:
        for seed, checks in cell.items():
            row = peak(checks)
            by_seed.setdefault(seed, []).append((score(row, "validation"), score(row, "test")))
    sizes = min(map(len, by_seed.values()))
    each = np.array([expected_best(*zip(*runs, strict=True))[:sizes] for runs in by_seed.values()])
    mean, error = _mean_and_error(each)
    rate = BASELINES[method.method].usual if method.method in BASELINES else None
    usual = None
    if rate is not None and rate in method.rates:
        cell = method.cells[method.rates.index(rate)]
        m, e = _mean_and_error(np.array([score(peak(checks), "test") for checks in cell.values()]))
        usual = (float(m), float(e))
    costs: list[float] = []
    if timed or method.method not in (FROZEN, PROBE):  # which have no epochs
        along = "seconds" if timed else "epoch"
        costs = [last(run)[along] for run in method.runs() if score(peak(run), "validation") > NO_SCORE]
    return Budget(method.method, float(np.mean(costs)) if costs else np.nan, mean, error, usual)


def _mean_and_error(each: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Over seeds, the first axis."""
    with np.errstate(invalid="ignore"):  # minus infinity, the score of runs that failed
        mean = np.mean(each, axis=0)
        if len(each) == 1:
            return mean, np.full_like(mean, np.nan)
        return mean, np.std(each, axis=0, ddof=1) / np.sqrt(len(each))


def is_timed(methods: Sequence[Summary]) -> bool:
    """Whether all runs have kept their times."""
    return all(row.get("seconds") is not None for m in methods for run in m.runs() for row in run if "error" not in row)
