"""ADMM on the program with held gates (method.md section 2), in its compact state.

With the splits ``U = V`` and ``G X U = S ≥ 0`` and scaled duals Λ, N, one iteration is

    U ← solve (K + ρ⁻¹ F*F) U = V − Λ + G*(S − N) + ρ⁻¹ F*Y
    V ← group prox of U + Λ with threshold β/ρ           S ← max(G U + N, 0)
    Λ ← Λ + U − V                                        N ← N + G U − S

with U over-relaxed. The prox fixes the duals, so only ``V + Λ`` and ``S + N`` are kept.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from cronos_flax._linsolve import Structured
from cronos_flax._program import Program, group_prox, lower_bound, norms
from cronos_flax._solution import TwoLayer
from cronos_flax._types import Activations, Directions, Gates, Neurons, Outputs, Scalar

_OVER_RELAXATION = 1.6
_CHECK_EVERY = 10


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["V_plus_dual", "S_plus_dual", "z", "iteration"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Iterate:
    """Everything ADMM keeps between iterations.

    Args:
        V_plus_dual: ``V + Λ``.
        S_plus_dual: ``S + N``.
        z: the last inner solution, the start of the next.
        iteration: iterations done, which the inner tolerance shrinks with.
    """

    V_plus_dual: Neurons
    S_plus_dual: Activations
    z: Outputs
    iteration: Int[Array, ""]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["V", "program_objective", "lower_bound", "cone_violation", "primal_residual", "dual_residual"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Check:
    """The figures of one check; :class:`cronos_flax.Stats` says what they mean."""

    V: Neurons
    program_objective: Scalar
    lower_bound: Scalar
    cone_violation: Scalar
    primal_residual: Scalar
    dual_residual: Scalar

    def converged(self, tol: Scalar) -> Array:
        """Whether gap and cone violation are both within tol."""
        gap = jnp.abs(self.program_objective - self.lower_bound)
        return (gap <= tol * jnp.abs(self.program_objective)) & (self.cone_violation <= tol)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["params", "hidden_plus_dual", "D", "A", "S_plus_dual", "z", "iteration"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class State:
    """Where a solve stands between calls, in the user's units; good for the rows it was made from."""

    params: TwoLayer
    hidden_plus_dual: tuple[Float[Array, "p m"], Float[Array, " m"] | None]
    D: Gates
    A: Directions
    S_plus_dual: Float[Array, "n m"]
    z: Float[Array, "n C"]
    iteration: Array


def init(program: Program, U: Neurons, rho: Scalar) -> Iterate:
    """The iterate for a start from neurons U: ``V = U``, ``S = G X U``, and the Λ that the prox would leave there."""
    size = norms(U)
    dual = (program.beta / rho) * U / jnp.where(size > 0, size, 1)
    Z = program.rows.X @ U
    return Iterate(U + dual, jnp.maximum(program.G(Z), 0), jnp.zeros_like(program.rows.Y), jnp.zeros((), jnp.int32))


def _split(program: Program, iterate: Iterate, rho: Scalar) -> tuple[Neurons, Neurons, Activations, Activations]:
    """V, Λ, S, N of the compact state."""
    V = group_prox(iterate.V_plus_dual, program.beta / rho)
    S = jnp.maximum(iterate.S_plus_dual, 0)
    return V, iterate.V_plus_dual - V, S, iterate.S_plus_dual - S


def step(
    program: Program, linear_solver: Structured, eigenvalues: Float[Array, " d"], rho: Scalar, iterate: Iterate
) -> tuple[Iterate, Neurons, Activations]:
    """One iteration; also the U of this iteration and ``G X U``."""
    V, Lambda, S, N = _split(program, iterate, rho)
    # Errors of the U-step must be summable for ADMM to converge, and reach the iterate divided by ρ.
    tol = 0.1 * jnp.minimum(rho, 1) / (iterate.iteration + 1).astype(rho.dtype) ** 1.2
    rhs = V - Lambda + program.rows.X.T @ (program.G(S - N) + program.Ft(program.rows.Y) / rho)
    U, XU, z = linear_solver.solve(program, eigenvalues, rho, rhs, iterate.z, tol)
    GXU = program.G(XU)
    relax = _OVER_RELAXATION
    new = Iterate(
        V_plus_dual=relax * U + (1 - relax) * V + Lambda,
        S_plus_dual=relax * GXU + (1 - relax) * S + N,
        z=z,
        iteration=iterate.iteration + 1,
    )
    return new, U, GXU


def check(program: Program, rho: Scalar, before: Iterate, after: Iterate, U: Neurons, GXU: Activations) -> Check:
    """The certificate and the residuals of the step from ``before`` to ``after``."""
    X = program.rows.X
    V_old, _, S_old, _ = _split(program, before, rho)
    V, Lambda, S, N = _split(program, after, rho)
    XV = X @ V
    GV = program.G(XV)
    tiny = jnp.finfo(U.dtype).tiny

    def size(a: Array, b: Array) -> Scalar:
        return jnp.sqrt(jnp.sum(jnp.square(a)) + jnp.sum(jnp.square(b)))

    return Check(
        V=V,
        program_objective=program.objective(V, XV),
        lower_bound=lower_bound(program, XV, -rho * N),
        cone_violation=jnp.linalg.norm(jnp.minimum(GV, 0)) / jnp.maximum(jnp.linalg.norm(GV), tiny),
        primal_residual=size(U - V, GXU - S) / jnp.maximum(jnp.maximum(size(U, GXU), size(V, S)), tiny),
        dual_residual=jnp.linalg.norm(V - V_old + X.T @ program.G(S - S_old))
        / jnp.maximum(jnp.linalg.norm(Lambda + X.T @ program.G(N)), tiny),
    )


def run(
    program: Program,
    linear_solver: Structured,
    eigenvalues: Float[Array, " d"],
    rho: Scalar,
    iterate: Iterate,
    *,
    tol: Scalar,
    max_iters: int,
) -> tuple[Iterate, Check, Int[Array, ""], Float[Array, " k"]]:
    """Iterate until a check passes, or ``max_iters``; the final iterate, its check, the iterations done, the trace."""

    def steps(iterate: Iterate, count: Int[Array, ""]) -> tuple[Iterate, Check]:
        def one(_: int, it: Iterate) -> Iterate:
            return step(program, linear_solver, eigenvalues, rho, it)[0]

        before = jax.lax.fori_loop(0, count - 1, one, iterate)
        after, U, GXU = step(program, linear_solver, eigenvalues, rho, before)
        return after, check(program, rho, before, after, U, GXU)

    def unfinished(carry: tuple) -> Array:
        done, _, last, _ = carry
        return (done < max_iters) & ~last.converged(tol) & jnp.isfinite(last.program_objective)

    def body(carry: tuple) -> tuple:
        done, it, _, trace = carry
        count = jnp.minimum(_CHECK_EVERY, max_iters - done)
        it, now = steps(it, count)
        trace = jnp.where(jnp.arange(max_iters + 1, dtype=jnp.int32) > done, now.program_objective, trace)
        return done + count, it, now, trace

    V, _, S, _ = _split(program, iterate, rho)
    start = check(program, rho, iterate, iterate, V, S)
    trace = jnp.full(max_iters + 1, start.program_objective)
    done, iterate, last, trace = jax.lax.while_loop(unfinished, body, (jnp.zeros((), jnp.int32), iterate, start, trace))
    return iterate, last, done, trace
