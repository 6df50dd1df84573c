"""A path of values of the weight decay β, to choose from on held-out rows.

On the path, each solve starts from the solution of the one before, from a large β to a small one.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int

from cronos_flax._solver.arrays import is_concrete
from cronos_flax._solver.blocks import Source
from cronos_flax._solver.loss import Loss
from cronos_flax._solver.meshes import automatically, mesh_of
from cronos_flax._solver.solution import Network, Solution, predict
from cronos_flax._solver.transfer import beside, on_device, on_host, taken
from cronos_flax._solver.types import Outputs, RowVector, Scalar
from cronos_flax._solver.user_warnings import warn

RATIOS = tuple(float(ratio) for ratio in 10.0 ** -np.arange(1, 4.5, 0.5))  # of β_max
TOL = 1e-2  # of the solves on the way, which are for comparing
PATIENCE = 4  # of refreshed ones, in place of that: they end when so many iterations bring little
FEWEST = 10  # rows to choose from
_EVERY = 5  # one row in so many is held out
_FEW = 300  # rows; a fifth of fewer says too little, so each of as many folds is held out in turn


class Data(NamedTuple):
    """Rows with their targets and weights; the features may be a source of blocks, but not on a path."""

    X: Any
    y: Outputs
    weight: RowVector

    def take(self, index: Bool[np.ndarray, " n"]) -> "Data":
        """Some of the rows."""
        return self.at(np.flatnonzero(index))

    def at(self, places: Int[np.ndarray, " k"]) -> "Data":
        """The rows at these places."""
        if mesh_of(self.X) is None:  # on the host, for on the device every number of rows would be a program
            return Data(*(beside(rows, on_host(rows)[places]) for rows in self))
        there = on_device(places)
        return Data(*(automatically(taken, rows, there) for rows in self))


def choosable(data: Data, order: Array | None = None, others: Any = None) -> Data:
    """The rows that a path can choose from: in memory of one process, not traced, and of positive weight, in order.

    Raises:
        ValueError: if they are in blocks, on several processes, or fewer than ten; or if they, or what the solve takes
            besides (``others``, a pytree), are traced.
    """
    if isinstance(data.X, Source):
        raise ValueError('solve: `X` in blocks cannot be split for beta="path". Give a number or None.')
    if not all(map(is_concrete, jax.tree.leaves((data, others)))):
        raise ValueError('solve: beta="path" chooses by values, got traced arrays. Call it outside jit and vmap.')
    if not data.X.is_fully_addressable:
        raise ValueError(
            'solve: beta="path" holds rows out, which must lie on one process, got rows on several. Give a number, or '
            "None."
        )
    there = on_host(data.weight) > 0
    if there.sum() < FEWEST:
        raise ValueError(f'solve: beta="path" needs at least {FEWEST} rows to hold some out, got {there.sum()}.')
    if there.all() and order is None:
        return data
    return data.at(np.flatnonzero(there) if order is None else on_host(order))


@functools.partial(jax.jit, static_argnames="loss")
def _mean_loss(network: Network, rows: Data, loss: Loss) -> Scalar:
    losses = jnp.where(rows.weight > 0, loss.value(predict(network, rows.X), rows.y), 0)
    return rows.weight @ losses / jnp.sum(rows.weight)


def pair(validation: Any) -> tuple[Any, Any]:
    """Features and targets of the validation rows.

    Raises:
        ValueError: if they are not a pair.
    """
    if not isinstance(validation, tuple | list) or len(validation) != 2:
        raise ValueError(f"solve: `validation` must be (X, y), got {type(validation).__name__}.")
    return validation[0], validation[1]


def same_columns(validation: Data, fit: Data) -> Data:
    """Validation rows, with as many columns as the rows to fit.

    Raises:
        ValueError: if they have others, or come in blocks.
    """
    columns, X = fit.X.shape[1], validation.X
    if isinstance(X, Source) or X.shape[1] != columns:
        raise ValueError(f"solve: `validation` must be (X, y) with X of {columns} columns, got {X.shape}.")
    return validation


def folds(targets: Outputs, key: Array, count: int) -> Int[np.ndarray, " n"]:
    """The fold of each row, from 0 to count − 1: rows in the order of their targets take turns, from a random one on.

    So every class, or every range of a real target, has its share in each fold. Rows that are left over are in others
    than the first one. NumPy draws, which compiles nothing.
    """
    rng = np.random.default_rng(on_host(jax.random.key_data(key)).ravel())
    host = on_host(targets)
    rank = host[:, 0] if host.shape[1] == 1 else np.argmax(host, axis=1)
    order = np.lexsort((rng.permutation(len(rank)), rank))
    stretches = np.array_split(order, max(len(rank) // count, 1))
    place = rng.random(len(stretches))
    fold = np.zeros(len(rank), int)
    for rows, at in zip(stretches, place, strict=True):
        turn = (np.arange(len(rows)) - int(at * len(rows))) % len(rows)
        fold[rows] = np.where(turn < count, turn, 1 + (turn - count) % (count - 1))
    return fold


def held_out(targets: Outputs, key: Array) -> Bool[np.ndarray, " n"]:
    """Which rows to hold out: about one in five."""
    return folds(targets, key, _EVERY) == 0


class Part(NamedTuple):
    """Rows to fit and rows to choose on.

    Args:
        fit: rows to fit; after the first ``length`` others may follow, of weight zero.
        chosen_on: rows to choose on, others among them of weight zero.
        length: how many rows there are to fit; None for all.
    """

    fit: Data
    chosen_on: Data
    length: int | None = None

    @classmethod
    def of(cls, data: Data, held: Bool[np.ndarray, " n"]) -> Self:
        """With these rows held out; all parts of the same data have one shape, for which programs are compiled once."""
        if mesh_of(data.X) is not None:  # rows stay on their devices
            return cls(data.take(~held), data.take(held))
        data, length = data.at(np.argsort(held, kind="stable")), int(np.sum(~held))
        weight = on_host(data.weight)
        fits = np.arange(len(weight)) < length
        fit, chosen_on = (beside(data.weight, np.where(there, weight, 0)) for there in (fits, ~fits))
        return cls(data._replace(weight=fit), data._replace(weight=chosen_on), length)


def parts(data: Data, key: Array, count: int | None) -> list[Part]:
    """One with each of so many folds held out in turn; None for one split, or with few rows for five folds.

    Raises:
        ValueError: if there are more folds than rows.
    """
    if count is None and len(data.y) >= _FEW:
        return [Part.of(data, held_out(data.y, key))]
    count = _EVERY if count is None else count
    if count > len(data.y):
        raise ValueError(
            f"solve: `folds` must not exceed the number of rows of positive weight, got folds={count} for "
            f"{len(data.y)} rows."
        )
    fold = folds(data.y, key, count)
    return [Part.of(data, fold == k) for k in range(count)]


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


def follow_all(
    solve: Callable[[Data, int | None, float, Network | None], Solution],
    loss: Loss,
    beta_max: float,
    parts: Sequence[Part],
) -> Path:
    """The mean of the paths of all parts, by the weights of the rows to choose on; see :func:`follow`."""
    paths = [follow(solve, loss, beta_max, part) for part in parts]
    weights = [float(np.sum(on_host(part.chosen_on.weight))) for part in parts]
    losses = np.average([path.losses for path in paths], axis=0, weights=weights)
    if not np.isfinite(losses).any():
        warn(
            'solve: beta="path" should have finite losses on the rows that it chooses on, got none for any β: the '
            "largest is taken. Look there for features or targets that are far larger than those of the rows to fit."
        )
    return paths[0]._replace(losses=losses)


def follow(
    solve: Callable[[Data, int | None, float, Network | None], Solution], loss: Loss, beta_max: float, part: Part
) -> Path:
    """The path from ``beta_max`` on.

    Args:
        solve: takes rows to fit, their number, β, and a network to start from, None for the first.
        loss: of one row.
        beta_max: where the path starts from.
        part: rows to fit, and rows to choose on.
    """
    betas, mean_loss = beta_max * np.asarray(RATIOS), functools.partial(_mean_loss, loss=loss)
    losses, networks, network = [], [], None
    for beta in betas:
        network = solve(part.fit, part.length, float(beta), network).params
        losses.append(float(on_host(automatically(mean_loss, network, part.chosen_on))))
        networks.append(network)
    return Path(betas, np.asarray(losses), networks)
