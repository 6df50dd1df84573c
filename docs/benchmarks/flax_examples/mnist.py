"""Flax's MNIST example: a CNN, SGD with momentum at .1, batches of 128."""

from collections.abc import Iterator

import flax.linen as nn
import jax
import numpy as np
import optax
from flax.training.train_state import TrainState

BATCH_SIZE = 128


class CNN(nn.Module):
    """Two convolutions and two fully connected layers."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits ``(n, 10)`` of images ``(n, 28, 28, 1)``."""
        for features in (32, 64):
            x = nn.avg_pool(nn.relu(nn.Conv(features, (3, 3))(x)), (2, 2), (2, 2))
        x = nn.relu(nn.Dense(256)(x.reshape(len(x), -1)))
        return nn.Dense(10)(x)


def create(x: np.ndarray, key: jax.Array, steps: int) -> TrainState:
    """The state before training; the rate is constant, whatever the number of steps."""
    model = CNN()
    params = model.init(key, x[:1])["params"]
    tx = optax.sgd(0.1, momentum=0.9)
    return TrainState.create(apply_fn=model.apply, params=params, tx=tx)


@jax.jit
def train_step(state: TrainState, x: jax.Array, y: jax.Array) -> TrainState:
    """One gradient step."""

    def loss(params: dict) -> jax.Array:
        logits = state.apply_fn({"params": params}, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    return state.apply_gradients(grads=jax.grad(loss)(state.params))


def train(state: TrainState, x: np.ndarray, y: np.ndarray, rng: np.random.Generator, epochs: int) -> Iterator:
    """Yield the state after each epoch."""
    for _ in range(epochs):
        order = rng.permutation(len(x))
        for i in range(0, len(x) - BATCH_SIZE + 1, BATCH_SIZE):
            rows = order[i : i + BATCH_SIZE]
            state = train_step(state, x[rows], y[rows])
        yield state


@jax.jit
def predicted(state: TrainState, x: jax.Array) -> jax.Array:
    """Labels ``(n,)``."""
    return state.apply_fn({"params": state.params}, x).argmax(axis=-1)
