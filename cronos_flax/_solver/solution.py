"""What a solve returns: the two layers, how it ended, its figures, and the state to go on from."""

import dataclasses
import enum
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Int

from cronos_flax._solver.arrays import is_array, numbers
from cronos_flax._solver.blocks import Blocks
from cronos_flax._solver.meshes import automatically, check_together
from cronos_flax._solver.transfer import batch_on_device, on_host
from cronos_flax._solver.types import Activations, Directions, Gates, Scalar


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
        "Converged: the program's objective is within `tol` of its lower bound and the gates are respected to `tol` "
        '(of a gated network, gates="gated", they always are).'
    ),
    Status.stationary: (
        "Stationary: the regularised loss of the network fell by less than `tol`, relatively, over the last "
        "iterations; or, where `tol` is None, by too little to pay for going on. `state=solution.state` and a small "
        "`tol` continue."
    ),
    Status.max_iters: (
        "Stopped at `max_iters`. The result is the best network seen; pass `state=solution.state` to continue."
    ),
    Status.nonfinite: (
        "The loss of the starting network is not finite in this precision, so nothing was changed. "
        "Check the scale of the features, of y and of `init`."
    ),
    Status.rejected: (
        "Rejected: the optimizer's steps since the last head solve raised the loss more than a new head can lower it. "
        "The train state went back to its values after that solve; the backbone goes on with a lower rate."
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
    data_fields=["kernel1", "bias1", "kernel2", "bias2", "gate_kernel", "gate_bias"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class GatedTwoLayer:
    """A two-layer gated ReLU network: gates of their own, not the signs of the neurons, say where neurons are on.

    ``outputs = (1[X @ gate_kernel + gate_bias >= 0] * (X @ kernel1 + bias1)) @ kernel2 + bias2``

    Gates are given, not trained. With the gates of its own neurons (``gate_kernel = kernel1``, ``gate_bias = bias1``)
    it is the ReLU network with these layers.

    Args:
        kernel1: hidden kernel, shape ``(p, m)``.
        bias1: hidden bias, shape ``(m,)``, or None for a layer without one.
        kernel2: output kernel, shape ``(m, C)``.
        bias2: output bias, shape ``(C,)``, or None for a layer without one.
        gate_kernel: vectors of the gates, shape ``(p, m)``; of any length, for only signs matter.
        gate_bias: their biases, shape ``(m,)``, or None for gates without them.

    Example:
        >>> import jax.numpy as jnp, cronos_flax as cf
        >>> one = jnp.ones((1, 1))
        >>> network = cf.GatedTwoLayer(-2 * one, None, one, None, gate_kernel=one, gate_bias=None)
        >>> cf.predict(network, jnp.array([[-1.0], [3.0]])).tolist()  # on where x >= 0, and negative there
        [[0.0], [-6.0]]
    """

    kernel1: Float[Array, "p m"]
    bias1: Float[Array, " m"] | None
    kernel2: Float[Array, "m C"]
    bias2: Float[Array, " C"] | None
    gate_kernel: Float[Array, "p m"]
    gate_bias: Float[Array, " m"] | None


Network: TypeAlias = TwoLayer | GatedTwoLayer


def check_arrays(what: str, network: Network) -> None:
    """Raise a ValueError for a network of lists, say; ``what`` is how the error names the network."""
    for name, value in vars(network).items():
        if value is not None and not is_array(value):
            raise ValueError(
                f"{what} must consist of arrays, got a {type(value).__name__} as {name}. Make an array of it by "
                "jnp.asarray."
            )


def check_network(where: str, params: Any) -> None:
    """Raise a ValueError for what is no network, such as a whole solution."""
    if not isinstance(params, Network):
        has_one = isinstance(getattr(params, "params", None), Network)
        raise ValueError(
            f"{where}: `params` must be a cf.TwoLayer or a cf.GatedTwoLayer, got a {type(params).__name__}."
            f"{' Give its .params, as solution.params.' if has_one else ''}"
        )
    check_arrays(f"{where}: `params`", params)
    if jnp.ndim(params.kernel1) > 2:
        raise ValueError(
            f"{where}: `params` must be one network, got several in arrays, as from vmap (kernel1 has the shape "
            f"{jnp.shape(params.kernel1)}). Call it under jax.vmap, or take one of them, "
            "jax.tree.map(lambda leaf: leaf[0], params)."
        )


def gates_on(params: GatedTwoLayer, X: Array | np.ndarray | Blocks) -> Gates:
    """Where the neurons of a gated network are on.

    In full precision wherever it is called, for what a rounding turns on is not small.

    Raises:
        ValueError: unless each neuron has one gate.
    """
    kernel, bias = jnp.shape(params.gate_kernel), params.gate_bias
    if kernel != params.kernel1.shape or (bias is not None and jnp.shape(bias) != kernel[1:]):
        raise ValueError(
            f"a cf.GatedTwoLayer must have one gate for each neuron: a gate_kernel of shape {params.kernel1.shape}, as "
            f"kernel1, and a gate_bias of {params.kernel1.shape[1:]} or None; got {kernel} and "
            f"{None if bias is None else jnp.shape(bias)}."
        )
    with jax.default_matmul_precision("highest"):
        Z = X @ params.gate_kernel
    return _at_least_zero(Z if params.gate_bias is None else Z + jnp.broadcast_to(params.gate_bias, Z.shape))


@jax.jit  # so that no zero is sent to the device, which a transfer guard may forbid
def _at_least_zero(Z: Activations) -> Gates:
    return Z >= 0


@jax.jit
def _where_on(D: Gates, Z: Activations) -> Activations:
    return jnp.where(D, Z, 0)


def predict(params: Network, X: ArrayLike | Blocks) -> Float[Array, "n C"]:
    """Outputs of a two-layer ReLU network, ``relu(X kernel1 + bias1) kernel2 + bias2``, or of a gated one.

    Args:
        params: a :class:`TwoLayer`, or a :class:`GatedTwoLayer`.
        X: features, shape ``(n, p)``, as :meth:`cronos_flax.Cronos.solve` takes them.

    Returns:
        Outputs, shape ``(n, C)``. For ``"softmax"`` and ``"logistic"`` these are logits.

    Raises:
        ValueError: for what is no network, or no array, and if the features are not as many as the network's.

    Example:
        >>> import jax.numpy as jnp, cronos_flax as cf
        >>> network = cf.TwoLayer(jnp.array([[1.0, -1.0]]), None, jnp.array([[1.0], [1.0]]), None)
        >>> cf.predict(network, jnp.array([[-2.0], [3.0]])).tolist()  # |x|
        [[2.0], [3.0]]
    """
    check_network("predict", params)
    if not isinstance(X, Blocks):
        X = numbers(X, "predict: `X`")
        if X.shape[-1:] != params.kernel1.shape[:1]:
            raise ValueError(
                f"predict: `X` must have the {params.kernel1.shape[0]} features of the network as its last axis, "
                f"got shape {X.shape}."
            )
        check_together("predict", params=params, X=X)
        params, X = batch_on_device((params, X))
    return automatically(_outputs, params, X)


def _outputs(params: Network, X: Any) -> Float[Array, "n C"]:
    hidden = X @ params.kernel1
    if params.bias1 is not None:
        hidden = hidden + jnp.broadcast_to(params.bias1, hidden.shape)
    active = _where_on(gates_on(params, X), hidden) if isinstance(params, GatedTwoLayer) else jax.nn.relu(hidden)
    outputs = active @ params.kernel2
    return outputs if params.bias2 is None else outputs + jnp.broadcast_to(params.bias2, outputs.shape)


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

    Args:
        objective: regularised loss of the network that is returned.
        initial_objective: regularised loss of the network the solve started from.
        null_loss: mean loss of the best constant output.
        beta: the weight decay that was used, also where ``beta=None`` chose it.
        iterations: iterations done.
        active_neurons: number of neurons of the returned network whose weights are not zero.
        objective_trace: shape ``(max_iters + 1,)``: the regularised loss at the start and after every iteration (of
            the network for ``gates="refreshed"``; of the program, at checks, else); entries after the last iteration
            repeat it.
        cg_steps: conjugate-gradient steps of all iterations, two products with X each. None for held gates.
        program_objective: objective of the convex program at ADMM's iterate. The iterate may violate the gates a
            little, and its objective may then lie below the optimum; not so with ``gates="gated"``. This and the next
            five are None for ``gates="refreshed"`` with ``certify_iters=0``.
        lower_bound: lower bound on the optimum of the convex program.
        lower_bound_trace: the lower bound at the start and after every iteration, as of the last check.
        cone_violation: relative violation of the gates by the iterate, ``‖min(GV, 0)‖ / ‖GV‖``; 0 for
            ``gates="gated"``.
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
        params: the network: a :class:`TwoLayer`, or for ``gates="gated"`` a :class:`GatedTwoLayer`.
        status_code: the :class:`Status` as an integer array, so that a solution can be returned from ``jit``.
        stats: the figures of the solve.
        state: pass it back as ``state=`` to go on from here.
    """

    params: Any
    status_code: Int[Array, ""]
    stats: Stats
    state: Any

    @property
    def status(self) -> Status:
        """How the solve ended. Reads one integer from the device.

        Raises:
            ValueError: for the solutions of several solves in one object, as ``vmap`` makes it.
        """
        if jnp.ndim(self.status_code):
            raise ValueError(
                f"status: `solution` must be of one solve, got {jnp.shape(self.status_code)} of them, as from vmap. "
                "Take one of them, jax.tree.map(lambda leaf: leaf[0], solution), or compare the array "
                "solution.status_code with cf.Status.converged and others."
            )
        return Status(int(on_host(self.status_code)))


def with_stats(solution: Solution, **figures: Any) -> Solution:
    """The solution with some of its figures replaced."""
    return dataclasses.replace(solution, stats=dataclasses.replace(solution.stats, **figures))


@partial(jax.tree_util.register_dataclass, data_fields=["params", "damping", "key", "last"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class RefreshedState:
    """Where a solve with ``gates="refreshed"`` stands between calls, in the user's units.

    It fits any rows with as many features and outputs.

    Args:
        params: the network.
        damping: μ.
        key: of what is drawn from here on.
        last: where the next step begins along: the last step of ``‖kernel2ᵢ‖ (kernel1ᵢ, bias1ᵢ)``, of the directions of
            ``kernel2ᵢ`` times the norm of the solver's neuron, and of the mean output.
    """

    params: TwoLayer
    damping: Scalar
    key: Array
    last: TwoLayer


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["params", "hidden_plus_dual", "D", "A", "S_plus_dual", "Z_plus_dual", "z", "rho", "iteration", "mark"],
    meta_fields=["kappa", "gates"],
)
@dataclasses.dataclass(frozen=True)
class HeldState:
    """Where a solve with held gates stands between calls, in the user's units.

    It is continued with the same ``gates`` only. With other rows of the same number, told by ``mark``, the gates are
    those that its network has on these; for ``gates="paired"`` random ones.
    """

    params: Network
    hidden_plus_dual: tuple[Float[Array, "p m"], Float[Array, " m"] | None]
    D: Bool[Array, "n m"]
    A: Directions
    S_plus_dual: Float[Array, "n m"] | None
    Z_plus_dual: Float[Array, "n C"] | None
    z: Float[Array, "n C"]
    rho: Array
    iteration: Array
    kappa: float
    mark: Array
    gates: str
