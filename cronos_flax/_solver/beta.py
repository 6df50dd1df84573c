"""The weight decay β: the value above which the solution is zero, and a path of values to choose from on held-out rows.

On the path, each solve starts from the solution of the one before, from a large β to a small one.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float

from cronos_flax._solver.blocks import Blocks, Source
from cronos_flax._solver.checks import concrete
from cronos_flax._solver.coordinates import Rows, normalised, scaled
from cronos_flax._solver.loss import Loss
from cronos_flax._solver.program import norms, unit_rows
from cronos_flax._solver.solution import Solution, TwoLayer, predict
from cronos_flax._solver.transfer import on_device, on_host, taken
from cronos_flax._solver.types import Features, Neurons, Outputs, RowVector, Scalar

_ASCENT_STARTS = 8
_ASCENT_STEPS = 10
_ASCENT_ROWS = 2048  # of more than twice as many
_LAST_STEPS = 5  # on all rows, after those on the sample
_ASCENT_LENGTHS = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
RATIOS = tuple(float(ratio) for ratio in 10.0 ** -np.arange(1, 4.5, 0.5))  # of β_max
TOL = 1e-2  # of the solves on the way, which are for comparing
_EVERY = 5  # one row in so many is held out


def violation(X: Features | Blocks, alpha: Outputs, u: Neurons) -> Float[Array, " k"]:
    """``‖relu(X u)ᵀ α‖/‖u‖`` for each column u: a neuron there would lower the loss if it is above β."""
    size = norms(u)
    return jnp.linalg.norm(jax.nn.relu(X @ u).T @ alpha, axis=1) / jnp.where(size > 0, size, 1)


def climb(X: Features | Blocks, alpha: Outputs, u: Neurons, steps: int = _ASCENT_STEPS) -> Neurons:
    """Unit neurons of large violation, from unit neurons u: gradient steps, each as long as pays most."""
    lengths = jnp.asarray((0.0, *_ASCENT_LENGTHS), X.dtype)

    def ascend(_: int, u: Neurons) -> Neurons:
        Z = X @ u
        c = jax.nn.relu(Z).T @ alpha
        g = X.T @ jnp.where(Z >= 0, alpha @ unit_rows(c, c).T, 0)
        g = unit_rows((g - u * jnp.sum(u * g, axis=0, keepdims=True)).T, jnp.zeros_like(u.T)).T
        Z_g = X @ g

        def height(t: Scalar) -> Float[Array, " k"]:
            return jnp.linalg.norm(jax.nn.relu(Z + t * Z_g).T @ alpha, axis=1) / norms(u + t * g)

        return unit_rows((u + lengths[jnp.argmax(jax.lax.map(height, lengths), axis=0)][None, :] * g).T, u.T).T

    return jax.lax.fori_loop(0, steps, ascend, u)


def at_best_constant(rows: Rows) -> Outputs:
    """The gradient α of the loss at the zero network, whose output bias, if it has one, is at its best."""
    return rows.dual(rows.gradient(jnp.zeros_like(rows.Y) + rows.constant(rows.best_constant())))


def sample(rows: Rows, alpha: Outputs, key: Array) -> tuple[Rows, Outputs]:
    """Some of the rows of positive weight, and their gradients α with the same weighted mean as on all rows.

    A neuron that is on in every row meets the mean of α. With an output bias this is zero on all rows, but not on a
    sample, where a constant offset of the features would turn the difference into the highest direction.
    """
    place = jnp.cumsum(rows.root > 0, dtype=jnp.int32)
    drawn = jax.random.randint(key, (_ASCENT_ROWS,), 0, place[-1], jnp.int32)
    index = jnp.searchsorted(place, jnp.sort(drawn), side="right").astype(jnp.int32)
    some, alpha_some = rows.take(index), alpha[index]
    lost = rows.mean(alpha) - some.mean(alpha_some)
    return some, alpha_some + some.constant(lost)


def beta_max(rows: Rows, key: Array) -> Scalar:
    """The smallest β for which the zero network is optimal: ``max over unit u of ‖relu(X u)ᵀ α‖``.

    The problem is not concave. It is climbed from a few random starts; the best of them is a lower estimate, which a
    local maximum can make too low by some per cent (docs/benchmarks/beta.md). Of many
    rows, a sample is climbed on first, then all rows for a few steps: the best neuron of a sample fits its noise too.
    """
    alpha = at_best_constant(rows)
    u = jax.random.normal(key, (rows.X.shape[1], _ASCENT_STARTS), rows.X.dtype)
    u = u / norms(u)[None, :]
    if len(alpha) <= 2 * _ASCENT_ROWS:
        return jnp.max(violation(rows.X, alpha, climb(rows.X, alpha, u)))
    some, alpha_some = sample(rows, alpha, jax.random.fold_in(key, 1))
    u = climb(rows.X, alpha, climb(some.X, alpha_some, u), _LAST_STEPS)
    return jnp.max(violation(rows.X, alpha, u))


@functools.partial(jax.jit, static_argnames=("loss", "hidden_bias", "output_bias"))
def user_beta_max(
    X: Float[Array, "n p"],
    y: Float[Array, "n C"],
    weight: RowVector,
    key: Array,
    *,
    loss: Loss,
    hidden_bias: bool,
    output_bias: bool,
) -> Scalar:
    """:func:`beta_max` of features in the user's units, as a weight decay in the user's units."""
    with jax.default_matmul_precision("highest"):
        weight = normalised(weight)
        rows, basis = scaled(X, y, weight, loss, hidden_bias=hidden_bias, output_bias=output_bias)
        return beta_max(rows, key) * basis.scale / jnp.sum(weight)


class Data(NamedTuple):
    """Rows with their targets and weights."""

    X: Float[Array, "n p"]
    y: Outputs
    weight: RowVector

    def take(self, index: Bool[np.ndarray, " n"]) -> "Data":
        """Some of the rows."""
        there = on_device(np.flatnonzero(index))
        return Data(*(taken(rows, there) for rows in self))


def choosable(X: Array | Source, y: Outputs, weight: RowVector) -> Data:
    """The rows that a path can choose from: in memory, not traced, and of positive weight.

    Raises:
        ValueError: if they are in blocks, traced, or fewer than ten.
    """
    if isinstance(X, Source):
        raise ValueError('solve: `X` in blocks cannot be split for beta="path". Give a number or None.')
    if not all(concrete(value) for value in (X, y, weight)):
        raise ValueError('solve: beta="path" chooses by values, got traced arrays. Call it outside jit and vmap.')
    there = on_host(weight) > 0
    if there.sum() < 10:
        raise ValueError(f'solve: beta="path" needs at least 10 rows to hold some out, got {there.sum()}.')
    return Data(X, y, weight).take(there)


@functools.partial(jax.jit, static_argnames="loss")
def _mean_loss(network: TwoLayer, rows: Data, loss: Loss) -> Scalar:
    return rows.weight @ loss.value(predict(network, rows.X), rows.y) / jnp.sum(rows.weight)


def pair(name: str, value: Any) -> tuple[Any, Any]:
    """Features and targets.

    Raises:
        ValueError: if ``value`` is not a pair.
    """
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise ValueError(f"solve: `{name}` must be (X, y), got {type(value).__name__}.")
    return value[0], value[1]


def same_columns(X: Array | Source, like: Array) -> Array:
    """Validation features, with as many columns as the features to fit.

    Raises:
        ValueError: if they have others, or come in blocks.
    """
    if isinstance(X, Source) or X.shape[1] != like.shape[1]:
        raise ValueError(f"solve: `validation` must be (X, y) with X of {like.shape[1]} columns, got {X.shape}.")
    return X


@functools.partial(jax.jit, static_argnums=1)
def _uniform(key: Array, count: int) -> Array:
    return jax.random.uniform(key, (count,), jnp.float32)


def held_out(targets: Outputs, key: Array) -> Bool[np.ndarray, " n"]:
    """Which rows to hold out: of the rows in the order of their targets, one at random of each five.

    So every class, or every range of a real target, has its share.
    """
    host = on_host(targets)
    rank = host[:, 0] if host.shape[1] == 1 else np.argmax(host, axis=1)
    tie_key, place_key = jax.random.split(key)
    order = np.lexsort((on_host(jax.random.permutation(tie_key, len(rank))), rank))
    stretches = np.array_split(order, max(len(rank) // _EVERY, 1))
    place = on_host(_uniform(place_key, len(stretches)))
    held = np.zeros(len(rank), bool)
    held[[rows[int(at * len(rows))] for rows, at in zip(stretches, place, strict=True)]] = True
    return held


def follow(
    solve: Callable[[Data, float, TwoLayer | None], Solution],
    loss: Loss,
    beta_max: float,
    fit: Data,
    validation: Data,
) -> tuple[float, TwoLayer, Float[np.ndarray, " k"], Float[np.ndarray, " k"]]:
    """The best β, its network, and the path: all β, and the mean loss on the held-out rows at each.

    Args:
        solve: takes rows, β and a network to start from, None for the first.
        loss: of one row.
        beta_max: where the path starts from.
        fit: rows to fit.
        validation: rows to choose on.
    """
    betas = beta_max * np.asarray(RATIOS)
    losses, networks, network = [], [], None
    for beta in betas:
        network = solve(fit, float(beta), network).params
        losses.append(float(on_host(_mean_loss(network, validation, loss))))
        networks.append(network)
    best = int(np.argmin(np.nan_to_num(losses, nan=np.inf)))
    return float(betas[best]), networks[best], betas, np.asarray(losses)
