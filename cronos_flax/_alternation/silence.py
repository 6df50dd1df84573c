"""What Orbax and TensorStore say of a damaged checkpoint, and of errors of the system, is not heard.

Their threads answer also when Orbax has given up and listens no more; these are errors for ``sys.unraisablehook``. The
hook, Python's warnings and a logger belong to the process, so all threads that read and write share one silence.
"""

import contextlib
import logging
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

_LATEST = 10.0  # seconds after which threads that Orbax has given up have answered


class Silence:
    """The silence of a process, while anybody asks for it; then all is as it was before."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = self._readers = 0
        self._before: Callable[[Any], Any] = sys.unraisablehook
        self._hook: Callable[[Any], Any] | None = None
        self._restored = contextlib.ExitStack()

    @contextlib.contextmanager
    def of_late_answers(self) -> Iterator[None]:
        """In the block and, if it ends in an error, for some seconds more: it is then that answers come late."""
        with self._lock:
            self._users += 1
            if sys.unraisablehook is not self._hook:
                before = self._before = sys.unraisablehook
                self._hook = sys.unraisablehook = lambda unraisable: self._hear(before, unraisable)
        try:
            yield
        except BaseException:
            timer = threading.Timer(_LATEST, self._end)
            timer.daemon = True
            timer.start()
            raise
        self._end()

    @contextlib.contextmanager
    def of_all(self) -> Iterator[None]:
        """As :meth:`of_late_answers`, and in the block of everything: of other errors, warnings and logs of Orbax."""
        with self.of_late_answers():
            with self._lock:
                self._readers += 1
                if self._readers == 1:
                    logger = logging.getLogger("absl")
                    self._restored.callback(logger.setLevel, logger.level)
                    logger.setLevel(logging.CRITICAL)
                    self._restored.enter_context(warnings.catch_warnings())
                    warnings.simplefilter("ignore")
            try:
                yield
            finally:
                with self._lock:
                    self._readers -= 1
                    if self._readers == 0:
                        self._restored.close()

    def _hear(self, hook: Callable[[Any], Any], unraisable: Any) -> None:
        if not self._readers and "Event loop is closed" not in str(unraisable.exc_value):
            hook(unraisable)

    def _end(self) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0 and sys.unraisablehook is self._hook:  # else somebody has put another one over it
                sys.unraisablehook, self._hook = self._before, None


silence = Silence()
