"""Every loss: its calculus by properties, its program against CVXPY, its descent, and what it takes as targets."""

import dataclasses
import functools

import dense_twin
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_network, random_problem, random_targets
from hypothesis import given, settings
from hypothesis import strategies as st

import cronos_flax as cf
from cronos_flax._solver import beta_path as betas
from cronos_flax._solver import checks, losses
from cronos_flax._solver.beta_max import user_beta_max

LOSSES = list(losses.LOSSES)
seeds = st.integers(0, 10_000)


@dataclasses.dataclass(frozen=True)
class LogCosh(cf.Loss):
    """A user's own, with nothing but its value."""

    def value(self, outputs, targets):
        r = outputs - targets
        return jnp.sum(jnp.logaddexp(r, -r) - jnp.log(2.0), axis=1)


@dataclasses.dataclass(frozen=True)
class OwnSoftmax(cf.Loss):
    """One whose outputs couple, with nothing but its value and conjugate."""

    def value(self, outputs, targets):
        return jax.nn.logsumexp(outputs, axis=1) - jnp.sum(outputs * targets, axis=1)

    def conjugate(self, dual, targets):
        return losses.Softmax().conjugate(dual, targets)

    def balance(self, dual, targets, weight):
        return losses.Softmax().balance(dual, targets, weight)


def drawn(loss, seed, n=6, C=3, scale=2.0):
    """Outputs and targets."""
    return scale * np.random.default_rng(seed).normal(size=(n, C)), random_targets(loss, seed, n, C)


def targets_of(loss, Y):
    """Y as a user gives it."""
    return Y.argmax(axis=1) if loss == "softmax" else Y


@functools.cache
def calculus(loss):
    """Value and gradient, the gradient by differentiation, curvature and its mean, the Hessian, and the value beyond r.

    In one program, as each would be compiled anew for every example.
    """
    made = losses.loss_of(loss)

    def of_row(f, y):
        return made.value(f[None], y[None])[0]

    def of(f, y, r):
        units = [jnp.broadcast_to(e, f.shape) for e in jnp.eye(f.shape[1])]
        curvature = jnp.stack([made.curvature(f, y, e) for e in units], axis=2)
        hessian = jax.vmap(jax.hessian(of_row))(f, y)
        parabola = made.value(f, y) + jnp.sum(made.gradient(f, y) * r + r * made.curvature(f, y, r) / 2, axis=1)
        gradients = made.gradient(f, y), jax.grad(lambda f: made.value(f, y).sum())(f)
        return (
            made.value(f, y),
            gradients,
            curvature,
            made.mean_curvature(f, y),
            hessian,
            parabola,
            made.value(f + r, y),
        )

    return jax.jit(of)


@settings(max_examples=20, deadline=None)
@given(loss=st.sampled_from(LOSSES), seed=seeds)
def test_value_gradient_and_curvature_agree(loss, seed):
    with jax.enable_x64(True):
        f, y = drawn(loss, seed)
        r = np.random.default_rng(seed + 9).normal(size=f.shape)
        value, (gradient, derivative), H, mean, hessian, parabola, beyond = jax.device_get(calculus(loss)(f, y, r))
    np.testing.assert_allclose(value, dense_twin.losses_of(loss, f, y), atol=1e-12)
    np.testing.assert_allclose(gradient, derivative, atol=1e-12)
    assert np.linalg.eigvalsh(H).min() >= -1e-12
    np.testing.assert_allclose(H, H.swapaxes(1, 2), atol=1e-12)
    np.testing.assert_allclose(mean, np.trace(H, axis1=1, axis2=2) / 3, atol=1e-12)
    if loss in ("squared", "softmax", "logistic"):
        np.testing.assert_allclose(H, hessian, atol=1e-10)
    else:  # the parabola that touches the loss lies above it
        floored = loss == "hinge" and np.any(np.abs(1 - y * f) < losses._HINGE_FLOOR)
        assert floored or np.all(parabola >= beyond - 1e-10)


@functools.cache
def compiled_prox(loss):
    return jax.jit(loss.prox)


@settings(max_examples=25, deadline=None)
@given(loss=st.sampled_from([*LOSSES, LogCosh(), OwnSoftmax()]), seed=seeds, log_step=st.floats(-3, 3))
def test_the_prox_is_optimal(loss, seed, log_step):
    """``(point − z)/step`` is a subgradient at z: no point nearby is better, and the smooth ones have no slope."""
    made, step = losses.loss_of(loss), 10.0**log_step
    name = loss if isinstance(loss, str) else "softmax" if isinstance(loss, OwnSoftmax) else "squared"
    with jax.enable_x64(True):
        point, y = drawn(name, seed, scale=5.0)
        z = np.asarray(compiled_prox(made)(jnp.asarray(point), y, jnp.asarray(step)))

        def objective(z):
            return np.asarray(made.value(z, y) + np.sum((z - point) ** 2, axis=1) / (2 * step))

        if loss != "hinge":
            np.testing.assert_allclose(made.gradient(z, y) + (z - point) / step, 0, atol=1e-7 * (1 + 1 / step))
        rng = np.random.default_rng(seed)
        for size in (1e-3, 1e-1, 1.0):
            assert np.all(objective(z + size * rng.normal(size=z.shape)) >= objective(z) - 1e-9)


@settings(max_examples=25, deadline=None)
@given(loss=st.sampled_from(LOSSES), seed=seeds)
def test_fenchel_and_young(loss, seed):
    """``ℓ(f) + ℓ*(a) ≥ ⟨a, f⟩``, with equality where a is the gradient at f."""
    with jax.enable_x64(True):
        f, y = drawn(loss, seed)
        made = losses.loss_of(loss)
        a, g = np.asarray(made.gradient(f, y)), np.asarray(drawn(loss, seed + 1)[0])
        np.testing.assert_allclose(made.value(f, y) + made.conjugate(a, y), np.sum(a * f, axis=1), atol=1e-10)
        assert np.all(made.value(g, y) + made.conjugate(a, y) >= np.sum(a * g, axis=1) - 1e-10)


@settings(max_examples=25, deadline=None)
@given(loss=st.sampled_from(LOSSES), seed=seeds)
def test_balanced_duals_sum_to_zero_and_stay_where_the_conjugate_is_finite(loss, seed):
    with jax.enable_x64(True):
        f, y = drawn(loss, seed)
        made, weight = losses.loss_of(loss), np.random.default_rng(seed).uniform(0, 2, size=len(f))
        a = np.asarray(made.balance(made.gradient(f, y), y, weight))
        np.testing.assert_allclose(weight @ a, 0, atol=1e-10)
        g = drawn(loss, seed + 1, scale=5.0)[0]
        assert np.all(made.value(g, y) + made.conjugate(a, y) >= np.sum(a * g, axis=1) - 1e-10)
        if loss == "softmax":
            assert np.all(a + y >= -1e-12)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_best_constant_is_best(loss):
    with jax.enable_x64(True):
        _, y = drawn(loss, 3, n=51)
        weight, made = np.random.default_rng(3).uniform(0.1, 2, size=51), losses.loss_of(loss)
        b = np.asarray(made.constant(y, weight))

        def objective(b):
            return weight @ np.asarray(made.value(np.broadcast_to(b, y.shape), y))

        for _ in range(50):
            assert objective(b + np.random.default_rng(_).normal(size=3) * 10.0 ** -(_ % 5)) >= objective(b) - 1e-6


@pytest.mark.parametrize(("dtype", "C"), [("float32", 3), ("float64", 1)], indirect=["dtype"])
@pytest.mark.parametrize("loss", [name for name in LOSSES if name != "squared"])
def test_held_gates_reach_the_optimum_of_the_program_of_every_loss(dtype, loss, C):
    if loss == "softmax" and C == 1:
        C = 2
    double = dtype == "float64"
    for weighted in (False, True):
        seed, biases = 7 * C + weighted, loss != "huber"
        X, _ = random_problem(seed, n=45, p=5, dtype=dtype)
        Y = random_targets(loss, seed, 45, C)
        weight = np.random.default_rng(seed).uniform(0.2, 2, size=45).astype(dtype) if weighted else None
        init = random_network(seed, p=5, m=7, C=C, hidden_bias=biases, output_bias=biases, dtype=dtype)
        tol = 1e-5 if double else 2e-4  # a cone violation of tol may count several times in the objective
        solver = cf.Cronos(loss=loss, beta=0.02, gates="fixed", max_iters=20_000, tol=tol)
        y = targets_of(loss, Y if double else Y.astype(dtype))
        solution = solver.solve(X, y, init=init, sample_weight=weight)
        stats, state = solution.stats, solution.state
        D, A = np.asarray(state.D), np.asarray(state.A, float)
        optimum = dense_twin.program_optimum(
            X.astype(float), Y, D, A, 0.02, weight, loss=loss, hidden_bias=biases, output_bias=biases
        )
        rounding = 1e-7 if double else 1e-5
        assert np.all(np.asarray(stats.lower_bound_trace) <= optimum * (1 + rounding) + rounding)
        assert float(stats.program_objective) == pytest.approx(optimum, rel=1e-4 if double else 1e-3)
        assert solution.status == cf.Status.converged


def test_a_loss_of_the_users_own_is_solved_as_the_built_in_one():
    X, _ = random_problem(0, n=60, dtype="float64")
    labels = np.random.default_rng(0).integers(0, 3, size=60)
    with jax.enable_x64(True):
        init = random_network(0, C=3, dtype="float64")
        for gates in ("fixed", "refreshed"):
            solver = cf.Cronos(loss="softmax", beta=0.02, gates=gates, max_iters=60, tol=0.0)
            built_in = solver.solve(X, labels, init=init).stats
            own = dataclasses.replace(solver, loss=OwnSoftmax()).solve(X, np.eye(3)[labels], init=init).stats
            np.testing.assert_allclose(own.objective_trace, built_in.objective_trace, rtol=1e-6)
            if gates == "fixed":
                np.testing.assert_allclose(own.lower_bound, built_in.lower_bound, rtol=1e-6)


class Plain(cf.Loss):
    """A user's own that is no dataclass."""

    def __init__(self, share):
        self.share = share

    def value(self, outputs, targets):
        r = targets - outputs
        return jnp.sum(jnp.where(r > 0, self.share, 1 - self.share) * jnp.square(r), axis=1)


@dataclasses.dataclass(frozen=True)
class Expectile(cf.Loss):
    """The same, as a dataclass; what it remembers is no setting."""

    share: float

    @functools.cached_property
    def other(self):
        return 1 - self.share

    def value(self, outputs, targets):
        r = targets - outputs
        return jnp.sum(jnp.where(r > 0, self.share, self.other) * jnp.square(r), axis=1)


@dataclasses.dataclass(frozen=True, eq=False)
class Uncompared(Expectile):
    """One of which all are equal."""

    power: float = 2.0


@dataclasses.dataclass(frozen=True)
class PartlyCompared(Expectile):
    power: float = dataclasses.field(default=2.0, compare=False)


def test_losses_of_one_class_are_told_apart():
    X, Y = random_problem(0, n=60, C=1)
    means = {}
    for share in (0.1, 0.9):
        solution = cf.Cronos(loss=Expectile(share), beta=0.02, max_iters=10).solve(X, Y, hidden=8)
        means[share] = float(jnp.mean(cf.predict(solution.params, X)))
    assert means[0.1] < means[0.9]


@pytest.mark.parametrize(
    ("loss", "match"),
    [
        (Plain(0.1), "`share` is no such field"),
        (Uncompared(0.1), "`power` is no such field"),
        (PartlyCompared(0.1), "`power` is no such field"),
        (Expectile(np.ones(3)), "fields that hash"),
        (Expectile(jnp.ones(())), "fields that hash"),
        (Expectile([0.1]), "fields that hash"),
    ],
)
def test_a_loss_that_equals_another_is_refused(loss, match):
    # They would share a compiled program: the second would be solved with the settings of the first.
    with pytest.raises(ValueError, match=f"Cronos: `loss` must be a frozen dataclass.*{match}"):
        cf.Cronos(loss=loss)


@settings(max_examples=15, deadline=None)
@given(
    loss_and_shape=st.sampled_from(  # each is compiled: two losses have two shapes
        [(loss, (12, 40, 5, 2)) for loss in LOSSES] + [(loss, (30, 4, 9, 3)) for loss in ("softmax", "hinge")]
    ),
    seed=seeds,
    scale=st.sampled_from([1e-6, 1.0, 1e6]),
    beta=st.sampled_from([0.0, 1e-3, 1.0]),
    weighted=st.booleans(),
)
def test_the_refreshed_loss_never_rises_whatever_the_loss(loss_and_shape, seed, scale, beta, weighted):
    loss, (n, p, m, C) = loss_and_shape
    X = (random_problem(seed, n=n, p=p)[0] * scale).astype("float32")
    Y = random_targets(loss, seed, n, C).astype("float32")
    weight = np.random.default_rng(seed).uniform(0.1, 2, size=n).astype("float32") if weighted else None
    init = random_network(seed, p=p, m=m, C=C)
    solver = cf.Cronos(loss=loss, beta=beta, max_iters=15)
    solution = solver.solve(X, targets_of(loss, Y), init=init, sample_weight=weight)
    trace = np.asarray(solution.stats.objective_trace)
    assert np.all(np.isfinite(trace))
    assert np.all(np.diff(trace) <= 0)
    before = dense_twin.regularised_loss(init, X, Y, beta, weight, loss)
    after = dense_twin.regularised_loss(solution.params, X, Y, beta, weight, loss)
    assert after <= before * (1 + 1e-4)
    assert float(solution.stats.initial_objective) == pytest.approx(before, rel=1e-4)
    assert float(solution.stats.objective) == pytest.approx(after, rel=1e-3, abs=1e-4 * before)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_weight_of_k_is_k_copies_for_every_loss(loss):
    X, _ = random_problem(2, n=30, dtype="float64")
    counts = np.random.default_rng(2).permutation(np.repeat([0, 1, 2], 10))  # of sum 30: one program solves both
    init = random_network(2, C=2)
    with jax.enable_x64(True):
        Y = targets_of(loss, random_targets(loss, 2, 30, 2))
        solver = cf.Cronos(loss=loss, beta=0.02, gates="fixed", max_iters=5000, tol=1e-6)
        weighted = solver.solve(X, Y, init=init, sample_weight=counts.astype(float)).stats
        repeated = solver.solve(np.repeat(X, counts, axis=0), np.repeat(Y, counts, axis=0), init=init).stats
    assert float(weighted.initial_objective) == pytest.approx(float(repeated.initial_objective), rel=1e-10)
    assert float(weighted.program_objective) == pytest.approx(float(repeated.program_objective), rel=1e-4)


@pytest.mark.parametrize("loss", LOSSES)
def test_above_beta_max_every_loss_has_a_constant_network(loss):
    X, _ = random_problem(4, n=200)
    labels = (X[:, 0] > 0.5).astype(int)
    y = {"softmax": labels, "logistic": labels}.get(loss, 2.0 * labels.astype("float32") - 1)
    made = losses.loss_of(loss)
    Y = made.targets(jnp.asarray(y), None)
    arrays = X, Y, jnp.ones(200)
    beta_max = float(user_beta_max(*arrays, loss=made, hidden_bias=True, output_bias=True))
    constant = float(jnp.mean(made.value(jnp.broadcast_to(made.constant(Y, jnp.ones(200)), Y.shape), Y)))
    above, below = (
        cf.Cronos(loss=loss, beta=factor * beta_max, max_iters=300, tol=1e-7).solve(X, y, hidden=16).stats
        for factor in (1.05, 0.5)
    )
    assert float(above.objective) == pytest.approx(constant, rel=1e-2)
    assert float(below.objective) < 0.98 * constant


def test_balanced_classes_count_the_same():
    X, _ = random_problem(1, n=60)
    labels = (np.arange(60) % 6 == 0).astype(int)
    weight = np.where(labels == 1, 60 / 2 / 10, 60 / 2 / 50).astype("float32")
    signed = (2 * labels - 1).astype("float32")
    for loss, y in {"softmax": labels, "logistic": labels, "hinge": signed, "squared": signed}.items():
        network = random_network(1, C=2 if loss == "softmax" else 1)
        by_hand = cf.Cronos(loss=loss).objective(network, X, y, 0.1, sample_weight=weight)
        balanced = cf.Cronos(loss=loss, class_weight="balanced").objective(network, X, y, 0.1)
        np.testing.assert_allclose(balanced, by_hand, rtol=1e-6)
        assert abs(float(balanced) - float(cf.Cronos(loss=loss).objective(network, X, y, 0.1))) > 1e-3
    solver = cf.Cronos(loss="softmax", max_iters=5)
    by_hand = solver.solve(X, labels, hidden=4, sample_weight=weight).stats
    balanced = dataclasses.replace(solver, class_weight="balanced").solve(X, labels, hidden=4).stats
    np.testing.assert_allclose(balanced.objective, by_hand.objective, rtol=1e-5)


@pytest.mark.parametrize("C", [2, 4])
def test_balanced_classes_count_probabilities(C):
    """A row was counted for its likeliest class alone."""
    X, _ = random_problem(1, n=60)
    p = np.random.default_rng(C).dirichlet(np.linspace(0.2, 3.0, C), 60).astype("float32")
    weight = p @ (60 / (C * p.sum(axis=0)))
    assert weight.mean() == pytest.approx(1.0)
    network = random_network(1, C=C)
    by_hand = cf.Cronos(loss="softmax").objective(network, X, p, 0.1, sample_weight=weight)
    balanced = cf.Cronos(loss="softmax", class_weight="balanced").objective(network, X, p, 0.1)
    np.testing.assert_allclose(balanced, by_hand, rtol=1e-5)
    if C == 2:
        network, y = random_network(1, C=1), p[:, 1]
        by_hand = cf.Cronos(loss="logistic").objective(network, X, y, 0.1, sample_weight=weight)
        balanced = cf.Cronos(loss="logistic", class_weight="balanced").objective(network, X, y, 0.1)
        np.testing.assert_allclose(balanced, by_hand, rtol=1e-5)


def test_balanced_classes_do_not_count_rows_of_no_weight():
    X, _ = random_problem(1, n=60)
    labels, weight = (np.arange(60) % 6 == 0).astype(int), (np.arange(60) < 40).astype("float32")
    solver, network = cf.Cronos(loss="softmax", class_weight="balanced"), random_network(1, C=2)
    one, other = (
        float(solver.objective(network, X, y, 0.1, sample_weight=weight))
        for y in (labels, np.where(weight > 0, labels, 1 - labels))
    )
    assert one == pytest.approx(other, rel=1e-6)


def test_labels_take_their_number_of_classes_from_the_network():
    X, _ = random_problem(1)
    labels = np.arange(40) % 2
    solver = cf.Cronos(loss="softmax", max_iters=2)
    assert float(solver.objective(random_network(0, C=4), X, labels, 0.0)) > 0
    assert solver.solve(X, labels, hidden=3, num_classes=5).params.kernel2.shape == (3, 5)


@pytest.mark.parametrize("labels", [[0, 3, 7], range(1, 11), [2]])
def test_labels_with_gaps_are_told_of_where_the_classes_are_counted_by_them(labels):
    """Each absent label had an output, without a word."""
    labels = np.resize(np.array(labels), 40)
    C, loss = int(labels.max()) + 1, losses.Softmax()
    with pytest.warns(UserWarning, match=rf"`y` should have labels 0, 1, .* and some up to {C - 1}.* num_classes={C}"):
        assert loss.targets(jnp.asarray(labels), None).shape == (40, C)
    loss.targets(jnp.asarray(labels), C)
    loss.targets(jnp.asarray(np.unique(labels, return_inverse=True)[1]), None)


def test_a_solve_with_gaps_in_labels_warns_unless_it_is_told_the_number_of_classes():
    X, labels = random_problem(1)[0], np.resize([0, 3], 40)
    solver = cf.Cronos(loss="softmax", max_iters=2)
    with pytest.warns(UserWarning, match="got none of 1, 2 and some up to 3"):
        solution = solver.solve(X, labels, hidden=3)
    solver.solve(X, labels, hidden=3, num_classes=4)
    solver.solve(X, labels, init=solution.params)


def test_rows_to_choose_beta_on_may_lack_a_class():
    X, _ = random_problem(1)
    path = cf.Cronos(loss="softmax", beta="path", max_iters=1)
    path.solve(X, np.arange(40) % 3, hidden=3, validation=(X[:9], np.full(9, 2)))


def test_a_path_chooses_the_beta_that_its_held_out_rows_like_best():
    X, _ = random_problem(5, n=120)
    y = np.abs(X[:, 0]) + 0.3 * np.random.default_rng(0).normal(size=120).astype("float32")
    solver = cf.Cronos(beta="path", max_iters=100)
    stats = solver.solve(X, y, hidden=8).stats
    best = int(np.argmin(stats.path_losses))
    assert float(stats.beta) == pytest.approx(float(stats.path_betas[best]), rel=1e-5)
    assert np.all(np.diff(stats.path_betas) < 0)
    assert best > 0  # a tenth of β_max leaves most of the signal
    given = solver.solve(X[:96], y[:96], hidden=8, validation=(X[96:], y[96:])).stats
    assert given.path_losses.shape == stats.path_losses.shape


def test_a_path_over_folds_chooses_by_the_mean_over_rows_that_are_each_held_out_once():
    X, _ = random_problem(5, n=60)
    y = np.abs(X[:, 0]) + 0.3 * np.random.default_rng(0).normal(size=60).astype("float32")
    solver, key = cf.Cronos(beta="path", max_iters=30, folds=3), jax.random.key(3)
    solution = solver.solve(X, y, hidden=8, key=key)
    betas_tried, losses = (np.asarray(each) for each in (solution.stats.path_betas, solution.stats.path_losses))
    assert float(solution.stats.beta) == pytest.approx(betas_tried[np.argmin(losses)], rel=1e-5)
    _, split_key, _ = jax.random.split(key, 3)
    fold = betas.folds(jnp.asarray(y)[:, None], split_key, 3)
    plain = cf.Cronos(beta=float(betas_tried[0]), max_iters=30)  # by hand, at the first β
    missed = []
    for k in range(3):
        network = plain.solve(X[fold != k], y[fold != k], hidden=8, key=key).params
        missed.append(cf.predict(network, X[fold == k])[:, 0] - y[fold == k])
    assert losses[0] == pytest.approx(float(np.mean(np.square(np.concatenate(missed))) / 2), rel=0.05)
    one = dataclasses.replace(solver, folds=None).solve(X, y, hidden=8, key=key)
    assert not np.array_equal(one.stats.path_losses, losses)
    with pytest.raises(ValueError, match="`validation` takes the place of folds, got both, and folds=3"):
        solver.solve(X, y, hidden=8, validation=(X, y))
    for beta in (None, 1e-3):  # they were passed over, without a word
        with pytest.raises(ValueError, match=r'`folds` are for beta="path" only, got folds=3'):
            dataclasses.replace(solver, beta=beta).solve(X, y, hidden=8)
    with pytest.raises(ValueError, match=r"`folds` must not exceed the number of rows .*, got folds=61 for 60 rows"):
        dataclasses.replace(solver, folds=61).solve(X, y, hidden=8)
    for bad in (1, 0, 2.5):
        with pytest.raises(ValueError, match=r"Cronos: `folds` must be an integer ≥ 2"):
            cf.Cronos(beta="path", folds=bad)


@pytest.mark.parametrize(("rows", "count"), [(60, 3), (100, 5), (103, 5), (12, 10), (11, 4)])
def test_folds_share_the_rows_and_each_class(rows, count):
    labels = np.arange(rows) % 3
    fold = betas.folds(jnp.eye(3)[labels], jax.random.key(0), count)
    sizes = np.bincount(fold, minlength=count)
    assert sizes.sum() == rows
    assert sizes.min() >= rows // count
    assert sizes.max() - sizes.min() <= max(rows // count - 1, rows % count)
    for label in range(3) if rows >= 60 else ():
        own = np.bincount(fold[labels == label], minlength=count)
        assert own.min() >= rows / 3 / count - 2
    np.testing.assert_array_equal(
        betas.held_out(jnp.eye(3)[labels], jax.random.key(0)),
        betas.folds(jnp.eye(3)[labels], jax.random.key(0), 5) == 0,
    )


def test_held_out_rows_are_stratified():
    labels = np.repeat([0, 1, 2], [50, 20, 30])
    for seed in range(5):
        held = betas.held_out(jnp.eye(3)[labels], jax.random.key(seed))
        assert np.bincount(labels[held], minlength=3).tolist() == [10, 4, 6]
        real = betas.held_out(jnp.linspace(0, 1, 40)[::-1, None], jax.random.key(seed))
        assert np.all(real.reshape(8, 5).sum(axis=1) == 1)


@pytest.mark.parametrize("case", ["labels", "probabilities", "logistic", "hinge", "weights"])
def test_inside_jit_what_would_be_refused_is_not_finite(case):
    """Nobody can look at values there: labels out of range had a loss of −4."""
    X, labels, ones = np.ones((8, 3), "float32"), np.arange(8) % 2, np.ones(8, "float32")
    signs = np.where(labels > 0, 1.0, -1.0).astype("float32")[:, None]
    loss, good, bad = {
        "labels": ("softmax", labels, labels + 1),
        "probabilities": ("softmax", np.eye(2, dtype="float32")[labels], 2 * np.eye(2, dtype="float32")[labels]),
        "logistic": ("logistic", np.maximum(signs, 0), signs),
        "hinge": ("hinge", signs, np.maximum(signs, 0)),
        "weights": ("squared", signs, signs),
    }[case]
    classes = 2 if loss == "softmax" else 1

    @jax.jit
    def null_loss(y, weight):
        _, targets = checks.data(X, y, classes, None, losses.loss_of(loss))
        return checks.sample_weight(weight, targets) @ losses.loss_of(loss).value(jnp.zeros((8, classes)), targets)

    assert np.isfinite(null_loss(good, ones))
    assert np.isnan(null_loss(bad, ones if case != "weights" else np.where(np.arange(8) == 3, -1, ones)))


@pytest.mark.parametrize("kind", ["float16", "bfloat16", "float32"])
def test_probabilities_of_few_bits_sum_to_one_as_well_as_their_type_can(kind):
    """They were summed in their own type, and held to 1e-3: bfloat16 was refused."""
    p = np.asarray(jax.nn.softmax(2 * jax.random.normal(jax.random.key(0), (500, 10))))
    y, loss = jnp.asarray(p, kind), losses.Softmax()
    assert np.max(np.abs(np.asarray(y, "float32").sum(axis=1) - 1)) > {"bfloat16": 1e-3}.get(kind, 0)
    X = np.ones((500, 2), "float32")
    for taken in (checks.data(X, y, None, None, loss)[1], jax.jit(lambda y: loss.targets(y, 10))(y)):
        np.testing.assert_array_equal(taken, y.astype("float32"))
    few = 0.9 * p  # in any type
    with pytest.raises(ValueError, match=r"solve: `y` .* sum to one; got a row that sums to 0\.\d+"):
        checks.data(X, jnp.asarray(few, kind), None, None, loss)
    assert np.all(np.isnan(jax.jit(lambda y: loss.targets(y, 10))(jnp.asarray(few, kind))))
    with pytest.raises(ValueError, match="got a negative entry"):
        checks.data(X, jnp.asarray(p - 0.5, kind), None, None, loss)


def test_inside_jit_signs_of_labels_out_of_range_are_not_finite():
    signs = jax.jit(lambda labels: cf.signed_targets(labels, 3))(np.array([0, 2, 3]))
    np.testing.assert_array_equal(np.isnan(signs), [[False] * 3, [False] * 3, [True] * 3])


@pytest.mark.parametrize("few", [losses._FEW, 0])
@pytest.mark.parametrize("kind", ["int8", "uint8"])
def test_labels_of_few_bits_are_those_of_many(kind, few, monkeypatch):
    """With more classes than the type of the labels has numbers, a row had several classes, or NaN inside jit."""
    monkeypatch.setattr(losses, "_FEW", few)
    labels = np.array([3, 44, 100, 127])
    for of in (lambda y: losses.Softmax().targets(jnp.asarray(y), 300), lambda y: cf.signed_targets(y, 300)):
        expected = of(labels.astype("int32"))
        np.testing.assert_array_equal(jnp.argmax(expected, axis=1), labels)
        for made in (of, jax.jit(of)):
            np.testing.assert_array_equal(made(labels.astype(kind)), expected)
