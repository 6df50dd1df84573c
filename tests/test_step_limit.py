"""No gradient step of an alternation moves a kernel by more than a share of its size."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import cronos_flax as cf
from cronos_flax._alternation.step_limit import limited, size, spectral_norm

RNG = np.random.default_rng(0)
X = RNG.random((64, 300)).astype("float32")  # many inputs of one sign
Y = (X[:, 0] > X[:, 1]).astype(int)
MODEL = nn.Sequential([nn.Dense(40), nn.relu, nn.Dense(12), nn.relu, nn.Dense(2)])
VARIABLES = MODEL.init(jax.random.key(0), X)
HEAD = cf.find_head(MODEL, VARIABLES, X)


def normal(*shape):
    return RNG.normal(size=shape).astype("float32")


def made(rate=1e3, **parts):
    return cf.CronosTrainState.create(
        apply_fn=MODEL.apply,
        params=VARIABLES["params"],
        tx=optax.sgd(rate),
        head=HEAD,
        solver=cf.Cronos(loss="softmax"),
        alternation=cf.Alternation(**parts),
    )


def moved(state):
    """How far one gradient step moves each kernel: the spectral norm, as a share of the kernel's size."""

    def loss(params):
        return optax.softmax_cross_entropy_with_integer_labels(state.apply_fn({"params": params}, X), Y).mean()

    new = state.apply_gradients(grads=jax.grad(loss)(state.params)).params
    return {
        name: float(np.linalg.norm(np.asarray(new[name]["kernel"] - layer["kernel"]), 2) / size(layer["kernel"]))
        for name, layer in state.params.items()
    }


@pytest.mark.parametrize(
    "matrix",
    [
        np.outer(normal(300), normal(7)),
        normal(300, 40),
        np.sign(normal(5, 90)),
        np.eye(9),
        np.outer(normal(30) + 1j * normal(30), normal(7) + 1j * normal(7)),
    ],
)
def test_the_spectral_norm_is_met_from_below(matrix):
    exact = np.linalg.norm(matrix, 2)
    given = jnp.asarray(matrix, "complex64" if np.iscomplexobj(matrix) else "float32")
    assert 0.8 * exact <= spectral_norm(given) <= exact * (1 + 1e-5)


@pytest.mark.parametrize(("m", "n"), [(300, 40), (40, 300), (64, 64)])
def test_the_size_of_a_random_kernel_is_its_spectral_norm(m, n):
    kernel = nn.initializers.lecun_normal()(jax.random.key(1), (m, n))
    np.testing.assert_allclose(size(kernel), np.linalg.norm(kernel, 2), rtol=0.1)
    np.testing.assert_allclose(size(3 * kernel), 3 * size(kernel), rtol=0.1)


def test_a_large_update_is_made_smaller_as_a_whole():
    params = {"dense": normal(30, 20), "conv": normal(3, 3, 4, 8), "bias": normal(20)}
    updates = jax.tree.map(lambda leaf: 100 * normal(*leaf.shape), params)
    new = limited(updates, params, 0.1)
    np.testing.assert_array_equal(new["bias"], updates["bias"])
    for name in ("dense", "conv"):
        columns = params[name].shape[-1]
        update, given, kernel = (np.reshape(tree[name], (-1, columns)) for tree in (new, updates, params))
        np.testing.assert_allclose(update / given, np.full(given.shape, update[0, 0] / given[0, 0]), rtol=1e-5)
        np.testing.assert_allclose(np.linalg.norm(update, 2), 0.1 * size(kernel), rtol=0.25)


@pytest.mark.parametrize("scale", [1e8, 1e10, 1e18, 1e30, 5e37])
def test_an_update_of_any_size_is_made_smaller(scale):
    """From 1e8 on its norm came out as zero, and it was not limited; from 1e18 on as NaN."""
    params, update = {"kernel": normal(30, 20)}, np.clip(normal(30, 20), -3, 3)
    for limit in (limited, jax.jit(limited)):
        new = limit({"kernel": np.float32(scale) * update}, params, 0.1)["kernel"]
        assert np.linalg.norm(new, 2) <= 0.1 * 1.25 * size(params["kernel"])
    powers = 2.0 ** np.arange(-30, 100, 13)
    norms = [float(spectral_norm(np.float32(power) * update)) / power for power in powers]
    assert len(set(norms)) == 1  # nothing is rounded by it


def test_a_small_update_is_left_to_the_bit():
    params = {"kernel": normal(30, 20)}
    updates = {"kernel": 1e-3 * normal(30, 20)}
    np.testing.assert_array_equal(limited(updates, params, 0.1)["kernel"], updates["kernel"])


def test_the_phase_of_a_complex_kernel_does_not_count():
    """Layers in frequencies have such ones."""
    kernel, update = normal(30, 20), 100 * normal(30, 20)
    turned = limited({"k": jnp.asarray(1j * update)}, {"k": jnp.asarray((0.6 + 0.8j) * kernel)}, 0.1)["k"]
    np.testing.assert_allclose(turned, 1j * limited({"k": update}, {"k": kernel}, 0.1)["k"], rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_kernel_of_zeros_moves_and_an_update_of_zeros_does_not(dtype):
    zeros, ones = jnp.zeros((30, 20), dtype), jnp.ones((30, 20), dtype)
    update = limited(ones, zeros, 0.1)
    assert update.dtype == dtype
    assert float(update.min()) > 0
    np.testing.assert_array_equal(limited(zeros, ones, 0.1), zeros)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (2, 0, 3)])
def test_a_parameter_without_entries_has_no_steps(shape):
    """It was a ZeroDivisionError."""
    empty = jnp.zeros(shape)
    assert limited({"k": empty}, {"k": empty}, 0.1)["k"].shape == shape


def test_an_update_that_is_not_finite_stays_so():
    update = jnp.ones((30, 20)).at[3, 4].set(jnp.nan)
    assert not np.isfinite(limited(update, jnp.ones((30, 20)), 0.1)[3, 4])


@pytest.mark.parametrize("head", ["moving", "frozen"])
def test_a_step_at_any_rate_moves_no_kernel_far(head):
    shares = moved(made(head=head))
    assert max(shares.values()) <= 1.25 * cf.Alternation().largest_step
    assert shares["layers_0"] >= 0.5 * cf.Alternation().largest_step  # the backbone's


def test_without_a_limit_the_optimizer_moves_as_far_as_it_says():
    free = moved(made(largest_step=None))
    small = moved(made(1e-3, largest_step=None))
    for name, share in free.items():
        np.testing.assert_allclose(share, 1e6 * small[name], rtol=0.05)


def test_a_lower_rate_of_the_guard_counts_where_steps_are_limited():
    """The limit comes first, so that lowering the rate helps."""
    state = made()
    slower = state.replace(opt_state=state.opt_state._replace(backbone_rate=jnp.float32(0.1)))
    for name, share in moved(slower).items():
        np.testing.assert_allclose(share, 0.1 * moved(state)[name], rtol=1e-2)


def test_parameters_must_be_given():
    state = made(head="frozen")
    with pytest.raises(ValueError, match="`params` must be given, as steps are limited"):
        state.tx.update(state.params, state.opt_state)


@pytest.mark.parametrize("value", [0, -1.0, "much", float("nan"), True])
def test_a_largest_step_that_is_no_positive_number_is_refused(value):
    with pytest.raises(ValueError, match="`largest_step` must be a number > 0"):
        cf.Alternation(largest_step=value)


def test_steps_of_lbfgs_keep_their_direction():
    """It learns curvature from its steps: with kernels limited and biases not, it was NaN within 30 steps."""
    x, y = normal(200, 20), RNG.integers(0, 2, 200)
    params = MODEL.init(jax.random.key(0), x)["params"]
    head = cf.find_head(MODEL, {"params": params}, x)
    state = cf.CronosTrainState.create(
        apply_fn=MODEL.apply, params=params, tx=optax.lbfgs(0.1, linesearch=None), head=head
    )

    @jax.jit
    def step(state):
        def loss(params):
            return optax.softmax_cross_entropy_with_integer_labels(MODEL.apply({"params": params}, x), y).mean()

        value, grads = jax.value_and_grad(loss)(state.params)
        return state.apply_gradients(grads=grads), value

    losses = []
    for _ in range(100):
        state, loss = step(state)
        losses.append(float(loss))
    assert np.isfinite(losses).all()
    assert losses[-1] < 0.1 * losses[0]


def test_a_step_is_shortened_as_a_whole_if_asked():
    params = {"a": {"kernel": jnp.ones((5, 4)), "bias": jnp.ones(4)}, "b": {"kernel": jnp.ones((4, 3))}}
    updates = jax.tree.map(lambda leaf: 10 * leaf, params)
    updates["b"]["kernel"] *= 7
    each, whole = (limited(updates, params, 0.1, together=together) for together in (False, True))
    np.testing.assert_array_equal(each["a"]["bias"], updates["a"]["bias"])
    np.testing.assert_array_equal(whole["b"]["kernel"], each["b"]["kernel"])
    factors = [float(np.max(a / b)) for a, b in zip(*map(jax.tree.leaves, (whole, updates)), strict=True)]
    np.testing.assert_allclose(factors, factors[0], rtol=1e-6)
    assert factors[0] < 0.1
