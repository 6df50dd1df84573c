"""The page of remedies for wrong labels, small: its loss, its matrix, and what they do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pages import page

import cronos_flax as cf

wrong_labels = page("neighbours", "wrong_labels")


def drawn(seed, n=50, C=4):
    rng = np.random.default_rng(seed)
    T = rng.dirichlet(np.ones(C), size=C).astype("float32")
    return jnp.asarray(3 * rng.normal(size=(n, C)), "float32"), rng.integers(0, C, n), T


def test_the_forward_loss_is_that_of_the_labels_that_are_seen():
    outputs, y, T = drawn(0)
    seen = jax.nn.softmax(outputs, axis=1) @ T
    expected = -jnp.log(seen[jnp.arange(len(y)), y])
    np.testing.assert_allclose(wrong_labels.Forward().value(outputs, T.T[y]), expected, rtol=1e-4, atol=1e-5)


def test_its_curvature_is_never_negative_nor_below_that_of_the_loss():
    outputs, y, T = drawn(1)
    loss, targets = wrong_labels.Forward(), jnp.asarray(T.T[y])
    C = outputs.shape[1]
    units = [jnp.broadcast_to(e, outputs.shape) for e in jnp.eye(C)]
    given = jnp.stack([loss.curvature(outputs, targets, e) for e in units], axis=2)
    hessian = jnp.stack([cf.Loss.curvature(loss, outputs, targets, e) for e in units], axis=2)
    assert jnp.linalg.eigvalsh(hessian).min() < -0.01  # the loss is not convex
    assert jnp.linalg.eigvalsh(given).min() > -1e-5
    assert jnp.linalg.eigvalsh(given - hessian).min() > -1e-5


@pytest.fixture(scope="module")
def heads():
    """Digits with wrong labels, and by method the accuracy on test rows, with the matrix of anchor rows."""
    fit, _, test = wrong_labels.digits(0)
    wrong_labels.HIDDEN, wrong_labels.ROUNDS = 32, 4
    first = wrong_labels.solved("softmax", 0.03, wrong_labels.probabilities)(fit.x, fit.given, None)
    T = wrong_labels.matrix(np.exp(first(fit.x)))
    grids = wrong_labels.Grids((0.03,), (0.3,), (0.1,), (0.3,), (0.1,))
    fits = {
        name: own for name, (own,) in ((n, f.values()) for n, f in wrong_labels.remedies(grids, T, 0.03, 0.1).items())
    }
    wanted = ("forward", "trimmed", "logistic, trimmed")
    found = {name: fits[name](fit.x, fit.given, None) for name in wanted} | {"cross entropy": first}
    return {name: wrong_labels.right(own, test.x, test.true) for name, own in found.items()}, T


def test_anchor_rows_find_where_wrong_labels_come_from(heads):
    _, T = heads
    np.testing.assert_allclose(T.sum(axis=1), 1, rtol=1e-5)
    assert (np.argsort(T, axis=1)[:, -1] == np.arange(10)).mean() >= 0.9
    assert (np.argsort(T, axis=1)[:, -2] == (np.arange(10) + 3) % 10).mean() >= 0.8


def test_the_forward_model_and_trimming_undo_mistakes_that_depend_on_the_class(heads):
    accuracy, _ = heads
    assert accuracy["forward"] > accuracy["cross entropy"] + 4
    assert accuracy["trimmed"] > accuracy["cross entropy"] + 2


def test_targets_of_smoothing_are_probabilities():
    y = np.array([0, 2, 1])
    given = wrong_labels.probabilities(y, smoothing=0.3)
    np.testing.assert_allclose(given.sum(axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(given[1], [0.1, 0.1, 0.8], rtol=1e-6)
