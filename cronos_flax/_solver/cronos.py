"""``Cronos``: the settings of a solve, and its entry point, which owns the checks."""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float

from cronos_flax._solver import beta_path, checks, doubts, host
from cronos_flax._solver.arrays import is_concrete
from cronos_flax._solver.beta_max import user_beta_max
from cronos_flax._solver.beta_path import Data
from cronos_flax._solver.blocks import Blocks, Source
from cronos_flax._solver.linear_solvers import NystromPCG, Structured
from cronos_flax._solver.loss import Loss, check_told_apart
from cronos_flax._solver.losses import LOSSES, loss_of
from cronos_flax._solver.meshes import automatically, check_together, mesh_of
from cronos_flax._solver.padding import padded
from cronos_flax._solver.processes import on_first
from cronos_flax._solver.program import compiled_loss
from cronos_flax._solver.settings import Held, Refreshed
from cronos_flax._solver.solution import Network, Solution, TwoLayer, check_network, with_stats
from cronos_flax._solver.solve import BETA_RATIO, RHO, TOL, Asked, State, biases, solve
from cronos_flax._solver.staging import OnHost, control_of
from cronos_flax._solver.transfer import default_key, on_device, on_host

GATES = ("refreshed", "fixed", "paired", "gated")
MAX_ITERS = 500  # of a single fit, where the setting is None


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["beta", "beta_ratio", "rho", "tol"],
    meta_fields=[
        "loss",
        "gates",
        "linear_solver",
        "max_iters",
        "certify_iters",
        "class_weight",
        "refreshed",
        "held",
        "max_bytes",
        "folds",
    ],
)
@dataclasses.dataclass(frozen=True)
class Cronos:
    r"""Solver for two-layer ReLU networks, ``relu(X kernel1 + bias1) kernel2 + bias2``, and for gated ones.

    With ``f_j`` the output for row j, ``w_j`` its weight, and s the root mean squared row norm of X, it minimises::

        Σ w_j ℓ(f_j, y_j) / Σ w_j + (beta/2) (‖kernel1‖² + ‖bias1‖²/s² + ‖kernel2‖²)

    so ``beta`` is the weight decay of Flax and Optax. The solution does not depend on the units of X: features that are
    multiplied by c, with ``beta`` multiplied by c, give the same network.

    A ``Cronos`` is a pytree. Its leaves are ``beta``, ``beta_ratio``, ``rho`` and ``tol``: other values of these do not
    compile the solve again. All other settings are static.

    Args:
        loss: ``"squared"`` (``½‖f − y‖²``), ``"softmax"`` (labels, or probabilities), ``"logistic"`` (y in [0, 1]),
            ``"huber"``, ``"hinge"`` (y = ±1), or a :class:`cronos_flax.Loss`.
        beta: weight decay, ``≥ 0``. None takes the fraction ``beta_ratio`` of β_max, the smallest weight decay at which
            the best network is constant. ``"path"`` tries seven values from β_max/10 to β_max/10,000, chooses the one
            of least loss on held-out rows, and fits all rows with it.
        rho: ADMM's first penalty, or the first damping of the refreshed path, ``> 0``; None takes 1. The solver adapts
            it, except with ``cf.NystromPCG``.
        gates: ``"refreshed"`` renews the ReLU gates at every iteration and lowers the loss of the network itself. The
            others hold the gates and solve that convex program by ADMM, with a lower bound on its optimum: ``"fixed"``
            holds the gates of the starting network, ``"paired"`` random gates, each used by two neurons of opposite
            direction. ``"paired"`` with ``cf.NystromPCG()`` is the published algorithm, which has no output bias unless
            the network given has one. ``"gated"`` holds the gates of the starting network, and lets its neurons have
            any sign where these are on: the solution is a :class:`cronos_flax.GatedTwoLayer`, whose loss is that of the
            program. It is for :meth:`solve` only, as a head is a ReLU network.
        linear_solver: how ADMM solves its linear systems: ``cf.Structured()`` or ``cf.NystromPCG()``.
        max_iters: most iterations of one solve. None takes 500, and in an alternation 3.
        tol: stopping tolerance, ``≥ 0``. Held gates stop when the relative gap and the relative constraint violation
            are below it; ``"refreshed"`` stops when the loss fell by less than this fraction over the last ten
            iterations (``refreshed.window``). None takes .001, and ``"refreshed"`` then also stops when going on would
            not pay: when ten iterations, or, if these are cheap, more of them, brought less than a 200th of what
            the network explains (the loss of the best constant minus the present one).
        certify_iters: iterations of ADMM that ``"refreshed"`` spends at its end on the convex program of its final
            gates. ``stats.lower_bound`` then says how good the network is among those with these gates. 0 spends none.
        class_weight: ``"balanced"`` multiplies the weight of each row by ``n / (classes · rows of its class)``;
            a row of probabilities counts for each class with its probability. Rows of weight zero are not counted.
        beta_ratio: fraction of β_max that ``beta=None`` takes, ``≥ 0``. None takes .001, and in an alternation .02
            (.005 with a frozen head).
        refreshed: constants of the refreshed path, for experts.
        held: constants of ADMM, for experts.
        max_bytes: most bytes of features that ``fit_head`` and ``solve_head`` keep in memory, ``4 n p`` for n rows of p
            features in float32. More are read in blocks, and features that are not in files yet are written to a
            temporary one. None takes a sixth of the memory that is free: on the machine, in the control group of the
            process, or on the accelerator, whichever is least. :meth:`solve` does not look at it, and features that
            come on a mesh of devices stay in the memory of these.
        folds: for ``beta="path"``: choose by the mean over so many folds of the rows, ``≥ 2``, each held out in turn.
            That takes some times as long. None holds out a fifth, and with fewer than 300 rows takes five folds.

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
        Networks*, NeurIPS 2024, arXiv:2411.01088. Gated networks: Mishkin, Sahiner, Pilanci, *Fast Convex Optimization
        for Two-Layer ReLU Networks*, ICML 2022, arXiv:2202.01331. The refreshed path is this package's own.
    """

    loss: str | Loss = "squared"
    beta: float | Array | str | None = None
    rho: float | Array | None = None
    gates: str = "refreshed"
    linear_solver: Structured | NystromPCG = Structured()  # noqa: RUF009  (frozen)
    max_iters: int | None = None
    tol: float | Array | None = None
    certify_iters: int = 0
    class_weight: str | None = None
    beta_ratio: float | Array | None = None
    refreshed: Refreshed = Refreshed()  # noqa: RUF009  (frozen)
    held: Held = Held()  # noqa: RUF009  (frozen)
    max_bytes: int | None = None
    folds: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.loss, Loss):
            checks.one_of("Cronos", "loss", self.loss, LOSSES, "a cf.Loss")
        else:
            check_told_apart("Cronos", self.loss)
        if self.class_weight is not None:
            checks.one_of("Cronos", "class_weight", self.class_weight, ("balanced",), "None")
        checks.one_of("Cronos", "gates", self.gates, GATES)
        if not isinstance(self.linear_solver, (Structured, NystromPCG)):
            raise ValueError(
                f"Cronos: `linear_solver` must be a cf.Structured or a cf.NystromPCG, got {self.linear_solver!r}."
            )
        for name, kind in (("refreshed", Refreshed), ("held", Held)):
            if not isinstance(getattr(self, name), kind):
                raise ValueError(f"Cronos: `{name}` must be a cf.{kind.__name__}, got {getattr(self, name)!r}.")
        if self.max_iters is not None:
            checks.positive_integer("Cronos", "max_iters", self.max_iters)
        if self.max_bytes is not None:
            checks.positive_integer("Cronos", "max_bytes", self.max_bytes)
        checks.positive_integer("Cronos", "certify_iters", self.certify_iters, least=0)
        if self.folds is not None:
            checks.positive_integer("Cronos", "folds", self.folds, least=2)
        number = functools.partial(checks.number, "Cronos")
        if not (isinstance(self.beta, str) and self.beta == "path"):
            number("beta", self.beta, 'a number ≥ 0, None for the default, or "path"', lambda v: v >= 0)
        number("beta_ratio", self.beta_ratio, "a number ≥ 0, or None for the default", lambda v: v >= 0)
        number("rho", self.rho, "a number > 0, or None for the default", lambda v: v > 0)
        number("tol", self.tol, "a number ≥ 0, or None for the default", lambda v: v >= 0)
        checks.in_python(self, "max_iters", "max_bytes", "certify_iters", "folds")

    def solve(
        self,
        X: ArrayLike | Iterable[ArrayLike],
        y: ArrayLike,
        *,
        hidden: int | None = None,
        num_classes: int | None = None,
        sample_weight: ArrayLike | None = None,
        init: Network | None = None,
        state: State | None = None,
        key: Array | None = None,
        callback: Callable[[dict[str, float]], Any] | None = None,
        validation: tuple[ArrayLike, ArrayLike] | None = None,
    ) -> Solution:
        """Train a two-layer network on arrays.

        Exactly one of ``hidden``, ``init`` and ``state`` says where to start. Can be called inside ``jit`` and
        ``vmap``, unless ``callback`` or blocks of X need the host; targets and weights whose values would be refused
        then give ``Status.nonfinite``.

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
            init: a network to start from; its widths and its missing biases are kept. For ``gates="gated"`` a
                :class:`cronos_flax.GatedTwoLayer`, whose gates are kept, or a :class:`cronos_flax.TwoLayer`, whose
                neurons are the gates (random ones for neurons that are nearly zero). For the others a TwoLayer. Where a
                refreshed solve from a network with both biases is stuck at the best constant or above it, one from a
                random network is tried too, and the better one returned; not inside ``jit``.
            state: ``solution.state`` of an earlier solve with the same ``gates``, to go on from there.
            key: key of the random start and of revived neurons; None means a fixed one.
            callback: called at every check (each step of the refreshed path, each tenth iteration of ADMM) with a flat
                dict of Python numbers: ``iteration``, ``seconds``, ``active_neurons`` and ``objective``; for held gates
                ``program_objective``, ``lower_bound``, ``gap`` (relative), ``cone_violation``, ``primal_residual``,
                ``dual_residual`` and ``rho`` in its place. What it raises ends the solve.
            validation: for ``beta="path"`` without ``folds``, rows ``(X, y)`` to choose on; None holds out rows of
                those given, at random within each class or range of y.

        Returns:
            The :class:`cronos_flax.Solution`. The regularised loss of ``solution.params`` is never above that of the
            start.

        Raises:
            ValueError: for arguments that do not fit, naming the argument, what was expected and what came.

        Warns:
            UserWarning: if C is read off labels, and one below the largest is in no row. If the features are the same
                in all rows. If targets, or features that explain little, lie so far from zero that rounding hides what
                tells them apart. If the squares of targets are zero. If little is explained, and a few rows are far
                larger than the others, or the residuals far larger than ``delta`` of :class:`cronos_flax.Huber`.
        """
        checks.folds_of_path("solve", self.folds, self.beta)
        data = self._data(X, y, num_classes, _outputs_of(init, state), sample_weight)
        doubts.warn_of_rounding(y, data.y.dtype, loss_of(self.loss))
        return self._solve(
            data,
            is_weighted=sample_weight is not None,
            hidden=hidden,
            init=init,
            state=state,
            key=key,
            callback=callback,
            validation=validation,
        )

    def solve_features(
        self,
        X: ArrayLike | Source,
        y: ArrayLike,
        *,
        init: TwoLayer,
        sample_weight: ArrayLike | None,
        key: Array | None,
        callback: Callable[[dict[str, float]], Any] | None,
        order: Array | None = None,
    ) -> Solution:
        """:meth:`solve` from ``init``, with the same arguments, for features that are known to be finite.

        Their values are not checked again. The ``beta`` that None stands for is found by a small program of its own, so
        that a solve with this ``beta`` runs the same program; not for a source of blocks. ``order`` says where the rows
        are that samples are drawn from, if they lie on several devices or in another order; None for all, as they
        stand.
        """
        checks.relu_only("solve", self.gates)
        solver, data = self, self._data(X, y, None, _outputs_of(init, None), sample_weight, known_finite=True)
        doubts.warn_of_rounding(y, data.y.dtype, loss_of(self.loss))
        if self.beta is None and not isinstance(data.X, Source):
            ratio = BETA_RATIO if self.beta_ratio is None else self.beta_ratio
            beta_max = self._user_beta_max(data, init, order)
            if not np.isfinite(on_host(beta_max)):  # nor is the loss, as the status of the solve says
                beta_max = on_device(0, beta_max.dtype)
            solver = dataclasses.replace(self, beta=on_device(ratio, beta_max.dtype) * beta_max)
        is_weighted = sample_weight is not None
        return solver._solve(data, is_weighted=is_weighted, init=init, key=key, callback=callback, order=order)

    def _solve(
        self,
        data: Data,
        *,
        is_weighted: bool,
        init: Network | None,
        key: Array | None,
        callback: Callable[[dict[str, float]], Any] | None,
        hidden: int | None = None,
        state: State | None = None,
        validation: tuple[ArrayLike, ArrayLike] | None = None,
        order: Array | None = None,
    ) -> Solution:
        """:meth:`solve` on data that are checked; ``is_weighted`` says whether some of their weights may be zero."""
        if callback is not None and not callable(callback):
            raise ValueError(f"solve: `callback` must be a function of one dict, got {callback!r}.")
        if callback is not None or isinstance(data.X, Source):
            what = "`X` in blocks" if callback is None else "`callback`"
            checks.on_the_host(what, (self, *data, init, state, key))
        callback = on_first(callback)
        if key is not None:
            checks.random_key("solve", key)
        for name in ("beta", "beta_ratio", "rho", "tol"):
            checks.single("solve", name, getattr(self, name))
        if validation is not None and not isinstance(self.beta, str):
            raise ValueError(f'solve: `validation` is for beta="path" only, got beta={self.beta!r}.')
        if validation is not None and self.folds is not None:
            raise ValueError(f"solve: `validation` takes the place of folds, got both, and folds={self.folds}.")
        start, m = checks.start(self.gates, (data.X.shape[0], data.X.shape[1]), data.y, hidden, init, state)
        check_together("solve", X=data.X, init=init, state=state, key=key, beta=self.beta)
        key = default_key() if key is None else key
        if isinstance(self.beta, str):
            first: Any = getattr(start, "params", start)
            rows = beta_path.choosable(data, order, (self, start, key))
            solution = self._solve_on_path(rows, first, m, key, callback, validation)
            doubts.warn_of_units(data.X, data.weight, loss_of(self.loss), solution)
            return solution
        is_weighted = is_weighted and is_concrete(data.weight)
        if self.gates == "refreshed" and is_weighted and isinstance(data.X, Array) and order is None:
            counts = on_host(data.weight) > 0  # a row of no weight must not take a sample's place
            if not counts.all() and mesh_of(data.X) is None:
                data = data.take(counts)
            elif not counts.all():  # rows stay on their devices
                order = on_device(np.flatnonzero(counts), np.int32)
        solution = self._solve_checked(data, start=start, hidden=m, key=key, callback=callback, order=order)
        doubts.warn_of_units(data.X, data.weight, loss_of(self.loss), solution)
        return solution

    def _solve_checked(
        self,
        data: Data,
        *,
        start: Network | State | None,
        hidden: int,
        key: Array,
        callback: Callable[[dict[str, float]], Any] | None,
        order: Array | None = None,
        length: int | None = None,
        patience: int | None = None,
    ) -> Solution:
        """Run the compiled solve on arguments that fit together; rows after the first ``length`` have weight zero."""
        features, y, weight = data
        max_iters = MAX_ITERS if self.max_iters is None else self.max_iters
        # What does not matter to the compiled programs must not compile them anew.
        solver = dataclasses.replace(self, max_iters=None, class_weight=None, max_bytes=None, folds=None)
        if self.gates != "refreshed":  # nor does it whether a number was given; a descent without a tol ends otherwise
            rho, tol = RHO if self.rho is None else self.rho, TOL if self.tol is None else self.tol
            solver = dataclasses.replace(solver, rho=rho, tol=tol)
        solver = jax.tree.map(lambda v: on_device(v, y.dtype), solver)
        limits: Any = {"hidden": hidden, "max_iters": max_iters, "patience": patience}

        def solved(rows: Any, progress: Array | None) -> Solution:
            counted = None if length is None else on_device(np.int32(length))
            asked = Asked(solver, rows, y, weight, start, key, progress, order, counted)
            solution = solve(asked, **limits)
            if self.gates != "refreshed" or not (doubts.is_full(start) and doubts.is_lost(solution)):
                return solution
            again = solve(asked._replace(start=None), **limits)
            if not on_host(again.stats.objective < solution.stats.objective):
                return solution
            first = solution.stats.initial_objective
            return with_stats(again, initial_objective=first)

        if callback is None and not isinstance(features, Source):
            return solved(features, None)
        source = features if isinstance(features, Source) else None
        with host.opened(source, callback and host.Reporter(callback)) as (number, progress):
            rows: Any = features if source is None else Blocks(number, *source.shape, source.rows, y.dtype)
            return jax.block_until_ready(solved(rows, progress))

    def _solve_on_path(
        self,
        data: Data,
        network: Network | None,
        hidden: int,
        key: Array,
        callback: Callable[[dict[str, float]], Any] | None,
        validation: tuple[ArrayLike, ArrayLike] | None,
    ) -> Solution:
        """Choose β on held-out rows, of one split or of all folds, then fit all rows from a network found with it."""
        if validation is not None:
            pair = beta_path.pair(validation)
            try:
                given = self._data(*pair, data.y.shape[1], None, None)
            except ValueError as error:
                raise ValueError(str(error).replace("solve:", "solve: in `validation`", 1)) from None
            parts = [beta_path.Part(data, beta_path.same_columns(given, data))]
        else:
            parts = beta_path.parts(data, key, self.folds)

        def solve(rows: Data, length: int | None, beta: float, init: Network | None, final: bool = False) -> Solution:
            tol, patience = self.tol, None
            if not final and tol is None and self.gates == "refreshed":
                patience = beta_path.PATIENCE
            elif not final:
                tol = beta_path.TOL if tol is None else max(float(on_host(tol)), beta_path.TOL)
            # The weights are as the classes made them.
            plain = dataclasses.replace(self, beta=beta, tol=tol, class_weight=None)
            how: Any = {"key": key, "callback": callback if final else None, "patience": patience}
            start = network if init is None else init
            return plain._solve_checked(rows, start=start, hidden=hidden, length=length, **how)

        beta_max, loss = float(on_host(self._user_beta_max(parts[0].fit, network))), loss_of(self.loss)
        path = beta_path.follow_all(solve, loss, beta_max, parts)
        beta, best = path.best
        # The number of all rows, so that the programs are those of the parts.
        solution = solve(data, None if parts[0].length is None else len(data.y), beta, best, final=True)
        tried, losses = on_device(path.betas), on_device(path.losses)
        return with_stats(solution, path_betas=tried, path_losses=losses)

    def _user_beta_max(self, data: Data, network: Network | None, order: Array | None = None) -> Array:
        hidden_bias, output_bias = biases(self.gates, network)
        static = {"loss": loss_of(self.loss), "hidden_bias": hidden_bias, "output_bias": output_bias}
        control = control_of(data)
        if control is OnHost and order is None:
            data = Data(*(padded(data, self.refreshed) or data))
        return control.run(user_beta_max, *data, order, **static)

    def objective(
        self,
        params: Network,
        X: ArrayLike | Source,
        y: ArrayLike,
        beta: Float[Array, ""] | float,
        *,
        sample_weight: ArrayLike | None = None,
    ) -> Float[Array, ""]:
        """The regularised loss of a network, which :meth:`solve` minimises.

        Args:
            params: the network, of either kind. Gates of its own are not penalised.
            X: features, shape ``(n, p)``.
            y: targets as the loss takes them.
            beta: weight decay; ``solution.stats.beta`` where it was chosen.
            sample_weight: as for :meth:`solve`.

        Returns:
            The regularised loss of the class's formula.

        Raises:
            ValueError: for arguments that do not fit, naming the argument, what was expected and what came.
        """
        check_network("objective", params)
        if beta is None:
            raise ValueError("objective: `beta` must be a number ≥ 0, got None. A solve's is solution.stats.beta.")
        expected = "a number ≥ 0, as a solve's solution.stats.beta"
        checks.number("objective", "beta", beta, expected, lambda v: v >= 0)
        checks.single("objective", "beta", beta)
        features, y, weight = self._data(X, y, None, _outputs_of(params, None), sample_weight)
        check_together("objective", params=params, X=features)
        rest, run = (y, weight, on_device(beta, y.dtype)), functools.partial(compiled_loss, loss=loss_of(self.loss))
        if not isinstance(features, Source):
            return automatically(run, params, features, *rest)
        if features is not X:
            raise ValueError("objective: `X` must be one array (n, p), got blocks.")
        with host.opened(features) as (number,):
            rows = Blocks(number, *features.shape, features.rows, y.dtype)
            return jax.block_until_ready(automatically(run, params, rows, *rest))

    def _data(
        self,
        X: Any,
        y: ArrayLike,
        num_classes: int | None,
        outputs: int | None,
        sample_weight: ArrayLike | None,
        known_finite: bool = False,
    ) -> Data:
        """Features, targets and weights, checked; the weights with those of the classes."""
        loss = loss_of(self.loss)
        features, y = checks.data(X, y, num_classes, outputs, loss, known_finite=known_finite)
        weight = checks.sample_weight(sample_weight, y)
        is_put_beside = mesh_of(features) is not None and mesh_of(y) is None  # by the solve, wherever it lies
        check_together("solve", X=features, y=None if is_put_beside else y, sample_weight=weight)
        return Data(features, y, weight if self.class_weight is None else weight * checks.balanced(loss, y, weight))


def _outputs_of(init: Any, state: Any) -> int | None:
    """The number of outputs of the network to start from, for labels; what it does not fit is said later."""
    network = init if isinstance(init, Network) else getattr(state, "params", None)
    return None if network is None or np.ndim(network.kernel2) != 2 else np.shape(network.kernel2)[1]
