"""β chosen anew in the middle of a run, on rows that it has not seen."""

import functools
import itertools
import math

import jax
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from given import HEAD, MODEL, PARAMS, same

import cronos_flax as cf
from cronos_flax._alternation import guarded_solve
from cronos_flax._alternation.loop import Loop

N = 600
RNG = np.random.default_rng(0)
X = RNG.normal(size=(N, 5)).astype("float32")
Y = (X[:, 0] * X[:, 1] > 0).astype(int)
NOISY = np.where(RNG.random(N) < 0.3, 1 - Y, Y)
TWICE = cf.Alternation(first_epoch=1)  # there is a solve before that which chooses
IDS = np.concatenate([X[:, :4], np.arange(N, dtype="float32")[:, None]], axis=1)


def made(params=PARAMS, alternation=TWICE, guard=True, **solver):
    return cf.CronosTrainState.create(
        apply_fn=MODEL.apply,
        params=params,
        tx=optax.adam(1e-2),
        head=HEAD,
        solver=cf.Cronos(loss="softmax", **solver),
        alternation=alternation,
        guard=guard,
    )


def train(state, data=(X, NOISY), **kwargs):
    return cf.train(state, data, **{"epochs": 5, "batch_size": 64, "key": jax.random.key(3), **kwargs})


@functools.cache
def unbroken(alternation):
    return train(made(alternation=alternation))


def betas(history):
    return [row["beta"] for row in history if "beta" in row]


def mean_loss(params, x, y):
    return float(optax.softmax_cross_entropy_with_integer_labels(MODEL.apply({"params": params}, x), y).mean())


@pytest.mark.parametrize(("targets", "ratio"), [(Y, 1e-1), (NOISY, 1e-4), (NOISY, 1e-2)])
def test_beta_is_the_one_after_which_the_loss_on_other_rows_is_least(targets, ratio):
    """Of β, four and sixteen times as much, and a fourth and a sixteenth, each solved for by itself."""
    fit, other = (X[:300], targets[:300]), (X[300:], targets[300:])
    before, first = made(beta_ratio=ratio).solve_head(fit)
    beta = float(first.stats.beta)
    got, solution = before.solve_head(fit, validation=other)
    assert float(got.beta) == float(solution.stats.beta) == float(got.opt_state.head_decay)

    def solved(factor):
        again = before.replace(beta=jax.numpy.full_like(before.beta, factor * beta), guard=None)
        state, _ = again.solve_head(fit)
        return mean_loss(state.params, *other)

    losses = {factor: solved(factor) for factor in (1, 4, 16, 1 / 4, 1 / 16)}
    side = 4 if losses[4] < losses[1] else 1 / 4
    factors = [1, side, side**2]
    expected = next((a for a, b in itertools.pairwise(factors) if losses[b] >= losses[a]), factors[-1])
    assert float(got.beta) == pytest.approx(expected * beta, rel=1e-5)
    assert mean_loss(got.params, *other) == pytest.approx(losses[expected], rel=1e-4)
    # The guard judges by the new β from here on, and the state that was solved from is as it was.
    assert got.figures["accepted"]
    assert got.figures["best_objective"] == pytest.approx(float(solution.stats.objective), rel=1e-6)
    assert float(before.beta) == pytest.approx(beta, rel=1e-6)


@pytest.mark.parametrize("first_epoch", [None, 1])
def test_rows_that_are_held_back_are_seen_by_nothing_until_beta_is_chosen(monkeypatch, first_epoch):
    """A tenth of them; and by all after that. Ids of rows are one of the features."""
    seen, stepped = [], Loop.stepped

    def watch(self, state, batch):
        seen.append((self.position.epoch, set(np.asarray(batch.args[0])[:, 4].astype(int).tolist())))
        return stepped(self, state, batch)

    monkeypatch.setattr(Loop, "stepped", watch)
    solves, solve_head = [], cf.CronosTrainState.solve_head

    def spy(self, data, **kwargs):
        held = kwargs.get("validation")
        solves.append([set(rows[0][:, 4].astype(int).tolist()) for rows in (data, held) if rows is not None])
        return solve_head(self, data, **kwargs)

    monkeypatch.setattr(cf.CronosTrainState, "solve_head", spy)
    params = jax.tree.map(lambda v: v, PARAMS)
    params["layers_0"]["kernel"] = params["layers_0"]["kernel"].at[4].set(0)  # ids are no feature
    alternation = cf.Alternation(first_epoch=first_epoch)
    state, history = train(made(params=params, alternation=alternation), (IDS, NOISY))
    *before, choice, last = solves
    (held,) = choice[1:]
    assert len(held) == 60
    assert len(before) == (first_epoch is not None)
    assert [row["epoch"] for row in history if "beta" in row] == [1] * len(before) + [2, 5]
    assert all(len(rows) == 1 for rows in (*before, last))
    assert all(rows[0] == set(range(N)) - held for rows in (*before, choice))
    assert len(last[0]) == N - 60
    assert last[0] & held  # a sample of all rows
    early = set().union(*(ids for epoch, ids in seen if epoch < 2))
    assert len(early) > 500
    assert not early & held
    late = set().union(*(ids for epoch, ids in seen if epoch >= 2))
    assert len(late & held) > 50
    *first_beta, at_choice, at_end = betas(history)
    assert at_choice not in first_beta
    assert at_end == pytest.approx(at_choice)
    assert float(state.beta) == pytest.approx(at_choice)


def test_a_row_that_is_not_finite_is_told_of_wherever_it_lies():
    rows = X.copy()
    rows[[at for at in range(0, N, 3)], 0] = np.nan  # some of these are held back
    with pytest.raises(FloatingPointError, match="solve_head"):
        train(made(guard=True), (rows, NOISY))
    before = made(guard=True)
    finite, poisoned = (X[60:], NOISY[60:]), (X[:60] * np.nan, NOISY[:60])
    with pytest.raises(FloatingPointError, match="solve_head"):
        before.solve_head(finite, validation=poisoned)
    state, _ = before.solve_head(finite)
    state, solution = state.solve_head(finite, validation=poisoned)
    assert solution.status.name == "rejected"
    with pytest.warns(UserWarning, match="Look for rows that are not finite"):
        state.solve_head(finite, validation=poisoned)


UNCHOSEN = {
    "β of one's own": lambda: train(made(beta_ratio=0.02)),
    "few rows": lambda: train(made(), (X[:499], NOISY[:499])),
    "one epoch": lambda: train(made(), epochs=1),
    "a frozen head": lambda: train(made(alternation=cf.Alternation(head="frozen", first_epoch=1))),
    "never": lambda: train(made(alternation=cf.Alternation(choose_beta=math.inf, first_epoch=1))),
    "in the last epoch": lambda: train(made(alternation=cf.Alternation(choose_beta=0.9, first_epoch=1))),
    "solved for before": lambda: train(made().solve_head((X, NOISY))[0]),
    "solve_data": lambda: train(made(), solve_data=(X, NOISY)),
    "a loader": lambda: train(made(), [(X[i : i + 64], NOISY[i : i + 64]) for i in range(0, N, 64)]),
}


@pytest.mark.parametrize("name", UNCHOSEN)
def test_else_beta_stays(name):
    _, history = UNCHOSEN[name]()
    assert len(set(np.float32(betas(history)).tolist())) == 1


def test_of_very_large_arrays_nothing_is_held_back(monkeypatch):
    """A solve on the other rows would copy them: arrays on disk may not fit into memory."""
    monkeypatch.setattr("cronos_flax._alternation.train._MOST_COPIED", X.nbytes - 1)
    _, history = train(made())
    assert len(set(np.float32(betas(history)).tolist())) == 1


@pytest.mark.parametrize(("stop_at", "alternation"), [(1, TWICE), (2, TWICE), (4, TWICE), (1, None), (2, None)])
def test_a_run_that_is_stopped_around_the_choice_ends_where_the_unbroken_one_ends(tmp_path, stop_at, alternation):
    whole, history = unbroken(alternation)

    class StoppedError(Exception):
        pass

    def stop(row):
        if row["epoch"] == stop_at and "loss" in row:
            raise StoppedError

    with pytest.raises(StoppedError):
        train(made(alternation=alternation), directory=tmp_path, callbacks=[stop], save_every=3)
    state, resumed = train(made(alternation=alternation), directory=tmp_path, save_every=3)
    same(state.params, whole.params)
    same(state.opt_state, whole.opt_state)
    assert betas(resumed) == betas(history)


def test_a_limit_of_seconds_counts_as_the_length_of_the_run(monkeypatch):
    chosen_at, solve = [], Loop.solve

    def watch(self, **choice):
        if choice:
            chosen_at.append(self.clock.seconds)
        return solve(self, **choice)

    monkeypatch.setattr(Loop, "solve", watch)
    train(made(guard=False), epochs=10**6, seconds=1.0, compile_first=True)
    (seconds,) = chosen_at
    assert seconds >= 0.4


def test_with_solves_at_steps_beta_is_chosen_too(monkeypatch):
    tried, chosen = [], guarded_solve.chosen

    def spy(fit, first, *rest):
        found = chosen(fit, first, *rest)
        tried.append([float(solution.stats.beta) for _, solution in (first, found)])
        return found

    monkeypatch.setattr(guarded_solve, "chosen", spy)
    _, history = train(made(guard=False), solve_every=4)
    ((first, found),) = tried
    assert set(np.float32(betas(history)).tolist()) == set(np.float32([first, found]).tolist())


@pytest.mark.parametrize(
    ("epochs", "alternation", "expected"),
    [
        (12, cf.Alternation(), [5, 12]),  # a short run: the first solve is that which chooses
        (13, cf.Alternation(), [1, 6, 13]),
        (28, cf.Alternation(), [1, 12, 21, 28]),  # not at 11
        (17, cf.Alternation(), [1, 7, 17]),  # nor soon after it, at 11
        (20, cf.Alternation(then_every=9, choose_beta=0.2), [4, 13, 20]),  # counted from the first
        (12, cf.Alternation(then_every=4, dense_epochs=2), [1, 2, 5, 10, 12]),
        (12, cf.Alternation(then_every=2), [1, 3, 5, 7, 9, 11, 12]),
        (12, cf.Alternation(first_epoch=0), [0, 5, 12]),
        (28, cf.Alternation(choose_beta=math.inf), [1, 11, 21, 28]),
    ],
)
def test_around_the_choice_there_is_no_other_solve(epochs, alternation, expected):
    _, history = train(made(alternation=alternation), epochs=epochs)
    assert [row["epoch"] for row in history if "beta" in row] == expected


def test_a_first_solve_that_chooses_begins_at_a_quarter_of_the_usual_beta():
    fit, other = (X[:300], NOISY[:300]), (X[300:], NOISY[300:])
    usual, _ = made().solve_head(fit)
    got, _ = made().solve_head(fit, validation=other)
    begun = made(beta_ratio=usual.solver.beta_ratio / 4).solve_head(fit)[0]
    expected, _ = begun.replace(params=made().params, guard=None).solve_head(fit, validation=other)
    assert float(begun.beta) == pytest.approx(float(usual.beta) / 4, rel=1e-6)
    assert float(got.beta) == pytest.approx(float(expected.beta), rel=1e-6)


def test_nnx_chooses_as_linen_does():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.a, self.b, self.c = (nnx.Linear(*size, rngs=rngs) for size in ((5, 8), (8, 6), (6, 2)))

        def __call__(self, x):
            return self.c(nnx.relu(self.b(nnx.tanh(self.a(x)))))

    net = Net(nnx.Rngs(0))
    for layer, name in ((net.a, "layers_0"), (net.b, "layers_2"), (net.c, "layers_4")):
        layer.kernel[...], layer.bias[...] = PARAMS[name]["kernel"], PARAMS[name]["bias"]
    head = cf.nnx.find_head(net, X[:64])
    optimizer = cf.nnx.CronosOptimizer(net, optax.adam(1e-2), head=head, solver=cf.Cronos(loss="softmax"))
    fit, other = (X[:300], NOISY[:300]), (X[300:], NOISY[300:])
    optimizer.solve_head(net, fit, key=jax.random.key(1))
    optimizer.solve_head(net, fit, validation=other, key=jax.random.key(2))
    state, _ = made().solve_head(fit, key=jax.random.key(1))
    state, _ = state.solve_head(fit, validation=other, key=jax.random.key(2))
    assert float(optimizer.beta[...]) == pytest.approx(float(state.beta), rel=1e-4)
    np.testing.assert_allclose(net(X), MODEL.apply({"params": state.params}, X), rtol=1e-2, atol=1e-2)


def test_weights_of_classes_and_rows_count_in_the_choice():
    """Rows of no weight cannot tip it."""
    fit, other = (X[:300], Y[:300]), (X[300:], Y[300:])
    junk = np.concatenate([other[0], other[0]]), np.concatenate([other[1], 1 - other[1]]), np.repeat([1.0, 0.0], 300)
    before, _ = made(class_weight="balanced").solve_head(fit)
    one, _ = before.solve_head(fit, validation=other)
    two, _ = before.solve_head([fit], validation=[junk], unpack=lambda batch: ((batch[0],), *batch[1:]))
    assert float(one.beta) == float(two.beta)


def test_features_of_batch_statistics_are_chosen_on():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            x = nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Dense(16)(x)))
            return nn.Dense(2)(nn.relu(nn.Dense(8)(x)))

    net = Net()
    variables = net.init(jax.random.key(0), X[:1])
    head = cf.find_head(net, variables, X[:64], statistics="batch")
    state = cf.CronosTrainState.create(
        apply_fn=net.apply,
        params=variables["params"],
        model_state={"batch_stats": variables["batch_stats"]},
        tx=optax.adam(1e-2),
        head=head,
        solver=cf.Cronos(loss="softmax"),
        alternation=TWICE,
    )
    state, history = train(state, train_kwargs={"train": True})
    assert len(set(np.float32(betas(history)).tolist())) == 2
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(state.params))


def test_validation_that_does_not_fit_is_refused_and_nothing_changes():
    state, _ = made().solve_head((X[:300], Y[:300]))
    before = jax.tree.map(np.array, state.params)
    with pytest.raises(ValueError, match="the batch must be one that the model takes"):
        state.solve_head((X[:300], Y[:300]), validation=(X[300:, :3], Y[300:]))
    with pytest.raises(ValueError, match="y"):
        state.solve_head((X[:300], Y[:300]), validation=(X[300:], Y[300:] + 7))
    same(state.params, before)


def test_rows_that_are_not_finite_choose_nothing(recwarn):
    bad = np.where(np.arange(300)[:, None] == 3, np.nan, X[300:])
    state, first = made().solve_head((X[:300], Y[:300]))
    after, _ = state.solve_head((X[:300], Y[:300]), validation=(bad, Y[300:]))
    assert float(after.beta) == pytest.approx(float(first.stats.beta))
