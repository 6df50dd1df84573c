"""Every public function refuses bad input with a ValueError that names it, and leaves the caller's arrays alone."""

import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import drawn, random_network, random_problem
from scipy.sparse import csr_array, csr_matrix

import cronos_flax as cf
from cronos_flax.compare.data import load_tfds

X, Y = random_problem(0)
NET = random_network(0)
MODEL = nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(2)])
VARIABLES = drawn(MODEL, jax.random.key(0), X)
HEAD = cf.find_head(MODEL, VARIABLES, X)
T = np.ones((40, 2), "float32")


def poisoned(value):
    bad = X.copy()
    bad[3, 2] = value
    return bad


def solve(X=X, y=Y, hidden=4, **kwargs):
    return cf.Cronos(max_iters=2).solve(X, y, hidden=hidden, **kwargs)


CASES = {
    "empty X": (lambda: solve(X[:0], Y[:0]), "`X`"),
    "one row": (lambda: solve(X[:1], Y[:1]), "`X`"),
    "a flat X": (lambda: solve(X[0], Y), "`X`"),
    "no columns": (lambda: solve(X[:, :0]), "`X`"),
    "NaN in X": (lambda: solve(poisoned(np.nan)), "`X`.*finite"),
    "inf in X": (lambda: solve(poisoned(np.inf)), "`X`.*finite"),
    "integer X": (lambda: solve(X.astype(int)), "`X`.*floating"),
    "text X": (lambda: solve([["a"]]), "`X`.*floating"),
    "blocks once only": (lambda: solve(iter([X])), "`X`.*re-iterable"),
    "blocks of other widths": (lambda: solve([X[:20], X[20:, :3]]), "`X`.*columns"),
    "integer blocks": (lambda: solve([X.astype(int)]), "`X`.*floating"),
    "X beyond float32": (lambda: solve(X.astype(float) * 1e300), "`X` must be finite in float32"),
    "NaN in a block": (lambda: solve([poisoned(np.nan)[:9], X[9:]]), "`X`.*finite"),
    "blocks of too few rows": (lambda: solve([X[:30]]), "`y`.*30"),
    "callback not callable": (lambda: solve(callback=3), "`callback`"),
    "mismatched rows": (lambda: solve(X, Y[:7]), "`y`.*40"),
    "integer y": (lambda: solve(y=np.arange(40)), "`y`.*signed_targets"),
    "NaN in y": (lambda: solve(y=Y * np.nan), "`y`.*finite"),
    "y of three dimensions": (lambda: solve(y=Y[:, :, None]), "`y`"),
    "labels that are ids": (
        lambda: cf.Cronos(loss="softmax").solve(X, np.arange(40) + 100_000_000, hidden=4),
        r"`y` must have labels 0, 1, .* up to 100000039, .*np\.unique",
    ),
    "hidden zero": (lambda: solve(hidden=0), "`hidden`"),
    "hidden a float": (lambda: solve(hidden=2.5), "`hidden`"),
    "no start": (lambda: solve(hidden=None), "exactly one"),
    "certify_iters negative": (lambda: cf.Cronos(certify_iters=-1), "`certify_iters`"),
    "settings of another path": (lambda: cf.Cronos(refreshed=cf.Held()), "`refreshed` must be a cf.Refreshed"),
    "a count of settings": (lambda: cf.Refreshed(cg_steps=0), "`cg_steps`"),
    "lengths without factors": (lambda: cf.Refreshed(step_lengths=(1.0, 0.0)), "`step_lengths`"),
    "lengths that rise": (
        lambda: cf.Refreshed(step_lengths=(1.0, 2.0, 0.0), damping_factors=(1.0, 1.0, 1.0)),
        "`step_lengths`.*decrease",
    ),
    "no bounds of the damping": (lambda: cf.Refreshed(damping_range=(1e8, 1e-8)), "`damping_range`"),
    "samples out of order": (lambda: cf.Refreshed(least_sample=9, most_sample=8), "`least_sample`"),
    "a list of lengths": (lambda: cf.Held(step_lengths=[1.0, 0.0]), "`step_lengths` must be a tuple"),
    "lengths without 0": (lambda: cf.Held(step_lengths=(1.0,)), "`step_lengths` must end"),
    "kappa zero": (lambda: cf.Held(kappa=0.0), "`kappa`"),
    "adaptation below 1": (lambda: cf.Held(least_adaptation=0.5), "`least_adaptation`"),
    "delta zero": (lambda: cf.Huber(delta=0.0), "`delta`"),
    "class weights of several outputs, traced": (
        lambda: jax.jit(cf.Cronos(loss="logistic", class_weight="balanced").solve, static_argnames="hidden")(
            X, np.ones((40, 2), "float32"), hidden=3
        ),
        "one label a row",
    ),
    "over-relaxation": (lambda: cf.Held(over_relaxation=2.0), "`over_relaxation`"),
    "rank zero": (lambda: cf.NystromPCG(rank=0), "`rank`"),
    "an unknown linear solver": (lambda: cf.Cronos(linear_solver="cg"), "`linear_solver`"),
    "hidden and init": (lambda: solve(init=NET), "`hidden` and `init`"),
    "init and state": (lambda: solve(hidden=None, init=NET, state=solve().state), "`init` and `state`"),
    "init of another width": (lambda: solve(hidden=None, init=random_network(0, p=4)), "kernel1"),
    "init of other outputs": (lambda: solve(hidden=None, init=random_network(0, C=2)), "kernel2"),
    "init not a network": (lambda: solve(hidden=None, init={"kernel": 1}), "`init`"),
    "state of other gates": (
        lambda: cf.Cronos(gates="fixed").solve(X, Y, state=solve().state),
        "`state`.*fixed",
    ),
    "state of other rows": (
        lambda: cf.Cronos(gates="fixed", max_iters=2).solve(
            X[:9], Y[:9], state=cf.Cronos(gates="fixed", max_iters=2).solve(X, Y, hidden=3).state
        ),
        "`state`.*rows",
    ),
    "other num_classes": (lambda: solve(num_classes=3), "`num_classes`"),
    "negative weight": (lambda: solve(sample_weight=-np.ones(40)), "`sample_weight`"),
    "zero weights": (lambda: solve(sample_weight=np.zeros(40)), "`sample_weight`"),
    "short weights": (lambda: solve(sample_weight=np.ones(3)), "`sample_weight`"),
    "negative beta": (lambda: cf.Cronos(beta=-1.0), "`beta`"),
    "negative beta array": (lambda: cf.Cronos(beta=jnp.float32(-1)), "`beta`"),
    "NaN beta": (lambda: cf.Cronos(beta=float("nan")), "`beta`"),
    "complex beta": (lambda: cf.Cronos(beta=-1j), "`beta`"),
    "rho a dict": (lambda: cf.Cronos(rho={}), "`rho`"),
    "beta a word": (lambda: cf.Cronos(beta="auto"), "`beta`.*path"),
    "validation without a path": (lambda: solve(validation=(X, Y)), "`validation`"),
    "validation without targets": (
        lambda: cf.Cronos(beta="path").solve(X, Y, hidden=3, validation=X),
        "`validation`",
    ),
    "validation of other columns": (
        lambda: cf.Cronos(beta="path").solve(X, Y, hidden=3, validation=(X[:, :2], Y)),
        "`validation`",
    ),
    "validation of NaN": (
        lambda: cf.Cronos(beta="path").solve(X, Y, hidden=3, validation=(X * np.nan, Y)),
        "solve: in `validation` `X` must be finite",
    ),
    "blocks beyond float32": (
        lambda: solve([X[:9], X[9:].astype(float) * 1e60]),
        "solve: `X` must be finite in float32",
    ),
    "keys for targets": (lambda: solve(y=jax.random.split(jax.random.key(0), 40)), "`y` must be real numbers"),
    "sparse": (lambda: solve(csr_array(X)), "solve: `X` must be dense, got a sparse csr_array. Give .toarray()"),
    "sparse blocks": (lambda: solve(csr_matrix(X)), "solve: the blocks of `X` must be dense"),
    "predict: sparse": (lambda: cf.predict(NET, csr_matrix(X)), "predict: `X` must be dense"),
    "a path under jit": (lambda: jax.jit(lambda y: cf.Cronos(beta="path").solve(X, y, hidden=3))(Y), "traced"),
    "a path of traced keys": (
        lambda: jax.vmap(lambda key: cf.Cronos(beta="path").solve(X, Y, hidden=3, key=key))(
            jax.random.split(jax.random.key(0))
        ),
        "traced arrays. Call it outside jit and vmap",
    ),
    "a path of a traced rho": (
        lambda: jax.vmap(lambda rho: cf.Cronos(beta="path", rho=rho).solve(X, Y, hidden=3))(np.ones(2)),
        "traced arrays. Call it outside jit and vmap",
    ),
    "a path in blocks": (lambda: cf.Cronos(beta="path").solve([X], Y, hidden=3), "blocks"),
    "a path of few rows": (lambda: cf.Cronos(beta="path").solve(X[:5], Y[:5], hidden=3), "10 rows"),
    "softmax of floats": (lambda: cf.Cronos(loss="softmax").solve(X, Y, hidden=3), "probabilities"),
    "softmax of two columns of labels": (
        lambda: cf.Cronos(loss="softmax").solve(X, np.ones((40, 2), int), hidden=3),
        "labels",
    ),
    "labels above num_classes": (
        lambda: cf.Cronos(loss="softmax").solve(X, np.arange(40) % 5, hidden=3, num_classes=3),
        "labels in",
    ),
    "labels under jit": (
        lambda: jax.jit(lambda y: cf.Cronos(loss="softmax").solve(X, y, hidden=3))(np.arange(40) % 2),
        "`num_classes`",
    ),
    "logistic beyond one": (lambda: cf.Cronos(loss="logistic").solve(X, 2 + Y, hidden=3), "0 or 1"),
    "hinge of labels": (lambda: cf.Cronos(loss="hinge").solve(X, np.arange(40) % 2, hidden=3), "signed_targets"),
    "an unknown class weight": (lambda: cf.Cronos(class_weight="even"), "`class_weight`"),
    "class weights of real targets": (lambda: cf.Cronos(class_weight="balanced").solve(X, Y, hidden=3), "labels"),
    "objective in blocks": (lambda: cf.Cronos().objective(NET, [X], Y, 0.1), "`X`"),
    "rho zero": (lambda: cf.Cronos(rho=0.0), "`rho`"),
    "negative tol": (lambda: cf.Cronos(tol=-1e-3), "`tol`"),
    "unknown loss": (lambda: cf.Cronos(loss="l1"), "`loss`"),
    "unknown gates": (lambda: cf.Cronos(gates="random"), "`gates`"),
    "no iterations": (lambda: cf.Cronos(max_iters=0), "`max_iters`"),
    "no CG steps": (lambda: cf.Structured(max_steps=0), "`max_steps`"),
    "float labels": (lambda: cf.signed_targets([0.5], 2), "`labels`"),
    "labels out of range": (lambda: cf.signed_targets([0, 3], 3), "`labels`"),
    "one class": (lambda: cf.signed_targets([0], 1), "`num_classes`"),
    "not a module": (lambda: cf.find_head(lambda x: x, VARIABLES, X), "`model`"),
    "no params": (lambda: cf.find_head(MODEL, {}, X), "`variables`"),
    "no head": (lambda: cf.find_head(nn.Dense(3), nn.Dense(3).init(jax.random.key(0), X), X), "Dense → relu → Dense"),
    "an empty batch": (lambda: cf.find_head(MODEL, VARIABLES, X[:0]), "empty"),
    "a batch of NaN": (lambda: cf.find_head(MODEL, VARIABLES, X * np.nan), "outputs on the batch must be finite"),
    "a batch of another shape": (lambda: cf.find_head(MODEL, VARIABLES, X[:, :3]), "batch"),
    "a kernel of another shape": (
        lambda: cf.find_head(MODEL, jax.tree.map(lambda leaf: leaf[..., :1], VARIABLES), X),
        "these variables and a batch",
    ),
    "fit: a kernel of another shape": (
        lambda: cf.fit_head(HEAD, jax.tree.map(lambda leaf: leaf[..., :1], VARIABLES), (X, T)),
        "that the model takes with these variables",
    ),
    "fit: not a head": (lambda: cf.fit_head(MODEL, VARIABLES, (X, T)), "`head`"),
    "fit: not a solver": (lambda: cf.fit_head(HEAD, VARIABLES, (X, T), solver="cronos"), "`solver`"),
    "fit: another shape": (lambda: cf.fit_head(HEAD, VARIABLES, (X[:, :3], T)), "batch"),
    "fit: mismatched rows": (lambda: cf.fit_head(HEAD, VARIABLES, (X, T[:3])), "`data`"),
    "fit: no rows": (lambda: cf.fit_head(HEAD, VARIABLES, (X[:0], T[:0])), "`data`"),
    "fit: no batches": (lambda: cf.fit_head(HEAD, VARIABLES, []), "at least one batch"),
    "fit: not data": (lambda: cf.fit_head(HEAD, VARIABLES, 3), "`data`"),
    "fit: labels": (lambda: cf.fit_head(HEAD, VARIABLES, (X, np.arange(40))), "signed_targets"),
    "fit: other outputs": (lambda: cf.fit_head(HEAD, VARIABLES, (X, np.ones((40, 3), "float32"))), "targets"),
    "fit: NaN": (lambda: cf.fit_head(HEAD, VARIABLES, (poisoned(np.nan), T)), "finite"),
    "fit: dict batches": (lambda: cf.fit_head(HEAD, VARIABLES, [{"x": X}]), "unpack"),
    "fit: bad unpack": (lambda: cf.fit_head(HEAD, VARIABLES, [X], unpack=lambda b: b), "`unpack`"),
    "backbone_only: not a tx": (lambda: cf.backbone_only(1e-3, HEAD), "`tx`"),
    "backbone_only: not a head": (lambda: cf.backbone_only(optax.sgd(0.1), None), "`head`"),
    "state: not a solver": (
        lambda: cf.CronosTrainState.create(
            apply_fn=MODEL.apply, params=VARIABLES["params"], tx=optax.sgd(0.1), head=HEAD, solver=3
        ),
        "`solver`",
    ),
    "predict: a solution": (
        lambda: cf.predict(solve(), X),
        "predict: `params` must be a cf.TwoLayer .*got a Solution.*solution.params",
    ),
    "predict: no network": (lambda: cf.predict(VARIABLES, X), "predict: `params` must be a cf.TwoLayer .*got a dict.$"),
    "predict: text": (lambda: cf.predict(NET, [["a"] * 5]), "predict: `X` must be numbers"),
    "objective: a solution": (
        lambda: cf.Cronos().objective(solve(), X, Y, 0.1),
        "objective: `params` must be a cf.TwoLayer .*got a Solution.*solution.params",
    ),
    "objective: a path": (
        lambda: cf.Cronos().objective(NET, X, Y, "path"),
        "objective: `beta` must be a number ≥ 0, .*solution.stats.beta, got 'path'",
    ),
    "objective: no beta": (lambda: cf.Cronos().objective(NET, X, Y, None), "objective: `beta` must be a number ≥ 0"),
    "objective: below zero": (lambda: cf.Cronos().objective(NET, X, Y, -1.0), "objective: `beta` .* got -1.0"),
    "objective: several": (lambda: cf.Cronos().objective(NET, X, Y, np.ones(2)), "objective: `beta` must be one numb"),
    "ragged blocks": (lambda: solve([[[1.0, 2.0], [3.0]], X]), "solve: the blocks of `X` must be an array of numbers"),
    "restore: no directory": (lambda: cf.restore_checkpoint(None, NET), "restore_checkpoint: `directory` must be a p"),
    "save: no directory": (lambda: cf.save_checkpoint(3, NET, 1), "save_checkpoint: `directory` must be a path"),
    "save: text": (lambda: cf.save_checkpoint("/nonexistent", {"a": "b"}, 1), r"save_checkpoint: `state` .*at \['a'\]"),
    "gather: no path": (
        lambda: cf.gather_features(HEAD, VARIABLES, (X, T), cache=3),
        "gather_features: `cache` must be a path",
    ),
    "save: a URL": (
        lambda: cf.save_checkpoint("gs://bucket/run", NET, 1),
        "save_checkpoint: `directory` must be a path of this machine's file systems, got the URL gs://bucket/run",
    ),
    "restore: a URL that was made a path": (
        lambda: cf.restore_checkpoint(pathlib.Path("gs://bucket/run"), NET),
        "restore_checkpoint: `directory` must be a path of this machine's file systems, got the URL gs:/bucket/run",
    ),
    "gather: a home": (
        lambda: cf.gather_features(HEAD, VARIABLES, (X, T), cache="~/features"),
        r"gather_features: `cache` must be a path without ~, .*os\.path\.expanduser\('~/features'\)",
    ),
    "save: nowhere": (lambda: cf.save_checkpoint("", NET, 1), "save_checkpoint: `directory` must be a path, .* got ''"),
    "no such data set": (lambda: load_tfds("mnist", "train", "/nonexistent"), "Prepare it"),
}


class Table:
    """An array of another library, as pandas has them."""

    def __array__(self, dtype=None, copy=None):
        return np.array(X, dtype)


@pytest.mark.parametrize("given", [X.tolist(), Table(), X.astype(">f4"), X.astype(np.longdouble)])
@pytest.mark.parametrize("gates", ["refreshed", "gated"])
def test_what_a_solve_takes_predict_takes(given, gates):
    solution = cf.Cronos(max_iters=2, gates=gates).solve(X, Y, hidden=4)
    np.testing.assert_array_equal(cf.predict(solution.params, given), cf.predict(solution.params, X))


@pytest.mark.parametrize(("call", "match"), CASES.values(), ids=CASES)
def test_bad_input_is_refused(call, match):
    kept = X.copy(), Y.copy(), jax.tree.map(np.array, VARIABLES)
    with pytest.raises(ValueError, match=match):
        call()
    jax.tree.map(np.testing.assert_array_equal, kept, (X, Y, VARIABLES))
