"""Clusters of pretrained features by rate reduction, their number by coding length, and a solved head for all rows.

    python examples/neighbours/cpp.py
    python examples/neighbours/cpp.py --cache DIR --data flowers128

Without DIR, scikit-learn's digits are clustered. DIR has the features that ``docs/benchmarks/suite_features.py`` makes:
``flowers128`` (EfficientNet-Lite0) and ``banking77`` (MiniLM). After Chu et al., "Image Clustering via the Principle of
Rate Reduction in the Age of Pretrained Models" (ICLR 2024). No label is used before the last lines, which only report.

1. A small head ``Z = Linear–BN–ReLU–Linear`` of unit length maximises ``R(Z) − R_c(Z, Π)``, where Π, doubly stochastic,
   is the Sinkhorn projection of ``exp(ZᵀZ/γ)``. (There Π has a head of its own.)
2. Spectral clustering of Π, for every number of clusters of a grid; the number of least coding length is taken.
3. ``cf.fit_head`` learns the clusters of the rows that fit theirs best, from the pretrained features, and says the
   cluster of every row. Ends with a table of clustering accuracy and NMI.
"""

import argparse
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.table import Table
from scipy.optimize import linear_sum_assignment
from scipy.sparse.linalg import eigsh
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits
from sklearn.metrics import normalized_mutual_info_score

import cronos_flax as cf

WIDTH, HIDDEN = 128, 512  # of Z, and of the layer before
EPS2, GAMMA = 0.1, 0.15  # squared distortion of a code word; temperature of the membership
BATCH, COLUMNS, WARM = 512, 32, 50  # rows of a step; columns of Π in R_c; steps that maximise R alone
ROUNDS = 10  # of Sinkhorn's iteration, within a step
CONFIDENT = 0.5  # share of the rows of a cluster that the solved head learns from


class Small(nn.Module):
    """Linear–BN–ReLU–Linear, rows of unit length."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Z, shape ``(n, WIDTH)``."""
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(nn.Dense(HIDDEN)(x)))
        x = nn.Dense(WIDTH)(x)
        return x / jnp.linalg.norm(x, axis=1, keepdims=True)


def rate(Z: jax.Array, weight: jax.Array) -> jax.Array:
    """``½ log det(I + d/ε² Σ_i w_i z_i z_iᵀ)``, weights with sum 1."""
    d = Z.shape[1]
    return 0.5 * jnp.linalg.slogdet(jnp.eye(d) + d / EPS2 * (Z.T * weight) @ Z)[1]


def membership(Z: jax.Array) -> jax.Array:
    """Π = diag(u) exp(ZZᵀ/γ) diag(u), rows and columns with sum 1."""
    K = jnp.exp((Z @ Z.T - 1) / GAMMA)
    u = jax.lax.fori_loop(0, ROUNDS, lambda _, u: jnp.sqrt(u / (K @ u)), jnp.ones(len(Z)) / jnp.sqrt(K.sum()))
    return u[:, None] * K * u


def reduction(Z: jax.Array, columns: jax.Array, both: jax.Array) -> jax.Array:
    """``R(Z) − R_c(Z, Π)``, R_c the mean of the rates of Z weighed by these columns of Π; ``both`` 0 leaves R alone."""
    compressed = jax.vmap(rate, (None, 0))(Z, membership(Z)[columns]).mean()
    return rate(Z, jnp.ones(len(Z)) / len(Z)) - both * compressed


def learn(X: np.ndarray, steps: int, seed: int) -> np.ndarray:
    """Z of all rows, after Adam on the rate reduction of batches."""
    model, batch = Small(), min(BATCH, len(X))
    tx = optax.adamw(optax.cosine_decay_schedule(1e-3, steps), weight_decay=1e-4)

    @jax.jit
    def step(variables: Any, state: Any, x: jax.Array, both: jax.Array) -> tuple[Any, Any]:
        def loss(params: Any) -> tuple[jax.Array, Any]:
            Z, new = model.apply({**variables, "params": params}, x, train=True, mutable=["batch_stats"])
            return -reduction(Z, jnp.arange(min(COLUMNS, batch)), both), new

        grads, new = jax.grad(loss, has_aux=True)(variables["params"])
        updates, state = tx.update(grads, state, variables["params"])
        return {"params": optax.apply_updates(variables["params"], updates), **new}, state

    variables: Any = model.init(jax.random.key(seed), X[:2])
    state, rng = tx.init(variables["params"]), np.random.default_rng(seed)
    for i in range(steps):
        rows = rng.choice(len(X), batch, replace=False)
        variables, state = step(variables, state, X[rows], jnp.float32(i >= WARM))
    return np.asarray(jax.jit(model.apply)(variables, X))


def spectrum(Z: np.ndarray, most: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Π of all rows, and its eigenvectors of largest eigenvalue."""
    K = Z @ Z.T
    np.exp((K - 1) / GAMMA, out=K)
    u = np.ones(len(Z), "float32") / np.sqrt(K.sum())
    for _ in range(100):
        u = np.sqrt(u / (K @ u))
    K *= u[:, None]
    K *= u
    values, vectors = eigsh(K, k=most, v0=np.random.default_rng(seed).normal(size=len(Z)).astype("f4"), tol=1e-3)
    return K, vectors[:, np.argsort(-values)]


def clustered(vectors: np.ndarray, clusters: int, seed: int) -> np.ndarray:
    """k-means of the rows of the first eigenvectors, made of unit length."""
    rows = vectors[:, :clusters] / np.maximum(np.linalg.norm(vectors[:, :clusters], axis=1, keepdims=True), 1e-12)
    return KMeans(clusters, n_init=3, random_state=seed).fit_predict(rows)


def coding_length(Z: np.ndarray, labels: np.ndarray, eps2: float = EPS2) -> float:
    """Bits of Z coded cluster by cluster, and of the clusters: ``Σ_j (n_j + d) R(Z_j) − n_j log2(n_j / n)``."""
    (n, d), bits = Z.shape, 0.0
    for j in np.unique(labels):
        rows = Z[labels == j]
        logdet = np.linalg.slogdet(np.eye(d) + d / (eps2 * len(rows)) * rows.T @ rows)[1]
        bits += (len(rows) + d) * 0.5 * logdet / np.log(2) - len(rows) * np.log2(len(rows) / n)
    return bits


def grid(most: int) -> list[int]:
    """Numbers of clusters to try, each about a tenth more than the last."""
    return sorted({round(2 * 1.1**i) for i in range(100) if 2 * 1.1**i <= most})


def confident(Pi: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Of each cluster, the rows with the largest part of their membership in it."""
    inside, chosen = Pi @ np.eye(labels.max() + 1, dtype="float32")[labels], []
    for j in np.unique(labels):
        rows = np.flatnonzero(labels == j)
        chosen.append(rows[np.argsort(-inside[rows, j])[: max(1, round(CONFIDENT * len(rows)))]])
    return np.concatenate(chosen)


def head_for_all(X: np.ndarray, labels: np.ndarray, rows: np.ndarray, seed: int) -> np.ndarray:
    """The cluster of every row, by a head solved on some."""
    model = nn.Sequential([nn.Dense(128), nn.relu, nn.Dense(int(labels.max()) + 1)])
    start = model.init(jax.random.key(seed), X[:2])
    head = cf.find_head(model, start, X[:64])
    variables, _ = cf.fit_head(head, start, (X[rows], labels[rows]), solver=cf.Cronos(loss="softmax"))
    return np.asarray(jax.jit(model.apply)(variables, X)).argmax(axis=1)


def accuracy(labels: np.ndarray, true: np.ndarray) -> float:
    """Share of rows, in %, whose cluster is the class that the best matching (Hungarian) gives it."""
    counts = np.zeros((labels.max() + 1, true.max() + 1))
    np.add.at(counts, (labels, true), 1)
    return 100 * counts[linear_sum_assignment(-counts)].sum() / len(true)


def scores(labels: np.ndarray, true: np.ndarray) -> tuple[float, float]:
    """Accuracy and normalised mutual information, in %."""
    return accuracy(labels, true), 100 * normalized_mutual_info_score(true, labels)


def load(cache: Path | None, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Features, in units of their mean length, and labels, which only report."""
    if cache is None:
        X, y = load_digits(return_X_y=True)
    else:
        with np.load(cache / f"{name}.npz") as file:
            X, y = file["x_train"], file["y_train"]
    return (X / np.linalg.norm(X, axis=1).mean()).astype("float32"), y


def main() -> None:
    """Learn, cluster, count, solve; print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cache", type=Path, help="directory of features; digits without it")
    parser.add_argument("--data", choices=("flowers128", "banking77"), default="flowers128")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--most", type=int, default=40, help="clusters")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    X, y = load(args.cache, args.data)
    Z = learn(X, args.steps, args.seed)
    Pi, vectors = spectrum(Z, args.most, args.seed)
    lengths = {k: coding_length(Z, clustered(vectors, k, args.seed)) for k in grid(args.most)}
    found = min(lengths, key=lambda k: lengths[k])
    table = Table(title=f"{len(X):,} rows of {y.max() + 1} classes; clusters by coding length: {found}")
    for column in ("method", "clusters", "accuracy, %", "NMI, %"):
        table.add_column(column)
    for k in dict.fromkeys((int(y.max()) + 1, found)):
        labels = clustered(vectors, k, args.seed)
        solved = head_for_all(X, labels, confident(Pi, labels), args.seed)
        for method, of in (
            ("k-means on the features", KMeans(k, n_init=3, random_state=args.seed).fit_predict(X)),
            ("rate reduction", labels),
            ("rate reduction, solved head", solved),
        ):
            table.add_row(method, str(k), *(f"{score:.1f}" for score in scores(of, y)))
    Console().print(table)


if __name__ == "__main__":
    main()
