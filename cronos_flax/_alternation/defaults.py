"""The defaults of an alternation, which solves again and again and needs less of each solve than a single fit does."""

import dataclasses
import warnings
from typing import Any

import jax

from cronos_flax._head.head import Head
from cronos_flax._solver.checks import positive_integer
from cronos_flax._solver.cronos import Cronos

_MAX_ITERS = 3
_BETA_RATIO = 0.005


@dataclasses.dataclass(frozen=True, kw_only=True)
class SolveSchedule:
    """The epochs that a head solve comes before: each of the first few, then every few.

    Args:
        dense_epochs: the number of first epochs, ``≥ 0``, that each have a solve before them.
        then_every: after these, one solve in so many epochs, ``≥ 1``.
    """

    dense_epochs: int = 5
    then_every: int = 3

    def __post_init__(self) -> None:
        positive_integer("SolveSchedule", "dense_epochs", self.dense_epochs, least=0)
        positive_integer("SolveSchedule", "then_every", self.then_every)

    def is_due(self, epoch: int) -> bool:
        """Whether a solve comes before this epoch; the first is number 0."""
        later = epoch - self.dense_epochs
        return later < 0 or later % self.then_every == self.then_every - 1


def alternation_defaults(solver: Cronos, head: Head) -> Cronos:
    """Fill in the settings of ``solver`` that are None.

    | setting                             | alternation | single fit |
    |-------------------------------------|-------------|------------|
    | ``max_iters``, iterations per solve | 3           | 500        |
    | ``beta_ratio``, β / β_max           | .005        | .001       |

    A module that is nothing but its head has no backbone to alternate with: its solver stays as it is.

    Args:
        solver: the user's solver.
        head: the head that it solves for.

    Returns:
        The solver of the alternation; ``print(state.solver)`` shows its settings.
    """
    if not head.frozen:
        return solver
    return dataclasses.replace(
        solver,
        max_iters=_MAX_ITERS if solver.max_iters is None else solver.max_iters,
        beta_ratio=_BETA_RATIO if solver.beta_ratio is None else solver.beta_ratio,
    )


def warn_of_running_statistics(where: str, head: Head, statistics: Any) -> None:
    """Warn if a model has running statistics, and solves use them where gradient steps use those of the batch.

    Args:
        where: the caller's name.
        head: the head that is solved for.
        statistics: the running statistics of the model; empty if it has none.
    """
    if not jax.tree.leaves(statistics) or head.in_training or head.module.statistics is not None:
        return
    warnings.warn(
        f"{where}: `head` was found with the running statistics of batch norms, but training steps use those of the "
        "batch, so solves fit other features than gradients see; this can cost accuracy. Call find_head with "
        'statistics="batch"; or, if batch norms use running statistics in training steps too, with '
        'statistics="running".',
        UserWarning,
        stacklevel=3,
    )
