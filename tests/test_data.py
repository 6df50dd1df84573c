"""Data as users have them: each goes through one door, and comes out right or is refused by name."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cronos_flax as cf
from cronos_flax._solver.arrays import is_array
from cronos_flax._solver.losses import LOSSES

MODEL = nn.Sequential([nn.Dense(8), nn.tanh, nn.Dense(6), nn.relu, nn.Dense(2)])
X = np.asarray(jax.random.normal(jax.random.key(0), (300, 5)))
Y = (X[:, 0] * X[:, 1] > 0).astype(int)
PARAMS = MODEL.init(jax.random.key(1), X)["params"]
HEAD = cf.find_head(MODEL, {"params": PARAMS}, X[:64])
WIDE = np.where(np.arange(256) == 7, 2**32 + 1, Y[:256])


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(a), jax.tree.leaves(b))


class Foreign:
    """An array of another library, like one of PyTorch: it can be sliced, and NumPy can read it."""

    def __init__(self, array):
        self.array = array

    def __array__(self, dtype=None, copy=None):
        return np.array(self.array, dtype)

    def __len__(self):
        return len(self.array)

    def __getitem__(self, rows):
        return Foreign(self.array[rows])


class Interface:
    """An array that only describes its memory."""

    def __init__(self, array):
        self.__array_interface__ = array.__array_interface__
        self.kept = array


def batched(x=X, y=Y, rows=64, count=4):
    return [(x[i : i + rows], y[i : i + rows]) for i in range(0, rows * count, rows)]


def test_arrays_of_other_libraries_compile_one_program_for_all_batches():
    traces = []

    class Counting(nn.Module):
        @nn.compact
        def __call__(self, x):
            traces.append(1)
            return nn.Dense(2)(nn.relu(nn.Dense(6)(nn.tanh(nn.Dense(8)(x)))))

    model = Counting()
    variables = model.init(jax.random.key(0), X)
    head = cf.find_head(model, variables, Foreign(X[:64]))
    head.gather(variables, [(Foreign(X[:64]), Foreign(Y[:64]))])
    before = len(traces)
    head.gather(variables, [(Foreign(x), Foreign(y)) for x, y in batched()])
    assert len(traces) == before


def test_types_and_constants_are_no_arrays():
    assert not any(map(is_array, (np.float32, jnp.float32, 3, True, "same", [1.0], None)))


def test_arrays_of_other_libraries_can_be_solved_on():
    X_, y = X[:, :3], X[:, :1]
    solver = cf.Cronos(max_iters=2, beta=1e-3)
    one = solver.solve(X_, y, hidden=4, sample_weight=np.ones(300, "float32"))
    for kind in (Foreign, lambda a: a.astype(">f4")):
        other = solver.solve(kind(X_), kind(y), hidden=4, sample_weight=kind(np.ones(300, "float32")))
        same(one.params, other.params)


def test_an_array_that_numpy_cannot_read_is_refused_with_the_reason():
    class OnAnotherDevice:
        def __array__(self, dtype=None, copy=None):
            raise TypeError("can't convert cuda:0 tensor to numpy")

    with pytest.raises(ValueError, match="NumPy can read, got OnAnotherDevice: can't convert cuda"):
        cf.fit_head(HEAD, {"params": PARAMS}, [(OnAnotherDevice(), Y[:64])])


SIGNS = np.where(Y[:256, None] == np.arange(2), 1.0, -1.0).astype("float32")


@pytest.mark.parametrize(("loss", "y"), [("softmax", WIDE), ("hinge", np.where(SIGNS > 0, 2**32 + 1, -1))])
def test_labels_that_would_wrap_are_refused_by_solves(loss, y):
    solver = cf.Cronos(loss=loss)
    with pytest.raises(ValueError, match="fit_head: the targets must be integers that fit int32"):
        cf.fit_head(HEAD, {"params": PARAMS}, (X[:256], y), solver=solver)
    with pytest.raises(ValueError, match="solve: `y` must be integers that fit int32"):
        solver.solve(X[:256], y, hidden=3)


def test_labels_that_would_wrap_are_refused_where_targets_are_made_of_them():
    for make in (cf.signed_targets, LOSSES["softmax"].from_labels, LOSSES["logistic"].from_labels):
        with pytest.raises(ValueError, match="`labels` must be integers that fit int32"):
            make(WIDE, 2)


def test_an_empty_batch_does_not_stop_a_fit():
    one = HEAD.gather({"params": PARAMS}, batched())
    two = HEAD.gather({"params": PARAMS}, [(X[:0], Y[:0]), *batched(), (X[:0], Y[:0])])
    same(one, two)
