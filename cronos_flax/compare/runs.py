"""One run of a comparison: a method at a rate and a seed."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from cronos_flax._alternation.defaults import Alternation
from cronos_flax._alternation.train import train
from cronos_flax._alternation.train_state import CronosTrainState
from cronos_flax._solver.cronos import Cronos
from cronos_flax.compare.frozen import Start, probe_first, probed, scored, solved, timed
from cronos_flax.compare.methods import (
    BACKBONE,
    BACKBONE_RATE,
    FROZEN,
    PROBE,
    PROBED_FIRST,
    SOLVED_FIRST,
    STRICT,
    BaselineState,
    at_rate,
    evaluated,
    optimizer,
    parts_of,
)
from cronos_flax.compare.task import Row, Run, Task

_PAPER = Alternation(head="frozen", decay=None, largest_step=None)
_NO_LIMIT = 10**6  # epochs, where seconds are the limit


def rows_of(
    task: Task, run: Run, watch: Callable[[Row], Any] = lambda _: None, directory: Path | None = None
) -> list[Row]:
    """Do a run.

    Args:
        task: the data and the model.
        run: method, rate and seed.
        watch: called with the row of each check as it is made.
        directory: where a run of gradient steps keeps its checkpoints, and resumes from.

    Returns:
        A row for each check: ``epoch`` (for a frozen backbone, iterations of the solver; 0 for what gradient steps
        start from, if that was fitted), ``seconds``, ``train_loss`` (the mean over the epoch's steps),
        ``compile_seconds``, and losses and accuracies on validation rows (``validation_``) and test rows (``test_``).
    """
    if run.method == PROBE:
        return probed(task, run)
    if run.method == FROZEN:
        return solved(task, run, watch)
    return _trained(task, run, watch, directory)


def _trained(task: Task, run: Run, watch: Callable[[Row], Any], directory: Path | None) -> list[Row]:
    """CRONOS-AM, or gradient steps alone; before these, perhaps, something for the head."""
    settings, model, data = task.settings, task.model, task.split(run.seed)
    state, start = _started(task, run)
    before: list[Row] = []
    if start is not None:
        times = {"epoch": 0, "seconds": start.seconds, "compile_seconds": start.compile_seconds}
        before.append(times | scored(task, run.seed, start.variables))
        watch(before[0])
    spent, compiling = (0.0, 0.0) if start is None else (start.seconds, start.compile_seconds)
    left = None if settings.budget is None else settings.budget - spent
    if left is not None and left <= 0:
        return before
    made, live = _Checks(spent, compiling), _Checks(spent, compiling)
    batch_size = min(settings.batch_size, len(data.x))
    rows: Any = (data.x, data.y)
    steps = None
    if task.augment is not None:
        rows, steps = task.augmented(run.seed, batch_size), len(data.x) // batch_size
    with warnings.catch_warnings():
        # A rate that is too high for an optimizer is a cell of the grid, with its rows.
        warnings.filterwarnings("ignore", "train: the parameters are not finite")
        _, history = train(
            state,
            rows,
            epochs=settings.epochs or _NO_LIMIT,
            seconds=left,
            batch_size=batch_size,
            steps_per_epoch=steps,
            solve_data=None if steps is None else (data.x, data.y),
            loss=task.loss,
            validation={"validation": (data.x_validation, data.y_validation), "test": (data.x_test, data.y_test)},
            train_kwargs=model.train_kwargs,
            eval_kwargs=model.eval_kwargs,
            key=jax.random.key(run.seed),
            callbacks=[lambda row: watch(check) if (check := live.of(row)) else None],
            directory=directory,
            compile_first=True,
        )
    return before + [check for row in history if (check := made.of(row))]


def _started(task: Task, run: Run) -> tuple[Any, Start | None]:
    """The train state before the first epoch; and what was done for it, if anything was."""
    model, data, parts = task.model, task.split(run.seed), parts_of(run.method)
    variables = model.init(run.seed, data.x[:1])
    start = probe_first(task, run) if parts.kind == PROBED_FIRST else None
    variables = variables if start is None else start.variables
    collections = {name: tree for name, tree in variables.items() if name != "params"}
    common = {"apply_fn": model.apply, "params": variables["params"], "model_state": collections}
    if not parts.alternates:
        assert parts.optimizer is not None
        assert run.rate is not None
        tx, evaluate = optimizer(parts.optimizer, parts.decay is not None), evaluated(parts.optimizer)
        baseline = BaselineState.create(**common, tx=tx, evaluate=evaluate, run_decay=parts.decay)
        return at_rate(baseline, run.rate), start
    state = CronosTrainState.create(
        **common,
        tx=optimizer(parts.optimizer or BACKBONE),
        head=task.head_in_training,
        solver=Cronos(loss=task.loss),
        alternation=_PAPER if parts.kind == STRICT else Alternation(),
    )
    state = at_rate(state, BACKBONE_RATE if run.rate is None else run.rate)
    if parts.kind == SOLVED_FIRST:

        def solved() -> Any:
            return state.solve_head((data.x, data.y), key=jax.random.key(run.seed))[0]

        _, first = timed(solved)
        state, seconds = timed(solved)
        start = Start(state.variables, seconds, max(first - seconds, 0.0))
    return state, start


class _Checks:
    """Merge the rows of ``cf.train``: an epoch's row, and the figures of the solves before it.

    Args:
        spent: seconds before the first epoch.
        compiling: seconds of compilation before that.
    """

    def __init__(self, spent: float, compiling: float) -> None:
        self._spent, self._compiling = spent, compiling
        self._before: Row = {}

    def of(self, row: Row) -> Row | None:
        """The check that an epoch's row makes; None for the row of a solve, which belongs to the next check."""
        if "loss" not in row:
            times = ("step", "epoch", "seconds", "solve_seconds")
            self._before |= {name: value for name, value in row.items() if name not in times}
            return None
        check = {**self._before, "train_loss": row["loss"], **{k: v for k, v in row.items() if k != "loss"}}
        check["seconds"] += self._spent
        if "compile_seconds" in check:
            check["compile_seconds"] += self._compiling
        return check
