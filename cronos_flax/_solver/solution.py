"""What a solve returns: the two layers, how it ended, and the figures that say how good they are."""

import dataclasses
import enum
from functools import partial
from typing import Any

import jax
from jax import Array
from jaxtyping import Float, Int

from cronos_flax._solver.types import Scalar


class Status(enum.IntEnum):
    """How a solve ended; ``status.message`` says it in words."""

    converged = 0
    stationary = 1
    max_iters = 2
    nonfinite = 3
    rejected = 4

    @property
    def message(self) -> str:
        """What happened, and what to do about it."""
        return _MESSAGES[self]


_MESSAGES = {
    Status.converged: (
        "Converged: the program's objective is within `tol` of its lower bound and the gates are respected to `tol`."
    ),
    Status.stationary: (
        "Stationary: the regularised loss of the network fell by less than `tol`, relatively, over the last "
        "iterations. A smaller `tol` continues."
    ),
    Status.max_iters: (
        "Stopped at `max_iters`. The result is the best network seen; pass `state=solution.state` to continue."
    ),
    Status.nonfinite: (
        "The loss of the starting network is not finite in this precision, so nothing was changed. "
        "Check the scale of the features, of y and of `init`."
    ),
    Status.rejected: (
        "Rejected: since the last head solve the optimizer's steps had made the loss worse than a new head can mend. "
        "The train state went back to what it was then, and goes on with a lower rate for the backbone."
    ),
}


@partial(jax.tree_util.register_dataclass, data_fields=["kernel1", "bias1", "kernel2", "bias2"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class TwoLayer:
    """A two-layer ReLU network, in the shapes of two Flax ``Dense`` layers.

    ``outputs = relu(X @ kernel1 + bias1) @ kernel2 + bias2``

    Args:
        kernel1: hidden kernel, shape ``(p, m)``.
        bias1: hidden bias, shape ``(m,)``, or None for a layer without one.
        kernel2: output kernel, shape ``(m, C)``.
        bias2: output bias, shape ``(C,)``, or None for a layer without one.
    """

    kernel1: Float[Array, "p m"]
    bias1: Float[Array, " m"] | None
    kernel2: Float[Array, "m C"]
    bias2: Float[Array, " C"] | None


@partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "objective",
        "initial_objective",
        "null_loss",
        "beta",
        "iterations",
        "active_neurons",
        "cg_steps",
        "objective_trace",
        "program_objective",
        "lower_bound",
        "lower_bound_trace",
        "cone_violation",
        "primal_residual",
        "dual_residual",
        "path_betas",
        "path_losses",
    ],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Stats:
    """The figures of one solve; losses are in the units of :class:`cronos_flax.Cronos` (a weighted mean over rows).

    Attributes:
        objective: regularised loss of the network that is returned.
        initial_objective: regularised loss of the network the solve started from.
        null_loss: mean loss of the best constant output, which is what a head that knows nothing has.
        beta: the weight decay that was used (of interest where ``beta=None`` chose it).
        iterations: iterations done.
        active_neurons: neurons of the returned network with a non-zero weight.
        objective_trace: shape ``(max_iters + 1,)``: the regularised loss at the start and after every iteration (of
            the network for ``gates="refreshed"``; of the program, at checks, else); entries after the last iteration
            repeat it.
        cg_steps: conjugate-gradient steps of all iterations, two products with X each. None for held gates.
        program_objective: objective of the convex program at its own iterate, which need not quite respect the gates
            and can then lie below the optimum. None for ``gates="refreshed"`` without
            ``certify_iters``, as all that follow.
        lower_bound: no point of the convex program is below this.
        lower_bound_trace: the lower bound at the start and after every iteration, as of the last check.
        cone_violation: how far the iterate is from respecting its gates, ``‖min(GV, 0)‖ / ‖GV‖``.
        primal_residual: ADMM's primal residual relative to the iterate.
        dual_residual: ADMM's dual residual relative to the duals.
        path_betas: for ``beta="path"`` the weight decays tried, from large to small; else None.
        path_losses: the mean loss on the held-out rows at each of them, without penalty.
    """

    objective: Scalar
    initial_objective: Scalar
    null_loss: Scalar
    beta: Scalar
    iterations: Int[Array, ""]
    active_neurons: Int[Array, ""]
    objective_trace: Float[Array, " k"]
    cg_steps: Int[Array, ""] | None = None
    program_objective: Scalar | None = None
    lower_bound: Scalar | None = None
    lower_bound_trace: Float[Array, " k"] | None = None
    cone_violation: Scalar | None = None
    primal_residual: Scalar | None = None
    dual_residual: Scalar | None = None
    path_betas: Float[Array, " k"] | None = None
    path_losses: Float[Array, " k"] | None = None


@partial(jax.tree_util.register_dataclass, data_fields=["params", "status_code", "stats", "state"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Solution:
    """The result of :meth:`cronos_flax.Cronos.solve`.

    Args:
        params: the network.
        status_code: the :class:`Status` as an integer array, so that a solution can be returned from ``jit``.
        stats: the figures of the solve.
        state: pass it back as ``state=`` to go on from here.
    """

    params: TwoLayer
    status_code: Int[Array, ""]
    stats: Stats
    state: Any

    @property
    def status(self) -> Status:
        """How the solve ended. Reads one integer from the device."""
        return Status(int(self.status_code))
