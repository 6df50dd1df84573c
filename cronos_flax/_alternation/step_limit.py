"""How far one step of an optimizer may move a kernel, as a share of the kernel's size.

Adam moves each entry of a kernel by about its rate, whatever the kernel's entries are, and all entries of a column in
one direction where the inputs have one sign. On many inputs a single step then changes the outputs of a layer by more
than they are. What counts is the spectral norm: it bounds how far a layer's outputs move.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

_ROUNDS = 2  # of power iteration: the norm comes out a few percent too small, more for an update of many directions
_TINY = float(jnp.finfo(jnp.float32).tiny)


def limited(updates: Any, params: Any, largest: float, together: bool = False) -> Any:
    """Updates of which none moves a kernel by more than a share of its size.

    A kernel is a parameter of two or more axes, the last one its outputs. Its update ΔW becomes

        ΔW · min(1, largest · size(W) / ‖ΔW‖₂)

    so its direction stays. Biases, scales and other vectors are not limited.

    Args:
        updates: of an optimizer, to be added to the parameters.
        params: the parameters, a tree of the same structure.
        largest: the share.
        together: multiply all updates, those of vectors too, by the least factor of a kernel. So the direction of the
            whole step stays, which L-BFGS needs: it takes the curvature along the step that was made.

    References:
        Yang, Simon, Bernstein, *A Spectral Condition for Feature Learning*, arXiv:2310.17813: features learn at
        the same pace in networks of all widths if the spectral norms of updates are in proportion to those of kernels.
    """

    def factor(update: Array, param: Array) -> Array | None:
        if jnp.ndim(update) < 2 or jnp.size(update) == 0:
            return None
        step, kernel = (array.astype(jnp.promote_types(array.dtype, jnp.float32)) for array in (update, param))
        return jnp.minimum(1.0, largest * size(kernel) / jnp.maximum(spectral_norm(step), _TINY))

    def shortened(update: Array, factor: Array | None) -> Array:
        return update if factor is None else (factor * update).astype(update.dtype)

    factors = jax.tree.map(factor, updates, params)
    if together and (known := jax.tree.leaves(factors)):
        least = functools.reduce(jnp.minimum, known)
        factors = jax.tree.map(lambda _: least, updates)
    return jax.tree.map(shortened, updates, factors)


def size(kernel: Float[Array, "*m n"]) -> Float[Array, ""]:
    """The spectral norm that a random matrix with the entries' root mean square σ has, about ``σ (√m + √n)``.

    All axes but the last are inputs, as in Flax's dense layers and convolutions. A kernel that is smaller than a fresh
    one, of σ = 1/√m, counts as a fresh one: it may begin at zero.
    """
    m, n = math.prod(kernel.shape[:-1]), kernel.shape[-1]
    sigma = jnp.sqrt(jnp.mean(jnp.square(jnp.abs(kernel))))
    return jnp.maximum(sigma, m**-0.5) * (m**0.5 + n**0.5)


def spectral_norm(matrix: Float[Array, "*m n"]) -> Float[Array, ""]:
    """The largest singular value, from below, by power iteration.

    Products are written as sums: JAX asks for no sharding of theirs on explicit axes, and on CPUs they are made while
    the matrix is computed. (``optax.power_iteration`` gives NaN for a matrix of zeros.)
    """
    inputs, columns = tuple(range(matrix.ndim - 1)), jnp.arange(matrix.shape[-1], dtype=matrix.real.dtype)
    unit = _power_of_two(matrix)
    matrix = matrix / unit  # the fourth powers of entries must be numbers
    right = jnp.expand_dims(1 + jnp.sin(columns) / 2, inputs)  # one for all steps, so that a run repeats
    for _ in range(_ROUNDS):
        left = jnp.sum(matrix * right, axis=-1, keepdims=True)
        right = jnp.sum(jnp.conj(matrix) * left, axis=inputs, keepdims=True)
        right = right / jnp.maximum(_norm(right), _TINY)
    return unit * _norm(jnp.sum(matrix * right, axis=-1))


def _power_of_two(matrix: Array) -> Float[Array, ""]:
    """About the size of the largest entry: to divide by it rounds nothing."""
    _, exponent = jnp.frexp(jnp.maximum(jnp.max(jnp.abs(matrix)), _TINY))
    return jnp.ldexp(jnp.ones((), matrix.real.dtype), jnp.minimum(exponent, 125))  # 2⁻¹²⁷ would be zero


def _norm(vector: Array) -> Float[Array, ""]:
    return jnp.sqrt(jnp.sum(jnp.square(jnp.abs(vector))))
