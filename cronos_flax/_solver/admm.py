"""ADMM on the program with held gates (method.md, "Held gates"), in its compact state.

With the splits ``U = V`` and ``G X U = S ≥ 0`` and scaled duals Λ, N, one iteration is

    U ← solve (K + ρ⁻¹ F*F) U = V − Λ + G*(S − N) + ρ⁻¹ F*Y
    V ← group prox of U + Λ with threshold β/ρ           S ← max(G U + N, 0)
    Λ ← Λ + U − V                                        N ← N + G U − S

with U over-relaxed. Losses other than the squared one get a third split, ``F U + 1bᵀ = Z`` with scaled dual M and
penalty τ; then κ = ρ/τ is in the place of ρ in the U-step, ``Z − M`` in that of Y, and

    Z ← prox of ℓ/τ at F U + 1bᵀ + M                         M ← M + F U + 1bᵀ − Z

A gated network has no cones, ``G = 0``, and then there are no S and N. The prox fixes the duals, so only ``V + Λ``,
``S + N`` and ``Z + M`` are kept. The iteration is a fixed-point map of these, and its slow tail is shortened by
Anderson acceleration, safeguarded.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int

from cronos_flax._solver.blocks import adjoint
from cronos_flax._solver.linear_solvers import NystromPCG, Structured
from cronos_flax._solver.numerics import or_one
from cronos_flax._solver.program import Program, group_prox, norms
from cronos_flax._solver.settings import Held
from cronos_flax._solver.types import Activations, Bias, Neurons, Outputs, Scalar


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["V_plus_dual", "S_plus_dual", "Z_plus_dual", "z", "rho", "iteration"],
    meta_fields=["kappa_of_split"],
)
@dataclasses.dataclass(frozen=True)
class Iterate:
    """Everything ADMM keeps between iterations.

    Args:
        V_plus_dual: ``V + Λ``.
        S_plus_dual: ``S + N``; None for a program without cones.
        Z_plus_dual: ``Z + M``; None for the squared loss.
        z: the last inner solution, the start of the next.
        rho: ρ, the penalty.
        iteration: iterations done, which the inner tolerance shrinks with.
        kappa_of_split: κ = ρ/τ where there is a third split.
    """

    V_plus_dual: Neurons
    S_plus_dual: Activations | None
    Z_plus_dual: Outputs | None
    z: Outputs
    rho: Scalar
    iteration: Int[Array, ""]
    kappa_of_split: float

    def split(self, beta: Scalar) -> tuple[Neurons, Neurons, Activations | Scalar, Activations | Scalar]:
        """``V, Λ, S, N``; without cones the last two are the number zero."""
        V = group_prox(self.V_plus_dual, beta / self.rho)
        S_plus_dual = jnp.zeros_like(self.rho) if self.S_plus_dual is None else self.S_plus_dual
        S = jnp.maximum(S_plus_dual, 0)
        return V, self.V_plus_dual - V, S, S_plus_dual - S

    @property
    def kappa(self) -> Scalar:
        """κ of the U-step."""
        return self.rho if self.Z_plus_dual is None else jnp.full_like(self.rho, self.kappa_of_split)

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
    def _kept(self) -> tuple[Neurons, Activations | None, Outputs | None]:
        """What the fixed-point map is about."""
        return self.V_plus_dual, self.S_plus_dual, self.Z_plus_dual

    def flat(self) -> Float[Array, " N"]:
        """What the fixed-point map is about, as one vector."""
        return ravel_pytree(self._kept)[0]

    def at(self, flat: Float[Array, " N"]) -> "Iterate":
        """This iterate moved to the point ``flat``."""
        V, S, Z = ravel_pytree(self._kept)[1](flat)
        return dataclasses.replace(self, V_plus_dual=V, S_plus_dual=S, Z_plus_dual=Z)

    def with_rho(self, rho: Scalar, program: Program) -> "Iterate":
        """The same V, S, Z and unscaled duals under another penalty."""
        V, Lambda, S, N = self.split(program.beta)
        ratio = self.rho / rho
        moved = dataclasses.replace(self, V_plus_dual=V + ratio * Lambda, rho=rho)
        if self.S_plus_dual is not None:
            moved = dataclasses.replace(moved, S_plus_dual=S + ratio * N)
        if self.Z_plus_dual is None:
            return moved
        Z, M = self.split_outputs(program)
        return dataclasses.replace(moved, Z_plus_dual=Z + ratio * M)


def init(program: Program, U: Neurons, b: Bias, rho: Scalar, settings: Held) -> Iterate:
    """The iterate for a start from U and b: ``V = U``, ``S = G X U``, ``Z = F X U + 1bᵀ``, stationary Λ and M."""
    size, rows = norms(U), program.rows
    XU = rows.X @ U
    dual = (program.beta / rho) * U / or_one(size)[None, :]
    outputs = program.outputs(XU, b)
    S = jnp.maximum(program.G(XU), 0) if program.has_cones else None
    first = Iterate(
        V_plus_dual=U + dual,
        S_plus_dual=S,
        Z_plus_dual=outputs,
        z=jnp.zeros_like(outputs),
        rho=rho,
        iteration=jnp.zeros((), jnp.int32),
        kappa_of_split=settings.kappa,
    )
    Z_plus_dual = None if rows.loss.is_quadratic else outputs + rows.gradient(outputs) / first.tau
    return dataclasses.replace(first, Z_plus_dual=Z_plus_dual)


@partial(jax.tree_util.register_dataclass, data_fields=["image", "U", "GXU", "outputs"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Iteration:
    """One iteration: where it led, the U it took, with ``G X U``, and with a third split ``F U + 1bᵀ``."""

    image: Iterate
    U: Neurons
    GXU: Activations | Scalar
    outputs: Outputs | None


def step(
    program: Program,
    linear_solver: Structured | NystromPCG,
    prepared: Any,
    iterate: Iterate,
    settings: Held,
) -> Iteration:
    """One iteration."""
    V, Lambda, S, N = iterate.split(program.beta)
    Z, M = iterate.split_outputs(program)
    rhs = V - Lambda + adjoint(program.rows.X, program.G(S - N) + program.Ft(Z - M) / iterate.kappa)
    U, XU, z = linear_solver.solve(program, iterate.kappa, prepared, rhs, iterate.z, iterate.iteration, V)
    GXU = program.G(XU)
    relax = settings.over_relaxation if linear_solver.accelerated else 1
    image = dataclasses.replace(
        iterate,
        V_plus_dual=relax * U + (1 - relax) * V + Lambda,
        S_plus_dual=relax * GXU + (1 - relax) * S + N if program.has_cones else None,
        z=z,
        iteration=iterate.iteration + 1,
    )
    if iterate.Z_plus_dual is None:
        return Iteration(image, U, GXU, None)
    outputs = program.outputs(XU, program.rows.bias(Z - M))
    image = dataclasses.replace(image, Z_plus_dual=relax * outputs + (1 - relax) * Z + M)
    return Iteration(image, U, GXU, outputs)
