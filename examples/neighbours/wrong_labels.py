"""Learn from labels of which many are wrong: remedies that cost one more solve of a convex head, or ten.

    python examples/neighbours/wrong_labels.py
    python examples/neighbours/wrong_labels.py --cache DIR

Digits get wrong labels, three in ten, each digit those of one other; or DIR has the features of texts with people's
labels that ``docs/benchmarks/label_noise.py`` makes. Every setting is chosen on held-out rows whose labels are as wrong
as those to fit. Ends with a table of the accuracy on test rows with true labels.

* *smoothing*: targets are probabilities, ``(1 − s)`` for the label and ``s / C`` for each class;
* *huber*, *hinge*: losses that grow as the error does, not as its square;
* *forward* (Patrini et al., CVPR 2017): the network says the probability of the true class, and a matrix T leads from
  there to that of the label. T is read off the rows that the first head is most certain of;
* *trimmed*: the rows of largest loss are left out, and the head is solved again from where it is, ten times.
"""

import argparse
import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

import cronos_flax as cf

HIDDEN, ROUNDS, CERTAIN = 64, 10, 0.97  # neurons; solves of a trimmed head; the quantile that an anchor row has
Predict = Callable[[np.ndarray], np.ndarray]  # scores by class
Fit = Callable[[np.ndarray, np.ndarray, Predict | None], Predict]  # of features, labels, and a head to start from


class Grids(NamedTuple):
    """The settings to choose from."""

    ratios: tuple[float, ...] = (0.1, 0.03, 0.01)  # ``beta_ratio`` of solved heads
    smoothed: tuple[float, ...] = (0.1, 0.3)
    deltas: tuple[float, ...] = (0.1,)  # of huber
    shares: tuple[float, ...] = (0.1, 0.3)  # trimmed
    strengths: tuple[float, ...] = (0.01, 0.1, 1.0, 10.0, 100.0)  # C of logistic regression


class Rows(NamedTuple):
    """Features, the labels that were given, and the true ones."""

    x: np.ndarray
    given: np.ndarray
    true: np.ndarray

    def split(self, order: np.ndarray, fit: int, held: int) -> list["Rows"]:
        """So many rows to fit, so many to choose on, and the others."""
        return [Rows(*parts) for parts in zip(*(np.split(a[order], (fit, fit + held)) for a in self), strict=True)]


@dataclasses.dataclass(frozen=True)
class Forward(cf.Loss):
    """``−log Σ_c y_c softmax(f)_c``, where ``y_c`` is the probability of the given label if the true class is c.

    With ``y`` one-hot it is the cross entropy. It is ``log Σ exp f_c − log Σ y_c exp f_c``, which is not convex. The
    second term is concave: the curvature of the first one alone is never negative, nor below that of the loss.
    """

    def value(self, outputs: jax.Array, targets: jax.Array) -> jax.Array:
        """Of each row."""
        return jax.nn.logsumexp(outputs, axis=1) - jax.nn.logsumexp(outputs, axis=1, b=targets)

    def curvature(self, outputs: jax.Array, targets: jax.Array, direction: jax.Array) -> jax.Array:
        """Of the first term: that of the softmax."""
        p = jax.nn.softmax(outputs, axis=1)
        return p * (direction - jnp.sum(p * direction, axis=1, keepdims=True))


def matrix(probabilities: np.ndarray) -> np.ndarray:
    """T, whose row c is the probabilities ``(n, C)``, by a head fitted to the given labels, of an anchor row of c."""
    return probabilities[[np.argsort(column)[int(CERTAIN * len(column))] for column in probabilities.T]]


@dataclasses.dataclass
class Head:
    """A solved head, which gives log-probabilities by class."""

    params: cf.TwoLayer

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Of features ``(n, p)``, shape ``(n, C)``."""
        return np.asarray(jax.nn.log_softmax(cf.predict(self.params, jnp.asarray(x)), axis=1))


def solved(loss: str | cf.Loss, ratio: float, targets: Callable[[np.ndarray], Any]) -> Fit:
    """Solve for a head from targets of labels, as the loss takes them."""

    def fit(x: np.ndarray, y: np.ndarray, start: Predict | None = None) -> Predict:
        at: dict[str, Any] = {"init": start.params} if isinstance(start, Head) else {"hidden": HIDDEN}
        return Head(cf.Cronos(loss=loss, beta_ratio=ratio).solve(x, targets(y), key=jax.random.key(0), **at).params)

    return fit


def logistic(strength: float) -> Fit:
    """scikit-learn's."""
    return lambda x, y, start: LogisticRegression(C=strength, max_iter=1000).fit(x, y).predict_log_proba


def trimmed(fit: Fit, share: float) -> Fit:
    """Fit, leave out the share of rows of largest loss, and fit again from there: ``ROUNDS`` times."""

    def fitted(x: np.ndarray, y: np.ndarray, start: Predict | None = None) -> Predict:
        predict = fit(x, y, start)
        for _ in range(ROUNDS):
            losses = -predict(x)[np.arange(len(y)), y]
            kept = np.sort(np.argsort(losses)[: round((1 - share) * len(y))])
            predict = fit(x[kept], y[kept], predict)
        return predict

    return fitted


def probabilities(y: np.ndarray, smoothing: float = 0.0) -> np.ndarray:
    """Targets of the cross entropy."""
    ones = np.eye(y.max() + 1, dtype="float32")[y]
    return (1 - smoothing) * ones + smoothing / ones.shape[1]


def plain(grids: Grids) -> dict[str, dict[str, Fit]]:
    """By method, the fits without a remedy, by setting."""
    return {
        "cross entropy": {f"{r}": solved("softmax", r, probabilities) for r in grids.ratios},
        "logistic regression": {f"{c}": logistic(c) for c in grids.strengths},
    }


def remedies(grids: Grids, T: np.ndarray, ratio: float, strength: float) -> dict[str, dict[str, Fit]]:
    """By method, the fits with a remedy, by setting; T by a first head, whose ratio and C trimmed ones keep."""
    ratios, entropy = grids.ratios, solved("softmax", ratio, probabilities)
    signed, smoothed = partial(cf.signed_targets, num_classes=len(T)), partial(partial, probabilities)
    return {
        "smoothing": {f"{s}, {r}": solved("softmax", r, smoothed(smoothing=s)) for s in grids.smoothed for r in ratios},
        "huber": {f"{d}, {r}": solved(cf.Huber(d), r, signed) for d in grids.deltas for r in ratios},
        "hinge": {f"{r}": solved("hinge", r, signed) for r in ratios},
        "forward": {f"{r}": solved(Forward(), r, lambda y: T.T[y]) for r in ratios},
        "trimmed": {f"{s}": trimmed(entropy, s) for s in grids.shares},
        "logistic, trimmed": {f"{s}": trimmed(logistic(strength), s) for s in grids.shares},
    }


def right(predict: Predict, x: np.ndarray, y: np.ndarray) -> float:
    """Accuracy in %."""
    return 100 * float(np.mean(predict(x).argmax(axis=1) == y))


def chosen(fits: dict[str, Fit], fit: Rows, held: Rows) -> tuple[str, Predict]:
    """The setting that agrees best with the given labels of held-out rows, and what it predicts."""
    heads = {name: make(fit.x, fit.given, None) for name, make in fits.items()}
    return max(heads.items(), key=lambda head: right(head[1], held.x, held.given))


def digits(seed: int) -> list[Rows]:
    """Rows to fit, rows to choose on and test rows; three labels in ten are those of the next digit but two."""
    x, y = load_digits(return_X_y=True)
    rng = np.random.default_rng(seed)
    given = np.where(rng.random(len(y)) < 0.3, (y + 3) % 10, y)
    return Rows(x.astype("float32") / 16, given, y).split(rng.permutation(len(y)), 900, 300)


def news(cache: Path, seed: int) -> list[Rows]:
    """The same of news texts: 3,000, 2,000 and 7,600."""
    with np.load(cache / "noisy_ag_news-train-all.npz") as train, np.load(cache / "noisy_ag_news-test-all.npz") as test:
        rows, tested = (Rows(data["x"], data["label"], data["true_label"]) for data in (train, test))
    return [*rows.split(np.random.default_rng(seed).permutation(len(rows.x)), 3000, 2000)[:2], tested]


def main() -> None:
    """Choose, fit, print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cache", type=Path, help="directory of the features of news; digits without it")
    parser.add_argument("--seed", type=int, default=0, help="of the draw of rows")
    args = parser.parse_args()
    fit, held, test = digits(args.seed) if args.cache is None else news(args.cache, args.seed)
    wrong = f"{100 * np.mean(fit.given != fit.true):.1f} % of the labels to fit are wrong"
    table = Table("method", "chosen", "test accuracy, %", title=wrong)

    grids, correct = Grids(), (fit._replace(given=fit.true), held._replace(given=held.true))
    found = {method: chosen(fits, fit, held) for method, fits in plain(grids).items()}
    (ratio, head), (strength, _) = found.values()
    with_remedy = remedies(grids, matrix(np.exp(head(fit.x))), float(ratio), float(strength))
    found |= {method: chosen(fits, fit, held) for method, fits in with_remedy.items()}
    found |= {f"{method}, true labels": chosen(fits, *correct) for method, fits in plain(grids).items()}
    for method, (setting, predict) in found.items():
        table.add_row(method, setting, f"{right(predict, test.x, test.true):.1f}")
    Console().print(table)


if __name__ == "__main__":
    main()
