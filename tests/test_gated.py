"""Gated networks: the program without cones against CVXPY, warm starts, what refuses them."""

import dataclasses

import dense_twin
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import random_network, random_problem
from flax import nnx

import cronos_flax as cf
from cronos_flax._solver import coordinates, linear_solvers, losses, u_step
from cronos_flax._solver import program as programs
from cronos_flax._solver.solution import gates_on

GATED = cf.Cronos(gates="gated", beta=0.02, max_iters=5_000)
LAYERS = ("kernel1", "bias1", "kernel2", "bias2")


def random_gated(seed, p=5, m=7, C=1, biases=True, dtype="float32"):
    network = random_network(seed, p=p, m=m, C=C, hidden_bias=biases, output_bias=biases, dtype=dtype)
    gates = random_network(seed + 100, p=p, m=m, C=C, hidden_bias=biases, dtype=dtype)
    return cf.GatedTwoLayer(**vars(network), gate_kernel=gates.kernel1, gate_bias=gates.bias1)


def targets_of(loss, seed, C, dtype, **shape):
    """Features, targets as the solver takes them, and as a matrix."""
    X, y = random_problem(seed, C=C, dtype=dtype, **shape)
    if loss == "softmax":
        y = np.argmax(y, axis=1)
        return X, y, np.eye(C)[y]
    return X, y, y


def optimum_of(solution, X, Y, beta, weight=None, **how):
    D, A = np.asarray(solution.state.D), np.asarray(solution.state.A, float)
    return dense_twin.program_optimum(X.astype(float), Y.astype(float), D, A, beta, weight, has_cones=False, **how)


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


# loss, n, p, m, C, biases, weights, linear solver
PROGRAMS = [
    ("squared", 50, 6, 9, 1, True, True, cf.Structured()),
    ("squared", 50, 6, 9, 3, False, True, cf.Structured()),
    ("squared", 12, 8, 4, 3, True, False, cf.Structured()),
    ("squared", 40, 3, 1, 1, False, False, cf.Structured()),
    ("squared", 50, 6, 9, 1, True, False, cf.NystromPCG(rank=10, max_steps=50)),
    ("softmax", 50, 6, 9, 3, True, True, cf.Structured()),
    ("softmax", 50, 6, 9, 3, False, False, cf.Structured()),
]


# In turn in each precision, and the one of the published solver in both, so that each loss and each solver meets both.
@pytest.mark.parametrize(
    ("dtype", "number"),
    [*((f"float{(64, 32)[i % 2]}", i) for i in range(len(PROGRAMS))), ("float32", 4)],
    indirect=["dtype"],
)
def test_a_solve_reaches_the_optimum_of_the_program_without_cones(dtype, number):
    loss, n, p, m, C, biases, weighted, linear_solver = PROGRAMS[number]
    X, y, Y = targets_of(loss, number, C, dtype, n=n, p=p)
    init = random_gated(number, p=p, m=m, C=C, biases=biases, dtype=dtype)
    weight = np.random.default_rng(number).uniform(0.2, 2, size=n).astype(dtype) if weighted else None
    tol = 5e-5 if dtype == "float64" else 2e-4
    solver = dataclasses.replace(GATED, loss=loss, linear_solver=linear_solver, tol=tol)
    solution = solver.solve(X, y, init=init, sample_weight=weight)
    stats, rounding = solution.stats, 1e-8 if dtype == "float64" else 1e-6
    optimum = optimum_of(solution, X, Y, 0.02, weight, loss=loss, hidden_bias=biases, output_bias=biases)
    assert np.all(np.asarray(stats.lower_bound_trace) <= optimum * (1 + rounding) + rounding)
    # The network is the program's point: there are no cones that it could break.
    assert optimum * (1 - rounding) - rounding <= float(stats.objective) <= float(stats.program_objective) + rounding
    assert float(stats.objective) == pytest.approx(optimum, rel=1e-3)
    assert float(stats.cone_violation) == 0
    if linear_solver.accelerated:
        assert solution.status == cf.Status.converged
        assert float(stats.objective - stats.lower_bound) <= tol * float(stats.objective) + rounding
    objective = float(solver.objective(solution.params, X, y, 0.02, sample_weight=weight))
    assert objective == pytest.approx(float(stats.objective), rel=1e-5)
    by_hand = dense_twin.regularised_loss(solution.params, X, Y, 0.02, weight, loss)
    assert objective == pytest.approx(by_hand, rel=1e-5)
    same((solution.params.gate_kernel, solution.params.gate_bias), (init.gate_kernel, init.gate_bias))
    assert (solution.params.bias1 is None) == (solution.params.bias2 is None) == (not biases)


@pytest.mark.parametrize("C", [1, 3])
def test_a_network_predicts_by_its_own_gates(C):
    network, X = random_gated(0, C=C), random_problem(0)[0]
    on = X @ network.gate_kernel + network.gate_bias >= 0
    by_hand = (on * (X @ network.kernel1 + network.bias1)) @ network.kernel2 + network.bias2
    np.testing.assert_allclose(cf.predict(network, X), by_hand, atol=1e-5)
    np.testing.assert_allclose(jax.jit(cf.predict)(network, X), by_hand, atol=1e-5)
    np.testing.assert_array_equal(gates_on(network, X), on)
    bare = dataclasses.replace(network, bias1=None, bias2=None, gate_bias=None)
    by_hand = ((X @ network.gate_kernel >= 0) * (X @ network.kernel1)) @ network.kernel2
    np.testing.assert_allclose(cf.predict(bare, X), by_hand, atol=1e-5)


def test_with_the_gates_of_its_neurons_a_gated_network_is_the_relu_network():
    relu, X = random_network(1), random_problem(1)[0]
    network = cf.GatedTwoLayer(**vars(relu), gate_kernel=relu.kernel1, gate_bias=relu.bias1)
    np.testing.assert_allclose(cf.predict(network, X), cf.predict(relu, X), atol=1e-6)


def test_a_gated_neuron_is_the_difference_of_two_relu_neurons_on_its_rows():
    """As method.md says; without weight decay the two classes of networks are the same."""
    network, X = random_gated(2), random_problem(2)[0]
    Z, on = X @ network.kernel1 + network.bias1, np.asarray(X @ network.gate_kernel + network.gate_bias)
    t = np.max(np.where(np.sign(on) * Z < 0, np.abs(Z / on), 0), axis=0)
    kernels = network.kernel1 + t * network.gate_kernel, t * network.gate_kernel
    biases = network.bias1 + t * network.gate_bias, t * network.gate_bias
    relu = cf.TwoLayer(
        np.hstack(kernels), np.hstack(biases), np.vstack([network.kernel2, -network.kernel2]), network.bias2
    )
    np.testing.assert_allclose(cf.predict(relu, X), cf.predict(network, X), atol=1e-5 * np.abs(Z).max() * t.max())


@pytest.mark.parametrize("loss", ["squared", "softmax"])
def test_the_optimum_is_below_that_of_the_relu_program_with_the_same_gates(loss):
    X, y, _ = targets_of(loss, 3, 3, "float32", n=50, p=6)
    init = random_network(3, p=6, m=9, C=3)
    solver = dataclasses.replace(GATED, loss=loss, tol=1e-3)
    gated, fixed = (dataclasses.replace(solver, gates=gates).solve(X, y, init=init) for gates in ("gated", "fixed"))
    np.testing.assert_array_equal(gated.state.D, fixed.state.D)
    np.testing.assert_array_equal(gated.state.A, fixed.state.A)
    assert float(gated.stats.initial_objective) == pytest.approx(float(fixed.stats.initial_objective), rel=1e-5)
    assert float(gated.stats.lower_bound) <= float(fixed.stats.objective)
    assert float(gated.stats.objective) < float(fixed.stats.lower_bound)
    same((gated.params.gate_kernel, gated.params.gate_bias), (init.kernel1, init.bias1))


def test_neurons_that_are_zero_get_random_gates_from_a_relu_network_and_keep_those_of_a_gated_one():
    X, y = random_problem(4)
    relu = random_network(4, m=5)
    relu.kernel1[:, 2], relu.bias1[2] = 0, 0
    found = GATED.solve(X, y, init=relu).params
    assert 0 < int(gates_on(found, X)[:, 2].sum()) < len(X)
    linear = cf.GatedTwoLayer(**vars(relu), gate_kernel=relu.kernel1, gate_bias=relu.bias1)
    assert gates_on(GATED.solve(X, y, init=linear).params, X)[:, 2].all()  # always on: a linear unit


def test_gates_are_those_that_predict_has_on_rows_at_the_boundary():
    """Integers make ties that are exact in the user's units, and not after scaling."""
    X = np.random.default_rng(0).integers(-3, 4, size=(80, 4)).astype("float32")
    init = dataclasses.replace(random_gated(0, p=4, m=6), gate_bias=None)
    init = dataclasses.replace(init, gate_kernel=jnp.round(2 * init.gate_kernel))
    ties = np.asarray(X @ init.gate_kernel) == 0
    assert ties.any()
    solution = GATED.solve(X, X[:, 0], init=init, sample_weight=np.linspace(0.1, 1, 80).astype("float32"))
    np.testing.assert_array_equal(solution.state.D, X @ init.gate_kernel >= 0)


@pytest.mark.parametrize("loss", ["squared", "softmax"])
@pytest.mark.parametrize("linear_solver", [cf.Structured(), cf.NystromPCG()])
def test_state_continues_admm_where_it_stopped(loss, linear_solver):
    """Twice twenty iterations are forty, where nothing but the iterate is kept between them."""
    held = cf.Held(extrapolate_every=1_000, last_adaptation=1)
    solver = dataclasses.replace(GATED, loss=loss, linear_solver=linear_solver, tol=0.0, held=held, max_iters=20)
    with jax.enable_x64(True):
        X, y, _ = targets_of(loss, 5, 2, "float64")
        init = random_gated(5, C=2, dtype="float64")
        first = solver.solve(X, y, init=init)
        second = solver.solve(X, y, state=first.state)
        whole = dataclasses.replace(solver, max_iters=40).solve(X, y, init=init)
        at_once = second.stats.objective_trace[0]
        assert float(at_once) == pytest.approx(float(first.stats.program_objective), rel=1e-12)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), second.params, whole.params)
    assert second.state.S_plus_dual is None
    assert int(second.state.iteration) == 40


def test_warm_starts_random_starts_and_callbacks():
    X, y = random_problem(6)
    rows = []
    solution = GATED.solve(X, y, hidden=8, callback=rows.append)
    assert solution.params.kernel1.shape == solution.params.gate_kernel.shape == (5, 8)
    assert rows[-1]["cone_violation"] == 0
    assert rows[-1]["gap"] <= 1e-3
    weaker = dataclasses.replace(GATED, beta=0.015)
    warm = weaker.solve(X, y, init=solution.params)
    same(warm.state.D, solution.state.D)
    assert float(warm.stats.initial_objective) < float(solution.stats.objective)
    assert float(warm.stats.objective) <= float(warm.stats.initial_objective)
    again = GATED.solve(X, y, state=solution.state)
    assert int(again.stats.iterations) == 0
    assert float(again.stats.objective) <= float(solution.stats.objective)


def test_a_state_on_other_rows_has_the_gates_of_these():
    """It had those of the first rows, and a lower bound above the loss."""
    X, y = random_problem(6)
    state = GATED.solve(X, y, hidden=8).state
    others = X[::-1].copy(), y[::-1].copy()
    solution = GATED.solve(*others, state=state)
    np.testing.assert_array_equal(solution.state.D, state.D[::-1])
    again = GATED.solve(*others, init=state.params)
    assert float(solution.stats.lower_bound) <= float(solution.stats.objective) * (1 + 1e-5)
    assert float(solution.stats.objective) == pytest.approx(float(again.stats.objective), rel=2e-3)


@pytest.mark.parametrize("folds", [None, 3])
def test_beta_can_be_chosen_on_a_path(folds):
    X, y = random_problem(7, n=60)
    solution = dataclasses.replace(GATED, beta="path", folds=folds, max_iters=200).solve(X, y, hidden=6)
    assert isinstance(solution.params, cf.GatedTwoLayer)
    assert np.isfinite(solution.stats.path_losses).all()
    assert np.isclose(solution.stats.path_betas, solution.stats.beta, rtol=1e-6).any()


def test_a_solve_goes_through_vmap_and_jit_and_blocks():
    X, y = random_problem(8)
    init = random_gated(8)
    solver = dataclasses.replace(GATED, max_iters=60)
    alone = solver.solve(X, y, init=init).stats.objective

    def solve(beta):
        return dataclasses.replace(solver, beta=beta).solve(X, y, init=init).stats.objective

    objectives = jax.jit(jax.vmap(solve))(jnp.asarray([0.02, 0.05]))
    np.testing.assert_allclose(objectives[0], alone, rtol=1e-3)
    assert objectives[1] > objectives[0]
    blocks = [X[:13], X[13:]]
    streamed = solver.solve(blocks, y, init=init)
    np.testing.assert_allclose(streamed.stats.objective, alone, rtol=1e-3)
    objective = solver.objective(streamed.params, X, y, 0.02)
    np.testing.assert_allclose(objective, streamed.stats.objective, rtol=1e-5)


def test_blocks_take_about_as_many_iterations_as_an_array():
    """Steps that were not exact enough took fifteen times as many: 400 did not do where 20 did."""
    X, noise = random_problem(13, n=300, p=6)
    y = np.abs(X[:, :1]) - X[:, 1:2] * X[:, 2:3] + 0.3 * noise
    solver = cf.Cronos(gates="gated", max_iters=400)
    array, blocks = (solver.solve(data, y, hidden=12) for data in (X, [X[:100], X[100:]]))
    assert array.status == blocks.status == cf.Status.converged
    assert int(blocks.stats.iterations) <= 5 * int(array.stats.iterations)


def test_small_and_degenerate_data():
    X, y = random_problem(9, n=20, p=3)
    X[:, 1] = 0
    one = dataclasses.replace(GATED, tol=1e-6).solve(X, y, hidden=1)
    assert float(one.stats.objective - one.stats.lower_bound) <= 1e-5
    assert 0.01 * float(one.params.kernel1[1, 0]) ** 2 <= 1e-6  # what the weight of zeros costs is in that gap
    with pytest.warns(UserWarning, match="`X` must differ from row to row"):
        still = GATED.solve(np.zeros_like(X), y, hidden=3)
    assert np.isfinite(float(still.stats.objective))
    weight = np.ones(20, "float32")
    weight[10:] = 0
    init = random_gated(9, p=3)
    absent, there = GATED.solve(X[:10], y[:10], init=init), GATED.solve(X, y, init=init, sample_weight=weight)
    assert float(there.stats.objective) == pytest.approx(float(absent.stats.objective), rel=1e-3)


@pytest.mark.parametrize("plan", [u_step.Woodbury, u_step.Primal, u_step.Kronecker, "published"])
@pytest.mark.parametrize("output_bias", [True, False])
def test_the_u_step_without_cones_solves_its_system(monkeypatch, plan, output_bias):
    monkeypatch.setattr(linear_solvers.Structured, "plan_without_cones", lambda self, n, d, m, C: plan)
    with jax.enable_x64(True):
        X, y = random_problem(1, n=12, p=4, C=2, dtype="float64")
        weight = jnp.asarray(np.linspace(0.5, 1.5, 12))
        rows, basis = coordinates.scaled(
            jnp.asarray(X), jnp.asarray(y), weight, losses.Squared(), hidden_bias=True, output_bias=output_bias
        )
        rows, basis = coordinates.rotated(rows, basis)
        rng, kappa = np.random.default_rng(0), jnp.asarray(0.3)
        D, A = (
            rng.uniform(size=(12, 3)) > 0.5,
            programs.unit_rows(jnp.asarray(rng.normal(size=(3, 2))), jnp.ones((3, 2))),
        )
        program = programs.Program(rows, jnp.asarray(D), A, jnp.asarray(0.1), basis.eigenvalues, has_cones=False)
        rhs, z = jnp.asarray(rng.normal(size=(5, 3))), jnp.zeros((12, 2))
        solver = cf.NystromPCG(1000, 200) if plan == "published" else cf.Structured(200)
        prepared = solver.prepare(program, kappa, jax.random.key(0))
        U, XU, _ = solver.solve(program, kappa, prepared, rhs, z, jnp.asarray(10**7), rhs)
        residual = U + rows.X.T @ program.Ft(program.F(rows.X @ U)) / kappa - rhs
        np.testing.assert_allclose(residual, 0, atol=1e-6)
        np.testing.assert_allclose(XU, rows.X @ U, atol=1e-12)
        alpha = rows.gradient(program.outputs(XU, None))
        bound = programs.lower_bound(program, alpha, jnp.zeros(()))
        assert float(bound) <= float(program.objective(U, None, XU))


@pytest.mark.parametrize(("n", "p"), [(2000, 5), (60, 40)])
def test_features_far_from_zero_leave_a_factor(n, p):
    """Most gates are on in all rows or in none, and the system is singular to rounding; in both plans."""
    X, y = random_problem(12, n=n, p=p)
    solution = cf.Cronos(gates="gated", max_iters=300).solve(X + 100, y, hidden=16)
    assert np.isfinite(solution.stats.objective_trace).all()
    assert float(solution.stats.objective) < float(solution.stats.null_loss)


def test_what_does_not_fit_is_refused():
    X, y = random_problem(10)
    init, relu = random_gated(10), random_network(10)
    for gates in ("refreshed", "fixed", "paired"):
        with pytest.raises(ValueError, match=r"`init` must be a cf\.TwoLayer for gates=.*got a cf\.GatedTwoLayer"):
            cf.Cronos(gates=gates).solve(X, y, init=init)
    with pytest.raises(ValueError, match=r"`init` must be a cf\.GatedTwoLayer or a cf\.TwoLayer, got dict"):
        GATED.solve(X, y, init={})
    with pytest.raises(ValueError, match=r"gate_kernel of shape \(5, 7\) for these data, got \(4, 7\)"):
        GATED.solve(X, y, init=dataclasses.replace(init, gate_kernel=init.gate_kernel[1:]))
    with pytest.raises(ValueError, match="got NaN or infinite entries in gate_bias"):
        GATED.solve(X, y, init=dataclasses.replace(init, gate_bias=init.gate_bias * np.nan))
    for wrong in ({"gate_kernel": init.gate_kernel[:, :1], "gate_bias": None}, {"gate_bias": init.gate_bias[:1]}):
        with pytest.raises(ValueError, match=r"one gate for each neuron: a gate_kernel of shape \(5, 7\)"):
            cf.predict(dataclasses.replace(init, **wrong), X)
    with pytest.raises(ValueError, match="`X` must be finite"):
        GATED.solve(X * np.nan, y, hidden=3)
    fixed = dataclasses.replace(GATED, gates="fixed", max_iters=2)
    gated_state, fixed_state = GATED.solve(X, y, init=init).state, fixed.solve(X, y, init=relu).state
    with pytest.raises(ValueError, match=r"with gates='fixed', got a HeldState of gates='gated'\. Set gates="):
        fixed.solve(X, y, state=gated_state)
    with pytest.raises(ValueError, match="with gates='gated', got a HeldState"):
        GATED.solve(X, y, state=fixed_state)


def test_heads_are_relu_networks_and_refuse_gated_ones():
    model, x = nn.Sequential([nn.Dense(6), nn.relu, nn.Dense(2)]), random_problem(11)[0]
    variables = model.init(jax.random.key(0), x)
    head, y = cf.find_head(model, variables, x), np.arange(len(x)) % 2
    solver = cf.Cronos(loss="softmax", gates="gated")
    refused = r"`solver` must give ReLU networks, got gates='gated'.*Take other gates, or call solver\.solve on arrays"
    with pytest.raises(ValueError, match=f"fit_head: {refused}"):
        cf.fit_head(head, variables, (x, y), solver=solver)
    create = {"apply_fn": model.apply, "params": variables["params"], "tx": optax.adam(1e-3), "head": head}
    with pytest.raises(ValueError, match=f"CronosTrainState: {refused}"):
        cf.CronosTrainState.create(**create, solver=solver)
    state = cf.CronosTrainState.create(**create, solver=cf.Cronos(loss="softmax"))
    with pytest.raises(ValueError, match=refused):  # past `create`
        state.replace(solver=solver).solve_head((x, y))
    rngs = nnx.Rngs(0)
    module = nnx.Sequential(nnx.Linear(5, 6, rngs=rngs), nnx.relu, nnx.Linear(6, 2, rngs=rngs))
    found = cf.nnx.find_head(module, x)
    with pytest.raises(ValueError, match=f"fit_head: {refused}"):
        cf.nnx.fit_head(found, module, (x, y), solver=solver)
    with pytest.raises(ValueError, match=f"CronosOptimizer: {refused}"):
        cf.nnx.CronosOptimizer(module, optax.adam(1e-3), head=found, solver=solver)
    network = solver.solve(x, y, init=head.read(variables)).params
    with pytest.raises(ValueError, match=r"must be a cf\.TwoLayer"):
        head.write(variables, network)
    with pytest.raises(ValueError, match=r"must be a cf\.TwoLayer, got GatedTwoLayer"):
        cf.prune_head(network)
