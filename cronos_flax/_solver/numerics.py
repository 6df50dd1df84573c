"""Numerical tools that know nothing of the problem: conjugate gradients, a Nyström sketch, Anderson acceleration."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int

from cronos_flax._solver.types import Scalar

Tree = TypeVar("Tree")

_POINTS = 10  # that an extrapolation is made from
_WORSE = 2.0  # growth of the residual at which an extrapolated point is taken back


def or_one(size: Array) -> Array:
    """Sizes ≥ 0 to divide by: 1 in place of 0, for what has no size stays zero."""
    return jnp.where(size > 0, size, 1)


def least(values: Float[Array, " k"]) -> Int[Array, ""]:
    """Where the least of the values is that are finite."""
    return jnp.argmin(jnp.where(jnp.isfinite(values), values, jnp.inf))


def best_of(
    at: Callable[[Scalar], Tree], objective: Callable[[Tree], Scalar], places: Float[Array, " k"]
) -> tuple[Tree, Scalar]:
    """What is ``at`` the place of least finite objective, of these places, and its objective.

    Each is made anew to be looked at, one after the other, so that only one is in memory.
    """
    values = jax.lax.map(lambda place: objective(at(place)), places)
    best = least(values)
    return at(places[best]), values[best]


def conjugate_gradient(
    operator: Callable[[Tree], Tree],
    rhs: Tree,
    *,
    preconditioner: Callable[[Tree], Tree] = lambda r: r,
    guess: Tree | None = None,
    first: Tree | None = None,
    tol: Array | float = 0.0,
    max_steps: Array | int,
) -> tuple[Tree, Int[Array, ""]]:
    """Solve ``operator(x) = rhs`` for a symmetric positive definite operator; also the number of steps taken.

    Stops when the residual, in the norm of the preconditioner, is below ``tol`` times that of ``rhs``, or below what
    the precision can resolve, or after ``max_steps``. Without a guess no product is spent on the start. A step along
    ``first``, if that is not zero, comes before the others, which are conjugate to it. Vectors are pytrees of arrays.
    """
    b, as_tree = ravel_pytree(rhs)

    def flat(function: Callable[[Tree], Tree]) -> Callable[[Array], Array]:
        return lambda v: ravel_pytree(function(as_tree(v)))[0]

    A, M = flat(operator), flat(preconditioner)
    smallest = jnp.square(jnp.maximum(jnp.asarray(tol, b.dtype), jnp.finfo(b.dtype).eps))

    def unfinished(carry: tuple) -> Array:
        step, *_, done = carry
        return (step < max_steps) & ~done

    zero, one = jnp.zeros_like(b), jnp.ones((), b.dtype)
    led = zero if first is None else ravel_pytree(first)[0]
    leads = jnp.any(led != 0)

    # Operator and preconditioner stand in the loop once each, as every place where they stand is compiled.
    def body(carry: tuple) -> tuple:
        step, x, r, p, image, image_led, target, _ = carry  # images A v / vᵀA v, of the last direction and of the first
        z = M(r)
        rz = r @ z
        if guess is None:
            target = jnp.where(step == 0, smallest * rz, target)
        p = z - (z @ image) * p
        is_led = (step == 0) & leads
        if first is not None:
            p = jnp.where(is_led, led, p - (z @ image_led) * led)
        done = ~(rz > target)
        q = jax.lax.cond(done, jnp.zeros_like, A, p)
        curvature = p @ q
        fits = ~done & (curvature > 0)
        curvature = jnp.where(fits, curvature, 1)
        length = jnp.where(fits, (r @ p) / curvature, 0)
        image = q / curvature
        if first is not None:
            image, image_led = jnp.where(is_led, 0, image), jnp.where(is_led, image, image_led)
        return jnp.where(done, step, step + 1), x + length * p, r - length * q, p, image, image_led, target, done

    x, r, target = zero, b, one
    if guess is not None:
        x = ravel_pytree(guess)[0]
        r, target = b - A(x), smallest * (b @ M(b))
    start = jnp.zeros((), jnp.int32), x, r, zero, zero, zero, target, jnp.zeros((), bool)
    steps, x, *_ = jax.lax.while_loop(unfinished, body, start)
    return as_tree(x), steps


@partial(jax.tree_util.register_dataclass, data_fields=["vectors", "eigenvalues"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Sketch:
    """``vectors diag(eigenvalues) vectorsᵀ``, below the operator and close to its leading part.

    Frangella, Tropp and Udell, *Randomized Nyström preconditioning*, SIAM J. Matrix Anal. Appl. 44 (2023), Algorithm
    2.1 and equation (1.3). The sketch knows nothing of the shift of the system that is solved with it.

    Args:
        vectors: orthonormal columns, or zero where the eigenvalue is; shape ``(N, rank)``.
        eigenvalues: not increasing, ``≥ 0``, shape ``(rank,)``.
    """

    vectors: Float[Array, "N r"]
    eigenvalues: Float[Array, " r"]

    def precondition(self, shift: float, residual: Float[Array, " N"]) -> Float[Array, " N"]:
        """``P⁻¹ residual`` for the system ``operator + shift I``; P is the identity outside the sketched space."""
        inside = residual @ self.vectors
        gain = (self.eigenvalues[-1] + shift) / (self.eigenvalues + shift) - 1
        return residual + self.vectors @ (gain * inside)


def test_matrix(size: int, rank: int, key: Array, dtype: jnp.dtype) -> Float[Array, "N r"]:
    """Random vectors of about unit norm, ``rank`` of them or as many as there are coordinates."""
    return jax.random.normal(key, (size, min(rank, size)), dtype) / jnp.sqrt(jnp.asarray(size, dtype))


def sketch(image: Float[Array, "N r"], test: Float[Array, "N r"]) -> Sketch:
    """Sketch a positive semidefinite operator from its product with a test matrix.

    Only eigenvalues of r × r matrices are asked of LAPACK. Larger problems, and triangular solves, would wake its
    threads, which spin for a while afterwards and on a CPU take the time of the products that follow.

    Args:
        image: the product.
        test: from :func:`test_matrix`.

    Returns:
        The :class:`Sketch`; finite also where the operator's rank is smaller, with zero vectors for what is missing.
    """
    size, dtype = len(test), test.dtype
    # Shifted so that the core has an inverse in this precision; subtracted again below.
    shift = jnp.sqrt(jnp.asarray(size, dtype)) * jnp.finfo(dtype).eps * jnp.linalg.norm(image)
    shift = jnp.maximum(shift, jnp.sqrt(jnp.finfo(dtype).tiny))
    image = image + shift * test
    core = test.T @ image
    eigenvalues, Q = jnp.linalg.eigh((core + core.T) / 2)
    least = jnp.finfo(dtype).eps * eigenvalues[-1]
    root = image @ _scaled_columns(Q, eigenvalues, least)
    # The operator is near root rootᵀ, whose eigenvalues are those of rootᵀ root.
    eigenvalues, Q = jnp.linalg.eigh(root.T @ root)
    eigenvalues, Q = eigenvalues[::-1], Q[:, ::-1]
    vectors = root @ _scaled_columns(Q, eigenvalues, shift)
    return Sketch(vectors, jnp.maximum(eigenvalues - shift, 0))


def _scaled_columns(Q: Float[Array, "r r"], eigenvalues: Float[Array, " r"], least: Scalar) -> Float[Array, "r r"]:
    """``qᵢ/√λᵢ``; zero where ``λᵢ`` is not above ``least``."""
    return jnp.where((eigenvalues > least)[None, :], Q / jnp.sqrt(jnp.maximum(eigenvalues, least))[None, :], 0)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["images", "residuals", "count", "fallback", "reference"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Memory:
    """Safeguarded Anderson acceleration of a fixed-point iteration ``x ← T(x)``.

    Of the last few points, the affine combination with the smallest residual ``f = T(x) − x`` is taken:

        minimise over a, Σ aᵢ = 1      ‖Σ aᵢ fᵢ‖,      then      x ← Σ aᵢ T(xᵢ)

    A point made so whose own residual is much larger than the one before is taken back, and the memory is emptied.
    Walker and Ni, *Anderson acceleration for fixed-point iterations*, SIAM J. Numer. Anal. 49 (2011), type II.

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
