"""``Cronos.solve``: the one entry point of the solver, and its one ``jit``."""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float, Int

from cronos_flax._solver import admm, checks, host, path, refreshed
from cronos_flax._solver.blocks import Blocks, Source
from cronos_flax._solver.coordinates import Basis, Rows, rotated, scaled
from cronos_flax._solver.linear_solvers import NystromPCG, Structured
from cronos_flax._solver.losses import LOSSES, Loss, loss_of
from cronos_flax._solver.program import Program, beta_max, network_objective
from cronos_flax._solver.solution import Solution, Stats, Status, TwoLayer
from cronos_flax._solver.types import Activations, Bias, Directions, Neurons, RowVector, Scalar
from cronos_flax._solver.weights import (
    dead,
    default_directions,
    from_network,
    random_neurons,
    regularised_loss,
    to_network,
)

_GATES = ("refreshed", "fixed", "paired")
_BETA_RATIO = 0.001
_RHO = 1.0
_MAX_ITERS = 500
_STEP_LENGTHS = (1.0, 0.5, 0.25, 0.1, 0.03, 0.0)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["beta", "beta_ratio", "rho", "tol"],
    meta_fields=["loss", "gates", "linear_solver", "max_iters", "certify_iters", "class_weight"],
)
@dataclasses.dataclass(frozen=True)
class Cronos:
    r"""Solver for two-layer ReLU networks, ``relu(X kernel1 + bias1) kernel2 + bias2``.

    With ``f_j`` the output for row j, ``w_j`` its weight, and s the root mean squared row norm of X, it minimises

        Σ w_j ℓ(f_j, y_j) / Σ w_j + (beta/2) (‖kernel1‖² + ‖bias1‖²/s² + ‖kernel2‖²)

    so ``beta`` is the weight decay of Flax and Optax, on a scale that does not depend on the units of X.

    A ``Cronos`` is a pytree: ``beta``, ``rho`` and ``tol`` are leaves, so sweeping them compiles nothing anew; the rest
    is static.

    Args:
        loss: ``"squared"`` (``½‖f − y‖²``), ``"softmax"`` (labels, or probabilities), ``"logistic"`` (y in [0, 1]),
            ``"huber"``, ``"hinge"`` (y = ±1), or a :class:`cronos_flax.Loss`.
        beta: weight decay, ``≥ 0``; None takes a fixed fraction of β_max, the smallest value that makes the solution
            zero. ``"path"`` tries seven from β_max/10 down to β_max/10,000, chooses by the loss on held-out rows, and
            fits all rows with that one.
        rho: ADMM's first penalty, or the first damping of the refreshed path, ``> 0``; None takes 1. It adapts by
            itself, except with ``cf.NystromPCG``.
        gates: ``"refreshed"`` renews the gates at every step and descends on the loss of the network itself. The
            others hold them, and solve that convex program by ADMM, with a lower bound on its optimum: ``"fixed"``
            those of the starting network, ``"paired"`` random ones, each used by two neurons of opposite direction.
            ``"paired"`` with ``cf.NystromPCG()`` is the published algorithm, which has no output bias unless the
            network given has one.
        linear_solver: how held gates solve their linear systems: ``cf.Structured()`` or ``cf.NystromPCG()``.
        max_iters: most iterations of one solve; None means 500, or a few in ``CronosTrainState``, which solves
            again and again.
        tol: held gates stop when gap and constraint violation are relatively below it, ``"refreshed"`` when the loss
            fell by less than this fraction over ten iterations.
        certify_iters: iterations of ADMM that ``"refreshed"`` spends at its end on the program of its final gates, to
            say by ``stats.lower_bound`` how good it is among the networks with these gates; 0 for none.
        class_weight: ``"balanced"`` multiplies the weight of each row by ``n / (classes · rows of its class)``.
        beta_ratio: the fraction of β_max that ``beta=None`` takes, ``≥ 0``; None means .001, or .005 in
            ``CronosTrainState``, whose backbone lives on what the head leaves over.

    Raises:
        ValueError: for a setting outside its range.

    Example:
        >>> import numpy as np, cronos_flax as cf
        >>> X = np.random.default_rng(0).normal(size=(200, 5)).astype("float32")
        >>> y = np.abs(X[:, 0]) - X[:, 1]
        >>> solution = cf.Cronos(beta=1e-4).solve(X, y, hidden=16)
        >>> bool(solution.stats.objective < 0.05)
        True

    References:
        Feng, Frangella, Pilanci, *CRONOS: Enhancing Deep Learning with Scalable GPU Accelerated Convex Neural
        Networks*, NeurIPS 2024, arXiv:2411.01088. The refreshed path is this package's own.
    """

    loss: str | Loss = "squared"
    beta: float | Array | str | None = None
    rho: float | Array | None = None
    gates: str = "refreshed"
    linear_solver: Structured | NystromPCG = Structured()  # noqa: RUF009  (frozen)
    max_iters: int | None = None
    tol: float | Array = 1e-3
    certify_iters: int = 0
    class_weight: str | None = None
    beta_ratio: float | Array | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.loss, Loss):
            checks.choice("loss", self.loss, LOSSES, "a cf.Loss")
        if self.class_weight is not None:
            checks.choice("class_weight", self.class_weight, ("balanced",), "None")
        checks.choice("gates", self.gates, _GATES)
        if not isinstance(self.linear_solver, (Structured, NystromPCG)):
            raise ValueError(
                f"Cronos: `linear_solver` must be a cf.Structured or a cf.NystromPCG, got {self.linear_solver!r}."
            )
        if self.max_iters is not None:
            checks.positive_integer("Cronos", "max_iters", self.max_iters)
        checks.positive_integer("Cronos", "certify_iters", self.certify_iters, least=0)
        if not (isinstance(self.beta, str) and self.beta == "path"):
            checks.number("beta", self.beta, 'a number ≥ 0, None for the default, or "path"', lambda v: v >= 0)
        checks.number("beta_ratio", self.beta_ratio, "a number ≥ 0, or None for the default", lambda v: v >= 0)
        checks.number("rho", self.rho, "a number > 0, or None for the default", lambda v: v > 0)
        checks.number("tol", self.tol, "a number ≥ 0", lambda v: v >= 0)

    def solve(
        self,
        X: ArrayLike | Iterable[ArrayLike],
        y: ArrayLike,
        *,
        hidden: int | None = None,
        num_classes: int | None = None,
        sample_weight: ArrayLike | None = None,
        init: TwoLayer | None = None,
        state: refreshed.State | admm.State | None = None,
        key: Array | None = None,
        callback: Callable[[dict[str, float]], Any] | None = None,
        validation: tuple[ArrayLike, ArrayLike] | None = None,
    ) -> Solution:
        """Train a two-layer network on arrays.

        Exactly one of ``hidden``, ``init`` and ``state`` says where to start. Can be called inside ``jit`` and
        ``vmap``; values (finiteness, signs) are then not checked.

        Args:
            X: features, floating, shape ``(n, p)`` with ``n ≥ 2``, finite, any units. Or, for features that do not fit
                into memory, a re-iterable of such arrays that are consecutive rows, for instance a list of slices of a
                ``np.memmap``: every product with X is then accumulated block by block.
            y: targets as the loss takes them, shape ``(n,)`` or ``(n, C)``, finite: integer labels for ``"softmax"``,
                floats for ``"squared"`` (:func:`cronos_flax.signed_targets` makes them from labels).
            hidden: number of hidden neurons m, for a random start.
            num_classes: the number of outputs C; None reads it off ``y`` or ``init``.
            sample_weight: ``w_j ≥ 0``, shape ``(n,)``, not all zero; None means all equal. Rows of weight zero are as
                if absent; inside ``jit``, and in blocks, they still take places in the samples of the refreshed path.
            init: a network to start from; its widths and its missing biases are kept.
            state: ``solution.state`` of an earlier solve with the same ``gates``, to go on from there.
            key: key of the random start and of revived neurons; None means a fixed one.
            callback: called at every check (each step of the refreshed path, each tenth iteration of ADMM) with a flat
                dict of Python numbers: ``iteration``, ``seconds``, ``active_neurons`` and ``objective``; for held gates
                ``program_objective``, ``lower_bound``, ``gap`` (relative), ``cone_violation``, ``primal_residual``,
                ``dual_residual`` in its place. What it raises ends the solve.
            validation: for ``beta="path"``, rows ``(X, y)`` to choose on; None holds out a fifth of the rows, at random
                within each class or range of y.

        Returns:
            The :class:`Solution`. The regularised loss of ``solution.params`` is never above that of the start.

        Raises:
            ValueError: for arguments that do not fit, naming the argument, what was expected and what came.
        """
        features, y, weight = self._data(X, y, num_classes, _outputs_of(init, state), sample_weight)
        if callback is not None and not callable(callback):
            raise ValueError(f"solve: `callback` must be a function of one dict, got {callback!r}.")
        if isinstance(self.beta, str):
            start, _ = checks.start(self.gates, (features.shape[0], features.shape[1]), y, hidden, init, state)
            return self._solve_on_path(checks.path_data(features, y, weight), start, hidden, key, callback, validation)
        if validation is not None:
            raise ValueError(f'solve: `validation` is for beta="path" only, got beta={self.beta!r}.')
        weighted = sample_weight is not None and checks.concrete(weight)
        if self.gates == "refreshed" and weighted and isinstance(features, Array):
            counts = np.flatnonzero(weight)  # a row of no weight must not take a sample's place
            if len(counts) < len(weight):
                features, y, weight = features[counts], y[counts], weight[counts]
        start, m = checks.start(self.gates, (features.shape[0], features.shape[1]), y, hidden, init, state)
        solver = jax.tree.map(lambda v: jnp.asarray(v, y.dtype), self)
        key = jax.random.key(0) if key is None else key
        if callback is None and not isinstance(features, Source):
            run = _compiled(solver, features, y, weight, start, key)
            return run(solver, features, y, weight, start, key, None, hidden=m)
        source = features if isinstance(features, Source) else None
        with host.opened(source, callback and host.Progress(callback)) as (number, progress):
            rows = features if source is None else Blocks(number, *source.shape, source.rows, y.dtype)
            run = _compiled(solver, rows, y, weight, start, key)
            return jax.block_until_ready(run(solver, rows, y, weight, start, key, progress, hidden=m))

    def _solve_on_path(
        self,
        data: path.Data,
        start: TwoLayer | refreshed.State | admm.State | None,
        hidden: int | None,
        key: Array | None,
        callback: Callable[[dict[str, float]], Any] | None,
        validation: tuple[ArrayLike, ArrayLike] | None,
    ) -> Solution:
        """Choose β on rows held out, and fit all rows from the network found with it."""
        loss = loss_of(self.loss)
        network = start if isinstance(start, TwoLayer) or start is None else start.params
        key, split_key, beta_key = jax.random.split(jax.random.key(0) if key is None else key, 3)
        if validation is None:
            held = path.held_out(data.y, split_key)
            fit, chosen_on = data.take(~held), data.take(held)
        else:
            X, y, weight = self._data(*checks.pair("validation", validation), data.y.shape[1], None, None)
            fit, chosen_on = data, path.Data(checks.same_columns(X, data.X), y, weight)

        def solve(rows: path.Data, beta: float, init: TwoLayer | None, final: bool = False) -> Solution:
            init = network if init is None else init
            random = {"hidden": hidden} if init is None else {"init": init}
            # Targets and weights are as the loss and the classes made them.
            tol, tell = (self.tol, callback) if final else (jnp.maximum(self.tol, path.TOL), None)
            plain = dataclasses.replace(self, beta=beta, tol=tol, class_weight=None)
            return plain.solve(rows.X, rows.y, sample_weight=rows.weight, key=key, callback=tell, **random)

        hidden_bias, output_bias = _biases(self.gates, network)
        beta_max = _beta_max(*fit, beta_key, loss=loss, hidden_bias=hidden_bias, output_bias=output_bias)
        beta, best, betas, losses = path.follow(solve, loss, float(beta_max), fit, chosen_on)
        solution = solve(data, beta, best, final=True)
        stats = dataclasses.replace(solution.stats, path_betas=jnp.asarray(betas), path_losses=jnp.asarray(losses))
        return dataclasses.replace(solution, stats=stats)

    def objective(
        self,
        params: TwoLayer,
        X: ArrayLike,
        y: ArrayLike,
        beta: Float[Array, ""] | float,
        *,
        sample_weight: ArrayLike | None = None,
    ) -> Float[Array, ""]:
        """What :meth:`solve` minimises, of any network.

        Args:
            params: the network.
            X: features, shape ``(n, p)``.
            y: targets as the loss takes them.
            beta: weight decay; ``solution.stats.beta`` where it was chosen.
            sample_weight: as for :meth:`solve`.

        Returns:
            The regularised loss of the class's formula.

        Raises:
            ValueError: for arguments that do not fit, naming the argument, what was expected and what came.
        """
        features, y, weight = self._data(X, y, None, _outputs_of(params, None), sample_weight)
        if isinstance(features, Source):
            raise ValueError("objective: `X` must be one array (n, p), got blocks.")
        return regularised_loss(params, features, y, weight, jnp.asarray(beta, y.dtype), loss_of(self.loss))

    def _data(
        self, X: Any, y: ArrayLike, num_classes: int | None, outputs: int | None, sample_weight: ArrayLike | None
    ) -> tuple[Array | Source, Array, Array]:
        """Features, targets and weights, checked."""
        loss = loss_of(self.loss)
        features, y = checks.data(X, y, num_classes, outputs, loss)
        weight = checks.sample_weight(sample_weight, y)
        return features, y, weight if self.class_weight is None else weight * checks.balanced(loss, y)


def _outputs_of(init: Any, state: Any) -> int | None:
    """The number of outputs of the network to start from, for labels; what it does not fit is said later."""
    network = init if isinstance(init, TwoLayer) else getattr(state, "params", None)
    return None if network is None or jnp.ndim(network.kernel2) != 2 else network.kernel2.shape[1]


def _biases(gates: str, network: TwoLayer | None) -> tuple[bool, bool]:
    """Whether the network has a hidden and an output bias; the published program has no output bias."""
    if network is None:
        return True, gates != "paired"
    return network.bias1 is not None, network.bias2 is not None


@functools.partial(jax.jit, static_argnames=("loss", "hidden_bias", "output_bias"))
def _beta_max(
    X: Float[Array, "n p"],
    y: Float[Array, "n C"],
    weight: RowVector,
    key: Array,
    *,
    loss: Loss,
    hidden_bias: bool,
    output_bias: bool,
) -> Scalar:
    """β_max in the door's units."""
    with jax.default_matmul_precision("highest"):
        weight = _normalised(weight)
        rows, basis = scaled(X, y, weight, loss, hidden_bias=hidden_bias, output_bias=output_bias)
        return beta_max(rows, key) * basis.scale / jnp.sum(weight)


def _normalised(weight: RowVector) -> RowVector:
    """Summing to the number of rows that have any, so that the others are as if absent."""
    return weight * (jnp.count_nonzero(weight).astype(weight.dtype) / jnp.sum(weight))


class _Problem(NamedTuple):
    """One solve on the solver's coordinates; what both paths need."""

    rows: Rows
    basis: Basis
    total_weight: Scalar
    beta: Scalar
    rho: Scalar
    tol: Scalar
    gates: str
    max_iters: int
    certify_iters: int
    linear_solver: Structured | NystromPCG
    progress: Int[Array, ""] | None

    def rotated(self) -> "_Problem":
        """The same on the eigenbasis."""
        rows, basis = rotated(self.rows, self.basis)
        return self._replace(rows=rows, basis=basis)


class _Ended(NamedTuple):
    """How a path ended: its network with ``X U``, and how to make the state to go on from once the network is final."""

    network: tuple[Neurons, Directions, Bias, Activations]
    status: Array
    figures: dict[str, Array]
    state_of: Callable[[TwoLayer], Any]


def _compiled(*arguments: Any) -> Callable[..., Solution]:
    """The solve as it is called from Python, or as part of a program that is being traced."""
    # Inside jit even a constant is traced.
    is_traced = not all(map(checks.concrete, (*jax.tree.leaves(arguments), jnp.zeros(()))))
    return jax.jit(_solve, static_argnames="hidden") if is_traced else _solve_compiled_by_itself()


@functools.cache
def _solve_compiled_by_itself() -> Callable[..., Solution]:
    # XLA's fusion emitters for the CPU take much memory to compile many small kernels; tests/streamed.py prints it.
    options: dict[str, Any] | None = {"xla_cpu_use_fusion_emitters": False}
    try:
        jax.jit(lambda: 0, compiler_options=options)()
    except jax.errors.JaxRuntimeError:  # an XLA that has no such option
        options = None
    return jax.jit(_solve, static_argnames="hidden", compiler_options=options)


def _solve(
    solver: Cronos,
    features: Float[Array, "n p"] | Blocks,
    targets: Float[Array, "n C"],
    weight: RowVector,
    start: TwoLayer | refreshed.State | admm.State | None,
    key: Array,
    progress: Int[Array, ""] | None,
    *,
    hidden: int,
) -> Solution:
    with jax.default_matmul_precision("highest"):
        return _solve_at_full_precision(solver, features, targets, weight, start, key, progress, hidden)


def _solve_at_full_precision(
    solver: Cronos,
    features: Float[Array, "n p"] | Blocks,
    targets: Float[Array, "n C"],
    weight: RowVector,
    start: TwoLayer | refreshed.State | admm.State | None,
    key: Array,
    progress: Int[Array, ""] | None,
    hidden: int,
) -> Solution:
    beta_key, start_key, run_key = jax.random.split(key, 3)
    network = start if isinstance(start, TwoLayer) or start is None else start.params
    weight, loss = _normalised(weight), loss_of(solver.loss)
    hidden_bias, output_bias = _biases(solver.gates, network)
    rows, basis = scaled(features, targets, weight, loss, hidden_bias=hidden_bias, output_bias=output_bias)
    d, total = rows.X.shape[1], jnp.sum(weight)
    # β of the program is in sums over rows and scaled features (docs/method.md, "Units").
    assert not isinstance(solver.beta, str)
    ratio = _BETA_RATIO if solver.beta_ratio is None else solver.beta_ratio
    beta = ratio * beta_max(rows, beta_key) if solver.beta is None else solver.beta * total / basis.scale
    door_beta = beta * basis.scale / total
    rho = jnp.asarray(_RHO if solver.rho is None else solver.rho, rows.X.dtype)
    problem = _Problem(
        rows,
        basis,
        total,
        beta,
        rho,
        jnp.asarray(solver.tol),
        solver.gates,
        _MAX_ITERS if solver.max_iters is None else solver.max_iters,
        solver.certify_iters,
        solver.linear_solver,
        progress,
    )

    if solver.gates != "refreshed" and solver.linear_solver.on_eigenbasis:
        problem = problem.rotated()
        rows, basis = problem.rows, problem.basis
    if network is None:
        U = random_neurons(start_key, jnp.empty((d, hidden), rows.X.dtype)) / hidden
        A, b = default_directions(hidden, targets.shape[1], rows.X.dtype), rows.best_constant()
        network = to_network(rows, basis, U, A, b, rows.X @ U)
    else:
        U, A, b = from_network(network, rows, basis)
    ended = (_refreshed if solver.gates == "refreshed" else _held)(problem, (U, A, b), start, run_key)

    # The way to the solver's coordinates and back rounds; what is promised is promised of the network itself.
    found = to_network(rows, basis, *ended.network)
    before, after = (
        regularised_loss(params, features, targets, weight, door_beta, rows.loss) for params in (network, found)
    )
    params = jax.tree.map(lambda new, old: jnp.where(after <= before, new, old), found, network)
    lives = jnp.any(params.kernel2 != 0, axis=1) & jnp.any(params.kernel1 != 0, axis=0)
    constant = rows.loss.constant(rows.Y, rows.weight)
    stats = Stats(
        objective=jnp.where(after <= before, after, before),
        initial_objective=before,
        null_loss=rows.value(rows.constant(constant)) / total,
        beta=door_beta,
        active_neurons=jnp.sum(lives, dtype=jnp.int32),
        **ended.figures,
    )
    status = jnp.where(jnp.isfinite(before), ended.status, Status.nonfinite).astype(jnp.int32)
    return Solution(params, status, stats, ended.state_of(params))


def _refreshed(problem: _Problem, network: tuple[Neurons, Directions, Bias], start: Any, key: Array) -> _Ended:
    """Descend on the network's own loss, gates renewed at every step."""
    rows = problem.rows
    # The sketch's key is the call's, so that a solve which goes on from a state sketches what the whole one would have.
    sketch_key, key = jax.random.split(key)
    damping, key = (start.damping, start.key) if isinstance(start, refreshed.State) else (problem.rho, key)
    prepared = refreshed.prepare(rows, network[0].shape[1], sketch_key)
    first = refreshed.init(rows, *network, problem.beta, damping, key)
    if start is None:
        first = refreshed.warm_up(rows, prepared, problem.beta, first)

    def tell(done: Array, iterate: refreshed.Iterate) -> None:
        host.report(
            problem.progress,
            iteration=done,
            objective=iterate.objective / problem.total_weight,
            active_neurons=jnp.sum(~dead(iterate.U)),
        )

    last, stagnated, done, trace = refreshed.run(
        rows, prepared, problem.beta, first, tol=problem.tol, max_iters=problem.max_iters, tell=tell
    )
    figures = {"iterations": done, "cg_steps": last.cg_steps, "objective_trace": trace / problem.total_weight}
    if problem.certify_iters:
        params = to_network(rows, problem.basis, last.U, last.A, last.b, last.Z)
        if problem.linear_solver.on_eigenbasis:
            problem = problem.rotated()
        program = _program_of(problem, *from_network(params, problem.rows, problem.basis), key)
        figures |= _figures(problem, _solve_program(problem, *program, key, problem.certify_iters))
    return _Ended(
        (last.U, last.A, last.b, last.Z),
        status=jnp.where(stagnated, Status.stationary, Status.max_iters),
        figures=figures,
        state_of=lambda params: refreshed.State(params, last.damping, last.key),
    )


def _program_of(problem: _Problem, U: Neurons, A: Directions, b: Bias, key: Array) -> tuple[Program, admm.Iterate]:
    """The program with the gates of neurons U, random ones for dead neurons, and U as its iterate."""
    probe = jnp.where(dead(U), random_neurons(key, U), U)
    program = Program(problem.rows, problem.rows.X @ probe >= 0, A, problem.beta)
    return program, admm.init(program, U, b, problem.rho)


def _solve_program(problem: _Problem, program: Program, first: admm.Iterate, key: Array, max_iters: int) -> admm.Run:
    """ADMM to a certificate, or ``max_iters``."""
    method = program, problem.linear_solver, problem.basis.eigenvalues
    begun = admm.begin(*method, first, key, max_iters=max_iters)

    def tell(done: Array, check: admm.Check, iterate: admm.Iterate) -> None:
        gap = jnp.abs(check.program_objective - check.lower_bound) / jnp.abs(check.program_objective)
        host.report(
            problem.progress,
            iteration=done,
            program_objective=check.program_objective / problem.total_weight,
            lower_bound=check.lower_bound / problem.total_weight,
            gap=gap,
            cone_violation=check.cone_violation,
            primal_residual=check.primal_residual,
            dual_residual=check.dual_residual,
            rho=iterate.rho,
            active_neurons=jnp.sum(~dead(check.V)),
        )

    return admm.run(*method, begun, key, tol=problem.tol, until=max_iters, tell=tell)


def _figures(problem: _Problem, run: admm.Run) -> dict[str, Array]:
    """What a run of ADMM has to say of its program, for :class:`cronos_flax.Stats`."""
    total = problem.total_weight
    return {
        "program_objective": run.check.program_objective / total,
        "lower_bound": run.check.lower_bound / total,
        "lower_bound_trace": run.bounds / total,
        "cone_violation": run.check.cone_violation,
        "primal_residual": run.check.primal_residual,
        "dual_residual": run.check.dual_residual,
    }


def _held(problem: _Problem, network: tuple[Neurons, Directions, Bias], start: Any, key: Array) -> _Ended:
    """Solve the convex program of held gates by ADMM, and go there as far as the network's loss falls."""
    rows, basis, beta = problem.rows, problem.basis, problem.beta
    (U, A, b), (gate_key, run_key) = network, jax.random.split(key)
    if isinstance(start, admm.State):
        program = Program(rows, start.D, start.A, beta)
        V_plus_dual = basis.lift(*start.hidden_plus_dual)
        first = admm.Iterate(V_plus_dual, start.S_plus_dual, start.Z_plus_dual, start.z, start.rho, start.iteration)
    elif problem.gates == "fixed":
        program, first = _program_of(problem, U, A, b, gate_key)
    else:
        # Directions alternate in sign, so neighbours are the pairs (v, w) of the paper.
        probe = jnp.repeat(random_neurons(gate_key, U[:, ::2]), 2, axis=1)[:, : U.shape[1]]
        U, A = jnp.zeros_like(U), default_directions(A.shape[0], A.shape[1], A.dtype)
        program = Program(rows, rows.X @ probe >= 0, A, beta)
        first = admm.init(program, U, b, problem.rho)
    run = _solve_program(problem, program, first, run_key, problem.max_iters)
    last = run.iterate
    # The program's iterate may break its gates, and its network then be worse than the start's.
    Z = rows.X @ U
    toward = jax.tree.map(jnp.subtract, (run.check.V, run.check.b, rows.X @ run.check.V), (U, b, Z))
    lengths = jnp.asarray(_STEP_LENGTHS, U.dtype)

    def moved(length: Scalar) -> tuple[Neurons, Bias, Activations]:
        return jax.tree.map(lambda now, step: now + length * step, (U, b, Z), toward)

    def objective(length: Scalar) -> Scalar:
        U, b, Z = moved(length)
        return network_objective(rows, program.A, b, beta, U, Z)

    values = jax.lax.map(objective, lengths)
    U, b, Z = moved(lengths[jnp.argmin(jnp.where(jnp.isfinite(values), values, jnp.inf))])
    return _Ended(
        (U, program.A, b, Z),
        status=jnp.where(run.check.converged(problem.tol), Status.converged, Status.max_iters),
        figures={
            **_figures(problem, run),
            "iterations": run.done,
            "objective_trace": run.objectives / problem.total_weight,
        },
        state_of=lambda params: admm.State(
            params,
            basis.lower(last.V_plus_dual),
            program.D,
            program.A,
            last.S_plus_dual,
            last.Z_plus_dual,
            last.z,
            last.rho,
            last.iteration,
        ),
    )
