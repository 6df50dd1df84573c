"""Features in files: gathered once, read as they are used, and gone on with after a kill.

A directory holds, while features are gathered, their rows as they came (``X.raw``, ``y.raw``, ``weight.raw``) and
``log.jsonl``: a line that tells the backbone, and a line for each batch, with checksums of what came and of what was
kept. At the end the rows are sorted into ``X.npy``, ``y.npy``, ``weight.npy`` and ``order.npy``, and a last line of the
log says so, with their checksums. The log is only added to: a line that a kill has cut is dropped, with the rows beyond
it.
"""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from cronos_flax._head.data import Batch
from cronos_flax._head.files import append, locked, named
from cronos_flax._head.fingerprint import Fingerprint, checksum, crc, difference
from cronos_flax._head.norms import Population
from cronos_flax._head.room import release
from cronos_flax._head.rows import Gathered, GatheredRows, Piece, sorted_by_target

_VERSION = 2
_LOG = "log.jsonl"
_FIRST = 64  # rows of the first batch that the module's features are compared with
_SAME = 1e-2  # difference of features, relative to the largest, after which they are others; rounding is below it
_PART = 2**21  # bytes that are sorted at a time, so that little memory is taken


class StaleError(ValueError):
    """The files are of another backbone or other data, or damaged."""


def from_cache(
    directory: Path, renew: bool, gathered: Callable[["Cache"], Gathered], backbone: Fingerprint
) -> Gathered:
    """What ``gathered`` makes of the files in a directory, whether they are whole, begun, or not there.

    Files that are whole are only read, by as many processes as like; others are held by one.

    Args:
        directory: of the files.
        renew: make them anew if they are stale.
        gathered: passes all batches, with these files as the store.
        backbone: what tells the backbone from others.

    Raises:
        ValueError: if the files are stale and not to be renewed, or are not those of a cache.
        BlockingIOError: if another process is gathering into them.
    """
    if Cache.is_whole(directory):
        try:
            return gathered(Cache(directory, backbone))
        except StaleError:
            if not renew:
                raise
    with locked(directory, "gather_features: `cache`"):
        try:
            return gathered(Cache(directory, backbone))
        except StaleError:
            if not renew:
                raise
        Cache.clear(directory)
        return gathered(Cache(directory, backbone))


class Cache:
    """The files of a directory, as the store of a pass.

    Args:
        directory: where they are.
        backbone: what tells the backbone from others.

    Raises:
        StaleError: if they are those of another backbone, or damaged.
        ValueError: if the directory has files of these names that are not of a cache.
    """

    def __init__(self, directory: Path, backbone: Fingerprint) -> None:
        self._directory = directory
        lines, length = _lines(directory / _LOG)
        theirs = [name for name in _names() if (directory / name).exists()] if not lines else []
        if _begins_as_ours(directory / _LOG):
            theirs = [name for name in theirs if name != _LOG]
        elif lines:
            theirs = [_LOG]
        if theirs:
            raise ValueError(
                f"gather_features: `cache` must be a new directory or one that it has made, got {directory}, where "
                f"{theirs[0]} is somebody else's."
            )
        if not lines:
            lines, length = [{"version": _VERSION, "backbone": backbone}], 0
            (directory / _LOG).unlink(missing_ok=True)
            self._log(lines[0])
        elif (directory / _LOG).stat().st_size > length:
            with (directory / _LOG).open("r+b") as file:
                file.truncate(length)
        if lines[0].get("version") != _VERSION:
            raise self._stale(f"its files have version {lines[0].get('version')}, not {_VERSION}")
        if changed := difference(lines[0]["backbone"], backbone):
            raise self._stale(f"it is of another backbone: {changed}")
        self._end: dict[str, Any] | None = lines.pop() if "complete" in lines[-1] else None
        self._batches: list[dict[str, Any]] = lines[1:]
        self._passed = len(self._batches)  # in earlier passes
        if self._end is None:
            self._cut()

    @staticmethod
    def is_whole(directory: Path) -> bool:
        """Whether there is nothing to add to the files."""
        lines, _ = _lines(directory / _LOG)
        return bool(lines) and "complete" in lines[-1]

    @staticmethod
    def clear(directory: Path) -> None:
        """Remove the files. What is mapped into memory stays as it is until it is released."""
        for name in _names():
            (directory / name).unlink(missing_ok=True)

    def _stale(self, why: str) -> StaleError:
        return StaleError(
            f"gather_features: `cache` {self._directory} cannot be used: {why}. Give another directory, or renew=True "
            "to make it anew."
        )

    def _log(self, line: dict[str, Any]) -> None:
        append(self._directory / _LOG, json.dumps(line).encode() + b"\n")

    def _cut(self) -> None:
        """Drop rows that no line of the log tells of."""
        if not self._batches:
            for path in self._directory.glob("*.raw"):
                path.unlink()
        for name in self._fields:
            path, size = self._directory / f"{name}.raw", self._row_bytes(name) * self._rows
            if not path.exists() or path.stat().st_size < size:
                raise self._stale(f"{path.name} is shorter than the log says")
            with path.open("r+b") as file:
                file.truncate(size)

    @property
    def _rows(self) -> int:
        return sum(batch["rows"] for batch in self._batches)

    @property
    def _fields(self) -> tuple[str, ...]:
        """The names of the arrays; none before the first batch."""
        if not self._batches:
            return ()
        return ("X", "y", "weight") if self._form["weight"] else ("X", "y")

    @property
    def _form(self) -> dict[str, Any]:
        return self._batches[0]["form"]

    def _form_of(self, name: str) -> tuple[np.dtype, tuple[int, ...]]:
        """Dtype and shape of a row of an array."""
        dtype, shape = (self._form["X"][0], ()) if name == "weight" else self._form[name]
        return np.dtype(dtype), tuple(shape)

    def _row_bytes(self, name: str) -> int:
        dtype, shape = self._form_of(name)
        return dtype.itemsize * int(np.prod(shape))

    def rows_left(self, number: int, batch: Batch) -> int | None:
        """How many rows batch ``number`` has left; None if it has not been passed yet.

        Raises:
            StaleError: if it is another batch than that one was.
        """
        if number >= self._passed:
            if self._end is not None:
                raise self._stale(f"`data` have more than the {self._passed} batches that it was made of")
            return None
        if self._batches[number]["came"] != _came(batch):
            raise self._stale(
                f"batch {number} of `data` (from 0) is another than it was: other values, another order, or another "
                "number of rows. A loader must give the same batches each time: no shuffling, no augmentation"
            )
        return self._batches[number]["rows"]

    def compare(self, piece: Piece) -> None:
        """See that the first batch gives the features that are there: the code of the module may be another.

        Raises:
            StaleError: if they are others.
        """
        now = piece.rows.X[:_FIRST]
        if self._end is None:
            there = self._raw("X", 0, self._batches[0]["rows"])[:_FIRST]
        else:
            there = self._sorted("X")[self._end["first"]]
        if there.shape != now.shape or there.dtype != now.dtype:
            raise self._stale(
                f"the module gives features {now.shape} of {now.dtype} for the first batch, not {there.shape} of "
                f"{there.dtype}"
            )
        finite = np.isfinite(there)
        size = np.max(np.abs(there[finite]), initial=np.finfo(there.dtype).tiny)
        both = finite & np.isfinite(now)
        apart = np.max(np.abs(there[both] - now[both]), initial=0.0) / size
        if apart > _SAME or not np.array_equal(finite, np.isfinite(now)):
            raise self._stale(
                f"the module gives other features for the first batch, by {apart:.2g} of the largest, though its "
                "parameters are the same: its code or its settings have changed"
            )

    def add(self, batch: Batch, piece: Piece, share: float | None) -> None:
        """Write what the next batch has left, and then the line that tells of it."""
        del share
        if piece.rows.y.dtype.kind == "V":  # bfloat16, which files of NumPy do not know
            piece = piece._replace(rows=piece.rows._replace(y=piece.rows.y.astype(np.float32)))
        if self._batches and piece.form != self._form:
            raise ValueError(
                "gather_features: with a `cache`, features and targets must have one dtype and shape in all batches, "
                f"got {piece.form} after {self._form}."
            )
        X, y, weight, finite, *_ = piece.rows
        kept = 0
        for name, array in {"X": X, "y": y, "weight": weight}.items():
            if array is None:
                continue
            kept, path = crc(array, kept), self._directory / f"{name}.raw"
            with named(path), path.open("ab") as file:  # what an error or a kill leaves, _cut drops
                file.write(np.ascontiguousarray(array).tobytes())
        line: dict[str, Any] = {"rows": len(X), "came": _came(batch), "kept": kept, "finite": finite}
        line |= {"passed": piece.passed, "norms": [[path, *map(_listed, both)] for path, both in piece.norms.items()]}
        if not self._batches:
            line["form"] = piece.form
        self._log(line)
        self._batches.append(line)

    def close(self) -> None:
        """Nothing is held between two calls."""

    def joined(self, count: int) -> Gathered:
        """All rows, in files that are read as they are used; they are sorted if that has not been done."""
        if count < len(self._batches):
            raise self._stale(f"`data` have {count} batches, and it was made of {len(self._batches)}")
        end = self._sort() if self._end is None else self._end
        arrays = {name: self._sorted(name) for name in (*self._fields, "order")}
        if any(len(array) != self._rows for array in arrays.values()):
            raise self._stale(f"its files do not have the {self._rows} rows that the log tells of")
        for name, array in arrays.items():
            if _checksum(array) != end["sorted"][name]:
                raise self._stale(f"{name}.npy is not what was written")
        for name in self._fields:
            (self._directory / f"{name}.raw").unlink(missing_ok=True)
        y, order = np.array(arrays["y"]), np.array(arrays["order"])
        weight = np.array(arrays["weight"]) if "weight" in arrays else None
        rows = GatheredRows(arrays["X"], y, weight, all(batch["finite"] for batch in self._batches))
        return Gathered(rows, order, self._moments() if rows.finite else {})

    def _moments(self) -> dict[tuple, tuple[np.ndarray, np.ndarray]]:
        population = Population()
        for batch in self._batches:
            norms = {tuple(path): (_array(mean), _array(var)) for path, mean, var in batch["norms"]}
            population.add(norms, batch["passed"])
        return population.moments

    def _raw(self, name: str, start: int, rows: int) -> np.ndarray:
        """Rows as they came."""
        dtype, shape = self._form_of(name)
        path = self._directory / f"{name}.raw"
        return np.fromfile(path, dtype, rows * int(np.prod(shape)), offset=start * self._row_bytes(name)).reshape(
            rows, *shape
        )

    def _pieces(self) -> Iterator[GatheredRows]:
        """The batches as they came, each compared with its checksum."""
        start = 0
        for number, batch in enumerate(self._batches):
            arrays = [self._raw(name, start, batch["rows"]) for name in self._fields]
            kept = 0
            for array in arrays:
                kept = crc(array, kept)
            if kept != batch["kept"]:
                raise self._stale(f"the rows of batch {number} (from 0) are not those that were written")
            X, y, *weight = arrays
            yield GatheredRows(X, y, weight[0] if weight else None, batch["finite"])
            start += batch["rows"]

    def _sort(self) -> dict[str, Any]:
        """Write the rows in their order, a part at a time; then the last line, which it returns."""
        order = sorted_by_target(self._pieces())
        kept = {name: self._write_sorted(name, order) for name in (*self._fields, "order")}
        place = np.empty(len(order), int)
        place[order] = np.arange(len(order))
        first = place[: min(_FIRST, self._batches[0]["rows"])].tolist()
        self._end = end = {"complete": len(order), "first": first, "sorted": kept}
        self._log(end)
        return end

    def _write_sorted(self, name: str, order: np.ndarray) -> int:
        """Write an array; its checksum."""
        kept, path, n = 0, self._directory / f"{name}.npy", len(order)
        fresh = path.with_name(f"{path.name}.new")
        raw: np.ndarray = order
        if name != "order":
            dtype, shape = self._form_of(name)
            raw = np.memmap(self._directory / f"{name}.raw", dtype, "r", shape=(n, *shape))
        try:
            with named(fresh), fresh.open("wb") as file:
                header = {"descr": raw.dtype.str, "fortran_order": False, "shape": raw.shape}
                np.lib.format.write_array_header_1_0(file, header)
                size = max(1, _PART * n // raw.nbytes)
                for start in range(0, n, size):
                    part = slice(start, start + size)
                    rows = raw[part] if name == "order" else raw[order[part]]
                    kept = crc(rows, kept)
                    file.write(rows.tobytes())
                    release(raw)
            fresh.replace(path)
        except OSError:
            fresh.unlink(missing_ok=True)
            raise
        return kept

    def _sorted(self, name: str) -> np.ndarray:
        """A sorted array, mapped into memory."""
        try:
            return np.load(self._directory / f"{name}.npy", mmap_mode="r", allow_pickle=False)
        except (OSError, EOFError, ValueError) as error:  # cut to nothing, it is an EOFError
            raise self._stale(f"{name}.npy cannot be read ({error})") from error


def _names() -> list[str]:
    """All files of a cache; the log last."""
    arrays = "X", "y", "weight", "order"
    return [f"{name}{end}" for name in arrays for end in (".raw", ".npy", ".npy.new")] + [_LOG]


def _lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The whole lines of a log, and the number of bytes that they take."""
    lines: list[dict[str, Any]] = []
    length = 0
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        for line in path.read_bytes().splitlines(keepends=True):
            try:
                read = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                break
            if not isinstance(read, dict):
                break
            lines.append(read)
            length += len(line)
    return lines, length


def _begins_as_ours(path: Path) -> bool:
    """Whether a file is a log of this module, or the beginning of one."""
    start = b'{"version": '
    try:
        content = path.read_bytes()[: len(start)]
    except FileNotFoundError:
        return False
    return start.startswith(content)


def _checksum(array: np.ndarray) -> int:
    """Of an array in a file, of which a part is in memory at a time."""
    kept, size = 0, max(1, _PART * len(array) // max(1, array.nbytes))
    for start in range(0, len(array), size):
        kept = crc(array[start : start + size], kept)
        release(array)
    return kept


def _came(batch: Batch) -> int:
    """What tells a batch from others."""
    return checksum((batch.args, dict(batch.kwargs), batch.y, batch.weight))


def _listed(array: np.ndarray) -> list[Any]:
    """As JSON takes it, with its dtype; every float comes back as it was."""
    return [str(array.dtype), np.asarray(array, np.float64).tolist()]


def _array(listed: list[Any]) -> np.ndarray:
    return np.asarray(listed[1], listed[0])
