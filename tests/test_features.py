"""Features gathered once, in memory or in files, for many solves."""

import dataclasses
import json
import pickle
import signal
import tracemalloc
from collections import Counter

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest
from disks import largest_file
from flax import nnx
from forked import Forked
from given import HEAD, MODEL, PARAMS, X, Y, alternating, batched, same

import cronos_flax as cf
from cronos_flax._head.room import release

VARIABLES = {"params": PARAMS}
SOLVER = cf.Cronos(loss="softmax", max_iters=2, beta=1e-3)
ROWS = 256


def gather(cache=None, data=None, variables=VARIABLES, head=HEAD, **kwargs):
    return cf.gather_features(head, variables, batched() if data is None else data, cache=cache, **kwargs)


def arrays(features):
    return [features.X, features.y, features.order, *([] if features.weight is None else [features.weight])]


@pytest.fixture
def passes(monkeypatch):
    """Counts passes through the backbone."""
    count, once = Counter(), cf.Head._pass

    def counted(self, *args, **kwargs):
        count["passes"] += 1
        return once(self, *args, **kwargs)

    monkeypatch.setattr(cf.Head, "_pass", counted)
    return count


class Killed(BaseException):
    """As a signal would end it."""


def killed_after(rows):
    def callback(row):
        if row["rows"] >= rows:
            raise Killed

    return callback


def test_features_are_the_heads_input_with_its_targets_and_the_order_of_the_data():
    features = gather()
    x, y = X[:ROWS], Y[:ROWS]
    np.testing.assert_allclose(features.X, HEAD.inputs(VARIABLES, x)[features.order], rtol=1e-5, atol=1e-6)
    same(features.y, y[features.order])
    assert sorted(features.order) == list(range(ROWS))
    assert str(features) == "Features: 256 rows of 8 float32"


def test_a_fit_on_features_is_the_fit_on_the_data_without_a_pass(passes):
    features = gather()
    one, solution = cf.fit_head(HEAD, VARIABLES, batched(), solver=SOLVER)
    passes.clear()
    two, again = cf.fit_head(HEAD, VARIABLES, features, solver=SOLVER)
    assert passes["passes"] == 0
    same(one, two)
    assert float(solution.stats.objective) == float(again.stats.objective)
    _, of_state = alternating(max_iters=2, beta=1e-3).solve_head(features)
    assert passes["passes"] == 0
    assert np.isfinite(of_state.stats.objective)


def test_heads_of_other_weights_and_widths_take_the_same_features(passes):
    features = gather()
    wide = nn.Sequential([nn.Dense(8), nn.tanh, nn.Dense(12), nn.relu, nn.Dense(2)])
    other = jax.jit(wide.init)(jax.random.key(5), X)["params"]
    variables = {"params": {**other, "layers_0": PARAMS["layers_0"]}}
    head = cf.find_head(wide, variables, X[:64])
    passes.clear()
    same(head.gather(variables, features)[0].X, features.X)
    start = HEAD.write(VARIABLES, jax.tree.map(lambda leaf: leaf + 1, HEAD.read(VARIABLES)))
    same(HEAD.gather(start, features)[0].X, features.X)
    assert passes["passes"] == 0


def test_a_cache_holds_the_rows_that_memory_would(tmp_path, passes):
    in_memory = gather()
    made = gather(tmp_path / "cache")
    passes.clear()
    opened = gather(tmp_path / "cache")
    assert passes["passes"] == 1  # to compare with
    for features in (made, opened):
        same(arrays(in_memory), arrays(features))
        assert isinstance(features.X, np.memmap)
    same(*(cf.fit_head(HEAD, VARIABLES, features, solver=SOLVER)[0] for features in (in_memory, opened)))
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {
        ".lock", "log.jsonl", "X.npy", "y.npy", "order.npy",
    }  # fmt: skip


def test_weighted_rows_and_several_targets_come_back_from_a_cache(tmp_path):
    weight = np.arange(ROWS) % 3
    data = [(x, np.eye(2, dtype="float32")[y], w) for (x, y), w in zip(batched(), weight.reshape(4, 64), strict=True)]
    unpack = lambda batch: ((batch[0],), batch[1], batch[2])  # noqa: E731
    in_memory, cached = (gather(cache, data, unpack=unpack) for cache in (None, tmp_path))
    same(arrays(in_memory), arrays(cached))
    assert len(cached.X) == np.sum(weight > 0)
    same(cached.weight, np.arange(ROWS)[weight > 0][cached.order] % 3)
    assert str(cached) == f"Features: 170 rows of 8 float32, weighted in {tmp_path / 'X.npy'}"
    assert str(pickle.loads(pickle.dumps(cached))) == "Features: 170 rows of 8 float32, weighted"  # it was "in None"


@pytest.mark.parametrize("torn", [False, True])
def test_a_pass_that_was_killed_goes_on_where_it_was(tmp_path, passes, torn):
    with pytest.raises(Killed):
        gather(tmp_path, callback=killed_after(128))
    if torn:  # rows that no line tells of, and half a line
        for name in ("X.raw", "log.jsonl"):
            with (tmp_path / name).open("ab") as file:
                file.write(b'{"rows": 64, "ca')
    passes.clear()
    seen = []
    features = gather(tmp_path, callback=seen.append)
    assert passes["passes"] == 1 + 2  # the first to compare with, and two that were missing
    assert [row["rows"] for row in seen] == [64, 128, 192, 256]
    same(arrays(features), arrays(gather()))


def test_a_process_that_is_killed_leaves_what_another_goes_on_with(tmp_path, tmp_path_factory, passes):
    program = (
        "import os, signal, sys; import given; import cronos_flax as cf; "
        "stop = lambda row: row['rows'] == 128 and os.kill(os.getpid(), signal.SIGKILL); "
        "cf.gather_features(given.HEAD, {'params': given.PARAMS}, given.batched(), cache=sys.argv[1], callback=stop)"
    )
    assert Forked(tmp_path_factory.mktemp("said"), "-c", program, tmp_path).wait()[0] == -signal.SIGKILL
    same(arrays(gather(tmp_path)), arrays(gather()))
    assert passes["passes"] == 1 + 2 + 4


def test_a_kill_while_rows_are_sorted_costs_only_the_sorting(tmp_path, monkeypatch, passes):
    from cronos_flax._head.cache import Cache

    with monkeypatch.context() as patch:
        patch.setattr(Cache, "_write_sorted", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            gather(tmp_path)
    passes.clear()
    same(arrays(gather(tmp_path)), arrays(gather()))
    assert passes["passes"] == 1 + 4
    assert not list(tmp_path.glob("*.raw"))


@pytest.mark.parametrize("log", ['{"vers', None])
def test_a_kill_before_the_first_batch_is_told_of_leaves_nothing_in_the_way(tmp_path, log):
    gather(tmp_path)
    first = (tmp_path / "log.jsonl").read_text().splitlines()[0] + "\n"
    for path in tmp_path.iterdir():
        path.unlink()
    (tmp_path / "log.jsonl").write_text(log or first)
    if log is None:
        (tmp_path / "X.raw").write_bytes(b"part of a batch")
    same(arrays(gather(tmp_path)), arrays(gather()))


def test_a_full_disk_is_said_and_gone_on_after(tmp_path):
    with largest_file(3000), pytest.raises(OSError, match=r"File too large: .*X\.raw"):
        gather(tmp_path)
    same(arrays(gather(tmp_path)), arrays(gather()))


MOVED = {**PARAMS, "layers_0": {**PARAMS["layers_0"], "bias": PARAMS["layers_0"]["bias"] + 1}}
NUDGED = X[192:256] + 1e-6 * (np.arange(64) == 5)[:, None]
CHANGED = {
    "a parameter": ({"params": MOVED}, None, "another backbone: params/layers_0/bias has other values"),
    "a collection": ({**VARIABLES, "batch_stats": {"mean": np.ones(3)}}, None, "batch_stats/mean was not there"),
    "a row": (None, [*batched()[:3], (NUDGED, Y[192:256])], "batch 3 of `data`"),
    "a target": (None, [*batched()[:3], (X[192:256], 1 - Y[192:256])], r"batch 3 of `data` \(from 0\) is another"),
    "the order": (None, batched()[::-1], "batch 0 of `data`"),
    "the batch size": (None, (X[:ROWS], Y[:ROWS]), "batch 0 of `data`"),
    "fewer batches": (None, batched()[:3], "`data` have 3 batches, and it was made of 4"),
    "more batches": (None, [*batched(), batched()[0]], "more than the 4 batches"),
}  # fmt: skip


@pytest.mark.parametrize("case", CHANGED)
def test_a_cache_of_another_backbone_or_other_data_is_refused_or_made_anew(tmp_path, case):
    variables, data, words = CHANGED[case]
    changed = {"variables": variables or VARIABLES, "data": data}
    before = gather(tmp_path)
    with pytest.raises(ValueError, match=rf"gather_features: `cache` .* cannot be used: .*{words}.*renew=True"):
        gather(tmp_path, **changed)
    same(arrays(gather(tmp_path)), arrays(gather()))  # it is as it was
    same(arrays(gather(tmp_path, renew=True, **changed)), arrays(gather(**changed)))
    release(before.X)  # so that it is read from its file again, which has no name any more
    same(arrays(before), arrays(gather()))


def test_a_begun_cache_of_another_backbone_is_refused(tmp_path):
    with pytest.raises(Killed):
        gather(tmp_path, callback=killed_after(128))
    for case in ("a parameter", "a collection", "the order", "the batch size"):
        variables, data, words = CHANGED[case]
        with pytest.raises(ValueError, match=words):
            gather(tmp_path, variables=variables or VARIABLES, data=data)
    with pytest.raises(ValueError, match="`data` have 1 batches, and it was made of 2"):
        gather(tmp_path, data=batched()[:1])


@pytest.mark.parametrize("bad", [None, np.nan, np.inf])
def test_a_cache_is_refused_if_the_code_of_the_module_changed(tmp_path, bad):
    other = nn.Sequential([nn.Dense(8), nn.sigmoid, nn.Dense(6), nn.relu, nn.Dense(2)])
    data = batched() if bad is None else [(np.where(np.arange(len(x))[:, None] == 3, bad, x), y) for x, y in batched()]
    gather(tmp_path, data)
    gather(tmp_path, data)
    with pytest.raises(ValueError, match=r"other features for the first batch, by .* its code or its settings"):
        gather(tmp_path, data, head=cf.find_head(other, VARIABLES, X[:64]))


@pytest.mark.parametrize("kind", ["cut", "emptied", "rows", "version", "X.npy", "y.npy", "order.npy"])
def test_a_damaged_cache_is_refused_or_made_anew(tmp_path, kind):
    if kind == "rows":  # as they came
        with pytest.raises(Killed):
            gather(tmp_path, callback=killed_after(128))
        content = bytearray((tmp_path / "X.raw").read_bytes())
        content[3000] ^= 64
        (tmp_path / "X.raw").write_bytes(content)
    else:
        gather(tmp_path)
        name = {"cut": "X.npy", "emptied": "order.npy", "version": "log.jsonl"}.get(kind, kind)
        content = (tmp_path / name).read_bytes()
        changed = {"cut": content[:-100], "emptied": b"", "version": content.replace(b'"version": 2', b'"version": 9')}
        flipped = content[:-40] + bytes([content[-40] ^ 1]) + content[-39:]  # one bit of one number
        (tmp_path / name).write_bytes(changed.get(kind, flipped))
    words = {
        "cut": "X.npy cannot be read",
        "emptied": "order.npy cannot be read",
        "rows": "rows of batch 1",
        "version": "version 9",
    }
    words = words.get(kind, f"{kind} is not what was written")
    with pytest.raises(ValueError, match=f"cannot be used: .*{words}"):
        gather(tmp_path)
    same(arrays(gather(tmp_path, renew=True)), arrays(gather()))


def test_features_of_another_backbone_are_refused_by_a_fit():
    features, (variables, _, _) = gather(), CHANGED["a parameter"]
    with pytest.raises(
        ValueError, match=r"fit_head: `data` must be features of this backbone, .*layers_0/bias has other"
    ):
        cf.fit_head(HEAD, variables, features, solver=SOLVER)
    with pytest.raises(ValueError, match="features of this backbone"):
        alternating().replace(params=variables["params"]).solve_head(features)
    with pytest.raises(ValueError, match="`unpack` must be None"):
        cf.fit_head(HEAD, VARIABLES, features, solver=SOLVER, unpack=lambda batch: batch)


def test_features_of_other_code_are_refused_by_a_fit():
    """The head was fitted to features that its backbone does not give, without a word."""
    features = gather()
    other = nn.Sequential([nn.Dense(8), nn.sigmoid, nn.Dense(6), nn.relu, nn.Dense(2)])
    with pytest.raises(
        ValueError, match=r"features of this backbone, .* only one of the two has the operations logistic"
    ):
        cf.fit_head(cf.find_head(other, VARIABLES, X[:64]), VARIABLES, features, solver=SOLVER)

    class WithoutBiases(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.jit(nn.Dense)(8, name="layers_0")(x)
            x = nn.relu(nn.Dense(7, use_bias=False)(jax.jit(nn.tanh)(x)))
            return nn.Dense(2, use_bias=False)(x)

    variables = jax.jit(WithoutBiases().init)(jax.random.key(0), X)
    variables["params"]["layers_0"] = PARAMS["layers_0"]
    head = cf.find_head(WithoutBiases(), variables, X[:1])  # the same backbone, whatever comes after it
    same(head.gather(variables, features)[0].X, features.X)


def test_what_cannot_be_cached_is_refused(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "X.npy").write_bytes(b"mine")
    with pytest.raises(ValueError, match=r"`cache` must be a new directory .* where X\.npy is somebody else's"):
        gather(tmp_path / "mine", renew=True)
    assert (tmp_path / "mine" / "X.npy").read_bytes() == b"mine"
    for content in ('{"step": 1}\n', "words"):
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run" / "log.jsonl").write_text(content)
        with pytest.raises(ValueError, match=r"where log\.jsonl is somebody else's"):
            gather(tmp_path / "run", renew=True)
        assert (tmp_path / "run" / "log.jsonl").read_text() == content
    with pytest.raises(ValueError, match="`data` must be re-iterable, got an iterator"):
        gather(tmp_path, iter(batched()))
    with pytest.raises(ValueError, match="`data` are features already"):
        gather(data=gather())
    with pytest.raises(ValueError, match="`head` must come from"):
        cf.gather_features(MODEL, VARIABLES, batched())


def test_a_cache_is_gathered_by_one_process_at_a_time(tmp_path):
    def while_held(row):
        with pytest.raises(BlockingIOError, match=r"gather_features: `cache` .* is held by process"):
            gather(tmp_path)
        raise Killed

    with pytest.raises(Killed):
        gather(tmp_path, callback=while_held)
    assert len(gather(tmp_path).X) == ROWS


def test_some_of_the_rows_can_be_taken(tmp_path):
    features = gather(tmp_path)
    few = features.take(np.concatenate([np.flatnonzero(features.y == label)[:5] for label in (1, 0)]))
    assert list(few.y) == [0] * 5 + [1] * 5
    np.testing.assert_allclose(few.X, HEAD.inputs(VARIABLES, X[:ROWS])[few.order], rtol=1e-5, atol=1e-6)
    assert not isinstance(few.X, np.memmap)
    same(arrays(features.take(np.isin(features.order, few.order))), arrays(few))
    same(HEAD.gather(VARIABLES, few)[0].X, few.X)
    for rows in ([], [0, 0], [-1], [ROWS], [0.5], [True], np.zeros(ROWS, bool)):
        with pytest.raises(ValueError, match="take: `rows` must be at least one index"):
            features.take(rows)


def test_features_that_are_larger_than_memory_are_solved_on_in_blocks(tmp_path):
    features = gather(tmp_path)
    assert [len(block) for block in features.blocks(100)] == [100, 100, 56]
    whole, _ = cf.fit_head(HEAD, VARIABLES, features, solver=SOLVER)
    parts, _ = cf.fit_head(HEAD, VARIABLES, features, solver=dataclasses.replace(SOLVER, max_bytes=100))
    for one, two in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-3, atol=1e-4)


def test_a_cache_takes_the_memory_of_a_few_batches(tmp_path):
    """Of 16,384 rows of 512 features, 34 MB, in batches of 256, half a MB each."""
    model = nn.Sequential([nn.Dense(512), nn.tanh, nn.Dense(2), nn.relu, nn.Dense(2)])
    variables = jax.jit(model.init)(jax.random.key(0), X[:2])
    head = cf.find_head(model, variables, X[:256])
    data = [(np.roll(X, i, 0)[:256], Y[:256]) for i in range(64)]
    gather(tmp_path / "small", data[:1], variables, head)
    peak = {}
    for name, cache in (("files", tmp_path / "all"), ("memory", None)):
        tracemalloc.start()
        features = gather(cache, data, variables, head)
        peak[name] = tracemalloc.get_traced_memory()[1] / features.X.nbytes
        tracemalloc.stop()
        assert features.X.nbytes == 2**25
    assert peak["memory"] > 0.95
    assert peak["files"] < 0.4


def test_statistics_of_batch_norms_come_back_from_a_cache(tmp_path):
    model = nn.Sequential([nn.Dense(8), nn.BatchNorm(use_running_average=True), nn.Dense(6), nn.relu, nn.Dense(2)])
    variables = jax.jit(model.init)(jax.random.key(0), X)
    head = cf.find_head(model, variables, X[:64], statistics="batch")
    with pytest.raises(Killed):
        gather(tmp_path, None, variables, head, callback=killed_after(128))
    cached, direct = (cf.fit_head(head, variables, data, solver=SOLVER)[0] for data in (
        gather(tmp_path, None, variables, head), batched(),
    ))  # fmt: skip
    same(cached, direct)
    assert not np.allclose(cached["batch_stats"]["layers_1"]["mean"], 0)
    frozen = cf.find_head(model, variables, X[:64], statistics="running")
    with pytest.raises(ValueError, match="another: the call's statistics has other values"):
        cf.fit_head(frozen, variables, gather(None, None, variables, head), solver=SOLVER)


def test_an_nnx_model_has_features_too(tmp_path, passes):
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.first, self.norm = nnx.Linear(5, 8, rngs=rngs), nnx.BatchNorm(8, rngs=rngs)
            self.dropout = nnx.Dropout(0.5, rngs=rngs)
            self.hidden, self.out = nnx.Linear(8, 6, rngs=rngs), nnx.Linear(6, 2, rngs=rngs)

        def __call__(self, x):
            return self.out(nnx.relu(self.hidden(self.dropout(nnx.tanh(self.norm(self.first(x)))))))

    model, direct = Model(nnx.Rngs(0)), Model(nnx.Rngs(0))
    head = cf.nnx.find_head(model, X[:64])
    features = gather(tmp_path, None, model, head)
    model.train()
    model(X)  # moves running statistics and the state of dropout
    with pytest.raises(ValueError, match="another backbone: norm/mean has other values"):
        gather(tmp_path, None, model, head)
    nnx.update(model, nnx.state(direct, nnx.BatchStat))
    passes.clear()
    cf.nnx.fit_head(head, model, features, solver=SOLVER)
    cf.nnx.fit_head(head, model, gather(tmp_path, None, model, head), solver=SOLVER)  # the head is another by now
    assert passes["passes"] == 1
    cf.nnx.fit_head(head, direct, batched(), solver=SOLVER)
    cf.nnx.fit_head(head, direct, batched(), solver=SOLVER)
    same(nnx.state(model, nnx.Param), nnx.state(direct, nnx.Param))


class Sowing(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Dense(8)(x))
        self.sow("seen", "hidden", x)
        return nn.Dense(4)(nn.relu(nn.Dense(6)(x)))


def test_sown_values_are_no_part_of_a_backbone():
    model = Sowing()
    variables = model.init(jax.random.key(0), X[:2])
    assert isinstance(variables["seen"]["hidden"], tuple)
    head = cf.find_head(model, variables, X[:8])
    features = cf.gather_features(head, variables, (X, Y))
    without = {"params": variables["params"]}
    one, two = (cf.fit_head(head, given, features, solver=SOLVER)[0]["params"] for given in (variables, without))
    same(one, two)


def test_training_says_that_a_collection_of_sown_values_would_grow():
    model = Sowing()
    variables = model.init(jax.random.key(0), X[:2])
    params, others = variables["params"], {"seen": variables["seen"]}
    head = cf.find_head(model, variables, X[:8])
    made = {"apply_fn": model.apply, "params": params, "tx": optax.sgd(0.1), "head": head, "solver": SOLVER}
    state = cf.CronosTrainState.create(**made, model_state=others)
    with pytest.raises(ValueError, match=r"model_state.*number in seen.*sows"):
        cf.train(state, (X, Y), epochs=1)
    with pytest.warns(UserWarning, match=r"train: the module sows into \['seen'\], and the loss"):
        state, _ = cf.train(cf.CronosTrainState.create(**made), (X, Y), epochs=1)
    assert int(state.step) > 0


def test_the_log_of_a_cache_can_be_read(tmp_path):
    gather(tmp_path)
    first, *batches_, last = map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines())
    assert first["version"] == 2
    assert first["backbone"]["params/layers_0/kernel"][:2] == [[5, 8], "float32"]
    assert not any(name.startswith(("params/layers_2", "params/layers_4")) for name in first["backbone"])
    assert [line["rows"] for line in batches_] == [64] * 4
    assert last["complete"] == ROWS
