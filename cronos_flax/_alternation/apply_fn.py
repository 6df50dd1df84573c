"""The ``apply_fn`` of a train state: how it is called, and whether it is the module that the head was found in."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
from flax.core import DenyList
from jax import Array

from cronos_flax._head.functional import selected
from cronos_flax._head.head import Head
from cronos_flax._head.jitted import jitted
from cronos_flax._head.linen import on_one_device
from cronos_flax._solver.user_warnings import warn


def called(
    apply_fn: Callable,
    output: Any,
    variables: Mapping,
    args: tuple,
    kwargs: Mapping[str, Any],
    mutable: Sequence[str] | DenyList = (),
    rngs: Mapping[str, Array] | None = None,
) -> tuple[Any, Mapping]:
    """The chosen output of a call, and the collections that it changed.

    Args:
        apply_fn: of a train state.
        output: which output, see :func:`~cronos_flax._head.functional.selected`.
        variables: of the module.
        args: the positional arguments.
        kwargs: the keyword arguments.
        mutable: the collections that may change, or all but some.
        rngs: keys of random streams.
    """
    extra: dict[str, Any] = {"mutable": mutable if isinstance(mutable, DenyList) else list(mutable)} if mutable else {}
    extra |= {"rngs": dict(rngs)} if rngs else {}
    with nn.intercept_methods(on_one_device):
        out = apply_fn(variables, *args, **extra, **kwargs)
    out, updates = out if mutable else (out, {})
    return selected(out, output), updates


def not_taken(apply_fn: Callable, extra: Sequence[str], error: Exception) -> str:
    """What to say of an ``apply_fn`` that does not take the keyword arguments that a step gives; empty if it does.

    Args:
        apply_fn: of a train state.
        extra: names of the keyword arguments.
        error: what a call of it raised.
    """
    missing = [name for name in extra if isinstance(error, TypeError) and f"keyword argument '{name}'" in str(error)]
    if not missing:
        return ""
    if "multiple values" in str(error):
        return (
            f"`train_kwargs` must leave out {' and '.join(f'`{name}`' for name in missing)}: a gradient step gives the "
            "collections of `model_state` as mutable by itself, and the keys of `rngs`."
        )
    without = " If it needs no random numbers, give rngs=()." if missing == ["rngs"] else ""
    return (
        f"`apply_fn` must take {' and '.join(f'`{name}`' for name in extra)} as the apply of a Flax module does, got "
        f"{getattr(apply_fn, '__qualname__', type(apply_fn).__name__)}. Give module.apply; of a model that wraps a "
        f"module, as those of Hugging Face, model.module.apply.{without}"
    )


def with_method(apply_fn: Callable, head: Head | None, kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    """Keyword arguments of ``apply_fn``, with the method that the head was found in if it can call any."""
    method = None if head is None else getattr(head.module, "method", None)
    return kwargs if head is None or method is None or not _applies(apply_fn, head) else {"method": method, **kwargs}


def warn_if_another(
    apply_fn: Callable, head: Head, variables: Mapping, args: tuple, kwargs: Mapping, out: Array
) -> None:
    """Warn if ``apply_fn`` is another function than the module in which the head was found.

    Args:
        apply_fn: of the train state.
        head: of the train state.
        variables: of the module.
        args: the positional arguments of a batch.
        kwargs: the keyword arguments that the module was called with.
        out: what it gave.
    """
    has_statistics = bool(jax.tree.leaves(variables.get("batch_stats", {})))
    # NNX models are made into functions by `create`; batch statistics make another function of one module.
    if not hasattr(head.module, "model") or (head.in_training and has_statistics) or _applies(apply_fn, head):
        return
    kwargs = {name: value for name, value in kwargs.items() if name != "mutable"}
    try:
        found = _compiled(apply_fn, head.module.output)(variables, args, kwargs)
    except Exception:  # it may be a model in training mode, which wants other arguments
        return
    if isinstance(found, Array) and (difference := head.outputs_apart(found, out)) is not None:
        warn(
            "solve_head: `apply_fn` must be the function of the module that the head was found in, got one whose "
            f"outputs on the first batch differ by {difference:.2g} of their size: solves fit other features than "
            "gradient steps see. Find the head in the module of `apply_fn`; what `apply_fn` adds to it, such as a "
            "normalisation of inputs, belongs into a module around it, or into the data."
        )


def _applies(apply_fn: Callable, head: Head) -> bool:
    """Whether a function is the ``apply`` of the linen module in which the head was found, or of an equal one."""
    model, own = getattr(head.module, "model", None), getattr(apply_fn, "__self__", None)
    if model is None or type(own) is not type(model) or getattr(apply_fn, "__name__", None) != "apply":
        return False
    try:
        return own is model or bool(own == model)
    except Exception:  # arrays among their attributes compare to no bool
        return False


@functools.lru_cache(maxsize=8)
def _compiled(apply_fn: Callable, output: Any) -> Callable[[Any, tuple, Mapping], Any]:
    """A call of it, compiled."""
    return jitted(lambda variables, args, kwargs: called(apply_fn, output, variables, args, kwargs)[0])
