"""Other values for the variables of a module: random heads, and all else redrawn."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from cronos_flax._head.paths import Path, format_path
from cronos_flax._solver.meshes import automatically
from cronos_flax._solver.numerics import or_one
from cronos_flax._solver.solution import TwoLayer
from cronos_flax._solver.transfer import on_device, on_host

DEVIATIONS = 16  # the largest of normal numbers, in standard deviations, with a margin
SPREADS = 0.3, 0.03  # of redrawn variables, relative; the second where the first makes outputs that are not finite
_KEPT = 1e-4  # difference of weights, relative to the largest, that rounding explains


def check_kept(written: TwoLayer, read: TwoLayer, pair: tuple[Path, Path]) -> None:
    """Raise a ValueError if weights are not kept as they are written: a solve would end in another network."""
    differences = vars(on_host(automatically(_differences, read, written)))
    for name, difference in differences.items():
        if difference is not None and not difference <= _KEPT:
            raise ValueError(
                f"find_head: the layers of a head must keep weights as they are written, but {name[:-1]} of "
                f"{format_path(pair[name.endswith('2')])} is read as another: something changes it on its way, such as "
                "a hook of an nnx.Variable (on_get_value, on_set_value) or a box of flax.linen.meta. Let it hold "
                "the weights that it multiplies by."
            )


@jax.jit
def _differences(read: TwoLayer, written: TwoLayer) -> TwoLayer:
    def difference(a: Array, b: Array) -> Array:
        a, b = a.astype(jnp.float32), b.astype(a.dtype).astype(jnp.float32)
        return jnp.max(jnp.abs(a - b)) / (jnp.max(jnp.abs(b)) + jnp.finfo(jnp.float32).tiny)

    return jax.tree.map(difference, read, written)


def redrawn(variables: Any, spread: float) -> Any:
    """The variables with all floating arrays, complex ones too, and masks changed: nothing stays 0, 1 or its inverse.

    Masks change with the wide spread only, as some of them must not let nothing through.
    """
    leaves, treedef = jax.tree.flatten(variables)
    rng, draws = np.random.default_rng(0), {}
    for i, leaf in enumerate(leaves):
        width = jnp.shape(leaf)[-1:]
        if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
            draws[i] = on_device(rng.normal(size=width), jnp.float32)
        elif _is_mask(leaf):
            draws[i] = on_device(np.resize([True, False], width))
    changed = partial(_changed, turned=spread == SPREADS[0])
    old = [on_device(leaves[i]) for i in draws]
    new = automatically(changed, old, list(draws.values()), on_device(spread, jnp.float32))
    for i, leaf in zip(draws, new, strict=True):
        leaves[i] = leaf
    return jax.tree.unflatten(treedef, leaves)


@partial(jax.jit, static_argnames="turned")
def _changed(leaves: list[Array], draws: list[Array], spread: Array, turned: bool) -> list[Array]:
    """Each number times ``exp(spread · draw)``; where it is zero, ``spread · |draw|``. Signs stay, so variances do.

    A complex number is turned by ``spread · draw``, and made smaller: the powers of one within the unit circle, as a
    recurrence takes them, stay finite. In masks every second entry is turned over, if ``turned``.
    """

    def changed(leaf: Array, draw: Array) -> Array:
        draw = jnp.broadcast_to(draw, leaf.shape)
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            return leaf ^ draw.astype(leaf.dtype) if turned else leaf
        size = jnp.abs(draw)
        is_complex = jnp.issubdtype(leaf.dtype, jnp.complexfloating)
        value = leaf.astype(jnp.complex64 if is_complex else jnp.float32)
        factor = jnp.exp(spread * (1j * draw - size if is_complex else draw))
        return jnp.where(value == 0, spread * size, value * factor).astype(leaf.dtype)

    return [changed(leaf, draw) for leaf, draw in zip(leaves, draws, strict=True)]


def _is_mask(leaf: Any) -> bool:
    """Whether a variable may be a mask or a switch: bools, or an array of integers that are all 0 or 1."""
    kind = jnp.result_type(leaf)
    if not jnp.issubdtype(kind, jnp.integer) or jnp.ndim(leaf) == 0:  # a single integer counts steps
        return bool(kind == np.bool_)
    return bool(np.all(np.isin(on_host(leaf), (0, 1))))


def random_like(network: TwoLayer, features: Array, size: float, largest: float) -> TwoLayer:
    """A random head of the same shape, the same one each time.

    Args:
        network: whose shape it has.
        features: its input.
        size: of activations and outputs.
        largest: standard deviation of weights that their dtypes hold.
    """
    rng = np.random.default_rng(0)  # on the host: to compile random numbers for every shape takes long
    draw = jax.tree.map(lambda leaf: on_device(rng.normal(size=jnp.shape(leaf)), float), network)
    return automatically(_scaled_to, draw, features, on_device(size, float), on_device(largest, float))


@jax.jit
def _scaled_to(draw: TwoLayer, features: Array, size: Array, largest: Array) -> TwoLayer:
    """A random head with about half of its neurons active on a row, and activations of about this size.

    Of a smaller size, biases with them, where the kernel would else exceed ``largest``.
    """
    rows = features.reshape(-1, features.shape[-1]).astype(size.dtype)
    norm = or_one(jnp.sqrt(jnp.mean(jnp.sum(jnp.square(rows), axis=1))))
    reached = jnp.minimum(size, largest * norm)
    return TwoLayer(
        kernel1=reached * draw.kernel1 / norm,
        bias1=None if draw.bias1 is None else reached * draw.bias1,
        kernel2=draw.kernel2 / jnp.sqrt(draw.kernel2.shape[0]),
        bias2=None if draw.bias2 is None else reached / size * draw.bias2,
    )
