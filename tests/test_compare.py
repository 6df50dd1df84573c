"""The comparison: baselines that are what Optax has, rows that survive a kill, choice by validation rows only."""

import dataclasses
import importlib
import json
import multiprocessing
import os
import re
import signal
import sys
import time
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest
from forked import ADDS_NONE, Forked

from cronos_flax._alternation.defaults import DECAYS
from cronos_flax.compare import models, programs, summaries, tables
from cronos_flax.compare.cli import main
from cronos_flax.compare.data import EMBEDDED, Split, load
from cronos_flax.compare.frozen import linear_probe
from cronos_flax.compare.methods import BASELINES, BaselineState, at_rate, check_method, grid, has_head, optimizer
from cronos_flax.compare.models import MODELS, model_of
from cronos_flax.compare.results import kept
from cronos_flax.compare.runs import rows_of
from cronos_flax.compare.sweep import sweep
from cronos_flax.compare.task import Run, Settings, Task, targets_for

ROOT = Path(__file__).resolve().parents[1]
TIMES = ("seconds", "compile_seconds")
# One set, model and batch size for all runs, so that a step and a solve are compiled once.
WINE = ("--dataset", "wine", "--model", "two-layer", "--batch-size", "32")


@pytest.fixture(scope="module")
def task():
    return Task.of(Settings("wine", model="two-layer", epochs=3, batch_size=32))


def untimed(rows):
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


# Optax's own examples call these as here; a rate of None is that of the grid.
BY_HAND = {
    "adam": lambda rate: optax.adam(learning_rate=rate),
    "adamw": lambda rate: optax.adamw(learning_rate=rate, weight_decay=1e-4),
    "nadamw": lambda rate: optax.nadamw(learning_rate=rate, weight_decay=1e-4),
    "sgd": lambda rate: optax.sgd(learning_rate=rate, momentum=0.9),
    "yogi": lambda rate: optax.yogi(learning_rate=rate),
    "muon": lambda rate: optax.contrib.muon(learning_rate=rate),
    "dadapt_adamw": lambda rate: optax.contrib.dadapt_adamw(learning_rate=rate, weight_decay=1e-4),
    "prodigy": lambda rate: optax.contrib.prodigy(learning_rate=rate),
    "mechanize": lambda rate: optax.contrib.mechanize(optax.adamw(learning_rate=rate, weight_decay=1e-4)),
    "schedule_free_adamw": lambda rate: optax.contrib.schedule_free_adamw(learning_rate=rate, weight_decay=1e-4),
}


@pytest.mark.parametrize("name", BASELINES)
def test_a_baseline_is_the_ordinary_optax_loop(task, name):
    rate = grid(name, 7)[3]
    rows = rows_of(task, Run(name, rate, 0))
    data, tx = task.split(0), BY_HAND[name](rate)
    params = task.model.module.init(jax.random.key(0), data.x[:1])["params"]
    opt_state = tx.init(params)
    seed = int(jax.random.bits(jax.random.key(0)))

    def loss(params, x, y):
        logits = task.model.module.apply({"params": params}, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    @jax.jit
    def step(params, opt_state, x, y):
        updates, opt_state = tx.update(jax.grad(loss)(params, x, y), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    for epoch in range(3):
        order = np.random.default_rng((seed, 0, epoch)).permutation(len(data.y))
        for i in range(0, len(order) - 31, 32):
            params, opt_state = step(params, opt_state, data.x[order[i : i + 32]], data.y[order[i : i + 32]])
        averaged = name == "schedule_free_adamw"
        scored = optax.contrib.schedule_free_eval_params(opt_state, params) if averaged else params
        assert rows[epoch]["test_loss"] == pytest.approx(float(loss(scored, data.x_test, data.y_test)), rel=1e-4)
    assert [row["epoch"] for row in rows] == [1, 2, 3]


def test_the_linear_probe_is_scikit_learns_and_cannot_do_what_is_not_linear():
    x = np.random.default_rng(0).normal(size=(400, 2)).astype("float32")
    straight, crossed = (x[:, 0] > 0).astype(int), (x[:, 0] * x[:, 1] > 0).astype(int)
    hits = [
        np.mean(linear_probe(x[:300], y[:300], 10.0, num_classes=2)(x[300:]).argmax(axis=1) == y[300:])
        for y in (straight, crossed)
    ]
    assert hits[0] > 0.95
    assert hits[1] < 0.7
    outputs = linear_probe(x, 2 * x[:, 0] + 1, 1e6, num_classes=None)(x)
    np.testing.assert_allclose(outputs[:, 0], 2 * x[:, 0] + 1, atol=1e-3)


def test_the_linear_probe_is_scored_by_the_loss_of_the_others():
    """With the Huber loss it had the squared one, which is nowhere smaller."""
    task = Task.of(Settings("diabetes", model="two-layer", loss="huber", epochs=1))
    data = task.labelled(0)
    variables = task.model.init(0, data.x[:1])
    x, x_test = (np.asarray(task.head.inputs(variables, part)) for part in (data.x, data.x_test))
    size = np.abs(linear_probe(x, data.y, 1e-3, num_classes=None)(x_test)[:, 0] - data.y_test)
    expected = np.mean(np.where(size < 1, size**2 / 2, size - 0.5))
    assert rows_of(task, Run("linear-probe", 1e-3, 0))[0]["test_loss"] == pytest.approx(expected, rel=1e-4)


def test_methods_that_solve_learn_and_say_what_they_did(task):
    for method in ("cronos-am", "cronos-am-strict", "cronos", "linear-probe", "cronos-am:sgd"):
        run = Run(method, grid(method, 3)[len(grid(method, 3)) // 2], 0)
        rows = rows_of(task, run)
        assert rows[-1]["test_accuracy"] > 0.8, method
        assert {"train_loss", "validation_loss", "validation_accuracy", "compile_seconds"} <= set(rows[-1])
        if method.startswith("cronos-am"):
            assert rows[-1]["epoch"] == 3
            assert rows[-1]["rejections"] >= 0
        assert rows_of(task, run)[-1]["test_loss"] == rows[-1]["test_loss"]


@pytest.mark.parametrize("method", ["cronos-am:adam", "adamw", "schedule_free_adamw", "sgd+cosine"])
def test_seeds_and_rates_share_what_is_compiled(method, task):
    for seed in (1, 3):  # a step that revives neurons is compiled when one is needed
        rows_of(task, Run(method, 1e-3, seed))
    compiled = []

    def listen(event, _, **kwargs):
        if "backend_compile" in event:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        rows_of(task, Run(method, 3e-3, 2))
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert len(compiled) == 0


def test_regression_is_scored_by_its_loss(tmp_path):
    settings = Settings("diabetes", model="two-layer", epochs=1)
    rows = sweep(settings, [Run("cronos-am", None, 0), Run("adam", 1e-2, 0), Run("linear-probe", 1.0, 0)], tmp_path)
    assert all(row["test_loss"] > 0 and "test_accuracy" not in row for row in rows)
    assert "minus the loss" in tables.table(rows)


@pytest.mark.parametrize("decays", [False, True])
def test_the_rate_is_not_that_of_a_parameter_of_this_name(decays):
    """Moments of a parameter "rate" were replaced by the rate."""
    params = {"rate": np.ones((2, 3), "float32"), "hyperparams": {"rate": np.ones(3, "float32")}}
    made = optimizer("adam", decays)
    state = at_rate(BaselineState.create(apply_fn=None, params=params, tx=made), 0.25)
    step = state.apply_gradients(grads=params).params
    for leaf in jax.tree.leaves(step):  # Adam's first step moves each entry by its rate
        np.testing.assert_allclose(leaf, 0.75, rtol=1e-5)


def test_grids():
    assert grid("adam", 7) == [3.16e-05, 0.0001, 0.000316, 0.001, 0.00316, 0.01, 0.0316]
    assert grid("prodigy", 3) == [0.0316, 1, 31.6]
    assert grid("cronos-am", 7) == [None]
    assert grid("cronos-am:adam", 2, (1e-4, 1e-2)) == [1e-4, 1e-2]
    drawn = grid("sgd", 5, random=1)
    assert drawn == sorted(drawn) == grid("sgd", 5, random=1) != grid("sgd", 5, random=2)
    assert all(10**-3.5 <= rate <= 10**-0.5 for rate in drawn)
    assert check_method("cronos-am:muon") == "cronos-am:muon"
    assert check_method("cronos-am-strict:sgd") == "cronos-am-strict:sgd"
    assert grid("adam+cosine", 3) == grid("adam", 3) == grid("cronos-am:adam", 3)
    assert [has_head(name) for name in ("adam+wsd", "sgd", "cronos", "cronos-am:sgd")] == [False, False, True, True]
    assert grid("lp-ft", 3) == grid("lp-ft:adam+cosine", 3) == grid("adam", 3) != grid("lp-ft:sgd", 3)
    assert grid("cronos-ft", 7) == [None]
    assert check_method("lp-ft:sgd+wsd") == "lp-ft:sgd+wsd"
    assert [has_head(name) for name in ("lp-ft", "lp-ft:sgd+wsd", "cronos-ft:adam", "linear-probe")] == [True] * 4
    bad_decays = "adam+", "adam+step", "lp-ft+", "lp-ft:adam+", "schedule_free_adamw+cosine", "cronos-am:adam+cosine"
    for bad in ("lbfgs", *bad_decays, "cronos-ft+cosine", "cronos+wsd", "other:adam", "lp-ft:cronos", "lp-ft:", ""):
        with pytest.raises(ValueError, match=r"`methods` must be of cronos-am.*got '" + re.escape(bad)):
            check_method(bad)


def test_an_optimizer_follows_the_decay_that_its_name_has(task, monkeypatch):
    factors = []
    monkeypatch.setitem(DECAYS, "cosine", lambda done: factors.append(done) or 0.0)
    stays = rows_of(task, Run("sgd+cosine", 0.1, 0))
    steps = len(factors) // 3  # of three epochs
    np.testing.assert_allclose(factors[1:], np.arange(3 * steps) / (3 * steps))  # the first is of compilation
    assert stays[0]["test_loss"] == stays[-1]["test_loss"]
    assert rows_of(task, Run("sgd", 0.1, 0))[0]["test_loss"] != stays[0]["test_loss"]


def test_a_run_that_fails_is_a_row_and_not_the_end(tmp_path):
    x = np.random.default_rng(0).normal(size=(200, 4))
    np.savez(tmp_path / "huge.npz", x=x * 1e37, y=(x[:, 0] > 0).astype(int))  # its squares are infinite in float32
    settings = Settings(str(tmp_path / "huge.npz"), model="two-layer", epochs=1, scaling="none")
    rows = sweep(settings, [Run("cronos", None, 0), Run("adam", 1e-3, 0)], tmp_path / "out")
    assert "error" in rows[0]
    assert rows[1]["epoch"] == 1
    assert "* failed: cronos, seed 0: " in tables.table(rows)
    assert untimed(kept(tmp_path / "out" / "results.jsonl")) == untimed(rows)


def test_a_comparison_whose_runs_all_fail_says_so_and_exits_with_one(tmp_path, capsys):
    x = np.random.default_rng(0).normal(size=(200, 4))
    np.savez(tmp_path / "huge.npz", x=x * 1e37, y=(x[:, 0] > 0).astype(int))
    args = ["--dataset", str(tmp_path / "huge.npz"), "--model", "two-layer", "--scaling", "none", "--epochs", "1"]
    args += ["--rates", "1", "--seeds", "1", "--quiet", "--out", str(tmp_path / "out")]
    assert main(["compare", *args, "--methods", "cronos"]) == 1
    assert "All runs failed, the first one with FloatingPointError: " in capsys.readouterr().err
    assert main(["compare", *args, "--methods", "cronos,adam"]) == 0
    assert capsys.readouterr().err == ""


def test_a_line_that_was_not_finished_is_passed_over_and_its_run_done_again(task, tmp_path):
    runs = [Run("adam", 1e-3, 0), Run("adam", 1e-2, 0)]
    rows = sweep(task.settings, runs, tmp_path, task=task)
    path = tmp_path / "results.jsonl"
    whole = path.read_text()
    path.write_text(whole[:-40])
    assert len(kept(path)) == 3
    again = sweep(task.settings, runs, tmp_path, task=task)
    assert untimed(again) == untimed(rows)
    assert untimed(kept(path)) == untimed(rows)
    with pytest.raises(ValueError, match=r"holds a comparison with epochs=3, and this one has 2"):
        sweep(dataclasses.replace(task.settings, epochs=2), runs, tmp_path)


def checks(method, rate, seed, figures):
    return [
        {
            "method": method, "rate": rate, "seed": seed, "epoch": epoch, "seconds": float(epoch),
            "compile_seconds": 0.5, "validation_accuracy": validation, "test_accuracy": test,
            "dataset": "toy", "model": "mlp", "loss": None, "epochs": len(figures), "budget": None, "batch_size": 1,
            "scaling": "none", "versions": {}, "device": "cpu", "cores": 1,
        }
        for epoch, (validation, test) in enumerate(figures, 1)
    ]  # fmt: skip


def test_cells_and_checks_are_chosen_by_validation_rows_and_reported_by_test_rows():
    rows = [
        *checks("cronos-am", None, 0, [(0.5, 0.6), (0.8, 0.7)]),
        *checks("cronos-am", None, 1, [(0.9, 0.8), (0.7, 0.9)]),
        *checks("adam", 0.1, 0, [(0.6, 0.1), (0.7, 0.2)]),
        *checks("adam", 0.1, 1, [(0.6, 0.5), (0.6, 0.9)]),
        *checks("adam", 0.2, 0, [(0.3, 1.0), (0.3, 1.0)]),
        *checks("adam", 0.2, 1, [(0.3, 1.0), (0.3, 1.0)]),
    ]
    rows[1] |= {"solves": 2, "rejections": 0}
    rows[3] |= {"solves": 2, "rejections": 1}
    ours, adam = summaries.summaries(rows)
    assert adam.rates == (0.1, 0.2)
    assert adam.test(summaries.peak) == {0: 20.0, 1: 50.0}
    assert adam.test(summaries.last) == {0: 20.0, 1: 90.0}
    assert ours.test(summaries.peak) == {0: 70.0, 1: 80.0}
    assert adam.finals() == pytest.approx([65.0, 30.0])
    assert summaries.default_target([ours, adam]) == pytest.approx(65.0)
    assert summaries.time_to(65.0, adam.best[0]) == 2.0
    assert summaries.time_to(65.0, adam.best[1]) is None
    own, cells = (
        [cell.strip() for line in lines if line.startswith(f"| {name} ") for cell in line.strip("|").split("|")]
        for lines in [tables.table(rows).partition("Expected")[0].splitlines()]
        for name in ("cronos-am", "adam")
    )
    assert own[-2:] == ["2.0", "2.0 (0.5)"]
    assert cells[-2:] == ["2.0", "–"]
    assert cells[:3] == ["adam", "0.1 of 2", f"35.00 ± {np.std([20, 50], ddof=1):.2f}"]
    assert cells[5] == "65.00 / 47.50 / 30.00"
    assert cells[6] == "+40.00 ± 10.00"  # of 50 and 30
    assert cells[7:9] == ["adam", "2.00 (1 of 2)"]


def test_rows_are_held_back_by_seed_and_scaled_by_the_rows_to_fit():
    digits = load("digits")
    a, b, c = (Split.of(digits, seed, 200, "standardise") for seed in (0, 0, 1))
    for x, y in zip(a, b, strict=True):
        np.testing.assert_array_equal(x, y)
    assert not np.array_equal(a.y_validation, c.y_validation)
    np.testing.assert_array_equal(a.y_test, c.y_test)
    assert len(a.y_validation) == 200
    assert len(a.y) + len(a.y_validation) + len(a.y_test) == 1797
    assert abs(a.x.mean()) < 1e-3
    assert a.x.std() == pytest.approx(1, abs=1e-3)
    assert np.all(np.bincount(a.y_validation) >= 18)  # stratified
    assert Split.of(digits, 0, 200, "unit").x.max() == pytest.approx(1)
    assert len(Split.of(digits, 0, 200, "none", rows=50).y) == 50
    with pytest.raises(ValueError, match="must leave rows to fit"):
        Split.of(digits, 0, 2000, "none")
    for name in EMBEDDED:
        assert load(name).num_classes == {"digits": 10, "wine": 3, "breast_cancer": 2, "diabetes": None}[name]


def test_targets_for_each_loss():
    y = np.array([0, 2, 1])
    assert targets_for("softmax", y, 3)[1] == 3
    signs, outputs = targets_for("hinge", y, 3)
    assert outputs == 3
    np.testing.assert_array_equal(signs.argmax(axis=1), y)
    assert targets_for("logistic", np.array([0, 1]), 2)[1] == 1
    assert targets_for("squared", np.array([0, 1]), 2)[1] == 1
    assert targets_for("huber", np.array([0.5]), None)[1] == 1
    with pytest.raises(ValueError, match="two classes"):
        targets_for("logistic", y, 3)
    with pytest.raises(ValueError, match="without classes"):
        targets_for("softmax", np.array([0.5]), None)


@pytest.mark.parametrize("name", MODELS)
def test_the_models_have_a_head(name):
    settings = Settings("digits", model=name, epochs=1)
    assert Task.of(settings).head.outputs == 10


FACTORY = """
import flax.linen as nn, jax.numpy as jnp

class Net(nn.Module):
    outputs: int

    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(16)(x))
        x = nn.Dropout(0.1, deterministic=not train)(nn.relu(x))
        return nn.Dense(self.outputs)(nn.relu(nn.Dense(8)(x)))

def nothing(outputs):
    return jnp.tanh

def ready():
    return Net(2)

def wider(outputs):
    return Net(outputs + 1)
"""


class Normed(nn.Module):
    """Dropout is between the two layers of its head."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(8)(x))
        return nn.Dense(3)(nn.Dropout(0.1, deterministic=not train)(nn.relu(nn.Dense(6)(x))))


class OwnNorm(nn.Module):
    """Statistics of a layer that Flax does not know."""

    use_running_average: bool

    @nn.compact
    def __call__(self, x):
        mean = self.variable("batch_stats", "mean", np.zeros, x.shape[-1:])
        if not self.use_running_average and self.is_mutable_collection("batch_stats"):
            mean.value = x.mean(axis=0)
        return x - (mean.value if self.use_running_average else x.mean(axis=0))


class OwnNormed(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return nn.Dense(3)(nn.relu(nn.Dense(6)(OwnNorm(use_running_average=not train)(nn.Dense(8)(x)))))


def test_heads_to_alternate_on_are_found_with_the_statistics_of_the_batch(monkeypatch):
    """Dropout between the two layers was refused, for the head was found as the model is trained."""
    monkeypatch.setitem(models.MODELS, "normed", lambda outputs: Normed())
    task = Task.of(Settings("wine", model="normed", epochs=1))
    assert task.head_in_training.module.statistics == "batch"
    assert task.head_in_training.kwargs == task.head.kwargs == {"train": False}
    assert task.head.module.statistics is None
    monkeypatch.setitem(models.MODELS, "own norms", lambda outputs: OwnNormed())
    own = Task.of(Settings("wine", model="own norms", epochs=1))
    assert own.head_in_training.module.statistics is None
    assert own.head_in_training.in_training


def test_a_model_of_ones_own_with_running_statistics_and_dropout(tmp_path, monkeypatch, capsys):
    (tmp_path / "own_model.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    x = np.random.default_rng(0).normal(size=(300, 4)).astype("float32")
    np.savez("own.npz", x=x, y=(x[:, 0] > 0).astype(int), x_test=x[:50], y_test=(x[:50, 0] > 0).astype(int))
    methods = "cronos-am,cronos,linear-probe,adam"
    args = ["compare", "--dataset", "own.npz", "--model", "own_model:Net", "--methods", methods, "--epochs", "8"]
    args += ["--batch-size", "32", "--seeds", "1", "--rates", "1", "--out", "out", "--quiet"]
    assert main(args) == 0
    last = {(r["method"], r["rate"]): r for r in kept(Path("out/results.jsonl")) if r.get("end")}
    assert not [row for row in last.values() if "error" in row]
    assert max(row["test_accuracy"] for row in last.values()) > 0.9
    with pytest.raises(ValueError, match=r"must return a flax.linen.Module"):
        model_of("own_model:nothing", 2)
    with pytest.raises(ValueError, match="cannot be imported"):
        model_of("own_model:Nothing", 2)
    with pytest.raises(ValueError, match=r"must be a function of the number of outputs, got .* too many positional"):
        model_of("own_model:ready", 2)  # it was a TypeError with its traceback
    wider = ["compare", "--dataset", "own.npz", "--model", "own_model:wider", "--methods", "cronos", "--out", "other"]
    with pytest.raises(SystemExit, match="2"):
        main([*wider, "--quiet"])
    assert "must have the 2 outputs that it is asked for, got 3" in " ".join(capsys.readouterr().err.split())


def test_a_model_of_ones_own_that_has_changed_is_not_added_to_the_runs_of_the_old_one(tmp_path, monkeypatch):
    """The rows of the old model were taken for those of the new one, without a word."""
    monkeypatch.syspath_prepend(tmp_path)
    text = "import flax.linen as nn\ndef net(n):\n    return nn.Sequential([nn.Dense({}), nn.relu, nn.Dense(n)])\n"

    def swept(width):
        (tmp_path / "changing.py").write_text(text.format(width))
        sys.modules.pop("changing", None)
        importlib.invalidate_caches()
        task = Task.of(Settings("wine", model="changing:net", epochs=1, batch_size=32))
        return sweep(task.settings, [Run("adam", 1e-3, 0)], tmp_path / "out", task=task)

    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    rows = swept(8)
    assert swept(8) == rows
    with pytest.raises(ValueError, match=r"`out` \S+ holds runs of another model: changing:net has changed since"):
        swept(9)


def test_the_command_leaves_rows_tables_and_pictures(tmp_path, capsys):
    args = ["compare", *WINE, "--methods", "cronos-am,adam,sgd", "--seeds", "2", "--epochs", "2", "--rates", "3"]
    args += ["--out", str(tmp_path)]
    assert main(args) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "[14/14]" in out
    assert "budget.png" in out.splitlines()[-1]
    assert max(map(len, out.splitlines())) <= 80 + len(str(tmp_path))
    rows = kept(tmp_path / "results.jsonl")
    assert len({(r["method"], r["rate"], r["seed"]) for r in rows}) == 14
    needed = {"seconds", "versions", "device", "train_loss", "validation_loss", "test_accuracy", "batch_size"}
    assert all(needed <= set(row) for row in rows)
    table = (tmp_path / "table.md").read_text()
    assert all(table.count(f"\n| {method} |") == 3 for method in ("cronos-am", "adam", "sgd"))
    assert "Expected test score for a budget that includes tuning" in table
    assert all((tmp_path / name).stat().st_size > 10_000 for name in ("curves.png", "budget.png"))
    assert main([*args, "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")
    assert kept(tmp_path / "results.jsonl") == rows


# The command, which gets a signal (the first argument) where it begins to write its second run.
SIGNALLED = """
import os, signal, sys
from cronos_flax.compare.cli import main
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background processes ignore it
appended = []
def on_file(event, arguments):
    if event == "open" and str(arguments[0]).endswith("results.jsonl") and "a" in str(arguments[1]):
        appended.append(arguments)
        if len(appended) == 2:
            os.kill(os.getpid(), int(sys.argv[1]))
sys.addaudithook(on_file)
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.slow
def test_killed_twice_a_sweep_ends_with_the_rows_of_an_unbroken_one(tmp_path):
    args = ["compare", *WINE, "--methods", "adam,sgd", "--rates", "2", "--seeds", "1", "--epochs", "3", "--out"]
    broken, whole = tmp_path / "broken", tmp_path / "whole"
    assert main([*args, str(whole)]) == 0
    for how, status in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)):
        command = ["-c", SIGNALLED, int(how), *args, broken]
        assert Forked(tmp_path, *command, config=ADDS_NONE).wait()[0] == status
    assert len({(row["method"], row["rate"]) for row in kept(broken / "results.jsonl")}) == 2
    assert main([*args, str(broken)]) == 0
    assert untimed(kept(broken / "results.jsonl")) == untimed(kept(whole / "results.jsonl"))


@pytest.mark.slow
def test_runs_side_by_side_have_the_same_figures_and_no_times(task, tmp_path):
    runs = [Run("adam", r, s) for r in (1e-3, 1e-2) for s in (0, 1)]
    alone = sweep(task.settings, runs, tmp_path / "1", task=task)
    beside = sweep(task.settings, runs, tmp_path / "2", jobs=2)
    assert all(row["seconds"] is None for row in beside)

    def ordered(rows):
        return sorted(untimed(rows), key=lambda r: (r["rate"], r["seed"], r["epoch"]))

    for a, b in zip(ordered(alone), ordered(beside), strict=True):
        assert a["test_loss"] == pytest.approx(b["test_loss"], rel=1e-4)
    text = tables.table(beside)
    assert "| – |" in text


def killed_after_the_first(job):
    """A run that the system kills, as when memory runs out; the first ends before."""
    run, ended = job[1], Path(os.environ["ENDED"])
    while run.seed > 0 and not ended.exists():
        time.sleep(0.01)
    if run.seed > 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return run, [{**run._asdict(), "epoch": 0, "end": True}]


@pytest.mark.slow
def test_a_run_that_is_killed_ends_the_sweep_and_keeps_what_is_done(task, tmp_path, monkeypatch):
    """It waited for ever."""
    monkeypatch.setenv("ENDED", str(tmp_path / "ended"))
    monkeypatch.setattr(sys.modules[sweep.__module__], "_worked", killed_after_the_first)
    runs, others = [Run("adam", 1e-3, seed) for seed in range(3)], multiprocessing.active_children()

    def watch(event, run, rows):
        (tmp_path / "ended").touch()

    with pytest.raises(ChildProcessError, match=r"`--jobs` must be fewer .* got 2\. What is done is kept"):
        sweep(task.settings, runs, tmp_path / "out", jobs=2, task=task, watch=watch)
    assert [row["seed"] for row in kept(tmp_path / "out" / "results.jsonl")] == [0]
    assert set(multiprocessing.active_children()) <= set(others)


def test_the_folder_of_compiled_programs_does_not_grow_for_ever(tmp_path):
    """What was not used for a fortnight goes, then what was used least recently."""
    now = time.time()
    for name, days, size in (("old", 15, 10), ("last week's", 7, 400), ("yesterday's", 1, 400), ("today's", 0, 400)):
        (tmp_path / name).write_bytes(bytes(size))
        os.utime(tmp_path / name, (now - days * 24 * 3600, 0))
    programs.trim(tmp_path, 1000)
    assert {path.name for path in tmp_path.iterdir()} == {"yesterday's", "today's"}
    programs.trim(tmp_path / "none", 1000)


def test_train_goes_on_where_it_stopped(tmp_path, capsys):
    args = ["train", *WINE, "--out", str(tmp_path)]
    assert main([*args, "--epochs", "2"]) == 0
    assert "epoch 2: training loss" in capsys.readouterr().out
    assert main([*args, "--epochs", "4"]) == 0
    out = capsys.readouterr().out
    assert "epoch 4" in out
    assert "epoch 2" not in out
    rows = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4]
    assert (tmp_path / "curves.png").exists()


def test_info_prints_versions_devices_and_the_head(capsys):
    assert main(["info", *WINE]) == 0
    out = capsys.readouterr().out
    assert jax.__version__ in out
    assert "Dense_0" in out
    assert "64" in out


BAD = {
    "no command": ([], "COMMAND"),
    "method": (["compare", "--methods", "adam,lbfgs", "--out", "OUT"], "got 'lbfgs'"),
    "no such set": (["compare", "--dataset", "mnist", "--out", "OUT"], "`data_dir` is needed"),
    "not prepared": (["compare", "--dataset", "mnist", "--data-dir", ".", "--out", "OUT"], "download_and_prepare"),
    "no file": (["compare", "--dataset", "none.npz", "--out", "OUT"], "No such file"),
    "model": (["compare", "--model", "vgg", "--out", "OUT"], "`model` must be one of mlp"),
    "module": (["compare", "--model", "nothere:Net", "--out", "OUT"], "cannot be imported"),
    "file": (["compare", "--model", "./mine.py:Net", "--out", "OUT"], "module:function, got './mine.py:Net'"),
    "loss": (["compare", "--loss", "logistic", "--out", "OUT"], "for two classes"),
    "epochs": (["compare", "--epochs", "0", "--out", "OUT"], "must be an integer ≥ 1, got '0'"),
    "two budgets": (["compare", "--epochs", "1", "--seconds", "1", "--out", "OUT"], "not allowed with"),
    "range": (["compare", "--rate-range", "1", "0.1", "--out", "OUT"], "LOW < HIGH"),
    "jobs": (["compare", "--seconds", "1", "--jobs", "2", "--out", "OUT"], "`--jobs`"),
    "shard": (["compare", "--shard", "0/8", "--out", "OUT"], "must be K/N with 1 ≤ K ≤ N, such as 2/8, got '0/8'"),
    "no shard": (["compare", "--shard", "/8", "--out", "OUT"], "must be K/N with 1 ≤ K ≤ N, such as 2/8, got '/8'"),
    "rows": (["compare", "--rows", "99999", "--out", "OUT"], "must leave rows to fit"),
    "too many shots": (["compare", "--shots", "2,999", "--out", "OUT"], "`shots` must be at most"),
    "parts of rows": (
        ["compare", "--validation", "1.5", "--out", "OUT"],
        "must be a number of rows, or a fraction below 1",
    ),
    "no shots": (["compare", "--shots", "2,0", "--out", "OUT"], "must be an integer ≥ 1, got '0'"),
    "shots and rows": (["compare", "--shots", "2", "--rows", "9", "--out", "OUT"], "leave `--rows` out"),
    "no augmentation": (["compare", "--augment", "nothere:flip", "--out", "OUT"], "`augment` 'nothere:flip' cannot"),
    "out": (["compare", "--out", "FILE/x"], "cannot be written to"),
    "no out": (["compare"], "--out"),
    "target of a part": (
        ["compare", "--shard", "1/8", "--target", "90", "--out", "OUT"],
        "give it to `cronos-flax merge`",
    ),
    "accuracy above 100": (["compare", "--target", "150", "--out", "OUT"], "an accuracy in %, from 1 to 100, got 150."),
    "accuracy as a share": (
        ["compare", "--target", "0.9", "--out", "OUT"],
        "an accuracy in %, from 1 to 100, got 0.9.",
    ),
    "target that is none": (
        ["compare", "--target", "nan", "--out", "OUT"],
        "an accuracy in %, from 1 to 100, got nan.",
    ),
    "loss below zero": (
        ["compare", "--dataset", "diabetes", "--target", "90", "--out", "OUT"],
        "minus a loss, as targets are values: a number ≤ 0, got 90.",
    ),
    "range of nothing": (
        ["compare", "--methods", "cronos-am,linear-probe", "--rate-range", ".1", "1", "--out", "OUT"],
        "got none in `--methods` cronos-am,linear-probe.",
    ),
    "random rates of nothing": (
        ["compare", "--methods", "cronos-am,cronos", "--random-rates", "1", "--out", "OUT"],
        "`--random-rates` is for optimizers with a grid of rates",
    ),
    "negative seed": (["compare", "--first-seed", "-1", "--out", "OUT"], "must be an integer from 0 to 4294967295"),
    "large seed": (["train", "--seed", "4294967296", "--out", "OUT"], "must be an integer from 0 to 4294967295"),
    "random rates": (["compare", "--random-rates", "-1", "--out", "OUT"], "must be an integer from 0 to 4294967295"),
    "no parts": (["merge", "OUT"], "required: PART"),
    "merged into a file": (["merge", "FILE/x", "PART"], "OUT must be a directory, or one that can be made"),
    "train optimizer": (["train", "--optimizer", "lion", "--out", "OUT"], "must be one of adam"),
    "info model": (["info", "--model", "nothere:Net"], "cannot be imported"),
}


@pytest.mark.parametrize("case", BAD)
def test_wrong_options_fail_at_once_with_the_remedy(case, tmp_path, capsys):
    args, message = BAD[case]
    (tmp_path / "file").write_text("")
    args = [a.replace("OUT", str(tmp_path / "out")).replace("FILE", str(tmp_path / "file")) for a in args]
    with pytest.raises(SystemExit) as stop:
        main(args)
    assert stop.value.code == 2
    said = " ".join(capsys.readouterr().err.split())
    assert message in said
    assert not (tmp_path / "out").exists()


def test_wrong_options_of_the_process_too(tmp_path):
    arguments = ["compare", "--dataset", "none", "--out", tmp_path / "out"]
    status, _, err = Forked(tmp_path, "-m", "cronos_flax", *arguments).wait()
    assert status == 2
    assert "`data_dir` is needed" in " ".join(err.split())
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.zeros((4, 2))}, "must have the arrays x and y"),
        ({"x": np.zeros((4, 2)), "y": np.zeros(3, int)}, "must have shape"),
        ({"x": np.full((4, 2), np.nan), "y": np.zeros(4, int)}, "must be finite"),
        ({"x": np.zeros((4, 2)), "y": np.full(4, -1)}, "integers ≥ 0"),
        ({"x": np.zeros((4, 2)), "y": np.zeros(4, int), "x_test": np.zeros((1, 2))}, "both of x_test and y_test"),
        ({"x": np.zeros((0, 2)), "y": np.zeros(0, int)}, "must have shape"),
    ],
)
def test_files_that_do_not_fit_are_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(ValueError, match=re.escape(message)):
        load(str(tmp_path / "bad.npz"))


def test_a_file_that_is_none_is_refused(tmp_path):
    (tmp_path / "bad.npz").write_text("no arrays")
    with pytest.raises(ValueError, match=r"must be an \.npz file"):
        load(str(tmp_path / "bad.npz"))


def test_tfds_sets(tfds_dir):
    data = load("cifar10_airplane_automobile", tfds_dir)
    assert data.x.shape == (10000, 32, 32, 3)
    assert data.x_test.shape == (2000, 32, 32, 3)
    assert data.num_classes == 2


@pytest.mark.parametrize(
    ("command", "option"), [("compare", "--seed"), ("compare", "--first"), ("train", "--rat"), ("train", "--epoch")]
)
def test_an_option_is_not_taken_for_the_beginning_of_another(command, option, tmp_path, capsys):
    """`compare --seed 7` were seven seeds."""
    with pytest.raises(SystemExit) as stopped:
        main([command, "--dataset", "wine", option, "7", "--out", str(tmp_path)])
    assert stopped.value.code == 2
    assert f"unrecognized arguments: {option} 7" in " ".join(capsys.readouterr().err.split())
