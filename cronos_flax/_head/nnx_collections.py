"""NNX models in the form of linen: a function like ``model.apply``, and variables as collections of arrays.

All that trains or solves for a linen module takes an NNX model in this form. The model itself is never written to.
"""

import dataclasses
import functools
import itertools
from collections.abc import Mapping
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import flatten_dict
from jax import Array

from cronos_flax._head.functional import Tap, Watched
from cronos_flax._head.head import Head
from cronos_flax._head.jitted import made_once
from cronos_flax._head.linen import Collections
from cronos_flax._head.nnx import NnxModule, without_sown
from cronos_flax._head.nnx_watched import captured
from cronos_flax._head.norms import bound_axes
from cronos_flax._head.paths import Path, format_path

# Variables that are of none of these kinds are in the collection of the rest.
_KINDS = {"params": nnx.Param, "batch_stats": nnx.BatchStat, "streams": nnx.RngState}
_REST = "others"
_ALWAYS = "params", "streams"  # a step mutates one collection at least, and so is told from an evaluation


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class NnxFunction:
    """An NNX model as a function of its variables; it is called as linen's ``model.apply`` is.

    Models of equal structure have the same function: see :func:`functional`.

    Args:
        structure: of the model, in the mode that it was given in.
        training: the same in the mode of gradient steps.
        evaluation: the same as after ``model.eval()``.
        method: the name of the method to call, or a function; None calls the model.
        kept_back: the parts that are in evaluation mode in gradient steps, by their paths.
    """

    structure: Any
    training: Any
    evaluation: Any
    method: Any
    kept_back: tuple[str, ...]

    def __call__(self, variables: Mapping[str, Any], *args: Any, mutable: Any = False, **kwargs: Any) -> Any:
        """Call the model: in the mode of gradient steps if anything is mutable, else in that of evaluation.

        Args:
            variables: the collections.
            *args: positional arguments of the model.
            mutable: the names of collections that the call may change, or one name; True for all but the parameters.
            **kwargs: keyword arguments of the model.

        Returns:
            What the model returns; with ``mutable`` a pair of that, and the collections that are mutable.

        Raises:
            ValueError: if a call in a gradient step assigns parameters, or makes Variables; or any call parameters.
        """
        model = _merged(self.training if mutable else self.evaluation, variables)
        for _, module in nnx.iter_modules(model):
            if isinstance(module, nnx.BatchNorm):  # as on one device: it averages over no axis that is not there
                module.axis_name = bound_axes(module.axis_name)
        if mutable:
            for _, variable in nnx.iter_graph(model):
                if isinstance(variable, nnx.Param):
                    variable.set_metadata(on_set_value=(_refused,))
        # What the model sows goes nowhere; outside of a capture, Flax would warn.
        out, _ = captured(model, nnx.Intermediate, self.method, args, kwargs)
        _, after = _split(model)
        if made := _made(after if mutable else {"params": after["params"]}, variables):
            raise ValueError(
                f"a call of the model must make no nnx.Variables, but it makes {', '.join(made)}. Make them when the "
                "model is made, or by one call before; or sow values as nnx.Intermediate, which training passes over."
            )
        if not mutable:
            return out
        names = after.keys() - {"params"} if mutable is True else [mutable] if isinstance(mutable, str) else mutable
        return out, {name: after.get(name, {}) for name in names}

    def model(self, variables: Mapping[str, Any]) -> nnx.Module:
        """A new model with these variables, in the mode that the model was given in."""
        return _merged(self.structure, variables)


def functional(model: nnx.Module, method: Any = None, train_mode: bool = True) -> tuple[NnxFunction, dict[str, Any]]:
    """A model as a function, and its variables: nested dicts of arrays, with the model's own names and indices.

    Args:
        model: the model; it is not changed.
        method: the name of the method to call, or a function; None calls the model.
        train_mode: whether gradient steps are made as after ``model.train()``; False leaves the mode as it is.

    Returns:
        The function; and the collections ``"params"`` (all of ``nnx.Param``), ``"batch_stats"``, ``"streams"`` (the
        state of random streams) and ``"others"``. What the model has sown is left out.
    """
    copy = without_sown(model)
    structure, variables = _split(copy)
    if train_mode:
        copy.train()
    training = nnx.graphdef(copy)
    kept_back = [format_path(tuple(path)) for path, module in nnx.iter_modules(copy) if _is_evaluated(module)]
    copy.eval()
    return _interned(structure, training, nnx.graphdef(copy), method, tuple(kept_back)), variables


# The same object for models of the same structure, so that a step is compiled once for all seeds. JAX compares it at
# each step, and so need not look into it.
@made_once(64)
def _interned(structure: Any, training: Any, evaluation: Any, method: Any, kept_back: tuple[str, ...]) -> NnxFunction:
    return NnxFunction(structure, training, evaluation, method, kept_back)


def _split(model: nnx.Module) -> tuple[Any, dict[str, Any]]:
    """The structure of a model, and its collections."""
    structure, *states = nnx.split(model, *_KINDS.values(), ...)
    collections = dict(zip((*_KINDS, _REST), map(nnx.to_pure_dict, states), strict=True))
    return structure, {name: tree for name, tree in collections.items() if tree or name in _ALWAYS}


def _made(after: Mapping[str, Any], before: Mapping[str, Any]) -> list[str]:
    """The Variables that collections have after a call, and had not before."""
    made = (flatten_dict(tree).keys() - flatten_dict(before.get(name, {})).keys() for name, tree in after.items())
    return sorted(map(format_path, itertools.chain(*made)))


def _is_evaluated(module: nnx.Module) -> bool:
    """Whether a part of a model is in evaluation mode."""
    return any(getattr(module, name, None) is True for name in ("deterministic", "use_running_average"))


def _merged(structure: Any, variables: Mapping[str, Any]) -> nnx.Module:
    return nnx.merge(structure, _state_of(variables), copy=True)


def _state_of(variables: Mapping[str, Any]) -> Any:
    """The collections as one state of an NNX model, with arrays in the place of Variables."""
    return nnx.merge_state(*(nnx.State(tree) for tree in variables.values()))


def _refused(variable: nnx.Variable, value: Any) -> Any:
    """For ``on_set_value``: what a call assigns to parameters would be lost."""
    raise ValueError(
        f"a call of the model must leave nnx.Params as they are, but it assigns one of shape {jnp.shape(value)}. Only "
        "the optimizer moves Params: keep what a call computes in another kind of nnx.Variable, such as nnx.BatchStat."
    )


@dataclasses.dataclass(frozen=True)
class NnxCollections(Collections):
    """An NNX model whose variables are in the form of linen.

    Args:
        module: the model as pure functions of an NNX state.
    """

    module: NnxModule

    finder: ClassVar[str] = "cf.nnx.CronosTrainState"
    dense: ClassVar[str] = NnxModule.dense
    graft: ClassVar[str] = NnxModule.graft
    numbered: ClassVar[bool] = NnxModule.numbered
    streams: ClassVar[tuple[str, ...]] = ("streams",)

    @property
    def name(self) -> str:
        return self.module.name

    @property
    def output(self) -> Any:
        return self.module.output

    @property
    def statistics(self) -> str | None:
        return self.module.statistics

    def watch(self, variables: Mapping, args: tuple, kwargs: Mapping) -> Watched:
        return self.module.watch(_state_of(variables), args, kwargs)

    def tap(self, variables: Mapping, args: tuple, kwargs: Mapping, path: Path, observed: bool) -> Tap:
        return self.module.tap(_state_of(variables), args, kwargs, path, observed)

    def in_training(self, kwargs: Mapping) -> bool:
        return self.module.in_training(kwargs)

    def backbone(self, variables: Mapping, paths: tuple[Path, Path]) -> dict[str, Array]:
        # By the names that they have in the model: features that were gathered with it are those of this backbone.
        kept = (tree for name, tree in variables.items() if name not in self.streams)
        arrays = {path: leaf for tree in kept for path, leaf in flatten_dict(tree).items()}
        return {"/".join(map(str, path)): leaf for path, leaf in arrays.items() if path[:-1] not in paths}


@functools.lru_cache(maxsize=16)  # the same head for all seeds, so that its programs are compiled once
def on_collections(head: Head) -> Head:
    """The head of an NNX model, for variables in the form of linen.

    Args:
        head: from :func:`cronos_flax.nnx.find_head`.
    """
    assert isinstance(head.module, NnxModule)
    return dataclasses.replace(head, module=NnxCollections(head.module))
