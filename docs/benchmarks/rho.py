"""How much ρ matters, the paper's question on Fashion-MNIST: four values of it, one network of 64 neurons.

    python docs/benchmarks/rho.py --data-dir DIR --out rho.jsonl

Ten classes, squared loss on ±1 targets, β = .001 in sums over rows; pixels standardised by their common mean and
deviation. The default on all 60,000 rows, 30 steps; the published algorithm (20 iterations of 20 CG steps) on 3,000 of
them, with a ρ that stays. Every run is a row of the file, written when it is done; rows that are there are not run
again. Ends with the table, and saves ``rho.png`` beside this file. Test rows choose nothing.
"""

import dataclasses
import functools
import itertools
from pathlib import Path

import jax
import numpy as np
from matplotlib.figure import Figure
from rows import missing, parser

import cronos_flax as cf
from cronos_flax.compare.data import Dataset, load

RHOS = (0.001, 0.01, 0.1, 1.0)
SEEDS = range(5)
METHODS = {
    "default": (cf.Cronos(max_iters=30), None, SEEDS),
    "published": (
        cf.Cronos(gates="paired", linear_solver=cf.NystromPCG(rank=20, max_steps=20), max_iters=20),
        3000,
        (0, 1),
    ),
}


def fitted(data: Dataset, method: str, rho: float, seed: int) -> dict[str, object]:
    """Fit once; the figures of the row."""
    solver, rows, _ = METHODS[method]
    fit = np.random.default_rng(seed).permutation(len(data.y))[:rows]
    X, X_test = (
        (x.reshape(len(x), -1).astype("float32") - data.x.mean()) / data.x.std() for x in (data.x, data.x_test)
    )
    y = np.asarray(cf.signed_targets(data.y[fit], 10))
    beta = 0.001 * float(np.sqrt(np.mean(np.sum(X[fit] ** 2, axis=1)))) / len(fit)  # docs/method.md, "Units"
    solver = dataclasses.replace(solver, rho=rho, beta=beta)
    solution = solver.solve(X[fit], y, hidden=64, key=jax.random.key(seed))
    hits = np.asarray(cf.predict(solution.params, X_test)).argmax(axis=1) == data.y_test
    return {
        "objective": float(solution.stats.objective),
        "test": 100 * float(hits.mean()),
        "iterations": int(solution.stats.iterations),
        "jax": jax.__version__,
    }


def main() -> None:
    """Run what is missing; the table and the picture."""
    args = parser(__file__, __doc__, data=True).parse_args()
    data = load("fashion_mnist", args.data_dir)
    wanted = [(method, rho, seed) for method, rho in itertools.product(METHODS, RHOS) for seed in METHODS[method][2]]
    rows = missing(args.out, ("method", "rho", "seed"), wanted, functools.partial(fitted, data))

    figure = Figure(figsize=(6, 4), layout="constrained")
    ax = figure.subplots()
    print("| method | ρ | objective | test accuracy, % |\n|---|---|---|---|")
    for method in METHODS:
        scores = []
        for rho in RHOS:
            cell = [row for row in rows if (row["method"], row["rho"]) == (method, rho)]
            test = [row["test"] for row in cell]
            scores.append((np.mean(test), np.std(test, ddof=1)))
            objective = np.mean([row["objective"] for row in cell])
            print(f"| {method} | {rho:g} | {objective:.4f} | {scores[-1][0]:.2f} ± {scores[-1][1]:.2f} |")
        mean, deviation = np.transpose(scores)
        ax.errorbar(RHOS, mean, yerr=deviation, marker="o", capsize=3, label=method)
    ax.set(xscale="log", xlabel="ρ", ylabel="test accuracy, %")
    ax.grid(alpha=0.3)
    ax.legend()
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=150)


if __name__ == "__main__":
    main()
