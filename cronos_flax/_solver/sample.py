"""A sample of rows that are sharded over devices: each device takes its own part of it, and no row travels.

Gathering rows by their numbers would send every row of the sample to all devices, for the compiler does not know which
device has which. So the numbers are sorted by device first, into as many places on each device as it can need.
"""

import dataclasses
import math
from functools import partial
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import Array, Bool, Int

from cronos_flax._solver.meshes import devices_of


def most_on_a_device(length: int, size: int, n: int) -> int:
    """Places for a sample of ``size`` of n rows on a device that has ``length`` rows.

    Each stretch of n/size rows gives one, so a device has ``mean = length · size/n`` of them on average, whatever the
    order of the rows, and a sum of independent draws. More than this come up with a chance below 1e-12.
    """
    mean = length / (n // size)
    return min(length, math.ceil(mean + 8 * math.sqrt(mean)) + 16)


@partial(jax.tree_util.register_dataclass, data_fields=["index", "counts", "order"], meta_fields=["place"])
@dataclasses.dataclass(frozen=True)
class Sample:
    """Where the rows of a sample are.

    Args:
        index: their numbers; over several devices the places of all devices, with the number of a row among those of
            its device.
        counts: the places that have a row; None for all.
        order: the place of each row of the sample, in the order in which they were drawn; None for their own order.
        place: how the rows are sharded over devices; None where they are on one.
    """

    index: Int[Array, " k"]
    counts: Bool[Array, " k"] | None
    order: Int[Array, " s"] | None
    place: NamedSharding | None

    @classmethod
    def of(cls, index: Int[Array, " s"], n: int, among: int, place: NamedSharding | None) -> Self:
        """The sample of the rows with these numbers.

        Args:
            index: numbers of rows, one drawn out of each stretch of equal length.
            n: how many rows there are on all devices.
            among: how many they are drawn from.
            place: as above.
        """
        if place is None:
            return cls(index, None, None, None)
        devices = devices_of(place)
        length, size = n // devices, len(index)
        most = most_on_a_device(length, size, among)
        device = index // length
        by_device = jnp.argsort(device, stable=True)
        first = jnp.searchsorted(device[by_device], jnp.arange(devices, dtype=index.dtype)).astype(index.dtype)
        rank = jnp.zeros_like(index).at[by_device].set(jnp.arange(size, dtype=index.dtype)) - first[device]
        # A row beyond the last place of its device is left out.
        order = jnp.where(rank < most, device * most + rank, devices * most)
        places = jnp.zeros(devices * most, index.dtype).at[order].set(index % length, mode="drop")
        counts = jnp.zeros(devices * most, bool).at[order].set(True, mode="drop")
        return cls(places, counts, order, place)

    def take(self, array: Any) -> Array:
        """The rows of an array that is sharded as the rows are; zero in places without a row."""
        if self.place is None:
            return array[self.index]
        spec = self.place.spec

        def own(array: Array, index: Array, counts: Array) -> Array:
            rows = array[index]
            return jnp.where(jnp.expand_dims(counts, tuple(range(1, rows.ndim))), rows, jnp.zeros_like(rows))

        assert self.counts is not None
        of_each = jax.shard_map(own, mesh=self.place.mesh, in_specs=(spec, spec, spec), out_specs=spec)
        return of_each(array, self.index, self.counts)
