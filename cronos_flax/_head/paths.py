"""Where a layer is in a module: paths, and how they are written."""

import functools
from collections.abc import Hashable
from typing import Any

Path = tuple[Hashable, ...]


def format_path(path: Path) -> str:
    """A path as text, ``"backbone/fc"``."""
    return "/".join(map(str, path)) or "the module itself"


def at_path(tree: Any, path: Path) -> Any:
    """What is there in nested mappings, or in anything else that is read by keys."""
    return functools.reduce(lambda node, key: node[key], path, tree)


def as_path(where: str, path: Any, numbered: bool = False) -> Path:
    """A path that a user gave, ``"a/b"`` or a tuple; if ``numbered``, digits in the text are indices."""
    if isinstance(path, str):
        return tuple(int(key) if numbered and key.isdigit() else key for key in path.split("/"))
    if not isinstance(path, tuple) or not all(isinstance(key, str | int) for key in path):
        raise ValueError(f"{where} must be a path, such as ('backbone', 'fc') or 'backbone/fc', got {path!r}.")
    return path
