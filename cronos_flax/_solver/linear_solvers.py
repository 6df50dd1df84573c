"""The two ways to take ADMM's U-step.

Both have one interface: ``prepare`` makes what holds for all iterations of one κ, ``solve`` takes the step.
"""

import dataclasses
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from cronos_flax._solver.blocks import Blocks, adjoint
from cronos_flax._solver.checks import in_python, positive_integer
from cronos_flax._solver.numerics import Sketch, conjugate_gradient, sketch, test_matrix
from cronos_flax._solver.program import Program
from cronos_flax._solver.types import Activations, Neurons, Outputs, Scalar

_LARGEST_FACTOR = 6144  # unknowns; three square matrices of that size are alive at once
_LARGEST_PRODUCTS = 2**27  # numbers, one for each row, feature and neuron, that are alive while a factor is made
_ITERATIONS, _CG_STEPS = 200, 10  # of a typical solve, for the cost model


@partial(jax.tree_util.register_dataclass, data_fields=["vectors", "eigenvalues"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Kronecker:
    """``I + κ⁻¹ F*F`` as if gates did not depend on features: ``I + κ⁻¹ XᵀX ⊗ M``, ``M = (Dᵀ W D/Σw) ∘ (A Aᵀ)``.

    On the eigenbasis of the Gram matrix and on that of M it is diagonal.

    Args:
        vectors: the eigenvectors of M, shape ``(m, m)``.
        eigenvalues: of the whole, shape ``(d, m)``.
    """

    vectors: Float[Array, "m m"]
    eigenvalues: Neurons

    @classmethod
    def of(cls, program: Program, kappa: Scalar) -> "Kronecker":
        """Of the U-step's system."""
        assert program.eigenvalues is not None
        D, weight = program.D.astype(kappa.dtype), program.rows.weight
        M = (D.T @ (weight[:, None] * D) / jnp.sum(weight)) * (program.A @ program.A.T)
        shares, vectors = jnp.linalg.eigh(M)
        return cls(vectors, 1 + jnp.outer(program.eigenvalues, jnp.maximum(shares, 0)) / kappa)

    def divide(self, R: Neurons) -> Neurons:
        """Its inverse, times R."""
        return (R @ self.vectors / self.eigenvalues) @ self.vectors.T


@partial(jax.tree_util.register_dataclass, data_fields=["factor"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Primal:
    """``κ I + F*F`` by its Cholesky factor, shape ``(m·d, m·d)``, neuron by neuron."""

    factor: Float[Array, "N N"]

    @classmethod
    def of(cls, program: Program, kappa: Scalar) -> "Primal":
        """Of the U-step's system, times κ."""
        X, D, A = program.rows.X, program.D, program.A
        assert not isinstance(X, Blocks)
        # F*F = TᵀT ∘ (A Aᵀ) with one column of T for each neuron and feature.
        T = program.rows.center(jnp.where(D[:, :, None], X[:, None, :], 0).reshape(len(D), -1))
        matrix = jnp.kron(A @ A.T, jnp.ones((X.shape[1],) * 2, X.dtype)) * (T.T @ T)
        return cls(jnp.linalg.cholesky(matrix + kappa * jnp.eye(len(matrix), dtype=X.dtype)))

    def divide(self, R: Neurons) -> Neurons:
        """Its inverse, times R."""
        return jax.scipy.linalg.cho_solve((self.factor, True), R.T.ravel()).reshape(R.T.shape).T


def _rounding(program: Program) -> Scalar:
    """What rounding may take from the eigenvalues of F*F: ten eps of the trace, which no output bias makes larger."""
    X = program.rows.X
    assert not isinstance(X, Blocks)
    return 10 * jnp.finfo(X.dtype).eps * (jnp.sum(jnp.square(X), axis=1) @ jnp.sum(program.D, axis=1, dtype=X.dtype))


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

    def plan(self, n: int, d: int, m: int, C: int) -> str:
        """``"dense"``, ``"preconditioned"`` or ``"plain"``: the cheapest by floating-point operations."""

        def factor(size: int) -> float:
            return size**3 / 3 + 2 * n * n * (d + m) if size <= _LARGEST_FACTOR else float("inf")

        def conjugate_gradients(steps: int) -> float:
            return _ITERATIONS * steps * 4 * n * d * m

        costs = {
            "dense": factor(n * C) + _ITERATIONS * 4 * (n * C) ** 2,
            "plain": conjugate_gradients(_CG_STEPS),
        }
        if C > 1:
            steps = _CG_STEPS * 2 // 5
            costs["preconditioned"] = factor(n) + conjugate_gradients(steps) + _ITERATIONS * steps * 4 * n * n * C
        return min(costs, key=costs.__getitem__)

    def plan_without_cones(self, n: int, d: int, m: int, C: int) -> str:
        """``"dense"``, ``"primal"`` or ``"kronecker"``: the smaller factor, if it is not too large."""
        sizes = {"dense": n * C}
        if n * d * m <= _LARGEST_PRODUCTS:
            sizes["primal"] = d * m
        plan = min(sizes, key=sizes.__getitem__)
        return plan if sizes[plan] <= _LARGEST_FACTOR else "kronecker"

    def prepare(self, program: Program, kappa: Scalar, key: Array) -> "Float[Array, 'N N'] | Kronecker | Primal | None":
        """The Cholesky factor or the preconditioner that :meth:`solve` wants, if any; to be renewed when κ changes."""
        del key
        X, D = program.rows.X, program.D.astype(program.rows.X.dtype)
        shape = *X.shape, *program.A.shape
        plan = self.plan(*shape) if program.has_cones else self.plan_without_cones(*shape)
        if plan == "kronecker" or (isinstance(X, Blocks) and not program.has_cones):
            return Kronecker.of(program, kappa)
        if not program.has_cones:
            kappa = kappa + _rounding(program)
        if plan == "primal":
            return Primal.of(program, kappa)
        if plan == "plain" or isinstance(X, Blocks):  # a factor needs all rows at once
            return None
        n, C = len(D), len(program.A.T)
        H = (X / program.K[None, :]) @ X.T
        if plan == "dense":
            # F acts on (row, output) pairs: F K⁻¹ F* = H ∘ (E Eᵀ) with one row of E for each pair.
            E = (D[:, None, :] * program.A.T[None]).reshape(n * C, -1)
            matrix = ((E @ E.T).reshape(n, C, n, C) * H[:, None, :, None]).reshape(n, -1)
            matrix = program.rows.center(matrix).reshape(n * C, n * C)
            matrix = program.rows.center(matrix.T.reshape(n, -1)).reshape(n * C, n * C)
        else:
            matrix = H * (D @ D.T) / C
            matrix = program.rows.center(program.rows.center(matrix).T)
        return jnp.linalg.cholesky(matrix + kappa * jnp.eye(len(matrix), dtype=X.dtype))

    def solve(
        self,
        program: Program,
        kappa: Scalar,
        prepared: "Float[Array, 'N N'] | Kronecker | Primal | None",
        rhs: Neurons,
        z: Outputs,
        iteration: Int[Array, ""],
        V: Neurons | float = 0.0,
    ) -> tuple[Neurons, Activations, Outputs]:
        """``U`` with ``(K + κ⁻¹ F*F) U = rhs``, with ``X U`` and the inner solution for the next call.

        V is where U leads to, and so near it. Without cones, a multiple of ``½‖U − V‖²`` that rounding asks for is
        added to what the step minimises; where ADMM leads to is the same.
        """
        X = program.rows.X
        if isinstance(prepared, Kronecker):
            # Relative to a right-hand side that is 1/κ times as large as U, hence κ. Ten times as exact as below, or
            # extrapolation and the lower bound suffer: solves took many more iterations than with a factor.
            tol = 0.01 * jnp.minimum(kappa, 1) / (iteration + 1).astype(kappa.dtype) ** 1.2
            U, _ = conjugate_gradient(
                lambda U: U + adjoint(X, program.Ft(program.F(X @ U))) / kappa,
                rhs,
                preconditioner=prepared.divide,
                guess=jnp.broadcast_to(V, rhs.shape),
                tol=tol,
                max_steps=self.max_steps,
            )
            return U, X @ U, z
        if not program.has_cones:
            shift = _rounding(program)
            rhs, kappa = (kappa * rhs + shift * V) / (kappa + shift), kappa + shift
        if isinstance(prepared, Primal):
            U = prepared.divide(kappa * rhs)
            return U, X @ U, z
        inverse_K = (1 / program.K)[:, None]

        def inner(z: Outputs) -> Outputs:
            return kappa * z + program.F(X @ (inverse_K * adjoint(X, program.Ft(z))))

        def divide(r: Outputs) -> Outputs:
            if prepared is None:
                return r
            return jax.scipy.linalg.cho_solve((prepared, True), r.reshape(len(prepared), -1)).reshape(r.shape)

        p = inverse_K * rhs
        Fp = program.F(X @ p)
        if prepared is not None and len(prepared) == Fp.size:
            z = divide(Fp)
        else:
            # Errors of the U-step must be summable for ADMM to converge, and reach the iterate divided by κ.
            tol = 0.1 * jnp.minimum(kappa, 1) / (iteration + 1).astype(kappa.dtype) ** 1.2
            z, _ = conjugate_gradient(inner, Fp, preconditioner=divide, guess=z, tol=tol, max_steps=self.max_steps)
        U = p - inverse_K * adjoint(X, program.Ft(z))
        return U, X @ U, z


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
