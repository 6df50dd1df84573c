"""What the rows of a comparison say: for each method its best cell, chosen by validation rows, and the whole grid."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable

import numpy as np

from cronos_flax.compare.sweep import ALTERNATION, FROZEN, PROBE, Row

_NO_SCORE = -np.inf


@dataclasses.dataclass(frozen=True)
class Summary:
    """One method; scores are accuracies in %, or negative losses where there are no classes.

    Args:
        method: its name.
        rates: of its cells, from the best mean peak on validation rows to the worst.
        cells: for each of these, by seed, the checks of the run.
    """

    method: str
    rates: tuple[float | None, ...]
    cells: tuple[dict[int, list[Row]], ...]

    @property
    def best(self) -> dict[int, list[Row]]:
        """The runs of the best cell, by seed."""
        return self.cells[0]

    def test(self, which: Callable[[list[Row]], Row]) -> dict[int, float]:
        """Test scores of the best cell by seed, at one check of each run."""
        return {seed: score(which(checks), "test") for seed, checks in sorted(self.best.items())}

    def finals(self) -> list[float]:
        """Mean final validation score of each cell, from the best to the worst."""
        return sorted((_mean(cell, last) for cell in self.cells), reverse=True)


def score(row: Row, split: str) -> float:
    """Of a check, on ``"validation"`` or ``"test"`` rows."""
    if f"{split}_accuracy" in row:
        return 100 * row[f"{split}_accuracy"]
    loss = row.get(f"{split}_loss")
    return _NO_SCORE if loss is None else -loss


def peak(checks: list[Row]) -> Row:
    """The first check with the best validation score."""
    return max(checks, key=lambda row: score(row, "validation"))


def last(checks: list[Row]) -> Row:
    """The check at the end."""
    return checks[-1]


def _mean(cell: dict[int, list[Row]], which: Callable[[list[Row]], Row]) -> float:
    return float(np.mean([score(which(checks), "validation") for checks in cell.values()]))


def summaries(rows: Iterable[Row]) -> list[Summary]:
    """The methods in the order in which they come."""
    methods: dict[str, dict[float | None, dict[int, list[Row]]]] = {}
    for row in rows:
        cells = methods.setdefault(row["method"], {})
        cells.setdefault(row["rate"], {}).setdefault(row["seed"], []).append(row)
    ordered = {
        name: sorted(cells.items(), key=lambda item: _mean(item[1], peak), reverse=True)
        for name, cells in methods.items()
    }
    return [Summary(name, *map(tuple, zip(*cells, strict=True))) for name, cells in ordered.items()]


def default_target(methods: list[Summary]) -> float:
    """What the best cells of all methods reach on average: the lowest of their mean peaks, linear probes left out."""
    peaks = [_mean(method.best, peak) for method in methods if method.method != PROBE]
    return min((mean for mean in peaks if mean > _NO_SCORE), default=_NO_SCORE)


def time_to(target: float, checks: list[Row]) -> float | None:
    """Seconds until the first check at the target or above; None where there is none, or no time."""
    return next((row.get("seconds") for row in checks if score(row, "validation") >= target), None)


def table(rows: list[Row], target: float | None = None) -> str:
    """The comparison as Markdown.

    Args:
        rows: of :func:`cronos_flax.compare.sweep`.
        target: validation score (accuracy in %, or the negative of a loss) that times are given to.
    """
    methods = summaries(rows)
    target = default_target(methods) if target is None else target
    head = [
        "method", "best rate", "test at peak", "test at end", "validation peak", "grid, at end: best / median / worst",
        "to the target, s", "run, s", "compile, s", "epochs",
    ]  # fmt: skip
    solving = any("solves" in row for row in rows)
    if solving:
        head.append("solves (rejected)")
    reference = next((m for name in (ALTERNATION, FROZEN) for m in methods if m.method == name), None)
    if reference is not None:
        head.append(f"{reference.method} − this")
    lines = [_protocol(rows, target), "", "| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for method in methods:
        cells = [
            method.method,
            _rate(method),
            _spread(method.test(peak).values()),
            _spread(method.test(last).values()),
            _spread(score(peak(checks), "validation") for checks in method.best.values()),
            _grid(method.finals()),
            _times(target, method),
            _seconds(last(checks).get("seconds") for checks in method.best.values()),
            _seconds(last(checks).get("compile_seconds") for checks in method.best.values()),
            _epochs(method),
            *([_solves(method)] if solving else []),
        ]
        if reference is not None:
            cells.append("" if method is reference else _difference(reference, method))
        lines.append("| " + " | ".join(cells) + " |")
    failed = [row for row in rows if "error" in row]
    lines += ["", *(f"* failed: {r['method']}, rate {r['rate']}, seed {r['seed']}: {r['error']}" for r in failed)]
    return "\n".join(lines).rstrip() + "\n"


def _protocol(rows: list[Row], target: float) -> str:
    """What was done, in words."""
    if not rows:
        return "No run is done yet."
    row = rows[0]
    what = "accuracy in %" if any("test_accuracy" in r for r in rows) else "minus the loss"
    budget = f"{row['epochs']} epochs" if row["epochs"] else f"{row['budget']:g} s of training"
    seeds = len({r["seed"] for r in rows})
    versions = ", ".join(f"{name} {version}" for name, version in row["versions"].items())
    return (
        f"{row['dataset']}, inputs {_SCALED[row['scaling']]}; model {row['model']}, loss {row['loss'] or 'of the set'};"
        f" batch size {row['batch_size']}, {budget} a run, {seeds} seed(s); {row['device']}, {row['cores']} cores; "
        f"{versions}.\n\n"
        f"Scores are {what}, mean ± standard deviation over seeds. For each method the cell (rate) and, in each run, "
        "the check (epoch) of the peak are chosen by validation rows; test rows only report. Grid: mean validation "
        f"score at the end, over all of the method's rates. Target: validation score {_number(target)}, in the best "
        "cell. Seconds are training time, without compilation and validation. Times, epochs and solves are means over "
        "the best cell's runs. Differences are paired by seed, of tests at the peak, ± standard error."
    )


_SCALED = {"standardise": "standardised", "unit": "scaled to 1", "none": "as they are"}


def _number(value: float, digits: int | None = None) -> str:
    """Two digits of an accuracy in %, four of a loss, which is small."""
    if value == _NO_SCORE:
        return "failed"
    return f"{value:.{_digits(value) if digits is None else digits}f}"


def _digits(value: float) -> int:
    return 2 if abs(value) >= 1 else 4


def _rate(method: Summary) -> str:
    rate = method.rates[0]
    name = "C " if method.method == PROBE else ""
    return "–" if rate is None else f"{name}{rate:g} of {len(method.rates)}"


def _spread(values: Iterable[float]) -> str:
    scores = np.asarray(list(values))
    if not np.all(np.isfinite(scores)):
        return "failed"
    mean, digits = scores.mean(), _digits(scores.mean())
    return _number(mean) + (f" ± {_number(scores.std(ddof=1), digits)}" if len(scores) > 1 else "")


def _grid(finals: list[float]) -> str:
    return " / ".join(_number(value) for value in (finals[0], float(np.median(finals)), finals[-1]))


def _times(target: float, method: Summary) -> str:
    times = [time_to(target, checks) for checks in method.best.values()]
    reached = [time for time in times if time is not None]
    if not reached:
        return "–"
    return f"{np.mean(reached):.2f}" + ("" if len(reached) == len(times) else f" ({len(reached)} of {len(times)})")


def _seconds(values: Iterable[float | None]) -> str:
    there = [value for value in values if value is not None]
    return f"{np.mean(there):.2f}" if there else "–"


def _epochs(method: Summary) -> str:
    """Of runs that take gradient steps."""
    if method.method in (FROZEN, PROBE):
        return "–"
    return f"{np.mean([last(checks)['epoch'] for checks in method.best.values()]):.1f}"


def _solves(method: Summary) -> str:
    """Head solves, and how many of them the guard rejected."""
    ends = [last(checks) for checks in method.best.values()]
    if not all("solves" in end for end in ends):
        return "–"
    solves, rejected = (np.mean([end[name] for end in ends]) for name in ("solves", "rejections"))
    return f"{solves:.1f} ({rejected:.1f})"


def _difference(reference: Summary, method: Summary) -> str:
    """Of tests at the peak, over the seeds that both have."""
    ours, theirs = reference.test(peak), method.test(peak)
    each = np.asarray([ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())])
    if not len(each) or not np.all(np.isfinite(each)):
        return "–"
    digits = _digits(float(np.mean(list(ours.values()))))
    error = f" ± {each.std(ddof=1) / np.sqrt(len(each)):.{digits}f}" if len(each) > 1 else ""
    return f"{each.mean():+.{digits}f}{error}"


def curves(method: Summary) -> list[list[Row]]:
    """All runs of all cells."""
    return list(itertools.chain.from_iterable(cell.values() for cell in method.cells))
