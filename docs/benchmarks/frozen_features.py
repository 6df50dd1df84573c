"""Heads on frozen sentence features: with wrong labels, and with few rows.

    python docs/benchmarks/frozen_features.py --data-dir DIR --weights DIR --cache DIR [--out frozen_features.jsonl]

MiniLM reads the texts once, as in ``pretrained.py``; its vectors are kept in ``--cache``. Two tasks:

* *noisy*: noisy_ag_news, whose labels people gave (19.75 % wrong); heads are fitted to these and to the true labels,
  five draws of 8,000 of the 10,000 training rows, scored on the 7,600 clean test rows;
* *few*: IMDb, five draws of 2,400 training and 479 validation rows, scored on 4,000 test rows; AdamW at eight rates.

Every fit is one row of the file, written when it is done; rows that are there are not run again. Ends with the tables;
``--out docs/benchmarks/frozen_features.jsonl.gz`` prints those of the kept rows.
"""

import functools
import itertools
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from pretrained import SEARCH, searched
from rows import kept, missing, parser
from sentences import texts_of, vectors

import cronos_flax as cf

HIDDEN, DRAWS, BATCH, EPOCHS = 128, range(5), 32, 20
NOISY, FEW = "noisy", "few"
FITTED, HELD = {NOISY: 8000, FEW: 2400}, {NOISY: 2000, FEW: 479}  # rows to fit; others, to choose a rate of Adam on
POOL, TESTED = 5000, 4000  # texts of IMDb
RATES = {NOISY: (3e-4, 1e-3, 3e-3), FEW: tuple(float(rate) for rate in np.logspace(-4.5, -1, 8))}
STRENGTHS = np.logspace(-3, 3, 7)
PEOPLE, TRUE = "people's", "true"
SMOOTHED, ADAMW = "Adam, label smoothing .1", "AdamW"
METHODS = {
    NOISY: ("squared", "huber", "hinge", "softmax", SEARCH, SMOOTHED),
    FEW: ("squared", "softmax", "squared, β chosen", "softmax, β chosen", SEARCH, ADAMW),
}
Predict = Callable[[np.ndarray], np.ndarray]
calls: dict[tuple[str, str], int] = {}


class Rows(NamedTuple):
    """Features and labels to fit."""

    X: np.ndarray
    y: np.ndarray


# ------------------------------------------------------------------------------------------------ features


def features_of(args: Any, name: str, split: str, most: int | None = None) -> dict[str, np.ndarray]:
    """Features ``x`` and labels by column, from the cache if they are there."""
    path = args.cache / f"{name}-{split}-{most or 'all'}.npz"
    if not path.exists():
        args.cache.mkdir(parents=True, exist_ok=True)
        texts, labels = texts_of(args.data_dir, name, split, most)
        part = path.with_suffix(".part.npz")
        np.savez(part, x=vectors(args.weights, texts), **labels)
        part.rename(path)
    with np.load(path) as file:
        return dict(file)


# ------------------------------------------------------------------------------------------------ heads


def solved(train: Rows, classes: int, draw: int, method: str) -> Predict:
    """By ``cf.Cronos`` with its defaults, or with β chosen on rows that it holds out itself."""
    loss, *chosen = method.split(", ")
    targets = train.y if loss == "softmax" else cf.signed_targets(train.y, classes)
    settings = {"num_classes": classes} if loss == "softmax" else {}
    solver = cf.Cronos(loss=loss, beta="path" if chosen else None)
    solution = solver.solve(train.X, targets, hidden=HIDDEN, key=jax.random.key(draw), **settings)
    jax.block_until_ready(solution.params)
    return functools.partial(labels_of, lambda X: cf.predict(solution.params, X))


def labels_of(outputs: Callable[[np.ndarray], jax.Array], X: np.ndarray) -> np.ndarray:
    """The class of the larger output, or the sign of the only one."""
    out = np.asarray(outputs(X))
    return (out.ravel() > 0).astype(int) if out.ndim == 1 or out.shape[1] == 1 else out.argmax(1)


def outputs_of(params: dict[str, jax.Array], X: jax.Array) -> jax.Array:
    """The head that Adam trains: that of Cronos."""
    return jax.nn.relu(X @ params["kernel1"] + params["bias1"]) @ params["kernel2"] + params["bias2"]


@functools.partial(jax.jit, static_argnames=("classes", "smoothing"))
def descended(
    X: jax.Array, y: jax.Array, key: jax.Array, rate: jax.Array, classes: int, smoothing: float
) -> dict[str, jax.Array]:
    """Parameters after AdamW (Optax's default weight decay) on the cross entropy; the rate decays as a cosine."""
    start, orders = jax.random.split(key)
    first, second = jax.random.split(start)
    init, steps = jax.nn.initializers.lecun_normal(), len(X) // BATCH
    params = {
        "kernel1": init(first, (X.shape[1], HIDDEN)),
        "bias1": jnp.zeros(HIDDEN),
        "kernel2": init(second, (HIDDEN, classes)),
        "bias2": jnp.zeros(classes),
    }
    targets = optax.smooth_labels(jax.nn.one_hot(y, classes), smoothing)
    decay = 1e-4 if smoothing == 0 else 0.0
    optimizer = optax.adamw(optax.cosine_decay_schedule(rate, EPOCHS * steps), weight_decay=decay)

    def step(carry: tuple, rows: jax.Array) -> tuple:
        params, state = carry
        grads = jax.grad(lambda params: optax.softmax_cross_entropy(outputs_of(params, X[rows]), targets[rows]).mean())(
            params
        )
        updates, state = optimizer.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    shuffled = jax.vmap(lambda key: jax.random.permutation(key, len(X)))(jax.random.split(orders, EPOCHS))
    rows = shuffled[:, : steps * BATCH].reshape(-1, BATCH)
    return jax.lax.scan(step, (params, optimizer.init(params)), rows)[0][0]


def by_adam(train: Rows, classes: int, draw: int, rate: float, smoothing: float) -> Predict:
    """One fit at one rate."""
    params = descended(train.X, train.y, jax.random.key(draw), rate, classes, smoothing)
    jax.block_until_ready(params)
    return functools.partial(labels_of, lambda X: outputs_of(params, X))


# ------------------------------------------------------------------------------------------------ rows


def right(predict: Predict, X: np.ndarray, y: np.ndarray) -> float:
    """Accuracy in %."""
    return 100 * float(np.mean(predict(X) == y))


class Task(NamedTuple):
    """All rows of a task: training ones by kind of label, and test ones."""

    x: np.ndarray
    y: dict[str, np.ndarray]
    x_test: np.ndarray
    y_test: np.ndarray


def task_of(args: Any, name: str) -> Task:
    """The task with its features."""
    if name == NOISY:
        train, test = (features_of(args, "noisy_ag_news", split) for split in ("train", "test"))
        y = {PEOPLE: train["label"], TRUE: train["true_label"]}
    else:
        train, test = (features_of(args, "imdb_reviews", s, n) for s, n in (("train", POOL), ("test", TESTED)))
        y = {TRUE: train["label"]}
    return Task(train["x"], y, test["x"], test["true_label" if "true_label" in test else "label"])


def fitted(task: Task, name: str, labels: str, method: str, rate: float | None, draw: int) -> dict[str, Any]:
    """Test accuracy, held-out accuracy of a rate, CPU seconds, and how many fits of the kind this process had done.

    Before the first fit of a kind all compiled programs are dropped, so that it pays for its own.
    """
    order = np.random.default_rng(draw).permutation(len(task.y[labels]))
    fit, held = order[: FITTED[name]], order[FITTED[name] :][: HELD[name]]
    train, classes = Rows(task.x[fit], task.y[labels][fit]), int(task.y_test.max()) + 1
    kind = (name, method)
    before, calls[kind] = calls.get(kind, 0), calls.get(kind, 0) + 1
    if not before:
        jax.clear_caches()
    began = time.process_time()
    if method == SEARCH:
        predict = searched(train, STRENGTHS)
    elif rate is not None:
        predict = by_adam(train, classes, draw, rate, 0.0 if method == ADAMW else 0.1)
    else:
        predict = solved(train, classes, draw, method)
    seconds = time.process_time() - began
    row = {"accuracy": right(predict, task.x_test, task.y_test), "cpu": seconds, "before": before}
    return row | ({} if rate is None else {"held": right(predict, task.x[held], task.y[labels][held])})


def wanted() -> Iterable[tuple[str, str, str, float | None, int]]:
    """The key of every row: task, labels, method, rate, draw; fits of a method together: it compiles once."""
    for name, kinds in ((FEW, (TRUE,)), (NOISY, (PEOPLE, TRUE))):
        for method, labels in itertools.product(METHODS[name], kinds):
            rates = RATES[name] if method in (SMOOTHED, ADAMW) else (None,)
            yield from ((name, labels, method, rate, draw) for draw in DRAWS for rate in rates)


# ------------------------------------------------------------------------------------------------ tables


def chosen(rows: list[dict[str, Any]]) -> dict[int, list[dict[str, Any]]]:
    """The fits of each draw, the one that counts first: the only one, or that of the best rate on held-out rows."""
    by_draw: dict[int, list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: -row.get("held", 0)):
        by_draw.setdefault(row["draw"], []).append(row)
    return by_draw


def apart(ours: dict[int, list[dict[str, Any]]], theirs: dict[int, list[dict[str, Any]]]) -> str:
    """Mean difference in accuracy, paired by draw, ± its standard error."""
    each = [ours[draw][0]["accuracy"] - theirs[draw][0]["accuracy"] for draw in ours if draw in theirs]
    return f"{np.mean(each):+.2f} ± {np.std(each, ddof=1) / len(each) ** 0.5:.2f}" if len(each) > 1 else "–"


def seconds(rows: list[dict[str, Any]], late: bool) -> str:
    """Mean CPU seconds of the first fit of its kind, or of later ones."""
    some = [row["cpu"] for row in rows if (row["before"] > 0) == late]
    return f"{np.mean(some):.1f}" if some else "–"


def table(rows: list[dict[str, Any]], name: str, labels: str) -> None:
    """One line a method."""
    own = [row for row in rows if (row["task"], row["labels"]) == (name, labels)]
    fits = {m: chosen([row for row in own if row["method"] == m]) for m in METHODS[name]}
    adam = SMOOTHED if name == NOISY else ADAMW
    print(f"\n{name}, {labels} labels\n")
    print(f"| method | test accuracy, % | less logistic | less {adam} | CPU s, first | later | whole search, later |")
    print("|---|---|---|---|---|---|---|")
    for method, draws in fits.items():
        if not draws:
            continue
        scores = [some[0]["accuracy"] for some in draws.values()]
        every = [row for some in draws.values() for row in some]
        searches = [sum(row["cpu"] for row in some) for some in draws.values() if all(row["before"] for row in some)]
        spread = f" ± {np.std(scores, ddof=1):.2f}" if len(scores) > 1 else ""
        cells = [
            f"{np.mean(scores):.2f}{spread}",
            *("–" if other == method else apart(draws, fits[other]) for other in (SEARCH, adam)),
            *(seconds(every, late) for late in (False, True)),
            f"{np.mean(searches):.1f}" if searches else "–",
        ]
        print(f"| {method} | {' | '.join(cells)} |")
    rates = [f"{some[0]['rate']:.2g}" for some in fits[adam].values()]
    print(f"\nrates that {adam} chose, by draw: {', '.join(rates)}")


def wrong(rows: list[dict[str, Any]]) -> None:
    """What the wrong labels cost each method, paired by draw."""
    print("\nnoisy: true less people's labels, paired by draw, ± standard error\n\n| method | difference |\n|---|---|")
    for method in METHODS[NOISY]:
        both = [
            chosen([r for r in rows if (r["task"], r["labels"], r["method"]) == (NOISY, labels, method)])
            for labels in (TRUE, PEOPLE)
        ]
        print(f"| {method} | {apart(*both)} |")


def main() -> None:
    """Run what is missing, print the tables."""
    args = parser(__file__, __doc__, data=False, pretrained=True).parse_args()
    rows = kept(args.out)
    if args.weights is not None:
        task = functools.cache(functools.partial(task_of, args))
        names = ("task", "labels", "method", "rate", "draw")
        rows = missing(args.out, names, wanted(), lambda name, *key: fitted(task(name), name, *key))
    for name, labels in ((NOISY, PEOPLE), (NOISY, TRUE), (FEW, TRUE)):
        table(rows, name, labels)
    wrong(rows)


if __name__ == "__main__":
    main()
