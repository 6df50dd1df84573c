"""What the parts of an alternation do: a head that moves or stands still, when it is solved for, how a run ends."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.traverse_util import path_aware_map
from given import HEAD, MODEL, PARAMS, X, Y

import cronos_flax as cf
from cronos_flax._alternation import backbone, optimizer_state

X, Y = X[:256], Y[:256]
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
    state, solution = made(tx, guard=False, alternation=cf.Alternation(largest_step=None)).solve_head((X, Y))
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
def test_after_a_solve_the_optimizer_has_no_direction_for_the_head(name):
    tx = OPTIMIZERS[name]
    before = made(tx)
    for _ in range(3):
        before = step(before)
    after, solution = before.solve_head((X, Y))
    assert solution.status != cf.Status.rejected
    at_start = tx.init(after.params)
    seen = set()

    def check(path, now, old, new):
        is_head = any(getattr(key, "key", "") in KERNELS for key in path)
        field = next((key.name for key in reversed(path) if hasattr(key, "name")), None)
        np.testing.assert_array_equal(now, new if is_head and field in ("mu", "z") else old)
        seen.add((is_head, field))

    jax.tree_util.tree_map_with_path(check, after.optimizer_state, before.optimizer_state, at_start)
    assert {(True, "nu"), (False, "nu"), (True, "z" if name == "schedule_free" else "mu")} <= seen
    donated = jax.jit(lambda state: step(state), donate_argnums=0)
    assert np.isfinite(loss(donated(after).params))  # no buffer is there twice


@pytest.mark.parametrize("name", ["adamw", "schedule_free"])
def test_after_a_solve_a_flattened_optimizer_has_no_direction_for_the_head_either(name):
    """Its moments are one array of all parameters: they went on for the head, without a word."""
    tx = OPTIMIZERS[name]
    states = [made(tx), made(optax.flatten(tx))]
    for i, state in enumerate(states):
        for _ in range(3):
            state = step(state)
        states[i], solution = state.solve_head((X, Y))
        assert solution.status != cf.Status.rejected
    for field in ("nu", "z" if name == "schedule_free" else "mu"):
        one, other = (optax.tree.get(state.optimizer_state, field) for state in states)
        # A solve enlarges the rounding of the steps before.
        close(jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(one)]), other, rtol=1e-2, atol=1e-4)


def test_a_late_solve_does_not_speed_up_the_head():
    state, rate = made(optax.adam(1e-3), guard=False), 1e-3
    for _ in range(500):
        state = step(state)
    state, _ = state.solve_head((X, Y))
    for _ in range(30):
        before, state = state, step(state)
        for name in KERNELS:
            moved = jnp.max(jnp.abs(state.params[name]["kernel"] - before.params[name]["kernel"]))
            assert float(moved) < 1.5 * rate


def test_lookahead_goes_through_the_loop():
    tx = optax.lookahead(optax.sgd(0.1), 2, 0.5)
    state = cf.CronosTrainState.create(
        apply_fn=MODEL.apply,
        params=optax.LookaheadParams.init_synced(PARAMS),
        tx=tx,
        head=HEAD,
        solver=cf.Cronos(loss="softmax"),
    )
    state, history = cf.train(state, (X, Y), epochs=3, batch_size=64)
    losses = [row["loss"] for row in history if "loss" in row]
    assert losses[-1] < losses[0]


def test_what_the_user_sees_of_the_optimizer_is_its_own_state():
    labels = lambda params: {name: "head" if name in KERNELS else "body" for name in params}  # noqa: E731
    tx = optax.partition({"head": optax.sgd(0.1), "body": optax.adam(1e-2)}, labels)
    state, _ = made(tx).solve_head((X, Y))
    assert jax.tree.structure(state.optimizer_state) == jax.tree.structure(tx.init(PARAMS))


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
    grads = nnx.state(model, nnx.Param)
    with pytest.raises(ValueError, match=r"`model` must be an NNX module, got State. Call optimizer.update\(model, gr"):
        optimizer.update(grads, model)  # did nothing, without a word


ENDS = {
    "cosine": (optax.adam(1e-2), "cosine", [(1 + math.cos(math.pi * i / 12)) / 2 for i in range(12)]),
    "linear": (optax.sgd(0.1), "linear", [1 - i / 12 for i in range(12)]),
    "wsd": (optax.sgd(0.1), "wsd", [0.05, *[1] * 8, 3 / 4, 2 / 4, 1 / 4]),
    "none": (optax.adam(1e-2), None, [1] * 12),
    "a schedule of its own": (optax.adam(optax.cosine_decay_schedule(1e-2, 9)), "cosine", [1] * 12),
    "an injected schedule": (
        optax.inject_hyperparams(optax.adam)(optax.linear_schedule(1e-2, 0, 9)),
        "cosine",
        [1] * 12,
    ),
    "schedule-free": (optax.contrib.schedule_free_adamw(1e-2), "cosine", [1] * 12),
}


class Watched(cf.CronosTrainState):
    """Keeps the factor of each of twelve steps."""

    factors: jax.Array | None = None
    decay: float = 0.99  # of some average: a field of the user's

    def apply_gradients(self, **kwargs):
        factors = self.factors.at[self.step].set(self.opt_state.run_decay)
        return super().apply_gradients(factors=factors, **kwargs)


def watched(tx, decay):
    return Watched.create(
        apply_fn=MODEL.apply,
        params=PARAMS,
        tx=tx,
        head=HEAD,
        solver=cf.Cronos(loss="softmax"),
        alternation=cf.Alternation(decay=decay),
        factors=jnp.full(12, jnp.nan),
    )


@pytest.mark.parametrize("name", ENDS)
def test_the_rate_falls_to_the_end_of_a_run_unless_the_optimizer_sees_to_it(name):
    tx, decay, expected = ENDS[name]
    state, _ = cf.train(watched(tx, decay), (X, Y), epochs=3, batch_size=64)
    np.testing.assert_allclose(state.factors, expected, rtol=1e-5)
    assert float(state.opt_state.run_decay) == 1  # for whoever goes on with it


def test_of_a_loader_without_a_length_the_first_epoch_has_the_full_rate():
    class Loader:
        def __iter__(self):
            return iter([(X[i : i + 64], Y[i : i + 64]) for i in range(0, 256, 64)])

    state, _ = cf.train(watched(optax.sgd(0.1), "linear"), Loader(), epochs=3)
    np.testing.assert_allclose(state.factors, [1] * 4 + [1 - i / 12 for i in range(4, 12)], rtol=1e-5)
    state, _ = cf.train(watched(optax.sgd(0.1), "linear"), list(Loader()), epochs=3)
    np.testing.assert_allclose(state.factors, [1 - i / 12 for i in range(12)], rtol=1e-5)


def test_the_rate_falls_with_the_seconds_of_a_run_that_they_end():
    state = watched(optax.adam(1e-2), "linear").replace(factors=jnp.full(10**5, jnp.nan))
    state, history = cf.train(state, (X, Y), epochs=10**6, batch_size=64, seconds=0.5, compile_first=True)
    assert history[-1]["seconds"] < 2
    assert float(state.factors[int(state.step) - 1]) < 0.5
    assert np.all(np.diff(state.factors[: int(state.step)]) <= 0)


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


KEEP_PARAMETERS = {
    "prodigy": optax.contrib.prodigy(),
    "sam": optax.contrib.sam(optax.sgd(0.1), optax.sgd(0.05)),
    "cocob": optax.contrib.cocob(),
    "dog": optax.contrib.dog(),
    "mechanize": optax.contrib.mechanize(optax.adam(1e-2)),
}


@pytest.mark.parametrize("head", ["moving", "frozen"])
@pytest.mark.parametrize("name", list(KEEP_PARAMETERS))
def test_a_new_state_has_each_buffer_once(name, head):
    """A step of the user's that donates the state failed: the optimizer's state held the parameters themselves."""
    state = made(KEEP_PARAMETERS[name], alternation=cf.Alternation(head=head))
    leaves = jax.tree.leaves((state.params, state.opt_state, state.guard))
    buffers = [leaf.unsafe_buffer_pointer() for leaf in leaves if isinstance(leaf, jax.Array) and leaf.size]
    assert len(set(buffers)) == len(buffers)


def test_an_optimizer_that_needs_the_gradient_as_a_function_is_refused():
    state = made(optax.contrib.sam(optax.sgd(0.1), optax.sgd(0.05), opaque_mode=True))
    with pytest.raises(ValueError, match=r"got one that needs grad_fn.* SAM with opaque_mode=False"):
        state.apply_gradients(grads=PARAMS)


def of_backbone(tree):
    return path_aware_map(lambda path, _: path[0] not in KERNELS, tree)


def of_head(tree):
    return path_aware_map(lambda path, _: path[0] in KERNELS, tree)


def parts(tx):
    return optax.partition({True: optax.adam(1e-2), False: tx}, of_backbone)


MASKED = optax.masked(optax.adam(1e-2), of_backbone)
PASS_ON = [
    MASKED,
    optax.chain(optax.clip_by_global_norm(1.0), MASKED),
    optax.chain(optax.clip(1.0), MASKED),
    optax.chain(MASKED, optax.zero_nans()),
    parts(optax.identity()),
    optax.MultiSteps(MASKED, 1),
    optax.MultiSteps(optax.chain(optax.clip(1.0), MASKED), 1).gradient_transformation(),
    optax.apply_if_finite(MASKED, 2),
]
PASS_NOTHING_ON = [
    parts(optax.set_to_zero()),
    optax.chain(MASKED, optax.masked(optax.set_to_zero(), of_head)),
    optax.chain(optax.masked(optax.scale_by_adam(), of_backbone), optax.scale(-1e-2)),
    optax.adamw(1e-2, mask=of_backbone),
    optax.masked(optax.adam(1e-2), lambda tree: jax.tree.map(lambda _: True, tree)),
    optax.masked(optax.lbfgs(), of_backbone),  # refused at its first step
    optax.MultiSteps(parts(optax.set_to_zero()), 2),
    optax.apply_if_finite(parts(optax.set_to_zero()), 2),
]


@pytest.mark.parametrize("tx", PASS_ON)
def test_gradients_that_the_optimizer_passes_on_are_told_of(tx):
    """The head went up its gradient at a rate of 1, without a word."""
    with pytest.warns(UserWarning, match=r"`tx` should .* of layers_2/bias, layers_2/kernel, layers_4/bias and 1 more"):
        made(tx)
    small = jax.tree.map(lambda leaf: leaf / 1000, PARAMS)
    updates, _ = jax.jit(tx.update)(small, tx.init(PARAMS), PARAMS)
    np.testing.assert_array_equal(updates["layers_4"]["kernel"], small["layers_4"]["kernel"])
    made(tx, alternation=cf.Alternation(head="frozen"))  # nothing is added to the head


@pytest.mark.parametrize("tx", PASS_NOTHING_ON)
def test_masks_that_pass_nothing_on_are_no_reason_for_a_warning(tx):
    made(tx)


def looks_at_values():
    """Momentum whose ``init`` cannot be traced."""
    inner = optax.sgd(0.1, momentum=0.9)
    return optax.GradientTransformation(lambda p: inner.init(jax.tree.map(np.zeros_like, p)), inner.update)


def looks_at_places():
    """Momentum whose ``init`` puts its zeros where the parameters are, which traced ones do not tell."""
    inner = optax.sgd(0.1, momentum=0.9)

    def init(params):
        return jax.tree.map(lambda zeros: jax.device_put(zeros, zeros.sharding), inner.init(params))

    return optax.GradientTransformation(init, inner.update)


LOOKING = {"looks at values": looks_at_values(), "looks at places": looks_at_places()}


@pytest.mark.parametrize("name", [*OPTIMIZERS, *LOOKING])
def test_what_begins_anew_for_the_head_is_as_the_optimizer_begins(name):
    """Of the state of a deep network only the head's part is made."""
    tx = backbone.rated((OPTIMIZERS | LOOKING)[name], HEAD.paths)
    expected = tx.init(PARAMS)
    made = optimizer_state._head_at_start(tx, PARAMS, HEAD.paths)
    assert jax.tree.structure(made) == jax.tree.structure(expected)
    for (path, one), two in zip(jax.tree_util.tree_leaves_with_path(made), jax.tree.leaves(expected), strict=True):
        if optimizer_state._is_inside(path, HEAD.paths):
            np.testing.assert_array_equal(one, two, strict=True)
        else:
            assert name in LOOKING or one == 0


def test_an_optimizer_begins_once_for_all_solves():
    calls, inner = [], optax.adam(1e-2)
    state = made(optax.GradientTransformation(lambda p: calls.append(p) or inner.init(p), inner.update))
    state, _ = state.solve_head((X, Y))
    calls.clear()
    state.solve_head((X, Y))
    assert not calls


def in_precision(dtype, tx):
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), PARAMS)
    return cf.CronosTrainState.create(apply_fn=MODEL.apply, params=params, tx=tx, head=HEAD)


@pytest.mark.parametrize("tx", [optax.adam(1e-2), optax.chain(optax.clip(1.0), optax.adamw(1e-2))])
def test_an_eps_that_is_zero_in_float16_is_told_of(tx):
    """The first solve after a step said that features were not finite, and to look for parameters and rows."""
    with pytest.warns(UserWarning, match=r"CronosTrainState: `tx` turns a gradient of zero into NaN.* float16.* eps"):
        state = in_precision("float16", tx)
    state = state.apply_gradients(grads=jax.tree.map(jnp.zeros_like, state.params))
    assert np.isnan(jax.tree.leaves(state.params)[0]).all()
    with jax.debug_nans(True):
        in_precision("bfloat16", tx)
        in_precision("float16", optax.adam(1e-2, eps=1e-4))
        in_precision("float16", optax.sgd(1e-2))
    rngs = nnx.Rngs(0)
    layers = nnx.Linear(5, 8, param_dtype="float16", rngs=rngs), nnx.relu, nnx.Linear(8, 2, rngs=rngs)
    model = nnx.Sequential(nnx.Linear(5, 5, rngs=rngs), nnx.tanh, *layers)
    head = cf.nnx.find_head(model, X)
    with pytest.warns(UserWarning, match="CronosOptimizer: `tx` turns a gradient of zero into NaN"):
        cf.nnx.CronosOptimizer(model, tx, head=head)


def test_gradients_that_the_optimizer_passes_on_are_told_of_in_nnx():
    rngs = nnx.Rngs(0)
    layers = nnx.Linear(5, 8, rngs=rngs), nnx.tanh, nnx.Linear(8, 6, rngs=rngs), nnx.relu, nnx.Linear(6, 2, rngs=rngs)
    model = nnx.Sequential(*layers)
    first = functools.partial(jax.tree_util.tree_map_with_path, lambda path, _: path[1].key == 0)
    tx = optax.masked(optax.adam(1e-2), first)
    head = cf.nnx.find_head(model, X)
    with pytest.warns(UserWarning, match="CronosOptimizer: `tx` should turn gradients into steps, .* layers/2/bias"):
        cf.nnx.CronosOptimizer(model, tx, head=head)
    with pytest.warns(UserWarning, match="CronosTrainState: `tx` should turn gradients into steps"):
        cf.nnx.CronosTrainState.create(model=model, tx=tx, head=head)
    cf.nnx.CronosOptimizer(model, tx, head=head, alternation=cf.Alternation(head="frozen"))


GATHER = {
    "sgd": optax.sgd(0.1, momentum=0.9),
    "ademamix": optax.contrib.ademamix(0.1),
    "madgrad": optax.contrib.madgrad(0.1),
    "adan": optax.adan(0.1),
    "sm3": optax.sm3(0.1),
    "rprop": optax.rprop(0.1),
    "optimistic": optax.optimistic_gradient_descent(0.1),
    "optimistic_adam": optax.optimistic_adam_v2(0.1),
    "apply_every": optax.chain(optax.apply_every(3), optax.sgd(0.1)),
    "monitor": optax.chain(optax.monitor({"size": optax.tree.norm}), optax.adam(0.1)),
    "nested": optax.partition(
        {"all": optax.named_chain(("sm3", optax.sm3(0.1)))}, lambda tree: jax.tree.map(lambda _: "all", tree)
    ),
}


@pytest.mark.parametrize("name", GATHER)
def test_no_optimizer_drags_the_new_head_where_the_old_one_was_going(name):
    """AdEMAMix, MADGRAD, Adan, SM3, Rprop, optimistic ones and apply_every did; at optax.monitor JAX stopped."""
    tx, old = GATHER[name], jax.tree.map(jnp.ones_like, PARAMS)
    update = jax.jit(lambda grads, state, params: tx.update(grads, state, params))
    state = tx.init(old)
    for _ in range(2):
        _, state = update(old, state, old)
    begun = optimizer_state.begun_anew(state, tx, PARAMS, HEAD.paths)
    assert jax.tree.structure(begun) == jax.tree.structure(state)
    assert jax.tree.structure(optimizer_state.gone_back(tx.init(old), state)) == jax.tree.structure(state)
    updates, _ = update(jax.tree.map(jnp.zeros_like, PARAMS), begun, PARAMS)
    largest = {layer: max(float(jnp.max(jnp.abs(leaf))) for leaf in updates[layer].values()) for layer in updates}
    assert max(largest[layer] for layer in KERNELS) < 1e-6
    assert largest["layers_0"] > 1e-3  # the backbone goes on


@pytest.mark.parametrize(
    "tx",
    [optax.adagrad(0.1), optax.yogi(0.1), optax.rmsprop(0.1, initial_scale=1.0), optax.rprop(0.1)],
    ids=["adagrad", "yogi", "rmsprop", "rprop"],
)
def test_sizes_of_gradients_stay_whatever_they_begin_with(tx):
    """Those that begin with another number than zero began anew, so that the head's steps changed their size."""
    state = jax.tree.map(lambda leaf: leaf + 3, tx.init(PARAMS))
    begun = optimizer_state.begun_anew(state, tx, PARAMS, HEAD.paths)
    directions = ("mu", "prev_updates")
    for (path, now), before in zip(jax.tree_util.tree_leaves_with_path(begun), jax.tree.leaves(state), strict=True):
        if not any(getattr(entry, "name", None) in directions for entry in path):
            np.testing.assert_array_equal(now, before)


def test_a_new_head_of_zeros_is_one_too():
    """Schedule-free optimizers, Prodigy and others kept the old parameters where the new ones are zero."""
    tx, zeros = optax.contrib.schedule_free_adamw(1e-2), jax.tree.map(jnp.zeros_like, PARAMS)
    begun = optimizer_state.begun_anew(tx.init(PARAMS), tx, zeros, HEAD.paths)
    for layer in KERNELS:
        close(begun.z[layer], zeros[layer])


def test_an_nnx_optimizer_may_keep_lists():
    """SM3 has a list for each kernel, in whose place NNX puts a mapping: JAX stopped the solve."""
    rngs = nnx.Rngs(0)
    layers = nnx.Linear(5, 8, rngs=rngs), nnx.tanh, nnx.Linear(8, 6, rngs=rngs), nnx.relu, nnx.Linear(6, 2, rngs=rngs)
    model = nnx.Sequential(*layers)
    optimizer = cf.nnx.CronosOptimizer(
        model, optax.sm3(0.1), head=cf.nnx.find_head(model, X), solver=cf.Cronos(loss="softmax")
    )

    @nnx.jit
    def train_step(model, optimizer):
        grads = nnx.grad(lambda m: optax.softmax_cross_entropy_with_integer_labels(m(X), Y).mean())(model)
        optimizer.update(model, grads)

    for _ in range(2):
        train_step(model, optimizer)
        solution = optimizer.solve_head(model, (X, Y))
        np.testing.assert_array_equal(model.layers[4].kernel[...], solution.params.kernel2)
