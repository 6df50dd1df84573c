"""β chosen on rows held out: a path of solves from a large β to a small one, each from the solution of the last."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float

from cronos_flax._solver.losses import Loss
from cronos_flax._solver.solution import Solution, TwoLayer
from cronos_flax._solver.types import Outputs, RowVector
from cronos_flax._solver.weights import predict

RATIOS = tuple(float(ratio) for ratio in 10.0 ** -np.arange(1, 4.5, 0.5))  # of β_max
TOL = 1e-2  # of the solves on the way, which are for comparing
_EVERY = 5  # one row in so many is held out


class Data(NamedTuple):
    """Rows with their targets and weights."""

    X: Float[Array, "n p"]
    y: Outputs
    weight: RowVector

    def take(self, index: Bool[np.ndarray, " n"]) -> "Data":
        """Some of the rows."""
        return Data(self.X[index], self.y[index], self.weight[index])


def held_out(targets: Outputs, key: Array) -> Bool[np.ndarray, " n"]:
    """Which rows to hold out: of the rows in the order of their targets, one at random of each five.

    So every class, or every range of a real target, has its share.
    """
    rank = np.asarray(targets[:, 0] if targets.shape[1] == 1 else jnp.argmax(targets, axis=1))
    tie_key, place_key = jax.random.split(key)
    order = np.lexsort((np.asarray(jax.random.permutation(tie_key, len(rank))), rank))
    stretches = np.array_split(order, max(len(rank) // _EVERY, 1))
    place = np.asarray(jax.random.uniform(place_key, (len(stretches),)))
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
        rows = loss.value(predict(network, validation.X), validation.y)
        losses.append(float(validation.weight @ rows / jnp.sum(validation.weight)))
        networks.append(network)
    best = int(np.argmin(np.nan_to_num(losses, nan=np.inf)))
    return float(betas[best]), networks[best], betas, np.asarray(losses)
