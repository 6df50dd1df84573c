"""Feeding and solving the head of linen modules; which modules have one is the zoo's affair."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import drawn, random_network
from flax.core import freeze
from zoo import Siamese

import cronos_flax as cf

ROOT = Path(__file__).resolve().parents[1]
KEY = jax.random.key(0)
X = jax.random.normal(KEY, (32, 6))


class Lie(nn.Module):
    """Names its output layer Dense_0."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(4)(nn.relu(nn.Dense(20)(x)))


def init(model):
    return jax.jit(model.init)(KEY, X)


def test_batches_give_what_whole_arrays_give_and_frozen_dicts_stay_frozen():
    variables = freeze(init(Lie()))
    head = cf.find_head(Lie(), variables, X)
    y = jax.random.normal(KEY, (32, 4))
    whole, _ = cf.fit_head(head, variables, (X, y))
    batches = [{"image": X[i : i + 10], "label": y[i : i + 10]} for i in range(0, 32, 10)]
    parts, _ = cf.fit_head(head, variables, batches, unpack=lambda b: ((b["image"],), b["label"]))
    assert type(whole) is type(variables)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), whole, parts)


@pytest.mark.parametrize("dtype", ["int32", "uint8", "bool"])
def test_a_head_without_a_backbone_takes_integers(dtype):
    """NumPy stopped the search, as integers have no precision."""
    rows = np.asarray(jax.random.randint(KEY, (32, 6), 0, 9)).astype(dtype)
    variables = init(Lie())
    solver, labels = cf.Cronos(loss="softmax", max_iters=2), np.arange(32) % 4
    fitted, solution = cf.fit_head(cf.find_head(Lie(), variables, rows), variables, (rows, labels), solver=solver)
    as_floats = rows.astype("float32")
    expected, _ = cf.fit_head(cf.find_head(Lie(), variables, as_floats), variables, (as_floats, labels), solver=solver)
    jax.tree.map(np.testing.assert_array_equal, fitted, expected)
    beta = float(solution.stats.beta)
    assert float(solver.objective(solution.params, as_floats, labels, beta)) == pytest.approx(
        float(solution.stats.objective), rel=1e-5
    )


def test_shapes_of_keyword_arguments_are_said():
    """``()`` was said of them."""

    class Named(nn.Module):
        @nn.compact
        def __call__(self, image):
            return Lie()(image)

    variables = jax.jit(Named().init)(KEY, X)
    with pytest.raises(ValueError, match=r"find_head: the module cannot .* of shapes \{'picture': \(32, 6\)\}"):
        cf.find_head(Named(), variables, picture=X)
    head = cf.find_head(Named(), variables, image=X)
    with pytest.raises(ValueError, match=r"fit_head: the batch must be .* of shapes \{'image': \(32, 3\)\}"):
        cf.fit_head(head, variables, [X], unpack=lambda x: ({"image": x[:, :3]}, np.zeros((32, 4), "float32")))


def test_a_complex_layer_is_no_layer_of_a_head():
    """It was found, and JAX stopped its first solve in training."""
    hidden = nn.Dense(20, param_dtype="complex64")
    model = nn.Sequential([nn.Dense(6), nn.tanh, hidden, lambda x: nn.relu(x.real), nn.Dense(4)])
    with pytest.raises(ValueError, match="layers_2 → layers_4: its weights and inputs must be real, got complex64"):
        cf.find_head(model, init(model), X)
    model = nn.Sequential([nn.Dense(20), nn.relu, nn.Dense(4), lambda x: x.astype("complex64")])
    with pytest.raises(ValueError, match="outputs on the batch must be finite floats, got complex64"):
        cf.find_head(model, init(model), X)


def test_the_order_of_batches_changes_nothing():
    x = np.asarray(jax.random.normal(KEY, (3000, 6)))  # enough rows to be sampled
    y = np.argmax(x[:, :4], axis=1)
    variables = init(Lie())
    head = cf.find_head(Lie(), variables, x[:32])
    batches = [(x[i : i + 100], y[i : i + 100]) for i in range(0, 3000, 100)]
    solver = cf.Cronos(loss="softmax", max_iters=5)
    there, _ = cf.fit_head(head, variables, batches, solver=solver)
    back, _ = cf.fit_head(head, variables, batches[::-1], solver=solver)
    jax.tree.map(np.testing.assert_array_equal, there, back)


def test_images_are_not_kept():
    done = subprocess.run([sys.executable, "tests/streamed.py"], capture_output=True, text=True, check=True, cwd=ROOT)
    assert float(done.stdout) < 220  # all images as float32 would add 60


def test_masked_tokens_are_left_out_and_counted_by_the_callback():
    tokens, mask = X.reshape(8, 4, 6), (np.arange(4) < 1 + np.arange(8)[:, None] % 4)
    y = np.argmax(tokens[..., :4], axis=-1)
    variables = init(Lie())
    head = cf.find_head(Lie(), variables, tokens)
    told = []
    solver = cf.Cronos(loss="softmax", max_iters=5)
    batches = [(tokens, y, mask.astype("float32"))]
    masked, _ = cf.fit_head(
        head, variables, batches, solver=solver, unpack=lambda b: ((b[0],), b[1], b[2]), callback=told.append
    )
    assert told[0]["rows"] == mask.sum()
    assert "objective" in told[-1]
    there = cf.fit_head(head, variables, (tokens[mask], y[mask]), solver=solver)[0]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), masked, there)


def test_loaders_may_use_their_buffers_again_and_batches_may_be_all_masked():
    y, variables = np.asarray(jax.random.normal(KEY, (32, 4))), init(Lie())
    head = cf.find_head(Lie(), variables, X)
    solver = cf.Cronos(max_iters=5)

    def loader():
        buffer, weight = np.empty((8, 4), "float32"), np.empty(8, "float32")
        for i in range(0, 40, 8):
            buffer[:], weight[:] = y[i % 32 : i % 32 + 8], i < 32  # the last batch repeats the first, and is masked
            yield np.asarray(X[i % 32 : i % 32 + 8]), buffer, weight

    there, _ = cf.fit_head(head, variables, loader(), solver=solver, unpack=lambda b: ((b[0],), b[1], b[2]))
    whole, _ = cf.fit_head(head, variables, (X, y), solver=solver)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), there, whole)


TOKENS = X.reshape(8, 4, 6)
BAD = {
    "transposed labels": ([(TOKENS, np.zeros((4, 8), int))], {}, "targets must have"),
    "labels of sequences": ([(TOKENS, np.zeros(8, int))], {}, "targets must have"),
    "ragged targets": ([(X, [[1], [1, 2]])], {}, "targets must be an array of numbers"),
    "targets that are no numbers": ([(X, np.array([None] * 32))], {}, "targets must be numbers"),
    "no rows": ((None, X), {}, "`data` = "),
    "lists": (([[1.0] * 6] * 32, X), {}, "`data` = "),
    "no batches": ([], {}, "at least one batch"),
    "no weight": ([((X,), X[:, :4], 0 * X[:, 0])], {"unpack": lambda batch: batch}, "positive weight"),
    "weight of another shape": (
        [((X,), X[:, :4], X[:5, 0] ** 2)],
        {"unpack": lambda batch: batch},
        "`weight` must have",
    ),
    "unpack of another kind": ([X], {"unpack": lambda batch: batch}, "`unpack` must return"),
    "unpack": ([X], {"unpack": 3}, "`unpack` must be a function"),
    "callback": ((X, X[:, :4]), {"callback": 3}, "`callback` must be a function"),
    "another module's batch": ([(X[:, :3], X[:, :4])], {}, "one that the model takes"),
}


@pytest.mark.parametrize(("data", "kwargs", "reason"), BAD.values(), ids=BAD)
def test_bad_data_are_refused(data, kwargs, reason):
    variables = init(Lie())
    with pytest.raises(ValueError, match=f"fit_head: .*{reason}"):
        cf.fit_head(cf.find_head(Lie(), variables, X), variables, data, **kwargs)


def test_several_arguments_that_came_as_one_are_told_of():
    model, data = Siamese(), ((X, X[::-1]), X[:, :4])
    variables = model.init(KEY, *data[0])
    head = cf.find_head(model, variables, *data[0])
    with pytest.raises(ValueError, match=r"fit_head: .*takes several arguments, .*returns \(\(a, b\), y\)"):
        cf.fit_head(head, variables, data)
    state = cf.CronosTrainState.create(apply_fn=model.apply, params=variables["params"], tx=optax.sgd(0.1), head=head)
    with pytest.raises(ValueError, match=r"train: .*takes several arguments, .*returns \(\(a, b\), y\)"):
        cf.train(state, [data], epochs=1)
    cf.fit_head(head, variables, [data], unpack=lambda batch: batch, solver=cf.Cronos(max_iters=1))


def test_weights_and_variables_of_another_module_are_refused():
    variables = init(Lie())
    head = cf.find_head(Lie(), variables, X)
    with pytest.raises(ValueError, match="`variables` must be a mapping with 'params'"):
        cf.fit_head(head, variables["params"], (X, X[:, :4]))
    with pytest.raises(ValueError, match="`network` must be"):
        head.write(variables, dataclasses.replace(head.read(variables), bias1=None))


WRONG = [
    {"kernel1": (2, 20)},  # other features
    {"kernel2": (20, 9), "bias2": (9,)},  # other outputs
    {"bias2": (1,)},
    {"bias1": (5,)},  # several widths
    {"kernel1": (6, 7), "bias1": (7,)},
    {"kernel1": (120,)},
]


@pytest.mark.parametrize("shapes", WRONG, ids=str)
def test_only_a_network_between_the_same_layers_is_written(shapes):
    """Variables were broken, without a word."""
    variables = init(Lie())
    head = cf.find_head(Lie(), variables, X)
    wide = cf.TwoLayer(*(np.ones(shape, "float32") for shape in ((6, 12), (12,), (12, 4), (4,))))
    assert head.read(head.write(variables, wide)).kernel1.shape == (6, 12)
    network = dataclasses.replace(head.read(variables), **{name: np.ones(shape) for name, shape in shapes.items()})
    with pytest.raises(ValueError, match=r"`network` must have the widths of the head: kernel1 \(6, m\)"):
        head.write(variables, network)
    with pytest.raises(ValueError, match="`output` must be a key"):
        cf.find_head(Lie(), variables, X, output="logits")


def test_mutable_collections_are_handed_back():
    class Normed(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            return Lie()(nn.BatchNorm(use_running_average=not train)(x))

    variables = Normed().init(KEY, X, train=False)
    head = cf.find_head(Normed(), variables, X, train=False)
    rows, updates = head.inputs(variables, X, train=True, mutable=["batch_stats"])
    _, expected = Normed().apply(variables, X, train=True, mutable=["batch_stats"])
    jax.tree.map(np.testing.assert_array_equal, dict(updates), dict(expected))
    np.testing.assert_allclose(rows.mean(axis=0), 0, atol=1e-5)


@pytest.mark.parametrize("hidden_bias", [True, False])
def test_pruning_leaves_out_neurons_that_do_nothing(hidden_bias):
    network = random_network(0, p=6, m=5, C=3, hidden_bias=hidden_bias)
    dead = dataclasses.replace(network, kernel2=network.kernel2 * np.array([1, 0, 1, 1, 0])[:, None])
    pruned = cf.prune_head(jax.tree.map(jnp.asarray, dead))
    assert pruned.kernel1.shape == (6, 3)
    np.testing.assert_allclose(cf.predict(pruned, X), cf.predict(dead, X), atol=1e-5)
    nothing = jax.tree.map(jnp.zeros_like, dead)
    assert cf.prune_head(nothing).kernel1.shape == (6, 1)
    with pytest.raises(ValueError, match="`tol` must be"):
        cf.prune_head(pruned, tol=1.0)


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
    variables = jax.jit(model.init)(KEY, X)
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


def test_targets_whose_squares_are_infinite_are_said_as_such():
    """The default β was infinite, and the error was about a `beta` that nobody gave."""
    variables = init(Lie())
    y = np.float32(1e30) * X[:, :4]
    with pytest.raises(FloatingPointError, match="Check the scale of the features, of y"):
        cf.fit_head(cf.find_head(Lie(), variables, X), variables, (X, y), solver=cf.Cronos(max_iters=2))


def test_a_head_that_ends_worse_than_a_constant_is_told():
    model, labels = nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(2)]), (X[:, 0] > 0).astype(int)
    variables = model.init(KEY, X)
    head = cf.find_head(model, variables, X)
    network = jax.tree.map(lambda leaf: 100 * leaf, head.read(variables))
    far = head.write(variables, network)
    with pytest.warns(
        UserWarning, match=r"fit_head: the regularised loss is .* after the solve, and 0\.6\d* for outputs"
    ):
        cf.fit_head(head, far, (X, labels), solver=cf.Cronos(loss="softmax", gates="fixed", max_iters=1))
    _, solution = cf.fit_head(head, far, (X, labels), solver=cf.Cronos(loss="softmax"))  # without a word
    assert solution.stats.objective < solution.stats.null_loss


def test_an_output_without_an_axis_is_told_how_to_get_one():
    class Squeezed(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(1)(nn.relu(nn.Dense(4)(x)))[:, 0]

    x = np.random.default_rng(0).normal(size=(16, 3)).astype("float32")
    variables = Squeezed().init(jax.random.key(0), x)
    with pytest.raises(ValueError, match=r"one axis, \(16,\).* output=lambda out: out\[:, None\]"):
        cf.find_head(Squeezed(), variables, x)
    head = cf.find_head(Squeezed(), variables, x, output=lambda out: out[:, None])
    assert head.outputs == 1


def test_outputs_of_another_shape_than_the_two_layers_give_are_told_how_to_get_it():
    """It was said that outputs differ by inf of their size, or that no two layers fit."""

    class Flattened(nn.Module):
        """Looks at each step of a sequence by itself, as actors and critics do."""

        end: str

        @nn.compact
        def __call__(self, x):
            outputs = 1 if self.end == "squeezed" else 2
            out = nn.Dense(outputs)(nn.relu(nn.Dense(4)(x.reshape(-1, 3) if self.end == "reshaped" else x)))
            return {"squeezed": out[..., 0], "reshaped": out.reshape(*x.shape[:2], -1), "mean": out.mean(axis=1)}[
                self.end
            ]

    def find(end, **how):
        return cf.find_head(Flattened(end), drawn(Flattened(end), jax.random.key(0), x), x, **how)

    x = np.random.default_rng(0).normal(size=(16, 5, 3)).astype("float32")
    with pytest.raises(ValueError, match=r"2 axes, \(16, 5\).* output=lambda out: out\[\.\.\., None\]"):
        find("squeezed")
    assert find("squeezed", output=lambda out: out[..., None]).outputs == 1
    with pytest.raises(ValueError, match=r"shape \(80, 2\), and the module's \(16, 5, 2\).*out\.reshape\(-1, 2\)"):
        find("reshaped")
    assert find("reshaped", output=lambda out: out.reshape(-1, 2)).rows == 80
    with pytest.raises(ValueError, match=r"shape \(16, 5, 2\), and the module's \(16, 2\): something follows\. If"):
        find("mean")


def test_grafting_variables_draws_the_head_as_init_does_and_no_backbone():
    """On EfficientNet-Lite0 to draw a backbone that is replaced took half a minute."""
    draws = []

    def counted(key, shape, dtype):
        drawn = nn.initializers.lecun_normal()(key, shape, dtype)
        return jax.pure_callback(lambda value: draws.append(shape) or value, drawn, drawn)

    class Backbone(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3, name="fc")(nn.tanh(nn.Dense(7, kernel_init=counted)(x)))

    pretrained = Backbone().init(jax.random.key(1), X)
    grafted = cf.graft(Backbone(), at="fc", hidden=5, features=2)
    whole = grafted.init(KEY, X)
    assert len(draws) == 2
    made = cf.graft_variables(grafted, pretrained, KEY, X)
    jax.block_until_ready(made)
    assert len(draws) == 2
    assert jax.tree.structure(made) == jax.tree.structure(whole)
    same = jax.tree.map(lambda a, b: bool(np.array_equal(a, b)), made, whole)
    assert [path[-2].key for path, is_same in jax.tree_util.tree_leaves_with_path(same) if not is_same] == ["Dense_0"]
    np.testing.assert_array_equal(
        made["params"]["backbone"]["Dense_0"]["kernel"], pretrained["params"]["Dense_0"]["kernel"]
    )
