"""Where a solve without `tol` ends, against the limit: accuracy, regularised loss, CPU seconds.

    python docs/benchmarks/stopping.py --data-dir DIR --features banking77.npz --out stopping.jsonl

Every set is one row of the file, written as soon as it is measured; sets that are there already are not run again.
``DIR`` holds a prepared fashion_mnist. The file of features has X_train, y_train, X_test and y_test; without these that
set is left out. Ends with the table of stopping.md; ``--out docs/benchmarks/stopping.jsonl.gz`` alone prints that of
the kept rows.
"""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from rows import missing, parser
from sets import score
from sklearn import datasets

import cronos_flax as cf
from cronos_flax.compare.data import load_tfds

LIMIT = {"tol": 1e-3}  # 500 iterations at most
MOST = {"banking77 features": 60, "planted 100 classes": 100}  # iterations of the limit where they cost much
LONG = 30  # CPU seconds of a first solve above which there is no second
SHIPPED = ("digits", "wine", "iris", "diabetes")


class Sets(NamedTuple):
    """Rows to fit and rows to test on; y are labels, or floats for regression."""

    X: np.ndarray
    y: np.ndarray
    X_test: np.ndarray
    y_test: np.ndarray
    hidden: int


def split(X: np.ndarray, y: np.ndarray, hidden: int = 64) -> Sets:
    """Three quarters to fit, one to test on; columns standardised by the rows to fit."""
    order = np.random.default_rng(0).permutation(len(X))
    X, y, k = X[order], y[order], 3 * len(X) // 4
    X = ((X - X[:k].mean(axis=0)) / (X[:k].std(axis=0) + 1e-6)).astype("float32")
    y = y.astype("int32") if np.issubdtype(y.dtype, np.integer) else ((y - y.mean()) / y.std()).astype("float32")
    return Sets(X[:k], y[:k], X[k:], y[k:], hidden)


def shipped(name: str) -> Sets:
    """A set of scikit-learn."""
    return split(*getattr(datasets, f"load_{name}")(return_X_y=True))


def hastie() -> Sets:
    """Two classes, inside and outside of a sphere in ten dimensions."""
    X, y = datasets.make_hastie_10_2(8000, random_state=0)
    return split(X, (y > 0).astype(int))


def planted() -> Sets:
    """A hundred classes by a random network, on features of decaying spectrum."""
    rng = np.random.default_rng(0)
    X = rng.normal(size=(12_000, 128)) / np.sqrt(1 + np.arange(128))
    hidden = np.maximum(X @ rng.normal(size=(128, 64)), 0)
    return split(X, (hidden @ rng.normal(size=(64, 100))).argmax(axis=1), 256)


def fashion(data_dir: Path) -> Sets:
    """6,000 images in ten classes, and the test images."""
    (X, y), (X_test, y_test) = (load_tfds("fashion_mnist", part, data_dir) for part in ("train", "test"))
    X, X_test = (rows.reshape(len(rows), -1).astype("float32") / 255 for rows in (X, X_test))
    return Sets(X[:6000], y[:6000].astype("int32"), X_test, y_test.astype("int32"), 64)


def features(path: Path) -> Sets:
    """Cached features."""
    with np.load(path) as file:
        X, y, X_test, y_test = (file[name] for name in ("X_train", "y_train", "X_test", "y_test"))
    return Sets(X, y.astype("int32"), X_test, y_test.astype("int32"), 512)


def solved(data: Sets, **settings: Any) -> dict[str, float]:
    """The figures of one solve; its seconds are those of the second, which compiles nothing."""
    solver = cf.Cronos(loss="softmax" if np.issubdtype(data.y.dtype, np.integer) else "squared", **settings)
    cpu = 0.0
    for _ in range(2):
        if cpu < LONG:
            start = time.process_time()
            solution = jax.block_until_ready(solver.solve(data.X, data.y, hidden=data.hidden))
            cpu = time.process_time() - start
    stats = solution.stats
    return {
        "iterations": int(stats.iterations),
        "CPU s": cpu,
        "objective": float(stats.objective),
        "null": float(stats.null_loss),
        "score": score(np.asarray(cf.predict(solution.params, data.X_test)), data.y_test),
    }


def main() -> None:
    """Run what is missing, print the table."""
    made = parser(__file__, __doc__, data=False)
    made.add_argument("--features", type=Path, help=".npz of MiniLM features of banking77")
    args = made.parse_args()
    cases: dict[str, Callable[[], Sets]] = {
        **{name: partial(shipped, name) for name in SHIPPED},
        "friedman1": lambda: split(*datasets.make_friedman1(8000, noise=1.0, random_state=0)),
        "hastie": hastie,
        "gaussian quantiles": lambda: split(
            *datasets.make_gaussian_quantiles(n_samples=8000, n_features=20, n_classes=5, random_state=0)
        ),
        **({"fashion_mnist": lambda: fashion(args.data_dir)} if args.data_dir else {}),
        "planted 100 classes": planted,
        **({"banking77 features": lambda: features(args.features)} if args.features else {}),
    }

    def do(name: str) -> dict[str, Any]:
        data = cases[name]()
        shape = {"n": len(data.X), "p": data.X.shape[1], "m": data.hidden}
        return {**shape, "stop": solved(data), "limit": solved(data, **LIMIT, max_iters=MOST.get(name))}

    rows = missing(args.out, ("set",), ((name,) for name in cases), do)
    print("| set | n × p, m | iterations | CPU s | loss | score |\n|---|---|---|---|---|---|")
    for row in rows:
        stop, limit = row["stop"], row["limit"]
        cells = (f"{stop[name]:{form}} / {limit[name]:{form}}" for name, form in FORMS.items())
        print(f"| {row['set']} | {row['n']:,} × {row['p']}, {row['m']} | {' | '.join(cells)} |")


FORMS = {"iterations": "d", "CPU s": ".3g", "objective": ".4f", "score": ".2f"}  # of the columns

if __name__ == "__main__":
    main()
