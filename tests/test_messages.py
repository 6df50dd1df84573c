"""What is easily given wrong is refused with the words that help."""

import types
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import drawn
from flax import jax_utils, nnx
from forked import Forked

import cronos_flax as cf
from cronos_flax._head.data import UserData

KEY = jax.random.key(0)
X = np.asarray(jax.random.normal(KEY, (32, 5)))
MODEL = nn.Sequential([nn.Dense(8), nn.tanh, nn.Dense(6), nn.relu, nn.Dense(3)])
VARIABLES = drawn(MODEL, jax.random.key(0), X)
HEAD = cf.find_head(MODEL, VARIABLES, X)


class LoRADense(nn.Dense):
    @nn.compact
    def __call__(self, x):
        down = self.param("down", nn.initializers.normal(), (x.shape[-1], 2))
        up = self.param("up", nn.initializers.zeros, (2, self.features))
        return super().__call__(x) + x @ down @ up


@pytest.mark.parametrize("paths", [None, ("layers_2", "layers_4")])
def test_a_layer_with_parameters_of_its_own_is_refused_by_name(paths):
    """Before: a subclass of Dense gave a raw error."""
    model = nn.Sequential([nn.Dense(8), nn.tanh, nn.Dense(6), nn.relu, LoRADense(3)])
    with pytest.raises(ValueError, match=r"find_head: .*got more at layers_4 \(down, up\)"):
        cf.find_head(model, model.init(jax.random.key(0), X), X, paths=paths)


class Graph(NamedTuple):
    nodes: jax.Array
    globals: jax.Array


@pytest.mark.parametrize(
    ("returned", "output", "match"),
    [
        (lambda out: {"logits": out}, "logit", r"got 'logit'; the outputs: \['logits'\]\."),
        (
            lambda out: Graph(X, out),
            "globals",
            r"a Graph of 2\. It is an attribute: give output=lambda out: out\.globals",
        ),
        (lambda out: out, "logits", r"got 'logits'; the outputs: one array \(32, 3\)\."),
        (lambda out: {"logits": out}, lambda out: out["logit"], r"raises KeyError: 'logit'; the outputs: \['logits'\]"),
    ],
)
def test_an_output_that_there_is_not_is_not_blamed_on_the_batch(returned, output, match):
    with pytest.raises(ValueError, match=f"^find_head: `output` must be .*{match}"):
        cf.find_head(MODEL, VARIABLES, X, method=lambda model, x: returned(model(x)), output=output)


def test_a_module_that_returns_more_in_training_is_told_how_its_output_is_chosen():
    """It was an error about a tuple without a shape."""

    class More(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            out = nn.Dense(3)(nn.relu(nn.Dense(6)(nn.tanh(nn.Dense(8)(x)))))
            return (out, jnp.mean(out)) if train else out

    model, labels = More(), np.arange(32) % 3
    made = {"apply_fn": model.apply, "params": drawn(model, jax.random.key(0), X)["params"], "tx": optax.sgd(0.1)}

    def train(**chosen):
        head = cf.find_head(model, {"params": made["params"]}, X, **chosen)
        state = cf.CronosTrainState.create(**made, head=head, solver=cf.Cronos(loss="softmax"))
        cf.train(state, (X, labels), epochs=1, train_kwargs={"train": True})

    with pytest.raises(
        ValueError, match=r"train: the module must return one array .*, got \(\(32, 3\), \(\)\)\. Choose"
    ):
        train()
    train(output=lambda out: out[0] if isinstance(out, tuple) else out)
    with pytest.raises(
        ValueError, match=r"train: `output` must be .* one that raises .*outputs: a tuple of 2\. If .* takes both"
    ):
        train(output=lambda out: jnp.asarray(out.astype(float)))


@pytest.mark.parametrize("output", [0, -1, "logits", (..., 0)])
def test_an_index_chooses_no_row_of_one_array(output):
    """Before: it took a row, and the layers were blamed."""
    expected = (
        r"find_head: `output` must be .* of several outputs, .*; the outputs: one array \(32, 3\)\. Leave `output` out"
    )
    with pytest.raises(ValueError, match=expected):
        cf.find_head(MODEL, VARIABLES, X, output=output)
    model = nnx.Sequential(nnx.Linear(5, 6, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(6, 3, rngs=nnx.Rngs(1)))
    with pytest.raises(ValueError, match=expected):
        cf.nnx.find_head(model, X, output=output)
    assert cf.find_head(MODEL, VARIABLES, X, output=lambda out: out[:]).paths == HEAD.paths


def test_an_index_chooses_no_row_in_training_either():
    """A module that returns one array in training only was trained on its first row."""

    class Less(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            out = nn.Dense(3)(nn.relu(nn.Dense(6)(nn.tanh(nn.Dense(8)(x)))))
            return out if train else (out, jnp.mean(out))

    model = Less()
    params = drawn(model, KEY, X)["params"]
    head = cf.find_head(model, {"params": params}, X, output=0)
    made = {"apply_fn": model.apply, "params": params, "tx": optax.sgd(0.1), "head": head}
    state = cf.CronosTrainState.create(**made, solver=cf.Cronos(loss="softmax"))
    expected = r"train: `output` must be .* several outputs, .* got 0; the outputs: one array .*output=lambda"
    with pytest.raises(ValueError, match=expected):
        cf.train(state, (X, np.arange(32) % 3), epochs=1, train_kwargs={"train": True})


def test_shapes_alone_are_refused():
    """They were errors of JAX about arguments."""
    match = "find_head: variables and data must be arrays with values, got shapes alone"
    with pytest.raises(ValueError, match=match):
        cf.find_head(MODEL, jax.eval_shape(MODEL.init, jax.random.key(0), X), X)
    with pytest.raises(ValueError, match=match):
        cf.nnx.find_head(nnx.eval_shape(lambda: nnx.Linear(5, 3, rngs=nnx.Rngs(0))), X)


def test_an_nnx_model_that_asks_for_the_type_of_a_layer_is_refused():
    """Layers are watched by subclasses: features were of another model, without a word."""

    class Asks(nnx.Module):
        def __init__(self, rngs):
            self.encoder, self.hidden = nnx.Linear(5, 8, rngs=rngs), nnx.Linear(8, 6, rngs=rngs)
            self.out = nnx.Linear(6, 3, rngs=rngs)

        def __call__(self, x):
            x = self.encoder(x)
            x = nnx.silu(x) if type(self.encoder) is nnx.Linear else x
            return self.out(nnx.relu(self.hidden(x)))

    with pytest.raises(ValueError, match=r"find_head: Asks must compute the same .* subclasses .* use isinstance"):
        cf.nnx.find_head(Asks(nnx.Rngs(0)), X)


BY_ATTRIBUTES = {
    "a factor": lambda model, x: x * len(vars(model)),
    "a factor of a layer": lambda model, x: x * len(vars(model.hidden)),
    "a constant": lambda model, x: x + np.arange(float(len(vars(model))), dtype="float32").sum() * np.eye(1, 8, 2),
    "a shape": lambda model, x: x + jnp.ones(len(vars(model.out))).sum(),
    "variables": lambda model, x: x / len(jax.tree.leaves(nnx.state(model))),
}


class ByAttributes(nnx.Module):
    def __init__(self, change, sows=False):
        rngs = nnx.Rngs(0)
        self.encoder, self.hidden = nnx.Linear(5, 8, rngs=rngs), nnx.Linear(8, 6, rngs=rngs)
        self.norm, self.out = nnx.BatchNorm(8, rngs=rngs), nnx.Linear(6, 3, rngs=rngs)
        self.change, self.sows = change, sows

    def __call__(self, x):
        x = self.change(self, jnp.tanh(self.norm(self.encoder(x))))
        if self.sows:
            self.sow(nnx.Intermediate, "inside", x)
        return self.out(nnx.relu(self.hidden(x)))


@pytest.mark.parametrize("name", list(BY_ATTRIBUTES))
@pytest.mark.parametrize("statistics", [None, "batch"])
def test_an_nnx_model_that_goes_by_all_its_attributes_is_refused(name, statistics):
    """While it is watched there are more of them: features were of another model, without a word."""
    model = ByAttributes(BY_ATTRIBUTES[name])
    with pytest.raises(ValueError, match=r"find_head: ByAttributes must compute the same .*vars\(self\)"):
        cf.nnx.find_head(model, X, statistics=statistics)


@pytest.mark.parametrize("sows", [False, True])
def test_an_nnx_model_that_goes_by_some_of_its_attributes_is_none_of_these(sows):
    def layers(model, x):
        return x * sum(isinstance(value, nnx.Linear) for value in vars(model).values())

    model = ByAttributes(layers, sows)
    inputs = cf.nnx.find_head(model, X).inputs(model, X)
    before = 3 * jnp.tanh(model.encoder(X) / jnp.sqrt(1 + 1e-5))  # fresh running statistics
    np.testing.assert_allclose(inputs, before, rtol=1e-5, atol=1e-6)


def test_an_object_that_holds_the_module_is_refused_with_its_attribute():
    """Before: the message did not help."""
    holder = types.SimpleNamespace(module=MODEL, params=VARIABLES["params"])
    with pytest.raises(ValueError, match=r"find_head: `model` .*`\.module`"):
        cf.find_head(holder, {"params": holder.params}, X)


def test_replicated_variables_are_named_as_such():
    """Before: the message did not help."""
    with pytest.raises(ValueError, match=r"fit_head: .*\(1, 8, 6\) at layers_2.*unreplicate"):
        cf.fit_head(HEAD, jax_utils.replicate(VARIABLES), (X, np.zeros(32, int)))
    given = {"apply_fn": MODEL.apply, "params": VARIABLES["params"], "tx": optax.sgd(0.1), "head": HEAD}
    state = cf.CronosTrainState.create(**given, solver=cf.Cronos(loss="softmax"))
    with pytest.raises(ValueError, match=r"solve_head: .*\(1, 8, 6\) at layers_2.*unreplicate"):
        jax_utils.replicate(state).solve_head((X, np.zeros(32, int)))


def test_variables_of_several_models_are_named_as_such():
    """The message spoke of replicated ones only."""
    several = jax.tree.map(lambda leaf: np.stack([leaf, leaf]), VARIABLES)
    with pytest.raises(ValueError, match=r"fit_head: .*\(2, 8, 6\) at layers_2.*vmap.*leaf\[i\]"):
        cf.fit_head(HEAD, several, (X, np.zeros(32, int)))


def test_lists_in_the_place_of_arrays_are_named():
    """They gave a bare AttributeError."""
    listed = jax.tree.map(lambda leaf: np.asarray(leaf).tolist(), VARIABLES)
    for call in (
        lambda: cf.find_head(MODEL, listed, X),
        lambda: cf.fit_head(HEAD, listed, (X, np.zeros(32, int))),
        lambda: HEAD.inputs(listed, X),
        lambda: cf.CronosTrainState.create(apply_fn=MODEL.apply, params=listed["params"], tx=optax.sgd(0.1), head=HEAD),
    ):
        with pytest.raises(ValueError, match=r"must hold arrays, got a list of numbers at .*layers_0/bias.*is_leaf"):
            call()
    network = cf.TwoLayer(np.ones((5, 3)), None, np.ones((3, 1)).tolist(), None)
    for call in (
        lambda: cf.predict(network, X),
        lambda: cf.Cronos().solve(X, X[:, 0], init=network),
        lambda: cf.Cronos().objective(network, X, X[:, 0], 0.1),
    ):
        with pytest.raises(ValueError, match="must consist of arrays, got a list as kernel2"):
            call()


def test_variables_without_the_head_are_refused_with_what_the_batch_met():
    """It was a bare KeyError of the layer's name."""
    with pytest.raises(ValueError, match="gather_features: the batch must be one that the model takes with these vari"):
        cf.gather_features(HEAD, {"params": {}}, (X, X))


def test_whole_variables_in_place_of_the_parameters_are_refused_at_once():
    """The first solve blamed the batch, and gradient steps before it had no weight decay."""
    given = {"apply_fn": MODEL.apply, "params": VARIABLES, "tx": optax.sgd(0.1), "head": HEAD}
    with pytest.raises(ValueError, match=r"CronosTrainState: `params` must be variables\['params'\].*without layers_2"):
        cf.CronosTrainState.create(**given)


def test_collections_given_by_their_name_are_refused_with_the_right_keyword():
    """Before: the message did not help."""
    given = {"apply_fn": MODEL.apply, "params": VARIABLES["params"], "tx": optax.sgd(0.1), "head": HEAD}
    with pytest.raises(ValueError, match=r'`batch_stats` is not a field.*model_state=\{"batch_stats": \.\.\.\}'):
        cf.CronosTrainState.create(**given, batch_stats={})


class Setup(nn.Module):
    def setup(self):
        self.fc = nn.Dense(3)

    def __call__(self, x):
        return self.fc(x)


def test_a_module_that_makes_its_layers_in_setup_cannot_be_replaced_but_its_layers_can():
    """Before: a raw AssignSubModuleError."""
    model = nn.Sequential([nn.Dense(8), Setup()])
    pretrained = model.init(jax.random.key(0), X)
    grafted = cf.graft(model, at="layers_1", hidden=6, features=3)
    with pytest.raises(ValueError, match=r"graft: `at` must be the path of a layer, got layers_1, a Setup"):
        cf.graft_variables(grafted, pretrained, jax.random.key(1), X)
    grafted = cf.graft(model, at="layers_1/fc", hidden=6)
    assert (
        "hidden"
        in cf.graft_variables(grafted, pretrained, jax.random.key(1), X)["params"]["backbone"]["layers_1"]["fc"]
    )


PIXELS = np.ones((2, 6, 6, 3), "float32")
PATCHES = partial(jax.lax.conv_general_dilated_patches, filter_shape=(3, 3), window_strides=(1, 1), padding="SAME")
MORE = {
    "kernel_size=": ({"kernel_size": (3, 3)}, {}),
    "strides=2": ({"strides": 2}, {}),
    "strides=": ({"strides": (1, 2)}, {}),
    "kernel_dilation=": ({"kernel_size": (2, 1), "kernel_dilation": (2, 1)}, {}),
    "feature_group_count=3": ({"feature_group_count": 3, "features": 3}, {}),
    "padding=1": ({"padding": 1}, {}),
    "and more": ({"kernel_size": (3, 3)}, {"features": 5}),
}


def convolutional(features=4, kernel_size=(1, 1), **settings):
    """The same model in linen and NNX."""
    conv = nnx.Conv(3, features, kernel_size, rngs=nnx.Rngs(0), **settings)
    return nn.Sequential([nn.Conv(features, kernel_size, **settings)]), nnx.Sequential(conv)


@pytest.mark.parametrize("name", MORE)
def test_a_head_takes_the_place_of_no_convolution_that_sees_more_than_one_pixel(name):
    """Before: a pointwise head, without a word."""
    settings, given = MORE[name]
    linen, model = convolutional(**settings)
    expected = rf"`at` must be .* of the last axis, .* got layers[_/]0, a Conv with .*{name if '=' in name else ''}"
    with pytest.raises(ValueError, match=expected):
        cf.graft(linen, at="layers_0", hidden=6, **given).init(jax.random.key(0), PIXELS)
    with pytest.raises(ValueError, match=expected):
        cf.nnx.graft(model, at="layers/0", hidden=6, rngs=nnx.Rngs(1), **given)


def test_a_head_takes_the_place_of_a_pointwise_convolution_and_of_another_by_patches():
    linen, model = convolutional()
    assert cf.graft(linen, at="layers_0", hidden=6).init_with_output(KEY, PIXELS)[0].shape == (2, 6, 6, 4)
    assert cf.nnx.graft(model, at="layers/0", hidden=6, rngs=nnx.Rngs(1))(PIXELS).shape == (2, 6, 6, 4)

    def pool(x, *_):
        return PATCHES(x, dimension_numbers=("NHWC", "HWIO", "NHWC"))

    linen, model = convolutional(kernel_size=(3, 3))
    assert cf.graft(linen, at="layers_0", hidden=6, pool=pool).init_with_output(KEY, PIXELS)[0].shape == (2, 6, 6, 4)
    of_patches = cf.nnx.graft(model, at="layers/0", hidden=6, in_features=27, pool=pool, rngs=nnx.Rngs(1))
    assert of_patches(PIXELS).shape == (2, 6, 6, 4)


def test_a_head_of_pointwise_convolutions_is_told_how_to_be_found():
    """Before: that the module calls no nn.Dense, which a 1x1 convolution is."""
    model = nn.Sequential([nn.Conv(8, (3, 3)), nn.tanh, nn.Conv(6, (1, 1)), nn.relu, nn.Conv(2, (1, 1))])
    variables = drawn(model, KEY, PIXELS)
    with pytest.raises(ValueError, match=r"no nn.Dense.* 1×1 convolution .*, as at layers_4, is an nn.Dense on the"):
        cf.find_head(model, variables, PIXELS)
    rngs = nnx.Rngs(0)
    convolutions = nnx.Conv(3, 6, (1, 1), rngs=rngs), nnx.relu, nnx.Conv(6, 2, (1, 1), rngs=rngs)
    with pytest.raises(ValueError, match=r"calls no nnx.Linear.* 1×1 convolution .*, as at layers/2, is an nnx.Linear"):
        cf.nnx.find_head(nnx.Sequential(*convolutions), PIXELS)
    # What the message says is so.
    layers = variables["params"]
    dense = nn.Sequential([nn.Conv(8, (3, 3)), nn.tanh, nn.Dense(6), nn.relu, nn.Dense(2)])
    written = {name: {**layers[name], "kernel": layers[name]["kernel"][0, 0]} for name in ("layers_2", "layers_4")}
    variables_of_dense = {"params": {**layers, **written}}
    same = dense.apply(variables_of_dense, PIXELS), model.apply(variables, PIXELS)
    np.testing.assert_allclose(*same, rtol=1e-5, atol=1e-6)
    assert cf.find_head(dense, variables_of_dense, PIXELS).paths == (("layers_2",), ("layers_4",))


def test_a_pointwise_convolution_under_a_dense_is_told_of_too():
    """It was said that there is one nn.Dense only."""
    model = nn.Sequential([nn.Conv(8, (3, 3)), nn.tanh, nn.Conv(6, (1, 1)), nn.relu, nn.Dense(2)])
    variables = drawn(model, KEY, PIXELS)
    match = r"one nn.Dense only .* 1×1 convolution with the input width of the last nn.Dense, as at layers_2, is an nn"
    with pytest.raises(ValueError, match=match):
        cf.find_head(model, variables, PIXELS)
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(nnx.Conv(3, 6, (1, 1), rngs=rngs), nnx.relu, nnx.Linear(6, 2, rngs=rngs))
    with pytest.raises(ValueError, match=r"input width of the last nnx.Linear, as at layers/0, is an nnx.Linear on"):
        cf.nnx.find_head(model, PIXELS)


def test_convolutions_that_do_not_end_in_the_outputs_are_not_spoken_of():
    wide = nn.Sequential([nn.Conv(6, (1, 1)), nn.relu, nn.Conv(2, (3, 3))])
    with pytest.raises(ValueError, match=r"calls no nn.Dense\. Give it a two-layer head with cf\.graft\.$"):
        cf.find_head(wide, drawn(wide, KEY, PIXELS), PIXELS)
    pooled = nn.Sequential([nn.Conv(6, (1, 1)), nn.relu, lambda x: x.mean(axis=(1, 2)), nn.Dense(2)])
    with pytest.raises(
        ValueError, match=r"one nn.Dense only \(layers_3\)\. Give it a two-layer head with cf\.graft\.$"
    ):
        cf.find_head(pooled, drawn(pooled, KEY, PIXELS), PIXELS)


LINEN_LAYERS = {
    "an Embed that looks up a row for each integer": (nn.Embed(9, 4), np.ones((2, 6), int)),
    "a MultiHeadAttention that works on a sequence": (nn.MultiHeadAttention(1), PIXELS[0]),
    r"a DenseGeneral with axis=\(1, 2\)": (nn.DenseGeneral(4, axis=(1, 2)), PIXELS),
    "a ConvLocal with weights=those of each place": (nn.ConvLocal(4, (1, 1)), PIXELS),
}


@pytest.mark.parametrize("got", LINEN_LAYERS)
def test_a_head_takes_the_place_of_no_layer_of_another_kind(got):
    """Before: of a lookup it was said that it makes its layers in setup(); of the others nothing."""
    layer, x = LINEN_LAYERS[got]
    with pytest.raises(ValueError, match=f"got layers_0, {got}"):
        cf.graft(nn.Sequential([layer]), at="layers_0", hidden=6, features=4).init(KEY, x)


def test_a_head_takes_the_place_of_a_general_layer_whose_axis_is_the_last():
    """It was refused, though on rows of features axis 1 is the last."""
    layers = nn.Sequential([nn.Dense(8), nn.tanh, nn.DenseGeneral(4, axis=1)])
    grafted = cf.graft(layers, at="layers_2", hidden=6)
    variables = cf.graft_variables(grafted, jax.jit(layers.init)(KEY, X), KEY, X)
    assert cf.find_head(grafted, variables, X).outputs == 4
    with pytest.raises(ValueError, match=r"got layers_2, a DenseGeneral with axis=1\."):
        grafted.apply(variables, X.reshape(2, 16, 5))


NNX_LAYERS = {
    "an Embed that looks up a row for each integer": lambda rngs: nnx.Embed(9, 4, rngs=rngs),
    "a MultiHeadAttention that works on a sequence": lambda rngs: nnx.MultiHeadAttention(1, 4, rngs=rngs),
    r"a LinearGeneral with axis=\(0, -1\)": lambda rngs: nnx.LinearGeneral((2, 3), 4, axis=(0, -1), rngs=rngs),
    "a ConvTranspose with kernel_size": lambda rngs: nnx.ConvTranspose(3, 4, (2, 2), rngs=rngs),
}


@pytest.mark.parametrize("got", NNX_LAYERS)
def test_a_head_takes_the_place_of_no_nnx_layer_of_another_kind(got):
    rngs = nnx.Rngs(0)
    with pytest.raises(ValueError, match=f"got layers/0, {got}"):
        cf.nnx.graft(nnx.Sequential(NNX_LAYERS[got](rngs)), at="layers/0", hidden=6, rngs=rngs)


class Tokens(nnx.Module):
    def __init__(self, classify=None, jitted=False):
        self.classify, self.jitted = classify, jitted

    def __call__(self, x, mask):
        def classified(classify, x):
            return x if classify is None else classify(x)

        return (nnx.jit(classified) if self.jitted else classified)(self.classify, x)

    def encode(self, x):
        return self.classify(x)


MASK = np.arange(7) < np.arange(1, 5)[:, None]
WORDS = np.where(MASK[..., None], 1, 100).astype("float32") * np.ones((4, 7, 5), "float32")


def mean_of_words(x, tokens, mask):
    return (x * mask[..., None]).sum(axis=1) / mask.sum(axis=1, keepdims=True)


def of_words(at, **kwargs):
    rngs = nnx.Rngs(0)
    model = Tokens(None if at is None else nnx.Linear(5, 3, rngs=rngs), **kwargs)
    sizes = {"in_features": 5, "features": 3} if at is None else {}
    return cf.nnx.graft(model, at=at, hidden=6, pool=mean_of_words, rngs=rngs, **sizes)


@pytest.mark.parametrize("at", [None, "classify"])
def test_pool_of_a_grafted_nnx_model_is_given_the_mask(at):
    """Inside a model it was given what the replaced layer was called with, and there was no mask."""
    grafted = of_words(at)
    np.testing.assert_allclose(grafted(WORDS, MASK), grafted(np.ones_like(WORDS), mask=MASK), rtol=1e-6)
    head = cf.nnx.find_head(grafted, WORDS, MASK)
    np.testing.assert_allclose(head.inputs(grafted, WORDS, MASK), np.ones((4, 5)), rtol=1e-6)
    twice = nnx.jit(lambda model, x, mask: model(x, mask))
    for mask in (MASK, MASK[::-1]):
        np.testing.assert_allclose(twice(grafted, WORDS, mask), grafted(WORDS, mask), rtol=1e-5)


def test_where_the_arguments_of_a_grafted_nnx_model_are_not_known_it_is_said():
    grafted = of_words("classify")
    with pytest.raises(ValueError, match=r"graft: `pool` needs the arguments of the model, .*another method"):
        grafted.encode(WORDS)
    jitted = of_words("classify", jitted=True)  # compiled once, with the mask of the first call
    with pytest.raises(ValueError, match="must not be in a part of it that is transformed by itself"):
        jitted(WORDS, MASK)


class ByIndex:
    """As a data source of TFDS or a dataset of PyTorch: no __iter__."""

    def __getitem__(self, index):
        return np.ones((4, 3)), np.ones((4, 1))

    def __len__(self):
        return 2


@pytest.mark.parametrize(
    ("data", "remedy"),
    [
        (ByIndex(), r"got ByIndex\. It can be read by index only.*loader"),
        (lambda: iter(()), r"got function\. If it is a function that makes batches, .*__iter__"),
        (3, "got int\\.$"),
    ],
)
def test_data_that_cannot_be_iterated_over_are_refused_with_what_to_do(data, remedy):
    with pytest.raises(ValueError, match=f"`data` must be .x, y. or an iterable of batches, {remedy}"):
        UserData(data).check()


def test_several_networks_in_arrays_are_refused_with_what_to_do():
    """As vmap over keys gives: their status was a TypeError about Python scalars, and features were counted wrong."""
    x = np.ones((5, 3), "float32")
    one = cf.Cronos(loss="squared", max_iters=1).solve(x, x[:, :1], hidden=2)
    several = jax.tree.map(lambda leaf: jnp.stack([leaf] * 4), one)
    with pytest.raises(ValueError, match=r"status: `solution` must be of one solve, got \(4,\) of them"):
        several.status  # noqa: B018
    with pytest.raises(ValueError, match=r"predict: `params` must be one network.*kernel1 has the shape \(4, 3, 2\)"):
        cf.predict(several.params, x)
    assert jax.tree.map(lambda leaf: leaf[0], several).status == one.status
    assert jax.vmap(cf.predict, (0, None))(several.params, x).shape == (4, 5, 1)


DEVICES = """
import jax, numpy as np, cronos_flax as cf
one, two = jax.devices()
X, y = np.ones((8, 2), "float32"), np.ones((8, 1), "float32")
network = cf.TwoLayer(np.ones((2, 3), "float32"), None, np.ones((3, 1), "float32"), None)
there, away, solver = jax.device_put(X, one), lambda tree: jax.device_put(tree, two), cf.Cronos()
for call in (
    lambda: solver.solve(there, away(y), hidden=3),
    lambda: solver.solve(there, y, hidden=3, sample_weight=away(y[:, 0])),
    lambda: solver.solve(there, y, init=away(network)),
    lambda: solver.solve(there, y, hidden=3, key=away(jax.random.key(0))),
    lambda: solver.objective(away(network), there, y, 0.1),
    lambda: cf.predict(away(network), there),
):
    try:
        call()
    except ValueError as error:
        print(error)
cf.predict(away(network), X), cf.predict(network, there)
"""


def test_arrays_on_two_devices_are_named(tmp_path):
    """JAX named the arguments of an inner program."""
    status, out, err = Forked(tmp_path, "-c", DEVICES, config={"jax_num_cpu_devices": 2}).wait()
    assert status == 0, err[-2000:]
    for line, name in zip(out.splitlines(), ["y", "sample_weight", "init", "key", "params", "params"], strict=True):
        assert "all arrays must be on one device, or on one mesh of devices, got" in line
        assert f"`{name}` on cpu:1" in line
        assert "`X` on cpu:0" in line


DEVICES_OF_MODULES = """
import flax.linen as nn, jax, numpy as np, optax, cronos_flax as cf
from flax import nnx
one, two = jax.devices()
X, y = np.random.default_rng(0).normal(size=(32, 5)).astype("float32"), np.arange(32) % 2
model = nn.Sequential([nn.Dense(8), nn.tanh, nn.Dense(6), nn.relu, nn.Dense(2)])
there, away = (lambda tree: jax.device_put(tree, one)), (lambda tree: jax.device_put(tree, two))
variables = there(jax.jit(model.init)(jax.random.key(0), X))
split = {"params": {**variables["params"], "layers_2": away(variables["params"]["layers_2"])}}
head, solver = cf.find_head(model, variables, X), cf.Cronos(loss="softmax", max_iters=2)
state = cf.CronosTrainState.create(
    apply_fn=model.apply, params=variables["params"], tx=optax.sgd(0.1), head=head, solver=solver
)
rngs = nnx.Rngs(0)
other = nnx.Sequential(nnx.Linear(5, 6, rngs=rngs), nnx.relu, nnx.Linear(6, 2, rngs=rngs))
nnx.update(other, there(nnx.state(other)))
for call in (
    lambda: cf.find_head(model, variables, away(X)),
    lambda: cf.find_head(model, split, X),
    lambda: cf.fit_head(head, variables, (away(X), y), solver=solver),
    lambda: head.inputs(variables, away(X)),
    lambda: state.solve_head([(away(X), y)]),
    lambda: cf.train(state, [(away(X), y)], epochs=1),
    lambda: cf.train(state, (X, y), epochs=1, batch_size=16, validation=[(away(X), y)]),
    lambda: cf.nnx.find_head(other, away(X)),
):
    try:
        call()
    except ValueError as error:
        print(error)
cf.fit_head(head, away(variables), (away(X), y), solver=solver)
"""


def test_arrays_of_a_module_on_two_devices_are_named(tmp_path):
    """It was said that the batch must be one that the model takes, with JAX's words about an inner program."""
    status, out, err = Forked(tmp_path, "-c", DEVICES_OF_MODULES, config={"jax_num_cpu_devices": 2}).wait()
    assert status == 0, err[-2000:]
    expected = {
        "find_head": ("variables", "args"),
        "find_head of two": ("variables", "variables"),
        "fit_head": ("variables", "batch"),
        "inputs": ("variables", "batch"),
        "solve_head": ("variables", "batch"),
        "train": ("state", "batch"),
        "train: `validation`": ("state", "batch"),
        "find_head in nnx": ("variables", "args"),
    }
    for line, (where, (one, two)) in zip(out.splitlines(), expected.items(), strict=True):
        said = f"all arrays must be on one device, or on one mesh of devices, got `{one}` on cpu:0, `{two}` on cpu:1."
        assert line.startswith(f"{where.split(' of ')[0].split(' in ')[0]}: {said}")


DEVICES_OF_MESHES = """
import flax.linen as nn, jax, numpy as np, optax, cronos_flax as cf
from jax.sharding import AxisType, NamedSharding, PartitionSpec
X, y = np.random.default_rng(0).normal(size=(32, 5)).astype("float32"), np.arange(32) % 2
model = nn.Sequential([nn.Dense(8), nn.tanh, nn.Dense(6), nn.relu, nn.Dense(2)])
variables = jax.jit(model.init)(jax.random.key(0), X)
head, solver = cf.find_head(model, variables, X), cf.Cronos(loss="softmax", max_iters=2)
def on(tree, devices, name="data", kind=AxisType.Explicit, spec=PartitionSpec()):
    mesh = jax.sharding.Mesh(np.array(devices), (name,), axis_types=(kind,))
    return jax.device_put(tree, NamedSharding(mesh, spec))
def trained(variables, rows):
    state = cf.CronosTrainState.create(
        apply_fn=model.apply, params=variables["params"], tx=optax.sgd(0.1), head=head, solver=solver
    )
    return cf.train(state, [(rows, y)], epochs=1)[0]
def solved(variables, rows):
    return solver.solve(rows, y, init=head.read(variables))
one, two = jax.devices()
features = np.asarray(head.inputs(variables, X))
for kind in (AxisType.Auto, AxisType.Explicit):
    there = on(variables, [one, two], kind=kind)
    for call, rows in ((trained, X), (solved, features)):
        for away in ([one], [two, one]):
            try:
                call(there, on(rows, away, kind=AxisType.Explicit))
            except ValueError as error:
                print(error)
    kept = trained(there, on(X, [one, two], "rows", spec=PartitionSpec("rows"))).params
    assert {leaf.sharding for leaf in jax.tree.leaves(kept)} == {jax.tree.leaves(there)[0].sharding}
solver.solve(on(features, [one, two]), jax.device_put(y, two), init=head.read(there))
"""


def test_arrays_on_meshes_of_other_devices_are_named(tmp_path):
    """Where axes had the same name, parameters went over to the devices of the rows; else it was an error of JAX."""
    status, out, err = Forked(tmp_path, "-c", DEVICES_OF_MESHES, config={"jax_num_cpu_devices": 2}).wait()
    assert status == 0, err[-2000:]
    both = "2 devices (cpu:0, cpu:1)"
    expected = [
        f"{where}: all arrays must be on one device, or on one mesh of devices, got {said}. Put them on one by "
        "jax.device_put(array, device)."
        for where, said in (
            ("train", f"`state` on {both}, `batch` on cpu:0"),
            ("train", f"`state` on {both}, `batch` on 2 devices (cpu:1, cpu:0)"),
            ("solve", f"`X` on cpu:0, `init` on {both}"),
            ("solve", f"`X` on 2 devices (cpu:1, cpu:0), `init` on {both}"),
        )
    ]
    assert out.splitlines() == 2 * expected
