"""Heads of linen modules: find one, and replace it by a solve."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import FrozenDict
from jax import Array

from cronos_flax._head.find import find
from cronos_flax._head.fit import fit_data, solver_or_default
from cronos_flax._head.head import Call, Head, Layer, Path, check_head, selected
from cronos_flax._solver.cronos import Cronos
from cronos_flax._solver.solution import Solution, TwoLayer

_TAPPED = "cronos_flax_tapped"  # the collection that inputs are sown into
_DENSE = nn.Dense, nn.DenseGeneral


@dataclasses.dataclass(frozen=True)
class LinenModule:
    """A linen module as pure functions of its variables; calls of layers are seen by Flax's interceptor.

    Args:
        model: the module.
        method: the method to call, as for ``model.apply``.
        output: which of several outputs ends in the head.
    """

    model: nn.Module
    method: Any
    output: Any

    finder: ClassVar[str] = "cf.find_head"
    dense: ClassVar[str] = "nn.Dense"
    graft: ClassVar[str] = "cf.graft"
    numbered: ClassVar[bool] = False

    @property
    def name(self) -> str:
        return type(self.model).__name__

    def variables(self, given: Any, where: str) -> Mapping:
        if not isinstance(given, Mapping) or "params" not in given:
            raise ValueError(
                f"{where}: `variables` must be a mapping with 'params', as model.init returns it, got "
                f"{sorted(map(str, given)) if isinstance(given, Mapping) else type(given).__name__}."
            )
        return given

    def watch(self, variables: Mapping, args: tuple, kwargs: Mapping) -> tuple[Any, tuple[Call, ...]]:
        out, inputs, dtypes, _ = self._apply(variables, args, kwargs, lambda _: True)
        return out, tuple(Call(Layer(path, dtype), inputs.get(path)) for path, dtype in dtypes.items())

    def tap(self, variables: Mapping, args: tuple, kwargs: Mapping, path: Path) -> tuple[Array, Mapping | None, Array]:
        out, inputs, _, updates = self._apply(variables, args, kwargs, lambda other: other == path)
        return inputs[path], None if kwargs.get("mutable", False) is False else updates, out

    def in_training(self, kwargs: Mapping) -> bool:
        return bool(kwargs.get("mutable"))

    def _apply(
        self, variables: Mapping, args: tuple, kwargs: Mapping, wanted: Callable[[Path], bool]
    ) -> tuple[Any, dict[Path, Array], dict[Path, Any], Mapping]:
        """The chosen output; inputs and dtypes of results by path, in call order; and the collections that changed."""
        dtypes: dict[Path, Any] = {}

        def watch(call: Callable, inputs: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
            module = context.module
            if not isinstance(module, _DENSE) or context.method_name != "__call__":
                return call(*inputs, **kwargs)
            if inputs and wanted(module.path):
                module.sow(_TAPPED, "input", jnp.asarray(inputs[0]), init_fn=lambda: None, reduce_fn=lambda _, new: new)
            out = call(*inputs, **kwargs)
            dtypes.pop(module.path, None)  # order by the last call
            dtypes[module.path] = out.dtype
            return out

        kwargs = dict(kwargs)
        mutable = flax.core.scope.union_filters(kwargs.pop("mutable", False), _TAPPED)
        with nn.intercept_methods(watch):
            out, updates = self.model.apply(variables, *args, method=self.method, mutable=mutable, **kwargs)
        updates = dict(updates)
        sown = flax.traverse_util.flatten_dict(flax.core.unfreeze(updates.pop(_TAPPED, {})))
        return selected(out, self.output), {path[:-1]: x for path, x in sown.items()}, dtypes, updates

    def kernel_shape(self, variables: Mapping, path: Path) -> tuple[int, ...]:
        try:
            return _at(variables["params"], path)["kernel"].shape
        except (KeyError, TypeError):
            return ()

    def read(self, given: Mapping, paths: tuple[Path, Path]) -> TwoLayer:
        hidden, output = (_at(given["params"], path) for path in paths)
        return TwoLayer(hidden["kernel"], hidden.get("bias"), output["kernel"], output.get("bias"))

    def write(self, variables: Mapping, paths: tuple[Path, Path], network: TwoLayer) -> Mapping:
        params = variables["params"]
        layers = (network.kernel1, network.bias1), (network.kernel2, network.bias2)
        for path, (kernel, bias) in zip(paths, layers, strict=True):
            new = {"kernel": kernel} if bias is None else {"kernel": kernel, "bias": bias}
            old = dict(functools.reduce(lambda tree, name: tree[name], path, params))
            new = jax.tree.map(lambda o, v: jnp.asarray(v, o.dtype), nn.meta.unbox(old), new)
            params = _replace(params, path, nn.meta.replace_boxed(old, new))
        return _replace(variables, ("params",), params)

    store = write

    def count(self, variables: Mapping) -> int:
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(variables["params"]))


def _at(tree: Mapping, path: Path) -> Mapping:
    for key in path:
        tree = tree[key]
    return nn.meta.unbox(tree)


def _replace(tree: Mapping, path: Path, value: Mapping) -> Mapping:
    """A copy of nested mappings, frozen where they were, with ``value`` at ``path``."""
    new = {**tree, path[0]: _replace(tree[path[0]], path[1:], value)} if path else dict(value)
    return FrozenDict(new) if isinstance(tree, FrozenDict) else new


def find_head(
    model: nn.Module,
    variables: Mapping,
    *args: Any,
    method: Any = None,
    output: Any = None,
    paths: Any = None,
    **kwargs: Any,
) -> Head:
    """Find the head ``Dense → relu → Dense`` that a linen module ends in, and verify it numerically.

    Takes the arguments of ``model.apply``, for one real batch. Keyword arguments (``train=False``, ``rngs``,
    ``mutable``, …) are used again for every feature pass. The module and the variables are not changed.

    Args:
        model: any linen module.
        variables: its variables, with ``"params"``.
        *args: the positional arguments of ``model.apply`` for one batch of at least two rows.
        method: as for ``model.apply``.
        output: which output ends in the head, if there are several: a key, an index, or a function of the outputs.
        paths: the paths of the hidden and the output layer within ``variables["params"]``, such as
            ``("fc1", "out/fc2")``; they are verified too. None searches for them.
        **kwargs: the keyword arguments of ``model.apply``.

    Returns:
        The :class:`Head`.

    Raises:
        ValueError: if the module has no such head; the message says what was found instead and what to do.

    Example:
        >>> import jax, flax.linen as nn, cronos_flax as cf
        >>> model = nn.Sequential([nn.Dense(8), nn.tanh, nn.Dense(16), nn.relu, nn.Dense(3)])
        >>> x = jax.random.normal(jax.random.key(0), (32, 5))
        >>> head = cf.find_head(model, model.init(jax.random.key(1), x), x)
        >>> head.hidden_path, head.output_path
        (('layers_2',), ('layers_4',))
    """
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"find_head: `model` must be a linen module, got {type(model).__name__}. For NNX: cf.nnx.find_head."
        )
    module = LinenModule(model, method, output)
    return find(module, module.variables(variables, "find_head"), args, kwargs, paths)


def fit_head(
    head: Head,
    variables: Mapping,
    data: Any,
    *,
    solver: Cronos | None = None,
    unpack: Callable[[Any], tuple] | None = None,
    key: Array | None = None,
    callback: Callable[[dict[str, float]], Any] | None = None,
    throw: bool = True,
) -> tuple[Mapping, Solution]:
    """Solve for the head of a module on the module's own features, starting from the present head.

    The backbone stays as it is. The regularised loss of the network (see :class:`cronos_flax.Cronos`) never rises.
    Each batch goes through the backbone once, and only its features are kept; the order of batches does not matter.

    Args:
        head: from :func:`find_head`.
        variables: the module's variables; they are not changed.
        data: whole arrays ``(x, y)``, or an iterable of batches ``(x, y)``; of NumPy, JAX, or any library whose arrays
            NumPy can read. Targets are what the solver's loss takes: labels, or floats with the shape of the module's
            output (for one output the last axis is optional). With ``unpack``, a dict of arrays is one batch.
        solver: None means ``Cronos()``.
        unpack: for batches of another form: ``unpack(batch)`` returns ``(args, y)`` or ``(args, y, weight)``, with
            ``args`` a tuple of the module's positional arguments or a dict of keyword arguments, and one weight for
            each example or for each row that reaches the head (a mask of tokens). Weights are finite and ≥ 0; batches
            without a positive one are passed over.
        key: as for :meth:`cronos_flax.Cronos.solve`.
        callback: called with ``{"rows", "seconds"}`` after each batch, and then as by
            :meth:`cronos_flax.Cronos.solve`.
        throw: raise on numerical failure; if False, ``solution.status`` tells.

    Returns:
        New variables, and the :class:`cronos_flax.Solution`.

    Raises:
        ValueError: for data that do not fit the module, or each other, and for features that are not finite.
        FloatingPointError: if the loss of the present head is not finite, and ``throw``.
    """
    check_head("fit_head", head, LinenModule)
    solver = solver_or_default("fit_head", solver)
    return fit_data(head, variables, data, solver, unpack, key, callback, throw)
