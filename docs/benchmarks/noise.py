"""What the losses make of wrong labels: held-out accuracy after a fifth of the training labels was changed.

    python docs/benchmarks/noise.py [--data-dir DIR] [--weights DIR] [--out noise.jsonl]

The classification sets of ``beta.py``, five seeds, 64 neurons, ``cf.Cronos``'s defaults, features as they are, and for
the two sets whose columns have different units also with columns of mean zero and variance one. A fifth
of the labels to fit, chosen at random, is replaced by another class at random; held-out labels are left alone. Every
solve is one row of the file; rows that are there are not run again. Ends with a table, means and standard deviations,
and one of the differences to the squared loss.
"""

from collections.abc import Callable, Iterable, Iterator

import jax
import numpy as np
from rows import missing, parser
from sets import Split, score, splits

import cronos_flax as cf

LOSSES: dict[str, str | cf.Loss] = {
    "squared": "squared",
    "huber": "huber",
    "huber .3": cf.Huber(0.3),
    "huber .1": cf.Huber(0.1),
    "hinge": "hinge",
    "softmax": "softmax",
}
SEEDS = (0, 1, 2, 3, 4)
FLIPPED = 0.2
HIDDEN = 64


def flipped(y: np.ndarray, classes: int, seed: int) -> np.ndarray:
    """Labels of which a fifth are wrong."""
    rng = np.random.default_rng(100 + seed)
    wrong = rng.choice(len(y), size=round(FLIPPED * len(y)), replace=False)
    noisy = y.copy()
    noisy[wrong] = (y[wrong] + rng.integers(1, classes, size=len(wrong))) % classes
    return noisy


def with_standardised(given: Iterable[Split]) -> Iterator[Split]:
    """The splits, and those of columns in different units once more, standardised."""
    for split in given:
        yield split
        if split.name in ("breast_cancer", "wine"):
            mean, sd = split.X.mean(axis=0), split.X.std(axis=0)
            name = f"{split.name}, standardised"
            yield split._replace(name=name, X=(split.X - mean) / sd, X_held=(split.X_held - mean) / sd)


def fitted(split: Split, loss: str) -> dict[str, float]:
    """Solve on noisy labels; the held-out accuracy."""
    assert split.classes is not None
    y = flipped(split.y, split.classes, split.seed)
    targets = y if loss == "softmax" else cf.signed_targets(y, split.classes)
    solver = cf.Cronos(loss=LOSSES[loss])
    params = solver.solve(split.X, targets, hidden=HIDDEN, key=jax.random.key(split.seed)).params
    return {"score": score(np.asarray(cf.predict(params, split.X_held)), split.y_held)}


def main() -> None:
    """Run what is missing, print the table."""
    args = parser(__file__, __doc__, data=False, weights=True).parse_args()
    rows: list[dict] = []
    for split in with_standardised(splits(args.data_dir, args.weights, SEEDS)):
        wanted = [(split.name, split.seed, loss) for loss in LOSSES if split.classes is not None]
        rows = missing(
            args.out, ("set", "seed", "loss"), wanted, lambda name, seed, loss, split=split: fitted(split, loss)
        )
    scores: dict[tuple[str, str], dict[int, float]] = {}
    for row in rows:
        scores.setdefault((row["set"], row["loss"]), {})[row["seed"]] = row["score"]
    others = [loss for loss in LOSSES if loss != "squared"]
    table(LOSSES, scores, lambda name, loss: (list(scores[name, loss].values()), 1))
    print("\ndifference to the squared loss, paired by split, ± standard error\n")
    table(
        others,
        scores,
        lambda name, loss: ([v - scores[name, "squared"][k] for k, v in scores[name, loss].items()], len(SEEDS)),
    )


def table(losses: Iterable[str], scores: dict, cell: Callable[[str, str], tuple[list[float], int]]) -> None:
    """Means of the cells' values, ± their standard deviation over the root of a count."""
    losses = list(losses)
    print("| set | " + " | ".join(losses) + " |")
    print("|---|" + "---|" * len(losses))
    for name in dict.fromkeys(name for name, _ in scores):
        cells = [cell(name, loss) for loss in losses]
        print(
            f"| {name} | " + " | ".join(f"{np.mean(v):.2f} ± {np.std(v, ddof=1) / c**0.5:.2f}" for v, c in cells) + " |"
        )


if __name__ == "__main__":
    main()
