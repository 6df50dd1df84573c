"""An ordinary Flax NNX loop: a CNN with dropout on scikit-learn's digits.

    python examples/loops/nnx_cnn.py --epochs 10

docs/guides/nnx.md shows the lines that turn it into CRONOS-AM.
"""

import argparse

import jax
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits


class CNN(nnx.Module):
    """Two convolutions, dropout and two fully connected layers."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.conv1 = nnx.Conv(1, 16, (3, 3), rngs=rngs)
        self.conv2 = nnx.Conv(16, 32, (3, 3), rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.fc1 = nnx.Linear(128, 64, rngs=rngs)
        self.fc2 = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits ``(n, 10)`` of images ``(n, 8, 8, 1)``."""
        for conv in (self.conv1, self.conv2):
            x = nnx.max_pool(nnx.relu(conv(x)), (2, 2), (2, 2))
        return self.fc2(nnx.relu(self.fc1(self.dropout(x.reshape(len(x), -1)))))


@nnx.jit
def train_step(model: CNN, optimizer: nnx.Optimizer, x: jax.Array, y: jax.Array) -> None:
    """One gradient step."""

    def loss(model: CNN) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()

    optimizer.update(model, nnx.grad(loss)(model))


def main() -> None:
    """Train, and print the accuracy on held-out digits after every epoch."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=10)
    args = parser.parse_args()
    digits = load_digits()
    images, labels = (digits.images[..., None] / 16).astype("float32"), digits.target
    x, y, x_test, y_test = images[:1400], labels[:1400], images[1400:], labels[1400:]

    model = CNN(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)
    rng = np.random.default_rng(0)
    for epoch in range(args.epochs):
        model.train()
        for rows in rng.permutation(len(x)).reshape(-1, 50):
            train_step(model, optimizer, x[rows], y[rows])
        model.eval()
        accuracy = (model(x_test).argmax(axis=1) == y_test).mean()
        print(f"epoch {epoch + 1}: {accuracy:.4f}")


if __name__ == "__main__":
    main()
