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
from cronos_flax._losses import squared
from cronos_flax._types import Activations, Directions, Gates, Neurons, Outputs, Scalar

_BETA_STARTS = 32
_BETA_ASCENT_STEPS = 10


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
        return jnp.where(self.D, self.rows.center(R) @ self.A.T, 0)

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


def beta_max(rows: Rows, key: Array) -> Scalar:
    """The smallest β found for which the zero network is optimal: ``max over unit u of ‖relu(X u)ᵀ α‖``.

    The problem is not concave; it is climbed from random starts, keeping the best (method.md section 3).
    """
    alpha = rows.center(rows.Y)
    start = jax.random.normal(key, (rows.X.shape[1], _BETA_STARTS), rows.X.dtype)

    def value(u: Neurons) -> tuple[Float[Array, " k"], Activations, Float[Array, "k C"]]:
        Z = rows.X @ u
        correlation = jax.nn.relu(Z).T @ alpha
        return jnp.linalg.norm(correlation, axis=1), Z, correlation

    def ascend(_: int, carry: tuple) -> tuple:
        best, u, Z, correlation = carry
        c = unit_rows(correlation, correlation)
        proposal = rows.X.T @ jnp.where(Z >= 0, alpha @ c.T, 0)
        size = norms(proposal)
        proposal = proposal / jnp.where(size > 0, size, 1)
        height, Z_new, correlation_new = value(proposal)
        better = height > best
        return (
            jnp.where(better, height, best),
            jnp.where(better, proposal, u),
            jnp.where(better, Z_new, Z),
            jnp.where(better[:, None], correlation_new, correlation),
        )

    start = start / norms(start)
    height, Z, correlation = value(start)
    best, *_ = jax.lax.fori_loop(0, _BETA_ASCENT_STEPS, ascend, (height, start, Z, correlation))
    return jnp.max(best)
