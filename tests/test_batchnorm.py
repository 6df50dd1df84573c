"""Batch norms and dropout as they are used: features as in training without dropout, and statistics that follow."""

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import drawn
from flax import nnx

import cronos_flax as cf
from cronos_flax._head.nnx_collections import functional, on_collections
from cronos_flax._head.norms import bound_axes

X = 3 + 2 * jax.random.normal(jax.random.key(0), (64, 5))
Y = (X[:, 0] > 3).astype(int)
KEY = jax.random.key(0)
SOLVER = cf.Cronos(loss="softmax", max_iters=3)


class LinenNet(nn.Module):
    """A batch norm that averages over devices, used twice if told so; dropout before the head and inside it."""

    twice: bool = False

    @nn.compact
    def __call__(self, x, train=False):
        norm = nn.BatchNorm(use_running_average=not train, axis_name="batch")
        x = norm(nn.Dense(8)(x))
        x = nn.relu(norm(3 * x + 1) if self.twice else x)
        x = nn.Dropout(0.5, deterministic=not train)(x)
        x = nn.relu(nn.Dense(6)(x))
        return nn.Dense(2)(nn.Dropout(0.5, deterministic=not train)(x))


class NnxNet(nnx.Module):
    """The same in NNX."""

    def __init__(self, twice, rngs):
        self.twice = twice
        self.encoder = nnx.Linear(5, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, axis_name="batch", rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.hidden, self.out = nnx.Linear(8, 6, rngs=rngs), nnx.Linear(6, 2, rngs=rngs)

    def __call__(self, x):
        x = self.norm(self.encoder(x))
        x = nnx.relu(self.norm(3 * x + 1) if self.twice else x)
        return self.out(self.dropout(nnx.relu(self.hidden(self.dropout(x)))))


@dataclasses.dataclass
class Kind:
    """A model of one kind, and what a user does with it.

    Args:
        find: finds its head, with the arguments given.
        fit: solves once with ``fit_head``; gives what it made.
        alternate: makes a train state or an optimizer, solves once; gives the model it made.
        logits: of a model in evaluation mode, on these rows.
        encoded: the input of the norm, as an array.
        running: mean and variance that a model keeps.
    """

    find: Callable[..., cf.Head]
    fit: Callable[..., Any]
    alternate: Callable[[cf.Head, Any], Any]
    logits: Callable[[Any, Any], Any]
    encoded: Callable[[Any], Any]
    running: Callable[[Any], tuple]


def linen(twice=False):
    model = LinenNet(twice)
    variables = jax.jit(model.init)(jax.random.key(0), X)

    def alternate(head, data):
        state = cf.CronosTrainState.create(
            apply_fn=model.apply,
            params=variables["params"],
            tx=optax.sgd(0.1),
            head=head,
            solver=SOLVER,
            model_state={"batch_stats": variables["batch_stats"]},
        )
        return state.solve_head(data)[0].variables

    return Kind(
        find=lambda **how: cf.find_head(model, variables, X, **how),
        fit=lambda head, data, unpack=None: cf.fit_head(head, variables, data, solver=SOLVER, unpack=unpack)[0],
        alternate=alternate,
        logits=lambda variables, x: model.apply(variables, x),
        encoded=lambda variables: np.asarray(
            X @ variables["params"]["Dense_0"]["kernel"] + variables["params"]["Dense_0"]["bias"]
        ),
        running=lambda variables: tuple(
            np.asarray(variables["batch_stats"]["BatchNorm_0"][name]) for name in ("mean", "var")
        ),
    )


def in_nnx(twice=False):
    model = NnxNet(twice, nnx.Rngs(0))

    def fit(head, data, unpack=None):
        copy = nnx.clone(model)
        cf.nnx.fit_head(head, copy, data, solver=SOLVER, unpack=unpack)
        return copy

    def alternate(head, data):
        copy = nnx.clone(model)
        cf.nnx.CronosOptimizer(copy, optax.sgd(0.1), head=head, solver=SOLVER).solve_head(copy, data)
        return copy

    def logits(model, x):
        copy = nnx.clone(model)
        copy.eval()
        return copy(x)

    return Kind(
        find=lambda **how: cf.nnx.find_head(model, X, **how),
        fit=fit,
        alternate=alternate,
        logits=logits,
        encoded=lambda model: np.asarray(model.encoder(X)),
        running=lambda model: (np.asarray(model.norm.mean[...]), np.asarray(model.norm.var[...])),
    )


def in_a_state(twice=False):
    """The NNX model in a train state: solves see it in the form of linen."""
    made = in_nnx(twice)
    model = NnxNet(twice, nnx.Rngs(0))

    function, variables = functional(model)

    def fit(head, data, unpack=None):
        return function.model(cf.fit_head(on_collections(head), variables, data, solver=SOLVER, unpack=unpack)[0])

    def alternate(head, data):
        state = cf.nnx.CronosTrainState.create(model=model, tx=optax.sgd(0.1), head=head, solver=SOLVER)
        return state.solve_head(data)[0].model

    return dataclasses.replace(made, fit=fit, alternate=alternate)


KINDS = pytest.mark.parametrize("kind", [linen, in_nnx, in_a_state])


@KINDS
def test_padding_that_is_not_finite_changes_no_statistics(kind):
    """It stands for rows that count; padding that is finite is part of the batch, as in training."""
    made = kind()
    head = made.find(statistics="batch")
    weight = np.where(np.arange(64) < 32, 1.0, 0.0)

    def running(padding):
        rows = np.concatenate([X[:32], np.broadcast_to(padding, (32, 5))])
        return made.running(made.fit(head, [(rows, Y, weight)], lambda batch: ((batch[0],), *batch[1:])))

    copies = running(X[:32])
    for one, two in zip(running(np.nan), copies, strict=True):
        np.testing.assert_array_equal(one, two)
    assert not np.allclose(running(0.0)[0], copies[0], atol=0.1)


@KINDS
@pytest.mark.parametrize("way", ["fit", "alternate"])
def test_an_evaluated_model_sees_what_was_solved_on(kind, way):
    """Dropout between the two layers, and an axis of devices; it had 11.6 % after an epoch."""
    made = kind()
    head = made.find(statistics="batch")
    assert head.in_training
    assert "statistics of the batch; a solve sets the running ones" in str(head)
    batches = [(X[:40], Y[:40]), (X[40:], Y[40:])]
    after = getattr(made, way)(head, batches)
    mean, var = made.running(after)
    encoded = made.encoded(after)
    np.testing.assert_allclose(mean, encoded.mean(axis=0), atol=1e-4)
    np.testing.assert_allclose(var, encoded.var(axis=0), rtol=1e-3)
    whole = getattr(made, way)(head, (X, Y))
    logits = cf.predict(head.read(whole), head.inputs(whole[0] if isinstance(whole, tuple) else whole, X))
    np.testing.assert_allclose(made.logits(whole, X), logits, atol=1e-3)


@KINDS
def test_statistics_stay_where_a_user_says_so(kind):
    made = kind()
    for how in ({"statistics": "batch", "recalibrate": False}, {"statistics": "running"}):
        mean, var = made.running(made.alternate(made.find(**how), (X, Y)))
        np.testing.assert_array_equal(mean, 0)
        np.testing.assert_array_equal(var, 1)


@KINDS
def test_a_norm_that_is_used_twice_keeps_the_mean_of_both(kind):
    made = kind(twice=True)
    after = made.fit(made.find(statistics="batch"), (X, Y))
    first = made.encoded(after)
    second = 3 * (first - first.mean(axis=0)) / np.sqrt(first.var(axis=0) + 1e-5) + 1
    mean, var = made.running(after)
    np.testing.assert_allclose(mean, (first.mean(axis=0) + second.mean(axis=0)) / 2, atol=1e-4)
    np.testing.assert_allclose(var, (first.var(axis=0) + second.var(axis=0)) / 2, rtol=1e-3)


class WithStatistics(cf.CronosTrainState):
    """A train state as in Flax's guides, with a field for the running statistics, which no solve looks at."""

    batch_stats: Any = None


def test_running_statistics_that_a_solve_does_not_find_are_told_of():
    model = LinenNet()
    variables = model.init(jax.random.key(0), X)
    made = {"apply_fn": model.apply, "params": variables["params"], "tx": optax.sgd(0.1), "solver": SOLVER}
    head = cf.find_head(model, variables, X, statistics="batch")
    state = WithStatistics.create(**made, head=head, batch_stats=variables["batch_stats"])
    with pytest.warns(UserWarning, match='batch norms such as BatchNorm_0 had no.*model_state={"batch_stats"'):
        state.solve_head((X, Y))
    with pytest.warns(UserWarning, match="had no running statistics to set.*with the variables to fit_head"):
        cf.fit_head(head, {"params": variables["params"]}, (X, Y), solver=SOLVER)
    unkept = cf.find_head(model, variables, X, statistics="batch", recalibrate=False)
    cf.fit_head(unkept, {"params": variables["params"]}, (X, Y), solver=SOLVER)


@KINDS
def test_an_alternation_on_running_statistics_warns(kind):
    """Gradients see other features than solves, and nobody is told."""
    made = kind()
    with pytest.warns(
        UserWarning, match=r'running statistics of batch norms.*Call find_head with statistics="batch"'
    ) as told:
        made.alternate(made.find(), (X, Y))
    assert told[0].filename == __file__
    with warnings.catch_warnings(action="error"):
        made.fit(made.find(), (X, Y))


def test_a_call_that_may_change_other_collections_only_is_no_training():
    """Sown values, losses or a cache made it one, and nothing was said of its running statistics."""
    made = linen()
    head = made.find(train=False, mutable=["intermediates"])
    assert not head.in_training
    assert "norms" not in str(head)
    with pytest.warns(UserWarning, match="running statistics of batch norms"):
        made.alternate(head, (X, Y))
    with pytest.warns(UserWarning, match="as in training, but this call leaves running statistics"):
        assert made.find(train=False, mutable=["intermediates", "batch_stats"]).in_training


def test_a_call_as_in_training_that_leaves_the_statistics_is_told_of():
    """It counted as one of training: gradient steps saw other features than solves, without a word."""
    for call in ({"train": False}, {}):
        with pytest.warns(
            UserWarning, match=r'find_head: `mutable=\["batch_stats"\]` calls.*statistics="batch"'
        ) as told:
            linen().find(**call, mutable=["batch_stats"])
        assert told[0].filename == __file__
    linen().find(train=False, mutable=["batch_stats"], statistics="running")
    linen().find(train=False, mutable=["batch_stats"], statistics="batch")


@KINDS
def test_other_words_than_batch_and_running_are_refused(kind):
    with pytest.raises(ValueError, match=r'find_head: `statistics` must be "batch", "running" or None.*got \'train\''):
        kind().find(statistics="train")


def test_rows_in_the_order_of_their_classes_are_mixed_for_the_statistics_of_a_batch():
    """Each batch of one class, normalised by its own mean, would say nothing of the class."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.BatchNorm(use_running_average=True)(x)
            return nn.Dense(2)(nn.relu(nn.Dense(6)(x)))

    rng = np.random.default_rng(0)
    y = np.repeat([0, 1], 1100)
    x = (rng.normal(size=(2200, 5)) + 6 * y[:, None]).astype("float32")
    variables = jax.jit(Net().init)(jax.random.key(0), x[:64])
    head = cf.find_head(Net(), variables, x[:64], statistics="batch")
    rows, _ = head.gather(variables, (x, y))
    assert np.mean((rows.X.mean(axis=1) > 0) == rows.y) > 0.99


def test_statistics_that_no_batch_norm_keeps_are_not_passed_over():
    class Own(nn.Module):
        @nn.compact
        def __call__(self, x):
            mean = self.variable("batch_stats", "mean", jnp.zeros, x.shape[-1:])
            return nn.Dense(2)(nn.relu(nn.Dense(6)(x - mean.value)))

    variables = jax.jit(Own().init)(jax.random.key(0), X)
    with pytest.raises(ValueError, match=r"must find nn.BatchNorm layers.*mutable="):
        cf.find_head(Own(), variables, X, statistics="batch")


class Noisy(nn.Module):
    """Dropout before the head, on unless told otherwise; a stream of random numbers that nothing uses if it is off."""

    @nn.compact
    def __call__(self, x, train=True):
        x = nn.Dropout(0.5, deterministic=not train)(nn.tanh(nn.Dense(8)(x)))
        return nn.Dense(2)(nn.relu(nn.Dense(6)(x)))


class NoisyNnx(nnx.Module):
    """The same in NNX."""

    def __init__(self, rngs):
        self.encoder, self.dropout = nnx.Linear(5, 8, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)
        self.hidden, self.out = nnx.Linear(8, 6, rngs=rngs), nnx.Linear(6, 2, rngs=rngs)

    def __call__(self, x, rngs=None):
        return self.out(nnx.relu(self.hidden(self.dropout(nnx.tanh(self.encoder(x)), rngs=rngs))))


@pytest.mark.parametrize("key", [jax.random.key(3), jax.random.PRNGKey(3), np.asarray(jax.random.PRNGKey(3))])
@pytest.mark.parametrize("named", [True, False])
def test_features_with_dropout_warn(key, named):
    """Solves fitted the noise of one draw, without a word: a model whose default is train=True, with its keys."""
    variables = drawn(Noisy(), {"params": KEY, "dropout": KEY}, X)
    rngs = {"dropout": key} if named else key
    with pytest.warns(UserWarning, match=r"find_head: the head's input must be the same .* train=False or"):
        cf.find_head(Noisy(), variables, X, rngs=rngs)
    cf.find_head(Noisy(), variables, X, train=False, rngs=rngs)


class NoisyBranch(nn.Module):
    """Dropout in a branch that begins at zero, as in DiT and other residual networks."""

    @nn.compact
    def __call__(self, x, train=True):
        x = nn.tanh(nn.Dense(8)(x))
        branch = nn.Dense(8, kernel_init=nn.initializers.zeros)(nn.Dropout(0.5, deterministic=not train)(x))
        return nn.Dense(2)(nn.relu(nn.Dense(6)(x + branch)))


def test_dropout_in_a_branch_that_begins_at_zero_warns():
    """It was seen only after the first gradient step, and then nobody looked."""
    variables = drawn(NoisyBranch(), {"params": KEY, "dropout": KEY}, X)
    variables["params"]["Dense_1"] = jax.tree.map(jnp.zeros_like, variables["params"]["Dense_1"])
    with pytest.warns(UserWarning, match=r"find_head: the head's input must be the same .* train=False or"):
        cf.find_head(NoisyBranch(), variables, X, rngs={"dropout": KEY})
    cf.find_head(NoisyBranch(), variables, X, train=False, rngs={"dropout": KEY})


def test_features_with_dropout_warn_in_nnx():
    model = NoisyNnx(nnx.Rngs(0))
    with pytest.warns(UserWarning, match=r"find_head: the head's input must be the same .* with eval_mode=True"):
        cf.nnx.find_head(model, X, eval_mode=False)
    cf.nnx.find_head(model, X)
    with pytest.warns(UserWarning, match=r"find_head: the head's input must be the same"):
        cf.nnx.find_head(model, X, eval_mode=False, rngs=nnx.Rngs(1))
    cf.nnx.find_head(model, X, rngs=nnx.Rngs(1))
    model.eval()
    cf.nnx.find_head(model, X, eval_mode=False)


def linen_state(rate):
    """A train state whose head was found on the statistics of the batch."""
    model = LinenNet()
    variables = jax.jit(model.init)(jax.random.key(0), X)
    return cf.CronosTrainState.create(
        apply_fn=model.apply,
        params=variables["params"],
        tx=optax.sgd(rate),
        head=cf.find_head(model, variables, X, statistics="batch"),
        solver=SOLVER,
        model_state={"batch_stats": variables["batch_stats"]},
    )


def test_a_rejected_solve_takes_the_running_statistics_back():
    accepted, _ = linen_state(1e30).solve_head((X, Y))
    state = accepted.apply_gradients(grads=jax.tree.map(jnp.ones_like, accepted.params))
    state, solution = state.solve_head((X, Y))
    assert solution.status == cf.Status.rejected
    jax.tree.map(np.testing.assert_array_equal, state.model_state, accepted.model_state)


def test_train_takes_a_norm_that_averages_over_devices():
    """It was an unbound axis outside pmap and shard_map."""
    state = linen_state(0.1)
    state, history = cf.train(state, (X, Y), epochs=1, batch_size=64, train_kwargs={"train": True}, validation=(X, Y))
    assert history[-1]["validation_loss"] < 0.7


def test_a_module_that_trains_where_it_is_scored_is_told_of():
    train = {"train": True, "rngs": {"dropout": KEY}}
    with pytest.raises(
        ValueError, match=r"`validation`: the module must change no collection .*train=False\. If train"
    ):
        cf.train(linen_state(0.1), (X, Y), epochs=1, train_kwargs={"train": True}, validation=(X, Y), eval_kwargs=train)


def test_gradient_steps_that_see_no_statistics_of_the_batch_are_told_of():
    """Without train=True they saw the running ones, and solves those of the batch, without a word."""
    with pytest.warns(UserWarning, match="train: `train_kwargs` must call the module as in training"):
        cf.train(linen_state(0.1), (X, Y), epochs=1, batch_size=64)


def test_statistics_that_are_those_of_the_batch_already_may_stay():
    state, _ = linen_state(1e-30).solve_head((X, Y))
    state, _ = cf.train(state, (X, Y), epochs=1, batch_size=len(X), train_kwargs={"train": True})
    with pytest.warns(UserWarning, match="train: `train_kwargs` must call the module as in training"):
        cf.train(state.replace(step=0), (X, Y), epochs=1, batch_size=len(X))


def test_an_axis_that_is_there_is_averaged_over():
    """A module that binds the axis itself, as nn.vmap does, is left alone."""
    assert bound_axes("batch") is None
    seen = []
    jax.vmap(lambda x: seen.append(bound_axes(("batch", "other"))) or x, axis_name="batch")(X)
    assert seen == [("batch",)]
