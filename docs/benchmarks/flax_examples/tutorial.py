"""The MNIST tutorial of Flax NNX: a CNN with batch norm and dropout, AdamW at .005, batches of 32."""

from collections.abc import Iterator

import jax
import numpy as np
import optax
from flax import nnx

BATCH_SIZE = 32


class CNN(nnx.Module):
    """Two convolutions, each with a norm, and two fully connected layers with dropout between them."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.conv1 = nnx.Conv(1, 32, (3, 3), rngs=rngs)
        self.batch_norm1 = nnx.BatchNorm(32, rngs=rngs)
        self.dropout1 = nnx.Dropout(0.025, rngs=rngs)
        self.conv2 = nnx.Conv(32, 64, (3, 3), rngs=rngs)
        self.batch_norm2 = nnx.BatchNorm(64, rngs=rngs)
        self.linear1 = nnx.Linear(3136, 256, rngs=rngs)
        self.dropout2 = nnx.Dropout(0.025, rngs=rngs)
        self.linear2 = nnx.Linear(256, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits ``(n, 10)`` of images ``(n, 28, 28, 1)``."""
        x = nnx.avg_pool(nnx.relu(self.batch_norm1(self.dropout1(self.conv1(x)))), (2, 2), (2, 2))
        x = nnx.avg_pool(nnx.relu(self.batch_norm2(self.conv2(x))), (2, 2), (2, 2))
        return self.linear2(nnx.relu(self.dropout2(self.linear1(x.reshape(len(x), -1)))))


def create(x: np.ndarray, key: jax.Array, steps: int) -> tuple[CNN, nnx.Optimizer]:
    """Model and optimizer before training; the rate is constant, whatever the number of steps."""
    model = CNN(nnx.Rngs(key))
    tx = optax.adamw(0.005, 0.9)
    return model, nnx.Optimizer(model, tx, wrt=nnx.Param)


@nnx.jit
def train_step(model: CNN, optimizer: nnx.Optimizer, x: jax.Array, y: jax.Array) -> None:
    """One gradient step."""

    def loss(model: CNN) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()

    optimizer.update(model, nnx.grad(loss)(model))


def train(
    state: tuple[CNN, nnx.Optimizer], x: np.ndarray, y: np.ndarray, rng: np.random.Generator, epochs: int
) -> Iterator:
    """Yield model and optimizer after each epoch."""
    model, optimizer = state
    for _ in range(epochs):
        model.train()
        order = rng.permutation(len(x))
        for i in range(0, len(x) - BATCH_SIZE + 1, BATCH_SIZE):
            rows = order[i : i + BATCH_SIZE]
            train_step(model, optimizer, x[rows], y[rows])
        model.eval()
        yield model, optimizer


@nnx.jit
def predicted(state: tuple[CNN, nnx.Optimizer], x: jax.Array) -> jax.Array:
    """Labels ``(n,)``."""
    return state[0](x).argmax(axis=-1)
