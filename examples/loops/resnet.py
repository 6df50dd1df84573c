"""An ordinary Flax loop with mutable collections: a small ResNet with BatchNorm on scikit-learn's digits.

    python examples/loops/resnet.py --epochs 10

docs/guides/batchnorm-dropout.md shows the lines that turn it into CRONOS-AM.
"""

import argparse
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax
from flax.training import train_state
from sklearn.datasets import load_digits


class Block(nn.Module):
    """Two convolutions around which the input is added."""

    features: int
    strides: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Images of ``features`` channels, smaller by ``strides``."""
        strides = (self.strides, self.strides)
        y = nn.Conv(self.features, (3, 3), strides, use_bias=False)(x)
        y = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(y))
        y = nn.Conv(self.features, (3, 3), use_bias=False)(y)
        y = nn.BatchNorm(use_running_average=not train, momentum=0.9)(y)
        if x.shape != y.shape:
            x = nn.Conv(self.features, (1, 1), strides, use_bias=False)(x)
        return nn.relu(x + y)


class ResNet(nn.Module):
    """Three blocks, the mean over pixels, and two fully connected layers."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Logits ``(n, 10)`` of images ``(n, 8, 8, 1)``."""
        x = nn.Conv(16, (3, 3))(x)
        for features, strides in ((16, 1), (32, 2), (64, 2)):
            x = Block(features, strides)(x, train)
        return nn.Dense(10)(nn.relu(nn.Dense(64)(x.mean(axis=(1, 2)))))


class TrainState(train_state.TrainState):
    """Flax's, with the running statistics."""

    model_state: Any


@jax.jit
def train_step(state: TrainState, x: jax.Array, y: jax.Array) -> TrainState:
    """One gradient step."""

    def loss(params: dict) -> tuple[jax.Array, Any]:
        variables = {"params": params, **state.model_state}
        logits, updates = state.apply_fn(variables, x, train=True, mutable=["batch_stats"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), updates

    grads, updates = jax.grad(loss, has_aux=True)(state.params)
    return state.apply_gradients(grads=grads, model_state=updates)


def main() -> None:
    """Train, and print the accuracy on held-out digits after every epoch."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=10)
    args = parser.parse_args()
    digits = load_digits()
    images, labels = (digits.images[..., None] / 16).astype("float32"), digits.target
    x, y, x_test, y_test = images[:1400], labels[:1400], images[1400:], labels[1400:]

    model = ResNet()
    variables = model.init(jax.random.key(0), x[:1], train=False)
    params, model_state = variables["params"], {"batch_stats": variables["batch_stats"]}
    state = TrainState.create(apply_fn=model.apply, params=params, tx=optax.adam(1e-3), model_state=model_state)
    rng = np.random.default_rng(0)
    for epoch in range(args.epochs):
        for rows in rng.permutation(len(x)).reshape(-1, 50):
            state = train_step(state, x[rows], y[rows])
        logits = state.apply_fn({"params": state.params, **state.model_state}, x_test, train=False)
        print(f"epoch {epoch + 1}: {(logits.argmax(axis=1) == y_test).mean():.4f}")


if __name__ == "__main__":
    main()
