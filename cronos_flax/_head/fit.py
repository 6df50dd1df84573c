"""A solve for the head of a module from rows of features, the same for linen and NNX."""

import dataclasses
import numbers
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from cronos_flax._head.features import Rows
from cronos_flax._solver.cronos import Cronos
from cronos_flax._solver.solution import Solution, Stats, Status, TwoLayer


def checked(head: Any, kind: type, solver: Cronos | None, where: str) -> Cronos:
    """The solver, None being the default; with a head of the right kind."""
    if not isinstance(head, kind):
        raise ValueError(f"{where}: `head` must come from its find_head, got {type(head).__name__}.")
    solver = Cronos() if solver is None else solver
    if not isinstance(solver, Cronos):
        raise ValueError(f"{where}: `solver` must be a cf.Cronos, got {type(solver).__name__}.")
    return solver


def check_network(network: Any, like: TwoLayer) -> None:
    """Weights that can be written where ``like`` is: of any width, with the same biases."""
    fits = isinstance(network, TwoLayer) and all(
        (getattr(network, name) is None) == (getattr(like, name) is None) for name in ("bias1", "bias2")
    )
    if not fits:
        raise ValueError(
            "write: `network` must be a cf.TwoLayer with the biases that the head has, "
            f"{'a' if like.bias1 is not None else 'no'} bias1 and {'a' if like.bias2 is not None else 'no'} bias2, got "
            f"{network!r}."
        )


def fit(
    network: TwoLayer,
    rows: Rows,
    solver: Cronos,
    key: Array | None,
    callback: Callable[[dict[str, float]], Any] | None,
    throw: bool,
) -> tuple[TwoLayer | None, Solution]:
    """What is to be written in place of ``network``, in its dtypes; None if nothing.

    Raises:
        FloatingPointError: if the loss of the present head is not finite, and ``throw``.
    """
    solution = solver.solve(rows.X, rows.y, init=network, sample_weight=rows.weight, key=key, callback=callback)
    if throw and solution.status == Status.nonfinite:
        raise FloatingPointError(f"fit_head: {solution.status.message}")

    def as_solved(params: TwoLayer) -> TwoLayer:
        return jax.tree.map(lambda v: v.astype(solution.params.kernel1.dtype), params)

    rounded = jax.tree.map(lambda old, new: new.astype(old.dtype), network, solution.params)
    if jnp.result_type(network.kernel1, network.kernel2) == solution.params.kernel1.dtype:
        return rounded, solution
    # Rounding to the parameters' own precision comes after the solve, and may undo it.
    objective = solver.objective(as_solved(rounded), rows.X, rows.y, solution.stats.beta, sample_weight=rows.weight)
    better = bool(objective <= solution.stats.initial_objective)
    stats = dataclasses.replace(solution.stats, objective=objective if better else solution.stats.initial_objective)
    kept = rounded if better else network
    return rounded if better else None, dataclasses.replace(solution, params=as_solved(kept), stats=stats)


def failed(network: TwoLayer) -> Solution:
    """The solution that stands for a solve on features that are not finite."""
    nan, zero = jnp.full((), jnp.nan), jnp.zeros((), jnp.int32)
    stats = Stats(
        objective=nan,
        initial_objective=nan,
        null_loss=nan,
        beta=nan,
        iterations=zero,
        active_neurons=zero,
        objective_trace=nan[None],
    )
    return Solution(network, jnp.asarray(Status.nonfinite, jnp.int32), stats, None)


def prune_head(params: TwoLayer, tol: float = 1e-3) -> TwoLayer:
    """The same network without the neurons that do (nearly) nothing.

    A solve uses exactly the neurons that it is given, and says in ``stats.active_neurons`` how many it needed. The
    smaller head fits a module of the smaller width: ``model.clone(width=…)`` and ``head.write`` in linen, new layers
    in NNX.

    A neuron goes if neither ``‖kernel1ᵢ‖ ‖kernel2ᵢ‖`` nor ``|bias1ᵢ| ‖kernel2ᵢ‖`` is above ``tol`` times the largest
    of its kind; these do not change when a neuron is rebalanced.

    Args:
        params: the network, with m neurons.
        tol: fraction of the largest, in [0, 1).

    Returns:
        A network of at least one and at most m neurons.

    Raises:
        ValueError: for a ``tol`` outside its range, or something that is not a network.

    Example:
        >>> import jax.numpy as jnp, cronos_flax as cf
        >>> wide = cf.TwoLayer(jnp.array([[1.0, 0.0, 2.0]]), jnp.zeros(3), jnp.array([[1.0], [1.0], [-1.0]]), None)
        >>> cf.prune_head(wide).kernel1
        Array([[1., 2.]], dtype=float32)
    """
    if not isinstance(params, TwoLayer):
        raise ValueError(f"prune_head: `params` must be a cf.TwoLayer, got {type(params).__name__}.")
    if not isinstance(tol, numbers.Real) or not 0 <= tol < 1:
        raise ValueError(f"prune_head: `tol` must be a number in [0, 1), got {tol!r}.")
    params = jax.tree.map(jnp.asarray, params)
    if (
        params.kernel1.ndim != 2
        or params.kernel1.size == 0
        or not all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(params))
    ):
        raise ValueError(
            f"prune_head: `params` must be finite, with a kernel1 (p, m), got one of shape {params.kernel1.shape}."
        )
    out = jnp.linalg.norm(params.kernel2, axis=1)
    sizes = [jnp.linalg.norm(params.kernel1, axis=0) * out]
    if params.bias1 is not None:
        sizes.append(jnp.abs(params.bias1) * out)
    active = jnp.any(jnp.stack([size > tol * jnp.max(size) for size in sizes]), axis=0)
    active = active.at[jnp.argmax(sizes[0])].set(True)
    bias1 = None if params.bias1 is None else params.bias1[active]
    return TwoLayer(params.kernel1[:, active], bias1, params.kernel2[active], params.bias2)
