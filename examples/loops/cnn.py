"""An ordinary Flax loop: a CNN on scikit-learn's digits, with ``TrainState``.

    python examples/loops/cnn.py --epochs 10

docs/guides/linen.md shows the lines that turn it into CRONOS-AM.
"""

import argparse

import flax.linen as nn
import jax
import numpy as np
import optax
from flax.training.train_state import TrainState
from sklearn.datasets import load_digits


class CNN(nn.Module):
    """Two convolutions and two fully connected layers."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits ``(n, 10)`` of images ``(n, 8, 8, 1)``."""
        for features in (16, 32):
            x = nn.max_pool(nn.relu(nn.Conv(features, (3, 3))(x)), (2, 2), (2, 2))
        return nn.Dense(10)(nn.relu(nn.Dense(64)(x.reshape(len(x), -1))))


@jax.jit
def train_step(state: TrainState, x: jax.Array, y: jax.Array) -> TrainState:
    """One gradient step."""

    def loss(params: dict) -> jax.Array:
        logits = state.apply_fn({"params": params}, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    return state.apply_gradients(grads=jax.grad(loss)(state.params))


def main() -> None:
    """Train, and print the accuracy on held-out digits after every epoch."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=10)
    args = parser.parse_args()
    digits = load_digits()
    images, labels = (digits.images[..., None] / 16).astype("float32"), digits.target
    x, y, x_test, y_test = images[:1400], labels[:1400], images[1400:], labels[1400:]

    model = CNN()
    params = model.init(jax.random.key(0), x[:1])["params"]
    state = TrainState.create(apply_fn=model.apply, params=params, tx=optax.adam(1e-3))
    rng = np.random.default_rng(0)
    for epoch in range(args.epochs):
        for rows in rng.permutation(len(x)).reshape(-1, 50):
            state = train_step(state, x[rows], y[rows])
        accuracy = (state.apply_fn({"params": state.params}, x_test).argmax(axis=1) == y_test).mean()
        print(f"epoch {epoch + 1}: {accuracy:.4f}")


if __name__ == "__main__":
    main()
