"""CRONOS-AM: the ordinary loop and its few changed lines; the head belongs to the solver alone."""

import difflib
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import cronos_flax as cf
from cronos_flax._alternation.defaults import alternation_defaults

ORDINARY = """
variables = model.init(jax.random.key(0), x)
state = TrainState.create(apply_fn=model.apply, params=variables["params"], tx=optax.adam(1e-3))

@jax.jit
def train_step(state, x, y):
    def loss(params):
        return jnp.mean(0.5 * jnp.sum(jnp.square(state.apply_fn({"params": params}, x) - y), axis=-1))
    return state.apply_gradients(grads=jax.grad(loss)(state.params))

for epoch in range(5):
    for i in range(0, len(x), 100):
        state = train_step(state, x[i : i + 100], y[i : i + 100])
"""

CRONOS_AM = """
variables = model.init(jax.random.key(0), x)
head = cf.find_head(model, variables, x[:100])
state = cf.CronosTrainState.create(apply_fn=model.apply, params=variables["params"], tx=optax.adam(1e-3), head=head)

@jax.jit
def train_step(state, x, y):
    def loss(params):
        return jnp.mean(0.5 * jnp.sum(jnp.square(state.apply_fn({"params": params}, x) - y), axis=-1))
    return state.apply_gradients(grads=jax.grad(loss)(state.params))

for epoch in range(5):
    state, solution = state.solve_head((x, y))
    for i in range(0, len(x), 100):
        state = train_step(state, x[i : i + 100], y[i : i + 100])
"""


def test_an_ordinary_loop_becomes_cronos_am_by_at_most_five_lines(digits):
    changed = [line for line in difflib.ndiff(ORDINARY.split("\n"), CRONOS_AM.split("\n")) if line[0] == "+"]
    assert len(changed) <= 5
    X, labels = digits
    model = nn.Sequential([nn.Dense(64), nn.relu, nn.Dense(32), nn.relu, nn.Dense(10)])
    x, y = X[:1000] / 16, np.asarray(cf.signed_targets(labels[:1000], 10))
    accuracy = {}
    for name, loop in {"adam": ORDINARY, "cronos": CRONOS_AM}.items():
        scope = {"model": model, "x": x, "y": y, "cf": cf, "jax": jax, "jnp": jnp, "optax": optax}
        scope["TrainState"] = TrainState
        exec(loop, scope)
        state = scope["state"]
        assert int(state.step) == 50
        guess = model.apply({"params": state.params}, X[1000:] / 16).argmax(axis=1)
        accuracy[name] = float(np.mean(np.asarray(guess) == labels[1000:]))
    assert accuracy["cronos"] > 0.93
    assert accuracy["cronos"] > accuracy["adam"]


def test_a_cross_entropy_loop_swaps_in(digits):
    X, labels = digits
    x, y = X[:600] / 16, labels[:600]
    model = nn.Sequential([nn.Dense(32), nn.relu, nn.Dense(24), nn.relu, nn.Dense(10)])
    variables = model.init(jax.random.key(0), x)
    head = cf.find_head(model, variables, x[:100])
    state = cf.CronosTrainState.create(
        apply_fn=model.apply,
        params=variables["params"],
        tx=optax.adam(1e-3),
        head=head,
        solver=cf.Cronos(loss="softmax"),
        alternation=cf.Alternation(head="frozen"),  # with its weak β the loss itself falls too
    )

    def cross_entropy(params):
        logits = state.apply_fn({"params": params}, x)
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, y))

    for _ in range(6):
        before = float(cross_entropy(state.params))
        state, solution = state.solve_head((x, y))
        assert float(cross_entropy(state.params)) < before
        assert solution.stats.objective < solution.stats.initial_objective
        state = state.apply_gradients(grads=jax.grad(cross_entropy)(state.params))
    guess = model.apply({"params": state.params}, X[600:] / 16).argmax(axis=1)
    assert np.mean(np.asarray(guess) == labels[600:]) > 0.9


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(8)(x))
        return nn.Dense(2)(nn.relu(nn.Dense(6)(nn.relu(x))))


def normed_state(tx, alternation=None):
    x = jax.random.normal(jax.random.key(0), (64, 5))
    model = Normed()
    variables = model.init(jax.random.key(1), x, train=False)
    head = cf.find_head(model, variables, x, train=False, statistics="running")
    state = cf.CronosTrainState.create(
        apply_fn=model.apply,
        params=variables["params"],
        tx=tx,
        head=head,
        model_state={"batch_stats": variables["batch_stats"]},
        alternation=alternation,
    )
    return state, (x, jnp.sign(x[:, :2]))


@pytest.mark.parametrize(
    "tx",
    [
        optax.adam(1e-2),
        optax.adamw(1e-2, weight_decay=0.1),
        optax.sgd(1e-2, momentum=0.9),
        optax.lion(1e-3),
        optax.contrib.schedule_free_adamw(1e-2),
        optax.contrib.prodigy(),
        optax.MultiSteps(optax.adamw(1e-2), 2),
    ],
    ids=["adam", "adamw", "sgd", "lion", "schedule_free", "prodigy", "MultiSteps"],
)
def test_gradients_move_the_backbone_and_solves_a_frozen_head(tx):
    state, (x, y) = normed_state(tx, cf.Alternation(head="frozen"))

    @jax.jit
    def train_step(state):
        def loss(params):
            variables = {"params": params, **state.model_state}
            out, updates = state.apply_fn(variables, x, train=True, mutable=["batch_stats"])
            return jnp.mean(jnp.square(out - y)), updates

        grads, updates = jax.grad(loss, has_aux=True)(state.params)
        return state.apply_gradients(grads=grads, model_state=updates)

    def head_of(state):
        return jax.tree.leaves(state.head.read({"params": state.params}))

    stepped = train_step(train_step(state))
    jax.tree.map(np.testing.assert_array_equal, head_of(stepped), head_of(state))
    assert not np.array_equal(stepped.params["Dense_0"]["kernel"], state.params["Dense_0"]["kernel"])
    solved, solution = stepped.solve_head((x, y))
    assert solution.stats.objective < solution.stats.initial_objective
    np.testing.assert_array_equal(solved.params["Dense_0"]["kernel"], stepped.params["Dense_0"]["kernel"])
    assert int(solved.step) == int(stepped.step) == 2
    train_step(solved)
    assert train_step._cache_size() <= 2


def test_the_penalised_loss_of_the_real_network_does_not_rise():
    state, (x, y) = normed_state(optax.adam(1e-2))
    for _ in range(3):
        before = state
        state, solution = state.solve_head((x, y))
        beta = float(solution.stats.beta)

        def loss(state, beta=beta):
            variables = {"params": state.params, **state.model_state}
            network = state.head.read(variables)
            features = np.asarray(state.head.inputs(variables, x))
            s = np.sqrt(np.mean(np.sum(features**2, axis=1)))
            out = state.apply_fn(variables, x, train=False)
            penalty = sum(float(jnp.sum(jnp.square(w))) for w in (network.kernel1, network.kernel2, network.bias1 / s))
            return float(jnp.mean(0.5 * jnp.sum(jnp.square(out - y), axis=1))) + beta / 2 * penalty

        assert loss(state) <= loss(before) * (1 + 1e-5)
        assert loss(state) == pytest.approx(float(solution.stats.objective), rel=1e-3)


def test_a_train_state_of_the_users_own_works_with_backbone_only_and_donation():
    class State(TrainState):
        average: Any
        dropout_key: jax.Array

        def apply_gradients(self, *, grads, **kwargs):
            new = super().apply_gradients(grads=grads, **kwargs)
            average = jax.tree.map(lambda old, p: 0.9 * old + 0.1 * p, self.average, new.params)
            return new.replace(average=average, dropout_key=jax.random.split(new.dropout_key)[0])

    made, (x, y) = normed_state(optax.adam(1e-2))
    head, params = made.head, jax.tree.map(jnp.copy, made.params)
    tx = optax.MultiSteps(cf.backbone_only(optax.adamw(1e-2), head), 2)
    state = State.create(
        apply_fn=made.apply_fn, params=params, tx=tx, average=jax.tree.map(jnp.copy, params),
        dropout_key=jax.random.key(0),
    )  # fmt: skip

    @partial(jax.jit, donate_argnums=0)
    def train_step(state):
        def loss(params):
            return jnp.mean(jnp.square(state.apply_fn({"params": params, **made.model_state}, x, train=False) - y))

        return state.apply_gradients(grads=jax.grad(loss)(state.params))

    for _ in range(2):
        kept = jax.tree.map(np.asarray, head.read({"params": state.params}))
        for _ in range(2):
            state = train_step(state)
        jax.tree.map(np.testing.assert_array_equal, kept, head.read({"params": state.params}))
        variables = {"params": state.params, **made.model_state}
        fitted, solution = cf.fit_head(head, variables, (x, y), solver=cf.Cronos(max_iters=3))
        assert solution.stats.objective < solution.stats.initial_objective
        state = state.replace(params=fitted["params"])
    assert not np.array_equal(state.params["Dense_0"]["kernel"], made.params["Dense_0"]["kernel"])


@pytest.mark.parametrize("tx", [optax.adamw(1e-2), optax.contrib.schedule_free_adamw(1e-2)], ids=["adamw", "free"])
def test_an_nnx_loop_moves_the_backbone_by_gradients_and_a_frozen_head_by_solves(tx):
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.encoder, self.norm = nnx.Linear(5, 8, rngs=rngs), nnx.BatchNorm(8, rngs=rngs)
            self.dropout = nnx.Dropout(0.2, rngs=rngs)
            self.fc1, self.fc2 = nnx.Linear(8, 6, rngs=rngs), nnx.Linear(6, 2, rngs=rngs)

        def __call__(self, x):
            return self.fc2(nnx.relu(self.fc1(self.dropout(nnx.relu(self.norm(self.encoder(x)))))))

    x = jax.random.normal(jax.random.key(0), (64, 5))
    y = (x[:, 0] > 0).astype(int)
    model = Net(nnx.Rngs(0))
    head = cf.nnx.find_head(model, x, statistics="running")
    optimizer = cf.nnx.CronosOptimizer(
        model, tx, head=head, solver=cf.Cronos(loss="softmax"), alternation=cf.Alternation(head="frozen")
    )

    @nnx.jit
    def train_step(model, optimizer):
        def loss(model):
            return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()

        optimizer.update(model, nnx.grad(loss)(model))

    for _ in range(2):
        kept = jax.tree.map(np.asarray, head.read(model))
        encoder = np.asarray(model.encoder.kernel)
        train_step(model, optimizer)
        jax.tree.map(np.testing.assert_array_equal, kept, head.read(model))
        assert not np.array_equal(encoder, model.encoder.kernel)
        encoder = np.asarray(model.encoder.kernel)
        solution = optimizer.solve_head(model, (x, y))
        assert solution.stats.objective < solution.stats.initial_objective
        np.testing.assert_array_equal(encoder, model.encoder.kernel)
        jax.tree.map(np.testing.assert_array_equal, solution.params, head.read(model))
    assert int(optimizer.step[...]) == 2
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    with pytest.raises(ValueError, match="targets must have 2"):
        optimizer.solve_head(model, (x, jnp.ones((64, 3))))
    jax.tree.map(np.testing.assert_array_equal, before, nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    with pytest.raises(ValueError, match="`head` must come from"):
        cf.nnx.CronosOptimizer(model, tx, head=None)
    with pytest.raises(ValueError, match="widths"):
        head.write(model, jax.tree.map(lambda v: v[..., :1], head.read(model)))


def test_the_solver_of_an_alternation_shows_the_defaults_it_takes():
    for head, ratio in {"moving": "0.02", "frozen": "0.005"}.items():
        state, _ = normed_state(optax.sgd(0.1), cf.Alternation(head=head))
        assert "max_iters=3" in str(state.solver)
        assert f"beta_ratio={ratio}" in str(state.solver)
    given = cf.Cronos(max_iters=7, beta_ratio=0.1)
    assert alternation_defaults(given, state.head, state.alternation) == given


def test_a_module_that_is_nothing_but_its_head_is_solved_as_far_as_fit_head_does():
    x = jax.random.normal(jax.random.key(0), (200, 5))
    y = (x[:, 0] * x[:, 1] > 0).astype(int)
    model, solver = nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(2)]), cf.Cronos(loss="softmax")
    variables = model.init(jax.random.key(1), x)
    head, key = cf.find_head(model, variables, x), jax.random.key(2)
    _, expected = cf.fit_head(head, variables, (x, y), solver=solver, key=key)
    state = cf.CronosTrainState.create(
        apply_fn=model.apply, params=variables["params"], tx=optax.adam(1e-2), head=head, solver=solver
    )
    state, solution = state.solve_head((x, y), key=key)
    np.testing.assert_array_equal(solution.stats.objective, expected.stats.objective)
    assert int(solution.stats.iterations) > 10
    gradients = jax.tree.map(jnp.ones_like, state.params)
    jax.tree.map(np.testing.assert_array_equal, state.apply_gradients(grads=gradients).params, state.params)

    bare = nnx.Sequential(nnx.Linear(5, 8, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(8, 2, rngs=nnx.Rngs(1)))
    optimizer = cf.nnx.CronosOptimizer(bare, optax.adam(1e-2), head=cf.nnx.find_head(bare, x), solver=solver)
    assert int(optimizer.solve_head(bare, (x, y)).stats.iterations) > 10
