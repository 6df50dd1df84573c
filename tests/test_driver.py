"""``cf.train``: an ordinary loop in a function; what is killed goes on to the same end."""

import functools
import gc
import shutil
import signal
import warnings
import weakref
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import resumed
from flax import nnx, struct
from flax.training.train_state import TrainState
from forked import ADDS_NONE, Forked
from given import HEAD, MODEL, PARAMS, X, Y

import cronos_flax as cf
from cronos_flax._alternation import sources as _sources
from cronos_flax._alternation.position import Position
from cronos_flax._alternation.steps import gradient_step
from cronos_flax._solver.losses import loss_of

ROOT = Path(__file__).resolve().parents[1]


def made(tx=None, **kwargs):
    return cf.CronosTrainState.create(
        apply_fn=MODEL.apply,
        params=PARAMS,
        tx=optax.adam(1e-2) if tx is None else tx,
        head=HEAD,
        solver=cf.Cronos(loss="softmax"),
        **kwargs,
    )


class Averaging(TrainState):
    """Fills its average of the parameters at the first step only."""

    average: Any = None

    def apply_gradients(self, *, grads, **kwargs):
        new = super().apply_gradients(grads=grads, **kwargs)
        return new.replace(average=new.params)


def plain():
    return TrainState.create(apply_fn=MODEL.apply, params=PARAMS, tx=optax.adam(1e-2))


def train(state=None, data=(X[:256], Y[:256]), **kwargs):
    return cf.train(made() if state is None else state, data, **{"epochs": 3, "batch_size": 64, **kwargs})


class Noisy(nn.Module):
    """Adds noise to its input in training."""

    @nn.compact
    def __call__(self, x, train=False):
        return nn.Dense(2)(x + jax.random.normal(self.make_rng("noise"), x.shape) if train else x)


def noisy():
    params = {"Dense_0": {"kernel": jnp.ones((X.shape[1], 2)), "bias": jnp.zeros(2)}}
    return TrainState.create(apply_fn=Noisy().apply, params=params, tx=optax.sgd(0.1))


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_it_trains_and_tells_and_leaves_the_state_given_alone():
    start, rows = made(), []
    state, history = train(start, validation=(X[256:], Y[256:]), callbacks=[rows.append])
    assert rows == history
    assert all(isinstance(value, int | float | bool) for row in rows for value in row.values())
    solves, epochs = ([row for row in rows if name in row] for name in ("objective", "loss"))
    assert [row["step"] for row in solves] == [4, 12]
    assert [row["step"] for row in epochs] == [4, 8, 12]
    assert all(row["objective"] <= row["initial_objective"] for row in solves)
    assert 0 < sum(row["solve_seconds"] for row in solves) < rows[-1]["seconds"]
    assert [row["seconds"] for row in rows] == sorted(row["seconds"] for row in rows)
    same(start.params, PARAMS)
    assert int(state.step) == 12
    logits = MODEL.apply({"params": state.params}, X[256:])
    assert epochs[-1]["validation_accuracy"] == pytest.approx(
        float(np.mean(np.asarray(logits).argmax(axis=1) == Y[256:]))
    )
    expected = optax.softmax_cross_entropy_with_integer_labels(logits, Y[256:]).mean()
    assert epochs[-1]["validation_loss"] == pytest.approx(float(expected), rel=1e-5)
    assert epochs[-1]["validation_accuracy"] > 0.7


def test_an_ordinary_train_state_is_the_ordinary_loop():
    state, history = train(plain(), loss="softmax", epochs=2, key=jax.random.key(5))
    by_hand = plain()
    seed = int(jax.random.bits(jax.random.key(5)))
    for epoch in range(2):
        order = np.random.default_rng((seed, 0, epoch)).permutation(256)
        for i in range(0, 256, 64):
            x, y = X[order[i : i + 64]], Y[order[i : i + 64]]

            def loss(params, x=x, y=y):
                return optax.softmax_cross_entropy_with_integer_labels(MODEL.apply({"params": params}, x), y).mean()

            by_hand = by_hand.apply_gradients(grads=jax.grad(loss)(by_hand.params))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), state.params, by_hand.params)
    assert [sorted(row) for row in history] == [["epoch", "loss", "seconds", "step"]] * 2


def test_solves_are_where_the_schedule_says():
    def steps(**kwargs):
        return [row["step"] for row in train(**kwargs)[1] if "objective" in row]

    assert steps(epochs=12) == [4, 48]
    assert steps(epochs=16) == [4, 44, 64]
    assert steps(epochs=2, solve_every=3) == [0, 3, 6, 8]
    frozen = made(alternation=cf.Alternation(head="frozen"))
    assert steps(state=frozen, epochs=10) == [0, 4, 8, 12, 16, 28, 40]
    often = made(alternation=cf.Alternation(first_epoch=2, dense_epochs=2, then_every=2))
    assert steps(state=often, epochs=6) == [8, 12, 20, 24]


def test_steps_that_raise_the_loss_bring_a_solve_and_are_gone_back_from():
    def bursts(step):
        return jnp.where((step >= 16) & (step < 20), 300.0, 1.0)

    tx = optax.chain(optax.adam(1e-2), optax.scale_by_schedule(bursts))
    solves = [row for row in train(made(tx), epochs=6)[1] if "objective" in row]
    assert [row["step"] for row in solves] == [4, 20, 24]
    assert [row["rejections"] for row in solves] == [0, 1, 1]


def test_seconds_end_a_run_early_and_with_a_solve():
    for seconds, epochs in ((1e-9, 1), (1e9, 3)):
        state, history = train(seconds=seconds)
        assert int(state.step) == 4 * epochs
        assert [row["epoch"] for row in history if "loss" in row][-1] == epochs
        assert "objective" in history[-2]
        _, plain_history = train(plain(), loss="softmax", seconds=seconds)
        assert [row["epoch"] for row in plain_history][-1] == epochs


def test_several_sets_of_rows_are_validated_by_name_and_compilation_is_told():
    state, history = train(validation={"held": (X[256:], Y[256:]), "fit": (X[:256], Y[:256])}, compile_first=True)
    assert history[0]["compile_seconds"] > 0
    assert history[0]["step"] == history[0]["epoch"] == 0
    for name, rows in (("held", slice(256, None)), ("fit", slice(256))):
        hits = np.asarray(MODEL.apply({"params": state.params}, X[rows])).argmax(axis=1) == Y[rows]
        assert history[-1][f"{name}_accuracy"] == pytest.approx(float(np.mean(hits)))


def test_a_state_may_have_other_parameters_to_evaluate():
    class Averaged(TrainState):
        @property
        def eval_params(self):
            return PARAMS

    state = Averaged.create(apply_fn=MODEL.apply, params=PARAMS, tx=optax.adam(1e-2))
    _, history = train(state, loss="softmax", validation=(X[256:], Y[256:]))
    losses = {row["validation_loss"] for row in history}
    expected = optax.softmax_cross_entropy_with_integer_labels(MODEL.apply({"params": PARAMS}, X[256:]), Y[256:]).mean()
    assert len(losses) == 1
    assert losses.pop() == pytest.approx(float(expected), rel=1e-5)


def test_batches_of_dicts_with_weights_and_keyword_arguments():
    class Masked(nn.Module):
        @nn.compact
        def __call__(self, tokens, scale):
            return nn.Dense(2)(nn.relu(nn.Dense(6)(jnp.tanh(nn.Dense(8)(scale * tokens)))))

    model = Masked()
    tokens = X[:240].reshape(60, 4, 5)
    labels = Y[:240].reshape(60, 4)
    mask = (np.arange(4) < 3) * np.ones((60, 1), "float32")
    labels = np.where(mask > 0, labels, 1 - labels)  # hidden ones are wrong
    params = model.init(jax.random.key(0), tokens, 1.0)["params"]
    head = cf.find_head(model, {"params": params}, tokens=tokens[:20], scale=1.0)
    state = cf.CronosTrainState.create(
        apply_fn=model.apply, params=params, tx=optax.adam(1e-2), head=head, solver=cf.Cronos(loss="softmax")
    )
    rows = [{"t": tokens[i : i + 20], "y": labels[i : i + 20], "m": mask[i : i + 20]} for i in range(0, 60, 20)]

    def unpack(row):
        return {"tokens": row["t"], "scale": np.float32(1.0)}, row["y"], row["m"]

    state, history = cf.train(state, rows, epochs=6, unpack=unpack, validation=rows)
    assert int(state.step) == 18
    last = history[-1]
    logits = model.apply({"params": state.params}, tokens, 1.0)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    assert last["validation_loss"] == pytest.approx(float((losses * mask).sum() / mask.sum()), rel=1e-4)
    assert last["validation_accuracy"] > 0.75


def test_running_statistics_dropout_and_several_steps_between_updates():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = nn.BatchNorm(use_running_average=not train)(nn.Dense(8)(x))
            x = nn.Dropout(0.3, deterministic=not train)(nn.relu(x))
            return nn.Dense(2)(nn.relu(nn.Dense(6)(x)))

    model = Net()
    variables = model.init(jax.random.key(0), X, train=False)
    state = cf.CronosTrainState.create(
        apply_fn=model.apply,
        params=variables["params"],
        tx=optax.MultiSteps(optax.adam(1e-2), 2),
        head=cf.find_head(model, variables, X[:64], train=False, statistics="batch"),
        solver=cf.Cronos(loss="softmax"),
        model_state={"batch_stats": variables["batch_stats"]},
    )
    trained, history = train(state, train_kwargs={"train": True}, validation=(X[256:], Y[256:]))
    means = [s.model_state["batch_stats"]["BatchNorm_0"]["mean"] for s in (state, trained)]
    assert not np.allclose(*means)
    assert history[-1]["validation_loss"] < 0.7
    again, _ = train(state, train_kwargs={"train": True}, validation=(X[256:], Y[256:]))
    same(again.params, trained.params)
    other, _ = train(state, train_kwargs={"train": True}, key=jax.random.key(1))
    assert not np.array_equal(jax.tree.leaves(other.params)[0], jax.tree.leaves(trained.params)[0])


@pytest.mark.parametrize("rate", [0.0, 0.8])
def test_a_solve_that_dropout_contradicts_is_told_once(rate, recwarn, tmp_path):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = nn.relu(nn.Dense(6)(nn.tanh(nn.Dense(8)(x))))
            return nn.Dense(2)(nn.Dropout(rate, deterministic=not train)(x))

    model = Net()
    made = {"apply_fn": model.apply, "params": model.init(jax.random.key(0), X, train=False)["params"]}
    head = cf.find_head(model, {"params": made["params"]}, X[:64], train=False)
    solver = cf.Cronos(loss="softmax", beta_ratio=1e-4, max_iters=20)
    alternation = cf.Alternation(first_epoch=0, dense_epochs=3)
    state = cf.CronosTrainState.create(
        **made, tx=optax.sgd(1e-4), head=head, solver=solver, guard=False, alternation=alternation
    )
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        train(state, train_kwargs={"train": True}, batch_size=12, epochs=3, directory=tmp_path)
    told = [str(warning.message) for warning in recwarn if "gradient steps after a solve" in str(warning.message)]
    assert len(told) == (rate > 0)
    assert all("larger beta_ratio" in message for message in told)


@pytest.mark.parametrize("solve_every", [None, 4])
def test_a_solve_that_training_contradicts_is_told_of_where_few_steps_follow_each(solve_every, recwarn):
    """A scale of outputs in training only: of epochs with fewer than twenty steps, nothing was looked at."""

    class Scaled(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            out = nn.Dense(2)(nn.relu(nn.Dense(6)(nn.tanh(nn.Dense(8)(x)))))
            return 30 * out if train else out

    def told(**train_kwargs):
        model = Scaled()
        made = {"apply_fn": model.apply, "params": model.init(jax.random.key(0), X, train=False)["params"]}
        head = cf.find_head(model, {"params": made["params"]}, X[:64], train=False)
        solver = cf.Cronos(loss="softmax", beta=1e-3)
        state = cf.CronosTrainState.create(**made, tx=optax.sgd(1e-4), head=head, solver=solver, guard=False)
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            train(state, batch_size=64, epochs=12, solve_every=solve_every, train_kwargs=train_kwargs)
        return [str(one.message) for one in recwarn if "gradient steps after a solve" in str(one.message)]

    assert not told(train=False)
    (message,) = told(train=True)
    assert "in training only" in message


class Sowing(nn.Module):
    """A network with an auxiliary loss, as of a mixture of experts, in some collection."""

    collection: str

    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Dense(8)(x))
        self.sow(self.collection, "balance", jnp.mean(x**2))
        return nn.Dense(int(Y.max()) + 1)(nn.relu(nn.Dense(6)(self.perturb("x", x))))


@pytest.mark.parametrize("kind", ["solved", "plain"])
def test_auxiliary_losses_that_are_not_trained_on_are_told_of_once(kind, recwarn):
    """They were left out of the loss, without a word; what is no loss passes without one."""

    def run(collection, apply_fn=None):
        model = Sowing(collection)
        params = {"params": model.init(jax.random.key(0), X[:8])["params"]}
        given = {"apply_fn": apply_fn or model.apply, **params, "tx": optax.sgd(1e-2)}
        if kind == "plain":
            state = TrainState.create(**given)
        else:
            head = cf.find_head(model, params, X[:64])
            state = cf.CronosTrainState.create(**given, head=head, solver=cf.Cronos(loss="softmax"))
        train(state, loss="softmax", epochs=2, validation=(X[:64], Y[:64]))
        return [str(warning.message) for warning in recwarn]

    assert run("intermediates") == []
    assert (
        run("losses", lambda variables, x, rngs=None: Sowing("losses").apply(variables, x)) == []
    )  # takes no `mutable`
    (said,) = run("losses")
    assert "sows into ['losses'], and the loss of cf.train holds nothing of that" in said


def test_solves_on_some_of_the_rows_are_on_others_each_time():
    state, history = train(solve_rows=192, epochs=4)
    assert all(row["objective"] <= row["initial_objective"] for row in history if "objective" in row)
    whole, _ = train(epochs=4)
    assert not np.array_equal(jax.tree.leaves(state.params)[0], jax.tree.leaves(whole.params)[0])


def test_solves_between_few_steps_take_no_more_rows_than_the_guard_needs(monkeypatch):
    seen = []
    solve_head = cf.CronosTrainState.solve_head

    def watched(self, data, **kwargs):
        seen.append(len(data[1]))
        return solve_head(self, tuple(rows[:256] for rows in data), **kwargs)  # one program for all

    monkeypatch.setattr(cf.CronosTrainState, "solve_head", watched)
    many = np.tile(X[:256], (40, 1)), np.tile(Y[:256], 40)
    for solve_every, rows in ((None, 10_240), (4, 8192), (70, 8960)):
        seen.clear()
        # No guard: the rows that are solved on here are fewer than it needs.
        train(made(guard=False), data=many, epochs=1, batch_size=128, solve_every=solve_every)
        assert set(seen) == {rows}
    monkeypatch.setattr(_sources, "_SOLVE_BYTES", 2**20)
    seen.clear()
    train(data=many, epochs=1, batch_size=128)
    assert all(2**19 < HEAD.solve_bytes(rows) <= 2**20 for rows in seen)


def compiled_programs(*args, **kwargs):
    """How many programs are compiled before each row of the history of a run."""
    compiled, counts = [], []

    def listen(event, _, **kwargs):
        if "backend_compile" in event:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        train(*args, callbacks=[lambda row: counts.append(len(compiled))], **kwargs)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    return counts


def test_nothing_is_compiled_anew_after_the_first_alternation():
    counts = compiled_programs(epochs=6)
    assert counts[-1] == counts[3]


def without_first_neuron(updates, params):
    """Steps after which a neuron of the head is dead."""
    update = jax.tree.map(lambda update: update, updates)
    update["layers_2"]["kernel"] = update["layers_2"]["kernel"].at[:, 0].set(-params["layers_2"]["kernel"][:, 0])
    update["layers_2"]["bias"] = update["layers_2"]["bias"].at[0].set(-params["layers_2"]["bias"][0])
    return update


@pytest.mark.parametrize("case", ["no solves", "solves", "a neuron dies", "apply_fn is jitted"])
def test_nothing_is_compiled_while_the_clock_runs(case):
    """An optimizer was timed with a program that looks whether parameters are finite, .2 to .5 s the first time.

    And a run of solves with the one that finds new gates for neurons that have died.
    """
    model = nn.Sequential([nn.Dense(13 + len(case)), nn.relu, nn.Dense(10), nn.relu, nn.Dense(3)])  # of no other test
    variables = model.init(jax.random.key(0), X[:1])
    tx = optax.chain(optax.adam(1e-2), optax.stateless(without_first_neuron)) if "dies" in case else optax.adam(1e-2)
    apply_fn = jax.jit(model.apply) if "jitted" in case else model.apply
    parts = {"apply_fn": apply_fn, "params": variables["params"], "tx": tx}
    state = TrainState.create(**parts)
    if case != "no solves":
        head, free = cf.find_head(model, variables, X[:8]), cf.Alternation(largest_step=None, decay=None)
        parts |= {"head": head, "solver": cf.Cronos(loss="softmax")}
        state = cf.CronosTrainState.create(**parts, alternation=free if "dies" in case else None)
    counts = compiled_programs(state, loss="softmax", epochs=6, compile_first=True)
    assert counts[0] > 0
    assert counts[-1] == counts[0]


def test_a_run_goes_on_where_it_stopped(tmp_path, monkeypatch):
    class StopError(Exception):
        pass

    def stop(row):
        if row["step"] == 10:
            raise StopError

    whole, history = train(epochs=4, solve_every=5)
    with pytest.raises(StopError):
        train(epochs=4, solve_every=5, directory=tmp_path, save_every=3, callbacks=[stop])
    told = []
    resumed, rows = train(epochs=4, solve_every=5, directory=tmp_path, save_every=3, callbacks=[told.append])
    same(jax.tree.leaves(resumed), jax.tree.leaves(whole))

    def untimed(rows):
        return [{k: v for k, v in row.items() if k not in ("seconds", "solve_seconds")} for row in rows]

    assert untimed(rows) == untimed(history)
    assert 0 < len(told) < len(rows)
    finished, _ = train(epochs=4, solve_every=5, directory=tmp_path)
    same(jax.tree.leaves(finished), jax.tree.leaves(whole))
    with pytest.raises(ValueError, match="holds a run with batch_size=64"):
        train(epochs=4, solve_every=5, directory=tmp_path, batch_size=32)
    cf.save_checkpoint(tmp_path / "other", made(), 0)
    with pytest.raises(ValueError, match="another kind"):
        train(directory=tmp_path / "other")
    monkeypatch.setattr(Position, "__dataclass_fields__", dict(list(Position.__dataclass_fields__.items())[:-1]))
    with pytest.raises(ValueError, match="a run of a later version of cronos_flax, which saves "):
        train(epochs=4, solve_every=5, directory=tmp_path)


def turning(figure, **keywords):
    """A run of eight epochs, whose steps go down for three of them, and up from there on."""
    turn = optax.chain(optax.sgd(0.3), optax.scale_by_schedule(lambda count: jnp.where(count < 12, 1, -1)))
    start = TrainState.create(apply_fn=MODEL.apply, params=PARAMS, tx=turn)
    return train(
        **{"state": start, "epochs": 8, "validation": (X[256:], Y[256:]), "loss": "softmax"} | keywords,
        keep_best=figure,
    )


def alternation_in_linen():
    model = nn.Sequential([nn.Dense(8), nn.tanh, nn.Dense(6), nn.relu, nn.Dense(2)])
    params = model.init(jax.random.key(0), X[:1])["params"]
    head = cf.find_head(model, {"params": params}, X[:8])
    state = cf.CronosTrainState.create(
        apply_fn=model.apply, params=params, tx=optax.adam(1e-2), head=head, solver=cf.Cronos(loss="softmax")
    )
    return state, [head, model]


def alternation_in_nnx():
    rngs = nnx.Rngs(0)
    layers = [nnx.Linear(X.shape[1], 8, rngs=rngs), nnx.tanh, nnx.Linear(8, 6, rngs=rngs), nnx.relu]
    model = nnx.Sequential(*layers, nnx.Linear(6, 2, rngs=rngs))
    head = cf.nnx.find_head(model, X[:8])
    return cf.nnx.CronosTrainState.create(
        model=model, tx=optax.adam(1e-2), head=head, solver=cf.Cronos(loss="softmax")
    ), [head, model]


class Turned(TrainState):
    """Changes a setting of its own in every step."""

    turn: int = struct.field(pytree_node=False, default=0)

    def apply_gradients(self, *, grads, **kwargs):
        new = super().apply_gradients(grads=jax.tree.map(lambda grad: grad * (1 - 2 * self.turn), grads), **kwargs)
        return new.replace(turn=1 - self.turn)


def test_a_step_may_change_a_setting_of_the_state(tmp_path):
    """Each is a program of its own."""
    state = Turned.create(apply_fn=MODEL.apply, params=PARAMS, tx=optax.sgd(0.1))
    seen, batches = [], [(X[i : i + 64], Y[i : i + 64]) for i in (0, 64, 128)]

    def loss(params, x, y):
        return optax.softmax_cross_entropy_with_integer_labels(MODEL.apply({"params": params}, x), y).mean()

    expected = state
    for batch in batches:
        seen.append(expected.turn)
        expected = expected.apply_gradients(grads=jax.grad(loss)(expected.params, *batch))
    found, _ = train(state, batches, epochs=1, loss="softmax")
    with pytest.raises(ValueError, match=r"leave what is no array in a Turned as it is.*got turn=1, which was 0"):
        train(state, batches, epochs=1, loss="softmax", directory=tmp_path)  # it went on with 0
    assert (seen, found.turn) == ([0, 1, 0], 1)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found.params, expected.params)


@pytest.mark.parametrize("made", [alternation_in_linen, alternation_in_nnx])
def test_models_and_their_programs_can_be_given_up(made):
    """JAX kept each model with its programs, until LLVM could not take another one and ended the process."""

    def run():
        state, parts = made()
        train(state, validation=(X[256:], Y[256:]))
        return [weakref.ref(part) for part in parts]

    def caches():
        gc.unfreeze()  # what `conftest.py` froze
        found = (each for each in gc.get_objects() if isinstance(each, functools._lru_cache_wrapper))
        return [each for each in found if (each.__module__ or "").startswith("cronos_flax")]

    def left():
        """Programs that are left when this package has given up its own."""
        for cache in caches():
            cache.cache_clear()
        gc.collect()
        return len(jax.devices()[0].client.live_executables())

    run()
    before, parts = left(), run()
    assert all(each.cache_info().maxsize is not None for each in caches() if each.cache_info().currsize > 4)
    assert left() <= before
    assert [part() for part in parts] == [None] * len(parts)


@pytest.mark.parametrize("figure", ["validation_loss", "validation_accuracy"])
def test_the_state_of_the_best_epoch_is_returned(figure):
    state, history = turning(figure)
    values = np.array([row[figure] for row in history])
    best = values.argmax() if figure.endswith("accuracy") else values.argmin()
    assert 0 < best < 7
    assert int(state.step) == history[best]["step"]
    last, again = turning(None)
    assert again[-1][figure] == values[-1]
    assert int(last.step) == history[-1]["step"]
    short, _ = turning(None, epochs=int(best) + 1)
    same(jax.tree.leaves(state.params), jax.tree.leaves(short.params))


def test_a_run_that_keeps_the_best_goes_on_where_it_stopped(tmp_path):
    class StopError(Exception):
        pass

    def stop(row):
        if row["epoch"] == 7:
            raise StopError

    whole, _ = turning("validation_loss")
    with pytest.raises(StopError):
        turning("validation_loss", directory=tmp_path, callbacks=[stop])
    assert {int(path.name) for path in tmp_path.iterdir() if path.name.isdecimal()} == {12, 16, 20, 24}
    for epochs in (8, 8, 9):
        resumed, _ = turning("validation_loss", directory=tmp_path, epochs=epochs)
        same(jax.tree.leaves(resumed), jax.tree.leaves(whole))
    gone_on, _ = turning("validation_loss", directory=tmp_path, epochs=10, state=whole)  # it has come to that one too
    same(jax.tree.leaves(gone_on), jax.tree.leaves(whole))
    with pytest.raises(ValueError, match="holds a run with keep_best='validation_loss'"):
        turning(None, directory=tmp_path)
    shutil.rmtree(tmp_path / "12")
    with pytest.warns(UserWarning, match="step 12, the best by validation_loss, cannot be read any more"):
        resumed, _ = turning("validation_loss", directory=tmp_path, epochs=11)
    assert int(resumed.step) == 44


BAD = {
    "state": (lambda: cf.train(PARAMS, (X, Y), epochs=1), "`state` must be"),
    "loss of a plain state": (lambda: train(plain()), "`loss` must be"),
    "loss": (lambda: train(loss="absolute"), "`loss` must be"),
    "epochs": (lambda: train(epochs=0), "`epochs`"),
    "batch_size": (lambda: train(batch_size=0.5), "`batch_size`"),
    "solve_every": (lambda: train(solve_every="often"), "`solve_every`"),
    "solve_rows": (lambda: train(solve_rows=1), "`solve_rows` must be an integer ≥ 2, got 1"),
    "seconds": (lambda: train(seconds=0), "`seconds` must be"),
    "seconds as a switch": (lambda: train(seconds=True), "`seconds` must be a positive number, got True"),
    "rows": (lambda: train(data=(X, Y[:5])), "equally many rows"),
    "no rows": (lambda: train(data=(X[:0], Y[:0])), "equally many rows"),
    "an iterator": (lambda: train(data=iter([(X[:64], Y[:64])])), "must be re-iterable"),
    "a field that is filled by a step": (
        lambda: train(Averaging.create(apply_fn=MODEL.apply, params=PARAMS, tx=optax.sgd(0.1)), loss="softmax"),
        "`apply_gradients` of Averaging must leave as many arrays .*, got 6 in `average`, 0 before. Let a",
    ),
    "keep_best without validation": (lambda: train(keep_best="validation_loss"), "`validation`, which is not given"),
    "keep_best": (
        lambda: train(keep_best="loss", validation=(X, Y)),
        "must be 'validation_loss' or 'validation_accuracy', got 'loss'",
    ),
    "keep_best of no labels": (
        lambda: train(
            plain(), (X, X[:, :2]), loss="squared", keep_best="validation_accuracy", validation=(X, X[:, :2])
        ),
        "its rows have no labels",
    ),
    "an apply_fn that takes no rngs": (
        lambda: train(plain().replace(apply_fn=lambda variables, x: MODEL.apply(variables, x)), loss="softmax"),
        r"`apply_fn` must take `rngs` .*got .*<lambda>\. Give module\.apply.*give rngs=\(\)",
    ),
    "keys of streams among the arguments": (
        lambda: train(noisy(), loss="softmax", train_kwargs={"train": True, "rngs": {"noise": jax.random.key(0)}}),
        "`train_kwargs` must leave out `rngs`",
    ),
    "a stream that is not named": (
        lambda: train(noisy(), loss="softmax", train_kwargs={"train": True}),
        r"train: the module needs a random stream, .* named by `rngs`, got \['dropout'\]\. .*\"noise\"",
    ),
    "a stream in scoring": (
        lambda: train(noisy(), loss="softmax", validation=(X, Y), eval_kwargs={"train": True}),
        r"`validation`: the module needs a random stream, and scoring has none: give eval_kwargs",
    ),
    "no batches": (lambda: train(plain(), data=[], loss="softmax"), "at least one batch"),
    "targets": (lambda: train(data=(X, np.ones((300, 3), "float32"))), "targets"),
    "x": (lambda: train(data=(X[:, :3], Y)), "the model takes"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused(case):
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call()


def test_a_best_epoch_that_there_is_not_is_told_of():
    """The state at the end was returned, without a word."""
    bad = np.where(np.arange(len(X))[:, None] == 3, np.nan, X)
    with pytest.warns(UserWarning, match=r"`keep_best` must be .* finite after an epoch, got 'validation_loss', which"):
        train(plain(), loss="softmax", epochs=1, keep_best="validation_loss", validation=(bad, Y))


def test_a_callback_cannot_change_the_history(tmp_path):
    """A row that it emptied or added arrays to ended in an error about labels or JSON."""
    plainly = {"loss": "softmax", "epochs": 1, "keep_best": "validation_loss", "validation": (X, Y)}
    for change in (dict.clear, lambda row: row.update(own=np.ones(3))):
        _, history = train(plain(), **plainly, callbacks=[change], directory=tmp_path / str(change))
        assert list(history[-1]) == ["step", "epoch", "seconds", "loss", "validation_loss", "validation_accuracy"]


def test_an_accuracy_that_there_is_not_is_refused_before_training():
    """It was refused after the first epoch."""
    told, rows = [], (X, X[:, :2])
    for validation in (rows, [rows]):  # a loader is read when it comes to it
        with pytest.raises(ValueError, match=r"its rows have no labels\. Give 'validation_loss'"):
            train(
                plain(),
                data=rows,
                loss="squared",
                keep_best="validation_accuracy",
                validation=validation,
                callbacks=[told.append],
            )
        assert len(told) == int(validation is not rows)
    train(plain().replace(apply_fn=lambda variables, x: MODEL.apply(variables, x)), rngs=(), epochs=1, loss="softmax")


def test_a_compiled_step_is_of_keyword_arguments_of_the_same_types():
    """That of True was taken for 1, as the two are equal."""

    one = plain()

    def step(**kwargs):
        return gradient_step(one, loss_of("softmax"), kwargs)

    assert step(k=1, of={"a": "b"}) is step(of={"a": "b"}, k=1)
    others = [step(k=k) for k in (1, True, 1.0, [1], [True], {"k": 1}, "1", None)]
    assert len(set(map(id, others))) == len(others)
    array = np.zeros(2)  # it may be changed in its place
    assert step(k=array) is not step(k=array)
    seen = []

    def apply_fn(variables, x, k, kind, rngs=None):
        seen.append((k, kind))
        return MODEL.apply(variables, x)

    state = TrainState.create(apply_fn=apply_fn, params=PARAMS, tx=optax.sgd(1e-2))
    for k in (1, True):
        given = {"train_kwargs": {"k": k, "kind": {"of": [k]}}, "eval_kwargs": {"k": k, "kind": None}}
        train(state, loss="softmax", epochs=1, validation=(X[:64], Y[:64]), **given)
    assert {type(k) for k, kind in seen if kind} == {type(k) for k, kind in seen if not kind} == {int, bool}
    assert all(type(k) is type(kind["of"][0]) for k, kind in seen if kind)


@pytest.mark.slow
def test_killed_again_and_again_it_ends_where_the_unbroken_run_ends(tmp_path):
    def killed(*when):
        process = Forked(tmp_path, "tests/resumed.py", tmp_path / "broken", *when, config=ADDS_NONE)
        return process.wait()[0] == -signal.SIGKILL

    def steps():
        return sorted(int(path.name) for path in (tmp_path / "broken").iterdir() if path.name.isdecimal())

    unbroken = resumed.main(str(tmp_path / "unbroken"), "never", 0)
    # In the first save; after a solve and an epoch of which nothing is saved. (Each moment of a save: test_checkpoint.)
    for when, saved in (("save 3", []), ("epoch 2", [5, 6, 9])):
        assert killed(*when.split()), when
        assert steps() == saved, when
    assert resumed.main(str(tmp_path / "broken"), "never", 0) == unbroken
