"""Batch norms in a feature pass: where their statistics come from, and those of all rows.

A training step normalises by the mean and variance of its batch, an evaluation by running averages of these. Features
can be taken in either way. From a pass over all rows in batches come the statistics of all rows, and a solve can write
them in place of the running averages, which lag behind the parameters.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array

STATISTICS = "batch", "running"


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Norm:
    """Where a batch norm is in its module."""

    path: tuple


class Moments(NamedTuple):
    """Mean and variance that a batch norm saw in a pass."""

    norm: Norm
    mean: Array
    var: Array


def check_statistics(where: str, statistics: Any) -> None:
    """Raise a ValueError unless ``statistics`` is an option."""
    if statistics is not None and statistics not in STATISTICS:
        raise ValueError(
            f'{where}: `statistics` must be "batch", "running" or None (those that the call asks for), got '
            f"{statistics!r}."
        )


def bound_axes(axis_name: Any) -> Any:
    """Of the axes that statistics are averaged over, those that exist where this is called; None if there are none.

    A feature pass runs outside ``jax.pmap`` and ``jax.shard_map``, on the whole batch: an axis of devices is not there,
    and there is nothing to average over.
    """

    def is_bound(name: Any) -> bool:
        try:
            jax.lax.psum(1, name)
        except NameError:
            return False
        return True

    names = axis_name if isinstance(axis_name, tuple) else (axis_name,)
    return tuple(name for name in names if name is not None and is_bound(name)) or None


@contextlib.contextmanager
def with_attributes(layer: Any, **values: Any) -> Iterator[None]:
    """A layer that has other attributes meanwhile."""
    before = {name: getattr(layer, name) for name in values}
    try:
        for name, value in values.items():
            object.__setattr__(layer, name, value)
        yield
    finally:
        for name, value in before.items():
            object.__setattr__(layer, name, value)


class Population:
    """Mean and variance of all rows for each batch norm, from those of the batches.

    With n_b rows in batch b, n in all: mean = Σ n_b/n · mean_b, and var = Σ n_b/n · (var_b + (mean_b − mean)²), added
    batch by batch as in Chan, Golub and LeVeque (1983). Wu and Johnson (2021), "Rethinking 'Batch' in BatchNorm",
    section 3, put these statistics in place of running averages.
    """

    def __init__(self) -> None:
        self._moments: dict[tuple, tuple[np.ndarray, np.ndarray]] = {}
        self._rows = 0

    def add(self, batch: Mapping[tuple, tuple[np.ndarray, np.ndarray]], rows: int) -> None:
        """Add mean and variance of a batch of so many rows, by path of the norm."""
        if not rows:
            return
        self._rows += rows
        share = rows / self._rows
        for path, (mean_b, var_b) in batch.items():
            mean, var = self._moments.get(path, (mean_b, var_b))
            # With shares 1 − s and s of the rows: (1 − s) var + s var_b + s (1 − s) (mean_b − mean)²
            difference = mean_b - mean
            var = var + share * (var_b - var) + share * (1 - share) * difference**2
            self._moments[path] = mean + share * difference, var

    @property
    def moments(self) -> dict[tuple, tuple[np.ndarray, np.ndarray]]:
        """Mean and variance by the path of the norm; empty if any is not finite."""
        finite = all(np.all(np.isfinite(value)) for pair in self._moments.values() for value in pair)
        return dict(self._moments) if finite else {}
