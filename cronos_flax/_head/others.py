"""Whether a module has other outputs that use the hidden layer of the head.

A relu network does not change if the weights into a neuron are multiplied by a positive number, and those out of it
divided by the same. The output that was chosen, and all that the module computes from it (a softmax, a label), then
stay as they are. What changes uses one of the two layers on another way, and a solve would change it unseen.
"""

import contextlib
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from cronos_flax._head.paths import format_path
from cronos_flax._solver.meshes import automatically
from cronos_flax._solver.solution import TwoLayer
from cronos_flax._solver.transfer import on_device

_FACTORS = 1 / 16, 1 / 2  # of neurons: powers of two, so that nothing is rounded, and far apart, so that labels change


def named_arrays(out: Any) -> dict[str, Array]:
    """The arrays of a module's outputs, of numbers or bools, by name: ``"logits"``, ``"1"``, ``"aux/logits"``.

    Those in an object of a class that JAX does not know, such as a dataclass or a distribution, are named by attribute.
    """

    def key(entry: Any) -> Any:
        return next((getattr(entry, name) for name in ("key", "idx", "name") if hasattr(entry, name)), entry)

    def leaves(tree: Any) -> list[tuple[tuple, Any]]:
        return [(tuple(map(key, path)), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]

    def attributes(leaf: Any) -> list[tuple[tuple, Any]]:
        found = []
        for name, value in vars(leaf).items():
            with contextlib.suppress(ValueError):  # a dict with keys that cannot be sorted
                found += [((name, *path), inside) for path, inside in leaves(value)]
        return found

    found = {}
    for path, leaf in leaves(out):
        opaque = hasattr(leaf, "__dict__") and not isinstance(leaf, Array)
        for inside, value in attributes(leaf) if opaque else [((), leaf)]:
            if isinstance(value, Array) and (jnp.issubdtype(value.dtype, jnp.number) or value.dtype == bool):
                found[format_path((*path, *inside))] = value
    return found


@partial(jax.jit, static_argnames="swapped")
def rescaled(network: TwoLayer, swapped: bool = False) -> TwoLayer:
    """The same function of the features, with smaller activations: much smaller of neurons 0, 2, …, or 1, 3, …."""
    factors = jnp.resize(jnp.asarray(_FACTORS[:: -1 if swapped else 1]), network.kernel1.shape[1:])
    factors = factors.astype(network.kernel1.dtype)
    return TwoLayer(
        kernel1=network.kernel1 * factors,
        bias1=None if network.bias1 is None else network.bias1 * factors,
        kernel2=network.kernel2 / factors.astype(network.kernel2.dtype)[:, None],
        bias2=network.bias2,
    )


def moved(before: Mapping[str, Array], after: Mapping[str, Array], tol: float) -> list[str]:
    """The names of the arrays that differ by more than ``tol`` of their largest finite number."""
    return [name for name in before if bool(automatically(_moved, before[name], after[name], on_device(tol, float)))]


@jax.jit
def _moved(before: Array, after: Array, tol: Array) -> Array:
    kind = jnp.promote_types(before.dtype, jnp.float32)
    before, after = before.astype(kind), after.astype(kind)
    same = (before == after) | (jnp.isnan(before) & jnp.isnan(after))
    size = jnp.max(jnp.where(jnp.isfinite(before), jnp.abs(before), 0), initial=0)
    return jnp.any(~same & ~(jnp.abs(after - before) <= tol * size))


def warning(name: str, output: Any, others: tuple[str, ...], times: int, graft: str) -> str:
    """What to tell of other outputs that use the layers of the head.

    Args:
        name: of the module.
        output: the one that was chosen.
        others: the names of the other outputs; empty where it is only known how often a layer of the head is called.
        times: how often it is called.
        graft: the function that makes a new head.
    """
    chosen = "this output" if callable(output) else f"output {output!r}"
    used = f"other outputs use it too: {', '.join(others)}" if others else f"head is called {times} times in one pass"
    return (
        f"find_head: the head's hidden layer must be used by the chosen output alone, got a {name} whose {used}. A "
        f"solve for {chosen} changes what else comes from it as well, and does not look at the targets of that. Give "
        f"each output a hidden layer of its own, or {chosen} a new head with {graft} at its last layer. If you need no "
        "other output, ignore this."
    )
