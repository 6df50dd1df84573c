"""Under each of JAX's global settings, all public functions run, and give what they give without it."""

import contextlib
import dataclasses
import warnings

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest
from flax import nnx

import cronos_flax as cf
from cronos_flax.sklearn import CronosClassifier

SETTINGS = {
    "promotion and transfers": {  # all three only raise, and each setting traces everything anew
        "jax_numpy_rank_promotion": "raise",
        "jax_numpy_dtype_promotion": "strict",
        "jax_transfer_guard": "disallow",
    },
    "NaN": {"jax_debug_nans": True},
    "checks": {"jax_enable_checks": True},
    "x64": {"jax_enable_x64": True, "jax_numpy_dtype_promotion": "strict"},  # on arrays of float32
    "no jit": {"jax_disable_jit": True},
}
WIDTH, HIDDEN, CLASSES = 5, 6, 3
SOLVER = cf.Cronos(loss="softmax", max_iters=2)


@contextlib.contextmanager
def under(settings):
    """These settings of JAX, for a while."""
    before = {name: jax.config.values[name] for name in settings}
    try:
        for name, value in settings.items():
            jax.config.update(name, value)
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


class User:
    """A user's arrays, models and optimizer, on the device before any setting is made."""

    def __init__(self):
        self.key = jax.random.key(0)
        self.x = jax.random.normal(self.key, (32, WIDTH))
        self.labels = jax.random.randint(self.key, (32,), 0, CLASSES)
        self.real = jax.random.normal(self.key, (32, CLASSES))
        self.one, self.weight = self.real[:, :1], self.real[:, 0] ** 2
        layers = [nn.Dense(WIDTH), nn.tanh, nn.Dense(HIDDEN), nn.relu, nn.Dense(CLASSES)]
        self.model = nn.Sequential(layers)
        self.variables = jax.jit(self.model.init)(self.key, self.x)
        self.head = cf.find_head(self.model, self.variables, self.x)
        self.features = self.head.inputs(self.variables, self.x)
        self.start = self.head.read(self.variables)
        self.grads = jax.tree.map(lambda leaf: leaf / 8, self.variables["params"])
        self.tx = optax.sgd(1e-2)
        self.rngs = nnx.Rngs(0)
        rngs = nnx.Rngs(1)
        self.nnx_layers = [nnx.Linear(WIDTH, WIDTH, rngs=rngs), nnx.Linear(WIDTH, HIDDEN, rngs=rngs)]
        self.nnx_layers.append(nnx.Linear(HIDDEN, CLASSES, rngs=rngs))
        self.pretrained = nn.Sequential([nn.Dense(WIDTH), nn.tanh, nn.Dense(CLASSES)])
        self.pretrained_variables = jax.jit(self.pretrained.init)(self.key, self.x)

    def state(self, tx=None):
        params, tx = self.variables["params"], self.tx if tx is None else tx
        return cf.CronosTrainState.create(
            apply_fn=self.model.apply, params=params, tx=tx, head=self.head, solver=SOLVER
        )

    def nnx_model(self):
        first, hidden, last = nnx.clone(self.nnx_layers)
        return nnx.Sequential(first, nnx.tanh, hidden, nnx.relu, last)


def figures(solution):
    return {"objective": solution.stats.objective, "params": solution.params}


def find_and_fit(user, directory):
    head = cf.find_head(user.model, user.variables, user.x)
    variables, solution = cf.fit_head(head, user.variables, (user.x, user.labels), solver=SOLVER)
    return variables, figures(solution)


def solve(user, directory):
    solution = SOLVER.solve(user.features, user.labels, init=user.start, sample_weight=user.weight)
    beta = solution.stats.beta
    return figures(solution), SOLVER.objective(solution.params, user.features, user.labels, beta)


def solve_squared(user, directory):
    solution = cf.Cronos(max_iters=2).solve(user.features, user.real, hidden=HIDDEN, key=user.key)
    return figures(solution), cf.predict(solution.params, user.features), cf.prune_head(solution.params)


def solve_fixed(user, directory):
    solver = cf.Cronos(loss="softmax", gates="fixed", max_iters=2, beta=1e-3)
    return figures(solver.solve(user.features, user.labels, init=user.start))


def solve_gated(user, directory):
    solver = cf.Cronos(loss="softmax", gates="gated", max_iters=2, beta=1e-3)
    solution = solver.solve(user.features, user.labels, init=user.start)
    return figures(solution), cf.predict(solution.params, user.features)


def solve_paired(user, directory):
    solver = cf.Cronos(gates="paired", linear_solver=cf.NystromPCG(), max_iters=2, beta=1e-3)
    return figures(solver.solve(user.features, user.one, hidden=HIDDEN))


def on_the_host(user, directory):
    """Arrays of NumPy, which are sent."""
    x, labels = np.asarray(user.x), np.asarray(user.labels)
    solution = SOLVER.solve(x, labels, hidden=HIDDEN)
    with warnings.catch_warnings(action="ignore"):  # of two iterations
        estimator = CronosClassifier(HIDDEN, max_iter=2, random_state=0).fit(x, labels)
    network = jax.device_get(solution.params)
    return figures(solution), cf.predict(network, x), cf.predict(solution.params, x), estimator.kernel1_.shape


def alternate(user, directory):
    state = jax.device_put(user.state(optax.rmsprop(1e-2)))  # Flax starts with a step that is Python's
    state = jax.jit(lambda state, grads: state.apply_gradients(grads=grads))(state, user.grads)
    state, solution = state.solve_head((user.x, user.labels))
    cf.save_checkpoint(directory / "state", state, 1)
    return figures(solution), state.params, cf.restore_checkpoint(directory / "state", state).params


def train(user, directory):
    rows = user.x, user.labels
    state = user.state()
    state = state.replace(solver=dataclasses.replace(state.solver, class_weight="balanced"))
    state, history = cf.train(state, rows, epochs=1, batch_size=16, validation=rows)
    return state.params, [row.get("validation_accuracy", 0.0) for row in history]


def alternate_nnx(user, directory):
    model = user.nnx_model()
    head = cf.nnx.find_head(model, user.x)
    optimizer = cf.nnx.CronosOptimizer(model, user.tx, head=head, solver=SOLVER)
    grads = nnx.jit(nnx.grad(lambda model, x: optax.squared_error(model(x)).mean()))(model, user.x)
    nnx.jit(lambda optimizer, model, grads: optimizer.update(model, grads))(optimizer, model, grads)
    solution = optimizer.solve_head(model, (user.x, user.labels))
    return figures(solution), figures(cf.nnx.fit_head(head, model, (user.x, user.labels), solver=SOLVER))


def gather(user, directory):
    rows = cf.gather_features(user.head, user.variables, (user.x, user.labels), cache=directory)
    return rows.X, rows.y, figures(cf.fit_head(user.head, user.variables, rows, solver=SOLVER)[1])


def graft(user, directory):
    grafted = cf.graft(user.pretrained, at="layers_2", hidden=HIDDEN)
    variables = cf.graft_variables(grafted, user.pretrained_variables, user.key, user.x)
    model = cf.nnx.graft(user.nnx_model(), at="layers/4", hidden=HIDDEN, rngs=user.rngs)
    return grafted.apply(variables, user.x), model(user.x).shape


def solve_path(user, directory):
    validation = user.features, user.labels
    solution = cf.Cronos(loss="softmax", max_iters=2, beta="path").solve(
        user.features, user.labels, init=user.start, validation=validation
    )
    return figures(solution), solution.stats.path_losses


PIECES = [
    find_and_fit,
    solve,
    solve_squared,
    solve_fixed,
    solve_paired,
    solve_gated,
    solve_path,
    on_the_host,
    alternate,
    train,
    alternate_nnx,
]
PIECES += [graft, gather]
WITHOUT_JIT = [solve_squared, alternate, graft]  # each operation is dispatched: slow


@pytest.fixture(scope="module")
def user():
    return User()


@pytest.fixture(scope="module")
def expected(user, tmp_path_factory):
    return {piece: jax.device_get(piece(user, tmp_path_factory.mktemp(piece.__name__))) for piece in PIECES}


@pytest.mark.parametrize("name", SETTINGS)
def test_everything_runs_under_a_setting_and_gives_the_same(user, expected, tmp_path, name):
    """Before: rank promotion, strict dtypes and the transfer guard broke it."""

    def compare(new, old):  # without jit sums are taken in another order
        tolerance = 1e-4 if name == "no jit" else 0.0
        np.testing.assert_allclose(new, old, tolerance, tolerance)

    for piece in WITHOUT_JIT if name == "no jit" else PIECES:
        with under(SETTINGS[name]):
            found = piece(user, tmp_path / piece.__name__)
        jax.tree.map(compare, jax.device_get(found), expected[piece])
