"""Models for the command line: those of the published experiments, and yours, by the name of a factory."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax

from cronos_flax._head.graft import Grafted
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


class CNN(nn.Module):
    """Two convolutions of 32 channels and a head of 16 neurons: that of the published experiments on ImageNet."""

    outputs: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Outputs ``(n, outputs)`` for images ``(n, height, width, channels)``."""
        for _ in range(2):
            x = nn.max_pool(nn.relu(nn.Conv(32, (3, 3))(x)), (2, 2), (2, 2))
        return nn.Dense(self.outputs)(nn.relu(nn.Dense(16)(x.reshape(len(x), -1))))


class StridedCNN(nn.Module):
    """Two convolutions with strides in place of pooling, whose gradient is slow on CPUs, and a head of 64 neurons."""

    outputs: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Outputs ``(n, outputs)`` for images ``(n, height, width, channels)``."""
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


class Model(NamedTuple):
    """A module, its own variables if it came with some, and its keyword arguments in training and in evaluation."""

    module: nn.Module
    variables: Mapping[str, Any] | None
    train_kwargs: dict[str, Any]
    eval_kwargs: dict[str, Any]

    def init(self, seed: int, x: Any) -> Mapping[str, Any]:
        """Its own variables, or fresh ones."""
        return (
            self.module.init(jax.random.key(seed), x, **self.eval_kwargs) if self.variables is None else self.variables
        )


def model_of(name: str, outputs: int) -> Model:
    """A module by name.

    Args:
        name: one of ``MODELS``; or ``module:factory``, importable from where one is: a function of the number of
            outputs that returns a linen module, or such a module and its variables.
        outputs: how many outputs it shall have.

    Returns:
        The module. Where its ``__call__``, or that of the module that was grafted, has an argument ``train`` or
        ``training``, or ``deterministic``, that says which of training and evaluation is meant.

    Raises:
        ValueError: if there is no such factory, or it returns something else.
    """
    said = "a function of the number of outputs"
    known = f"one of {', '.join(MODELS)}, or "
    made = _named(name, outputs) if name in MODELS else function("model", name, said, known)(outputs)
    module, variables = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(module, nn.Module) or not (variables is None or "params" in variables):
        raise ValueError(
            f"`model` {name!r} must return a flax.linen.Module, or a pair of one and its variables, got "
            f"{type(module).__name__}."
        )
    called = module
    while isinstance(called, Grafted):  # which passes on what it is called with
        called = called.backbone
    parameters = inspect.signature(type(called).__call__).parameters
    for flag, training in (("train", True), ("training", True), ("deterministic", False)):
        if flag in parameters:
            return Model(module, variables, {flag: training}, {flag: not training})
    return Model(module, variables, {}, {})


@functools.cache
def _named(name: str, outputs: int) -> nn.Module:
    """The same object each time, so that its programs are compiled once."""
    return MODELS[name](outputs)
