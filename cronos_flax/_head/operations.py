"""What a function computes, as far as the names of its operations tell: parameters alone do not tell relu from tanh."""

import importlib.metadata
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.interpreters.partial_eval import dce_jaxpr

from cronos_flax._head.fingerprint import checksum

Operations = dict[str, int]  # how often each is there

# What moves numbers and does not change them; it may depend on the number of rows.
_LAYOUT = {"broadcast_in_dim", "concatenate", "convert_element_type", "copy", "expand_dims", "pad", "pvary"}
_LAYOUT |= {"reshape", "slice", "squeeze", "transpose"}
_SHOWN = 5  # operations of which a difference is told


def operations(jaxpr: Any, outputs: Iterable[Any]) -> Operations:
    """The operations that some outputs of a jaxpr are made of, those of its inner functions too."""
    found: Counter[str] = Counter()
    needed = {variable for variable in outputs if not hasattr(variable, "val")}  # those that are no literals
    for equation in reversed(jaxpr.eqns):
        if needed.isdisjoint(equation.outvars):
            continue
        needed.update(variable for variable in equation.invars if not hasattr(variable, "val"))
        inner = _inner(equation)
        for one in inner:
            found.update(operations(one, (one.jaxpr if hasattr(one, "jaxpr") else one).outvars))
        if not inner and equation.primitive.name not in _LAYOUT:
            found[equation.primitive.name] += 1
    return dict(sorted(found.items()))


def integers(jaxpr: Any) -> list[int]:
    """The integers that are written in a jaxpr, in its inner functions too, each once."""
    found: set[int] = set()
    for equation in jaxpr.eqns:
        written = (variable.val for variable in equation.invars if hasattr(variable, "val"))
        found.update(int(value) for value in written if jnp.issubdtype(jnp.result_type(value), jnp.integer))
        for one in _inner(equation):
            found.update(integers(one))
    return sorted(found)


def text(closed: Any, wanted: Iterable[bool]) -> str:
    """All that some outputs of a closed jaxpr are made of, with every number that is written there."""
    jaxpr, _ = dce_jaxpr(closed.jaxpr, list(wanted), instantiate=True)
    constants = [value if isinstance(value, Array) else np.asarray(value) for value in closed.consts]
    return f"{re.sub(r' at 0x[0-9a-f]+', '', str(jaxpr))} {checksum(constants)}"


def _inner(equation: Any) -> list[Any]:
    """The jaxprs of the functions that an equation calls."""
    values = (value if isinstance(value, tuple | list) else (value,) for value in equation.params.values())
    return [one for value in values for one in value if hasattr(one, "eqns")]


def with_versions(found: Mapping[str, int], *others: str) -> dict[str, Any]:
    """Operations as JSON takes them, and the versions that made them: others may write the same function otherwise.

    Args:
        found: the operations.
        *others: names of distributions that made them too, besides JAX and Flax.
    """
    versions = [_version(name) for name in ("jax", "flax", *others)]
    return {"versions": versions, "operations": dict(found)}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:  # it is on the path, and not installed
        return "unknown"


def other_names(then: Mapping[str, int], now: Mapping[str, int]) -> str:
    """The operations that are only in one of two functions; how often may depend on the number of rows."""
    return ", ".join(sorted(then.keys() ^ now.keys())[:_SHOWN])


def other_operations(then: Mapping[str, int], now: Mapping[str, int]) -> str:
    """In words, how operations differ from those of before; empty if they do not."""
    differ = [name for name in sorted({*then, *now}) if then.get(name, 0) != now.get(name, 0)]
    return ", ".join(f"{name} {now.get(name, 0)} (before: {then.get(name, 0)})" for name in differ[:_SHOWN])


def others_than_saved(before: Any, now: Any) -> str:
    """The same of what was saved; empty, too, where it is not known.

    Args:
        before: what :func:`with_versions` gave then, or None.
        now: what it gives now, or None.
    """
    if not before or not now or before["versions"] != now["versions"]:
        return ""
    differ = other_operations(before["operations"], now["operations"])
    then, here = (set(each.get("integers", ())) for each in (before, now))
    if then != here:
        counts = f"counts go by {sorted(here - then)} (before: {sorted(then - here)})"
        differ = f"{differ}, {counts}" if differ else counts
    return differ
