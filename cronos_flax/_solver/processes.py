"""Several processes that run the same program, as ``jax.distributed`` starts them: what they must agree on.

Each process makes the same calls in the same order, for programs on arrays of several processes wait for all of them.
So whatever differs from process to process (a clock, an error of a disk) must not decide anything by itself.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


def is_first() -> bool:
    """Whether this is process 0, which tells users and writes what one process writes."""
    return jax.process_index() == 0


def on_first(callback: Any) -> Any:
    """A user's callback in the first process; in others a function that does nothing, so that all compile the same."""
    return callback if is_first() or not callable(callback) else _nothing


def _nothing(_: Any) -> None:
    """Nobody is told."""


def agreed(value: float) -> float:
    """The number that the first process has."""
    if jax.process_count() == 1:
        return value
    bits = np.frombuffer(np.float64(value).tobytes(), np.uint8)  # as they are: JAX may have no float64
    return float(np.frombuffer(np.asarray(multihost_utils.broadcast_one_to_all(bits)).tobytes(), np.float64)[0])


def everywhere(holds: bool) -> bool:
    """Whether something holds in all processes."""
    if jax.process_count() == 1:
        return holds
    return bool(np.all(multihost_utils.process_allgather(np.uint8(holds))))


def by_first(action: Callable[[], Any]) -> Any:
    """Do something in the first process, while the others wait.

    Raises:
        OSError: in every process, if the first one raises one.
    """
    error, result = None, None
    if is_first():
        try:
            result = action()
        except OSError as raised:
            error = raised
    if agreed(float(error is not None)):
        raise error or OSError("The first process could not do this; its error says why.")
    return result
