"""Calls of a module, compiled: arrays are traced, and all other arguments are part of the program."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Self, TypeVar

import jax

from cronos_flax._head.data import as_arrays
from cronos_flax._head.operations import Operations, operations, text
from cronos_flax._solver.arrays import is_array
from cronos_flax._solver.meshes import automatically
from cronos_flax._solver.transfer import on_device

Made = TypeVar("Made")


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Static:
    """The arguments of a call that are part of a compiled program, and the places of those that are traced."""

    treedef: Any
    rest: tuple  # with the type of each: 1 and True are equal, but a module may tell them apart

    @classmethod
    def of(cls, arguments: Any) -> Self:
        """Of all arguments, arrays too; with these it does not hash."""
        leaves, treedef = jax.tree.flatten(arguments)
        return cls(treedef, tuple((leaf, type(leaf)) for leaf in leaves))

    @classmethod
    def split(cls, arguments: Any) -> tuple[list[Any], Self]:
        """The arrays, which are traced, and what remains."""
        whole = cls.of(arguments)
        arrays = [leaf for leaf, _ in whole.rest if is_array(leaf)]
        rest = tuple(None if is_array(leaf) else (leaf, kind) for leaf, kind in whole.rest)
        return [on_device(array) for array in as_arrays(arrays, "the module's arguments")], cls(whole.treedef, rest)

    def join(self, arrays: Iterable[Any] = ()) -> Any:
        """The arguments, with these arrays in their places."""
        remaining = iter(arrays)
        return jax.tree.unflatten(self.treedef, [next(remaining) if r is None else r[0] for r in self.rest])


@dataclasses.dataclass(frozen=True, eq=False)
class Jitted:
    """A function of variables, positional and keyword arguments; only arrays are traced.

    Args:
        run: compiled, of variables, arrays and what else there is.
    """

    run: Any

    def __call__(self, variables: Any, args: tuple, kwargs: Mapping) -> Any:
        """Its value."""
        return automatically(self.run, variables, *Static.split((args, dict(kwargs))))

    def operations(self, variables: Any, args: tuple, kwargs: Mapping, wanted: list[bool]) -> Operations:
        """What those of its outputs that are wanted are made of; traced only if it has not been called so."""

        def traced(*arguments: Any) -> Operations:
            jaxpr = self.run.trace(*arguments).jaxpr.jaxpr
            return operations(jaxpr, itertools.compress(jaxpr.outvars, wanted))

        return automatically(traced, variables, *Static.split((args, dict(kwargs))))

    def text(self, variables: Any, args: tuple, kwargs: Mapping, wanted: list[bool]) -> str:
        """The same with every number that is written there, and nothing left out."""

        def traced(*arguments: Any) -> str:
            return text(self.run.trace(*arguments).jaxpr, wanted)

        return automatically(traced, variables, *Static.split((args, dict(kwargs))))


def jitted(call: Callable[[Any, tuple, Mapping], Any]) -> Jitted:
    """``jax.jit`` of a function of variables, positional and keyword arguments."""

    @jax.jit
    def run(variables: Any, arrays: list[Any], static: Static) -> Any:
        return call(variables, *static.join(arrays))

    return Jitted(run)


def made_once(most: int) -> Callable[[Callable[..., Made]], Callable[..., Made]]:
    """Make the same once, so that a sweep compiles once. Of what does not hash, as it may change, all is made anew.

    Args:
        most: how many to keep.
    """

    def decorated(make: Callable[..., Made]) -> Callable[..., Made]:
        kept = functools.lru_cache(most)(make)

        @functools.wraps(make)
        def made(*of: Any) -> Made:
            try:
                hash(of)
            except TypeError:
                return make(*of)
            return kept(*of)

        return made

    return decorated
