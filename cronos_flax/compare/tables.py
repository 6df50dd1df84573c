"""A comparison as Markdown: each method's best cell and whole grid, and what it reaches for a budget with tuning."""

from collections.abc import Iterable, Sequence

import numpy as np

from cronos_flax.compare.budget import budget, is_timed
from cronos_flax.compare.methods import FROZEN, PROBE
from cronos_flax.compare.results import run_of
from cronos_flax.compare.summaries import (
    NO_SCORE,
    Summary,
    default_target,
    is_accuracy,
    last,
    peak,
    reference,
    score,
    summaries,
    time_to,
)
from cronos_flax.compare.task import Row

_SCORES = "method", "best rate", "test at peak", "test at end", "validation peak", "grid, at end: best / median / worst"
_COSTS = "method", "to the target, s", "run, s", "compile, s", "epochs"


def table(rows: list[Row], target: float | None = None) -> str:
    """The comparison as Markdown: a table of scores, and one of what they cost.

    Args:
        rows: of :func:`cronos_flax.compare.sweep.sweep`.
        target: validation score (accuracy in %, or the negative of a loss) that times are given to.
    """
    methods = summaries(rows)
    target = default_target(methods) if target is None else target
    solving, ours = any("solves" in row for row in rows), reference(methods)
    scores = [
        [
            method.method,
            _rate(method),
            spread(method.test(peak).values()),
            spread(method.test(last).values()),
            spread(score(peak(checks), "validation") for checks in method.best.values()),
            _grid(method.finals()),
            *([] if ours is None else ["" if method is ours else _difference(ours, method)]),
        ]
        for method in methods
    ]
    costs = [
        [
            method.method,
            _times(target, method),
            _seconds(last(checks).get("seconds") for checks in method.best.values()),
            _seconds(last(checks).get("compile_seconds") for checks in method.best.values()),
            _epochs(method),
            *([_solves(method)] if solving else []),
        ]
        for method in methods
    ]
    failed = [row for row in rows if "error" in row]
    text = [
        _protocol(rows, target),
        "",
        *markdown([*_SCORES, *([] if ours is None else [f"{ours.method} − this"])], scores),
        "",
        *markdown([*_COSTS, *(["solves (rejected)"] if solving else [])], costs),
        "",
        *(f"* failed: {run_of(r).name}: {r['error']}" for r in failed),
    ]
    if any(len(method.cells) > 1 for method in methods):
        text += [*([""] if failed else []), budget_table(rows)]
    return "\n".join(text).rstrip() + "\n"


def budget_table(rows: list[Row]) -> str:
    """The test score to expect for a budget that includes tuning, as Markdown.

    Args:
        rows: of :func:`cronos_flax.compare.sweep.sweep`.
    """
    methods = summaries(rows)
    timed, ours = is_timed(methods), reference(methods)
    budgets = [budget(method, timed=timed) for method in methods]
    most = max((len(each.mean) for each in budgets), default=0)
    counts = sorted({*(2**i for i in range(most.bit_length())), most} - {0})
    target = next((float(each.mean[0]) for each in budgets if ours is not None and each.method == ours.method), None)
    head = ["method", "a run, s" if timed else "a run, epochs", "usual rate, 1 run"]
    head += [f"{k} run{'s' * (k > 1)}" for k in counts]
    if ours is not None:
        head.append(f"runs to match {ours.method}")
    lines = []
    for each in budgets:
        cells = [each.method, _number(each.per_run, 1) if np.isfinite(each.per_run) else "–"]
        cells.append(_expected(*each.usual) if each.usual else "")
        cells += [_expected(each.mean[k - 1], each.error[k - 1]) if k <= len(each.mean) else "" for k in counts]
        if ours is not None and target is not None:
            cells.append("" if each.method == ours.method else str(each.runs_to(target) or f"> {len(each.mean)}"))
        lines.append(cells)
    return "\n".join([_BUDGET, "", *markdown(head, lines)]) + "\n"


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table."""
    return [f"| {' | '.join(head)} |", "|---" * len(head) + "|", *(f"| {' | '.join(cells)} |" for cells in rows)]


_BUDGET = (
    "Expected test score for a budget that includes tuning: draw k of the method's runs (rates) at random without "
    "replacement, keep the one with the best validation peak, report its test score there. Exact expectation for each "
    "seed; mean over seeds ± standard error. A method without a rate to search takes one run. Usual rate: one run at "
    "the rate that users take without a search (Adam, AdamW .001; Prodigy, D-adapted AdamW 1), if the grid has it."
)


def _expected(mean: float, error: float) -> str:
    return _number(mean) + (f" ± {_number(error, _digits(mean))}" if np.isfinite(error) else "")


def _protocol(rows: list[Row], target: float) -> str:
    """What was done, in words."""
    if not rows:
        return "No run is done yet."
    row = rows[0]
    what = "accuracy in %" if is_accuracy(rows) else "minus the loss"
    length = f"{row['epochs']} epochs" if row["epochs"] else f"{row['budget']:g} s of training"
    seeds = len({r["seed"] for r in rows})
    machines = " and on ".join(dict.fromkeys(map(_machine, rows)))
    return (
        f"{row['dataset']}, inputs {_SCALED[row['scaling']]}; model {row['model']}, loss {row['loss'] or 'of the set'};"
        f" batch size {row['batch_size']}, {length} a run, {seeds} seed(s); {machines}.\n\n"
        f"Scores are {what}, mean ± standard deviation over seeds. For each method the cell (rate) and, in each run, "
        "the check (epoch) of the peak are chosen by validation rows; test rows only report. Grid: mean validation "
        f"score at the end, over all of the method's rates. Target: validation score {_number(target)}, in the best "
        "cell. Seconds are training time, without compilation and validation. Times, epochs and solves are means over "
        "the best cell's runs. Differences are paired by seed, of tests at the peak, ± standard error."
    )


def _machine(row: Row) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in row["versions"].items())
    return f"{row['device']}, {row['cores']} cores; {versions}"


_SCALED = {"standardise": "standardised", "unit": "scaled to 1", "none": "as they are"}


def _number(value: float, digits: int | None = None) -> str:
    """Two digits of an accuracy in %, four of a loss, which is small."""
    if value == NO_SCORE:
        return "failed"
    return f"{value:.{_digits(value) if digits is None else digits}f}"


def _digits(value: float) -> int:
    return 2 if abs(value) >= 1 else 4


def _rate(method: Summary) -> str:
    rate = method.rates[0]
    name = "C " if method.method == PROBE else ""
    return "–" if rate is None else f"{name}{rate:g} of {len(method.rates)}"


def spread(values: Iterable[float]) -> str:
    """Mean ± standard deviation."""
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
