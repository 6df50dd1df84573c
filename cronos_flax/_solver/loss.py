"""The interface of a loss: what the solver asks of one row, and which targets it takes.

A :class:`Loss` says everything the solver needs to know. The refreshed path asks for value, gradient and curvature,
held gates for the prox, their lower bound for the conjugate (method.md). All work on whole arrays,
row by row, and know nothing of weights.
"""

import copy
import dataclasses
from functools import cached_property, partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Int

from cronos_flax._solver.arrays import is_concrete, native
from cronos_flax._solver.numerics import least
from cronos_flax._solver.transfer import on_device, on_host
from cronos_flax._solver.types import Outputs, RowVector, Scalar

_NEWTON_STEPS = 50
_NEWTON_LENGTHS = (1.0, 0.5, 0.2, 0.05, 0.01, 0.001, 0.0)
_CONSTANT_STEPS = 50


@dataclasses.dataclass(frozen=True)
class Loss:
    """A convex loss ``ℓ(f, y)`` of the outputs f of one row, summed over rows by the solver.

    Subclass it for a loss of your own: a frozen dataclass with Python numbers as fields, and :meth:`value`. For a
    smooth loss all other methods follow by automatic differentiation. Override those that have a cheaper formula, or
    no derivative. Without :meth:`conjugate`, held gates have no lower bound and never report convergence.

    Solves end, and the guard decides, by differences of the loss relative to its size. So it should be about zero for a
    perfect fit; with a constant that makes it far larger or negative, the same differences count for less.

    Example:
        >>> import dataclasses, jax.numpy as jnp, numpy as np, cronos_flax as cf
        >>> @dataclasses.dataclass(frozen=True)
        ... class LogCosh(cf.Loss):
        ...     def value(self, outputs, targets):
        ...         r = outputs - targets
        ...         return jnp.sum(jnp.logaddexp(r, -r) - jnp.log(2.0), axis=1)
        >>> X = np.random.default_rng(0).normal(size=(200, 5)).astype("float32")
        >>> solution = cf.Cronos(loss=LogCosh(), beta=1e-4).solve(X, np.abs(X[:, 0]), hidden=16)
        >>> bool(solution.stats.objective < 0.05)
        True

    Attributes:
        takes_values: whether targets may be real numbers; otherwise they are labels or probabilities.
        is_quadratic: whether the loss is ``½‖f − y‖²``, whose prox is linear and whose best output bias is known.
        threshold: the target of a single output above which a row is of class 1.
    """

    takes_values: ClassVar[bool] = True
    is_quadratic: ClassVar[bool] = False
    threshold: ClassVar[float] = 0.0

    def targets(self, y: Array, num_classes: int | None) -> Array:
        """Targets ``(n, C)`` from the user's ``y``. The default takes floats, ``(n,)`` or ``(n, C)``.

        Args:
            y: an array of any dtype, with one or two dimensions.
            num_classes: C where it is known.

        Raises:
            ValueError: saying what was expected and what came.
        """
        _check_floating(y)
        return y[:, None] if y.ndim == 1 else y

    def check_targets(self, y: Array | np.ndarray, num_classes: int | None) -> None:
        """Raise a ValueError unless ``y`` are targets that the loss takes, by their values.

        ``cf.train`` calls it for each batch, on the host. The default tries :meth:`targets`.

        Args:
            y: an array with one or two dimensions, not traced.
            num_classes: C where it is known.
        """
        if type(self).targets is Loss.targets:
            _check_floating(y)  # without work for a device
        else:
            self.targets(jnp.asarray(y), num_classes)

    def from_labels(self, labels: ArrayLike, num_classes: int) -> Array:
        """``y`` for class labels. The default gives targets ±1.

        Args:
            labels: integers in ``[0, num_classes)``, shape ``(n,)``.
            num_classes: the number of classes.

        Raises:
            ValueError: for labels that the loss cannot take.
        """
        return signed_targets(labels, num_classes)

    def is_labelled(self, targets: Outputs) -> Bool[Array, ""] | bool:
        """Whether the targets say one class for each row; a ``bool`` where the loss and C alone tell."""
        return jnp.all(jnp.abs(targets) == 1)

    def labels(self, targets: Outputs) -> Int[Array, " n"]:
        """The class of each row, where :meth:`is_labelled`."""
        if targets.shape[1] > 1:
            return jnp.argmax(targets, axis=1)
        return (targets[:, 0] > self.threshold).astype(jnp.int32)

    def shares(self, targets: Outputs) -> Float[Array, "n classes"]:
        """How much of each row is of each class, ``(n, max(C, 2))``: probabilities themselves; for a label, one."""
        return jax.nn.one_hot(self.labels(targets), max(targets.shape[1], 2), dtype=targets.dtype)

    def predicted(self, outputs: Outputs) -> Int[Array, " n"]:
        """The class that the outputs of each row say: the largest, or the sign of a single one."""
        return jnp.argmax(outputs, axis=1) if outputs.shape[1] > 1 else (outputs[:, 0] > 0).astype(jnp.int32)

    def value(self, outputs: Outputs, targets: Outputs) -> RowVector:
        """``ℓ(f_j, y_j)`` of each row."""
        raise NotImplementedError(
            f"{type(self).__name__} must have a method `value`, which gives the loss of each row."
        )

    def gradient(self, outputs: Outputs, targets: Outputs) -> Outputs:
        """``∇ℓ`` with respect to the outputs."""
        return jax.grad(lambda f: jnp.sum(self.value(f, targets)))(outputs)

    def curvature(self, outputs: Outputs, targets: Outputs, direction: Outputs) -> Outputs:
        """``H_j r_j``: of the Hessian, or of a positive semidefinite matrix that stands for it."""
        return jax.jvp(lambda f: self.gradient(f, targets), (outputs,), (direction,))[1]

    def mean_curvature(self, outputs: Outputs, targets: Outputs) -> RowVector:
        """``tr H_j / C``, for preconditioners."""
        C = outputs.shape[1]
        units = jnp.eye(C, dtype=outputs.dtype)
        diagonal = jax.vmap(lambda e: self.curvature(outputs, targets, jnp.broadcast_to(e, outputs.shape)) @ e)(units)
        return jnp.mean(diagonal, axis=0)

    def prox(self, point: Outputs, targets: Outputs, step: Scalar) -> Outputs:
        """``argmin_z ℓ(z, y) + ‖z − point‖²/(2 step)``, here by Newton steps of safe length."""
        lengths = jnp.asarray(_NEWTON_LENGTHS, point.dtype)[:, None, None]

        def objective(z: Outputs) -> RowVector:
            return self.value(z, targets) + jnp.sum(jnp.square(z - point), axis=1) / (2 * step)

        def improve(_: int, z: Outputs) -> Outputs:
            g = self.gradient(z, targets) + (z - point) / step
            candidates = z[None] - lengths * self.divide(z, targets, 1 / step, g)[None]
            best = jnp.argmin(jnp.nan_to_num(jax.vmap(objective)(candidates), nan=jnp.inf), axis=0)
            return jnp.take_along_axis(candidates, best[None, :, None], axis=0)[0]

        return jax.lax.fori_loop(0, _NEWTON_STEPS, improve, point)

    def divide(self, outputs: Outputs, targets: Outputs, shift: Scalar, direction: Outputs) -> Outputs:
        """``(H_j + shift I)⁻¹ r_j``, for the Newton steps of the prox."""
        C = outputs.shape[1]
        units = jnp.eye(C, dtype=outputs.dtype)
        H = jax.vmap(lambda e: self.curvature(outputs, targets, jnp.broadcast_to(e, outputs.shape)), out_axes=2)(units)
        return jnp.linalg.solve(H + shift * units[None], direction[..., None])[..., 0]

    def conjugate(self, dual: Outputs, targets: Outputs) -> RowVector:
        """``ℓ*(a, y) = sup_f ⟨a, f⟩ − ℓ(f, y)`` for a among the gradients of ℓ; infinite means unknown."""
        return jnp.full(dual.shape[0], jnp.inf, dual.dtype)

    def balance(self, dual: Outputs, targets: Outputs, weight: RowVector) -> Outputs:
        """Duals near the given ones with ``Σ w_j a_j = 0``, which a free output bias asks for, still among gradients.

        Of each output, the entries of the heavier sign are shrunk; right for losses that are sums over outputs.
        """
        plus = weight @ jnp.maximum(dual, 0)
        minus = weight @ jnp.maximum(-dual, 0)
        heavier = jnp.where(dual > 0, _positive(plus)[None, :], _positive(minus)[None, :])
        return dual * jnp.minimum(jnp.minimum(plus, minus)[None, :] / heavier, 1)

    def constant(self, targets: Outputs, weight: RowVector) -> Float[Array, " C"]:
        """The best constant outputs b, here by damped steps of the mean curvature from zero."""
        n, C = targets.shape
        lengths = jnp.asarray(_NEWTON_LENGTHS, targets.dtype)[:, None]

        def objective(b: Float[Array, " C"]) -> Scalar:
            return weight @ self.value(jnp.broadcast_to(b, (n, C)), targets)

        def improve(_: int, b: Float[Array, " C"]) -> Float[Array, " C"]:
            outputs = jnp.broadcast_to(b, (n, C))
            slope = weight @ self.gradient(outputs, targets)
            bend = weight @ self.mean_curvature(outputs, targets)
            candidates = b[None, :] - lengths * slope[None, :] / _positive(bend)
            values = jax.vmap(objective)(candidates)
            return candidates[least(values)]

        return jax.lax.fori_loop(0, _CONSTANT_STEPS, improve, jnp.zeros(C, targets.dtype))


def check_told_apart(where: str, loss: Loss) -> None:
    """Raise a ValueError if two losses of this class may be equal and differ: they would share what is compiled.

    Args:
        where: the caller's name.
        loss: a loss, perhaps of a user's class.
    """
    kind = type(loss).__name__
    for name in vars(loss):
        if not isinstance(getattr(type(loss), name, None), cached_property) and not _is_compared(loss, name):
            raise ValueError(
                f"{where}: `loss` must be a frozen dataclass, whose fields tell it from others of its class, got a "
                f"{kind} whose `{name}` is no such field, so that it equals one with another `{name}`. Write "
                f"@dataclasses.dataclass(frozen=True) above the class, and its fields in it, with types and without "
                "compare=False; a value that follows from them is a functools.cached_property."
            )
    try:
        hash(loss)
    except TypeError as error:
        raise ValueError(
            f"{where}: `loss` must be a frozen dataclass with fields that hash, such as Python numbers and tuples of "
            f"them, got a {kind}: {error}."
        ) from error


def _is_compared(loss: Loss, name: str) -> bool:
    """Whether a loss is not equal to one that differs in this attribute only."""
    other: Any = copy.copy(loss)
    object.__setattr__(other, name, object())
    try:
        return not bool(loss == other)
    except Exception:  # an __eq__ of the user's own looked at it; or it is an array, which does not hash either
        return True


def where_taken(taken: Bool[Array, "..."], targets: Array) -> Array:
    """Targets inside ``jit``, where nobody can look: those that the loss does not take are NaN, as is then the loss."""
    return jnp.where(taken, targets, jnp.asarray(jnp.nan, targets.dtype))


def wide(labels: Array) -> Array:
    """Labels of less than 32 bits as int32: in their own type the numbers of further classes would wrap around."""
    return labels.astype(jnp.int32) if labels.dtype.itemsize < 4 else labels


def _check_floating(y: Array | np.ndarray) -> None:
    if not jnp.issubdtype(y.dtype, jnp.floating):
        raise ValueError(
            f"`y` must be a floating array, got dtype {y.dtype}. For class labels use "
            'cf.signed_targets(labels, num_classes), or loss="softmax".'
        )


def _positive(value: Array) -> Array:
    return jnp.maximum(value, jnp.asarray(jnp.finfo(value.dtype).tiny, value.dtype))


def signed_targets(labels: ArrayLike, num_classes: int) -> Float[Array, "n C"]:
    """Targets ±1 for the squared loss: +1 for the row's own class, −1 for the others.

    Two classes need one column only, ``+1`` for class 1 and ``−1`` for class 0.

    Args:
        labels: integers in ``[0, num_classes)``, any shape ``(...)``.
        num_classes: number of classes, at least 2.

    Returns:
        Shape ``(..., num_classes)``, or ``(..., 1)`` for two classes.

    Raises:
        ValueError: for labels that are not integers or out of range, or fewer than two classes. Inside ``jit`` labels
            out of range give NaN.

    Example:
        >>> import cronos_flax as cf
        >>> cf.signed_targets([0, 2], 3).tolist()
        [[1.0, -1.0, -1.0], [-1.0, -1.0, 1.0]]
        >>> cf.signed_targets([0, 1], 2).tolist()
        [[-1.0], [1.0]]
    """
    if isinstance(num_classes, bool) or not isinstance(num_classes, (int, np.integer)) or num_classes < 2:
        raise ValueError(f"signed_targets: `num_classes` must be an integer ≥ 2, got {num_classes!r}.")
    labels = native(labels, "signed_targets: `labels`")
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(f"signed_targets: `labels` must be integers, got dtype {labels.dtype}.")
    labels = on_device(labels)
    if not is_concrete(labels):
        labels = wide(labels)
        within = (labels >= 0) & (labels < num_classes)
        return where_taken(within[..., None], _signed(labels, num_classes))
    if labels.size:
        low, high = map(int, on_host((labels.min(), labels.max())))
        if low < 0 or high >= num_classes:
            raise ValueError(
                f"signed_targets: `labels` must lie in [0, {num_classes}), got values from {low} to {high}."
            )
    return _signed(labels, num_classes)


@partial(jax.jit, static_argnums=1)
def _signed(labels: Array, num_classes: int) -> Array:
    labels = wide(labels)
    classes = jnp.arange(1 if num_classes == 2 else 0, num_classes, dtype=labels.dtype)
    return jnp.where(labels[..., None] == jnp.broadcast_to(classes, (*labels.shape, len(classes))), 1.0, -1.0)
