"""CRONOS-AM in a Flax train state: an Optax optimizer, and solves for the head."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from flax.training.train_state import TrainState
from jax import Array
from jaxtyping import Float

from cronos_flax._alternation.apply_fn import warn_if_another
from cronos_flax._alternation.backbone import (
    RatedState,
    alternating,
    check_lookahead,
    check_params,
    module_params,
    with_arguments,
)
from cronos_flax._alternation.defaults import Alternation, warn_of_running_statistics
from cronos_flax._alternation.first_solve import undecided_beta
from cronos_flax._alternation.guard import Guard, GuardState
from cronos_flax._alternation.guarded_solve import asked_for, solve_guarded
from cronos_flax._alternation.half_precision import warn_of_float16
from cronos_flax._alternation.optimizer_state import begun_anew, with_head
from cronos_flax._alternation.passed_on import warn_of_gradients_passed_on
from cronos_flax._head.head import Head
from cronos_flax._head.linen import Collections
from cronos_flax._solver.cronos import Cronos
from cronos_flax._solver.meshes import automatically
from cronos_flax._solver.solution import Solution, TwoLayer
from cronos_flax._solver.transfer import copied, on_host


def with_value(state: TrainState, value: Array, **given: Any) -> TrainState:
    """``state.apply_gradients(**given)``, with the loss for an optimizer that takes ``value``, such as MoMo.

    Flax's ``apply_gradients`` gives an optimizer nothing but gradients.
    """
    tx = state.tx
    if not isinstance(tx, optax.GradientTransformationExtraArgs):
        return state.apply_gradients(**given)
    told = optax.GradientTransformationExtraArgs(tx.init, functools.partial(with_arguments(tx).update, value=value))
    return state.replace(tx=told).apply_gradients(**given).replace(tx=tx)


@jax.jit
def _without_first(network: TwoLayer) -> TwoLayer:
    """The network with its first neuron at zero."""
    first = jnp.arange(network.kernel1.shape[1]) == 0
    kernel1, kernel2 = jnp.where(first, 0, network.kernel1), jnp.where(first[:, None], 0, network.kernel2)
    bias1 = None if network.bias1 is None else jnp.where(first, 0, network.bias1)
    return dataclasses.replace(network, kernel1=kernel1, bias1=bias1, kernel2=kernel2)


class CronosTrainState(TrainState):
    """Flax's ``TrainState`` for CRONOS-AM: between gradient steps, solves replace the head.

    ``apply_gradients`` is Flax's, for gradients of the mean loss. To those of the head it adds the weight decay
    that solves use; or, with a frozen head, it leaves the head where it is (see :class:`cronos_flax.Alternation`).
    :meth:`solve_head` replaces the head, and restores an earlier state if the optimizer's steps since the last solve
    have done harm.

    A subclass with fields that follow the parameters (an average of them, say) adds their names to ``guarded``.

    Args:
        head: from :func:`cronos_flax.find_head`.
        solver: how the head is solved, with the defaults of an alternation filled in.
        alternation: the parts of the alternation.
        beta: weight decay of solves and of the head's steps, in the units of the mean loss; infinite until the first
            solve chooses it, see ``largest_growth`` of :class:`cronos_flax.Alternation`. A solve with ``validation``
            chooses it anew; and the next one, if you replace it by infinity.
        model_state: the module's collections other than its parameters, such as ``{"batch_stats": …}``.
        guard: the state of the guard; None without guard. ``state.figures`` shows it as numbers.
    """

    head: Head = struct.field(pytree_node=False)
    solver: Cronos = struct.field(pytree_node=False)
    alternation: Alternation = struct.field(pytree_node=False)
    beta: Float[Array, ""]
    model_state: Any = struct.field(default_factory=dict)
    guard: GuardState | None = None

    guarded: ClassVar[tuple[str, ...]] = ("params", "opt_state", "model_state")

    @classmethod
    def create(  # type: ignore[override]
        cls,
        *,
        apply_fn: Callable,
        params: Any,
        tx: optax.GradientTransformation,
        head: Head,
        solver: Cronos | None = None,
        guard: Guard | bool | None = True,
        alternation: Alternation | None = None,
        **kwargs: Any,
    ) -> Self:
        """As ``TrainState.create``; ``tx`` is applied at a rate that the guard sets.

        Args:
            apply_fn: usually ``model.apply``.
            params: ``variables["params"]``.
            tx: any Optax optimizer.
            head: from :func:`cronos_flax.find_head`.
            solver: how the head is solved, with the same loss as the gradients; None means ``Cronos()``. Settings that
                are None take the defaults of an alternation, 3 iterations a solve (``max_iters``) and ``beta_ratio``
                .02 (.005 with a frozen head), unless the module is nothing but its head. ``print(state.solver)`` shows
                them.
            guard: settings of the guard, which restores the last good state if a solve ends above the best loss so far,
                and lowers the backbone's rate. It keeps a copy of parameters, collections and optimizer state. True
                means ``cf.Guard()``; False or None means no guard: every solve is accepted.
            alternation: what moves the head between solves, and when :func:`cronos_flax.train` solves; None means
                ``cf.Alternation()``.
            **kwargs: ``model_state``, and the fields of subclasses.

        Raises:
            ValueError: for a ``tx``, ``head``, ``solver``, ``guard`` or ``alternation`` of the wrong kind, for
                ``params`` without the head, and for a keyword that is no field, such as ``batch_stats``.

        Warns:
            UserWarning: if ``tx`` passes gradients on as they are, or makes NaN of float16 parameters, and if the head
                was found with the running statistics of batch norms.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        for name in kwargs.keys() - known:
            example = f'{{"{name}": ...}}'
            raise ValueError(
                f"CronosTrainState: `{name}` is not a field of {cls.__name__}. Give collections other than parameters "
                f"as model_state={example}; for fields of your own make a subclass."
            )
        solver, alternation, settings = asked_for("CronosTrainState", tx, head, Collections, solver, guard, alternation)
        check_params("CronosTrainState", params, head)
        moving = alternation.moves(head)
        left_out = () if moving else head.paths
        warn_of_gradients_passed_on("CronosTrainState", tx, params, module_params(params), left_out)
        tx = alternating(tx, head, moving, alternation.largest_step)
        warn_of_float16("CronosTrainState", tx, params, module_params(params))
        kwargs |= {"head": head, "solver": solver, "alternation": alternation, "beta": undecided_beta(solver)}
        with jax.transfer_guard("allow"):  # Optax makes its zeros on the host
            state = super().create(apply_fn=apply_fn, params=params, tx=tx, **kwargs)
        check_lookahead("CronosTrainState", state.params, state.opt_state)
        warn_of_running_statistics("CronosTrainState", head, state._statistics_in_training)
        if settings is None:
            return state
        parts = state._parts_with(None)
        drifts = bool(jax.tree.leaves(parts["model_state"])) and not head.in_training
        return state.replace(guard=GuardState.init(settings, parts, drifts))

    @property
    def variables(self) -> dict[str, Any]:
        """The variables that the module is applied with."""
        return {"params": module_params(self.params), **self.model_state}

    @property
    def figures(self) -> dict[str, float]:
        """The guard's decisions so far, as flat Python numbers; empty without a guard."""
        return {} if self.guard is None else self.guard.figures

    @property
    def optimizer_state(self) -> optax.OptState:
        """The state of ``tx`` as it would be without the wrapper; ``opt_state`` holds it with the guard's rate.

        For functions that take the state of one kind of optimizer: ``state.optimizer_state.hyperparams`` of
        ``optax.inject_hyperparams`` can be read and set, and ``optax.contrib.schedule_free_eval_params`` takes it with
        ``state.params``. For a frozen head ``tx`` keeps nothing: there the head's parameters stand.
        """
        if self.alternation.moves(self.head):
            return self.opt_state.optimizer_state
        return with_head(self.opt_state.optimizer_state, self.head.paths, module_params(self.params))

    def apply_gradients(self, *, grads: Any, value: Array | None = None, **kwargs: Any) -> Self:
        """One step of the optimizer.

        Args:
            grads: gradients of the mean loss, a tree like ``params``.
            value: the mean loss, for optimizers that take it, such as ``optax.contrib.momo``; :func:`cronos_flax.train`
                gives it.
            **kwargs: other fields to replace.

        Returns:
            The state after the step.
        """
        if value is None:
            return super().apply_gradients(grads=grads, **kwargs)
        return with_value(self, value, grads=grads, **kwargs)  # type: ignore[return-value]

    @property
    def _statistics_in_training(self) -> Any:
        """The running statistics of batch norms that may take those of the batch in training steps."""
        return self.variables.get("batch_stats")

    @property
    def _streams(self) -> dict[str, Any]:
        """The state of random streams in ``model_state``, which goes on when the guard goes back."""
        module = self.head.module
        assert isinstance(module, Collections)
        return {name: self.model_state[name] for name in module.streams if name in self.model_state}

    def _parts_with(self, network: TwoLayer | None, moments: Any = None) -> dict[str, Any]:
        """The guarded parts of the state with this head and these statistics; None stands for the present ones."""
        parts = {name: getattr(self, name) for name in self.guarded}
        parts["model_state"] = self.head.module.recalibrated(self.model_state, moments or {})
        if streams := self._streams:
            parts["model_state"] = {name: v for name, v in parts["model_state"].items() if name not in streams}
        if network is None:
            return parts
        ahead = isinstance(self.params, optax.LookaheadParams)
        old = self.params if ahead else (self.params,)
        # Copies: a user's step may donate the fast and the slow ones.
        new = [self.head.write({"params": params}, copied(network))["params"] for params in old]
        parts["params"] = optax.LookaheadParams(*new) if ahead else new[0]
        if self.alternation.moves(self.head):
            parts["opt_state"] = begun_anew(self.opt_state, self.tx, parts["params"], self.head.paths)
        return parts

    def _with_streams(self, parts: dict[str, Any]) -> dict[str, Any]:
        """Guarded parts with the random streams of now, which no guard takes back."""
        return {**parts, "model_state": {**parts["model_state"], **self._streams}} if self._streams else parts

    def _with_dead_neuron(self) -> Self:
        """The state with the first neuron of its head at zero: its solve needs the program for dead ones too."""
        parts = self._parts_with(automatically(_without_first, self.head.read(self.variables)))
        return self.replace(**self._with_streams(parts))

    def _check_parts(self) -> None:
        """Raise a ValueError for parts of the state that the user has replaced by others than ``create`` makes."""
        if not isinstance(self.opt_state, RatedState):
            raise ValueError(
                "solve_head: `opt_state` must be that of the state's own `tx`, as `create` makes it, got a "
                f"{type(self.opt_state).__name__}. For another optimizer make a new state: create(params=state.params, "
                "tx=..., ...), and with the weight decay of this one: .replace(beta=state.beta, step=state.step)."
            )
        if not isinstance(self.guard, GuardState | None):
            raise ValueError(
                f"solve_head: `guard` of a state must be a cf.GuardState or None, got a {type(self.guard).__name__}. "
                "Settings of a guard are given to `create`."
            )

    @property
    def _is_unsolved(self) -> bool:
        """Whether this state has seen no solve, as far as it remembers."""
        solves = int(on_host(self.step if self.guard is None else self.guard.solves))
        return solves == 0 or not np.isfinite(on_host(self.beta))

    def solve_head(
        self,
        data: Any,
        *,
        validation: Any = None,
        unpack: Callable[[Any], tuple] | None = None,
        key: Array | None = None,
        callback: Callable[[dict[str, float]], Any] | None = None,
        throw: bool = True,
    ) -> tuple[Self, Solution]:
        """Solve for the head on the present features, starting from the present head.

        Runs on the host, between jitted training steps; ``step`` does not change. The regularised loss of the network
        on ``data`` never rises. If it ends above the least loss of earlier solves, by more than the guard's tolerance,
        the solve is rejected: parameters, collections and optimizer state go back to those of the last accepted solve,
        the backbone continues at a lower rate, and ``solution.status`` is ``Status.rejected``. Accepted solves raise
        the rate again (see :class:`cronos_flax.Guard`).

        If features are those of batch statistics, the running statistics in ``model_state`` become those of all rows of
        ``data``, from the same pass (see ``recalibrate`` of :func:`cronos_flax.find_head`).

        Args:
            data: as for :func:`cronos_flax.fit_head`, as are the other arguments. The guard compares losses from solve
                to solve, so give the same rows each time, or samples of the same rows.
            validation: rows to choose β on anew, in the form of ``data``, to which nothing has been fitted: the head is
                solved for at 4 and 16 times the present β, as long as the mean loss on these rows falls; if it does
                not fall at 4 times, at a fourth and a sixteenth. A first solve begins at a fourth of the β it would
                else have. None keeps β, and so do features that are not finite.
            unpack: how to take a batch apart.
            key: key of samples and revived neurons; None derives one from ``step``.
            callback: called after each batch, at each step of the solve, and with ``state.figures`` at the end. The
                first solve may be several, with larger and larger β.
            throw: raise on numerical failure if no earlier state can be restored.

        Returns:
            The state with the new head, or the restored state; and the :class:`cronos_flax.Solution`.

        Raises:
            ValueError: for data that do not fit.
            OSError: if the temporary directory has no room for features that memory should not hold.
            FloatingPointError: if the loss is not finite at the first solve, or without guard, and ``throw``.

        Warns:
            UserWarning: at the first solve, if ``apply_fn`` is another function than the module of the head. If the
                guard goes back twice in a row, or lowers the rate below a hundredth of the optimizer's own. If the
                network explains next to nothing after a solve. If running statistics that it sets are not in
                ``model_state``. And where :meth:`cronos_flax.Cronos.solve` warns.
        """
        self._check_parts()

        def compare(variables: Any, args: tuple, kwargs: Mapping, out: Array) -> None:
            if self._is_unsolved:
                warn_if_another(self.apply_fn, self.head, variables, args, kwargs, out)

        guard, beta, changed, solution = solve_guarded(
            self.guard,
            self.beta,
            self.head,
            self.variables,
            self.solver,
            self.alternation,
            self._parts_with,
            data,
            validation=validation,
            unpack=unpack,
            key=key,
            step=self.step,
            callback=callback,
            throw=throw,
            compare=compare,
        )
        return self.replace(guard=guard, beta=beta, **self._with_streams(changed)), solution
