"""Features that memory should not hold: written to a temporary file by the fit itself, and read in blocks."""

import gc
import itertools
import os
import threading
import time
import tracemalloc
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import pytest
from disks import largest_file
from flax import nnx
from given import HEAD, PARAMS, alternating, batched

import cronos_flax as cf
from cronos_flax._head import features as features_module
from cronos_flax._head import fit, room
from cronos_flax._solver import memory
from cronos_flax._solver.blocks import Source

VARIABLES = {"params": PARAMS}
ROWS = 5_000  # curvature is taken from a sample
X = np.random.default_rng(0).normal(size=(ROWS, 5)).astype("float32")
Y = (X[:, 0] * X[:, 1] > 0).astype(int)
FEW = 2**10  # bytes


def solver(**kwargs):
    return cf.Cronos(**{"loss": "softmax", "max_iters": 3, **kwargs})


def weighted(batch):
    x, y = batch
    return (x,), y, np.where(np.arange(len(y)) % 3 == 0, 0.0, 1.0 + np.arange(len(y)) % 2)


def close(one, two):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-8)


@pytest.fixture
def double():
    """Rounding to float32 grows a hundredfold with each of the first steps; in float64 it stays small."""
    with jax.enable_x64(True):
        yield jax.tree.map(lambda leaf: np.asarray(leaf, "float64"), VARIABLES), X.astype("float64")


def without_names():
    """Files that this process holds and that have no name any more."""
    gc.collect()
    links = (os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.is_symlink())
    maps = Path("/proc/self/maps").read_text().splitlines()
    return [line for line in itertools.chain(links, maps) if "(deleted)" in line and "tmp" in line]


@pytest.fixture
def room_for_files(tmp_path, monkeypatch):
    """A directory for temporary files, in which nothing is left."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = without_names()
    yield tmp_path
    assert list(tmp_path.iterdir()) == []
    assert without_names() == before


@pytest.fixture
def streamed(monkeypatch):
    """The shapes of features that solves have read in blocks."""
    shapes, made = [], fit.as_source

    def as_source(X):
        shapes.append((type(X), X.shape))
        return made(X)

    monkeypatch.setattr(fit, "as_source", as_source)
    return shapes


@pytest.mark.usefixtures("room_for_files")
@pytest.mark.parametrize("unpack", [None, weighted])
def test_a_fit_that_memory_should_not_hold_is_the_fit_in_memory(streamed, double, unpack):
    variables, x = double
    data = batched(x, Y, rows=500, count=10)
    whole, in_memory = cf.fit_head(HEAD, variables, data, solver=solver(max_bytes=2**40), unpack=unpack)
    assert not streamed
    parts, in_file = cf.fit_head(HEAD, variables, data, solver=solver(max_bytes=FEW), unpack=unpack)
    ((kind, shape),) = streamed
    assert kind is np.memmap
    assert shape == (ROWS if unpack is None else 3_330, 8)
    close(whole, parts)
    np.testing.assert_allclose(in_memory.stats.objective_trace, in_file.stats.objective_trace, rtol=1e-8)
    assert in_memory.stats.objective < 0.95 * in_memory.stats.initial_objective


@pytest.mark.usefixtures("room_for_files")
def test_features_that_are_at_hand_are_read_in_blocks_too(tmp_path_factory, streamed, double):
    variables, x = double
    data = batched(x, Y, rows=500, count=10)
    in_memory = cf.gather_features(HEAD, variables, data)
    in_files = cf.gather_features(HEAD, variables, data, cache=tmp_path_factory.mktemp("cache"))
    whole, _ = cf.fit_head(HEAD, variables, in_files, solver=solver(max_bytes=2**40))
    assert not streamed
    for features in (in_memory, in_files):
        close(whole, cf.fit_head(HEAD, variables, features, solver=solver(max_bytes=FEW))[0])
    assert [kind for kind, _ in streamed] == [np.ndarray, np.memmap]


@pytest.mark.usefixtures("room_for_files")
def test_solves_of_an_alternation_write_to_a_file_too(streamed):
    """The first one also looks at the gradient on some of the rows, and the guard at the loss."""
    data = batched(X, Y, rows=500, count=10)
    one, two = (alternating(max_iters=1, max_bytes=most).solve_head(data) for most in (2**40, FEW))
    assert streamed
    assert float(one[1].stats.objective) == pytest.approx(float(two[1].stats.objective), rel=1e-3)
    assert float(one[0].beta) == pytest.approx(float(two[0].beta), rel=1e-3)
    model = nnx.Sequential(nnx.Linear(5, 6, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(6, 2, rngs=nnx.Rngs(1)))
    head, before = cf.nnx.find_head(model, X[:64]), len(streamed)
    solution = cf.nnx.fit_head(head, model, data, solver=solver(max_bytes=FEW))
    assert len(streamed) == before + 1
    assert solution.stats.objective < solution.stats.initial_objective


@pytest.mark.usefixtures("room_for_files")
def test_a_head_of_low_precision_is_compared_in_blocks(streamed):
    """What is gained in float32 may be lost in bfloat16, so the loss is looked at again."""
    low = jax.tree.map(lambda leaf: leaf.astype("bfloat16"), HEAD.read(VARIABLES))
    rows, _ = HEAD.gather(VARIABLES, (X, Y), most_bytes=FEW)
    network, solution = fit.fit_rows(low, rows, solver(max_bytes=FEW), None, None, throw=True)
    assert len(streamed) == 2
    assert network is not None
    X_sorted, y = rows.X[rows.order], rows.y[rows.order]
    again = solver().objective(solution.params, X_sorted, y, solution.stats.beta)
    assert float(solution.stats.objective) == pytest.approx(float(again), rel=1e-5)


@pytest.mark.usefixtures("room_for_files")
@pytest.mark.parametrize("stops_in", ["the data", "the solve"])
def test_after_an_exception_nothing_is_left(stops_in):
    def data():
        yield from batched(X, Y, rows=500, count=9)
        if stops_in == "the data":
            raise KeyError("enough")

    def callback(figures):
        if "objective" in figures:
            raise KeyError("enough")

    with pytest.raises(KeyError, match="enough"):
        cf.fit_head(HEAD, VARIABLES, data(), solver=solver(max_bytes=FEW), callback=callback)


@pytest.mark.usefixtures("room_for_files")
def test_a_disk_without_room_is_named_with_what_is_needed():
    batches, one = batched(X, Y, rows=500, count=10), solver(max_bytes=20_000)
    cases = (((X, Y), "about 0.16 MB"), (batches, "about 0.16 MB"), (iter(batches), "more than that"))
    for data, needed in cases:
        with largest_file(50_000), pytest.raises(OSError, match=rf"(?s)max_bytes.*{needed}.*TMPDIR.*cache=DIRECTORY"):
            cf.fit_head(HEAD, VARIABLES, data, solver=one)


@pytest.mark.usefixtures("room_for_files")
def test_a_disk_that_is_too_small_is_not_filled(monkeypatch):
    monkeypatch.setattr(room.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 100_000}))
    with pytest.raises(OSError, match=r"0.10 MB are free, and they need about 0.16 MB"):
        cf.fit_head(HEAD, VARIABLES, (X, Y), solver=solver(max_bytes=20_000))


def test_features_that_are_to_be_in_memory_and_do_not_fit_are_refused(monkeypatch):
    monkeypatch.setattr(room, "available", lambda: 20_000)
    with pytest.raises(MemoryError, match=r"gather_features: .*0\.0. MB are free.*cache=DIRECTORY"):
        cf.gather_features(HEAD, VARIABLES, batched(X, Y, rows=500, count=10))


def test_a_path_of_weight_decays_says_that_it_needs_memory(tmp_path):
    path = cf.Cronos(loss="softmax", beta="path", max_iters=2, max_bytes=FEW)
    features = cf.gather_features(HEAD, VARIABLES, (X, Y), cache=tmp_path)
    with pytest.raises(ValueError, match=r'beta="path" needs the features in memory.*max_bytes'):
        cf.fit_head(HEAD, VARIABLES, features, solver=path)


def test_features_are_in_memory_once_or_not_at_all():
    """Of 16,384 rows of 512 features, 34 MB, in batches of 256, half a MB each."""
    model = nn.Sequential([nn.Dense(512), nn.tanh, nn.Dense(2), nn.relu, nn.Dense(2)])
    variables = jax.jit(model.init)(jax.random.key(0), X[:2])
    head = cf.find_head(model, variables, X[:256])
    data, peak = [(np.roll(X, i, 0)[:256], Y[:256]) for i in range(64)], {}
    head.gather(variables, data[:1])
    for most in (None, 2**20):
        tracemalloc.start()
        rows, _ = head.gather(variables, data, most_bytes=most)
        peak[most] = tracemalloc.get_traced_memory()[1] / rows.X.nbytes
        tracemalloc.stop()
        assert rows.X.nbytes == 2**25
    assert 0.95 < peak[None] < 2.1  # sorted at one stroke: it is less than `room._STEP`
    assert peak[2**20] < 0.4


@pytest.mark.parametrize("step", [2**6, 2**10, 2**26])
def test_rows_are_reordered_in_place(monkeypatch, step):
    monkeypatch.setattr(room, "_STEP", step)
    order, kept = np.random.default_rng(1).permutation(ROWS), np.tile(X, 9)
    expected = kept[order]
    room.reorder(kept, order)
    np.testing.assert_array_equal(kept, expected)


def test_room_grows_as_rows_come(monkeypatch):
    monkeypatch.setattr(room, "_STEP", 2**10)
    kept = room.Room(None, "here")
    for part in np.array_split(X, 37):
        kept.add(part, None)
    np.testing.assert_array_equal(kept.all(), X)


def test_what_is_free_is_what_the_machine_and_the_control_groups_leave(tmp_path):
    def write(path, text):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
        memory._with_a_limit.cache_clear()  # another machine

    assert memory.available(tmp_path) is None
    write("proc/meminfo", "MemTotal: 9000 kB\nMemAvailable: 5000 kB\n")
    assert memory.available(tmp_path) == 5000 * 1024
    write("proc/self/cgroup", "0::/job/step\n")
    write("sys/fs/cgroup/job/step/memory.max", "max\n")
    write("sys/fs/cgroup/job/step/memory.current", "70000\n")
    assert memory.available(tmp_path) == 5000 * 1024
    write("sys/fs/cgroup/job/memory.max", "100000\n")
    write("sys/fs/cgroup/job/memory.current", "80000\n")
    write("sys/fs/cgroup/job/memory.stat", "anon 50000\nactive_file 4000\ninactive_file 1000\n")
    assert memory.available(tmp_path) == 25_000
    write("proc/self/cgroup", "5:cpu:/\n4:memory:/\n")
    write("sys/fs/cgroup/memory/memory.limit_in_bytes", "60000\n")
    write("sys/fs/cgroup/memory/memory.usage_in_bytes", "90000\n")
    assert memory.available(tmp_path) == 0
    write("sys/fs/cgroup/memory/memory.limit_in_bytes", f"{2**63 - 4096}\n")  # says version 1 for no limit
    assert memory.available(tmp_path) == 5000 * 1024


def test_the_limit_is_the_users_or_a_share_of_what_is_free(monkeypatch):
    assert memory.most_bytes(7) == 7
    monkeypatch.setattr(memory, "available", lambda: 600)
    assert memory.most_bytes(None) == 100
    assert memory.most_bytes(None, held=60) == 110
    monkeypatch.setattr(memory, "available", lambda: None)
    assert memory.most_bytes(None) == 2**32
    with pytest.raises(ValueError, match="Cronos: `max_bytes` must be an integer"):
        cf.Cronos(max_bytes=0)


class Watched:
    """Blocks of four rows that tell which have been read, and by how many readers at a time."""

    def __init__(self):
        self.read, self.readers, self.most = [], 0, 0
        self.lock = threading.Lock()

    def __iter__(self):
        for i in range(0, 20, 4):
            with self.lock:
                self.readers += 1
                self.most = max(self.most, self.readers)
            time.sleep(0.01)
            self.read.append(i)
            with self.lock:
                self.readers -= 1
            yield np.full((4, 2), i, "float32")


def test_the_next_block_is_read_while_one_is_used():
    blocks = Watched()
    source = Source(blocks, (20, 2), np.dtype("float32"))
    source.rows = 4
    for i in range(5):
        assert source.piece(i)[0, 0] == 4 * i
        read = source._ahead.result()  # without being asked for
        assert (read is None) == (i == 4)
        assert blocks.read == [0, 4, 8, 12, 16][: i + 2]
    source.piece(0)
    np.testing.assert_array_equal(source.take(np.array([17, 3]))[:, 0], [16, 0])
    assert source.piece(1)[0, 0] == 4
    assert source.piece(0)[0, 0] == 0
    source.close()
    count = len(blocks.read)
    assert blocks.most == 1
    time.sleep(0.05)
    assert len(blocks.read) == count


def test_features_of_a_file_do_not_stay_mapped(tmp_path):
    features = cf.gather_features(HEAD, VARIABLES, (X, Y), cache=tmp_path)
    for _ in range(2):
        np.testing.assert_array_equal(np.concatenate(list(features_module.FromFile(features.X))), features.X)
    part = list(features_module.FromFile(features.X[100:]))
    np.testing.assert_array_equal(np.concatenate(part), features.X[100:])
