"""How little the last ten iterations may bring before a solve without ``tol`` ends: a hundredth, or a 200th.

    python docs/benchmarks/least_gain.py --data-dir DIR [--out least_gain.jsonl]

The default of ``cf.Refreshed(least_gain=)`` was chosen by this table, whose sets are on no other page. Every solve is
one row of the file; rows that are there are not run again. ``--out docs/benchmarks/least_gain.jsonl.gz`` alone prints
the table of the kept rows.
"""

import functools
import time
from typing import Any

import jax
import numpy as np
from rows import kept, missing, parser
from sets import score
from sklearn import datasets
from sklearn.cluster import KMeans
from stopping import Sets, split

import cronos_flax as cf
from cronos_flax.compare.data import load_tfds

GAINS, SEEDS = (0.01, 0.005), range(3)
IMAGES = {  # of TFDS: which rows, clusters in place of classes, neurons
    "clusters of Fashion-MNIST": ("fashion_mnist", "train[20000:29000]", 80, 256),
    "Fashion-MNIST": ("fashion_mnist", "train[30000:42000]", None, 64),
    "clusters of planes and cars": ("cifar10_airplane_automobile", "train[:8000]", 80, 256),
    "planes and cars": ("cifar10_airplane_automobile", "train[4000:8000]", None, 64),
}
PLANTED, GENERATED = "planted, 100 classes", "make_classification, 20 classes"


@functools.cache
def made(name: str, directory: Any) -> Sets:
    """A set by its name; a quarter of its rows is for testing."""
    if name == GENERATED:
        return split(*datasets.make_classification(8000, 40, n_informative=20, n_classes=20, random_state=5), 128)
    if name == PLANTED:
        rng = np.random.default_rng(11)
        X = rng.normal(size=(12_000, 128)) / np.sqrt(1 + np.arange(128))
        hidden = np.maximum(X @ rng.normal(size=(128, 64)), 0)
        y = np.unique((hidden @ rng.normal(size=(64, 100))).argmax(axis=1), return_inverse=True)[1]
        k = 9000
        return Sets(X[:k].astype("float32"), y[:k].astype("int32"), X[k:].astype("float32"), y[k:], 256)
    tfds, part, clusters, hidden = IMAGES[name]
    X, y = load_tfds(tfds, part, directory)
    X = X.reshape(len(X), -1).astype("float32") / 255
    if clusters is not None:
        y = KMeans(clusters, n_init=1, random_state=3).fit_predict(X)
    order = np.random.default_rng(0).permutation(len(X))
    fit, test = np.split(order, [3 * len(X) // 4])
    return Sets(X[fit], y[fit].astype("int32"), X[test], y[test], hidden)


def measured(args: Any, name: str, gain: float, seed: int) -> dict[str, Any]:
    """Test accuracy in %, iterations, and the CPU seconds of a second solve, which compiles nothing."""
    data = made(name, args.data_dir)
    solver = cf.Cronos(loss="softmax", refreshed=cf.Refreshed(least_gain=gain))
    outputs = int(max(data.y.max(), data.y_test.max())) + 1
    for _ in range(2):
        start = time.process_time()
        solution = solver.solve(data.X, data.y, hidden=data.hidden, num_classes=outputs, key=jax.random.key(seed))
        jax.block_until_ready(solution.params)
        cpu = time.process_time() - start
    accuracy = score(np.asarray(cf.predict(solution.params, data.X_test)), data.y_test)
    return {"score": accuracy, "iterations": int(solution.stats.iterations), "cpu": cpu, "n": len(data.X)}


def main() -> None:
    """Run what is missing, print the table."""
    args = parser(__file__, __doc__, data=False).parse_args()
    rows, names = kept(args.out), (*IMAGES, PLANTED, GENERATED)
    if args.data_dir is not None:
        wanted = [(name, gain, seed) for name in names for seed in SEEDS for gain in GAINS]
        rows = missing(args.out, ("set", "gain", "seed"), wanted, functools.partial(measured, args))
    of = {(row["set"], row["gain"], row["seed"]): row for row in rows}
    print("| set | rows | accuracy, a hundredth | a 200th | difference | iterations | CPU s |")
    print("|---|---|---|---|---|---|---|")
    for name in names:
        if any((name, gain, seed) not in of for gain in GAINS for seed in SEEDS):
            continue
        each = {
            part: np.array([[of[name, gain, seed][part] for seed in SEEDS] for gain in GAINS])
            for part in ("score", "iterations", "cpu")
        }
        less = each["score"][1] - each["score"][0]
        means = [each[part].mean(axis=1) for part in each]
        print(
            f"| {name} | {of[name, GAINS[0], 0]['n']:,} | {means[0][0]:.2f} | {means[0][1]:.2f} | {less.mean():+.2f} ± "
            f"{less.std(ddof=1) / np.sqrt(len(less)):.2f} | {means[1][0]:.0f}, {means[1][1]:.0f} | "
            f"{means[2][0]:.2f}, {means[2][1]:.2f} |"
        )


if __name__ == "__main__":
    main()
