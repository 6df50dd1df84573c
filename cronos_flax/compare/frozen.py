"""What a comparison does on a frozen backbone: the head solved on its features, and a linear probe of these.

Each is a method, and the start of one that trains all layers. Their time counts from the first pass through the
backbone; compilation is left out, by doing once before what is timed.
"""

import dataclasses
import functools
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike
from scipy.special import log_softmax
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, Ridge

from cronos_flax._alternation.steps import scoring
from cronos_flax._head.data import UserData
from cronos_flax._head.fit import fit_rows
from cronos_flax._solver.cronos import Cronos
from cronos_flax._solver.losses import loss_of
from cronos_flax._solver.solution import TwoLayer
from cronos_flax.compare.methods import PROBE_DECADES, BaselineState
from cronos_flax.compare.task import Row, Run, Task

_ITERATIONS, _MOST_SOLVES = 10, 50  # between two checks, and checks
_STAGNATION = 1e-3  # relative decrease of the loss between two checks below which the run ends
_STRENGTHS = 7  # of a probe that training starts from: one for each power of ten


def timed(do: Callable[[], Any]) -> tuple[Any, float]:
    """What a function returns, computed, and the seconds that it took."""
    began = time.perf_counter()
    return jax.block_until_ready(do()), time.perf_counter() - began


def parts(data: Any) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """The parts of a split by the names that figures have in rows."""
    return [
        ("train", data.x, data.y),
        ("validation", data.x_validation, data.y_validation),
        ("test", data.x_test, data.y_test),
    ]


def scored(task: Task, seed: int, variables: Any) -> Row:
    """Losses and accuracies of the model with these variables, on all parts of the split."""
    state = BaselineState.create(
        apply_fn=task.model.apply,
        params=variables["params"],
        tx=optax.identity(),
        model_state={name: tree for name, tree in variables.items() if name != "params"},
    )
    score = scoring(state, loss_of(task.loss), task.model.eval_kwargs)
    each = {name: score(state, UserData((x, y), None, "compare")) for name, x, y in parts(task.split(seed))}
    return {f"{name}_{figure}": value for name, figures in each.items() for figure, value in figures.items()}


def solved(task: Task, run: Run, watch: Callable[[Row], Any]) -> list[Row]:
    """The head solved on the features of the backbone as it is, until it stagnates or the time is over.

    Returns:
        A row for each check, whose ``epoch`` are iterations of the solver.
    """
    settings, data = task.settings, task.split(run.seed)
    variables, key = task.model.init(run.seed, data.x[:1]), jax.random.key(run.seed)
    network, solver = task.head.read(variables), Cronos(loss=task.loss, max_iters=_ITERATIONS, tol=0.0)

    def features() -> Any:
        return jax.device_put(task.head.gather(variables, (data.x, data.y))[0])

    def advanced(network: Any, rows: Any, number: int, beta: Any) -> Any:
        with_beta = dataclasses.replace(solver, beta=beta)
        return fit_rows(network, rows, with_beta, jax.random.fold_in(key, number), None, throw=True)

    def compiled() -> None:
        rows = features()
        _, solution = advanced(network, rows, 0, None)
        advanced(network, rows, 1, solution.stats.beta)

    _, compiling = timed(compiled)
    rows, seconds = timed(features)
    checks: list[Row] = []
    beta = None  # chosen by the first solve, and kept
    for number in range(1, _MOST_SOLVES + 1):
        (new, solution), taken = timed(functools.partial(advanced, network, rows, number, beta))
        beta = solution.stats.beta
        network, seconds = network if new is None else new, seconds + taken
        before, after = float(solution.stats.initial_objective), float(solution.stats.objective)
        check = {"epoch": _ITERATIONS * number, "seconds": seconds, "compile_seconds": compiling, "objective": after}
        check |= scored(task, run.seed, task.head.write(variables, network))
        checks.append(check)
        watch(check)
        if before - after < _STAGNATION * before or (settings.budget and seconds + taken > settings.budget):
            break
    return checks


class Linear(NamedTuple):
    """A linear model ``x kernel + bias``.

    Args:
        kernel: shape ``(p, C)``; of two classes as of others, a column for each.
        bias: shape ``(C,)``.
    """

    kernel: np.ndarray
    bias: np.ndarray

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Outputs ``(n, C)`` of features ``(n, p)``."""
        return x @ self.kernel + self.bias


def linear_probe(
    features: np.ndarray, y: np.ndarray, strength: float, *, num_classes: int | None, has_bias: bool = True
) -> Linear:
    """Fit scikit-learn's ``LogisticRegression``, or ``Ridge``.

    Args:
        features: of the rows to fit, ``(n, p)``.
        y: labels ``(n,)``; or values, ``(n,)`` or ``(n, C)``.
        strength: the inverse of the regularisation, C of ``LogisticRegression``, 1/α of ``Ridge``.
        num_classes: the number of classes; None for values.
        has_bias: whether to fit a bias; else it is zero.

    Returns:
        The model; of classes its outputs are log-probabilities up to a constant of each row. A class without a row has
        as output what an output is at least, less the log of the number of rows; without bias zero.
    """
    if num_classes is None:
        ridge = Ridge(alpha=1 / strength, fit_intercept=has_bias).fit(features, y)
        kernel = np.atleast_2d(ridge.coef_).T
        return Linear(kernel, np.broadcast_to(ridge.intercept_, kernel.shape[1:]))
    kernel, bias = np.zeros((features.shape[1], num_classes)), np.zeros(num_classes)
    classes = np.unique(y)
    if len(classes) > 1:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            logistic = LogisticRegression(C=strength, max_iter=500, fit_intercept=has_bias).fit(features, y)
        signs = np.asarray([[-0.5, 0.5]]) if len(classes) == 2 else np.eye(len(classes))  # of two, the log of the odds
        kernel[:, classes] = logistic.coef_.T @ signs
        bias[classes] = np.broadcast_to(logistic.intercept_, logistic.coef_.shape[:1]) @ signs
    there = Linear(kernel[:, classes], bias[classes])
    if has_bias and len(classes) < num_classes:
        bias[np.setdiff1d(np.arange(num_classes), classes)] = np.min(there(features)) - np.log(len(y))
    return Linear(kernel, bias)


def probed(task: Task, run: Run) -> list[Row]:
    """A linear model of some strength on the features of the backbone as it is; one row."""
    data, num_classes = task.labelled(run.seed), task.dataset.num_classes
    variables = task.model.init(run.seed, data.x[:1])

    def features(x: np.ndarray) -> np.ndarray:
        blocks = [task.head.inputs(variables, x[i : i + 1024]) for i in range(0, len(x), 1024)]
        return np.concatenate([np.asarray(block) for block in blocks])

    _, first = timed(lambda: features(data.x))
    inputs, passing = timed(lambda: features(data.x))
    assert run.rate is not None
    strength = run.rate
    model, fitting = timed(lambda: linear_probe(inputs, data.y, strength, num_classes=num_classes))
    row: Row = {"epoch": 0, "seconds": passing + fitting, "compile_seconds": max(first - passing, 0.0)}
    for name, x, y in parts(data):
        out = model(features(x))
        if num_classes is None:
            row[f"{name}_loss"] = float(jnp.mean(loss_of(task.loss).value(jnp.asarray(out), jnp.asarray(y[:, None]))))
        else:
            row[f"{name}_loss"] = -float(np.mean(log_softmax(out, axis=1)[np.arange(len(y)), y]))
            row[f"{name}_accuracy"] = float(np.mean(out.argmax(axis=1) == y))
    return [row]


class Start(NamedTuple):
    """What training starts from: variables with a head on the frozen backbone, and what it took."""

    variables: Any
    seconds: float
    compile_seconds: float


def probe_first(task: Task, run: Run) -> Start:
    """A linear probe in the place of the head, its strength chosen on validation rows.

    Features are those that solves see, and the running statistics become theirs, as after a solve.
    """
    data, head, loss = task.split(run.seed), task.head_in_training, loss_of(task.loss)
    variables = task.model.init(run.seed, data.x[:1])
    network = head.read(variables)
    num_classes = task.dataset.num_classes if task.loss in ("softmax", "logistic") else None

    def features(x: np.ndarray, y: np.ndarray) -> Any:
        rows, moments = head.gather(variables, (x, y))
        return np.asarray(rows.X), np.asarray(rows.y), moments

    def score(linear: Linear, x: np.ndarray, y: np.ndarray) -> float:
        outputs = linear(x)
        if task.dataset.num_classes is None:
            return -float(np.mean(np.square(outputs - y)))
        labels = y if y.ndim == 1 else loss.labels(jnp.asarray(y))
        return float(jnp.mean(loss.predicted(jnp.asarray(outputs)) == labels))

    def fitted(x: np.ndarray, y: np.ndarray, strength: float) -> Linear:
        labels = y if num_classes is None else y.reshape(-1).astype(int)
        linear = linear_probe(x, labels, strength, num_classes=num_classes, has_bias=network.bias2 is not None)
        odds = np.asarray([[-1.0], [1.0]])  # of two classes, for the logistic loss of one output
        return Linear(linear.kernel @ odds, linear.bias @ odds) if task.loss == "logistic" else linear

    def probe() -> Any:
        x, y, moments = features(data.x, data.y)
        x_chosen_on, y_chosen_on, _ = features(data.x_validation, data.y_validation)
        each = [fitted(x, y, strength) for strength in np.logspace(*PROBE_DECADES, _STRENGTHS)]
        best = max(each, key=lambda linear: score(linear, x_chosen_on, y_chosen_on))
        return in_head(best, x, network), moments

    _, first = timed(probe)
    (made, moments), seconds = timed(probe)
    written = head.write(variables, made)
    return Start(head.module.recalibrated(written, moments), seconds, max(first - seconds, 0.0))


def in_head(linear: Linear, features: ArrayLike, network: TwoLayer) -> TwoLayer:
    """The head that computes a linear model.

    A direction needs two neurons, as ``relu(z) − relu(−z) = z``. If there are too few, the model is replaced by the
    nearest one of lower rank on these features. Neurons that are left over keep their kernels, and add nothing yet.

    Args:
        linear: the model, of the head's inputs and outputs.
        features: rows of the head's input, ``(n, p)``.
        network: the head.

    Returns:
        Weights of the shapes and dtypes of ``network``.
    """
    outputs = np.asarray(features) @ linear.kernel
    mean = outputs.mean(axis=0) if network.bias2 is not None else np.zeros(outputs.shape[1])
    _, vectors = np.linalg.eigh((outputs - mean).T @ (outputs - mean))
    vectors = vectors[:, ::-1][:, : network.kernel1.shape[1] // 2]
    directions = linear.kernel @ vectors
    size = np.sqrt(np.linalg.norm(directions, axis=0))  # so that both layers have the same
    there = np.divide(directions, size, out=np.zeros_like(directions), where=size > 0)
    back, used = (vectors * size).T, 2 * len(size)
    kernel1, kernel2 = np.array(network.kernel1), np.zeros_like(network.kernel2)
    kernel1[:, :used], kernel2[:used] = np.concatenate([there, -there], axis=1), np.concatenate([back, -back])
    bias1 = None if network.bias1 is None else network.bias1.at[:used].set(0)
    bias2 = None
    if network.bias2 is not None:
        bias2 = jnp.asarray(linear.bias + mean - mean @ vectors @ vectors.T, network.bias2.dtype)
    return TwoLayer(jnp.asarray(kernel1), bias1, jnp.asarray(kernel2), bias2)
