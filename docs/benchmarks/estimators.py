"""Should the estimators choose β on held-out rows? Both ways on sets of their own, which no other page reports.

    python docs/benchmarks/estimators.py --data-dir DIR [--out estimators.jsonl]

The default of ``CronosClassifier`` and ``CronosRegressor`` was chosen by this table. Each set is split five times at
random, three quarters to fit. Each fit is one row of the file, written when it is done; rows that are there are not run
again. ``--out docs/benchmarks/estimators.jsonl.gz`` alone prints the table of the kept rows.
"""

import functools
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from rows import kept, missing, parser
from sklearn import datasets

from cronos_flax.sklearn import CronosClassifier, CronosRegressor

FIXED, PATH = "a thousandth", "path"
SPLITS = range(5)
Set = tuple[np.ndarray, np.ndarray]


def classes(n: int, p: int, **settings: Any) -> Set:
    """Clusters of several classes, by scikit-learn's generator."""
    return datasets.make_classification(n, p, random_state=5, **settings)


def above_median(noise: float) -> Set:
    """Whether a noisy function of five of ten features is above its median."""
    X, y = datasets.make_friedman1(2000, noise=noise, random_state=5)
    return X, (y > np.median(y)).astype(int)


def parity(n: int, p: int) -> Set:
    """Whether the signs of three features have an even number of minuses; one label in twenty is another."""
    rng = np.random.default_rng(5)
    X = rng.normal(size=(n, p))
    return X, (np.prod(X[:, :3], axis=1) > 0).astype(int) ^ (rng.random(n) < 0.05)


def planted(n: int, p: int, m: int, C: int) -> Set:
    """Classes of a random network with m neurons."""
    rng = np.random.default_rng(5)
    X = rng.normal(size=(n, p)) / np.sqrt(1 + np.arange(p))
    return X, (np.maximum(X @ rng.normal(size=(p, m)), 0) @ rng.normal(size=(m, C))).argmax(axis=1)


def pixels(args: Any) -> Set:
    """Of 2,000 images of planes and cars."""
    from cronos_flax.compare.data import load_tfds

    X, y = load_tfds("cifar10_airplane_automobile", "train[2000:4000]", args.data_dir)
    return X.reshape(len(X), -1), y


CLASSES: dict[str, Callable[[Any], Set]] = {
    "clusters, 8 classes, a tenth of labels random": lambda _: classes(
        4000, 30, n_informative=12, n_classes=8, flip_y=0.1
    ),
    "clusters, 20 classes": lambda _: classes(6000, 40, n_informative=20, n_classes=20),
    "clusters, 2 classes, hardly apart": lambda _: classes(500, 20, n_informative=5, class_sep=0.5),
    "clusters, 2 classes, few rows": lambda _: classes(200, 10, n_informative=5, flip_y=0),
    "circles": lambda _: datasets.make_circles(1000, noise=0.2, factor=0.5, random_state=5),
    "blobs, 6 classes": lambda _: datasets.make_blobs(2000, 10, centers=6, cluster_std=6, random_state=5),
    "friedman1 above its median, noise 1": lambda _: above_median(1.0),
    "friedman1 above its median, noise 5": lambda _: above_median(5.0),
    "parity of three signs": lambda _: parity(3000, 10),
    "planted, 30 classes": lambda _: planted(4000, 64, 64, 30),
    "planes and cars, pixels": pixels,
}
VALUES: dict[str, Callable[[Any], Set]] = {
    "friedman1, noise 1": lambda _: datasets.make_friedman1(1000, noise=1.0, random_state=5),
    "friedman1, noise 5": lambda _: datasets.make_friedman1(1000, noise=5.0, random_state=5),
    "friedman2, noise 100": lambda _: datasets.make_friedman2(1000, noise=100.0, random_state=5),
    "friedman3, no noise": lambda _: datasets.make_friedman3(1000, random_state=5),
    "linear, noise 50": lambda _: datasets.make_regression(300, 30, n_informative=10, noise=50.0, random_state=5),
    "linear, no noise": lambda _: datasets.make_regression(300, 30, n_informative=10, random_state=5),
}
SETS = {**CLASSES, **VALUES}


@functools.cache
def made(name: str, directory: Any) -> Set:
    """A set by its name."""

    class Args:
        data_dir = directory

    return SETS[name](Args)


def measured(args: Any, name: str, beta: str, seed: int) -> dict[str, Any]:
    """The score on the rows that are not fitted, in % (100 R² of values), and the CPU seconds of a second fit."""
    X, y = made(name, args.data_dir)
    fit, test = np.split(np.random.default_rng(seed).permutation(len(y)), [3 * len(y) // 4])
    kind, given = CronosClassifier if name in CLASSES else CronosRegressor, None if beta == FIXED else beta
    for _ in range(2):  # the second compiles nothing
        start = time.process_time()
        estimator = kind(beta=given, random_state=seed).fit(X[fit], y[fit])
        cpu = time.process_time() - start
    return {"score": 100 * float(estimator.score(X[test], y[test])), "cpu": cpu, "n": len(fit), "p": X.shape[1]}


def table(rows: list[dict[str, Any]]) -> None:
    """Scores of both, their difference paired by split ± its standard error, and CPU seconds."""
    print(f"| set | n × p | {FIXED} | {PATH} | {PATH} less {FIXED} | CPU s |\n|---|---|---|---|---|---|")
    of = {(row["set"], row["beta"], row["seed"]): row for row in rows}
    for name in SETS:
        each = {beta: [of[name, beta, seed] for seed in SPLITS if (name, beta, seed) in of] for beta in (FIXED, PATH)}
        if any(len(found) < len(SPLITS) for found in each.values()):
            continue
        scores = {beta: np.array([row["score"] for row in found]) for beta, found in each.items()}
        cpu = [np.mean([row["cpu"] for row in each[beta]]) for beta in (FIXED, PATH)]
        less, first = scores[PATH] - scores[FIXED], each[FIXED][0]
        error = less.std(ddof=1) / np.sqrt(len(less))
        means = f"{scores[FIXED].mean():.1f} | {scores[PATH].mean():.1f} | {less.mean():+.1f} ± {error:.1f}"
        print(f"| {name} | {first['n']:,} × {first['p']:,} | {means} | {cpu[0]:.2f}, {cpu[1]:.2f} |")


def main() -> None:
    """Run what is missing, print the table."""
    args = parser(__file__, __doc__, data=False).parse_args()
    rows = kept(args.out)
    if args.data_dir is not None:
        wanted = [(name, beta, seed) for name in SETS for seed in SPLITS for beta in (FIXED, PATH)]
        rows = missing(args.out, ("set", "beta", "seed"), wanted, functools.partial(measured, args))
    table(rows)


if __name__ == "__main__":
    main()
