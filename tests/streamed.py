"""Fits a head on 20,000 images streamed through a convolutional backbone; prints the peak of memory, in MiB.

Counted from before the fit, without the features: the pass, the compilation of the solve, and the solve. Most of it is
the compilation, with a user's settings of XLA more than with those of the tests.
"""

# ruff: noqa: T201

import threading
import time
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np

import cronos_flax as cf

ROWS, BATCH, FEATURES = 20_000, 250, 128


class Backbone(nn.Module):
    @nn.compact
    def __call__(self, x):
        for width in (16, 32):
            x = nn.max_pool(nn.relu(nn.Conv(width, (3, 3))(x)), (2, 2), (2, 2))
        x = nn.tanh(nn.Dense(FEATURES)(x.reshape(len(x), -1)))
        return nn.Dense(10)(nn.relu(nn.Dense(32)(x)))


class Stream:
    """Images made batch by batch; all of them at once would take 120 MiB."""

    def __iter__(self):
        for i in range(0, ROWS, BATCH):
            rng = np.random.default_rng(i)
            labels = rng.integers(0, 10, size=BATCH)
            yield {"image": rng.normal(labels[:, None, None, None] / 5, 1, (BATCH, 28, 28, 1)), "label": labels}


def resident():
    """Memory of this process that is not files, in MiB."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["RssAnon"].split()[0]) / 2**10


def main():
    model = Backbone()
    first = next(iter(Stream()))
    variables = model.init(jax.random.key(0), first["image"])
    head = cf.find_head(model, variables, first["image"])
    before, peak, ended = resident(), [0.0], threading.Event()

    def sample():
        while not ended.is_set():
            peak[0] = max(peak[0], resident())
            time.sleep(0.005)

    thread = threading.Thread(target=sample)
    thread.start()
    _, solution = cf.fit_head(
        head,
        variables,
        Stream(),
        solver=cf.Cronos(loss="softmax", max_iters=5),  # what a step takes, any number takes
        unpack=lambda batch: ((batch["image"].astype("float32"),), batch["label"]),
    )
    ended.set()
    thread.join()
    assert solution.stats.objective < solution.stats.initial_objective
    print(peak[0] - before - ROWS * FEATURES * 4 / 2**20)


if __name__ == "__main__":
    main()
