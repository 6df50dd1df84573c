"""A small run of ``cf.train`` with checkpoints, to be killed and started again: ``python resumed.py DIRECTORY``.

Prints at its end a checksum of everything in the final state and of the history.
"""

import json
import sys
import zlib

import flax.linen as nn
import jax
import numpy as np
import optax
from sklearn.datasets import load_digits

import cronos_flax as cf

EPOCHS = 30


class Net(nn.Module):
    """With running statistics and dropout, which a resumed run must not lose."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Logits ``(n, 10)``."""
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Dense(32)(x)))
        x = nn.Dropout(0.2, deterministic=not train)(x)
        return nn.Dense(10)(nn.relu(nn.Dense(16)(x)))


def main(directory: str) -> None:
    """Train, from where the directory says."""
    x, y = load_digits(return_X_y=True)
    x = (x / 16).astype("float32")
    model = Net()
    variables = model.init(jax.random.key(0), x[:1], train=False)
    state = cf.CronosTrainState.create(
        apply_fn=model.apply,
        params=variables["params"],
        tx=optax.adam(0.03),
        head=cf.find_head(model, variables, x[:64], train=False),
        solver=cf.Cronos(loss="softmax"),
        model_state={"batch_stats": variables["batch_stats"]},
    )
    state, history = cf.train(
        state,
        (x[:1500], y[:1500]),
        epochs=EPOCHS,
        batch_size=100,
        solve_every=5,
        validation=(x[1500:], y[1500:]),
        train_kwargs={"train": True},
        directory=directory,
        save_every=6,
    )
    for row in history:
        del row["seconds"]
        row.pop("solve_seconds", None)
    checksum = zlib.crc32(json.dumps(history).encode())
    for leaf in jax.tree.leaves(state):
        checksum = zlib.crc32(np.asarray(leaf).tobytes(), checksum)
    sys.stdout.write(f"checksum {checksum}\n")


if __name__ == "__main__":
    main(sys.argv[1])
