"""Rows of figures, one JSON object a line, written as they come, so that a benchmark goes on where it stopped."""

import json
from pathlib import Path
from typing import Any


def kept(path: Path) -> list[dict[str, Any]]:
    """The rows that are there."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def keep(path: Path, row: dict[str, Any]) -> dict[str, Any]:
    """Append a row; returns it."""
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")
    return row
