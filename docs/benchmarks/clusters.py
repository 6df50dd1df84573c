"""Clusters by rate reduction and a solved head, against k-means and spectral clustering of the pretrained features.

    python docs/benchmarks/clusters.py --cache DIR --out clusters.jsonl
    python docs/benchmarks/clusters.py --out docs/benchmarks/clusters.jsonl.gz  # the tables of rows that are there

The method is ``examples/neighbours/cpp.py``; DIR is that of ``suite_features.py``. Of banking77 each seed draws 5,000
of the 10,003 training rows; of flowers128 all 3,443 are taken. Labels only report. One row for each set and seed.
"""

import sys
import time
from pathlib import Path

import numpy as np
from rows import Row, kept, missing, parser
from sklearn.cluster import KMeans, SpectralClustering

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "neighbours"))
import cpp

SEEDS, STEPS, MOST_ROWS = 5, 150, 5000
SETS = {"flowers128": 30, "banking77": 160}  # and the most clusters to try
EPS2 = (0.01, 0.03, 0.1, 0.3, 1.0)  # the number of clusters is counted with each; the example has cpp.EPS2
METHODS = ("k-means", "spectral", "rate reduction", "rate reduction, solved head")


def once(cache: Path, name: str, seed: int) -> Row:
    """Scores of every method with the true number of clusters and with the number that is found."""
    X, y = cpp.load(cache, name)
    rows = np.random.default_rng(seed).permutation(len(X))[:MOST_ROWS]
    X, y = X[rows], y[rows]
    began = time.process_time()
    Z = cpp.learn(X, STEPS, seed)
    learnt = time.process_time() - began
    Pi, vectors = cpp.spectrum(Z, SETS[name], seed)
    tried = {k: cpp.clustered(vectors, k, seed) for k in cpp.grid(SETS[name])}
    found = {
        str(eps2): min(tried, key=lambda k, eps2=eps2: cpp.coding_length(Z, tried[k], eps2))
        for eps2 in EPS2
    }  # fmt: skip
    row: Row = {"classes": int(y.max()) + 1, "found": found, "learn_seconds": learnt}
    row["search_seconds"] = time.process_time() - began - learnt
    for which, k in (("true", row["classes"]), ("found", found[str(cpp.EPS2)])):
        labels = cpp.clustered(vectors, k, seed)
        chosen = cpp.confident(Pi, labels)
        began = time.process_time()
        solved = cpp.head_for_all(X, labels, chosen, seed)
        row[f"solve_seconds, {which}"] = time.process_time() - began
        row[f"accuracy of confident rows, {which}"] = cpp.accuracy(labels[chosen], y[chosen])
        graph = SpectralClustering(k, affinity="nearest_neighbors", random_state=seed, n_init=3)
        of = (KMeans(k, n_init=3, random_state=seed).fit_predict(X), graph.fit_predict(X), labels, solved)
        for method, clusters in zip(METHODS, of, strict=True):
            row[f"{method}, {which}"] = [float(score) for score in cpp.scores(clusters, y)]
    return row


def spread(values: list[float]) -> str:
    """Mean ± standard error."""
    return f"{np.mean(values):.1f} ± {np.std(values, ddof=1) / len(values) ** 0.5:.1f}"


def show(rows: list[Row]) -> None:
    """The tables."""
    for name in SETS:
        of = [row for row in rows if row["set"] == name]
        print(f"\n{name}: {of[0]['classes']} classes, {len(of)} seeds\n")
        print("| method | true number: accuracy, % | less k-means | NMI, % | found number: accuracy, % | NMI, % |")
        print("|---|---|---|---|---|---|")
        for method in METHODS:
            true, found = (np.array([row[f"{method}, {which}"] for row in of]) for which in ("true", "found"))
            less = true[:, 0] - [row["k-means, true"][0] for row in of]
            cells = (true[:, 0], less, true[:, 1], found[:, 0], found[:, 1])
            print(f"| {method} |", " | ".join(spread(list(cell)) for cell in cells), "|")
        print("\n| squared distortion | clusters found, by seed |\n|---|---|")
        for eps2 in EPS2:
            print(f"| {eps2} |", ", ".join(str(row["found"][str(eps2)]) for row in of), "|")
        print("\naccuracy of the confident rows:", spread([row["accuracy of confident rows, true"] for row in of]))
        for part in ("learn_seconds", "search_seconds", "solve_seconds, true"):
            print(f"CPU {part}:", spread([row[part] for row in of]))


def main() -> None:
    """Run what has no row yet, where there are features; print."""
    given = parser(__file__, __doc__, pretrained=True).parse_args()
    if given.cache is None:
        show(kept(given.out))
    else:
        wanted = [(name, seed) for seed in range(SEEDS) for name in SETS]
        show(missing(given.out, ("set", "seed"), wanted, lambda name, seed: once(given.cache, name, seed)))


if __name__ == "__main__":
    main()
