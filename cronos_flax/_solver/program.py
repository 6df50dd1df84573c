"""The convex program of method.md section 1, one function per symbol.

With gates ``D`` and output directions ``A`` held fixed,

    minimise over U, b      L(F X U + 1bᵀ) + β Σᵢ ‖uᵢ‖₂      subject to      G X U ≥ 0

where ``F Z = P (D ∘ Z) A`` and ``G Z = (2D − 1) ∘ Z`` act on pre-activations ``Z = X U``, ``P`` removes what the output
bias b can make, and L is the weighted loss, summed over rows. Acting on pre-activations lets one product with X serve
both.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cronos_flax._solver.blocks import Blocks
from cronos_flax._solver.coordinates import Rows
from cronos_flax._solver.losses import Squared
from cronos_flax._solver.types import Activations, Bias, Directions, Features, Gates, Neurons, Outputs, Scalar

_ASCENT_STARTS = 8
_ASCENT_STEPS = 10
_ASCENT_ROWS = 2048  # of more than twice as many
_ASCENT_LENGTHS = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)


def norms(U: Neurons) -> Float[Array, " m"]:
    """``‖uᵢ‖₂`` of each neuron."""
    return jnp.linalg.norm(U, axis=0)


def unit_rows(T: Float[Array, "k C"], fallback: Float[Array, "k C"]) -> Float[Array, "k C"]:
    """Rows of T divided by their norms; the row of ``fallback`` where T's is zero."""
    size = jnp.linalg.norm(T, axis=1, keepdims=True)
    return jnp.where(size > 0, T / jnp.where(size > 0, size, 1), fallback)


@partial(jax.tree_util.register_dataclass, data_fields=["rows", "D", "A", "beta"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Program:
    """The program for given gates and directions.

    Args:
        rows: the data on the solver's coordinates.
        D: gates, True where a neuron is on.
        A: unit output directions.
        beta: β, the group penalty (in sums over rows).
    """

    rows: Rows
    D: Gates
    A: Directions
    beta: Scalar

    def F(self, Z: Activations) -> Outputs:
        """``P (D ∘ Z) A``."""
        return self.rows.center(jnp.where(self.D, Z, 0) @ self.A)

    def Ft(self, R: Outputs) -> Activations:
        """The adjoint of :meth:`F`: ``D ∘ (P R Aᵀ)``."""
        R = self.rows.center(R)
        # One output needs no product of matrices, which would cost more than the memory it writes.
        return jnp.where(self.D, R * self.A.T if R.shape[1] == 1 else R @ self.A.T, 0)

    def G(self, Z: Activations) -> Activations:
        """``(2D − 1) ∘ Z``, its own adjoint and inverse."""
        return jnp.where(self.D, Z, -Z)

    def outputs(self, Z: Activations, b: Bias) -> Outputs:
        """``F Z + 1bᵀ``."""
        return self.F(Z) + self.rows.constant(b)

    def objective(self, U: Neurons, b: Bias, Z: Activations) -> Scalar:
        """The program's objective at U and b, given ``Z = X U``."""
        return self.rows.value(self.outputs(Z, b)) + self.beta * jnp.sum(norms(U))


def network_outputs(rows: Rows, A: Directions, b: Bias, Z: Activations) -> Outputs:
    """Outputs of the network with pre-activations Z: gates follow the signs."""
    return rows.center(jax.nn.relu(Z) @ A) + rows.constant(b)


def network_objective(rows: Rows, A: Directions, b: Bias, beta: Scalar, U: Neurons, Z: Activations) -> Scalar:
    """Regularised loss of the network with neurons U and directions A of any length."""
    penalty = jnp.sum(norms(U) * jnp.linalg.norm(A, axis=1))
    return rows.value(network_outputs(rows, A, b, Z)) + beta * penalty


def group_prox(U: Neurons, threshold: Scalar) -> Neurons:
    """``argmin_V ½‖V − U‖² + threshold Σᵢ ‖vᵢ‖``."""
    size = norms(U)
    return U * (jnp.maximum(size - threshold, 0) / jnp.where(size > 0, size, 1))


def lower_bound(program: Program, alpha: Outputs, nu: Activations) -> Scalar:
    """A number no point of the program is below (method.md section 4).

    With α a gradient of the loss that the output bias cannot lower, and any ``ν ≥ 0``, weak duality gives ``−L*(cα)``
    for every ``c ≥ 0`` with ``c · maxᵢ ‖Fᵢ*α − Gᵢ*νᵢ‖ ≤ β``; for the squared loss the best such c has a closed form.
    """
    rows, tiny = program.rows, jnp.finfo(alpha.dtype).tiny
    alpha = rows.dual(alpha)
    dual_norm = jnp.max(norms(rows.X.T @ (program.Ft(alpha) - program.G(nu))))
    largest = program.beta / jnp.maximum(dual_norm, tiny)
    if isinstance(rows.loss, Squared):
        best = -jnp.sum(alpha * rows.root[:, None] * rows.Y) / jnp.maximum(jnp.sum(jnp.square(alpha)), tiny)
    else:
        best = jnp.ones((), alpha.dtype)
    return -rows.conjugate(jnp.clip(best, 0, largest) * alpha)


def violation(X: Features | Blocks, alpha: Outputs, u: Neurons) -> Float[Array, " k"]:
    """``‖relu(X u)ᵀ α‖/‖u‖`` for each column u: a neuron there would lower the loss if it is above β."""
    size = norms(u)
    return jnp.linalg.norm(jax.nn.relu(X @ u).T @ alpha, axis=1) / jnp.where(size > 0, size, 1)


def climb(X: Features | Blocks, alpha: Outputs, u: Neurons) -> Neurons:
    """Unit neurons of large violation, from unit neurons u: gradient steps, each as long as pays most."""
    lengths = jnp.asarray((0.0, *_ASCENT_LENGTHS), X.dtype)

    def ascend(_: int, u: Neurons) -> Neurons:
        Z = X @ u
        c = jax.nn.relu(Z).T @ alpha
        g = X.T @ jnp.where(Z >= 0, alpha @ unit_rows(c, c).T, 0)
        g = unit_rows((g - u * jnp.sum(u * g, axis=0)).T, jnp.zeros_like(u.T)).T
        Z_g = X @ g

        def height(t: Scalar) -> Float[Array, " k"]:
            return jnp.linalg.norm(jax.nn.relu(Z + t * Z_g).T @ alpha, axis=1) / norms(u + t * g)

        return unit_rows((u + lengths[jnp.argmax(jax.lax.map(height, lengths), axis=0)] * g).T, u.T).T

    return jax.lax.fori_loop(0, _ASCENT_STEPS, ascend, u)


def beta_max(rows: Rows, key: Array) -> Scalar:
    """The smallest β for which the zero network is optimal: ``max over unit u of ‖relu(X u)ᵀ α‖`` (section 3).

    The problem is not concave. It is climbed from a few random starts; the best of them is a lower estimate, and agrees
    over keys to a few hundredths. Of many rows, a sample is climbed on; what is reached there is measured on all.
    """
    alpha = rows.gradient(jnp.zeros_like(rows.Y) + rows.constant(rows.best_constant()))
    alpha = rows.dual(alpha)
    u = jax.random.normal(key, (rows.X.shape[1], _ASCENT_STARTS), rows.X.dtype)
    some = rows.X, alpha
    if len(alpha) > 2 * _ASCENT_ROWS:
        index = jnp.sort(jax.random.randint(jax.random.fold_in(key, 1), (_ASCENT_ROWS,), 0, len(alpha)))
        some = rows.X[index], alpha[index]
    u = climb(*some, u / norms(u))
    return jnp.max(violation(rows.X, alpha, u))
