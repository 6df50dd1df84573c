"""Rows, a small model and its states, for the tests of what data may be; and arrays that are not those of NumPy."""

import flax.linen as nn
import jax
import numpy as np
import optax
from flax.training.train_state import TrainState

import cronos_flax as cf

MODEL = nn.Sequential([nn.Dense(8), nn.tanh, nn.Dense(6), nn.relu, nn.Dense(2)])
X = np.asarray(jax.random.normal(jax.random.key(0), (300, 5)))
Y = (X[:, 0] * X[:, 1] > 0).astype(int)
PARAMS = jax.jit(MODEL.init)(jax.random.key(1), X)["params"]
HEAD = cf.find_head(MODEL, {"params": PARAMS}, X[:64])
WIDE = np.where(np.arange(256) == 7, 2**32 + 1, Y[:256])


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


def plain(params=PARAMS, apply_fn=MODEL.apply, tx=None, kind=TrainState, **kwargs):
    return kind.create(apply_fn=apply_fn, params=params, tx=tx or optax.adam(1e-2), **kwargs)


def alternating(**solver):
    solver = cf.Cronos(**{"loss": "softmax", **solver})
    return plain(kind=cf.CronosTrainState, head=HEAD, solver=solver)


def train(state=None, data=(X[:256], Y[:256]), **kwargs):
    state = plain() if state is None else state
    return cf.train(state, data, **{"epochs": 2, "batch_size": 64, "loss": "softmax", **kwargs})


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(a), jax.tree.leaves(b))


def batched(x=X, y=Y, rows=64, count=4):
    return [(x[i : i + rows], y[i : i + rows]) for i in range(0, rows * count, rows)]


def losses(history):
    return [row["loss"] for row in history if "loss" in row]
