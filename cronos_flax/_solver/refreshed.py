"""One step of the refreshed path (method.md, "Refreshed gates"): gates are renewed at each, so the loss can only fall.

A step is Levenberg–Marquardt's (:mod:`cronos_flax._solver.gauss_newton`), followed by a line search on the
regularised loss of the network. The damping μ follows the line search, so nothing needs to be tuned. All rows are
needed twice a step: for the gradient, and for where the step leads.
"""

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from cronos_flax._solver.blocks import adjoint
from cronos_flax._solver.coordinates import Rows
from cronos_flax._solver.gauss_newton import (
    Here,
    LocalModel,
    Prepared,
    Step,
    direction,
    floored,
    gradient,
)
from cronos_flax._solver.numerics import best_of, least
from cronos_flax._solver.program import (
    dead,
    network_objective,
    network_outputs,
    norms,
    objective_of,
    random_neurons,
    unit_rows,
)
from cronos_flax._solver.settings import Refreshed
from cronos_flax._solver.staging import EVERY_STEP, ONCE, SOME_STEPS, Stage
from cronos_flax._solver.types import Activations, Bias, Directions, Neurons, Outputs, Scalar

_REVIVED, _REVIVED_SHARE = 16, 8  # so many neurons at once, or one in so many, if these are more
_QUARTERED = 30  # how often outputs that are too large may be divided by four


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["U", "A", "b", "Z", "outputs", "objective", "has_dead", "damping", "cg_steps", "last"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Iterate:
    """What one step hands to the next.

    Network, ``Z = X U``, outputs, objective, whether there are dead neurons, damping μ, CG steps so far, last step.
    """

    U: Neurons
    A: Directions
    b: Bias
    Z: Activations
    outputs: Outputs
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
    outputs = network_outputs(rows, A, b, Z)
    return Iterate(
        U=U,
        A=A,
        b=b,
        Z=Z,
        outputs=outputs,
        objective=objective_of(rows, outputs, A, beta, U),
        has_dead=jnp.any(dead(U)),
        damping=damping,
        cg_steps=jnp.zeros((), jnp.int32),
        last=last,
    )


def _shrunk(rows: Rows, beta: Scalar, iterate: Iterate) -> Iterate:
    """The iterate with its outputs nearer to the best constant: at a power of four of the distance, or at none of it.

    Of these, the one of least objective. A network whose outputs are thousands of times too large, as fresh weights on
    large features have, would take hundreds of steps to get there.
    """
    constant = None if iterate.b is None else rows.best_constant()

    def at(share: Scalar) -> tuple[Neurons, Bias, Activations]:
        b = None if iterate.b is None or constant is None else constant + share * (iterate.b - constant)
        return share * iterate.U, b, share * iterate.Z

    def objective(network: tuple[Neurons, Bias, Activations]) -> Scalar:
        U, b, Z = network
        return network_objective(rows, iterate.A, b, beta, U, Z)

    shares = jnp.asarray([*(0.25**k for k in range(_QUARTERED)), 0.0], iterate.U.dtype)
    (U, b, Z), value = best_of(at, objective, shares)
    outputs = network_outputs(rows, iterate.A, b, Z)
    return dataclasses.replace(iterate, U=U, b=b, Z=Z, outputs=outputs, objective=value, has_dead=jnp.any(dead(U)))


shrunk = Stage(_shrunk, few=ONCE)


def on_gates_of(probe: Activations, rows: Rows, iterate: Iterate) -> Iterate:
    """The iterate with dead neurons at zero, on the gates of a probe, and pointing where the probe lowers the loss.

    Each column of the probe is for one of them; if they are more, the first are taken. Z there is that of the probe.
    """
    U, A, Z = iterate.U, iterate.A, iterate.Z
    is_dead = dead(U)
    column = jax.lax.cumsum(is_dead.astype(jnp.int32)) - 1
    are = (column[None, :] == jnp.arange(probe.shape[1], dtype=jnp.int32)[:, None]) & is_dead[None, :]
    spread, gone = are.astype(U.dtype), jnp.any(are, axis=0)  # products with it move columns; scatters trace slowly
    fallback = spread @ A
    outputs = iterate.outputs - rows.center(jax.nn.relu(Z @ spread.T) @ fallback)
    lower = unit_rows(-adjoint(jax.nn.relu(probe), rows.center(rows.gradient(outputs))), fallback)
    return dataclasses.replace(
        iterate,
        U=jnp.where(gone[None, :], 0, U),
        A=jnp.where(gone[:, None], spread.T @ lower, A),
        Z=jnp.where(gone[None, :], probe @ spread, Z),
        outputs=outputs,
    )


def _revived(rows: Rows, iterate: Iterate, key: Array) -> Iterate:
    """The iterate with its dead neurons, or the first of them, on random gates."""
    d, m = iterate.U.shape
    few = min(m, max(_REVIVED, m // _REVIVED_SHARE))
    return on_gates_of(rows.X @ random_neurons(key, jnp.empty((d, few), iterate.U.dtype)), rows, iterate)


revived = Stage(_revived, few=ONCE)


def search(
    reached: Callable[[Scalar], tuple[Scalar, Outputs]],
    estimate: Callable[[Scalar], Scalar] | None,
    now: tuple[Scalar, Outputs],
    settings: Refreshed,
) -> tuple[Array, Scalar, Outputs]:
    """The step length of least estimated objective, or the next shorter one that lowers the objective.

    Without an estimate the objective itself is tried at every length, and the least taken. ``reached`` gives the
    objective and the outputs at a length; ``now`` are those at 0. Returns the index of the length in their list, whose
    last is 0, and these.
    """
    objective, outputs = now
    lengths = jnp.asarray(settings.step_lengths, objective.dtype)
    values = jax.lax.map((lambda length: reached(length)[0]) if estimate is None else estimate, lengths)
    first = least(values)
    if estimate is None:  # what no length lowers, a shorter one does not
        chosen = jnp.where(values[first] < objective, first, len(lengths) - 1)
        return chosen, values[chosen], reached(lengths[chosen])[1]

    def rises(carry: tuple) -> Array:
        index, value, _ = carry
        return ~(value < objective) & (index < len(lengths) - 1)

    def shorten(carry: tuple) -> tuple:
        index, _, _ = carry
        return index + 1, *reached(lengths[index + 1])

    return jax.lax.while_loop(rises, shorten, (first - 1, jnp.full_like(objective, jnp.inf), outputs))


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
    lives, size = norms(U) > 0, floored(U, settings)
    here = Here(alive.Z, jnp.where(lives, 1 / size, 0), A, alive.outputs)

    def around(index: Int[Array, " k"] | None) -> LocalModel:
        if index is None:
            return LocalModel.of(rows, here, 1.0)
        return LocalModel.of(rows.take(index), here.take(rows.sample(index)), rows.count / len(index))

    sampled, whole = around(index), None if index is None else lambda: around(None)
    decided = known if precise is None else precise
    assert decided is not None
    g = gradient(rows, here, beta, U)
    last = iterate.last._replace(U=jnp.where(lives[None, :], iterate.last.U, 0))
    delta, cg_steps = direction(sampled, whole, prepared, beta, iterate.damping, U, g, last, decided, settings)
    A_delta = jnp.zeros_like(A) if delta.W is None else delta.W / size[:, None]
    Z_delta = rows.X @ delta.U

    def moved(length: Scalar) -> tuple[Neurons, Directions, Bias]:
        return (
            U + length * delta.U,
            A + length * A_delta,
            None if b is None or delta.b is None else b + length * delta.b,
        )

    def further(length: Scalar, Z: Activations, Z_delta: Activations) -> Activations:
        return jnp.where(lives[None, :], Z, 0) + length * Z_delta

    def reached(length: Scalar) -> tuple[Scalar, Outputs]:
        U, A, b = moved(length)
        made = rows.mapped(lambda *Z: jax.nn.relu(further(length, *Z)) @ A, alive.Z, Z_delta)
        outputs = rows.center(made) + rows.constant(b)
        return objective_of(rows, outputs, A, beta, U), outputs

    estimate = None
    if tried is not None:
        some, share = rows.take(tried), beta * (len(tried) / rows.count)
        at = rows.sample(tried)
        Z_some, Z_delta_some = at.take(alive.Z), at.take(Z_delta)

        def estimate(length: Scalar) -> Scalar:
            U, A, b = moved(length)
            return network_objective(some, A, b, share, U, further(length, Z_some, Z_delta_some))

    chosen, value, outputs = search(reached, estimate, (iterate.objective, iterate.outputs), settings)
    length = jnp.asarray(settings.step_lengths, U.dtype)[chosen]
    damping = iterate.damping * jnp.asarray(settings.damping_factors, U.dtype)[chosen]
    U, A, b = moved(length)
    growth = jnp.linalg.norm(A, axis=1)
    U = U * growth[None, :]
    after = Iterate(
        U=U,
        A=A / growth[:, None],
        b=b,
        Z=further(length, alive.Z, Z_delta) * growth[None, :],
        outputs=outputs,
        objective=value,
        has_dead=jnp.any(dead(U)),
        damping=jnp.clip(damping, *settings.damping_range),
        cg_steps=iterate.cg_steps + cg_steps,
        last=jax.tree.map(lambda part: length * part, delta._replace(U=delta.U * growth[None, :])),
    )
    stayed = dataclasses.replace(iterate, damping=after.damping, cg_steps=after.cg_steps)
    falls = (length > 0) & (value < iterate.objective)  # at length 0, where no step is the last, it may by rounding
    return jax.tree.map(lambda new, old: jnp.where(falls, new, old), after, stayed)


stepped, stepped_in_warm_up = Stage(step, few=EVERY_STEP), Stage(step, few=SOME_STEPS)
