"""Models for the command line: those of the published experiments, and yours, by the name of a factory."""

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from cronos_flax._head import linen, nnx_graft
from cronos_flax._head.graft import Grafted
from cronos_flax._head.head import Head
from cronos_flax._head.nnx import find_head
from cronos_flax._head.nnx_collections import NnxFunction, functional, on_collections
from cronos_flax.compare.own import function


class MLP(nn.Module):
    """Bias-free, 256-256-20: that of the published experiment on CIFAR airplanes against automobiles."""

    outputs: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Outputs ``(n, outputs)`` for inputs ``(n, ...)``."""
        x = x.reshape(len(x), -1)
        for width in (256, 256, 20):
            x = nn.relu(nn.Dense(width, use_bias=False)(x))
        return nn.Dense(self.outputs, use_bias=False)(x)


def _check_images(name: str, x: jax.Array, least: int) -> None:
    """Raise a ValueError for what are no images: a convolution would take rows for pixels."""
    if x.ndim != 4 or min(x.shape[1:3]) < least:
        raise ValueError(
            f"the model {name} takes images (n, height, width, channels) of at least {least} × {least} pixels, got "
            f"inputs of shape {x.shape}. Store x in that shape, or take the model mlp."
        )


class CNN(nn.Module):
    """Two convolutions of 32 channels and a head of 16 neurons: that of the published experiments on ImageNet."""

    outputs: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Outputs ``(n, outputs)`` for images ``(n, height, width, channels)``."""
        _check_images("cnn", x, 4)
        for _ in range(2):
            x = nn.max_pool(nn.relu(nn.Conv(32, (3, 3))(x)), (2, 2), (2, 2))
        return nn.Dense(self.outputs)(nn.relu(nn.Dense(16)(x.reshape(len(x), -1))))


class StridedCNN(nn.Module):
    """Two convolutions with strides in place of pooling, whose gradient is slow on CPUs, and a head of 64 neurons."""

    outputs: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Outputs ``(n, outputs)`` for images ``(n, height, width, channels)``."""
        _check_images("strided-cnn", x, 1)
        for features in (16, 32):
            x = nn.relu(nn.Conv(features, (3, 3), strides=2)(x))
        return nn.Dense(self.outputs)(nn.relu(nn.Dense(64)(x.reshape(len(x), -1))))


class TwoLayerMLP(nn.Module):
    """64 neurons on the inputs themselves: that of the published experiment on Fashion-MNIST."""

    outputs: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Outputs ``(n, outputs)`` for inputs ``(n, ...)``."""
        return nn.Dense(self.outputs)(nn.relu(nn.Dense(64)(x.reshape(len(x), -1))))


MODELS: dict[str, Callable[[int], nn.Module]] = {
    "mlp": MLP,
    "cnn": CNN,
    "strided-cnn": StridedCNN,
    "two-layer": TwoLayerMLP,
}


class Model(Protocol):
    """A model as a function of its variables, which are collections of arrays, as linen has them."""

    @property
    def apply(self) -> Callable[..., Any]:
        """The function: ``module.apply``, or what takes its place."""

    @property
    def train_kwargs(self) -> dict[str, Any]:
        """Its keyword arguments in training."""

    @property
    def eval_kwargs(self) -> dict[str, Any]:
        """Its keyword arguments in evaluation."""

    def init(self, seed: int, x: Any) -> Mapping[str, Any]:
        """The variables that a run of this seed starts from, for inputs like ``x``."""

    def head(self, x: Any) -> Head:
        """The head of the model as it is evaluated.

        Raises:
            ValueError: if the model has no head; the message says why and what to do.
        """

    def head_in_training(self, x: Any) -> Head | None:
        """The head whose features are those that gradient steps see; None if that is the head in evaluation."""


@dataclasses.dataclass(frozen=True, eq=False)
class _LinenModel:
    """A linen module, its own variables if it came with some, and keyword arguments in training and in evaluation."""

    module: nn.Module
    variables: Mapping[str, Any] | None
    train_kwargs: dict[str, Any]
    eval_kwargs: dict[str, Any]

    @property
    def apply(self) -> Callable[..., Any]:
        return self.module.apply

    def init(self, seed: int, x: Any) -> Mapping[str, Any]:
        return (
            self.module.init(jax.random.key(seed), x, **self.eval_kwargs) if self.variables is None else self.variables
        )

    def head(self, x: Any) -> Head:
        variables = self.init(0, x)
        head = linen.find_head(self.module, variables, x, **self.eval_kwargs)
        if "batch_stats" in variables and not self.train_kwargs:  # a training step takes the running ones too
            with contextlib.suppress(ValueError):  # there is no batch norm
                return linen.find_head(self.module, variables, x, statistics="running", **self.eval_kwargs)
        return head

    def head_in_training(self, x: Any) -> Head | None:
        variables = self.init(0, x)
        collections = [name for name in variables if name != "params"]
        if not (collections and self.train_kwargs):
            return None
        if "batch_stats" in collections:
            with contextlib.suppress(ValueError):  # there is no batch norm; or no head, which the other search says too
                return linen.find_head(self.module, variables, x, statistics="batch", **self.eval_kwargs)
        kwargs = {"mutable": collections, "rngs": {"dropout": jax.random.key(0)}, **self.train_kwargs}
        return linen.find_head(self.module, variables, x, **kwargs)


@dataclasses.dataclass(frozen=True, eq=False)
class _NnxModel:
    """An NNX model for each seed.

    Args:
        make: gives the model for these random streams.
        train_kwargs: keyword arguments in training.
        eval_kwargs: keyword arguments in evaluation.
    """

    make: Callable[[nnx.Rngs], nnx.Module]
    train_kwargs: dict[str, Any]
    eval_kwargs: dict[str, Any]

    @property
    def apply(self) -> Callable[..., Any]:
        return _drawn(self, 0)[0]

    def init(self, seed: int, x: Any) -> Mapping[str, Any]:
        (_, first), (_, variables) = _drawn(self, 0), _drawn(self, seed)
        shapes, others = (jax.tree.map(jnp.shape, tree) for tree in (first, variables))
        if shapes != others:
            raise ValueError(
                "`model` must return a model of the same structure for each `rngs`, got other shapes for seed "
                f"{seed} than for seed 0."
            )
        return variables

    def head(self, x: Any) -> Head:
        return on_collections(find_head(self._first, x, **self.eval_kwargs))

    def head_in_training(self, x: Any) -> Head | None:
        if "batch_stats" not in self.init(0, x):
            return None
        with contextlib.suppress(ValueError):  # there is no batch norm; or no head, which the other search says too
            return on_collections(find_head(self._first, x, statistics="batch", **self.eval_kwargs))
        model = self._first
        model.train()
        return on_collections(find_head(model, x, eval_mode=False, **self.train_kwargs))

    @property
    def _first(self) -> nnx.Module:
        function, variables = _drawn(self, 0)
        return function.model(variables)


@functools.lru_cache(maxsize=2)  # the first seed, which heads are found with, and that of the run
def _drawn(model: _NnxModel, seed: int) -> tuple[NnxFunction, Mapping[str, Any]]:
    """The function and the variables of a seed."""
    return functional(model.make(nnx.Rngs(seed)))


def model_of(name: str, outputs: int) -> Model:
    """A model by name.

    Args:
        name: one of ``MODELS``; or ``module:factory``, importable from where one is: a function of the number of
            outputs that returns a linen module, or such a module and its variables; or a function of the number of
            outputs and ``rngs``, an ``nnx.Rngs``, that returns an NNX model.
        outputs: how many outputs it shall have.

    Returns:
        The model. Where its ``__call__``, or that of the module that was grafted, has an argument ``train`` or
        ``training``, or ``deterministic``, that says which of training and evaluation is meant.

    Raises:
        ValueError: if there is no such factory, or it returns something else.
    """
    if name in MODELS:
        return _of(name, _named(name, outputs))
    said = "a function of the number of outputs"
    factory = function("model", name, said, f"one of {', '.join(MODELS)}, or ")
    try:
        inspect.signature(factory).bind(outputs, **({"rngs": None} if _takes_rngs(factory) else {}))
    except TypeError as error:
        raise ValueError(f"`model` {name!r} must be {said}, got one that cannot be called with it: {error}.") from None
    except ValueError:  # of a function that is not written in Python
        pass
    if not _takes_rngs(factory):
        return _of(name, factory(outputs))

    def make(rngs: nnx.Rngs) -> nnx.Module:
        return factory(outputs, rngs=rngs)

    model = make(nnx.Rngs(0))
    if not isinstance(model, nnx.Module):
        raise ValueError(
            f"`model` {name!r} has an argument `rngs`, and so must return an nnx.Module, got {type(model).__name__}. A "
            "factory of a linen module takes the number of outputs only."
        )
    return _NnxModel(make, *_modes(model))


def _of(name: str, made: Any) -> Model:
    """The model that a factory without ``rngs`` has made."""
    module, variables = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if isinstance(module, nnx.Module):
        raise ValueError(
            f"`model` {name!r} returns the NNX model {type(module).__name__}, and so must have an argument `rngs`, an "
            "nnx.Rngs of the seed: def make(outputs, rngs). First weights and random streams come from it."
        )
    if not isinstance(module, nn.Module) or not (variables is None or "params" in variables):
        raise ValueError(
            f"`model` {name!r} must return a flax.linen.Module, or a pair of one and its variables, or, if it has an "
            f"argument `rngs`, an nnx.Module, got {type(module).__name__}."
        )
    return _LinenModel(module, variables, *_modes(module))


def _takes_rngs(factory: Any) -> bool:
    called = factory.__init__ if inspect.isclass(factory) else factory  # classes of NNX hide its signature
    try:
        return "rngs" in inspect.signature(called).parameters
    except ValueError:  # of a function that is not written in Python
        return False


def _modes(model: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The keyword arguments that say training, and those that say evaluation."""
    while isinstance(model, Grafted | nnx_graft.Grafted):  # which passes on what it is called with
        model = model.backbone
    parameters = inspect.signature(type(model).__call__).parameters
    for flag, training in (("train", True), ("training", True), ("deterministic", False)):
        if flag in parameters:
            return {flag: training}, {flag: not training}
    return {}, {}


@functools.cache
def _named(name: str, outputs: int) -> nn.Module:
    """The same object each time, so that its programs are compiled once."""
    return MODELS[name](outputs)
