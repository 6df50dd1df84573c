"""The guard of CRONOS-AM: undo optimizer steps after which no head fits any more.

After each head solve the regularised loss of the network is known on all rows. If it is clearly above the best so far,
the optimizer's steps since the last solve have done harm. Then all parts of the state go back to the copies kept at the
last accepted solve, and the backbone continues at a lower rate. Accepted solves raise the rate again. All solves of an
alternation have one weight decay β, until it is chosen anew: then the guard forgets losses with another β, which say
nothing about the backbone.

The rate multiplies the updates of the user's optimizer, so it works for every optimizer, also for one without a
learning rate. It is part of the optimizer's state. The guard keeps copies, so a train step can be jitted and donated as
usual.
"""

import dataclasses
import functools
import math
from typing import Any, Self

import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array
from jaxtyping import Bool, Float, Int

from cronos_flax._alternation.optimizer_state import gone_back
from cronos_flax._solver.checks import in_python, positive_integer, real_number
from cronos_flax._solver.processes import agreed
from cronos_flax._solver.solution import Stats
from cronos_flax._solver.transfer import copied, on_device, on_host
from cronos_flax._solver.user_warnings import warn

_LOW_RATE = 0.01  # of the optimizer's own: said to the user
_LEAST_RATE = float(jnp.finfo(jnp.float32).eps)  # where steps as large as the parameters are lost in rounding
_TINY = float(jnp.finfo(jnp.float32).tiny)


@dataclasses.dataclass(frozen=True)
class Guard:
    """Settings of the guard of CRONOS-AM, given as ``guard=`` to ``CronosTrainState.create`` or ``CronosOptimizer``.

    Let F be the regularised loss after a solve, F* the least after earlier ones, and F₀ the loss of the best constant
    outputs. The solve is accepted if F is finite and

        F − F* ≤ tolerance · F₀

    up to rounding. If it is not, the state goes back to that of the last accepted solve, and the rate of the backbone
    is multiplied by ``decrease_factor``; after an accepted solve by ``increase_factor``, up to ``highest_rate``. In the
    optimizer's state, what is kept for each parameter goes back; schedules and injected hyperparameters go on. Two
    rejections in a row, and a rate that falls below a hundredth of the optimizer's own, give a ``UserWarning``. So does
    a rate of ``1.2e-7``, the precision of float32: there the backbone stands still, and it falls no further.

    Running statistics (batch norm) change the features without the optimizer, so F can rise at any rate. Then the
    tolerance is multiplied by ``drift_factor ** k``, with k the number of rejections in a row but at most
    ``drift_tries``; at the first two solves ``k = drift_tries``. A solve that passes only by this factor sets F* to its
    own loss, and undoes the decreases of the rate since the last accepted solve.

    Args:
        tolerance: how far F may exceed F*, as a fraction of F₀, ``≥ 0``; infinity accepts every finite loss.
        decrease_factor: factor on the rate after a rejected solve, in (0, 1]; 1 keeps the rate.
        increase_factor: factor on the rate after an accepted solve, ``≥ 1``; 1 keeps the rate.
        highest_rate: upper bound of an increase, as a multiple of the optimizer's own rate, ``> 0``.
        drift_factor: factor on the tolerance with running statistics, ``≥ 1``.
        drift_tries: the largest exponent of that factor, ``≥ 0``.

    Raises:
        ValueError: for a setting outside its range.

    Example:
        >>> import cronos_flax as cf
        >>> cf.Guard(tolerance=0.05)
        Guard(tolerance=0.05, decrease_factor=0.3, ...)
    """

    tolerance: float = 0.01
    decrease_factor: float = 0.3
    increase_factor: float = 1.2
    highest_rate: float = 1.0
    drift_factor: float = 8.0
    drift_tries: int = 2

    def __post_init__(self) -> None:
        check = functools.partial(real_number, "Guard")
        check("tolerance", self.tolerance, "a number ≥ 0", lambda v: v >= 0)
        check("decrease_factor", self.decrease_factor, "a number in (0, 1]", lambda v: 0 < v <= 1)
        check("increase_factor", self.increase_factor, "a number ≥ 1 and finite", lambda v: 1 <= v < math.inf)
        check("highest_rate", self.highest_rate, "a number > 0 and finite", lambda v: 0 < v < math.inf)
        check("drift_factor", self.drift_factor, "a number ≥ 1 and finite", lambda v: 1 <= v < math.inf)
        positive_integer("Guard", "drift_tries", self.drift_tries, least=0)
        in_python(self, *(field.name for field in dataclasses.fields(self)))


def guard_settings(where: str, guard: Guard | bool | None) -> Guard | None:
    """The settings that a user asked for by ``guard=``; None for no guard."""
    if guard is True:
        return Guard()
    if guard is False or guard is None:
        return None
    if not isinstance(guard, Guard):
        raise ValueError(
            f"{where}: `guard` must be a cf.Guard, True for the default one, or False for none, got "
            f"{type(guard).__name__}."
        )
    return guard


@struct.dataclass
class GuardState:
    """The state of a guard: the parts of a train state to go back to, and the decisions so far.

    Args:
        kept: copies of the guarded parts, as of the last accepted solve; before that, as of the start.
        best: the least regularised loss after a solve; infinite before the first one.
        accepted: whether the last solve was accepted.
        solves: the number of solves.
        rejections: the number of rejected solves.
        consecutive_rejections: the number of rejected solves since the last accepted one.
        settings: the guard's settings.
        drifts: whether features change without the optimizer, as running statistics make them.
    """

    kept: Any
    best: Float[Array, ""]
    accepted: Bool[Array, ""]
    solves: Int[Array, ""]
    rejections: Int[Array, ""]
    consecutive_rejections: Int[Array, ""]
    settings: Guard = struct.field(pytree_node=False)
    drifts: bool = struct.field(pytree_node=False)

    @classmethod
    def init(cls, settings: Guard, parts: dict[str, Any], drifts: bool) -> Self:
        """The state before the first solve.

        Args:
            settings: the guard's settings.
            parts: the guarded parts of the train state.
            drifts: whether features change without the optimizer.
        """
        return cls(
            kept=copied(parts),
            best=on_device(math.inf, jnp.float32),
            accepted=on_device(True),
            solves=on_device(0, jnp.int32),
            rejections=on_device(0, jnp.int32),
            consecutive_rejections=on_device(0, jnp.int32),
            settings=settings,
            drifts=drifts,
        )

    def forgetful(self) -> Self:
        """The same, without the least loss so far: the next finite one is accepted."""
        return self.replace(best=on_device(math.inf, self.best.dtype))  # type: ignore[attr-defined]

    def has_weight_decay(self, beta: Float[Array, ""]) -> bool:
        """Whether the least loss so far is one with this weight decay, to rounding."""
        of_best = float(on_host(self.kept["opt_state"].head_decay))
        return math.isclose(of_best, agreed(float(on_host(beta))), rel_tol=1e-6)

    def judge(self, parts: dict[str, Any], stats: Stats, rounding: float) -> tuple[Self, dict[str, Any]]:
        """Accept or reject the state after a solve.

        Args:
            parts: the guarded parts, with the new head, and with the optimizer's state as ``"opt_state"``.
            stats: of the solve.
            rounding: differences of losses that mean nothing.

        Returns:
            The new state of the guard, and the parts to continue with: those given if the solve is accepted, otherwise
            copies of the kept ones; with the new rate of the backbone in both cases.
        """
        settings, objective, best = self.settings, agreed(float(on_host(stats.objective))), float(on_host(self.best))
        size = max(abs(float(on_host(stats.null_loss))), _TINY)  # a loss of the user's own may be negative
        rise, allowed = objective - best - rounding, settings.tolerance * size
        accepted = math.isfinite(objective) and rise <= allowed * settings.drift_factor ** self._tries()
        comparable = rise <= allowed  # with the losses before, which drift does not explain
        before = on_host(parts["opt_state"].backbone_rate)
        rate = self._new_rate(before, accepted, comparable)
        if not accepted:
            head_decay = parts["opt_state"].head_decay
            opt_state = gone_back(self.kept["opt_state"], parts["opt_state"])
            parts = {**self.kept, "opt_state": opt_state._replace(head_decay=head_decay)}
        opt_state = parts["opt_state"]._replace(backbone_rate=on_device(rate))
        parts = {**parts, "opt_state": opt_state}
        if accepted:
            best = min(objective, best) if comparable else objective
        in_a_row = 0 if accepted else int(on_host(self.consecutive_rejections)) + 1
        state = self.replace(  # type: ignore[attr-defined]
            # A user's step may donate the parts of the state: kept ones share no buffer with them.
            kept=copied(parts),
            best=on_device(best, self.best.dtype),
            accepted=on_device(accepted),
            solves=on_device(int(on_host(self.solves)) + 1, jnp.int32),
            rejections=on_device(int(on_host(self.rejections)) + (not accepted), jnp.int32),
            consecutive_rejections=on_device(in_a_row, jnp.int32),
        )
        still = 2 * _LEAST_RATE  # so that an accepted solve or two there do not bring the next warning
        stands_still = rate < still <= before
        if stands_still or rate < _LOW_RATE <= before or (in_a_row == 2 and before >= still):
            state._warn(objective, best, stands_still)
        return state, parts if accepted else copied(parts)

    def _warn(self, objective: float, best: float, stands_still: bool) -> None:
        """Tell the user that the backbone hardly moves, and what to do."""
        figures = self.figures
        look = "" if math.isfinite(objective) else "Look for rows that are not finite. "
        if stands_still:
            look += (
                f"Its rate falls no further than to {_LEAST_RATE:.2g}, where it stands still: if solves are rejected "
                "all the same, steps are not the reason, but solves on other rows each time. "
            )
        warn(
            f"solve_head: the guard undid the optimizer's steps {figures['consecutive_rejections']} time(s) in a row, "
            f"and the backbone now moves at {figures['backbone_rate']:.2g} of the optimizer's own rate: after the last "
            f"steps the regularised loss was {objective:.4g} after a solve, and had been {best:.4g}. {look}Lower the "
            "optimizer's rate or let it decay; or give the solver a larger beta_ratio, as large weights of the head "
            "make large gradients, and enlarge the noise of dropout, which a solve does not see; or solve more often; "
            "or on more rows, if each solve has other ones. "
            "guard=cf.Guard(tolerance=...) allows a larger rise, guard=False any."
        )

    def _tries(self) -> int:
        """How often the tolerance is multiplied by ``drift_factor`` at the next solve."""
        if not self.drifts:
            return 0
        # Statistics have not settled at the start; and they go back with the rest, so that the next solve fails too.
        most = self.settings.drift_tries
        return most if int(on_host(self.solves)) <= 1 else min(int(on_host(self.consecutive_rejections)), most)

    def _new_rate(self, rate: np.ndarray, accepted: bool, comparable: bool) -> np.ndarray:
        settings = self.settings
        if not accepted:
            return np.maximum(rate * settings.decrease_factor, np.minimum(rate, _LEAST_RATE))
        if not comparable:  # the rejections before were the drift's doing
            # At the least rate some of them were no decreases.
            before = rate / settings.decrease_factor ** int(on_host(self.consecutive_rejections))
            return np.minimum(before, max(settings.highest_rate, 1.0))
        return np.maximum(rate, np.minimum(rate * settings.increase_factor, settings.highest_rate))

    @property
    def figures(self) -> dict[str, float]:
        """The decisions so far, as flat Python numbers for a logger."""
        return {
            "accepted": bool(on_host(self.accepted)),
            "backbone_rate": float(on_host(self.kept["opt_state"].backbone_rate)),
            "best_objective": float(on_host(self.best)),
            "solves": int(on_host(self.solves)),
            "rejections": int(on_host(self.rejections)),
            "consecutive_rejections": int(on_host(self.consecutive_rejections)),
        }
