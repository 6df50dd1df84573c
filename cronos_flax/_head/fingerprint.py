"""What tells arrays and settings from others: parameters of a backbone, batches of data, a solver."""

import re
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from cronos_flax._solver.arrays import is_array, is_key
from cronos_flax._solver.transfer import on_host

_READ_ROWS = 4_096  # of an array that is not read whole, evenly spaced

Fingerprint = dict[str, list[Any]]  # by name of an array: its shape, dtype and checksum; None for what is not known


def described(arrays: Mapping[str, Any], most_bytes: int | None = None) -> Fingerprint:
    """Shape, dtype and CRC-32 of every array; random keys are left out.

    Args:
        arrays: by name.
        most_bytes: of larger arrays some rows, evenly spaced, are read; None reads all.
    """
    return {
        name: [list(np.shape(leaf)), str(leaf.dtype), crc(_read(leaf, most_bytes))]
        for name, leaf in arrays.items()
        if not is_key(leaf)
    }


def _read(array: Any, most_bytes: int | None) -> Any:
    """What of an array is read for its checksum."""
    if most_bytes is None or array.nbytes <= most_bytes:
        return array
    return array[np.linspace(0, len(array) - 1, min(_READ_ROWS, len(array))).astype(int)]


def crc(array: Any, value: int = 0) -> int:
    """CRC-32 of an array's bytes, after those that gave ``value``."""
    flat = np.ascontiguousarray(on_host(array)).reshape(-1)
    return zlib.crc32(flat.view(np.uint8).data, value)


def checksum(tree: Any) -> int:
    """CRC-32 of the arrays, numbers and texts of a tree, with their places, shapes and dtypes."""
    value = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        value = zlib.crc32(jax.tree_util.keystr(path).encode(), value)
        if is_array(leaf):
            if not is_key(leaf):
                value = crc(leaf, zlib.crc32(f"{np.shape(leaf)} {leaf.dtype}".encode(), value))
        elif isinstance(leaf, bool | int | float | str | None):
            value = zlib.crc32(repr(leaf).encode(), value)
    return value


def said(value: Any) -> str:
    """A setting in words that are the same in every process: arrays by their checksum, objects without their place."""
    named = jax.tree.map(lambda leaf: f"array {checksum(leaf)}" if is_array(leaf) else leaf, value)
    return re.sub(r" at 0x[0-9a-f]+", "", repr(named))


def difference(before: Fingerprint, now: Fingerprint) -> str | None:
    """In words, how arrays differ from those of before; None if nothing that is known of both tells them apart."""
    if missing := sorted(before.keys() - now.keys()):
        return f"{missing[0]} is not there any more"
    if added := sorted(now.keys() - before.keys()):
        return f"{added[0]} was not there"
    for name, then in before.items():
        for kind, old, new in zip(("shape", "dtype", "values"), then, now[name], strict=True):
            if old is not None and new is not None and old != new:
                return f"{name} has other {kind}" + (f", {new} for {old}" if kind != "values" else "")
    return None
