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
        vectors: orthonormal columns, shape ``(N, rank)``.
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
    """Random orthonormal vectors, ``rank`` of them or as many as there are."""
    return jnp.linalg.qr(jax.random.normal(key, (size, min(rank, size)), dtype))[0]


def sketch(operator: Callable[[Array], Array], test: Float[Array, "N r"]) -> Sketch:
    """Sketch a positive semidefinite operator from its action on a test matrix.

    Args:
        operator: maps shape ``(N, r)`` to itself, column by column.
        test: orthonormal columns, from :func:`test_matrix`.

    Returns:
        The :class:`Sketch`; finite also where the operator's rank is smaller.
    """
    size, dtype = len(test), test.dtype
    image = operator(test)
    # Shifted so that the core has an inverse in this precision; subtracted again below.
    shift = jnp.sqrt(jnp.asarray(size, dtype)) * jnp.finfo(dtype).eps * jnp.linalg.norm(image)
    shift = jnp.maximum(shift, jnp.sqrt(jnp.finfo(dtype).tiny))
    image = image + shift * test
    core = test.T @ image
    # By eigenvalues, and not by Cholesky: a triangular solve wakes the threads of LAPACK, which spin for a while and on
    # a CPU take the time of the products that follow.
    eigenvalues, Q = jnp.linalg.eigh((core + core.T) / 2)
    root = image @ (Q / jnp.sqrt(jnp.maximum(eigenvalues, shift)))
    vectors, singular, _ = jnp.linalg.svd(root, full_matrices=False)
    return Sketch(vectors, jnp.maximum(jnp.square(singular) - shift, 0))
