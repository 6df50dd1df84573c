"""ADMM on the program with held gates (method.md section 2), in its compact state.

With the splits ``U = V`` and ``G X U = S ≥ 0`` and scaled duals Λ, N, one iteration is

    U ← solve (K + ρ⁻¹ F*F) U = V − Λ + G*(S − N) + ρ⁻¹ F*Y
    V ← group prox of U + Λ with threshold β/ρ           S ← max(G U + N, 0)
    Λ ← Λ + U − V                                        N ← N + G U − S

with U over-relaxed. Losses other than the squared one get a third split, ``F U + 1bᵀ = Z`` with scaled dual M and
penalty τ; then κ = ρ/τ is in the place of ρ in the U-step, ``Z − M`` in that of Y, and

    Z ← prox of ℓ/τ at F U + 1bᵀ + M                         M ← M + F U + 1bᵀ − Z

The prox fixes the duals, so only ``V + Λ``, ``S + N`` and ``Z + M`` are kept. The iteration is a fixed-point map of
these, and its slow tail is shortened by Anderson acceleration, safeguarded.
"""

import dataclasses
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from cronos_flax._solver.anderson import Memory
from cronos_flax._solver.linear_solvers import NystromPCG, Structured
from cronos_flax._solver.losses import Squared
from cronos_flax._solver.program import Program, group_prox, lower_bound, norms
from cronos_flax._solver.solution import TwoLayer
from cronos_flax._solver.types import Activations, Bias, Directions, Gates, Neurons, Outputs, Scalar

_OVER_RELAXATION = 1.6
_KAPPA = 4.0  # ρ/τ, where there is a third split
_CHECK_EVERY = 10
_EXTRAPOLATE_EVERY = 5
_RESIDUAL_RATIO = 0.1  # of the primal to the dual residual, that ρ is steered to
_LEAST_ADAPTATION, _MOST_ADAPTATION = 1.5, 4.0
_LAST_ADAPTATION = 10_000  # ρ changes finitely often, which convergence needs


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["V_plus_dual", "S_plus_dual", "Z_plus_dual", "z", "rho", "iteration"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Iterate:
    """Everything ADMM keeps between iterations.

    Args:
        V_plus_dual: ``V + Λ``.
        S_plus_dual: ``S + N``.
        Z_plus_dual: ``Z + M``; None for the squared loss.
        z: the last inner solution, the start of the next.
        rho: ρ, the penalty.
        iteration: iterations done, which the inner tolerance shrinks with.
    """

    V_plus_dual: Neurons
    S_plus_dual: Activations
    Z_plus_dual: Outputs | None
    z: Outputs
    rho: Scalar
    iteration: Int[Array, ""]

    def split(self, beta: Scalar) -> tuple[Neurons, Neurons, Activations, Activations]:
        """``V, Λ, S, N``."""
        V = group_prox(self.V_plus_dual, beta / self.rho)
        S = jnp.maximum(self.S_plus_dual, 0)
        return V, self.V_plus_dual - V, S, self.S_plus_dual - S

    @property
    def kappa(self) -> Scalar:
        """κ of the U-step."""
        return self.rho if self.Z_plus_dual is None else jnp.full_like(self.rho, _KAPPA)

    @property
    def tau(self) -> Scalar:
        """τ, the penalty of the third split."""
        return self.rho / self.kappa

    def split_outputs(self, program: Program) -> tuple[Outputs, Outputs]:
        """``Z, M``; for the squared loss the targets, and zero."""
        if self.Z_plus_dual is None:
            targets = program.rows.root[:, None] * program.rows.Y
            return targets, jnp.zeros_like(targets)
        Z = program.rows.prox(self.Z_plus_dual, 1 / self.tau)
        return Z, self.Z_plus_dual - Z

    @property
    def parts(self) -> list[Array]:
        """The arrays that the fixed-point map is about."""
        return jax.tree.leaves((self.V_plus_dual, self.S_plus_dual, self.Z_plus_dual))

    def flat(self) -> Float[Array, " N"]:
        """:attr:`parts` as one vector."""
        return jnp.concatenate([part.ravel() for part in self.parts])

    def at(self, flat: Float[Array, " N"]) -> "Iterate":
        """This iterate moved to the point ``flat``."""
        pieces = jnp.split(flat, list(itertools.accumulate(part.size for part in self.parts))[:-1])
        V, S, *Z = (piece.reshape(part.shape) for piece, part in zip(pieces, self.parts, strict=True))
        return dataclasses.replace(self, V_plus_dual=V, S_plus_dual=S, Z_plus_dual=Z[0] if Z else None)

    def with_rho(self, rho: Scalar, program: Program) -> "Iterate":
        """The same V, S, Z and unscaled duals under another penalty."""
        V, Lambda, S, N = self.split(program.beta)
        ratio = self.rho / rho
        moved = dataclasses.replace(self, V_plus_dual=V + ratio * Lambda, S_plus_dual=S + ratio * N, rho=rho)
        if self.Z_plus_dual is None:
            return moved
        Z, M = self.split_outputs(program)
        return dataclasses.replace(moved, Z_plus_dual=Z + ratio * M)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["V", "b", "program_objective", "lower_bound", "cone_violation", "primal_residual", "dual_residual"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Check:
    """The figures of one check; :class:`cronos_flax.Stats` says what they mean."""

    V: Neurons
    b: Bias
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
    data_fields=["params", "hidden_plus_dual", "D", "A", "S_plus_dual", "Z_plus_dual", "z", "rho", "iteration"],
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
    Z_plus_dual: Float[Array, "n C"] | None
    z: Float[Array, "n C"]
    rho: Array
    iteration: Array


def init(program: Program, U: Neurons, b: Bias, rho: Scalar) -> Iterate:
    """The iterate for a start from U and b: ``V = U``, ``S = G X U``, ``Z = F X U + 1bᵀ``, stationary Λ and M."""
    size, rows = norms(U), program.rows
    XU = rows.X @ U
    dual = (program.beta / rho) * U / jnp.where(size > 0, size, 1)
    outputs = program.outputs(XU, b)
    zero = jnp.zeros((), jnp.int32)
    first = Iterate(U + dual, jnp.maximum(program.G(XU), 0), outputs, jnp.zeros_like(outputs), rho, zero)
    Z_plus_dual = None if isinstance(rows.loss, Squared) else outputs + rows.gradient(outputs) / first.tau
    return dataclasses.replace(first, Z_plus_dual=Z_plus_dual)


@partial(jax.tree_util.register_dataclass, data_fields=["image", "U", "GXU", "gap"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Step:
    """One iteration: where it led, the U it took, with ``G X U``, and the outputs' distance from Z."""

    image: Iterate
    U: Neurons
    GXU: Activations
    gap: Outputs


def step(
    program: Program,
    linear_solver: Structured | NystromPCG,
    eigenvalues: Float[Array, " d"] | None,
    prepared: Any,
    iterate: Iterate,
) -> Step:
    """One iteration."""
    V, Lambda, S, N = iterate.split(program.beta)
    Z, M = iterate.split_outputs(program)
    rhs = V - Lambda + program.rows.X.T @ (program.G(S - N) + program.Ft(Z - M) / iterate.kappa)
    U, XU, z = linear_solver.solve(program, eigenvalues, iterate.kappa, prepared, rhs, iterate.z, iterate.iteration)
    GXU = program.G(XU)
    relax = _OVER_RELAXATION if linear_solver.accelerated else 1
    image = dataclasses.replace(
        iterate,
        V_plus_dual=relax * U + (1 - relax) * V + Lambda,
        S_plus_dual=relax * GXU + (1 - relax) * S + N,
        z=z,
        iteration=iterate.iteration + 1,
    )
    if iterate.Z_plus_dual is None:
        return Step(image, U, GXU, jnp.zeros_like(Z))
    outputs = program.outputs(XU, program.rows.bias(Z - M))
    image = dataclasses.replace(image, Z_plus_dual=relax * outputs + (1 - relax) * Z + M)
    return Step(image, U, GXU, outputs - image.split_outputs(program)[0])


def check(program: Program, before: Iterate, step: Step) -> Check:
    """The certificate and the residuals of a step from ``before``."""
    X, U, GXU = program.rows.X, step.U, step.GXU
    V_old, _, S_old, _ = before.split(program.beta)
    V, Lambda, S, N = step.image.split(program.beta)
    Z_old, _ = before.split_outputs(program)
    Z, M = step.image.split_outputs(program)
    b = program.rows.bias(Z - M)
    XV = X @ V
    GV = program.G(XV)
    squared = step.image.Z_plus_dual is None
    alpha = program.rows.gradient(program.outputs(XV, b)) if squared else step.image.tau * M
    Z, Z_old = (jnp.zeros_like(Z),) * 2 if squared else (Z, Z_old)
    tiny = jnp.finfo(U.dtype).tiny

    def size(*parts: Array) -> Scalar:
        return jnp.sqrt(sum((jnp.sum(jnp.square(part)) for part in parts), start=jnp.zeros((), U.dtype)))

    return Check(
        V=V,
        b=b,
        program_objective=program.objective(V, b, XV),
        lower_bound=lower_bound(program, alpha, -step.image.rho * N),
        cone_violation=jnp.linalg.norm(jnp.minimum(GV, 0)) / jnp.maximum(jnp.linalg.norm(GV), tiny),
        primal_residual=size(U - V, GXU - S, step.gap) / jnp.maximum(jnp.maximum(size(U, GXU), size(V, S, Z)), tiny),
        dual_residual=size(V - V_old + X.T @ (program.G(S - S_old) + program.Ft(Z - Z_old) / step.image.kappa))
        / jnp.maximum(size(Lambda + X.T @ program.G(N)), tiny),
    )


def better_rho(check: Check, image: Iterate) -> tuple[Scalar, Array]:
    """The penalty that the residuals ask for, and whether it is time for a change and the change worth it."""
    tens = image.iteration // _CHECK_EVERY
    due = (image.iteration % _CHECK_EVERY == 0) & (tens & (tens - 1) == 0) & (image.iteration <= _LAST_ADAPTATION)
    ratio = check.primal_residual / (_RESIDUAL_RATIO * jnp.maximum(check.dual_residual, jnp.finfo(image.rho.dtype).eps))
    factor = jnp.clip(jnp.sqrt(ratio), 1 / _MOST_ADAPTATION, _MOST_ADAPTATION)
    return image.rho * factor, due & ((factor > _LEAST_ADAPTATION) | (factor < 1 / _LEAST_ADAPTATION))


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["done", "iterate", "memory", "prepared", "check", "objectives", "bounds"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Run:
    """A run between two checks: iterations done in it, where it is, the last figures, and their traces."""

    done: Int[Array, ""]
    iterate: Iterate
    memory: Memory | None
    prepared: Any
    check: Check
    objectives: Float[Array, " k"]
    bounds: Float[Array, " k"]


def begin(
    program: Program,
    linear_solver: Structured | NystromPCG,
    eigenvalues: Float[Array, " d"] | None,
    iterate: Iterate,
    key: Array,
    *,
    max_iters: int,
) -> Run:
    """A run that has done nothing yet."""
    V, _, S, _ = iterate.split(program.beta)
    first = check(program, iterate, Step(iterate, V, S, jnp.zeros_like(iterate.z)))
    return Run(
        done=jnp.zeros((), jnp.int32),
        iterate=iterate,
        memory=Memory.empty(iterate.flat()) if linear_solver.accelerated else None,
        prepared=linear_solver.prepare(program, eigenvalues, iterate.kappa, key),
        check=first,
        objectives=jnp.full(max_iters + 1, first.program_objective),
        bounds=jnp.full(max_iters + 1, first.lower_bound),
    )


def run(
    program: Program,
    linear_solver: Structured | NystromPCG,
    eigenvalues: Float[Array, " d"] | None,
    start: Run,
    key: Array,
    *,
    tol: Scalar,
    until: Int[Array, ""] | int,
    tell: Callable[[Int[Array, ""], Check, Iterate], None],
) -> Run:
    """Iterate until a check passes, or ``until`` iterations are done; ``tell`` is called with every check."""

    def advance(prepared: Any, iterate: Iterate, memory: Memory | None) -> tuple[Iterate, Memory | None]:
        image = step(program, linear_solver, eigenvalues, prepared, iterate).image
        if memory is None:
            return image, None
        # Never at a check, whose figures are of a plain step.
        extrapolate = image.iteration % _EXTRAPOLATE_EVERY == _EXTRAPOLATE_EVERY // 2
        point, memory = memory.advance(iterate.flat(), image.flat(), extrapolate)
        return image.at(point), memory

    def unfinished(now: Run) -> Array:
        return (now.done < until) & ~now.check.converged(tol) & jnp.isfinite(now.check.program_objective)

    def body(now: Run) -> Run:
        count = jnp.minimum(_CHECK_EVERY, until - now.done)
        before, memory = jax.lax.fori_loop(
            0, count - 1, lambda _, c: advance(now.prepared, *c), (now.iterate, now.memory)
        )
        last = step(program, linear_solver, eigenvalues, now.prepared, before)
        figures = check(program, before, last)
        image, prepared = last.image, now.prepared
        if memory is not None:
            _, memory = memory.advance(before.flat(), image.flat(), False)
            rho, change = better_rho(figures, image)
            rho = jnp.where(change, rho, image.rho)
            image = image.with_rho(rho, program)
            memory = dataclasses.replace(memory, count=jnp.where(change, 0, memory.count))
            if image.Z_plus_dual is None:  # else κ has not changed
                prepared = jax.lax.cond(
                    change, lambda: linear_solver.prepare(program, eigenvalues, rho, key), lambda: prepared
                )
        tell(now.done + count, figures, image)
        later = jnp.arange(len(now.objectives), dtype=jnp.int32) > now.done
        return Run(
            now.done + count,
            image,
            memory,
            prepared,
            figures,
            objectives=jnp.where(later, figures.program_objective, now.objectives),
            bounds=jnp.where(later, figures.lower_bound, now.bounds),
        )

    return jax.lax.while_loop(unfinished, body, start)
