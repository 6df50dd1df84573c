"""The page for CRATE-MAE: its blocks against their equations in plain NumPy, and a run on digits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pages import page


@pytest.fixture(scope="module")
def crate():
    """The example, as a module, with fewer blocks."""
    module = page("neighbours", "crate_mae")
    module.DEPTH = (2, 1)
    return module


def tokens(n, d):
    return np.random.default_rng(0).normal(size=(3, n, d)).astype("float32")


def test_attention_is_the_sum_over_subspaces_of_its_one_projection(crate):
    Z = tokens(5, 8)
    variables = crate.Attention().init(jax.random.key(0), Z)
    (U,) = jax.tree.leaves(variables)
    given, p = np.asarray(U), 8 // crate.HEADS
    seen, U = crate.Attention().apply(variables, Z)
    np.testing.assert_array_equal(U, given)
    for got, image in zip(seen, Z, strict=True):
        columns, expected = image.T, np.zeros((8, 5))
        for k in range(crate.HEADS):
            U_k = given[:, k * p : (k + 1) * p]
            V = U_k.T @ columns
            powers = np.exp(V.T @ V / np.sqrt(p))
            expected += U_k @ V @ (powers / powers.sum(axis=0))  # each column of weights has sum 1
        np.testing.assert_allclose(got, expected.T, atol=1e-5)


def test_the_sparse_step_is_one_of_ista(crate):
    Z = tokens(5, 8)
    variables = crate.Sparse().init(jax.random.key(0), Z)
    D = np.asarray(variables["params"]["D"])
    seen = np.asarray(crate.Sparse().apply(variables, Z))
    for got, image in zip(seen, Z, strict=True):
        z = image.T
        step = z - crate.ETA * D.T @ (D @ z - z) - crate.ETA * crate.LAMBDA
        np.testing.assert_allclose(got, np.maximum(step, 0).T, atol=1e-5)
    assert 0 < np.mean(seen == 0) < 1


def test_the_compression_term_is_that_of_the_determinants(crate):
    Z, U = tokens(5, 8), np.random.default_rng(1).normal(size=(8, 8)).astype("float32")
    p, n, expected = 8 // crate.HEADS, 5, 0
    for image in Z:
        for k in range(crate.HEADS):
            V = U[:, k * p : (k + 1) * p].T @ image.T
            V = V / np.linalg.norm(V, axis=0)
            expected += 0.5 * np.log(np.linalg.det(np.eye(n) + p / (n * crate.EPS2) * V.T @ V)) / len(Z)
    np.testing.assert_allclose(crate.compression(Z, U), expected, rtol=1e-5)


def test_attention_is_a_direction_in_which_the_compression_term_falls(crate):
    Z = tokens(12, 16)
    U, _ = jnp.linalg.qr(np.random.default_rng(1).normal(size=(16, 16)).astype("float32"))  # subspaces at right angles
    step, _ = crate.Attention().apply({"params": {"U": U}}, Z)
    against, here, along = (float(crate.compression(Z + t * step, U)) for t in (-0.05, 0, 0.05))
    assert along < here - 0.01
    assert against > here + 0.01


def test_hidden_patches_are_not_seen_and_the_order_of_the_others_is_nothing(crate):
    x = np.random.default_rng(0).normal(size=(2, 8, 8, 1)).astype("float32")
    order = np.stack([np.random.default_rng(seed).permutation(16) for seed in (0, 1)])
    model = crate.Autoencoder(2)
    variables, apply = jax.jit(model.init)(jax.random.key(0), x, order), jax.jit(model.apply)
    drawn = apply(variables, x, order)
    hidden = np.zeros((2, 16), bool)
    np.put_along_axis(hidden, order[:, crate.VISIBLE :], True, axis=1)

    def changed(where):
        squares = np.kron(where.reshape(2, 4, 4), np.ones((1, 2, 2)))[..., None]
        return apply(variables, (x + squares).astype("float32"), order)

    np.testing.assert_array_equal(changed(hidden), drawn)
    assert np.abs(changed(~hidden) - drawn).max() > 1e-2
    others = np.concatenate([order[:, crate.VISIBLE - 1 :: -1], order[:, : crate.VISIBLE - 1 : -1]], axis=1)
    np.testing.assert_allclose(apply(variables, x, others), drawn, atol=1e-5)


def test_the_page_autoencodes_digits_and_solves(crate):
    x, fit, held, test = crate.load(None, "digits", 0)
    before, after, errors = crate.pretrain(x, 2, 300, 0)
    assert np.mean(errors[-50:]) < 0.95  # 1 is what the mean image leaves
    crate.STRENGTHS, crate.RATIOS = (0.1,), (1e-3,)
    for scores in crate.judge(after, 2, fit, held, test, 0).values():
        ((on_held, on_test, *_),) = scores
        assert on_held > 80
        assert on_test > 80
    for encoder in (before, after):
        _, seen = crate.Encoder(2).apply({"params": encoder}, test[0][:100], mutable="layers")
        assert all(then < first for first, then in seen["layers"]["terms"])
