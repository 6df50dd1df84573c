"""Calls of NNX models in which layers are watched: what goes into them, and the statistics of batch norms.

NNX has no interceptor. So every layer to be watched is given, in a copy of the model, a subclass of its class.
"""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import flax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from cronos_flax._head.functional import Layer
from cronos_flax._head.norms import Moments, Norm, bound_axes, with_attributes
from cronos_flax._head.paths import Path

LAYERS = nnx.Linear, nnx.LinearGeneral
_trace = threading.local()  # .calls: layers by path, and where they were called, while a watched copy is traced


class Tapped(nnx.Variable):
    """The recorded input of a layer, in a watched copy of a model."""


def _may_change(module: Any, *variables: nnx.Variable) -> bool:
    """Whether what a watched layer holds may change here: within a transform of JAX itself it may only be read.

    A layer that is merged there may hold Variables from outside.
    """
    try:
        module.tap = module.tap
        for variable in variables:
            variable.set_value(variable.get_value())
    except flax.errors.TraceContextError:
        return False
    return True


@functools.cache
def _tapping(kind: Any) -> type:
    """A subclass of a layer's class that records the layer's input."""

    def call(self: Any, inputs: Array, *args: Any, **kwargs: Any) -> Array:
        path, wanted = self.tap
        if wanted and _may_change(self, *getattr(self, "__captures__", ())):
            self.sow(Tapped, "input", jnp.asarray(inputs), init_fn=lambda: None, reduce_fn=lambda _, new: new)
        out = kind.__call__(self, inputs, *args, **kwargs)
        earlier, _ = _trace.calls.pop(path, (None, None))  # order by the last call
        _trace.calls[path] = Layer.of(path, out, self.dtype, earlier), nnx.tracers.TraceState()
        return out

    return type(kind.__name__, (kind,), {"__call__": call, "__module__": __name__})


@functools.cache
def _normalising(kind: Any) -> type:
    """A subclass of a batch norm's class that takes the statistics that were chosen, and keeps those of the batch."""

    def call(self: Any, x: Array, use_running_average: bool | None = None, **kwargs: Any) -> Array:
        if self.statistics is not None:
            use_running_average = self.statistics == "running"
        if not _may_change(self, self.calls):
            with with_attributes(self, axis_name=bound_axes(self.axis_name)):
                return kind.__call__(self, x, use_running_average, **kwargs)
        mean, var, earlier = self.mean[...], self.var[...], self.calls[...]
        with with_attributes(self, axis_name=bound_axes(self.axis_name), momentum=0.0):
            out = kind.__call__(self, x, use_running_average, **kwargs)
        # The batch's own; if the layer is called repeatedly, their mean.
        self.mean[...] = (earlier * mean + self.mean[...]) / (earlier + 1)
        self.var[...] = (earlier * var + self.var[...]) / (earlier + 1)
        self.calls[...] = earlier + 1
        return out

    return type(kind.__name__, (kind,), {"__call__": call, "__module__": __name__})


def _normalise(layer: Any, statistics: str | None) -> None:
    """Make a batch norm take these statistics, and keep those of the batch."""
    kind: Any = type(layer)
    layer.__class__ = _normalising(kind)
    layer.statistics, layer.tap = nnx.static(statistics), nnx.static(None)
    layer.calls = nnx.BatchStat(jnp.zeros_like(layer.mean[...]))  # the same for all: of a shape that transforms take


def _watch(layer: Any, path: Path, wanted: bool) -> None:
    """Make a layer record its calls, and, if wanted, its input."""
    kind: Any = type(layer)
    layer.__class__ = _tapping(kind)
    layer.tap = nnx.static((path, wanted))


@contextlib.contextmanager
def _recorded() -> Iterator[dict[Path, tuple[Layer, nnx.tracers.TraceState]]]:
    """The watched layers that are called in this thread, by path, and in which trace."""
    before, _trace.calls = getattr(_trace, "calls", None), {}
    try:
        yield _trace.calls
    finally:
        _trace.calls = before


class Seen(NamedTuple):
    """What is seen of one call of a model.

    Args:
        out: all outputs.
        inputs: of the layers, by path, as far as they were recorded.
        layers: those that were called, by path, in call order.
        beside: paths of the layers that were called in the same trace as the last one.
        norms: statistics of the batch norms.
    """

    out: Any
    inputs: dict[Path, Array]
    layers: dict[Path, Layer]
    beside: set[Path]
    norms: tuple[Moments, ...]


def watched(
    model: nnx.Module,
    wanted: Callable[[Path], bool],
    statistics: str | None,
    method: Any,
    args: tuple,
    kwargs: Mapping,
) -> Seen:
    """Call a model, and see its layers.

    Args:
        model: a copy, whose layers are changed.
        wanted: of which layers, by path, the input is recorded.
        statistics: which ones batch norms take, "batch" or "running"; None for those of the mode.
        method: the name of the method to call, or a function; None calls the model.
        args: positional arguments.
        kwargs: keyword arguments.
    """
    norms = {}
    for path, module in nnx.iter_modules(model):
        if isinstance(module, LAYERS):
            _watch(module, tuple(path), wanted(path))
        if isinstance(module, nnx.BatchNorm):
            norms[tuple(path)] = module
    for norm in norms.values():
        _normalise(norm, statistics)

    with _recorded() as calls:
        out, sown = captured(model, Tapped, method, args, kwargs)
    inputs: dict[Path, Array] = {tuple(path[:-1]): leaf[...] for path, leaf in nnx.to_flat_state(sown)}
    # A jitted part of the model that was traced before sows its inputs, but its calls are not recorded.
    layers = {path: Layer(path, x.dtype) for path, x in inputs.items() if path not in calls}
    layers |= {path: layer for path, (layer, _) in calls.items()}
    where = [trace for _, trace in calls.values()]
    beside = {path for path, (_, trace) in calls.items() if trace == where[-1]}
    moments = tuple(Moments(Norm(path), norm.mean[...], norm.var[...]) for path, norm in norms.items())
    return Seen(out, inputs, layers, beside, moments)


def called(model: nnx.Module, method: Any, args: tuple, kwargs: Mapping) -> Any:
    """What a model returns; the arguments are those of :func:`captured`."""
    of_class = getattr(type(model), method) if isinstance(method, str) else method or type(model).__call__
    return of_class(model, *args, **kwargs)


def captured(model: nnx.Module, kind: type[nnx.Variable], method: Any, args: tuple, kwargs: Mapping) -> tuple[Any, Any]:
    """What a model returns, and what it sows of this kind.

    Args:
        model: the model.
        kind: of Variables.
        method: the name of the method to call, or a function; None calls the model.
        args: positional arguments.
        kwargs: keyword arguments.
    """

    def call(model: nnx.Module) -> Any:
        # Flax gives all modules an attribute to sow into. A list has numbers for keys, and `nnx.scan` and `nnx.vmap`
        # cannot sort its state with a name among them; a dict has one entry more; a bridged linen module takes all
        # attributes for its variables. None of them sows anything.
        for _, module in nnx.iter_modules(model):
            if isinstance(module, nnx.List | nnx.Dict | nnx.bridge.ToNNX) and "__captures__" in vars(module):
                delattr(module, "__captures__")
        return called(model, method, args, kwargs)

    return nnx.capture(call, kind)(model)
