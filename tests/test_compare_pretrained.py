"""Comparisons of fine-tuning: heads fitted before the first step, few rows of each class, augmentation."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

import cronos_flax as cf
from cronos_flax.compare import frozen, models, shots
from cronos_flax.compare.cli import main
from cronos_flax.compare.data import Split, load
from cronos_flax.compare.frozen import Linear, in_head
from cronos_flax.compare.results import kept
from cronos_flax.compare.runs import rows_of
from cronos_flax.compare.task import Run, Settings, Task

# Functions of a user's, by name.
AUGMENT = """
def darker(x, random):
    return x * random.uniform(0.5, 1)

def gone(x, random):
    return x * 0

def narrower(x, random):
    return x[:, :-1]

def whole(x, random):
    return x.astype(int)
"""


# A pretrained model of a user's, whose last layer is replaced.
GRAFTED = """
import flax.linen as nn, jax, numpy as np
import cronos_flax as cf

class Normed(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(16)(x))
        return nn.Dense(7, name="fc")(nn.Dropout(0.1, deterministic=not train)(nn.tanh(x)))

def make(outputs):
    x = np.zeros((2, 13), "float32")
    pretrained = Normed().init(jax.random.key(0), x, train=False)
    model = cf.graft(Normed(), at="fc", hidden=12, features=outputs)
    return model, cf.graft_variables(model, pretrained, jax.random.key(1), x, train=False)
"""


@pytest.fixture(scope="module")
def task():
    return Task.of(Settings("wine", model="two-layer", epochs=2, batch_size=32))


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A directory with the module ``own_augment``."""
    (tmp_path / "own_augment.py").write_text(AUGMENT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def network(p, m, outputs, *, hidden_bias=True, output_bias=True):
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = (p, m), (m,), (m, outputs), (outputs,)
    made = [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]
    return cf.TwoLayer(made[0], made[1] if hidden_bias else None, made[2], made[3] if output_bias else None)


@pytest.mark.parametrize(("hidden_bias", "output_bias"), list(itertools.product([True, False], repeat=2)))
def test_a_head_computes_a_linear_model_exactly_if_it_has_two_neurons_for_each_output(hidden_bias, output_bias):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(50, 6)).astype("float32") + 1
    linear = Linear(rng.normal(size=(6, 3)), rng.normal(size=3) if output_bias else np.zeros(3))
    start = network(6, 8, 3, hidden_bias=hidden_bias, output_bias=output_bias)
    made = in_head(linear, x, start)
    np.testing.assert_allclose(cf.predict(made, x), linear(x), rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(made.kernel1[:, 6:], start.kernel1[:, 6:])  # left over: as they were, and silent
    assert not np.any(made.kernel2[6:])
    assert jax.tree.map(jnp.shape, made) == jax.tree.map(jnp.shape, start)


def test_with_fewer_neurons_it_is_the_nearest_linear_model_of_lower_rank():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(50, 6)).astype("float32") + 1
    linear = Linear(rng.normal(size=(6, 4)), rng.normal(size=4))
    made = in_head(linear, x, network(6, 5, 4))  # two pairs
    exact = linear(x)
    singular = np.linalg.svd(exact - exact.mean(axis=0), compute_uv=False)
    missed = np.linalg.norm(cf.predict(made, x) - exact)
    assert missed == pytest.approx(np.linalg.norm(singular[2:]), rel=1e-4)  # Eckart and Young


def test_a_probe_of_nothing_is_no_division_by_zero():
    made = in_head(Linear(np.zeros((6, 3)), np.ones(3)), np.ones((4, 6)), network(6, 8, 3))
    np.testing.assert_allclose(cf.predict(made, jnp.ones((4, 6))), 1)


def test_lp_ft_starts_from_the_probe_that_validation_rows_prefer(task):
    rows = rows_of(task, Run("lp-ft", 1e-3, 0))
    assert [row["epoch"] for row in rows] == [0, 1, 2]
    data, best = task.split(0), (0, 0)
    for C in np.logspace(-3, 3, 7):
        probe = LogisticRegression(C=C, max_iter=500).fit(data.x, data.y)
        score = (probe.score(data.x_validation, data.y_validation), probe.score(data.x_test, data.y_test))
        best = max(best, score, key=lambda each: each[0])
    assert rows[0]["test_accuracy"] == pytest.approx(best[1])
    assert 0 < rows[0]["seconds"] < rows[1]["seconds"] < rows[2]["seconds"]
    assert rows_of(task, Run("lp-ft:adam", 1e-3, 0))[-1]["test_loss"] == rows[-1]["test_loss"]  # the usual one
    assert rows_of(task, Run("lp-ft:adam+cosine", 1e-3, 0))[-1]["test_loss"] != rows[-1]["test_loss"]


def test_cronos_ft_starts_from_a_solved_head_and_goes_on_as_cronos_am(task):
    watched = []
    rows = rows_of(task, Run("cronos-ft", None, 0), watched.append)
    assert [row["epoch"] for row in rows] == [row["epoch"] for row in watched] == [0, 1, 2]
    data, variables = task.split(0), task.model.init(0, task.split(0).x)
    solver = cf.Cronos(loss="softmax", max_iters=3, beta_ratio=0.02)
    fitted, _ = cf.fit_head(task.head, variables, (data.x, data.y), solver=solver, key=jax.random.key(0))
    outputs = np.asarray(task.model.module.apply(fitted, data.x_test))
    assert rows[0]["test_accuracy"] == pytest.approx(np.mean(outputs.argmax(axis=1) == data.y_test), abs=0.06)
    assert rows[-1]["solves"] > rows_of(task, Run("cronos-am", None, 0))[-1]["solves"]
    assert rows[-1]["test_accuracy"] > 0.9


@pytest.mark.parametrize(
    ("dataset", "loss"), [("breast_cancer", "logistic"), ("breast_cancer", "hinge"), ("diabetes", None)]
)
def test_a_probe_fits_the_outputs_of_any_loss(dataset, loss):
    task = Task.of(Settings(dataset, model="two-layer", loss=loss, epochs=1))
    (row, *_) = rows_of(task, Run("lp-ft", 1e-4, 0))
    probed = [rows_of(task, Run("linear-probe", C, 0))[0] for C in (0.1, 1.0)]
    if dataset == "diabetes":
        assert row["test_loss"] < 1.1 * probed[0]["test_loss"]
    else:
        assert row["test_accuracy"] > probed[0]["test_accuracy"] - 0.05


@pytest.mark.parametrize("classes", [[0, 1, 3], [0, 2], [1, 2], [2]])
@pytest.mark.parametrize("has_bias", [True, False])
def test_a_probe_has_an_output_for_classes_without_rows_too(classes, has_bias):
    """It had columns for the classes that there are only, and other methods' labels did not fit them."""
    rng = np.random.default_rng(0)
    labels = np.asarray(classes)[rng.integers(0, len(classes), 90)]
    x = (5 * np.eye(6)[labels] + rng.normal(size=(90, 6))).astype("float32")
    probe = frozen.linear_probe(x, labels, 1.0, num_classes=4, has_bias=has_bias)
    assert probe(x).shape == (90, 4)
    if len(classes) > 1:
        assert np.mean(probe(x).argmax(axis=1) == labels) > 0.95
        theirs = LogisticRegression(C=1.0, max_iter=500, fit_intercept=has_bias).fit(x, labels).predict_proba(x)
        np.testing.assert_allclose(jax.nn.softmax(probe(x)[:, classes], axis=1), theirs, atol=1e-5)
    if has_bias:
        assert np.mean(probe(x).argmax(axis=1) == labels) > 0.95
        assert jax.nn.softmax(probe(x), axis=1)[:, [c for c in range(4) if c not in classes]].max() < 1 / 90


def test_gaps_in_labels_and_heads_without_biases_are_probed_too(own):
    rng = np.random.default_rng(0)
    labels = np.asarray([0, 2])[rng.integers(0, 2, 240)]
    np.savez("gap.npz", x=(3 * np.eye(8)[labels] + rng.normal(size=(240, 8))).astype("float32"), y=labels)
    task = Task.of(Settings("gap.npz", model="mlp", epochs=1, batch_size=32))  # which has no biases
    for method in ("linear-probe", "lp-ft", "cronos-ft"):
        rate = None if method == "cronos-ft" else 1.0 if method == "linear-probe" else 1e-3
        assert rows_of(task, Run(method, rate, 0))[0]["test_accuracy"] > 0.85, method


class Normed(nn.Module):
    outputs: int

    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(16)(x))
        return nn.Dense(self.outputs)(nn.relu(nn.Dense(12)(x)))


def test_with_batch_norm_a_probe_is_fitted_to_what_gradients_see_and_sets_the_running_statistics(monkeypatch):
    monkeypatch.setitem(models.MODELS, "normed, to tune", Normed)
    task = Task.of(Settings("wine", model="normed, to tune", epochs=1, batch_size=32))
    start = frozen.probe_first(task, Run("lp-ft", 1e-3, 0))
    data, before = task.split(0), task.model.init(0, task.split(0).x)
    z = data.x @ before["params"]["Dense_0"]["kernel"]
    mean = start.variables["batch_stats"]["BatchNorm_0"]["mean"]
    np.testing.assert_allclose(mean, z.mean(axis=0), atol=1e-4)
    assert not np.any(before["batch_stats"]["BatchNorm_0"]["mean"])
    assert frozen.scored(task, 0, start.variables)["test_accuracy"] > 0.9


def test_a_grafted_model_is_told_what_is_training(own):
    """The wrapper of a grafted model takes any arguments, so these of the backbone were not seen."""
    (own / "own_graft.py").write_text(GRAFTED)
    task = Task.of(Settings("wine", model="own_graft:make", epochs=1, batch_size=32))
    assert (task.model.train_kwargs, task.model.eval_kwargs) == ({"train": True}, {"train": False})
    assert task.head_in_training.module.statistics == "batch"
    assert not task.head.module.statistics
    for method, rate in (("cronos-ft", None), ("lp-ft", 1e-3), ("linear-probe", 1.0)):
        assert rows_of(task, Run(method, rate, 0))[-1]["test_accuracy"] > 0.3, method


def test_batch_norms_that_keep_their_statistics_are_no_reason_to_warn(own):
    frozen = GRAFTED.replace("self, x, train):", "self, x):").replace("not train", "True").replace(", train=False", "")
    (own / "own_frozen.py").write_text(frozen)
    task = Task.of(Settings("wine", model="own_frozen:make", epochs=1, batch_size=32))
    assert task.head_in_training.module.statistics == "running"
    before = task.model.init(0, None)["batch_stats"]
    assert rows_of(task, Run("cronos-ft", None, 0))[-1]["test_accuracy"] > 0.3
    assert jax.tree.all(jax.tree.map(np.array_equal, task.model.init(0, None)["batch_stats"], before))


def test_what_comes_before_training_counts_in_its_seconds(monkeypatch):
    task = Task.of(Settings("wine", model="two-layer", budget=1e-6, batch_size=32))
    for method, rate in (("lp-ft", 1e-3), ("cronos-ft", None)):  # the time is over before the first step
        assert [row["epoch"] for row in rows_of(task, Run(method, rate, 0))] == [0]


def test_shots_are_so_many_rows_of_each_class_drawn_by_seed():
    digits = load("digits")
    split, whole = (Split.of(digits, 0, 200, "none", shots=count) for count in (3, None))
    np.testing.assert_array_equal(np.bincount(split.y), 3)
    np.testing.assert_array_equal(split.y_validation, whole.y_validation)
    np.testing.assert_array_equal(split.x_test, whole.x_test)
    again, other = Split.of(digits, 0, 200, "none", shots=3), Split.of(digits, 1, 200, "none", shots=3)
    np.testing.assert_array_equal(split.x, again.x)
    assert not np.array_equal(split.x, other.x)
    rows = {row.tobytes() for row in whole.x}
    assert all(row.tobytes() in rows for row in split.x)
    with pytest.raises(ValueError, match=r"`shots` must be at most 1\d\d, .* smallest class, 8, .*got 200"):
        Split.of(digits, 0, 200, "none", shots=200)
    with pytest.raises(ValueError, match="`shots` is for sets with classes"):
        Split.of(load("diabetes"), 0, 50, "none", shots=2)


def test_few_shot_comparisons_leave_a_table_and_a_picture_of_all(tmp_path, capsys):
    args = ["compare", "--dataset", "wine", "--model", "two-layer", "--methods", "cronos,linear-probe,lp-ft"]
    args += ["--seeds", "2", "--epochs", "1", "--rates", "1", "--shots", "5,2", "--out", str(tmp_path)]
    assert main(args) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.count("[6/6]") == 2
    assert out.splitlines()[-1] == f"{tmp_path}: shots.md, shots.png"
    rows = {count: kept(tmp_path / f"shots-{count}" / "results.jsonl") for count in (2, 5)}
    assert all(row["shots"] == count and "error" not in row for count, own in rows.items() for row in own)
    text = (tmp_path / "shots.md").read_text()
    assert text == shots.table(rows)
    assert "| method | 2 | 5 |" in text
    probe = [row for row in rows[5] if row["method"] == "linear-probe"]
    mean = 100 * np.mean([row["test_accuracy"] for row in probe])
    assert f"| {mean:.2f} ± " in next(line for line in text.splitlines() if line.startswith("| linear-probe"))
    assert (tmp_path / "shots.png").stat().st_size > 10_000
    (ax,) = shots.draw(rows, tmp_path / "again.png").axes
    assert [label.get_text() for label in ax.get_xticklabels()] == ["2", "5"]
    assert {text.get_text() for text in ax.texts} == {"cronos", "linear-probe", "lp-ft"}
    assert main([*args, "--quiet"]) == 0  # all is there already
    assert {count: kept(tmp_path / f"shots-{count}" / "results.jsonl") for count in rows} == rows
    assert main([*args, "--quiet", "--shard", "1/2", "--first-seed", "2"]) == 0
    assert kept(tmp_path / "shots-2" / "part-1-of-2" / "results.jsonl")


def test_runs_that_fail_leave_a_picture_of_the_others(tmp_path):
    common = {"dataset": "toy", "model": "mlp", "rate": None, "seed": 0, "epoch": 0}
    rows = [{**common, "method": "cronos", "error": "ValueError: no"}]
    sweeps = {1: rows, 5: [{**common, "method": "cronos", "test_accuracy": 0.5, "validation_accuracy": 0.5}]}
    assert "failed" in shots.table(sweeps)
    (ax,) = shots.draw(sweeps, tmp_path / "shots.png").axes
    np.testing.assert_array_equal(ax.lines[0].get_xdata(), [5])


def test_gradient_steps_see_augmented_rows_and_nothing_else_does(own):
    task = Task.of(Settings("wine", model="two-layer", epochs=3, batch_size=32, augment="own_augment:gone"))
    rows = {method: rows_of(task, Run(method, rate, 0)) for method, rate in (("adam", 1e-2), ("cronos", None))}
    clean = Task.of(Settings("wine", model="two-layer", epochs=3, batch_size=32))
    # From inputs of zeros no weight of the first layer can learn; on rows as they are both methods do.
    assert rows["adam"][-1]["test_accuracy"] < 0.7 < rows_of(clean, Run("adam", 1e-2, 0))[-1]["test_accuracy"]
    assert rows["cronos"][-1]["test_loss"] == rows_of(clean, Run("cronos", None, 0))[-1]["test_loss"]
    assert rows_of(task, Run("cronos-am", None, 0))[-1]["test_accuracy"] > 0.8


def test_augmented_batches_are_the_same_for_the_same_seed(own):
    task = Task.of(Settings("wine", model="two-layer", epochs=1, batch_size=32, augment="own_augment:darker"))
    data = task.split(0)
    (one, _) = next(iter(task.augmented(0, 10**6)))  # more than there are: all of them
    assert len(one) == len(data.y)
    first, again, other = (
        list(itertools.islice(task.augmented(seed, 32), 6)) for seed in (0, 0, 1)
    )  # of two epochs: three batches fit into one
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert not np.array_equal(first[0][0], other[0][0])
    assert not np.array_equal(first[0][1], first[3][1])
    assert all(x.shape == (32, 13) and x.dtype == np.float32 for x, _ in first)
    known = {(row / np.linalg.norm(row)).round(3).tobytes() for row in data.x}
    assert all((row / np.linalg.norm(row)).round(3).tobytes() in known for x, _ in first for row in x)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("narrower", r"`augment` must return floats of the shape that it was given, \(2, 13\), got float32 of shape"),
        ("whole", r"`augment` must return floats .*, got int64 of shape \(2, 13\)"),
        ("nothing", r"`augment` 'own_augment:nothing' cannot be imported"),
    ],
)
def test_what_is_no_augmentation_is_refused_before_any_run(own, name, message):
    with pytest.raises(ValueError, match=message):
        Task.of(Settings("wine", model="two-layer", epochs=1, augment=f"own_augment:{name}"))


def test_the_name_of_an_augmentation_is_checked_too():
    with pytest.raises(ValueError, match="`augment` must be module:function, got 'flip'"):
        Task.of(Settings("wine", augment="flip"))
