"""CRONOS-AM for Flax NNX: an ``nnx.Optimizer``, and solves for the head."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import optax
from flax import nnx
from jax import Array

from cronos_flax._alternation.backbone import rated
from cronos_flax._alternation.defaults import Alternation, warn_of_running_statistics
from cronos_flax._alternation.first_solve import undecided_beta
from cronos_flax._alternation.guard import Guard, GuardState
from cronos_flax._alternation.guarded_solve import asked_for, solve_guarded
from cronos_flax._alternation.half_precision import warn_of_float16
from cronos_flax._alternation.optimizer_state import begun_anew
from cronos_flax._alternation.passed_on import warn_of_gradients_passed_on
from cronos_flax._head.head import Head
from cronos_flax._head.nnx import NnxModule
from cronos_flax._head.paths import Path
from cronos_flax._solver.cronos import Cronos
from cronos_flax._solver.solution import Solution, TwoLayer


@dataclasses.dataclass(frozen=True)
class _OutsideHead:
    """A filter of NNX: the Variables that ``wrt`` selects, without the head's."""

    wrt: Any
    paths: tuple[Path, Path]

    def __call__(self, path: tuple, value: Any) -> bool:
        inside = any(tuple(path[: len(p)]) == p for p in self.paths)
        return not inside and nnx.filterlib.to_predicate(self.wrt)(path, value)


@dataclasses.dataclass(frozen=True, eq=False)
class _Solving:
    """The head and how it is solved; static, and compared by identity."""

    head: Head
    solver: Cronos
    alternation: Alternation


class GuardVariable(nnx.Variable):
    """Holds the :class:`cronos_flax.GuardState` of a :class:`CronosOptimizer`."""


class BetaVariable(nnx.Variable):
    """Holds the weight decay of all solves of a :class:`CronosOptimizer`; infinite until the first chooses it."""


class CronosOptimizer(nnx.Optimizer):
    """CRONOS-AM for NNX: between gradient steps, solves replace the head.

    ``update(model, grads)`` is that of ``nnx.Optimizer``, for gradients of the mean loss. To those of the head it adds
    the weight decay that solves use; or, with a frozen head, it leaves the head where it is (see
    :class:`cronos_flax.Alternation`). :meth:`solve_head` replaces the head, and restores an earlier state if the
    optimizer's steps since the last solve have done harm.

    Args:
        model: the model.
        tx: any Optax optimizer.
        head: from :func:`find_head`.
        solver: how the head is solved, with the same loss as the gradients; None means ``Cronos()``. Settings that are
            None take the defaults of an alternation, 3 iterations a solve (``max_iters``) and ``beta_ratio`` .02 (.005
            with a frozen head), unless the model is nothing but its head.
        guard: as for :meth:`cronos_flax.CronosTrainState.create`; ``optimizer.figures`` shows the decisions. All
            Variables of the model are guarded, except the state of its random streams.
        alternation: what moves the head between solves; None means ``cf.Alternation()``.
        wrt: the Variables that the optimizer moves, as for ``nnx.Optimizer``; those of a frozen head are left out.

    Raises:
        ValueError: for a ``tx``, ``head``, ``solver``, ``guard`` or ``alternation`` of the wrong kind.

    Warns:
        UserWarning: if ``tx`` passes gradients on as they are, if it makes NaN of float16 parameters, and if the head
            was found with the running statistics of batch norms.
    """

    def __init__(
        self,
        model: nnx.Module,
        tx: optax.GradientTransformation,
        *,
        head: Head,
        solver: Cronos | None = None,
        guard: Guard | bool | None = True,
        alternation: Alternation | None = None,
        wrt: Any = nnx.Param,
    ) -> None:
        solver, alternation, settings = asked_for("CronosOptimizer", tx, head, NnxModule, solver, guard, alternation)
        largest_step = alternation.largest_step
        with jax.transfer_guard("allow"):  # Optax makes its zeros on the host
            if alternation.moves(head):
                super().__init__(model, rated(tx, head.paths, largest_step), wrt=wrt)
            else:
                outside = _OutsideHead(wrt, head.paths)
                super().__init__(model, rated(tx, largest_step=largest_step), wrt=outside)
        params = nnx.as_pure(nnx.state(model, self.wrt))
        warn_of_gradients_passed_on("CronosOptimizer", tx, params, params)
        warn_of_float16("CronosOptimizer", self.tx, params, params)
        self.solving = nnx.static(_Solving(head, solver, alternation))
        self.beta = BetaVariable(undecided_beta(solver))
        statistics = nnx.state(model, nnx.Not(nnx.Any(nnx.Param, nnx.RngState)))
        drifts = bool(jax.tree.leaves(statistics)) and not head.in_training
        warn_of_running_statistics("CronosOptimizer", head, nnx.filter_state(statistics, nnx.BatchStat))
        made = None if settings is None else GuardState.init(settings, self._parts(model), drifts)
        self.guard = None if made is None else GuardVariable(made)

    def update(self, model: nnx.Module, grads: Any, /, **kwargs: Any) -> Any:
        """One step of the optimizer, which changes the model in place.

        Args:
            model: the model.
            grads: gradients of the mean loss, as ``nnx.grad`` gives them.
            **kwargs: what ``tx`` takes besides, such as ``value=``, the mean loss.

        Returns:
            The updates of the parameters.

        Raises:
            ValueError: for a ``model`` that is none, as when the two are given the other way round.
        """
        if not isinstance(model, nnx.Module):
            raise ValueError(
                f"update: `model` must be an NNX module, got {type(model).__name__}. Call optimizer.update(model, "
                "grads), in this order."
            )
        return super().update(model, grads, **kwargs)

    @property
    def figures(self) -> dict[str, float]:
        """The guard's decisions so far, as flat Python numbers; empty without a guard."""
        return {} if self.guard is None else self.guard.get_value().figures

    @property
    def optimizer_state(self) -> optax.OptState:
        """The state of ``tx``; ``opt_state`` holds it with the guard's rate. It has nothing for a frozen head."""
        return self.opt_state.optimizer_state

    def _parts(self, model: nnx.Module, network: TwoLayer | None = None, moments: Any = None) -> dict[str, Any]:
        """The guarded parts with this head and these statistics, as plain arrays; None stands for the present ones."""
        head: Head = self.solving.head
        state = head.module.recalibrated(nnx.state(model, nnx.Not(nnx.RngState)), moments or {})
        opt_state = nnx.as_pure(self.opt_state)
        if network is not None:
            state = head.module.write(state, head.paths, network)
            if self.solving.alternation.moves(head):
                params = nnx.as_pure(nnx.filter_state(state, self.wrt))
                opt_state = begun_anew(opt_state, self.tx, params, head.paths)
        return {"model": nnx.as_pure(state), "opt_state": opt_state}

    def solve_head(
        self,
        model: nnx.Module,
        data: Any,
        *,
        validation: Any = None,
        unpack: Callable[[Any], tuple] | None = None,
        key: Array | None = None,
        callback: Callable[[dict[str, float]], Any] | None = None,
        throw: bool = True,
    ) -> Solution:
        """Solve for the head on the present features, starting from the present head, and write it into the model.

        Runs on the host, between jitted training steps, as :meth:`cronos_flax.CronosTrainState.solve_head` does, with
        the same guard; running statistics are recalibrated likewise. Everything is written at the end; after an
        exception nothing has changed.

        Args:
            model: the model.
            data: as for :func:`cronos_flax.fit_head`, as are the other arguments.
            validation: rows to choose β on anew, in the form of ``data``, to which nothing has been fitted: the head is
                solved for at 4 and 16 times the present β, as long as the mean loss on these rows falls; if it does
                not fall at 4 times, at a fourth and a sixteenth. A first solve begins at a fourth of the β it would
                else have. None keeps β, and so do features that are not finite.
            unpack: how to take a batch apart.
            key: key of samples and revived neurons; None derives one from ``step``.
            callback: called after each batch, at each step of the solve, and with the guard's figures at the end. The
                first solve may be several, with larger and larger β.
            throw: raise on numerical failure if no earlier state can be restored.

        Returns:
            The :class:`cronos_flax.Solution`.

        Raises:
            ValueError: for data that do not fit.
            OSError: if the temporary directory has no room for features that memory should not hold.
            FloatingPointError: if the loss is not finite at the first solve, or without guard, and ``throw``.

        Warns:
            UserWarning: as :meth:`cronos_flax.CronosTrainState.solve_head` does.
        """
        solving = self.solving
        guard, beta, changed, solution = solve_guarded(
            None if self.guard is None else self.guard.get_value(),
            self.beta.get_value(),
            solving.head,
            model,
            solving.solver,
            solving.alternation,
            functools.partial(self._parts, model),
            data,
            validation=validation,
            unpack=unpack,
            key=key,
            step=self.step[...],
            callback=callback,
            throw=throw,
        )
        nnx.update(model, changed["model"])
        nnx.update(self.opt_state, nnx.state(changed["opt_state"]))
        self.beta.set_value(beta)
        if self.guard is not None:
            self.guard.set_value(guard)
        return solution
