"""A loss of the user's own may be negative, as the likelihood of counts is without its constants."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cronos_flax as cf

X = np.random.default_rng(0).normal(size=(400, 6)).astype("float32")
COUNTS = np.random.default_rng(1).poisson(np.exp(3 + 0.3 * np.maximum(X[:, 0] - X[:, 1], 0))).astype("float32")[:, None]


@dataclasses.dataclass(frozen=True)
class Poisson(cf.Loss):
    """The negative log-likelihood of counts, with or without what depends on them alone."""

    whole: bool

    def value(self, outputs, targets):
        terms = jnp.exp(outputs) - targets * outputs
        if self.whole:
            terms += jax.scipy.special.xlogy(targets, targets) - targets
        return jnp.sum(terms, axis=1)


BOTH = [Poisson(whole=True), Poisson(whole=False)]
OF_COUNTS = float(np.mean(COUNTS * np.log(np.maximum(COUNTS, 1)) - COUNTS))


def test_a_solve_ends_where_that_of_the_whole_loss_ends():
    """It went on for all of its 500 iterations, and had curvature from a sample only."""
    whole, part = (cf.Cronos(loss=loss, beta=0.01).solve(X, COUNTS, hidden=20) for loss in BOTH)
    assert part.stats.objective < 0 < whole.stats.objective
    assert whole.status == part.status == cf.Status.stationary
    assert part.stats.iterations <= 2 * whole.stats.iterations
    explained = whole.stats.null_loss - whole.stats.objective
    assert abs(part.stats.objective + OF_COUNTS - whole.stats.objective) < 0.05 * explained


@pytest.mark.parametrize("loss", BOTH)
def test_no_word_of_a_head_that_is_better_than_the_best_constant(loss):
    """One that was better by less than a twentieth of its size was said to be worse."""
    model = nn.Sequential([nn.Dense(20), nn.relu, nn.Dense(1)])
    variables = jax.jit(model.init)(jax.random.key(0), X)
    head = cf.find_head(model, variables, X[:64])
    _, solution = cf.fit_head(head, variables, (X, COUNTS), solver=cf.Cronos(loss=loss, max_iters=8))
    assert solution.stats.objective < solution.stats.null_loss


def test_the_guard_and_the_loop_decide_as_with_the_whole_loss():
    """Any rise was too much for the guard, which lowered the rate; and each epoch counted as one with a clear rise."""
    model = nn.Sequential([nn.Dense(8), nn.tanh, nn.Dense(20), nn.relu, nn.Dense(1)])
    variables = jax.jit(model.init)(jax.random.key(0), X)
    made = {"apply_fn": model.apply, "params": variables["params"], "head": cf.find_head(model, variables, X[:64])}

    def solves(loss):
        state = cf.CronosTrainState.create(**made, tx=optax.adam(3e-3), solver=cf.Cronos(loss=loss))
        state, history = cf.train(state, (X, COUNTS), epochs=7, batch_size=100)
        return [row["epoch"] for row in history if "objective" in row], state.figures["rejections"]

    whole, part = map(solves, BOTH)
    assert whole == part
    assert not part[1]
