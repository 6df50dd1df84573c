"""Optimizers that move the backbone and never the head, at a rate that is part of their state."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jaxtyping import Float

from cronos_flax._head.head import Head, check_head, format_path
from cronos_flax._head.linen import LinenModule
from cronos_flax._solver.transfer import on_device


class RatedState(NamedTuple):
    """The state of :func:`at_backbone_rate`: that of the user's optimizer, and the factor on its updates."""

    optimizer_state: Any
    backbone_rate: Float[Array, ""]


def at_backbone_rate(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """``tx``, with its updates multiplied by a rate in the optimizer's state; the rate starts at one."""
    inner = optax.with_extra_args_support(tx)

    def init(params: Any) -> RatedState:
        return RatedState(inner.init(params), on_device(1, jnp.float32))

    def update(updates: Any, state: RatedState, params: Any = None, **extra: Any) -> tuple[Any, RatedState]:
        updates, optimizer_state = inner.update(updates, state.optimizer_state, params, **extra)
        rate = state.backbone_rate
        return jax.tree.map(lambda u: (rate * u).astype(u.dtype), updates), RatedState(optimizer_state, rate)

    return optax.GradientTransformationExtraArgs(init, update)


def backbone_only(tx: optax.GradientTransformation, head: Head) -> optax.GradientTransformation:
    """An optimizer that moves all parameters but the head's.

    The head's updates are zero whatever ``tx`` does (weight decay included), and no moments are kept for the head.

    Args:
        tx: any Optax optimizer.
        head: from :func:`cronos_flax.find_head`.

    Returns:
        A transformation for trees of the same structure as ``variables["params"]``.

    Raises:
        ValueError: if ``tx`` is not an Optax transformation or ``head`` not a head of a linen module.
    """
    check_optimizer("backbone_only", tx)
    check_head("backbone_only", head, LinenModule)
    inner = optax.with_extra_args_support(tx)

    def is_head(path: tuple) -> bool:
        # Only keys of dicts count: optax.LookaheadParams adds .fast and .slow.
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
        # Not optax.partition: the updates of optax.lookahead have another structure than its gradients.
        updates = jax.tree.map(
            lambda new, old: jnp.zeros_like(old) if isinstance(new, optax.MaskedNode) else new,
            updates,
            grads if params is None else params,
            is_leaf=lambda node: isinstance(node, optax.MaskedNode),
        )
        return updates, state

    return optax.GradientTransformationExtraArgs(init, update)


@functools.lru_cache(maxsize=16)  # the same object for each state of a sweep, so that a jitted step compiles once
def rated_backbone_only(tx: optax.GradientTransformation, head: Head) -> optax.GradientTransformation:
    """``tx`` for the backbone, at a rate that the guard sets."""
    return backbone_only(at_backbone_rate(tx), head)


def check_optimizer(where: str, tx: Any) -> None:
    """Raise a ValueError unless ``tx`` is an Optax optimizer."""
    if not (hasattr(tx, "init") and hasattr(tx, "update")):
        raise ValueError(
            f"{where}: `tx` must be an optax.GradientTransformation, got {type(tx).__name__}; "
            "for example optax.adam(1e-3)."
        )
