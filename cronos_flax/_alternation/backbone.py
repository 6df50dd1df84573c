"""Optimizers in an alternation: their rate is part of their state; they move the head with its weight decay, or not.

No step moves a kernel by more than a share of its size.
"""

import functools
import inspect
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jaxtyping import Float

from cronos_flax._alternation.optimizer_state import has_node, learns_from_steps
from cronos_flax._alternation.step_limit import limited
from cronos_flax._head.head import Head, check_head
from cronos_flax._head.linen import Collections, check_no_lists
from cronos_flax._head.paths import Path, format_path
from cronos_flax._solver.transfer import copied, on_device

# What line searches, Hessians and the opaque mode of SAM are made from, of the loss as it is.
_OF_THE_LOSS = {"grad", "grad_fn", "value_fn", "obj_fn"}


class RatedState(NamedTuple):
    """The state of :func:`rated`.

    Args:
        optimizer_state: of the user's optimizer.
        backbone_rate: the guard's factor on the updates.
        run_decay: the factor of :func:`cronos_flax.train` on the updates, which falls towards the end of a run.
        head_decay: weight decay β of the head's kernels in gradient steps, if these move it; 0 until the first solve.
    """

    optimizer_state: Any
    backbone_rate: Float[Array, ""]
    run_decay: Float[Array, ""]
    head_decay: Float[Array, ""]


def rated(
    tx: optax.GradientTransformation, paths: tuple[Path, ...] = (), largest_step: float | None = None
) -> optax.GradientTransformationExtraArgs:
    """``tx`` on the regularised loss that solves minimise, its updates limited and multiplied by rates in the state.

    Args:
        tx: any Optax optimizer, of gradients of the loss.
        paths: of the layers whose kernels have the weight decay ``head_decay`` in their gradients.
        largest_step: of a kernel, as a share of its size, before the rates: see :func:`limited`; None for no limit.
    """
    inner = with_arguments(tx)

    def init(params: Any) -> RatedState:
        # Three buffers, as a user's step may donate them.
        return RatedState(inner.init(params), *(on_device(value, jnp.float32) for value in (1, 1, 0)))

    def update(updates: Any, state: RatedState, params: Any = None, **extra: Any) -> tuple[Any, RatedState]:
        value = extra.get("value")
        if value is not None:  # the loss, for optimizers that take it
            _check_value(value)
        if params is not None:
            _check_structure(updates, params)
            _check_shapes(updates, updates, params, leading=True)
        if paths:
            updates = _with_decay(updates, params, state.head_decay, paths)
            if value is not None:  # of the same function
                extra["value"] = value + _decay_of(params, state.head_decay, paths)
        grads = updates
        updates, optimizer_state = inner.update(grads, state.optimizer_state, params, **extra)
        if params is not None:
            _check_shapes(module_params(updates), grads, params)
        if largest_step is not None:
            kernels = _given(params, "steps are limited by the size of kernels")
            updates = limited(updates, kernels, largest_step, together=learns_from_steps(optimizer_state))
        rate = state.backbone_rate * state.run_decay
        updates = jax.tree.map(lambda u: (rate * u).astype(u.dtype), updates)
        return updates, state._replace(optimizer_state=optimizer_state)

    return optax.GradientTransformationExtraArgs(init, update)


def with_arguments(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """As ``optax.with_extra_args_support``; an update that takes less than its type says, as SAM's, gets no more.

    An update that needs more than the loss is refused. The state begins with buffers of its own, where Prodigy's, SAM's
    and others hold the parameters themselves: a user's step may donate both.
    """
    extended = optax.with_extra_args_support(tx)
    taken = inspect.signature(extended.update).parameters
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values())

    def update(updates: Any, state: optax.OptState, params: Any = None, **extra: Any) -> tuple[Any, optax.OptState]:
        if given := sorted(extra.keys() & _OF_THE_LOSS):
            raise _unsupported(given)
        try:
            return extended.update(
                updates, state, params, **{name: extra[name] for name in extra if takes_all or name in taken}
            )
        except (TypeError, ValueError) as error:
            if needed := sorted(set(_needed(str(error))) & {*_OF_THE_LOSS, "value"}):
                raise _unsupported(needed) from error
            raise

    return optax.GradientTransformationExtraArgs(lambda params: _of_its_own(extended.init(params), params), update)


def traced_update(tx: optax.GradientTransformation, grads: Any, opt_state: Any, params: Any) -> tuple[Any, Any, Any]:
    """One update of an optimizer as a jaxpr, and the shapes of its updates and of the state after it; nothing runs.

    Args:
        tx: the optimizer; it is given the loss too.
        grads: the gradients, or their shapes, as the others are.
        opt_state: the state.
        params: the parameters.

    Raises:
        Exception: whatever an optimizer raises that needs more than these.
    """

    def update(grads: Any, opt_state: Any, params: Any) -> Any:
        return with_arguments(tx).update(grads, opt_state, params, value=jnp.float32(1))

    with jax.transfer_guard("allow"):  # Optax makes its constants on the host
        closed, (updates, new) = jax.make_jaxpr(update, return_shape=True)(grads, opt_state, params)
    return closed.jaxpr, updates, new


def _of_its_own(opt_state: optax.OptState, params: Any) -> optax.OptState:
    """The state with a copy of each array that is a parameter, or that is there a second time."""
    seen = set(map(id, jax.tree.leaves(params)))

    def own(leaf: Any) -> Any:
        if isinstance(leaf, Array) and id(leaf) in seen:
            return copied(leaf)
        seen.add(id(leaf))
        return leaf

    return jax.tree.map(own, opt_state)


def _needed(message: str) -> list[str]:
    """The arguments that an optimizer misses, from what it raises."""
    if "required keyword-only argument" in message:
        return re.findall(r"'(\w+)'", message)
    return re.findall(r"(\w+) must be provided", message)


def _unsupported(names: list[str]) -> ValueError:
    """What to raise for an optimizer that needs these arguments."""
    needs = " and ".join(names) if len(names) < 3 else f"{', '.join(names[:-1])} and {names[-1]}"
    if names == ["value"]:
        return ValueError(
            "update: `tx` needs the mean loss in each update, got no value. Give it with the gradients: "
            "state.apply_gradients(grads=grads, value=loss), or, for NNX, optimizer.update(model, grads, value=loss)."
        )
    return ValueError(
        f"update: `tx` must need no more than gradients, parameters and the loss, got one that needs {needs}. In an "
        "alternation the loss has the weight decay of the head, or the head stands still, so a function of yours would "
        "be another loss. Take an optimizer without line search, such as optax.lbfgs(linesearch=None), without second "
        "derivatives, or SAM with opaque_mode=False; or use this one in a loop of your own, with cf.fit_head between "
        "its steps."
    )


def _with_decay(grads: Any, params: Any, beta: Array, paths: tuple[Path, ...]) -> Any:
    """The gradients of the loss and ``(beta/2) ‖kernel‖²`` of these layers."""
    params, kernels = _decaying(params, paths)

    def with_decay(path: tuple, grad: Array, param: Array) -> Array:
        return (grad + beta * param).astype(grad.dtype) if begins_with(path, kernels) else grad

    return jax.tree_util.tree_map_with_path(with_decay, grads, params)


def _decay_of(params: Any, beta: Array, paths: tuple[Path, ...]) -> Float[Array, ""]:
    """``(beta/2) ‖kernel‖²`` of these layers."""
    params, kernels = _decaying(params, paths)
    leaves = jax.tree_util.tree_leaves_with_path(params)
    squares = [jnp.sum(jnp.square(leaf.astype(beta.dtype))) for path, leaf in leaves if begins_with(path, kernels)]
    return beta / 2 * sum(squares, jnp.zeros_like(beta))


def _decaying(params: Any, paths: tuple[Path, ...]) -> tuple[Any, tuple[Path, ...]]:
    """The parameters that gradients are of, and the paths of these layers' kernels."""
    params = _given(params, "the head has weight decay in gradient steps")
    return module_params(params), tuple((*path, "kernel") for path in paths)


def module_params(params: Any) -> Any:
    """The parameters that the module is applied with, and gradients are of: the fast ones of ``LookaheadParams``."""
    return params.fast if isinstance(params, optax.LookaheadParams) else params


def _check_value(value: Any) -> None:
    """Raise a ValueError unless the loss is one number."""
    if isinstance(value, tuple) or [jnp.shape(leaf) for leaf in jax.tree.leaves(value)] != [()]:
        shapes = jax.tree.map(jnp.shape, value)
        raise ValueError(
            f"update: `value` must be the mean loss, one number, got {shapes}. Give the mean over the batch; of a pair "
            "(loss, aux), as jax.value_and_grad with has_aux=True returns it, give the loss."
        )


def _check_structure(grads: Any, params: Any) -> None:
    """Raise a ValueError unless gradients are a tree like the parameters."""
    params = module_params(params)
    structure: Any = jax.tree.structure(grads)
    if structure == jax.tree.structure(params):
        return
    got, expected = ([name for name, _ in _named_leaves(tree)] for tree in (grads, params))
    differ = {
        "nothing at": [name for name in expected if name not in got],
        "what no parameter is at": [name for name in got if name not in expected],
    }
    said = [f"{what} {', '.join(names[:3])}{', …' * (len(names) > 3)}" for what, names in differ.items() if names]
    containers = f"other containers, such as {type(grads).__name__} instead of {type(params).__name__}"
    raise ValueError(
        f"update: `grads` must be a tree like the parameters, got one with {' and '.join(said) or containers}. Take "
        "gradients in state.params alone, not in variables with other collections: "
        "jax.grad(lambda params: loss({'params': params, **state.model_state}))(state.params); in NNX, those of the "
        "Variables that the optimizer moves (wrt=)."
    )


def _check_shapes(tree: Any, grads: Any, params: Any, leading: bool = False) -> None:
    """Raise a ValueError, which tells of ``grads``, unless the leaves of ``tree`` have the shapes of the parameters.

    Args:
        tree: gradients, or updates made of them.
        grads: the gradients.
        params: the parameters.
        leading: whether there may be more axes in front: some optimizers take the gradients of each row.
    """
    trees = jax.tree.leaves(tree), jax.tree.leaves(grads), _named_leaves(module_params(params))
    for leaf, grad, (name, param) in zip(*trees, strict=True):
        more = max(jnp.ndim(leaf) - jnp.ndim(param), 0) if leading else 0
        if jnp.shape(leaf)[more:] != jnp.shape(param):
            raise ValueError(
                f"update: `grads` must have the shapes of the parameters, got {jnp.shape(grad)} at {name}, which has "
                f"{jnp.shape(param)}. Give gradients of the mean loss of the batch."
            )


def _named_leaves(tree: Any) -> list[tuple[str, Any]]:
    """The leaves of a tree with their names."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(jax.tree_util.keystr(path, simple=True, separator="/") or "the root", leaf) for path, leaf in leaves]


def _given(params: Any, why: str) -> Any:
    if params is None:
        raise ValueError(f"update: `params` must be given, as {why}, got None.")
    return params


def begins_with(path: tuple, prefixes: tuple[Path, ...]) -> bool:
    """Whether the keys of dicts in a path of a tree begin with one of these."""
    # Only keys of dicts count: optax.LookaheadParams adds .fast and .slow.
    names = tuple(entry.key for entry in path if hasattr(entry, "key"))
    return any(names[: len(prefix)] == prefix for prefix in prefixes)


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
    check_head("backbone_only", head, Collections)
    inner = with_arguments(tx)

    def backbone(tree: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: optax.MaskedNode() if begins_with(path, head.paths) else leaf, tree
        )

    def init(params: Any) -> optax.OptState:
        check_params("backbone_only", params, head)
        inside = backbone(params)
        try:
            return inner.init(inside)
        except (IndexError, TypeError) as error:  # Optax's line searches look at the first parameter
            if jax.tree.leaves(inside):
                raise
            raise ValueError(
                "backbone_only: `tx` must be an optimizer that can do without parameters, such as optax.sgd, for the "
                f"module is nothing but its head; got one that raises: {error}. Or solve with cf.fit_head alone."
            ) from error

    def update(grads: Any, state: optax.OptState, params: Any = None, **extra: Any) -> tuple[Any, optax.OptState]:
        if params is not None:
            _check_structure(grads, params)
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
def alternating(
    tx: optax.GradientTransformation, head: Head, moving: bool, largest_step: float | None
) -> optax.GradientTransformation:
    """``tx`` at the rates of an alternation; between solves the head moves with the backbone, or stands still."""
    if moving:
        return rated(tx, head.paths, largest_step)
    return backbone_only(rated(tx, largest_step=largest_step), head)


def check_optimizer(where: str, tx: Any) -> None:
    """Raise a ValueError unless ``tx`` is an Optax optimizer."""
    if not (hasattr(tx, "init") and hasattr(tx, "update")):
        raise ValueError(
            f"{where}: `tx` must be an optax.GradientTransformation, got {type(tx).__name__}; "
            "for example optax.adam(1e-3)."
        )


def check_params(where: str, params: Any, head: Head) -> None:
    """Raise a ValueError for parameters that are not those of the module of the head, or no arrays."""
    check_no_lists(f"{where}: `params`", params)
    if not any(begins_with(path, head.paths) for path, _ in jax.tree_util.tree_leaves_with_path(params)):
        raise ValueError(
            f"{where}: `params` must be variables['params'] of the module that the head was found in, got a "
            f"tree without {format_path(head.hidden_path)}."
        )


def check_lookahead(where: str, params: Any, opt_state: Any) -> None:
    """Raise a ValueError for ``optax.lookahead`` on parameters that are not of its kind: its first step would fail."""
    is_ahead = has_node(opt_state, lambda node: isinstance(node, optax.LookaheadState))
    if isinstance(params, optax.LookaheadParams) or not is_ahead:
        return
    raise ValueError(
        f"{where}: with optax.lookahead the parameters must be optax.LookaheadParams.init_synced(params), got a "
        f"{type(params).__name__}. Give these in linen; for an NNX model take another optimizer."
    )
