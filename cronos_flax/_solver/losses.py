"""Losses of one row: value, gradient, curvature, prox and conjugate; and the targets they take.

A :class:`Loss` says everything the solver needs to know. The refreshed path asks for value, gradient and curvature,
held gates for the prox, their lower bound for the conjugate (method.md sections 2, 4 and 5). All work on whole arrays,
row by row, and know nothing of weights.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float

from cronos_flax._solver.types import Outputs, RowVector, Scalar

_NEWTON_STEPS = 50
_NEWTON_LENGTHS = (1.0, 0.5, 0.2, 0.05, 0.01, 0.001, 0.0)
_CONSTANT_STEPS = 50
_HINGE_FLOOR = 0.1  # distance to the kink below which the hinge's parabola gets no narrower


@dataclasses.dataclass(frozen=True)
class Loss:
    """A convex loss ``ℓ(f, y)`` of the outputs f of one row, summed over rows by the solver.

    Subclass it for a loss of your own: a frozen dataclass whose fields are Python numbers, with :meth:`value`. What
    else there is follows from that by automatic differentiation, for losses that are smooth; overwrite what can be had
    cheaper, or what the loss has no derivative for. Without :meth:`conjugate` held gates have no lower bound, and never
    say that they converged.

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
    """

    def targets(self, y: Array, num_classes: int | None) -> Array:
        """Targets ``(n, C)`` from what the user calls y: here floats, ``(n,)`` or ``(n, C)``.

        Args:
            y: an array of any dtype, with one or two dimensions.
            num_classes: C where it is known.

        Raises:
            ValueError: saying what was expected and what came.
        """
        if not jnp.issubdtype(y.dtype, jnp.floating):
            raise ValueError(
                f"`y` must be a floating array, got dtype {y.dtype}. For class labels use "
                'cf.signed_targets(labels, num_classes), or loss="softmax".'
            )
        return y[:, None] if y.ndim == 1 else y

    def value(self, outputs: Outputs, targets: Outputs) -> RowVector:
        """``ℓ(f_j, y_j)`` of each row."""
        raise NotImplementedError

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
            candidates = z - lengths * self.divide(z, targets, 1 / step, g)
            best = jnp.argmin(jnp.nan_to_num(jax.vmap(objective)(candidates), nan=jnp.inf), axis=0)
            return jnp.take_along_axis(candidates, best[None, :, None], axis=0)[0]

        return jax.lax.fori_loop(0, _NEWTON_STEPS, improve, point)

    def divide(self, outputs: Outputs, targets: Outputs, shift: Scalar, direction: Outputs) -> Outputs:
        """``(H_j + shift I)⁻¹ r_j``, for the Newton steps of the prox."""
        C = outputs.shape[1]
        units = jnp.eye(C, dtype=outputs.dtype)
        H = jax.vmap(lambda e: self.curvature(outputs, targets, jnp.broadcast_to(e, outputs.shape)), out_axes=2)(units)
        return jnp.linalg.solve(H + shift * units, direction[..., None])[..., 0]

    def conjugate(self, dual: Outputs, targets: Outputs) -> RowVector:
        """``ℓ*(a, y) = sup_f ⟨a, f⟩ − ℓ(f, y)`` for a among the gradients of ℓ; infinite means unknown."""
        return jnp.full(dual.shape[0], jnp.inf, dual.dtype)

    def balance(self, dual: Outputs, targets: Outputs, weight: RowVector) -> Outputs:
        """Duals near the given ones with ``Σ w_j a_j = 0``, which a free output bias asks for, still among gradients.

        Of each output, the entries of the heavier sign are shrunk; right for losses that are sums over outputs.
        """
        plus = weight @ jnp.maximum(dual, 0)
        minus = weight @ jnp.maximum(-dual, 0)
        shrink = jnp.minimum(plus, minus) / jnp.where(dual > 0, jnp.maximum(plus, _tiny(dual)), _positive(minus))
        return dual * jnp.minimum(shrink, 1)

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
            candidates = b - lengths * slope / _positive(bend)
            values = jax.vmap(objective)(candidates)
            return candidates[jnp.argmin(jnp.where(jnp.isfinite(values), values, jnp.inf))]

        return jax.lax.fori_loop(0, _CONSTANT_STEPS, improve, jnp.zeros(C, targets.dtype))


@dataclasses.dataclass(frozen=True)
class Squared(Loss):
    """``½‖f − y‖²``, for targets of any kind."""

    def value(self, outputs: Outputs, targets: Outputs) -> RowVector:
        """See :class:`Loss`, as for all that follow."""
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
        return dual - weight @ dual / jnp.sum(weight)

    def constant(self, targets: Outputs, weight: RowVector) -> Float[Array, " C"]:
        return weight @ targets / jnp.sum(weight)


@dataclasses.dataclass(frozen=True)
class Softmax(Loss):
    """Cross-entropy of the softmax of the outputs, ``log Σ exp f_c − ⟨y, f⟩``; y are labels, or probabilities."""

    def targets(self, y: Array, num_classes: int | None) -> Array:
        known = not isinstance(y, jax.core.Tracer)
        if y.ndim == 2 and jnp.issubdtype(y.dtype, jnp.floating):
            if known and not bool(jnp.all(y >= 0) & jnp.all(jnp.abs(jnp.sum(y, axis=1) - 1) < 1e-3)):
                raise ValueError("`y` of two dimensions must be probabilities, rows ≥ 0 that sum to one; got others.")
            return y
        if y.ndim != 1 or not jnp.issubdtype(y.dtype, jnp.integer):
            raise ValueError(
                f"`y` must be integer labels (n,) or probabilities (n, C), got {y.dtype} of shape {y.shape}."
            )
        if num_classes is None and not known:
            raise ValueError("`num_classes` must be given inside jit, where labels cannot be counted; got None.")
        low, high = (int(y.min()), int(y.max())) if known and y.size else (0, 0)
        C = max(high + 1, 2) if num_classes is None else num_classes
        if low < 0 or high >= C:
            raise ValueError(f"`y` must have labels in [0, {C}), got values from {low} to {high}.")
        return jax.nn.one_hot(y, C)

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
        share = jnp.min(jnp.where(total > 0, mean / jnp.where(total > 0, total, 1), jnp.inf))
        mix = 1 / (1 + share)
        pi = (mean - jnp.where(mix > 0, (1 - mix) / jnp.where(mix > 0, mix, 1), 0) * total) / jnp.sum(weight)
        return (1 - mix) * dual + mix * (jnp.maximum(pi, 0) - targets)

    def constant(self, targets: Outputs, weight: RowVector) -> Float[Array, " C"]:
        mean = weight @ targets / jnp.sum(weight)
        logits = jnp.log(jnp.maximum(mean, jnp.finfo(mean.dtype).eps))
        return logits - jnp.mean(logits)


@dataclasses.dataclass(frozen=True)
class Logistic(Loss):
    """``Σ_c log(1 + exp f_c) − y_c f_c``: cross-entropy of independent yes-or-no outputs, y in [0, 1]."""

    def targets(self, y: Array, num_classes: int | None) -> Array:
        if not isinstance(y, jax.core.Tracer) and not bool(jnp.all((y >= 0) & (y <= 1))):
            raise ValueError("`y` must be 0 or 1, or probabilities between; got other values.")
        y = y if jnp.issubdtype(y.dtype, jnp.floating) else y.astype(float)
        return y[:, None] if y.ndim == 1 else y

    def value(self, outputs: Outputs, targets: Outputs) -> RowVector:
        return jnp.sum(jax.nn.softplus(outputs) - targets * outputs, axis=1)

    def gradient(self, outputs: Outputs, targets: Outputs) -> Outputs:
        return jax.nn.sigmoid(outputs) - targets

    def curvature(self, outputs: Outputs, targets: Outputs, direction: Outputs) -> Outputs:
        return jax.nn.sigmoid(outputs) * jax.nn.sigmoid(-outputs) * direction

    def mean_curvature(self, outputs: Outputs, targets: Outputs) -> RowVector:
        return jnp.mean(jax.nn.sigmoid(outputs) * jax.nn.sigmoid(-outputs), axis=1)

    def divide(self, outputs: Outputs, targets: Outputs, shift: Scalar, direction: Outputs) -> Outputs:
        return direction / (jax.nn.sigmoid(outputs) * jax.nn.sigmoid(-outputs) + shift)

    def conjugate(self, dual: Outputs, targets: Outputs) -> RowVector:
        p = dual + targets
        return jnp.sum(_entropy(p) + _entropy(1 - p), axis=1)

    def constant(self, targets: Outputs, weight: RowVector) -> Float[Array, " C"]:
        eps = jnp.finfo(targets.dtype).eps
        mean = jnp.clip(weight @ targets / jnp.sum(weight), eps, 1 - eps)
        return jnp.log(mean) - jnp.log1p(-mean)


@dataclasses.dataclass(frozen=True)
class Huber(Loss):
    """``Σ_c ½r²`` for ``|r| ≤ delta`` and ``delta (|r| − delta/2)`` beyond, ``r = f − y``: outliers count less.

    Args:
        delta: where the loss turns from quadratic to linear, in the units of y.
    """

    delta: float = 1.0

    def value(self, outputs: Outputs, targets: Outputs) -> RowVector:
        size = jnp.abs(outputs - targets)
        inside = jnp.minimum(size, self.delta)
        return jnp.sum(inside * (size - 0.5 * inside), axis=1)

    def gradient(self, outputs: Outputs, targets: Outputs) -> Outputs:
        return jnp.clip(outputs - targets, -self.delta, self.delta)

    def _weight(self, outputs: Outputs, targets: Outputs) -> Outputs:
        # Of the parabola that touches the loss here and is nowhere below it.
        return self.delta / jnp.maximum(jnp.abs(outputs - targets), self.delta)

    def curvature(self, outputs: Outputs, targets: Outputs, direction: Outputs) -> Outputs:
        return self._weight(outputs, targets) * direction

    def mean_curvature(self, outputs: Outputs, targets: Outputs) -> RowVector:
        return jnp.mean(self._weight(outputs, targets), axis=1)

    def prox(self, point: Outputs, targets: Outputs, step: Scalar) -> Outputs:
        r = point - targets
        return point - step * jnp.clip(r / (1 + step), -self.delta, self.delta)

    def conjugate(self, dual: Outputs, targets: Outputs) -> RowVector:
        return jnp.sum(0.5 * jnp.square(dual) + dual * targets, axis=1)


@dataclasses.dataclass(frozen=True)
class Hinge(Loss):
    """``Σ_c max(0, 1 − y_c f_c)``, y = ±1."""

    def targets(self, y: Array, num_classes: int | None) -> Array:
        if not isinstance(y, jax.core.Tracer) and not bool(jnp.all(jnp.abs(y) == 1)):
            raise ValueError(
                "`y` must be −1 or +1, got other values. For class labels use cf.signed_targets(labels, num_classes)."
            )
        y = y if jnp.issubdtype(y.dtype, jnp.floating) else y.astype(float)
        return y[:, None] if y.ndim == 1 else y

    def value(self, outputs: Outputs, targets: Outputs) -> RowVector:
        return jnp.sum(jnp.maximum(1 - targets * outputs, 0), axis=1)

    def gradient(self, outputs: Outputs, targets: Outputs) -> Outputs:
        return jnp.where(targets * outputs <= 1, -targets, 0)

    def _weight(self, outputs: Outputs, targets: Outputs) -> Outputs:
        # Of the parabola that touches the loss here and is nowhere below it, but not narrower than the floor makes it.
        return 0.5 / jnp.maximum(jnp.abs(1 - targets * outputs), _HINGE_FLOOR)

    def curvature(self, outputs: Outputs, targets: Outputs, direction: Outputs) -> Outputs:
        return self._weight(outputs, targets) * direction

    def mean_curvature(self, outputs: Outputs, targets: Outputs) -> RowVector:
        return jnp.mean(self._weight(outputs, targets), axis=1)

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


def _tiny(like: Array) -> Array:
    return jnp.asarray(jnp.finfo(like.dtype).tiny, like.dtype)


def _positive(value: Array) -> Array:
    return jnp.maximum(value, _tiny(value))


def _entropy(p: Array) -> Array:
    """``p log p``, zero at zero; rounding may have put p just outside [0, 1]."""
    p = jnp.clip(p, 0, 1)
    return jnp.where(p > 0, p * jnp.log(jnp.where(p > 0, p, 1)), 0)


def signed_targets(labels: ArrayLike, num_classes: int) -> Float[Array, "n C"]:
    """Targets ±1 for the squared loss: +1 for the row's own class, −1 for the others.

    Two classes need one column only, ``+1`` for class 1 and ``−1`` for class 0.

    Args:
        labels: integers in ``[0, num_classes)``, any shape ``(...)``.
        num_classes: number of classes, at least 2.

    Returns:
        Shape ``(..., num_classes)``, or ``(..., 1)`` for two classes.

    Raises:
        ValueError: for labels that are not integers or out of range, or fewer than two classes.

    Example:
        >>> import cronos_flax as cf
        >>> cf.signed_targets([0, 2], 3).tolist()
        [[1.0, -1.0, -1.0], [-1.0, -1.0, 1.0]]
        >>> cf.signed_targets([0, 1], 2).tolist()
        [[-1.0], [1.0]]
    """
    if isinstance(num_classes, bool) or not isinstance(num_classes, (int, np.integer)) or num_classes < 2:
        raise ValueError(f"signed_targets: `num_classes` must be an integer ≥ 2, got {num_classes!r}.")
    if not isinstance(labels, (Array, np.ndarray)):
        labels = np.asarray(labels)
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(f"signed_targets: `labels` must be integers, got dtype {labels.dtype}.")
    labels = jnp.asarray(labels)
    if not isinstance(labels, jax.core.Tracer) and labels.size:
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= num_classes:
            raise ValueError(
                f"signed_targets: `labels` must lie in [0, {num_classes}), got values from {low} to {high}."
            )
    classes = jnp.arange(1 if num_classes == 2 else 0, num_classes)
    return jnp.where(labels[..., None] == classes, 1.0, -1.0)
