"""The tasks of the suite: seven to choose on, eleven others to report, and six for a grid of rates.

    python docs/benchmarks/suite_tasks.py --data-dir DIR --weights DIR --cache DIR

This prepares what several runs share: the features of sentences and photographs from frozen pretrained networks (by the
models of ``examples/pretrained``), once, in the directory of ``--cache``. About five minutes on one core.
"""

import argparse
import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from sklearn.datasets import load_digits

from cronos_flax.compare.data import load_tfds
from cronos_flax.compare.models import MLP

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "pretrained"))
BLOCK = 200  # photographs of a pass


class Places(NamedTuple):
    """Where data lie: prepared TFDS sets, published weights, and features that this file makes of them."""

    data: Path
    weights: Path
    cache: Path


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
        norm = functools.partial(nn.BatchNorm, use_running_average=not train, momentum=0.9)
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
    solved_epochs: int  # of CRONOS-AM in the same time, by the share that solves took in a pilot run
    loss: str = "softmax"

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


def teacher(seed: int, places: Places) -> Rows:
    """5,000 rows in 40 dimensions, labelled by two random layers of tanh; 3,000 to score."""
    rng = np.random.default_rng(1000 + seed)
    x = h = rng.normal(size=(8000, 40)).astype("float32")
    for i, shape in enumerate(((40, 60), (60, 60), (60, 6))):
        h = (np.tanh(1.6 * h) if i else h) @ (rng.normal(size=shape) / shape[0] ** 0.5)
    y = (h - h.mean(axis=0)).argmax(axis=1)
    return Rows(x[:5000], y[:5000], x[5000:], y[5000:])


def features(
    seed: int, places: Places, *, name: str, rows: int | None = None, scored: str = "test", most: int | None = None
) -> Rows:
    """Features of a frozen pretrained network, standardised; ``most`` rows of the split ``scored`` are scored."""
    with np.load(places.cache / f"{name}.npz") as kept:
        x, y = kept["x_train"], kept["y_train"]
        x_scored, y_scored = (x[-3000:], y[-3000:]) if scored == "train" else (kept["x_test"], kept["y_test"])
    if scored == "train":
        x, y = x[:-3000], y[:-3000]
    chosen = drawn(x, rows, seed)
    x, x_scored = standardised(x[chosen], x_scored[:most])
    return Rows(x, y[chosen], x_scored, y_scored[:most])


CLOTHES, VEHICLES = "fashion_mnist", "cifar10_airplane_automobile"
# Choices are made on these: other rows, other sets, other widths or other networks than those below. No test split.
DEVELOPMENT = {
    "clothes, CNN": Task(
        functools.partial(pictures, name=CLOTHES, rows=3000, pool=(30_000, 50_000)),
        Net("cnn", (12, 24), 64, 10),
        64,
        15,
        12,
    ),
    "clothes /255, MLP": Task(
        functools.partial(pictures, name=CLOTHES, rows=4000, pool=(30_000, 50_000), scaling="/255"),
        Net("plain", (160, 80), 20, 10),
        128,
        25,
        23,
    ),
    "clothes, ViT": Task(
        functools.partial(pictures, name=CLOTHES, rows=2000, pool=(30_000, 50_000)),
        Net("vit", (64, 64), 64, 10),
        64,
        12,
        11,
    ),
    "vehicles, MLP": Task(
        functools.partial(pictures, name=VEHICLES, rows=3000, pool=(0, 7000)),
        Net("dense", (200, 80), 64, 2),
        128,
        25,
        23,
    ),
    "vehicles, ResNet": Task(
        functools.partial(pictures, name=VEHICLES, rows=2500, pool=(0, 7000)), Net("resnet", (12, 24), 48, 2), 64, 10, 9
    ),
    "teacher, MLP": Task(teacher, Net("dense", (128, 64), 64, 6), 64, 25, 23),
    "news, features": Task(
        functools.partial(features, name="noisy_ag_news", rows=3000, scored="train"),
        Net("dense", (96,), 96, 4),
        64,
        15,
        13,
    ),
}
REPORTED = {
    **{
        f"experiment #1, {scaling}, batch {size}": Task(
            functools.partial(planes, scaling=scaling), MLP(1), size, *{128: (20, 18), 1024: (25, 22)}[size], "squared"
        )
        for size in (128, 1024)
        for scaling in ("/255", "standardised")
    },
    "clothes 6,000, CNN": Task(
        functools.partial(pictures, name=CLOTHES, rows=6000), Net("cnn", (16, 32), 64, 10), 128, 15, 12
    ),
    "clothes 20,000, MLP": Task(
        functools.partial(pictures, name=CLOTHES, rows=20_000), Net("dense", (256, 128), 64, 10), 128, 10, 8
    ),
    "digits, MLP": Task(digits, Net("dense", (64, 32), 64, 10), 64, 30, 15),
    "vehicles, ResNet 16-32-64": Task(
        functools.partial(pictures, name=VEHICLES, rows=6000), Net("resnet", (16, 32, 64), 64, 2), 128, 10, 9
    ),
    "banking77, MiniLM": Task(functools.partial(features, name="banking77"), Net("dense", (256,), 256, 77), 128, 15, 8),
    "IMDb, MiniLM": Task(functools.partial(features, name="imdb_reviews"), Net("dense", (128,), 64, 2), 64, 10, 5),
    "flowers, Lite0": Task(functools.partial(features, name="flowers128"), Net("dense", (128,), 128, 5), 64, 15, 12),
}
# For rates a thousand times apart: four of the above, and two wide backbones.
GRID = {name: DEVELOPMENT[name] for name in ("clothes, CNN", "vehicles, MLP", "vehicles, ResNet", "teacher, MLP")} | {
    f"clothes, {name} 384 wide": Task(
        functools.partial(pictures, name=CLOTHES, rows=1000, pool=(30_000, 50_000)), Net(kind, (384,), 64, 10), 50, 5, 5
    )
    for name, kind in (("ViT", "vit"), ("ConvNeXt", "convnext"))
}
TASKS = DEVELOPMENT | REPORTED | GRID


# ------------------------------------------------------------------------------------------------ features


def texts_of(name: str, split: str, data: Path, most: int | None) -> tuple[list[str], np.ndarray]:
    """Texts and labels, in a fixed random order."""
    import tensorflow_datasets as tfds

    source = tfds.data_source(name, split=split, data_dir=str(data))
    chosen = np.random.default_rng(0).permutation(len(source))[:most]
    found = source.__getitems__([int(i) for i in chosen])
    label = "true_label" if "true_label" in found[0] else "label"
    return [row["text"].decode() for row in found], np.array([row[label] for row in found])


def of_texts(name: str, places: Places, most: tuple[int | None, int | None]) -> dict[str, np.ndarray]:
    """The sentence vectors of MiniLM for the training and test rows of a set, at most so many."""
    import text as example
    from tokenizers import Tokenizer

    folder = places.weights / "minilm"
    encoder = example.load(folder / "model.safetensors", json.loads((folder / "config.json").read_text()))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(example.LONGEST)
    encode = nnx.jit(lambda encoder, ids, mask: example.sentence(encoder(ids, mask), ids, mask))
    kept: dict[str, np.ndarray] = {}
    for split, count in zip(("train", "test"), most, strict=True):
        texts, y = texts_of(name, split, places.data, count)
        ids = [encoding.ids for encoding in tokenizer.encode_batch(texts)]
        order = np.argsort([len(row) for row in ids], kind="stable")
        x = np.zeros((len(ids), 384), "float32")
        for begin in range(0, len(order), example.PASS_BATCH):
            rows = order[begin : begin + example.PASS_BATCH]
            x[rows] = encode(encoder, *example.padded([ids[i] for i in rows]))
        kept |= {f"x_{split}": x, f"y_{split}": y}
    return kept


def of_photographs(name: str, places: Places) -> dict[str, np.ndarray]:
    """The pooled features of EfficientNet-Lite0."""
    import images as example

    model = example.Lite()
    folder, kept = places.weights / "efficientnet_lite0", {}
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 128, 128, 3)))
    variables = example.load(folder / "model.safetensors", shapes)

    @jax.jit
    def pooled(x: jax.Array) -> jax.Array:
        _, seen = model.apply(variables, x, capture_intermediates=lambda module, _: module.name == "top_norm")
        return nn.relu6(seen["intermediates"]["top_norm"]["__call__"][0]).mean(axis=(1, 2))

    for split in ("train", "test"):
        x, y = load_tfds(name, split, places.data)
        blocks = [np.asarray(pooled(x[i : i + BLOCK])) for i in range(0, len(x), BLOCK)]
        kept |= {f"x_{split}": np.concatenate(blocks), f"y_{split}": np.asarray(y)}
    return kept


MADE: dict[str, Callable[[Places], dict[str, Any]]] = {
    "noisy_ag_news": lambda places: of_texts("noisy_ag_news", places, (None, 1)),
    "banking77": lambda places: of_texts("banking77", places, (None, None)),
    "imdb_reviews": lambda places: of_texts("imdb_reviews", places, (2400, 4000)),
    "flowers128": lambda places: of_photographs("flowers128", places),
}

if __name__ == "__main__":
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for option in ("--data-dir", "--weights", "--cache"):
        options.add_argument(option, type=Path, required=True)
    given = options.parse_args()
    asked = Places(given.data_dir, given.weights, given.cache)
    asked.cache.mkdir(parents=True, exist_ok=True)
    for set_name, make in MADE.items():
        if not (asked.cache / f"{set_name}.npz").exists():
            np.savez(asked.cache / f"{set_name}.npz", **make(asked))
            print(set_name, flush=True)
