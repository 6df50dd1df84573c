"""The weight decay β: the value above which the solution is zero, and a path of values to choose from on held-out rows.

On the path, each solve starts from the solution of the one before, from a large β to a small one.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int

from cronos_flax._solver.blocks import Blocks, Source, adjoint
from cronos_flax._solver.checks import concrete
from cronos_flax._solver.coordinates import Rows, normalised, scaled
from cronos_flax._solver.loss import Loss
from cronos_flax._solver.meshes import automatically
from cronos_flax._solver.numerics import or_one
from cronos_flax._solver.program import norms
from cronos_flax._solver.solution import Network, Solution, predict
from cronos_flax._solver.staging import ONCE, Program
from cronos_flax._solver.transfer import on_device, on_host, taken
from cronos_flax._solver.types import Design, Neurons, Outputs, RowVector, Scalar

_STARTS, _STEPS = 16, 12  # of the climb to β_max
_LONGER, _SHORTER = 2.0, 0.25  # what a step's length is multiplied by after it went up, and after it did not
RATIOS = tuple(float(ratio) for ratio in 10.0 ** -np.arange(1, 4.5, 0.5))  # of β_max
TOL = 1e-2  # of the solves on the way, which are for comparing
PATIENCE = 4  # of refreshed ones, in place of that: they end when so many iterations bring little
_EVERY = 5  # one row in so many is held out


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


user_beta_max = Program(_user_beta_max, few=ONCE)


class Data(NamedTuple):
    """Rows with their targets and weights."""

    X: Float[Array, "n p"]
    y: Outputs
    weight: RowVector

    def take(self, index: Bool[np.ndarray, " n"]) -> "Data":
        """Some of the rows."""
        return self.at(np.flatnonzero(index))

    def at(self, places: Int[np.ndarray, " k"]) -> "Data":
        """The rows at these places."""
        there = on_device(places)
        return Data(*(automatically(taken, rows, there) for rows in self))


def choosable(X: Array | Source, y: Outputs, weight: RowVector, order: Array | None = None) -> Data:
    """The rows that a path can choose from: in memory of one process, not traced, and of positive weight, in order.

    Raises:
        ValueError: if they are in blocks, traced, on several processes, or fewer than ten.
    """
    if isinstance(X, Source):
        raise ValueError('solve: `X` in blocks cannot be split for beta="path". Give a number or None.')
    if not all(concrete(value) for value in (X, y, weight)):
        raise ValueError('solve: beta="path" chooses by values, got traced arrays. Call it outside jit and vmap.')
    if not X.is_fully_addressable:
        raise ValueError(
            'solve: beta="path" holds rows out, which must lie on one process, got rows on several. Give a number, or '
            "None."
        )
    there = on_host(weight) > 0
    if there.sum() < 10:
        raise ValueError(f'solve: beta="path" needs at least 10 rows to hold some out, got {there.sum()}.')
    return Data(X, y, weight).at(np.flatnonzero(there) if order is None else on_host(order))


@functools.partial(jax.jit, static_argnames="loss")
def _mean_loss(network: Network, rows: Data, loss: Loss) -> Scalar:
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


def folds(targets: Outputs, key: Array, count: int) -> Int[np.ndarray, " n"]:
    """The fold of each row, from 0 to count − 1: rows in the order of their targets take turns, from a random one on.

    So every class, or every range of a real target, has its share in each fold. Rows that are left over are in others
    than the first one.
    """
    host = on_host(targets)
    rank = host[:, 0] if host.shape[1] == 1 else np.argmax(host, axis=1)
    tie_key, place_key = jax.random.split(key)
    order = np.lexsort((on_host(jax.random.permutation(tie_key, len(rank))), rank))
    stretches = np.array_split(order, max(len(rank) // count, 1))
    place = on_host(_uniform(place_key, len(stretches)))
    fold = np.zeros(len(rank), int)
    for rows, at in zip(stretches, place, strict=True):
        turn = (np.arange(len(rows)) - int(at * len(rows))) % len(rows)
        fold[rows] = np.where(turn < count, turn, 1 + (turn - count) % (count - 1))
    return fold


def held_out(targets: Outputs, key: Array) -> Bool[np.ndarray, " n"]:
    """Which rows to hold out: about one in five."""
    return folds(targets, key, _EVERY) == 0


class Path(NamedTuple):
    """What was tried on the way from a large β to a small one.

    Args:
        betas: all β.
        losses: the mean loss at each on the rows to choose on, without penalty.
        networks: what was found at each; of several folds in the first.
    """

    betas: Float[np.ndarray, " k"]
    losses: Float[np.ndarray, " k"]
    networks: list[Network]

    @property
    def best(self) -> tuple[float, Network]:
        """The β of least loss, and its network."""
        best = int(np.argmin(np.nan_to_num(self.losses, nan=np.inf)))
        return float(self.betas[best]), self.networks[best]

    @classmethod
    def mean(cls, paths: Sequence["Path"], weights: Sequence[float]) -> "Path":
        """Of folds with the same β, by the weights of their rows."""
        losses = np.average([path.losses for path in paths], axis=0, weights=weights)
        return cls(paths[0].betas, losses, paths[0].networks)


def follow(
    solve: Callable[[Data, float, Network | None], Solution],
    loss: Loss,
    beta_max: float,
    fit: Data,
    validation: Data,
) -> Path:
    """The path from ``beta_max`` on.

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
    return Path(betas, np.asarray(losses), networks)
