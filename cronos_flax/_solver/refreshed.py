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
from jaxtyping import Array, Bool, Float, Int

from cronos_flax._solver import gauss_newton
from cronos_flax._solver.blocks import Blocks, adjoint
from cronos_flax._solver.coordinates import Rows
from cronos_flax._solver.gauss_newton import (
    LocalModel,
    Prepared,
    Step,
    direction,
    floored,
    gradient,
    places,
    sample_size,
)
from cronos_flax._solver.program import dead, network_objective, network_outputs, norms, random_neurons, unit_rows
from cronos_flax._solver.settings import Refreshed
from cronos_flax._solver.staging import EVERY_STEP, ONCE, SOME_STEPS, Control, Program
from cronos_flax._solver.types import Activations, Bias, Directions, Neurons, Scalar

_QUARTERED = 30  # how often outputs that are too large may be divided by four


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["U", "A", "b", "Z", "objective", "has_dead", "damping", "cg_steps", "last"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Iterate:
    """What one step hands to the next.

    Network, ``Z = X U``, objective, whether there are dead neurons, damping μ, CG steps so far, and the last step.
    """

    U: Neurons
    A: Directions
    b: Bias
    Z: Activations
    objective: Scalar
    has_dead: Bool[Array, ""]
    damping: Scalar
    cg_steps: Int[Array, ""]
    last: Step


def unmoved(U: Neurons, A: Directions, b: Bias) -> Step:
    """The last step of a network that has not made one."""
    U, A, b = jax.tree.map(jnp.zeros_like, (U, A, b))
    return Step(U, A if A.shape[1] > 1 else None, b)


def init(rows: Rows, U: Neurons, A: Directions, b: Bias, beta: Scalar, damping: Scalar, last: Step) -> Iterate:
    """The iterate for a start from the network (U, A, b), after this last step."""
    Z = rows.X @ U
    objective = network_objective(rows, A, b, beta, U, Z)
    return Iterate(U, A, b, Z, objective, jnp.any(dead(U)), damping, jnp.zeros((), jnp.int32), last)


def _shrunk(rows: Rows, beta: Scalar, iterate: Iterate) -> Iterate:
    """The iterate with its outputs nearer to the best constant: at a power of four of the distance, or at none of it.

    Of these, the one of least objective. A network whose outputs are thousands of times too large, as fresh weights on
    large features have, would take hundreds of steps to get there.
    """
    constant = None if iterate.b is None else rows.best_constant()

    def at(share: Scalar) -> tuple[Neurons, Bias, Activations]:
        b = None if iterate.b is None or constant is None else constant + share * (iterate.b - constant)
        return share * iterate.U, b, share * iterate.Z

    def objective(share: Scalar) -> Scalar:
        U, b, Z = at(share)
        return network_objective(rows, iterate.A, b, beta, U, Z)

    shares = jnp.asarray([*(0.25**k for k in range(_QUARTERED)), 0.0], iterate.U.dtype)
    values = jax.lax.map(objective, shares)
    best = jnp.argmin(jnp.where(jnp.isfinite(values), values, jnp.inf))
    U, b, Z = at(shares[best])
    return dataclasses.replace(iterate, U=U, b=b, Z=Z, objective=values[best], has_dead=jnp.any(dead(U)))


shrunk = Program(_shrunk, few=ONCE)


def on_gates_of(probe: Activations, rows: Rows, iterate: Iterate) -> Iterate:
    """The iterate with dead neurons at zero, on the gates of a probe, and pointing where the probe lowers the loss.

    Z there is that of the probe.
    """
    is_dead = dead(iterate.U)
    U, Z = jnp.where(is_dead[None, :], 0, iterate.U), jnp.where(is_dead[None, :], probe, iterate.Z)
    lives = norms(U) > 0
    outputs = network_outputs(rows, iterate.A, iterate.b, jnp.where(lives[None, :], Z, 0))
    lower = unit_rows(-adjoint(jax.nn.relu(Z), rows.center(rows.gradient(outputs))), iterate.A)
    return dataclasses.replace(iterate, U=U, Z=Z, A=jnp.where(lives[:, None], iterate.A, lower))


def _revived(rows: Rows, iterate: Iterate, key: Array) -> Iterate:
    """The iterate with dead neurons on random gates."""
    return on_gates_of(rows.X @ random_neurons(key, iterate.U), rows, iterate)


revived = Program(_revived, few=ONCE)


def search(
    objective: Callable[[Scalar], Scalar],
    estimate: Callable[[Scalar], Scalar] | None,
    now: Scalar,
    settings: Refreshed,
) -> tuple[Array, Scalar]:
    """The step length of least estimated objective, or the next shorter one that lowers the objective.

    Without an estimate the objective itself is tried at every length, and the least taken. Returns the index of the
    length in their list, whose last is 0, and the objective there.
    """
    lengths = jnp.asarray(settings.step_lengths, now.dtype)
    values = jax.lax.map(objective if estimate is None else estimate, lengths)
    first = jnp.argmin(jnp.where(jnp.isfinite(values), values, jnp.inf))
    if estimate is None:  # what no length lowers, a shorter one does not
        chosen = jnp.where(values[first] < now, first, len(lengths) - 1)
        return chosen, values[chosen]

    def rises(carry: tuple) -> Array:
        index, value = carry
        return ~(value < now) & (index < len(lengths) - 1)

    def shorten(carry: tuple) -> tuple:
        index, _ = carry
        return index + 1, objective(lengths[index + 1])

    return jax.lax.while_loop(rises, shorten, (first - 1, jnp.full_like(now, jnp.inf)))


def step(
    rows: Rows,
    prepared: Prepared,
    beta: Scalar,
    iterate: Iterate,
    alive: Iterate,
    index: Int[Array, " k"] | None,
    tried: Int[Array, " l"] | None,
    precise: Array | bool | None,
    *,
    settings: Refreshed,
    known: bool | None = None,
) -> Iterate:
    """One step; the objective of the result is never above that of ``iterate``.

    Args:
        rows: the data.
        prepared: what all steps share.
        beta: β.
        iterate: where the step starts from.
        alive: the same with its dead neurons :func:`revived`; only the sum of reviving and step has to go down.
        index: rows that the curvature is taken from; None for all.
        tried: rows that lengths are compared on, before all have the last word; None for all.
        precise: whether the step is found precisely, with the curvature of all rows; None where it is `known`.
        settings: constants.
        known: the same, where it is known when the step is compiled.
    """
    U, A, b = jnp.where((norms(alive.U) > prepared.least)[None, :], alive.U, 0), alive.A, alive.b
    D, Z = alive.Z > 0, jnp.where((norms(U) > 0)[None, :], alive.Z, 0)
    size = floored(U, settings)
    H = jnp.where(D, Z, 0) / size[None, :] if A.shape[1] > 1 else None
    model = LocalModel(rows, D, H, A, network_outputs(rows, A, b, Z), 1.0)
    sampled = model if index is None else model.take(index)
    g = gradient(model, beta, U)
    decided = known if precise is None else precise
    assert decided is not None
    last = iterate.last._replace(U=jnp.where((norms(U) > 0)[None, :], iterate.last.U, 0))
    delta, cg_steps = direction(model, sampled, prepared, beta, iterate.damping, U, g, last, decided, settings)
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

    estimate = None
    if tried is not None:
        some, share = rows.take(tried), beta * (len(tried) / rows.count)
        at = rows.sample(tried)
        Z_some, Z_delta_some = at.take(Z), at.take(Z_delta)

        def estimate(length: Scalar) -> Scalar:
            U, A, b = moved(length)
            return network_objective(some, A, b, share, U, Z_some + length * Z_delta_some)

    chosen, value = search(objective, estimate, iterate.objective, settings)
    length = jnp.asarray(settings.step_lengths, U.dtype)[chosen]
    damping = iterate.damping * jnp.asarray(settings.damping_factors, U.dtype)[chosen]
    U, A, b = moved(length)
    growth = jnp.linalg.norm(A, axis=1)
    U = U * growth[None, :]
    after = Iterate(
        U=U,
        A=A / growth[:, None],
        b=b,
        Z=(Z + length * Z_delta) * growth[None, :],
        objective=value,
        has_dead=jnp.any(dead(U)),
        damping=jnp.clip(damping, *settings.damping_range),
        cg_steps=iterate.cg_steps + cg_steps,
        last=jax.tree.map(lambda part: length * part, delta._replace(U=delta.U * growth[None, :])),
    )
    stayed = dataclasses.replace(iterate, damping=after.damping, cg_steps=after.cg_steps)
    falls = (length > 0) & (value < iterate.objective)  # at length 0, where no step is the last, it may by rounding
    return jax.tree.map(lambda new, old: jnp.where(falls, new, old), after, stayed)


class Limits(NamedTuple):
    """When a descent ends.

    Args:
        tol: relative decrease over ``settings.window`` precise iterations, below which it ends.
        max_iters: most iterations.
        null: loss of the best constant output, in sums over rows; None where only ``tol`` and ``max_iters`` end it.
        patience: iterations that must bring ``settings.least_gain`` of what the network explains, ``null − objective``;
            precise ones are counted from their first on.
    """

    tol: Scalar
    max_iters: int
    null: Scalar | None = None
    patience: int = 0


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["iterate", "has_dead", "key", "trace", "done", "since", "precise", "stagnated", "goes_on"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Descent:
    """Where the loop stands; all but iterate and key is NumPy's where the loop runs on the host.

    Args:
        iterate: the network.
        has_dead: whether there are neurons to revive before the next step.
        key: of what is drawn from here on.
        trace: objectives from the start to here; entries after the last repeat it.
        done: steps done.
        since: the step at which they became precise.
        precise: whether the next step takes its curvature from all rows.
        stagnated: whether the loss has stopped to fall.
        goes_on: whether there is a next step.
    """

    iterate: Iterate
    has_dead: Bool[Array, ""]
    key: Array
    trace: Float[Array, " k"]
    done: Int[Array, ""]
    since: Int[Array, ""]
    precise: Bool[Array, ""]
    stagnated: Bool[Array, ""]
    goes_on: Bool[Array, ""]


def patience(n: int, d: int, m: int, C: int, settings: Refreshed) -> int:
    """Iterations that must bring something: a window, or as many as have so many products that they cost something."""
    return max(settings.window, -(-settings.window_products // (n * m * (d + C))))


def begin(control: Control, n: int, iterate: Iterate, key: Array, limits: Limits, settings: Refreshed) -> Descent:
    """A descent on n rows that has not done a step; on very few it is precise from the start."""
    xp = control.xp
    objective, has_dead = control.seen((iterate.objective, iterate.has_dead))
    return Descent(
        iterate,
        has_dead,
        key,
        trace=xp.full(limits.max_iters + 1, objective),
        done=xp.zeros((), xp.int32),
        since=xp.zeros((), xp.int32),
        precise=xp.asarray(n <= settings.least_sample),
        stagnated=xp.zeros((), bool),
        goes_on=xp.isfinite(objective),
    )


def judged(
    control: Control, now: Descent, iterate: Iterate, key: Array, limits: Limits, settings: Refreshed
) -> Descent:
    """The descent one step further, at this iterate."""
    xp = control.xp
    objective, has_dead = control.seen((iterate.objective, iterate.has_dead))
    done = now.done + xp.int32(1)
    trace = xp.where(xp.arange(len(now.trace), dtype=xp.int32) >= done, objective, now.trace)

    def fall_over(steps: int) -> Any:
        return trace[xp.maximum(done - xp.int32(steps), xp.int32(0))] - objective

    fall = fall_over(settings.window)
    is_due = done >= now.since + xp.int32(settings.window)
    stagnated = now.precise & is_due & (fall <= limits.tol * objective)
    if limits.null is not None:
        least = xp.asarray(settings.least_gain, objective.dtype) * (limits.null - objective)
        is_over = done >= now.since + xp.int32(limits.patience)
        stagnated = stagnated | (is_over & (fall_over(limits.patience) <= least))
    precise = now.precise | (is_due & (fall <= xp.asarray(settings.sampled_tol, objective.dtype) * objective))
    return Descent(
        iterate,
        has_dead,
        key,
        trace,
        done,
        since=xp.where(precise & ~now.precise, done, now.since),
        precise=precise,
        stagnated=stagnated,
        goes_on=(done < limits.max_iters) & ~stagnated & xp.isfinite(objective),
    )


def _drawn(
    key: Array,
    order: Int[Array, " n"] | None,
    length: Int[Array, ""] | None,
    *,
    n: int,
    settings: Refreshed,
) -> tuple[Array, Array, Int[Array, " k"] | None, Int[Array, " l"] | None]:
    """The next key, the key of the probes, the rows of the curvature and those to try lengths on; None for all.

    Of n places, as :func:`places` takes them.
    """
    key, probe_key, sample_key = jax.random.split(key, 3)
    index = places(n, sample_size(n, settings), sample_key, order, length)
    tried = places(n, min(n, settings.least_sample), sample_key, order, length) if index is None else index
    return key, probe_key, index, tried


drawn = Program(_drawn, few=ONCE)
stepped, stepped_in_warm_up = Program(step, few=EVERY_STEP), Program(step, few=SOME_STEPS)


def descend(
    control: Control,
    rows: Rows,
    prepared: Prepared,
    beta: Scalar,
    limits: Limits,
    start: Descent,
    settings: Refreshed,
    tell: Callable[[Descent], None] = lambda _: None,
    stepped: Program = stepped,
) -> Descent:
    """Step until the loss stagnates or ``limits.max_iters``; ``tell`` is called after every step.

    Steps take their curvature from a sample of the rows until that leads no further, and then from all of them.
    ``stepped`` is the program of a step.
    """

    def body(now: Descent) -> Descent:
        draws = now.key, rows.order, rows.length
        key, probe_key, index, tried = control.run(drawn, *draws, n=rows.places, settings=settings)
        alive = control.cond(
            now.has_dead, lambda: control.run(revived, rows, now.iterate, probe_key), lambda: now.iterate
        )
        # With a sample this is two programs, the second of which may never be asked for.
        known = None if index is None else control.known(now.precise)
        precise = control.back(now.precise) if known is None else None
        iterate = control.run(
            stepped, *(rows, prepared, beta, now.iterate, alive, index, tried, precise), settings=settings, known=known
        )
        after = judged(control, now, iterate, key, limits, settings)
        tell(after)
        return after

    return control.while_loop(lambda now: now.goes_on, body, start)


class Point(NamedTuple):
    """What of an iterate does not depend on the rows."""

    U: Neurons
    A: Directions
    b: Bias
    damping: Scalar
    last: Step


def _few(rows: Rows, at: Point, beta: Scalar, key: Array, *, size: int) -> tuple[Rows, Scalar, Iterate, Array]:
    """Some of the rows, their share of β, the iterate on them, and the next key."""
    key, sample_key = jax.random.split(key)
    some = gauss_newton.sample(rows, sample_key, size)
    share = beta * size / rows.count
    return some, share, init(some, at.U, at.A, at.b, share, at.damping, at.last), key


def point(now: Iterate) -> Point:
    """Where an iterate is."""
    return Point(now.U, now.A, now.b, now.damping, now.last)


def _better(rows: Rows, beta: Scalar, start: Iterate, found: Point) -> Iterate:
    """The better one of an iterate and what was found on other rows."""
    there = init(rows, found.U, found.A, found.b, beta, found.damping, found.last)
    return jax.tree.map(lambda new, old: jnp.where(there.objective < start.objective, new, old), there, start)


few, better = Program(_few, few=ONCE), Program(_better, few=ONCE)


def warm_up(
    control: Control,
    rows: Rows,
    prepared: Prepared,
    beta: Scalar,
    start: Iterate,
    key: Array,
    tol: Scalar,
    settings: Refreshed,
) -> tuple[Iterate, Array]:
    """A few steps, each on few rows: from a random start these lead about as far as steps on all of them.

    Every step draws its rows anew, for many classes have few rows each, and several steps on the same ones fit these
    alone. Rows on disk are drawn once, as every draw reads the disk.
    """
    n = rows.places
    size = min(n // settings.warm_up_every, settings.most_sample)
    if size < settings.least_warm_up:
        return start, key
    settings = dataclasses.replace(settings, few_rows=1)  # the curvature of a few of these will do
    draws, steps = (1, settings.warm_up_steps) if isinstance(rows.X, Blocks) else (settings.warm_up_steps, 1)
    limits = Limits(tol, steps)

    def body(now: tuple[Any, Point, Array]) -> tuple[Any, Point, Array]:
        drawn, at, key = now
        some, share, first, key = control.run(few, rows, at, beta, key, size=size)
        descent = begin(control, size, first, key, limits, settings)
        last = descend(control, some, prepared, share, limits, descent, settings, stepped=stepped_in_warm_up)
        return drawn + control.xp.int32(1), point(last.iterate), last.key

    begun = control.xp.int32(0), point(start), key
    _, found, key = control.while_loop(lambda now: now[0] < draws, body, begun)
    return control.run(better, rows, beta, start, found), key
