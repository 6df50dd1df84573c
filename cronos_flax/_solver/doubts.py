"""What is done where a solve has ended badly: another start, or a word to the user."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from cronos_flax._solver.checks import concrete
from cronos_flax._solver.meshes import automatically
from cronos_flax._solver.solution import Solution, Status, TwoLayer
from cronos_flax._solver.transfer import on_host
from cronos_flax._solver.types import Scalar
from cronos_flax._solver.user_warnings import warn

_NOTHING = 0.999  # of the loss of the best constant: what explains less is no more than the constant
_LITTLE = 0.2  # of it left: then the features are looked at
_ROUNDED = 1e-4  # rounding of the features, relative to how much they vary, from which on solves end early


def is_full(start: Any) -> bool:
    """Whether a start is a network like those of a random start: one with all biases."""
    return isinstance(start, TwoLayer) and start.bias1 is not None and start.bias2 is not None


def is_lost(solution: Solution) -> bool:
    """Whether a solve was stuck at the best constant or above it.

    As from a network that takes a class for impossible, or whose hidden neurons are off in all rows.
    """
    return _ended_above(_NOTHING, solution)


def warn_if_far_from_zero(X: Any, solution: Solution) -> None:
    """Warn if a solve explains little, and the features are so far from zero that float32 hardly tells rows apart."""
    if not isinstance(X, Array) or not concrete(X) or not _ended_above(_LITTLE, solution):
        return
    ratio, reached, null = map(float, on_host((automatically(_distance, X), *_losses(solution))))
    if ratio * float(jnp.finfo(X.dtype).eps) > _ROUNDED:
        warn(
            f"solve: `X` should vary around zero, got columns that lie {ratio:.2g} times as far from zero as they "
            f"vary: in {X.dtype} rounding hides what tells the rows apart, and the loss is "
            f"{reached:.4g}, where the best constant has {null:.4g}. "
            "Subtract the mean of each column, as scikit-learn's StandardScaler does."
        )


def _ended_above(share: float, solution: Solution) -> bool:
    """Whether a solve ended by itself with more than this share of the loss of the best constant left."""
    if not concrete(solution.status_code):
        return False
    reached, null = on_host(_losses(solution))
    return bool(reached > share * null) and solution.status == Status.stationary


def _losses(solution: Solution) -> tuple[Scalar, Scalar]:
    """At the end, and of the best constant."""
    return solution.stats.objective, solution.stats.null_loss


@jax.jit
def _distance(X: Float[Array, "n p"]) -> Scalar:
    """How far the mean of the rows is from zero, in root mean squared distances of rows from it."""
    mean = jnp.mean(X, axis=0)
    return jnp.linalg.norm(mean) / jnp.sqrt(jnp.mean(jnp.sum(jnp.square(X - mean), axis=1)))
