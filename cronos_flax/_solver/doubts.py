"""What is done where a solve has ended badly: another start, or a word to the user."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from cronos_flax._solver.arrays import is_concrete, opened
from cronos_flax._solver.loss import Loss
from cronos_flax._solver.losses import Huber
from cronos_flax._solver.meshes import automatically
from cronos_flax._solver.numerics import or_one
from cronos_flax._solver.solution import Solution, Status, TwoLayer
from cronos_flax._solver.transfer import on_host
from cronos_flax._solver.types import RowVector, Scalar
from cronos_flax._solver.user_warnings import warn

_NOTHING = 0.999  # of the loss of the best constant: what explains less is no more than the constant
_LITTLE = 0.2  # of it left: then the features are looked at
_SMALL = 1e-3  # of the root mean squared norm of rows: where the median is below, a few rows set it
_FLAT = 1e6  # residuals, in deltas of Huber's loss, from which on its curvature is lost
_ROUNDED = 1e-4  # rounding of the features, relative to how much they vary, from which on solves end early
_HIDDEN = 0.2  # the same of the targets, from which on a network explains clearly less of them
_UNDER = 10.0  # deviations, in roots of the least number, up to which losses are lost
_LOOKED_AT = 2**16  # targets, of more


def is_full(start: Any) -> bool:
    """Whether a start is a network like those of a random start: one with all biases."""
    return isinstance(start, TwoLayer) and start.bias1 is not None and start.bias2 is not None


def is_lost(solution: Solution) -> bool:
    """Whether a solve was stuck at the best constant or above it.

    As from a network that takes a class for impossible, or whose hidden neurons are off in all rows.
    """
    return _ended_above(_NOTHING, solution)


def warn_of_rounding(y: Any, dtype: Any, loss: Loss) -> None:
    """Warn if real targets are so far from zero that their rounding is of the size of what tells them apart.

    Then the loss shows nothing of it: it may be that of a perfect network. So it is if their squares are zero.

    Args:
        y: the targets as they came, in more bits perhaps than the solve has.
        dtype: of the solve.
        loss: what they are for.
    """
    if not loss.takes_values or (isinstance(y, Array) and not (is_concrete(y) and y.is_fully_addressable)):
        return
    values = on_host(opened(y, "solve: `y`"))  # before it is cut: inside jit that would be traced
    values = np.asarray(values[:: 1 + len(values) // _LOOKED_AT], float)
    apart = values - values[:1]  # of constants it is zero
    unit = float(np.max(np.abs(apart), initial=0)) or 1.0  # in which squares are not
    deviation = np.atleast_1d(unit * np.std(apart / unit, axis=0))
    size = np.atleast_1d(np.max(np.abs(values), axis=0))
    finfo, spread = jnp.finfo(dtype), float(np.max(deviation))
    if 0 < spread < _UNDER * float(finfo.tiny) ** 0.5:
        warn(
            f"solve: `y` must have a loss that {finfo.dtype} can hold, got values with a standard deviation of "
            f"{spread:.3g}, whose squares are zero there: the network is no more than a constant. Divide y by its "
            "standard deviation, and multiply the outputs by it."
        )
    lost = np.minimum(deviation, size * float(finfo.eps))
    if np.linalg.norm(lost) > _HIDDEN * np.linalg.norm(deviation):
        most = np.argmax(lost)
        warn(
            f"solve: `y` should vary around zero, got values up to {size[most]:.3g} with a standard deviation of "
            f"{deviation[most]:.3g}: rounding to {jnp.dtype(dtype).name} hides most of what tells them apart. "
            "Subtract their mean first, in float64, and add it to the outputs."
        )


def warn_of_units(X: Any, weight: Array, loss: Loss, solution: Solution) -> None:
    """Warn if a solve explains little, and the units of features or targets are such that it could not explain more.

    Features may be so far from zero that float32 hardly tells rows apart, or next to nothing beside a few rows.
    Residuals may be so large that Huber's loss has next to no curvature. And rows that are all the same tell nothing.
    """
    if not isinstance(X, Array) or not is_concrete(X) or not _is_known(solution):
        return
    reached, null = map(float, on_host(_losses(solution)))
    if reached > _NOTHING * null > 0 and on_host(automatically(_all_alike, X)):
        warn(
            f"solve: `X` must differ from row to row in {X.dtype}, got {len(X)} times the same: the best that there is "
            "are constant outputs. If these are the features of a module, its neurons may be off for all inputs, or "
            "its inputs be all the same."
        )
        return
    if not _ended_above(_LITTLE, solution):
        return
    ratio, typical = map(float, on_host((automatically(_distance, X), automatically(_typical, X, weight))))
    explained = f"the loss is {reached:.4g}, where the best constant has {null:.4g}"
    if ratio * float(jnp.finfo(X.dtype).eps) > _ROUNDED:
        warn(
            f"solve: `X` should vary around zero, got columns that lie {ratio:.2g} times as far from zero as they "
            f"vary: in {X.dtype} rounding hides what tells the rows apart, and {explained}. "
            "Subtract the mean of each column, as scikit-learn's StandardScaler does."
        )
    if typical < _SMALL:
        warn(
            f"solve: `X` should have rows of about one size, got a median norm of {typical:.2g} of the root mean "
            f"square: a few rows set the units and the weight decay, and {explained}. Remove these rows, give them a "
            "weight of zero, or bring their features into the range of the others, by numpy.clip."
        )
    if isinstance(loss, Huber) and null > _FLAT * loss.delta**2:
        warn(
            f"solve: `delta` of cf.Huber should be in the units of y, got {loss.delta:.4g} for residuals of about "
            f"{null / loss.delta:.2g}: there the loss has no curvature, and {explained}. Give "
            "cf.Cronos(loss=cf.Huber(delta=...)) the size of residuals that are no outliers, or divide y by its size."
        )


def _ended_above(share: float, solution: Solution) -> bool:
    """Whether a solve ended by itself with more than this share of the loss of the best constant left.

    Of a loss that is negative there, as one of the user's own may be: with less than the rest of its size gone.
    """
    if not _is_known(solution):
        return False
    reached, null = on_host(_losses(solution))
    left = (share if null >= 0 else 2 - share) * null
    return bool(reached > left) and solution.status == Status.stationary


def _is_known(solution: Solution) -> bool:
    """Whether its figures are numbers; where it is differentiated the integers among them are, and the losses not."""
    return all(map(is_concrete, (solution.status_code, *_losses(solution))))


def _losses(solution: Solution) -> tuple[Scalar, Scalar]:
    """At the end, and of the best constant."""
    return solution.stats.objective, solution.stats.null_loss


@jax.jit
def _distance(X: Float[Array, "n p"]) -> Scalar:
    """How far the mean of the rows is from zero, in root mean squared distances of rows from it."""
    mean = jnp.mean(X, axis=0, keepdims=True)
    return jnp.linalg.norm(mean) / jnp.sqrt(jnp.mean(jnp.sum(jnp.square(X - mean), axis=1)))


@jax.jit
def _all_alike(X: Float[Array, "n p"]) -> Array:
    return jnp.all(X[:1] == X)


@jax.jit
def _typical(X: Float[Array, "n p"], weight: RowVector) -> Scalar:
    """The median norm of the rows that are not zero, relative to the root mean square of all norms."""
    largest = jnp.max(jnp.abs(X))
    squares = jnp.sum(jnp.square(X / or_one(largest)), axis=1)
    median = jnp.nanmedian(jnp.where((squares > 0) & (weight > 0), squares, jnp.nan))
    return jnp.sqrt(median / (weight @ squares / jnp.sum(weight)))
