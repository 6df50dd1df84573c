"""Randomised Nyström approximation of a positive semidefinite operator, and the preconditioner it makes.

Frangella, Tropp and Udell, *Randomized Nyström preconditioning*, SIAM J. Matrix Anal. Appl. 44 (2023), Algorithm 2.1
and equation (1.3). The sketch knows nothing of the shift of the system that is solved with it.
"""

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@partial(jax.tree_util.register_dataclass, data_fields=["vectors", "eigenvalues"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Sketch:
    """``vectors diag(eigenvalues) vectorsᵀ``, below the operator and close to its leading part.

    Args:
        vectors: orthonormal columns, or zero where the eigenvalue is; shape ``(N, rank)``.
        eigenvalues: not increasing, ``≥ 0``, shape ``(rank,)``.
    """

    vectors: Float[Array, "N r"]
    eigenvalues: Float[Array, " r"]

    def precondition(self, shift: float, residual: Float[Array, " N"]) -> Float[Array, " N"]:
        """``P⁻¹ residual`` for the system ``operator + shift I``; P is the identity outside the sketched space."""
        inside = self.vectors.T @ residual
        gain = (self.eigenvalues[-1] + shift) / (self.eigenvalues + shift) - 1
        return residual + self.vectors @ (gain * inside)


def test_matrix(size: int, rank: int, key: Array, dtype: jnp.dtype) -> Float[Array, "N r"]:
    """Random vectors of about unit norm, ``rank`` of them or as many as there are coordinates."""
    return jax.random.normal(key, (size, min(rank, size)), dtype) / jnp.sqrt(jnp.asarray(size, dtype))


def sketch(operator: Callable[[Array], Array], test: Float[Array, "N r"]) -> Sketch:
    """Sketch a positive semidefinite operator from its action on a test matrix.

    Only eigenvalues of r × r matrices are asked of LAPACK. Larger problems, and triangular solves, would wake its
    threads, which spin for a while afterwards and on a CPU take the time of the products that follow.

    Args:
        operator: maps shape ``(N, r)`` to itself, column by column.
        test: from :func:`test_matrix`.

    Returns:
        The :class:`Sketch`; finite also where the operator's rank is smaller, with zero vectors for what is missing.
    """
    size, dtype = len(test), test.dtype
    image = operator(test)
    # Shifted so that the core has an inverse in this precision; subtracted again below.
    shift = jnp.sqrt(jnp.asarray(size, dtype)) * jnp.finfo(dtype).eps * jnp.linalg.norm(image)
    shift = jnp.maximum(shift, jnp.sqrt(jnp.finfo(dtype).tiny))
    image = image + shift * test
    core = test.T @ image
    eigenvalues, Q = jnp.linalg.eigh((core + core.T) / 2)
    least = jnp.finfo(dtype).eps * eigenvalues[-1]
    root = image @ jnp.where(eigenvalues > least, Q / jnp.sqrt(jnp.maximum(eigenvalues, least)), 0)
    # The operator is near root rootᵀ, whose eigenvalues are those of rootᵀ root.
    eigenvalues, Q = jnp.linalg.eigh(root.T @ root)
    eigenvalues, Q = eigenvalues[::-1], Q[:, ::-1]
    vectors = root @ jnp.where(eigenvalues > shift, Q / jnp.sqrt(jnp.maximum(eigenvalues, shift)), 0)
    return Sketch(vectors, jnp.maximum(eigenvalues - shift, 0))
