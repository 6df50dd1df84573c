"""The pictures of a comparison, and the expected score for a budget: its formula against all draws there are."""

import itertools

import numpy as np
import pytest

import cronos_flax as cf
from cronos_flax.compare import path, plots
from cronos_flax.compare.budget import budget, expected_best
from cronos_flax.compare.methods import BASELINES, check_method
from cronos_flax.compare.style import spaced
from cronos_flax.compare.summaries import summaries
from cronos_flax.compare.tables import budget_table

RATES = (0.001, 0.01, 0.1)
COMMON = {
    "dataset": "toy", "model": "mlp", "loss": None, "epochs": 4, "budget": None, "batch_size": 1, "scaling": "none",
    "versions": {}, "device": "cpu", "cores": 1,
}  # fmt: skip


def rows_of(methods, *, timed=True, regression=False, seeds=2, epochs=4):
    """Rows as a sweep leaves them, scores rising with epochs to a level that the rate decides."""
    rows, rng = [], np.random.default_rng(0)
    for method, seed in itertools.product(methods, range(seeds)):
        for rate in RATES if ":" in check_method(method) or method in (*BASELINES, "linear-probe") else (None,):
            for epoch in range(1, 2 if method == "linear-probe" else epochs + 1):
                value = (0.9 - 0.2 * rng.random()) * (1 - 0.5**epoch) * (1 if rate != 0.1 else 0.3)
                row = {**COMMON, "method": method, "rate": rate, "seed": seed, "epoch": epoch}
                row |= {"seconds": 0.5 * epoch if timed else None, "compile_seconds": None}
                row |= {"validation_loss": 1 - value, "test_loss": 1 - value}
                rows.append(row if regression else {**row, "validation_accuracy": value, "test_accuracy": value})
    return rows


@pytest.mark.parametrize(
    ("chosen", "reported"),
    [
        ([3.0, 1.0, 2.0, 5.0, 4.0], [10.0, 20.0, 5.0, 7.0, 8.0]),
        ([1.0, 1.0, 2.0, 2.0], [10.0, 20.0, 5.0, 7.0]),  # equal validation scores
        ([1.0], [3.0]),
    ],
)
def test_expected_best_is_the_mean_over_all_draws(chosen, reported):
    def one(draw):
        best = max(chosen[i] for i in draw)
        return np.mean([reported[i] for i in draw if chosen[i] == best])

    n = len(chosen)
    by_hand = [np.mean([one(draw) for draw in itertools.combinations(range(n), k)]) for k in range(1, n + 1)]
    np.testing.assert_allclose(expected_best(chosen, reported), by_hand)


def test_a_budget_takes_means_over_seeds_and_counts_compute_with_tuning():
    rows = rows_of(["cronos-am", "adam"])
    ours, adam = (budget(method, timed=True) for method in summaries(rows))
    assert len(ours.mean) == 1
    np.testing.assert_allclose(adam.spent, [2, 4, 6])
    ends = {(r["rate"], r["seed"]): 100 * r["test_accuracy"] for r in rows if r["method"] == "adam" and r["epoch"] == 4}
    each = np.array([[np.mean([ends[rate, seed] for rate in RATES]) for seed in (0, 1)],
                     [max(ends[rate, seed] for rate in RATES) for seed in (0, 1)]])  # fmt: skip
    np.testing.assert_allclose(adam.mean[[0, 2]], each.mean(axis=1))
    np.testing.assert_allclose(adam.error[[0, 2]], each.std(axis=1, ddof=1) / np.sqrt(2))
    assert adam.runs_to(adam.mean[1]) == 2
    assert adam.runs_to(101) is None
    usual = [ends[0.001, seed] for seed in (0, 1)]
    assert adam.usual == pytest.approx((np.mean(usual), np.std(usual, ddof=1) / np.sqrt(2)))
    assert budget(summaries(rows)[1], timed=False).per_run == 4


def test_runs_that_failed_count_as_draws():
    rows = rows_of(["adam"], seeds=1)
    failed = {"method": "adam", "rate": 1.0, "seed": 0, "epoch": 0, "error": "ValueError: no"}
    curve = budget(summaries([*rows, {**COMMON, **failed}])[0], timed=True)
    assert curve.mean[0] == -np.inf
    assert np.all(np.isfinite(curve.mean[1:]))
    assert curve.per_run == 2


def test_the_budget_table():
    text = budget_table(rows_of(["cronos-am", "adam", "linear-probe"], timed=False))
    head, _, ours, adam, probe = [line.split(" | ") for line in text.splitlines() if line.startswith("|")]
    assert head[1:6] == ["a run, epochs", "usual rate, 1 run", "1 run", "2 runs", "3 runs"]
    assert [line[1] for line in (ours, adam, probe)] == ["4.0", "4.0", "–"]
    assert ours[4] == ""
    assert "±" in adam[2]
    assert "±" in adam[4]


MANY = ["cronos-am", "cronos", "linear-probe", "cronos-am:adam", "adam", "adamw", "sgd", "yogi", "muon", "prodigy"]
CASES = {
    "one": rows_of(["cronos-am"], seeds=1),
    "one optimizer": rows_of(["adam"]),
    "three": rows_of(MANY[4:7]),
    "nine": rows_of(MANY[:9]),
    "ten": rows_of(MANY),
    "without times": rows_of(MANY[:5], timed=False),
    "regression": rows_of(MANY[:5], regression=True),
    "solved at once": rows_of(["linear-probe"]),
    "failed": [{**COMMON, "method": "adam", "rate": 1.0, "seed": 0, "epoch": 0, "error": "ValueError: no"}],
    "diverged": [*rows_of(["adam"], regression=True), *({**r, "validation_loss": None, "test_loss": None}
                 for r in rows_of(["sgd"], regression=True))],
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_pictures_are_drawn_and_their_axes_end_where_lines_end(case, tmp_path):
    rows = CASES[case]
    figure = plots.draw_curves(rows, tmp_path / "curves.png")
    panels = [ax for ax in figure.axes if ax.axison]
    methods = list(dict.fromkeys(row["method"] for row in rows if "error" not in row))
    assert [ax.get_title(loc="left") for ax in panels] == methods
    for ax in panels if case != "solved at once" else ():
        ends = [line.get_xdata()[-1] for line in ax.lines]
        assert ax.get_xlim()[1] == pytest.approx(max(ends))
    figure = plots.draw_budget(rows, tmp_path / "budget.png")
    for name in ("curves.png", "budget.png"):
        assert (tmp_path / name).stat().st_size > (10_000 if case != "failed" else 1_000)
    (ax,) = figure.axes
    if ax.lines and case != "one":
        points = np.concatenate([line.get_xdata() for line in ax.lines])
        np.testing.assert_allclose(ax.get_xlim(), (points.min(), points.max()))
        assert {text.get_text() for text in ax.texts[1:]} <= set(methods)


def test_a_run_that_goes_on_longer_does_not_stretch_the_axis(tmp_path):
    long = [{**row, "method": "sgd"} for row in rows_of(["adam"], timed=False, epochs=9) if row["rate"] == 0.01]
    short = [{**row, "method": "sgd"} for row in rows_of(["adam"], timed=False, epochs=6) if row["rate"] != 0.01]
    figure = plots.draw_curves([*rows_of(["adam"], timed=False), *long, *short], tmp_path / "curves.png")
    assert figure.axes[0].get_xlim()[1] == 9  # where the best cell ends
    assert max(line.get_xdata()[-1] for line in figure.axes[0].lines) == 9


def test_a_path_of_weight_decays_is_drawn_and_the_chosen_one_marked(tmp_path):
    X = np.random.default_rng(0).normal(size=(60, 4)).astype("float32")
    stats = cf.Cronos(beta="path", max_iters=5).solve(X, X[:, 0], hidden=4).stats
    (ax,) = path.draw(stats, tmp_path / "path.png").axes
    line, star = ax.lines
    np.testing.assert_array_equal(line.get_ydata(), stats.path_losses)
    assert star.get_ydata() == min(line.get_ydata())
    assert (tmp_path / "path.png").stat().st_size > 5_000
    with pytest.raises(ValueError, match='`stats` must be of a solve with beta="path"'):
        path.draw(cf.Cronos(max_iters=1).solve(X, X[:, 0], hidden=4).stats, tmp_path / "none.png")


def test_labels_keep_their_distance_and_stay_near():
    places = spaced([0.9, 0.9, 0.1, 0.95], 0.1)
    assert np.diff(np.sort(places)).min() >= 0.1 - 1e-12
    assert list(np.argsort(places)) == [2, 0, 1, 3]
    assert places[2] == 0.1
    assert np.all((places >= 0) & (places <= 1))
