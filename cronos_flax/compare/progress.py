"""Progress of a comparison on the terminal: a bar and each method's best so far; elsewhere, a line for each run."""

from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table

from cronos_flax.compare.summaries import Summary, last, peak, score, summaries
from cronos_flax.compare.task import Row, Run


class Progress:
    """Show runs as they are made: a context manager, and the ``watch`` of :func:`cronos_flax.compare.sweep.sweep`.

    Args:
        total: the number of runs, or of epochs.
        quiet: show nothing.
    """

    def __init__(self, total: int, *, quiet: bool) -> None:
        self._console = Console(quiet=quiet)
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
        )
        self._task = self._bar.add_task("", total=total)
        self._total, self._done = total, 0
        self._rows: list[Row] = []
        self._is_live = self._console.is_terminal and not quiet
        self._live = Live(self._bar, console=self._console, transient=True)

    def __enter__(self) -> Self:
        if self._is_live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._is_live:
            self._live.stop()

    def __call__(self, event: str, run: Run, what: Any) -> None:
        """Take a check (its row), or a run that is done or was done before (its rows)."""
        if event == "check":
            self._bar.update(self._task, description=f"{run.name}, epoch {what['epoch']}")
            return
        self._done += 1
        self._rows += what
        if self._is_live:
            self._bar.update(self._task, advance=1)
            self._live.update(Group(_table(summaries(self._rows)), self._bar))
        elif event == "done":
            said = what[-1].get("error") or _figures(peak(what))
            self._console.print(f"[{self._done}/{self._total}] {run.name}: {said}", markup=False, highlight=False)

    def epoch(self, row: Row) -> None:
        """Take a check of a single run."""
        self._bar.update(self._task, completed=row["epoch"], description="")
        said = f"epoch {row['epoch']}: training loss {row['train_loss']:.4f}, {_figures(row)}"
        self._console.print(said, markup=False, highlight=False)

    def show(self, rows: list[Row], out: Path) -> None:
        """Print the table at the end, and the names of the files."""
        self._console.print(_table(summaries(rows)))
        self._console.print(f"{out}: results.jsonl, table.md, curves.png, budget.png", highlight=False)


def _figures(row: Row) -> str:
    """The scores of a check, as a text."""
    unit = " %" if "validation_accuracy" in row else ""
    seconds = "" if row.get("seconds") is None else f", {row['seconds']:.1f} s"
    return f"validation {score(row, 'validation'):.4g}{unit} at epoch {row['epoch']}{seconds}"


def _table(methods: list[Summary]) -> Table:
    table = Table("method", "best rate", "validation", "test", "at end", "runs", "failed")
    for method in methods:
        runs, best = method.runs(), list(method.best.values())
        means = [
            sum(score(which(checks), split) for checks in best) / len(best)
            for which, split in ((peak, "validation"), (peak, "test"), (last, "test"))
        ]
        rate = "–" if method.rates[0] is None else f"{method.rates[0]:g}"
        failed = sum("error" in checks[-1] for checks in runs)
        table.add_row(method.method, rate, *(f"{m:.2f}" for m in means), str(len(runs)), str(failed or ""))
    return table
