"""How a solve is compiled: in stages with a loop on the host, or inside a program that is being traced.

Called from Python, each :class:`Stage` is compiled by itself, and the loop between them runs on the host: what is
never reached is never compiled, and another number of iterations compiles nothing anew. (A solve with held gates is one
program with its loop in it, which takes the number of iterations as an array.) Inside the caller's ``jit`` or ``vmap``
the same functions are traced, with JAX's own control flow between them.
"""

import contextlib
import functools
import gc
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from cronos_flax._solver import host
from cronos_flax._solver.arrays import is_concrete
from cronos_flax._solver.blocks import Blocks
from cronos_flax._solver.meshes import automatically
from cronos_flax._solver.transfer import on_device, on_host

# The fusion emitters take much time and memory to compile many small kernels; tests/streamed.py prints it. One thread
# compiles such programs sooner than many are started. With LLVM's first level of optimisation they are as fast as with
# its third.
_COMMON: dict[str, Any] = {"xla_cpu_use_fusion_emitters": False, "xla_cpu_parallel_codegen_split_count": 1}
_OPTIMISED: dict[str, Any] = _COMMON | {"xla_backend_optimization_level": 1}
_UNOPTIMISED: dict[str, Any] = _COMMON | {"xla_backend_optimization_level": 0}
# Entries of the arguments up to which a program is compiled without optimisation: then it runs longer by less than
# compiling it took, where it runs once a solve, some ten times, or at each of some hundred steps of several solves.
ONCE, SOME_STEPS, EVERY_STEP = 4_000_000, 1_000_000, 50_000


class Stage:
    """A part of a solve that is compiled as a whole: a function of arrays, with products at full precision.

    Args:
        function: the function; keyword arguments are static.
        few: entries of its arguments up to which it is compiled without optimisation.
    """

    def __init__(self, function: Callable[..., Any], *, few: int = 0) -> None:
        functools.update_wrapper(self, function)
        self._few = few

        def at_full_precision(arguments: tuple, static: tuple) -> Any:
            with jax.default_matmul_precision("highest"):
                return function(*arguments, **dict(static))

        at_full_precision.__name__ = function.__name__
        self._jit = functools.partial(jax.jit, at_full_precision, static_argnums=1)
        self._jitted: dict[bool | None, Callable[..., Any]] = {}

    def __call__(self, *arguments: Any, **static: Any) -> Any:
        """Run it by itself."""
        names = tuple(sorted(static.items()))
        with contextlib.nullcontext() if self._jitted else _without_collection():
            return automatically(lambda *given: self.compiled(given)(given, names), *arguments)

    def inside(self, *arguments: Any, **static: Any) -> Any:
        """Run it as part of a program that is being traced."""
        return self._for(None)(arguments, tuple(sorted(static.items())))

    def compiled(self, arguments: tuple) -> Callable[..., Any]:
        """The jitted function of a tuple of arguments and a tuple of static ones, by name."""
        is_off = jax.config.values["jax_disable_most_optimizations"]  # the options of a stage would win over it
        return self._for(is_off or _entries(arguments) <= self._few)

    def _for(self, fast: bool | None) -> Callable[..., Any]:
        if fast not in self._jitted:
            self._jitted[fast] = self._jit(compiler_options=None if fast is None else _options(fast))
        return self._jitted[fast]


@contextlib.contextmanager
def _without_collection() -> Iterator[None]:
    """No collection of cyclic garbage: tracing makes so many objects that it would look at all of the process."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _entries(tree: Any) -> int:
    leaves = jax.tree.leaves(tree, is_leaf=lambda leaf: isinstance(leaf, Blocks))
    return sum(leaf.rows * leaf.columns if isinstance(leaf, Blocks) else np.size(leaf) for leaf in leaves)


def _options(fast: bool) -> dict[str, Any] | None:
    """Of XLA for the CPU; None where it does not know them, or compiles for something else."""
    if not _are_known():
        return None
    return _UNOPTIMISED if fast else _OPTIMISED


@functools.cache
def _are_known() -> bool:
    if jax.default_backend() != "cpu":
        return False
    try:
        jax.jit(lambda: 0, compiler_options=_UNOPTIMISED)()
    except jax.errors.JaxRuntimeError:
        return False
    return True


class OnHost:
    """Control flow of a solve that is called from Python: what decides is looked at, as NumPy's."""

    xp = np

    @staticmethod
    def run(stage: Stage, *arguments: Any, **static: Any) -> Any:
        """The stage, compiled by itself."""
        return stage(*arguments, **static)

    @staticmethod
    def cond(condition: Any, yes: Callable[[], Any], no: Callable[[], Any]) -> Any:
        """``jax.lax.cond``."""
        return yes() if condition else no()

    @staticmethod
    def seen(tree: Any) -> Any:
        """Arrays to decide by."""
        return jax.tree.map(np.asarray, on_host(tree))

    @staticmethod
    def back(tree: Any) -> Any:
        """The same for a stage."""
        return jax.tree.map(on_device, tree)

    @staticmethod
    def beside(array: Any, other: Array) -> Array:
        """An array where another one lies."""
        return jax.device_put(array, other.sharding)

    @staticmethod
    def known(decision: Any) -> bool | None:
        """A decision that a stage is compiled for."""
        return bool(decision)

    @staticmethod
    def report(number: Any, figures: dict[str, Any]) -> None:
        """Tell the caller's callback."""
        host.tell(number, on_host(figures))

    @staticmethod
    def while_loop(unfinished: Callable[[Any], Any], body: Callable[[Any], Any], start: Any) -> Any:
        """``jax.lax.while_loop``."""
        while unfinished(start):
            start = body(start)
        return start


class Traced:
    """Control flow of a solve inside a program that is being traced."""

    xp = jnp

    cond = staticmethod(jax.lax.cond)
    while_loop = staticmethod(jax.lax.while_loop)

    @staticmethod
    def run(stage: Stage, *arguments: Any, **static: Any) -> Any:
        """The stage as part of the program that is traced."""
        return stage.inside(*arguments, **static)

    @staticmethod
    def seen(tree: Any) -> Any:
        """Arrays to decide by: as they are."""
        return tree

    back = seen

    @staticmethod
    def beside(array: Any, other: Array) -> Array:
        """An array, as it is."""
        del other
        return array

    @staticmethod
    def known(decision: Any) -> bool | None:
        """Nothing is known when a program is traced."""
        return None

    @staticmethod
    def report(number: Any, figures: dict[str, Any]) -> None:
        """Tell the caller's callback, from compiled code."""
        host.report(number, **figures)


Control: TypeAlias = type[OnHost] | type[Traced]


def control_of(*trees: Any) -> Control:
    """The control flow for these arguments."""
    # Inside jit even a constant is traced.
    is_known = all(map(is_concrete, (*jax.tree.leaves(trees), jax.device_put(np.zeros(())))))
    return OnHost if is_known else Traced
