"""Features that lie on several devices, perhaps of several processes, stay there: rows of features are never gathered.

A feature pass leaves the features of a batch on a mesh of devices, and each process keeps the rows that its own devices
hold. Targets and weights of all rows, and for each row one number to sort by, are known to every process. So each knows
where every row is, and all draw the samples that one device would draw. Devices that have fewer rows than others are
filled up with rows of weight zero.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cronos_flax._head.rows import Collected, Gathered, GatheredRows, direction, ordered
from cronos_flax._solver.meshes import automatic, automatically
from cronos_flax._solver.transfer import on_device, on_host


@dataclasses.dataclass(frozen=True)
class Part:
    """The features of a batch, as far as this process holds them.

    Args:
        held: of each of its devices, by number, the rows that count.
        device: the number of the device that has each row that counts, those of other processes too.
        along: what these rows are sorted by.
        shape: ``(n, p)`` of the rows that count.
        dtype: of the features.
    """

    held: dict[int, np.ndarray]
    device: np.ndarray
    along: np.ndarray
    shape: tuple[int, int]
    dtype: np.dtype

    def __len__(self) -> int:
        return self.shape[0]


class OverDevices(Collected):
    """Rows on the devices of a mesh; until the end each process has its own in host memory.

    Args:
        mesh: of the features, as they come.
    """

    def __init__(self, mesh: Mesh) -> None:
        super().__init__()
        self._mesh, self._auto = mesh, automatic(mesh) or mesh
        self._place: NamedSharding | None = None

    def part(self, features: Array, y: np.ndarray, weight: np.ndarray | None) -> GatheredRows:
        """The rows of a batch that count; those of this process in host memory.

        Args:
            features: ``(..., p)``, on the mesh.
            y: targets of all rows.
            weight: of all rows; None if all are equal.
        """
        if self._place is None:
            self._place = NamedSharding(self._auto, PartitionSpec(_axes(features)))
        along = on_device(direction(features.shape[-1], jnp.promote_types(features.dtype, jnp.float32)))
        # Partial, as a sharding is no argument that can be traced.
        X, seen = automatically(partial(_flattened, place=self._place), features, along)
        along, finite = on_host(seen)
        of_device = len(along) // self._mesh.size
        counts = np.zeros(len(along), bool)
        counts[: len(y)] = True if weight is None else weight != 0
        held = {}
        for shard in X.addressable_shards:
            start = shard.index[0].start or 0
            held[start // of_device] = np.asarray(shard.data)[counts[start : start + of_device]]
        device, rows = np.flatnonzero(counts) // of_device, counts[: len(y)]
        part = Part(held, device, along[counts], (len(device), X.shape[1]), X.dtype)
        kept = None if weight is None else weight[rows].astype(X.dtype)
        return GatheredRows(part, y[rows], kept, bool(np.all(finite[counts])))

    def joined(self, count: int) -> Gathered:
        """All rows, on the devices that they came from."""
        del count
        pieces, place = self._pieces, self._place
        assert place is not None
        parts: list[Part] = [piece.X for piece in pieces]
        device, along = (np.concatenate([getattr(part, name) for part in parts]) for name in ("device", "along"))
        y = np.concatenate([piece.y for piece in pieces])
        of_each = np.bincount(device, minlength=self._mesh.size)
        length, p, dtype = int(of_each.max()), parts[0].shape[1], parts[0].dtype
        # A row stands at its device's stretch, behind those that came before it.
        by_device = np.argsort(device, kind="stable")
        stands = np.empty(len(device), int)
        stands[by_device] = np.arange(len(device)) + (np.arange(len(of_each)) * length).repeat(of_each)
        stands[by_device] -= (np.cumsum(of_each) - of_each).repeat(of_each)

        def spread(values: np.ndarray, filling: Any) -> Array:
            whole = np.full((self._mesh.size * length, *values.shape[1:]), filling, values.dtype)
            whole[stands] = values
            return jax.make_array_from_callback(whole.shape, place, lambda index: whole[index])

        shape, stretches = (self._mesh.size * length, p), []
        for owner, index in place.addressable_devices_indices_map(shape).items():
            assert index is not None
            number, stretch, end = (index[0].start or 0) // length, np.zeros((length, p), dtype), 0
            for part in parts:
                here = part.held.pop(number)
                stretch[end : end + len(here)] = here
                end += len(here)
            stretches.append(jax.device_put(stretch, owner))
        X = jax.make_array_from_single_device_arrays(shape, place, stretches)
        weighted = pieces[0].weight is not None
        weight = np.concatenate([piece.weight for piece in pieces]) if weighted else np.ones(len(y), dtype)
        finite = all(piece.finite for piece in pieces)
        order = ordered(y, along)
        rows = GatheredRows(X, spread(y, y[0]), spread(weight, 0), finite, stands[order].astype(np.int32), self._mesh)
        return Gathered(rows, order, self._population.moments if finite else {})


def _axes(features: Array) -> tuple[Any, ...]:
    """The axes of the mesh, those first that the rows of features are on: so rows stay on their devices."""
    sharding = features.sharding
    assert isinstance(sharding, NamedSharding)
    first = sharding.spec[0] if len(sharding.spec) else None
    rows = first if isinstance(first, tuple) else () if first is None else (first,)
    return (*rows, *(name for name in sharding.mesh.axis_names if name not in rows))


@partial(jax.jit, static_argnames="place")
def _flattened(features: Array, direction: Array, place: NamedSharding) -> tuple[Array, Array]:
    """Features ``(rows, p)``, as many on each device; and of each what it is sorted by, and if it is finite."""
    X = features.reshape(-1, features.shape[-1]).astype(direction.dtype)
    X = jax.lax.with_sharding_constraint(jnp.pad(X, ((0, -len(X) % place.mesh.size), (0, 0))), place)
    along = jnp.matmul(X, direction, precision="highest")
    seen = jnp.stack([along, jnp.all(jnp.isfinite(X), axis=1).astype(along.dtype)])
    return X, jax.lax.with_sharding_constraint(seen, NamedSharding(place.mesh, PartitionSpec()))
