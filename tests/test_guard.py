"""The alternation: a head solve never raises the loss, and the guard goes back when the backbone has run away."""

import warnings
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import drawn
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import cronos_flax as cf
from cronos_flax._alternation.backbone import rated

GUARD = cf.Guard()
PARTS = {"params": jnp.zeros(()), "opt_state": rated(optax.identity()).init(jnp.zeros(()))}
X = jax.random.normal(jax.random.key(0), (64, 5))
Y = (X[:, 0] * X[:, 1] > 0).astype(int)


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(8)(x))
        return nn.Dense(2)(nn.relu(nn.Dense(6)(nn.relu(x))))


MODEL = Normed()
VARIABLES = jax.jit(MODEL.init, static_argnames="train")(jax.random.key(1), X, train=False)
HEAD = cf.find_head(MODEL, VARIABLES, X, train=False, statistics="running")


# Tests spoil the backbone: features are then the same in all rows, and the solve says so.
pytestmark = pytest.mark.filterwarnings("ignore:solve. `X` must differ from row to row:UserWarning")

# The warning is right where features are all alike, or β is large; and such tests are of other things.
EXPLAINS_NOTHING = pytest.mark.filterwarnings("ignore:solve_head. the loss is:UserWarning")


def made(tx=None, kind=cf.CronosTrainState, head=HEAD, **kwargs):
    return kind.create(
        apply_fn=MODEL.apply,
        params=jax.tree.map(jnp.copy, VARIABLES["params"]),  # a donated step deletes them
        tx=optax.adam(1e-2) if tx is None else tx,
        head=head,
        solver=cf.Cronos(loss="softmax"),
        model_state=jax.tree.map(jnp.copy, {"batch_stats": VARIABLES["batch_stats"]}),
        **kwargs,
    )


def step(state):
    def loss(params):
        out, updates = state.apply_fn({"params": params, **state.model_state}, X, train=True, mutable=["batch_stats"])
        return optax.softmax_cross_entropy_with_integer_labels(out, Y).mean(), updates

    grads, updates = jax.grad(loss, has_aux=True)(state.params)
    return state.apply_gradients(grads=grads, model_state=updates)


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def rate(state):
    return float(optax.tree.get(state.opt_state, "backbone_rate"))


def without_rate(opt_state):
    return optax.tree.set(opt_state, backbone_rate=jnp.zeros(()))


TARGETS = {
    "squared": lambda rng: rng.normal(size=(48, 2)).astype("float32"),
    "huber": lambda rng: (rng.standard_t(1, size=(48, 2))).astype("float32"),
    "softmax": lambda rng: rng.integers(0, 2, size=48),
    "logistic": lambda rng: rng.integers(0, 2, size=(48, 2)).astype("float32"),
    "hinge": lambda rng: rng.choice([-1.0, 1.0], size=(48, 2)).astype("float32"),
}


class Net(nn.Module):
    """A backbone of one layer or two, of which the last is scaled in the tests, and a head."""

    widths: tuple[int, ...]
    activation: Callable
    hidden: int
    biases: bool

    @nn.compact
    def __call__(self, x):
        for width in self.widths[:-1]:
            x = self.activation(nn.Dense(width, use_bias=self.biases)(x))
        x = self.activation(nn.Dense(self.widths[-1], use_bias=self.biases, name="backbone")(x))
        x = nn.relu(nn.Dense(self.hidden, use_bias=self.biases, name="hidden")(x))
        return nn.Dense(2, use_bias=self.biases, name="out")(x)


NETS = Net((8,), jnp.tanh, 6, True), Net((7, 12), nn.relu, 9, False), Net((3, 2), nn.gelu, 1, True)


@pytest.mark.slow
@EXPLAINS_NOTHING
@pytest.mark.parametrize("loss", TARGETS)
def test_a_head_solve_never_raises_the_loss_of_the_real_network(loss):
    x = np.random.default_rng(0).normal(size=(48, 5)).astype("float32")
    nets = {net: drawn(net, jax.random.key(0), x)["params"] for net in NETS}
    heads = {net: cf.find_head(net, {"params": params}, x) for net, params in nets.items()}
    # Of one β, so that losses compare over solves.
    fresh = partial(cf.CronosTrainState.create, tx=optax.sgd(0.1), solver=cf.Cronos(loss=loss, beta=1e-3))

    @settings(max_examples=15, deadline=None, derandomize=True)
    @given(
        net=st.sampled_from(NETS),
        seed=st.integers(0, 2**31 - 1),
        scale=st.sampled_from([1e-3, 1.0, 30.0]),
        head_scale=st.sampled_from([0.0, 1e-2, 1.0, 10.0]),
        dead=st.integers(0, 6),
    )
    def check(net, seed, scale, head_scale, dead):
        rng = np.random.default_rng(seed)
        x = rng.normal(size=(48, 5)).astype("float32")
        y = TARGETS[loss](rng)
        head = heads[net]
        params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype("float32"), nets[net])
        params["backbone"] = jax.tree.map(lambda leaf: np.float32(scale) * leaf, params["backbone"])
        params["out"] = jax.tree.map(lambda leaf: np.float32(head_scale) * leaf, params["out"])
        params["hidden"] = jax.tree.map(
            lambda leaf: np.where(np.arange(leaf.shape[-1]) < dead, 0, leaf), params["hidden"]
        )
        state = fresh(apply_fn=net.apply, params=jax.tree.map(jax.device_put, params), head=head)

        def real(state):
            # By the module itself, not by what the solver thinks it is.
            network, features = head.read(state.variables), np.asarray(head.inputs(state.variables, x))
            outputs = np.asarray(state.apply_fn(state.variables, x), "float64")
            s2 = np.mean(np.sum(features.astype("float64") ** 2, axis=1)) or 1.0  # of features that are all zero
            squares = [network.kernel1**2, network.kernel2**2]
            squares += [] if network.bias1 is None else [network.bias1**2 / s2]
            fit = np.mean(np.asarray(cf_loss(loss, outputs, y)))
            return fit + 0.5e-3 * sum(float(np.sum(np.asarray(w, "float64"))) for w in squares)

        for _ in range(2):
            before = real(state)
            state, solution = state.solve_head((x, y))
            after = real(state)
            assert solution.status != cf.Status.rejected
            assert after <= before + 1e-5 * abs(before)
            assert after == pytest.approx(float(solution.stats.objective), rel=1e-3, abs=1e-5)

    check()


def cf_loss(loss, f, y):
    """Losses of rows, by their textbook formulas."""
    if loss == "softmax":
        return np.logaddexp.reduce(f, axis=1) - f[np.arange(len(f)), y]
    r = f - y
    each = {
        "squared": lambda: r**2 / 2,
        "huber": lambda: np.where(np.abs(r) <= 1, r**2 / 2, np.abs(r) - 0.5),
        "logistic": lambda: np.logaddexp(0, f) - y * f,
        "hinge": lambda: np.maximum(1 - y * f, 0),
    }
    return each[loss]().sum(axis=1)


def test_what_ran_away_goes_back_and_goes_on_at_a_lower_rate():
    state, _ = made().solve_head((X, Y))
    good, _ = step(state).solve_head((X, Y))
    assert good.figures["accepted"]
    harmed = good
    for _ in range(3):
        harmed = step(harmed)
    # Features that are all alike: no head can mend that.
    backbone = jax.tree.map(lambda leaf: leaf * 0, harmed.params["Dense_0"])
    harmed = harmed.replace(params={**harmed.params, "Dense_0": backbone})
    figures = []
    back, solution = harmed.solve_head((X, Y), callback=figures.append)
    assert solution.status == cf.Status.rejected
    assert "went back" in solution.status.message
    for name in ("params", "model_state"):
        same(getattr(back, name), getattr(good, name))
    same(without_rate(back.opt_state), without_rate(good.opt_state))
    assert int(back.step) == int(harmed.step) == 4
    assert rate(back) == pytest.approx(0.3 * rate(good))
    assert figures[-1] == back.figures
    assert back.figures["rejections"] == 1
    assert back.figures["solves"] == 3
    # Again from there, lower still; and up again, but not above one, as solves pass.
    with pytest.warns(UserWarning, match="2 time.*now moves at 0.09 of the optimizer's own rate") as told:
        again, _ = back.replace(params={**back.params, "Dense_0": backbone}).solve_head((X, Y))
    said = [warning for warning in told if "now moves" in str(warning.message)]
    assert {warning.filename for warning in told} == {__file__}
    assert "larger beta_ratio" in str(said[0].message)
    assert again.figures["consecutive_rejections"] == 2
    assert rate(again) == pytest.approx(0.09 * rate(good))
    rates = [rate(again)]
    for _ in range(3):
        again, solution = step(again).solve_head((X, Y))
        assert solution.status != cf.Status.rejected
        rates.append(rate(again))
    assert rates == sorted(rates)
    assert rates[-1] <= 1


@pytest.mark.parametrize("guard", [True, False])
def test_a_backbone_that_is_spoiled_before_the_first_solve_is_said_to_be(guard):
    """The guard knows no better loss to go back to."""
    state = made(guard=guard)
    state = state.replace(params={**state.params, "Dense_0": jax.tree.map(jnp.zeros_like, state.params["Dense_0"])})
    state, _ = state.solve_head((X, Y))  # features of which a first solve makes nothing may become better ones
    with pytest.warns(UserWarning, match="explains next to nothing") as told:
        _, solution = state.solve_head((X, Y))
    assert told[0].filename == __file__
    assert float(solution.stats.objective) == pytest.approx(float(solution.stats.null_loss), rel=1e-2)
    large = jax.tree.map(lambda leaf: 100 * leaf, VARIABLES["params"]["Dense_0"])
    state = made(guard=guard)
    # Held gates go only a part of the way from a start that is far off, the refreshed ones would begin at a constant.
    solver = cf.Cronos(loss="softmax", max_iters=1, beta=1e3, gates="fixed")
    state = state.replace(params={**state.params, "Dense_0": large}, solver=solver)
    with pytest.warns(UserWarning, match="explains next to nothing"):
        state.solve_head((X, Y))


@EXPLAINS_NOTHING
def test_running_statistics_that_settle_are_not_held_against_the_backbone():
    # Features far from what the first statistics, mean 0 and variance 1, would make of normal ones.
    x, state = 5 + 20 * X, made(optax.sgd(1e-6))

    @jax.jit
    def train_step(state):
        def loss(params):
            variables = {"params": params, **state.model_state}
            out, updates = state.apply_fn(variables, x, train=True, mutable=["batch_stats"])
            return optax.softmax_cross_entropy_with_integer_labels(out, Y).mean(), updates

        grads, updates = jax.grad(loss, has_aux=True)(state.params)
        return state.apply_gradients(grads=grads, model_state=updates)

    accepted = []
    for _ in range(12):
        state, _ = state.solve_head((x, Y))
        accepted.append(state.figures["accepted"])
        for _ in range(30):
            state = train_step(state)
    mean = state.model_state["batch_stats"]["BatchNorm_0"]["mean"]
    assert float(jnp.max(jnp.abs(mean))) > 1
    assert sum(accepted[-4:]) >= 3
    assert rate(state) > 0.5


def test_a_head_found_in_training_is_solved_for_on_the_features_of_training():
    head = cf.find_head(MODEL, VARIABLES, X, train=True, mutable=["batch_stats"])
    state = made(head=head)
    assert made().guard.drifts
    assert not state.guard.drifts
    solved, solution = state.solve_head((X, Y))
    stats = solved.model_state["batch_stats"]["BatchNorm_0"]
    assert not np.allclose(stats["mean"], state.model_state["batch_stats"]["BatchNorm_0"]["mean"])
    logits, _ = MODEL.apply(solved.variables, X, train=True, mutable=["batch_stats"])
    network = head.read(solved.variables)
    penalty = sum(float(jnp.sum(kernel**2)) for kernel in (network.kernel1, network.kernel2))
    loss = float(optax.softmax_cross_entropy_with_integer_labels(logits, Y).mean())
    # What is left is the hidden bias, on the scale of the features.
    assert 0 <= float(solution.stats.objective) - loss - float(solution.stats.beta) / 2 * penalty < 1e-2


def test_the_rate_multiplies_the_backbones_steps_of_any_optimizer():
    for tx in (optax.adam(1e-2), optax.contrib.prodigy(), optax.MultiSteps(optax.sgd(0.1), 1)):
        state = made(tx)
        slow = state.replace(opt_state=optax.tree.set(state.opt_state, backbone_rate=jnp.asarray(0.25)))
        moves = [jax.tree.map(jnp.subtract, step(s).params["Dense_0"], state.params["Dense_0"]) for s in (state, slow)]
        jax.tree.map(
            partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-7), moves[1], jax.tree.map(lambda v: v / 4, moves[0])
        )
        assert any(np.any(leaf != 0) for leaf in jax.tree.leaves(moves[1]))


def test_a_backbone_that_is_not_finite_goes_back_and_a_donated_step_goes_on():
    state, _ = made(optax.sgd(1e30)).solve_head((X, Y))
    kept = jax.tree.map(np.asarray, state.params)
    donated = jax.jit(step, donate_argnums=0)
    rejections = 0
    for _ in range(3):
        state = donated(donated(state))
        with warnings.catch_warnings(action="ignore"):
            state, solution = state.solve_head((X, Y))
        rejections += solution.status == cf.Status.rejected
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(state.params))
    assert rejections == state.figures["rejections"] == 3
    same(state.params, kept)
    assert donated._cache_size() <= 2


def harmed(state):
    """With features that are all alike: no head can mend that."""
    backbone = jax.tree.map(lambda leaf: leaf * 0, state.params["Dense_0"])
    return state.replace(params={**state.params, "Dense_0": backbone})


@EXPLAINS_NOTHING
def test_an_infinite_tolerance_accepts_and_a_factor_of_one_keeps_the_rate():
    state, _ = made(guard=cf.Guard(tolerance=np.inf)).solve_head((X, Y))
    state, solution = harmed(state).solve_head((X, Y))
    assert solution.status != cf.Status.rejected
    assert state.figures["rejections"] == 0
    state, _ = made(guard=cf.Guard(decrease_factor=1.0, increase_factor=1.0, drift_tries=0)).solve_head((X, Y))
    state, solution = harmed(state).solve_head((X, Y))
    assert solution.status == cf.Status.rejected
    assert rate(state) == 1
    state, _ = made(guard=cf.Guard(increase_factor=2.0, highest_rate=3.0)).solve_head((X, Y))
    assert rate(state) == 2
    state, _ = state.solve_head((X, Y))
    assert rate(state) == 3


BAD_SETTINGS = [
    ("tolerance", -0.1),
    ("tolerance", float("nan")),
    ("tolerance", "low"),
    ("decrease_factor", 0),
    ("decrease_factor", 1.1),
    ("increase_factor", 0.9),
    ("increase_factor", float("inf")),
    ("highest_rate", 0.0),
    ("drift_factor", 0.5),
    ("drift_factor", True),
    ("drift_tries", -1),
    ("drift_tries", 1.5),
]


@pytest.mark.parametrize(("name", "value"), BAD_SETTINGS)
def test_settings_of_the_guard_outside_their_range_are_refused(name, value):
    with pytest.raises(ValueError, match=f"Guard: `{name}` must be"):
        cf.Guard(**{name: value})


def test_the_guard_of_a_state_is_settings_or_a_bool():
    assert made().guard.settings == made(guard=cf.Guard()).guard.settings == cf.Guard()
    assert made(guard=None).guard is made(guard=False).guard is None
    assert isinstance(made().guard, cf.GuardState)
    for bad in ("yes", 0.5, made().guard):
        with pytest.raises(ValueError, match=r"`guard` must be a cf\.Guard"):
            made(guard=bad)


@pytest.mark.parametrize("value", [0.0, 1.0, 3.3e4])
def test_constant_targets_leave_nothing_to_reject(value):
    """Before: a division by zero."""
    y = np.full((64, 2), value, "float32")  # the loss of the best constant is zero, or rounding
    state = made().replace(solver=cf.Cronos(max_iters=2))
    for _ in range(3):
        state, _ = step(state).solve_head((X, y))
    assert state.figures["solves"] == 3
    assert state.figures["rejections"] == 0


def test_a_rate_below_a_hundredth_is_told_once():
    guard, parts = cf.GuardState.init(cf.Guard(decrease_factor=0.05), PARTS, drifts=False), PARTS
    for objective, told in ((0.5, False), (0.6, False), (0.5, False), (0.6, True), (0.5, False), (0.6, False)):
        stats = SimpleNamespace(objective=objective, null_loss=1.0)
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            guard, parts = guard.judge(parts, stats, 0.0)
        assert [str(w.message)[:10] for w in heard] == ["solve_head"] * told


def test_the_rate_does_not_fall_to_where_nothing_brings_it_back():
    """It fell to zero in float32, and stayed there, with a warning at every second rejection."""
    guard, parts, heard = cf.GuardState.init(GUARD, PARTS, drifts=False), PARTS, []

    def judge(objective):
        nonlocal guard, parts
        with warnings.catch_warnings(record=True) as now:
            warnings.simplefilter("always")
            guard, parts = guard.judge(parts, SimpleNamespace(objective=objective, null_loss=1.0), 0.0)
        heard.extend(str(warning.message) for warning in now)
        return guard.figures["backbone_rate"]

    judge(0.5)
    rates = [judge(0.6) for _ in range(200)]
    expected = [max(0.3**k, float(jnp.finfo(jnp.float32).eps)) for k in range(1, 201)]
    np.testing.assert_allclose(rates, expected, rtol=1e-5)
    assert [("where it stands still" in said) for said in heard] == [
        False,
        False,
        True,
    ]  # two in a row, a hundredth, and the last
    assert "solves on other rows each time" in heard[-1]
    assert judge(0.5) == pytest.approx(1.2 * rates[-1])
    assert judge(0.6) == rates[-1]
    assert len(heard) == 3
    for _ in range(100):
        highest = judge(0.5)
    assert highest == 1.0


def test_what_drift_has_rejected_raises_the_rate_to_that_of_the_optimizer_at_most():
    guard, decisions = judged([0.5, 0.5, *[5.0] * 100, 1.0], drifts=True)
    assert decisions == [True] * 2 + [False] * 100 + [True]
    assert guard.figures["backbone_rate"] == 1.0


@pytest.mark.parametrize("rows", [1_000, 50_000])
def test_a_solve_again_without_a_step_is_never_rejected(rows):
    """Before: five of eight such solves were rejected."""
    # Features with an offset: another key once meant another default β.
    rng = np.random.default_rng(rows)
    x = rng.normal(5, 1, (rows, 5)).astype("float32")
    y = (x[:, 0] > x[:, 1] + rng.normal(size=rows)).astype(int)
    state = made(tx=optax.sgd(0.1), guard=cf.Guard(tolerance=0.0, drift_factor=1.0))
    for seed in (0, 1, 2):
        for number in range(4):
            state, solution = state.solve_head((x, y), key=jax.random.key(seed + 10 * number))
            assert solution.status != cf.Status.rejected
            assert float(solution.stats.beta) == pytest.approx(float(state.beta))


@EXPLAINS_NOTHING
def test_the_first_solve_chooses_the_weight_decay_of_all():
    """Before: objectives of different β were compared."""
    state = made()
    assert np.isinf(state.beta)
    first, solution = state.solve_head((X, Y))
    assert first.beta == solution.stats.beta > 0
    first, _ = first.solve_head((X, Y))
    moved = harmed(step(first))  # other features, which would have another default
    later, solution = moved.solve_head((X, Y), key=jax.random.key(5))
    assert later.beta == first.beta == pytest.approx(float(solution.stats.beta))
    assert solution.status == cf.Status.rejected
    anew, solution = moved.replace(beta=jnp.asarray(jnp.inf)).solve_head((X, Y))
    assert anew.beta == solution.stats.beta != first.beta
    assert solution.status != cf.Status.rejected  # there is nothing to compare it with
    own = made(guard=False).replace(solver=cf.Cronos(loss="softmax"), beta=jnp.asarray(0.25))
    assert float(own.solve_head((X, Y))[1].stats.beta) == pytest.approx(0.25)


def test_a_weight_decay_that_is_put_into_the_state_is_not_compared_with_the_one_before():
    state, _ = made().solve_head((X, Y))
    state, before = state.solve_head((X, Y))  # running statistics are allowed for in the first two
    larger = state.replace(beta=4 * state.beta)
    solved, solution = larger.solve_head((X, Y))
    assert solution.status != cf.Status.rejected
    assert float(solution.stats.objective) > float(before.stats.objective)
    np.testing.assert_allclose(solution.stats.beta, 4 * before.stats.beta, rtol=1e-6)
    # From there on it is: the next solve is compared with this one.
    assert solved.figures["best_objective"] == pytest.approx(float(solution.stats.objective))
    assert harmed(solved).solve_head((X, Y))[1].status == cf.Status.rejected


@EXPLAINS_NOTHING
def test_parameters_of_the_users_stay_if_the_guard_forgets_the_loss_before():
    state, _ = made().solve_head((X, Y))
    state, _ = state.solve_head((X, Y))  # running statistics are allowed for in the first two
    bad = harmed(state)
    assert bad.solve_head((X, Y))[1].status == cf.Status.rejected
    kept, solution = bad.replace(guard=bad.guard.forgetful()).solve_head((X, Y))
    assert solution.status != cf.Status.rejected
    np.testing.assert_array_equal(kept.params["Dense_0"]["kernel"], bad.params["Dense_0"]["kernel"])


SCHEDULE = optax.cosine_decay_schedule(1e-2, 100)
COUNTED = {
    "adam": (optax.adam(SCHEDULE), lambda s: s[1].count, lambda s: s[0].count),
    "inject": (
        optax.inject_hyperparams(optax.adamw)(learning_rate=SCHEDULE),
        lambda s: s.count,
        lambda s: s.inner_state[0].count,
    ),
    "partition": (
        optax.partition({"all": optax.adam(SCHEDULE)}, lambda tree: jax.tree.map(lambda _: "all", tree)),
        lambda s: s.inner_states["all"].inner_state[1].count,
        lambda s: s.inner_states["all"].inner_state[0].count,
    ),
    "MultiSteps": (
        optax.MultiSteps(optax.adam(SCHEDULE), 1),
        lambda s: s.gradient_step,
        lambda s: s.inner_opt_state[0].count,
    ),
    "schedule_free": (
        optax.contrib.schedule_free_adamw(1e-2, warmup_steps=5),
        lambda s: s.step_count,
        lambda s: s.base_optimizer_state[0].count,
    ),
}


@pytest.mark.parametrize("name", COUNTED)
def test_a_schedule_goes_on_through_a_rejection_and_moments_go_back(name):
    """Before: a roll-back put the schedule back."""
    tx, scheduled, of_moments = COUNTED[name]
    state, _ = made(tx).solve_head((X, Y))
    good, _ = step(state).solve_head((X, Y))
    state = good
    for _ in range(4):
        state = step(state)
    back, solution = harmed(state).solve_head((X, Y))
    assert solution.status == cf.Status.rejected
    assert int(scheduled(back.optimizer_state)) == int(scheduled(good.optimizer_state)) + 4
    assert int(of_moments(back.optimizer_state)) == int(of_moments(good.optimizer_state)) == 1
    jax.tree.map(
        lambda kept, now: kept.ndim == 0 or np.testing.assert_array_equal(kept, now),
        good.opt_state.optimizer_state,
        back.opt_state.optimizer_state,
    )
    assert int(scheduled(step(back).optimizer_state)) == int(scheduled(good.optimizer_state)) + 5


def test_injected_hyperparameters_are_there_to_read_and_to_set():
    """Before: the wrapper hid them."""
    state = made(optax.inject_hyperparams(optax.sgd)(learning_rate=0.1, momentum=0.9))
    first, _ = state.solve_head((X, Y))[0].solve_head((X, Y))
    assert float(first.optimizer_state.hyperparams["learning_rate"]) == pytest.approx(0.1)
    first.optimizer_state.hyperparams["learning_rate"] = jnp.asarray(0.0)
    same(step(first).params, first.params)
    back, solution = harmed(first).solve_head((X, Y))
    assert solution.status == cf.Status.rejected
    assert float(back.optimizer_state.hyperparams["learning_rate"]) == 0.0


def test_schedule_free_evaluates_the_average_of_the_backbone_and_a_frozen_head_as_it_is():
    """Before: the wrapper broke it."""
    tx = optax.contrib.schedule_free_adamw(1e-2)
    state, _ = made(tx, alternation=cf.Alternation(head="frozen")).solve_head((X, Y))
    for _ in range(3):
        state = step(state)
    averaged = optax.contrib.schedule_free_eval_params(state.optimizer_state, state.params)
    assert jax.tree.structure(averaged) == jax.tree.structure(state.params)
    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=1e-6), HEAD.read({"params": averaged}), HEAD.read(state.variables)
    )
    # The backbone's, as the optimizer alone has it.
    inner = state.opt_state.optimizer_state
    x = jax.tree.map(lambda y, z: (y - 0.1 * z) / 0.9, state.params["BatchNorm_0"], inner.z["BatchNorm_0"])
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5), averaged["BatchNorm_0"], x)
    assert jax.tree.structure(state.optimizer_state) == jax.tree.structure(tx.init(state.params))


@pytest.mark.parametrize("layer", ["Dense_0", HEAD.paths[1][-1]])
def test_without_anything_to_go_back_to_it_raises(layer):
    nan = jax.tree.map(lambda leaf: leaf * jnp.nan, VARIABLES["params"][layer])
    for guard in (True, False):
        state = made(guard=guard)
        broken = state.replace(params={**state.params, layer: nan})
        with pytest.raises(FloatingPointError, match="solve_head"):
            broken.solve_head((X, Y))
    same(broken.solve_head((X, Y), throw=False)[0].params, broken.params)
    assert made(guard=False).figures == {}
    good, _ = made(guard=True).solve_head((X, Y))
    back, solution = good.replace(params={**good.params, layer: nan}).solve_head((X, Y))
    assert solution.status.name == "rejected"
    same(back.params, good.params)


def test_fields_of_a_subclass_go_back_if_they_are_named():
    class State(cf.CronosTrainState):
        average: Any = None
        seen: Any = None
        guarded = (*cf.CronosTrainState.guarded, "average")

    state = made(kind=State, average=VARIABLES["params"], seen=jnp.zeros(()))
    good, _ = state.solve_head((X, Y))
    nan = jax.tree.map(lambda leaf: leaf * jnp.nan, good.params)
    bad = good.replace(params={**good.params, "Dense_0": nan["Dense_0"]}, average=nan, seen=jnp.ones(()))
    back, _ = bad.solve_head((X, Y))
    same(back.average, VARIABLES["params"])
    assert float(back.seen) == 1


@pytest.mark.parametrize(
    "tx",
    [
        optax.adamw(1e-2, weight_decay=0.3),
        optax.contrib.schedule_free_adamw(1e-2),
        optax.contrib.muon(1e-2),
        optax.lookahead(optax.adamw(1e-2), 2, 0.5),
        optax.MultiSteps(optax.adamw(1e-2), 2),
        optax.contrib.dadapt_adamw(),
    ],
    ids=["adamw", "schedule_free", "muon", "lookahead", "MultiSteps", "dadapt"],
)
def test_gradients_never_move_a_frozen_head(tx):
    model = nn.Sequential([nn.Dense(8), nn.tanh, nn.Dense(6), nn.relu, nn.Dense(2)])
    params = model.init(jax.random.key(0), X)["params"]
    head = cf.find_head(model, {"params": params}, X)
    ahead = "lookahead" in tx.update.__qualname__
    state = cf.CronosTrainState.create(
        apply_fn=model.apply,
        params=optax.LookaheadParams.init_synced(params) if ahead else params,
        tx=tx,
        head=head,
        solver=cf.Cronos(loss="softmax"),
        alternation=cf.Alternation(head="frozen"),
    )

    @jax.jit
    def train_step(state):
        def loss(params):
            return optax.softmax_cross_entropy_with_integer_labels(state.apply_fn({"params": params}, X), Y).mean()

        return state.apply_gradients(grads=jax.grad(loss)(state.variables["params"]))

    def heads(state):
        return [head.read({"params": p}) for p in (state.params if ahead else [state.params])]

    for _ in range(2):
        state, solution = state.solve_head((X, Y))
        assert solution.stats.objective < solution.stats.initial_objective
        for written in heads(state):
            same(written, solution.params)
        moved = state
        for _ in range(4):
            moved = train_step(moved)
            same(heads(moved), heads(state))
        assert not np.array_equal(
            moved.variables["params"]["layers_0"]["kernel"], state.variables["params"]["layers_0"]["kernel"]
        )
        state = moved


def test_an_nnx_model_goes_back_whole_but_for_its_random_streams():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.encoder, self.norm = nnx.Linear(5, 8, rngs=rngs), nnx.BatchNorm(8, rngs=rngs)
            self.dropout = nnx.Dropout(0.2, rngs=rngs)
            self.fc1, self.fc2 = nnx.Linear(8, 6, rngs=rngs), nnx.Linear(6, 2, rngs=rngs)

        def __call__(self, x):
            return self.fc2(nnx.relu(self.fc1(self.dropout(nnx.relu(self.norm(self.encoder(x)))))))

    model = Net(nnx.Rngs(0))
    head = cf.nnx.find_head(model, X, statistics="running")
    tx = optax.sgd(optax.constant_schedule(1e30), momentum=0.9)
    optimizer = cf.nnx.CronosOptimizer(model, tx, head=head, solver=cf.Cronos(loss="softmax"))
    assert np.isinf(optimizer.beta[...])

    @nnx.jit
    def train_step(model, optimizer):
        def loss(model):
            return optax.softmax_cross_entropy_with_integer_labels(model(X), Y).mean()

        optimizer.update(model, nnx.grad(loss)(model))

    optimizer.solve_head(model, (X, Y))
    assert optimizer.figures["accepted"]

    def pure(*filters):
        return jax.tree.map(np.asarray, nnx.as_pure(nnx.state(model, *filters)))

    before, streams = pure(nnx.Not(nnx.RngState)), int(model.dropout.rngs.count[...])
    train_step(model, optimizer)
    train_step(model, optimizer)
    assert not all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    solution = optimizer.solve_head(model, (X, Y))
    assert solution.status == cf.Status.rejected
    same(pure(nnx.Not(nnx.RngState)), before)
    assert int(model.dropout.rngs.count[...]) > streams
    assert int(optimizer.step[...]) == 2
    assert optimizer.figures["backbone_rate"] == pytest.approx(0.3)
    assert np.isfinite(optimizer.beta[...])
    assert int(optimizer.optimizer_state[1].count[...]) == 2  # the schedule's
    train_step(model, optimizer)
    unguarded = cf.nnx.CronosOptimizer(model, optax.sgd(1.0), head=head, guard=False)
    assert unguarded.figures == {}


def test_an_nnx_head_found_in_training_sets_the_running_statistics():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.inner, self.norm = nnx.Linear(5, 8, rngs=rngs), nnx.BatchNorm(8, rngs=rngs)
            self.hidden, self.out = nnx.Linear(8, 6, rngs=rngs), nnx.Linear(6, 2, rngs=rngs)

        def __call__(self, x):
            return self.out(nnx.relu(self.hidden(nnx.relu(self.norm(self.inner(x))))))

    model = Model(nnx.Rngs(0))
    for eval_mode, statistics in ((True, "running"), (False, None)):
        model.train()
        head = cf.nnx.find_head(model, X, eval_mode=eval_mode, statistics=statistics)
        optimizer = cf.nnx.CronosOptimizer(model, optax.adam(1e-3), head=head, solver=cf.Cronos(loss="softmax"))
        assert optimizer.guard.get_value().drifts == eval_mode
        mean = np.array(model.norm.mean[...])
        solution = optimizer.solve_head(model, (X, Y))
        assert solution.stats.objective < solution.stats.initial_objective
        assert np.array_equal(mean, model.norm.mean[...]) == eval_mode


def judged(objectives, settings=GUARD, drifts=False, null_loss=1.0, rounding=0.0):
    """What a guard decides on solves that end with these objectives; ``null_loss`` is that of the best constant."""
    guard, parts, decisions = cf.GuardState.init(settings, PARTS, drifts), PARTS, []
    for number, objective in enumerate(objectives):
        solved = {**parts, "params": jnp.asarray(float(number))}
        with warnings.catch_warnings(action="ignore"):
            guard, parts = guard.judge(solved, SimpleNamespace(objective=objective, null_loss=null_loss), rounding)
        decisions.append(bool(guard.accepted))
        assert float(parts["params"]) == max(i for i, accepted in enumerate(decisions) if accepted)
    return guard, decisions


def test_targets_in_half_precision_do_not_switch_the_guard_off():
    """Their squares were infinite, and so the rounding that explains a rise of the loss."""
    state = made().replace(solver=cf.Cronos(max_iters=2))
    state = state.replace(params={**state.params, "Dense_0": jax.tree.map(jnp.zeros_like, state.params["Dense_0"])})
    y = np.where(Y[:, None] == np.arange(2), 1e3, -1e3).astype("float16")
    state, _ = state.solve_head((X, y))
    with pytest.warns(UserWarning, match="explains next to nothing"):
        state.solve_head((X, y))


def test_small_rises_do_not_add_up():
    guard, decisions = judged([0.5, 0.505, 0.513])  # each within a hundredth of the one before
    assert decisions == [True, True, False]
    assert float(guard.best) == 0.5


def test_a_rise_that_rounding_explains_is_none():
    """Where the best constant fits exactly, every tolerance is zero."""
    objectives, exact = [1e-7, 1.5e-7, 3e-7], {"null_loss": 0.0}
    assert judged(objectives, **exact, rounding=1e-7)[1] == [True, True, False]
    assert judged(objectives, **exact)[1] == [True, False, False]


def test_running_statistics_widen_the_tolerance_at_the_start_and_after_rejections():
    objectives = [0.5, 0.9, 1.0, 1.0, 1.0, 1.005]
    guard, decisions = judged(objectives, drifts=True)
    assert decisions == [True, True, False, False, True, True]
    assert float(guard.best) == 1.0
    # The two rejections were not the backbone's doing: its rate is what it was.
    assert guard.figures["backbone_rate"] == pytest.approx(1.0)
    assert judged(objectives)[1] == [True, False, False, False, False, False]


def test_a_loss_that_is_not_finite_is_never_accepted():
    for objective in (np.nan, np.inf):
        assert judged([0.5, objective], cf.Guard(tolerance=np.inf))[1] == [True, False]
