"""The methods of a comparison: which there are, their grids of rates, and one run of each.

CRONOS-AM, the head solved on a frozen backbone, a linear probe on the same features, and Optax optimizers.
"""

import dataclasses
import functools
import math
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from flax import struct
from flax.training.train_state import TrainState
from scipy.special import log_softmax
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, Ridge

from cronos_flax._alternation.backbone import rated
from cronos_flax._alternation.defaults import DECAYS, Alternation
from cronos_flax._alternation.steps import scoring
from cronos_flax._alternation.train import train
from cronos_flax._alternation.train_state import CronosTrainState
from cronos_flax._head.fit import fit_rows
from cronos_flax._solver.cronos import Cronos
from cronos_flax._solver.losses import loss_of
from cronos_flax.compare.task import Row, Run, Task

ALTERNATION, STRICT, FROZEN, PROBE = "cronos-am", "cronos-am-strict", "cronos", "linear-probe"

_WEIGHT_DECAY = 1e-4
_BACKBONE, _BACKBONE_RATE = "adam", 3e-3  # of CRONOS-AM without a search
_PAPER = Alternation(head="frozen", decay=None, largest_step=None)
_PROBE_DECADES = (-3.0, 3.0)
_ITERATIONS, _MOST_SOLVES = 10, 50  # on a frozen backbone: iterations between two checks, and checks
_STAGNATION = 1e-3  # relative decrease of the loss between two checks below which the run ends
_NO_LIMIT = 10**6  # epochs, where seconds are the limit


class Baseline(NamedTuple):
    """An optimizer as a function of its rate, and its grid: the exponents of ten of the lowest and highest rate.

    ``usual`` is the rate that users take without a search, where there is one. ``evaluate(opt_state, params)`` gives
    the parameters to evaluate, where these are not the ones trained.
    """

    make: Callable[[float], optax.GradientTransformation]
    low: float
    high: float
    usual: float | None = None
    evaluate: Callable[[Any, Any], Any] | None = None


BASELINES = {
    "adam": Baseline(optax.adam, -4.5, -1.5, 1e-3),
    "adamw": Baseline(lambda rate: optax.adamw(rate, weight_decay=_WEIGHT_DECAY), -4.5, -1.5, 1e-3),
    "nadamw": Baseline(lambda rate: optax.nadamw(rate, weight_decay=_WEIGHT_DECAY), -4.5, -1.5, 1e-3),
    "sgd": Baseline(lambda rate: optax.sgd(rate, momentum=0.9), -3.5, -0.5),
    "yogi": Baseline(optax.yogi, -4, -1),
    "muon": Baseline(optax.contrib.muon, -3.5, -0.5),
    # The next two find a rate themselves; theirs here is a factor on it, 1 by default.
    "dadapt_adamw": Baseline(lambda rate: optax.contrib.dadapt_adamw(rate, weight_decay=_WEIGHT_DECAY), -1.5, 1.5, 1.0),
    "prodigy": Baseline(optax.contrib.prodigy, -1.5, 1.5, 1.0),
    "mechanize": Baseline(
        lambda rate: optax.contrib.mechanize(optax.adamw(rate, weight_decay=_WEIGHT_DECAY)), -4.5, -1.5
    ),
    "schedule_free_adamw": Baseline(
        lambda rate: optax.contrib.schedule_free_adamw(rate, weight_decay=_WEIGHT_DECAY),
        -4,
        -1,
        None,
        optax.contrib.schedule_free_eval_params,
    ),
}
METHODS = (ALTERNATION, STRICT, FROZEN, PROBE, *BASELINES)
_NO_DECAY = "schedule_free_adamw"  # averages in the place of a schedule


class Parts(NamedTuple):
    """What the name of a method says: ``KIND``, ``KIND:OPTIMIZER``, ``OPTIMIZER`` or ``OPTIMIZER+DECAY``."""

    kind: str | None  # the alternation; None for an optimizer alone
    optimizer: str | None  # None for the usual one
    decay: str | None


def parts_of(method: str) -> Parts:
    """The parts of the name of a method that trains by gradient steps."""
    kind, _, name = method.rpartition(":")
    if method in (ALTERNATION, STRICT):
        kind, name = method, ""
    name, _, decay = name.partition("+")
    return Parts(kind or None, name or None, decay or None)


def check_method(method: str) -> str:
    """Return the method if it exists.

    Raises:
        ValueError: if it does not; the message lists those that do.
    """
    kind, name, decay = parts_of(method)
    exists = method in METHODS or (
        name in BASELINES
        and kind in (None, ALTERNATION, STRICT)
        and (decay is None or (kind is None and decay in filter(None, DECAYS) and name != _NO_DECAY))
        and not method.endswith("+")
    )
    if not exists:
        raise ValueError(
            f"`methods` must be of {', '.join(METHODS)}, or {ALTERNATION}:OPTIMIZER or {STRICT}:OPTIMIZER with one of "
            f"the optimizers, or OPTIMIZER+DECAY with {', '.join(filter(None, DECAYS))} (not for {_NO_DECAY}), got "
            f"{method!r}."
        )
    return method


def has_head(method: str) -> bool:
    """Whether a method needs to know the head of the model; an optimizer alone does not."""
    return method in (FROZEN, PROBE) or parts_of(method).kind is not None


def grid(method: str, rates: int, span: tuple[float, float] | None = None, random: int | None = None) -> list[Any]:
    """The rates that a method is run at.

    Args:
        method: as :func:`check_method` takes it.
        rates: how many.
        span: the lowest and the highest rate; None for the three decades that are usual for the method.
        random: a seed: rates are drawn, uniformly in their logarithm, instead of spaced.

    Returns:
        Rates in increasing order; ``[None]`` for a method without a rate to search.
    """
    name = parts_of(method).optimizer
    if name is None or name == FROZEN:
        return [None]
    low, high = _PROBE_DECADES if name == PROBE else BASELINES[name][1:3]
    if span is not None and name != PROBE:
        low, high = (math.log10(rate) for rate in span)
    if random is not None:
        exponents = np.sort(np.random.default_rng(random).uniform(low, high, rates))
    else:
        exponents = np.linspace(low, high, rates) if rates > 1 else np.asarray([(low + high) / 2])
    return [float(f"{10**exponent:.3g}") for exponent in exponents]


@functools.lru_cache(maxsize=64)
def optimizer(name: str, rate: float, decays: bool = False) -> optax.GradientTransformation:
    """The optimizer of this name; the same object each time, so that its step is compiled once."""
    tx = BASELINES[name].make(rate)
    return rated(tx) if decays else tx


class BaselineState(TrainState):
    """Flax's ``TrainState`` with collections, parameters to evaluate that differ from those trained, and a decay.

    Args:
        model_state: the module's other collections.
        evaluate: gives the parameters to evaluate; None for those that are trained.
        run_decay: how ``cf.train`` lets the rate fall, if ``tx`` is :func:`rated`; None for a rate that stays.
    """

    model_state: Any = struct.field(default_factory=dict)
    evaluate: Callable[[Any, Any], Any] | None = struct.field(pytree_node=False, default=None)
    run_decay: str | None = struct.field(pytree_node=False, default=None)

    @property
    def eval_params(self) -> Any:
        """Parameters to evaluate; None for ``params``."""
        return None if self.evaluate is None else self.evaluate(self.opt_state, self.params)


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
        A row for each check: ``epoch`` (for a frozen backbone, iterations of the solver), ``seconds``, ``train_loss``
        (the mean over the epoch's steps), ``compile_seconds``, and losses and accuracies on validation rows
        (``validation_``) and test rows (``test_``).
    """
    if run.method == PROBE:
        return _probed(task, run)
    if run.method == FROZEN:
        return _frozen(task, run, watch)
    return _trained(task, run, watch, directory)


def _trained(task: Task, run: Run, watch: Callable[[Row], Any], directory: Path | None) -> list[Row]:
    """CRONOS-AM, or gradient steps alone."""
    settings, model, data = task.settings, task.model, task.split(run.seed)
    variables = model.init(run.seed, data.x[:1])
    common = {"apply_fn": model.module.apply, "params": variables["params"], "model_state": _collections(variables)}
    kind, name, decay = parts_of(run.method)
    state: Any
    if kind is not None:
        tx = optimizer(_BACKBONE, _BACKBONE_RATE) if name is None else optimizer(name, run.rate)
        alternation = _PAPER if kind == STRICT else Alternation()
        state = CronosTrainState.create(
            **common, tx=tx, head=task.head_in_training, solver=Cronos(loss=task.loss), alternation=alternation
        )
    else:
        assert name is not None
        tx = optimizer(name, run.rate, decay is not None)
        state = BaselineState.create(**common, tx=tx, evaluate=BASELINES[name].evaluate, run_decay=decay)
    live = _Checks()
    with warnings.catch_warnings():
        # A rate that is too high for an optimizer is a cell of the grid, with its rows.
        warnings.filterwarnings("ignore", "train: the parameters are not finite")
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
            callbacks=[lambda row: watch(check) if (check := live.of(row)) else None],
            directory=directory,
            compile_first=True,
        )
    checks = _Checks()
    return [check for row in history if (check := checks.of(row))]


class _Checks:
    """Merge the rows of ``cf.train``: an epoch's row, and the figures of the solves before it."""

    def __init__(self) -> None:
        self._before: Row = {}

    def of(self, row: Row) -> Row | None:
        """The check that an epoch's row makes; None for the row of a solve, which belongs to the next check."""
        if "loss" not in row:
            times = ("step", "epoch", "seconds", "solve_seconds")
            self._before |= {name: value for name, value in row.items() if name not in times}
            return None
        return {**self._before, "train_loss": row["loss"], **{k: v for k, v in row.items() if k != "loss"}}


def _frozen(task: Task, run: Run, watch: Callable[[Row], Any]) -> list[Row]:
    """The head solved on the features of an untrained backbone, until it stagnates or the time is over."""
    settings, model, data = task.settings, task.model, task.split(run.seed)
    variables, key = model.init(run.seed, data.x[:1]), jax.random.key(run.seed)
    state = BaselineState.create(
        apply_fn=model.module.apply,
        params=variables["params"],
        tx=optimizer(_BACKBONE, _BACKBONE_RATE),
        model_state=_collections(variables),
    )
    score = scoring(state, loss_of(task.loss), model.eval_kwargs)
    network, solver = task.head.read(variables), Cronos(loss=task.loss, max_iters=_ITERATIONS, tol=0.0)

    def timed(do: Callable[[], Any]) -> tuple[Any, float]:
        began = time.perf_counter()
        return jax.block_until_ready(do()), time.perf_counter() - began

    def features() -> Any:
        return jax.device_put(task.head.gather(variables, (data.x, data.y), None, None)[0])

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
    beta = None  # chosen by the first solve, and kept
    for number in range(1, _MOST_SOLVES + 1):
        (new, solution), taken = timed(functools.partial(solved, network, rows, number, beta))
        beta = solution.stats.beta
        network, seconds = network if new is None else new, seconds + taken
        state = state.replace(params=task.head.write(variables, network)["params"])
        before, after = float(solution.stats.initial_objective), float(solution.stats.objective)
        check = {"epoch": _ITERATIONS * number, "seconds": seconds, "compile_seconds": compiling, "objective": after}
        for name, x, y in _parts(data):
            check |= {f"{name}_{figure}": value for figure, value in score(state, (x, y)).items()}
        checks.append(check)
        watch(check)
        if before - after < _STAGNATION * before or (settings.budget and seconds + taken > settings.budget):
            break
    return checks


def _probed(task: Task, run: Run) -> list[Row]:
    """A linear model on the features of an untrained backbone."""
    data, num_classes = task.labelled(run.seed), task.dataset.num_classes
    variables = task.model.init(run.seed, data.x[:1])

    def features(x: np.ndarray) -> np.ndarray:
        blocks = [task.head.inputs(variables, x[i : i + 1024]) for i in range(0, len(x), 1024)]
        return np.concatenate([np.asarray(block) for block in blocks])

    inputs = {name: features(x) for name, x, _ in _parts(data)}
    began = time.perf_counter()
    assert run.rate is not None
    outputs = linear_probe(inputs["train"], data.y, run.rate, regression=num_classes is None)
    row: Row = {"epoch": 0, "seconds": time.perf_counter() - began, "compile_seconds": 0.0}
    for name, _, y in _parts(data):
        out = outputs(inputs[name])
        if num_classes is None:
            row[f"{name}_loss"] = float(np.mean((out[:, 0] - y) ** 2) / 2)
        else:
            row[f"{name}_loss"] = -float(np.mean(out[np.arange(len(y)), y]))
            row[f"{name}_accuracy"] = float(np.mean(out.argmax(axis=1) == y))
    return [row]


def linear_probe(
    features: np.ndarray, y: np.ndarray, strength: float, *, regression: bool
) -> Callable[[np.ndarray], np.ndarray]:
    """Fit scikit-learn's linear model; returns a function that gives values, or log-probabilities by class.

    Args:
        features: of the rows to fit, ``(n, p)``.
        y: labels or values, ``(n,)``.
        strength: the inverse of the regularisation, C of ``LogisticRegression``, 1/α of ``Ridge``.
        regression: whether y are values.
    """
    if regression:
        ridge = Ridge(alpha=1 / strength).fit(features, y)
        return lambda x: ridge.predict(x)[:, None]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        logistic = LogisticRegression(C=strength, max_iter=500).fit(features, y)

    def log_probabilities(x: np.ndarray) -> np.ndarray:
        scores = logistic.decision_function(x)
        scores = scores if scores.ndim == 2 else np.stack([np.zeros_like(scores), scores], axis=1)
        return log_softmax(scores, axis=1)

    return log_probabilities


def _collections(variables: Any) -> dict[str, Any]:
    """All variables but the parameters."""
    return {name: tree for name, tree in variables.items() if name != "params"}


def _parts(data: Any) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """The parts of a split by the names that figures have in rows."""
    return [
        ("train", data.x, data.y),
        ("validation", data.x_validation, data.y_validation),
        ("test", data.x_test, data.y_test),
    ]
