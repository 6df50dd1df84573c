"""Every model of the zoo is accepted with the right paths or refused for the right reason; nothing else is touched."""

import contextlib
from concurrent.futures import ThreadPoolExecutor

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import drawn
from flax import nnx
from zoo import (
    HIDDEN,
    IMAGES,
    KEY,
    LINEN,
    LINEN_REFUSED,
    NNX,
    NNX_REFUSED,
    OUTPUTS,
    NnxConv,
    NnxMLP,
    ResNet,
    Skip,
    Two,
    X,
    rngs,
)

import cronos_flax as cf

pytestmark = pytest.mark.usefixtures("little_garbage")  # JAX collects it where tracers might leak
SOLVER = cf.Cronos(max_iters=5)
CALLED = "output", "paths", "rngs", "mutable"


def host(tree):
    """A copy of the values of a tree, keys apart."""
    leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(tree)]
    return [np.array(jax.random.key_data(v) if jnp.issubdtype(v.dtype, jax.dtypes.prng_key) else v) for v in leaves]


def same(a, b):
    return len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.fixture(autouse=True)
def _nothing_is_left_behind():
    """No layer's class is patched, and no tracer outlives its trace."""
    kinds = nn.Dense, nn.DenseGeneral, nnx.Linear, nnx.LinearGeneral

    def methods():
        return [{name: value for name, value in vars(kind).items() if callable(value)} for kind in kinds]

    before = methods()
    yield
    assert methods() == before


def init(member):
    kwargs = {k: v for k, v in member.kwargs.items() if k not in CALLED}
    return drawn(member.model, {"params": KEY, "dropout": KEY}, *member.args, **kwargs)


@pytest.mark.parametrize("name", LINEN)
def test_linen_models_are_solved_and_only_their_head_changes(name):
    member = LINEN[name]
    variables = init(member)
    kept, args = host(variables), host(member.args)
    noisy = "rngs" in member.kwargs
    with jax.checking_leaks(), pytest.warns(match="other random keys") if noisy else contextlib.nullcontext():
        head = cf.find_head(member.model, variables, *member.args, **member.kwargs)
    assert head.paths == member.expected
    assert "/".join(head.hidden_path) in str(head)
    assert same(host(head.write(variables, head.read(variables))), kept)
    y = jax.random.normal(KEY, (32, OUTPUTS))
    inputs = {k: v for k, v in member.kwargs.items() if k == "mask"}
    batches = [({**inputs, **dict(zip(("ids",), member.args, strict=True))} if inputs else member.args, y)]
    fitted, solution = cf.fit_head(head, variables, batches, solver=SOLVER, unpack=lambda batch: batch)
    assert solution.stats.objective < solution.stats.initial_objective
    assert jax.tree.structure(fitted) == jax.tree.structure(variables)
    for (path, old), new in zip(jax.tree_util.tree_leaves_with_path(variables), jax.tree.leaves(fitted), strict=True):
        names = tuple(entry.key for entry in path if hasattr(entry, "key"))[1:]
        assert old.dtype == new.dtype
        solved = names[: len(head.hidden_path)] in head.paths or (path[0].key == "batch_stats" and head.in_training)
        assert bool(jnp.array_equal(old, new)) != solved
    assert same(host(variables), kept)
    assert same(host(member.args), args)


@pytest.mark.parametrize("name", LINEN_REFUSED)
def test_other_linen_models_are_refused_with_the_reason(name):
    member = LINEN_REFUSED[name]
    variables = init(member)
    kept = host(variables)
    with jax.checking_leaks(), pytest.raises(ValueError, match=member.expected):
        cf.find_head(member.model, variables, *member.args, **member.kwargs)
    assert same(host(variables), kept)


@pytest.mark.parametrize("name", NNX)
def test_nnx_models_are_solved_in_place_and_only_their_head_changes(name):
    member = NNX[name]
    model = member.model()
    graphdef, kept = nnx.split(model)
    kept = jax.tree.map(jnp.copy, kept)
    with jax.checking_leaks():
        head = cf.nnx.find_head(model, *member.args, **member.kwargs)
    assert head.paths == member.expected
    head.write(model, head.read(model))
    assert nnx.split(model)[0] == graphdef
    assert same(host(nnx.state(model)), host(kept))
    y = jax.random.normal(KEY, (32, OUTPUTS))
    inputs = {k: v for k, v in member.kwargs.items() if k == "mask"}
    batches = [({**inputs, **dict(zip(("ids",), member.args, strict=True))} if inputs else member.args, y)]
    solution = cf.nnx.fit_head(head, model, batches, solver=SOLVER, unpack=lambda batch: batch)
    assert solution.stats.objective < solution.stats.initial_objective
    assert nnx.split(model)[0] == graphdef
    old, new = (dict(nnx.to_flat_state(state)) for state in (kept, nnx.state(model)))
    for path in old:
        assert old[path].dtype == new[path].dtype
        assert same(host(old[path]), host(new[path])) == (path[:-1] not in head.paths)


@pytest.mark.parametrize("name", NNX_REFUSED)
def test_other_nnx_models_are_refused_with_the_reason(name):
    member = NNX_REFUSED[name]
    model = member.model()
    graphdef, kept = nnx.split(model)[0], host(nnx.state(model))
    with jax.checking_leaks(), pytest.raises(ValueError, match=member.expected):
        cf.nnx.find_head(model, *member.args, **member.kwargs)
    assert nnx.split(model)[0] == graphdef
    assert same(host(nnx.state(model)), kept)


def test_a_method_of_the_model_itself_is_called_on_a_copy():
    """It was called with the model twice."""
    model = NnxMLP()
    head = cf.nnx.find_head(model, X, method=model.logits, scale=0.5)
    inputs = head.inputs(model, X)
    np.testing.assert_array_equal(inputs, cf.nnx.find_head(model, X, method="logits", scale=0.5).inputs(model, X))


def test_an_nnx_head_is_of_the_model_that_it_was_found_in():
    class Other(NnxMLP):
        pass

    head = cf.nnx.find_head(NnxMLP(), X)
    with pytest.raises(ValueError, match="find_head again"):
        cf.nnx.fit_head(head, Other(), (X, jnp.ones((32, OUTPUTS))))
    trained = NnxMLP()
    trained.sown = nnx.Intermediate((X,))  # as a model does that sows outside nnx.capture
    trained.train()
    assert head.inputs(trained, X).shape == (32, 6)


def test_a_head_is_of_one_class_and_used_with_the_kind_of_module_that_it_was_found_in():
    assert cf.nnx.Head is cf.Head
    member = LINEN["names lie"]
    variables, model = init(member), NnxMLP()
    linen_head = cf.find_head(member.model, variables, *member.args)
    nnx_head = cf.nnx.find_head(model, X)
    of_linen = {"apply_fn": member.model.apply, "params": variables["params"], "tx": optax.sgd(0.1)}
    other = r"`head` must come from cf\.{}find_head, got one that cf\.{}find_head found"
    with pytest.raises(ValueError, match=other.format("", r"nnx\.")):
        cf.fit_head(nnx_head, variables, (X, X[:, :OUTPUTS]))
    with pytest.raises(ValueError, match=other.format("", r"nnx\.")):
        cf.CronosTrainState.create(**of_linen, head=nnx_head)
    with pytest.raises(ValueError, match=other.format("", r"nnx\.")):
        cf.backbone_only(optax.sgd(0.1), nnx_head)
    with pytest.raises(ValueError, match=other.format(r"nnx\.", "")):
        cf.nnx.fit_head(linen_head, model, (X, X[:, :OUTPUTS]))
    with pytest.raises(ValueError, match=other.format(r"nnx\.", "")):
        cf.nnx.CronosOptimizer(model, optax.sgd(0.1), head=linen_head)


def test_an_nnx_head_without_biases_is_read_and_written_in_place():
    model = nnx.Sequential(
        nnx.Linear(6, HIDDEN, use_bias=False, rngs=rngs()), nnx.relu, nnx.Linear(HIDDEN, 4, use_bias=False, rngs=rngs())
    )
    head = cf.nnx.find_head(model, X)
    network = head.read(model)
    assert network.bias1 is None
    assert network.bias2 is None
    assert head.write(model, jax.tree.map(lambda v: 2 * v, network)) is model
    np.testing.assert_array_equal(model.layers[0].kernel, 2 * network.kernel1)


def test_two_threads_at_once():
    linen = [LINEN[name] for name in ("names lie", "siamese", "chosen output", "remat")]
    variables = [init(member) for member in linen]
    nnx_members = [NNX[name] for name in ("plain", "sequential")]

    def find(task):
        member, given = task
        if given is None:
            return cf.nnx.find_head(member.model(), *member.args, **member.kwargs).paths
        return cf.find_head(member.model, given, *member.args, **member.kwargs).paths

    tasks = [*zip(linen, variables, strict=True), *((member, None) for member in nnx_members)] * 2
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(find, tasks)) == [member.expected for member, _ in tasks]


GRAFTED = {
    "at a path": (nn.Sequential([nn.Dense(6), nn.tanh, nn.Dense(7)]), "layers_2", None, (X,), {}),
    "of a residual network": (ResNet(False), ("fc",), OUTPUTS, (IMAGES,), {"train": False}),
    "inside remat": (nn.Sequential([nn.remat(nn.Dense)(6), nn.tanh, nn.remat(nn.Dense)(7)]), "layers_2", 3, (X,), {}),
    "at the output": (nn.Sequential([nn.Dense(6), nn.tanh]), None, OUTPUTS, (X,), {}),
    "of a module that is the layer": (nn.Dense(5), (), None, (X,), {}),
}


@pytest.mark.parametrize("name", GRAFTED)
def test_grafted_linen_models_are_ordinary_modules(name):
    model, at, features, args, kwargs = GRAFTED[name]
    pretrained = drawn(model, KEY, *args, **kwargs)
    kept = host(pretrained)
    grafted = cf.graft(model, at, hidden=20, features=features)
    variables = cf.graft_variables(grafted, pretrained, jax.random.key(1), *args, **kwargs)
    assert same(host(pretrained), kept)
    head = cf.find_head(grafted, variables, *args, **kwargs)
    width = features or model.apply(pretrained, *args, **kwargs).shape[-1]
    assert (head.hidden, head.outputs) == (20, width)
    assert grafted.apply(variables, *args, **kwargs).shape == (32, width)
    assert "hidden" in grafted.tabulate(KEY, *args, **kwargs, console_kwargs={"width": 200})
    restored = nn.FrozenDict(variables) if name == "at a path" else variables
    fitted, solution = cf.fit_head(head, restored, [(args[0], jnp.ones((32, width)))], solver=SOLVER)
    assert solution.stats.objective < solution.stats.initial_objective
    if at is not None and len(at) > 0:  # the rest of the model is the pretrained one
        flat = jax.tree.leaves(fitted)
        assert sum(any(np.array_equal(a, b) for b in flat) for a in kept) >= len(kept) - 2


def test_grafts_take_the_mean_over_the_tokens_that_the_mask_lets_through():
    tokens, mask = X.reshape(8, 4, 6), jnp.arange(4) < 1 + jnp.arange(8)[:, None] % 4

    def pool(x, tokens, mask):
        return jnp.sum(x * mask[..., None], axis=1) / jnp.sum(mask, axis=1, keepdims=True)

    class Encoder(nn.Module):
        @nn.compact
        def __call__(self, tokens, mask):
            return nn.tanh(nn.Dense(6)(tokens))

    grafted = cf.graft(Encoder(), hidden=20, features=2, pool=pool)
    variables = drawn(grafted, KEY, tokens, mask)
    head = cf.find_head(grafted, variables, tokens, mask)
    assert head.inputs(variables, tokens, mask).shape == (8, 6)


def test_grafts_say_what_is_wrong():
    model = nn.Sequential([nn.Dense(6), nn.tanh, nn.Dense(7)])
    with pytest.raises(ValueError, match=r"got fc; .*layers_0, layers_2"):
        cf.graft(model, "fc", hidden=3).init(KEY, X)
    with pytest.raises(ValueError, match="`features` must be"):
        cf.graft(model, hidden=3)
    with pytest.raises(ValueError, match="`hidden` must be"):
        cf.graft(model, "layers_2", hidden=0)
    grafted = cf.graft(model, "layers_2", hidden=3)
    with pytest.raises(ValueError, match="`pretrained` must be the variables"):
        cf.graft_variables(grafted, nn.Dense(3).init(KEY, X), KEY, X)
    inside = cf.graft(Skip(), "Lie_0", hidden=3, features=5)
    with pytest.raises(ValueError, match=r"cannot be called .*`at` may need outputs of its width"):
        cf.graft_variables(inside, Skip().init(KEY, X), KEY, X)
    several = cf.graft(Two(), hidden=3, features=2)
    with pytest.raises(ValueError, match=r"input of the head must be one array .*'gelu': \(32, 4\).*out\[key\]"):
        cf.graft_variables(several, Two().init(KEY, X), KEY, X)
    with pytest.raises(ValueError, match=r"input of the head must be one array .*'logits': \(32, 4\)"):
        cf.nnx.graft(NnxConv(), hidden=3, features=2, in_features=3, rngs=rngs())({"image": IMAGES})
    with pytest.raises(ValueError, match=r"there are layers/0, layers/2"):
        cf.nnx.graft(NNX["sequential"].model(), "fc", hidden=3, rngs=rngs())


@pytest.mark.parametrize("at", ["fc2", None])
def test_grafted_nnx_models_keep_the_rest(at):
    model = NNX["plain"].model()
    kept = host(nnx.state(model))
    sizes = {} if at else {"features": 5, "in_features": OUTPUTS}
    grafted = cf.nnx.graft(model, at, hidden=9, rngs=rngs(), **sizes)
    assert same(host(nnx.state(model)), kept)
    head = cf.nnx.find_head(grafted, X)
    assert head.paths == ((("fc2" if at else "head"), "hidden"), (("fc2" if at else "head"), "output"))
    np.testing.assert_array_equal((grafted if at else grafted.backbone).encoder.kernel, model.encoder.kernel)
    solution = cf.nnx.fit_head(head, grafted, (X, jnp.ones((32, head.outputs))), solver=SOLVER)
    assert solution.stats.objective < solution.stats.initial_objective
