"""Linear systems: preconditioned conjugate gradients, and the structured solve of ADMM's U-step."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cronos_flax._program import Program
from cronos_flax._types import Activations, Neurons, Outputs, Scalar


def conjugate_gradient(
    operator: Callable[[Array], Array],
    rhs: Array,
    *,
    preconditioner: Callable[[Array], Array] = lambda r: r,
    guess: Array | None = None,
    tol: Array | float = 0.0,
    max_steps: int,
) -> Array:
    """Solve ``operator(x) = rhs`` for a symmetric positive definite operator.

    Stops when the residual, in the norm of the preconditioner, is below ``tol`` times that of ``rhs``, or below what
    the precision can resolve, or after ``max_steps``. Without a guess no product is spent on the start.
    """
    floor = jnp.finfo(rhs.dtype).eps

    def energy(r: Array) -> Array:
        return jnp.vdot(r, preconditioner(r))

    target = jnp.square(jnp.maximum(jnp.asarray(tol, rhs.dtype), floor)) * energy(rhs)

    def unfinished(carry: tuple) -> Array:
        step, _, _, _, rz = carry
        return (step < max_steps) & (rz > target)

    def body(carry: tuple) -> tuple:
        step, x, r, p, rz = carry
        q = operator(p)
        length = rz / jnp.vdot(p, q)
        x, r = x + length * p, r - length * q
        z = preconditioner(r)
        rz_new = jnp.vdot(r, z)
        return step + 1, x, r, z + (rz_new / rz) * p, rz_new

    x = jnp.zeros_like(rhs) if guess is None else guess
    r = rhs if guess is None else rhs - operator(guess)
    z = preconditioner(r)
    return jax.lax.while_loop(unfinished, body, (0, x, r, z, jnp.vdot(r, z)))[1]


@dataclasses.dataclass(frozen=True)
class Structured:
    """The U-step of ADMM by Woodbury on the eigenbasis (method.md section 2).

    There ``K = I + XᵀX`` is diagonal and the step is one system with ``n·C`` unknowns,

        p = K⁻¹ r,      (κ I + F K⁻¹ F*) z = F p,      U = p − K⁻¹ F* z

    which conjugate gradients solve from the last z.

    Args:
        max_steps: most conjugate-gradient steps in one iteration of ADMM.
    """

    max_steps: int = 50

    def __post_init__(self) -> None:
        if isinstance(self.max_steps, bool) or not isinstance(self.max_steps, int) or self.max_steps < 1:
            raise ValueError(f"Structured: `max_steps` must be a positive integer, got {self.max_steps!r}.")

    def solve(
        self,
        program: Program,
        eigenvalues: Float[Array, " d"],
        kappa: Scalar,
        rhs: Neurons,
        z: Outputs,
        tol: Scalar,
    ) -> tuple[Neurons, Activations, Outputs]:
        """``U`` with ``(K + κ⁻¹ F*F) U = rhs``, with ``X U`` and the inner solution for the next call."""
        X = program.rows.X
        inverse_K = (1 / (1 + eigenvalues))[:, None]

        def inner(z: Outputs) -> Outputs:
            return kappa * z + program.F(X @ (inverse_K * (X.T @ program.Ft(z))))

        p = inverse_K * rhs
        z = conjugate_gradient(inner, program.F(X @ p), guess=z, tol=tol, max_steps=self.max_steps)
        U = p - inverse_K * (X.T @ program.Ft(z))
        return U, X @ U, z
