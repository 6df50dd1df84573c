"""The two ways to take ADMM's U-step.

Both have one interface: ``prepare`` makes what holds for all iterations of one κ, ``solve`` takes the step.
"""

import dataclasses
from typing import ClassVar

import jax
from jaxtyping import Array, Int

from cronos_flax._solver.blocks import Blocks, adjoint
from cronos_flax._solver.checks import in_python, positive_integer
from cronos_flax._solver.numerics import Sketch, conjugate_gradient, sketch, test_matrix
from cronos_flax._solver.program import Program
from cronos_flax._solver.types import Activations, Neurons, Outputs, Scalar
from cronos_flax._solver.u_step import Kronecker, Plain, Preconditioned, Primal, UStep, Woodbury

_LARGEST_FACTOR = 6144  # unknowns; three square matrices of that size are alive at once
_LARGEST_PRODUCTS = 2**27  # numbers, one for each row, feature and neuron, that are alive while a factor is made
_ITERATIONS, _CG_STEPS = 200, 10  # of a typical solve, for the cost model


@dataclasses.dataclass(frozen=True)
class Structured:
    """The U-step of ADMM by Woodbury on the eigenbasis (method.md, "Held gates").

    There ``K = I + XᵀX`` (for ``gates="gated"``: ``K = I``) is diagonal and the step is one system with ``n·C``
    unknowns::

        p = K⁻¹ r,      (κ I + F K⁻¹ F*) z = F p,      U = p − K⁻¹ F* z

    which is solved by one Cholesky factor for all iterations where that is cheaper, and else by conjugate gradients
    from the last z; for several outputs these are preconditioned by a factor that ignores how the outputs couple. With
    ``K = I`` that system is ill-conditioned. Then the smaller of it and ``(κ I + F*F) U = κ r`` has a Cholesky factor;
    where both are large, conjugate gradients solve the latter from the last V, preconditioned as if the gates did not
    depend on the features.

    Args:
        max_steps: most conjugate-gradient steps in one iteration of ADMM.

    Raises:
        ValueError: for a ``max_steps`` that is no positive integer.
    """

    max_steps: int = 50
    accelerated: ClassVar[bool] = True
    on_eigenbasis: ClassVar[bool] = True

    def __post_init__(self) -> None:
        positive_integer("Structured", "max_steps", self.max_steps)
        in_python(self, "max_steps")

    def plan(self, n: int, d: int, m: int, C: int) -> type[UStep]:
        """``Woodbury``, ``Preconditioned`` or ``Plain``: the cheapest by floating-point operations."""

        def factor(size: int) -> float:
            return size**3 / 3 + 2 * n * n * (d + m) if size <= _LARGEST_FACTOR else float("inf")

        def conjugate_gradients(steps: int) -> float:
            return _ITERATIONS * steps * 4 * n * d * m

        costs: dict[type[UStep], float] = {
            Woodbury: factor(n * C) + _ITERATIONS * 4 * (n * C) ** 2,
            Plain: conjugate_gradients(_CG_STEPS),
        }
        if C > 1:
            steps = _CG_STEPS * 2 // 5
            costs[Preconditioned] = factor(n) + conjugate_gradients(steps) + _ITERATIONS * steps * 4 * n * n * C
        return min(costs, key=costs.__getitem__)

    def plan_without_cones(self, n: int, d: int, m: int, C: int) -> type[UStep]:
        """``Woodbury``, ``Primal`` or ``Kronecker``: the smaller factor, if it is not too large."""
        sizes: dict[type[UStep], int] = {Woodbury: n * C}
        if n * d * m <= _LARGEST_PRODUCTS:
            sizes[Primal] = d * m
        plan = min(sizes, key=sizes.__getitem__)
        return plan if sizes[plan] <= _LARGEST_FACTOR else Kronecker

    def prepare(self, program: Program, kappa: Scalar, key: Array) -> UStep:
        """How :meth:`solve` is to take the step, with a Cholesky factor or a preconditioner of this κ, if any."""
        del key
        X, shape = program.rows.X, (*program.rows.X.shape, *program.A.shape)
        if isinstance(X, Blocks):  # a factor needs all rows at once
            plan: type[UStep] = Plain if program.has_cones else Kronecker
        else:
            plan = self.plan(*shape) if program.has_cones else self.plan_without_cones(*shape)
        return plan.of(program, kappa, self.max_steps)

    def solve(
        self,
        program: Program,
        kappa: Scalar,
        prepared: UStep,
        rhs: Neurons,
        z: Outputs,
        iteration: Int[Array, ""],
        V: Neurons | float = 0.0,
    ) -> tuple[Neurons, Activations, Outputs]:
        """``U`` with ``(K + κ⁻¹ F*F) U = rhs``, with ``X U`` and the inner solution for the next call.

        As :meth:`cronos_flax._solver.u_step.UStep.solve`; V is where U leads to, and so near it.
        """
        return prepared.solve(program, kappa, rhs, z, iteration, V)


@dataclasses.dataclass(frozen=True)
class NystromPCG:
    """The U-step, and with it the ADMM, as published.

    Nyström-preconditioned conjugate gradients solve the primal system::

        (I + G*G + κ⁻¹ F*F) U = r

    from a zero start, to the relative tolerance ``1/(k+1)^1.2`` in iteration k = 1, 2, …, with one sketch a solve. ADMM
    is then neither over-relaxed nor accelerated, and ρ is held.

    Args:
        rank: rank of the sketch.
        max_steps: most conjugate-gradient steps in one iteration of ADMM.

    Raises:
        ValueError: for a setting that is no positive integer.

    References:
        Feng, Frangella, Pilanci, arXiv:2411.01088, section 4 and Algorithm 2.
    """

    rank: int = 20
    max_steps: int = 20
    accelerated: ClassVar[bool] = False
    on_eigenbasis: ClassVar[bool] = False

    def __post_init__(self) -> None:
        positive_integer("NystromPCG", "rank", self.rank)
        positive_integer("NystromPCG", "max_steps", self.max_steps)
        in_python(self, "rank", "max_steps")

    def prepare(self, program: Program, kappa: Scalar, key: Array) -> Sketch:
        """The sketch of ``G*G + κ⁻¹ F*F``."""
        X, m = program.rows.X, program.A.shape[0]
        shape = X.shape[1], m
        test = test_matrix(shape[0] * m, self.rank, key, X.dtype)
        image = jax.lax.map(lambda v: self._product(program, kappa, v.reshape(shape)).ravel(), test.T).T
        return sketch(image, test)

    @staticmethod
    def _product(program: Program, kappa: Scalar, V: Neurons) -> Neurons:
        """``(G*G + κ⁻¹ F*F) V``."""
        Z = program.rows.X @ V
        return adjoint(program.rows.X, program.G(program.G(Z)) + program.Ft(program.F(Z)) / kappa)

    def solve(
        self,
        program: Program,
        kappa: Scalar,
        prepared: Sketch,
        rhs: Neurons,
        z: Outputs,
        iteration: Int[Array, ""],
        V: Neurons | float = 0.0,
    ) -> tuple[Neurons, Activations, Outputs]:
        """As :meth:`Structured.solve`; the inner solution is handed through unused."""
        del V
        U, _ = conjugate_gradient(
            lambda V: V + self._product(program, kappa, V),
            rhs,
            preconditioner=lambda R: prepared.precondition(1.0, R.ravel()).reshape(R.shape),
            tol=1 / (iteration + 2).astype(kappa.dtype) ** 1.2,
            max_steps=self.max_steps,
        )
        return U, program.rows.X @ U, z
