"""Many classes: CPU seconds of the solver and of Adam to the same regularised loss.

    python docs/benchmarks/classes.py --data-dir DIR --weights DIR --cache DIR [--out classes.jsonl]

Adam has six rates, batches of 128 and a cosine decay, 30 epochs (10 for the thousand classes); the loss to reach is
the one that its best rate ends at, and its time is that run's alone. The solver has its defaults, but goes on until it
is there. Both minimise one objective, at the solver's default β; compilation is counted for neither. Pin the process to
one core (``taskset -c 0``). Every fit is one row of the file; rows that are there are not run again.
``--out docs/benchmarks/classes.jsonl.gz`` prints the table of the kept rows. ``--sets "planted 1,000 classes"``, into a
file of its own, takes half an hour.
"""

import time
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from frozen_features import features_of
from rows import kept, missing, parser
from stopping import Sets

import cronos_flax as cf

BANKING, PLANTED, THOUSAND = "banking77 features", "planted 100 classes", "planted 1,000 classes"
ADAM, OURS, STOP = "Adam", "solver", "solver, by itself"
RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
EPOCHS, BATCH, MOST = {THOUSAND: 10}, 128, 150  # epochs are 30 elsewhere
SEEDS = {BANKING: (0, 1, 2), PLANTED: (0, 1, 2), THOUSAND: (0,)}


def classes_of(rows: Sets) -> int:
    """The number of classes."""
    return int(rows.y.max()) + 1


def planted(n: int, tested: int, p: int, m: int, classes: int, width: int) -> Sets:
    """Classes of a random network with m neurons, those of the rows to fit, on features of decaying spectrum."""
    rng = np.random.default_rng(1)
    X = rng.normal(size=(n + tested, p)) / np.sqrt(1 + np.arange(p))
    hidden = np.maximum(X @ rng.normal(size=(p, m)), 0)
    y = (hidden @ rng.normal(size=(m, classes))).argmax(axis=1)
    there = np.unique(y[:n])
    X, known = X.astype("float32"), np.isin(y, there)
    y, known[:n] = np.searchsorted(there, y).astype("int32"), False
    return Sets(X[:n], y[:n], X[known], y[known], width)


def banking(args: Any) -> Sets:
    """Sentence vectors of banking77 by MiniLM, from the cache if they are there."""
    parts = [features_of(args, "banking77", split) for split in ("train", "test")]
    return Sets(*(array for part in parts for array in (part["x"], part["label"].astype("int32"))), 512)


@cache
def beta_of(data: Any) -> float:
    """The default β of a set, a function of no arguments."""
    rows = data()
    solver = cf.Cronos(loss="softmax", max_iters=1)
    return float(solver.solve(rows.X, rows.y, hidden=8, num_classes=classes_of(rows)).stats.beta)


def right(outputs: np.ndarray, y: np.ndarray) -> float:
    """Accuracy in %."""
    return 100 * float(np.mean(outputs.argmax(axis=1) == y))


def by_adam(data: Any, epochs: int, rate: float, seed: int) -> dict[str, Any]:
    """One run of Adam on the solver's objective, features divided by their root mean squared row norm."""
    rows, beta = data(), beta_of(data)
    (n, p), C, m = rows.X.shape, classes_of(rows), rows.hidden
    scale = float(np.sqrt(np.mean(np.sum(np.square(rows.X), axis=1))))
    X, y, steps = jnp.asarray(rows.X / scale), jnp.asarray(rows.y), n // BATCH
    first, second, orders = jax.random.split(jax.random.key(seed), 3)
    init = jax.nn.initializers.he_normal()

    def fresh() -> dict[str, jax.Array]:
        return {
            "kernel1": init(first, (p, m)),
            "bias1": jnp.zeros(m),
            "kernel2": init(second, (m, C)),
            "bias2": jnp.zeros(C),
        }

    def outputs(params: dict[str, jax.Array], X: jax.Array) -> jax.Array:
        return jax.nn.relu(X @ params["kernel1"] + params["bias1"]) @ params["kernel2"] + params["bias2"]

    def objective(params: dict[str, jax.Array], X: jax.Array, y: jax.Array) -> jax.Array:
        losses = optax.softmax_cross_entropy_with_integer_labels(outputs(params, X), y)
        squares = sum(jnp.sum(jnp.square(params[name])) for name in ("kernel1", "bias1", "kernel2"))
        return jnp.mean(losses) + beta / (2 * scale) * squares

    optimizer = optax.adam(optax.cosine_decay_schedule(rate, epochs * steps))

    @jax.jit
    def epoch(params: Any, state: Any, order: jax.Array) -> Any:
        def step(carry: tuple, index: jax.Array) -> tuple:
            params, state = carry
            updates, state = optimizer.update(jax.grad(objective)(params, X[index], y[index]), state)
            return (optax.apply_updates(params, updates), state), None

        index = jax.random.permutation(order, n)[: steps * BATCH].reshape(steps, BATCH)
        return jax.lax.scan(step, (params, state), index)[0]

    keys = jax.random.split(orders, epochs)
    jax.block_until_ready(epoch(fresh(), optimizer.init(fresh()), keys[0]))  # compiled
    params = fresh()
    state = optimizer.init(params)
    start = time.process_time()
    for order in keys:
        params, state = epoch(params, state, order)
    jax.block_until_ready(params)
    cpu = time.process_time() - start
    found = {"cpu": cpu, "objective": float(jax.jit(objective)(params, X, y))}
    return found | {"accuracy": right(np.asarray(outputs(params, jnp.asarray(rows.X_test / scale))), rows.y_test)}


def by_itself(data: Any, seed: int) -> dict[str, Any]:
    """Where a solve with all its defaults ends, and the CPU seconds of the second one, which compiles nothing."""
    rows, cpu = data(), 0.0
    for _ in range(2):
        start = time.process_time()
        solution = cf.Cronos(loss="softmax").solve(
            rows.X, rows.y, hidden=rows.hidden, num_classes=classes_of(rows), key=jax.random.key(seed)
        )
        jax.block_until_ready(solution.params)
        cpu = time.process_time() - start
    found = {"cpu": cpu, "objective": float(solution.stats.objective), "iterations": int(solution.stats.iterations)}
    return found | {"accuracy": right(np.asarray(cf.predict(solution.params, rows.X_test)), rows.y_test)}


class ReachedError(Exception):
    """The loss that was asked for."""


def to_loss(data: Any, seed: int, target: float) -> dict[str, Any]:
    """CPU seconds until the loss after an iteration is the target."""
    rows, solver = data(), cf.Cronos(loss="softmax", tol=0.0, max_iters=MOST)
    arguments = {"hidden": rows.hidden, "num_classes": classes_of(rows), "key": jax.random.key(seed)}
    seen: dict[str, Any] = {}
    for _ in range(2):  # the second compiles nothing
        start = time.process_time()

        def look(row: dict[str, float], start: float = start) -> None:
            seen.update(cpu=time.process_time() - start, iterations=row["iteration"], objective=row["objective"])
            if row["objective"] <= target:
                raise ReachedError

        try:
            solver.solve(rows.X, rows.y, callback=look, **arguments)
        except ReachedError:
            continue
    return {"target": target, "reached": seen["objective"] <= target, **seen}


def main() -> None:
    """Run what is missing, print the table."""
    made = parser(__file__, __doc__, data=False, pretrained=True)
    made.add_argument("--sets", nargs="+", choices=SEEDS, default=[PLANTED, BANKING], help="which of the sets")
    args = made.parse_args()
    sets = {
        BANKING: cache(lambda: banking(args)),
        PLANTED: cache(partial(planted, 12_000, 3_000, 128, 64, 100, 256)),
        THOUSAND: cache(partial(planted, 100_000, 10_000, 512, 128, 1_000, 256)),
    }
    names = "set", "method", "rate", "seed"

    def do(name: str, method: str, rate: float | None, seed: int) -> dict[str, Any]:
        data = sets[name]
        if method == ADAM:
            assert rate is not None
            return by_adam(data, EPOCHS.get(name, 30), rate, seed)
        if method == STOP:
            return by_itself(data, seed)
        return to_loss(data, seed, best(kept(args.out), name, seed)["objective"])

    rows: list[dict[str, Any]] = []
    for name in args.sets:
        for seed in SEEDS[name]:
            wanted = [(name, ADAM, rate, seed) for rate in RATES] + [(name, OURS, None, seed), (name, STOP, None, seed)]
            rows = missing(args.out, names, wanted, do)
    print("| set | Adam's best rate: loss, CPU s, accuracy | solver to this loss: CPU s, iterations | Adam ÷ solver |")
    print("|---|---|---|---|")
    for name in args.sets:
        for seed in SEEDS[name]:
            adam = best(rows, name, seed)
            ours, stop = (one(rows, name, method, seed) for method in (OURS, STOP))
            least = "" if ours["reached"] else "> "
            print(
                f"| {name}, seed {seed} | {adam['rate']:g}: {adam['objective']:.4f}, {adam['cpu']:.2f}, "
                f"{adam['accuracy']:.2f} % | {least}{ours['cpu']:.2f}, {ours['iterations']} | "
                f"{adam['cpu'] / ours['cpu']:.2f} |"
            )
            print(
                f"|  | | by itself: {stop['objective']:.4f}, {stop['cpu']:.2f}, {stop['iterations']} iterations, "
                f"{stop['accuracy']:.2f} % | |"
            )


def best(rows: list[dict[str, Any]], name: str, seed: int) -> dict[str, Any]:
    """Adam's run of least loss."""
    return min(
        (row for row in rows if (row["set"], row["method"], row["seed"]) == (name, ADAM, seed)),
        key=lambda row: np.nan_to_num(row["objective"], nan=np.inf),
    )


def one(rows: list[dict[str, Any]], name: str, method: str, seed: int) -> dict[str, Any]:
    """The only row of its kind."""
    return next(row for row in rows if (row["set"], row["method"], row["seed"]) == (name, method, seed))


if __name__ == "__main__":
    main()
