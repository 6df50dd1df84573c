"""Objects of the host that a compiled solve calls back: sources of blocks, and reports of progress.

Compiled code knows them by a number, so that a new object compiles nothing anew. What they raise is raised to the
caller as it was, not as XLA words it.
"""

import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.experimental import io_callback
from jaxtyping import Int

from cronos_flax._solver.transfer import on_device

_open: dict[int, Any] = {}
_errors: dict[int, BaseException] = {}
_numbers = itertools.count()


@contextmanager
def opened(*objects: Any) -> Iterator[list[Any]]:
    """Numbers for these objects, None for None; what their calls raise leaves the block as it was raised.

    At the end those that have a ``close`` are closed.
    """
    numbers = [next(_numbers) for _ in objects]
    _open.update(zip(numbers, objects, strict=True))
    try:
        yield [None if thing is None else on_device(n, np.int32) for n, thing in zip(numbers, objects, strict=True)]
    except Exception:
        raised = [_errors[n] for n in numbers if n in _errors]
        if raised:
            raise raised[0] from None
        raise
    finally:
        for n in numbers:
            thing = _open.pop(n)
            if hasattr(thing, "close"):
                thing.close()
            _errors.pop(n, None)


def called(number: Array | np.ndarray, use: Callable[[Any], Any]) -> Any:
    """``use`` of the object with this number; what it raises is kept for :func:`opened`."""
    n = int(number)
    try:
        return use(_open[n])
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
        io_callback(tell, None, number, figures)
