"""Objects of the host that a compiled solve calls back: sources of blocks, and reports of progress.

Compiled code knows them by a number, so that a new object compiles nothing anew. What they raise is raised to the
caller as it was, not as XLA words it. XLA calls them in threads of its own, where a ``jax.enable_x64`` of the caller
does not hold: it is set there again, and numbers of 64 bits are handed over as bits, or JAX would round them.
"""

import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import io_callback
from jaxtyping import Int

from cronos_flax._solver.transfer import has_x64, on_device

_open: dict[int, tuple[Any, bool]] = {}  # with whether the caller has enabled 64 bits
_errors: dict[int, BaseException] = {}
_numbers = itertools.count()


@contextmanager
def opened(*objects: Any) -> Iterator[list[Any]]:
    """Numbers for these objects, None for None; what their calls raise leaves the block as it was raised.

    At the end those that have a ``close`` are closed.
    """
    numbers = [next(_numbers) for _ in objects]
    _open.update((n, (thing, has_x64())) for n, thing in zip(numbers, objects, strict=True))
    try:
        yield [None if thing is None else on_device(n, np.int32) for n, thing in zip(numbers, objects, strict=True)]
    except Exception:
        raised = [_errors[n] for n in numbers if n in _errors]
        if raised:
            raise raised[0] from None
        raise
    finally:
        for n in numbers:
            thing, _ = _open.pop(n)
            if hasattr(thing, "close"):
                thing.close()
            _errors.pop(n, None)


def called(number: Array | np.ndarray, use: Callable[[Any], Any]) -> Any:
    """``use`` of the object with this number; what it raises is kept for :func:`opened`."""
    n = int(number)
    try:
        thing, x64 = _open[n]
        with jax.enable_x64(x64):
            return use(thing)
    except BaseException as error:
        _errors.setdefault(n, error)
        raise


class Reporter:
    """The user's callback, with the clock that it is told the time from."""

    def __init__(self, callback: Callable[[dict[str, float]], Any]) -> None:
        self._callback, self._start = callback, time.perf_counter()

    def __call__(self, figures: Mapping[str, np.ndarray]) -> None:
        """Call it with Python numbers."""
        self._callback({name: value.item() for name, value in figures.items()} | {"seconds": self.seconds})

    @property
    def seconds(self) -> float:
        """Since the start of the solve."""
        return time.perf_counter() - self._start


def tell(number: Array | np.ndarray, figures: Mapping[str, Any]) -> None:
    """Hand scalars to the :class:`Reporter` with this number."""
    called(number, lambda reporter: reporter(jax.tree.map(np.asarray, figures)))


def report(number: Int[Array, ""] | None, **figures: Array) -> None:
    """:func:`tell` from compiled code; nothing if there is no number."""
    if number is not None:
        io_callback(_told, None, number, jax.tree.map(_as_bits, figures))


def _as_bits(value: Array) -> Array:
    """A scalar of 64 bits as two of 32, a count as one."""
    if jnp.issubdtype(value.dtype, jnp.integer):
        return value.astype(jnp.int32)
    return jax.lax.bitcast_convert_type(value, jnp.uint32) if value.dtype == jnp.float64 else value


def _told(number: Array | np.ndarray, figures: Mapping[str, Any]) -> None:
    """:func:`tell` of what has come as bits."""
    arrays = jax.tree.map(np.asarray, figures)
    tell(number, {name: value.view(np.float64)[0] if value.ndim else value for name, value in arrays.items()})
