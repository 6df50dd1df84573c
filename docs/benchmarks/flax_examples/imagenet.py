"""Flax's ImageNet example: a ResNet whose batch norms average over all devices, SGD with warm-up and cosine decay.

Small: three stages of one block, images of 32 × 32 pixels. Batches of 128 are shared by the devices.
"""

import functools
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training import train_state
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

BATCH_SIZE = 128
RATE = 0.1  # for batches of 256
MESH = jax.make_mesh((jax.device_count(),), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))


class Block(nn.Module):
    """Two convolutions around which the input is added."""

    features: int
    strides: int
    train: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Images of ``features`` channels, smaller by ``strides``."""
        strides = (self.strides, self.strides)
        norm = functools.partial(
            nn.BatchNorm, use_running_average=not self.train, momentum=0.9, epsilon=1e-5, axis_name="batch"
        )
        y = nn.relu(norm()(nn.Conv(self.features, (3, 3), strides, use_bias=False)(x)))
        y = norm(scale_init=nn.initializers.zeros)(nn.Conv(self.features, (3, 3), use_bias=False)(y))
        if x.shape != y.shape:
            x = norm()(nn.Conv(self.features, (1, 1), strides, use_bias=False)(x))
        return nn.relu(x + y)


class ResNet(nn.Module):
    """A first convolution, blocks, the mean over pixels, and one fully connected layer."""

    classes: int = 2

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = True) -> jax.Array:
        """Logits ``(n, classes)`` of images ``(n, 32, 32, 3)``."""
        x = nn.Conv(16, (3, 3), (2, 2), use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(not train, momentum=0.9, epsilon=1e-5, axis_name="batch")(x))
        for features, strides in ((16, 1), (32, 2), (64, 2)):
            x = Block(features, strides, train)(x)
        return nn.Dense(self.classes, name="fc")(x.mean(axis=(1, 2)))


class TrainState(train_state.TrainState):
    """Flax's, with the running statistics."""

    model_state: Any


def create(x: np.ndarray, key: jax.Array, steps: int) -> TrainState:
    """The state before training of so many steps."""
    model = ResNet()
    variables = model.init(key, x[:1], train=False)
    params, model_state = variables["params"], {"batch_stats": variables["batch_stats"]}
    rate = optax.warmup_cosine_decay_schedule(0.0, RATE * BATCH_SIZE / 256, steps // 10, steps)
    tx = optax.sgd(rate, momentum=0.9, nesterov=True)
    return TrainState.create(apply_fn=model.apply, params=params, tx=tx, model_state=model_state)


def shared_step(state: TrainState, x: jax.Array, y: jax.Array) -> TrainState:
    """One gradient step, on this device's share of the batch."""

    def loss(params: dict) -> tuple[jax.Array, Any]:
        variables = {"params": params, **state.model_state}
        logits, updates = state.apply_fn(variables, x, mutable=["batch_stats"])
        cross_entropy = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
        squares = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params) if leaf.ndim > 1)
        return cross_entropy + 0.5e-4 * squares, updates

    grads, updates = jax.grad(loss, has_aux=True)(state.params)
    return state.apply_gradients(grads=jax.lax.pmean(grads, "batch"), model_state=jax.lax.pmean(updates, "batch"))


train_step = jax.jit(
    jax.shard_map(shared_step, mesh=MESH, in_specs=(P(), P("batch"), P("batch")), out_specs=P(), check_vma=False)
)


def train(state: TrainState, x: np.ndarray, y: np.ndarray, rng: np.random.Generator, epochs: int) -> Iterator:
    """Yield the state after each epoch."""
    state = jax.device_put(state, NamedSharding(MESH, P()))
    for _ in range(epochs):
        order = rng.permutation(len(x))
        for i in range(0, len(x) - BATCH_SIZE + 1, BATCH_SIZE):
            rows = order[i : i + BATCH_SIZE]
            state = train_step(state, x[rows], y[rows])
        yield state


@jax.jit
def predicted(state: TrainState, x: jax.Array) -> jax.Array:
    """Labels ``(n,)``."""
    return state.apply_fn({"params": state.params, **state.model_state}, x, train=False).argmax(axis=-1)
