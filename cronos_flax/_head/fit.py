"""A solve for the head of a module, the same for linen and NNX."""

import dataclasses
import numbers
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from cronos_flax._head.features import as_source
from cronos_flax._head.head import Head
from cronos_flax._head.rows import GatheredRows
from cronos_flax._solver.checks import all_finite, folds_of_path, relu_only
from cronos_flax._solver.cronos import Cronos
from cronos_flax._solver.memory import most_bytes
from cronos_flax._solver.meshes import on_automatic_axes_of
from cronos_flax._solver.solution import Solution, Stats, Status, TwoLayer, with_stats
from cronos_flax._solver.transfer import on_device, on_host
from cronos_flax._solver.user_warnings import warn

_WORSE, _ROUNDING = 0.05, 1e-6  # more than so much of the loss of the best constant: above, a head is worse than that


def fit_data(
    head: Head,
    variables: Any,
    data: Any,
    solver: Cronos,
    unpack: Callable[[Any], tuple] | None,
    key: Array | None,
    callback: Callable[[dict[str, float]], Any] | None,
    throw: bool,
) -> tuple[Any, Solution]:
    """Gather the head's input, solve, and write the solution into the head.

    Args:
        head: the head.
        variables: the variables of a linen module, or an NNX model.
        data: as for :func:`cronos_flax.fit_head`, as are the other arguments.
        solver: how the head is solved.
        unpack: how to take a batch apart.
        key: key of samples and revived neurons.
        callback: called after each batch and at each check of the solve.
        throw: raise on numerical failure.

    Returns:
        What ``head.write`` returns, or ``variables`` if no better head was found; and the solution.

    Raises:
        ValueError: for data that do not fit, or features that are not finite.
        FloatingPointError: if the loss of the present head is not finite, and ``throw``.
    """
    rows, moments = head.gather(variables, data, unpack, callback, most_bytes=most_in_memory(solver))
    if not rows.finite:
        raise ValueError(
            "fit_head: the features must be finite, got NaN or infinite entries. Check the parameters of the backbone, "
            "and remove or impute the rows of `data` that are not finite."
        )
    network, solution = fit_rows(head.read(variables), rows, solver, key, callback, throw)
    _warn_if_worse_than_constant(solution)
    fitted = variables if network is None else head.write(variables, network)
    if solution.status == Status.nonfinite:
        return fitted, solution
    return head.module.recalibrated(fitted, moments), solution


def _warn_if_worse_than_constant(solution: Solution) -> None:
    """Warn if a head that could be constant, as it has a bias, ends above the loss of the best constant."""
    objective, null = (float(on_host(value)) for value in (solution.stats.objective, solution.stats.null_loss))
    if solution.params.bias2 is not None and objective > null + _WORSE * abs(null) + _ROUNDING:
        warn(
            f"fit_head: the regularised loss is {objective:.4g} after the solve, and {null:.4g} for outputs that are "
            "the same for all rows. Give the solve more iterations (max_iters, or a smaller tol), or bring the "
            "features to similar scales."
        )


def fit_rows(
    network: TwoLayer,
    rows: GatheredRows,
    solver: Cronos,
    key: Array | None,
    callback: Callable[[dict[str, float]], Any] | None,
    throw: bool,
) -> tuple[TwoLayer | None, Solution]:
    """Solve on finite features, starting from ``network``.

    Returns:
        The new network in the dtypes of the old one, or None if rounding to these dtypes loses what the solve gained;
        and the solution, whose figures are those of the rounded network.

    Raises:
        FloatingPointError: if the loss of ``network`` is not finite, and ``throw``.
    """

    def fit(network: TwoLayer, solver: Cronos, key: Array | None) -> tuple[TwoLayer | None, Solution]:
        return _fit_rows(network, rows, solver, key, callback, throw)

    return on_automatic_axes_of(rows.mesh, fit, network, solver, key)


def _fit_rows(
    network: TwoLayer,
    rows: GatheredRows,
    solver: Cronos,
    key: Array | None,
    callback: Callable[[dict[str, float]], Any] | None,
    throw: bool,
) -> tuple[TwoLayer | None, Solution]:
    if not all_finite(network):
        if throw:
            raise FloatingPointError("fit_head: the head to start from must be finite, got NaN or infinite entries.")
        return None, nonfinite_solution(network)
    arguments: dict[str, Any] = {"init": network, "sample_weight": rows.weight, "key": key, "callback": callback}
    order, streamed = None if rows.order is None else on_device(rows.order), _are_streamed(rows, solver)

    def features() -> Any:
        return as_source(rows.X) if streamed else rows.X

    solution = solver.solve_features(features(), rows.y, order=order, **arguments)
    if throw and solution.status == Status.nonfinite:
        raise FloatingPointError(f"fit_head: {solution.status.message}")

    def as_solved(params: TwoLayer) -> TwoLayer:
        return jax.tree.map(lambda v: v.astype(solution.params.kernel1.dtype), params)

    rounded = jax.tree.map(lambda old, new: new.astype(old.dtype), network, solution.params)
    if jnp.result_type(network.kernel1, network.kernel2) == solution.params.kernel1.dtype:
        return rounded, solution
    objective = solver.objective(as_solved(rounded), features(), rows.y, solution.stats.beta, sample_weight=rows.weight)
    before = solution.stats.initial_objective
    better = bool(on_host(objective) <= on_host(before))
    solution = with_stats(solution, objective=objective if better else before)
    kept = rounded if better else network
    return rounded if better else None, dataclasses.replace(solution, params=as_solved(kept))


def most_in_memory(solver: Cronos) -> int | None:
    """Most bytes of features to keep in memory while they are gathered; None for all, which ``beta="path"`` needs."""
    return None if isinstance(solver.beta, str) else most_bytes(solver.max_bytes)


def _are_streamed(rows: GatheredRows, solver: Cronos) -> bool:
    """Whether a solve reads the features in blocks: from files as these are, or because they are many.

    Raises:
        ValueError: if they are too many for ``beta="path"``.
    """
    if not isinstance(rows.X, np.ndarray):  # on devices
        return False
    in_file = isinstance(rows.X, np.memmap)
    if in_file and rows.order is not None:
        return True
    chooses = isinstance(solver.beta, str)
    most = most_bytes(solver.max_bytes, held=0 if in_file else rows.X.nbytes)
    if rows.X.nbytes <= most or (chooses and not in_file):
        return False
    if chooses:
        raise ValueError(
            f'fit_head: beta="path" needs the features in memory, got {rows.X.nbytes / 1e9:,.1f} GB of them in a file, '
            f"more than the {most / 1e9:,.1f} GB that memory should hold. Choose on some of them "
            "(features.take(rows)), give a number, or let cf.Cronos(max_bytes=...) allow it."
        )
    return True


def solver_or_default(where: str, solver: Cronos | None) -> Cronos:
    """The solver given, one that gives ReLU networks; None means ``Cronos()``."""
    solver = Cronos() if solver is None else solver
    if not isinstance(solver, Cronos):
        raise ValueError(f"{where}: `solver` must be a cf.Cronos, got {type(solver).__name__}.")
    relu_only(where, solver.gates)
    folds_of_path(where, solver.folds, solver.beta)
    return solver


def nonfinite_solution(network: TwoLayer) -> Solution:
    """The solution of a solve that was not tried, as features or head are not finite: ``network``, unchanged."""
    nan, zero = on_device(np.nan, float), on_device(0, jnp.int32)
    stats = Stats(
        objective=nan,
        initial_objective=nan,
        null_loss=nan,
        beta=nan,
        iterations=zero,
        active_neurons=zero,
        objective_trace=on_device([np.nan], float),
    )
    return Solution(network, on_device(Status.nonfinite, jnp.int32), stats, None)


def prune_head(params: TwoLayer, tol: float = 1e-3) -> TwoLayer:
    """The same network without the neurons that contribute (nearly) nothing.

    A solve uses all neurons that it is given; ``stats.active_neurons`` says how many it needed. The smaller network
    fits a module of the smaller width: ``model.clone(width=…)`` and ``head.write`` in linen, new layers in NNX.

    Neuron i is dropped if both ``‖kernel1ᵢ‖ ‖kernel2ᵢ‖`` and ``|bias1ᵢ| ‖kernel2ᵢ‖`` are at most ``tol`` times the
    largest of their kind. Rescaling a neuron's two layers against each other does not change these products.

    Args:
        params: the network, with m neurons.
        tol: fraction of the largest, in [0, 1).

    Returns:
        A network of at least one and at most m neurons.

    Raises:
        ValueError: for a ``tol`` outside its range, and for what is not a network or not finite.

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
    params = jax.tree.map(np.asarray, on_host(params))
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.promote_types(leaf.dtype, np.float32)), params)
    if (
        params.kernel1.ndim != 2
        or params.kernel1.size == 0
        or not all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(wide))
    ):
        raise ValueError(
            f"prune_head: `params` must be finite, with a kernel1 (p, m), got one of shape {params.kernel1.shape}."
        )
    out = np.linalg.norm(wide.kernel2, axis=1)
    sizes = [np.linalg.norm(wide.kernel1, axis=0) * out]
    if wide.bias1 is not None:
        sizes.append(np.abs(wide.bias1) * out)
    active = np.any([size > tol * np.max(size) for size in sizes], axis=0)
    active[np.argmax(sizes[0])] = True
    bias1 = None if params.bias1 is None else params.bias1[active]
    return jax.tree.map(on_device, TwoLayer(params.kernel1[:, active], bias1, params.kernel2[active], params.bias2))
