"""Where the default of ``beta=None`` comes from: held-out score against the ratio of β to β_max.

    python docs/benchmarks/beta.py [--data-dir DIR] [--weights DIR] [--out beta.jsonl] [--picture beta.png]

Seven sets (four without ``--data-dir``), three seeds, the squared loss (on signed targets) and softmax, 64 neurons,
``cf.Cronos``'s defaults otherwise, features as they are; beside the ratios, ``beta="path"``, with a fifth of the rows
held out (of wine, which has fewer than 300 rows, each of five folds) and over five folds. Every solve is one row of
the file, written as soon as it is done; rows that are there are not run again. Ends with a table, means and standard
deviations over seeds, and draws it.
"""

import argparse
import functools
import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from rows import missing, parser
from sets import Split, score, splits

import cronos_flax as cf
from cronos_flax._solver.beta_max import user_beta_max
from cronos_flax._solver.cronos import BETA_RATIO
from cronos_flax._solver.losses import loss_of
from cronos_flax.compare.tables import markdown

RATIOS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
# In the place of a ratio: ``beta="path"``, which looks at the rows to fit only; with a fifth held out, and over folds.
PATH, FOLDS = "path", "path, five folds"
TRIED = (*RATIOS, PATH, FOLDS)
SEEDS = (0, 1, 2)
HIDDEN = 64


def targets(split: Split, loss: str) -> np.ndarray:
    """As the loss takes them."""
    if split.classes is None or loss == "softmax":
        return split.y
    return np.asarray(cf.signed_targets(split.y, split.classes))


def beta_max(split: Split, loss: str) -> float:
    """In the user's units."""
    made = loss_of(loss)
    y = made.targets(jnp.asarray(targets(split, loss)), split.classes)
    arrays = jnp.asarray(split.X), y, jnp.ones(len(y))
    return float(user_beta_max(*arrays, loss=made, hidden_bias=True, output_bias=True))


def solved(split: Split, loss: str, ratio: float | str, largest: Callable[[str], float]) -> dict:
    """Solve once; the figures of the row."""
    beta: Any = PATH if isinstance(ratio, str) else ratio * largest(loss)
    start = time.perf_counter()
    solver = cf.Cronos(loss=loss, beta=beta, folds=5 if ratio == FOLDS else None)
    solution = solver.solve(split.X, targets(split, loss), hidden=HIDDEN, key=jax.random.key(split.seed))
    found = score(np.asarray(cf.predict(solution.params, split.X_held)), split.y_held)
    active, seconds = int(solution.stats.active_neurons), time.perf_counter() - start
    return {"score": found, "active": active, "seconds": seconds}


def run(args: argparse.Namespace) -> list[dict]:
    """Solve what is missing in the file; returns all rows."""
    rows: list[dict] = []
    for split in splits(args.data_dir, args.weights, SEEDS):
        largest = functools.cache(functools.partial(beta_max, split))
        losses = ("squared",) if split.classes is None else ("squared", "softmax")
        rows = missing(
            args.out,
            ("set", "loss", "seed", "ratio"),
            itertools.product((split.name,), losses, (split.seed,), TRIED),
            lambda name, loss, seed, ratio, split=split, largest=largest: solved(split, loss, ratio, largest),
        )
    return rows


def curves(rows: list[dict]) -> dict[tuple[str, str], np.ndarray]:
    """Scores ``(ratios and path, seeds)`` of each set and loss."""
    table = {}
    for name, loss in dict.fromkeys((row["set"], row["loss"]) for row in rows):
        scores = {(r["ratio"], r["seed"]): r["score"] for r in rows if (r["set"], r["loss"]) == (name, loss)}
        table[name, loss] = np.array([[scores.get((r, seed), np.nan) for seed in SEEDS] for r in TRIED])
    return table


def main() -> None:
    """Run what is missing, print the tables, draw them."""
    options = parser(__file__, __doc__, data=False, weights=True)
    options.add_argument("--picture", type=Path, default=Path("beta.png"))
    args = options.parse_args()
    table = curves(run(args))
    default = BETA_RATIO
    of_ratios, beside = [], []
    for (name, loss), scores in table.items():
        mean, sd = np.nanmean(scores, axis=1), np.nanstd(scores, axis=1, ddof=1)
        cells = ["–" if np.isnan(m) else f"{m:.2f} ± {s:.2f}" for m, s in zip(mean, sd, strict=True)]
        below = mean[: len(RATIOS)].max() - mean[RATIOS.index(default)]
        of_ratios.append([name, loss, *cells[: len(RATIOS)]])
        beside.append([name, loss, f"{below:.2f}", *cells[len(RATIOS) :]])
    ratios = [f"**{r:g}**" if r == default else f"{r:g}" for r in RATIOS]
    print(*markdown(["set", "loss", *ratios], of_ratios), "", sep="\n")
    print(*markdown(["set", "loss", "default below best", PATH, FOLDS], beside), sep="\n")

    figure, axes = plt.subplots(2, 4, figsize=(13, 6), layout="constrained", sharex=True)
    names = list(dict.fromkeys(name for name, _ in table))
    for axis, name in zip(axes.flat, names, strict=False):
        for loss in ("squared", "softmax"):
            if (name, loss) in table:
                scores = table[name, loss]
                mean, sd = np.nanmean(scores, axis=1), np.nanstd(scores, axis=1, ddof=1)
                axis.errorbar(
                    RATIOS, mean[: len(RATIOS)], sd[: len(RATIOS)], marker="o", markersize=3, capsize=2, label=loss
                )
        axis.axvline(default, color="0.6", linestyle=":", label="default")
        axis.set_title(name.replace(" features of ", " features,\n").replace("cifar10_", "cifar10 "), fontsize=9)
        axis.set_xscale("log")
        axis.ticklabel_format(axis="y", useOffset=False)
    for axis in axes.flat[len(names) :]:
        axis.set_axis_off()
    figure.supxlabel("β / β_max")
    figure.supylabel("held-out accuracy in %, or 100 R² (diabetes)")
    axes.flat[0].legend(fontsize=8)
    figure.savefig(args.picture, dpi=110)


if __name__ == "__main__":
    main()
