"""Finding, proving and solving the head of linen modules."""

import copy

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import freeze

import cronos_flax as cf

KEY = jax.random.key(0)
X = jax.random.normal(KEY, (32, 6))


class Lie(nn.Module):
    """Names its output layer Dense_0."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(4)(nn.relu(nn.Dense(20)(x)))


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(8)(x))
        return Lie()(nn.Dropout(0.5, deterministic=not train)(x))


class Remat(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.remat(Lie)()(nn.relu(nn.remat(nn.Dense)(8)(x)))


class Jitted(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.jit(Lie)()(x)


class Two(nn.Module):
    @nn.compact
    def __call__(self, x):
        gelu = nn.Dense(3)(nn.gelu(nn.Dense(9)(x)))
        return {"gelu": gelu, "relu": nn.Dense(3)(nn.relu(nn.Dense(9)(x)))}


class Skip(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(4)(x)
        return x + Lie()(x)


class Tied(nn.Module):
    @nn.compact
    def __call__(self, x):
        dense = nn.Dense(6)
        return nn.Dense(4)(nn.relu(dense(nn.relu(dense(x)))))


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x):
        class Block(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                return nn.Dense(6)(nn.relu(nn.Dense(20)(x))), None

        return nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)()(x, None)[0]


def sequential(*between, **kwargs):
    return nn.Sequential([nn.Dense(5, **kwargs), *between, nn.Dense(2, **kwargs)])


def init(model):
    return model.init({"params": KEY, "dropout": KEY}, X)


ACCEPTED = {
    "names lie": (Lie(), {}, ("Dense_1",), ("Dense_0",)),
    "norm and dropout before": (Normed(), {"train": False}, ("Lie_0", "Dense_1"), ("Lie_0", "Dense_0")),
    "train mode": (
        Normed(),
        {"train": True, "mutable": ["batch_stats"], "rngs": {"dropout": KEY}},
        ("Lie_0", "Dense_1"),
        ("Lie_0", "Dense_0"),
    ),
    "remat": (Remat(), {}, ("CheckpointLie_0", "Dense_1"), ("CheckpointLie_0", "Dense_0")),
    "jit": (Jitted(), {}, ("JitLie_0", "Dense_1"), ("JitLie_0", "Dense_0")),
    "chosen output": (Two(), {"output": "relu"}, ("Dense_3",), ("Dense_2",)),
    "no biases": (sequential(nn.relu, use_bias=False), {}, ("layers_0",), ("layers_2",)),
    "bfloat16": (
        sequential(nn.relu, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16),
        {},
        ("layers_0",),
        ("layers_2",),
    ),
}

REFUSED = {
    "several outputs": (Two(), {}, "output="),
    "gelu": (Two(), {"output": "gelu"}, "differ"),
    "leaky relu": (sequential(nn.leaky_relu), {}, "differ"),
    "softmax after": (nn.Sequential([sequential(nn.relu), nn.softmax]), {}, "differ"),
    "skip": (Skip(), {}, "differ"),
    "tied": (Tied(), {}, "used elsewhere"),
    "scan": (Scanned(), {}, "nn.scan"),
    "single Dense": (nn.Dense(3), {}, "one nn.Dense only"),
    "no Dense": (nn.LayerNorm(), {}, "no nn.Dense"),
}


@pytest.mark.parametrize(("model", "kwargs", "hidden", "output"), ACCEPTED.values(), ids=ACCEPTED)
def test_accepted_modules_are_solved_and_only_their_head_changes(model, kwargs, hidden, output):
    variables = init(model)
    kept = copy.deepcopy(jax.tree.map(np.asarray, variables))
    head = cf.find_head(model, variables, X, **kwargs)
    assert head.paths == (hidden, output)
    assert "/".join(hidden) in str(head)
    same = jax.tree.map(
        lambda a, b: bool(jnp.array_equal(a, b)), variables, head.write(variables, head.read(variables))
    )
    assert all(jax.tree.leaves(same))
    y = jax.random.normal(KEY, (32, head.outputs))
    fitted, solution = cf.fit_head(head, variables, (X, y))
    assert solution.stats.objective < solution.stats.initial_objective
    for (path, old), new in zip(jax.tree_util.tree_leaves_with_path(variables), jax.tree.leaves(fitted), strict=True):
        names = tuple(entry.key for entry in path)[1:-1]
        assert old.dtype == new.dtype
        assert bool(jnp.array_equal(old, new)) == (names not in head.paths)
    jax.tree.map(np.testing.assert_array_equal, variables, kept)


@pytest.mark.parametrize(("model", "kwargs", "reason"), REFUSED.values(), ids=REFUSED)
def test_other_modules_are_refused_with_the_reason(model, kwargs, reason):
    with pytest.raises(ValueError, match=reason):
        cf.find_head(model, init(model), X, **kwargs)


def test_batches_give_what_whole_arrays_give_and_frozen_dicts_stay_frozen():
    variables = freeze(init(Lie()))
    head = cf.find_head(Lie(), variables, X)
    y = jax.random.normal(KEY, (32, 4))
    whole, _ = cf.fit_head(head, variables, (X, y))
    batches = [{"image": X[i : i + 10], "label": y[i : i + 10]} for i in range(0, 32, 10)]
    parts, _ = cf.fit_head(head, variables, batches, unpack=lambda b: ((b["image"],), b["label"]))
    assert type(whole) is type(variables)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), whole, parts)


def test_leading_axes_are_rows():
    tokens = X.reshape(8, 4, 6)
    head = cf.find_head(Lie(), init(Lie()), tokens)
    assert head.inputs(init(Lie()), tokens).shape == (32, 6)
    _, solution = cf.fit_head(head, init(Lie()), (tokens, jnp.ones((8, 4, 4))))
    assert solution.stats.objective < solution.stats.initial_objective


def test_numerical_failure_is_raised_unless_asked_not_to():
    variables = jax.tree.map(lambda leaf: leaf * 1e25, init(Lie()))
    head = cf.find_head(Lie(), init(Lie()), X)
    with pytest.raises(FloatingPointError, match="not finite"):
        cf.fit_head(head, variables, (X, jnp.ones((32, 4))))
    same, solution = cf.fit_head(head, variables, (X, jnp.ones((32, 4))), throw=False)
    assert solution.status == cf.Status.nonfinite
    jax.tree.map(np.testing.assert_array_equal, same, variables)


@pytest.mark.parametrize(
    ("loss", "width"),
    [(loss, jnp.float32) for loss in ("squared", "softmax", "logistic", "huber", "hinge")]
    + [("softmax", jnp.bfloat16)],
)
def test_fit_head_takes_every_loss_and_its_targets(loss, width):
    model = nn.Sequential([nn.Dense(5, dtype=width, param_dtype=width), nn.tanh, Half(width)])
    variables = model.init(KEY, X)
    labels = jnp.argmax(X[:, :3], axis=1)
    y = {"softmax": labels, "logistic": jax.nn.one_hot(labels, 3, dtype=int)}.get(loss, cf.signed_targets(labels, 3))
    head = cf.find_head(model, variables, X)
    solver = cf.Cronos(loss=loss, max_iters=5, class_weight="balanced" if loss != "logistic" else None)
    fitted, solution = cf.fit_head(head, variables, (X, y), solver=solver)
    assert solution.stats.objective < solution.stats.initial_objective
    network = jax.tree.map(lambda v: v.astype(jnp.float32), head.read(fitted))
    features = head.inputs(variables, X).astype(jnp.float32)
    again = solver.objective(network, features, y, solution.stats.beta)
    np.testing.assert_allclose(solution.stats.objective, again, rtol=1e-3)


class Half(nn.Module):
    """A head in another precision."""

    width: jnp.dtype

    @nn.compact
    def __call__(self, x):
        kind = {"dtype": self.width, "param_dtype": self.width}
        return nn.Dense(3, **kind)(nn.relu(nn.Dense(20, **kind)(x)))
