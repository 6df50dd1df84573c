"""Heads of NNX models: find one, and replace it by a solve.

The user's model is only read; a solve writes to it once, at the end.
"""

import dataclasses
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from cronos_flax._head.find import find
from cronos_flax._head.fit import fit_data, solver_or_default
from cronos_flax._head.functional import Call, Paths, Tap, Watched, selected
from cronos_flax._head.head import Head, check_head, relative_difference
from cronos_flax._head.jitted import jitted
from cronos_flax._head.nnx_watched import Seen, called, captured, watched
from cronos_flax._head.norms import check_statistics
from cronos_flax._head.others import named_arrays
from cronos_flax._head.paths import Path, at_path, format_path
from cronos_flax._head.pointwise import is_pointwise
from cronos_flax._solver.cronos import Cronos
from cronos_flax._solver.meshes import in_place_of
from cronos_flax._solver.solution import Solution, TwoLayer


@dataclasses.dataclass(frozen=True)
class NnxModule:
    """An NNX model as pure functions of its variables, which are its state.

    Args:
        name: the name of the model's class.
        graphdef: its structure, in the mode in which features are computed.
        method: the name of the method to call, or a function; None calls the model.
        output: which of several outputs ends in the head.
        eval_mode: whether features are computed as after ``model.eval()``.
        statistics: which statistics batch norms take, "batch" or "running"; None for those of the mode.
        structure: the structure in evaluation mode, whatever the mode of features; models of another are refused.
    """

    name: str
    graphdef: Any
    method: Any
    output: Any
    eval_mode: bool
    statistics: str | None
    structure: Any

    finder: ClassVar[str] = "cf.nnx.find_head"
    dense: ClassVar[str] = "nnx.Linear"
    graft: ClassVar[str] = "cf.nnx.graft"
    numbered: ClassVar[bool] = True

    def variables(self, given: Any, where: str) -> Any:
        if not isinstance(given, nnx.Module):
            raise ValueError(f"{where}: `model` must be an NNX module, got {type(given).__name__}.")
        _, state, structure = _functional(given, self.eval_mode)
        try:
            is_same = bool(self.structure == structure)
        except Exception:  # NumPy arrays in attributes, as of a configuration, compare to no bool
            is_same = False
        if not is_same:
            raise ValueError(
                f"{where}: `model` must be the {self.name} that the head was found in, unchanged in structure, "
                f"got a {type(given).__name__} of another structure or with other attributes. Call find_head again."
            )
        return state

    def watch(self, variables: Any, args: tuple, kwargs: Mapping) -> Watched:
        seen = self._with_inputs(variables, args, kwargs)
        if (
            self.statistics == "batch"
            and not seen.norms
            and jax.tree.leaves(nnx.filter_state(variables, nnx.BatchStat))
        ):
            raise ValueError(
                '`statistics="batch"` must find nnx.BatchNorm layers, and there are statistics but no such layers. For '
                "other norms call model.train() and give eval_mode=False instead."
            )
        calls = tuple(Call(layer, seen.inputs.get(path)) for path, layer in seen.layers.items())
        others = {} if self.output is None else named_arrays(seen.out)
        modules = nnx.iter_modules(nnx.merge(self.graphdef, variables))
        pointwise = Paths(tuple(path for path, module in modules if is_pointwise(module)))
        return Watched(selected(seen.out, self.output), calls, others, pointwise)

    def unwatched(self, variables: Any, args: tuple, kwargs: Mapping) -> Any:
        """The chosen output of one call of the model as it is: its layers are of their own classes."""
        try:
            with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # of what the model sows
                out = called(nnx.merge(self.graphdef, variables, copy=True), self.method, args, kwargs)
        except Exception:  # it sows where only captures can, as inside of nnx.scan
            model = nnx.merge(self.graphdef, variables, copy=True)
            out, _ = captured(model, nnx.Intermediate, self.method, args, kwargs)
        return selected(out, self.output)

    def tap(self, variables: Any, args: tuple, kwargs: Mapping, path: Path, observed: bool) -> Tap:
        seen = self._seen(variables, args, kwargs, lambda other: other == path)
        return Tap(seen.inputs[path], selected(seen.out, self.output), None, seen.norms if observed else ())

    def in_training(self, kwargs: Mapping) -> bool:
        return not self.eval_mode if self.statistics is None else self.statistics == "batch"

    def _with_inputs(self, variables: Any, args: tuple, kwargs: Mapping) -> Seen:
        """A call with the inputs of all layers, or of all that are called where the last one is.

        What a transform must give back as it took it, such as the cell of an ``nnx.RNN``, can keep no inputs.
        """
        try:
            return self._seen(variables, args, kwargs, lambda _: True)
        except Exception:
            seen = self._seen(variables, args, kwargs, lambda _: False)  # raises what the model itself does
        try:
            return self._seen(variables, args, kwargs, seen.beside.__contains__)
        except Exception:  # the last one is in such a transform
            return seen

    def _seen(self, variables: Any, args: tuple, kwargs: Mapping, wanted: Callable[[Path], bool]) -> Seen:
        """A call with the inputs of the layers that are wanted."""
        model = nnx.merge(self.graphdef, variables, copy=True)
        return watched(model, wanted, self.statistics, self.method, args, kwargs)

    def backbone(self, variables: Any, paths: tuple[Path, Path]) -> dict[str, Array]:
        arrays = nnx.to_flat_state(nnx.filter_state(variables, nnx.Not(nnx.RngState)))
        return {"/".join(map(str, path)): leaf[...] for path, leaf in arrays if tuple(path[:-1]) not in paths}

    def kernel_shape(self, variables: Any, path: Path) -> tuple[int, ...]:
        try:
            return jnp.shape(at_path(variables, path)["kernel"][...])
        except KeyError:  # shared with a layer that comes before
            return ()

    def own_parameters(self, variables: Any, path: Path) -> tuple[str, ...]:
        layer = at_path(variables, path) if self.kernel_shape(variables, path) else {}
        return tuple(sorted(map(str, layer.keys() - {"kernel", "bias"})))

    def read(self, given: Any, paths: tuple[Path, Path]) -> TwoLayer:
        hidden, output = (_weights(given, path) for path in paths)
        return TwoLayer(
            hidden["kernel"][...],
            hidden["bias"][...] if "bias" in hidden else None,
            output["kernel"][...],
            output["bias"][...] if "bias" in output else None,
        )

    def write(self, variables: Any, paths: tuple[Path, Path], network: TwoLayer) -> Any:
        new = jax.tree.map(lambda leaf: leaf, variables)
        _assign([_weights(new, path) for path in paths], network)
        return new

    def store(self, given: nnx.Module, paths: tuple[Path, Path], network: TwoLayer) -> nnx.Module:
        old, new = (jax.tree.map(jnp.shape, weights) for weights in (self.read(given, paths), network))
        if old != new:
            raise ValueError(
                f"write: `network` must have the widths of the head, {old}, got {new}. For other widths replace the "
                "model's layers."
            )
        _assign([_weights(given, path) for path in paths], network)
        return given

    def recalibrated(self, given: Any, moments: Mapping[Path, tuple[Any, Any]]) -> Any:
        new = given if isinstance(given, nnx.Module) else jax.tree.map(lambda leaf: leaf, given)
        for path, (mean, var) in moments.items():
            layer = _weights(new, path)
            layer["mean"].set_value(in_place_of(mean, layer["mean"].get_value()))
            layer["var"].set_value(in_place_of(var, layer["var"].get_value()))
        return new

    def count(self, variables: Any) -> int:
        return sum(math.prod(jnp.shape(leaf)) for leaf in jax.tree.leaves(nnx.filter_state(variables, nnx.Param)))


def _weights(given: Any, path: Path) -> Mapping[str, nnx.Variable]:
    """The Variables of a layer by name, in a model or in a state of it."""
    if not isinstance(given, nnx.Module):
        return at_path(given, path)
    return {name: value for name, value in vars(module_at(given, path)).items() if isinstance(value, nnx.Variable)}


def _assign(layers: list[Mapping[str, nnx.Variable]], network: TwoLayer) -> None:
    """Write the weights of two layers, in the dtypes of the old ones: all of them, or, on an error, none."""
    values = (network.kernel1, network.bias1), (network.kernel2, network.bias2)
    changes = []
    for layer, (kernel, bias) in zip(layers, values, strict=True):
        changes.append((layer["kernel"], in_place_of(kernel, layer["kernel"].get_value())))
        if bias is not None:
            changes.append((layer["bias"], in_place_of(bias, layer["bias"].get_value())))
    for param, value in changes:
        param.set_value(value)


def module_at(model: Any, path: Path) -> Any:
    """The part of a model at ``path``, of attributes and of keys or indices."""
    for key in path:
        model = getattr(model, str(key)) if isinstance(model, nnx.Module) and hasattr(model, str(key)) else model[key]
    return model


def without_sown(model: nnx.Module) -> nnx.Module:
    """A copy of the model, without what the model has sown."""
    copy = nnx.merge(*nnx.split(model), copy=True)
    for _, module in nnx.iter_modules(copy):
        for name, value in list(vars(module).items()):
            if isinstance(value, nnx.Intermediate):
                delattr(module, name)
    return copy


def _functional(model: nnx.Module, eval_mode: bool) -> tuple[Any, Any, Any]:
    """Structure and state of a copy of the model, and the structure in evaluation mode."""
    copy = without_sown(model)
    if eval_mode:
        copy.eval()
    graphdef, state = nnx.split(copy)
    copy.eval()
    return graphdef, state, nnx.graphdef(copy)


def find_head(
    model: nnx.Module,
    *args: Any,
    method: Any = None,
    output: Any = None,
    paths: Any = None,
    eval_mode: bool = True,
    statistics: str | None = None,
    recalibrate: bool = True,
    **kwargs: Any,
) -> Head:
    """Find the head ``Linear → relu → Linear`` that an NNX model ends in, and verify it numerically.

    Takes the arguments of the model, for one real batch. Keyword arguments are used again for every feature pass. The
    model is not changed.

    Args:
        model: any NNX model.
        *args: its positional arguments for one batch of at least two rows.
        method: the name of the method to call, the method itself, or a function of the model and the arguments; None
            calls the model.
        output: which output ends in the head, if there are several: a key, an index, or a function of the outputs. A
            UserWarning names others that use the head's hidden layer, since a solve changes these too.
        paths: the paths of the hidden and the output layer, such as ``("fc1", "layers/2")``; they are verified too.
            None searches for them.
        eval_mode: compute features as after ``model.eval()``, whatever the model's mode: no dropout, running averages
            in norms. False takes the mode that the model is in now.
        statistics: which statistics every ``nnx.BatchNorm`` takes, whatever mode and call say. ``"batch"``: those of
            the batch; in evaluation mode, features are then as in training, but without dropout. Alternate on these.
            ``"running"``: the running ones. None: those of the mode.
        recalibrate: whether, after a solve on features of batch statistics, the running statistics become those of all
            rows of that pass. Evaluated models then see the features that were solved on.
        **kwargs: its keyword arguments. Those that belong to the rows of the batch, such as a mask, must come
            with every other batch: see :attr:`Head.of_rows`.

    Returns:
        The :class:`cronos_flax.Head`.

    Raises:
        ValueError: if the model has no such head; the message says what was found instead and what to do.

    Warns:
        UserWarning: if other outputs of the module use the head's hidden layer too; and if the head's input changes
            with the random keys, as under dropout.

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
    bridged = [format_path(path) for path, module in nnx.iter_modules(model) if isinstance(module, nnx.bridge.ToNNX)]
    check_statistics("find_head", statistics)
    if getattr(method, "__self__", None) is model:
        method = method.__func__  # a copy is called
    graphdef, state, structure = _functional(model, eval_mode)
    module = NnxModule(type(model).__name__, graphdef, method, output, eval_mode, statistics, structure)
    try:
        head = find(module, state, args, kwargs, paths, recalibrate)
        _check_unwatched(module, state, args, kwargs, head.tolerance)
        return head
    except ValueError as error:
        if not bridged:
            raise
        raise ValueError(
            f"{error} A linen module is bridged in at {', '.join(bridged)}: its layers cannot be seen from NNX; if "
            "the head is among them, use cf.find_head on the linen module."
        ) from error


def _check_unwatched(module: NnxModule, state: Any, args: tuple, kwargs: Mapping, tolerance: float) -> None:
    """Raise a ValueError if the model computes something else while it is watched.

    Only where its program is another one then, which takes no compilation to tell, are outputs compared.
    """
    module = dataclasses.replace(module, statistics=None)  # chosen ones are others than those of the mode
    plain, seen = jitted(module.unwatched), jitted(lambda *call: module.watch(*call).out)
    if plain.text(state, args, kwargs, [True]) == seen.text(state, args, kwargs, [True]):
        return
    with jax.default_matmul_precision("highest"):
        difference = relative_difference(seen(state, args, kwargs), plain(state, args, kwargs))
    if not difference <= tolerance:
        raise ValueError(
            f"find_head: {module.name} must compute the same where its layers belong to subclasses of their classes, "
            f"by which they are watched; its outputs differ by {difference:.2g} of their size. It may ask for the type "
            "of a layer, as by type(layer) is nnx.Linear: use isinstance. Or it may go by all attributes of a module, "
            "as by vars(self), of which there are more then, such as __captures__: name those that are meant."
        )


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
    """Solve for the head of a model on the model's own features, and write it into the model, in place.

    The regularised loss of the network (see :class:`cronos_flax.Cronos`) never rises. The head's Params are written at
    the end, all of them; and, if features are those of batch statistics, the running statistics (see ``recalibrate`` of
    :func:`find_head`). Nothing else in the model changes. After an exception the model is unchanged. Features that are
    many go to a file, as in :func:`cronos_flax.fit_head`.

    Args:
        head: from :func:`find_head`.
        model: the model that the head was found in, or one of the same structure.
        data: as for :func:`cronos_flax.fit_head`, as are the other arguments.
        solver: None means ``Cronos()``.
        unpack: how to take a batch apart.
        key: key of samples and revived neurons.
        callback: called after each batch and at each check of the solve.
        throw: raise on numerical failure; if False, ``solution.status`` tells.

    Returns:
        The :class:`cronos_flax.Solution`.

    Raises:
        ValueError: for data that do not fit the model, or each other, and for features that are not finite.
        OSError: if the temporary directory has no room for features that memory should not hold.
        FloatingPointError: if the loss of the present head is not finite, and ``throw``.

    Warns:
        UserWarning: if a head with an output bias ends above the loss of the best constant outputs, and where
            :meth:`cronos_flax.Cronos.solve` warns.
    """
    check_head("fit_head", head, NnxModule)
    solver = solver_or_default("fit_head", solver)
    return fit_data(head, model, data, solver, unpack, key, callback, throw)[1]
