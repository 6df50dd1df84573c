"""Features in blocks are the matrix they were cut from; callbacks are told what happens, and may end it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_problem
from hypothesis import given, settings
from hypothesis import strategies as st

import cronos_flax as cf
from cronos_flax._solver import blocks, host, u_step


def cut(X, *at):
    return np.split(X, at)


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    n=st.sampled_from([1, 16, 40]),
    piece=st.sampled_from([1, 4, 17]),
    cuts=st.integers(0, 5),
)
def test_products_of_blocks_are_those_of_the_matrix(seed, n, piece, cuts):
    rng = np.random.default_rng(seed)
    X, root, Q = rng.normal(size=(n, 3)), rng.uniform(0.5, 2, size=n), rng.normal(size=(4, 4))
    U, R = rng.normal(size=(4, 2)), rng.normal(size=(n, 2))
    with jax.enable_x64(True):
        source = blocks.Source(cut(X, *np.sort(rng.integers(0, n + 1, size=cuts))), X.shape, X.dtype)
        source.rows = piece
        with host.opened(source) as (number,):
            matrix = blocks.Blocks(number, n, 3, piece, X.dtype, jnp.asarray(2.0), jnp.asarray(root), Q, True)
            whole = root[:, None] * np.hstack([X / 2, np.ones((n, 1))]) @ Q
            assert matrix.shape == whole.shape
            np.testing.assert_allclose(matrix @ U, whole @ U, atol=1e-10)
            np.testing.assert_allclose(blocks.adjoint(matrix, R), whole.T @ R, atol=1e-10)
            index = rng.permutation(n)[: max(1, n // 2)]
            np.testing.assert_allclose(matrix[jnp.asarray(index)], whole[index], atol=1e-12)
            gram = matrix.fold(lambda gram, X: gram + X.T @ X, jnp.zeros((4, 4)))
            np.testing.assert_allclose(gram, whole.T @ whole, atol=1e-10)


@pytest.mark.parametrize("gates", ["refreshed", "fixed", "paired", "gated"])
def test_a_solve_in_blocks_is_the_solve_in_memory(gates, monkeypatch):
    monkeypatch.setattr(blocks, "_ROWS", 100)
    monkeypatch.setattr(cf.Structured, "plan", lambda *_: u_step.Plain)  # in memory, too
    monkeypatch.setattr(cf.Structured, "plan_without_cones", lambda *_: u_step.Kronecker)
    with jax.enable_x64(True):
        X, y = random_problem(0, n=350, p=6, C=2, dtype="float64")
        weight = np.random.default_rng(0).uniform(0, 2, size=350)
        solver = cf.Cronos(gates=gates, max_iters=12)
        in_memory = solver.solve(X, y, hidden=6, sample_weight=weight)
        in_blocks = solver.solve(cut(X, 3, 3, 270), y, hidden=6, sample_weight=weight)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), in_memory.params, in_blocks.params)
    np.testing.assert_allclose(in_memory.stats.objective_trace, in_blocks.stats.objective_trace, rtol=1e-8)


class OfJax:
    """Blocks that JAX makes."""

    def __init__(self, *parts):
        self.parts, self.dtypes = parts, set()

    def __iter__(self):
        for part in map(jnp.asarray, self.parts):
            self.dtypes.add(part.dtype)
            yield part


def test_in_the_threads_of_a_solve_64_bits_are_as_enabled_as_with_the_caller(monkeypatch):
    """Some reports were in float32, and so were blocks that JAX makes, without a word."""
    monkeypatch.setattr(blocks, "_ROWS", 100)
    rows, seen = [], set()

    def callback(row):
        seen.add(jnp.asarray(0.5).dtype)
        rows.append(row)

    with jax.enable_x64(True):
        X, y = random_problem(0, n=350, p=6, C=2, dtype="float64")
        made = OfJax(*cut(X, 3, 3, 270))
        cf.Cronos(gates="fixed", max_iters=12).solve(made, y, hidden=6, callback=callback)
    assert seen == made.dtypes == {np.dtype("float64")}
    assert all(type(row["iteration"]) is int for row in rows)
    assert all(row["program_objective"] != float(np.float32(row["program_objective"])) for row in rows)


@pytest.mark.parametrize("on", [np.asarray, jnp.asarray])
@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
def test_blocks_in_half_precision_are_taken_as_a_whole_array_is(kind, on):
    """Those of bfloat16 were refused, as no floating arrays."""
    X, y = random_problem(0)
    X, solver = X.astype(jnp.dtype(kind)), cf.Cronos(max_iters=2)
    in_memory = solver.solve(on(X), y, hidden=4)
    in_blocks = solver.solve([on(X[:9]), X[9:].astype("float32")], y, hidden=4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), in_memory.params, in_blocks.params)
    with pytest.raises(ValueError, match="`X` must be finite"):
        solver.solve([on(X * np.asarray(np.inf, X.dtype))], y, hidden=4)


class Failing:
    """Blocks that can be read a few times only."""

    def __init__(self, X):
        self.X, self.passes = X, 0

    def __iter__(self):
        self.passes += 1
        if self.passes > 3:
            raise OSError("the disk is gone")
        return iter([self.X])


def test_a_source_that_fails_says_what_it_said():
    X, y = random_problem(0)
    with pytest.raises(OSError, match="the disk is gone"):
        cf.Cronos(max_iters=3).solve(Failing(X), y, hidden=4)
    assert not host._open
    assert not host._errors


@pytest.mark.parametrize("gates", ["refreshed", "fixed", "gated"])
def test_a_callback_is_told_every_check(gates, dtype):
    X, y = random_problem(0, dtype=dtype)
    told = []
    solver = cf.Cronos(gates=gates, max_iters=30, tol=0.0)
    with_it = solver.solve(X, y, hidden=4, callback=told.append)
    without = solver.solve(X, y, hidden=4)
    np.testing.assert_array_equal(with_it.params.kernel1, without.params.kernel1)
    assert [row["iteration"] for row in told] == list(range(1, 31) if gates == "refreshed" else (10, 20, 30))
    assert all(type(value) in (int, float) for row in told for value in row.values())
    seconds = [row["seconds"] for row in told]
    assert seconds == sorted(seconds)
    loss = "objective" if gates == "refreshed" else "program_objective"
    traced = np.asarray(with_it.stats.objective_trace)[[row["iteration"] for row in told]]
    np.testing.assert_allclose([row[loss] for row in told], traced, rtol=1e-6)


@pytest.mark.parametrize("within", [jax.jit, jax.vmap])
@pytest.mark.parametrize("traced", ["X", "y", "sample_weight", "beta", "nothing"])
def test_inside_jit_and_vmap_what_needs_the_host_is_refused(traced, within):
    """A KeyError in an error of XLA, as the host had gone on when it was called."""
    X, y = random_problem(0)
    given = {"X": X, "y": y, "sample_weight": np.ones(len(X), "float32"), "beta": np.float32(0.1), "nothing": 0.0}

    def solve(value, **others):
        arguments = {**given, traced: value}
        solver = cf.Cronos(max_iters=2, beta=arguments.pop("beta"))
        del arguments["nothing"]
        return solver.solve(**{**arguments, **others}, hidden=4).status_code

    value = given[traced] if within is jax.jit else np.asarray(given[traced])[None]
    if (traced, within) != ("nothing", jax.vmap):  # there nothing is traced
        with pytest.raises(ValueError, match=r"solve: `callback` needs the host, .*Call solve outside"):
            within(lambda value: solve(value, callback=dict))(value)
        if traced != "X":
            with pytest.raises(ValueError, match="solve: `X` in blocks needs the host"):
                within(lambda value: solve(value, X=[X]))(value)


def test_what_a_callback_raises_ends_the_solve():
    X, y = random_problem(0)

    def stop(figures):
        if figures["iteration"] == 2:
            raise KeyError("enough")

    with pytest.raises(KeyError, match="enough"):
        cf.Cronos(max_iters=10).solve(X, y, hidden=4, callback=stop)
