"""The pieces of the solver against dense twins: adjoints, prox, the Levenberg–Marquardt step, weights, basis."""

import dataclasses
import functools

import dense_twin
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from conftest import random_network, random_problem, random_targets
from hypothesis import given, settings
from hypothesis import strategies as st

import cronos_flax as cf
from cronos_flax._solver import (
    admm,
    blocks,
    coordinates,
    descent,
    gauss_newton,
    host,
    linear_solvers,
    losses,
    numerics,
    refreshed,
    u_step,
)
from cronos_flax._solver import beta_max as betas
from cronos_flax._solver import program as programs
from cronos_flax._solver.staging import OnHost

seeds = st.integers(0, 10_000)
SETTINGS = cf.Refreshed()


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def rows_and_basis(seed, n=20, p=4, C=2, hidden_bias=True, output_bias=True, loss="squared"):
    X, Y = random_problem(seed, n=n, p=p, C=C, dtype="float64")
    if loss != "squared":
        Y = random_targets(loss, seed, n, C)
    weight = np.random.default_rng(seed).uniform(0.5, 1.5, size=n)
    biases = {"hidden_bias": hidden_bias, "output_bias": output_bias}
    scaled = coordinates.scaled(X, jnp.asarray(Y), jnp.asarray(weight / weight.mean()), losses.loss_of(loss), **biases)
    return coordinates.rotated(*scaled)


def random_program(seed, m=5, C=2, output_bias=True, loss="squared"):
    rows, basis = rows_and_basis(seed, C=C, output_bias=output_bias, loss=loss)
    rng = np.random.default_rng(seed + 1)
    U = jnp.asarray(rng.normal(size=(rows.X.shape[1], m)))
    A = rng.normal(size=(m, C))
    A = jnp.asarray(A / np.linalg.norm(A, axis=1, keepdims=True))
    return programs.Program(rows, rows.X @ U >= 0, A, jnp.asarray(0.3), basis.eigenvalues), U


@settings(max_examples=12, deadline=None)
@given(seed=seeds, output_bias=st.booleans())
def test_adjoints(seed, output_bias):
    program, _ = random_program(seed, output_bias=output_bias)
    rng = np.random.default_rng(seed)
    Z, R = rng.normal(size=program.D.shape), rng.normal(size=program.rows.Y.shape)
    T = rng.normal(size=program.D.shape)
    assert float(jnp.vdot(program.F(Z), R)) == pytest.approx(float(jnp.vdot(Z, program.Ft(R))), abs=1e-10)
    assert float(jnp.vdot(program.G(Z), T)) == pytest.approx(float(jnp.vdot(Z, program.G(T))), abs=1e-10)
    np.testing.assert_allclose(program.G(program.G(Z)), Z)


@settings(max_examples=12, deadline=None)
@given(seed=seeds, threshold=st.floats(0, 5))
def test_group_prox_is_optimal(seed, threshold):
    U = jnp.asarray(np.random.default_rng(seed).normal(size=(4, 6)))
    V = programs.group_prox(U, threshold)
    size = np.linalg.norm(V, axis=0)
    for u, v, length in zip(U.T, V.T, size, strict=True):
        if length > 0:
            np.testing.assert_allclose(v - u + threshold * v / length, 0, atol=1e-10)
        else:
            assert np.linalg.norm(u) <= threshold * (1 + 1e-12)


def u_step_residual(program, kappa, U, rhs):
    X = program.rows.X
    return U + X.T @ (X @ U) + X.T @ program.Ft(program.F(X @ U)) / kappa - rhs


@pytest.mark.parametrize("plan", [u_step.Woodbury, u_step.Preconditioned, u_step.Plain])
@pytest.mark.parametrize("output_bias", [True, False])
@pytest.mark.parametrize("C", [1, 3])
def test_the_structured_solve_solves_the_u_step(monkeypatch, plan, output_bias, C):
    monkeypatch.setattr(linear_solvers.Structured, "plan", lambda self, n, d, m, C: plan)
    for seed in range(4):
        program, U = random_program(seed, C=C, output_bias=output_bias)
        kappa = jnp.asarray(0.1)
        rhs = jnp.asarray(np.random.default_rng(seed).normal(size=U.shape))
        solver = linear_solvers.Structured(200)
        prepared = solver.prepare(program, kappa, jax.random.key(0))
        assert type(prepared) is plan
        late = jnp.asarray(10**7)  # the inner tolerance shrinks with the iterations
        got, XU, _ = solver.solve(program, kappa, prepared, rhs, jnp.zeros_like(program.rows.Y), late)
        np.testing.assert_allclose(u_step_residual(program, kappa, got, rhs), 0, atol=1e-6)
        np.testing.assert_allclose(XU, program.rows.X @ got, atol=1e-12)


@pytest.mark.parametrize(
    ("shape", "plan"),
    [
        ((1400, 65, 128, 1), u_step.Woodbury),
        ((6000, 785, 64, 1), u_step.Woodbury),
        ((6000, 20, 8, 1), u_step.Plain),
        ((60_000, 785, 64, 1), u_step.Plain),
        ((5000, 785, 64, 10), u_step.Preconditioned),
    ],
)
def test_the_cost_model_takes_a_factor_where_it_pays(shape, plan):
    assert linear_solvers.Structured().plan(*shape) is plan


def test_nystrom_pcg_solves_the_u_step_and_its_sketch_is_below_the_operator():
    program, U = random_program(0)
    kappa = jnp.asarray(0.1)
    rhs = jnp.asarray(np.random.default_rng(0).normal(size=U.shape))
    for rank in (1, 5, 1000):
        solver = linear_solvers.NystromPCG(rank, 500)
        prepared = solver.prepare(program, kappa, jax.random.key(0))
        got, _, _ = solver.solve(program, kappa, prepared, rhs, None, jnp.asarray(10**7))
        np.testing.assert_allclose(u_step_residual(program, kappa, got, rhs), 0, atol=1e-6)
        units = jnp.eye(U.size).reshape(U.size, *U.shape)
        product = jnp.stack([solver._product(program, kappa, unit).ravel() for unit in units])
        low_rank = (prepared.vectors * prepared.eigenvalues) @ prepared.vectors.T
        assert np.linalg.eigvalsh(product - low_rank).min() > -1e-6 * np.linalg.norm(product)


@pytest.mark.parametrize("rank_of_operator", [0, 1, 7])
def test_a_sketch_in_float32_is_finite_on_operators_of_low_rank(rank_of_operator):
    with jax.enable_x64(False):
        root = np.random.default_rng(0).normal(size=(60, rank_of_operator)).astype("float32")
        for seed in range(20):
            test = numerics.test_matrix(60, 20, jax.random.key(seed), jnp.float32)
            made = numerics.sketch(root @ (root.T @ test), test)
            assert np.all(np.isfinite(made.vectors))
            assert np.all(np.asarray(made.eigenvalues) >= 0)
            close = (made.vectors * made.eigenvalues) @ made.vectors.T
            np.testing.assert_allclose(close, root @ root.T, atol=1e-2 * max(rank_of_operator, 1))


@pytest.mark.parametrize("accelerated", [True, False])
def test_an_admm_step_is_the_textbook_one(accelerated):
    """A few iterations against dense linear algebra on the uncompact variables."""
    program, U0 = random_program(0, m=4, C=2)
    beta, rho = 0.3, 0.2
    solver = linear_solvers.Structured() if accelerated else linear_solvers.NystromPCG(1000, 50)
    relax = cf.Held().over_relaxation if accelerated else 1
    V = np.asarray(U0)
    start = dict(V=V, Lambda=beta / rho * V / np.linalg.norm(V, axis=0))
    rows = program.rows
    Y = rows.center(rows.root[:, None] * rows.Y)
    twin = dense_twin.admm(
        *map(np.asarray, (rows.X, Y, program.D, program.A)),
        beta,
        rho,
        relax,
        center=rows.center,
        **start,
    )
    iterate = admm.init(program, U0, rows.best_constant(), jnp.asarray(rho), cf.Held())
    prepared = solver.prepare(program, jnp.asarray(rho), jax.random.key(0))
    for _ in range(4):
        V, Lambda, S, N = next(twin)
        iterate = admm.step(program, solver, prepared, iterate, cf.Held()).image
        for got, expected in zip(iterate.split(jnp.asarray(beta)), (V, Lambda, S, N), strict=True):
            np.testing.assert_allclose(got, expected, atol=1e-8)


def test_a_change_of_rho_keeps_the_iterate_and_the_unscaled_duals():
    program, U = random_program(3)
    before = admm.init(program, U, program.rows.best_constant(), jnp.asarray(0.2), cf.Held())
    before = dataclasses.replace(before, S_plus_dual=before.S_plus_dual - 0.1)
    after = before.with_rho(jnp.asarray(0.7), program)
    V, Lambda, S, N = before.split(program.beta)
    V2, Lambda2, S2, N2 = after.split(program.beta)
    np.testing.assert_allclose((V2, 0.7 * Lambda2), (V, 0.2 * Lambda), atol=1e-12)
    np.testing.assert_allclose((S2, 0.7 * N2), (S, 0.2 * N), atol=1e-12)


def test_anderson_solves_a_linear_fixed_point_that_the_plain_iteration_does_not():
    rng = np.random.default_rng(0)
    root = rng.normal(size=(6, 6))
    matrix = jnp.asarray(np.eye(6) - root @ root.T / np.linalg.norm(root, 2) ** 2)
    solution = jnp.asarray(rng.normal(size=6))

    def image(x):
        return solution + matrix @ (x - solution)

    x = plain = jnp.zeros(6)
    memory, advance = numerics.Memory.empty(x), jax.jit(numerics.Memory.advance)
    for k in range(30):
        plain = image(plain)
        x, memory = advance(memory, x, image(x), k % 5 == 4)
    assert np.linalg.norm(x - solution) < 1e-3 * np.linalg.norm(plain - solution)


def test_anderson_takes_back_a_point_that_is_worse():
    memory, advance = numerics.Memory.empty(jnp.zeros(2)), jax.jit(numerics.Memory.advance)
    x = jnp.asarray([1.0, 0.0])
    for _ in range(6):
        good, memory = advance(memory, x, x * 0.9, True)
        x, previous = good, x
    bad = jnp.asarray([50.0, 50.0])  # as if the extrapolation had led here
    x, memory = advance(memory, bad, bad * 0.9, False)
    np.testing.assert_allclose(x, previous * 0.9)
    assert int(memory.count) == 0


@pytest.mark.parametrize("output_bias", [True, False])
@pytest.mark.parametrize(("loss", "seed"), [("squared", 0), ("softmax", 1), ("logistic", 2)])
def test_the_refreshed_direction_is_the_levenberg_marquardt_step(seed, output_bias, loss):
    """Against the Jacobian of the network's outputs by automatic differentiation, in neurons, directions and bias."""
    program, U = random_program(seed, output_bias=output_bias, loss=loss)
    rows, A, beta, damping = program.rows, program.A, 0.3, 0.7
    (d, m), C = U.shape, A.shape[1]
    b = jnp.asarray(np.random.default_rng(seed).normal(size=C)) if output_bias else None
    size = np.linalg.norm(U, axis=0)

    def outputs(U, W, b):  # W moves the directions, in the units of the output kernel
        return programs.network_outputs(rows, A + W / size[:, None], b, rows.X @ U).ravel()

    zero, argnums = jnp.zeros_like(A), (0, 1, 2) if output_bias else (0, 1)
    J = np.hstack([np.asarray(j).reshape(rows.Y.size, -1) for j in jax.jit(jax.jacobian(outputs, argnums))(U, zero, b)])
    O = outputs(U, zero, b).reshape(rows.Y.shape)
    H = np.asarray(jax.jit(jax.hessian(lambda o: rows.value(o.reshape(O.shape))))(O.ravel()))
    slope = np.asarray(jax.grad(rows.value)(O)).ravel()
    # Damping is in the norm of what each part alone does to pre-activations and outputs; the penalty is on U and W.
    hidden = np.asarray(jax.nn.relu(rows.X @ U)) / size
    N = np.diag(damping + beta / np.maximum(size, SETTINGS.norm_floor * size.mean()))
    blocks = [
        damping * np.kron(rows.X.T @ rows.X, np.eye(m)) + np.kron(np.eye(d), N),
        damping * np.kron(hidden.T @ hidden, np.eye(C)) + np.kron(N, np.eye(C)),
        damping * float(jnp.sum(rows.weight)) * np.eye(C if output_bias else 0),
    ]
    K = scipy.linalg.block_diag(*blocks)
    penalty = np.zeros(len(K))
    penalty[: d * m] = (beta * np.asarray(U) / size).ravel()
    across = np.concatenate([np.eye(C) - np.outer(a, a) for a in np.asarray(A)]).reshape(m, C, C)
    T = scipy.linalg.block_diag(np.eye(d * m), *[np.linalg.svd(P)[0][:, : C - 1] for P in across], blocks[2] != 0)
    system, gradient = T.T @ (J.T @ H @ J + K) @ T, T.T @ (J.T @ slope + penalty)
    expected = T @ np.linalg.solve(system, -gradient)

    unit = jnp.where(program.D, rows.X @ U, 0) / size
    model = gauss_newton.LocalModel(rows, program.D, unit, A, O, 1.0)
    here = gauss_newton.Here(rows.X @ U, 1 / jnp.asarray(size), A, O)
    g = gauss_newton.gradient(rows, here, jnp.asarray(beta), U)
    flat = lambda step: np.concatenate([np.ravel(part) for part in jax.tree.leaves(step)])  # noqa: E731
    np.testing.assert_allclose(T.T @ flat(g), gradient, atol=1e-9)
    prepared = gauss_newton.prepare(rows, m, jax.random.key(seed), SETTINGS)
    rng = np.random.default_rng(seed)
    last = gauss_newton.Step(*(None if part is None else jnp.asarray(rng.normal(size=part.shape)) for part in g))
    problem = model, None, prepared, jnp.asarray(beta), jnp.asarray(damping), U, g, last, True
    exact, _ = gauss_newton.direction(*problem, dataclasses.replace(SETTINGS, precise_cg_steps=500, cg_tol=1e-12))
    np.testing.assert_allclose(flat(exact), expected, atol=1e-7)
    # What the solver takes of it is a direction of descent.
    delta, _ = gauss_newton.direction(*problem, SETTINGS)
    assert float(flat(delta) @ flat(g)) < 0


def test_the_preconditioner_is_the_kronecker_system_where_the_sketches_are_exact():
    program, U = random_program(0, m=3, C=2, loss="logistic")
    rows, A, damping, rng = program.rows, program.A, 0.2, np.random.default_rng(0)
    n, (d, m), (_, C) = len(program.D), U.shape, A.shape
    N, D, size = rng.uniform(0.1, 10, size=m), np.asarray(program.D, float), np.linalg.norm(U, axis=0)
    outputs = program.outputs(rows.X @ U, rows.best_constant())
    H = jnp.where(program.D, rows.X @ U, 0) / size
    model = gauss_newton.LocalModel(rows, program.D, H, A, outputs, 1.0)
    prepared = gauss_newton.prepare(rows, m, jax.random.key(0), SETTINGS)
    made = gauss_newton.Preconditioner.of(prepared, model, jnp.asarray(N), jnp.asarray(damping))
    R = gauss_newton.Step(rng.normal(size=(d, m)), gauss_newton.tangent(rng.normal(size=(m, C)), A), rng.normal(size=C))
    got = made.divide(R)
    h = np.asarray(rows.mean_curvature(outputs))
    M = (D.T * h) @ D * (A @ A.T) + n * damping * np.eye(m)
    system = np.kron(rows.X.T @ rows.X / n, M) + np.kron(np.eye(d), np.diag(N))
    np.testing.assert_allclose(got.U, np.linalg.solve(system, R.U.ravel()).reshape(d, m), atol=1e-6)
    H = np.asarray(rows.center(H))
    kernel = (H.T * (h + damping)) @ H + np.diag(N)
    np.testing.assert_allclose(got.W, gauss_newton.tangent(np.linalg.solve(kernel, R.W), A), atol=1e-6)
    np.testing.assert_allclose(got.b, R.b / (np.asarray(rows.weight) @ (h + damping)))


def test_a_sample_takes_one_row_of_each_stretch():
    rows, _ = rows_and_basis(0, n=1000)
    for seed in range(5):
        index = gauss_newton.places(1000, 100, jax.random.key(seed))
        some = gauss_newton.sample(rows, jax.random.key(seed), 100)
        assert len(set(np.sort(index) // 10)) > 60
        assert len(set(np.asarray(index))) == 100
        np.testing.assert_array_equal(some.X, rows.X[index])
        np.testing.assert_array_equal(some.Y, rows.Y[index])


@settings(max_examples=12, deadline=None)
@given(seed=seeds, hidden_bias=st.booleans(), output_bias=st.booleans(), C=st.sampled_from([1, 3]))
def test_network_to_program_and_back(seed, hidden_bias, output_bias, C):
    rows, basis = rows_and_basis(seed, C=C, hidden_bias=hidden_bias, output_bias=output_bias)
    X, Y = random_problem(seed, n=20, p=4, C=C, dtype="float64")
    weight = np.random.default_rng(seed).uniform(0.5, 1.5, size=20)
    network = random_network(seed, p=4, m=5, C=C, hidden_bias=hidden_bias, output_bias=output_bias, dtype="float64")
    U, A, b = programs.from_network(network, rows, basis)
    back = programs.to_network(rows, basis, U, A, b, rows.X @ U)
    for without_bias in (network, back):
        hidden = jax.nn.relu(rows.X @ U) @ A
        bias = 0 if without_bias.bias2 is None else without_bias.bias2
        root = np.sqrt(weight / weight.mean())[:, None]
        np.testing.assert_allclose(root * (cf.predict(without_bias, X) - bias), hidden, atol=1e-9)
    beta = 0.01
    before = dense_twin.regularised_loss(network, X, Y, beta, weight)
    after = dense_twin.regularised_loss(back, X, Y, beta, weight)
    assert after <= before * (1 + 1e-12)
    objective = programs.network_objective(rows, A, b, beta * 20 / basis.scale, U, rows.X @ U) / 20
    assert float(objective) == pytest.approx(after, rel=1e-9)
    assert float(programs.regularised_loss(back, X, Y, weight, beta, losses.Squared())) == pytest.approx(
        after, rel=1e-12
    )


def test_a_neuron_without_output_weight_gets_a_direction_and_no_size():
    rows, basis = rows_and_basis(0)
    network = random_network(0, p=4, m=5, C=2, dtype="float64")
    kernel2 = np.array(network.kernel2)
    kernel2[2] = 0
    network = dataclasses.replace(network, kernel2=kernel2)
    U, A, _ = programs.from_network(network, rows, basis)
    assert np.all(U[:, 2] == 0)
    np.testing.assert_allclose(np.linalg.norm(A, axis=1), 1)


LENGTHS = (1.0, 0.5, 0.25, 0.0)
SEARCHES = {  # estimates and losses at these lengths, the loss now being 5; the index of the length, and the loss there
    "the least estimate": ((3, 2, 4, 5), (1, 2, 3, 5), 1, 2),
    "not the first again": ((4, 3, 2, 5), (1, 2, 3, 5), 2, 3),
    "shorter while it rises": ((1, 2, 3, 5), (9, 6, 4, 5), 2, 4),
    "shorter where it is as high": ((1, 2, 3, 5), (5, 4, 3, 5), 1, 4),
    "no step": ((1, 2, 3, 5), (9, 8, 7, 5), 3, 5),
    "estimates that are not finite": ((np.nan, -np.inf, 4, 5), (1, 2, 3, 5), 2, 3),
    "losses that are not finite": ((1, 2, 3, 5), (np.inf, np.nan, 4, 5), 2, 4),
}


@pytest.mark.parametrize("case", SEARCHES)
def test_the_line_search_takes_the_least_estimate_and_shortens_until_the_loss_falls(case):
    estimates, losses, index, value = SEARCHES[case]

    def at(values):
        return lambda length: jnp.asarray(values, float)[jnp.argmin(jnp.abs(jnp.asarray(LENGTHS) - length))]

    tried = cf.Refreshed(step_lengths=LENGTHS, damping_factors=(0.25, 1.0, 2.0, 4.0))
    found = refreshed.search(lambda length: (at(losses)(length), length), at(estimates), (jnp.asarray(5.0), 0.0), tried)
    assert (int(found[0]), float(found[1]), float(found[2])) == (index, value, LENGTHS[index])


def test_a_step_hands_on_one_network_and_the_damping_of_its_length():
    rows, _ = rows_and_basis(0, n=60, C=3)
    rng, beta, key = np.random.default_rng(0), jnp.asarray(1e-3), jax.random.key(0)
    U = jnp.asarray(rng.normal(size=(rows.X.shape[1], 4)))
    A = programs.unit_rows(jnp.asarray(rng.normal(size=(4, 3))), programs.default_directions(4, 3, U.dtype))
    tried = cf.Refreshed(least_warm_up=8, warm_up_every=2, damping_range=(1e-3, 10.0))
    unmoved = refreshed.unmoved(U, A, rows.best_constant())
    prepared = gauss_newton.prepare(rows, 4, key, tried)
    step = jax.jit(refreshed.step, static_argnames="settings")
    taken = set()
    for damping in (1e-3, 1.0, 10.0):
        before = refreshed.init(rows, U, A, rows.best_constant(), beta, jnp.asarray(damping), unmoved)
        for _ in range(4):
            after = step(rows, prepared, beta, before, before, None, None, False, settings=tried)
            np.testing.assert_allclose(programs.norms(after.A.T), 1, rtol=1e-12)
            np.testing.assert_allclose(after.Z, rows.X @ after.U, atol=1e-9)
            again = refreshed.init(rows, after.U, after.A, after.b, beta, after.damping, after.last)
            np.testing.assert_allclose(after.outputs, again.outputs, atol=1e-9)
            assert float(after.objective) == pytest.approx(float(again.objective), rel=1e-9)
            assert float(after.objective) < float(before.objective)
            factors = [np.clip(f * float(before.damping), 1e-3, 10.0) for f in tried.damping_factors]
            assert np.min(np.abs(np.subtract(factors, float(after.damping)))) < 1e-12
            taken.add(round(float(after.damping / before.damping), 6))
            # What is handed on as the last step led from one to the other, but for the lengths of the directions.
            length = 1 + jnp.linalg.norm(after.last.W, axis=1) ** 2 / gauss_newton.floored(before.U, tried) ** 2
            np.testing.assert_allclose(before.U * jnp.sqrt(length) + after.last.U, after.U, rtol=1e-9)
            np.testing.assert_allclose(before.b + after.last.b, after.b, rtol=1e-9)
            before = after
    assert 0.25 in taken  # the damping follows
    # From a loss that nothing reaches it stays, with more damping; and a warm-up gives its start back.
    lowest = dataclasses.replace(before, objective=jnp.asarray(-1.0), damping=jnp.asarray(1.0))
    stayed = step(rows, prepared, beta, lowest, lowest, None, None, False, settings=tried)
    assert float(stayed.damping) == 4.0
    # Nor is it a step that the loss falls by rounding at length 0: the last step is kept.
    longest = dataclasses.replace(tried, step_lengths=(1e6, 0.0), damping_factors=(0.25, 4.0))
    rounded = dataclasses.replace(before, objective=before.objective * (1 + 1e-9))
    kept = step(rows, prepared, beta, rounded, rounded, None, None, False, settings=longest)
    jax.tree.map(np.testing.assert_array_equal, kept.last, before.last)
    assert float(jnp.linalg.norm(before.last.U)) > 0
    drawn = []

    class Watched(OnHost):
        @staticmethod
        def run(program, *arguments, **static):
            result = OnHost.run(program, *arguments, **static)
            if program is descent.few:
                drawn.append(np.asarray(result[0].X).tobytes())
            return result

    warm, _ = descent.warm_up(Watched, rows, prepared, beta, lowest, key, np.float64(1e-3), tried)
    assert len(set(drawn)) == tried.warm_up_steps  # each of its steps is on other rows
    for left in (stayed, warm):
        jax.tree.map(
            np.testing.assert_array_equal, (left.U, left.A, left.b, left.Z), (before.U, before.A, before.b, before.Z)
        )


@pytest.mark.parametrize("piece", [1, 7, 10, 19, 20])
def test_sums_and_maps_over_pieces_are_those_over_all_rows(piece):
    rows, _ = rows_and_basis(2, n=20)
    pieces = dataclasses.replace(rows, piece=piece)
    rng = np.random.default_rng(0)
    Z, T = (jnp.asarray(rng.normal(size=(20, k))) for k in (3, 2))
    np.testing.assert_allclose(pieces.summed(blocks.adjoint, Z, T), Z.T @ T, atol=1e-12)
    np.testing.assert_array_equal(pieces.mapped(lambda Z, T: Z[:, :1] * T, Z, T), Z[:, :1] * T)


def test_of_many_dead_neurons_the_first_are_revived_and_the_others_stay():
    rows, _ = rows_and_basis(1, n=60, C=2)
    m, dead = 40, 30
    U = jnp.asarray(np.random.default_rng(1).normal(size=(rows.X.shape[1], m)))
    U = U.at[:, :dead].multiply(1e-6)
    A, b = programs.default_directions(m, 2, U.dtype), rows.best_constant()
    iterate = refreshed.init(rows, U, A, b, jnp.asarray(1e-3), jnp.asarray(1.0), refreshed.unmoved(U, A, b))
    alive = refreshed.revived(rows, iterate, jax.random.key(0))
    np.testing.assert_array_equal(alive.U[:, :16], 0)
    for part in ("U", "Z"):
        np.testing.assert_array_equal(getattr(alive, part)[:, 16:], getattr(iterate, part)[:, 16:])
    left = jnp.where(jnp.arange(m) < 16, 0, U)
    np.testing.assert_allclose(alive.outputs, programs.network_outputs(rows, A, b, rows.X @ left), atol=1e-12)


def test_a_dead_neuron_is_revived_where_it_lowers_the_loss():
    rows, _ = rows_and_basis(1, n=60, C=1)
    U = jnp.asarray(np.random.default_rng(1).normal(size=(rows.X.shape[1], 4))).at[:, 1:].set(0)
    A = programs.default_directions(4, 1, U.dtype)
    unmoved = refreshed.unmoved(U, A, rows.best_constant())
    iterate = refreshed.init(rows, U, A, rows.best_constant(), jnp.asarray(1e-3), jnp.asarray(1.0), unmoved)
    assert bool(iterate.has_dead)
    prepared = gauss_newton.prepare(rows, 4, jax.random.key(1), SETTINGS)
    alive = refreshed.revived(rows, iterate, jax.random.key(0))
    step = jax.jit(refreshed.step, static_argnames="settings")
    after = step(rows, prepared, jnp.asarray(1e-3), iterate, alive, None, None, False, settings=SETTINGS)
    assert float(after.objective) < float(iterate.objective)
    assert int(jnp.sum(programs.norms(after.U) > 0)) > 1


def test_conjugate_gradients_stop_at_the_tolerance_and_take_a_guess():
    rng = np.random.default_rng(0)
    root = rng.normal(size=(12, 12))
    matrix = jnp.asarray(root @ root.T + np.eye(12))
    rhs = jnp.asarray(rng.normal(size=12))
    x, _ = linear_solvers.conjugate_gradient(lambda v: matrix @ v, rhs, tol=1e-3, max_steps=100)
    assert np.linalg.norm(matrix @ x - rhs) / np.linalg.norm(rhs) < 1e-2
    again, _ = linear_solvers.conjugate_gradient(lambda v: matrix @ v, rhs, guess=x, tol=1e-10, max_steps=100)
    np.testing.assert_allclose(matrix @ again, rhs, atol=1e-8)


@pytest.mark.parametrize("steps", [1, 2, 3, 6])
def test_conjugate_gradients_along_a_first_direction_end_at_the_least_point_of_what_they_span(steps):
    rng = np.random.default_rng(1)
    root, scale = rng.normal(size=(12, 12)), rng.uniform(0.5, 2, size=12)
    matrix, rhs, first = root @ root.T + np.eye(12), rng.normal(size=12), rng.normal(size=12)
    x, taken = linear_solvers.conjugate_gradient(
        lambda v: matrix @ v, jnp.asarray(rhs), preconditioner=lambda r: scale * r, first=first, max_steps=steps
    )
    assert int(taken) == steps
    span = [first]
    for _ in range(1, steps):  # the preconditioned gradient at the least point so far, each time
        basis = np.stack(span, axis=1)
        least = basis @ np.linalg.solve(basis.T @ matrix @ basis, basis.T @ rhs)
        span.append(scale * (rhs - matrix @ least))
    basis = np.stack(span, axis=1)
    least = basis @ np.linalg.solve(basis.T @ matrix @ basis, basis.T @ rhs)
    np.testing.assert_allclose(x, least, atol=1e-9)


def test_conjugate_gradients_without_a_first_direction_are_as_those_along_zero():
    rng = np.random.default_rng(2)
    root, rhs = rng.normal(size=(12, 12)), jnp.asarray(rng.normal(size=12))
    matrix = jnp.asarray(root @ root.T + np.eye(12))
    plain, along_zero = (
        linear_solvers.conjugate_gradient(lambda v: matrix @ v, rhs, first=first, max_steps=4)[0]
        for first in (None, jnp.zeros(12))
    )
    np.testing.assert_allclose(plain, along_zero, rtol=1e-12)


def test_beta_max_of_rows_in_blocks_is_that_of_rows_in_memory():
    """Features on disk have the default β of the same features in memory, also if they come in several pieces."""
    rng = np.random.default_rng(0)
    X = rng.normal(size=(20_000, 6)).astype("float32")
    y = (np.abs(X[:, :1]) + 0.3 * rng.normal(size=(20_000, 1))).astype("float32")
    largest = functools.partial(betas.user_beta_max, loss=losses.Squared(), hidden_bias=True, output_bias=True)
    source = blocks.Source([X[:7000], X[7000:]], X.shape, X.dtype)
    with host.opened(source) as (number,):
        in_blocks = float(largest(blocks.Blocks(number, *X.shape, source.rows, X.dtype), y, jnp.ones(20_000)))
    assert in_blocks == pytest.approx(float(largest(X, y, jnp.ones(20_000))), rel=1e-4)


@pytest.mark.parametrize("output_bias", [True, False])
def test_the_default_beta_of_many_rows_does_not_move_with_their_order_or_an_offset(output_bias):
    """Features with a large mean have the β_max of a longer climb, in every order, also where rows have weight zero."""
    rng = np.random.default_rng(0)
    X = rng.normal(size=(12_000, 32)) + 5
    y = np.abs(X[:, 0] - 5) + 0.3 * rng.normal(size=12_000)
    y = y - (0 if output_bias else y.mean())
    weight = np.where(np.arange(12_000) % 2, rng.exponential(size=12_000), 0)
    arrays = (jnp.asarray(array, "float32") for array in (X, y[:, None], weight / weight[weight > 0].mean()))
    rows, _ = coordinates.scaled(*arrays, losses.Squared(), hidden_bias=True, output_bias=output_bias)
    u = jnp.asarray(rng.normal(size=(rows.X.shape[1], 16)), "float32")
    _, heights = jax.jit(betas.climb, static_argnums=3)(rows.X, betas.at_best_constant(rows), u, 40)
    orders = [jnp.asarray(place) for place in (np.arange(12_000), np.argsort(y), rng.permutation(12_000))]
    found = [float(jax.jit(betas.beta_max)(rows.take(order))) for order in orders]
    assert found == pytest.approx([float(jnp.max(heights))] * 3, rel=0.03)


def data_for_beta(seed, rows=500):
    """Features with an offset between 0 and 10, and a network of random neurons with noise."""
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(rows, 5)) + rng.uniform(0, 10)
    y = np.maximum((X - X.mean(axis=0)) @ rng.normal(size=(5, 4)) + rng.normal(size=4), 0) @ rng.normal(size=(4, 1))
    return rng, X, y / y.std() + rng.uniform(0.1, 1) * rng.normal(size=(rows, 1))


def test_beta_max_is_no_local_maximum():
    """With its rows in any order, a problem has the β_max of a climb from 64 random starts."""
    largest, climb = jax.jit(betas.beta_max), jax.jit(betas.climb, static_argnums=3)
    for seed in (2, 10, 12, 23, 52, 66):
        rng, X, y = data_for_beta(seed)
        arrays = (jnp.asarray(array, "float32") for array in (X, y, np.ones(500)))
        rows, _ = coordinates.scaled(*arrays, losses.Squared(), hidden_bias=True, output_bias=True)
        x, u = np.asarray(rows.X[:64], float).T, rng.normal(size=(6, 64))
        through_rows = u - x * np.sum(x * u, axis=0) / np.sum(x * x, axis=0)
        _, heights = climb(rows.X, betas.at_best_constant(rows), jnp.asarray(through_rows, "float32"), 40)
        orders = (np.arange(500), np.argsort(y[:, 0]), *(rng.permutation(500) for _ in range(3)))
        found = [float(largest(rows.take(jnp.asarray(order)))) for order in orders]
        assert found == pytest.approx([float(jnp.max(heights))] * 5, rel=0.01)


def test_beta_max_does_not_see_rows_of_weight_zero_at_the_end():
    """Rows filled up with others of weight zero have the same β_max to rounding."""
    _, X, y = data_for_beta(0)
    kept = np.repeat([1.0, 0.0], [400, 100])

    def largest(count):
        arrays = (jnp.asarray(array[:count], "float32") for array in (np.where(kept[:, None], X, 1e3), y, kept))
        return float(betas.user_beta_max(*arrays, loss=losses.Squared(), hidden_bias=True, output_bias=True))

    assert largest(500) == pytest.approx(largest(400), rel=1e-4)
