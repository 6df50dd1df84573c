"""CronosClassifier and the classifiers of scikit-learn on twelve sets, all with their defaults.

    python docs/benchmarks/tabular.py --data-dir DIR --weights DIR --cache DIR [--out tabular.jsonl]

Each set is split five times at random, three quarters to fit. Each method does the five splits of a set in a process
of its own, on one core. Each set and method is one row of the file, written when it is done; rows that are there are
not run again. The data are fashion_mnist, cifar10_airplane_automobile, banking77 and noisy_ag_news, prepared by TFDS;
the weights ``minilm`` and ``resnet20_cifar10.safetensors``. Sets, once made, are kept in ``--cache``. Ends with the
tables of tabular.md; ``--out docs/benchmarks/tabular.jsonl.gz`` alone prints those of the kept rows.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rows import kept, missing, parser

ALONE = """
import json, os, sys, time, warnings
os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
import numpy as np
data, imports, maker = sys.argv[1:]
start = time.process_time()
exec(imports)
seconds = [time.process_time() - start]
warnings.simplefilter("ignore")
with np.load(data) as file:
    X, y = file["X"], file["y"]
scores = []
for seed in range(5):
    order = np.random.default_rng(seed).permutation(len(y))
    fit, test = np.split(order, [3 * len(y) // 4])
    start = time.process_time()
    predicted = eval(maker).fit(X[fit], y[fit]).predict(X[test])
    seconds.append(time.process_time() - start)
    scores.append(100 * float(np.mean(predicted == y[test])))
print(json.dumps({"seconds": seconds, "scores": scores}))
"""
SCALED = (
    "from sklearn.pipeline import make_pipeline; from sklearn.preprocessing import StandardScaler; "
    "from sklearn.{} import {}"
)
FIXED = "CronosClassifier, beta=None"
OURS = "from cronos_flax.sklearn import CronosClassifier"
MLP = SCALED.format("neural_network", "MLPClassifier")
METHODS = {  # what is imported, and what makes the estimator
    "CronosClassifier": (OURS, "CronosClassifier(random_state=seed)"),
    "SVC": (SCALED.format("svm", "SVC"), "make_pipeline(StandardScaler(), SVC())"),
    "MLPClassifier": (MLP, "make_pipeline(StandardScaler(), MLPClassifier(random_state=seed))"),
    "MLP, early stopping": (
        MLP,
        "make_pipeline(StandardScaler(), MLPClassifier(early_stopping=True, random_state=seed))",
    ),
    "HistGradientBoosting": (
        "from sklearn.ensemble import HistGradientBoostingClassifier",
        "HistGradientBoostingClassifier(random_state=seed)",
    ),
    "LogisticRegressionCV": (
        SCALED.format("linear_model", "LogisticRegressionCV"),
        "make_pipeline(StandardScaler(), LogisticRegressionCV())",
    ),
    FIXED: (OURS, "CronosClassifier(beta=None, random_state=seed)"),
}
DEFAULTS = [name for name in METHODS if name != FIXED]
Set = tuple[np.ndarray, np.ndarray]


def made(name: str, n: int, **settings: Any) -> Set:
    """A set of one of scikit-learn's generators."""
    from sklearn import datasets

    return getattr(datasets, f"make_{name}")(n_samples=n, random_state=0, **settings)


def images(name: str, rows: int, args: Any) -> Set:
    """The first images of a set of TFDS and their labels."""
    from cronos_flax.compare.data import load_tfds

    return load_tfds(name, f"train[:{rows}]", args.data_dir)


def pixels(args: Any) -> Set:
    """Of 1,000 images of Fashion-MNIST."""
    X, y = images("fashion_mnist", 1000, args)
    return X.reshape(len(X), -1), y


def planes(args: Any) -> Set:
    """ResNet-20 features of 2,000 planes and cars of CIFAR-10."""
    from resnet import resnet20_features

    X, y = images("cifar10_airplane_automobile", 2000, args)
    return resnet20_features(args.weights / "resnet20_cifar10.safetensors", X), y


def sentences(name: str, most: int, classes: int, args: Any) -> Set:
    """MiniLM features of the first texts of the first classes, at most so many."""
    import tensorflow_datasets as tfds
    from tokenizers import Tokenizer

    sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "pretrained"))
    import text as example

    source = tfds.data_source(name, split="train", data_dir=str(args.data_dir))
    examples = source.__getitems__(range(len(source)))
    field = next(key for key, value in examples[0].items() if isinstance(value, bytes))
    examples = [example for example in examples if example["label"] < classes]
    order = np.random.default_rng(0).permutation(len(examples))[:most]
    folder = args.weights / "minilm"
    encoder = example.load(folder / "model.safetensors", json.loads((folder / "config.json").read_text()))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(example.LONGEST)
    texts = [examples[i][field].decode() for i in order]
    batches = example.by_length(
        [row.ids for row in tokenizer.encode_batch(texts)], np.array([examples[i]["label"] for i in order])
    )
    X = [np.asarray(example.sentence(encoder(ids, mask), ids, mask)) for ids, mask, _ in batches]
    return np.concatenate(X), np.concatenate([labels for *_, labels in batches])


def shipped(name: str) -> Set:
    """A set that is part of scikit-learn."""
    from sklearn import datasets

    return getattr(datasets, f"load_{name}")(return_X_y=True)


def cases(args: Any) -> dict[str, Callable[[], Set]]:
    """The twelve sets."""
    return {
        **{name: partial(shipped, name) for name in ("iris", "wine", "breast_cancer", "digits")},
        "make_moons": lambda: made("moons", 1000, noise=0.3),
        "make_hastie_10_2": lambda: made("hastie_10_2", 4000),
        "make_gaussian_quantiles": lambda: made("gaussian_quantiles", 4000, n_features=20, n_classes=5),
        "make_classification": lambda: made("classification", 2000, n_features=20, n_informative=10, n_classes=4),
        "planes or cars, ResNet-20": partial(planes, args),
        "banking77, 10 intents, MiniLM": partial(sentences, "banking77", 1000, 10, args),
        "noisy_ag_news, MiniLM": partial(sentences, "noisy_ag_news", 1500, 4, args),
        "fashion_mnist, pixels": partial(pixels, args),
    }


def file_of(name: str, args: Any) -> Path:
    """The file of a set, made if it is not there."""
    path = args.cache / f"{name.replace(', ', '-').replace(' ', '_')}.npz"
    if not path.exists():
        X, y = cases(args)[name]()
        np.savez(path, X=X.astype("float64"), y=y)
    return path


def measured(args: Any, name: str, method: str) -> dict[str, Any]:
    """The size of a set, seconds of the import and of each fit with its predictions, and test accuracies."""
    path = file_of(name, args)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("JAX_")}
    environment |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-c", ALONE, str(path), *METHODS[method]]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    with np.load(path) as file:
        (n, p), classes = file["X"].shape, len(np.unique(file["y"]))
    return {"n": n, "p": p, "classes": classes, **json.loads(run.stdout)}


def ranks(values: np.ndarray) -> np.ndarray:
    """Of the columns of each row, 1 for the least; equal ones share the mean."""
    less = (values[:, :, None] > values[:, None, :]).sum(axis=2)
    return less + (1 + (values[:, :, None] == values[:, None, :]).sum(axis=2)) / 2


def line(*cells: Any) -> None:
    """A row of a table."""
    print(f"| {' | '.join(map(str, cells))} |")


def tables(rows: list[dict[str, Any]]) -> None:
    """Print accuracies, seconds, and mean ranks, of the sets that all methods have done."""
    of = {(row["set"], row["method"]): row for row in rows}
    names = [name for name in dict.fromkeys(row["set"] for row in rows) if all((name, m) in of for m in METHODS)]

    def table(cell: Callable[[dict[str, Any]], str]) -> None:
        line("set", "n × p, classes", *METHODS)
        line(*["---"] * (2 + len(METHODS)))
        for name in names:
            row = of[name, "CronosClassifier"]
            line(name, f"{row['n']:,} × {row['p']}, {row['classes']}", *(cell(of[name, m]) for m in METHODS))
        print()

    table(lambda row: f"{np.mean(row['scores']):.1f}")
    table(lambda row: f"{sum(row['seconds']):.1f}")
    line("method", "rank in accuracy", "mean accuracy, %", "rank in seconds", "import", "first fit", "later fits")
    line(*["---"] * 7)
    means = {m: [np.mean(of[name, m]["scores"]) for name in names] for m in METHODS}
    totals = {m: [sum(of[name, m]["seconds"]) for name in names] for m in METHODS}
    for method in METHODS:
        field = DEFAULTS if method in DEFAULTS else [method, *DEFAULTS[1:]]
        accurate = ranks(-np.round([means[m] for m in field], 6).T).mean(axis=0)[field.index(method)]
        fast = ranks(np.array([totals[m] for m in field]).T).mean(axis=0)[field.index(method)]
        seconds = np.array([of[name, method]["seconds"] for name in names]).mean(axis=0)
        parts = (f"{value:.2f}" for value in (seconds[0], seconds[1], seconds[2:].mean()))
        line(method, f"{accurate:.2f}", f"{np.mean(means[method]):.2f}", f"{fast:.2f}", *parts)
    real = np.array([[means[m][i] for m in DEFAULTS] for i, name in enumerate(names) if not name.startswith("make_")])
    print("\nranks in accuracy on the sets that are not made")
    print(
        *(f"{m} {rank:.2f}" for m, rank in zip(DEFAULTS, ranks(-np.round(real, 6)).mean(axis=0), strict=True)), sep=", "
    )
    for other in list(METHODS)[1:]:
        print(f"\nCronosClassifier less {other}, paired by split, ± standard error")
        for name in names:
            apart = np.subtract(of[name, "CronosClassifier"]["scores"], of[name, other]["scores"])
            print(f"{name} {apart.mean():+.2f} ± {apart.std(ddof=1) / np.sqrt(len(apart)):.2f}")


def main() -> None:
    """Run what is missing, print the tables."""
    args = parser(__file__, __doc__, data=False, pretrained=True).parse_args()
    rows = kept(args.out)
    if args.cache is not None:
        others_first = sorted(METHODS, key=lambda method: method.startswith("Cronos"))
        wanted = [(name, method) for method in others_first for name in cases(args)]
        rows = missing(args.out, ("set", "method"), wanted, partial(measured, args))
    tables(rows)


if __name__ == "__main__":
    main()
