"""What stands at the edge of what is foreseen: it works, or is refused in words that help."""

import contextlib
import dataclasses
from collections import OrderedDict

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import drawn
from flax import nnx

import cronos_flax as cf
from cronos_flax._solver.transfer import default_key, seeded
from cronos_flax.compare.task import Augmented

rng = np.random.default_rng(0)
X = rng.normal(size=(64, 5)).astype("float32")
LABELS = rng.integers(0, 3, 64)
MODEL = nn.Sequential([nn.Dense(8), nn.tanh, nn.Dense(6), nn.relu, nn.Dense(3)])
VARIABLES = drawn(MODEL, jax.random.key(0), X)
HEAD = cf.find_head(MODEL, VARIABLES, X)
SOLVER = cf.Cronos(loss="softmax", max_iters=2)
BATCHES = (X[:32], LABELS[:32]), (X[32:], LABELS[32:])


def state(tx=None, model=MODEL, variables=VARIABLES, head=HEAD, **kwargs):
    given = {"apply_fn": model.apply, "params": variables["params"], "tx": tx or optax.sgd(0.1), "head": head}
    return cf.CronosTrainState.create(**given, solver=SOLVER, **kwargs)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("size", [1e-3, 1e-5])
def test_a_head_of_half_precision_on_small_features_is_found(dtype, size):
    """Random weights for features of 1e-3 are beyond float16: its outputs differed "by nan of their size"."""
    x = (size * X).astype(dtype)
    good = nn.Sequential([nn.Dense(6, dtype=dtype, param_dtype=dtype), nn.relu, nn.Dense(3, dtype=dtype)])
    bad = nn.Sequential([nn.Dense(6, dtype=dtype, param_dtype=dtype), nn.gelu, nn.Dense(3, dtype=dtype)])
    variables = drawn(good, jax.random.key(0), x)
    assert cf.find_head(good, variables, x).paths == (("layers_0",), ("layers_2",))
    with pytest.raises(ValueError, match="gelu stands between the two"):
        cf.find_head(bad, variables, x)


def _wide(lhs, rhs, dimensions, precision=None, preferred_element_type=None):
    return jax.lax.dot_general(lhs, rhs, dimensions, precision, jnp.float32)


def test_a_head_of_half_precision_that_is_summed_in_float32_is_found():
    """Its results are float32, and it was held to their precision: "its outputs differ by 0.005 of their size"."""
    how = {"dtype": jnp.bfloat16, "dot_general": _wide}
    good = nn.Sequential([nn.Dense(5), nn.tanh, nn.Dense(6, **how), nn.relu, nn.Dense(3, **how)])
    variables = drawn(good, jax.random.key(0), X)
    assert good.apply(variables, X).dtype == jnp.float32
    head = cf.find_head(good, variables, X)
    assert head.largest < jnp.finfo(jnp.float32).max
    cf.fit_head(head, variables, (X, LABELS), solver=SOLVER)

    rngs, how = nnx.Rngs(0), {"dtype": jnp.bfloat16, "preferred_element_type": jnp.float32}
    layers = [nnx.Linear(5, 6, rngs=rngs, **how), nnx.relu, nnx.Linear(6, 3, rngs=rngs, **how)]
    assert cf.nnx.find_head(nnx.Sequential(nnx.Linear(5, 5, rngs=rngs), nnx.tanh, *layers), X).hidden == 6


class Pooled(nn.Module):
    """Takes a mask of tokens, and a scale of features, by keyword."""

    @nn.compact
    def __call__(self, tokens, mask=None, scale=None):
        x = nn.tanh(nn.Dense(5)(tokens if scale is None else tokens * scale))
        weight = jnp.ones(tokens.shape[:2]) if mask is None else mask.astype(x.dtype)
        x = jnp.sum(x * weight[..., None], axis=1) / jnp.sum(weight, axis=1, keepdims=True)
        return nn.Dense(3)(nn.relu(nn.Dense(6)(x)))


class NnxPooled(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.first, self.hidden, self.out = (nnx.Linear(*size, rngs=rngs) for size in ((5, 5), (5, 6), (6, 3)))

    def __call__(self, tokens, mask):
        x = jnp.mean(nnx.tanh(self.first(tokens)) * mask[..., None], axis=1)
        return self.out(nnx.relu(self.hidden(x)))


TOKENS = rng.normal(size=(64, 4, 5)).astype("float32")
MASK = np.arange(4) < rng.integers(1, 5, (64, 1))
POOLED = drawn(Pooled(), jax.random.key(0), TOKENS)
HALVES = [(TOKENS[:32], LABELS[:32]), (TOKENS[32:], LABELS[32:])]
WHOLE = [slice(0, 32), slice(32, 64)]


def with_mask(rows):
    return {"tokens": TOKENS[rows], "mask": MASK[rows]}, LABELS[rows]


@pytest.mark.parametrize(
    "mask", [MASK[:32], np.ones((32, 4), bool), np.ones((32, 4), int), np.ones((32, 4), "float32")]
)
def test_a_mask_of_one_batch_is_not_used_for_others(mask):
    """All batches had the mask of the batch that the head was found on, without a word."""
    head = cf.find_head(Pooled(), POOLED, TOKENS[:32], mask=mask)
    assert head.of_rows == ("mask",)
    for solve in (
        lambda: cf.fit_head(head, POOLED, HALVES, solver=SOLVER),
        lambda: cf.gather_features(head, POOLED, HALVES),
        lambda: state(model=Pooled(), variables=POOLED, head=head).solve_head(HALVES),
    ):
        with pytest.raises(ValueError, match=r"each batch must come with `mask` of its own rows.*unpack="):
            solve()
    cf.fit_head(head, POOLED, HALVES[:1], solver=SOLVER)  # the whole data are one batch, as of a graph
    cf.fit_head(head, POOLED, WHOLE, unpack=with_mask, solver=SOLVER)


def test_validation_has_the_masks_of_its_own_batches():
    head = cf.find_head(Pooled(), POOLED, TOKENS[:32], mask=MASK[:32])
    made = state(model=Pooled(), variables=POOLED, head=head)
    with pytest.raises(ValueError, match="train: `validation`: each batch must come with `mask`"):
        cf.train(made, HALVES, epochs=1, solve_data=HALVES[:1], validation=HALVES)
    _, history = cf.train(made, WHOLE, epochs=1, unpack=with_mask, validation=WHOLE)
    assert np.isfinite(history[-1]["validation_loss"])


def test_an_nnx_mask_of_one_batch_is_not_used_for_others():
    model = NnxPooled()
    head = cf.nnx.find_head(model, TOKENS[:32], mask=MASK[:32])
    with pytest.raises(ValueError, match="each batch must come with `mask` of its own rows"):
        cf.nnx.fit_head(head, model, HALVES, solver=SOLVER)


@pytest.mark.parametrize("scale", [np.ones(5, "float32"), np.arange(1.0, 6.0, dtype="float32")])
def test_an_array_that_belongs_to_no_row_is_used_again(scale):
    head = cf.find_head(Pooled(), POOLED, TOKENS[:5], scale=scale)  # as many rows as features
    assert head.of_rows == ()
    cf.fit_head(head, POOLED, HALVES, solver=SOLVER)
    both = cf.find_head(Pooled(), POOLED, TOKENS[:5], scale=scale, mask=np.ones((5, 4), bool))
    assert both.of_rows == ("mask",)


class Shifted(nn.Module):
    """The same parameters as MODEL, another function."""

    def setup(self):
        self.layers_0, self.layers_2, self.layers_4 = nn.Dense(8), nn.Dense(6), nn.Dense(3)

    def __call__(self, x):
        return self.layers_4(nn.relu(self.layers_2(jnp.sin(self.layers_0(x)))))


def tripled(variables, x, **kwargs):
    return MODEL.apply(variables, 3 * x, **kwargs)


@pytest.mark.parametrize("apply_fn", [Shifted().apply, tripled])
@pytest.mark.parametrize("solver", [SOLVER, dataclasses.replace(SOLVER, beta=0.01)])
def test_an_apply_fn_that_is_another_function_is_told_of_once(apply_fn, solver):
    """Solves fitted features that no gradient step saw, without a word."""
    made = state().replace(apply_fn=apply_fn, solver=solver, beta=jnp.float32(np.inf if solver.beta is None else 0.01))
    with pytest.warns(UserWarning, match="`apply_fn` must be the function of the module that the head was found in"):
        solved, _ = made.solve_head((X, LABELS))
    solved.solve_head((X, LABELS))


def test_an_apply_fn_that_is_another_function_is_told_of_where_outputs_begin_at_zero():
    """The outputs of both were zero, and so the same."""
    made = state()
    zeros = {"layers_4": jax.tree.map(jnp.zeros_like, made.params["layers_4"])}
    made = made.replace(apply_fn=tripled, params={**made.params, **zeros})
    with pytest.warns(UserWarning, match="`apply_fn` must be the function of the module that the head was found in"):
        made.solve_head((X, LABELS))
    made.replace(apply_fn=jax.jit(MODEL.apply)).solve_head((X, LABELS))


def _of_training(variables, x, train):
    raise TypeError("it wants other arguments")


@pytest.mark.parametrize(
    "apply_fn",
    [
        jax.jit(MODEL.apply),
        lambda variables, x: MODEL.apply(variables, x),
        nn.Sequential([nn.Dense(8), nn.tanh, nn.Dense(6), nn.relu, nn.Dense(3)]).apply,
        _of_training,
    ],
    ids=["jitted", "wrapped", "equal", "of training"],
)
def test_an_apply_fn_that_is_the_same_function_is_not(apply_fn):
    state().replace(apply_fn=apply_fn).solve_head((X, LABELS))


def test_parts_of_a_state_that_create_did_not_make_are_named():
    """They were AttributeErrors."""
    made, tx = state(), optax.sgd(0.1)
    with pytest.raises(ValueError, match="`opt_state` must be that of the state's own `tx`"):
        made.replace(tx=tx, opt_state=tx.init(made.params)).solve_head((X, LABELS))
    with pytest.raises(ValueError, match=r"`guard` of a state must be a cf\.GuardState"):
        made.replace(guard=cf.Guard()).solve_head((X, LABELS))
    other = state(tx).replace(beta=jnp.float32(0.01), step=made.step)
    assert float(other.solve_head((X, LABELS))[1].stats.beta) == pytest.approx(0.01)


def test_the_method_of_the_head_is_trained_and_scored():
    """Gradient steps and validation called another one, whose outputs have as many axes."""

    class Methods(nn.Module):
        def setup(self):
            self.first, self.hidden, self.out = nn.Dense(8), nn.Dense(6), nn.Dense(3)

        def __call__(self, x):
            return nn.tanh(self.first(x))

        def logits(self, x):
            return self.out(nn.relu(self.hidden(self(x))))

    model = Methods()
    variables = model.init(jax.random.key(0), X, method="logits")
    made = state(model=model, variables=variables, head=cf.find_head(model, variables, X, method="logits"))
    given = {"epochs": 2, "batch_size": 16, "validation": (X, LABELS)}
    ours, history = cf.train(made, (X, LABELS), **given)
    named = {"method": "logits"}
    _, expected = cf.train(made, (X, LABELS), **given, train_kwargs=named, eval_kwargs=named)
    assert [row.get("loss") for row in history] == [row.get("loss") for row in expected]
    hits = model.apply(ours.variables, X, method="logits").argmax(axis=1) == LABELS
    assert history[-1]["validation_accuracy"] == pytest.approx(float(hits.mean()))


def _halved(variable, value):
    return value / 2


def _clipped(variable, value):
    return jnp.clip(value, -0.1, 0.1)


@pytest.mark.parametrize(("on", "change"), [("on_get_value", _halved), ("on_set_value", _clipped)])
@pytest.mark.parametrize("name", ["kernel", "bias"])
def test_weights_that_a_hook_changes_are_no_head(on, change, name):
    """The network in the model was another one than that of the solution."""
    model = nnx.Sequential(nnx.Linear(5, 6, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(6, 3, rngs=nnx.Rngs(1)))
    getattr(model.layers[2], name).set_metadata(**{on: (change,)})
    with pytest.raises(
        ValueError, match=f"must keep weights as they are written, but {name} of layers/2 is read as anoth"
    ):
        cf.nnx.find_head(model, X)


def test_a_head_whose_weights_are_no_params_is_not_for_a_train_state():
    """It was a KeyError."""
    layers = [nnx.Linear(*size, rngs=nnx.Rngs(0)) for size in ((5, 5), (5, 6), (6, 3))]
    model = nnx.Sequential(layers[0], nnx.tanh, layers[1], nnx.relu, layers[2])
    model.layers[2].kernel = nnx.BatchStat(model.layers[2].kernel[...])
    head = cf.nnx.find_head(model, X)
    with pytest.raises(ValueError, match=r"must be nnx\.Param, .* for kernel of layers/2"):
        cf.nnx.CronosTrainState.create(model=model, tx=optax.sgd(0.1), head=head)


@pytest.mark.parametrize("layer", ["hidden", "out"])
def test_a_layer_over_another_axis_is_no_layer_of_a_head(layer):
    """It was an error of `predict`, about the features of a network."""

    class Across(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(5)(x).T  # (5, rows)
            if layer == "hidden":
                return nn.Dense(3)(nn.relu(nn.DenseGeneral(6, axis=0)(x)))
            return nn.DenseGeneral(3, axis=0)(nn.relu(nn.Dense(6)(x.T)).T)

    variables = drawn(Across(), jax.random.key(0), X)
    with pytest.raises(ValueError, match="find_head: Across must end in Dense → relu → Dense, but no two"):
        cf.find_head(Across(), variables, X)


@pytest.mark.parametrize("head", ["moving", "frozen"])
@pytest.mark.parametrize(
    ("tx", "needs"),
    [(optax.lbfgs(), "grad, value and value_fn"), (optax.contrib.sophia(1e-3), "obj_fn")],
    ids=["lbfgs", "sophia"],
)
def test_an_optimizer_that_needs_more_than_the_loss_is_refused(tx, needs, head):
    """It was a TypeError of Optax, about one of its own functions."""
    made = state(tx, alternation=cf.Alternation(head=head))
    with pytest.raises(ValueError, match=rf"update: `tx` must need no more .*needs {needs}\..*linesearch=None"):
        jax.eval_shape(lambda grads: made.apply_gradients(grads=grads), VARIABLES["params"])


def test_an_optimizer_that_needs_the_loss_is_told_where_it_comes_from():
    """It was a TypeError of Optax, about one of its own functions."""
    made = state(optax.contrib.momo(1.0))
    with pytest.raises(ValueError, match=r"update: `tx` needs the mean loss .*value=loss"):
        jax.eval_shape(lambda grads: made.apply_gradients(grads=grads), VARIABLES["params"])
    jax.eval_shape(lambda grads: made.apply_gradients(grads=grads, value=jnp.float32(1.0)), VARIABLES["params"])


PARAMS = VARIABLES["params"]
FIRST, *_ = PARAMS


def test_parameters_in_ordered_dicts_stay_in_them():
    """A solve gave plain dicts, whose order is another: the next step failed in Optax."""

    def ordered(tree):
        return OrderedDict((k, ordered(v)) for k, v in reversed(tree.items())) if isinstance(tree, dict) else tree

    params = ordered(dict(sorted(PARAMS.items())))
    made = state(optax.adam(1e-2), variables={"params": params})
    solved, _ = made.solve_head((X, LABELS))
    assert jax.tree.structure(solved.params) == jax.tree.structure(params)
    assert list(solved.params) == list(params)
    expected, _ = state(optax.adam(1e-2)).solve_head((X, LABELS))
    jax.tree.map(np.testing.assert_array_equal, dict(solved.params["layers_4"]), expected.params["layers_4"])


WRONG_GRADIENTS = {
    "of variables": (VARIABLES, "nothing at layers_0/bias.* and what no parameter is at params/layers_0/bias"),
    "of some layers": ({k: v for k, v in PARAMS.items() if k != "layers_4"}, "nothing at layers_4/bias, layers_4/"),
    "a leaf that is None": ({**PARAMS, FIRST: {**PARAMS[FIRST], "bias": None}}, f"nothing at {FIRST}/bias"),
    "other containers": (flax.core.freeze(PARAMS), "FrozenDict instead of dict"),
    "each row's": (jax.tree.map(lambda leaf: jnp.stack([leaf] * 2), PARAMS), r"got \(2, 8\) at layers_0/bias"),
    "one number for a bias": (
        {**PARAMS, FIRST: {**PARAMS[FIRST], "bias": jnp.zeros(())}},
        rf"got \(\) at {FIRST}/bias, which has \(8,\)",
    ),
}


@pytest.mark.parametrize("head", ["moving", "frozen"])
@pytest.mark.parametrize("case", list(WRONG_GRADIENTS))
def test_gradients_of_another_form_are_refused(case, head):
    """Some were errors of JAX about its own trees; those of each row gave parameters of another shape, in silence."""
    grads, message = WRONG_GRADIENTS[case]
    made = state(optax.adam(1e-2), alternation=cf.Alternation(head=head))
    with pytest.raises(ValueError, match=f"update: `grads` must .*{message}"):
        jax.eval_shape(lambda grads: made.apply_gradients(grads=grads), grads)


def test_an_optimizer_may_take_the_gradients_of_each_row():
    """As those of differential privacy do."""
    rows = optax.stateless(lambda grads, _: jax.tree.map(lambda leaf: leaf.mean(axis=0), grads))
    made = state(optax.chain(rows, optax.sgd(0.1)))
    grads = jax.tree.map(lambda leaf: jnp.stack([leaf] * 2), PARAMS)
    new = jax.eval_shape(lambda grads: made.apply_gradients(grads=grads), grads)
    assert jax.tree.map(jnp.shape, new.params) == jax.tree.map(jnp.shape, PARAMS)


@pytest.mark.parametrize("head", ["moving", "frozen"])
@pytest.mark.parametrize(
    "value",
    [jnp.ones(64), (jnp.ones(()), {"aux": jnp.ones(())}), (jnp.ones(()), {})],
    ids=["of each row", "a pair", "a pair without arrays"],
)
def test_a_loss_that_is_not_one_number_is_refused(value, head):
    """It was broadcast over parameters, or an error of JAX."""
    made = state(optax.adam(1e-2), alternation=cf.Alternation(head=head))
    with pytest.raises(ValueError, match="update: `value` must be the mean loss, one number, got"):
        jax.eval_shape(lambda grads: made.apply_gradients(grads=grads, value=value), PARAMS)


def test_gradients_of_another_form_are_refused_in_nnx():
    model = nnx.Sequential(*(nnx.Linear(*size, rngs=nnx.Rngs(0)) for size in ((5, 8), (8, 6))), nnx.relu)
    model = nnx.Sequential(model, nnx.Linear(6, 3, rngs=nnx.Rngs(0)))
    optimizer = cf.nnx.CronosOptimizer(model, optax.adam(1e-2), head=cf.nnx.find_head(model, X), solver=SOLVER)
    grads = nnx.state(model, nnx.Param)
    with pytest.raises(ValueError, match="`grads` must be a tree like the parameters, got one with nothing at"):
        optimizer.update(model, nnx.State({"layers": {0: grads["layers"][0]}}))
    with pytest.raises(ValueError, match=r"`grads` must have the shapes .* got \(2, 8\)"):
        optimizer.update(model, jax.tree.map(lambda leaf: jnp.stack([leaf] * 2), grads))


def test_what_a_line_search_is_made_of_is_not_taken_for_the_loss_with_weight_decay():
    """An alternation adds the weight decay to gradient and value, and the search compared them with a loss without."""
    model = nnx.Sequential(nnx.Linear(5, 8, rngs=nnx.Rngs(0)), nnx.tanh, nnx.Linear(8, 6, rngs=nnx.Rngs(0)))
    model = nnx.Sequential(model, nnx.relu, nnx.Linear(6, 3, rngs=nnx.Rngs(0)))
    optimizer = cf.nnx.CronosOptimizer(model, optax.lbfgs(), head=cf.nnx.find_head(model, X), solver=SOLVER)
    grads = nnx.state(model, nnx.Param)
    with pytest.raises(ValueError, match="needs grad and value_fn"):
        optimizer.update(model, grads, value=1.0, grad=grads, value_fn=lambda params: 1.0)


def test_a_line_search_without_parameters_is_refused():
    """A module that is nothing but its head has no backbone: it was an IndexError of Optax."""
    model = nn.Sequential([nn.Dense(6), nn.relu, nn.Dense(3)])
    variables = drawn(model, jax.random.key(0), X)
    with pytest.raises(ValueError, match="`tx` must be an optimizer that can do without parameters"):
        state(optax.lbfgs(), model, variables, cf.find_head(model, variables, X))


NETWORK = jax.tree.map(np.asarray, HEAD.read(VARIABLES))
STARTS = {
    "a fresh network": lambda net: net,
    "no output kernel": lambda net: dataclasses.replace(net, kernel2=0 * net.kernel2),
    "zeros": lambda net: jax.tree.map(np.zeros_like, net),
}


@pytest.mark.parametrize("start", STARTS.values(), ids=STARTS)
def test_a_start_far_too_small_for_the_targets_is_left(start, dtype):
    """What such a network changes is lost in the rounding of the loss: it ended at the constant, as "stationary"."""
    features = np.tanh(rng.normal(size=(64, 8))).astype(dtype)
    plain = np.stack([np.sin(features[:, 0]), features[:, 1] ** 2, features[:, 2]], axis=1).astype(dtype)
    network = jax.tree.map(lambda leaf: leaf.astype(dtype), start(NETWORK))
    size = np.asarray(1e15 if dtype == "float32" else 1e30, dtype)
    stats = cf.Cronos(max_iters=30).solve(features, size * plain, init=network).stats
    assert stats.objective <= stats.initial_objective
    assert stats.objective < 0.3 * stats.null_loss


def test_targets_of_any_size_are_fitted_by_a_head():
    """Targets of 1e15 ended at the constant, without a word."""
    features = rng.normal(size=(64, 5)).astype("float32")
    targets = 1e15 * np.stack([np.sin(features[:, 0]), features[:, 1] ** 2, features[:, 2]], axis=1)
    _, solution = cf.fit_head(HEAD, VARIABLES, (features, targets.astype("float32")), solver=cf.Cronos(max_iters=30))
    assert solution.stats.objective < 0.3 * solution.stats.null_loss


AUGMENTS = {
    "NaN": (lambda x, random: x * np.nan, "must return finite inputs, got 8 entries"),
    "one argument": (lambda x: x, r"must be a function of two arguments, .*<lambda>\(x\)"),
    "three arguments": (
        lambda x, random, rate: x,
        "must be a function of two arguments, .*missing a required argument: 'rate'",
    ),
    "nothing": (lambda x, random: None, "must return floats"),
}


@pytest.mark.parametrize(("augment", "message"), AUGMENTS.values(), ids=AUGMENTS)
def test_a_function_that_augments_wrongly_is_refused(augment, message):
    """It was a traceback, or NaN in all that followed."""
    batches = Augmented(np.ones((4, 2), "float32"), np.arange(4), 4, 0, augment)
    with pytest.raises(ValueError, match=f"`augment` {message}"):
        next(iter(batches))


@pytest.mark.parametrize("name", ["data", "validation"])
def test_two_batches_in_a_tuple_are_told_from_arrays(name):
    """It was NumPy's message, about arrays of an inhomogeneous shape."""
    message = f"`{name}` must be .*tuple of two tuples of two arrays each, .*Two batches are given as a list"
    given = {"data": (X, LABELS)} | {name: BATCHES}
    with pytest.raises(ValueError, match=f"solve_head: {message}"):
        state().solve_head(**given)
    with pytest.raises(ValueError, match=f"train: {message}"):
        cf.train(state(), epochs=1, batch_size=32, **given)


def test_a_batch_of_batches_is_refused():
    """It was NumPy's message, about arrays of an inhomogeneous shape."""
    with pytest.raises(ValueError, match=r"fit_head: each batch must be \(x, y\) with one array y, got tuple of 2"):
        cf.fit_head(HEAD, VARIABLES, [BATCHES], solver=SOLVER)


class Once:
    """A loader that gives the same iterator each time."""

    def __init__(self):
        self.batches = iter(BATCHES)

    def __iter__(self):
        return self.batches


@pytest.mark.parametrize("once", [Once, lambda: iter(BATCHES)], ids=["loader", "iterator"])
def test_data_that_were_read_before_are_refused_by_name(once):
    """The message named fit_head, whoever had been called, and did not say why there was nothing."""
    data = once()
    made, _ = state().solve_head(data)
    with pytest.raises(ValueError, match=r"solve_head: `data` must have .*can be read only once"):
        made.solve_head(data)
    with pytest.raises(ValueError, match=r"solve_head: `validation` must have .*can be read only once"):
        made.solve_head((X, LABELS), validation=data)


def test_a_file_in_place_of_a_directory_is_named(tmp_path):
    """It was a FileExistsError that named no argument; and to restore from a file gave the state back, unchanged."""
    file = tmp_path / "features"
    file.write_text("not features")
    for directory in (file, file / "below"):
        with pytest.raises(NotADirectoryError, match=rf"gather_features: `cache` must be .*, and {file} is a file"):
            cf.gather_features(HEAD, VARIABLES, (X, LABELS), cache=directory)
        with pytest.raises(NotADirectoryError, match="save_checkpoint: `directory`"):
            cf.save_checkpoint(directory, VARIABLES, 1)
    with pytest.raises(NotADirectoryError, match="restore_checkpoint: `directory` must be a directory, got the file"):
        cf.restore_checkpoint(file, VARIABLES)
    assert file.read_text() == "not features"
    (link := tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(NotADirectoryError, match=f"{link} is a link to what does not exist"):
        cf.save_checkpoint(link, VARIABLES, 1)  # it said that the directory above was a file


class Block(nnx.Module):
    def __init__(self, kind, rngs):
        self.layers = kind(nnx.Linear(5, 5, rngs=rngs))

    def __call__(self, x):
        return jnp.tanh(self.layers(x) if callable(self.layers) else self.layers[0](x))


class Stacked(nnx.Module):
    """Blocks with stacked parameters, and a head."""

    def __init__(self, kind, scanned):
        rngs = nnx.Rngs(0)
        self.scanned = scanned
        self.blocks = nnx.split_rngs(splits=2)(nnx.vmap(lambda rngs: Block(kind, rngs)))(rngs)
        self.hidden, self.out = nnx.Linear(5, 6, rngs=rngs), nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x):
        if self.scanned:
            x = nnx.scan(lambda x, block: block(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.blocks)
        else:
            x = nnx.vmap(lambda block, x: block(x), in_axes=(0, None))(self.blocks, x).mean(axis=0)
        return self.out(nnx.relu(self.hidden(x)))


@pytest.mark.parametrize("kind", [nnx.Sequential, lambda layer: nnx.List([layer])], ids=["Sequential", "List"])
@pytest.mark.parametrize("scanned", [True, False])
def test_lists_inside_of_nnx_transforms_are_passed(kind, scanned):
    """Flax's capture puts names among their numbers: "Comparator raised exception while sorting"."""
    model = Stacked(kind, scanned)
    before = model(X)
    head = cf.nnx.find_head(model, X)
    assert head.paths == (("hidden",), ("out",))
    np.testing.assert_array_equal(model(X), before)
    made = cf.nnx.TrainState.create(model=model, tx=optax.sgd(0.1))
    np.testing.assert_allclose(made.apply_fn({"params": made.params}, X), before, rtol=1e-5)


@pytest.mark.parametrize("mixed", [True, False])
def test_targets_beyond_the_precision_of_the_head_are_refused(mixed):
    """The solve said that it had explained nearly all, and the module's outputs were infinite."""
    kinds = {"dtype": "float16"} | ({} if mixed else {"param_dtype": "float16"})
    model = nn.Sequential([nn.Dense(6, **kinds), nn.relu, nn.Dense(1, **kinds)])
    variables, y = drawn(model, jax.random.key(0), X), 1e5 * np.sin(X[:, :1])
    head = cf.find_head(model, variables, X)
    for data in ((X, y), cf.gather_features(head, variables, (X, y))):
        with pytest.raises(ValueError, match=r"the targets must be .*6\.55e\+04 .*, got 9\.9\d*e\+04\. Scale the"):
            cf.fit_head(head, variables, data)
    new, _ = cf.fit_head(head, variables, (X, y / 100), solver=cf.Cronos(max_iters=2))
    assert np.all(np.isfinite(model.apply(new, X)))


def test_one_checkpoint_in_place_of_their_directory_is_refused(tmp_path):
    """The state was given back as it was."""
    cf.save_checkpoint(tmp_path, VARIABLES, 5)
    with pytest.raises(ValueError, match=r"restore_checkpoint: `directory` must be one of checkpoints, .*step=5"):
        cf.restore_checkpoint(tmp_path / "5", VARIABLES)


def test_a_first_solve_on_features_that_are_not_finite_says_so():
    """It named the scale of the features, of y and of `init`."""
    bad = np.where(np.arange(64)[:, None] == 3, np.nan, X)
    with pytest.raises(FloatingPointError, match=r"solve_head: the features of `data` must be finite"):
        state().solve_head((bad, LABELS))
    with pytest.raises(FloatingPointError, match=r"solve_head: the features of `validation` must be finite"):
        state().solve_head((X, LABELS), validation=(bad, LABELS))


@pytest.mark.parametrize("gates", ["refreshed", "fixed"])
def test_a_traced_weight_decay_below_zero_is_told(gates):
    """It was solved with: neurons grew for their own sake."""

    def status(beta):
        return cf.Cronos(beta=beta, gates=gates, max_iters=2).solve(X, X[:, :1], hidden=4).status_code

    assert jax.jit(status)(-1.0) == cf.Status.nonfinite
    assert jax.jit(status)(0.0) == cf.Status.max_iters


@pytest.mark.parametrize("size", [1e-38, 1e38])
def test_weights_that_cannot_be_summed_are_refused(size):
    """The status named the scale of the features, of y and of `init`."""
    with pytest.raises(ValueError, match=r"solve: `sample_weight` must be 0, or between .*divide them by their mean"):
        cf.Cronos().solve(X, X[:, :1], hidden=4, sample_weight=np.full(64, size, "float32"))


@pytest.mark.parametrize(
    ("reduce", "shape"),
    [(lambda misfit: misfit, r"\(3, 2\)"), (jnp.mean, r"\(\)"), (lambda misfit: misfit.sum(axis=0), r"\(2,\)")],
    ids=["none", "all", "rows"],
)
def test_a_loss_of_ones_own_that_has_not_one_value_a_row_is_refused(reduce, shape):
    """It was an error about the truth value of an array, or of a product of matrices."""

    @dataclasses.dataclass(frozen=True)
    class Own(cf.Loss):
        def value(self, outputs, targets):
            return reduce(jnp.square(outputs - targets))

    with pytest.raises(ValueError, match=rf"solve: the `value` of Own must have one entry for each row.*got {shape}"):
        cf.Cronos(loss=Own()).solve(X, X[:, :2], hidden=4)


def test_predictions_need_the_features_of_the_network():
    """It was a TypeError of JAX."""
    with pytest.raises(ValueError, match=r"predict: `X` must have the 8 features .*got shape \(64, 5\)"):
        cf.predict(NETWORK, X)
    assert cf.predict(NETWORK, np.ones((2, 8)).tolist()).shape == (2, 3)


class Blocks:
    """Blocks of rows that are others in every later pass."""

    def __init__(self, changed):
        self.changed, self.passes = changed, 0

    def __iter__(self):
        self.passes += 1
        return iter([X[:20], X[20:]] if self.passes < 5 else self.changed)


CHANGED = {
    "fewer": ([X[:20]], "20 rows in a later one, of 64"),
    "more": ([X, X], "more than 64 rows"),
    "another order": ([X[20:], X[:20]], "other rows, or the same in another order"),
    "other values": ([X[:20], -X[20:]], "other rows"),
}


@pytest.mark.parametrize(("changed", "got"), CHANGED.values(), ids=CHANGED)
def test_blocks_that_are_others_in_a_later_pass_are_refused(changed, got):
    """A loader that shuffles gave a wrong network, and so did one that lost rows: zeros stood for them."""
    with pytest.raises(ValueError, match=f"solve: the blocks of `X` must hold the same finite rows.* got {got}"):
        cf.Cronos(max_iters=2).solve(Blocks(changed), X[:, :1], hidden=4)


def test_blocks_that_are_cut_otherwise_or_computed_anew_are_the_same():
    def solved(blocks):
        return cf.Cronos(max_iters=2).solve(blocks, X[:, :1], hidden=4).stats.objective

    again = np.nextafter(X, np.inf)
    np.testing.assert_allclose(solved(Blocks([again[:1], again[1:1], again[1:]])), solved([X[:20], X[20:]]), rtol=1e-4)


@pytest.mark.parametrize("name", ["beta", "beta_ratio", "rho", "tol"])
def test_a_batch_of_settings_is_for_vmap(name):
    """It was NumPy's message, that something cannot be broadcast."""
    solvers = cf.Cronos(max_iters=2, **{name: jnp.array([0.1, 0.2])})
    with pytest.raises(ValueError, match=rf"solve: `{name}` must be one number, got an array of shape \(2,\).*vmap"):
        solvers.solve(X, X[:, :1], hidden=4)


@pytest.mark.parametrize(
    "key",
    [3, "a", jax.random.split(jax.random.key(0)), np.zeros(3), np.zeros(3, "uint32")],
    ids=["int", "str", "keys", "floats", "three"],
)
def test_what_is_no_key_is_refused(key):
    """It was JAX's message, about the data of a key or an abstract array."""
    with pytest.raises(ValueError, match="solve: `key` must be one key, such as"):
        cf.Cronos(max_iters=2).solve(X, X[:, :1], hidden=4, key=key)


def test_a_class_that_was_held_out_whole_is_fitted_at_the_end_of_a_path():
    """The last fit started where its row was hopeless, and ended above the best constant, as "stationary"."""
    y = np.where(np.arange(64) == 5, 2, LABELS % 2)
    for seed in range(3):
        stats = cf.Cronos(loss="softmax", beta="path").solve(X, y, hidden=8, key=jax.random.key(seed)).stats
        assert stats.objective < stats.null_loss


def test_a_start_that_takes_a_row_for_impossible_is_left():
    """Logits of a class that the network had not seen hardly moved: it ended above the best constant, "stationary"."""
    y, known = np.where(np.arange(64) == 5, 2, LABELS % 2), np.arange(64) != 5
    solver = cf.Cronos(loss="softmax", beta=0.0159)
    init = solver.solve(X[known], y[known], hidden=16, num_classes=3).params
    stats = solver.solve(X, y, init=init).stats
    assert stats.objective < 0.95 * stats.null_loss
    assert stats.initial_objective == pytest.approx(float(solver.objective(init, X, y, 0.0159)), rel=1e-5)
    without_bias = dataclasses.replace(init, bias2=None)
    assert solver.solve(X, y, init=without_bias).params.bias2 is None


@pytest.mark.parametrize("beta", [1.0, 1e3, 1e22])
def test_a_weight_decay_that_leaves_no_neuron_gives_the_best_constant(beta):
    """Rounding of activations became steps of neurons near zero: the loss the solver saw was that of no network."""
    X = np.random.default_rng(0).normal(size=(200, 5)).astype("float32")
    stats = cf.Cronos(loss="softmax", beta=beta).solve(X, (X[:, 0] > 0).astype(int), hidden=8).stats
    assert float(stats.objective) == pytest.approx(float(stats.null_loss), rel=1e-5)
    assert float(stats.objective_trace[-1]) == pytest.approx(float(stats.objective), rel=1e-5)


@pytest.mark.parametrize("gates", ["fixed", "paired", "gated"])
def test_a_state_of_other_rows_gives_no_bound_above_the_objective(gates):
    """Gates of the old rows gave a lower bound three times the objective, as "converged"."""
    X = np.random.default_rng(0).normal(size=(200, 5)).astype("float32")
    X /= np.linalg.norm(X, axis=1, keepdims=True)  # the norms of rows do not tell them apart
    y = np.abs(X[:, 0]) - X[:, 1]
    first = cf.Cronos(gates=gates, beta=1e-3, max_iters=20).solve(X, y, hidden=8)
    solver = cf.Cronos(gates=gates, beta=1e-3, max_iters=1000)  # where it ends, cones hold
    stats = solver.solve(X[::-1], y[::-1], state=first.state).stats
    assert stats.lower_bound <= stats.program_objective * (1 + 1e-3)
    if gates != "paired":  # there the network need not follow the program
        assert stats.lower_bound <= stats.objective * (1 + 1e-3)
    again = solver.solve(X, y, state=first.state)
    np.testing.assert_array_equal(again.state.D, first.state.D)


@pytest.mark.parametrize(("mean", "told"), [(100.0, False), (1e6, True)])
def test_features_that_float32_hardly_tells_apart_are_told_of(mean, told):
    """They ended at the loss of the best constant, as "stationary", without a word."""
    X = np.random.default_rng(0).normal(size=(500, 5)).astype("float32")
    y = np.abs(X[:, 0])
    warned = pytest.warns(UserWarning, match="Subtract the mean of each column") if told else contextlib.nullcontext()
    with warned, jax.numpy_rank_promotion("raise"):  # the look at the features was an error there
        stats = cf.Cronos().solve(X + np.float32(mean), y, hidden=16).stats
    assert (stats.objective > 0.9 * stats.null_loss) == told


@pytest.mark.parametrize(("mean", "kind", "told"), [(1e5, "d", False), (1e7, "f", True), (1e8, "d", True)])
@pytest.mark.parametrize("columns", [1, 3])
def test_targets_that_float32_hardly_tells_apart_are_told_of(mean, kind, told, columns):
    """Their loss was zero, as of a perfect network, and the network was worse than the mean, without a word."""
    X = np.random.default_rng(0).normal(size=(300, 5)).astype("float32")
    y = np.abs(X[:, :1]) + np.zeros(columns)
    y[:, -1] += mean  # of several columns one is enough
    y, solver = (y if columns > 1 else y[:, 0]).astype(kind), cf.Cronos(max_iters=3)
    with pytest.warns(UserWarning, match="`y` should vary around zero") if told else contextlib.nullcontext():
        solver.solve(X, y, hidden=8)
    solver.solve(X, np.full_like(y, 1e9), hidden=8)  # of constants nothing is lost
    solver.solve(X, np.hstack([X[:, :1], np.where(X[:, 1:2] > 0, 0.1 + 0.2, 0.3)]), hidden=8)  # nor of rounding itself


@pytest.mark.parametrize(("size", "told"), [(1e-17, False), (1e-19, True), (1e-300, True)])
def test_targets_whose_squares_are_zero_are_told_of(size, told):
    """Their loss was zero, as of a perfect network, and the network was a constant, without a word."""
    X = np.random.default_rng(0).normal(size=(300, 5)).astype("float32")
    y, solver = np.abs(X[:, 0].astype(float)), cf.Cronos()
    with pytest.warns(UserWarning, match="whose squares are zero there") if told else contextlib.nullcontext():
        solution = solver.solve(X, y * size, hidden=8)
    residuals = np.asarray(cf.predict(solution.params, X), float)[:, 0] / size - y
    assert (np.var(residuals) > 0.1 * np.var(y)) == told
    solver.solve(X, np.zeros(300), hidden=8)  # of constants nothing is lost


@pytest.mark.parametrize(("times", "told"), [(1.0, False), (1e6, True)])
def test_rows_beside_which_all_others_are_next_to_nothing_are_told_of(times, told):
    """The default weight decay was that of two rows, and all others got the best constant, without a word."""
    X = np.random.default_rng(0).normal(size=(500, 5)).astype("float32")
    y = np.abs(X[:, 0])
    X[7:9] *= np.float32(times)
    with pytest.warns(UserWarning, match="rows of about one size") if told else contextlib.nullcontext():
        stats = cf.Cronos().solve(X, y, hidden=16).stats
        assert (stats.objective > 0.5 * stats.null_loss) == told
    if told:  # what the warning says
        stats = cf.Cronos().solve(X, y, hidden=16, sample_weight=(np.abs(X).max(axis=1) < 1e3).astype("float32")).stats
        assert stats.objective < 0.2 * stats.null_loss


@pytest.mark.parametrize("value", [0.0, 3.0])
def test_features_that_are_the_same_in_all_rows_are_told_of(value):
    """Those of a backbone whose neurons are all off ended at the best constant, as "stationary", without a word."""

    class Off(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Dense(8, bias_init=nn.initializers.constant(-1e6))(x)) + value
            return nn.Dense(1)(nn.relu(nn.Dense(6)(x)))

    x = np.random.default_rng(0).normal(size=(64, 5)).astype("float32")
    variables = drawn(Off(), jax.random.key(0), x)
    variables["params"]["Dense_0"]["bias"] = jnp.full(8, -1e6)
    head = cf.find_head(Off(), variables, x)
    with pytest.warns(UserWarning, match="`X` must differ from row to row in float32, got 64 times the same"):
        cf.fit_head(head, variables, (x, x[:, :1]), solver=cf.Cronos())
    state = cf.CronosTrainState.create(
        apply_fn=Off().apply, params=variables["params"], tx=optax.sgd(0.1), head=head, solver=cf.Cronos()
    )
    with pytest.warns(UserWarning, match="`X` must differ from row to row"):
        state.solve_head((x, x[:, :1]))


def test_residuals_at_which_the_huber_loss_is_flat_are_told_of():
    """With targets of 1e9 the solve ended at the best constant, as "stationary", without a word."""
    X = np.random.default_rng(0).normal(size=(500, 5)).astype("float32")
    y = np.float32(1e9) * np.abs(X[:, 0])
    with pytest.warns(UserWarning, match="`delta` of cf.Huber should be in the units of y"):
        stats = cf.Cronos(loss="huber").solve(X, y, hidden=16).stats
    assert stats.objective > 0.9 * stats.null_loss
    stats = cf.Cronos(loss=cf.Huber(1e9)).solve(X, y, hidden=16).stats
    assert stats.objective < 0.2 * stats.null_loss


def test_a_state_goes_on_with_its_own_gates_only():
    """One of "paired" went on under "fixed", with its random gates, without a word."""
    X = np.random.default_rng(0).normal(size=(200, 5)).astype("float32")
    solvers = {g: cf.Cronos(gates=g, beta=1e-3, max_iters=2) for g in ("refreshed", "fixed", "paired", "gated")}
    states = {gates: solver.solve(X, X[:, 0], hidden=8).state for gates, solver in solvers.items()}
    for gates, solver in solvers.items():
        for others in solvers.keys() - {gates}:
            got = "a RefreshedState" if others == "refreshed" else f"a HeldState of gates='{others}'"
            with pytest.raises(ValueError, match=f"of a solve with gates='{gates}', got {got}"):
                solver.solve(X, X[:, 0], state=states[others])


def test_a_network_whose_hidden_neurons_are_off_in_all_rows_is_left():
    """No gradient reaches such neurons: it ended at the best constant, as "stationary"."""
    X = np.random.default_rng(0).normal(size=(200, 5)).astype("float32")
    y = np.abs(X[:, 0])
    start = cf.Cronos(max_iters=1).solve(X, y, hidden=8).params
    stats = cf.Cronos().solve(X, y, init=dataclasses.replace(start, bias1=start.bias1 - 1e6)).stats
    assert stats.objective < 0.2 * stats.null_loss
    assert stats.objective <= stats.initial_objective


@pytest.mark.parametrize("kind", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_no_key_stands_for_that_of_seed_zero(kind):
    """It is put together from its data: to make it by ``jax.random.key`` compiles a program."""
    with jax.default_prng_impl(kind):
        assert default_key() == jax.random.key(0)


@pytest.mark.parametrize("kind", ["threefry2x32", "rbg"])
def test_no_key_goes_by_the_offset_of_seeds_too(kind):
    """It did not, so runs of several offsets were one run where no key was given."""
    with jax.default_prng_impl(kind):
        without = default_key()
        jax.config.update("jax_random_seed_offset", 7)
        try:
            assert default_key() == jax.random.key(0) != without
            assert jax.jit(lambda: default_key() == jax.random.key(0))()
        finally:
            jax.config.update("jax_random_seed_offset", 0)
        assert default_key() == without
        assert seeded(3) == jax.random.key(3)  # before, the generator of the first call stayed
