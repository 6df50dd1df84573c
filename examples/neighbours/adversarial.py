"""Distributed adversarial training: each device attacks its own rows, and the head is solved on attacked features.

    python examples/neighbours/adversarial.py
    python examples/neighbours/adversarial.py --devices 4 --batch 400 --optimizer lamb --rate 0.02
    python examples/neighbours/adversarial.py --data-dir DIR --eps 0.03137 --epochs 8

After Zhang et al., "Distributed adversarial training to robustify deep neural networks at scale" (UAI 2022). A batch is
spread over the devices. Each attacks its rows (PGD in the l-infinity norm; FGSM from a random start with ``--steps 1``)
and exchanges nothing for it; the gradient of the attacked rows' loss is the mean over all devices. After epoch 1, 11, …
all rows are attacked and the head is solved on them. ``--labels no``: the attack raises the divergence from the
prediction of the clean row, for which it needs no label. Data are scikit-learn's digits; DIR has TFDS's
``fashion_mnist``. Ends with a table: what the last solve does to accuracy on clean and on attacked rows.
"""

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training.train_state import TrainState
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits

import cronos_flax as cf
from cronos_flax.compare.data import load_tfds


class Attack(NamedTuple):
    """How a row is attacked: within ``eps`` of each pixel, which is between 0 and 1, in so many steps."""

    eps: float
    steps: int
    labels: bool = True  # whether it knows them


class Rows(NamedTuple):
    """Images between 0 and 1, and labels: rows to fit and rows to score."""

    x: np.ndarray
    y: np.ndarray
    x_scored: np.ndarray
    y_scored: np.ndarray


class CNN(nn.Module):
    """Two convolutions with stride 2, and the head."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits ``(n, 10)`` of images ``(n, height, width, 1)``."""
        x = (x - 0.3) / 0.35  # about the mean and the deviation of the pixels of both sets
        for width in (16, 32):
            x = nn.relu(nn.Conv(width, (3, 3), strides=2)(x))
        return nn.Dense(10)(nn.relu(nn.Dense(64)(x.reshape(len(x), -1))))


MODEL: Any = CNN()


def loss(params: Any, x: jax.Array, y: jax.Array, clean: Any = None) -> jax.Array:
    """Of each row: the cross entropy with its label, or the divergence from the prediction of the clean row."""
    found = jax.nn.log_softmax(MODEL.apply({"params": params}, x))
    if clean is not None:
        return (jnp.exp(clean) * (clean - found)).sum(axis=1)
    return optax.softmax_cross_entropy_with_integer_labels(found, y)


@jax.jit
def start(params: Any, x: jax.Array, key: jax.Array, eps: float) -> tuple[jax.Array, jax.Array]:
    """A random image within eps of x, and the log-probabilities of the clean rows."""
    z = x + eps * jax.random.uniform(key, x.shape, x.dtype, -1, 1)
    return jnp.clip(z, 0, 1), jax.nn.log_softmax(MODEL.apply({"params": params}, x))


@jax.jit
def climb(params: Any, z: jax.Array, x: jax.Array, y: jax.Array, clean: Any, attack: Attack) -> jax.Array:
    """One step of an attack along the sign of the gradient of each row's loss, and back to an image within eps."""
    size = attack.eps * jnp.minimum(2.5 / attack.steps, 1.25)
    z += size * jnp.sign(jax.grad(lambda z: loss(params, z, y, clean).sum())(z))
    return jnp.clip(z, jnp.maximum(x - attack.eps, 0), jnp.minimum(x + attack.eps, 1))


def attacked(params: Any, x: jax.Array, y: jax.Array, key: jax.Array, attack: Attack) -> jax.Array:
    """PGD from a random start; FGSM for one step."""
    if not attack.steps:
        return x
    z, clean = start(params, x, key, attack.eps)
    for _ in range(attack.steps):
        z = climb(params, z, x, y, None if attack.labels else clean, attack)
    return z


@jax.jit
def descend(state: TrainState, x: jax.Array, y: jax.Array) -> TrainState:
    """One gradient step."""
    return state.apply_gradients(grads=jax.grad(lambda params: loss(params, x, y).mean())(state.params))


def create(tx: optax.GradientTransformation, seed: int, rows: Rows, mesh: Mesh) -> cf.CronosTrainState:
    """The state of an alternation, on all devices."""
    variables = jax.device_put(MODEL.init(jax.random.key(seed), rows.x[:1]), NamedSharding(mesh, PartitionSpec()))
    common = {"apply_fn": MODEL.apply, "params": variables["params"], "tx": tx}
    head = cf.find_head(MODEL, variables, rows.x[:64])
    # No guard: it compares losses from solve to solve, and those of rows attacked anew say little about each other.
    return cf.CronosTrainState.create(**common, head=head, solver=cf.Cronos(loss="softmax"), guard=False)


def batches(rows: tuple, size: int, mesh: Mesh) -> list[tuple[jax.Array, jax.Array]]:
    """Batches whose rows are spread over the devices; rows beyond the last full one are left out."""
    (x, y), place = rows, NamedSharding(mesh, PartitionSpec("data"))
    return [jax.device_put((x[i : i + size], y[i : i + size]), place) for i in range(0, len(x) - size + 1, size)]


def under(attack: Attack, params: Any, rows: tuple, size: int, mesh: Mesh, key: jax.Array) -> list[tuple]:
    """Batches of all rows, attacked with the present model."""
    each = enumerate(batches(rows, size, mesh))
    return [(attacked(params, x, y, jax.random.fold_in(key, i), attack), y) for i, (x, y) in each]


def train(
    state: Any, rows: Rows, mesh: Mesh, attack: Attack, epochs: int, size: int, seed: int, solve: Attack | None = None
) -> Any:
    """Steps on rows under ``attack``, and after epochs 1, 11, … but the last a solve on rows under ``solve``."""
    rng, key, count = np.random.default_rng(seed), jax.random.key(seed), 0
    for epoch in range(1, epochs + 1):
        order = rng.permutation(len(rows.x))
        for x, y in batches((rows.x[order], rows.y[order]), size, mesh):
            x = attacked(state.params, x, y, jax.random.fold_in(key, count := count + 1), attack)
            state = descend(state, x, y)
        if solve is not None and epoch < epochs and epoch % 10 == 1:
            state, _ = state.solve_head(under(solve, state.params, rows[:2], size, mesh, jax.random.fold_in(key, 0)))
    return state


# The share of rows with the right label, in %.
right = jax.jit(lambda params, x, y: 100 * jnp.mean(MODEL.apply({"params": params}, x).argmax(axis=1) == y))


def accuracy(params: Any, rows: Rows, size: int, mesh: Mesh, attack: Attack) -> float:
    """On rows to score, attacked, in %."""
    found = under(attack, params, rows[2:], size, mesh, jax.random.key(1))
    return float(np.mean([right(params, *batch) for batch in found]))


def load(data_dir: Path | None) -> Rows:
    """1,200 digits to fit and 400 to score; or 6,000 and 1,000 images of clothes."""
    if data_dir is None:
        (x, y), fit, end = load_digits(return_X_y=True), 1200, 1600
        x = x.reshape(-1, 8, 8, 1)
    else:
        (x, y), fit, end = load_tfds("fashion_mnist", "train[:7000]", data_dir), 6000, 7000
    order = np.random.default_rng(0).permutation(len(x))
    x, y = (x[order] / x.max()).astype("float32"), y[order]
    return Rows(x[:fit], y[:fit], x[fit:end], y[fit:end])


def main() -> None:
    """Train with and without attacks and solves, print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data-dir", type=Path, help="directory of prepared TFDS sets; digits without it")
    parser.add_argument("--devices", type=int, default=1, help="so many, of the CPU")
    parser.add_argument("--eps", type=float, default=0.1)
    parser.add_argument("--steps", type=int, default=5, help="of an attack in training; 1 is FGSM")
    parser.add_argument("--labels", choices=("yes", "no"), default="yes", help="whether attacks in training know them")
    parser.add_argument("--optimizer", choices=("adam", "lamb", "lars"), default="adam")
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--epochs", type=int, default=12)
    args = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", args.devices)  # before any array is made
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    rows, clean, attack = load(args.data_dir), Attack(0.0, 0), Attack(args.eps, args.steps, args.labels == "yes")
    steps, common = args.epochs * (len(rows.x) // args.batch), (args.epochs, args.batch, 0)
    tx = getattr(optax, args.optimizer)(optax.warmup_cosine_decay_schedule(0.0, args.rate, steps // 20, steps))
    state = create(tx, 0, rows, mesh)
    alone = TrainState.create(apply_fn=MODEL.apply, params=state.params, tx=tx)
    state = train(state, rows, mesh, attack, *common, solve=attack)
    found = {
        f"{args.optimizer}, clean rows": train(alone, rows, mesh, clean, *common),
        f"{args.optimizer}, attacked rows": train(alone, rows, mesh, attack, *common),
        "CRONOS-AM, before the last solve": state,
    }
    for name, each in (("attacked", attack), ("clean", clean)):
        data = under(each, state.params, rows[:2], args.batch, mesh, jax.random.key(0))
        found[f"CRONOS-AM, solved on {name} rows"], _ = state.solve_head(data)
    table = Table("method", "clean, %", "PGD-20, %", title=f"{mesh.size} device(s), eps {args.eps:g}")
    for name, state in found.items():
        scores = (accuracy(state.params, rows, args.batch, mesh, each) for each in (clean, Attack(args.eps, 20)))
        table.add_row(name, *(f"{score:.1f}" for score in scores))
    Console().print(table)


if __name__ == "__main__":
    main()
