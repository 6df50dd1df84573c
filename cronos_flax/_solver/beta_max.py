"""β_max: the value of the weight decay β above which the solution is zero."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from cronos_flax._solver.blocks import Blocks, adjoint
from cronos_flax._solver.coordinates import Rows, normalised, scaled
from cronos_flax._solver.loss import Loss
from cronos_flax._solver.numerics import or_one
from cronos_flax._solver.program import norms
from cronos_flax._solver.staging import ONCE, Stage
from cronos_flax._solver.types import Design, Neurons, Outputs, RowVector, Scalar

_STARTS, _STEPS = 16, 12  # of the climb to β_max
_LONGER, _SHORTER = 2.0, 0.25  # what a step's length is multiplied by after it went up, and after it did not


def climb(X: Design | Blocks, alpha: Outputs, u: Neurons, steps: int = _STEPS) -> tuple[Neurons, Float[Array, " k"]]:
    """Unit neurons of large violation ``‖relu(X u)ᵀ α‖``, from neurons u, and their violation.

    A neuron lowers the loss if its violation is above β. Where the violation h of a unit neuron u is largest, its
    gradient g is ``h u``. So a step is ``u + t (g/h − u)``, made a unit vector. It is taken if the violation is higher
    there; then t doubles. If not, u stays, and t is divided by four.

    Args:
        X: features, n rows of d.
        alpha: the gradient α of the loss, shape ``(n, C)``.
        u: k neurons to start from, of any length; from zero there is no way up.
        steps: products with X, and with its transpose; the first is at u.
    """

    def ascend(_: int, at: tuple[Neurons, Neurons, Array, Array]) -> tuple[Neurons, Neurons, Array, Array]:
        u, onward, height, length = at
        v = u + length[None, :] * onward
        v = v / or_one(norms(v))[None, :]
        Z = X @ v
        c = alpha.T @ jax.nn.relu(Z)
        h = norms(c)
        g = adjoint(X, jnp.where(Z > 0, alpha @ (c / or_one(h)[None, :]), 0))
        up = h > height
        onward = jnp.where(up[None, :], g / or_one(h)[None, :] - v, onward)
        length = length * jnp.where(up, jnp.asarray(_LONGER, h.dtype), jnp.asarray(_SHORTER, h.dtype))
        return jnp.where(up[None, :], v, u), onward, jnp.maximum(height, h), length

    nowhere = jnp.full_like(u[0], -1)  # so the first step, which leads from u to a multiple of it, is taken
    u, _, height, _ = jax.lax.fori_loop(0, steps, ascend, (u, u, nowhere, jnp.full_like(u[0], 1 / _LONGER)))
    return u, height


def at_best_constant(rows: Rows) -> Outputs:
    """The gradient α of the loss at the zero network, whose output bias, if it has one, is at its best."""
    return rows.dual(rows.gradient(jnp.zeros_like(rows.Y) + rows.constant(rows.best_constant())))


def starts(rows: Rows) -> Neurons:
    """Neurons to climb from, shape ``(d, 16)``: differences of unit rows x̂.

    A neuron ``x̂ᵢ − x̂ⱼ`` is on at row i and off at row j, however large the mean of the features is; a random neuron
    would then be on in all rows or in none. Every eighth is a row itself, for features with one column. The rows are
    those whose place has the highest hash, among the rows of positive weight: not regular, for rows can be sorted or
    come in turns, and not changed by rows of weight zero at the end.
    """
    n, root = rows.places, rows.root if rows.order is None else rows.root[rows.order]
    place = jnp.arange(1, n + 1, dtype=jnp.uint32) * np.uint32(0x9E3779B9)
    place = (place ^ (place >> 16)) * np.uint32(0x85EBCA6B)
    score = (place ^ (place >> 13)) >> 8  # 24 bits, which a float32 holds
    _, index = jax.lax.top_k(jnp.where(root > 0, score.astype(jnp.float32), -1), min(_STARTS, n))
    x = rows.X[index if rows.order is None else rows.order[index]].T
    x = jnp.pad(x / or_one(norms(x))[None, :], ((0, 0), (0, _STARTS - len(index))))
    return x - jnp.where(np.arange(_STARTS)[None, :] % 8 == 0, 0, jnp.roll(x, 1, axis=1))


def beta_max(rows: Rows) -> Scalar:
    """The smallest β for which the zero network is optimal: ``max over unit u of ‖relu(X u)ᵀ α‖``.

    The problem is not concave. It is climbed from 16 starts, and the best is a lower estimate. On most data it is too
    low by less than 1 %, with many classes or heavy tails by some per cent (docs/benchmarks/beta.md). It depends on
    the rows and, a little, on their order. Nothing in it is random. Rows of weight zero at the end change nothing.
    """
    _, heights = climb(rows.X, at_best_constant(rows), starts(rows))
    return jnp.max(heights)


def _user_beta_max(
    X: Float[Array, "n p"],
    y: Float[Array, "n C"],
    weight: RowVector,
    order: Int[Array, " k"] | None = None,
    *,
    loss: Loss,
    hidden_bias: bool,
    output_bias: bool,
) -> Scalar:
    """:func:`beta_max` of features in the user's units, as a weight decay in the user's units."""
    weight = normalised(weight)
    rows, basis = scaled(X, y, weight, loss, hidden_bias=hidden_bias, output_bias=output_bias, order=order)
    return beta_max(rows) * basis.scale / jnp.sum(weight)


user_beta_max = Stage(_user_beta_max, few=ONCE)
