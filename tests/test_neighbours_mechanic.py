"""Optimizers without a rate move the backbone: what they need from the package, and the example, small."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState
from given import HEAD, MODEL, PARAMS, X, Y
from pages import page

import cronos_flax as cf

X, Y = X[:256], Y[:256]
KERNELS = ("layers_2", "layers_4")


mechanic = page("neighbours", "mechanic")


def made(tx, **kwargs):
    solver = cf.Cronos(loss="softmax")
    return cf.CronosTrainState.create(apply_fn=MODEL.apply, params=PARAMS, tx=tx, head=HEAD, solver=solver, **kwargs)


def loss(params, beta=0.0):
    fit = optax.softmax_cross_entropy_with_integer_labels(MODEL.apply({"params": params}, X), Y).mean()
    return fit + beta / 2 * sum(jnp.sum(params[name]["kernel"] ** 2) for name in KERNELS)


@jax.jit
def step(state):
    value, grads = jax.value_and_grad(loss)(state.params)
    return state.apply_gradients(grads=grads, value=value)


@pytest.mark.parametrize("name", ["mechanic", "cocob", "dog", "momo"])
def test_a_solved_head_stays_where_no_gradient_moves_it(name):
    state = made(mechanic.BACKBONES[name](), guard=False, alternation=cf.Alternation(largest_step=None))
    for _ in range(10):
        state = step(state)
    state, solution = state.solve_head((X, Y))
    beta = float(solution.stats.beta)
    # Of the loss and its weight decay together: zero.
    grads = {
        name: {
            part: -beta * value if name in KERNELS and part == "kernel" else 0 * value for part, value in own.items()
        }
        for name, own in state.params.items()
    }
    params = jax.jit(lambda state: state.apply_gradients(grads=grads, value=1.0))(state).params
    for layer, kernel in zip(KERNELS, (solution.params.kernel1, solution.params.kernel2), strict=True):
        np.testing.assert_allclose(params[layer]["kernel"], kernel, atol=1e-5 * float(jnp.max(jnp.abs(kernel))))


def test_momo_sees_the_value_of_the_objective_that_solves_lower():
    tx = optax.contrib.momo(0.5)
    state, solution = made(tx, guard=False, alternation=cf.Alternation(largest_step=None)).solve_head((X, Y))
    params, beta = state.params, float(solution.stats.beta)
    opt_state = tx.init(params)

    @jax.jit
    def by_hand(params, opt_state):
        value, grads = jax.value_and_grad(loss)(params, beta)
        updates, opt_state = tx.update(grads, opt_state, params, value=value)
        return optax.apply_updates(params, updates), opt_state

    for _ in range(4):
        state = step(state)
        params, opt_state = by_hand(params, opt_state)
    jax.tree.map(lambda u, v: np.testing.assert_allclose(u, v, rtol=2e-4, atol=2e-6), state.params, params)


def of_kind(kind, tx):
    """An alternation with this head, or an ordinary train state."""
    if kind == "plain":
        return TrainState.create(apply_fn=MODEL.apply, params=PARAMS, tx=tx)
    return made(tx, alternation=cf.Alternation(head=kind))


@pytest.mark.parametrize("kind", ["moving", "frozen", "plain"])
def test_an_optimizer_that_takes_less_than_its_type_says_is_not_given_the_loss(kind):
    """SAM's type says that its update takes more arguments than gradients; it does not."""
    tx = optax.contrib.sam(optax.sgd(0.1), optax.chain(optax.contrib.normalize(), optax.sgd(0.01)))
    state = of_kind(kind, tx)
    after, history = cf.train(state, (X, Y), epochs=4, batch_size=64, loss="softmax")
    losses = [row["loss"] for row in history if "loss" in row]
    assert losses[-1] < losses[0]
    value = step(state) if kind != "plain" else state  # in a loop of one's own, with the value of the loss
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((after.params, value.params)))


@pytest.mark.parametrize("kind", ["moving", "frozen", "plain"])
def test_train_gives_the_loss_to_an_optimizer_that_takes_it(kind):
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.contrib.momo(0.1))
    state = of_kind(kind, tx)
    after, history = cf.train(state, (X, Y), epochs=2, batch_size=64, loss="softmax")
    losses = [row["loss"] for row in history if "loss" in row]
    assert losses[-1] < losses[0]
    assert after.tx is state.tx  # no traced value stays in it


def test_the_page_moves_a_backbone_without_a_rate_and_shows_both_factors():
    rows = mechanic.digits()
    rows = rows._replace(x=rows.x[:640], y=rows.y[:640])
    state, told = mechanic.create(mechanic.BACKBONES["mechanic"](), rows), []
    assert mechanic.scale(state) == pytest.approx(6 * mechanic.SCALE)  # of six factors of forgetting
    state = mechanic.alternate(state, rows, 4, told.append)
    assert [row["epoch"] for row in told] == [1, 4]
    assert told[-1]["scale"] > 60 * mechanic.SCALE
    assert told[-1]["rate"] == 1
    assert told[-1]["accepted"]
    assert told[-1]["loss"] < told[0]["loss"]
    assert mechanic.accuracy(state, rows) > 85
    assert mechanic.scale(mechanic.create(optax.adam(1e-3), rows)) is None


def test_after_a_rejected_solve_mechanic_has_its_former_scale_and_the_guard_a_lower_rate():
    state, _ = made(optax.contrib.mechanize(optax.adam(1.0))).solve_head((X, Y))
    kept = mechanic.scale(state)
    for _ in range(5):
        state = step(state)
    assert mechanic.scale(state) != kept
    state = state.replace(params={**state.params, "layers_0": jax.tree.map(lambda p: 0 * p, state.params["layers_0"])})
    with pytest.warns(UserWarning, match="`X` must differ from row to row"):
        state, solution = state.solve_head((X, Y))
    assert solution.status == cf.Status.rejected
    assert mechanic.scale(state) == kept
    assert state.figures["backbone_rate"] == pytest.approx(0.3)
