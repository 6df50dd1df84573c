"""``cf.train`` on NNX models: as on linen ones, and as in an NNX loop by hand; the model given is never changed."""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from given import HEAD, MODEL, PARAMS, X, Y, batched, losses, same

import cronos_flax as cf

ROWS = X[:256], Y[:256]
SOLVER = cf.Cronos(loss="softmax")


class Plain(nnx.Module):
    """The model of ``given`` in NNX, with its weights; layers in a list, and so with indices in their paths."""

    def __init__(self):
        sizes = (5, 8), (8, 6), (6, 2)
        self.layers = nnx.List([nnx.Linear(*size, rngs=nnx.Rngs(0)) for size in sizes])
        for layer, name in zip(self.layers, ("layers_0", "layers_2", "layers_4"), strict=True):
            layer.kernel[...], layer.bias[...] = PARAMS[name]["kernel"], PARAMS[name]["bias"]

    def __call__(self, x):
        a, b, c = self.layers
        return c(nnx.relu(b(nnx.tanh(a(x)))))


class Net(nnx.Module):
    """A batch norm with an axis of devices that is not there, dropout, and perhaps a value that is sown."""

    def __init__(self, rngs, rate=0.3, sows=False):
        self.sows = sows
        self.encoder, self.norm = nnx.Linear(5, 8, rngs=rngs), nnx.BatchNorm(8, axis_name="batch", rngs=rngs)
        self.dropout = nnx.Dropout(rate, rngs=rngs)
        self.hidden, self.out = nnx.Linear(8, 6, rngs=rngs), nnx.Linear(6, 2, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.encoder(x)))
        if self.sows:
            self.sow(nnx.Intermediate, "encoded", x)
        return self.out(nnx.relu(self.hidden(self.dropout(x))))


class LinenNet(nn.Module):
    """The same in linen, without dropout."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(nn.BatchNorm(use_running_average=not train, name="norm")(nn.Dense(8, name="encoder")(x)))
        return nn.Dense(2, name="out")(nn.relu(nn.Dense(6, name="hidden")(x)))


class Parts(nnx.Module):
    """The mean of parts in a dict, which it counts and perhaps goes through, and a head in another dict."""

    def __init__(self, goes_through):
        rngs = nnx.Rngs(0)
        self.goes_through = goes_through
        self.parts = nnx.Dict({name: nnx.Linear(5, 8, rngs=rngs) for name in "abc"})
        self.head = nnx.Dict(hidden=nnx.Linear(8, 6, rngs=rngs), out=nnx.Linear(6, 2, rngs=rngs))

    def __call__(self, x):
        parts = self.parts.values() if self.goes_through else (self.parts[name] for name in "abc")
        mean = sum(part(x) for part in parts) / len(self.parts)
        return self.head["out"](nnx.relu(self.head["hidden"](jnp.tanh(mean))))


@pytest.mark.parametrize("goes_through", [False, True])
def test_an_nnx_dict_has_no_entry_more_while_it_is_watched(goes_through):
    """Flax gives it one to sow into: features were of another model, without a word, or there was an error."""
    model = Parts(goes_through)
    head = cf.nnx.find_head(model, X)
    mean = sum(np.asarray(part(X)) for part in model.parts.values()) / 3
    np.testing.assert_allclose(head.inputs(model, X), np.tanh(mean), atol=1e-5)
    state = cf.nnx.CronosTrainState.create(model=model, tx=optax.adam(1e-2), head=head, solver=SOLVER)
    state, history = cf.train(state, ROWS, epochs=1, batch_size=64, validation=ROWS)
    logits = state.model(ROWS[0])
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, ROWS[1]).mean()
    np.testing.assert_allclose(history[-1]["validation_loss"], loss, rtol=1e-4)


def net(seed=0, **kwargs):
    return Net(nnx.Rngs(seed), **kwargs)


def alternating(model, tx=None, statistics=None, **kwargs):
    head = cf.nnx.find_head(model, X[:64], statistics=statistics)
    tx = optax.adam(1e-2) if tx is None else tx
    return cf.nnx.CronosTrainState.create(model=model, tx=tx, head=head, solver=SOLVER, **kwargs)


def plain(model, tx=None, **kwargs):
    return cf.nnx.TrainState.create(model=model, tx=optax.adam(1e-2) if tx is None else tx, **kwargs)


def train(state, data=ROWS, **kwargs):
    return cf.train(state, data, **{"epochs": 3, "batch_size": 64, "loss": "softmax", **kwargs})


def arrays(tree):
    keys = jax.dtypes.prng_key
    return [
        np.array(jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, keys) else leaf)
        for leaf in jax.tree.leaves(tree)
    ]


def everything(model):
    return arrays(nnx.to_pure_dict(nnx.state(model)))


def close(a, b):
    np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4)


def untimed(history):
    return [{name: v for name, v in row.items() if not name.endswith("seconds")} for row in history]


@pytest.mark.parametrize("head", ["moving", "frozen"])
def test_a_run_is_that_of_the_same_model_in_linen(head):
    alternation, tx = cf.Alternation(head=head), optax.adam(1e-2)
    model = Plain()
    linen = cf.CronosTrainState.create(
        apply_fn=MODEL.apply, params=PARAMS, tx=tx, head=HEAD, solver=SOLVER, alternation=alternation
    )
    kwargs = {"validation": (X[256:], Y[256:]), "epochs": 4, "data": (X, Y)}
    ours, history = train(alternating(model, tx, alternation=alternation), **kwargs)
    theirs, expected = train(linen, **kwargs)
    assert [row.keys() for row in history] == [row.keys() for row in expected]
    for row, other in zip(untimed(history), untimed(expected), strict=True):
        for name, value in row.items():
            np.testing.assert_allclose(value, other[name], rtol=2e-3, atol=2e-4, err_msg=name)
    for layer, name in zip(ours.model.layers, ("layers_0", "layers_2", "layers_4"), strict=True):
        close(layer.kernel[...], theirs.params[name]["kernel"])
        close(layer.bias[...], theirs.params[name]["bias"])
    same(everything(model), everything(Plain()))


def test_running_statistics_are_those_of_the_same_model_in_linen():
    model, module = net(rate=0.0), LinenNet()
    names = ("encoder", "norm", "hidden", "out")
    variables = nnx.to_pure_dict(nnx.state(model, nnx.Param)), nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
    params, stats = ({name: tree[name] for name in names if name in tree} for tree in variables)
    linen = cf.CronosTrainState.create(
        apply_fn=module.apply,
        params=params,
        tx=optax.adam(1e-2),
        head=cf.find_head(module, {"params": params, "batch_stats": stats}, X[:64], statistics="batch"),
        solver=SOLVER,
        model_state={"batch_stats": stats},
    )
    kwargs = {"validation": (X[256:], Y[256:]), "solve_every": 5}
    theirs, expected = train(linen, train_kwargs={"train": True}, **kwargs)
    ours, history = train(alternating(model, statistics="batch"), **kwargs)
    close(
        [row["validation_loss"] for row in history if "loss" in row],
        [r["validation_loss"] for r in expected if "loss" in r],
    )
    close(
        [row["objective"] for row in history if "loss" not in row],
        [r["objective"] for r in expected if "loss" not in r],
    )
    for name in ("mean", "var"):
        close(ours.model_state["batch_stats"]["norm"][name], theirs.model_state["batch_stats"]["norm"][name])
        assert np.all(ours.model_state["batch_stats"]["norm"][name] != stats["norm"][name])
    evaluated = ours.model
    evaluated.eval()
    close(evaluated(X), module.apply(theirs.variables, X))


def test_gradient_steps_are_those_of_an_nnx_loop():
    """Dropout too: the streams of the model go on as they do when it is called."""
    model, looped = net(sows=True), net(sows=True)
    looped.norm.axis_name = None
    optimizer = nnx.Optimizer(looped, optax.adam(1e-2), wrt=nnx.Param)
    looped.train()

    @nnx.jit
    def step(model, optimizer, x, y):
        def loss(model):
            out, _ = nnx.capture(lambda model: model(x), nnx.Intermediate)(model)
            return optax.softmax_cross_entropy_with_integer_labels(out, y).mean()

        value, grads = nnx.value_and_grad(loss)(model)
        optimizer.update(model, grads)
        return value

    expected = [np.mean([step(looped, optimizer, x, y) for x, y in batched()]) for _ in range(2)]
    before = everything(model)
    state, history = train(plain(model), batched(), epochs=2)
    np.testing.assert_allclose(losses(history), expected, rtol=1e-4)
    for ours, theirs in zip(everything(state.model), everything(looped), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4)
    assert state.model.dropout.rngs.count[...] == 8
    same(everything(model), before)


def test_a_run_goes_on_to_the_bit_where_it_stopped(tmp_path):
    class StopError(Exception):
        pass

    def stop(row):
        if row["step"] == 8:
            raise StopError

    def made(**kwargs):
        return alternating(net(), statistics="batch", **kwargs)

    kwargs = {"epochs": 4, "save_every": 3}
    whole, history = train(made(), epochs=4)
    with pytest.raises(StopError):
        train(made(), directory=tmp_path, callbacks=[stop], **kwargs)
    resumed, rows = train(made(), directory=tmp_path, **kwargs)
    same(arrays(resumed), arrays(whole))
    assert untimed(rows) == untimed(history)
    evaluating = net()
    evaluating.eval()
    with pytest.raises(ValueError, match="holds a run with train_mode="):
        train(alternating(evaluating, statistics="batch", train_mode=False), directory=tmp_path, **kwargs)


def test_the_model_stays_where_a_step_of_the_users_donates_the_state():
    """Its arrays were those of the state, and the first step deleted them."""
    model = net()
    before = everything(model)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state):
        return state.apply_gradients(grads=state.params)

    step(alternating(model, statistics="batch"))
    step(plain(model))
    same(everything(model), before)


@pytest.mark.parametrize("train_mode", [True, False])
def test_the_mode_of_gradient_steps_and_of_the_model_that_comes_back(train_mode):
    model = net()
    model.eval()
    state, _ = train(plain(model, train_mode=train_mode), epochs=1)
    moved = not np.array_equal(state.model_state["batch_stats"]["norm"]["mean"], model.norm.mean[...])
    assert moved == train_mode
    assert state.model_state["streams"]["dropout"]["rngs"]["count"] == (4 if train_mode else 0)
    assert state.model.dropout.deterministic
    np.testing.assert_allclose(
        state.apply_fn({"params": state.params, **state.model_state}, X), state.model(X), rtol=1e-5
    )
    for mutable, names in ((True, {"batch_stats", "streams"}), ("streams", {"streams"})):
        _, changed = state.apply_fn({"params": state.params, **state.model_state}, X, mutable=mutable)
        assert changed.keys() == names
    assert isinstance(state.model, Net)
    assert state.model is not model


class Block(nnx.Module):
    def __init__(self, rngs):
        self.linear, self.norm = nnx.Linear(8, 8, rngs=rngs), nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.2, rngs=rngs)

    def __call__(self, x):
        return nnx.tanh(self.dropout(self.norm(self.linear(x))))


@nnx.split_rngs(splits=3)
@nnx.vmap
def blocks(rngs):
    return Block(rngs)


def called(block, x):
    return block(x)


class Transformed(nnx.Module):
    """A part of the model is transformed by itself; its first layer is called twice, and so is tied."""

    def __init__(self, how):
        rngs = nnx.Rngs(0)
        self.how, self.body = how, (blocks if how == "scan" else Block)(rngs)
        self.first, self.again = [nnx.Linear(5, 5, rngs=rngs)] * 2
        self.wide, self.hidden, self.out = (nnx.Linear(*size, rngs=rngs) for size in ((5, 8), (8, 6), (6, 2)))

    def __call__(self, x):
        x = self.wide(self.again(nnx.tanh(self.first(x))))
        if self.how == "scan":
            x = nnx.scan(lambda x, block: block(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.body)
        else:
            x = {"plain": called, "jit": nnx.jit(called), "remat": nnx.remat(called)}[self.how](self.body, x)
        return self.out(nnx.relu(self.hidden(x)))


def test_parts_that_are_transformed_and_layers_that_are_tied():
    trained = {}
    for how in ("plain", "jit", "remat", "scan"):
        state, history = train(alternating(Transformed(how), statistics="batch"), epochs=2)
        model = state.model
        assert np.all(model.body.dropout.rngs.count[...] == 8)
        assert model.first is model.again
        assert ("first" in state.params) != ("again" in state.params)
        trained[how] = losses(history)
    np.testing.assert_allclose(trained["jit"], trained["plain"], rtol=1e-4)
    np.testing.assert_allclose(trained["remat"], trained["plain"], rtol=1e-4)


def test_programs_of_a_model_with_random_streams_are_compiled_first():
    """The state that they were compiled with had no streams, and was refused."""
    _, history = train(alternating(net(), statistics="batch"), compile_first=True, epochs=1)
    assert history[0]["compile_seconds"] > 0


def test_norms_that_stay_as_they_were_pretrained():
    model = net()
    model.norm.eval()
    state, _ = train(alternating(model, statistics="running", train_mode=False), epochs=2)
    assert state.apply_fn.kept_back == ("norm",)
    np.testing.assert_array_equal(state.model.norm.mean[...], model.norm.mean[...])
    assert state.model.dropout.rngs.count[...] == 8
    assert (state.model.norm.use_running_average, state.model.dropout.deterministic) == (True, False)


@pytest.mark.parametrize("evaluated", [["norm"], ["norm", "dropout"], []])
def test_norms_that_stay_as_they_were_need_no_statistics(evaluated):
    """Steps and solves use the same running statistics; only norms in training mode take those of the batch."""
    model = net()
    for name in evaluated:
        getattr(model, name).eval()
    if evaluated:
        alternating(model, train_mode=False)
    else:
        with pytest.warns(UserWarning, match="training steps use those of the batch"):
            alternating(model, train_mode=False)
    with pytest.warns(UserWarning, match="training steps use those of the batch"):
        alternating(model)


def test_a_warning_shows_the_line_of_the_user():
    with pytest.warns(UserWarning, match="CronosTrainState: `head` was found with the running statistics") as told:
        alternating(net())
    assert told[0].filename == __file__


@pytest.mark.filterwarnings("ignore:solve. `X` must differ from row to row:UserWarning")  # so it was spoiled
def test_when_the_guard_goes_back_random_streams_go_on():
    state = alternating(net(), statistics="batch")
    state, _ = state.solve_head(ROWS)
    kept = state.variables
    trained, _ = cf.train(state, ROWS, epochs=1, batch_size=64)
    spoiled = {**trained.params, "encoder": jax.tree.map(jnp.zeros_like, trained.params["encoder"])}
    back, solution = trained.replace(params=spoiled, guard=state.guard).solve_head(ROWS)
    assert solution.status == cf.Status.rejected
    same(arrays(back.params), arrays(kept["params"]))
    same(arrays(back.model_state["batch_stats"]), arrays(kept["batch_stats"]))
    assert back.model_state["streams"]["dropout"]["rngs"]["count"] == 4
    assert jax.tree.structure(back.model_state) == jax.tree.structure(state.model_state)
    assert not state.guard.drifts


def test_masks_weights_and_a_pool_among_the_arguments():
    """In the place of a layer inside, which is told the arguments that the model is called with."""

    class Tokens(nnx.Module):
        def __init__(self, rngs):
            self.body, self.classify = nnx.Linear(5, 5, rngs=rngs), nnx.Linear(5, 2, rngs=rngs)

        def __call__(self, x, mask):
            return self.classify(nnx.tanh(self.body(x)))

    def mean(x, tokens, mask):
        return (x * mask[..., None]).sum(axis=1) / mask.sum(axis=1, keepdims=True)

    rngs = nnx.Rngs(0)
    model = cf.nnx.graft(Tokens(rngs), at="classify", hidden=6, pool=mean, rngs=rngs)
    mask = np.arange(3) < np.resize([1, 2, 3], 128)[:, None]
    words = np.where(mask[..., None], X[:128, None], 1e6).astype("float32")  # what is masked must not count
    rows = [{"x": words[i : i + 64], "mask": mask[i : i + 64], "y": Y[i : i + 64]} for i in (0, 64)]

    def unpack(row):
        return (row["x"], row["mask"]), row["y"], np.ones(64, "float32")

    head = cf.nnx.find_head(model, words[:64], mask[:64])
    state = cf.nnx.CronosTrainState.create(model=model, tx=optax.adam(1e-2), head=head, solver=SOLVER)
    state, history = train(state, rows, unpack=unpack)
    assert losses(history)[-1] < 0.69
    close(state.model(words, mask), state.model(X[:128, None].repeat(3, axis=1), mask))


def test_the_method_of_the_head_is_trained():
    class Two(Plain):
        def __call__(self, x):
            raise AssertionError

        def classify(self, x):
            return {"logits": Plain.__call__(self, x)}

    model = Two()
    head = cf.nnx.find_head(model, X[:64], method="classify", output="logits")
    state = cf.nnx.CronosTrainState.create(model=model, tx=optax.adam(1e-2), head=head, solver=SOLVER)
    ours, history = train(state)
    _, expected = train(alternating(Plain()))
    assert untimed(history) == untimed(expected)
    close(ours.model.classify(X)["logits"], ours.apply_fn(ours.variables, X)["logits"])
    by_name = cf.nnx.TrainState.create(model=model, tx=optax.adam(1e-2), method=lambda m, x: m.classify(x)["logits"])
    assert losses(train(by_name)[1])[-1] < losses(train(by_name)[1])[0]


def test_features_that_were_gathered_with_the_model_are_solved_on():
    model = net()
    head = cf.nnx.find_head(model, X[:64], statistics="batch")
    features = cf.gather_features(head, model, batched())
    state = cf.nnx.CronosTrainState.create(model=model, tx=optax.adam(1e-2), head=head, solver=SOLVER)
    by_features, _ = state.solve_head(features)
    by_rows, _ = state.solve_head(batched())
    for ours, theirs in zip(arrays(by_features.variables), arrays(by_rows.variables), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    looped = net()
    optimizer = cf.nnx.CronosOptimizer(looped, optax.adam(1e-2), head=head, solver=SOLVER)
    optimizer.solve_head(looped, batched())
    for ours, theirs in zip(everything(by_rows.model), everything(looped), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="features of this backbone"):
        train(state, epochs=1)[0].solve_head(features)


def test_other_seeds_take_the_same_programs():
    head = cf.nnx.find_head(net(), X[:64], statistics="batch")
    tx = optax.adam(1e-2)
    states = [cf.nnx.CronosTrainState.create(model=net(seed), tx=tx, head=head, solver=SOLVER) for seed in (0, 1)]
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])
    assert not np.array_equal(*(state.params["out"]["kernel"] for state in states))


@dataclasses.dataclass
class Config:
    """Not frozen, so it has no hash; and arrays in it compare to no bool."""

    sizes: Any = dataclasses.field(default_factory=lambda: np.arange(3))


class Configured(Plain):
    def __init__(self, config):
        super().__init__()
        self.config = config


@pytest.mark.parametrize("config", [lambda: [8, 0.5], lambda: {"width": 8}, Config])
def test_attributes_may_be_without_a_hash(config, tmp_path):
    """A foreign error, where find_head and CronosOptimizer took them."""
    model = Configured(config())
    state, history = train(alternating(model), validation=ROWS, directory=tmp_path)
    assert state.model.config == model.config
    np.testing.assert_allclose(losses(history), losses(train(alternating(Plain()))[1]), rtol=1e-5)
    again, _ = train(alternating(model), validation=ROWS, directory=tmp_path)
    same(again, state)
    train(plain(model), epochs=1)


def test_attributes_that_compare_to_no_bool_are_those_of_another_model():
    head = cf.nnx.find_head(Configured(Config()), X[:64])
    with pytest.raises(ValueError, match="or with other attributes"):
        cf.nnx.fit_head(head, Configured(Config()), ROWS, solver=SOLVER)


class Writing(Plain):
    def __call__(self, x):
        out = super().__call__(x)
        self.layers[0].bias[...] = self.layers[0].bias[...] + 1
        return out


class Making(Plain):
    def __call__(self, x):
        self.seen = nnx.Variable(x)
        return super().__call__(x)


class Lazy(Plain):
    """Makes a layer when it is called first."""

    def __init__(self):
        super().__init__()
        self.rngs, self.more = nnx.Rngs(0), nnx.List([])

    def __call__(self, x):
        if not self.more:
            self.more.append(nnx.Linear(5, 5, rngs=self.rngs))
        return super().__call__(nnx.tanh(self.more[0](x)))


def test_a_layer_that_the_first_call_makes_is_there_after_it():
    """Before it, it was drawn anew in every step, and trained in none, without a word."""
    model = Lazy()
    model(X)
    state, _ = train(plain(model), epochs=1)
    assert not np.array_equal(state.model.more[0].kernel, model.more[0].kernel)
    fresh = plain(Lazy())
    with pytest.raises(ValueError, match=r"but it makes more/0/bias, more/0/kernel\. Make them"):
        fresh.apply_fn({"params": fresh.params, **fresh.model_state}, X)


class Scaled(Plain):
    def __init__(self):
        super().__init__()
        self.scales = nnx.List([nnx.Param({"a": jnp.ones(5)})])

    def __call__(self, x):
        return super().__call__(x * self.scales[0]["a"])


def given(**kwargs):
    model = kwargs.get("model", Plain())
    defaults = {"model": model, "tx": optax.adam(1e-2), "head": cf.nnx.find_head(Plain(), X[:64])}
    return cf.nnx.CronosTrainState.create(**{**defaults, **kwargs})


BAD = {
    "a model in the place of a state": (lambda: train(Plain()), "cf.nnx.CronosTrainState.create"),
    "rngs": (lambda: train(alternating(Plain()), rngs=("noise",)), "random streams of its own"),
    "a model that is none": (lambda: given(model=MODEL), "`model` must be an NNX module, got Sequential"),
    "a model that is none, without head": (lambda: plain(MODEL), "`model` must be an NNX module, got Sequential"),
    "a head of linen": (lambda: given(head=HEAD), "must come from cf.nnx.find_head"),
    "a head of another model": (lambda: given(model=net()), "the Plain that the head was found in"),
    "a head of NNX in linen": (
        lambda: cf.CronosTrainState.create(
            apply_fn=MODEL.apply, params=PARAMS, tx=optax.adam(1e-2), head=cf.nnx.find_head(Plain(), X[:64])
        ),
        "got one that cf.nnx.find_head found",
    ),
    "its own head outside": (
        lambda: cf.nnx.fit_head(alternating(Plain()).head, Plain(), ROWS),
        "got one that cf.nnx.CronosTrainState found",
    ),
    "an optimizer": (lambda: given(tx="adam"), "`tx` must be"),
    "an optimizer of a plain state": (lambda: plain(Plain(), "adam"), "TrainState: `tx` must be"),
    "lookahead": (
        lambda: given(tx=optax.lookahead(optax.adam(1e-2), 2, 0.5)),
        "CronosTrainState: with optax.lookahead",
    ),
    "lookahead of a plain state": (
        lambda: plain(Plain(), optax.lookahead(optax.adam(1e-2), 2, 0.5)),
        "TrainState: with optax.lookahead .* for an NNX model take another",
    ),
    "a field": (lambda: given(batch_stats={}), "is not a field"),
    "streams in a call": (
        lambda: train(alternating(Plain()), train_kwargs={"rngs": nnx.Rngs(0)}),
        "`train_kwargs` must hold no random streams, got `rngs`",
    ),
    "assigned parameters": (lambda: train(plain(Writing())), r"it assigns one of shape \(8,\)"),
    "a dict in a Variable": (lambda: plain(Scaled()), "TrainState: no nnx.Variable .* got one at scales/0.*nnx.Dict"),
    "made variables": (lambda: train(plain(Making())), "it makes seen"),
    "made parameters": (lambda: train(plain(Lazy())), "it makes more/0/bias, more/0/kernel"),
}


@pytest.mark.parametrize("case", list(BAD))
def test_bad_input_is_refused(case):
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call()
