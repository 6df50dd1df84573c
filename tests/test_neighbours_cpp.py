"""The page for clusters: its pieces against their formulas, and a run on digits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pages import page


@pytest.fixture(scope="module")
def cpp():
    """The example, as a module."""
    return page("neighbours", "cpp")


def unit(n, d, seed=0):
    rows = np.random.default_rng(seed).normal(size=(n, d))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype("float32")


def groups(n=40, d=8):
    """Three tight groups of unit rows, and their labels."""
    labels = np.arange(3 * n) // n
    rows = np.eye(d)[labels] + 0.05 * np.random.default_rng(0).normal(size=(3 * n, d))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype("float32"), labels


def test_the_membership_is_doubly_stochastic(cpp):
    Pi = np.asarray(cpp.membership(unit(60, 8)))
    np.testing.assert_allclose(Pi, Pi.T, atol=1e-6)
    np.testing.assert_allclose(Pi.sum(axis=0), 1, atol=2e-2)  # after ten rounds
    Pi, vectors = cpp.spectrum(unit(60, 8), 4, 0)
    np.testing.assert_allclose(Pi.sum(axis=0), 1, atol=1e-4)
    values = np.einsum("ij,ij->j", vectors, Pi @ vectors)
    np.testing.assert_allclose(values, np.linalg.eigvalsh(Pi)[::-1][:4], atol=1e-3)


def test_the_rate_reduction_is_that_of_the_determinants(cpp):
    Z = unit(30, 6)
    d = Z.shape[1]

    def bits(weight):
        return 0.5 * np.log(np.linalg.det(np.eye(d) + d / cpp.EPS2 * (Z.T * weight) @ Z))

    Pi = np.asarray(cpp.membership(Z))
    expected = bits(np.full(30, 1 / 30)) - np.mean([bits(column) for column in Pi])
    np.testing.assert_allclose(cpp.reduction(Z, jnp.arange(30), 1.0), expected, rtol=1e-4)
    np.testing.assert_allclose(cpp.reduction(Z, jnp.arange(30), 0.0), bits(np.full(30, 1 / 30)), rtol=1e-4)
    assert np.isfinite(jax.grad(lambda Z: cpp.reduction(Z, jnp.arange(30), 1.0))(Z)).all()


def test_groups_apart_are_found_and_counted(cpp):
    Z, true = groups()
    Pi, vectors = cpp.spectrum(Z, 8, 0)
    lengths = {k: cpp.coding_length(Z, cpp.clustered(vectors, k, 0)) for k in (1, 2, 3, 4, 6, 8)}
    assert min(lengths, key=lengths.get) == 3
    labels = cpp.clustered(vectors, 3, 0)
    assert cpp.scores(labels, true) == pytest.approx((100, 100))
    rows = cpp.confident(Pi, labels)
    assert len(np.unique(rows)) == len(rows) == 60
    assert set(labels[rows]) == {0, 1, 2}


def test_accuracy_is_that_of_the_best_names(cpp):
    assert cpp.accuracy(np.array([2, 2, 0, 0, 1]), np.array([0, 0, 1, 1, 1])) == pytest.approx(80)
    assert cpp.accuracy(np.array([0, 1, 2, 3]), np.array([0, 0, 1, 1])) == pytest.approx(50)  # a cluster has one class


def test_the_page_clusters_digits(cpp):
    X, y = cpp.load(None, "")
    X, y = X[:600], y[:600]
    cpp.BATCH, cpp.WARM = 256, 15
    Z = cpp.learn(X, 40, 0)
    np.testing.assert_allclose(np.linalg.norm(Z, axis=1), 1, atol=1e-5)
    untrained = cpp.learn(X, 1, 0)

    def reduced(Z):
        return float(cpp.reduction(jnp.asarray(Z), jnp.arange(32), 1.0))

    assert reduced(Z) > 1.5 * reduced(untrained)
    Pi, vectors = cpp.spectrum(Z, 10, 0)
    labels = cpp.clustered(vectors, 10, 0)
    solved = cpp.head_for_all(X, labels, cpp.confident(Pi, labels), 0)
    assert cpp.accuracy(solved, labels) > 80  # the head knows the clusters of rows it did not learn from
    assert cpp.scores(solved, y)[1] > 60
