"""A comparison: many runs over methods, rates and seeds, each kept as rows of figures as soon as it is done.

A run is known by its method, rate and seed; what all runs share is in :class:`Settings`. Its rows are written at once
when it ends, so a comparison that was interrupted goes on with the runs that are missing.
"""

import dataclasses
import functools
import importlib.metadata
import itertools
import json
import math
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from cronos_flax._alternation.steps import scoring
from cronos_flax._alternation.train import train
from cronos_flax._alternation.train_state import CronosTrainState
from cronos_flax._head.fit import fit_rows
from cronos_flax._head.head import Head
from cronos_flax._head.linen import find_head
from cronos_flax._solver.cronos import Cronos
from cronos_flax._solver.losses import loss_of
from cronos_flax.compare.data import Dataset, Split, load, targets_for
from cronos_flax.compare.methods import BASELINES, BaselineState, linear_probe, optimizer
from cronos_flax.compare.models import Model, model_of

Row = dict[str, Any]

ALTERNATION, FROZEN, PROBE = "cronos-am", "cronos", "linear-probe"
METHODS = (ALTERNATION, FROZEN, PROBE, *BASELINES)
_BACKBONE, _BACKBONE_RATE = "adam", 1e-3  # of CRONOS-AM as it comes
_PROBE_DECADES = (-3.0, 3.0)
_ITERATIONS, _MOST_SOLVES = 10, 50  # of the solver between two checks of a frozen backbone, and how often
_STAGNATION = 1e-3  # relative decrease of the loss in that many steps that ends it
_SAMPLE = 64  # rows that the head is found with
_NO_LIMIT = 10**6  # epochs, where seconds are the limit
VERSIONS = ("cronos_flax", "jax", "flax", "optax", "numpy")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What all runs of a comparison share.

    Args:
        dataset: a name for :func:`cronos_flax.datasets.load`.
        model: a name for :func:`cronos_flax.models.model_of`.
        loss: a name that ``cf.Cronos`` knows; None for ``"softmax"``, or ``"squared"`` where there are no classes.
        epochs: how long each run is; or
        budget: how long, in seconds of training.
        batch_size: rows of a gradient step.
        rows: how many rows to fit at most.
        validation: how many are held back to choose by, or, below 1, which part.
        scaling: one of ``cronos_flax.datasets.SCALINGS``.
        data_dir: where TFDS sets lie; not part of what makes a comparison another one.
    """

    dataset: str
    model: str = "mlp"
    loss: str | None = None
    epochs: int | None = None
    budget: float | None = None
    batch_size: int = 128
    rows: int | None = None
    validation: float = 0.2
    scaling: str = "standardise"
    data_dir: str | None = dataclasses.field(default=None, compare=False)

    def shared(self) -> Row:
        """As a row has them."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.compare}


class Run(NamedTuple):
    """One cell of the grid, at one seed; ``rate`` is None for what has none."""

    method: str
    rate: float | None
    seed: int


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """The data, the model and its head that all runs share, made once."""

    settings: Settings
    dataset: Dataset
    loss: str
    model: Model

    @classmethod
    def of(cls, settings: Settings) -> "Task":
        """Read the data and make the model.

        Raises:
            ValueError: if one of them is not there, or they do not fit together.
        """
        dataset = load(settings.dataset, settings.data_dir)
        loss = settings.loss or ("softmax" if dataset.num_classes else "squared")
        _, outputs = targets_for(loss, dataset.y, dataset.num_classes)
        return cls(settings, dataset, loss, model_of(settings.model, outputs))

    @property
    def held_back(self) -> int:
        """Rows to choose by."""
        share = self.settings.validation
        return round(share * len(self.dataset.y)) if share < 1 else int(share)

    @functools.lru_cache(maxsize=1)  # noqa: B019 - a task lives as long as its process
    def split(self, seed: int) -> Split:
        """Its rows by this seed, with targets for the loss."""
        s = Split.of(self.dataset, seed, self.held_back, self.settings.scaling, self.settings.rows)
        y, y_validation, y_test = (
            targets_for(self.loss, part, self.dataset.num_classes)[0] for part in (s.y, s.y_validation, s.y_test)
        )
        return s._replace(y=y, y_validation=y_validation, y_test=y_test)

    @functools.cached_property
    def head(self) -> Head:
        """Of the model as it is evaluated; found once, so that what is compiled for one seed serves all.

        Raises:
            ValueError: if the model has none; the message says why and what to do.
        """
        x = self.split(0).x[:_SAMPLE]
        return find_head(self.model.module, self.model.init(0, x), x, **self.model.eval_kwargs)

    @functools.cached_property
    def head_in_training(self) -> Head:
        """With running statistics, of the model as it is trained: solves see the features that gradients see."""
        x = self.split(0).x[:_SAMPLE]
        variables = self.model.init(0, x)
        collections = [name for name in variables if name != "params"]
        if not (collections and self.model.train_kwargs):
            return self.head
        kwargs = {"mutable": collections, "rngs": {"dropout": jax.random.key(0)}, **self.model.train_kwargs}
        return find_head(self.model.module, variables, x, **kwargs)


def grid(method: str, rates: int, span: tuple[float, float] | None = None, random: int | None = None) -> list[Any]:
    """The rates that a method is run at.

    Args:
        method: as :func:`check_method` takes it.
        rates: how many.
        span: the lowest and the highest; None for those that fit the method.
        random: a seed: rates are drawn, uniformly in their logarithm, instead of spaced.

    Returns:
        Rates in increasing order; ``[None]`` for a method that has none.
    """
    name = method.removeprefix(f"{ALTERNATION}:")
    if name in (ALTERNATION, FROZEN):
        return [None]
    low, high = _PROBE_DECADES if name == PROBE else BASELINES[name][1:3]
    if span is not None and name != PROBE:
        low, high = (math.log10(rate) for rate in span)
    if random is not None:
        exponents = np.sort(np.random.default_rng(random).uniform(low, high, rates))
    else:
        exponents = np.linspace(low, high, rates) if rates > 1 else np.asarray([(low + high) / 2])
    return [float(f"{10**exponent:.3g}") for exponent in exponents]


def check_method(method: str) -> str:
    """The method, if it is one.

    Raises:
        ValueError: if not, with those that are.
    """
    if method not in METHODS and method.removeprefix(f"{ALTERNATION}:") not in BASELINES:
        raise ValueError(
            f"`methods` must be of {', '.join(METHODS)}, or {ALTERNATION}:OPTIMIZER with one of the optimizers, got "
            f"{method!r}."
        )
    return method


def rows_of(
    task: Task, run: Run, watch: Callable[[Row], Any] = lambda _: None, directory: Path | None = None
) -> list[Row]:
    """Do a run.

    Args:
        task: what it is done on.
        run: which it is.
        watch: called with the figures of each check as it is made.
        directory: where a run that takes gradient steps keeps checkpoints, and goes on from.

    Returns:
        A row for each check: ``epoch`` (of a frozen backbone, steps of the solver), ``seconds``, ``train_loss`` (the
        mean over the epoch's steps), losses and accuracies on the rows to choose by (``validation_``) and to report
        (``test_``), ``compile_seconds``.
    """
    if run.method == PROBE:
        return _probed(task, run)
    if run.method == FROZEN:
        return _frozen(task, run, watch)
    return _trained(task, run, watch, directory)


def _trained(task: Task, run: Run, watch: Callable[[Row], Any], directory: Path | None) -> list[Row]:
    settings, model, data = task.settings, task.model, task.split(run.seed)
    variables = model.init(run.seed, data.x[:1])
    collections = {name: tree for name, tree in variables.items() if name != "params"}
    common = {"apply_fn": model.module.apply, "params": variables["params"], "model_state": collections}
    name = run.method.removeprefix(f"{ALTERNATION}:")
    state: Any
    if run.method.startswith(ALTERNATION):
        backbone = (_BACKBONE, _BACKBONE_RATE) if name == ALTERNATION else (name, run.rate)
        tx = optimizer(*backbone)
        state = CronosTrainState.create(**common, tx=tx, head=task.head_in_training, solver=Cronos(loss=task.loss))
    else:
        state = BaselineState.create(**common, tx=optimizer(name, run.rate), evaluate=BASELINES[name].evaluate)
    told = _Checks()
    _, history = train(
        state,
        (data.x, data.y),
        epochs=settings.epochs or _NO_LIMIT,
        seconds=settings.budget,
        batch_size=settings.batch_size,
        loss=task.loss,
        validation={"validation": (data.x_validation, data.y_validation), "test": (data.x_test, data.y_test)},
        train_kwargs=model.train_kwargs,
        eval_kwargs=model.eval_kwargs,
        key=jax.random.key(run.seed),
        callbacks=[lambda row: watch(check) if (check := told.of(row)) else None],
        directory=directory,
        compile_first=True,
    )
    every = _Checks()
    return [check for row in history if (check := every.of(row))]


class _Checks:
    """The rows of ``cf.train`` put together: a check has what the last solve, and the guard, said before it."""

    def __init__(self) -> None:
        self._before: Row = {}

    def of(self, row: Row) -> Row | None:
        """The check that a row is, or None for one that belongs to the next."""
        if "loss" not in row:
            times = ("step", "epoch", "seconds", "solve_seconds")
            self._before |= {name: value for name, value in row.items() if name not in times}
            return None
        return {**self._before, "train_loss": row["loss"], **{k: v for k, v in row.items() if k != "loss"}}


def _frozen(task: Task, run: Run, watch: Callable[[Row], Any]) -> list[Row]:
    """A head that is solved for on the features of the backbone as it is, to the end or to the end of the time."""
    settings, model, data = task.settings, task.model, task.split(run.seed)
    variables, key = model.init(run.seed, data.x[:1]), jax.random.key(run.seed)
    state = BaselineState.create(
        apply_fn=model.module.apply,
        params=variables["params"],
        tx=optimizer(_BACKBONE, _BACKBONE_RATE),
        model_state={name: tree for name, tree in variables.items() if name != "params"},
    )
    score = scoring(state, loss_of(task.loss), model.eval_kwargs)
    network, solver = task.head.read(variables), Cronos(loss=task.loss, max_iters=_ITERATIONS, tol=0.0)

    def timed(do: Callable[[], Any]) -> tuple[Any, float]:
        began = time.perf_counter()
        return jax.block_until_ready(do()), time.perf_counter() - began

    def features() -> Any:
        return jax.device_put(task.head.gather(variables, (data.x, data.y), None, None))

    def solved(network: Any, rows: Any, number: int, beta: Any) -> Any:
        with_beta = dataclasses.replace(solver, beta=beta)
        return fit_rows(network, rows, with_beta, jax.random.fold_in(key, number), None, throw=True)

    def compiled() -> None:
        rows = features()
        _, solution = solved(network, rows, 0, None)
        solved(network, rows, 1, solution.stats.beta)

    _, compiling = timed(compiled)
    rows, seconds = timed(features)
    checks: list[Row] = []
    beta = None  # as the first steps find it, the same from then on
    for number in range(1, _MOST_SOLVES + 1):
        (new, solution), taken = timed(functools.partial(solved, network, rows, number, beta))
        beta = solution.stats.beta
        network, seconds = network if new is None else new, seconds + taken
        state = state.replace(params=task.head.write(variables, network)["params"])
        before, after = float(solution.stats.initial_objective), float(solution.stats.objective)
        check = {"epoch": _ITERATIONS * number, "seconds": seconds, "compile_seconds": compiling, "objective": after}
        for name, x, y in (
            ("train", data.x, data.y),
            ("validation", data.x_validation, data.y_validation),
            ("test", data.x_test, data.y_test),
        ):
            check |= {f"{name}_{figure}": value for figure, value in score(state, (x, y)).items()}
        checks.append(check)
        watch(check)
        if before - after < _STAGNATION * before or (settings.budget and seconds + taken > settings.budget):
            break
    return checks


def _probed(task: Task, run: Run) -> list[Row]:
    """A linear model on the features of the backbone as it is."""
    seed, num_classes = run.seed, task.dataset.num_classes
    plain = Split.of(task.dataset, seed, task.held_back, task.settings.scaling, task.settings.rows)
    variables = task.model.init(seed, plain.x[:1])
    features = [
        np.concatenate([np.asarray(task.head.inputs(variables, x[i : i + 1024])) for i in range(0, len(x), 1024)])
        for x in (plain.x, plain.x_validation, plain.x_test)
    ]
    began = time.perf_counter()
    assert run.rate is not None
    outputs = linear_probe(features[0], plain.y, run.rate, regression=num_classes is None)
    row: Row = {"epoch": 0, "seconds": time.perf_counter() - began, "compile_seconds": 0.0}
    for name, x, y in zip(("train", "validation", "test"), features, (plain.y, *plain[3::2]), strict=True):
        out = outputs(x)
        if num_classes is None:
            row[f"{name}_loss"] = float(np.mean((out[:, 0] - y) ** 2) / 2)
        else:
            row[f"{name}_loss"] = -float(np.mean(out[np.arange(len(y)), y]))
            row[f"{name}_accuracy"] = float(np.mean(out.argmax(axis=1) == y))
    return [row]


def kept(path: Path) -> list[Row]:
    """The rows of the runs that were finished; a line that was not, and the run that it is of, are passed over."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    ended = {_run_of(row) for row in rows if row.get("end")}
    return [row for row in rows if _run_of(row) in ended]


def by_run(rows: Iterable[Row]) -> dict[Run, list[Row]]:
    """Rows by the run that they are of."""
    runs: dict[Run, list[Row]] = {}
    for row in rows:
        runs.setdefault(_run_of(row), []).append(row)
    return runs


def sweep(
    settings: Settings,
    runs: Iterable[Run],
    out: Path,
    *,
    jobs: int = 1,
    watch: Callable[[str, Run, Any], Any] = lambda *_: None,
    task: Task | None = None,
) -> list[Row]:
    """Do the runs that are missing from ``out / "results.jsonl"``.

    Args:
        settings: what they share.
        runs: all that there shall be.
        out: the directory; made if it does not exist.
        jobs: how many run side by side, each on a core of its own; with more than one their seconds are not kept.
        watch: called with ``"check"``, a run and a row; or ``"done"``, or for what was done before
            ``"before"``, a run and its rows.
        task: of these settings, if it is there already.

    Returns:
        All rows, of earlier calls too.

    Raises:
        ValueError: if there are rows of other settings.
        OSError: if the directory cannot be written to.
    """
    out.mkdir(parents=True, exist_ok=True)
    path = out / "results.jsonl"
    rows = kept(path)
    for name, value in settings.shared().items():
        if rows and rows[0].get(name) != value:
            raise ValueError(
                f"`out` {out} holds a comparison with {name}={rows[0].get(name)!r}, and this one has {value!r}. Give "
                "another directory."
            )
    # Without what was not finished; in one move, so that nothing is lost.
    fresh = path.with_suffix(".new")
    fresh.write_text("".join(json.dumps(row) + "\n" for row in rows))
    fresh.replace(path)
    done, missing = by_run(rows), []
    for run in runs:
        if run in done:
            watch("before", run, done[run])
        else:
            missing.append(run)
    with path.open("a") as file:
        for run, new in _done(settings, missing, jobs, watch, task):
            file.write("".join(json.dumps(row) + "\n" for row in new))
            file.flush()
            os.fsync(file.fileno())
            rows += new
            watch("done", run, new)
    return rows


def _done(
    settings: Settings, runs: list[Run], jobs: int, watch: Callable[[str, Run, Any], Any], task: Task | None
) -> Iterator[tuple[Run, list[Row]]]:
    if jobs == 1:
        for run in runs:
            task = Task.of(settings) if task is None else task
            yield run, _finished(task, run, functools.partial(watch, "check", run))
        return
    context = multiprocessing.get_context("spawn")
    with context.Pool(jobs, _one_core, (context.Value("i", 0),)) as pool:
        for run, rows in pool.imap_unordered(_worked, zip(itertools.repeat(settings), runs, strict=False)):
            yield run, [{**row, "seconds": None, "compile_seconds": None} for row in rows]


def _finished(task: Any, run: Run, watch: Callable[[Row], Any] = lambda _: None) -> list[Row]:
    """A run's rows as they are kept; of one that failed, a row that says how."""
    try:
        rows = rows_of(task, run, watch)
    except Exception as error:  # one run that fails is not the end of the others
        rows = [{"epoch": 0, "error": f"{type(error).__name__}: {error}"}]
    known = {**task.settings.shared(), **run._asdict(), **_environment()}
    rows = [{**known, **{name: _plain(value) for name, value in row.items()}} for row in rows]
    rows[-1]["end"] = True
    return rows


def _plain(value: Any) -> Any:
    """As JSON has it, which knows no NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


@functools.cache
def _environment() -> Row:
    device = jax.devices()[0]
    return {
        "versions": {name: importlib.metadata.version(name) for name in VERSIONS},
        "device": f"{device.platform} {device.device_kind}",
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    }


def _run_of(row: Row) -> Run:
    return Run(row["method"], row["rate"], row["seed"])


_task_of = functools.cache(Task.of)  # of a worker process


def _worked(job: tuple[Settings, Run]) -> tuple[Run, list[Row]]:
    settings, run = job
    return run, _finished(_task_of(settings), run)


def _one_core(counter: Any) -> None:
    """Give each worker process a core of its own."""
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        with counter.get_lock():
            os.sched_setaffinity(0, {cores[counter.value % len(cores)]})
            counter.value += 1
