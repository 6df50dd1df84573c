"""Functions of the user's, by name: ``module:function``, importable from where one is."""

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any


def function(argument: str, name: str, said: str, also: str = "") -> Callable[..., Any]:
    """Import a function.

    Args:
        argument: that has the name, for messages.
        name: ``module:function``.
        said: what the function must be, for messages.
        also: what the argument takes besides, for messages.

    Raises:
        ValueError: if there is none.
    """
    file, _, attribute = name.partition(":")
    if not attribute or not all(map(str.isidentifier, file.split("."))) or file.endswith(".py"):
        raise ValueError(
            f"`{argument}` must be {also}module:function, got {name!r}. The module of my_module.py, here or in "
            "PYTHONPATH, is my_module."
        )
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(file), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"`{argument}` {name!r} cannot be imported from {os.getcwd()}: {error}.") from error
    if not callable(found):
        raise ValueError(f"`{argument}` {name!r} must be {said}, got {found!r}.")
    return found
