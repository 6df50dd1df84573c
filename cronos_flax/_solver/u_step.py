"""Ways to solve the system of ADMM's U-step, one class each: ``of`` makes what holds for all iterations of one κ.

The U-step asks for U with ``(K + κ⁻¹ F*F) U = r``. With ``K = I + XᵀX``, diagonal on the eigenbasis, it is one system
with ``n·C`` unknowns::

    p = K⁻¹ r,      (κ I + F K⁻¹ F*) z = F p,      U = p − K⁻¹ F* z

Without cones ``K = I``, and that system is ill-conditioned. There a factor is of a system to which a multiple of
``½‖U − V‖²`` is added, with V where U leads to; where ADMM leads to is the same.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Protocol, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from cronos_flax._solver.blocks import Blocks, adjoint
from cronos_flax._solver.numerics import conjugate_gradient
from cronos_flax._solver.program import Program
from cronos_flax._solver.types import Activations, Neurons, Outputs, Scalar


class UStep(Protocol):
    """A way to solve the system, with what it has prepared for one κ."""

    @classmethod
    def of(cls, program: Program, kappa: Scalar, max_steps: int) -> Self:
        """Of this program and κ, with at most so many conjugate-gradient steps, if it takes them."""
        ...

    def solve(
        self, program: Program, kappa: Scalar, rhs: Neurons, z: Outputs, iteration: Int[Array, ""], V: Neurons | float
    ) -> tuple[Neurons, Activations, Outputs]:
        """``U`` with ``(K + κ⁻¹ F*F) U = rhs``, with ``X U`` and the inner solution for the next call."""
        ...


@partial(jax.tree_util.register_dataclass, data_fields=["vectors", "eigenvalues"], meta_fields=["max_steps"])
@dataclasses.dataclass(frozen=True)
class Kronecker:
    """Without cones: conjugate gradients for U from V, preconditioned as if gates did not depend on features.

    Then ``I + κ⁻¹ F*F`` would be ``I + κ⁻¹ XᵀX ⊗ M`` with ``M = (Dᵀ W D/Σw) ∘ (A Aᵀ)``, diagonal on the eigenbasis of
    the Gram matrix and on that of M.

    Args:
        vectors: the eigenvectors of M, shape ``(m, m)``.
        eigenvalues: of the whole, shape ``(d, m)``.
        max_steps: most steps.
    """

    vectors: Float[Array, "m m"]
    eigenvalues: Neurons
    max_steps: int

    @classmethod
    def of(cls, program: Program, kappa: Scalar, max_steps: int) -> Self:
        """The preconditioner."""
        assert program.eigenvalues is not None
        D, weight = program.D.astype(kappa.dtype), program.rows.weight
        M = (D.T @ (weight[:, None] * D) / jnp.sum(weight)) * (program.A @ program.A.T)
        shares, vectors = jnp.linalg.eigh(M)
        return cls(vectors, 1 + jnp.outer(program.eigenvalues, jnp.maximum(shares, 0)) / kappa, max_steps)

    def divide(self, R: Neurons) -> Neurons:
        """The inverse of the preconditioner, times R."""
        return (R @ self.vectors / self.eigenvalues) @ self.vectors.T

    def solve(
        self, program: Program, kappa: Scalar, rhs: Neurons, z: Outputs, iteration: Int[Array, ""], V: Neurons | float
    ) -> tuple[Neurons, Activations, Outputs]:
        """As :meth:`UStep.solve`; z is handed through unused."""
        X = program.rows.X
        # Relative to a right-hand side that is 1/κ times as large as U, hence κ. Ten times as exact as `Plain`, or
        # extrapolation and the lower bound suffer: solves took many more iterations than with a factor.
        tol = 0.01 * jnp.minimum(kappa, 1) / (iteration + 1).astype(kappa.dtype) ** 1.2
        U, _ = conjugate_gradient(
            lambda U: U + adjoint(X, program.Ft(program.F(X @ U))) / kappa,
            rhs,
            preconditioner=self.divide,
            guess=jnp.broadcast_to(V, rhs.shape),
            tol=tol,
            max_steps=self.max_steps,
        )
        return U, X @ U, z


def _rounding(program: Program) -> Scalar:
    """What rounding may take from the eigenvalues of F*F: ten eps of the trace, which no output bias makes larger."""
    X = program.rows.X
    assert not isinstance(X, Blocks)
    return 10 * jnp.finfo(X.dtype).eps * (jnp.sum(jnp.square(X), axis=1) @ jnp.sum(program.D, axis=1, dtype=X.dtype))


def _shifted(program: Program, kappa: Scalar, rhs: Neurons, V: Neurons | float) -> tuple[Scalar, Neurons]:
    """κ and the right-hand side with what rounding asks for without cones."""
    shift = _rounding(program)
    return kappa + shift, (kappa * rhs + shift * V) / (kappa + shift)


def _factor(matrix: Float[Array, "N N"], kappa: Scalar) -> Float[Array, "N N"]:
    """The Cholesky factor of ``matrix + κ I``."""
    return jnp.linalg.cholesky(matrix + kappa * jnp.eye(len(matrix), dtype=matrix.dtype))


def _divided(factor: Float[Array, "N N"], R: Array) -> Array:
    """The inverse of what has this factor, times R, whose entries are as many as unknowns or a multiple of them."""
    return jax.scipy.linalg.cho_solve((factor, True), R.reshape(len(factor), -1)).reshape(R.shape)


@partial(jax.tree_util.register_dataclass, data_fields=["factor"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Primal:
    """Without cones: ``(κ I + F*F) U = κ r`` by its Cholesky factor, shape ``(m·d, m·d)``, neuron by neuron."""

    factor: Float[Array, "N N"]

    @classmethod
    def of(cls, program: Program, kappa: Scalar, max_steps: int) -> Self:
        """The factor."""
        del max_steps
        X, D, A = program.rows.X, program.D, program.A
        assert not isinstance(X, Blocks)
        # F*F = TᵀT ∘ (A Aᵀ) with one column of T for each neuron and feature.
        T = program.rows.center(jnp.where(D[:, :, None], X[:, None, :], 0).reshape(len(D), -1))
        matrix = jnp.kron(A @ A.T, jnp.ones((X.shape[1],) * 2, X.dtype)) * (T.T @ T)
        return cls(_factor(matrix, kappa + _rounding(program)))

    def solve(
        self, program: Program, kappa: Scalar, rhs: Neurons, z: Outputs, iteration: Int[Array, ""], V: Neurons | float
    ) -> tuple[Neurons, Activations, Outputs]:
        """As :meth:`UStep.solve`; z is handed through unused."""
        del iteration
        kappa, rhs = _shifted(program, kappa, rhs, V)
        U = _divided(self.factor, (kappa * rhs).T.ravel()).reshape(rhs.T.shape).T
        return U, program.rows.X @ U, z


def _gram(program: Program) -> Float[Array, "n n"]:
    """``H = X K⁻¹ Xᵀ``; all rows at once."""
    X = program.rows.X
    assert not isinstance(X, Blocks)
    return (X / program.K[None, :]) @ X.T


def _woodbury(
    program: Program, rhs: Neurons, inner: Callable[[Outputs, Array], Outputs]
) -> tuple[Neurons, Activations, Outputs]:
    """U by Woodbury, with ``X U`` and z; ``inner`` has z from ``F p`` and the diagonal of K⁻¹, shape ``(d, 1)``."""
    X, inverse_K = program.rows.X, (1 / program.K)[:, None]
    p = inverse_K * rhs
    z = inner(program.F(X @ p), inverse_K)
    U = p - inverse_K * adjoint(X, program.Ft(z))
    return U, X @ U, z


@partial(jax.tree_util.register_dataclass, data_fields=["factor"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Woodbury:
    """``κ I + F K⁻¹ F*`` by its Cholesky factor, shape ``(n·C, n·C)``, row by row."""

    factor: Float[Array, "N N"]

    @classmethod
    def of(cls, program: Program, kappa: Scalar, max_steps: int) -> Self:
        """The factor."""
        del max_steps
        D, n, C = program.D.astype(program.rows.X.dtype), len(program.D), program.A.shape[1]
        if not program.has_cones:
            kappa = kappa + _rounding(program)
        H = _gram(program)
        # F acts on (row, output) pairs: F K⁻¹ F* = H ∘ (E Eᵀ) with one row of E for each pair.
        E = (D[:, None, :] * program.A.T[None]).reshape(n * C, -1)
        matrix = ((E @ E.T).reshape(n, C, n, C) * H[:, None, :, None]).reshape(n, -1)
        matrix = program.rows.center(matrix).reshape(n * C, n * C)
        matrix = program.rows.center(matrix.T.reshape(n, -1)).reshape(n * C, n * C)
        return cls(_factor(matrix, kappa))

    def solve(
        self, program: Program, kappa: Scalar, rhs: Neurons, z: Outputs, iteration: Int[Array, ""], V: Neurons | float
    ) -> tuple[Neurons, Activations, Outputs]:
        """As :meth:`UStep.solve`."""
        del z, iteration
        if not program.has_cones:
            _, rhs = _shifted(program, kappa, rhs, V)
        return _woodbury(program, rhs, lambda Fp, _: _divided(self.factor, Fp))


@partial(jax.tree_util.register_dataclass, data_fields=[], meta_fields=["max_steps"])
@dataclasses.dataclass(frozen=True)
class Plain:
    """With cones: conjugate gradients for z from the last one, without a preconditioner; takes rows in blocks, too."""

    max_steps: int

    @classmethod
    def of(cls, program: Program, kappa: Scalar, max_steps: int) -> Self:
        """Nothing is prepared."""
        del program, kappa
        return cls(max_steps)

    def divide(self, r: Outputs) -> Outputs:
        """The inverse of the preconditioner, times r."""
        return r

    def solve(
        self, program: Program, kappa: Scalar, rhs: Neurons, z: Outputs, iteration: Int[Array, ""], V: Neurons | float
    ) -> tuple[Neurons, Activations, Outputs]:
        """As :meth:`UStep.solve`."""
        del V
        X = program.rows.X

        def inner(Fp: Outputs, inverse_K: Array) -> Outputs:
            def product(z: Outputs) -> Outputs:
                return kappa * z + program.F(X @ (inverse_K * adjoint(X, program.Ft(z))))

            # Errors of the U-step must be summable for ADMM to converge, and reach the iterate divided by κ.
            tol = 0.1 * jnp.minimum(kappa, 1) / (iteration + 1).astype(kappa.dtype) ** 1.2
            steps = self.max_steps
            return conjugate_gradient(product, Fp, preconditioner=self.divide, guess=z, tol=tol, max_steps=steps)[0]

        return _woodbury(program, rhs, inner)


@partial(jax.tree_util.register_dataclass, data_fields=["factor"], meta_fields=["max_steps"])
@dataclasses.dataclass(frozen=True)
class Preconditioned(Plain):
    """The same with a preconditioner: the Cholesky factor, shape ``(n, n)``, where outputs do not couple."""

    factor: Float[Array, "n n"]

    @classmethod
    def of(cls, program: Program, kappa: Scalar, max_steps: int) -> Self:
        """The factor."""
        D, C = program.D.astype(program.rows.X.dtype), program.A.shape[1]
        matrix = _gram(program) * (D @ D.T) / C
        matrix = program.rows.center(program.rows.center(matrix).T)
        return cls(max_steps, _factor(matrix, kappa))

    def divide(self, r: Outputs) -> Outputs:
        """The inverse of the preconditioner, times r."""
        return _divided(self.factor, r)
