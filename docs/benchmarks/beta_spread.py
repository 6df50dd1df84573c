"""How far the largest useful β, β_max, moves with the key, and how near it is to the one climbed on all rows.

    python docs/benchmarks/beta_spread.py [--out beta_spread.jsonl] [--problems 200] [--development]

Random problems: 500 to 60,000 rows, 5 to 64 normal features with an offset of 0 to 10, a network of random neurons and
noise as targets, four losses, with and without output bias, with and without sample weights. Each is measured with
five keys, and climbed on all rows from 64 starts with four times the steps. Every problem is one row of the file,
written as soon as it is done; rows that are there are not run again. Ends with a table.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from rows import missing, parser

from cronos_flax._solver import beta
from cronos_flax._solver.coordinates import Rows, scaled
from cronos_flax._solver.losses import loss_of
from cronos_flax._solver.program import norms

ROWS = (500, 12_000, 60_000)
COLUMNS = (5, 64)
LOSSES = ("squared", "softmax", "logistic", "hinge")
KEYS = 5
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


@jax.jit
def reached(X: Array, alpha: Array, u: Array) -> tuple[Array, Array]:
    """Neurons after a climb on all rows, and how high they are."""
    u = beta.climb(X, alpha, u)
    return u, beta.violation(X, alpha, u)


def on_all_rows(rows: Rows) -> float:
    """The best of many starts, climbed on all rows; the better half goes on after each climb."""
    alpha = beta.at_best_constant(rows)
    u = jax.random.normal(jax.random.key(999), (rows.X.shape[1], STARTS), rows.X.dtype)
    u, best = u / norms(u), 0.0
    groups = jnp.split(u, STARTS // 8, axis=1)
    ends = [reached(rows.X, alpha, group) for group in groups]
    u, heights = jnp.concatenate([end[0] for end in ends], axis=1), jnp.concatenate([end[1] for end in ends])
    u = u[:, jnp.argsort(-heights)[:8]]
    for _ in range(CLIMBS - 1):
        u, heights = reached(rows.X, alpha, u)
        best = max(best, float(jnp.max(heights)))
    return best


largest = jax.jit(beta.beta_max)


def measured(seed: int) -> dict:
    """The figures of a row."""
    with jax.default_matmul_precision("highest"):
        rows, named = problem(seed)
        found = [float(largest(rows, jax.random.key(key))) for key in range(KEYS)]
        return {**named, "all_rows": on_all_rows(rows), "found": found}


def main() -> None:
    """Run what is missing, print the table."""
    options = parser(__file__, __doc__)
    options.add_argument("--problems", type=int, default=200)
    options.add_argument("--development", action="store_true", help="the problems that constants were chosen on")
    args = options.parse_args()
    first = 0 if args.development else 10_000
    rows = missing(args.out, ("seed",), ((seed,) for seed in range(first, first + args.problems)), measured)
    print("below and above: what was climbed on all rows\n")
    print("| rows | problems | largest spread over keys | mean spread | furthest below | furthest above | within 3 % |")
    print("|---|---|---|---|---|---|---|")
    for n in (*ROWS, None):
        some = [row for row in rows if n in (row["rows"], None)]
        if not some:
            continue
        ratio = np.array([row["found"] for row in some]) / np.array([[row["all_rows"]] for row in some])
        spread = 100 * (ratio.max(axis=1) / ratio.min(axis=1) - 1)
        below, above = 100 * (1 - ratio.min()), 100 * (ratio.max() - 1)
        within = np.sum((spread <= 3) & (np.abs(ratio - 1).max(axis=1) <= 0.03))
        name = "all" if n is None else f"{n:,}"
        print(
            f"| {name} | {len(some)} | {spread.max():.2f} % | {spread.mean():.2f} % | {below:.2f} % | {above:.2f} % "
            f"| {within} of {len(some)} |"
        )


if __name__ == "__main__":
    main()
