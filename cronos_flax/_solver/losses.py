"""The five losses that have a name: squared, softmax, logistic, Huber and hinge."""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import SingleDeviceSharding
from jax.typing import ArrayLike
from jaxtyping import Float

from cronos_flax._solver.arrays import is_concrete, native
from cronos_flax._solver.checks import in_python, real_number
from cronos_flax._solver.loss import Loss, where_taken, wide
from cronos_flax._solver.numerics import or_one
from cronos_flax._solver.transfer import beside, on_device, on_host
from cronos_flax._solver.types import Outputs, RowVector, Scalar
from cronos_flax._solver.user_warnings import warn

_FEW = 4_000_000  # numbers up to which targets are made of labels on the host
_MOST_CLASSES = 1_000_000  # more are taken for labels that are not numbered from 0 on
_SHOWN = 5  # absent labels that are named
_MOST_OFF = 1e-3  # how far from one the sum of a row of probabilities may be
_HINGE_FLOOR = 0.1  # distance to the kink below which the hinge's parabola gets no narrower


@dataclasses.dataclass(frozen=True)
class Squared(Loss):
    """``½‖f − y‖²``, for targets of any kind."""

    is_quadratic: ClassVar[bool] = True

    def value(self, outputs: Outputs, targets: Outputs) -> RowVector:
        """See :meth:`Loss.value`."""
        return 0.5 * jnp.sum(jnp.square(outputs - targets), axis=1)

    def gradient(self, outputs: Outputs, targets: Outputs) -> Outputs:
        return outputs - targets

    def curvature(self, outputs: Outputs, targets: Outputs, direction: Outputs) -> Outputs:
        return direction

    def mean_curvature(self, outputs: Outputs, targets: Outputs) -> RowVector:
        return jnp.ones(len(outputs), outputs.dtype)

    def prox(self, point: Outputs, targets: Outputs, step: Scalar) -> Outputs:
        return (point + step * targets) / (1 + step)

    def conjugate(self, dual: Outputs, targets: Outputs) -> RowVector:
        return jnp.sum(0.5 * jnp.square(dual) + dual * targets, axis=1)

    def balance(self, dual: Outputs, targets: Outputs, weight: RowVector) -> Outputs:
        return dual - (weight @ dual / jnp.sum(weight))[None, :]

    def constant(self, targets: Outputs, weight: RowVector) -> Float[Array, " C"]:
        return weight @ targets / jnp.sum(weight)


@dataclasses.dataclass(frozen=True)
class Softmax(Loss):
    """Cross-entropy of the softmax of the outputs, ``log Σ exp f_c − ⟨y, f⟩``; y are labels, or probabilities."""

    takes_values: ClassVar[bool] = False

    def from_labels(self, labels: ArrayLike, num_classes: int) -> Array:
        del num_classes
        return on_device(native(labels, "`labels`"))

    def is_labelled(self, targets: Outputs) -> bool:
        return True

    def shares(self, targets: Outputs) -> Float[Array, "n classes"]:
        return targets if targets.shape[1] > 1 else super().shares(targets)

    def check_targets(self, y: Array | np.ndarray, num_classes: int | None) -> None:
        if y.ndim == 2 and jnp.issubdtype(y.dtype, jnp.floating):
            p = np.asarray(on_host(y))
            sums = np.sum(p, axis=1, dtype=jnp.promote_types(p.dtype, np.float32))
            worst = float(sums[np.argmax(np.abs(sums - 1))]) if sums.size else 1.0  # the first NaN, if there is one
            if not (np.all(p >= 0) and abs(worst - 1) < _most_off(p.dtype)):
                got = "a negative entry" if np.any(p < 0) else f"a row that sums to {worst:.6g}"
                raise ValueError(f"`y` of two dimensions must be probabilities, rows ≥ 0 that sum to one; got {got}.")
        elif y.size and y.ndim == 1 and jnp.issubdtype(y.dtype, jnp.integer):
            low, high = _range(y)
            C = max(high + 1, 2) if num_classes is None else num_classes
            if low < 0 or high >= C:
                raise ValueError(f"`y` must have labels in [0, {C}), got values from {low} to {high}.")
            if num_classes is None and high >= _MOST_CLASSES:
                raise ValueError(
                    f"`y` must have labels 0, 1, … C − 1, got some up to {high}, which is so many classes. Number them "
                    "by np.unique(y, return_inverse=True)[1], or give `num_classes`."
                )

    def targets(self, y: Array, num_classes: int | None) -> Array:
        known = is_concrete(y)
        if known:
            self.check_targets(y, num_classes)
        if y.ndim == 2 and jnp.issubdtype(y.dtype, jnp.floating):
            sums = jnp.sum(y, axis=1, keepdims=True, dtype=jnp.promote_types(y.dtype, jnp.float32))
            are_one = jnp.abs(sums - 1) < _most_off(y.dtype)
            return y if known else where_taken(jnp.all(y >= 0, axis=1, keepdims=True) & are_one, y)
        if y.ndim != 1 or not jnp.issubdtype(y.dtype, jnp.integer):
            instead = "labels as y.astype(int)" if y.shape[1:] == () else "one-hot rows as y.astype(float)"
            raise ValueError(
                f"`y` must be integer labels (n,) or probabilities (n, C), got {y.dtype} of shape {y.shape}. Give "
                f"{'labels as y[:, 0]' if y.shape[1:] == (1,) else instead}."
            )
        if num_classes is None and not known:
            raise ValueError("`num_classes` must be given inside jit, where labels cannot be counted; got None.")
        if num_classes is None:
            num_classes = max(_range(y)[1] + 1, 2) if y.size else 2
            _warn_of_gaps(y)
        if known:
            return _one_hot(y, num_classes)
        y = wide(y)
        return where_taken(((y >= 0) & (y < num_classes))[:, None], _one_hot(y, num_classes))

    def value(self, outputs: Outputs, targets: Outputs) -> RowVector:
        return jax.nn.logsumexp(outputs, axis=1) - jnp.sum(outputs * targets, axis=1)

    def gradient(self, outputs: Outputs, targets: Outputs) -> Outputs:
        return jax.nn.softmax(outputs, axis=1) - targets

    def curvature(self, outputs: Outputs, targets: Outputs, direction: Outputs) -> Outputs:
        p = jax.nn.softmax(outputs, axis=1)
        return p * (direction - jnp.sum(p * direction, axis=1, keepdims=True))

    def mean_curvature(self, outputs: Outputs, targets: Outputs) -> RowVector:
        p = jax.nn.softmax(outputs, axis=1)
        return jnp.mean(p * (1 - p), axis=1)

    def divide(self, outputs: Outputs, targets: Outputs, shift: Scalar, direction: Outputs) -> Outputs:
        # diag(p) + shift I − p pᵀ, by Sherman and Morrison; 1 − Σ p²/(p + shift) = Σ p shift/(p + shift).
        p = jax.nn.softmax(outputs, axis=1)
        inverse = 1 / (p + shift)
        rest = jnp.sum(p * shift * inverse, axis=1, keepdims=True)
        return inverse * (direction + p * jnp.sum(p * inverse * direction, axis=1, keepdims=True) / rest)

    def conjugate(self, dual: Outputs, targets: Outputs) -> RowVector:
        return jnp.sum(_entropy(dual + targets), axis=1)

    def balance(self, dual: Outputs, targets: Outputs, weight: RowVector) -> Outputs:
        # Mixed with π − y, π the same for all rows: the least that leaves π a probability.
        mean, total = weight @ targets, weight @ dual
        share = jnp.min(jnp.where(total > 0, mean / or_one(total), jnp.inf))
        mix = 1 / (1 + share)
        pi = (mean - jnp.where(mix > 0, (1 - mix) / or_one(mix), 0) * total) / jnp.sum(weight)
        return (1 - mix) * dual + mix * (jnp.maximum(pi, 0)[None, :] - targets)

    def constant(self, targets: Outputs, weight: RowVector) -> Float[Array, " C"]:
        mean = weight @ targets / jnp.sum(weight)
        logits = jnp.log(jnp.maximum(mean, jnp.finfo(mean.dtype).eps))
        return logits - jnp.mean(logits)


class _Separable(Loss):
    """A sum over outputs: its curvature is a number for each of them."""

    def _weight(self, outputs: Outputs, targets: Outputs) -> Outputs:
        """The second derivative for each output, or a number ≥ 0 that stands for it."""
        raise NotImplementedError

    def curvature(self, outputs: Outputs, targets: Outputs, direction: Outputs) -> Outputs:
        return self._weight(outputs, targets) * direction

    def mean_curvature(self, outputs: Outputs, targets: Outputs) -> RowVector:
        return jnp.mean(self._weight(outputs, targets), axis=1)

    def divide(self, outputs: Outputs, targets: Outputs, shift: Scalar, direction: Outputs) -> Outputs:
        return direction / (self._weight(outputs, targets) + shift)


@dataclasses.dataclass(frozen=True)
class Logistic(_Separable):
    """``Σ_c log(1 + exp f_c) − y_c f_c``: cross-entropy of independent yes-or-no outputs, y in [0, 1]."""

    takes_values: ClassVar[bool] = False
    threshold: ClassVar[float] = 0.5

    def from_labels(self, labels: ArrayLike, num_classes: int) -> Array:
        if num_classes != 2:
            raise ValueError(f"`loss` 'logistic' is for two classes, got {num_classes}. Use 'softmax'.")
        return on_device(native(labels, "`labels`"), float)[:, None]

    def is_labelled(self, targets: Outputs) -> bool:
        return targets.shape[1] == 1

    def shares(self, targets: Outputs) -> Float[Array, "n classes"]:
        return jnp.concatenate([1 - targets, targets], axis=1)  # of one output, where rows have one label

    def check_targets(self, y: Array | np.ndarray, num_classes: int | None) -> None:
        p = np.asarray(on_host(y))
        if not np.all((p >= 0) & (p <= 1)):
            raise ValueError("`y` must be 0 or 1, or probabilities between; got other values.")

    def targets(self, y: Array, num_classes: int | None) -> Array:
        return _one_each(self, y, num_classes, lambda y: (y >= 0) & (y <= 1))

    def value(self, outputs: Outputs, targets: Outputs) -> RowVector:
        return jnp.sum(jax.nn.softplus(outputs) - targets * outputs, axis=1)

    def gradient(self, outputs: Outputs, targets: Outputs) -> Outputs:
        return jax.nn.sigmoid(outputs) - targets

    def _weight(self, outputs: Outputs, targets: Outputs) -> Outputs:
        return jax.nn.sigmoid(outputs) * jax.nn.sigmoid(-outputs)

    def conjugate(self, dual: Outputs, targets: Outputs) -> RowVector:
        p = dual + targets
        return jnp.sum(_entropy(p) + _entropy(1 - p), axis=1)

    def constant(self, targets: Outputs, weight: RowVector) -> Float[Array, " C"]:
        eps = jnp.finfo(targets.dtype).eps
        mean = jnp.clip(weight @ targets / jnp.sum(weight), eps, 1 - eps)
        return jnp.log(mean) - jnp.log1p(-mean)


@dataclasses.dataclass(frozen=True)
class Huber(_Separable):
    """``Σ_c ½r²`` for ``|r| ≤ delta`` and ``delta (|r| − delta/2)`` beyond, ``r = f − y``: outliers count less.

    Args:
        delta: where the loss turns from quadratic to linear, in the units of y, ``> 0``.

    Raises:
        ValueError: for a ``delta`` that is not.
    """

    delta: float = 1.0

    def __post_init__(self) -> None:
        real_number("Huber", "delta", self.delta, "a finite number > 0", lambda v: 0 < v < math.inf)
        in_python(self, "delta")

    def value(self, outputs: Outputs, targets: Outputs) -> RowVector:
        size = jnp.abs(outputs - targets)
        inside = jnp.minimum(size, self.delta)
        return jnp.sum(inside * (size - 0.5 * inside), axis=1)

    def gradient(self, outputs: Outputs, targets: Outputs) -> Outputs:
        return jnp.clip(outputs - targets, -self.delta, self.delta)

    def _weight(self, outputs: Outputs, targets: Outputs) -> Outputs:
        # Of the parabola that touches the loss here and is nowhere below it.
        return self.delta / jnp.maximum(jnp.abs(outputs - targets), self.delta)

    def prox(self, point: Outputs, targets: Outputs, step: Scalar) -> Outputs:
        r = point - targets
        return point - step * jnp.clip(r / (1 + step), -self.delta, self.delta)

    def conjugate(self, dual: Outputs, targets: Outputs) -> RowVector:
        return jnp.sum(0.5 * jnp.square(dual) + dual * targets, axis=1)


@dataclasses.dataclass(frozen=True)
class Hinge(_Separable):
    """``Σ_c max(0, 1 − y_c f_c)``, y = ±1."""

    takes_values: ClassVar[bool] = False

    def check_targets(self, y: Array | np.ndarray, num_classes: int | None) -> None:
        if not np.all(np.abs(np.asarray(on_host(y))) == 1):
            raise ValueError(
                "`y` must be −1 or +1, got other values. For class labels use cf.signed_targets(labels, num_classes)."
            )

    def targets(self, y: Array, num_classes: int | None) -> Array:
        return _one_each(self, y, num_classes, lambda y: jnp.abs(y) == 1)

    def value(self, outputs: Outputs, targets: Outputs) -> RowVector:
        return jnp.sum(jnp.maximum(1 - targets * outputs, 0), axis=1)

    def gradient(self, outputs: Outputs, targets: Outputs) -> Outputs:
        return jnp.where(targets * outputs <= 1, -targets, 0)

    def _weight(self, outputs: Outputs, targets: Outputs) -> Outputs:
        # Of the parabola that touches the loss here and is nowhere below it, but not narrower than the floor makes it.
        return 0.5 / jnp.maximum(jnp.abs(1 - targets * outputs), _HINGE_FLOOR)

    def prox(self, point: Outputs, targets: Outputs, step: Scalar) -> Outputs:
        return point + targets * jnp.clip(1 - targets * point, 0, step)

    def conjugate(self, dual: Outputs, targets: Outputs) -> RowVector:
        return jnp.sum(dual * targets, axis=1)

    def constant(self, targets: Outputs, weight: RowVector) -> Float[Array, " C"]:
        return jnp.sign(weight @ targets)


LOSSES = {
    "squared": Squared(),
    "softmax": Softmax(),
    "logistic": Logistic(),
    "huber": Huber(),
    "hinge": Hinge(),
}


def loss_of(loss: str | Loss) -> Loss:
    """The loss of this name, or the loss itself."""
    return loss if isinstance(loss, Loss) else LOSSES[loss]


def _one_each(loss: Loss, y: Array, num_classes: int | None, is_taken: Callable[[Array], Array]) -> Array:
    """Targets ``(n, C)``, a float for each output; traced ones that the loss does not take are NaN."""
    known = is_concrete(y)
    if known:
        loss.check_targets(y, num_classes)
    y = y if jnp.issubdtype(y.dtype, jnp.floating) else y.astype(float)
    y = y if known else where_taken(is_taken(y), y)
    return y[:, None] if y.ndim == 1 else y


def _most_off(dtype: np.dtype) -> float:
    """How far from one the sum of probabilities may be that were rounded to this type."""
    return max(_MOST_OFF, 8 * float(jnp.finfo(dtype).eps))


def _range(y: Array | np.ndarray) -> tuple[int, int]:
    labels = np.asarray(on_host(y))
    return int(labels.min()), int(labels.max())


def _warn_of_gaps(y: Array | np.ndarray) -> None:
    """Warn if labels below the largest are in no row: each of them has an output."""
    counts = np.bincount(np.asarray(on_host(y), np.int64))
    if absent := np.flatnonzero(counts == 0).tolist():
        shown = ", ".join(map(str, absent[:_SHOWN])) + (", …" if len(absent) > _SHOWN else "")
        warn(
            f"solve: `y` should have labels 0, 1, … C − 1, got none of {shown} and some up to {len(counts) - 1}: each "
            "absent one has an output too. Number the labels by np.unique(y, return_inverse=True)[1]; or, if there are "
            f"such classes, give num_classes={len(counts)}."
        )


def _one_hot(labels: Array, num_classes: int) -> Array:
    """``jax.nn.one_hot``; on the host where it is little, for on the device every number of rows is a program."""
    is_few = is_concrete(labels) and labels.size * num_classes <= _FEW
    if not is_few or not isinstance(labels.sharding, SingleDeviceSharding):
        return _one_hot_on_device(labels, num_classes)
    ones = on_host(labels)[:, None] == np.arange(num_classes)[None, :]
    return beside(labels, ones.astype(jax.dtypes.canonicalize_dtype(float)))


@partial(jax.jit, static_argnums=1)
def _one_hot_on_device(labels: Array, num_classes: int) -> Array:
    return jax.nn.one_hot(wide(labels), num_classes)


def _entropy(p: Array) -> Array:
    """``p log p``, zero at zero; rounding may have put p just outside [0, 1]."""
    p = jnp.clip(p, 0, 1)
    return jnp.where(p > 0, p * jnp.log(or_one(p)), 0)
