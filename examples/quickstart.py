"""CRONOS-AM beside Adam: the same small CNN, the same loss, the same seconds, the same loop.

    python examples/quickstart.py
    python examples/quickstart.py --dataset fashion_mnist --data-dir DIR

Trains a Flax classifier on real images three times, for equal training time: with Adam at two rates, and with CRONOS-AM
(the last two layers solved for, Adam 3e-3 on the backbone, the rate that ``cronos-flax compare`` has by default). All
three minimise the cross-entropy of the softmax in ``cf.train``, whose clock excludes compilation and validation. Ends
with a table, and a picture of validation accuracy against time.
"""

import argparse
from pathlib import Path

import jax
import numpy as np
import optax
from flax.training.train_state import TrainState
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits

import cronos_flax as cf
from cronos_flax.compare import style
from cronos_flax.compare.data import load_tfds
from cronos_flax.compare.models import StridedCNN

BATCH = 64
NO_LIMIT = 10**6  # epochs: seconds are the limit
History = list[dict[str, float]]


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


def options() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dataset", default="digits", help="'digits' (embedded), or the name of a prepared TFDS set")
    parser.add_argument("--data-dir", type=Path, help="directory of prepared TFDS sets")
    parser.add_argument("--rows", type=int, default=4000, help="most training rows")
    parser.add_argument("--seconds", type=float, help="training time of each run; 3 for digits, else 12")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("quickstart.png"), help="path of the picture")
    return parser


def show(histories: dict[str, History], title: str, seconds: float, console: Console) -> None:
    """Print the table."""
    table = Table(title=title)
    for column in ("method", "loss", "peak val. %", "final val. %", "at a quarter", "seconds", "steps"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for name, checks in histories.items():
        accuracies = [100 * row["validation_accuracy"] for row in checks]
        early = [100 * row["validation_accuracy"] for row in checks if row["seconds"] <= seconds / 4]
        last = checks[-1]
        table.add_row(
            name, f"{last['loss']:.4f}", f"{max(accuracies):.2f}", f"{accuracies[-1]:.2f}",
            f"{early[-1]:.2f}" if early else "–", f"{last['seconds']:.1f}", str(last["step"]),
        )  # fmt: skip
    console.print(table)


def draw(histories: dict[str, History], title: str, path: Path) -> None:
    """Save the picture; its axes end where the lines end."""
    colors = dict(zip(histories, (*style.COLORS[: len(histories) - 1], style.OURS), strict=True))
    with style.styled(7, 4) as figure:
        axes, labels, worst, best = figure.subplots(), [], [], []
        for name, checks in histories.items():
            seconds = [row["seconds"] for row in checks]
            accuracies = [100 * row["validation_accuracy"] for row in checks]
            ours = name == "CRONOS-AM"
            axes.plot(seconds, accuracies, color=colors[name], linewidth=2.4 if ours else 1.3, zorder=3 if ours else 2)
            labels.append(style.Label(seconds[-1], accuracies[-1], name, colors[name], ours))
            worst.append(min(accuracies[len(accuracies) // 20 :]))  # the first epochs need not be in sight
            best.append(max(accuracies))
        starts = [checks[0]["seconds"] for checks in histories.values()]
        axes.set_xlim(min(starts), max(label.x for label in labels))
        axes.set_ylim(min(worst), max(best) + 0.05 * (max(best) - min(worst) + 1))
        axes.set(xlabel="training time, s", ylabel="validation accuracy, %", title=title)
        style.label_ends(axes, labels)
        style.save(figure, path)


def main() -> None:
    """Train three times, print the table, save the picture."""
    parser = options()
    args = parser.parse_args()
    if args.dataset != "digits" and args.data_dir is None:
        parser.error("--dataset needs --data-dir, the directory with the prepared TFDS set")
    if args.rows < BATCH:
        parser.error(f"--rows must be at least {BATCH}")
    try:
        images, labels, held_images, held_labels = load(args)
    except ValueError as error:
        parser.error(str(error))
    seconds = args.seconds or (3.0 if args.dataset == "digits" else 12.0)

    model = StridedCNN(int(labels.max()) + 1)
    variables = model.init(jax.random.key(args.seed), images[:1])
    head = cf.find_head(model, variables, images[:BATCH])
    made = {"apply_fn": model.apply, "params": variables["params"]}
    states = {
        "Adam 1e-3": TrainState.create(**made, tx=optax.adam(1e-3)),
        "Adam 3e-3": TrainState.create(**made, tx=optax.adam(3e-3)),
        "CRONOS-AM": cf.CronosTrainState.create(
            **made, tx=optax.adam(3e-3), head=head, solver=cf.Cronos(loss="softmax")
        ),
    }

    console, histories = Console(), {}
    for name, state in states.items():
        with console.status(name):
            _, history = cf.train(
                state,
                (images, labels),
                epochs=NO_LIMIT,
                seconds=seconds,
                batch_size=BATCH,
                loss="softmax",
                validation=(held_images, held_labels),
                key=jax.random.key(args.seed),
                compile_first=True,
            )
        histories[name] = [row for row in history if "validation_accuracy" in row]
        final = 100 * histories[name][-1]["validation_accuracy"]
        console.print(f"{name}: {len(histories[name])} epochs, validation {final:.2f} %")
    title = f"{args.dataset}: {len(images)} rows, {seconds:g} s of training each"
    show(histories, title, seconds, console)
    draw(histories, title, args.out)
    console.print(f"picture: {args.out}")


if __name__ == "__main__":
    main()
