"""Transfers between host and device that are meant, and so explicit: they pass under ``jax_transfer_guard="disallow"``.

There even ``jnp.zeros(())`` or ``x + 1`` outside ``jit`` is refused, for a constant travels. So values made on the host
go by :func:`on_device`, values to look at come by :func:`on_host`, and arithmetic on the device is jitted.
"""

from typing import Any

import jax
import numpy as np
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from cronos_flax._solver.arrays import is_concrete, is_key


def has_x64() -> bool:
    """Whether 64 bits are enabled here, by the configuration or by ``jax.enable_x64``, which holds in one thread."""
    return jax.dtypes.canonicalize_dtype(float).itemsize == 8


def on_device(value: Any, dtype: Any = None) -> Array:
    """``jnp.asarray(value, dtype)``."""
    if isinstance(value, Array):  # traced ones too
        return value if dtype is None or value.dtype == dtype else value.astype(dtype)
    array = np.asarray(value)
    return jax.device_put(array if dtype is None else array.astype(jax.dtypes.canonicalize_dtype(dtype)))


def beside(rows: Array, values: np.ndarray) -> Array:
    """The values where these rows are, and committed to that device if these are."""
    return jax.device_put(values, rows.sharding) if rows.committed else on_device(values)


def batch_on_device(tree: Any) -> Any:
    """A pytree with its NumPy arrays on the device; all else, Python numbers too, as it was."""
    return jax.tree.map(lambda leaf: jax.device_put(leaf) if isinstance(leaf, np.ndarray | np.generic) else leaf, tree)


def copied(tree: Any) -> Any:
    """A pytree with its arrays in buffers of their own, where they are.

    ``Array.copy`` is a program for each shape, and its result may have another sharding.
    """

    def own(leaf: Any) -> Any:
        if not isinstance(leaf, Array):
            return leaf
        if not is_concrete(leaf):
            return leaf.copy()
        return put(leaf, leaf.sharding if leaf.committed else None, may_alias=False)

    return jax.tree.map(own, tree)


def put(leaf: Any, place: Any, **options: Any) -> Array:
    """``jax.device_put`` to the devices that an array is on; of random keys on several processes too."""
    if leaf.is_fully_addressable or not is_key(leaf):
        return jax.device_put(leaf, place, **options)
    # JAX moves none of these keys, only what they consist of; each is made in the mesh where it lies.
    with jax.set_mesh(leaf.sharding.mesh):
        data = jax.random.key_data(leaf)
    with jax.set_mesh(place.mesh):
        return jax.random.wrap_key_data(jax.device_put(data, place, **options), impl=jax.random.key_impl(leaf))


def on_host(value: Any) -> Any:
    """A pytree with its arrays in host memory, as NumPy's.

    Of arrays on several processes each process gets the whole, so all must ask: for weights and targets, not for rows
    of features.
    """
    return jax.device_get(jax.tree.map(_replicated, value))


def _replicated(leaf: Any) -> Any:
    """An array of which each process has the whole."""
    if not isinstance(leaf, Array) or leaf.is_fully_addressable or leaf.is_fully_replicated:
        return leaf
    assert isinstance(leaf.sharding, NamedSharding)
    return jax.device_put(leaf, NamedSharding(leaf.sharding.mesh, PartitionSpec()))


def default_key() -> Array:
    """The key that None stands for: ``jax.random.key(0)``, whose data are zeros, without a program that makes it.

    With a ``jax_random_seed_offset`` it is that of another seed, which a program makes.
    """
    if _configured("jax_random_seed_offset"):
        return seeded(0)
    data = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))
    return jax.random.wrap_key_data(on_device(np.zeros(data.shape, data.dtype)))


def seeded(seed: int) -> Array:
    """``jax.random.key(seed)``, of a seed of 31 bits."""
    return _seeded(on_device(seed, np.int32), impl=str(_configured("jax_default_prng_impl")))


_seeded = jax.jit(jax.random.key, static_argnames="impl")  # a program of one generator, whatever the next one is


def _configured(name: str) -> Any:
    """A setting of JAX, which its types do not know."""
    return getattr(jax.config, name)


@jax.jit
def _folded(key: Array, number: Array) -> Array:
    return jax.random.fold_in(key, number)


def folded(key: Array, number: ArrayLike) -> Array:
    """``jax.random.fold_in``."""
    return _folded(key, on_device(number))


@jax.jit
def taken(array: Array, index: Array) -> Array:
    """``array[index]``."""
    return array[index]
