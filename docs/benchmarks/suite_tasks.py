"""The tasks of the suite: some to choose on, eleven to report, a grid of rates.

``suite_features.py`` makes the features that some of them need.
"""

import functools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import flax.linen as nn
import jax
import numpy as np
from sklearn.datasets import load_digits

from cronos_flax.compare.data import load_tfds
from cronos_flax.compare.models import MLP


class Places(NamedTuple):
    """Where data lie: prepared TFDS sets, and features of ``suite_features.py``."""

    data: Path
    cache: Path = Path()


class Rows(NamedTuple):
    """Rows to fit and rows to score; labels are integers."""

    x: np.ndarray
    y: np.ndarray
    x_scored: np.ndarray
    y_scored: np.ndarray


class Net(nn.Module):
    """A backbone with the head ``Dense → relu → Dense``.

    Args:
        kind: ``"dense"`` layers, or ``"plain"`` ones without biases, in the head neither; ``"cnn"`` (convolutions with
            stride 2), ``"vit"`` or ``"convnext"`` (patches of 7), or ``"resnet"`` (with batch norms).
        widths: of the backbone's layers or blocks.
        hidden: neurons of the head.
        outputs: of the head.
    """

    kind: str
    widths: tuple[int, ...]
    hidden: int
    outputs: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Outputs ``(n, outputs)``; ``train`` says whether batch norms use the statistics of the batch."""
        x = self.resnet(x, train) if self.kind == "resnet" else getattr(self, self.kind)(x)
        biased = self.kind != "plain"
        return nn.Dense(self.outputs, biased)(nn.relu(nn.Dense(self.hidden, biased)(x)))

    def dense(self, x: jax.Array) -> jax.Array:
        """Dense layers."""
        x = x.reshape(len(x), -1)
        for width in self.widths:
            x = nn.relu(nn.Dense(width, self.kind != "plain")(x))
        return x

    plain = dense

    def cnn(self, x: jax.Array) -> jax.Array:
        """Convolutions of 3 × 3 with stride 2."""
        for width in self.widths:
            x = nn.relu(nn.Conv(width, (3, 3), strides=2)(x))
        return x.reshape(len(x), -1)

    def vit(self, x: jax.Array) -> jax.Array:
        """Transformer blocks before the mean over patches."""
        width = self.widths[0]
        x = nn.Conv(width, (7, 7), strides=7)(x).reshape(len(x), -1, width)
        x = x + self.param("position", nn.initializers.normal(0.02), (1, x.shape[1], width))
        for _ in self.widths:
            h = nn.LayerNorm()(x)
            x = x + nn.MultiHeadDotProductAttention(4)(h, h)
            x = x + nn.Dense(width)(nn.gelu(nn.Dense(2 * width)(nn.LayerNorm()(x))))
        return nn.LayerNorm()(x).mean(axis=1)

    def convnext(self, x: jax.Array) -> jax.Array:
        """ConvNeXt blocks before the mean over patches."""
        width = self.widths[0]
        x = nn.LayerNorm()(nn.Conv(width, (7, 7), strides=7)(x))
        for _ in self.widths:
            h = nn.LayerNorm()(nn.Conv(width, (7, 7), feature_group_count=width)(x))
            x = x + nn.Dense(width)(nn.gelu(nn.Dense(4 * width)(h)))
        return nn.LayerNorm()(x.mean(axis=(1, 2)))

    def resnet(self, x: jax.Array, train: bool) -> jax.Array:
        """Residual blocks with batch norms before the mean over pixels; each block halves the image."""
        norm = partial(nn.BatchNorm, use_running_average=not train, momentum=0.9)
        x = nn.relu(norm()(nn.Conv(self.widths[0], (3, 3), strides=2, use_bias=False)(x)))
        for width in self.widths:
            y = nn.relu(norm()(nn.Conv(width, (3, 3), strides=2, use_bias=False)(x)))
            y = norm()(nn.Conv(width, (3, 3), use_bias=False)(y))
            x = nn.relu(y + norm()(nn.Conv(width, (1, 1), strides=2, use_bias=False)(x)))
        return x.mean(axis=(1, 2))


class Task(NamedTuple):
    """A task: its rows by seed, its network and how long it is trained."""

    rows: Callable[[int, Places], Rows]
    model: nn.Module
    batch_size: int
    epochs: int  # of an optimizer alone
    solved_epochs: int  # of CRONOS-AM in about the same time: pilot runs gave the share of solves and a step's time
    loss: str = "softmax"
    unchosen: int | None = None  # epochs of CRONOS-AM in about the same time if β is not chosen; None for as many

    @property
    def unchosen_epochs(self) -> int:
        """Of CRONOS-AM in about the same time if β is not chosen."""
        return self.solved_epochs if self.unchosen is None else self.unchosen

    @property
    def keywords(self) -> tuple[dict[str, bool], dict[str, bool]]:
        """Of the module, in training and in evaluation."""
        normed = isinstance(self.model, Net) and self.model.kind == "resnet"
        return ({"train": True}, {"train": False}) if normed else ({}, {})


# ------------------------------------------------------------------------------------------------ rows


@functools.cache
def images(name: str, split: str, data: Path) -> tuple[np.ndarray, np.ndarray]:
    """Pixels in 0..255 and labels."""
    x, y = load_tfds(name, split, data)
    return np.asarray(x, "float32"), np.asarray(y)


def drawn(x: np.ndarray, count: int | None, seed: int) -> np.ndarray:
    """So many rows at random; None for all, in a random order."""
    return np.random.default_rng(seed).permutation(len(x))[:count]


def standardised(x: np.ndarray, x_scored: np.ndarray, axis: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """By the mean and the deviation of the rows to fit: of all numbers, or of each column (``axis=0``)."""
    mean, deviation = x.mean(axis=axis), x.std(axis=axis)
    return (x - mean) / deviation, (x_scored - mean) / deviation


def pictures(
    seed: int,
    places: Places,
    *,
    name: str,
    rows: int,
    pool: tuple[int, int] | None = None,
    classes: tuple[int, ...] = (),
    scaling: str = "standardised",
) -> Rows:
    """Images, standardised or divided by 255.

    Args:
        seed: of the draw.
        places: of the data.
        name: of the set.
        rows: to fit.
        pool: rows to fit are drawn from these of the training split, and the 3,000 after them are scored; None for all,
            and then the test split is scored.
        classes: of the images; empty for all.
        scaling: ``"standardised"`` or ``"/255"``.
    """
    x, y = images(name, "train", places.data)
    if classes:
        there = np.isin(y, classes)
        x, y = x[there], np.searchsorted(classes, y[there])
    if pool is None:
        x_scored, y_scored = images(name, "test", places.data)
    else:
        (low, high), end = pool, pool[1] + 3000
        x, y, x_scored, y_scored = x[low:high], y[low:high], x[high:end], y[high:end]
    chosen = drawn(x, rows, seed)
    x_fit, x_scored = (x[chosen] / 255, x_scored / 255) if scaling == "/255" else standardised(x[chosen], x_scored)
    return Rows(x_fit, y[chosen], x_scored, y_scored)


def planes(seed: int, places: Places, *, scaling: str) -> Rows:
    """Experiment #1: 9,000 airplanes and automobiles to fit, the test split to score."""
    x, y = images(VEHICLES, "train", places.data)
    x_scored, y_scored = images(VEHICLES, "test", places.data)
    x, x_scored = (a.reshape(len(a), -1) / 255 for a in (x, x_scored))
    chosen = drawn(x, 9000, seed)
    x, y = x[chosen], y[chosen]
    if scaling == "standardised":
        x, x_scored = standardised(x, x_scored, axis=0)
    return Rows(x, y, x_scored, y_scored)


def digits(seed: int, places: Places) -> Rows:
    """scikit-learn's digits, a third to score."""
    x, y = load_digits(return_X_y=True)
    order = drawn(x, None, seed)
    fit, scored = order[:1200], order[1200:]
    x = x.astype("float32") / 16
    return Rows(x[fit], y[fit], x[scored], y[scored])


def teacher(seed: int, places: Places, *, rows: int = 5000) -> Rows:
    """Rows in 40 dimensions, labelled by two random layers of tanh; 3,000 to score."""
    rng = np.random.default_rng(1000 + seed)
    x = h = rng.normal(size=(rows + 3000, 40)).astype("float32")
    for i, shape in enumerate(((40, 60), (60, 60), (60, 6))):
        h = (np.tanh(1.6 * h) if i else h) @ (rng.normal(size=shape) / shape[0] ** 0.5)
    y = (h - h.mean(axis=0)).argmax(axis=1)
    return Rows(x[:rows], y[:rows], x[rows:], y[rows:])


def features(seed: int, places: Places, *, name: str, rows: int | None = None, held: int = 0) -> Rows:
    """Features of a frozen pretrained network, standardised; the test split is scored, or ``held`` training rows."""
    with np.load(places.cache / f"{name}.npz") as kept:
        x, y, x_scored, y_scored = (kept[part] for part in ("x_train", "y_train", "x_test", "y_test"))
    if held:
        x, y, x_scored, y_scored = x[:-held], y[:-held], x[-held:], y[-held:]
    chosen = drawn(x, rows, seed)
    x, x_scored = standardised(x[chosen], x_scored)
    return Rows(x, y[chosen], x_scored, y_scored)


CLOTHES, VEHICLES = "fashion_mnist", "cifar10_airplane_automobile"
some_clothes = partial(pictures, name=CLOTHES, pool=(30_000, 50_000))
some_vehicles = partial(pictures, name=VEHICLES, pool=(0, 7000))
clothes, vehicles = (partial(pictures, name=name) for name in (CLOTHES, VEHICLES))
news = partial(features, name="noisy_ag_news", rows=3000, held=3000)
banking, films, flowers = (partial(features, name=n) for n in ("banking77", "imdb_reviews", "flowers128"))


# Choices are made on these: with other widths or networks than those below. No row of a test split.
DEVELOPMENT = {
    "clothes, CNN": Task(partial(some_clothes, rows=3000), Net("cnn", (12, 24), 64, 10), 64, 15, 11),
    "clothes /255, MLP": Task(
        partial(some_clothes, rows=4000, scaling="/255"), Net("plain", (160, 80), 20, 10), 128, 25, 19
    ),
    "clothes, ViT": Task(partial(some_clothes, rows=2000), Net("vit", (64, 64), 64, 10), 64, 12, 10),
    "vehicles, MLP": Task(partial(some_vehicles, rows=3000), Net("dense", (200, 80), 64, 2), 128, 25, 18),
    "vehicles, ResNet": Task(partial(some_vehicles, rows=2500), Net("resnet", (12, 24), 48, 2), 64, 10, 9),
    "teacher, MLP": Task(teacher, Net("dense", (128, 64), 64, 6), 64, 25, 16),
    "news, features": Task(news, Net("dense", (96,), 96, 4), 64, 15, 9),
}
# The limit of steps was chosen on six of these, and on experiment #1 with other rows and another network.
LIMIT = {name: task for name, task in DEVELOPMENT.items() if name != "news, features"} | {
    f"vehicles /255, MLP, batch {size}": Task(
        partial(some_vehicles, rows=4000, scaling="/255"), Net("plain", (200, 200), 24, 1), size, *epochs, "squared"
    )
    for size, epochs in {128: (20, 15), 512: (25, 22)}.items()
}
REPORTED = {
    **{
        f"experiment #1, {scaling}, batch {size}": Task(
            partial(planes, scaling=scaling), MLP(1), size, *epochs, "squared"
        )
        for size, epochs in {128: (20, 15), 1024: (25, 22)}.items()
        for scaling in ("/255", "standardised")
    },
    "clothes 6,000, CNN": Task(partial(clothes, rows=6000), Net("cnn", (16, 32), 64, 10), 128, 15, 11),
    "clothes 20,000, MLP": Task(
        partial(clothes, rows=20_000), Net("dense", (256, 128), 64, 10), 128, 10, 6, unchosen=7
    ),
    "digits, MLP": Task(digits, Net("dense", (64, 32), 64, 10), 64, 30, 13, unchosen=15),
    "vehicles, ResNet 16-32-64": Task(partial(vehicles, rows=6000), Net("resnet", (16, 32, 64), 64, 2), 128, 10, 9),
    "banking77, MiniLM": Task(banking, Net("dense", (256,), 256, 77), 128, 15, 4, unchosen=7),
    "IMDb, MiniLM": Task(films, Net("dense", (128,), 64, 2), 64, 10, 4, unchosen=5),
    "flowers, Lite0": Task(flowers, Net("dense", (128,), 128, 5), 64, 15, 8, unchosen=9),
}
# For rates a thousand times apart: four of the above, and two wide backbones.
GRID = {name: DEVELOPMENT[name] for name in ("clothes, CNN", "vehicles, MLP", "vehicles, ResNet", "teacher, MLP")} | {
    f"clothes, {name} 384 wide": Task(partial(some_clothes, rows=1000), Net(kind, (384,), 64, 10), 50, 5, 5)
    for name, kind in (("ViT", "vit"), ("ConvNeXt", "convnext"))
}
# For the weight decay of the head: other numbers of rows, and the fewer epochs the more rows there are.
_NETS = {
    "clothes, MLP": (some_clothes, Net("dense", (200, 100), 64, 10)),
    "clothes, CNN": (some_clothes, Net("cnn", (12, 24), 64, 10)),
    "teacher": (teacher, Net("dense", (128, 64), 64, 6)),
    "vehicles": (some_vehicles, Net("dense", (200, 80), 64, 2)),
}
_EPOCHS = {1500: 24, 6000: 12, 20_000: 7}
_ROWS = {name: _EPOCHS for name in _NETS} | {
    "teacher": {rows: epochs + 3 for rows, epochs in _EPOCHS.items()},
    "vehicles": {1000: 25, 2500: 18, 6500: 13},
}
DECAYS = {
    f"{name}, {rows:,} rows": Task(partial(draw, rows=rows), net, 128, epochs, epochs)
    for name, (draw, net) in _NETS.items()
    for rows, epochs in _ROWS[name].items()
}
TASKS = DEVELOPMENT | LIMIT | REPORTED | GRID | DECAYS
