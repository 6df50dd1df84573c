"""Arrays of any library as arrays that JAX takes: the first thing that is done with what a user gives."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

TO_NUMBERS = "Number labels by np.unique(labels, return_inverse=True)[1]; convert others by astype."


def is_array(value: Any) -> bool:
    """Whether a value is an array: of NumPy, JAX, or any library whose arrays NumPy can read (PyTorch, pandas)."""
    if isinstance(value, Array | np.ndarray | np.generic):
        return True
    return not isinstance(value, type) and (hasattr(value, "__array__") or hasattr(value, "__array_interface__"))


def is_key(value: Any) -> bool:
    """Whether a value is a random key of JAX, or an array of them, of the new style."""
    return isinstance(value, Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key)


def is_concrete(value: Any) -> bool:
    """Whether a value can be looked at: one that is being traced cannot."""
    return not isinstance(value, jax.core.Tracer)


def opened(value: Any, what: str) -> Array | np.ndarray:
    """An array of JAX as it is, and anything else as an array of NumPy, in the byte order and type that it came in.

    Args:
        value: an array, or something that NumPy makes one of.
        what: how an error names it.

    Raises:
        ValueError: if NumPy cannot read it, or would drop its mask.
    """
    if isinstance(value, Array):
        return value
    if isinstance(value, np.ma.MaskedArray) and np.ma.is_masked(value):
        raise ValueError(f"{what} must not have masked entries, got a masked array. Fill them, or give a weight of 0.")
    if hasattr(value, "toarray") and not is_array(value):  # of which NumPy makes an array of one object
        raise ValueError(f"{what} must be dense, got a sparse {type(value).__name__}. Give .toarray().")
    try:
        return np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:  # ragged; on another device, with a gradient
        raise ValueError(
            f"{what} must be an array of numbers that NumPy can read, got {type(value).__name__}: {error}"
        ) from None


def native(value: Any, what: str) -> Array | np.ndarray:
    """As :func:`opened`, in native byte order and a type that JAX has; integers, if they fit into it.

    Raises:
        ValueError: also for integers that do not fit.
    """
    array = opened(value, what)
    if isinstance(array, Array):
        return array
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    if array.dtype.char in "gG":  # long doubles, which JAX does not have
        array = array.astype(complex if array.dtype.kind == "c" else float)
    if array.dtype.kind not in "iu":
        return array
    held = jax.dtypes.canonicalize_dtype(array.dtype)
    if held == array.dtype:
        return array
    low, high = (int(array.min()), int(array.max())) if array.size else (0, 0)
    if low < np.iinfo(held).min or high > np.iinfo(held).max:
        raise ValueError(
            f"{what} must be integers that fit {held}, got {array.dtype} with values from {low} to {high}. Labels "
            "must lie in [0, C); other numbers can be floats."
        )
    return array.astype(held)


def numbers(value: Any, what: str) -> Array | np.ndarray:
    """As :func:`native`.

    Raises:
        ValueError: also for text, objects, dates and records.
    """
    array = native(value, what)
    in_jax = isinstance(array, Array)  # which holds numbers and random keys
    if not (in_jax or array.dtype.kind in "biufc" or jnp.issubdtype(array.dtype, jnp.number)):
        raise ValueError(f"{what} must be numbers, got dtype {array.dtype}. {TO_NUMBERS}")
    return array
