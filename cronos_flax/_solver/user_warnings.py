"""Warnings, which show the line of the user's code that asked for what they are about."""

import inspect
import warnings

_INSIDE = (__name__.partition(".")[0], "flax")


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn the user, at the nearest line that is neither in this package nor in Flax."""
    frame, level = inspect.currentframe(), 0
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _INSIDE:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level + 1)
