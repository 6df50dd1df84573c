"""One solve from checked arrays to a :class:`cronos_flax.Solution`: its beginning, its path, its end."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding
from jaxtyping import Float, Int

from cronos_flax._solver import descent, gauss_newton, refreshed
from cronos_flax._solver.beta_max import beta_max
from cronos_flax._solver.blocks import Blocks
from cronos_flax._solver.coordinates import normalised, scaled
from cronos_flax._solver.descent import Descent, Limits
from cronos_flax._solver.gauss_newton import Prepared
from cronos_flax._solver.held import figures, held, program_of, solve_program
from cronos_flax._solver.losses import loss_of
from cronos_flax._solver.meshes import beside_rows, place_of_rows
from cronos_flax._solver.numerics import or_one
from cronos_flax._solver.padding import padded
from cronos_flax._solver.problem import Ended, Problem
from cronos_flax._solver.program import (
    dead,
    default_directions,
    from_network,
    gated,
    norms,
    random_neurons,
    regularised_loss,
    to_network,
)
from cronos_flax._solver.solution import (
    GatedTwoLayer,
    HeldState,
    Network,
    RefreshedState,
    Solution,
    Stats,
    Status,
    TwoLayer,
    gates_on,
    with_stats,
)
from cronos_flax._solver.staging import ONCE, OnHost, Stage, control_of
from cronos_flax._solver.transfer import on_device, on_host
from cronos_flax._solver.types import Bias, Directions, Gates, Neurons, RowVector, Scalar

# Defaults of a single fit, where the setting is None.
BETA_RATIO = 0.001
RHO = 1.0
TOL = 1e-3

_FIRST_SIZE = 0.01  # of neurons, as a share of those of a random start, where those of a network are far too small
_FAR = 4.0  # times the loss of the best constant: above, a network to start from is first brought nearer to that
_LEAST_TRACE = 4096  # entries of the traces of a solve with held gates, which are cut to those that are asked for

State = RefreshedState | HeldState


def biases(gates: str, network: Network | None) -> tuple[bool, bool]:
    """Whether the network has a hidden and an output bias; the published program has no output bias."""
    if network is None:
        return True, gates != "paired"
    return network.bias1 is not None, network.bias2 is not None


class Asked(NamedTuple):
    """A solve as it is asked for, checked.

    Args:
        solver: the :class:`cronos_flax.Cronos`, its leaves arrays, ``beta`` a number or None.
        features: shape ``(n, p)``.
        targets: shape ``(n, C)``.
        weight: of the rows.
        start: a network or a state to start from; None for a random network.
        key: of all that is random.
        progress: the number of the callback, None for none.
        order: of the rows, as in :class:`cronos_flax._solver.coordinates.Rows`.
        length: how many rows there are before others of weight zero; None for all.
    """

    solver: Any
    features: Float[Array, "n p"] | Blocks
    targets: Float[Array, "n C"]
    weight: RowVector
    start: Network | State | None
    key: Array
    progress: Int[Array, ""] | None
    order: Int[Array, " k"] | None = None
    length: Int[Array, ""] | None = None


class Begun(NamedTuple):
    """What a solve starts from.

    Args:
        problem: the data on the solver's coordinates, and the settings.
        params: the network, in the user's units.
        network: its neurons, directions and mean output.
        D: the gates of a gated network on these rows, None for a ReLU network.
        user_beta: β in the user's units.
        null: loss of the best constant output, in sums over rows.
        key: of the path.
        before: the regularised loss of the network, where it is known: of one that nobody else has, so to rounding.
    """

    problem: Problem
    params: Network
    network: tuple[Neurons, Directions, Bias]
    D: Gates | None
    user_beta: Scalar
    null: Scalar
    key: Array
    before: Scalar | None = None

    def with_targets(self, targets: Any) -> "Begun":
        """The same with these targets, None for none."""
        rows = dataclasses.replace(self.problem.rows, Y=targets)
        return self._replace(problem=dataclasses.replace(self.problem, rows=rows))


def _not_too_small(U: Neurons, size: Scalar, key: Array) -> Neurons:
    """The neurons, made longer if what they and the first steps change is lost in the rounding of the loss.

    Neurons that are all zero count as of norm one, as in a step (see ``floored``); too small, they become random ones.
    """
    mean = jnp.mean(norms(U))
    divisor = or_one(mean)
    longer = _FIRST_SIZE * size * jnp.where(mean > 0, U / divisor, random_neurons(key, U))
    return jnp.where(divisor < jnp.sqrt(jnp.finfo(U.dtype).eps) * size, longer, U)


def _begin(asked: Asked, *, hidden: int, place: NamedSharding | None = None) -> Begun:
    solver, features, targets, weight, start, key, progress, order, length = asked
    gate_key, start_key, run_key = jax.random.split(key, 3)
    params = start if isinstance(start, Network) or start is None else start.params
    weight, loss = normalised(weight), loss_of(solver.loss)
    hidden_bias, output_bias = biases(solver.gates, params)
    biased = {"hidden_bias": hidden_bias, "output_bias": output_bias}
    rows, basis = scaled(features, targets, weight, loss, **biased, order=order, place=place)
    rows = dataclasses.replace(rows, length=length)
    d, total = rows.X.shape[1], jnp.sum(weight)
    # β of the program is in sums over rows and scaled features (docs/method.md, "Units").
    ratio = BETA_RATIO if solver.beta_ratio is None else solver.beta_ratio
    beta = ratio * beta_max(rows) if solver.beta is None else solver.beta * total / basis.scale
    beta = jnp.where(beta >= 0, beta, jnp.nan)  # what is refused where it can be seen
    problem = Problem(
        rows=rows,
        basis=basis,
        total_weight=total,
        beta=beta,
        rho=jnp.asarray(RHO if solver.rho is None else solver.rho, rows.X.dtype),
        tol=jnp.asarray(TOL if solver.tol is None else solver.tol, rows.X.dtype),
        gates=solver.gates,
        certify_iters=solver.certify_iters,
        linear_solver=solver.linear_solver,
        refreshed=solver.refreshed,
        held=solver.held,
        progress=progress,
    )
    if solver.gates != "refreshed" and solver.linear_solver.on_eigenbasis:
        problem = problem.rotated()
        rows, basis = problem.rows, problem.basis
    # By the user's features, as `predict` has them: what a rounding turns on is not small.
    D = gates_on(params, features) if isinstance(params, GatedTwoLayer) else None
    null = rows.value(rows.constant(loss.constant(rows.Y, rows.weight)))
    if params is None:
        # In the units of the targets, or outputs that are far too large or too small would cost hundreds of steps.
        U = (rows.misfit() / hidden) * random_neurons(start_key, jnp.empty((d, hidden), rows.X.dtype))
        A, b = default_directions(hidden, targets.shape[1], rows.X.dtype), rows.best_constant()
        params = to_network(rows, basis, U, A, b, rows.X @ U)
    else:
        U, A, b = from_network(params, rows, basis, D)
        if isinstance(start, TwoLayer):
            U = _not_too_small(U, rows.misfit() / U.shape[1], start_key)
    if solver.gates == "gated" and isinstance(params, TwoLayer):
        params = gated(params, U, basis, gate_key)
        D = gates_on(params, features)
    return Begun(problem, params, (U, A, b), D, beta * basis.scale / total, null, run_key)


def _begin_refreshed(
    asked: Asked, *, hidden: int, place: NamedSharding | None = None
) -> tuple[Begun, Prepared, refreshed.Iterate, Array]:
    """The same; and what the steps of the refreshed path share, their first iterate, and the key of what they draw.

    Without targets, as what a program returns it holds twice.
    """
    begun, start = _begin(asked, hidden=hidden, place=place), asked.start
    problem, (U, A, b) = begun.problem, begun.network
    # The sketch's key is the call's, so that a solve which goes on from a state sketches what the whole one would have.
    sketch_key, key = jax.random.split(begun.key)
    damping, last = problem.rho, refreshed.unmoved(U, A, b)
    if isinstance(start, RefreshedState):
        damping, key, moved = start.damping, start.key, start.last
        last = last._replace(U=problem.basis.lift(moved.kernel1, moved.bias1), b=moved.bias2)
        last = last if last.W is None else last._replace(W=moved.kernel2)
    prepared = gauss_newton.prepare(problem.rows, U.shape[1], sketch_key, problem.refreshed)
    first = refreshed.init(problem.rows, U, A, b, problem.beta, damping, last)
    if start is None:
        begun = begun._replace(before=first.objective / problem.total_weight)
    return begun.with_targets(None), prepared, first, key


def _end(
    begun: Begun, ended: Ended, features: Float[Array, "n p"] | Blocks, targets: Float[Array, "n C"], weight: RowVector
) -> Solution:
    """The network in the user's units, and the figures."""
    problem, (rows, basis) = begun.problem, (begun.problem.rows, begun.problem.basis)
    weight = normalised(weight)
    # The way to the solver's coordinates and back rounds; what is promised is promised of the network itself.
    found = dataclasses.replace(begun.params, **vars(to_network(rows, basis, *ended.network, begun.D)))

    def loss(params: Network) -> Scalar:
        return regularised_loss(params, features, targets, weight, begun.user_beta, rows.loss)

    before, after = loss(begun.params) if begun.before is None else begun.before, loss(found)
    is_kept = jnp.isfinite(before) & (after <= before)
    params = jax.tree.map(lambda new, old: jnp.where(is_kept, new, old), found, begun.params)
    lives = jnp.any(params.kernel2 != 0, axis=1) & jnp.any(params.kernel1 != 0, axis=0)
    stats = Stats(
        objective=jnp.where(is_kept, after, before),
        initial_objective=before,
        null_loss=begun.null / problem.total_weight,
        beta=begun.user_beta,
        active_neurons=jnp.sum(lives, dtype=jnp.int32),
        **ended.figures,
    )
    status = jnp.where(jnp.isfinite(before), ended.status, Status.nonfinite).astype(jnp.int32)
    return Solution(params, status, stats, ended.state_of(params))


def _end_refreshed(
    begun: Begun, now: refreshed.Iterate, done: Array, stagnated: Array, key: Array, *data: Any
) -> Solution:
    """The same after a descent, whose last gates are certified first where that is asked for."""
    problem = begun.problem
    # The trace is not part of the program, which would be another one for every length of it.
    shown = {"iterations": done, "cg_steps": now.cg_steps, "objective_trace": now.objective}
    if problem.certify_iters:
        params = to_network(problem.rows, problem.basis, now.U, now.A, now.b, now.Z)
        other = problem.rotated() if problem.linear_solver.on_eigenbasis else problem
        program = program_of(other, *from_network(params, other.rows, other.basis), key)
        shown |= figures(other, solve_program(other, *program, key, other.certify_iters, other.certify_iters + 1))
    W = jnp.zeros_like(now.A) if now.last.W is None else now.last.W
    last = TwoLayer(*problem.basis.lower(now.last.U), W, now.last.b)
    ended = Ended(
        (now.U, now.A, now.b, now.Z),
        status=jnp.where(stagnated, Status.stationary, Status.max_iters),
        figures=shown,
        state_of=lambda params: RefreshedState(params, now.damping, key, last),
    )
    return _end(begun, ended, *data)


def _held(asked: Asked, until: Int[Array, ""], *, hidden: int, length: int) -> Solution:
    """The whole solve with held gates: at most ``until`` iterations, and traces of this length."""
    begun = _begin(asked, hidden=hidden)
    ended = held(begun.problem, begun.network, begun.D, asked.start, begun.key, until, length)
    return _end(begun, ended, asked.features, asked.targets, asked.weight)


def _figures(now: refreshed.Iterate, done: Array, total: Scalar) -> dict[str, Array]:
    """What a callback is told of a step."""
    active = jnp.sum(~dead(now.U), dtype=jnp.int32)
    return {"iteration": done, "objective": now.objective / total, "active_neurons": active}


begin_refreshed, end_refreshed = Stage(_begin_refreshed, few=ONCE), Stage(_end_refreshed, few=ONCE)
held_solve, figures_of = Stage(_held), Stage(_figures, few=ONCE)


def _solve_held(asked: Asked, *, hidden: int, max_iters: int) -> Solution:
    """Solve with held gates."""
    control = control_of(asked)
    shown = max_iters + 1
    # Compiled for the length of its traces: for one that many numbers of iterations share.
    length = max(_LEAST_TRACE, 1 << int(max_iters).bit_length()) if control is OnHost else shown
    solution = control.run(held_solve, asked, control.back(np.int32(max_iters)), hidden=hidden, length=length)
    if control is not OnHost:
        return solution
    stats = solution.stats
    traces = {"objective_trace": stats.objective_trace, "lower_bound_trace": stats.lower_bound_trace}
    cut = {name: control.beside(trace[:shown], stats.objective) for name, trace in control.seen(traces).items()}
    return with_stats(solution, **cut)


def _padded(asked: Asked) -> Asked:
    """The same with its rows padded to a size that others share, where that can be done."""
    data = padded((asked.features, asked.targets, asked.weight), asked.solver.refreshed)
    if data is None:
        return asked
    features, targets, weight = data
    length = on_device(np.int32(len(asked.targets))) if asked.length is None else asked.length
    return asked._replace(features=features, targets=targets, weight=weight, length=length)


def solve(asked: Asked, *, hidden: int, max_iters: int, patience: int | None = None) -> Solution:
    """Solve.

    Args:
        asked: data, settings and start.
        hidden: neurons of a random network.
        max_iters: most iterations.
        patience: of a refreshed solve without ``tol``, see :class:`Limits`; None for that of a problem of this size.
    """
    if asked.solver.gates != "refreshed":
        return _solve_held(asked, hidden=hidden, max_iters=max_iters)
    control, progress = control_of(asked), asked.progress
    n = len(asked.targets if asked.order is None else asked.order)
    n = n if asked.length is None else int(on_host(asked.length))
    if control is OnHost and asked.order is None:
        asked = _padded(asked)
    if control is OnHost:
        asked = asked._replace(targets=beside_rows(asked.targets, asked.features))
    place = place_of_rows(asked.features) if control is OnHost else None
    begun, prepared, first, key = control.run(begin_refreshed, asked, hidden=hidden, place=place)
    begun = begun.with_targets(asked.targets)
    problem, settings = begun.problem, begun.problem.refreshed
    rows, beta, total = problem.rows, problem.beta, problem.total_weight
    rows = rows.in_pieces(first.A.shape[0]) if control is OnHost else rows
    tol, total_seen, null = control.seen((problem.tol, total, begun.null))
    if not isinstance(asked.start, RefreshedState):
        is_far = control.seen(first.objective) / _FAR > null
        first = control.cond(is_far, lambda: control.run(refreshed.shrunk, rows, beta, first), lambda: first)
    if asked.start is None:
        first, key = descent.warm_up(control, rows, prepared, beta, first, key, tol, settings)

    def tell(now: Descent) -> None:
        if progress is not None:
            control.report(progress, control.run(figures_of, now.iterate, control.back(now.done), total))

    limits = Limits(tol, max_iters)
    if asked.solver.tol is None:
        d, (m, C) = rows.X.shape[1], first.A.shape
        patience = descent.patience(n, d, m, C, settings) if patience is None else patience
        if patience <= max_iters:
            limits = limits._replace(null=null, patience=patience)
    start = descent.begin(control, n, first, key, limits, settings)
    last = descent.descend(control, rows, prepared, beta, limits, start, settings, tell)
    done, stagnated = control.back((last.done, last.stagnated))
    data = asked.features, asked.targets, asked.weight
    solution = control.run(end_refreshed, begun, last.iterate, done, stagnated, last.key, *data)
    trace = control.beside(last.trace / total_seen, solution.stats.objective)
    return with_stats(solution, objective_trace=trace)
