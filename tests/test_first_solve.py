"""The first solve of an alternation chooses β, so that the backbone does not get a gradient many times as large."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from given import X, Y

import cronos_flax as cf
from cronos_flax._alternation.first_solve import gradient_growth
from cronos_flax._head.rows import GatheredRows
from cronos_flax._solver.losses import loss_of

DATA, KEY = (X[:256], Y[:256]), jax.random.key(3)
SMALL = nn.Sequential([nn.Dense(8), nn.tanh, lambda x: 1e-3 * x, nn.Dense(6), nn.relu, nn.Dense(2)])
LARGEST = 16.0


def small_state(alternation=None, tx=None, loss="softmax", **solver):
    params = jax.jit(SMALL.init)(jax.random.key(1), X)["params"]
    head = cf.find_head(SMALL, {"params": params}, X[:64])
    solver = cf.Cronos(loss=loss, **solver)
    common = {"apply_fn": SMALL.apply, "params": params, "tx": optax.adam(1e-2) if tx is None else tx}
    return cf.CronosTrainState.create(**common, head=head, solver=solver, alternation=alternation)


def growth(before, after):
    rows = cf.gather_features(before.head, before.variables, DATA)
    rows = GatheredRows(np.asarray(rows.X), np.asarray(rows.y), None, True)
    old, new = (state.head.read(state.variables) for state in (before, after))
    return gradient_growth(old, new, rows, loss_of("softmax"))


@pytest.mark.filterwarnings("ignore:solve_head. the loss is:UserWarning")  # at a second solve without a step
def test_features_that_need_large_weights_get_a_stronger_beta_as_if_it_were_given():
    state = small_state()
    free, _ = small_state(cf.Alternation(largest_growth=float("inf"))).solve_head(DATA, key=KEY)
    assert growth(state, free) > LARGEST
    solved, solution = state.solve_head(DATA, key=KEY)
    assert growth(state, solved) <= LARGEST
    raised = float(solved.beta / free.beta)
    exponent = np.log(raised) / np.log(2)
    np.testing.assert_allclose(exponent, np.round(exponent), atol=1e-5)
    weaker, _ = small_state(beta=float(solved.beta) / 2).solve_head(DATA, key=KEY)
    assert raised > 1.9
    assert growth(state, weaker) > LARGEST
    given, expected = small_state(beta=float(solved.beta)).solve_head(DATA, key=KEY)
    jax.tree.map(np.testing.assert_array_equal, solved.params, given.params)
    np.testing.assert_array_equal(solution.stats.objective, expected.stats.objective)
    again, solution = solved.solve_head(DATA)
    assert float(again.beta) == float(solved.beta) == float(solution.stats.beta)


def test_a_beta_ratio_or_a_beta_of_the_users_stays():
    free, _ = small_state(cf.Alternation(largest_growth=float("inf"))).solve_head(DATA, key=KEY)
    for solver in ({"beta_ratio": 0.02}, {"beta": float(free.beta)}):
        state = small_state(**solver)
        solved, _ = state.solve_head(DATA, key=KEY)
        np.testing.assert_allclose(solved.beta, free.beta, rtol=1e-6)
    limited, _ = small_state(cf.Alternation(largest_growth=LARGEST), beta_ratio=0.02).solve_head(DATA, key=KEY)
    assert float(limited.beta) > 1.9 * float(free.beta)


def test_cf_train_and_nnx_choose_beta_likewise():
    state = small_state(cf.Alternation(first_epoch=0))
    expected = state.solve_head(DATA, key=KEY)[0].beta
    trained, history = cf.train(state, DATA, epochs=1, batch_size=64, key=KEY)
    solves = [row["beta"] for row in history if "objective" in row]
    np.testing.assert_allclose(solves, float(trained.beta), rtol=1e-6)
    assert float(expected) / 2.1 < solves[0] < 2.1 * float(expected)  # another key

    def linear(kernel, bias):
        layer = nnx.Linear(*kernel.shape, rngs=nnx.Rngs(0))
        layer.kernel[...], layer.bias[...] = kernel, bias
        return layer

    first, second, third = (linear(**layer) for layer in state.params.values())
    model = nnx.Sequential(first, nnx.tanh, lambda x: 1e-3 * x, second, nnx.relu, third)
    head = cf.nnx.find_head(model, X[:64])
    optimizer = cf.nnx.CronosOptimizer(model, optax.adam(1e-2), head=head, solver=cf.Cronos(loss="softmax"))
    optimizer.solve_head(model, DATA, key=KEY)
    np.testing.assert_allclose(optimizer.beta[...], expected, rtol=1e-5)


def test_the_growth_is_that_of_the_gradients_root_mean_square():
    rng = np.random.default_rng(0)
    rows, weight = rng.normal(size=(1024, 8)).astype("float32"), rng.uniform(size=1024).astype("float32")
    weight[:100] = 0
    y = rng.integers(0, 2, size=1024)

    def network(size):
        shapes = ((8, 6), (6,), (6, 2), (2,))
        return cf.TwoLayer(*(np.asarray(size * rng.normal(size=shape), "float32") for shape in shapes))

    def size(network):
        def loss(x, y):
            return optax.softmax_cross_entropy_with_integer_labels(cf.predict(network, x[None])[0], y)

        gradients = jax.vmap(jax.grad(loss))(rows, y)
        return np.sqrt(np.sum(weight * np.sum(np.square(gradients), axis=1)) / np.sum(weight))

    loss, usual, large = loss_of("softmax"), network(1.0), network(3.0)
    given = GatheredRows(rows, y, weight, True)
    expected = size(large) / size(usual)
    np.testing.assert_allclose(gradient_growth(usual, large, given, loss), expected, rtol=1e-4)
    # As they lie on several devices: in another order, between rows of weight zero that are not finite.
    order = rng.permutation(2048)[:1024].astype("int32")
    X, labels, weights = np.full((2048, 8), np.nan, "float32"), np.zeros(2048, int), np.zeros(2048, "float32")
    X[order], labels[order], weights[order] = rows, y, weight
    spread = GatheredRows(*map(jnp.asarray, (X, labels, weights)), True, order)
    np.testing.assert_allclose(gradient_growth(usual, large, spread, loss), expected, rtol=1e-4)
    # A head of zeros has no gradient: it counts as a fresh one.
    nothing = jax.tree.map(np.zeros_like, usual)
    share = np.average(y, weights=weight)
    fresh = np.sqrt(2 * share * (1 - share)) / np.sqrt(2)
    np.testing.assert_allclose(gradient_growth(nothing, large, given, loss), size(large) / fresh, rtol=1e-3)


def test_rows_of_one_class_and_a_head_of_zeros_end_the_solve():
    """β_max is 0 there, and twice zero is zero."""
    model = SMALL.clone(layers=[*SMALL.layers[:-1], nn.Dense(2, kernel_init=nn.initializers.zeros)])
    params = jax.jit(model.init)(jax.random.key(1), X)["params"]
    head = cf.find_head(model, {"params": params}, X[:64])
    for solver, y in ((cf.Cronos(loss="softmax"), 0 * Y), (cf.Cronos(), np.zeros((300, 2), "float32"))):
        state = cf.CronosTrainState.create(
            apply_fn=model.apply, params=params, tx=optax.sgd(1e-2), head=head, solver=solver
        )
        state, solution = state.solve_head((DATA[0], y[:256]))
        assert np.isfinite(solution.stats.objective)


def test_the_unit_of_weights_does_not_count():
    state, weight = small_state(), np.full(256, 1e30, "float32")
    usual, _ = state.solve_head(DATA, key=KEY)
    heavy, _ = state.solve_head([(*DATA, weight)], unpack=lambda rows: ((rows[0],), *rows[1:]), key=KEY)
    np.testing.assert_allclose(heavy.beta, usual.beta, rtol=1e-4)


@pytest.mark.parametrize("value", [0, -1.0, "much", float("nan")])
def test_a_largest_growth_that_is_no_positive_number_is_refused(value):
    with pytest.raises(ValueError, match="`largest_growth` must be a number > 0"):
        cf.Alternation(largest_growth=value)
    assert dataclasses.asdict(cf.Alternation(largest_growth=3))["largest_growth"] == 3


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_targets_in_half_precision_are_taken_without_a_promotion(kind, strict_promotion):
    """A solve on arrays took them, `solve_head` and `train` raised a TypePromotionError."""
    state = small_state(tx=optax.sgd(1e-3), loss="squared", max_iters=2)
    data = DATA[0], DATA[0][:, :2].astype(jnp.dtype(kind))
    wide, _ = state.solve_head((data[0], data[1].astype("float32")), key=KEY)
    solved, _ = state.solve_head(data, key=KEY)
    jax.tree.map(np.testing.assert_array_equal, solved.params, wide.params)
    _, history = cf.train(state, data, epochs=1, batch_size=64, solve_data=data)
    assert np.isfinite(history[-1]["loss"])
