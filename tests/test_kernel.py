"""The pieces of the solver against dense twins: adjoints, prox, the Levenberg–Marquardt step, weights, basis."""

import dense_twin
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_network, random_problem
from hypothesis import given, settings
from hypothesis import strategies as st

from cronos_flax import _admm, _basis, _linsolve, _program, _refresh, _weights

seeds = st.integers(0, 10_000)


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def rows_and_basis(seed, n=20, p=4, C=2, hidden_bias=True, output_bias=True):
    X, Y = random_problem(seed, n=n, p=p, C=C, dtype="float64")
    weight = np.random.default_rng(seed).uniform(0.5, 1.5, size=n)
    return _basis.eigenbasis(
        X, Y, jnp.asarray(weight / weight.mean()), hidden_bias=hidden_bias, output_bias=output_bias
    )


def random_program(seed, m=5, C=2, output_bias=True):
    rows, basis = rows_and_basis(seed, C=C, output_bias=output_bias)
    rng = np.random.default_rng(seed + 1)
    U = jnp.asarray(rng.normal(size=(rows.X.shape[1], m)))
    A = rng.normal(size=(m, C))
    A = jnp.asarray(A / np.linalg.norm(A, axis=1, keepdims=True))
    return _program.Program(rows, rows.X @ U >= 0, A, jnp.asarray(0.3)), U, basis


@settings(max_examples=20, deadline=None)
@given(seed=seeds, output_bias=st.booleans())
def test_adjoints(seed, output_bias):
    program, _, _ = random_program(seed, output_bias=output_bias)
    rng = np.random.default_rng(seed)
    Z, R = rng.normal(size=program.D.shape), rng.normal(size=program.rows.Y.shape)
    T = rng.normal(size=program.D.shape)
    assert float(jnp.vdot(program.F(Z), R)) == pytest.approx(float(jnp.vdot(Z, program.Ft(R))), abs=1e-10)
    assert float(jnp.vdot(program.G(Z), T)) == pytest.approx(float(jnp.vdot(Z, program.G(T))), abs=1e-10)
    np.testing.assert_allclose(program.G(program.G(Z)), Z)


@settings(max_examples=20, deadline=None)
@given(seed=seeds, threshold=st.floats(0, 5))
def test_group_prox_is_optimal(seed, threshold):
    U = jnp.asarray(np.random.default_rng(seed).normal(size=(4, 6)))
    V = _program.group_prox(U, threshold)
    size = np.linalg.norm(V, axis=0)
    for u, v, length in zip(U.T, V.T, size, strict=True):
        if length > 0:
            np.testing.assert_allclose(v - u + threshold * v / length, 0, atol=1e-10)
        else:
            assert np.linalg.norm(u) <= threshold * (1 + 1e-12)


@settings(max_examples=10, deadline=None)
@given(seed=seeds)
def test_the_structured_solve_solves_the_u_step(seed):
    program, U, basis = random_program(seed)
    kappa = jnp.asarray(0.1)
    rhs = jnp.asarray(np.random.default_rng(seed).normal(size=U.shape))
    got, XU, _ = _linsolve.Structured(200).solve(
        program, basis.eigenvalues, kappa, rhs, jnp.zeros_like(program.rows.Y), jnp.asarray(1e-12)
    )
    X = program.rows.X
    left = got + X.T @ (X @ got) + X.T @ program.Ft(program.F(X @ got)) / kappa
    np.testing.assert_allclose(left, rhs, atol=1e-8)
    np.testing.assert_allclose(XU, X @ got, atol=1e-12)


@settings(max_examples=10, deadline=None)
@given(seed=seeds)
def test_an_admm_step_is_the_published_one(seed):
    """One iteration against dense linear algebra on the uncompact variables, without over-relaxation's shortcut."""
    program, U0, basis = random_program(seed, m=3, C=1)
    rho, relax = 0.2, _admm._OVER_RELAXATION
    X, Y = np.asarray(program.rows.X), np.asarray(program.rows.center(program.rows.Y))
    signs = 2.0 * np.asarray(program.D) - 1
    d, m = U0.shape

    def dense(apply):
        return np.stack([np.asarray(apply(X @ e.reshape(d, m))).ravel() for e in np.eye(d * m)], axis=1)

    F, G = dense(program.F), dense(lambda Z: signs * Z)
    V, S = np.asarray(U0), np.maximum(signs * (X @ np.asarray(U0)), 0)
    Lambda = 0.3 / rho * V / np.linalg.norm(V, axis=0)
    N = np.zeros_like(S)
    iterate = _admm.init(program, U0, jnp.asarray(rho))
    for _ in range(3):
        rhs = (V - Lambda).ravel() + G.T @ (S - N).ravel() + F.T @ Y.ravel() / rho
        U = np.linalg.solve(np.eye(d * m) + G.T @ G + F.T @ F / rho, rhs)
        GU = (G @ U).reshape(S.shape)
        U = relax * U.reshape(d, m) + (1 - relax) * V
        GU = relax * GU + (1 - relax) * S
        size = np.linalg.norm(U + Lambda, axis=0)
        V_new = (U + Lambda) * np.maximum(1 - 0.3 / rho / size, 0)
        S_new = np.maximum(GU + N, 0)
        Lambda, N = Lambda + U - V_new, N + GU - S_new
        V, S = V_new, S_new
        exact = _Exact(200)
        iterate, _, _ = _admm.step(program, exact, basis.eigenvalues, jnp.asarray(rho), iterate)
        np.testing.assert_allclose(iterate.V_plus_dual, V + Lambda, atol=1e-8)
        np.testing.assert_allclose(iterate.S_plus_dual, S + N, atol=1e-8)


class _Exact(_linsolve.Structured):
    """The structured solve to rounding, so that a step can be compared with dense algebra."""

    def solve(self, program, eigenvalues, kappa, rhs, z, tol):
        return super().solve(program, eigenvalues, kappa, rhs, z, 0 * tol)


@settings(max_examples=15, deadline=None)
@given(seed=seeds, output_bias=st.booleans())
def test_the_refreshed_direction_is_the_levenberg_marquardt_step(seed, output_bias):
    program, U, basis = random_program(seed, output_bias=output_bias)
    X, A, beta, damping = program.rows.X, program.A, 0.3, 0.7
    size = np.linalg.norm(U, axis=0)

    # The network's residuals and their Jacobian, by automatic differentiation of the network itself.
    def residuals(U):
        return program.rows.center(jax.nn.relu(X @ U) @ A - program.rows.Y).ravel()

    J = np.asarray(jax.jacobian(residuals)(U)).reshape(-1, U.size)
    gradient = J.T @ np.asarray(residuals(U)) + (beta * np.asarray(U) / size).ravel()
    floored = np.maximum(size, _refresh._NORM_FLOOR * size.mean())
    diagonal = damping * (1 + np.asarray(basis.eigenvalues))[:, None] + beta / floored
    expected = np.linalg.solve(J.T @ J + np.diag(diagonal.ravel()), -gradient).reshape(U.shape)

    np.testing.assert_allclose(_refresh.gradient(program, U, X @ U), gradient.reshape(U.shape), atol=1e-9)
    operator = np.stack(
        [
            np.asarray(X.T @ program.Ft(program.F(X @ e.reshape(U.shape))) + diagonal * e.reshape(U.shape)).ravel()
            for e in np.eye(U.size)
        ],
        axis=1,
    )
    np.testing.assert_allclose(np.linalg.solve(operator, -gradient).reshape(U.shape), expected, atol=1e-9)
    # What the solver takes of it is a direction of descent.
    delta = _refresh.direction(program, basis.eigenvalues, jnp.asarray(damping), U, X @ U)
    assert float(np.sum(np.asarray(delta) * gradient.reshape(U.shape))) < 0


@settings(max_examples=20, deadline=None)
@given(seed=seeds, hidden_bias=st.booleans(), output_bias=st.booleans(), C=st.sampled_from([1, 3]))
def test_network_to_program_and_back(seed, hidden_bias, output_bias, C):
    rows, basis = rows_and_basis(seed, C=C, hidden_bias=hidden_bias, output_bias=output_bias)
    X, Y = random_problem(seed, n=20, p=4, C=C, dtype="float64")
    weight = np.random.default_rng(seed).uniform(0.5, 1.5, size=20)
    network = random_network(seed, p=4, m=5, C=C, hidden_bias=hidden_bias, output_bias=output_bias, dtype="float64")
    U, A = _weights.from_network(network, basis)
    back = _weights.to_network(rows, basis, U, A)
    for without_bias in (network, back):
        hidden = jax.nn.relu(rows.X @ U) @ A
        bias = 0 if without_bias.bias2 is None else without_bias.bias2
        root = np.sqrt(weight / weight.mean())[:, None]
        np.testing.assert_allclose(root * (_weights.predict(without_bias, X) - bias), hidden, atol=1e-9)
    beta = 0.01
    before = dense_twin.regularised_loss(network, X, Y, beta, weight)
    after = dense_twin.regularised_loss(back, X, Y, beta, weight)
    assert after <= before * (1 + 1e-12)
    objective = _program.network_objective(rows, A, beta * 20 / basis.scale, U, rows.X @ U) / 20
    assert float(objective) == pytest.approx(after, rel=1e-9)
    assert float(_weights.regularised_loss(back, X, Y, weight, beta)) == pytest.approx(after, rel=1e-12)


def test_a_neuron_without_output_weight_gets_a_direction_and_no_size():
    _, basis = rows_and_basis(0)
    network = random_network(0, p=4, m=5, C=2, dtype="float64")
    kernel2 = np.array(network.kernel2)
    kernel2[2] = 0
    U, A = _weights.from_network(_weights.TwoLayer(network.kernel1, network.bias1, kernel2, network.bias2), basis)
    assert np.all(U[:, 2] == 0)
    np.testing.assert_allclose(np.linalg.norm(A, axis=1), 1)


def test_a_dead_neuron_is_revived_where_it_lowers_the_loss():
    rows, basis = rows_and_basis(1, n=60, C=1)
    U = jnp.asarray(np.random.default_rng(1).normal(size=(rows.X.shape[1], 4))).at[:, 1:].set(0)
    A = _weights.default_directions(4, 1, U.dtype)
    iterate = _refresh.init(rows, U, A, jnp.asarray(1e-3), jnp.asarray(1.0), jax.random.key(0))
    after = _refresh.step(rows, basis.eigenvalues, jnp.asarray(1e-3), iterate)
    assert float(after.objective) < float(iterate.objective)
    assert int(jnp.sum(_program.norms(after.U) > 0)) > 1


def test_refitting_directions_is_the_ridge_solution():
    rows, _ = rows_and_basis(2, n=50, C=3)
    rng = np.random.default_rng(2)
    U = jnp.asarray(rng.normal(size=(rows.X.shape[1], 6)))
    A = jnp.asarray(np.eye(3)[np.arange(6) % 3])
    H = jax.nn.relu(rows.X @ U)
    beta = 0.5
    U_new, A_new, growth = _refresh.refit_directions(rows, U, A, H, jnp.asarray(beta))
    hidden = np.asarray(rows.center(H / np.sqrt(np.linalg.norm(U, axis=0))))
    W2 = np.linalg.solve(hidden.T @ hidden + beta * np.eye(6), hidden.T @ np.asarray(rows.Y))
    scaled = W2 * np.sqrt(np.linalg.norm(U, axis=0))[:, None]
    np.testing.assert_allclose(np.linalg.norm(U_new, axis=0)[:, None] * A_new, scaled, atol=1e-8)
    np.testing.assert_allclose(U_new, U * growth)


def test_conjugate_gradients_stop_at_the_tolerance_and_take_a_guess():
    rng = np.random.default_rng(0)
    root = rng.normal(size=(12, 12))
    matrix = jnp.asarray(root @ root.T + np.eye(12))
    rhs = jnp.asarray(rng.normal(size=12))
    x = _linsolve.conjugate_gradient(lambda v: matrix @ v, rhs, tol=1e-3, max_steps=100)
    assert np.linalg.norm(matrix @ x - rhs) / np.linalg.norm(rhs) < 1e-2
    again = _linsolve.conjugate_gradient(lambda v: matrix @ v, rhs, guess=x, tol=1e-10, max_steps=100)
    np.testing.assert_allclose(matrix @ again, rhs, atol=1e-8)
