"""The ordinary loops of the examples, Flax's own examples, and the lines of the manual that make them CRONOS-AM."""

import re
from pathlib import Path

import jax
import numpy as np
import pytest
from forked import Forked

ROOT = Path(__file__).resolve().parents[1]
LOOPS = "cnn", "resnet", "nnx_cnn"
EPOCHS = 1
CLIENTS = "mnist", "sst2", "imagenet", "tutorial"


@pytest.fixture
def clients(monkeypatch):
    """The benchmark of Flax's own examples."""
    monkeypatch.syspath_prepend(ROOT / "docs" / "benchmarks")
    import clients

    return clients


def changed(clients, name):
    """The loop after the diff of the docs, and how many lines that adds."""
    guides = "".join(path.read_text() for path in sorted((ROOT / "docs" / "guides").glob("*.md")))
    source = (ROOT / "examples" / "loops" / f"{name}.py").read_text()
    (diff,) = re.findall(rf"`examples/loops/{name}\.py`:\n\n```diff\n(.*?)```", guides, re.DOTALL)
    return clients.patched(source, diff), sum(line.startswith("+") for line in diff.splitlines())


@pytest.mark.parametrize("name", LOOPS)
def test_five_lines_make_an_ordinary_loop_cronos_am(clients, name):
    source, added = changed(clients, name)
    assert added <= 5
    compile(source, f"{name}.py", "exec")


@pytest.mark.slow
def test_an_ordinary_loop_learns_with_the_lines_of_the_guide(clients, tmp_path):
    path = tmp_path / "cnn.py"
    path.write_text(changed(clients, "cnn")[0])
    status, out, err = Forked(tmp_path, path, "--epochs", EPOCHS, strict=True).wait()
    assert status == 0, err
    printed = re.findall(r"epoch \d+: ([\d.]+)", out)
    assert len(printed) == EPOCHS
    assert float(printed[-1]) > 0.85


@pytest.mark.parametrize("name", CLIENTS)
def test_seven_lines_make_an_example_of_flax_cronos_am(clients, name):
    sources = clients.sources(name)
    assert 0 < clients.changed_lines(sources[clients.OWN], sources[clients.OURS]) <= 7


@pytest.mark.slow
@pytest.mark.parametrize("name", CLIENTS)
def test_an_example_of_flax_runs_an_epoch_with_these_lines(clients, name, cheap_init):
    """Heads of images, texts, grafted ones under shard_map, and of NNX: solved before and after the epoch."""
    module = clients.loaded(name, clients.sources(name)[clients.OURS])
    module.BATCH_SIZE = 32
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 64)
    x = rng.normal(size=(64, *((32, 32, 3) if name == "imagenet" else (28, 28, 1)))).astype("float32")
    x += y[:, None, None, None]
    if name == "sst2":
        x = np.stack([clients.word_ids(f"a {('bad', 'good')[label]} film") for label in y])
    state = module.create(x, jax.random.key(0), 2)
    states = list(module.train(state, x, y, rng, 1))
    assert len(states) == 2
    last = states[-1][1] if name == "tutorial" else states[-1]
    assert last.figures["solves"] == 2
    assert np.mean(module.predicted(states[-1], x) == y) > 0.8
