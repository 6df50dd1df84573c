"""Comparisons of NNX models: every method takes them, and they come out as the same models in linen do."""

import sys
from pathlib import Path

import flax.linen as nn
import numpy as np
import pytest
from flax import nnx

from cronos_flax.compare import models
from cronos_flax.compare.cli import main
from cronos_flax.compare.models import model_of
from cronos_flax.compare.results import kept
from cronos_flax.compare.runs import rows_of
from cronos_flax.compare.task import Run, Settings, Task

FACTORIES = """
import cronos_flax as cf
from flax import nnx

class Net(nnx.Module):
    def __init__(self, outputs, rngs):
        self.body, self.norm = nnx.Linear(13, 16, rngs=rngs), nnx.BatchNorm(16, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.fc1, self.fc2 = nnx.Linear(16, 12, rngs=rngs), nnx.Linear(12, outputs, rngs=rngs)

    def __call__(self, x):
        return self.fc2(self.dropout(nnx.relu(self.fc1(nnx.tanh(self.norm(self.body(x)))))))

class Told(nnx.Module):
    def __init__(self, rngs):
        self.body, self.fc = nnx.Linear(13, 16, rngs=rngs), nnx.Linear(16, 7, rngs=rngs)
        self.norm = nnx.BatchNorm(16, rngs=rngs)

    def __call__(self, x, train):
        return self.fc(nnx.relu(self.norm(self.body(x), use_running_average=not train)))

def told(outputs, rngs):
    pretrained = Told(nnx.Rngs(5))
    return cf.nnx.graft(pretrained, at="fc", hidden=12, features=outputs, pool=lambda x, *_, **__: x, rngs=rngs)

def first(outputs):
    return Net(outputs, nnx.Rngs(0))

def nothing(outputs, rngs):
    return None

def wider(outputs, rngs):
    wider.called = getattr(wider, "called", 0) + 1
    return nnx.Linear(13, outputs * wider.called, rngs=rngs)
"""
METHODS = [
    ("cronos-am", None),
    ("cronos-am-strict", None),
    ("cronos-ft", None),
    ("lp-ft", 1e-2),
    ("linear-probe", 1.0),
    ("cronos", None),
    ("adam", 1e-2),
    ("sgd+cosine", 1e-1),
    ("schedule_free_adamw", 1e-2),
]


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A directory with the module ``own_nnx``."""
    (tmp_path / "own_nnx.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_nnx", raising=False)
    return tmp_path


@pytest.mark.parametrize("name", ["Net", "told"])
def test_every_method_takes_an_nnx_model(own, name):
    task = Task.of(Settings("wine", model=f"own_nnx:{name}", epochs=10, batch_size=16))
    assert task.head_in_training.module.statistics == "batch"
    assert task.head.module.statistics is None
    told = ({"train": True}, {"train": False}) if name == "told" else ({}, {})
    assert (task.model.train_kwargs, task.model.eval_kwargs) == told
    for method, rate in METHODS:
        rows = rows_of(task, Run(method, rate, 1))
        assert rows[-1]["test_accuracy"] > 0.8, method
        assert np.isfinite(rows[-1]["validation_loss"]), method


class Linen(nn.Module):
    outputs: int

    @nn.compact
    def __call__(self, x):
        return nn.Dense(self.outputs, name="fc2")(
            nn.relu(nn.Dense(12, name="fc1")(nn.tanh(nn.Dense(16, name="body")(x))))
        )


class Same(nnx.Module):
    def __init__(self, outputs, rngs):
        self.body = nnx.Linear(13, 16, rngs=rngs)
        self.fc1, self.fc2 = nnx.Linear(16, 12, rngs=rngs), nnx.Linear(12, outputs, rngs=rngs)

    def __call__(self, x):
        return self.fc2(nnx.relu(self.fc1(nnx.tanh(self.body(x)))))


@pytest.mark.parametrize("method", METHODS)
def test_runs_are_those_of_the_same_model_in_linen(monkeypatch, method):
    monkeypatch.setattr(models, "function", lambda *_: Same)
    ours = Task.of(Settings("wine", model="same:Same", epochs=2, batch_size=32))
    params = ours.model.init(3, None)["params"]
    monkeypatch.setitem(models.MODELS, "same, in linen", lambda outputs: (Linen(outputs), {"params": params}))
    models._named.cache_clear()
    theirs = Task.of(Settings("wine", model="same, in linen", epochs=2, batch_size=32))
    rows, expected = (rows_of(task, Run(*method, 3)) for task in (ours, theirs))
    assert len(rows) == len(expected)
    for name, value in rows[-1].items():
        if not name.endswith("seconds"):
            assert value == pytest.approx(expected[-1][name], rel=2e-3, abs=1e-4), name


def test_seeds_draw_first_weights_and_share_programs(own):
    model = model_of("own_nnx:Net", 3)
    first, second = model.init(0, None), model.init(1, None)
    assert not np.array_equal(first["params"]["body"]["kernel"], second["params"]["body"]["kernel"])
    again = model_of("own_nnx:Net", 3)
    assert again.apply is model.apply
    np.testing.assert_array_equal(again.init(1, None)["params"]["body"]["kernel"], second["params"]["body"]["kernel"])


def test_the_command_compares_an_nnx_model(own):
    args = ["compare", "--dataset", "wine", "--model", "own_nnx:Net", "--methods", "cronos-am,adam", "--epochs", "2"]
    assert main([*args, "--seeds", "2", "--rates", "1", "--out", "out", "--quiet"]) == 0
    last = [row for row in kept(Path("out/results.jsonl")) if row.get("end")]
    assert len(last) == 4
    assert not [row for row in last if "error" in row]
    assert main(["info", "--model", "own_nnx:Net", "--dataset", "wine"]) == 0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("first", r"returns the NNX model Net, and so must have an argument `rngs`.*def make\(outputs, rngs\)"),
        ("nothing", "must return an nnx.Module, got NoneType"),
    ],
)
def test_what_is_no_factory_of_an_nnx_model_is_refused(own, name, message):
    with pytest.raises(ValueError, match=message):
        model_of(f"own_nnx:{name}", 3)


def test_models_of_other_shapes_for_other_seeds_are_refused(own):
    model = model_of("own_nnx:wider", 3)
    model.init(0, None)
    with pytest.raises(ValueError, match="same structure for each `rngs`"):
        model.init(1, None)
