"""A two-layer head for NNX models that have none."""

import functools
import threading
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax import Array

from cronos_flax._head.nnx import module_at
from cronos_flax._head.nnx_watched import LAYERS
from cronos_flax._head.paths import Path, as_path, format_path
from cronos_flax._head.pointwise import check_features, check_replaceable
from cronos_flax._solver.checks import positive_integer

_calls = threading.local()  # .stack: arguments and trace of the grafted models that are being called


@functools.cache
def _telling(kind: Any) -> type:
    """A subclass of a model's class that tells the head inside it the arguments that the model is called with."""

    @functools.wraps(kind.__call__)  # with its signature
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        _calls.stack = [*getattr(_calls, "stack", []), (args, kwargs, nnx.tracers.TraceState())]
        try:
            return kind.__call__(self, *args, **kwargs)
        finally:
            _calls.stack = _calls.stack[:-1]

    return type(kind.__name__, (kind,), {"__call__": call, "__module__": kind.__module__, "told": True})


def _told() -> tuple[tuple, dict[str, Any]]:
    """The arguments of the grafted model that is being called."""
    if not getattr(_calls, "stack", []):
        raise ValueError(
            "graft: `pool` needs the arguments of the model, and the model must be called by itself (`__call__`), got "
            "a call of another method. Graft without `pool`, or call the model."
        )
    args, kwargs, trace = _calls.stack[-1]
    if trace != nnx.tracers.TraceState():  # a part that is compiled once would keep the arguments of its first call
        raise ValueError(
            "graft: `pool` needs the arguments of the model, and `at` must not be in a part of it that is transformed "
            "by itself (jit, scan, vmap, remat), got one that is. Graft without `pool`, or transform the whole model."
        )
    return args, kwargs


class TwoLayerHead(nnx.Module):
    """``Linear → relu → Linear``.

    Args:
        in_features: width p of the input.
        hidden: number of hidden neurons m.
        features: number of outputs C.
        pool: applied to the input and the arguments of the model first; None for nothing.
        inside: whether the head stands inside the model, which then tells it these arguments.
        rngs: for the weights.
        **settings: keyword arguments of both layers, such as ``dtype``.
    """

    def __init__(
        self,
        in_features: int,
        hidden: int,
        features: int,
        *,
        pool: Callable[..., Any] | None = None,
        inside: bool = False,
        rngs: nnx.Rngs,
        **settings: Any,
    ) -> None:
        self.hidden = nnx.Linear(in_features, hidden, rngs=rngs, **settings)
        self.output = nnx.Linear(hidden, features, rngs=rngs, **settings)
        self.pool, self.inside = pool, inside

    def __call__(self, x: Any, *args: Any, **kwargs: Any) -> Array:
        """Outputs ``(..., C)``; the other arguments are those of the model, or of the layer whose place this takes."""
        if self.pool is not None:
            args, kwargs = _told() if self.inside else (args, kwargs)
            x = self.pool(x, *args, **kwargs)
        check_features(x)
        return self.output(nnx.relu(self.hidden(x)))


class Grafted(nnx.Module):
    """A model with a two-layer head after its output; made by :func:`cronos_flax.nnx.graft`.

    Args:
        backbone: the model.
        head: the two layers after its output.
    """

    def __init__(self, backbone: nnx.Module, head: TwoLayerHead) -> None:
        self.backbone, self.head = backbone, head

    def __call__(self, *args: Any, **kwargs: Any) -> Array:
        """As the backbone is called."""
        return self.head(self.backbone(*args, **kwargs), *args, **kwargs)


def graft(
    model: nnx.Module,
    at: str | Path | None = None,
    *,
    hidden: int,
    features: int | None = None,
    in_features: int | None = None,
    pool: Callable[..., Any] | None = None,
    rngs: nnx.Rngs,
) -> nnx.Module:
    """Copy a model, with one layer replaced by the head ``Linear(hidden) → relu → Linear(features)``.

    All other Params are those of ``model``; the model itself is not changed.

    Args:
        model: any NNX model.
        at: path of the layer to replace, ``("fc",)`` or ``"layers/2"``; None puts the head after the model's output.
        hidden: number of hidden neurons m.
        features: number of outputs C; None for as many as the layer has.
        in_features: width p of the head's input; None for as many as the layer has.
        pool: a function of the head's input and of all arguments of the model, that returns the new input of the head:
            for instance the mean over tokens, by a mask among the arguments.
        rngs: for the weights of the head.

    Returns:
        The grafted model.

    Raises:
        ValueError: if there is nothing at ``at``, or a layer of Flax that is more than a function of the last axis (a
            lookup, attention; without ``pool``, a convolution that is not 1×1); or a size is missing.

    Example:
        >>> import cronos_flax as cf
        >>> from flax import nnx
        >>> rngs = nnx.Rngs(0)
        >>> model = nnx.Sequential(nnx.Linear(5, 8, rngs=rngs), nnx.tanh, nnx.Linear(8, 10, rngs=rngs))
        >>> grafted = cf.nnx.graft(model, at="layers/2", hidden=16, rngs=rngs)
        >>> grafted.layers[2].output.out_features
        10
    """
    if not isinstance(model, nnx.Module):
        raise ValueError(f"graft: `model` must be an NNX module, got {type(model).__name__}. For linen: cf.graft.")
    positive_integer("graft", "hidden", hidden)
    if pool is not None and not callable(pool):
        raise ValueError(f"graft: `pool` must be a function, got {pool!r}.")
    if not isinstance(rngs, nnx.Rngs):
        raise ValueError(f"graft: `rngs` must be an nnx.Rngs, got {type(rngs).__name__}.")
    copy = nnx.merge(*nnx.split(model), copy=True)
    path = None if at is None else as_path("graft: `at`", at, numbered=True)
    settings: dict[str, Any] = {}
    if path:
        try:
            old = module_at(copy, path)
        except (AttributeError, KeyError, IndexError, TypeError):
            there = ", ".join(format_path(p) for p, module in nnx.iter_modules(copy) if isinstance(module, LAYERS))
            raise ValueError(
                f"graft: `at` must be the path of a layer, got {format_path(path)}; there are {there}."
            ) from None
        check_replaceable(old, format_path(path), "nnx.Linear", pool is not None)
        features = getattr(old, "out_features", None) if features is None else features
        in_features = getattr(old, "in_features", None) if in_features is None else in_features
        names = ("dtype", "param_dtype", "precision")
        settings = {name: getattr(old, name) for name in names if hasattr(old, name)}
    for name, size in (("features", features), ("in_features", in_features)):
        positive_integer("graft", name, size)
    assert features is not None
    assert in_features is not None
    with jax.transfer_guard("allow"):  # Flax counts its random streams on the host
        head = TwoLayerHead(in_features, hidden, features, pool=pool, inside=bool(path), rngs=rngs, **settings)
    if not path:
        return Grafted(copy, head)
    if pool is not None and not hasattr(type(copy), "told"):
        copy.__class__ = _telling(type(copy))
    parent = module_at(copy, path[:-1])
    if isinstance(parent, nnx.Module) and hasattr(parent, str(path[-1])):
        setattr(parent, str(path[-1]), head)
    else:
        parent[path[-1]] = head
    return copy
