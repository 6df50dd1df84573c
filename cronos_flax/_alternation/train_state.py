"""CRONOS-AM in a Flax train state: an Optax optimizer for the backbone, solves for the head."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import optax
from flax import struct
from flax.training.train_state import TrainState
from jax import Array

from cronos_flax._alternation.guard import Guard, at_backbone_rate, solve_guarded
from cronos_flax._head.fit import solver_or_default
from cronos_flax._head.head import Head, check_head, format_path
from cronos_flax._head.linen import LinenModule
from cronos_flax._solver.cronos import Cronos
from cronos_flax._solver.solution import Solution, TwoLayer

_STEPS_PER_SOLVE = 3
_BETA_RATIO = 0.005


def short_solves(solver: Cronos, head: Head) -> Cronos:
    """The solver of an alternation, with what it takes where a setting is None: it solves again and again.

    A module that is nothing but its head does not alternate: there it stays as it is.
    """
    if not head.frozen:
        return solver
    return dataclasses.replace(
        solver,
        max_iters=_STEPS_PER_SOLVE if solver.max_iters is None else solver.max_iters,
        beta_ratio=_BETA_RATIO if solver.beta_ratio is None else solver.beta_ratio,
    )


def backbone_only(tx: optax.GradientTransformation, head: Head) -> optax.GradientTransformation:
    """An optimizer that moves everything but the head.

    The head's updates are zero whatever ``tx`` does (weight decay included), and no moments are kept for it.

    Args:
        tx: any Optax optimizer.
        head: from :func:`cronos_flax.find_head`.

    Returns:
        A transformation for trees of the same structure as ``variables["params"]``.

    Raises:
        ValueError: if ``tx`` is not an Optax transformation or ``head`` not a head.
    """
    if not (hasattr(tx, "init") and hasattr(tx, "update")):
        raise ValueError(
            f"backbone_only: `tx` must be an optax.GradientTransformation, got {type(tx).__name__}; "
            "for example optax.adam(1e-3)."
        )
    check_head("backbone_only", head, LinenModule)
    inner = optax.with_extra_args_support(tx)

    def is_head(path: tuple) -> bool:
        # The keys of dicts: not the .fast and .slow of optax.LookaheadParams.
        names = tuple(entry.key for entry in path if hasattr(entry, "key"))
        return any(names[: len(p)] == p for p in head.paths)

    def backbone(tree: Any) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, leaf: optax.MaskedNode() if is_head(path) else leaf, tree)

    def init(params: Any) -> optax.OptState:
        if not any(is_head(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)):
            raise ValueError(
                "backbone_only: `params` must be variables['params'] of the module that the head was found in, got a "
                f"tree without {format_path(head.hidden_path)}."
            )
        return inner.init(backbone(params))

    def update(grads: Any, state: optax.OptState, params: Any = None, **extra: Any) -> tuple[Any, optax.OptState]:
        updates, state = inner.update(backbone(grads), state, None if params is None else backbone(params), **extra)
        # optax.partition would do, but for optax.lookahead, whose updates have not the structure of the gradients.
        updates = jax.tree.map(
            lambda new, old: jnp.zeros_like(old) if isinstance(new, optax.MaskedNode) else new,
            updates,
            grads if params is None else params,
            is_leaf=lambda node: isinstance(node, optax.MaskedNode),
        )
        return updates, state

    return optax.GradientTransformationExtraArgs(init, update)


@functools.lru_cache(maxsize=16)  # of another state it is the same one, and a jitted step is not compiled again
def _routed(tx: optax.GradientTransformation, head: Head) -> optax.GradientTransformation:
    """``tx`` for the backbone, at a rate that the guard sets."""
    return backbone_only(at_backbone_rate(tx) if hasattr(tx, "update") else tx, head)


def module_params(params: Any) -> Any:
    """What the module is applied with; of ``optax.LookaheadParams`` the fast ones."""
    return params.fast if isinstance(params, optax.LookaheadParams) else params


class CronosTrainState(TrainState):
    """Flax's ``TrainState``, with a head that is solved for rather than stepped.

    ``apply_gradients`` is Flax's own and moves the backbone only; :meth:`solve_head` moves the head only, and goes back
    to the last good state when the backbone has run away from its head.

    A subclass whose fields follow the parameters (an average of them, say) names these in ``guarded`` too.

    Args:
        head: from :func:`cronos_flax.find_head`.
        solver: how the head is solved.
        model_state: the module's other collections, such as ``{"batch_stats": …}``.
        guard: what to go back to, and what was decided (``state.figures``); None for a state without guard.
    """

    head: Head = struct.field(pytree_node=False)
    solver: Cronos = struct.field(pytree_node=False)
    model_state: Any = struct.field(default_factory=dict)
    guard: Guard | None = None

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
        guard: bool = True,
        **kwargs: Any,
    ) -> Self:
        """As ``TrainState.create``; ``tx`` is routed to the backbone, at a rate that the guard sets.

        Args:
            apply_fn: usually ``model.apply``.
            params: ``variables["params"]``.
            tx: any Optax optimizer.
            head: from :func:`cronos_flax.find_head`.
            solver: how the head is solved, with the loss that the gradients are of; None means ``Cronos()``. Where its
                ``max_iters`` is None, each solve takes a few steps only, unless the module is nothing but its head.
            guard: go back to the last good state when a solve ends above the best so far, and lower the backbone's
                rate. Keeps a copy of parameters, collections and optimizer state. False: every solve is accepted.
            **kwargs: ``model_state`` and the fields of subclasses.

        Raises:
            ValueError: for a ``tx``, ``head`` or ``solver`` of the wrong kind.
        """
        check_head("CronosTrainState", head, LinenModule)
        solver = short_solves(solver_or_default("CronosTrainState", solver), head)
        tx = _routed(tx, head)
        state = super().create(apply_fn=apply_fn, params=params, tx=tx, head=head, solver=solver, **kwargs)
        if not guard:
            return state
        # A head that was found with mutable collections sees what a training step sees, not the running statistics.
        drifts = bool(jax.tree.leaves(state.model_state)) and not head.in_training
        return state.replace(guard=Guard.of(state._parts_with(None), drifts=drifts))

    @property
    def variables(self) -> dict[str, Any]:
        """What the module is applied with."""
        return {"params": module_params(self.params), **self.model_state}

    @property
    def figures(self) -> dict[str, float]:
        """What the guard decided so far, as flat Python numbers; nothing without a guard."""
        return {} if self.guard is None else self.guard.figures

    def _parts_with(self, network: TwoLayer | None) -> dict[str, Any]:
        """The guarded parts, with this head; None for the present one."""
        parts = {name: getattr(self, name) for name in self.guarded}
        if network is None:
            return parts
        ahead = isinstance(self.params, optax.LookaheadParams)
        old = self.params if ahead else (self.params,)
        new = [self.head.write({"params": params}, network)["params"] for params in old]
        return parts | {"params": optax.LookaheadParams(*new) if ahead else new[0]}

    def solve_head(
        self,
        data: Any,
        *,
        unpack: Callable[[Any], tuple] | None = None,
        key: Array | None = None,
        callback: Callable[[dict[str, float]], Any] | None = None,
        throw: bool = True,
    ) -> tuple[Self, Solution]:
        """Solve for the head on the present features, starting from the present head.

        Runs on the host, between jitted training steps; ``step`` stays as it is. The regularised loss of the network on
        ``data`` never rises. If it ends above the least that an earlier solve ended at, by more than a hundredth of the
        loss of the best constant, then the steps in between have done harm: parameters, collections and optimizer state
        go back to what they were after the last solve that was accepted, the backbone goes on at a lower rate, and
        ``solution.status`` is ``Status.rejected``. Solves that are accepted raise the rate again.

        Args:
            data: as for :func:`cronos_flax.fit_head`, as are the other arguments. The guard compares losses from solve
                to solve, so these should be the same rows, or samples of the same rows.
            unpack: how to take a batch apart.
            key: key of samples and revived neurons; None means one that follows from ``step``.
            callback: called after each batch, at each step of the solve, and with ``state.figures`` at the end.
            throw: raise on numerical failure that there is no earlier state to go back from.

        Returns:
            The state with the new head, or the state gone back to, and the :class:`Solution`.

        Raises:
            ValueError: for data that do not fit.
            FloatingPointError: if the loss is not finite at the first solve, or without guard, and ``throw``.
        """
        rows = self.head.gather(self.variables, data, unpack, callback)
        key = jax.random.fold_in(jax.random.key(0), self.step) if key is None else key
        guard, changed, solution = solve_guarded(
            self.guard, self.head.read(self.variables), rows, self.solver, self._parts_with, key, callback, throw
        )
        return self.replace(guard=guard, **changed), solution
