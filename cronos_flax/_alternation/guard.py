"""The guard of CRONOS-AM: what was good is kept, and gone back to when the backbone has run away from its head.

After every head solve the regularised loss of the network is known on all rows. If it is above the best so far by more
than a little, then what the optimizer did since the last solve was harmful: everything goes back to what was kept at
the last solve that passed, and the backbone goes on at a lower rate. As long as solves pass, the rate is raised again.

The rate multiplies the updates of the user's optimizer, so it works for any, also for one without a learning rate; it
is part of the optimizer's state, and what is kept are copies, so a train step can be jitted and donated as always.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax import Array
from jaxtyping import Bool, Float, Int

from cronos_flax._head.features import Rows
from cronos_flax._head.fit import fit_rows, nonfinite_solution
from cronos_flax._solver.cronos import Cronos
from cronos_flax._solver.solution import Solution, Stats, Status, TwoLayer

_TOLERANCE = 0.01  # that the loss may be above the best, as a fraction of the loss of the best constant
_LOWER, _RAISE = 0.3, 1.2  # what the rate is multiplied by when a solve fails, and when it passes
_HIGHEST = 1.0  # rate that solves which pass lead to
_WIDER, _MOST_TRIES = 8.0, 2  # what the tolerance grows by with failures in a row, where statistics drift; how often


class RateState(NamedTuple):
    """The state of :func:`at_backbone_rate`."""

    backbone_rate: Float[Array, ""]


def at_backbone_rate(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """``tx``, its updates multiplied by a rate that is part of the state, at first one."""

    def init(params: Any) -> RateState:
        del params
        return RateState(jnp.ones((), jnp.float32))

    def update(updates: Any, state: RateState, params: Any = None) -> tuple[Any, RateState]:
        del params
        return jax.tree.map(lambda u: (state.backbone_rate * u).astype(u.dtype), updates), state

    return optax.chain(tx, optax.GradientTransformation(init, update))


@struct.dataclass
class Guard:
    """What a train state goes back to, and what was decided so far.

    Args:
        kept: copies of the guarded parts of the state, as of the last solve that passed; before that, of the start.
        best: the least regularised loss after a solve.
        accepted: whether the last solve passed.
        solves: how many there were.
        rejections: how many did not pass.
        row: how many of these since the last that did.
        drifts: whether features change without the optimizer's doing, as running statistics make them.
    """

    kept: Any
    best: Float[Array, ""]
    accepted: Bool[Array, ""]
    solves: Int[Array, ""]
    rejections: Int[Array, ""]
    row: Int[Array, ""]
    drifts: bool = struct.field(pytree_node=False)

    @classmethod
    def of(cls, parts: dict[str, Any], drifts: bool) -> Self:
        """The guard of a state that has not been solved yet."""
        solves, rejections, row = (jnp.zeros((), jnp.int32) for _ in range(3))
        best = jnp.full((), jnp.inf, jnp.float32)
        return cls(copied(parts), best, jnp.ones((), bool), solves, rejections, row, drifts)

    def judge(self, parts: dict[str, Any], stats: Stats) -> tuple[Self, dict[str, Any]]:
        """Decide on the state after a solve.

        Args:
            parts: the guarded parts, with the new head, and the optimizer's state in ``"opt_state"``.
            stats: of the solve.

        Returns:
            The guard from now on, and the parts to go on with: those given, or, if the loss is not finite or too far
            above the best, copies of those kept.
        """
        objective, row = float(stats.objective), int(self.row)
        excess = (objective - float(self.best)) / float(stats.null_loss)
        # Running statistics that have not settled, as at the start, or that go back with the rest, make losses worse
        # at any rate: then it is their doing if a solve fails again, and only what is hopeless is still refused.
        tries = min(row + (_MOST_TRIES if int(self.solves) <= 1 else 0), _MOST_TRIES) if self.drifts else 0
        accepted = math.isfinite(objective) and excess <= _TOLERANCE * _WIDER**tries
        comparable = excess <= _TOLERANCE
        rate = optax.tree.get(parts["opt_state"], "backbone_rate")
        if not accepted:
            rate = rate * _LOWER
        elif not comparable:
            rate = rate / _LOWER**row
        else:
            rate = jnp.maximum(rate, jnp.minimum(rate * _RAISE, _HIGHEST))
        parts = parts if accepted else self.kept
        parts = {**parts, "opt_state": optax.tree.set(parts["opt_state"], backbone_rate=rate)}
        best = objective if not comparable else min(objective, float(self.best))
        guard = self.replace(  # type: ignore[attr-defined]
            # The state's parts may be donated by the user's step, so what is kept shares nothing with them.
            kept=copied(parts) if accepted else parts,
            best=jnp.asarray(best, self.best.dtype) if accepted else self.best,
            accepted=jnp.asarray(accepted),
            solves=self.solves + 1,
            rejections=self.rejections + (not accepted),
            row=jnp.zeros((), jnp.int32) if accepted else self.row + 1,
        )
        return guard, parts if accepted else copied(parts)

    @property
    def figures(self) -> dict[str, float]:
        """What was decided, as flat Python numbers for a logger."""
        return {
            "accepted": bool(self.accepted),
            "backbone_rate": float(optax.tree.get(self.kept["opt_state"], "backbone_rate")),
            "best_objective": float(self.best),
            "solves": int(self.solves),
            "rejections": int(self.rejections),
        }


def solve_guarded(
    guard: Guard | None,
    network: TwoLayer,
    rows: Rows,
    solver: Cronos,
    parts: Callable[[TwoLayer | None], dict[str, Any]],
    key: Array,
    callback: Callable[[dict[str, float]], Any] | None,
    throw: bool,
) -> tuple[Guard | None, dict[str, Any], Solution]:
    """A head solve, and what becomes of it.

    Args:
        guard: None accepts everything.
        network: the present head.
        rows: its input, with targets and weights.
        solver: how to solve.
        parts: the guarded parts of the state with a given head, None for the present one.
        key: key of samples and revived neurons.
        callback: told of the solve, and then of the decision.
        throw: raise if the loss is not finite and there is nothing to go back to.

    Returns:
        The guard and the parts to go on with, and the solution; its status says if it was rejected.

    Raises:
        FloatingPointError: if the loss is not finite at the first solve, or without guard, and ``throw``.
    """
    if rows.finite:
        new, solution = fit_rows(network, rows, solver, key, callback, throw=False)
    else:
        new, solution = None, nonfinite_solution(network)
    if throw and solution.status == Status.nonfinite and (guard is None or int(guard.solves) == 0):
        raise FloatingPointError(f"solve_head: {solution.status.message}")
    changed = parts(new)
    if guard is None:
        return None, changed, solution
    guard, changed = guard.judge(changed, solution.stats)
    if not guard.accepted:
        solution = dataclasses.replace(solution, status_code=jnp.asarray(Status.rejected, jnp.int32))
    if callback is not None:
        callback(guard.figures)
    return guard, changed, solution


def copied(tree: Any) -> Any:
    """A copy that shares no buffer."""
    return jax.tree.map(lambda leaf: leaf.copy() if isinstance(leaf, Array) else leaf, tree)
