"""The parts of CRONOS-AM on development tasks: a table that confirmed the defaults of ``cf.Alternation``.

    python docs/benchmarks/alternation.py --data-dir tfds --out alternation.jsonl

Six tasks, none of which a comparison in these pages reports: rows, classes, widths or networks are others, and all rows
are of training splits. Every method has the same epochs and batches. Adam alone can be run with and without a cosine
decay at five rates; the kept rows have two. Every run is a row of the file, written when it is done; rows that are
there are not run again. Ends with the table; ``--out docs/benchmarks/alternation.jsonl.gz`` prints that of kept rows.
"""

import dataclasses
import functools
import itertools
import time
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
import optax
from flax.training.train_state import TrainState
from rows import Row, missing, parser

import cronos_flax as cf
from cronos_flax.compare.data import load_tfds

SEEDS = (0, 1)
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)


class Body(nn.Module):
    """A backbone with the head ``Dense(64) → relu → Dense``.

    Args:
        kind: ``"cnn"`` (strided convolutions), ``"mlp"`` or ``"vit"`` (patches of 7, two blocks).
        widths: of the backbone's layers.
        outputs: number of classes.
    """

    kind: str
    widths: tuple[int, ...]
    outputs: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits ``(n, outputs)``."""
        x = getattr(self, self.kind)(x)
        return nn.Dense(self.outputs)(nn.relu(nn.Dense(64)(x)))

    def cnn(self, x: jax.Array) -> jax.Array:
        """Convolutions of 3 × 3 with stride 2."""
        for width in self.widths:
            x = nn.relu(nn.Conv(width, (3, 3), strides=2)(x))
        return x.reshape(len(x), -1)

    def mlp(self, x: jax.Array) -> jax.Array:
        """Dense layers."""
        x = x.reshape(len(x), -1)
        for width in self.widths:
            x = nn.relu(nn.Dense(width)(x))
        return x

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


class Case(NamedTuple):
    """A task: its data, its network and how it is trained."""

    data: str  # a set of images, or "teacher"
    classes: tuple[int, ...]  # of the images; empty for all
    rows: int  # to fit
    pool: tuple[int, int]  # rows to fit are drawn from these of the training split; the 3,000 after them are scored
    model: Body
    batch_size: int
    epochs: int


FASHION, CIFAR = "fashion_mnist", "cifar10_airplane_automobile"
CASES = {
    "clothes, CNN": Case(FASHION, (), 4000, (30_000, 50_000), Body("cnn", (12, 24), 10), 64, 15),
    "vehicles, CNN": Case(CIFAR, (), 4000, (0, 7000), Body("cnn", (16, 32, 32), 2), 64, 20),
    "vehicles, MLP": Case(CIFAR, (), 3000, (0, 7000), Body("mlp", (200, 80), 2), 128, 40),
    "tops, MLP": Case(FASHION, (2, 4, 6), 4000, (0, 13_000), Body("mlp", (256, 128), 3), 128, 25),
    "teacher, MLP": Case("teacher", (), 5000, (0, 5000), Body("mlp", (128, 64), 6), 64, 25),
    "clothes, ViT": Case(FASHION, (), 2000, (30_000, 50_000), Body("vit", (96, 96), 10), 64, 12),
}
MOVING = cf.Alternation(decay="cosine", then_every=5)  # the default when the rows were made
FROZEN = dataclasses.replace(MOVING, head="frozen")
# By name: the rate of Adam, the parts, and settings of the solver.
VARIANTS: dict[str, tuple[float, cf.Alternation, dict[str, Any]]] = {
    "default": (1e-3, MOVING, {}),
    **{f"default, rate {rate:g}": (rate, MOVING, {}) for rate in RATES if rate != 1e-3},
    "frozen head": (1e-3, FROZEN, {}),
    "frozen head, no decay": (1e-3, dataclasses.replace(FROZEN, decay=None), {}),
    "no decay": (1e-3, dataclasses.replace(MOVING, decay=None), {}),
    "linear decay": (1e-3, dataclasses.replace(MOVING, decay="linear"), {}),
    "solved at the start": (1e-3, dataclasses.replace(MOVING, first_epoch=0), {}),
    "solved before each epoch": (1e-3, dataclasses.replace(MOVING, then_every=1), {}),
    "solved before every third epoch": (1e-3, dataclasses.replace(MOVING, then_every=3), {}),
    "beta_ratio .005": (1e-3, MOVING, {"beta_ratio": 0.005}),
    "beta_ratio .05": (1e-3, MOVING, {"beta_ratio": 0.05}),
}
ADAM = {
    f"Adam {rate:g}{name}": (rate, decay)
    for (name, decay), rate in itertools.product({"": False, ", cosine": True}.items(), RATES)
}


@functools.cache
def whole(name: str, data_dir: Path) -> tuple[np.ndarray, np.ndarray]:
    """The training split of a set of images."""
    images, labels = load_tfds(name, "train", data_dir)
    return np.asarray(images, "float32"), np.asarray(labels)


def split(case: Case, seed: int, data_dir: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Rows to fit and rows to score."""
    if case.data == "teacher":  # two layers of tanh in 40 dimensions, with weights of the seed
        rng = np.random.default_rng(1000 + seed)
        x, h = rng.normal(size=(8000, 40)).astype("float32"), None
        for shape in ((40, 60), (60, 60), (60, 6)):
            kernel = rng.normal(size=shape) / shape[0] ** 0.5
            h = x @ kernel if h is None else np.tanh(1.6 * h) @ kernel
        y = (h - h.mean(axis=0)).argmax(axis=1)
    else:
        x, y = whole(case.data, data_dir)
        if case.classes:
            there = np.isin(y, case.classes)
            x, y = x[there], np.searchsorted(case.classes, y[there])
    low, high = case.pool
    fit = low + np.random.default_rng(seed).permutation(high - low)[: case.rows]
    mean, std = x[fit].mean(), x[fit].std()
    scored = slice(high, high + 3000)
    return (x[fit] - mean) / std, y[fit], (x[scored] - mean) / std, y[scored]


def run(task: str, method: str, seed: int, *, data_dir: Path) -> Row:
    """Train once; the figures of the row."""
    case = CASES[task]
    x, y, x_held, y_held = split(case, seed, data_dir)
    params = case.model.init(jax.random.key(seed), x[:1])["params"]
    common: dict[str, Any] = {"apply_fn": case.model.apply, "params": params}
    steps = case.epochs * (len(x) // case.batch_size)
    state: TrainState
    if method in ADAM:
        rate, decays = ADAM[method]
        state = TrainState.create(**common, tx=_adam(rate, steps if decays else None))
    else:
        rate, alternation, settings = VARIANTS[method]
        head = cf.find_head(case.model, {"params": params}, x[:64])
        solver = cf.Cronos(loss="softmax", **settings)
        state = cf.CronosTrainState.create(
            **common, tx=_adam(rate, None), head=head, solver=solver, alternation=alternation
        )
    began = time.process_time()
    state, history = cf.train(
        state,
        (x, y),
        epochs=case.epochs,
        batch_size=case.batch_size,
        loss="softmax",
        validation=(x_held, y_held),
        key=jax.random.key(seed),
        compile_first=True,
    )
    accuracies = [100 * row["validation_accuracy"] for row in history if "validation_accuracy" in row]
    solving = sum(row.get("solve_seconds", 0.0) for row in history)
    return {
        "end": accuracies[-1],
        "peak": max(accuracies),
        "rejections": getattr(state, "figures", {}).get("rejections", 0),
        "solving": solving / history[-1]["seconds"],
        "cpu_seconds": time.process_time() - began,
    }


@functools.cache
def _adam(rate: float, steps: int | None) -> optax.GradientTransformation:
    """Adam, with a cosine decay over so many steps."""
    return optax.adam(rate if steps is None else optax.cosine_decay_schedule(rate, steps))


def table(rows: list[Row]) -> str:
    """Accuracy at the end by method and task, and its mean difference to Adam at 0.001 with a cosine decay."""
    by = {(row["task"], row["method"], row["seed"]): row for row in rows}
    reference = "Adam 0.001, cosine"
    lines = [f"| method | {' | '.join(CASES)} | minus {reference} | rejected | solving |"]
    lines.append("|---" * (len(CASES) + 4) + "|")
    for method in (*VARIANTS, *ADAM):
        there = {task: [by[key] for s in SEEDS if (key := (task, method, s)) in by] for task in CASES}
        if not all(there.values()):
            continue
        pairs = [
            row["end"] - by[task, reference, row["seed"]]["end"]
            for task, runs in there.items()
            for row in runs
            if (task, reference, row["seed"]) in by
        ]
        error = np.std(pairs, ddof=1) / len(pairs) ** 0.5 if len(pairs) > 1 else np.nan
        each = [row for runs in there.values() for row in runs]
        cells = [f"{np.mean([row['end'] for row in runs]):.2f}" for runs in there.values()]
        cells.append(f"{np.mean(pairs):+.2f} ± {error:.2f}" if pairs else "")
        cells.append(f"{sum(row['rejections'] for row in each):.0f}")
        cells.append(f"{100 * np.mean([row['solving'] for row in each]):.0f} %")
        lines.append(f"| {method} | {' | '.join(cells)} |")
    if all((task, method, seed) in by for task in CASES for method in ADAM for seed in SEEDS):
        best = [np.mean([max(by[task, m, s]["end"] for m in ADAM) for s in SEEDS]) for task in CASES]
        cells = [f"{value:.2f}" for value in best]
        lines.append(f"| Adam, the best of ten on these rows | {' | '.join(cells)} | | | |")
    return "\n".join(lines)


if __name__ == "__main__":
    arguments = parser(__file__, __doc__, data=False)
    arguments.add_argument("--methods", nargs="*", default=[*VARIANTS, *ADAM], help="some of the methods")
    options = arguments.parse_args()
    wanted = [] if options.out.suffix == ".gz" else itertools.product(SEEDS, options.methods, CASES)
    keys = ((task, method, seed) for seed, method, task in wanted)
    do = functools.partial(run, data_dir=options.data_dir)
    print(table(missing(options.out, ("task", "method", "seed"), keys, do)))
