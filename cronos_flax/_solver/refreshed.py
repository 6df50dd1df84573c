"""The refreshed path (method.md, "Refreshed gates"): gates renewed at every step, so the loss can only fall.

Each step is Levenberg–Marquardt's (:mod:`cronos_flax._solver.gauss_newton`), followed by a line search on the
regularised loss of the network. The damping μ follows the line search, so nothing needs to be tuned. All rows are
needed twice a step: for the gradient, and for where the step leads.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from cronos_flax._solver import gauss_newton, held, host
from cronos_flax._solver.coordinates import Rows
from cronos_flax._solver.gauss_newton import LocalModel, Prepared, direction, floored, gradient, sample, sample_size
from cronos_flax._solver.problem import Ended, Problem
from cronos_flax._solver.program import (
    dead,
    from_network,
    network_objective,
    network_outputs,
    norms,
    random_neurons,
    to_network,
    unit_rows,
)
from cronos_flax._solver.settings import Refreshed
from cronos_flax._solver.solution import RefreshedState, Status
from cronos_flax._solver.types import Activations, Bias, Directions, Neurons, Scalar


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["U", "A", "b", "Z", "objective", "damping", "key", "cg_steps"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Iterate:
    """What one step hands to the next: network, ``Z = X U``, objective, damping μ, key, CG steps so far."""

    U: Neurons
    A: Directions
    b: Bias
    Z: Activations
    objective: Scalar
    damping: Scalar
    key: Array
    cg_steps: Int[Array, ""]


def init(rows: Rows, U: Neurons, A: Directions, b: Bias, beta: Scalar, damping: Scalar, key: Array) -> Iterate:
    """The iterate for a start from the network (U, A, b)."""
    Z = rows.X @ U
    objective = network_objective(rows, A, b, beta, U, Z)
    return Iterate(U, A, b, Z, objective, damping, key, jnp.zeros((), jnp.int32))


def revive(rows: Rows, iterate: Iterate, key: Array) -> Iterate:
    """The iterate with dead neurons at zero, on random gates: Z there is that of a probe."""
    is_dead = dead(iterate.U)
    Z = jax.lax.cond(
        jnp.any(is_dead),
        lambda: jnp.where(is_dead[None, :], rows.X @ random_neurons(key, iterate.U), iterate.Z),
        lambda: iterate.Z,
    )
    return dataclasses.replace(iterate, U=jnp.where(is_dead[None, :], 0, iterate.U), Z=Z)


def search(
    objective: Callable[[Scalar], Scalar], estimate: Callable[[Scalar], Scalar], now: Scalar, settings: Refreshed
) -> tuple[Array, Scalar]:
    """The step length of least estimated objective, or the next shorter one that lowers the objective.

    Returns its index in the list of lengths, whose last is 0, and the objective there.
    """
    lengths = jnp.asarray(settings.step_lengths, now.dtype)
    values = jax.lax.map(estimate, lengths)
    first = jnp.argmin(jnp.where(jnp.isfinite(values), values, jnp.inf))

    def rises(carry: tuple) -> Array:
        index, value = carry
        return ~(value < now) & (index < len(lengths) - 1)

    def shorten(carry: tuple) -> tuple:
        index, _ = carry
        return index + 1, objective(lengths[index + 1])

    return jax.lax.while_loop(rises, shorten, (first, objective(lengths[first])))


def step(
    rows: Rows, prepared: Prepared, beta: Scalar, iterate: Iterate, precise: Array | bool, settings: Refreshed
) -> Iterate:
    """One step; the objective of the result is never above that of ``iterate``."""
    key, probe_key, sample_key = jax.random.split(iterate.key, 3)
    revived = revive(rows, iterate, probe_key)
    U, A, b = revived.U, revived.A, revived.b
    D, lives = revived.Z > 0, norms(U) > 0
    Z = jnp.where(lives[None, :], revived.Z, 0)
    outputs = network_outputs(rows, A, b, Z)
    # A revived neuron points where its probe lowers the loss.
    A = jax.lax.cond(
        jnp.all(lives),
        lambda: A,
        lambda: jnp.where(
            lives[:, None], A, unit_rows(-jax.nn.relu(revived.Z).T @ rows.center(rows.gradient(outputs)), A)
        ),
    )

    n, size = rows.Y.shape[0], floored(U, settings)
    H = jnp.where(D, Z, 0) / size[None, :] if A.shape[1] > 1 else None
    model = LocalModel(rows, D, H, A, outputs, 1.0)
    some, index = sample(rows, sample_key, sample_size(n, settings))
    sampled = model if some is rows else model.take(some, index)
    g = gradient(model, beta, U)
    delta, cg_steps = direction(model, sampled, prepared, beta, iterate.damping, U, g, precise, settings)
    A_delta = jnp.zeros_like(A) if delta.W is None else delta.W / size[:, None]
    Z_delta = rows.X @ delta.U

    def moved(length: Scalar) -> tuple[Neurons, Directions, Bias]:
        return (
            U + length * delta.U,
            A + length * A_delta,
            None if b is None or delta.b is None else b + length * delta.b,
        )

    def objective(length: Scalar) -> Scalar:
        U, A, b = moved(length)
        return network_objective(rows, A, b, beta, U, Z + length * Z_delta)

    def estimate(length: Scalar) -> Scalar:
        U, A, b = moved(length)
        return network_objective(some, A, b, beta / sampled.stretch, U, Z[index] + length * Z_delta[index])

    chosen, value = search(objective, estimate, iterate.objective, settings)
    length = jnp.asarray(settings.step_lengths, U.dtype)[chosen]
    damping = iterate.damping * jnp.asarray(settings.damping_factors, U.dtype)[chosen]
    U, A, b = moved(length)
    growth = jnp.linalg.norm(A, axis=1)
    after = Iterate(
        U=U * growth[None, :],
        A=A / growth[:, None],
        b=b,
        Z=(Z + length * Z_delta) * growth[None, :],
        objective=value,
        damping=jnp.clip(damping, *settings.damping_range),
        key=key,
        cg_steps=iterate.cg_steps + cg_steps,
    )
    # Reviving comes before the line search; only their sum has to go down.
    stayed = dataclasses.replace(iterate, damping=after.damping, key=key, cg_steps=after.cg_steps)
    return jax.tree.map(lambda new, old: jnp.where(value < iterate.objective, new, old), after, stayed)


def warm_up(rows: Rows, prepared: Prepared, beta: Scalar, start: Iterate, settings: Refreshed) -> Iterate:
    """A few steps on few rows: from a random start these lead about as far as steps on all of them."""
    n = rows.Y.shape[0]
    size = min(n // settings.warm_up_every, settings.most_sample)
    if size < settings.least_warm_up:
        return start
    key, sample_key = jax.random.split(start.key)
    few, _ = sample(rows, sample_key, size)
    share = beta * size / n
    first = init(few, start.U, start.A, start.b, share, start.damping, key)

    def advance(_: int, iterate: Iterate) -> Iterate:
        return step(few, prepared, share, iterate, False, settings)

    last = jax.lax.fori_loop(0, settings.warm_up_steps, advance, first)
    warm = init(rows, last.U, last.A, last.b, beta, last.damping, last.key)
    return jax.tree.map(lambda new, old: jnp.where(warm.objective < start.objective, new, old), warm, start)


class Descent(NamedTuple):
    """Where the loop stands: steps done, whether they have become precise, and since which, iterate and trace."""

    done: Int[Array, ""]
    precise: Array
    since: Int[Array, ""]
    iterate: Iterate
    trace: Float[Array, " k"]


def run(
    rows: Rows,
    prepared: Prepared,
    beta: Scalar,
    start: Iterate,
    *,
    tol: Scalar,
    max_iters: int,
    settings: Refreshed,
    tell: Callable[[Int[Array, ""], Iterate], None],
) -> tuple[Iterate, Array, Int[Array, ""], Float[Array, " k"]]:
    """Step until the loss stagnates or ``max_iters``: the iterate, whether it stagnated, steps done, the trace.

    Steps take their curvature from a sample of the rows until that leads no further, and then from all of them.
    ``tell`` is called with the steps done and every iterate.
    """
    index = jnp.arange(max_iters + 1, dtype=jnp.int32)

    def stagnates(now: Descent, tol: Scalar | float) -> Array:
        loss, earlier = now.trace[now.done], now.trace[jnp.maximum(now.done - settings.window, 0)]
        return (now.done >= now.since + settings.window) & (earlier - loss <= tol * loss)

    def unfinished(now: Descent) -> Array:
        ended = now.precise & stagnates(now, tol)
        return (now.done < max_iters) & ~ended & jnp.isfinite(now.iterate.objective)

    def body(now: Descent) -> Descent:
        precise = now.precise | stagnates(now, settings.sampled_tol)
        iterate = step(rows, prepared, beta, now.iterate, precise, settings)
        tell(now.done + 1, iterate)
        return Descent(
            done=now.done + 1,
            precise=precise,
            since=jnp.where(precise & ~now.precise, now.done, now.since),
            iterate=iterate,
            trace=jnp.where(index > now.done, iterate.objective, now.trace),
        )

    zero, n = jnp.zeros((), jnp.int32), rows.Y.shape[0]
    first = Descent(
        zero, jnp.asarray(sample_size(n, settings) == n), zero, start, jnp.full(max_iters + 1, start.objective)
    )
    last = jax.lax.while_loop(unfinished, body, first)
    return last.iterate, last.precise & stagnates(last, tol), last.done, last.trace


def refreshed(problem: Problem, network: tuple[Neurons, Directions, Bias], start: Any, key: Array) -> Ended:
    """Descend on the network's own loss, gates renewed at every step."""
    rows, settings = problem.rows, problem.refreshed
    # The sketch's key is the call's, so that a solve which goes on from a state sketches what the whole one would have.
    sketch_key, key = jax.random.split(key)
    damping, key = (start.damping, start.key) if isinstance(start, RefreshedState) else (problem.rho, key)
    prepared = gauss_newton.prepare(rows, network[0].shape[1], sketch_key, settings)
    first = init(rows, *network, problem.beta, damping, key)
    if start is None:
        first = warm_up(rows, prepared, problem.beta, first, settings)

    def tell(done: Array, iterate: Iterate) -> None:
        host.report(
            problem.progress,
            iteration=done,
            objective=iterate.objective / problem.total_weight,
            active_neurons=jnp.sum(~dead(iterate.U)),
        )

    last, stagnated, done, trace = run(
        rows, prepared, problem.beta, first, tol=problem.tol, max_iters=problem.max_iters, settings=settings, tell=tell
    )
    figures = {"iterations": done, "cg_steps": last.cg_steps, "objective_trace": trace / problem.total_weight}
    if problem.certify_iters:
        params = to_network(rows, problem.basis, last.U, last.A, last.b, last.Z)
        if problem.linear_solver.on_eigenbasis:
            problem = problem.rotated()
        program = held.program_of(problem, *from_network(params, problem.rows, problem.basis), key)
        figures |= held.figures(problem, held.solve_program(problem, *program, key, problem.certify_iters))
    return Ended(
        (last.U, last.A, last.b, last.Z),
        status=jnp.where(stagnated, Status.stationary, Status.max_iters),
        figures=figures,
        state_of=lambda params: RefreshedState(params, last.damping, last.key),
    )
