"""What is said where there is no head: what was found instead, and what to do."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from cronos_flax._head.functional import Call, Functional, Watched
from cronos_flax._head.paths import Path, format_path
from cronos_flax._solver.checks import all_finite


def check_output(out: Any) -> None:
    """Raise a ValueError unless the module's output is one array of finite floats with an axis of outputs."""
    if not isinstance(out, Array) or out.ndim < 1:
        raise ValueError(
            f"find_head: the module must return one array (..., C), got {jax.tree.map(np.shape, out)}. "
            "Choose one with output=: a key, an index, or a function of the outputs."
        )
    is_float = jnp.issubdtype(out.dtype, jnp.floating)
    if not is_float or not all_finite(out):
        raise ValueError(
            "find_head: the module's outputs on the batch must be finite floats, got "
            f"{'NaN or infinite entries' if is_float else out.dtype}. Check batch and variables."
        )


def refusal(module: Functional, calls: tuple[Call, ...], nearest: str, again: str) -> str:
    """The error message: what was found instead of a head, and what to do."""
    space, _, dense = module.dense.partition(".")
    expected = f"find_head: {module.name} must end in {dense} → relu → {dense}"
    if nearest:
        return (
            f"{expected}; the nearest candidate is {nearest}. If something stands between or after the two layers "
            "(another activation, a norm, dropout, a skip, a softmax), take it away, or choose another output with "
            f"output=; or give the module a new head with {module.graft}."
        )
    inside = ", ".join(format_path(call.layer.path) for call in calls if call.input is None)
    if inside:
        others = ", nn.WeightNorm and others that change its weights" if space == "nn" else ""
        return (
            f"{expected}, outside transforms: {space}.scan, {space}.vmap{others}, and those of JAX itself; got "
            f"{inside} inside of one. Move the head out of it, or give the module a new head with {module.graft}."
        )
    if again:
        return f"{expected}, but {again}. Give it a two-layer head of its own with {module.graft}."
    names = ", ".join(format_path(call.layer.path) for call in calls)
    found = {0: f"it calls no {module.dense}", 1: f"it calls one {module.dense} only ({names})"}.get(
        len(calls), f"no two of its layers ({names}) fit together and to the output"
    )
    return f"{expected}, but {found}. Give it a two-layer head with {module.graft}."


def flat(module: Functional, variables: Any, calls: tuple[Call, ...], out: Array) -> str:
    """A remark on outputs without an axis for them, which no layer fits; empty for others."""

    def ends(call: Call) -> bool:
        """Whether the outputs are those of this layer, of one output, without the axis."""
        one = module.kernel_shape(variables, call.layer.path)[1:] == (1,)
        return one and call.input is not None and call.input.shape[:-1] == out.shape

    if out.ndim > 1 and not any(map(ends, calls)):
        return ""
    axes, index = ("one axis", ":, None") if out.ndim == 1 else (f"{out.ndim} axes", "..., None")
    return (
        f" The outputs on the batch have {axes}, {out.shape}: if the module takes that of its one output away, give "
        f"it back with output=lambda out: out[{index}]."
    )


def extended(module: Functional, variables: Any, calls: Iterable[Call]) -> str:
    """A remark that names the layers with parameters of their own, which no head can have; empty without any."""
    own = {call.layer.path: module.own_parameters(variables, call.layer.path) for call in calls}
    named = ", ".join(f"{format_path(path)} ({', '.join(names)})" for path, names in own.items() if names)
    if not named:
        return ""
    return (
        f" The layers of a head must have a kernel and a bias only, got more at {named}. Merge them into the kernel, "
        f"or replace the layers with {module.graft}."
    )


def convolved(module: Functional, variables: Any, watched: Watched) -> str:
    """A remark on 1×1 convolutions in the place of a layer of a head, which they are not; empty without any."""
    last, below = _pointwise(module, variables, watched)
    if last:
        named, which, more = last, "with the width of the outputs", ", and the one before it too"
    elif below:
        named, which, more = below, f"with the input width of the last {module.dense}", ""
    else:
        return ""
    return (
        f" A 1×1 convolution {which}, as at {', '.join(map(format_path, named))}, is an {module.dense} on the last "
        f"axis: write it so{more}. The kernel is the same, without its axes of one."
    )


def _pointwise(module: Functional, variables: Any, watched: Watched) -> tuple[list[Path], list[Path]]:
    """The 1×1 convolutions that may give the outputs, and those that may give the input of the layer that does."""
    out = watched.out

    def ends(call: Call) -> bool:
        """Whether the outputs, of pixels, may be those of this layer."""
        of_pixels = out.ndim > 2 and call.input is not None and call.input.shape[:-1] == out.shape[:-1]
        return of_pixels and module.kernel_shape(variables, call.layer.path)[-1:] == out.shape[-1:]

    inputs = {module.kernel_shape(variables, call.layer.path)[:1] for call in watched.calls if ends(call)}
    widths = {path: module.kernel_shape(variables, path)[-1:] for path in watched.pointwise.of}
    last = [path for path, width in widths.items() if width == out.shape[-1:]]
    return last, [path for path, width in widths.items() if width in inputs]
