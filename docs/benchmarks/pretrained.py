"""Heads on the frozen features of a sentence encoder: solved, and by scikit-learn's logistic regression.

    python docs/benchmarks/pretrained.py --data-dir DIR --weights DIR --cache DIR [--out pretrained.jsonl]

banking77 (77 intents; 10,003 training and 3,080 test queries) through MiniLM, once; the encoder is that of
``examples/pretrained/text.py``. Heads are fitted to all rows, and to ten of each class (770), ten draws. Every fit is
one row of the file, written when it is done; rows that are there are not run again. Ends with the table;
``--out docs/benchmarks/pretrained.jsonl.gz`` prints that of the kept rows.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from rows import kept, missing, parser
from sklearn.linear_model import LogisticRegression, LogisticRegressionCV
from tokenizers import Tokenizer

import cronos_flax as cf

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "pretrained"))
import text as example

HIDDEN, CLASSES, SHOTS, DRAWS = 512, 77, 10, range(10)
STRENGTHS = np.logspace(-1, 3, 5)
SOLVED, PATH, SEARCH, PLAIN = "solved head", "solved head, β chosen", "logistic, C chosen", "logistic, C = 1"
FOLDS = "solved head, β chosen over five folds"
ALL_ROWS = {PLAIN: (0,), SEARCH: (0,), SOLVED: (0, 1, 2)}  # seeds; logistic regression has none
calls: dict[tuple[int, str], int] = {}


def features_of(weights: Path, data_dir: Path, cache: Path, split: str) -> cf.Features:
    """Of all texts of a split."""
    config = json.loads((weights / "config.json").read_text())
    encoder = example.load(weights / "model.safetensors", config)
    tokenizer = Tokenizer.from_file(str(weights / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(example.LONGEST)
    texts, labels = example.banking(data_dir, split)
    batches = example.by_length([text.ids for text in tokenizer.encode_batch(texts)], labels)
    size = {"hidden": HIDDEN, "features": CLASSES, "in_features": config["hidden_size"]}
    model = cf.nnx.graft(encoder, **size, pool=example.sentence, rngs=nnx.Rngs(0))
    head = cf.nnx.find_head(model, *batches[0][:2])
    return cf.gather_features(head, model, batches, unpack=example.unpack, cache=cache / split)


def solved(train: cf.Features, draw: int, **settings: Any) -> Callable[[np.ndarray], np.ndarray]:
    """A function of features that gives labels."""
    solver = cf.Cronos(loss="softmax", **settings)
    solution = solver.solve(train.X, train.y, hidden=HIDDEN, num_classes=CLASSES, key=jax.random.key(draw))
    jax.block_until_ready(solution.params)
    return lambda X: np.asarray(cf.predict(solution.params, X)).argmax(1)


def searched(train: Any, strengths: np.ndarray = STRENGTHS) -> Callable[[np.ndarray], np.ndarray]:
    """The same by logistic regression, its strength chosen by three-fold cross-validation."""
    choice = {"Cs": strengths, "cv": 3, "l1_ratios": (0,), "scoring": "accuracy", "use_legacy_attributes": False}
    return LogisticRegressionCV(**choice, max_iter=1000).fit(train.X, train.y).predict


FITS: dict[str, Callable[[cf.Features, int], Callable[[np.ndarray], np.ndarray]]] = {
    SOLVED: solved,
    PATH: lambda train, draw: solved(train, draw, beta="path"),
    FOLDS: lambda train, draw: solved(train, draw, beta="path", folds=5),
    SEARCH: lambda train, _: searched(train),
    PLAIN: lambda train, _: LogisticRegression(max_iter=1000).fit(train.X, train.y).predict,
}


def measured(train: cf.Features, test: cf.Features, shots: int, draw: int, method: str) -> dict[str, Any]:
    """Test accuracy, CPU seconds of the fit, and how many fits of the kind this process had done before."""
    if shots:
        order = np.random.default_rng(draw).permutation(len(train.y))
        train = train.take(np.concatenate([order[train.y[order] == label][:shots] for label in range(CLASSES)]))
    began, before = time.process_time(), calls.get((shots, method), 0)
    predict = FITS[method](train, draw)
    seconds = time.process_time() - began
    calls[shots, method] = before + 1
    return {"accuracy": 100 * float(np.mean(predict(test.X) == test.y)), "cpu": seconds, "before": before}


def table(rows: list[dict[str, Any]]) -> None:
    """Print mean and standard deviation of the accuracy, and CPU seconds of the first fit and of later ones."""
    print(
        "| rows | method | fits | test accuracy, % | CPU s, first fit | CPU s, later fits |\n|---|---|---|---|---|---|"
    )
    for shots, method in dict.fromkeys((row["shots"], row["method"]) for row in rows):
        own = [row for row in rows if (row["shots"], row["method"]) == (shots, method)]
        scores, (first, later) = (
            [row["accuracy"] for row in own],
            ([row["cpu"] for row in own if (row["before"] > 0) == late] for late in (False, True)),
        )
        spread = f" ± {np.std(scores, ddof=1):.2f}" if len(scores) > 1 else ""
        seconds = (f"{np.mean(some):.1f}" if some else "–" for some in (first, later))
        size = f"{shots} a class" if shots else "all"
        print(f"| {size} | {method} | {len(own)} | {np.mean(scores):.2f}{spread} | {' | '.join(seconds)} |")
    print("\n10 a class, paired by draw, ± standard error")
    of = {(row["method"], row["draw"]): row["accuracy"] for row in rows if row["shots"]}
    for one, other in ((SOLVED, SEARCH), (PATH, SEARCH), (SOLVED, PATH), (FOLDS, PATH)):
        apart = [of[one, draw] - of[other, draw] for draw in DRAWS if {(one, draw), (other, draw)} <= of.keys()]
        if len(apart) > 1:
            error = np.std(apart, ddof=1) / np.sqrt(len(apart))
            print(f"{one} less {other}: {np.mean(apart):+.2f} ± {error:.2f}; least {min(apart):+.2f}")


def main() -> None:
    """Run what is missing, print the table."""
    args = parser(__file__, __doc__, data=False, pretrained=True).parse_args()
    rows = kept(args.out)
    if args.weights is not None:
        train, test = (features_of(args.weights, args.data_dir, args.cache, split) for split in ("train", "test"))
        wanted = [(SHOTS, draw, method) for method in (PLAIN, SEARCH, SOLVED) for draw in DRAWS]
        wanted += [(0, draw, method) for method, draws in ALL_ROWS.items() for draw in draws]
        wanted += [(SHOTS, draw, method) for method in (PATH, FOLDS) for draw in DRAWS]
        rows = missing(args.out, ("shots", "draw", "method"), wanted, lambda *key: measured(train, test, *key))
    table(rows)


if __name__ == "__main__":
    main()
