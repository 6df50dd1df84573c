"""A module as pure functions: what linen and NNX each implement, and what one call of a module shows."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import Array

from cronos_flax._head.norms import Moments
from cronos_flax._head.paths import Path
from cronos_flax._solver.solution import TwoLayer


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Layer:
    """A fully connected layer that was called: its path, the least dtype in it, and how often it was called."""

    path: Path
    dtype: Any
    times: int = 1

    @classmethod
    def of(cls, path: Path, out: Array, dtype: Any, earlier: "Layer | None") -> "Layer":
        """A layer that has returned ``out``, computed from inputs in ``dtype`` (None for their own), and earlier calls.

        The result may have more digits than its factors had, as by ``preferred_element_type``.
        """
        kinds = (kind for kind in (dtype, out.dtype) if kind is not None and jnp.issubdtype(kind, jnp.inexact))
        least = min(kinds, key=lambda kind: jnp.finfo(kind).bits, default=out.dtype)
        return cls(path, jnp.dtype(least), 1 + (earlier.times if earlier else 0))


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Paths:
    """Paths of layers, which a compiled call may return."""

    of: tuple[Path, ...] = ()


class Call(NamedTuple):
    """A call of a layer, and the layer's input; None if a transform hides it."""

    layer: Layer
    input: Array | None


class Watched(NamedTuple):
    """What the search sees of one call of a module.

    Args:
        out: the chosen output.
        calls: every fully connected layer, in the order of its last call.
        every: the arrays of all outputs by name, if one was chosen.
        pointwise: the 1×1 convolutions, in the order of their last call, or in NNX, which shows none, of the model.
    """

    out: Any
    calls: tuple[Call, ...]
    every: dict[str, Array]
    pointwise: Paths

    def input_of(self, path: Path) -> Array:
        """The recorded input of the layer at this path."""
        features = {call.layer.path: call.input for call in self.calls}[path]
        assert features is not None
        return features


class Tap(NamedTuple):
    """What a feature pass yields.

    Args:
        features: the input of the head, with its leading axes.
        out: the module's chosen output.
        updates: the collections that changed; None if none may.
        norms: the statistics of the batch norms, if they were observed.
    """

    features: Array
    out: Array
    updates: Any
    norms: tuple[Moments, ...]


class Kind(Protocol):
    """A kind of modules."""

    finder: ClassVar[str]  # the public function that finds a head in modules of this kind


class Functional(Kind, Protocol):
    """A module as pure functions of its variables.

    Variables are one pytree: linen's collections, or the state of an NNX model. ``given`` is what the user holds:
    the same collections, or the NNX model itself.
    """

    dense: ClassVar[str]  # the name of a fully connected layer
    graft: ClassVar[str]  # the public function that replaces a layer by a two-layer head
    numbered: ClassVar[bool]  # whether paths have indices in them

    @property
    def name(self) -> str:
        """The name of the module's class."""

    @property
    def output(self) -> Any:
        """Which of several outputs ends in the head: a key, an index, a function, or None for the only one."""

    @property
    def statistics(self) -> str | None:
        """Which statistics batch norms take, "batch" or "running"; None for those that the call asks for."""

    def variables(self, given: Any, where: str) -> Any:
        """The variables that the user's object holds.

        Raises:
            ValueError: if it is not the module's; the message starts with ``where``, the caller's name.
        """

    def watch(self, variables: Any, args: tuple, kwargs: Mapping) -> Watched:
        """One call of the module."""

    def tap(self, variables: Any, args: tuple, kwargs: Mapping, path: Path, observed: bool) -> Tap:
        """The input of the layer at ``path``; if ``observed``, with the statistics of batch norms, not of updates."""

    def in_training(self, kwargs: Mapping) -> bool:
        """Whether a call with these keyword arguments sees batch statistics, as a training step does."""

    def backbone(self, variables: Any, paths: tuple[Path, Path]) -> dict[str, Array]:
        """All arrays but the weights of two layers and the state of random streams, by name."""

    def kernel_shape(self, variables: Any, path: Path) -> tuple[int, ...]:
        """The shape of a layer's kernel; () if it has no plain one."""

    def own_parameters(self, variables: Any, path: Path) -> tuple[str, ...]:
        """The names of what a layer has besides kernel and bias: a solve would not know it."""

    def read(self, given: Any, paths: tuple[Path, Path]) -> TwoLayer:
        """The weights of two layers, from variables or from what the user holds."""

    def write(self, variables: Any, paths: tuple[Path, Path], network: TwoLayer) -> Any:
        """A copy of the variables with these weights, in the dtypes of the old ones."""

    def store(self, given: Any, paths: tuple[Path, Path], network: TwoLayer) -> Any:
        """What the user holds, with these weights: a copy for linen; for NNX the model, changed in place."""

    def recalibrated(self, given: Any, moments: Mapping[Path, tuple[Any, Any]]) -> Any:
        """Variables with these running means and variances of batch norms: a copy; an NNX model is changed in place."""

    def count(self, variables: Any) -> int:
        """The number of parameters."""


class WrongOutputError(ValueError):
    """``output=`` chooses nothing of what the module returns."""


def selected(out: Any, output: Any) -> Any:
    """The output that the user chose: by a key, an index, or a function; None for ``out`` itself.

    Raises:
        WrongOutputError: if there is none; for a key or an index where ``out`` is one array.
    """
    if output is None:
        return out
    there = sorted(map(str, out)) if isinstance(out, Mapping) else _kind(out)
    if isinstance(out, Array) and not callable(output):  # an index would be one of rows
        raise WrongOutputError(
            f"`output` must be a key or an index of several outputs, or a function, got {output!r}; the outputs: "
            f"{there}. Leave `output` out, or give a function of the array."
        )
    try:
        return output(out) if callable(output) else out[output]
    except Exception as error:
        if callable(output):
            raise WrongOutputError(
                "`output` must be a function of what the module returns, got one that raises "
                f"{type(error).__name__}: {error}; the outputs: {there}."
            ) from error
        name = output if isinstance(output, str) and hasattr(out, output) else None
        remark = "" if name is None else f" It is an attribute: give output=lambda out: out.{name}."
        raise WrongOutputError(
            f"`output` must be a key or an index of the outputs, or a function, got {output!r}; the outputs: {there}."
            f"{remark}"
        ) from None


def _kind(out: Any) -> str:
    """What a module returns, in a few words: the class, and the shape of an array or the number of entries."""
    if isinstance(out, Array):
        return f"one array {out.shape}"
    return f"a {type(out).__name__}" + (f" of {len(out)}" if isinstance(out, tuple | list) else "")
