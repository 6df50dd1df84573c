"""The page of adversarial training: its attacks, the same on four devices as on one, and a small run."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState
from forked import Forked
from jax.sharding import AxisType
from pages import page

adversarial = page("neighbours", "adversarial")
Attack, CLEAN = adversarial.Attack, adversarial.Attack(0.0, 0)
SIZE = 30


@pytest.fixture(scope="module")
def rows():
    """Some digits."""
    rows = adversarial.load(None)
    return adversarial.Rows(rows.x[:300], rows.y[:300], rows.x_scored[:150], rows.y_scored[:150])


@pytest.fixture(scope="module")
def mesh():
    """One device."""
    return jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))


@pytest.fixture(scope="module")
def trained(rows, mesh):
    """States after training on clean rows, and by an alternation on attacked rows before its last solve."""
    tx, attack = optax.adam(1e-2), Attack(0.1, 2)
    state = adversarial.create(tx, 0, rows, mesh)
    alone = TrainState.create(apply_fn=state.apply_fn, params=state.params, tx=tx)
    common = (6, SIZE, 0)
    return {
        "clean": adversarial.train(alone, rows, mesh, CLEAN, *common),
        "alternation": adversarial.train(state, rows, mesh, attack, *common, solve=attack),
    }


def batch(rows):
    return jnp.asarray(rows.x[:SIZE]), jnp.asarray(rows.y[:SIZE])


@pytest.mark.parametrize("steps", [1, 4])
def test_an_attack_stays_in_its_box_and_raises_the_loss(rows, trained, steps):
    (x, y), params, attack = batch(rows), trained["clean"].params, Attack(0.1, steps)
    z = adversarial.attacked(params, x, y, jax.random.key(0), attack)
    assert jnp.abs(z - x).max() <= 0.1 + 1e-6
    assert 0 <= z.min() <= z.max() <= 1
    start, _ = adversarial.start(params, x, jax.random.key(0), 0.1)
    before, random, after = (float(adversarial.loss(params, each, y).mean()) for each in (x, start, z))
    assert after > max(before, random) + 0.5


def test_an_attack_without_labels_asks_for_none_and_raises_the_divergence(rows, trained):
    (x, y), params = batch(rows), trained["clean"].params
    blind = Attack(0.1, 4, labels=False)
    z, same = (adversarial.attacked(params, x, labels, jax.random.key(0), blind) for labels in (y, 0 * y))
    np.testing.assert_array_equal(z, same)
    start, clean = adversarial.start(params, x, jax.random.key(0), 0.1)
    random, after = (float(adversarial.loss(params, each, y, clean).mean()) for each in (start, z))
    assert after > random + 0.5


def test_rows_are_attacked_one_by_one(rows, trained):
    x, y = batch(rows)
    common = (None, Attack(0.1, 4))
    z = adversarial.climb(trained["clean"].params, x, x, y, *common)
    half = adversarial.climb(trained["clean"].params, x[15:], x[15:], y[15:], *common)
    assert np.mean(np.abs(z[15:] - half) > 1e-6) < 1e-3  # where a gradient is nearly zero its sign may differ


def test_training_on_attacked_rows_makes_the_network_robust(rows, mesh, trained):
    def accuracy(name, attack):
        return adversarial.accuracy(trained[name].params, rows, SIZE, mesh, attack)

    assert accuracy("clean", CLEAN) > 80
    assert accuracy("alternation", Attack(0.1, 10)) > accuracy("clean", Attack(0.1, 10)) + 10


def test_a_solve_lowers_the_loss_on_the_attack_that_it_saw(rows, mesh, trained):
    state, attack = trained["alternation"], Attack(0.1, 3)
    seen = adversarial.under(attack, state.params, rows[:2], SIZE, mesh, jax.random.key(0))
    solved, solution = state.solve_head(seen)
    anew = adversarial.under(attack, solved.params, rows[:2], SIZE, mesh, jax.random.key(1))
    on_seen, on_new = (
        float(np.mean([adversarial.loss(solved.params, *batch).mean() for batch in each])) for each in (seen, anew)
    )
    assert float(solution.stats.objective) < float(solution.stats.initial_objective)
    assert on_new > on_seen  # an attack answers the head


DEVICES = """
import sys
sys.path.insert(0, "tests")
import jax, numpy as np, optax
from jax.sharding import AxisType
from pages import page

page = page("neighbours", "adversarial")
rows = page.load(None)
rows = page.Rows(*(a[:80].astype("f8") if a.ndim > 1 else a[:80] for a in rows))
attack, key = page.Attack(0.1, 3), jax.random.key(3)
kinds = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter")
meshes = [jax.make_mesh((n,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:n]) for n in (1, 4)]

def begun(mesh):
    state = page.create(optax.lamb(1e-3), 0, rows, mesh)
    params = jax.tree.map(lambda leaf: leaf.astype("f8"), state.params)
    return state.replace(params=params, opt_state=state.tx.init(params))

def exchanged(function, *args):
    text = function.lower(*args).compile().as_text()
    return {kind for kind in kinds if kind in text}

def close(found, **tolerances):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerances), *found)

found = {"step": [], "solve": [], "run": []}
for mesh in meshes:
    state = begun(mesh)
    x, y = page.batches(rows[:2], 40, mesh)[0]
    z = page.attacked(state.params, x, y, key, attack)
    assert z.sharding.is_equivalent_to(x.sharding, x.ndim)
    found["step"].append(page.descend(state, z, y).params)
    assert not exchanged(page.start, state.params, x, key, attack.eps)
    assert not exchanged(page.climb, state.params, z, x, y, None, attack)
    assert exchanged(page.descend, state, z, y) == ({"all-reduce"} if mesh.size > 1 else set())
    found["solve"].append(state.solve_head(page.under(attack, state.params, rows[:2], 40, mesh, key))[0].params)
    found["run"].append(page.train(state, rows, mesh, attack, 3, 40, 0, attack).params)
close(found["step"], rtol=1e-6, atol=1e-9)
close(found["solve"], rtol=1e-5, atol=1e-8)
close(found["run"], rtol=1e-3, atol=1e-5)
"""


@pytest.mark.slow
def test_four_devices_give_what_one_gives_and_attacks_exchange_nothing(tmp_path):
    """A step, a solve and a short run, in float64: there no sign of a gradient depends on the order of sums."""
    config = {"jax_num_cpu_devices": 4, "jax_enable_x64": True}
    status, _, err = Forked(tmp_path, "-c", DEVICES, config=config).wait(300)
    assert status == 0, err[-3000:]
