"""Safeguarded Anderson acceleration of a fixed-point iteration ``x ← T(x)``.

Of the last few points, the affine combination with the smallest residual ``f = T(x) − x`` is taken:

    minimise over a, Σ aᵢ = 1      ‖Σ aᵢ fᵢ‖,      then      x ← Σ aᵢ T(xᵢ)

Walker and Ni, *Anderson acceleration for fixed-point iterations*, SIAM J. Numer. Anal. 49 (2011), type II. A point made
so whose own residual turns out much larger than the one before is taken back, and the memory emptied.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from cronos_flax._solver.types import Scalar

_POINTS = 10
_WORSE = 2.0  # growth of the residual at which an extrapolated point is taken back


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["images", "residuals", "count", "fallback", "reference"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Memory:
    """What the next extrapolation is made from, and judged by.

    Args:
        images: the last images ``T(x)``, flattened, shape ``(k, N)``.
        residuals: ``T(x) − x`` of the same points.
        count: points stored since the memory was last empty.
        fallback: the image to go back to, if the last point was extrapolated.
        reference: the residual's norm before that; infinite if the last point was not extrapolated.
    """

    images: Float[Array, "k N"]
    residuals: Float[Array, "k N"]
    count: Int[Array, ""]
    fallback: Float[Array, " N"]
    reference: Scalar

    @classmethod
    def empty(cls, like: Float[Array, " N"]) -> "Memory":
        """A memory without points."""
        blank = jnp.zeros((_POINTS, like.size), like.dtype)
        return cls(blank, blank, jnp.zeros((), jnp.int32), like, jnp.asarray(jnp.inf, like.dtype))

    def advance(
        self, point: Float[Array, " N"], image: Float[Array, " N"], extrapolate: Array | bool
    ) -> tuple[Float[Array, " N"], "Memory"]:
        """The point that follows ``point``: its ``image``, or an extrapolated point, or the fallback."""
        residual = image - point
        size = jnp.linalg.norm(residual)
        worse = size > _WORSE * self.reference
        slot = self.count % _POINTS
        images, residuals = self.images.at[slot].set(image), self.residuals.at[slot].set(residual)
        count = jnp.where(worse, 0, self.count + 1)
        extrapolate = extrapolate & (count > _POINTS // 2)
        following = jax.lax.cond(extrapolate, lambda: combine(images, residuals, count), lambda: image)
        return jnp.where(worse, self.fallback, following), Memory(
            images, residuals, count, image, jnp.where(extrapolate, size, jnp.inf)
        )


def combine(images: Float[Array, "k N"], residuals: Float[Array, "k N"], count: Int[Array, ""]) -> Float[Array, " N"]:
    """``Σ aᵢ T(xᵢ)`` with the a of least residual, of the first ``count`` entries."""
    stored = jnp.arange(len(images), dtype=jnp.int32) < count
    residuals = jnp.where(stored[:, None], residuals, 0)
    gram = residuals @ residuals.T
    shift = jnp.where(stored, 10 * jnp.finfo(gram.dtype).eps, 1) * jnp.trace(gram) + jnp.finfo(gram.dtype).tiny
    a = jnp.where(stored, jnp.linalg.solve(gram + jnp.diag(shift), stored.astype(gram.dtype)), 0)
    return (a / jnp.sum(a)) @ jnp.where(stored[:, None], images, 0)
