"""Estimators for scikit-learn: two-layer ReLU networks that are solved, not tuned. Needs the extra ``sklearn``."""

import functools
from collections.abc import Callable
from typing import Any, Self

import jax
import numpy as np
from jax.typing import ArrayLike
from scipy.special import log_softmax
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_random_state, compute_sample_weight
from sklearn.utils.metaestimators import available_if
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data

from cronos_flax._solver import checks
from cronos_flax._solver.beta_path import FEWEST
from cronos_flax._solver.cronos import Cronos
from cronos_flax._solver.loss import Loss
from cronos_flax._solver.losses import loss_of
from cronos_flax._solver.solution import Status
from cronos_flax._solver.transfer import on_device, on_host, seeded
from cronos_flax._solver.user_warnings import warn

__all__ = ["CronosClassifier", "CronosRegressor"]

_FEW = 2048  # rows up to which equal ones are merged; up to so many a solve never looks at a sample


def _all_or_nothing(fit: Callable) -> Callable:
    """A ``fit`` after whose errors the estimator is as it was: its network, and what scikit-learn knows of columns."""

    @functools.wraps(fit)
    def whole(self: Any, X: ArrayLike, y: ArrayLike, sample_weight: ArrayLike | None = None) -> Any:
        before = dict(vars(self))
        try:
            return fit(self, X, y, sample_weight)
        except BaseException:
            vars(self).clear()
            vars(self).update(before)
            raise

    return whole


class _TwoLayer(BaseEstimator):
    """What the two estimators share: weights, units, the solve, and the outputs of the network that it found."""

    def _checked(self, X: Any, y: Any, sample_weight: Any, **how: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Features, targets and weights of ``fit`` as arrays; the largest weight is about one."""
        for name, given in (("X", X), ("y", y), ("sample_weight", sample_weight)):
            self._refuse_masked(name, given)
        X, y = validate_data(self, X, y, dtype=np.float64, ensure_min_samples=2, **how)
        weight = _check_sample_weight(sample_weight, X, dtype=np.float64, ensure_non_negative=True)
        if not weight.any():
            raise ValueError(f"{type(self).__name__}: `sample_weight` must not be all zero, got only zeros.")
        return X, y, np.ldexp(weight, -np.frexp(weight.max())[1])  # their sum is finite, and no digit is lost

    def _refuse_masked(self, name: str, given: Any) -> None:
        """Raise a ValueError for masked entries: scikit-learn takes what is under the mask."""
        if np.ma.is_masked(given):
            raise ValueError(
                f"{type(self).__name__}: `{name}` must not have masked entries, got a masked array. Fill them, or "
                "remove those rows."
            )

    def _units(self, values: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What is subtracted from each column, and its scale, zero for one that never varies."""
        where, standardize = type(self).__name__, self.standardize
        if not isinstance(standardize, bool | np.bool_):
            raise ValueError(f"{where}: `standardize` must be True or False, got {standardize!r}.")
        if standardize:
            return _moments(values, weight)
        return np.zeros(values.shape[1]), np.ones(values.shape[1])

    def _solve(self, X: np.ndarray, y: np.ndarray, weight: np.ndarray, outputs: int | None) -> Self:
        """Solve for rows in the user's units; keep the network in these units, and the figures."""
        where = type(self).__name__
        checks.positive_integer(where, "n_neurons", self.n_neurons)
        checks.positive_integer(where, "max_iter", self.max_iter)
        if self.folds is not None:
            checks.positive_integer(where, "folds", self.folds, least=2)
        dtype = jax.dtypes.canonicalize_dtype(float)
        relative = (weight / weight.max()).astype(dtype)  # float32 does not hold all of them
        beta = self.beta
        if isinstance(beta, str) and beta == "path" and np.count_nonzero(relative) < FEWEST:
            beta = None
        folds = self.folds if isinstance(beta, str) else None  # a search over β may have both
        solver = Cronos(loss=self.loss, beta=beta, max_iters=self.max_iter, tol=self.tol, folds=folds)
        mean, scale = self._units(X, weight)
        seed = check_random_state(self.random_state).randint(np.iinfo(np.int32).max)
        solution = solver.solve(
            _divided(X - mean, scale).astype(dtype),
            y if outputs is None else loss_of(self.loss).from_labels(y, outputs),
            hidden=self.n_neurons,
            num_classes=outputs if self.loss == "softmax" else None,
            sample_weight=relative,
            key=seeded(seed),
        )
        if solution.status is Status.nonfinite:
            raise ValueError(f"{where}: {solution.status.message}")
        if solution.status is Status.max_iters:
            message = f"{where}: stopped at max_iter={self.max_iter}. Raise `max_iter`, or `tol`."
            warn(message, ConvergenceWarning)
        network, stats = jax.device_get((solution.params, solution.stats))
        # relu((X − mean)/scale · kernel + bias), in the units of X; a column that never varied says nothing.
        kernel = _divided(network.kernel1.astype(float).T, scale).T
        self.kernel1_, self.bias1_ = kernel, network.bias1.astype(float) - mean @ kernel
        self.kernel2_, self.bias2_ = network.kernel2.astype(float), network.bias2.astype(float)
        self.beta_, self.n_iter_, self.objective_ = float(stats.beta), int(stats.iterations), float(stats.objective)
        return self

    def _outputs(self, X: Any) -> np.ndarray:
        """Of the network, shape ``(n, C)``."""
        check_is_fitted(self)
        self._refuse_masked("X", X)
        X = validate_data(self, X, dtype=np.float64, reset=False)
        return np.maximum(X @ self.kernel1_ + self.bias1_, 0) @ self.kernel2_ + self.bias2_


class CronosClassifier(ClassifierMixin, _TwoLayer):
    """Classifier: a two-layer ReLU network, solved by :class:`cronos_flax.Cronos`. Nothing needs to be tuned.

    ``outputs = relu(X kernel1_ + bias1_) kernel2_ + bias2_``

    Args:
        n_neurons: number of hidden neurons.
        loss: ``"softmax"``; ``"logistic"``, for two classes; ``"squared"``, ``"huber"`` or ``"hinge"``, of targets ±1;
            or a :class:`cronos_flax.Loss`. The first two have ``predict_proba``.
        beta: weight decay of the network on the standardised features. ``"path"`` tries seven values and chooses by the
            loss on held-out rows. None takes a thousandth of the value above which the network is zero, and so does
            ``"path"`` with fewer than ten rows (equal ones count once, those of weight zero not).
        folds: for ``beta="path"``, choose by the mean over so many folds of the rows, each held out in turn. None
            holds out a fifth, and with fewer than 300 rows takes five folds.
        max_iter: most iterations; a ConvergenceWarning says that they did not suffice.
        tol: as for :class:`cronos_flax.Cronos`; None ends when going on would not pay.
        standardize: bring columns to mean 0 and variance 1 first, by the (weighted) rows of ``fit``. False leaves the
            features in their units.
        class_weight: weights of the classes, ``{label: weight}`` or ``"balanced"``; None means 1.
        random_state: of the random start; an integer makes ``fit`` repeatable.

    Attributes:
        classes_: the labels, sorted.
        kernel1_: hidden kernel for features in the units they came in, shape ``(p, m)``; so are the next three.
        bias1_: hidden bias, shape ``(m,)``.
        kernel2_: output kernel, shape ``(m, C)``; C is 1 for two classes, unless the loss is ``"softmax"``.
        bias2_: output bias, shape ``(C,)``.
        beta_: the weight decay that was used.
        n_iter_: iterations done.
        objective_: the regularised loss at the end.
        n_features_in_: number of columns of ``fit``.
        feature_names_in_: their names, where they had any.

    Example:
        >>> from sklearn.datasets import load_iris
        >>> from sklearn.model_selection import cross_val_score
        >>> from cronos_flax.sklearn import CronosClassifier
        >>> X, y = load_iris(return_X_y=True)
        >>> bool(cross_val_score(CronosClassifier(random_state=0), X, y).mean() > 0.9)
        True
    """

    def __init__(
        self,
        n_neurons: int = 64,
        *,
        loss: str | Loss = "softmax",
        beta: float | str | None = "path",
        folds: int | None = None,
        max_iter: int = 500,
        tol: float | None = None,
        standardize: bool = True,
        class_weight: dict | str | None = None,
        random_state: Any = None,
    ) -> None:
        self.n_neurons = n_neurons
        self.loss = loss
        self.beta = beta
        self.folds = folds
        self.max_iter = max_iter
        self.tol = tol
        self.standardize = standardize
        self.class_weight = class_weight
        self.random_state = random_state

    @_all_or_nothing
    def fit(self, X: ArrayLike, y: ArrayLike, sample_weight: ArrayLike | None = None) -> Self:
        """Solve.

        Args:
            X: features, shape ``(n, p)``, dense and finite; arrays or data frames.
            y: labels of any kind, shape ``(n,)``.
            sample_weight: ``≥ 0``, shape ``(n,)``, not all zero; None means 1. Up to 2,048 rows a weight of k is the
                same as the row k times, to the last digit.

        Raises:
            ValueError: for settings or data that do not fit.
            TypeError: for sparse features.
        """
        rows, names, weight = self._checked(X, y, sample_weight)
        check_classification_targets(names)
        classes, labels = np.unique(names, return_inverse=True)
        rows, labels, weight = _merged(rows, labels[:, None], weight)
        labels = labels[:, 0].astype(np.int32)
        weight = weight * self._of_classes(classes, labels, weight)
        self._solve(rows, labels, weight, outputs=max(len(classes), 2))
        self.classes_, self._fitted_loss = classes, self.loss
        return self

    def _of_classes(self, classes: np.ndarray, labels: np.ndarray, weight: np.ndarray) -> np.ndarray:
        """The weight of each row's class; balanced by the weights of rows, which stand for their numbers."""
        if self.class_weight is None:
            return np.ones(len(labels))
        if isinstance(self.class_weight, str) and self.class_weight == "balanced":
            counts = np.bincount(labels, weight)
            return weight.sum() / (np.count_nonzero(counts) * counts[labels])
        each = compute_sample_weight(self.class_weight, classes[labels])
        if not (np.all(np.isfinite(each) & (each >= 0)) and each.any()):
            raise ValueError(
                "CronosClassifier: `class_weight` must have finite numbers ≥ 0, not all zero, got "
                f"{self.class_weight!r}."
            )
        return each

    def decision_function(self, X: ArrayLike) -> np.ndarray:
        """Outputs, shape ``(n, C)``; for two classes ``(n,)``, above 0 for the second."""
        outputs = self._outputs(X)
        if len(self.classes_) > 2:
            return outputs
        return outputs[:, 1] - outputs[:, 0] if outputs.shape[1] == 2 else outputs[:, 0]

    def predict(self, X: ArrayLike) -> np.ndarray:
        """The likeliest class of each row, shape ``(n,)``."""
        scores = self.decision_function(X)
        index = (scores > 0).astype(int) if scores.ndim == 1 else scores.argmax(axis=1)
        return self.classes_[np.minimum(index, len(self.classes_) - 1)]

    def _has_probabilities(self) -> bool:
        loss = getattr(self, "_fitted_loss", self.loss)  # `set_params` is for the next fit
        return isinstance(loss, str) and loss in ("softmax", "logistic")

    @available_if(_has_probabilities)
    def predict_proba(self, X: ArrayLike) -> np.ndarray:
        """Probabilities of the classes, shape ``(n, len(classes_))``."""
        return np.exp(self.predict_log_proba(X))

    @available_if(_has_probabilities)
    def predict_log_proba(self, X: ArrayLike) -> np.ndarray:
        """Logarithms of the probabilities, shape ``(n, len(classes_))``."""
        scores = self.decision_function(X)
        logits = np.stack([np.zeros_like(scores), scores], axis=1) if scores.ndim == 1 else scores
        return log_softmax(logits[:, : len(self.classes_)], axis=1)


class CronosRegressor(RegressorMixin, _TwoLayer):
    """Regressor, of one target or several: a two-layer ReLU network, solved by :class:`cronos_flax.Cronos`.

    ``predictions = relu(X kernel1_ + bias1_) kernel2_ + bias2_``

    Args:
        n_neurons: number of hidden neurons.
        loss: ``"squared"``, ``"huber"`` (linear beyond one standard deviation of the target), or a
            :class:`cronos_flax.Loss` of real targets.
        beta: weight decay of the network on standardised features and targets. ``"path"`` tries seven values and
            chooses by the loss on held-out rows. None takes a thousandth of the value above which the network is zero,
            and so does ``"path"`` with fewer than ten rows (equal ones count once, those of weight zero not).
        folds: for ``beta="path"``, choose by the mean over so many folds of the rows, each held out in turn. None
            holds out a fifth, and with fewer than 300 rows takes five folds.
        max_iter: most iterations; a ConvergenceWarning says that they did not suffice.
        tol: as for :class:`cronos_flax.Cronos`; None ends when going on would not pay.
        standardize: bring the columns of X, and of y, to mean 0 and variance 1 first, by the (weighted) rows of
            ``fit``. False leaves both in their units, and so y is where a :class:`cronos_flax.Loss` is not one of
            outputs minus targets, as that of counts.
        random_state: of the random start; an integer makes ``fit`` repeatable.

    Attributes:
        kernel1_: hidden kernel for features in the units they came in, shape ``(p, m)``; so are the next three.
        bias1_: hidden bias, shape ``(m,)``.
        kernel2_: output kernel, shape ``(m, C)``, for targets in their units.
        bias2_: output bias, shape ``(C,)``.
        beta_: the weight decay that was used.
        n_iter_: iterations done.
        objective_: the regularised loss at the end, of the standardised targets.
        n_features_in_: number of columns of ``fit``.
        feature_names_in_: their names, where they had any.

    Example:
        >>> import numpy as np
        >>> from cronos_flax.sklearn import CronosRegressor
        >>> X = np.random.default_rng(0).normal(size=(200, 5))
        >>> y = np.abs(X[:, 0]) - X[:, 1]
        >>> bool(CronosRegressor(random_state=0).fit(X, y).score(X, y) > 0.95)
        True
    """

    def __init__(
        self,
        n_neurons: int = 64,
        *,
        loss: str | Loss = "squared",
        beta: float | str | None = "path",
        folds: int | None = None,
        max_iter: int = 500,
        tol: float | None = None,
        standardize: bool = True,
        random_state: Any = None,
    ) -> None:
        self.n_neurons = n_neurons
        self.loss = loss
        self.beta = beta
        self.folds = folds
        self.max_iter = max_iter
        self.tol = tol
        self.standardize = standardize
        self.random_state = random_state

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags

    @_all_or_nothing
    def fit(self, X: ArrayLike, y: ArrayLike, sample_weight: ArrayLike | None = None) -> Self:
        """Solve.

        Args:
            X: features, shape ``(n, p)``, dense and finite; arrays or data frames.
            y: targets, shape ``(n,)`` or ``(n, C)``.
            sample_weight: ``≥ 0``, shape ``(n,)``, not all zero; None means 1. Up to 2,048 rows a weight of k is the
                same as the row k times, to the last digit.

        Raises:
            ValueError: for settings or data that do not fit.
            TypeError: for sparse features.
        """
        rows, values, weight = self._checked(X, y, sample_weight, multi_output=True, y_numeric=True)
        if isinstance(self.loss, str) and not loss_of(Cronos(loss=self.loss).loss).takes_values:
            raise ValueError(
                f"CronosRegressor: `loss` must be 'squared', 'huber' or a cf.Loss of real targets, got {self.loss!r}. "
                "For classes use CronosClassifier."
            )
        self._is_vector = values.ndim == 1
        rows, values, weight = _merged(rows, values.reshape(len(values), -1).astype(float), weight)
        if isinstance(self.loss, Loss) and not _is_of_residuals(self.loss, values.shape[1]):
            mean, scale = np.zeros(values.shape[1]), np.ones(values.shape[1])
        else:
            mean, scale = self._units(values, weight)
        targets = _divided(values - mean, scale)
        self._solve(rows, targets.astype(jax.dtypes.canonicalize_dtype(float)), weight, outputs=None)
        self.kernel2_, self.bias2_ = self.kernel2_ * scale, self.bias2_ * scale + mean
        return self

    def predict(self, X: ArrayLike) -> np.ndarray:
        """Predictions, of the shape that y had in ``fit``."""
        outputs = self._outputs(X)
        return outputs[:, 0] if self._is_vector else outputs


def _merged(X: np.ndarray, y: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows without those of no weight, and equal ones as one with the sum of their weights, in an order of their own.

    So neither the order of the rows matters nor whether a row comes twice or has twice the weight. Only for few rows:
    with more of them, a solve looks at samples.
    """
    there = weight > 0
    X, y, weight = X[there], y[there], weight[there]
    if len(X) <= _FEW:
        whole = np.column_stack([X, y])
        _, first, which = np.unique(whole, axis=0, return_index=True, return_inverse=True)
        X, y, weight = X[first], y[first], np.bincount(which.ravel(), weight)
    twice = slice(None) if len(X) > 1 else [0, 0]  # a solve takes two rows at least
    return X[twice], y[twice], weight[twice]


def _is_of_residuals(loss: Loss, C: int) -> bool:
    """Whether a loss is one of outputs minus targets, which then may be moved together."""
    rows = np.random.RandomState(0).normal(size=(2, C + 1, C))
    value = jax.jit(loss.value)
    here, moved = (on_host(value(*(on_device(part + by, np.float32) for part in rows))) for by in (0.0, 1.0))
    return np.allclose(here, moved, rtol=0, atol=1e-3 * np.max(np.abs(here)))


def _divided(rows: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Rows over the scale of each column, zero where that is zero: there only the rounding of its mean is left."""
    return rows / np.where(scale > 0, scale, np.inf)


def _moments(rows: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weighted mean and standard deviation of each column, without overflow; 0 where only rounding varies."""
    share = weight / weight.sum()
    largest = np.abs(rows).max(axis=0)
    unit = rows / np.where(largest > 0, largest, 1)
    mean = share @ unit
    scale = np.sqrt(share @ np.square(unit - mean))
    scale[scale <= 10 * np.finfo(float).eps * np.sqrt(len(rows))] = 0
    return mean * largest, scale * largest
