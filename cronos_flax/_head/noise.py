"""Whether features are random: dropout, or another noise, is on while they are computed."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from cronos_flax._solver.arrays import is_key
from cronos_flax._solver.meshes import automatically
from cronos_flax._solver.transfer import on_device


def reseeded(variables: Any, kwargs: Mapping, args: tuple) -> tuple[Any, dict, tuple] | None:
    """A call with other random keys: of the streams among its variables, and of its arguments; None if it has no keys.

    Args:
        variables: of a module.
        kwargs: keyword arguments; what linen's ``rngs`` holds may be keys of the old style.
        args: positional arguments.
    """
    rngs = {"rngs": jax.tree.map(_new_style, kwargs["rngs"])} if "rngs" in kwargs else {}
    leaves, treedef = jax.tree.flatten((variables, {**kwargs, **rngs}, args))
    places = [i for i, leaf in enumerate(leaves) if is_key(leaf)]
    if not places:
        return None
    for i, key in zip(places, automatically(_others, [leaves[i] for i in places]), strict=True):
        leaves[i] = key
    return jax.tree.unflatten(treedef, leaves)


def warning(finder: str) -> str:
    """What to tell where features are random.

    Args:
        finder: the function that found the head.
    """
    how = "eval_mode=True" if "nnx" in finder else "train=False or deterministic=True"
    return (
        "find_head: the head's input must be the same whenever it is computed, got another one with other random keys: "
        "dropout, or another noise, is on. Every pass for features uses these keys again, so a solve fits the noise of "
        "one draw, and the validation of cf.train sees it too. Find the head in the model as it is evaluated, with "
        f'{how}; for batch norms as in training add statistics="batch".'
    )


def _new_style(key: Any) -> Any:
    """A key of the new style; counts, such as those of ``nnx.Rngs``, as they are."""
    return jax.random.wrap_key_data(on_device(key)) if np.ndim(key) and not is_key(key) else key


@jax.jit
def _others(keys: list[Array]) -> list[Array]:
    def other(key: Array) -> Array:
        data = jax.random.key_data(key)
        return jax.random.wrap_key_data(data ^ jnp.asarray(1, data.dtype), impl=jax.random.key_impl(key))

    return list(map(other, keys))
