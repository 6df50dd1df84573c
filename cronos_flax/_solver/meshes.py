"""Arrays on meshes of devices: run on automatic axes, whatever the caller's are, and put back as they lay.

On a mesh of explicit axes, as ``jax.make_mesh`` makes it, JAX asks how each product of sharded arrays is sharded. A
module, an optimizer or a solve cannot know. So they run on a mesh of the same devices with automatic axes, where JAX
finds out by itself.
"""

import contextlib
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from cronos_flax._solver.arrays import is_concrete
from cronos_flax._solver.transfer import on_device, on_host, put


def mesh_of(tree: Any) -> Mesh | None:
    """The mesh that arrays lie on, one with explicit axes first; None where it is one device without these."""
    meshes = [leaf.sharding.mesh for leaf in jax.tree.leaves(tree) if _is_named(leaf)]
    large = (mesh for mesh in meshes if mesh.size > 1)
    return next(filter(_is_explicit, meshes), next(large, None))


def check_together(where: str, **given: Any) -> None:
    """Raise a ValueError for trees of arrays that the user has put on devices, and not all on the same in one order."""
    places = {
        (name, _devices(leaf)): None
        for name, tree in given.items()
        for leaf in jax.tree.leaves(tree)
        if isinstance(leaf, Array) and is_concrete(leaf) and leaf.committed
    }
    if len({devices for _, devices in places}) > 1:
        there = ", ".join(f"`{name}` on {_said(devices)}" for name, devices in places)
        raise ValueError(
            f"{where}: all arrays must be on one device, or on one mesh of devices, got {there}. Put them on one by "
            "jax.device_put(array, device)."
        )


def automatic(mesh: Mesh | None) -> Mesh | None:
    """The mesh of the same devices with automatic axes, for one with explicit axes; None for all else."""
    if mesh is None or not _is_explicit(mesh):
        return None
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))


def automatically(function: Callable[..., Any], *arguments: Any) -> Any:
    """``function(*arguments)`` on automatic axes; results on a mesh are on the caller's again. No array moves.

    Where an argument is traced, the axes are those of the caller's program.
    """
    mesh = mesh_of(arguments) if all(map(is_concrete, jax.tree.leaves(arguments))) else None
    return function(*arguments) if automatic(mesh) is None else on_automatic_axes_of(mesh, function, *arguments)


def on_automatic_axes_of(mesh: Mesh | None, function: Callable[..., Any], *arguments: Any) -> Any:
    """The same where the mesh is known, and the function has arrays of its own that lie on its automatic axes."""
    if mesh is None:
        return function(*arguments)
    auto = automatic(mesh) or mesh
    with jax.set_mesh(auto):
        result = function(*_on_mesh(arguments, auto))
    return _on_mesh(result, mesh)


def evaluated(function: Callable[..., Any], mesh: Mesh | None, *arguments: Any) -> Any:
    """``jax.eval_shape`` of a function of arrays and of what else there is, wherever the arrays lie.

    Args:
        function: the function.
        mesh: that of its arrays, as :func:`mesh_of` gives it.
        *arguments: of the function.
    """
    auto = automatic(mesh)
    with contextlib.nullcontext() if auto is None else jax.set_mesh(auto):
        return jax.eval_shape(function, *shapes_of(arguments))


def shapes_of(tree: Any) -> Any:
    """The tree with JAX's arrays as shapes and dtypes."""
    return jax.tree.map(lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype) if isinstance(v, Array) else v, tree)


def in_place_of(new: ArrayLike, old: Array) -> Array:
    """An array in the dtype of the one whose place it takes and, if that one is committed to devices, sharded alike.

    One of another shape, which that sharding does not divide, is replicated on the same devices.
    """
    new = on_device(new, old.dtype)
    if not is_concrete(new) or not is_concrete(old) or not getattr(old, "committed", False):
        return new
    place = old.sharding
    try:
        place.shard_shape(new.shape)
    except ValueError:
        assert isinstance(place, NamedSharding)
        place = NamedSharding(place.mesh, PartitionSpec())
    return jax.device_put(new, place)


Places = tuple[NamedSharding | None, ...]


def places_of(tree: Any) -> Places:
    """How the arrays of a tree are sharded over more than one device; None for those that are not."""
    return tuple(leaf.sharding if _is_on_mesh(leaf) else None for leaf in jax.tree.leaves(tree))


def at_places(tree: Any, places: Places) -> Any:
    """In a jitted function on automatic axes: the tree, sharded like this."""
    leaves, treedef = jax.tree.flatten(tree)
    put = [
        leaf if place is None else jax.lax.with_sharding_constraint(leaf, place)
        for leaf, place in zip(leaves, places, strict=True)
    ]
    return jax.tree.unflatten(treedef, put)


def place_of_rows(array: Any) -> NamedSharding | None:
    """How rows of an array are sharded over devices, on automatic axes; None where they are not, or something else is.

    A tracer does not say where it lies.
    """
    if not _is_on_mesh(array):
        return None
    mesh, axes = array.sharding.mesh, tuple(array.sharding.spec)
    place = NamedSharding(automatic(mesh) or mesh, PartitionSpec(*axes[:1] or (None,)))
    return place if devices_of(place) > 1 and not any(axes[1:]) else None


def beside_rows(values: Array, features: Any) -> Array:
    """An array with an entry for each row of the features, on the devices where these rows are."""
    if not _is_on_mesh(features) or mesh_of(values) is not None:
        return values
    whole = on_host(values)
    place = NamedSharding(features.sharding.mesh, PartitionSpec(*features.sharding.spec[:1]))
    return jax.make_array_from_callback(whole.shape, place, lambda index: whole[index])


def devices_of(place: NamedSharding) -> int:
    """Into how many parts rows are divided."""
    rows = place.spec[0]
    names = rows if isinstance(rows, tuple) else () if rows is None else (rows,)
    return math.prod(place.mesh.shape[name] for name in names)


def _is_named(leaf: Any) -> bool:
    if not isinstance(leaf, Array) or not is_concrete(leaf):
        return False
    return isinstance(leaf.sharding, NamedSharding) and isinstance(leaf.sharding.mesh, Mesh)


def _is_on_mesh(leaf: Any) -> bool:
    return _is_named(leaf) and leaf.sharding.mesh.size > 1


def _devices(array: Array) -> tuple[jax.Device, ...]:
    """Those that an array lies on, in their order on its mesh."""
    where = array.sharding
    if isinstance(where, NamedSharding) and isinstance(where.mesh, Mesh):
        return tuple(where.mesh.devices.flat)
    return tuple(sorted(array.devices(), key=lambda device: device.id))


@functools.lru_cache(64)  # asked for every array of a step
def _of_same_devices(one: Mesh, other: Mesh) -> bool:
    """In one order, whatever the axes are."""
    return list(one.devices.flat) == list(other.devices.flat)


def _said(devices: tuple[jax.Device, ...]) -> str:
    """The first devices by name, and how many there are."""
    if len(devices) == 1:
        return str(devices[0])
    rest = ", …" if len(devices) > 4 else ""
    return f"{len(devices)} devices ({', '.join(map(str, devices[:4]))}{rest})"


def _is_explicit(mesh: Mesh) -> bool:
    return AxisType.Explicit in mesh.axis_types


def _on_mesh(tree: Any, mesh: Mesh) -> Any:
    """The arrays that lie on the devices of this mesh, on this one; or on automatic axes, if they have other names."""

    def moved(leaf: Any) -> Any:
        if not _is_named(leaf) or leaf.sharding.mesh == mesh or not _of_same_devices(leaf.sharding.mesh, mesh):
            return leaf
        has_names = leaf.sharding.mesh.axis_names == mesh.axis_names
        if (on := mesh if has_names else automatic(leaf.sharding.mesh)) is None:
            return leaf
        return put(leaf, NamedSharding(on, leaf.sharding.spec))

    return jax.tree.map(moved, tree)
