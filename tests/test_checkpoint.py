"""Checkpoints: what is restored is what was saved, to the bit, or the reason is said."""

import contextlib
import copy
import dataclasses
import functools
import json
import logging
import pickle
import shutil
import sys
import threading
import time
import warnings
import zlib
from pathlib import Path
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import cronos_flax as cf
from cronos_flax._alternation import checkpoint as _checkpoint
from cronos_flax._alternation import silence as _silence

ROOT = Path(__file__).resolve().parents[1]
X = jax.random.normal(jax.random.key(0), (32, 5))


pytestmark = pytest.mark.usefixtures("little_garbage")  # a damaged checkpoint makes Python collect it


class MLP(nn.Module):
    width: int = 6
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(8, param_dtype=self.dtype)(x))
        return nn.Dense(2)(nn.relu(nn.Dense(self.width)(x)))


@functools.cache
def made(seed=0, **kwargs):
    model = MLP(**kwargs)
    params = jax.jit(model.init)(jax.random.key(seed), X)["params"]
    head = cf.find_head(model, {"params": params}, X)
    return cf.CronosTrainState.create(
        apply_fn=model.apply,
        params=params,
        tx=optax.adamw(1e-3),
        head=head,
        model_state={"rng": jax.random.key(seed), "count": np.arange(3) + seed},
    )


BENT, SGD = cf.Cronos(loss="softmax"), optax.sgd(0.1)


class Bent(nn.Module):
    """Its parameters are those of ``MLP``."""

    turns: str = "tanh"

    @nn.compact
    def __call__(self, x):
        x = getattr(nn, self.turns)(nn.Dense(8)(x))
        return nn.Dense(2)(nn.relu(nn.Dense(6)(x)))


class BentNnx(nnx.Module):
    def __init__(self, turns):
        rngs = nnx.Rngs(0)
        self.turns, self.first = turns, nnx.Linear(5, 8, rngs=rngs)
        self.hidden, self.out = nnx.Linear(8, 6, rngs=rngs), nnx.Linear(6, 2, rngs=rngs)

    def __call__(self, x):
        return self.out(nnx.relu(self.hidden(self.turns(self.first(x)))))


def bent(turns, rows=X, tx=SGD):
    model = Bent(turns)
    params = jax.jit(model.init)(jax.random.key(0), X)["params"]
    head = cf.find_head(model, {"params": params}, rows)
    return cf.CronosTrainState.create(apply_fn=model.apply, params=params, tx=tx, head=head, solver=BENT)


def bent_nnx(turns, rows=X, tx=SGD):
    model = BentNnx(getattr(nnx, turns))
    head = cf.nnx.find_head(model, rows)
    return cf.nnx.CronosTrainState.create(model=model, tx=tx, head=head, solver=BENT)


@pytest.mark.parametrize("make", [bent, bent_nnx])
def test_another_function_of_the_same_parameters_is_told_of(tmp_path, make):
    """It went on with the parameters of the other one, without a word."""
    cf.save_checkpoint(tmp_path / "own", make("tanh"), 0)
    cf.restore_checkpoint(tmp_path / "own", make("tanh", X[:1]))  # the same, whatever the head was found on
    with pytest.warns(UserWarning, match=r"another function of the same parameters .* add 3 \(before: 1\)"):
        cf.restore_checkpoint(tmp_path / "own", make("gelu").replace(step=1))
    y = np.arange(len(X)) % 2
    run = {"epochs": 1, "batch_size": 16, "directory": tmp_path / "run"}
    cf.train(make("tanh"), (X, y), **run)
    with pytest.warns(UserWarning, match="restore_checkpoint: the backbone of `state`"):
        cf.train(make("swish"), (X, y), **run)


OTHER_SOLVERS = [
    (cf.Cronos(loss="softmax", beta=0.1), r"beta=0.1 \(before: None\)"),
    (cf.Cronos(loss="softmax", class_weight="balanced"), r"class_weight='balanced' \(before: None\)"),
    (cf.Cronos(loss="squared", beta_ratio=0.1), r"loss='squared' \(before: 'softmax'\), beta_ratio=0.1 \(before"),
]


@pytest.mark.parametrize(("solver", "differs"), OTHER_SOLVERS)
def test_a_solver_of_another_loss_or_weight_decay_is_told_of(tmp_path, solver, differs):
    """Its β was that of the checkpoint, and its loss compared with that of another one, without a word."""

    def state(solver):
        given = bent("tanh")
        create = functools.partial(cf.CronosTrainState.create, apply_fn=given.apply_fn, params=given.params, tx=SGD)
        return create(head=given.head, solver=solver)

    cf.save_checkpoint(tmp_path, state(BENT), 0)
    cf.restore_checkpoint(tmp_path, state(dataclasses.replace(BENT, max_iters=7)))
    with pytest.warns(UserWarning, match=f"the solver of `state` should be the one that was saved, got {differs}"):
        cf.restore_checkpoint(tmp_path, state(solver))


STEPS = optax.cosine_decay_schedule
SAME_OPTIMIZERS = [
    (optax.adam(1e-3), optax.adam(3e-2)),
    (optax.adam(STEPS(1e-3, 100)), optax.adam(STEPS(1e-2, 200))),
    (optax.MultiSteps(optax.adam(STEPS(1e-3, 100)), 2), optax.MultiSteps(optax.adam(STEPS(1e-3, 200)), 2)),
    (optax.lbfgs(), optax.lbfgs()),  # needs more than gradients and the loss: it is not known
]
OTHER_OPTIMIZERS = [
    (optax.MultiSteps(optax.adam(1e-3), 4), optax.MultiSteps(optax.adam(1e-3), 2), r"counts go by \[2\]"),
    (optax.apply_every(3), optax.apply_every(5), r"counts go by \[5\] \(before: \[3\]\)"),
    (optax.contrib.reduce_on_plateau(patience=5), optax.contrib.reduce_on_plateau(patience=7), r"go by \[7\]"),
    (optax.adam(1e-3), optax.adamw(1e-3), "mul 12 .before: 10"),
    (optax.sgd(0.1, 0.9), optax.sgd(0.1, 0.9, nesterov=True), "mul 6 .before: 4"),
]


def plain(tx):
    params = {"kernel": np.ones((3, 2), "float32"), "bias": jnp.ones(2)}
    return TrainState.create(apply_fn=None, params=params, tx=tx)


@pytest.mark.parametrize(("saved", "now"), SAME_OPTIMIZERS)
def test_another_rate_is_not_told_of(tmp_path, saved, now):
    cf.save_checkpoint(tmp_path, plain(saved), 0)
    cf.restore_checkpoint(tmp_path, plain(now))


@pytest.mark.parametrize(("saved", "now", "told"), OTHER_OPTIMIZERS)
def test_another_optimizer_with_a_state_of_the_same_structure_is_told_of(tmp_path, saved, now, told):
    """It went on with moments and accumulators of the other one, without a word."""
    cf.save_checkpoint(tmp_path, plain(saved), 0)
    with pytest.warns(UserWarning, match=f"restore_checkpoint: the optimizer of `state` .*{told}"):
        cf.restore_checkpoint(tmp_path, plain(now))


@pytest.mark.parametrize("make", [bent, bent_nnx])
def test_a_run_that_goes_on_with_another_accumulator_is_told_of(tmp_path, make):
    y = np.arange(len(X)) % 2
    run = {"epochs": 1, "batch_size": 16, "directory": tmp_path}
    cf.train(make("tanh", tx=optax.MultiSteps(optax.sgd(0.1), 2)), (X, y), **run)
    cf.train(make("tanh", tx=optax.MultiSteps(optax.sgd(0.2), 2)), (X, y), **run)
    with pytest.warns(UserWarning, match=r"Its operations: counts go by \[3, 4\] \(before: \[2\]\)"):
        cf.train(make("tanh", tx=optax.MultiSteps(optax.sgd(0.1), 4)), (X, y), **run)


def few(seed=0):
    """A leaf of each kind: what is restored some hundred times."""
    weights = np.random.default_rng(seed).normal(size=(8, 6)).astype("float32")
    return {"weights": jnp.asarray(weights), "rng": jax.random.key(seed), "count": np.arange(3) + seed, "step": seed}


def assert_same(a, b):
    a, b = (jax.tree_util.tree_leaves_with_path(tree) for tree in (a, b))
    assert [path for path, _ in a] == [path for path, _ in b]
    for (_, x), (_, y) in zip(a, b, strict=True):
        assert type(x) is type(y)
        if isinstance(x, jax.Array):
            assert x.dtype == y.dtype
            x, y = (jax.random.key_data(v) if jnp.issubdtype(v.dtype, jax.dtypes.prng_key) else v for v in (x, y))
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_train_state_comes_back_to_the_bit(tmp_path, dtype):
    saved = made(1, dtype=dtype).replace(step=7)
    cf.save_checkpoint(tmp_path / "run", saved, 7)
    assert_same(cf.restore_checkpoint(tmp_path / "run", made(2, dtype=dtype)), saved)


def test_an_nnx_model_and_its_optimizer_come_back(tmp_path):
    def fresh(seed):
        rngs = nnx.Rngs(seed)
        model = nnx.Sequential(nnx.Linear(5, 6, rngs=rngs), nnx.relu, nnx.Linear(6, 2, rngs=rngs))
        head = cf.nnx.find_head(model, X)
        return model, cf.nnx.CronosOptimizer(model, optax.adam(1e-3), head=head)

    saved, other = fresh(0), fresh(1)
    cf.save_checkpoint(tmp_path, nnx.state(saved), 0)
    nnx.update(other, cf.restore_checkpoint(tmp_path, nnx.state(other)))
    assert_same(nnx.as_pure(nnx.state(other)), nnx.as_pure(nnx.state(saved)))


def listed_at_first(leaves):
    """The list of leaves as the first versions wrote it, by a copy of each."""
    copies = {name: np.asarray(jax.device_get(leaf)) for name, leaf in leaves.items()}
    return {
        name: {"shape": list(copy.shape), "dtype": str(copy.dtype), "checksum": zlib.crc32(copy.tobytes())}
        for name, copy in copies.items()
    }


def test_checkpoints_of_the_first_versions_are_restored_and_new_ones_have_the_same_list(tmp_path, monkeypatch):
    cf.save_checkpoint(tmp_path / "new", made(1), 5)
    monkeypatch.setattr(_checkpoint, "_listed", listed_at_first)
    cf.save_checkpoint(tmp_path / "old", made(1), 5)
    monkeypatch.undo()
    new, old = ((tmp_path / name / "5" / "meta" / "metadata").read_text() for name in ("new", "old"))
    assert new == old
    assert_same(cf.restore_checkpoint(tmp_path / "old", made(2)), made(1))
    odd = {
        "empty": np.zeros((0, 3)),
        "turned": np.eye(3, 2)[::-1].T,
        "no": np.bool_(False),
        "half": X.astype("bfloat16"),
    }
    assert _checkpoint._listed(odd) == listed_at_first(odd)


def test_where_there_is_nothing_the_state_comes_back(tmp_path):
    state = made()
    assert cf.restore_checkpoint(tmp_path / "none", state) is state


def test_the_newest_that_is_sound_is_restored_and_a_stray_directory_is_no_checkpoint(tmp_path):
    for step in (3, 20):
        cf.save_checkpoint(tmp_path, made(step), step)
    assert_same(cf.restore_checkpoint(tmp_path, made()), made(20))
    assert_same(cf.restore_checkpoint(tmp_path, made(), step=3), made(3))
    (tmp_path / "99").mkdir()
    (tmp_path / "21.orbax-checkpoint-tmp").mkdir()
    with pytest.warns(UserWarning, match="restored step 20.*step 99"):
        assert_same(cf.restore_checkpoint(tmp_path, made()), made(20))
    cf.save_checkpoint(tmp_path, made(4), 99)
    assert_same(cf.restore_checkpoint(tmp_path, made()), made(4))
    assert (tmp_path / "99.damaged").is_dir()


def test_the_newest_are_kept_with_what_was_saved_beside_them_and_keys_stay_of_their_kind(tmp_path):
    def state(seed):
        return {"key": jax.random.key(seed, impl="rbg"), "weights": jnp.full(3, float(seed))}

    for step in (2, 9, 10):
        cf.save_checkpoint(tmp_path, state(step), step, extra={"note": [step, 0.1]}, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "10", "9"]
    restored, step, extra = _checkpoint.restored(tmp_path, state(0))
    assert_same(restored, state(10))
    assert (step, extra) == (10, {"note": [10, 0.1]})
    with pytest.raises(ValueError, match=r"`step` must be later than all .* got 3 beside \[10, 9\]"):
        cf.save_checkpoint(tmp_path, state(3), 3, keep=1)
    cf.save_checkpoint(tmp_path, state(3), 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "10", "3", "9"]


def test_sound_files_with_other_values_are_noticed(tmp_path):
    for step in (1, 2):
        cf.save_checkpoint(tmp_path / "run", made(step), step, extra={"note": step})
    first, second = (tmp_path / "run" / step / "state" for step in ("1", "2"))
    first.rename(tmp_path / "aside")
    second.rename(first)
    (tmp_path / "aside").rename(second)
    with pytest.raises(ValueError, match=r"kernel.*: other values than were saved"):
        cf.restore_checkpoint(tmp_path / "run", made())
    cf.save_checkpoint(tmp_path / "run", made(3), 3, extra={"note": 3})
    meta = tmp_path / "run" / "3" / "meta" / "metadata"
    meta.write_text(meta.read_text().replace("note", "mote"))
    with pytest.raises(ValueError, match="step 3: the list of its leaves has another checksum"):
        cf.restore_checkpoint(tmp_path / "run", made())


def test_any_flipped_byte_is_noticed_or_harmless(tmp_path):
    for step in (1, 2):
        cf.save_checkpoint(tmp_path, few(step), step)
    rng = np.random.default_rng(0)
    noticed = 0
    for file in sorted(path for path in (tmp_path / "2").rglob("*") if path.is_file()):
        sound = file.read_bytes()
        for place in {0, len(sound) - 1, *rng.integers(0, max(len(sound), 1), 3).tolist()} if sound else ():
            bad = bytearray(sound)
            bad[place] ^= 1 << int(rng.integers(8))
            file.write_bytes(bad)
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                restored = cf.restore_checkpoint(tmp_path, few())
            was_noticed = any("passed over" in str(warning.message) for warning in said)
            assert_same(restored, few(1 if was_noticed else 2))
            noticed += was_noticed
        file.write_bytes(sound)
    assert noticed > 10


class Moments:
    """Copies of a directory, one before each operation on files while it is watched: what a kill would leave there."""

    OPERATIONS = frozenset(["open", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "shutil.rmtree"])

    def __init__(self, directory):
        self.directory, self.seen, self.local, self.watching = directory, [], threading.local(), False
        sys.addaudithook(self.hook)  # for ever, but idle when nothing is watched

    def hook(self, event, _):
        if self.watching and event in self.OPERATIONS and not getattr(self.local, "copies", False):
            self.local.copies = True
            self.note()
            self.local.copies = False

    def note(self):
        files = {}
        for path in sorted(self.directory.rglob("*")):
            with contextlib.suppress(FileNotFoundError):  # TensorStore's threads go on
                files[path.relative_to(self.directory)] = path.read_bytes() if path.is_file() else None
        if files not in self.seen:
            self.seen.append(files)

    @contextlib.contextmanager
    def noted(self):
        self.watching = True
        yield
        self.watching = False
        self.note()

    def laid_out(self, parent):
        """Each in a directory of its own."""
        for number, files in enumerate(self.seen):
            for path, content in files.items():
                to = parent / str(number) / path
                (to if content is None else to.parent).mkdir(parents=True, exist_ok=True)
                if content is not None:
                    to.write_bytes(content)
            yield parent / str(number)


def test_a_save_may_be_killed_at_any_moment(tmp_path):
    for step in (1, 2):
        cf.save_checkpoint(tmp_path / "run", few(step), step)
    moments = Moments(tmp_path / "run")
    with moments.noted():
        cf.save_checkpoint(tmp_path / "run", few(3), 3, keep=2)
    found = []
    for directory in moments.laid_out(tmp_path / "left"):
        state, step, _ = _checkpoint.restored(directory, few())
        assert_same(state, few(step))
        found.append(step)
        if step == 2:  # then the run goes on, and comes to where it was killed
            cf.save_checkpoint(directory, few(3), 3, keep=2)
            assert_same(cf.restore_checkpoint(directory, few()), few(3))
    assert found == sorted(found)
    assert set(found) == {2, 3}
    assert len(found) > 20


def test_what_other_threads_say_of_damage_is_not_heard_for_a_while_and_the_hook_is_put_back(tmp_path, monkeypatch):
    """It stayed another one for the rest of the process."""
    monkeypatch.setattr(_silence, "_LATEST", 0.5)
    monkeypatch.setattr(_checkpoint, "silence", _silence.Silence())  # those before may not be over
    said = []
    monkeypatch.setattr(sys, "unraisablehook", hook := lambda unraisable: said.append(str(unraisable.exc_value)))
    cf.save_checkpoint(tmp_path, {"weights": np.zeros(3)}, 1)
    assert sys.unraisablehook is hook
    for file in (tmp_path / "1" / "meta").iterdir():
        file.write_text("")
    for _ in range(2):  # the second while the first is not yet over
        with pytest.raises(ValueError, match="none of the checkpoints"):
            cf.restore_checkpoint(tmp_path, {"weights": np.zeros(3)})
    for text in ("Event loop is closed", "another"):
        sys.unraisablehook(SimpleNamespace(exc_value=RuntimeError(text)))
    assert said == ["another"]
    cf.save_checkpoint(tmp_path, {"weights": np.zeros(3)}, 2)
    until = time.monotonic() + 20
    while sys.unraisablehook is not hook and time.monotonic() < until:
        time.sleep(0.05)
    assert sys.unraisablehook is hook


def test_checkpoints_that_are_read_side_by_side_leave_what_they_found(tmp_path, monkeypatch):
    """The second to begin put back the silence of the first, for the rest of the process."""
    monkeypatch.setattr(_silence, "_LATEST", 0.1)
    monkeypatch.setattr(_checkpoint, "silence", _silence.Silence())
    both = threading.Event()

    def manager(directory):
        if directory.name == "second":
            both.set()
            first.join()
        assert both.wait(60)
        raise OSError("damaged")

    def read(name):
        (tmp_path / name / "1").mkdir(parents=True)
        with pytest.raises(ValueError, match="none of the checkpoints"):
            cf.restore_checkpoint(tmp_path / name, {})

    def now():
        return sys.unraisablehook, logging.getLogger("absl").level, warnings.filters[:]

    monkeypatch.setattr(_checkpoint, "_manager", manager)
    before = now()
    first, second = (threading.Thread(target=read, args=(name,)) for name in ("first", "second"))
    first.start()
    while now() == before:
        time.sleep(0.01)
    second.start()
    second.join()
    until = time.monotonic() + 20
    while sys.unraisablehook is not before[0] and time.monotonic() < until:
        time.sleep(0.05)
    assert now() == before


def test_a_file_cut_short_or_gone_is_noticed(tmp_path):
    for step in (1, 2):
        cf.save_checkpoint(tmp_path, made(step), step)
    largest = max((tmp_path / "2").rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0)
    largest.write_bytes(largest.read_bytes()[:100])
    with pytest.warns(UserWarning, match="passed over what is damaged: step 2"):
        assert_same(cf.restore_checkpoint(tmp_path, made()), made(1))
    shutil.rmtree(tmp_path / "1" / "state")
    with pytest.raises(ValueError, match="none of the checkpoints"):
        cf.restore_checkpoint(tmp_path, made())


def test_what_does_not_fit_is_refused_with_the_reason(tmp_path):
    cf.save_checkpoint(tmp_path, made(), 5, extra={"note": [1, 0.1]})
    with pytest.raises(ValueError, match=r"kernel.*\(7, 2\), step 5 has float32 of shape \(6, 2\)"):
        cf.restore_checkpoint(tmp_path, made(width=7))
    with pytest.raises(ValueError, match="bfloat16"):
        cf.restore_checkpoint(tmp_path, made(dtype="bfloat16"))
    with pytest.raises(ValueError, match="has nothing"):
        cf.restore_checkpoint(tmp_path, {"a": jnp.zeros(1)})
    with pytest.raises(ValueError, match="must have arrays, freshly made, got shapes alone"):
        cf.restore_checkpoint(tmp_path, jax.eval_shape(made))
    with pytest.raises(ValueError, match="`step` 4 is not in"):
        cf.restore_checkpoint(tmp_path, made(), step=4)
    with pytest.raises(ValueError, match=r"`step` 5 is in .* already"):
        cf.save_checkpoint(tmp_path, made(1), 5)
    with pytest.raises(ValueError, match="`step` must be an integer"):
        cf.save_checkpoint(tmp_path, made(), -1)
    with pytest.raises(ValueError, match="`extra` must be what JSON takes"):
        cf.save_checkpoint(tmp_path, made(), 6, extra={1, 2})
    with pytest.raises(ValueError, match="`state` must have arrays"):
        cf.save_checkpoint(tmp_path, {}, 6)
    assert_same(cf.restore_checkpoint(tmp_path, made(1)), made())


OTHERS = ocp.args.StandardSave({"a": np.arange(3)})
MADE_BY_OTHERS = {
    "one item": OTHERS,
    "a state": ocp.args.Composite(state=OTHERS),
    "arrays as meta": ocp.args.Composite(state=OTHERS, meta=OTHERS),
    "a dict as meta": ocp.args.Composite(state=OTHERS, meta=ocp.args.JsonSave({"format": 1, "epoch": 3})),
    "a list as meta": ocp.args.Composite(state=OTHERS, meta=ocp.args.JsonSave([3])),
}


@pytest.mark.parametrize("name", list(MADE_BY_OTHERS))
def test_checkpoints_that_orbax_made_by_itself_are_left_alone(tmp_path, name):
    """One of the same step was put aside as damaged, and ``keep`` deleted the others, without a word."""
    with ocp.CheckpointManager(tmp_path) as manager:
        for step in (1, 2):
            manager.save(step, args=MADE_BY_OTHERS[name])
    for given in ({"step": 2}, {"step": 3, "keep": 1}):
        with pytest.raises(
            ValueError, match=r"save_checkpoint: `directory` must be for .*step 2 was made by something"
        ):
            cf.save_checkpoint(tmp_path, made(), **given)
    with pytest.raises(ValueError, match=r"restore_checkpoint: `directory` must be for checkpoints of cf.save_checkp"):
        cf.restore_checkpoint(tmp_path, made())
    with ocp.CheckpointManager(tmp_path) as manager:
        assert manager.all_steps() == [1, 2]


@pytest.mark.parametrize("lost", [["state"], ["meta"], ["state", "meta"]])
def test_a_checkpoint_that_lost_parts_is_one_of_ours_still(tmp_path, lost):
    """It was refused as another's where both parts were gone, and the sound one before it with it."""
    state = made()
    for step in (1, 2):
        cf.save_checkpoint(tmp_path, state, step)
    for part in lost:
        shutil.rmtree(tmp_path / "2" / part)
    with pytest.warns(UserWarning, match="restored step 1 .*passed over what is damaged: step 2"):
        cf.restore_checkpoint(tmp_path, state)


def test_an_unknown_format_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(_checkpoint, "_FORMAT", "cronos_flax checkpoint 99")
    cf.save_checkpoint(tmp_path, made(), 1)
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"must be of the format 'cronos_flax checkpoint 1', got .* 99"):
        cf.restore_checkpoint(tmp_path, made())


def test_a_directory_that_cannot_be_written_to_is_said(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(OSError, match="file"):
        cf.save_checkpoint(file / "run", made(), 1)


def test_nothing_is_pickled(tmp_path):
    cf.save_checkpoint(tmp_path, made(), 1)
    meta = json.loads(next((tmp_path / "1" / "meta").glob("metadata")).read_text())
    assert meta["format"] == "cronos_flax checkpoint 1"
    assert not [path for path in Path(tmp_path).rglob("*") if path.suffix in (".pkl", ".pickle")]


@pytest.mark.parametrize("again", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_what_flax_pickles_is_pickled_with_its_head_solver_and_solution(again):
    """Not a whole train state: the functions of Optax are local, and Flax's own fails too."""
    state, solver, y = made(), cf.Cronos(max_iters=2), X[:, :2]
    variables, net = {"params": state.params}, BentNnx(abs)  # JAX itself refuses nn.tanh
    _, solution = cf.fit_head(state.head, variables, (X, y), solver=solver)
    head, solver, before, arrays = again((state.head, solver, solution, (state.params, state.opt_state)))
    _, after = cf.fit_head(head, variables, (X, y), solver=solver)
    for one in (before, after):
        jax.tree.map(np.testing.assert_array_equal, solution.params, one.params)
    jax.tree.map(np.testing.assert_array_equal, (state.params, state.opt_state), arrays)
    of_nnx = cf.nnx.find_head(net, X)
    features = of_nnx.inputs(net, X)
    np.testing.assert_array_equal(again(of_nnx).inputs(net, X), features)


def test_arrays_of_size_zero_come_back(tmp_path):
    """GaLore has them for biases: Orbax refused them at the first save."""
    state = {"empty": jnp.zeros((0, 3), jnp.bfloat16), "of NumPy": np.zeros((2, 0)), "full": jnp.arange(3)}
    cf.save_checkpoint(tmp_path, state, 1)
    back = cf.restore_checkpoint(tmp_path, jax.tree.map(lambda leaf: leaf + 1, state))
    for name, leaf in state.items():
        np.testing.assert_array_equal(back[name], leaf, strict=True)
        assert type(back[name]) is type(leaf)
    with pytest.raises(ValueError, match=r"at \['empty'\] it has bfloat16 of shape \(0, 4\), step 1 has .* \(0, 3\)"):
        cf.restore_checkpoint(tmp_path, state | {"empty": jnp.zeros((0, 4), jnp.bfloat16)})
    with pytest.raises(ValueError, match="`state` must have arrays"):
        cf.save_checkpoint(tmp_path, {"empty": state["empty"]}, 2)


def test_numpy_arrays_of_64_bits_come_back_in_the_bits_of_a_device(tmp_path):
    """As those of a model that a run begins with: after a step they have 32, and the run could not go on."""
    fresh = {"table": np.arange(3.0), "count": np.arange(2)}
    cf.save_checkpoint(tmp_path, jax.jit(lambda tree: tree)(fresh), 1)
    back = cf.restore_checkpoint(tmp_path, fresh)
    assert [str(leaf.dtype) for leaf in jax.tree.leaves(back)] == ["int32", "float32"]
    jax.tree.map(np.testing.assert_array_equal, back, fresh)
    with pytest.raises(ValueError, match="it has float64"):
        cf.restore_checkpoint(tmp_path, {**fresh, "count": np.arange(2.0)})
