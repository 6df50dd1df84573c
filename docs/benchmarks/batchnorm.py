"""CRONOS-AM with BatchNorm: solves on the features of the running statistics, or on those that gradients see.

    python docs/benchmarks/batchnorm.py --out batchnorm.jsonl

The ResNet of ``examples/loops/resnet.py`` on scikit-learn's digits: 1,400 rows to fit, 397 held out, 10 epochs of
batches of 100, Adam at 1e-3 for the backbone, and alone at three rates. Every run is a row of the file, written when
it is done; rows that are there are not run again. Ends with the table.
"""

import itertools
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from rows import missing, parser
from sklearn.datasets import load_digits

import cronos_flax as cf
from cronos_flax.compare.methods import BaselineState

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "loops"))
from resnet import ResNet

SEEDS = (31, 32, 33)
MODES = {
    "running statistics": {"train": False},
    "those of training": {"train": True, "mutable": ["batch_stats"]},
}
METHODS = {
    **{f"Adam {rate:g}": (rate, None) for rate in (3e-4, 1e-3, 3e-3)},
    **{f"CRONOS-AM, {mode}": (1e-3, how) for mode, how in MODES.items()},
}
EPOCHS = 10


def trained(method: str, seed: int) -> dict[str, Any]:
    """Train once; the figures of the row."""
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
        head = cf.find_head(model, variables, x[:64], **how)
        state = cf.CronosTrainState.create(**made, head=head, solver=cf.Cronos(loss="softmax"))
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


def main() -> None:
    """Run what is missing, print the table."""
    args = parser(__file__, __doc__).parse_args()
    rows = missing(
        args.out, ("method", "seed"), ((method, seed) for seed, method in itertools.product(SEEDS, METHODS)), trained
    )
    print(
        "| method | after 1 epoch | after 2 | after 4 | after 10 | solves rejected, in all |\n|---|---|---|---|---|---|"
    )
    for method in METHODS:
        mine = [row for row in rows if row["method"] == method]
        cells = [[row["scores"][epoch - 1] for row in mine] for epoch in (1, 2, 4, EPOCHS)]
        figures = " | ".join(f"{np.mean(cell):.1f} ± {np.std(cell, ddof=1):.1f}" for cell in cells)
        print(f"| {method} | {figures} | {sum(row['rejections'] for row in mine)} |")


if __name__ == "__main__":
    main()
