"""Where the default of ``beta=None`` comes from: held-out accuracy against the ratio of β to β_max.

    python docs/benchmarks/beta.py [--data-dir DIR]

Random splits of four classification sets, seeds 0 to 2, squared loss on signed targets, 64 neurons, ``cf.Cronos``'s
defaults otherwise; features as they are. Fashion-MNIST (6,000 rows to fit, its 10,000 test images) is used where
``--data-dir`` has it. Prints one row a set and marks the default.
"""

import argparse
from pathlib import Path

import jax
import numpy as np
from sklearn import datasets

import cronos_flax as cf
from cronos_flax._cronos import _BETA_RATIO
from cronos_flax.data import load_tfds

RATIOS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
SEEDS = (0, 1, 2)


def splits(data_dir: Path | None):
    """``name, seed, (X, labels) to fit, (X, labels) held out`` of every set and seed."""
    for name in ("digits", "breast_cancer", "wine"):
        X, labels = getattr(datasets, f"load_{name}")(return_X_y=True)
        for seed in SEEDS:
            order = np.random.default_rng(seed).permutation(len(X))
            fit, held = order[: 3 * len(X) // 4], order[3 * len(X) // 4 :]
            yield name, seed, (X[fit], labels[fit]), (X[held], labels[held])
    if data_dir is not None:
        images, labels = load_tfds("fashion_mnist", "train", data_dir)
        test_images, test_labels = load_tfds("fashion_mnist", "test", data_dir)
        for seed in SEEDS:
            fit = np.random.default_rng(seed).permutation(len(images))[:6000]
            yield (
                "fashion_mnist",
                seed,
                (images[fit].reshape(6000, -1), labels[fit]),
                (test_images.reshape(len(test_images), -1), test_labels),
            )


def accuracy(outputs: np.ndarray, labels: np.ndarray) -> float:
    """Percentage of rows whose largest output, or sign, is the label's."""
    predicted = outputs[:, 0] > 0 if outputs.shape[1] == 1 else outputs.argmax(axis=1)
    return 100 * float(np.mean(predicted == labels))


def held_out_accuracy(beta: float | None, seed: int, fit, held) -> tuple[float, float]:
    """Accuracy on the held-out rows, and the β used."""
    X, labels = fit
    targets = cf.signed_targets(labels, int(labels.max()) + 1)
    solution = cf.Cronos(beta=beta).solve(X.astype("float32"), targets, hidden=64, key=jax.random.key(seed))
    return accuracy(np.asarray(cf.predict(solution.params, held[0].astype("float32"))), held[1]), float(
        solution.stats.beta
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, help="where a prepared TFDS fashion_mnist lies")
    scores: dict[str, list[list[float]]] = {}
    for name, seed, fit, held in splits(parser.parse_args().data_dir):
        _, default = held_out_accuracy(None, seed, fit, held)
        row = [held_out_accuracy(r / _BETA_RATIO * default, seed, fit, held)[0] for r in RATIOS]
        scores.setdefault(name, []).append(row)
    print("set".ljust(16) + "".join(f"{r:>14.0e}" + ("*" if r == _BETA_RATIO else " ") for r in RATIOS))
    for name, rows in scores.items():
        mean, sd = np.mean(rows, axis=0), np.std(rows, axis=0, ddof=1)
        print(name.ljust(16) + "".join(f"{m:8.2f} ± {s:4.2f}" for m, s in zip(mean, sd, strict=True)))


if __name__ == "__main__":
    main()
