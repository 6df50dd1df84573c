"""CRONOS-AM in a Flax train state: an Optax optimizer for the backbone, solves for the head."""

import dataclasses
from collections.abc import Callable
from typing import Any, Self

import jax
import optax
from flax import struct
from flax.training.train_state import TrainState
from jax import Array

from cronos_flax._cronos import Cronos
from cronos_flax._fit import checked
from cronos_flax._head import Head, fit_head
from cronos_flax._solution import Solution

_STEPS_PER_SOLVE = 3


def short_solves(solver: Cronos) -> Cronos:
    """The solver of an alternation, which solves again and again: a few steps where ``max_iters`` is None."""
    return solver if solver.max_iters is not None else dataclasses.replace(solver, max_iters=_STEPS_PER_SOLVE)


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
    if not isinstance(head, Head):
        raise ValueError(f"backbone_only: `head` must come from cf.find_head, got {type(head).__name__}.")

    def labels(params: Any) -> Any:
        def label(path: tuple, _: Any) -> str:
            names = tuple(getattr(entry, "key", None) for entry in path)
            return "head" if any(names[: len(p)] == p for p in head.paths) else "backbone"

        labelled = jax.tree_util.tree_map_with_path(label, params)
        if "head" not in jax.tree.leaves(labelled):
            raise ValueError(
                "backbone_only: `params` must be variables['params'] of the module that the head was found in, got a "
                f"tree without {'/'.join(map(str, head.hidden_path))}."
            )
        return labelled

    return optax.partition({"backbone": tx, "head": optax.set_to_zero()}, labels)


class CronosTrainState(TrainState):
    """Flax's ``TrainState``, with a head that is solved for rather than stepped.

    ``apply_gradients`` is Flax's own and moves the backbone only; :meth:`solve_head` moves the head only.

    Args:
        head: from :func:`cronos_flax.find_head`.
        solver: how the head is solved.
        model_state: the module's other collections, such as ``{"batch_stats": …}``.
    """

    head: Head = struct.field(pytree_node=False)
    solver: Cronos = struct.field(pytree_node=False)
    model_state: Any = struct.field(default_factory=dict)

    @classmethod
    def create(  # type: ignore[override]
        cls,
        *,
        apply_fn: Callable,
        params: Any,
        tx: optax.GradientTransformation,
        head: Head,
        solver: Cronos | None = None,
        **kwargs: Any,
    ) -> Self:
        """As ``TrainState.create``; ``tx`` is routed to the backbone.

        Args:
            apply_fn: usually ``model.apply``.
            params: ``variables["params"]``.
            tx: any Optax optimizer.
            head: from :func:`cronos_flax.find_head`.
            solver: how the head is solved, with the loss that the gradients are of; None means ``Cronos()``. Where its
                ``max_iters`` is None, each solve takes a few steps only.
            **kwargs: ``model_state`` and the fields of subclasses.

        Raises:
            ValueError: for a ``tx``, ``head`` or ``solver`` of the wrong kind.
        """
        solver = short_solves(checked(head, Head, solver, "CronosTrainState"))
        tx = backbone_only(tx, head)
        return super().create(apply_fn=apply_fn, params=params, tx=tx, head=head, solver=solver, **kwargs)

    def solve_head(
        self, data: Any, *, unpack: Callable | None = None, key: Array | None = None, throw: bool = True
    ) -> tuple[Self, Solution]:
        """Solve for the head on the present features, starting from the present head.

        Runs on the host, between jitted training steps. The regularised loss of the network on ``data`` never rises;
        ``step`` and optimizer state stay as they are.

        Args:
            data: as for :func:`cronos_flax.fit_head`, as are the other arguments.
            unpack: how to take a batch apart.
            key: key of samples and revived neurons; None means one that follows from ``step``.
            throw: raise on numerical failure.

        Returns:
            The state with the new head, and the :class:`Solution`.

        Raises:
            ValueError: for data that do not fit.
            FloatingPointError: if the loss of the present head is not finite, and ``throw``.
        """
        variables = {"params": self.params, **self.model_state}
        key = jax.random.fold_in(jax.random.key(0), self.step) if key is None else key
        fitted, solution = fit_head(self.head, variables, data, solver=self.solver, unpack=unpack, key=key, throw=throw)
        return self.replace(params=fitted["params"]), solution
