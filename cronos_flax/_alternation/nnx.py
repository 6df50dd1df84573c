"""CRONOS-AM for Flax NNX: an ``nnx.Optimizer`` whose head is solved for."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import optax
from flax import nnx
from jax import Array

from cronos_flax._alternation.guard import Guard, at_backbone_rate, solve_guarded
from cronos_flax._alternation.train_state import short_solves
from cronos_flax._head.fit import solver_or_default
from cronos_flax._head.head import Head, Path, check_head
from cronos_flax._head.nnx import NnxModule
from cronos_flax._solver.cronos import Cronos
from cronos_flax._solver.solution import Solution, TwoLayer


@dataclasses.dataclass(frozen=True)
class _OutsideHead:
    """A filter of NNX: what ``wrt`` lets through, and is no weight of the head."""

    wrt: Any
    paths: tuple[Path, Path]

    def __call__(self, path: tuple, value: Any) -> bool:
        inside = any(tuple(path[: len(p)]) == p for p in self.paths)
        return not inside and nnx.filterlib.to_predicate(self.wrt)(path, value)


@dataclasses.dataclass(frozen=True, eq=False)
class _Solving:
    """How an optimizer solves; compared by identity, so that it is no part of what is traced."""

    head: Head
    solver: Cronos


class GuardState(nnx.Variable):
    """What a :class:`CronosOptimizer` goes back to, and what was decided: a :class:`cronos_flax.Guard`."""


class CronosOptimizer(nnx.Optimizer):
    """CRONOS-AM for NNX: an ``nnx.Optimizer`` whose head is solved for rather than stepped.

    ``update(model, grads)`` is that of ``nnx.Optimizer`` and moves the backbone only; :meth:`solve_head` moves the head
    only, and goes back to the last good state when the backbone has run away from its head.

    Args:
        model: the model.
        tx: any Optax optimizer.
        head: from :func:`find_head`.
        solver: how the head is solved, with the loss that the gradients are of; None means ``Cronos()``. Where its
            ``max_iters`` is None, each solve takes a few steps only, unless the model is nothing but its head.
        guard: as for :meth:`cronos_flax.CronosTrainState.create`; ``optimizer.figures`` says what was decided.
            All Variables of the model are guarded, but for the state of its random streams.
        wrt: what the optimizer moves, as for ``nnx.Optimizer``; the head is left out of it.

    Raises:
        ValueError: for a ``tx``, ``head`` or ``solver`` of the wrong kind.
    """

    def __init__(
        self,
        model: nnx.Module,
        tx: optax.GradientTransformation,
        *,
        head: Head,
        solver: Cronos | None = None,
        guard: bool = True,
        wrt: Any = nnx.Param,
    ) -> None:
        check_head("CronosOptimizer", head, NnxModule)
        solver = short_solves(solver_or_default("CronosOptimizer", solver), head)
        if not (hasattr(tx, "init") and hasattr(tx, "update")):
            raise ValueError(
                f"CronosOptimizer: `tx` must be an optax.GradientTransformation, got {type(tx).__name__}; "
                "for example optax.adam(1e-3)."
            )
        super().__init__(model, at_backbone_rate(tx), wrt=_OutsideHead(wrt, head.paths))
        self.solving = nnx.static(_Solving(head, solver))
        others = nnx.state(model, nnx.Not(nnx.Any(nnx.Param, nnx.RngState)))
        # In the mode of training the head sees what a training step sees, not the running statistics.
        drifts = bool(jax.tree.leaves(others)) and not head.in_training
        made = Guard.of(self._parts(model), drifts=drifts) if guard else None
        self.guard = None if made is None else GuardState(made)

    @property
    def figures(self) -> dict[str, float]:
        """What the guard decided so far, as flat Python numbers; nothing without a guard."""
        return {} if self.guard is None else self.guard.get_value().figures

    def _parts(self, model: nnx.Module) -> dict[str, Any]:
        """What is guarded, as plain arrays."""
        state = nnx.state(model, nnx.Not(nnx.RngState))
        return {"model": nnx.as_pure(state), "opt_state": nnx.as_pure(self.opt_state)}

    def solve_head(
        self,
        model: nnx.Module,
        data: Any,
        *,
        unpack: Callable[[Any], tuple] | None = None,
        key: Array | None = None,
        callback: Callable[[dict[str, float]], Any] | None = None,
        throw: bool = True,
    ) -> Solution:
        """Solve for the head on the present features, starting from the present head, and write it into the model.

        Runs on the host, between jitted training steps, as :meth:`cronos_flax.CronosTrainState.solve_head` does, with
        the same guard. Everything is written at the end; after an exception nothing has been.

        Args:
            model: the model.
            data: as for :func:`cronos_flax.fit_head`, as are the other arguments.
            unpack: how to take a batch apart.
            key: key of samples and revived neurons; None means one that follows from ``step``.
            callback: called after each batch, at each step of the solve, and with the guard's figures at the end.
            throw: raise on numerical failure that there is no earlier state to go back from.

        Returns:
            The :class:`Solution`.

        Raises:
            ValueError: for data that do not fit.
            FloatingPointError: if the loss is not finite at the first solve, or without guard, and ``throw``.
        """
        how: _Solving = self.solving
        head = how.head
        rows = head.gather(model, data, unpack, callback)
        key = jax.random.fold_in(jax.random.key(0), self.step[...]) if key is None else key

        def parts(network: TwoLayer | None) -> dict[str, Any]:
            parts = self._parts(model)
            if network is not None:
                parts["model"] = nnx.as_pure(
                    head.module.write(nnx.state(model, nnx.Not(nnx.RngState)), head.paths, network)
                )
            return parts

        guard = None if self.guard is None else self.guard.get_value()
        guard, changed, solution = solve_guarded(guard, head.read(model), rows, how.solver, parts, key, callback, throw)
        nnx.update(model, changed["model"])
        nnx.update(self.opt_state, nnx.state(changed["opt_state"]))
        if self.guard is not None:
            self.guard.set_value(guard)
        return solution
