"""The convex program of method.md section 1, one function per symbol.

With gates ``D`` and output directions ``A`` held fixed,

    minimise over U      ½‖P(F X U − Y)‖² + β Σᵢ ‖uᵢ‖₂      subject to      G X U ≥ 0

where ``F Z = (D ∘ Z) A`` and ``G Z = (2D − 1) ∘ Z`` act on pre-activations ``Z = X U``, and ``P`` removes what the
output bias explains. Acting on pre-activations lets one product with X serve both.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cronos_flax._basis import Rows
from cronos_flax._blocks import Blocks
from cronos_flax._losses import squared
from cronos_flax._types import Activations, Directions, Features, Gates, Neurons, Outputs, Scalar

_ASCENT_STARTS = 8
_ASCENT_STEPS = 10
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

    def residual(self, Z: Activations) -> Outputs:
        """``P(F Z − Y)``, the gradient of the loss with respect to the outputs."""
        return self.F(Z) - self.rows.center(self.rows.Y)

    def objective(self, U: Neurons, Z: Activations) -> Scalar:
        """The program's objective at U, given ``Z = X U``."""
        loss = jnp.sum(squared(self.F(Z), self.rows.center(self.rows.Y)))
        return loss + self.beta * jnp.sum(norms(U))


def network_objective(rows: Rows, A: Directions, beta: Scalar, U: Neurons, Z: Activations) -> Scalar:
    """Regularised loss of the network with neurons U: gates follow the signs of ``Z = X U``."""
    loss = jnp.sum(squared(rows.center(jax.nn.relu(Z) @ A), rows.center(rows.Y)))
    return loss + beta * jnp.sum(norms(U))


def group_prox(U: Neurons, threshold: Scalar) -> Neurons:
    """``argmin_V ½‖V − U‖² + threshold Σᵢ ‖vᵢ‖``."""
    size = norms(U)
    return U * (jnp.maximum(size - threshold, 0) / jnp.where(size > 0, size, 1))


def lower_bound(program: Program, Z: Activations, nu: Activations) -> Scalar:
    """A number no point of the program is below (method.md section 4).

    With ``α = P(F Z − Y)`` and any ``ν ≥ 0``, weak duality gives ``−L*(cα)`` for every ``c ≥ 0`` with
    ``c · maxᵢ ‖Fᵢ*α − Gᵢ*νᵢ‖ ≤ β``; for the squared loss the best such c has a closed form.
    """
    Y = program.rows.Y
    alpha = program.residual(Z)
    dual_norm = jnp.max(norms(program.rows.X.T @ (program.Ft(alpha) - program.G(nu))))
    tiny = jnp.finfo(alpha.dtype).tiny
    largest = program.beta / jnp.maximum(dual_norm, tiny)
    c = jnp.clip(-jnp.sum(alpha * Y) / jnp.maximum(jnp.sum(jnp.square(alpha)), tiny), 0, largest)
    return -jnp.sum(0.5 * jnp.square(c * alpha) + c * alpha * Y)


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
    over keys to a few hundredths.
    """
    alpha = rows.center(rows.Y)
    u = jax.random.normal(key, (rows.X.shape[1], _ASCENT_STARTS), rows.X.dtype)
    u = climb(rows.X, alpha, u / norms(u))
    return jnp.max(violation(rows.X, alpha, u))
