"""A small convolutional network for ``cronos-flax compare --model strided:CNN``, from where this file is.

Strides in place of pooling: the gradient of ``nn.max_pool`` takes most of a step on CPUs.
"""

import flax.linen as nn
import jax


class CNN(nn.Module):
    """Two convolutions and a two-layer head."""

    outputs: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Outputs ``(n, outputs)`` for images ``(n, height, width, channels)``."""
        for features in (16, 32):
            x = nn.relu(nn.Conv(features, (3, 3), strides=2)(x))
        return nn.Dense(self.outputs)(nn.relu(nn.Dense(64)(x.reshape(len(x), -1))))
