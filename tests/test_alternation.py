"""What the parts of an alternation do: a head that moves or stands still, when it is solved for, how a run ends."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import cronos_flax as cf

MODEL = nn.Sequential([nn.Dense(8), nn.tanh, nn.Dense(6), nn.relu, nn.Dense(2)])
X = jax.random.normal(jax.random.key(0), (256, 5))
Y = (X[:, 0] * X[:, 1] > 0).astype(int)
PARAMS = MODEL.init(jax.random.key(1), X)["params"]
HEAD = cf.find_head(MODEL, {"params": PARAMS}, X[:64])
KERNELS = ("layers_2", "layers_4")

OPTIMIZERS = {
    "sgd": optax.sgd(0.1, momentum=0.9),
    "adamw": optax.adamw(1e-2, weight_decay=0.1),
    "schedule_free": optax.contrib.schedule_free_adamw(1e-2),
    "prodigy": optax.contrib.prodigy(),
    "MultiSteps": optax.MultiSteps(optax.adam(1e-2), 2),
    "partition": optax.partition({"all": optax.adam(1e-2)}, lambda tree: jax.tree.map(lambda _: "all", tree)),
}


def made(tx=None, **kwargs):
    return cf.CronosTrainState.create(
        apply_fn=MODEL.apply,
        params=PARAMS,
        tx=optax.adam(1e-2) if tx is None else tx,
        head=HEAD,
        solver=cf.Cronos(loss="softmax"),
        **kwargs,
    )


def loss(params, beta=0.0):
    fit = optax.softmax_cross_entropy_with_integer_labels(MODEL.apply({"params": params}, X), Y).mean()
    return fit + beta / 2 * sum(jnp.sum(params[name]["kernel"] ** 2) for name in KERNELS)


@jax.jit
def step(state):
    return state.apply_gradients(grads=jax.grad(loss)(state.params))


def close(a, b, **tolerance):
    jax.tree.map(lambda u, v: np.testing.assert_allclose(u, v, **{"rtol": 2e-4, "atol": 2e-6, **tolerance}), a, b)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_moving_head_takes_steps_on_the_objective_that_solves_lower(name):
    tx = OPTIMIZERS[name]
    state, solution = made(tx, guard=False).solve_head((X, Y))
    params, beta = state.params, float(solution.stats.beta)
    assert beta > 0
    opt_state = tx.init(params)

    @jax.jit
    def by_hand(params, opt_state):
        updates, opt_state = tx.update(jax.grad(loss)(params, beta), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    for _ in range(4):
        state = step(state)
        params, opt_state = by_hand(params, opt_state)
    close(state.params, params)
    assert not np.array_equal(params["layers_4"]["kernel"], solution.params.kernel2)
    assert jax.tree.structure(state.optimizer_state) == jax.tree.structure(opt_state)


@pytest.mark.parametrize("name", ["adamw", "schedule_free", "partition"])
def test_a_solve_begins_the_optimizer_anew_for_the_head_only(name):
    tx = OPTIMIZERS[name]
    before = made(tx)
    for _ in range(3):
        before = step(before)
    after, solution = before.solve_head((X, Y))
    assert solution.status != cf.Status.rejected
    at_start = tx.init(after.params)
    counted = {"head": 0, "backbone": 0}

    def check(path, now, old, new):
        names = {str(getattr(key, "key", "")) for key in path}
        is_head = bool(names & set(KERNELS))
        np.testing.assert_array_equal(now, new if is_head else old)
        counted["head" if is_head else "backbone"] += now.ndim > 0

    jax.tree_util.tree_map_with_path(check, after.optimizer_state, before.optimizer_state, at_start)
    assert counted["head"] >= 8 > 0 < counted["backbone"]
    donated = jax.jit(lambda state: step(state), donate_argnums=0)
    assert np.isfinite(loss(donated(after).params))  # no buffer is there twice


def test_before_the_first_solve_the_head_has_no_weight_decay():
    state, tx = made(optax.sgd(0.1)), optax.sgd(0.1)
    updates, _ = tx.update(jax.grad(loss)(PARAMS), tx.init(PARAMS), PARAMS)
    close(step(state).params, optax.apply_updates(PARAMS, updates))


def test_the_objective_falls_in_steps_and_in_solves():
    state, solution = made(optax.sgd(0.02), alternation=cf.Alternation(decay=None)).solve_head((X, Y))
    for _ in range(4):
        before = float(solution.stats.objective)
        for _ in range(5):
            state = step(state)
        state, solution = state.solve_head((X, Y))
        assert float(solution.stats.initial_objective) < before
        assert float(solution.stats.objective) <= float(solution.stats.initial_objective)
    assert state.figures["rejections"] == 0


def test_nnx_moves_as_linen_does():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.a, self.b, self.c = (nnx.Linear(*s, rngs=rngs) for s in ((5, 8), (8, 6), (6, 2)))

        def __call__(self, x):
            return self.c(nnx.relu(self.b(nnx.tanh(self.a(x)))))

    model = Net(nnx.Rngs(0))
    for layer, name in ((model.a, "layers_0"), (model.b, "layers_2"), (model.c, "layers_4")):
        layer.kernel[...], layer.bias[...] = PARAMS[name]["kernel"], PARAMS[name]["bias"]
    tx = optax.adam(1e-2)
    optimizer = cf.nnx.CronosOptimizer(model, tx, head=cf.nnx.find_head(model, X), solver=cf.Cronos(loss="softmax"))

    @nnx.jit
    def train_step(model, optimizer):
        def cross_entropy(model):
            return optax.softmax_cross_entropy_with_integer_labels(model(X), Y).mean()

        optimizer.update(model, nnx.grad(cross_entropy)(model))

    state, key = made(tx), jax.random.key(3)
    for _ in range(2):
        state, solution = state.solve_head((X, Y), key=key)
        other = optimizer.solve_head(model, (X, Y), key=key)
        close(other.stats.objective, solution.stats.objective)
        for _ in range(3):
            state = step(state)
            train_step(model, optimizer)
    for layer, name in ((model.a, "layers_0"), (model.b, "layers_2"), (model.c, "layers_4")):
        close(layer.kernel[...], state.params[name]["kernel"], rtol=1e-2, atol=1e-3)
    assert not np.array_equal(model.c.kernel[...], other.params.kernel2)


ENDS = {
    "cosine": (optax.adam(1e-2), "cosine", (1 + math.cos(math.pi * 11 / 12)) / 2),
    "linear": (optax.sgd(0.1), "linear", 1 / 12),
    "none": (optax.adam(1e-2), None, 1.0),
    "a schedule of its own": (optax.adam(optax.cosine_decay_schedule(1e-2, 9)), "cosine", 1.0),
    "an injected schedule": (optax.inject_hyperparams(optax.adam)(optax.linear_schedule(1e-2, 0, 9)), "cosine", 1.0),
    "schedule-free": (optax.contrib.schedule_free_adamw(1e-2), "cosine", 1.0),
}


@pytest.mark.parametrize("name", ENDS)
def test_the_rate_falls_to_the_end_of_a_run_unless_the_optimizer_sees_to_it(name):
    tx, decay, last = ENDS[name]
    state = made(tx, alternation=cf.Alternation(decay=decay))
    state, _ = cf.train(state, (X, Y), epochs=3, batch_size=64)
    assert float(state.opt_state.run_decay) == pytest.approx(last, rel=1e-4)


def test_the_rate_falls_with_the_seconds_of_a_run_that_they_end():
    seen = []
    state, history = cf.train(made(), (X, Y), epochs=10**6, batch_size=64, seconds=0.5, callbacks=[seen.append])
    assert history[-1]["seconds"] < 2
    assert float(state.opt_state.run_decay) < 0.5


def test_updates_are_those_of_the_optimizer_times_the_decay():
    state = made(optax.sgd(0.1))
    quarter = state.replace(opt_state=state.opt_state._replace(run_decay=jnp.asarray(0.25)))
    full, less = (jax.tree.map(jnp.subtract, step(each).params, PARAMS) for each in (state, quarter))
    close(jax.tree.map(lambda leaf: leaf / 4, full), less, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("head", "still"),
        ("first_epoch", -1),
        ("dense_epochs", 0),
        ("then_every", 0),
        ("then_every", 1.5),
        ("decay", "step"),
    ],
)
def test_parts_outside_their_range_are_refused(name, value):
    with pytest.raises(ValueError, match=f"Alternation: `{name}` must be"):
        cf.Alternation(**{name: value})


def test_what_is_no_alternation_is_refused():
    with pytest.raises(ValueError, match="CronosTrainState: `alternation` must be"):
        made(alternation="frozen")
