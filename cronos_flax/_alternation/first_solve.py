"""The first solve of an alternation: it chooses the weight decay β of all.

A solve sees the features as they are. If they hardly tell the classes apart (those of an untrained recurrent network,
say), a weakly regularised head fits them by large weights, and two things that the solve does not see become large with
them: the gradient that the backbone gets, whose steps then destroy the features, and the noise of dropout. So β is
raised until that gradient is not much larger than before.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from cronos_flax._head.rows import GatheredRows
from cronos_flax._solver.cronos import Cronos
from cronos_flax._solver.losses import Loss, loss_of
from cronos_flax._solver.meshes import on_automatic_axes_of
from cronos_flax._solver.processes import agreed
from cronos_flax._solver.solution import Solution, TwoLayer, predict
from cronos_flax._solver.staging import ONCE, Stage
from cronos_flax._solver.transfer import on_device, on_host, taken

_STRONGER = 2.0  # a β that is too small is multiplied by this
_ROWS = 1024  # that the gradient is looked at on

Solved = tuple[TwoLayer | None, Solution]


def undecided_beta(solver: Cronos) -> Float[Array, ""]:
    """The weight decay of an alternation before its first solve: the solver's number, or infinity, to be chosen then.

    Not NaN: a user's jitted step carries it, and ``jax_debug_nans`` would take it for a fault.
    """
    chosen = solver.beta is None or isinstance(solver.beta, str)
    return on_device(math.inf if chosen else solver.beta, float)


def first_solved(
    fit: Callable[[Cronos], Solved], network: TwoLayer, rows: GatheredRows, solver: Cronos, largest: float
) -> Solved:
    """Solve at the solver's own β, then at larger ones while the gradient in the features has grown too much.

    Each solve starts from the same head. Its objective is that of its own β.

    Args:
        fit: solves as a solver says.
        network: the present head.
        rows: the head's input, with targets and weights.
        solver: how the head is solved.
        largest: how many times the gradient may grow; infinity for no limit.

    Returns:
        What ``fit`` gave at last.
    """
    new, solution = fit(solver)
    while (beta := on_host(solution.stats.beta)) > 0 and largest < math.inf:  # twice zero is zero
        if not gradient_growth(network, solution.params, rows, loss_of(solver.loss)) > largest:  # it may be NaN
            break
        solver = dataclasses.replace(solver, beta=on_device(_STRONGER * beta))
        new, solution = fit(solver)
    return new, solution


def gradient_growth(before: TwoLayer, after: TwoLayer, rows: GatheredRows, loss: Loss) -> float:
    """How many times larger the loss's gradient in the features is with another head: root mean squares over rows.

    Rows count by their weights, without those of ``class_weight``.

    A head whose gradient is smaller than that of a fresh one (of zeros, or fitted already) counts as a fresh one.

    Args:
        before: the one head.
        after: the other head.
        rows: features, targets and weights; 1,024 of them are looked at.
        loss: of the outputs.
    """
    n = len(rows.X) if rows.order is None else len(rows.order)
    index = np.linspace(0, n - 1, _ROWS).astype(np.int32)  # of few rows some more than once, for one program
    weight = np.ones(len(rows.X), rows.X.dtype) if rows.weight is None else rows.weight
    if rows.order is None or isinstance(rows.X, np.ndarray):
        places = index if rows.order is None else rows.order[index]
        sample = [on_device(values[places]) for values in (rows.X, rows.y, weight)]
        return agreed(float(on_host(_growth(before, after, *sample, loss=loss))))

    def seen(index: Array, before: TwoLayer, after: TwoLayer) -> Array:
        return _growth(before, after, *(taken(values, index) for values in (rows.X, rows.y, weight)), loss=loss)

    growth = on_automatic_axes_of(rows.mesh, seen, on_device(rows.order[index]), before, after)
    return agreed(float(on_host(growth)))


def _gradient_growth(before: TwoLayer, after: TwoLayer, X: Array, y: Array, weight: Array, *, loss: Loss) -> Array:
    targets, weight = loss.targets(y, before.kernel2.shape[1]).astype(X.dtype), weight / jnp.max(weight)

    def size(gradient: Array) -> Array:
        squares = jnp.sum(jnp.square(gradient), axis=1)
        return jnp.sqrt(jnp.sum(jnp.where(weight > 0, weight * squares, 0)) / jnp.sum(weight))

    def gradient(network: TwoLayer) -> Array:
        return jax.grad(lambda X: jnp.sum(loss.value(predict(network, X), targets)))(X)

    # Of a fresh Dense → relu → Dense of C outputs the Jacobian has Frobenius norm √(C/2), so √½ for each output.
    constant = jnp.broadcast_to(loss.constant(targets, weight), targets.shape)
    fresh = size(loss.gradient(constant, targets)) / jnp.sqrt(2.0)
    usual = jnp.maximum(size(gradient(before)), fresh)
    return size(gradient(after)) / jnp.maximum(usual, jnp.finfo(X.dtype).tiny)  # constant targets may leave none


_growth = Stage(_gradient_growth, few=ONCE)
