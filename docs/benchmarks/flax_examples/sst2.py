"""Flax's SST-2 example: a bidirectional LSTM with attention, dropout, SGD with momentum at .1, batches of 64.

The classifier at its end has a relu where Flax's has a tanh.
"""

from collections.abc import Iterator

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training.train_state import TrainState

BATCH_SIZE = 64
PAD, UNKNOWN = 0, 1  # words


class TextClassifier(nn.Module):
    """Words are embedded, read in both directions, averaged by attention, and classified."""

    words: int = 8000
    hidden: int = 64
    classes: int = 4
    dropout: float = 0.5
    word_dropout: float = 0.1

    @nn.compact
    def __call__(self, words: jax.Array, train: bool) -> jax.Array:
        """Logits ``(n, classes)`` of texts ``(n, length)`` that end in padding."""
        there = words != PAD
        lengths = there.sum(axis=1)
        if train:
            dropped = jax.random.bernoulli(self.make_rng("dropout"), self.word_dropout, words.shape)
            words = jnp.where(dropped & there, UNKNOWN, words)
        drop = nn.Dropout(self.dropout, deterministic=not train)
        x = drop(nn.Embed(self.words, self.hidden)(words))
        forward = nn.RNN(nn.OptimizedLSTMCell(self.hidden))
        backward = nn.RNN(nn.OptimizedLSTMCell(self.hidden), reverse=True, keep_order=True)
        x = drop(nn.Bidirectional(forward, backward)(x, seq_lengths=lengths))
        scores = nn.Dense(1, use_bias=False)(nn.tanh(nn.Dense(self.hidden, use_bias=False)(x)))[..., 0]
        attention = nn.softmax(jnp.where(there, scores, -jnp.inf))
        x = (attention[..., None] * x).sum(axis=1)
        x = drop(nn.relu(nn.Dense(self.hidden)(x)))
        return nn.Dense(self.classes, use_bias=False)(x)


def create(x: np.ndarray, key: jax.Array, steps: int) -> TrainState:
    """The state before training; the rate is constant, whatever the number of steps."""
    model = TextClassifier()
    params = model.init(key, x[:2], train=False)["params"]
    tx = optax.chain(optax.add_decayed_weights(3e-6), optax.sgd(0.1, momentum=0.9))
    return TrainState.create(apply_fn=model.apply, params=params, tx=tx)


@jax.jit
def train_step(state: TrainState, x: jax.Array, y: jax.Array, key: jax.Array) -> TrainState:
    """One gradient step."""
    rngs = {"dropout": jax.random.fold_in(key, state.step)}

    def loss(params: dict) -> jax.Array:
        logits = state.apply_fn({"params": params}, x, train=True, rngs=rngs)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    return state.apply_gradients(grads=jax.grad(loss)(state.params))


def train(state: TrainState, x: np.ndarray, y: np.ndarray, rng: np.random.Generator, epochs: int) -> Iterator:
    """Yield the state after each epoch."""
    key = jax.random.key(rng.integers(2**31))
    for _ in range(epochs):
        order = rng.permutation(len(x))
        for i in range(0, len(x) - BATCH_SIZE + 1, BATCH_SIZE):
            rows = order[i : i + BATCH_SIZE]
            state = train_step(state, x[rows], y[rows], key)
        yield state


@jax.jit
def predicted(state: TrainState, x: jax.Array) -> jax.Array:
    """Labels ``(n,)``."""
    return state.apply_fn({"params": state.params}, x, train=False).argmax(axis=-1)
