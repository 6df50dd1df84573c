"""The guard of CRONOS-AM: what was good is kept, and gone back to when the backbone has run away from its head.

After every head solve the regularised loss of the network is known on all rows. If it is above the best so far by more
than a little, then what the optimizer did since the last solve was harmful: everything goes back to what was kept at
the last solve that passed, and the backbone goes on at a lower rate. As long as solves pass, the rate is raised again.

The rate multiplies the updates of the user's optimizer, so it works for any, also for one without a learning rate; it
is part of the optimizer's state, and what is kept are copies, so a train step can be jitted and donated as always.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax import Array
from jaxtyping import Bool, Float, Int

from cronos_flax._cronos import Cronos
from cronos_flax._features import Rows
from cronos_flax._fit import failed, fit
from cronos_flax._solution import Solution, Stats, Status, TwoLayer

_TOLERANCE = 0.01  # that the loss may be above the best, as a fraction of the loss of the best constant
_LOWER, _RAISE = 0.3, 1.2  # what the rate is multiplied by when a solve fails, and when it passes
_HIGHEST = 1.0  # rate that solves which pass lead to


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
    """

    kept: Any
    best: Float[Array, ""]
    accepted: Bool[Array, ""]
    solves: Int[Array, ""]
    rejections: Int[Array, ""]

    @classmethod
    def of(cls, parts: dict[str, Any]) -> Self:
        """The guard of a state that has not been solved yet."""
        zero = jnp.zeros((), jnp.int32)
        return cls(copied(parts), jnp.full((), jnp.inf, jnp.float32), jnp.ones((), bool), zero, zero + 0)

    def judge(self, parts: dict[str, Any], stats: Stats) -> tuple[Self, dict[str, Any]]:
        """Decide on the state after a solve.

        Args:
            parts: the guarded parts, with the new head, and the optimizer's state in ``"opt_state"``.
            stats: of the solve.

        Returns:
            The guard from now on, and the parts to go on with: those given, or, if the loss is not finite or too far
            above the best, copies of those kept.
        """
        # A comparison with NaN is false.
        accepted = bool(stats.objective <= self.best + _TOLERANCE * stats.null_loss) and bool(
            jnp.isfinite(stats.objective)
        )
        rate = optax.tree.get(parts["opt_state"], "backbone_rate")
        new = rate * _LOWER if not accepted else jnp.maximum(rate, jnp.minimum(rate * _RAISE, _HIGHEST))
        parts = parts if accepted else self.kept
        parts = {**parts, "opt_state": optax.tree.set(parts["opt_state"], backbone_rate=new)}
        guard = self.replace(  # type: ignore[attr-defined]
            # The state's parts may be donated by the user's step, so what is kept shares nothing with them.
            kept=copied(parts) if accepted else parts,
            best=jnp.minimum(self.best, stats.objective.astype(self.best.dtype)) if accepted else self.best,
            accepted=jnp.asarray(accepted),
            solves=self.solves + 1,
            rejections=self.rejections + (not accepted),
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
    if np.all(np.isfinite(rows.X)):
        new, solution = fit(network, rows, solver, key, callback, throw=False)
    else:
        new, solution = None, failed(network)
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
