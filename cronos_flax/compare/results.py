"""``results.jsonl``: the rows of finished runs, a line each, with checksums.

Lines are only ever added, those of a run at once. Each ends with ``"crc32"``, the checksum of the run's lines so far;
lines of an earlier version, which have none, are taken as they are. What a kill leaves after the last finished run is
cut off when the sweep goes on. Anything else that does not fit is damage: it is reported, and nothing is changed.
"""

import json
import re
import zlib
from collections.abc import Iterable
from pathlib import Path

from cronos_flax._head.files import append, named
from cronos_flax.compare.task import Row, Run

_BROKEN = re.compile(rb'"crc32"|"[0-9a-f]{8}"\}$')  # what is left of a checksum if one byte of it is wrong
_SUM = re.compile(rb', "crc32": "([0-9a-f]{8})"\}$')


def kept(path: Path, name: str = "`out`") -> list[Row]:
    """The rows of all finished runs; none if there is no file.

    Args:
        path: of the file.
        name: what the caller calls its directory, for the message.

    Raises:
        ValueError: if a line is damaged, by number.
    """
    return _read(path, name)[0]


def by_run(rows: Iterable[Row]) -> dict[Run, list[Row]]:
    """The rows of each run."""
    runs: dict[Run, list[Row]] = {}
    for row in rows:
        runs.setdefault(run_of(row), []).append(row)
    return runs


def run_of(row: Row) -> Run:
    """The run that a row belongs to."""
    return Run(row["method"], row["rate"], row["seed"])


def check_same(rows: Iterable[Row], shared: Row, where: str, other: str, remedy: str) -> None:
    """Check that rows are of the same settings and data.

    Args:
        rows: to check.
        shared: settings by name, and of what they name ``"data"`` and ``"variables"``, the checksums of the data and of
            the shapes of a model, if these are known.
        where: what holds the rows, for the message.
        other: what has the settings.
        remedy: what to do.

    Raises:
        ValueError: if they are not; it names the setting.
    """
    rows = list(rows)
    for name, value in shared.items():
        default = value if name in ("data", "variables") else None  # which early versions did not keep
        theirs = next((row.get(name, default) for row in rows if row.get(name, default) != value), value)
        if theirs == value:
            continue
        if name == "data":
            dataset = rows[0]["dataset"]
            raise ValueError(
                f"{where} holds runs on other data: {dataset} has changed since (its checksum is {theirs}, and {other} "
                f"has {value}). {remedy}"
            )
        if name == "variables":
            model = rows[0]["model"]
            raise ValueError(
                f"{where} holds runs of another model: {model} has changed since (the checksum of its variables' names "
                f"and shapes is {theirs}, and {other} has {value}). {remedy}"
            )
        raise ValueError(f"{where} holds a comparison with {name}={theirs!r}, and {other} has {value!r}. {remedy}")


def repaired(path: Path) -> list[Row]:
    """The rows of all finished runs, as :func:`kept`; what follows them, of a run that was killed, is cut off."""
    rows, size = _read(path, "`out`")
    if path.exists() and size < path.stat().st_size:
        with named(path), path.open("r+b") as file:
            file.truncate(size)
    if size and not path.read_bytes().endswith(b"\n"):
        append(path, b"\n")
    return rows


def add(path: Path, rows: list[Row]) -> None:
    """Add a finished run: all of its rows, the last with ``"end"``, or none."""
    append(path, lines_of(rows))


def lines_of(rows: list[Row]) -> bytes:
    """The lines of a finished run, with checksums."""
    lines, total = [], 0
    for row in rows:
        body = json.dumps(row).encode()
        total = zlib.crc32(body, total)
        lines.append(body[:-1] + f', "crc32": "{total:08x}"}}\n'.encode())
    return b"".join(lines)


def _read(path: Path, name: str) -> tuple[list[Row], int]:
    """The rows of all finished runs, and how many bytes of the file these are."""
    if not path.exists():
        return [], 0
    rows: list[Row] = []
    run: list[Row] = []  # that is being read
    first: dict[Run, int] = {}  # line of each run
    total, summed, end, position = 0, False, 0, 0
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        is_last = number == len(lines)  # what follows the last end of a line: nothing, unless a write was cut short
        position += len(line) + (not is_last)
        line = line.strip(b" \r")
        if not line:
            continue
        try:
            body, mark = _SUM.sub(b"}", line), _SUM.search(line)
            total = zlib.crc32(body, total)
            row = _row(body)
            if not mark and (summed or _BROKEN.search(line)):
                raise ValueError("has no checksum")
            if mark and int(mark[1], 16) != total:
                raise ValueError("does not fit its checksum, or a line before it is missing")
            if run and run_of(row) != run_of(run[0]):
                raise ValueError(f"belongs to another run than line {first[run_of(run[0])]}, which has not ended")
            if not run and run_of(row) in first:
                raise ValueError(f"begins a run that line {first[run_of(row)]} has begun already")
        except _CutShortError as error:
            if is_last:
                break
            raise _damaged(name, path, number, error) from None
        except ValueError as error:
            raise _damaged(name, path, number, error) from None
        first.setdefault(run_of(row), number)
        summed = summed or mark is not None
        run.append(row)
        if row.get("end"):
            rows += run
            run, total, end = [], 0, position
    return rows, end


class _CutShortError(ValueError):
    """A line that may be the beginning of a whole one."""


def _row(line: bytes) -> Row:
    text = line.decode(errors="replace")
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        kind = ValueError if error.msg == "Extra data" else _CutShortError
        raise kind(f"is not JSON ({error.msg} at character {error.pos + 1})") from None
    if not isinstance(row, dict) or not {"method", "rate", "seed", "epoch"} <= set(row):
        raise ValueError("is not a row of a run")
    return row


def _damaged(name: str, path: Path, number: int, error: ValueError) -> ValueError:
    return ValueError(
        f"{name}: line {number} of {path} is damaged: it {error}. Nothing was changed. Take the file from a copy, or "
        'delete the lines of that run (a run ends with the line that has "end"): the next sweep does it again.'
    )
