"""The solver on arrays: optimality against CVXPY, descent, warm starts, tracing."""

import contextlib
import dataclasses
import itertools
import logging
from types import SimpleNamespace

import dense_twin
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_network, random_problem
from hypothesis import given, settings
from hypothesis import strategies as st

import cronos_flax as cf
from cronos_flax._solver import beta_max as betas
from cronos_flax._solver import beta_path, coordinates, cronos, descent, losses, padding, staging
from cronos_flax._solver import solve as solve_module


def optimum_of(solution, X, y, beta, weight=None, **biases):
    """The optimal value of the program that a solve with held gates has solved, by CVXPY in float64."""
    D, A = np.asarray(solution.state.D), np.asarray(solution.state.A, float)
    return dense_twin.program_optimum(X.astype(float), y.astype(float), D, A, beta, weight, **biases)


# n, p, m, C, biases, weights, β, gates, linear solver
PROGRAMS = [
    (50, 6, 9, C, biases, biases == (C == 1), beta, gates, solver)  # each two of C, biases and weights in each way
    for C in (1, 3)
    for biases in (True, False)
    for beta, gates, solver in (
        (0.02, "fixed", cf.Structured()),
        (0.1, "paired", cf.Structured()),
        (0.1, "paired", cf.NystromPCG(rank=10, max_steps=50)),
    )
] + [
    (50, 6, 9, 3, True, True, 1e-3, "fixed", cf.Structured()),  # these two share the programs of others above
    (50, 6, 9, 1, False, False, 1e-3, "fixed", cf.Structured()),
    (20, 8, 12, 1, True, False, 0.02, "fixed", cf.Structured()),
    (12, 8, 4, 3, True, False, 0.02, "fixed", cf.Structured()),
    (60, 1, 3, 1, True, True, 0.02, "fixed", cf.Structured()),
    (40, 3, 1, 3, False, False, 0.02, "fixed", cf.Structured()),
]


# In turn in each precision, so that each solver meets both.
@pytest.mark.parametrize(
    ("dtype", "number"), [(f"float{(64, 32)[i % 2]}", i) for i in range(len(PROGRAMS))], indirect=["dtype"]
)
def test_held_gates_reach_the_optimum_of_the_program(dtype, number):
    n, p, m, C, biases, weighted, beta, gates, linear_solver = PROGRAMS[number]
    X, y = random_problem(number, n=n, p=p, C=C, dtype=dtype)
    init = random_network(number, p=p, m=m, C=C, hidden_bias=biases, output_bias=biases, dtype=dtype)
    weight = np.random.default_rng(number).uniform(0.2, 2, size=n).astype(dtype) if weighted else None
    double = dtype == "float64"
    solver = cf.Cronos(
        beta=beta, gates=gates, linear_solver=linear_solver, max_iters=20_000, tol=5e-5 if double else 2e-4
    )
    solution = solver.solve(X, y, init=init, sample_weight=weight)
    stats = solution.stats
    optimum = optimum_of(solution, X, y, beta, weight, hidden_bias=biases, output_bias=biases)
    rounding = 1e-8 if double else 1e-6
    assert np.all(np.asarray(stats.lower_bound_trace) <= optimum * (1 + rounding) + rounding)
    assert float(stats.program_objective) == pytest.approx(optimum, rel=1e-4 if double else 1e-3)
    if linear_solver.accelerated:  # plain ADMM may need more iterations than a test should take
        assert solution.status == cf.Status.converged


@pytest.mark.parametrize("steps", [1, 3, 10])
@pytest.mark.parametrize("biases", [True, False])
def test_the_published_mode_is_the_published_algorithm_step_by_step(steps, biases):
    """Against dense numpy, from zero, on the program's own features; a full sketch makes the inner solves exact."""
    beta, rho, n, p, m = 0.05, 0.3, 30, 4, 6
    with jax.enable_x64(True):
        X, y = random_problem(steps, n=n, p=p, dtype="float64")
        init = random_network(0, p=p, m=m, hidden_bias=biases, output_bias=False, dtype="float64")
        solver = cf.Cronos(
            beta=beta, rho=rho, gates="paired", linear_solver=cf.NystromPCG(1000), max_iters=steps, tol=0.0
        )
        solution = solver.solve(X, y, init=init)
        kernel, bias = solution.state.hidden_plus_dual
        D, A = np.asarray(solution.state.D), np.asarray(solution.state.A)
    Z, s = dense_twin.scaled_features(X, None, biases)
    np.testing.assert_array_equal(D[:, ::2], D[:, 1::2])
    np.testing.assert_array_equal(A[::2], -A[1::2])
    zero = np.zeros((Z.shape[1], m))
    iterates = dense_twin.admm(Z, y, D, A, beta * n / s, rho, V=zero, Lambda=zero)
    V, Lambda, S, N = next(itertools.islice(iterates, steps - 1, None))
    got = np.vstack([s * np.asarray(kernel), np.asarray(bias)[None]]) if biases else s * np.asarray(kernel)
    np.testing.assert_allclose(got, V + Lambda, atol=1e-7)
    np.testing.assert_allclose(solution.state.S_plus_dual, S + N, atol=1e-7)


@pytest.mark.parametrize("max_iters", [1, 10, 100])
def test_the_bound_holds_at_every_check_and_converged_means_it(max_iters):
    for seed in range(4):
        X, y = random_problem(seed, C=2)
        solver = cf.Cronos(beta=0.01, gates="fixed", max_iters=max_iters)
        solution = solver.solve(X, y, init=random_network(seed, C=2))
        stats = solution.stats
        optimum = optimum_of(solution, X, y, 0.01)
        assert stats.lower_bound <= optimum * (1 + 1e-6)
        gap = abs(float(stats.program_objective - stats.lower_bound))
        conditions = gap <= 1e-3 * abs(float(stats.program_objective)) and float(stats.cone_violation) <= 1e-3
        assert (solution.status == cf.Status.converged) == conditions
        assert stats.objective <= stats.initial_objective


def test_digits_even_odd_refreshed_descends_far_below_held_gates(digits, optimised):
    X, labels = digits
    y = np.where(labels % 2 == 0, 1.0, -1.0).astype("float32")
    s = np.sqrt(np.mean(np.sum(X[:1400] ** 2, axis=1)))
    solver = cf.Cronos(beta=0.01 * s / 1400)
    solution = solver.solve(X[:1400], y[:1400], hidden=128)
    refreshed = float(solution.stats.objective) * 1400
    assert refreshed < 2.5
    outputs = np.asarray(cf.predict(solution.params, X[1400:]))[:, 0]
    assert np.mean((outputs > 0) == (y[1400:] > 0)) > 0.985
    assert np.all(np.diff(solution.stats.objective_trace) <= 0)
    held = dataclasses.replace(solver, gates="fixed", max_iters=100).solve(X[:1400], y[:1400], hidden=128)
    assert float(held.stats.objective) * 1400 >= 3 * refreshed
    assert float(held.stats.program_objective) * 1400 >= 3 * refreshed


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    shape=st.sampled_from([(2, 1, 1, 1), (7, 3, 4, 1), (30, 4, 9, 3), (12, 40, 5, 2)]),
    scale=st.sampled_from([1e-6, 1.0, 1e6]),
    beta=st.sampled_from([0.0, 1e-3, 1.0]),
    sparse=st.booleans(),
)
def test_the_refreshed_loss_never_rises(seed, shape, scale, beta, sparse):
    n, p, m, C = shape
    X, y = random_problem(seed, n=n, p=p, C=C)
    if sparse:
        filled = np.random.default_rng(seed).uniform(size=(n, 1)) > 0.3
        filled[0] = True  # a solve warns of rows that are all the same
        X = X * filled
    X = (X * scale).astype("float32")
    init = random_network(seed, p=p, m=m, C=C)
    solution = cf.Cronos(beta=beta, max_iters=15).solve(X, y, init=init)
    trace = np.asarray(solution.stats.objective_trace)
    assert np.all(np.isfinite(trace))
    assert np.all(np.diff(trace) <= 0)
    before = dense_twin.regularised_loss(init, X, y, beta)
    after = dense_twin.regularised_loss(solution.params, X, y, beta)
    assert after <= before * (1 + 1e-4)
    assert float(solution.stats.initial_objective) == pytest.approx(before, rel=1e-4)
    assert float(solution.stats.objective) == pytest.approx(after, rel=1e-3, abs=1e-4 * before)


@pytest.mark.parametrize(
    "make",
    [
        lambda X: np.hstack([X[:, :3], np.ones_like(X[:, 3:])]),
        lambda X: np.vstack([X[:20], X[:20]]),
        lambda X: np.outer(X[:, 0], X[0]),
        lambda X: np.zeros_like(X),
        lambda X: X * 1e30,
        lambda X: X * 1e-30,
        lambda X: X * 10.0 ** np.linspace(-6, 6, X.shape[1]),
        lambda X: X * (np.arange(len(X)) % 10 > 0)[:, None],
        lambda X: np.random.default_rng(0).normal(size=(12, 50)),
    ],
    ids=[
        "constant columns", "duplicate rows", "rank one", "all zero", "huge", "tiny", "columns of all scales",
        "a tenth zero rows", "d > n",
    ],
)  # fmt: skip
@pytest.mark.parametrize("gates", ["refreshed", "fixed", "paired", "gated"])
def test_degenerate_features_give_a_finite_result(make, gates):
    X, _ = random_problem(0)
    X = make(X).astype("float32")
    y = np.sin(np.arange(len(X), dtype="float32"))
    told = contextlib.nullcontext() if np.any(X) else pytest.warns(UserWarning, match="must differ from row to row")
    with told:
        solution = cf.Cronos(gates=gates, max_iters=30).solve(X, y, hidden=6)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(solution.params))
    assert np.isfinite(solution.stats.objective)
    assert solution.stats.objective <= solution.stats.initial_objective


@pytest.mark.parametrize("gates", ["refreshed", "fixed", "gated"])
def test_one_row_that_counts_is_fitted(gates):
    X, y = random_problem(0)
    weight = np.zeros(40, "float32")
    weight[7] = 2.0
    solution = cf.Cronos(gates=gates).solve(X, y, hidden=6, sample_weight=weight)
    np.testing.assert_allclose(cf.predict(solution.params, X[7:8]), y[7:8], atol=1e-2)


@pytest.mark.parametrize("gates", ["refreshed", "fixed", "gated"])
def test_equal_targets_are_fitted_by_the_output_bias(gates):
    X, _ = random_problem(0)
    solution = cf.Cronos(gates=gates).solve(X, np.full(40, 3.0, "float32"), hidden=6)
    np.testing.assert_allclose(cf.predict(solution.params, X), 3.0, rtol=1e-3)


def test_a_loss_that_is_not_finite_is_said_and_changes_nothing():
    X, y = random_problem(0)
    init = random_network(0)
    init = dataclasses.replace(init, kernel2=init.kernel2 * np.float32(1e30))
    solution = cf.Cronos().solve(X, y, init=init)
    assert solution.status == cf.Status.nonfinite
    assert "not finite" in solution.status.message
    np.testing.assert_array_equal(solution.params.kernel1, init.kernel1)


def test_the_result_does_not_depend_on_the_units_of_the_features():
    X, y = random_problem(1, n=60)
    init = random_network(1)
    a = cf.Cronos(beta=1e-3).solve(X, y, init=init)
    scaled = dataclasses.replace(init, kernel1=init.kernel1 / 8)
    b = cf.Cronos(beta=8e-3).solve(8 * X, y, init=scaled)
    np.testing.assert_allclose(cf.predict(a.params, X), cf.predict(b.params, 8 * X), atol=2e-3)


@pytest.mark.parametrize("loss", ["softmax", "squared"])
@pytest.mark.parametrize("scale", [1e3, 1e6])
def test_a_start_whose_outputs_are_far_too_large_leads_as_far_as_any(loss, scale):
    """Fresh weights on columns of unlike scale ended at a hundred times the loss of the best constant, "stationary"."""
    X = np.random.default_rng(0).normal(size=(300, 6)).astype("float32")
    labels = (X[:, :3] + 0.3 * X[:, 3:]).argmax(axis=1)
    y = labels if loss == "softmax" else cf.signed_targets(labels, 3)
    X[:, :2] *= scale
    solver, start = cf.Cronos(loss=loss), random_network(0, p=6, m=12, C=3)
    stats = solver.solve(X, y, init=start).stats
    assert stats.initial_objective > 100 * stats.null_loss
    assert stats.objective < 0.8 * stats.null_loss
    fresh = solver.solve(X, y, hidden=12).stats
    assert stats.objective < 1.3 * fresh.objective
    traced = jax.jit(lambda X: solver.solve(X, y, init=start, num_classes=3).stats.objective)
    assert float(traced(X)) == pytest.approx(float(stats.objective), rel=0.1)


def test_a_weight_of_k_is_k_copies_and_a_weight_of_zero_is_absence():
    X, y = random_problem(2, n=30, dtype="float64")
    counts = np.random.default_rng(2).permutation(np.repeat([0, 1, 2], 10))  # of sum 30: one program solves both
    init = random_network(2)
    with jax.enable_x64(True):
        solver = cf.Cronos(beta=0.01, gates="fixed", max_iters=3000, tol=1e-7)
        weighted = solver.solve(X, y, init=init, sample_weight=counts.astype(float)).stats
        repeated = solver.solve(np.repeat(X, counts, axis=0), np.repeat(y, counts, axis=0), init=init).stats
    assert float(weighted.initial_objective) == pytest.approx(float(repeated.initial_objective), rel=1e-12)
    assert float(weighted.program_objective) == pytest.approx(float(repeated.program_objective), rel=1e-3)


@pytest.mark.parametrize("gates", ["refreshed", "fixed", "gated"])
def test_rows_of_no_weight_are_as_if_absent(gates):
    X, y = random_problem(2)
    init = random_network(2)
    weight = np.repeat([1.0, 0.0], 40).astype("float32")
    solver = cf.Cronos(beta=0.01, gates=gates)

    def with_rows(X_more, y_more):
        return solver.solve(np.vstack([X, X_more]), np.vstack([y, y_more]), init=init, sample_weight=weight)

    with_them, with_others = with_rows(100 * X, -y), with_rows(X - 3, 7 * y)
    without = solver.solve(X, y, init=init)
    assert float(with_them.stats.initial_objective) == pytest.approx(float(without.stats.initial_objective), rel=1e-5)
    assert float(with_them.stats.objective) == pytest.approx(float(with_others.stats.objective), rel=1e-4)
    assert float(with_them.stats.objective) == pytest.approx(float(without.stats.objective), rel=1e-4)


@pytest.mark.parametrize("gates", ["refreshed", "fixed"])
def test_rows_of_no_weight_may_have_any_features(gates):
    """The square of 1e30, and a loss there, are infinite: times a weight of zero they were NaN."""
    X, y = random_problem(2)
    weight = np.repeat([1.0, 0.0], 40).astype("float32")
    solver, init = cf.Cronos(beta=0.01, gates=gates), random_network(2)

    @jax.jit  # outside of it they are left out where gates are refreshed
    def solved(X_more):
        rows = jnp.concatenate([X, X_more]), jnp.concatenate([y, y])
        return solver.solve(*rows, init=init, sample_weight=weight).stats.objective

    assert float(solved(np.full_like(X, 1e30))) == pytest.approx(float(solved(X)), rel=1e-4)


def test_the_objective_has_a_slope_in_weights_that_are_zero():
    X, y = random_problem(2, dtype="float64")
    weight = np.repeat([1.0, 0.0], 20)
    with jax.enable_x64(True):
        network = jax.tree.map(lambda part: part.astype(float), random_network(2))

        @jax.jit
        def objective(weight):
            return cf.Cronos().objective(network, X, y, 0.1, sample_weight=weight)

        step = 1e-6 * (weight == 0)
        slope = (objective(weight + step) - objective(weight)) / 1e-6
        assert float(jax.grad(objective)(weight) @ (weight == 0)) == pytest.approx(float(slope), rel=1e-4)


@pytest.mark.parametrize("C", [2, 10])
def test_rows_that_come_in_turns_are_solved_as_any_others(C):
    """A regular sample of rows whose classes come in turns has rows of one class only."""
    X, turns = np.random.default_rng(0).normal(size=(1280, 6)).astype("float32"), np.arange(1280) % C
    X[:, 0] += turns  # something to learn
    order = np.random.default_rng(1).permutation(1280)
    solver = cf.Cronos(loss="softmax", beta=1e-3, max_iters=60)
    in_turns, shuffled = (solver.solve(X[rows], turns[rows], hidden=32).stats for rows in (slice(None), order))
    assert float(in_turns.objective) == pytest.approx(float(shuffled.objective), rel=0.05)
    assert float(in_turns.objective) < 0.9 * float(in_turns.initial_objective)


def test_the_first_damping_hardly_matters(digits, optimised):
    X, labels = digits[0][:600], digits[1][:600]
    y = np.where(labels % 2 == 0, 1.0, -1.0).astype("float32")

    def end(rho, seed):
        return float(cf.Cronos(rho=rho).solve(X, y, hidden=64, key=jax.random.key(seed)).stats.objective)

    ends = [np.mean([end(rho, seed) for seed in range(3)]) for rho in (0.1, 1.0, 10.0)]
    assert max(ends) <= 1.08 * min(ends)  # over many seeds .1 is 5 % above 1


def test_a_refreshed_solve_can_be_certified_at_its_final_gates():
    X, y = random_problem(0, n=60, C=2)
    stats = cf.Cronos(beta=0.02, certify_iters=2000).solve(X, y, hidden=8).stats
    assert stats.lower_bound <= stats.objective * (1 + 1e-5)
    assert float(stats.program_objective) == pytest.approx(float(stats.lower_bound), rel=2e-3)
    plain = cf.Cronos(beta=0.02).solve(X, y, hidden=8).stats
    assert plain.lower_bound is None
    assert float(plain.objective) == float(stats.objective)


def test_above_beta_max_the_network_is_constant_and_below_it_is_not(digits):
    X, labels = digits
    X, y = X[:300], np.where(labels[:300] < 5, 1.0, -1.0).astype("float32")
    default = float(cf.Cronos(max_iters=1).solve(X, y, hidden=4).stats.beta)
    beta_max = default / cronos.BETA_RATIO
    constant = 0.5 * np.var(y)
    above = cf.Cronos(beta=1.02 * beta_max, max_iters=500, tol=1e-6).solve(X, y, hidden=32)
    below = cf.Cronos(beta=0.5 * beta_max, max_iters=500, tol=1e-6).solve(X, y, hidden=32)
    assert float(above.stats.objective) == pytest.approx(constant, rel=1e-2)
    assert float(below.stats.objective) < 0.98 * constant


def test_beta_max_agrees_over_orders_of_the_rows_and_is_above_what_random_neurons_show(digits):
    """Before: the default β moved nearly three-fold with the key."""
    X, labels = digits
    y = np.where(labels < 5, 1.0, -1.0).astype("float32")[:, None]
    rows, _ = coordinates.scaled(X, y, jnp.ones(len(X)), losses.Squared(), hidden_bias=True, output_bias=True)
    some = jax.jit(betas.beta_max)
    orders = [np.random.default_rng(seed).permutation(len(X)) for seed in range(4)]
    found = np.asarray([some(rows.take(jnp.asarray(order))) for order in (*orders, np.argsort(labels))])
    assert found.max() / found.min() < 1.03
    u = jax.random.normal(jax.random.key(9), (rows.X.shape[1], 1000))
    random = jnp.linalg.norm(jax.nn.relu(rows.X @ (u / jnp.linalg.norm(u, axis=0))).T @ rows.center(rows.Y), axis=1)
    assert found.min() > float(jnp.max(random))


@pytest.mark.parametrize("scale", [1e-12, 1e-5, 1e-2, 1e10])
def test_a_random_start_is_in_the_units_of_the_targets(scale):
    rng = np.random.default_rng(0)
    X = rng.normal(size=(300, 10)).astype("float32")
    y = (X[:, 0] + np.abs(X[:, 1])).astype("float32")
    plain, scaled = (cf.Cronos(max_iters=30).solve(X, size * y, hidden=32).stats for size in (1.0, scale))
    assert float(plain.objective) < 0.1 * float(plain.null_loss)
    shares = [float(stats.objective) / float(stats.null_loss) for stats in (plain, scaled)]
    assert shares[0] == pytest.approx(shares[1], rel=0.1)  # but for rounding, which grows along the way


def test_state_continues_a_refreshed_solve(digits):
    X, labels = digits
    y = cf.signed_targets(labels, 10)
    short = cf.Cronos(beta=1e-4, max_iters=10, tol=0.0)
    with jax.enable_x64(True):  # the way is the same but for rounding, which in float32 grows to per cents
        X, y = X.astype("float64"), np.asarray(y, "float64")
        first = short.solve(X, y, hidden=32)
        second = short.solve(X, y, state=first.state)
        whole = dataclasses.replace(short, max_iters=20).solve(X, y, hidden=32)
        assert float(second.stats.initial_objective) == pytest.approx(float(first.stats.objective), rel=1e-5)
        assert float(second.stats.objective) == pytest.approx(float(whole.stats.objective), rel=1e-6)


@pytest.mark.parametrize("linear_solver", [cf.Structured(), cf.NystromPCG()])
def test_state_continues_admm_where_it_stopped(linear_solver):
    with jax.enable_x64(True):
        X, y = random_problem(3, dtype="float64")
        short = cf.Cronos(beta=0.01, gates="fixed", linear_solver=linear_solver, max_iters=40, tol=0.0)
        first = short.solve(X, y, init=random_network(3, dtype="float64"))
        second = short.solve(X, y, state=first.state)
        at_once = second.stats.objective_trace[0]
        assert float(at_once) == pytest.approx(float(first.stats.program_objective), rel=1e-9)
        assert float(second.stats.lower_bound) > float(first.stats.lower_bound)
        assert int(second.state.iteration) == 80


def test_sweeping_beta_rho_tol_and_iterations_compiles_once(caplog):
    X, y = random_problem(4)
    cf.Cronos(beta=0.1, rho=1.0, tol=1e-6).solve(X, y, hidden=5)
    with jax.log_compiles(True), caplog.at_level(logging.WARNING):
        for beta, rho, tol, most in [(0.2, 2.0, 1e-3, 40), (jnp.float32(0.3), 0.1, 1e-4, 7), (1, 3, 0, 600)]:
            cf.Cronos(beta=beta, rho=rho, tol=tol, max_iters=most).solve(X + 1, y, hidden=5)
    compiled = [record.message.split()[1] for record in caplog.records if "Compiling" in record.message]
    assert not {"jit(_begin_refreshed)", "jit(step)", "jit(_end_refreshed)"} & set(compiled)
    caplog.clear()
    with jax.log_compiles(True), caplog.at_level(logging.WARNING):
        cf.Cronos().solve(X[:, :3], y, hidden=5)
    assert "Compiling jit(step)" in caplog.text  # what is looked for


@pytest.mark.parametrize("gates", ["fixed", "paired", "gated"])
def test_another_number_of_iterations_with_held_gates_compiles_nothing(gates, caplog):
    """Traces have the length that was asked for, in the caller's ``jit`` too."""
    X, y = random_problem(4)
    solver = cf.Cronos(gates=gates, beta=0.01, tol=0.0, max_iters=30)
    long = solver.solve(X, y, hidden=4)
    with jax.log_compiles(True), caplog.at_level(logging.WARNING):
        others = {m: dataclasses.replace(solver, max_iters=m).solve(X, y, hidden=4).stats for m in (1, 25, 45)}
        dataclasses.replace(solver, tol=None, rho=2.0).solve(X, y, hidden=4)
    assert "Compiling" not in caplog.text
    for most, stats in others.items():
        trace, bounds = np.asarray(stats.objective_trace), np.asarray(stats.lower_bound_trace)
        assert trace.shape == bounds.shape == (most + 1,)
        assert int(stats.iterations) == most
        seen = 1 if most < 10 else 20  # the checks of both: of the start, after ten iterations and after twenty
        np.testing.assert_array_equal(trace[:seen], long.stats.objective_trace[:seen])
        assert bounds[-1] == pytest.approx(float(stats.lower_bound), rel=1e-6)
    traced = jax.eval_shape(lambda X: solver.solve(X, y, hidden=4).stats, X)
    assert traced.objective_trace.shape == traced.lower_bound_trace.shape == (31,)


@pytest.mark.parametrize("loss", ["squared", "softmax"])
def test_another_number_of_rows_of_the_same_size_class_compiles_nothing(loss, caplog):
    """Labels too, and weights, of some rows more."""
    X, y = random_problem(4, n=100)
    y = y if loss == "squared" else (y[:, 0] > 0).astype("int32")
    weight, solver = np.linspace(1, 2, 100), cf.Cronos(loss=loss, max_iters=3)
    solver.solve(X[:40], y[:40], hidden=6, sample_weight=weight[:40])
    with jax.log_compiles(True), caplog.at_level(logging.WARNING):
        solver.solve(X, y, hidden=6, sample_weight=weight)
    compiled = {record.message.split()[1] for record in caplog.records if "Compiling" in record.message}
    assert compiled <= {"jit(_revived)"}  # dead neurons may come up in the second only


@pytest.mark.parametrize("n", [90, 140, 2100])
@pytest.mark.parametrize(("folds", "hidden"), [(None, 7), (3, 9)])  # shapes of no other test
def test_a_path_compiles_each_of_its_programs_once(n, folds, hidden, caplog):
    """Rows to fit were of another number than all rows, and so of another program; so was each fold."""
    X, y = random_problem(4, n=n)
    with jax.log_compiles(True), caplog.at_level(logging.WARNING):
        cf.Cronos(beta="path", max_iters=3, folds=folds).solve(X, y, hidden=hidden)
    compiled = [record.message.split()[1] for record in caplog.records if "Compiling" in record.message]
    assert compiled.count("jit(step)") == 1
    assert compiled.count("jit(_begin_refreshed)") <= 2  # from a random network, and from one that is there
    assert compiled.count("jit(_mean_loss)") == 1


@pytest.mark.parametrize("n", [100, 2050, 3000])
def test_rows_held_out_by_their_weight_change_nothing_but_samples(n, monkeypatch):
    """They come after the others, in the same arrays: the fit is as without them."""
    X, y = random_problem(5, n=n, dtype="float64")
    with jax.enable_x64(True):
        solver = cf.Cronos(beta="path", max_iters=60)
        stats = solver.solve(X, y, hidden=5).stats
        monkeypatch.setattr(beta_path, "mesh_of", lambda _: "a mesh")  # so that rows are taken
        taken = solver.solve(X, y, hidden=5).stats
    np.testing.assert_allclose(stats.path_losses, taken.path_losses, rtol=0.02)
    assert float(stats.objective) == pytest.approx(float(taken.objective), rel=0.02)


@dataclasses.dataclass(frozen=True)
class Counts(cf.Loss):
    """Poisson's, of the logarithm of a mean; in float32 infinite from 89 on."""

    def value(self, outputs, targets):
        return jnp.sum(jnp.exp(outputs) - targets * outputs, axis=1)


def test_a_path_fits_whatever_the_loss_of_the_rows_that_are_held_out(monkeypatch):
    """Where it was infinite, times a weight of zero, each fit gave back the network that it had started from."""
    rng = np.random.default_rng(0)
    X = rng.normal(size=(400, 3)).astype("float32")
    y = rng.poisson(np.exp(0.5 + X[:, 0])).astype("float32")
    X[7, 0] = 200
    monkeypatch.setattr(beta_path, "held_out", lambda y, key: np.arange(len(y)) % 5 == 2)
    with pytest.warns(UserWarning, match="finite losses on the rows that it chooses on, got none"):
        stats = cf.Cronos(loss=Counts(), beta="path").solve(X, y, hidden=16).stats
    assert float(stats.beta) == stats.path_betas[0]
    assert np.all(np.isinf(stats.path_losses))  # of networks that grow with the feature, as the counts do


@pytest.mark.parametrize(("loss", "n"), [("squared", 40), ("softmax", 140)])
def test_rows_that_pad_change_nothing_but_rounding(loss, n, monkeypatch):
    X, y = random_problem(3, n=n, dtype="float64")
    y = y if loss == "squared" else (y[:, 0] > 0).astype("int32")
    with jax.enable_x64(True):  # in float32 rounding grows to per cents

        def params():
            solver = cf.Cronos(loss=loss, max_iters=10, beta_ratio=0.2)  # a penalty that counts
            return solver.solve(X, y, hidden=5, key=jax.random.key(1)).params

        padded = params()
        monkeypatch.setattr(solve_module, "padded", lambda *_: None)
        for one, other in zip(jax.tree.leaves(padded), jax.tree.leaves(params()), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("loss", ["squared", "softmax"])
@pytest.mark.parametrize("rows_at_once", [7, 100])
def test_rows_in_pieces_change_nothing_but_rounding(loss, rows_at_once, monkeypatch):
    X, y = random_problem(3, n=301, C=3, dtype="float64")
    y = y if loss == "squared" else y.argmax(axis=1)
    some = cf.Refreshed(few_rows=64, least_sample=32, window=2, sampled_tol=1.0)  # samples at first, then all rows
    solver = cf.Cronos(loss=loss, tol=0.0, max_iters=12, beta_ratio=0.2, refreshed=some)
    with jax.enable_x64(True):
        whole = solver.solve(X, y, hidden=5, key=jax.random.key(1)).stats
        monkeypatch.setattr(coordinates, "_MANY_BYTES", 0)
        monkeypatch.setattr(coordinates, "_PIECE_BYTES", rows_at_once * 5 * 8)
        in_pieces = solver.solve(X, y, hidden=5, key=jax.random.key(1)).stats
    np.testing.assert_allclose(in_pieces.objective_trace, whole.objective_trace, rtol=1e-8)
    assert int(whole.cg_steps) > 12 * some.cg_steps


@dataclasses.dataclass(frozen=True)
class Poisson(cf.Loss):
    """Of a mean that is the output itself: infinite at 0, where a row of no weight has its output."""

    def value(self, outputs, targets):
        return jnp.sum(outputs - targets * jnp.log(outputs), axis=1)

    def constant(self, targets, weight):
        return weight @ targets / jnp.sum(weight)


def test_a_loss_that_is_not_finite_at_zero_can_be_solved():
    X, _ = random_problem(3, n=40)
    solution = cf.Cronos(loss=Poisson(), beta=1e-3).solve(X, 3 + np.abs(X[:, 0]), hidden=5)
    assert solution.stats.objective < solution.stats.initial_objective - 0.01


def test_a_solve_of_rows_that_are_committed_to_a_device_is_committed_to_it():
    data = random_problem(0)
    for rows, committed in ((data, False), (jax.device_put(data, jax.devices()[0]), True)):
        solution = cf.Cronos(beta=1e-2, max_iters=2).solve(*rows, hidden=6)
        assert solution.params.kernel1.committed == committed


@pytest.mark.parametrize("n", [1, 127, 128, 129, 256, 257, 2047, 2048])
def test_rows_are_padded_only_where_no_step_looks_at_a_sample_of_them(n):
    size = padding.size_class(n, cf.Refreshed())
    assert n <= size <= 2048
    assert (n <= 128) == (size <= 128)  # up to so many, step lengths are compared on all rows
    assert size < 2 * max(n, 128)
    assert padding.size_class(2049, cf.Refreshed()) is None
    assert padding.size_class(n, cf.Refreshed(least_warm_up=1)) is None  # first steps would draw from them


def test_solve_goes_through_vmap_and_jit():
    X, y = random_problem(5, dtype="float64")

    @jax.jit
    @jax.vmap
    def objective(beta):
        return cf.Cronos(beta=beta, max_iters=20).solve(X, y, hidden=5).stats.objective

    with jax.enable_x64(True):  # in float32 rounding grows to per cents
        sweep = jnp.asarray([1e-3, 1e-1])
        one_by_one = [cf.Cronos(beta=float(beta), max_iters=20).solve(X, y, hidden=5).stats.objective for beta in sweep]
        np.testing.assert_allclose(objective(sweep), one_by_one, rtol=1e-6)


@pytest.mark.parametrize("gates", ["refreshed", "fixed", "gated"])
def test_nothing_is_promoted_silently(dtype, gates, strict_promotion):
    X, y = random_problem(6, C=2, dtype=dtype)
    solution = cf.Cronos(gates=gates, max_iters=5).solve(X, y, hidden=4)
    floats = [leaf for leaf in jax.tree.leaves(solution) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert {str(leaf.dtype) for leaf in floats} == {dtype}


def test_a_solve_is_differentiated_forwards():
    """Outside jit the doubts about a result looked at its losses, which are not known there."""
    X, y = random_problem(0)
    solver = cf.Cronos(beta=1e-2, max_iters=5)

    def objective(y):
        return solver.solve(X, y, hidden=4).stats.objective

    for f in (objective, jax.jit(objective)):
        value, slope = jax.jvp(f, (y,), (y,))
        apart = 1e-3
        expected = (objective((1 + apart) * y) - objective((1 - apart) * y)) / (2 * apart)
        np.testing.assert_allclose(value, objective(y), rtol=1e-4)
        np.testing.assert_allclose(slope, expected, rtol=0.02)


def test_a_one_dimensional_target_is_one_column():
    X, y = random_problem(7)
    a, b = (cf.Cronos(max_iters=5).solve(X, t, hidden=6) for t in (y, y[:, 0]))
    np.testing.assert_array_equal(a.params.kernel2, b.params.kernel2)
    assert cf.predict(a.params, X).shape == (40, 1)


def test_missing_biases_stay_missing():
    X, y = random_problem(8)
    init = random_network(8, hidden_bias=False, output_bias=False)
    params = cf.Cronos().solve(X, y, init=init).params
    assert params.bias1 is None
    assert params.bias2 is None


def ends_at(objectives, null, patience, tol=1e-3):
    """The step after which a descent with these objectives ends; None if it goes on."""
    control, refined = staging.OnHost, cf.Refreshed()
    null = None if null is None else np.float32(null)
    limits = descent.Limits(np.float32(tol), len(objectives), null, patience)

    def at(objective):
        return SimpleNamespace(objective=np.float32(objective), has_dead=np.asarray(False))

    now = descent.begin(control, 4096, at(objectives[0]), None, limits, refined)
    for step, objective in enumerate(objectives[1:], 1):
        now = descent.judged(control, now, at(objective), None, limits, refined)
        if not now.goes_on:
            assert now.stagnated
            return step
    return None


def test_without_a_tolerance_a_solve_ends_when_going_on_would_not_pay():
    falling = 1.0 / np.arange(1, 91)  # ten steps bring a 200th of the whole up to step 50
    assert ends_at(falling, null=1.0, patience=10) == 50
    assert ends_at(falling, null=1.0, patience=20) > 50
    assert ends_at(falling, null=None, patience=0) is None  # a tolerance that was asked for
    # From a good start what counts is what the network explains, not what this solve gained.
    assert ends_at(0.1 * (1 + falling / 40), null=1.0, patience=10) == 10
    # Not below what a constant gives, it goes on as long as the loss falls.
    assert ends_at(2.0 + falling[:61], null=1.0, patience=10) is None


def test_iterations_that_cost_little_are_many_before_a_solve_ends():
    small, large = (descent.patience(*shape, cf.Refreshed()) for shape in ((1000, 20, 32, 3), (10_000, 384, 512, 77)))
    assert small > 500
    assert large == cf.Refreshed().window


def test_a_stage_of_few_entries_is_compiled_without_optimisation_and_gives_the_same(optimised):
    def scaled(x):
        return jnp.exp(x) / jnp.sum(jnp.exp(x))

    stage, few, many = staging.Stage(scaled, few=64), np.linspace(0, 1, 64), np.linspace(0, 1, 65)
    quick, slow = stage.compiled((few,)), stage.compiled((many,))
    assert quick is not slow
    assert stage.compiled((many[1:],)) is quick
    np.testing.assert_allclose(quick((few,), ()), slow((few,), ()), rtol=1e-6)
    jax.config.update("jax_disable_most_optimizations", True)  # as the fixture was called in, and leaves it
    assert stage.compiled((many,)) is quick


@pytest.mark.parametrize(
    "settings",
    [
        cf.Refreshed(damping_range=(np.float64(1e-8), 1e8), cg_tol=np.float64(0.1), cg_steps=np.int64(3)),
        cf.Held(kappa=np.float64(4), step_lengths=(np.float32(1), 0)),
        cf.Huber(np.float64(1)),
        cf.Structured(np.int8(50)),
        cf.NystromPCG(np.uint8(20)),
        cf.Cronos(max_iters=np.int8(127), folds=np.int64(3)),
        cf.Guard(tolerance=np.float64(0.1)),
        cf.Alternation(largest_step=np.float64(0.02)),
    ],
    ids=lambda settings: type(settings).__name__,
)
def test_settings_are_numbers_of_python(settings):
    """NumPy's are equal to them, so what was compiled for them is taken for these, and they promote."""
    values = [getattr(settings, field.name) for field in dataclasses.fields(settings)]
    values += [number for value in values if isinstance(value, tuple) for number in value]
    assert not [value for value in values if isinstance(value, np.generic)]


def test_settings_in_double_precision_leave_features_in_single_precision(strict_promotion):
    """A `damping_range` of np.float64 was a TypeError, in this solve and in all later ones with default settings."""
    X, y = random_problem(1)
    with jax.enable_x64(True):
        for refreshed in (cf.Refreshed(damping_range=(np.float64(1e-8), np.float64(1e8))), cf.Refreshed()):
            solution = cf.Cronos(max_iters=2, refreshed=refreshed).solve(X, y, hidden=4)
            assert solution.stats.objective.dtype == np.float32
