"""Pairs of layers whose shapes fit: the candidates for a head."""

from collections.abc import Iterable, Iterator
from typing import Any

from jax import Array

from cronos_flax._head.functional import Call, Functional
from cronos_flax._head.paths import Path, as_path, format_path


def candidates(module: Functional, variables: Any, calls: tuple[Call, ...], out: Array) -> Iterator[tuple[Path, Path]]:
    """Pairs of layers whose shapes fit, the pair called last first."""
    for i in range(len(calls) - 1, 0, -1):
        last = calls[i]
        if _width(module, variables, last) == out.shape[-1]:
            for first in reversed(calls[:i]):
                if _feeds(module, variables, first, last):
                    yield first.layer.path, last.layer.path


def given(
    paths: Any, pairs: Iterable[tuple[Path, Path]], calls: tuple[Call, ...], numbered: bool, remark: str
) -> tuple[Path, Path]:
    """The pair that the user named, if it is a candidate."""
    if not isinstance(paths, tuple | list) or len(paths) != 2:
        raise ValueError(f"find_head: `paths` must be two paths, of the hidden and of the output layer, got {paths!r}.")
    first, last = (as_path("find_head: each of `paths`", path, numbered) for path in paths)
    if (first, last) not in list(pairs):
        called = ", ".join(format_path(call.layer.path) for call in calls) or "none"
        raise ValueError(
            f"find_head: `paths` must be two layers whose shapes fit together and to the output, got "
            f"{format_path(first)} and {format_path(last)}; layers called: {called}.{remark}"
        )
    return first, last


def called_again(module: Functional, variables: Any, calls: tuple[Call, ...], out: Array) -> str:
    """What to say of a hidden layer whose last call comes after that of its output layer; empty without one."""
    for i, last in enumerate(calls):
        for first in calls[i + 1 :]:
            is_pair = _width(module, variables, last) == out.shape[-1] and _feeds(module, variables, first, last)
            if is_pair and first.layer.times > 1:
                hidden, output = format_path(first.layer.path), format_path(last.layer.path)
                return f"{hidden} is called again after {output}, and a solve of the two would change that call too"
    return ""


def _width(module: Functional, variables: Any, call: Call) -> int | None:
    """Outputs of a layer, if it has a plain kernel for the last axis of its input, and this was recorded."""
    shape = module.kernel_shape(variables, call.layer.path)
    plain = len(shape) == 2 and not module.own_parameters(variables, call.layer.path)
    return shape[1] if plain and call.input is not None and call.input.shape[-1:] == shape[:1] else None


def _feeds(module: Functional, variables: Any, first: Call, last: Call) -> bool:
    """Whether a layer's outputs have the width of another's inputs."""
    return last.input is not None and _width(module, variables, first) == last.input.shape[-1]
