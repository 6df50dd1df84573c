"""CRONOS-AM with BatchNorm: which statistics the features of a solve use, and what becomes of the running ones.

    python docs/benchmarks/batchnorm.py --out batchnorm.jsonl --data-dir tfds

``resnet``: the ResNet of ``examples/loops/resnet.py`` (momentum .9) on scikit-learn's digits: 1,400 rows to fit, 397
held out, batches of 100, Adam at 1e-3 for the backbone, and alone at three rates. ``tutorial``, with ``--data-dir``:
the CNN of Flax's NNX tutorial (momentum .99, dropout within the head) on 4,000 training rows of Fashion-MNIST, 2,000
others held out, batches of 32, AdamW at the tutorial's 5e-3. Models are scored in evaluation mode, after the solve that
follows an epoch; runs are compared at equal epochs. Every run is a row of the file, written when it is done; rows that
are there are not run again. Ends with the tables; ``--out docs/benchmarks/batchnorm.jsonl.gz`` prints those of the kept
rows.
"""

import argparse
import functools
import itertools
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from flax_examples import tutorial as tutorial_example
from rows import missing, parser
from sklearn.datasets import load_digits

import cronos_flax as cf
from cronos_flax.compare.data import load_tfds
from cronos_flax.compare.methods import BaselineState

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "loops"))
from resnet import ResNet

STRICT = cf.Alternation(head="frozen", decay=None, largest_step=None)  # what all rows are of
SEEDS = (31, 32, 33)
TUTORIAL_SEEDS = (31, 32)
MODES = {
    "running statistics": {"statistics": "running"},
    "those of the batch, not recalibrated": {"statistics": "batch", "recalibrate": False},
    "those of the batch": {"statistics": "batch"},
}
METHODS = {
    **{f"Adam {rate:g}": (rate, None) for rate in (3e-4, 1e-3, 3e-3)},
    **{f"CRONOS-AM, {mode}": (1e-3, how) for mode, how in MODES.items()},
}
TUTORIAL_METHODS = {"AdamW 0.005": (5e-3, None), **{f"CRONOS-AM, {mode}": (5e-3, how) for mode, how in MODES.items()}}
EPOCHS, TUTORIAL_EPOCHS = 10, 4


def resnet(method: str, seed: int) -> dict[str, Any]:
    """Train the ResNet once; the figures of the row."""
    digits = load_digits()
    images, order = digits.images[..., None].astype("float32") / 16, np.random.default_rng(seed).permutation(1797)
    fit, held = order[:1400], order[1400:]
    model, x = ResNet(), images[fit]
    rate, how = METHODS[method]
    variables = model.init(jax.random.key(seed), x[:1], train=False)
    made = {"apply_fn": model.apply, "params": variables["params"], "tx": optax.adam(rate)}
    made["model_state"] = {"batch_stats": variables["batch_stats"]}
    if how is None:
        state: Any = BaselineState.create(**made)
    else:
        head = cf.find_head(model, variables, x[:64], train=False, **how)
        state = cf.CronosTrainState.create(**made, head=head, solver=cf.Cronos(loss="softmax"), alternation=STRICT)
    _, history = cf.train(
        state,
        (x, digits.target[fit]),
        epochs=EPOCHS,
        batch_size=100,
        loss="softmax",
        train_kwargs={"train": True},
        eval_kwargs={"train": False},
        validation=(images[held], digits.target[held]),
        key=jax.random.key(seed),
    )
    scores = [100 * row["validation_accuracy"] for row in history if "validation_accuracy" in row]
    rejections = max((row.get("rejections", 0) for row in history), default=0)
    return {"scores": scores, "rejections": rejections, "jax": jax.__version__}


def tutorial(data_dir: Path, method: str, seed: int) -> dict[str, Any]:
    """Train the tutorial's CNN once; the figures of the row."""
    images, labels = load_tfds("fashion_mnist", "train[:6000]", data_dir)
    images, rng = images.astype("float32") / 255, np.random.default_rng(seed)
    order = rng.permutation(len(labels))
    x, y, x_held, y_held = images[order[:4000]], labels[order[:4000]], images[order[4000:]], labels[order[4000:]]
    model = tutorial_example.CNN(nnx.Rngs(seed))
    rate, how = TUTORIAL_METHODS[method]
    if how is None:
        optimizer: Any = nnx.Optimizer(model, optax.adamw(rate, 0.9), wrt=nnx.Param)
    else:
        head, solver = cf.nnx.find_head(model, x[:64], **how), cf.Cronos(loss="softmax")
        tx = optax.adamw(rate, 0.9)
        optimizer = cf.nnx.CronosOptimizer(model, tx, head=head, solver=solver, alternation=STRICT)

    @nnx.jit
    def train_step(model: tutorial_example.CNN, optimizer: nnx.Optimizer, x: jax.Array, y: jax.Array) -> None:
        def loss(model: tutorial_example.CNN) -> jax.Array:
            return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()

        optimizer.update(model, nnx.grad(loss)(model))

    @nnx.jit
    def predicted(model: tutorial_example.CNN, x: jax.Array) -> jax.Array:
        return model(x).argmax(axis=1)

    def solve() -> None:
        if how is not None:
            optimizer.solve_head(model, (x, y))

    scores = []
    solve()
    for _ in range(TUTORIAL_EPOCHS):
        model.train()
        for rows in rng.permutation(len(x)).reshape(-1, 32):
            train_step(model, optimizer, x[rows], y[rows])
        solve()
        model.eval()
        hits = [np.asarray(predicted(model, x_held[i : i + 500])) == y_held[i : i + 500] for i in range(0, 2000, 500)]
        scores.append(100 * float(np.mean(hits)))
    rejections = 0 if how is None else optimizer.figures["rejections"]
    return {"scores": scores, "rejections": rejections, "jax": jax.__version__}


def cost() -> str:
    """What a feature pass of the ResNet over 1,024 rows takes, without and with the statistics of its norms."""
    model, x = ResNet(), jax.random.normal(jax.random.key(0), (1024, 8, 8, 1))
    variables = model.init(jax.random.key(1), x[:1], train=False)
    head = cf.find_head(model, variables, x[:64], train=False, statistics="batch")

    def compiled(observed: bool) -> str:
        tap = jax.jit(lambda variables, x: head.module.tap(variables, (x,), head.kwargs, head.hidden_path, observed))
        done = tap.lower(variables, x).compile()
        return f"{done.cost_analysis()['flops']:,.0f} operations, {done.memory_analysis().temp_size_in_bytes:,} bytes"

    return f"A feature pass over 1,024 rows: {compiled(False)}; with statistics: {compiled(True)}"


def table(rows: list[dict[str, Any]], methods: dict[str, Any], epochs: tuple[int, ...]) -> None:
    """Print held-out accuracies after these epochs."""
    print(f"\n| method | {' | '.join(f'after {epoch}' for epoch in epochs)} | solves rejected, in all |")
    print("|---|" + "---|" * (len(epochs) + 1))
    for method in methods:
        mine = [row for row in rows if row["method"] == method]
        cells = [[row["scores"][epoch - 1] for row in mine] for epoch in epochs]
        figures = " | ".join(f"{np.mean(cell):.1f} ± {np.std(cell, ddof=1):.1f}" for cell in cells)
        print(f"| {method} | {figures} | {sum(row['rejections'] for row in mine)} |")


def main() -> None:
    """Run what is missing, print the tables."""
    options: argparse.ArgumentParser = parser(__file__, __doc__, data=False)
    args = options.parse_args()
    names, runs = ("task", "method", "seed"), itertools.product(["resnet"], METHODS, SEEDS)
    rows = missing(args.out, names, runs, lambda task, method, seed: resnet(method, seed))
    print(cost())
    table([row for row in rows if row["task"] == "resnet"], METHODS, (1, 2, 4, EPOCHS))
    if args.data_dir is None:
        return
    do = functools.partial(tutorial, args.data_dir)
    runs = itertools.product(["tutorial"], TUTORIAL_METHODS, TUTORIAL_SEEDS)
    rows = missing(args.out, names, runs, lambda task, method, seed: do(method, seed))
    table([row for row in rows if row["task"] == "tutorial"], TUTORIAL_METHODS, (1, 2, TUTORIAL_EPOCHS))


if __name__ == "__main__":
    main()
