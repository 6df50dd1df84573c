"""Rows of figures, one JSON object a line, written as they come, so that a benchmark resumes where it stopped."""

import argparse
import gzip
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def kept(path: Path) -> list[Row]:
    """The rows of a file, which may be compressed (``.gz``); none if there is no file."""
    if not path.exists():
        return []
    text = gzip.decompress(path.read_bytes()).decode() if path.suffix == ".gz" else path.read_text()
    return [json.loads(line) for line in text.splitlines()]


def keep(path: Path, row: Row) -> Row:
    """Append a row; returns it."""
    if path.suffix == ".gz":
        raise ValueError(f"{path} has the kept rows, and none is added to them. Give another file by --out.")
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")
    return row


def missing(path: Path, names: Sequence[str], wanted: Iterable[tuple], do: Callable[..., Row]) -> list[Row]:
    """Do what has no row yet.

    Args:
        path: of the rows.
        names: the columns that identify a row.
        wanted: their values, one tuple a row.
        do: called with these values; returns the other columns.

    Returns:
        All rows, those of earlier calls first.
    """
    rows = kept(path)
    done = {tuple(row.get(name) for name in names) for row in rows}
    for key in wanted:
        if key not in done:
            rows.append(keep(path, {**dict(zip(names, key, strict=True)), **do(*key)}))
    return rows


def parser(
    script: str, doc: str | None, *, data: bool | None = None, weights: bool = False, pretrained: bool = False
) -> argparse.ArgumentParser:
    """The options that the benchmarks share.

    Args:
        script: its ``__file__``; rows go to a file of the same name.
        doc: its docstring, whose first line is the description.
        data: whether prepared TFDS sets are required; None for a script that does not read any.
        weights: whether published weights can be used.
        pretrained: whether features of published weights are made, and kept in a directory.
    """
    made = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    if data is not None:
        made.add_argument("--data-dir", type=Path, required=data, help="directory of prepared TFDS sets")
    if weights:
        made.add_argument("--weights", type=Path, help="directory of resnet20_cifar10.safetensors")
    if pretrained:
        made.add_argument("--weights", type=Path, help="directory of published weights")
        made.add_argument("--cache", type=Path, help="directory for what is made of them")
    made.add_argument("--out", type=Path, default=Path(f"{Path(script).stem}.jsonl"), help="rows; kept, and added to")
    return made
