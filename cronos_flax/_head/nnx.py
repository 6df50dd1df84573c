"""The layer-solver on NNX models: find the head, read, write and feed it, and replace it by a solve.

NNX has no interceptor, and patching a layer would be felt everywhere. So a copy of the model is watched, in which every
fully connected layer is of a class that hands its input on; the user's model is read, and written to by a solve only.
"""

import contextlib
import dataclasses
import functools
import math
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from cronos_flax._head.features import Rows, gather
from cronos_flax._head.find import Call, Found, Layer, Path, find, jitted, selected, slashed
from cronos_flax._head.fit import check_network, checked, fit
from cronos_flax._solver.cronos import Cronos
from cronos_flax._solver.solution import Solution, TwoLayer

LAYERS = nnx.Linear, nnx.LinearGeneral
_trace = threading.local()  # .calls: dtypes of results by path, while a copy is being traced


class Tapped(nnx.Variable):
    """The input of a layer, in the copy of a model that is watched."""


@functools.cache
def _tapping(kind: Any) -> type:
    """A subclass of a layer's class that hands its input on."""

    def call(self: Any, inputs: Array, *args: Any, **kwargs: Any) -> Array:
        path, wanted = self.tap
        if wanted:
            self.sow(Tapped, "input", jnp.asarray(inputs), init_fn=lambda: None, reduce_fn=lambda _, new: new)
        out = kind.__call__(self, inputs, *args, **kwargs)
        _trace.calls.pop(path, None)  # the last call counts
        _trace.calls[path] = out.dtype
        return out

    return type(kind.__name__, (kind,), {"__call__": call, "__module__": __name__})


def _tap(layer: Any, path: Path, wanted: bool) -> None:
    kind: Any = type(layer)
    layer.__class__ = _tapping(kind)
    layer.tap = nnx.static((path, wanted))


@contextlib.contextmanager
def _recorded() -> Iterator[dict[Path, Any]]:
    """Calls of watched layers in this thread."""
    before, _trace.calls = getattr(_trace, "calls", None), {}
    try:
        yield _trace.calls
    finally:
        _trace.calls = before


@dataclasses.dataclass(frozen=True)
class _Nnx:
    """An NNX model in functional form; its variables are the model's state."""

    name: str
    graphdef: Any
    method: Any
    output: Any

    dense: ClassVar[str] = "nnx.Linear"
    graft: ClassVar[str] = "cf.nnx.graft"
    numbered: ClassVar[bool] = True

    def watch(self, state: Any, args: tuple, kwargs: Mapping) -> tuple[Any, tuple[Call, ...]]:
        out, inputs, dtypes = self.tapped(state, args, kwargs, lambda _: True)
        return out, tuple(Call(Layer(path, dtype), inputs.get(path)) for path, dtype in dtypes.items())

    def tapped(
        self, state: Any, args: tuple, kwargs: Mapping, wanted: Callable[[Path], bool]
    ) -> tuple[Any, dict[Path, Array], dict[Path, Any]]:
        """The chosen output; and inputs and dtypes of results by path, in call order."""
        model = nnx.merge(self.graphdef, state, copy=True)
        for path, module in nnx.iter_modules(model):
            if isinstance(module, LAYERS):
                _tap(module, tuple(path), wanted(path))

        def call(model: nnx.Module) -> Any:
            method = self.method or type(model).__call__
            method = getattr(type(model), method) if isinstance(method, str) else method
            return method(model, *args, **kwargs)

        with _recorded() as dtypes:
            out, sown = nnx.capture(call, Tapped)(model)
        inputs: dict[Path, Array] = {tuple(path[:-1]): leaf[...] for path, leaf in nnx.to_flat_state(sown)}
        # A jitted part of the model that was traced before hands its inputs on, but is not recorded.
        unseen = {path: x.dtype for path, x in inputs.items() if path not in dtypes}
        return selected(out, self.output), inputs, unseen | dtypes

    def kernel_shape(self, state: Any, path: Path) -> tuple[int, ...]:
        try:
            return jnp.shape(_at(state, path)["kernel"][...])
        except KeyError:  # shared with a layer that comes before
            return ()

    def read(self, state: Any, paths: tuple[Path, Path]) -> TwoLayer:
        hidden, output = (_at(state, path) for path in paths)
        return TwoLayer(
            hidden["kernel"][...],
            hidden["bias"][...] if "bias" in hidden else None,
            output["kernel"][...],
            output["bias"][...] if "bias" in output else None,
        )

    def write(self, state: Any, paths: tuple[Path, Path], network: TwoLayer) -> Any:
        new = jax.tree.map(lambda leaf: leaf, state)
        _assign([_at(new, path) for path in paths], network)
        return new

    def count(self, state: Any) -> int:
        return sum(math.prod(jnp.shape(leaf)) for leaf in jax.tree.leaves(nnx.filter_state(state, nnx.Param)))


def _at(tree: Any, path: Path) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def _assign(layers: list[Any], network: TwoLayer) -> None:
    """Write the weights of two layers, in the dtypes that were there: all of them, or none."""
    values = (network.kernel1, network.bias1), (network.kernel2, network.bias2)
    changes = []
    for layer, (kernel, bias) in zip(layers, values, strict=True):
        changes.append((layer["kernel"], jnp.asarray(kernel, layer["kernel"].dtype)))
        if bias is not None:
            changes.append((layer["bias"], jnp.asarray(bias, layer["bias"].dtype)))
    for param, value in changes:
        param.set_value(value)


def module_at(model: Any, path: Path) -> Any:
    for key in path:
        model = getattr(model, str(key)) if isinstance(model, nnx.Module) and hasattr(model, str(key)) else model[key]
    return model


def _functional(model: nnx.Module, eval_mode: bool) -> tuple[Any, Any]:
    """Graph and state of a copy, without what the model has sown."""
    copy = nnx.merge(*nnx.split(model), copy=True)
    for _, module in nnx.iter_modules(copy):
        for name, value in list(vars(module).items()):
            if isinstance(value, nnx.Intermediate):
                delattr(module, name)
    if eval_mode:
        copy.eval()
    return nnx.split(copy)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Head(Found):
    """The two-layer head of an NNX model: where it is, and how to read, write and feed it.

    Made by :func:`find_head`. ``print(head)`` shows where it is, what was proved, what a solve writes and what it
    leaves alone, and how much memory that takes.
    """

    eval_mode: bool = dataclasses.field(kw_only=True)

    def state(self, model: nnx.Module) -> Any:
        """The state that features are taken with.

        Raises:
            ValueError: if the model is not of the structure that the head was found in.
        """
        if not isinstance(model, nnx.Module):
            raise ValueError(f"fit_head: `model` must be an NNX module, got {type(model).__name__}.")
        graphdef, state = _functional(model, self.eval_mode)
        if self.eval_mode and graphdef != self.module.graphdef:
            raise ValueError(
                f"fit_head: `model` must be the {self.module.name} that the head was found in, unchanged in structure, "
                f"got a {type(model).__name__} of another structure. Call find_head again."
            )
        return state

    def read(self, model: nnx.Module) -> TwoLayer:
        """The head's weights as they are in ``model``."""
        return self.module.read(nnx.state(model), self.paths)

    def write(self, model: nnx.Module, network: TwoLayer) -> None:
        """Write these weights into the head, in place, in the dtypes that are there; the widths must be the same."""
        old = self.read(model)
        check_network(network, old)
        if jax.tree.map(jnp.shape, old) != jax.tree.map(jnp.shape, network):
            raise ValueError(
                f"write: `network` must have the widths of the head, {jax.tree.map(jnp.shape, old)}, got "
                f"{jax.tree.map(jnp.shape, network)}. For other widths replace the model's layers."
            )
        layers = [vars(module_at(model, path)) for path in self.paths]
        _assign(layers, network)

    def gather(self, model: nnx.Module, data: Any, unpack: Callable | None, callback: Callable | None) -> Rows:
        """The head's input for all rows of ``data``, with targets and weights; arguments as for :func:`fit_head`."""
        state = self.state(model)
        return gather(lambda args, kwargs: self._pass(state, args, kwargs), self.outputs, data, unpack, callback)

    def inputs(self, model: nnx.Module, *args: Any, **kwargs: Any) -> Array:
        """The head's input for a batch, ``(n, p)`` with leading axes flattened, by one jitted pass.

        Args:
            model: the model.
            *args: positional arguments of the model.
            **kwargs: keyword arguments; those of :func:`find_head` are kept where none is given.

        Raises:
            ValueError: if the model does not take the batch.
        """
        return self._pass(self.state(model), args, kwargs).reshape(-1, self.features)

    def _pass(self, state: Any, args: tuple, kwargs: Mapping) -> Array:
        try:
            return self._tap(state, args, {**self.kwargs, **kwargs})
        except (AttributeError, TypeError, ValueError) as error:
            shapes = jax.tree.map(jnp.shape, args)
            raise ValueError(
                f"fit_head: the batch must be one that the model takes, got arguments of shapes {shapes}: {error}"
            ) from error

    @functools.cached_property
    def _tap(self) -> Callable[[Any, tuple, Mapping], Array]:
        wanted = self.hidden_path
        return jitted(
            lambda state, args, kwargs: self.module.tapped(state, args, kwargs, lambda p: p == wanted)[1][wanted]
        )


def find_head(
    model: nnx.Module,
    *args: Any,
    method: Any = None,
    output: Any = None,
    paths: Any = None,
    eval_mode: bool = True,
    **kwargs: Any,
) -> Head:
    """Find the head ``Linear → relu → Linear`` that an NNX model ends in, and prove it by value.

    Called as the model would be, on one real batch; arguments given by keyword are used again for every feature pass.
    The model is not changed.

    Args:
        model: an NNX model; nothing in it needs to be prepared.
        *args: its positional arguments for one batch of at least two rows.
        method: the name of the method to call, or a function of the model and the arguments; None calls the model.
        output: which output ends in the head, where there are several: a key, an index, or a function of the outputs.
        paths: the paths of hidden and output layer, such as ``("fc1", "layers/2")``, instead of a search; they are
            proved all the same.
        eval_mode: features are taken as after ``model.eval()``, whatever mode the model is in: no dropout, running
            averages in norms. False takes the mode that the model is in now; with BatchNorm, alternations need that of
            ``model.train()``.
        **kwargs: its keyword arguments.

    Returns:
        The :class:`Head`.

    Raises:
        ValueError: if the model has no such head; the message says what was found instead, and what can be done.

    Example:
        >>> import jax, cronos_flax as cf
        >>> from flax import nnx
        >>> rngs = nnx.Rngs(0)
        >>> layers = nnx.Linear(5, 8, rngs=rngs), nnx.tanh, nnx.Linear(8, 16, rngs=rngs), nnx.relu
        >>> model = nnx.Sequential(*layers, nnx.Linear(16, 3, rngs=rngs))
        >>> head = cf.nnx.find_head(model, jax.random.normal(jax.random.key(0), (32, 5)))
        >>> head.hidden_path, head.output_path
        (('layers', 2), ('layers', 4))
    """
    if not isinstance(model, nnx.Module):
        raise ValueError(
            f"find_head: `model` must be an NNX module, got {type(model).__name__}. For linen: cf.find_head."
        )
    bridged = [slashed(path) for path, module in nnx.iter_modules(model) if isinstance(module, nnx.bridge.ToNNX)]
    graphdef, state = _functional(model, eval_mode)
    module = _Nnx(type(model).__name__, graphdef, method, output)
    try:
        found = find(module, state, args, kwargs, paths)
    except ValueError as error:
        if not bridged:
            raise
        raise ValueError(
            f"{error} A linen module is bridged in at {', '.join(bridged)}: its layers cannot be seen from NNX; use "
            "cf.find_head on the linen module."
        ) from error
    return Head(**vars(found), eval_mode=eval_mode)


def fit_head(
    head: Head,
    model: nnx.Module,
    data: Any,
    *,
    solver: Cronos | None = None,
    unpack: Callable[[Any], tuple] | None = None,
    key: Array | None = None,
    callback: Callable[[dict[str, float]], Any] | None = None,
    throw: bool = True,
) -> Solution:
    """Solve for the head of a model on its own features, and write it into the model, in place.

    The regularised loss of the network (see :class:`cronos_flax.Cronos`) never rises. The head's Params are written at
    the end, all of them; nothing else of the model changes, and after an exception nothing has.

    Args:
        head: from :func:`find_head`.
        model: the model, of the structure that it had then.
        data: as for :func:`cronos_flax.fit_head`, as are the other arguments.
        solver: None means ``Cronos()``.
        unpack: how to take a batch apart.
        key: key of samples and revived neurons.
        callback: called after each batch and at each check of the solve.
        throw: raise on numerical failure; else ``solution.status`` tells.

    Returns:
        The :class:`Solution`.

    Raises:
        ValueError: for data that do not fit the model, or each other.
        FloatingPointError: if the loss of the present head is not finite, and ``throw``.
    """
    solver = checked(head, Head, solver, "fit_head")
    rows = head.gather(model, data, unpack, callback)
    params, solution = fit(head.read(model), rows, solver, key, callback, throw)
    if params is not None:
        head.write(model, params)
    return solution
