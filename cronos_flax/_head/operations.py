"""What a function computes, as far as the names of its operations tell: parameters alone do not tell relu from tanh."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import flax
import jax

Operations = dict[str, int]  # how often each is there

# What moves numbers and does not change them; it may depend on the number of rows.
_LAYOUT = {"broadcast_in_dim", "concatenate", "convert_element_type", "copy", "expand_dims", "pad", "pvary"}
_LAYOUT |= {"reshape", "slice", "squeeze", "transpose"}
_SHOWN = 5  # operations of which a difference is told


def operations(jaxpr: Any) -> Operations:
    """The operations of a jaxpr, those of its inner functions too."""
    found: Counter[str] = Counter()
    for equation in jaxpr.eqns:
        values = (value if isinstance(value, tuple | list) else (value,) for value in equation.params.values())
        inner = [one for value in values for one in value if hasattr(one, "eqns")]
        for one in inner:
            found.update(operations(one))
        if not inner and equation.primitive.name not in _LAYOUT:
            found[equation.primitive.name] += 1
    return dict(sorted(found.items()))


def with_versions(found: Mapping[str, int]) -> dict[str, Any]:
    """Operations as JSON takes them, and the versions that made them: others may write the same function otherwise."""
    return {"versions": [jax.__version__, flax.__version__], "operations": dict(found)}


def other_operations(before: Any, now: Any) -> str:
    """In words, how a function differs from that of before; empty if it does not, or if this is not known.

    Args:
        before: what :func:`with_versions` gave then, or None.
        now: what it gives now, or None.
    """
    if not before or not now or before["versions"] != now["versions"]:
        return ""
    then, there = before["operations"], now["operations"]
    differ = [name for name in sorted({*then, *there}) if then.get(name, 0) != there.get(name, 0)]
    return ", ".join(f"{name} {there.get(name, 0)} (saved: {then.get(name, 0)})" for name in differ[:_SHOWN])
