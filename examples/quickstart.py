"""CRONOS-AM beside Adam: the same small CNN, the same loss, the same seconds.

    python examples/quickstart.py
    python examples/quickstart.py --dataset fashion_mnist --data-dir DIR

Trains a Flax classifier on real images three times, for equal training time: with Adam at two rates, and with CRONOS-AM
(Adam 1e-3 on the backbone, the last two layers solved for). Both minimise the cross-entropy of the softmax. Compilation
and evaluation are outside every clock. Ends with a table, and a picture of validation accuracy against time.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from flax.training.train_state import TrainState
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits

import cronos_flax as cf
from cronos_flax.compare.data import load_tfds

matplotlib.use("Agg")
from matplotlib import pyplot as plt

BATCH = 64
FULL_SOLVES, THEN_EVERY = 5, 3  # a head solve before each of the first epochs, then before every third


class CNN(nn.Module):
    """Two convolutions and a two-layer head."""

    outputs: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Outputs ``(n, outputs)`` for images ``(n, height, width, channels)``."""
        for features in (16, 32):
            x = nn.max_pool(nn.relu(nn.Conv(features, (3, 3))(x)), (2, 2), (2, 2))
        x = x.reshape(len(x), -1)
        return nn.Dense(self.outputs)(nn.relu(nn.Dense(64)(x)))


@jax.jit
def train_step(state: TrainState, x: jax.Array, y: jax.Array) -> TrainState:
    """One gradient step, the same for both methods."""

    def loss(params: Any) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(state.apply_fn({"params": params}, x), y).mean()

    return state.apply_gradients(grads=jax.grad(loss)(state.params))


def load(args: argparse.Namespace) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Training images and labels, validation images and labels; pixels in [0, 1]."""
    if args.dataset == "digits":
        data = load_digits()
        images, labels = data.images[..., None] / 16, data.target
    else:
        images, labels = load_tfds(args.dataset, "train", args.data_dir)
        images = images / 255
    order = np.random.default_rng(args.seed).permutation(len(images))
    held_out = min(2000, len(images) // 4)
    fit, held = order[held_out:][: args.rows], order[:held_out]
    return images[fit].astype("float32"), labels[fit], images[held].astype("float32"), labels[held]


def train(
    name: str, state: TrainState, data: tuple, budget: float, seed: int, report: Any
) -> list[tuple[float, int, float, float]]:
    """Train for ``budget`` seconds: ``(seconds, steps, loss, validation accuracy)`` after every epoch."""
    x, y, x_held, labels_held = data

    @jax.jit
    def outputs(params: Any, images: jax.Array) -> jax.Array:
        return state.apply_fn({"params": params}, images)

    def evaluate(params: Any) -> tuple[float, float]:
        held, fitted = outputs(params, x_held), outputs(params, x)
        loss = optax.softmax_cross_entropy_with_integer_labels(fitted, y).mean()
        return float(loss), 100 * float(jnp.mean(held.argmax(axis=1) == labels_held))

    # Compile outside the clock: the states made here are thrown away.
    jax.block_until_ready(train_step(state, x[:BATCH], y[:BATCH]))
    if isinstance(state, cf.CronosTrainState):
        jax.block_until_ready(state.solve_head((x, y))[0].params)

    rng = np.random.default_rng(seed)
    history, clock, epoch = [], 0.0, 0
    while clock < budget:
        start = time.perf_counter()
        if isinstance(state, cf.CronosTrainState) and (epoch < FULL_SOLVES or epoch % THEN_EVERY == 2):
            state, _ = state.solve_head((x, y))
        for rows in rng.permutation(len(x))[: len(x) // BATCH * BATCH].reshape(-1, BATCH):
            state = train_step(state, x[rows], y[rows])
        jax.block_until_ready(state.params)
        epoch += 1
        clock += time.perf_counter() - start
        if isinstance(state, cf.CronosTrainState) and clock >= budget:
            start = time.perf_counter()
            state, _ = state.solve_head((x, y))
            jax.block_until_ready(state.params)
            clock += time.perf_counter() - start
        history.append((clock, int(state.step), *evaluate(state.params)))
        report(f"{name}: epoch {epoch}, {clock:.1f} s, validation {history[-1][3]:.2f} %")
    return history


def main() -> None:
    """Parse the command line, train, print the table, save the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="digits", help="'digits' (embedded), or the name of a prepared TFDS set")
    parser.add_argument("--data-dir", type=Path, help="where prepared TFDS sets lie")
    parser.add_argument("--rows", type=int, default=4000, help="most training rows")
    parser.add_argument("--seconds", type=float, help="training time of each run; 3 for digits, else 12")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("quickstart.png"), help="where the picture goes")
    args = parser.parse_args()
    if args.dataset != "digits" and args.data_dir is None:
        parser.error("--dataset needs --data-dir, the directory with the prepared TFDS set")
    if args.rows < BATCH:
        parser.error(f"--rows must be at least {BATCH}")
    try:
        images, labels, held_images, held_labels = load(args)
    except ValueError as error:
        parser.error(str(error))
    budget = args.seconds or (3.0 if args.dataset == "digits" else 12.0)
    data = images, labels, held_images, held_labels

    model = CNN(int(labels.max()) + 1)
    variables = model.init(jax.random.key(args.seed), images[:1])
    head = cf.find_head(model, variables, images[:BATCH])
    made = {"apply_fn": model.apply, "params": variables["params"]}
    states = {
        "Adam 1e-3": TrainState.create(**made, tx=optax.adam(1e-3)),
        "Adam 3e-3": TrainState.create(**made, tx=optax.adam(3e-3)),
        "CRONOS-AM": cf.CronosTrainState.create(
            **made, tx=optax.adam(1e-3), head=head, solver=cf.Cronos(loss="softmax")
        ),
    }

    console = Console()
    table = Table(title=f"{args.dataset}: {len(images)} rows, {budget:g} s of training each")
    for column in ("method", "loss", "peak val. %", "final val. %", "at a quarter", "seconds", "steps"):
        table.add_column(column, justify="left" if column == "method" else "right")
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for name, state in states.items():
        with console.status(name) as status:
            history = train(name, state, data, budget, args.seed, status.update)
        clock, steps, loss, final = history[-1]
        accuracies = [row[3] for row in history]
        early = [row[3] for row in history if row[0] <= budget / 4]
        table.add_row(
            name, f"{loss:.4f}", f"{max(accuracies):.2f}", f"{final:.2f}", f"{early[-1]:.2f}" if early else "–",
            f"{clock:.1f}", str(steps),
        )  # fmt: skip
        axes.plot([row[0] for row in history], accuracies, marker=".", markersize=4, label=name)
        console.print(f"{name}: {len(history)} epochs, validation {final:.2f} %")
    axes.set(xlabel="training time [s]", ylabel="validation accuracy [%]", title=table.title)
    axes.set_ylim(bottom=max(axes.get_ylim()[0], axes.get_ylim()[1] - 15))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(args.out, dpi=150)
    console.print(table)
    console.print(f"picture: {args.out}")


if __name__ == "__main__":
    main()
