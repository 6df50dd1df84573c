"""Remedies for wrong labels on sentence features: people's mistakes, and the same mistakes dealt out at random.

    python docs/benchmarks/label_noise.py --data-dir DIR --weights DIR --cache DIR [--out label_noise.jsonl]
    python docs/benchmarks/label_noise.py --out docs/benchmarks/label_noise.jsonl.gz  # the tables of kept rows

The methods are those of ``examples/neighbours/wrong_labels.py``, on MiniLM's features of noisy_ag_news. Three kinds of
labels: *people's*; *shuffled*, the people's labels dealt out anew among the texts of one true class, so that the
matrix of mistakes is the same and no mistake has to do with its text; and *true*. Five draws of 3,000 texts to fit and
2,000 others to choose on, whose labels are of the same kind; 7,600 test texts with true labels. Each method with all
its settings is one row of the file, written when it is done; rows that are there are not run again.
"""

import functools
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from rows import Row, kept, missing, parser

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "neighbours"))
import wrong_labels as example
from wrong_labels import Fit, Grids, Rows

PEOPLE, SHUFFLED, TRUE = "people's", "shuffled", "true"
DRAWS = range(5)
GRIDS = Grids(ratios=(0.1, 0.03), smoothed=(0.3, 0.5), deltas=(0.1, 1.0), shares=(0.1, 0.2))
PLAIN = ("cross entropy", "logistic regression")
KNOWN = "forward, matrix known"
REMEDIES = ("smoothing", "huber", "hinge", "forward", KNOWN, "trimmed", "logistic, trimmed")
names = ("labels", "method", "draw")


def wanted() -> Iterable[tuple[str, str, int]]:
    """The key of every row; those that others choose by come first."""
    for draw in DRAWS:
        for labels in (PEOPLE, SHUFFLED, TRUE):
            methods = PLAIN if labels == TRUE else (*PLAIN, *REMEDIES)
            yield from ((labels, method, draw) for method in methods)


def shuffled(rows: Rows) -> Rows:
    """The given labels dealt out anew among the rows of each true class."""
    given, rng = rows.given.copy(), np.random.default_rng(0)
    for label in np.unique(rows.true):
        (there,) = np.nonzero(rows.true == label)
        given[there] = rng.permutation(given[there])
    return rows._replace(given=given)


def split(labels: str, draw: int, cache: Path) -> list[Rows]:
    """Rows to fit, to choose on, and test rows."""
    fit, held, test = example.news(cache, draw)
    if labels == TRUE:
        return [fit._replace(given=fit.true), held._replace(given=held.true), test]
    return [shuffled(fit), shuffled(held), test] if labels == SHUFFLED else [fit, held, test]


def counted(rows: Rows) -> np.ndarray:
    """The matrix T: the share of each given label among the rows of each true class."""
    counts = np.zeros((rows.true.max() + 1,) * 2)
    np.add.at(counts, (rows.true, rows.given), 1)
    return counts / counts.sum(axis=1, keepdims=True)


def best(settings: dict[str, list[float]], by: int = 0) -> str:
    """The setting with the best held-out accuracy, or (``by=1``) the best test accuracy."""
    return max(settings, key=lambda name: settings[name][by])


@functools.lru_cache(maxsize=1)
def anchored(labels: str, draw: int, ratio: float, cache: Path) -> np.ndarray:
    """The matrix T of anchor rows, by a head of cross entropy."""
    fit, *_ = split(labels, draw, cache)
    return example.matrix(
        np.exp(example.solved("softmax", ratio, example.probabilities)(fit.x, fit.given, None)(fit.x))
    )


def run(labels: str, method: str, draw: int, *, cache: Path, out: Path) -> Row:
    """All settings of a method: held-out accuracy, test accuracy, and CPU seconds of each."""
    fit, held, test = split(labels, draw, cache)
    more: Row = {}
    if method in PLAIN:
        fits = example.plain(GRIDS)[method]
    else:
        own = {row["method"]: row for row in kept(out) if (row["labels"], row["draw"]) == (labels, draw)}
        ratio, strength = (float(best(own[name]["settings"])) for name in PLAIN)
        found = anchored(labels, draw, ratio, cache)
        fits = example.remedies(GRIDS, found, ratio, strength).get(method, {})
        if method == KNOWN:
            fits = example.remedies(GRIDS, counted(fit), ratio, strength)["forward"]
        if method == "forward":
            more = {"matrix": found.round(3).tolist(), "counted": counted(fit).round(3).tolist()}
    return {"settings": {name: scored(make, fit, held, test) for name, make in fits.items()}, **more}


def scored(make: Fit, fit: Rows, held: Rows, test: Rows) -> list[float]:
    """Accuracy on held-out rows by their given labels, on test rows, and CPU seconds."""
    began = time.process_time()
    predict = make(fit.x, fit.given, None)
    seconds = time.process_time() - began
    return [example.right(predict, *pair) for pair in ((held.x, held.given), (test.x, test.true))] + [seconds]


# ------------------------------------------------------------------------------------------------ tables


def figures(rows: list[Row], labels: str, method: str) -> list[tuple[str, list[float], float]]:
    """By draw: the chosen setting, its figures, and the best test accuracy of any setting."""
    own = sorted((r for r in rows if (r["labels"], r["method"]) == (labels, method)), key=lambda r: r["draw"])
    each = [(row["settings"], best(row["settings"])) for row in own]
    return [(name, settings[name], settings[best(settings, 1)][1]) for settings, name in each]


def apart(ours: list[float], theirs: list[float]) -> str:
    """Mean difference, paired by draw, ± its standard error."""
    difference = np.subtract(ours, theirs)
    return f"{difference.mean():+.2f} ± {difference.std(ddof=1) / len(difference) ** 0.5:.2f}"


def table(rows: list[Row], labels: str) -> None:
    """One line a method."""
    by = {m: found for m in (*PLAIN, *REMEDIES) if len(found := figures(rows, labels, m)) == len(DRAWS)}
    tests = {method: [own[1] for _, own, _ in found] for method, found in by.items()}
    columns = ("test accuracy, %", "less cross entropy", "less logistic", "best setting on test", "CPU s", "chosen")
    print(f"\n{labels} labels\n\n| method | {' | '.join(columns)} |\n|---{'|---' * len(columns)}|")
    for method, found in by.items():
        cells = [f"{np.mean(tests[method]):.2f} ± {np.std(tests[method], ddof=1):.2f}"]
        cells += ["–" if method == other else apart(tests[method], tests[other]) for other in PLAIN]
        cells += [f"{np.mean([top for *_, top in found]):.2f}", f"{np.median([own[2] for _, own, _ in found]):.1f}"]
        cells += ["; ".join(f"{name}" for name, *_ in found)]
        print(f"| {method} | {' | '.join(cells)} |")


def matrices(rows: list[Row]) -> None:
    """How far anchor rows are from the counted matrix."""
    print("\n| labels | diagonal, counted | diagonal, by anchor rows | mean distance of entries |\n|---|---|---|---|")
    for labels in (PEOPLE, SHUFFLED):
        own = [row for row in rows if (row["labels"], row["method"]) == (labels, "forward")]
        if own:
            found, counts = (np.mean([row[name] for row in own], axis=0) for name in ("matrix", "counted"))
            away = np.mean([np.abs(np.subtract(row["matrix"], row["counted"])).mean() for row in own])
            cells = [" ".join(f"{v:.2f}" for v in np.diag(T)) for T in (counts, found)]
            print(f"| {labels} | {' | '.join(cells)} | {away:.3f} |")


def main() -> None:
    """Run what is missing, print the tables."""
    args: Any = parser(__file__, __doc__, data=False, pretrained=True).parse_args()
    rows = kept(args.out)
    if args.weights is not None:
        from frozen_features import features_of

        for name in ("train", "test"):  # minutes, the first time
            features_of(args, "noisy_ag_news", name)
        rows = missing(args.out, names, wanted(), functools.partial(run, cache=args.cache, out=args.out))
    for labels in (PEOPLE, SHUFFLED, TRUE):
        table(rows, labels)
    matrices(rows)


if __name__ == "__main__":
    main()
