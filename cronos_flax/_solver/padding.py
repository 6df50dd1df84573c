"""Rows padded to a few sizes, so that a solve of another number of rows runs the same compiled programs.

Only where every step looks at all rows: no sample then sees the padding. Results are equal to rounding.
"""

from typing import Any

import numpy as np
from jax import Array
from jax.sharding import SingleDeviceSharding

from cronos_flax._solver.settings import Refreshed
from cronos_flax._solver.transfer import beside, on_host

_LEAST, _STRIDE = 128, 256  # sizes are 128, 256, and from there the multiples of 256


def size_class(n: int, settings: Refreshed) -> int | None:
    """How many rows n rows are padded to; None where a step may look at a sample of them.

    With no more than ``settings.least_sample`` rows, step lengths are compared on all of them: that is another program.
    """
    size = _LEAST
    while size < n:
        size += min(size, _STRIDE)
    size = min(size, settings.few_rows, *[settings.least_sample] * (n <= settings.least_sample))
    has_warm_up = size // settings.warm_up_every >= settings.least_warm_up
    return None if size < n or has_warm_up else size


def padded(data: tuple[Any, Array, Array], settings: Refreshed) -> tuple[Array, Array, Array] | None:
    """Features, targets and weights with the first row repeated, at a weight of zero, up to the size of their class.

    None for data that stay as they are: many rows, blocks, and arrays on several devices.
    """
    n = len(data[1])
    size = size_class(n, settings)
    is_on_one = all(isinstance(rows, Array) and isinstance(rows.sharding, SingleDeviceSharding) for rows in data)
    if size is None or not is_on_one or len({rows.sharding for rows in data}) > 1:
        return None
    X, y, weight = on_host(data)
    more = np.zeros(size - n, np.int32)
    # On the host, for on the device every n would be a program. A row that is there has a finite loss.
    parts = (X, X[more]), (y, y[more]), (weight, np.zeros_like(weight, shape=len(more)))
    X, y, weight = (beside(rows, np.concatenate(both)) for rows, both in zip(data, parts, strict=True))
    return X, y, weight
