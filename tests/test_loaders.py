"""``cf.train`` on loaders as they are: endless, augmented, shuffled; and a directory that knows its data."""

from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest
from conftest import drawn
from flax.training.train_state import TrainState
from given import HEAD, MODEL, PARAMS, Interface, X, Y, alternating, batched, plain, same, train

import cronos_flax as cf
from cronos_flax._alternation import position, sources
from cronos_flax._head import data, fingerprint

# ------------------------------------------------------------------------------------------------ real loaders


class Endless:
    """A loader that never ends, of batches 0, 1, 2, … of rows."""

    def __init__(self, limit=10**9):
        self.started, self.limit = 0, limit

    def __iter__(self):
        self.started += 1
        for i in range(self.limit):
            rows = np.random.default_rng(i).integers(0, 256, 64)
            yield X[rows], Y[rows]


def test_epochs_of_a_loader_that_does_not_end_are_so_many_batches(unsolved):
    """Before: such a loader never ended."""
    state, history = train(data=Endless(), steps_per_epoch=3, epochs=2)
    assert [row["step"] for row in history] == [3, 6]
    six, _ = train(data=list(Endless(6)), epochs=1)
    same(state.params, six.params)  # the second epoch goes on where the first one ended
    again, _ = train(data=Endless(6), steps_per_epoch=4, epochs=3)
    twice, _ = train(data=Endless(6), epochs=2)
    same(again.params, twice.params)  # a loader that ends begins again
    train(alternating(), data=Endless(), steps_per_epoch=3)
    assert {len(batches) for batches in unsolved} == {3}


def test_epochs_of_arrays_may_be_shorter_or_longer_than_a_pass():
    whole, _ = train(epochs=3)
    for steps, epochs in ((2, 6), (6, 2)):
        other, history = train(epochs=epochs, steps_per_epoch=steps)
        same(whole.params, other.params)
        assert [row["step"] for row in history] == [steps * (i + 1) for i in range(epochs)]


def test_an_endless_run_goes_on_where_it_stopped(tmp_path):
    class StopError(Exception):
        pass

    def stop(row):
        if row["step"] == 6:
            raise StopError

    arguments = {"steps_per_epoch": 3, "epochs": 4}
    whole, _ = train(data=Endless(), **arguments)
    with pytest.raises(StopError):
        train(data=Endless(), **arguments, directory=tmp_path, save_every=2, callbacks=[stop])
    resumed, _ = train(data=Endless(), **arguments, directory=tmp_path, save_every=2)
    same(whole.params, resumed.params)
    with pytest.raises(ValueError, match="holds a run with steps_per_epoch=3"):
        train(data=Endless(), directory=tmp_path, steps_per_epoch=4)


def test_a_loader_may_write_its_next_batch_into_the_memory_of_the_last():
    """JAX takes such memory as it is: features and gradients were of rows that came later, without a word."""

    def loader(wrapped):
        x, y = np.empty((64, 5), X.dtype), np.empty(64, int)
        for i in range(0, 256, 64):
            x[:], y[:] = X[i : i + 64], Y[i : i + 64]
            yield wrapped(x), wrapped(y)

    def unpack(batch):
        return {"x": {"whole": batch[0]}}, batch[1], batch[1] + 1

    for wrapped in (np.asarray, Interface):
        seen = list(data.UserData(loader(wrapped)).batches())
        np.testing.assert_array_equal(np.concatenate([batch.args[0] for batch in seen]), X[:256])
    seen = list(data.UserData(loader(np.asarray), unpack).batches())
    np.testing.assert_array_equal(np.concatenate([batch.kwargs["x"]["whole"] for batch in seen]), X[:256])
    for name, expected in {"y": Y, "weight": Y + 1}.items():
        np.testing.assert_array_equal(np.concatenate([getattr(batch, name) for batch in seen]), expected[:256])


def test_solves_can_be_on_rows_of_their_own(unsolved):
    """Before: solves were on augmented rows."""
    clean = X[:128], Y[:128]
    train(alternating(), data=batched(X + 1), solve_data=clean)
    assert len(unsolved) == 2
    for batches in unsolved:
        np.testing.assert_array_equal(np.concatenate([batch.args[0] for batch in batches]), clean[0])
    unsolved.clear()
    train(alternating(), data=batched(X + 1), solve_data=clean, solve_rows=64)
    assert {len(batch.y) for batches in unsolved for batch in batches} == {64}


class Noisy(nn.Module):
    """A module with two streams of random numbers in training."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.Dropout(0.3, deterministic=not train)(nn.tanh(nn.Dense(8)(x)))
        if train:
            x += 0.1 * jax.random.normal(self.make_rng("noise"), x.shape)
        return nn.Dense(2)(nn.relu(nn.Dense(6)(x)))


def test_a_module_gets_the_rng_streams_that_are_named():
    """Before: only dropout was fed."""
    model = Noisy()
    params = model.init(jax.random.key(0), X, train=False)["params"]

    def run(**kwargs):
        return train(plain(params, model.apply), train_kwargs={"train": True}, **kwargs)[0].params

    def differ(a, b):
        return not np.array_equal(jax.tree.leaves(a)[0], jax.tree.leaves(b)[0])

    named = run(rngs=("dropout", "noise"))
    same(named, run(rngs=["noise", "dropout"]))
    assert differ(named, run(rngs=("dropout", "noise"), key=jax.random.key(3)))
    one, two, three = jax.random.split(jax.random.key(0), 3)
    keys = {"dropout": one, "noise": two}
    given = run(rngs=keys)
    same(given, run(rngs=keys))
    assert differ(given, run(rngs={**keys, "noise": three}))
    with pytest.raises(ValueError, match=r"(?s)the module needs a random stream, and .* got \['dropout'\].*noise"):
        run()


def test_each_step_has_random_numbers_of_its_own():
    seen = []

    def apply_fn(variables, x, rngs):
        jax.debug.callback(lambda draw: seen.append(float(draw)), jax.random.uniform(rngs["noise"]))
        return MODEL.apply(variables, x)

    train(plain(apply_fn=apply_fn), rngs=("noise",))
    jax.effects_barrier()
    assert len(set(seen)) == 8


def test_an_error_in_eval_params_is_raised():
    """Before: it was swallowed."""

    class Averaged(TrainState):
        @property
        def eval_params(self):
            return self.avrage

    with pytest.raises(AttributeError, match="avrage"):
        train(plain(kind=Averaged), validation=(X, Y))


# ------------------------------------------------------------------------------------------------ the data of a run


class Shuffled:
    """A loader with another order at each pass."""

    def __init__(self, x=X):
        self.rng, self.x = np.random.default_rng(0), x

    def __iter__(self):
        for rows in self.rng.permutation(256).reshape(4, 64):
            yield self.x[rows], Y[rows]


SWAPPED = Y[:256].copy()
SWAPPED[:2] = 1 - SWAPPED[:2]
OTHERS = {
    "other values": ((X[:256] + 1, Y[:256]), "other `data`: x has other values"),
    "other labels": ((X[:256], SWAPPED), "other `data`: y has other values"),
    "fewer rows": ((X[:128], Y[:128]), r"other `data`: x has other shape, \[128, 5\] for \[256, 5\]"),
    "another type": ((X[:256], Y[:256].astype("int16")), "other `data`: y has other dtype, int16"),
    "a tree": (({"a": X[:256]}, Y[:256]), "other `data`: it had the arrays x, y, and has x/a, y"),
    "a loader": (batched(X, Y), "other `data`: it had the arrays x, y, and has"),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs")
    train(directory=directory / "arrays")
    train(data=batched(), directory=directory / "batches")
    train(data=Shuffled(), directory=directory / "shuffled")
    return directory


@pytest.mark.parametrize("case", OTHERS)
def test_a_directory_is_of_one_set_of_data(saved, case):
    """Before: the first run's parameters came back."""
    data, message = OTHERS[case]
    train(directory=saved / "arrays")
    apply_fn = (lambda v, x: MODEL.apply(v, x["a"])) if case == "a tree" else MODEL.apply
    with pytest.raises(ValueError, match=message):
        train(plain(apply_fn=apply_fn), data, directory=saved / "arrays")


def guarded(**settings):
    return plain(kind=cf.CronosTrainState, head=HEAD, solver=cf.Cronos(loss="softmax"), guard=cf.Guard(**settings))


def began_with(change):
    return alternating().replace(params=jax.tree.map(change, PARAMS))


OTHER_RUNS = {
    "another weight decay": (
        lambda: alternating(beta=0.3),
        {},
        "with solver.beta='None', and this one has '0.3'",
    ),
    "weights of classes": (lambda: alternating(class_weight="balanced"), {}, "a run with solver.class_weight"),
    "another guard": (lambda: guarded(tolerance=0.5), {}, "a run with guard.tolerance='0.01', and this one has '0.5'"),
    "another start": (lambda: began_with(lambda leaf: leaf + 1), {}, "began with other parameters"),
    "keyword arguments": (alternating, {"train_kwargs": {"mode": X[:3]}}, "a run with train_kwargs='{}'"),
    "fewer epochs": (alternating, {"epochs": 1}, "a run of 2 epochs, and `epochs` is 1"),
}


@pytest.mark.parametrize("case", OTHER_RUNS)
def test_a_directory_is_of_one_solver_guard_and_start(tmp_path, unsolved, case):
    """The figures of the first run were given for those of a second one with another weight decay, or another seed."""
    made, arguments, message = OTHER_RUNS[case]
    train(alternating(), directory=tmp_path)
    with pytest.raises(ValueError, match=message):
        train(made(), directory=tmp_path, **arguments)


def test_a_directory_is_gone_on_with_from_the_start_or_from_what_it_has_come_to(tmp_path, unsolved):
    state, _ = train(alternating(), directory=tmp_path)
    train(began_with(lambda leaf: leaf * np.float32(1 + 1e-6)), directory=tmp_path)  # as another device draws it
    state, history = train(state, directory=tmp_path, epochs=3)
    again, same_history = train(alternating(), directory=tmp_path, epochs=3)
    same(state.params, again.params)
    assert history == same_history


def test_a_directory_knows_a_loss_of_ones_own_in_another_process():
    class Own(cf.Loss):
        pass

    assert position.said(Own()) == position.said(Own())


def test_a_directory_knows_a_loader_by_its_first_batch(saved):
    train(data=batched(), directory=saved / "batches")
    with pytest.raises(ValueError, match="other `data`: argument/0 has other values"):
        train(data=batched(X + 1), directory=saved / "batches")
    train(data=Shuffled(), directory=saved / "shuffled")  # another first batch: it is known by shapes and dtypes
    with pytest.raises(ValueError, match="other `data`: argument/0 has other dtype"):
        train(data=Shuffled(X.astype("float16")), directory=saved / "shuffled")


def test_with_a_directory_too_objects_are_refused_by_the_check_of_batches(tmp_path):
    with pytest.raises(ValueError, match="the module's arguments must be numbers, got dtype object"):
        train(data=(X.astype(object), Y), directory=tmp_path)


def test_a_directory_costs_two_readings_of_a_loader_for_each_that_is_given(tmp_path, unsolved):
    """Without `solve_data` there were four."""
    opened = []
    for arguments in ({}, {"directory": tmp_path / "one"}, {"directory": tmp_path / "two", "solve_data": Endless(4)}):
        loader = Endless(4)
        train(alternating(), data=loader, epochs=1, **arguments)
        opened.append(loader.started)
    assert opened[1] == opened[0] + 2
    assert arguments["solve_data"].started >= 2


def test_of_large_arrays_some_rows_are_read(monkeypatch):
    monkeypatch.setattr(sources, "_READ_BYTES", 100)
    monkeypatch.setattr(fingerprint, "_READ_ROWS", 10)

    def mark(x):
        return sources.Arrays.of(data.UserData((x, Y)), 64, None, jax.random.key(0)).fingerprint()

    assert mark(X) == mark(X.copy())
    assert fingerprint.difference(mark(X), mark(X + 1)) == "x has other values"


class BatchStatsState(TrainState):
    """As in Flax's examples."""

    batch_stats: Any


def test_collections_in_a_field_of_another_name_are_told_of():
    """The error was of the batch."""
    model = nn.Sequential([nn.Dense(8), nn.BatchNorm(use_running_average=False), nn.relu, nn.Dense(2)])
    variables = drawn(model, jax.random.key(0), X)
    for given, got in (
        (BatchStatsState.create, {"batch_stats": variables["batch_stats"]}),
        (TrainState.create, {}),
    ):
        state = given(apply_fn=model.apply, params=variables["params"], tx=optax.sgd(0.1), **got)
        with pytest.raises(
            ValueError, match=r"train: `state` must have .* `model_state`, .*got none\. .*`batch_stats`"
        ):
            train(state)


class Stream:
    """A loader that goes on where it stopped, whenever it is asked for an iterator."""

    def __init__(self, count):
        self.batches = iter(batched(count=4) * (count // 4))

    def __iter__(self):
        return self.batches


def test_a_directory_loses_no_batch_of_a_loader_that_goes_on_where_it_stopped(tmp_path):
    """Two batches were read to know the data again, and gone, without a word."""
    expected, _ = train(epochs=2, data=batched())
    for directory in (None, tmp_path):
        state, _ = train(epochs=2, data=Stream(8), steps_per_epoch=4, directory=directory)
        assert int(state.step) == 8
        same(state.params, expected.params)
    resumed, _ = train(epochs=3, data=Stream(12), steps_per_epoch=4, directory=tmp_path)
    same(resumed.params, train(epochs=3, data=batched())[0].params)


class Resumed:
    """A loader whose every iterator goes on where the last one was left, and ends with the pass."""

    def __init__(self):
        self.place = 0

    def __iter__(self):
        while self.place < 4:
            self.place += 1
            yield batched()[self.place - 1]
        self.place = 0


class Restarting:
    """A loader with one iterator, which begins anew when it is asked for, as PyTorch's with persistent workers."""

    def __init__(self):
        self.place, self.batches = 0, batched()
        self.iterator = _Places(self)

    def __iter__(self):
        self.place = 0
        return self.iterator


class _Places:
    def __init__(self, loader):
        self.loader = loader

    def __iter__(self):
        return self

    def __next__(self):
        if self.loader.place == len(self.loader.batches):
            raise StopIteration
        self.loader.place += 1
        return self.loader.batches[self.loader.place - 1]


def test_a_directory_leaves_solves_whole_where_one_loader_is_given_for_steps_and_solves(tmp_path, unsolved):
    """To know the loader twice began it anew: the first solve had its first batch only, without a word."""
    loader = Restarting()
    train(alternating(), loader, solve_data=loader, directory=tmp_path)
    assert {len(batches) for batches in unsolved} == {4}


LOADERS = {
    "a stream": (lambda: Stream(8), {"steps_per_epoch": 4}),
    "goes on": (Resumed, {}),
    "goes on, by steps": (Resumed, {"steps_per_epoch": 4}),
    "begins anew": (Restarting, {}),
    "a list": (batched, {}),
}


SOLVES = "none", "of their own rows", "of the same"
CASES = [(case, solves) for case in LOADERS for solves in SOLVES if (case, solves) != ("a stream", SOLVES[2])]


@pytest.mark.parametrize(("case", "solves"), CASES)
def test_compilation_first_loses_no_batch(unsolved, case, solves):
    """The batch that was read to compile a step was gone, without a word."""
    make, given = LOADERS[case]

    def trained(loader, **others):
        if solves == "none":
            return train(plain(), loader, **given, **others)[0]
        data = loader if solves == "of the same" else batched()
        return train(alternating(), loader, solve_data=data, **given, **others)[0]

    state = trained(make(), compile_first=True)
    assert int(state.step) == 8
    same(state.params, trained(make()).params)


def test_a_solve_within_an_epoch_does_not_end_it(unsolved):
    """It did, without a word: the solve read what was left of the one iterator that there was."""
    state, _ = train(alternating(), batched(), solve_every=3, epochs=1)
    assert int(state.step) == 4
    for same_loader in (False, True):
        loader = Restarting()
        with pytest.raises(ValueError, match=r"iterator of its own, got a Restarting .*solve_data="):
            train(alternating(), loader, solve_every=3, solve_data=loader if same_loader else None)
    state, _ = train(alternating(), Restarting(), solve_every=3, solve_data=batched(), epochs=1)
    assert int(state.step) == 4


def test_a_loader_that_has_ended_is_told_of():
    """The error did not say why there were no batches."""
    with pytest.raises(ValueError, match=r"train: `data` must have at least one batch .*An iterator \(Stream\)"):
        train(epochs=2, data=Stream(8))


@pytest.mark.parametrize("error", [TypeError, NotImplementedError])
def test_a_loader_may_raise_where_it_is_asked_for_its_length(error):
    """PyTorch's over an IterableDataset does: fits and solves ended with its TypeError."""

    class Unsized:
        def __iter__(self):
            return (batch for batch in batches)

    class Raising(Unsized):
        def __len__(self):
            raise error("has no len()")

    batches = batched()
    (state, history), (expected, _) = (train(alternating(max_iters=1), loader()) for loader in (Raising, Unsized))
    assert any("objective" in row for row in history)
    same(state.params, expected.params)


@pytest.mark.filterwarnings("ignore:shape requires ndarray")  # of JAX, to a module that is given lists
@pytest.mark.parametrize(
    ("apply_fn", "data", "message"),
    [
        (MODEL.apply, [(X[:64].tolist(), Y[:64])], r"arguments of shapes \('a list of numbers, which is no array',\)"),
        (MODEL.apply, [(X[:64] + 0j, Y[:64])], "the module must return floats, got complex64"),
        (
            lambda *of, **how: (MODEL.apply(*of, **how), 0),
            [(X[:64], Y[:64])],
            r"return one array .*, got \(\(64, 2\), \(\)\)\. Choose .* without a head, by its apply_fn",
        ),
        (lambda *of, **how: MODEL.apply(*of, **how).sum(), [(X[:64], Y[:64])], r"must return one array \(\.\.\., C\)"),
    ],
)
def test_what_a_model_takes_and_gives_is_said(apply_fn, data, message):
    """Lists were printed number by number; other outputs gave an error of JAX, or none of `shape`."""
    with pytest.raises(ValueError, match=message) as raised:
        train(plain(apply_fn=apply_fn), data)
    assert len(str(raised.value)) < 1000
