"""The data sets that several benchmarks share: features as they are, rows to fit and rows held out, by seed.

Nothing here touches a test split of Fashion-MNIST or CIFAR: what is tuned on held-out rows must not be.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from resnet import resnet20_features
from sklearn import datasets

from cronos_flax.compare.data import load_tfds

SMALL = ("digits", "breast_cancer", "wine", "diabetes")
IMAGES = ("fashion_mnist", "cifar10_airplane_automobile")
FEATURES = "resnet20 features of cifar10_airplane_automobile"
ROWS, HELD = 6000, 4000


class Split(NamedTuple):
    """Rows to fit and rows held out; y are integer labels, or floats for regression."""

    name: str
    seed: int
    X: np.ndarray
    y: np.ndarray
    X_held: np.ndarray
    y_held: np.ndarray

    @property
    def classes(self) -> int | None:
        """The number of classes, None for regression."""
        return int(self.y.max()) + 1 if np.issubdtype(self.y.dtype, np.integer) else None


def splits(data_dir: Path | None, weights: Path | None, seeds: tuple[int, ...]) -> Iterator[Split]:
    """Every set and seed that can be had: small sets split 3 : 1, of image sets 6,000 rows and 4,000 others."""
    for name in SMALL:
        X, y = getattr(datasets, f"load_{name}")(return_X_y=True)
        y = y.astype("float32") if name == "diabetes" else y.astype(int)
        yield from _split(name, X.astype("float32"), y, 3 * len(X) // 4, len(X), seeds)
    for name in IMAGES if data_dir is not None else ():
        images, labels = load_tfds(name, "train", data_dir)
        if name == IMAGES[1] and weights is not None:
            features = resnet20_features(weights / "resnet20_cifar10.safetensors", images)
            yield from _split(FEATURES, features, labels.astype(int), ROWS, ROWS + HELD, seeds)
        flat = images.reshape(len(images), -1)
        yield from _split(name, flat, labels.astype(int), ROWS, ROWS + HELD, seeds)


def _split(name: str, X: np.ndarray, y: np.ndarray, fit: int, end: int, seeds: tuple[int, ...]) -> Iterator[Split]:
    for seed in seeds:
        order = np.random.default_rng(seed).permutation(len(X))
        a, b = order[:fit], order[fit:end]
        yield Split(name, seed, X[a].astype("float32"), y[a], X[b].astype("float32"), y[b])


def score(outputs: np.ndarray, y: np.ndarray) -> float:
    """Accuracy in %, or 100 R² where y are floats."""
    if not np.issubdtype(y.dtype, np.integer):
        return 100 * float(1 - np.mean((outputs[:, 0] - y) ** 2) / np.var(y))
    predicted = outputs[:, 0] > 0 if outputs.shape[1] == 1 else outputs.argmax(axis=1)
    return 100 * float(np.mean(predicted == y))
