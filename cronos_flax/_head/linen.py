"""The layer-solver on linen modules: find the head, read, write and feed it, and replace it by a solve."""

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
from jaxtyping import Float

from cronos_flax._head.features import Rows, gather
from cronos_flax._head.find import Call, Found, Layer, Path, find, jitted, selected
from cronos_flax._head.fit import check_network, checked, fit
from cronos_flax._solver.cronos import Cronos
from cronos_flax._solver.solution import Solution, TwoLayer

_TAPPED = "cronos_flax_tapped"  # the collection that inputs are sown into
_DENSE = nn.Dense, nn.DenseGeneral


@dataclasses.dataclass(frozen=True)
class _Linen:
    """A linen module in functional form."""

    model: nn.Module
    method: Any
    output: Any

    dense: ClassVar[str] = "nn.Dense"
    graft: ClassVar[str] = "cf.graft"
    numbered: ClassVar[bool] = False

    @property
    def name(self) -> str:
        return type(self.model).__name__

    def watch(self, variables: Mapping, args: tuple, kwargs: Mapping) -> tuple[Any, tuple[Call, ...]]:
        out, inputs, dtypes, _ = self.tapped(variables, args, kwargs, lambda _: True)
        return out, tuple(Call(Layer(path, dtype), inputs.get(path)) for path, dtype in dtypes.items())

    def tapped(
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
            dtypes.pop(module.path, None)  # the last call counts
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

    def read(self, variables: Mapping, paths: tuple[Path, Path]) -> TwoLayer:
        hidden, output = (_at(variables["params"], path) for path in paths)
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

    def count(self, variables: Mapping) -> int:
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(variables["params"]))


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Head(Found):
    """The two-layer head of a linen module: where it is, and how to read, write and feed it.

    Made by :func:`find_head`. ``print(head)`` shows where it is, what was proved, what a solve writes and what it
    leaves alone, and how much memory that takes.
    """

    def read(self, variables: Mapping) -> TwoLayer:
        """The head's weights as they are in ``variables``."""
        return self.module.read(variables, self.paths)

    def write(self, variables: Mapping, network: TwoLayer) -> Mapping:
        """A copy of ``variables`` with these weights in the head, in the dtypes that were there."""
        check_network(network, self.read(variables))
        return self.module.write(variables, self.paths, network)

    def gather(self, variables: Mapping, data: Any, unpack: Callable | None, callback: Callable | None) -> Rows:
        """The head's input for all rows of ``data``, with targets and weights; arguments as for :func:`fit_head`."""
        return gather(lambda args, kwargs: self._pass(variables, args, kwargs)[0], self.outputs, data, unpack, callback)

    def inputs(self, variables: Mapping, *args: Any, **kwargs: Any) -> Any:
        """The head's input for a batch, by one jitted pass through the backbone.

        Args:
            variables: the module's variables.
            *args: positional arguments of the module.
            **kwargs: keyword arguments; those of :func:`find_head` are kept where none is given.

        Returns:
            Features ``(n, p)``, leading axes flattened. If ``mutable`` is among the keyword arguments, a pair of these
            and the collections that changed, as from ``model.apply``.

        Raises:
            ValueError: if the module does not take the batch.
        """
        features, updates = self._pass(variables, args, kwargs)
        rows: Float[Array, "n p"] = features.reshape(-1, self.features)
        return (rows, updates) if "mutable" in {**self.kwargs, **kwargs} else rows

    def _pass(self, variables: Mapping, args: tuple, kwargs: Mapping) -> tuple[Array, Mapping]:
        """Features with their leading axes, and the collections that changed."""
        try:
            return self._tap(variables, args, {**self.kwargs, **kwargs})
        except (flax.errors.FlaxError, AttributeError, TypeError, ValueError) as error:
            shapes = jax.tree.map(jnp.shape, args)
            raise ValueError(
                f"fit_head: the batch must be one that the model takes, got arguments of shapes {shapes}: {error}"
            ) from error

    @functools.cached_property
    def _tap(self) -> Callable[[Mapping, tuple, Mapping], tuple[Array, Mapping]]:
        def tap(variables: Mapping, args: tuple, kwargs: Mapping) -> tuple[Array, Mapping]:
            _, inputs, _, updates = self.module.tapped(variables, args, kwargs, lambda p: p == self.hidden_path)
            return inputs[self.hidden_path], updates

        return jitted(tap)


def _at(tree: Mapping, path: Path) -> Mapping:
    for key in path:
        tree = tree[key]
    return nn.meta.unbox(tree)


def _replace(tree: Mapping, path: Path, value: Mapping) -> Mapping:
    """A copy of nested mappings, frozen where they were, with ``value`` at ``path``."""
    new = {**tree, path[0]: _replace(tree[path[0]], path[1:], value)} if path else dict(value)
    return FrozenDict(new) if isinstance(tree, FrozenDict) else new


def check_variables(where: str, variables: Any) -> None:
    """What ``model.init`` returns."""
    if not isinstance(variables, Mapping) or "params" not in variables:
        raise ValueError(
            f"{where}: `variables` must be a mapping with 'params', as model.init returns it, got "
            f"{sorted(map(str, variables)) if isinstance(variables, Mapping) else type(variables).__name__}."
        )


def find_head(
    model: nn.Module,
    variables: Mapping,
    *args: Any,
    method: Any = None,
    output: Any = None,
    paths: Any = None,
    **kwargs: Any,
) -> Head:
    """Find the head ``Dense → relu → Dense`` that a linen module ends in, and prove it by value.

    Called as ``model.apply`` would be, on one real batch; the arguments given by keyword (``train=False``, ``rngs``,
    ``mutable``, …) are used again for every feature pass. The module and the variables are not changed.

    Args:
        model: a linen module; nothing in it needs to be prepared.
        variables: its variables, with ``"params"``.
        *args: the positional arguments of ``model.apply`` for one batch of at least two rows.
        method: as for ``model.apply``.
        output: which output ends in the head, where there are several: a key, an index, or a function of the outputs.
        paths: the paths of hidden and output layer within ``variables["params"]``, such as ``("fc1", "out/fc2")``,
            instead of a search; they are proved all the same.
        **kwargs: the keyword arguments of ``model.apply``.

    Returns:
        The :class:`Head`.

    Raises:
        ValueError: if the module has no such head; the message says what was found instead, and what can be done.

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
    check_variables("find_head", variables)
    return Head(**vars(find(_Linen(model, method, output), variables, args, kwargs, paths)))


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
    """Solve for the head of a module on its own features, everything else frozen, starting from the head that is there.

    The regularised loss of the network (see :class:`cronos_flax.Cronos`) never rises; ``variables`` are not changed.
    Batches go through the backbone once, and only features stay. The order in which they come does not matter.

    Args:
        head: from :func:`find_head`.
        variables: the module's variables.
        data: ``(x, y)``, whole arrays; or an iterable of batches, each ``(x, y)``. Targets are what the solver's
            loss takes: labels, or floats with the shape of the module's output, the last axis optional for one output.
        solver: None means ``Cronos()``.
        unpack: for batches of another form: ``unpack(batch)`` returns ``(args, y)`` or ``(args, y, weight)`` with
            ``args`` the tuple of positional arguments of the module, or a dict of keyword arguments. A weight is
            one for each example, or for each row that reaches the head (a mask of tokens).
        key: as for :meth:`cronos_flax.Cronos.solve`.
        callback: called with ``{"rows", "seconds"}`` after each batch, and then as by
            :meth:`cronos_flax.Cronos.solve`.
        throw: raise on numerical failure; else ``solution.status`` tells.

    Returns:
        New variables, and the :class:`Solution`.

    Raises:
        ValueError: for data that do not fit the module, or each other.
        FloatingPointError: if the loss of the present head is not finite, and ``throw``.
    """
    solver = checked(head, Head, solver, "fit_head")
    check_variables("fit_head", variables)
    rows = head.gather(variables, data, unpack, callback)
    params, solution = fit(head.read(variables), rows, solver, key, callback, throw)
    return variables if params is None else head.write(variables, params), solution
