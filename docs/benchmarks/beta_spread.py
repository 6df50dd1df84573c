"""How far the largest useful β, β_max, moves with the order of the rows, and how near it is to a longer climb.

    python docs/benchmarks/beta_spread.py [--out beta_spread.jsonl] [--problems 200] [--development]

Random problems: 500 to 60,000 rows, 5 to 64 normal features with an offset of 0 to 10, a network of random neurons and
noise as targets, four losses, with and without output bias, with and without sample weights. β_max has no key; what can
move it is the order of the rows. Each problem is measured with its rows as drawn, sorted by target and in three random
orders; and climbed from 64 other starts with four times the steps, half of them random, half of them random but with
their edge through a random row. Every problem is one row of the file, written as soon as it is done; rows that are
there are not run again. Ends with a table.
"""

import jax
import jax.numpy as jnp
import numpy as np
from rows import missing, parser

from cronos_flax._solver import beta_max as beta
from cronos_flax._solver.coordinates import Rows, scaled
from cronos_flax._solver.losses import loss_of

ROWS = (500, 12_000, 60_000)
COLUMNS = (5, 64)
LOSSES = ("squared", "softmax", "logistic", "hinge")
SHUFFLES = 3
STARTS, CLIMBS = 64, 4  # of the reference


def problem(seed: int) -> tuple[Rows, dict]:
    """A random problem in the solver's coordinates, and what it is."""
    rng = np.random.default_rng(seed)
    n, p, loss = int(rng.choice(ROWS)), int(rng.choice(COLUMNS)), str(rng.choice(LOSSES))
    offset, noise, output_bias = float(rng.uniform(0, 10)), float(rng.uniform(0.1, 2)), bool(rng.integers(2))
    weighted = bool(rng.integers(2))
    X = rng.normal(size=(n, p)) * rng.uniform(0.5, 2, p)
    C = 3 if loss == "softmax" else 1
    hidden = np.maximum(X @ rng.normal(size=(p, 4)), 0)
    outputs = hidden @ rng.normal(size=(4, C))
    outputs = (outputs - outputs.mean(axis=0)) / outputs.std(axis=0) + noise * rng.normal(size=(n, C))
    made = loss_of(loss)
    if loss == "squared":
        y = jnp.asarray(outputs, jnp.float32)
    else:
        labels = outputs.argmax(axis=1) if C > 1 else (outputs[:, 0] > rng.uniform(-1, 1)).astype(int)
        labelled = made.from_labels(jnp.asarray(labels), max(C, 2))
        y = jnp.asarray(made.targets(labelled, C if C > 1 else None), jnp.float32)
    weight = rng.exponential(size=n) if weighted else np.ones(n)
    arrays = (jnp.asarray(array, jnp.float32) for array in (X + offset, y, weight / weight.mean()))
    rows, _ = scaled(*arrays, made, hidden_bias=True, output_bias=output_bias)
    named = {"rows": n, "columns": p, "loss": loss, "offset": offset, "noise": noise}
    return rows, {**named, "output_bias": output_bias, "weighted": weighted}


def orders(rows: Rows, seed: int) -> list[Rows]:
    """The same rows in five orders."""
    n, rng = len(rows.root), np.random.default_rng(seed)
    target = np.asarray(rows.Y)
    by_target = np.argsort(target[:, 0] if target.shape[1] == 1 else target.argmax(axis=1), kind="stable")
    places = [np.arange(n), by_target, *(rng.permutation(n) for _ in range(SHUFFLES))]
    return [rows.take(jnp.asarray(place)) for place in places]


climb = jax.jit(beta.climb)
largest = jax.jit(beta.beta_max)


def longer_climb(rows: Rows, seed: int) -> float:
    """The best of many starts; the best of them go on after the first climb."""
    alpha, rng = beta.at_best_constant(rows), np.random.default_rng(seed)
    u = rng.normal(size=(rows.X.shape[1], STARTS))
    x = np.asarray(rows.X[rng.integers(len(alpha), size=STARTS // 2)]).T.astype(float)
    u[:, STARTS // 2 :] -= x * np.sum(x * u[:, STARTS // 2 :], axis=0) / np.sum(x * x, axis=0)
    u = jnp.asarray(u / np.linalg.norm(u, axis=0), rows.X.dtype)
    ends = [climb(rows.X, alpha, group) for group in jnp.split(u, STARTS // 16, axis=1)]
    u, heights = jnp.concatenate([end[0] for end in ends], axis=1), jnp.concatenate([end[1] for end in ends])
    u = u[:, jnp.argsort(-heights)[:16]]
    for _ in range(CLIMBS - 1):
        u, heights = climb(rows.X, alpha, u)
    return float(jnp.max(heights))


def measured(seed: int) -> dict:
    """The figures of a row."""
    with jax.default_matmul_precision("highest"):
        rows, named = problem(seed)
        found = [float(largest(ordered)) for ordered in orders(rows, seed)]
        return {**named, "longer": longer_climb(rows, seed), "found": found}


def main() -> None:
    """Run what is missing, print the table."""
    options = parser(__file__, __doc__)
    options.add_argument("--problems", type=int, default=200)
    options.add_argument("--development", action="store_true", help="the problems that constants were chosen on")
    args = options.parse_args()
    first = 0 if args.development else 10_000
    rows = missing(args.out, ("seed",), ((seed,) for seed in range(first, first + args.problems)), measured)
    print("below and above: the longer climb\n")
    print("| rows | problems | largest spread | 99 % | mean | furthest below | 99 % | furthest above | within 3 % |")
    print("|---|---|---|---|---|---|---|---|---|")
    for n in (*ROWS, None):
        some = [row for row in rows if n in (row["rows"], None)]
        if not some:
            continue
        ratio = np.array([row["found"] for row in some]) / np.array([[row["longer"]] for row in some])
        spread = 100 * (ratio.max(axis=1) / ratio.min(axis=1) - 1)
        below, above = 100 * (1 - ratio.min(axis=1)), max(100 * (ratio.max() - 1), 0)
        within = np.sum((spread <= 3) & (np.abs(ratio - 1).max(axis=1) <= 0.03))
        spreads, lows = (f"{v.max():.2f} % | {np.quantile(v, 0.99):.2f} %" for v in (spread, below))
        name = "all" if n is None else f"{n:,}"
        print(
            f"| {name} | {len(some)} | {spreads} | {spread.mean():.2f} % | {lows} | {above:.2f} % "
            f"| {within} of {len(some)} |"
        )


if __name__ == "__main__":
    main()
