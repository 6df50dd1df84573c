"""Heads of linen modules: find one, and replace it by a solve."""

import copy
import dataclasses
import math
import numbers
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict
from jax import Array

from cronos_flax._head.find import find
from cronos_flax._head.fit import fit_data, solver_or_default
from cronos_flax._head.functional import Call, Layer, Paths, Tap, Watched, selected
from cronos_flax._head.head import Head, check_head
from cronos_flax._head.jitted import jitted
from cronos_flax._head.norms import Moments, Norm, bound_axes, check_statistics, with_attributes
from cronos_flax._head.others import named_arrays
from cronos_flax._head.paths import Path, at_path, format_path
from cronos_flax._head.pointwise import is_pointwise
from cronos_flax._solver.arrays import is_array
from cronos_flax._solver.cronos import Cronos
from cronos_flax._solver.meshes import in_place_of
from cronos_flax._solver.solution import Solution, TwoLayer
from cronos_flax._solver.transfer import on_host
from cronos_flax._solver.user_warnings import warn

_TAPPED = "cronos_flax_tapped"  # the collection that inputs are sown into
_STATS = "batch_stats"  # Flax's collection of running statistics
_DENSE = nn.Dense, nn.DenseGeneral


_NOT_IN_TRAINING = (
    f'find_head: `mutable=["{_STATS}"]` calls the module as in training, but this call leaves running statistics as '
    "they are, such as one with train=False: features are those of evaluation, and gradient steps may see others. Give "
    'statistics="batch" for those of the batch; or leave `mutable` out; or give statistics="running" if batch norms '
    "keep their statistics in training steps too."
)


class _Seen(NamedTuple):
    """What is seen of one call of a module.

    Args:
        out: the chosen output.
        every: all outputs.
        inputs: of the fully connected layers, by path, as far as they were recorded.
        layers: those that were called, by path, in call order.
        updates: the collections that changed; None if none may.
        norms: statistics of the batch norms; those of the batch only if they were observed.
        running: whether there are batch norms, and all were called to take running statistics, by the call itself.
        pointwise: paths of the 1×1 convolutions, in call order.
    """

    out: Any
    every: Any
    inputs: dict[Path, Array]
    layers: dict[Path, Layer]
    updates: Mapping | None
    norms: tuple[Moments, ...]
    running: bool
    pointwise: tuple[Path, ...]


def _normed(
    module: nn.BatchNorm, call: Callable, inputs: tuple, kwargs: dict, statistics: str | None, observed: bool
) -> Any:
    """A call of a batch norm, with the statistics that were chosen.

    If ``observed``, its running statistics are the batch's own afterwards, and their mean if it is called repeatedly.
    """
    attributes: dict[str, Any] = {"axis_name": bound_axes(module.axis_name)}
    if statistics is not None:
        attributes["use_running_average"] = statistics == "running"
        inputs, kwargs = inputs[:1], {name: v for name, v in kwargs.items() if name != "use_running_average"}
    if not observed:
        with with_attributes(module, **attributes):
            return call(*inputs, **kwargs)
    earlier = module.get_variable(_TAPPED, "calls", 0.0)
    before: dict[str, Array | None] = {name: module.get_variable(_STATS, name) for name in ("mean", "var")}
    with with_attributes(module, **attributes, momentum=0.0):
        out = call(*inputs, **kwargs)
    if module.is_mutable_collection(_TAPPED):  # not within nn.scan, where layers are called once
        module.put_variable(_TAPPED, "calls", earlier + 1)
        for name, old in before.items():
            if old is not None:
                mean: Array = module.get_variable(_STATS, name)
                module.put_variable(_STATS, name, (earlier * old + mean) / (earlier + 1))
    return out


def on_one_device(call: Callable, inputs: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
    """For ``nn.intercept_methods``: batch norms average over no axis of devices that is not there."""
    if not isinstance(context.module, nn.BatchNorm):
        return call(*inputs, **kwargs)
    with with_attributes(context.module, axis_name=bound_axes(context.module.axis_name)):
        return call(*inputs, **kwargs)


def check_no_lists(what: str, tree: Any) -> None:
    """Raise a ValueError for numbers in lists, as JSON gives arrays; ``what`` is how the error names the tree."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        is_listed = any(isinstance(entry, jax.tree_util.SequenceKey) for entry in path)
        if is_listed and isinstance(leaf, numbers.Real) and not isinstance(leaf, np.generic):
            names = format_path(tuple(getattr(entry, "key", None) for entry in path if hasattr(entry, "key")))
            raise ValueError(
                f"{what} must hold arrays, got a list of numbers at {names}. Make arrays of lists: jax.tree.map("
                "jnp.asarray, variables, is_leaf=lambda leaf: isinstance(leaf, list))."
            )


class Collections:
    """Variables in the form of linen, for a module as pure functions: arrays in nested mappings, by collection.

    Attributes:
        streams: the collections that hold the state of random streams, if variables have it.
    """

    finder: ClassVar[str] = "cf.find_head"
    streams: ClassVar[tuple[str, ...]] = ()

    def variables(self, given: Any, where: str) -> Mapping:
        if not isinstance(given, Mapping) or "params" not in given:
            raise ValueError(
                f"{where}: `variables` must be a mapping with 'params', as model.init returns it, got "
                f"{sorted(map(str, given)) if isinstance(given, Mapping) else type(given).__name__}."
            )
        check_no_lists(f"{where}: `variables`", given["params"])
        return given

    def backbone(self, variables: Mapping, paths: tuple[Path, Path]) -> dict[str, Array]:
        head = {("params", *path) for path in paths}
        arrays = flax.traverse_util.flatten_dict(flax.core.unfreeze(nn.meta.unbox(dict(variables))))
        own = {path: leaf for path, leaf in arrays.items() if is_array(leaf)}  # sown values are tuples
        return {"/".join(map(str, path)): leaf for path, leaf in own.items() if path[:-1] not in head}

    def kernel_shape(self, variables: Mapping, path: Path) -> tuple[int, ...]:
        try:
            return _at(variables["params"], path)["kernel"].shape
        except (KeyError, TypeError):
            return ()

    def own_parameters(self, variables: Mapping, path: Path) -> tuple[str, ...]:
        layer = _at(variables["params"], path) if self.kernel_shape(variables, path) else {}
        return tuple(sorted(layer.keys() - {"kernel", "bias"}))

    def read(self, given: Mapping, paths: tuple[Path, Path]) -> TwoLayer:
        hidden, output = (_at(given["params"], path) for path in paths)
        return TwoLayer(hidden["kernel"], hidden.get("bias"), output["kernel"], output.get("bias"))

    def write(self, variables: Mapping, paths: tuple[Path, Path], network: TwoLayer) -> Mapping:
        params = variables["params"]
        layers = (network.kernel1, network.bias1), (network.kernel2, network.bias2)
        for path, (kernel, bias) in zip(paths, layers, strict=True):
            new = {"kernel": kernel} if bias is None else {"kernel": kernel, "bias": bias}
            old = dict(at_path(params, path))
            new = {name: in_place_of(value, jax.tree.leaves(old[name])[0]) for name, value in new.items()}
            params = _replace(params, path, nn.meta.replace_boxed(old, new))
        return _replace(variables, ("params",), params)

    store = write

    def recalibrated(self, given: Mapping, moments: Mapping[Path, tuple[Any, Any]]) -> Mapping:
        missing: list[str] = []
        for path, (mean, var) in moments.items():
            try:
                old = dict(at_path(given[_STATS], path))
            except KeyError:
                missing.append(format_path(path))
                continue
            unboxed = nn.meta.unbox(old)
            new = unboxed | {
                "mean": in_place_of(mean, unboxed["mean"]),
                "var": in_place_of(var, unboxed["var"]),
            }
            given = _replace(given, (_STATS, *path), nn.meta.replace_boxed(old, new))
        if missing:
            warn(
                f"After a solve with statistics of the batch, batch norms such as {missing[0]} had no running "
                "statistics to set. Give them: with the variables to fit_head; or to CronosTrainState.create as "
                f'model_state={{"{_STATS}": …}}, since a field of another name is not looked at. If you keep none, '
                "find the head with recalibrate=False."
            )
        return given

    def count(self, variables: Mapping) -> int:
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(variables["params"]))


@dataclasses.dataclass(frozen=True)
class LinenModule(Collections):
    """A linen module as pure functions of its variables; calls of layers are seen by Flax's interceptor.

    Args:
        model: the module.
        method: the method to call, as for ``model.apply``.
        output: which of several outputs ends in the head.
        statistics: which statistics batch norms take, "batch" or "running"; None for those that the call asks for.
    """

    model: nn.Module
    method: Any
    output: Any
    statistics: str | None

    dense: ClassVar[str] = "nn.Dense"
    graft: ClassVar[str] = "cf.graft"
    numbered: ClassVar[bool] = False

    @property
    def name(self) -> str:
        return type(self.model).__name__

    def watch(self, variables: Mapping, args: tuple, kwargs: Mapping) -> Watched:
        seen = self._apply(variables, args, kwargs, lambda _: True)
        if self.statistics == "batch" and not seen.norms and jax.tree.leaves(variables.get(_STATS, {})):
            raise ValueError(
                '`statistics="batch"` must find nn.BatchNorm layers, and there are statistics but no such layers. For '
                f'other norms call the module as in training instead: mutable=["{_STATS}"] and its own argument.'
            )
        calls = tuple(Call(layer, seen.inputs.get(path)) for path, layer in seen.layers.items())
        every = {} if self.output is None else named_arrays(seen.every)
        return Watched(seen.out, calls, every, Paths(seen.pointwise))

    def tap(self, variables: Mapping, args: tuple, kwargs: Mapping, path: Path, observed: bool) -> Tap:
        seen = self._apply(variables, args, kwargs, lambda other: other == path, observed)
        return Tap(seen.inputs[path], seen.out, seen.updates, seen.norms if observed else ())

    def in_training(self, kwargs: Mapping) -> bool:
        asked = flax.core.scope.in_filter(kwargs.get("mutable", False), _STATS)
        return asked if self.statistics is None else self.statistics == "batch"

    def leaves_statistics(self, variables: Mapping, args: tuple, kwargs: Mapping) -> bool:
        """Whether a call says that it is one of training, and all its batch norms take their running statistics."""
        if self.statistics is not None or not self.in_training(kwargs):
            return False

        def running(variables: Mapping, args: tuple, kwargs: Mapping) -> np.ndarray:
            return np.asarray(self._apply(variables, args, kwargs, lambda _: False).running)

        return bool(on_host(jitted(running)(variables, args, kwargs)))  # which computes nothing else

    def _apply(
        self,
        variables: Mapping,
        args: tuple,
        kwargs: Mapping,
        wanted: Callable[[Path], bool],
        observed: bool = False,
    ) -> "_Seen":
        """One call of the module."""
        layers: dict[Path, Layer] = {}
        norms: list[Path] = []
        running: list[bool] = []  # of each call of a batch norm
        pointwise: list[Path] = []

        def watch(call: Callable, inputs: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
            module = context.module
            if is_pointwise(module):
                pointwise.append(module.path)
            if context.method_name != "__call__" or not isinstance(module, (*_DENSE, nn.BatchNorm)):
                return call(*inputs, **kwargs)
            if isinstance(module, nn.BatchNorm):
                norms.append(module.path)
                running.append(_takes_running(module, *inputs[1:2], **kwargs))
                return _normed(module, call, inputs, kwargs, self.statistics, observed)
            if inputs and wanted(module.path) and _may_change(module):
                module.sow(_TAPPED, "input", jnp.asarray(inputs[0]), init_fn=lambda: None, reduce_fn=lambda _, new: new)
            out = call(*inputs, **kwargs)
            earlier = layers.pop(module.path, None)  # order by the last call
            layers[module.path] = Layer.of(module.path, out, module.dtype, earlier)
            return out

        kwargs = dict(kwargs)
        asked = kwargs.pop("mutable", False)
        mutable = flax.core.scope.union_filters(asked, _TAPPED)
        if observed or self.statistics == "batch":
            mutable = flax.core.scope.union_filters(mutable, _STATS)
        with nn.intercept_methods(watch):
            out, changed = self.model.apply(variables, *args, method=self.method, mutable=mutable, **kwargs)
        changed = dict(changed)
        sown = flax.traverse_util.flatten_dict(flax.core.unfreeze(changed.pop(_TAPPED, {})))
        updates = {name: value for name, value in changed.items() if flax.core.scope.in_filter(asked, name)}
        return _Seen(
            selected(out, self.output),
            out,
            {path[:-1]: x for path, x in sown.items() if path[-1] == "input"},
            layers,
            None if asked is False else updates,
            tuple(_moments(changed[_STATS], path) for path in dict.fromkeys(norms)) if _STATS in changed else (),
            bool(running) and all(running),
            tuple(reversed(dict.fromkeys(reversed(pointwise)))),
        )


def _takes_running(module: nn.BatchNorm, use_running_average: Any = None, **_: Any) -> bool:
    """Whether a call of a batch norm asks for its running statistics."""
    asked = module.use_running_average if use_running_average is None else use_running_average
    return isinstance(asked, bool | np.bool_) and bool(asked)


def _may_change(module: nn.Module) -> bool:
    """Whether variables of a module may change here: within a transform of JAX itself they may only be read."""
    assert module.scope is not None
    return bool(module.scope.root.trace_level == flax.core.tracers.current_trace())


def _moments(collection: Mapping, path: Path) -> Moments:
    """The statistics of the batch norm at ``path``."""
    stats = _at(collection, path)
    return Moments(Norm(path), stats["mean"], stats["var"])


def _at(tree: Mapping, path: Path) -> Mapping:
    return nn.meta.unbox(at_path(tree, path))


def _replace(tree: Mapping, path: Path, value: Mapping) -> Mapping:
    """A copy of nested mappings, of the kinds that they were, with ``value`` at ``path``."""
    new = {**tree, path[0]: _replace(tree[path[0]], path[1:], value)} if path else dict(value)
    if isinstance(tree, FrozenDict):
        return FrozenDict(new)
    if type(tree) is dict or not isinstance(tree, dict):
        return new
    other = copy.copy(tree)  # an OrderedDict, whose order its pytree has
    other.update(new)
    return other


def find_head(
    model: nn.Module,
    variables: Mapping,
    *args: Any,
    method: Any = None,
    output: Any = None,
    paths: Any = None,
    statistics: str | None = None,
    recalibrate: bool = True,
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
        output: which output ends in the head, if there are several: a key, an index, or a function of the outputs. A
            UserWarning names others that use the head's hidden layer, since a solve changes these too.
        paths: the paths of the hidden and the output layer within ``variables["params"]``, such as
            ``("fc1", "out/fc2")``; they are verified too. None searches for them.
        statistics: which statistics every ``nn.BatchNorm`` takes, whatever the call says. ``"batch"``: those of the
            batch; with the keyword arguments of an evaluation, features are then as in training, but without dropout.
            Alternate on these. ``"running"``: the running ones. None: those that the call asks for.
        recalibrate: whether, after a solve on features of batch statistics, the running statistics become those of all
            rows of that pass. Evaluated models then see the features that were solved on.
        **kwargs: the keyword arguments of ``model.apply``. Those that belong to the rows of the batch, such as a
            mask, must come with every other batch: see :attr:`Head.of_rows`.

    Returns:
        The :class:`Head`.

    Raises:
        ValueError: if the module has no such head; the message says what was found instead and what to do.

    Warns:
        UserWarning: if other outputs of the module use the head's hidden layer too; and if the head's input changes
            with the random keys, as under dropout. If ``mutable`` has the running statistics of batch norms, and the
            call leaves them as they are.

    Example:
        >>> import jax, flax.linen as nn, cronos_flax as cf
        >>> model = nn.Sequential([nn.Dense(8), nn.tanh, nn.Dense(16), nn.relu, nn.Dense(3)])
        >>> x = jax.random.normal(jax.random.key(0), (32, 5))
        >>> head = cf.find_head(model, model.init(jax.random.key(1), x), x)
        >>> head.hidden_path, head.output_path
        (('layers_2',), ('layers_4',))
    """
    if not isinstance(model, nn.Module):
        if isinstance(getattr(model, "module", None), nn.Module):  # as Hugging Face's Flax models have it
            raise ValueError(
                f"find_head: `model` must be a linen module, got a {type(model).__name__} that holds one. Give its "
                '`.module`, with {"params": model.params} as `variables`.'
            )
        raise ValueError(
            f"find_head: `model` must be a linen module, got {type(model).__name__}. For NNX: cf.nnx.find_head."
        )
    check_statistics("find_head", statistics)
    module = LinenModule(model, method, output, statistics)
    head = find(module, module.variables(variables, "find_head"), args, kwargs, paths, recalibrate)
    if module.leaves_statistics(variables, args, kwargs):
        warn(_NOT_IN_TRAINING)
    return head


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
    Features that are more than ``max_bytes`` of :class:`cronos_flax.Cronos` are written to a file in the temporary
    directory, which is gone afterwards, and read in blocks.

    Args:
        head: from :func:`find_head`.
        variables: the module's variables; they are not changed.
        data: whole arrays ``(x, y)``, or an iterable of batches ``(x, y)``; of NumPy, JAX, or any library whose arrays
            NumPy can read. Targets are what the solver's loss takes: labels, or floats with the shape of the module's
            output (for one output the last axis is optional). With ``unpack``, a dict of arrays is one batch. Or
            :class:`Features`, which need no pass.
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
        New variables, and the :class:`cronos_flax.Solution`. Running statistics change only if features are those of
        batch statistics (see ``recalibrate`` of :func:`find_head`).

    Raises:
        ValueError: for data that do not fit the module, or each other, and for features that are not finite.
        OSError: if the temporary directory has no room for features that memory should not hold.
        FloatingPointError: if the loss of the present head is not finite, and ``throw``.

    Warns:
        UserWarning: if a head with an output bias ends above the loss of the best constant outputs; if running
            statistics that it sets are not among the variables; and where :meth:`cronos_flax.Cronos.solve` warns.
    """
    check_head("fit_head", head, Collections)
    solver = solver_or_default("fit_head", solver)
    return fit_data(head, variables, data, solver, unpack, key, callback, throw)
