"""The refreshed path, step after step: what is drawn for each, when it ends, and the first steps on few rows."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from cronos_flax._solver import gauss_newton
from cronos_flax._solver.blocks import Blocks
from cronos_flax._solver.coordinates import Rows
from cronos_flax._solver.gauss_newton import Prepared, Step, places, sample_size
from cronos_flax._solver.refreshed import Iterate, init, revived, stepped, stepped_in_warm_up
from cronos_flax._solver.settings import Refreshed
from cronos_flax._solver.staging import ONCE, Control, Stage
from cronos_flax._solver.types import Bias, Directions, Neurons, Scalar


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
    size = xp.abs(objective)  # a loss of the user's own may be negative
    stagnated = now.precise & is_due & (fall <= limits.tol * size)
    if limits.null is not None:
        least = xp.asarray(settings.least_gain, objective.dtype) * (limits.null - objective)
        is_over = done >= now.since + xp.int32(limits.patience)
        stagnated = stagnated | (is_over & (fall_over(limits.patience) <= least))
    precise = now.precise | (is_due & (fall <= xp.asarray(settings.sampled_tol, objective.dtype) * size))
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


drawn = Stage(_drawn, few=ONCE)


def descend(
    control: Control,
    rows: Rows,
    prepared: Prepared,
    beta: Scalar,
    limits: Limits,
    start: Descent,
    settings: Refreshed,
    tell: Callable[[Descent], None] = lambda _: None,
    stepped: Stage = stepped,
) -> Descent:
    """Step until the loss stagnates or ``limits.max_iters``; ``tell`` is called after every step.

    Steps take their curvature from a sample of the rows until that leads no further, and then from all of them.
    ``stepped`` is the stage of a step.
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


few, better = Stage(_few, few=ONCE), Stage(_better, few=ONCE)


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
