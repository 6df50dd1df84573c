"""Where features lie that are not to be kept: in memory, and, if there are too many, in a temporary file.

The file has no name in its directory, so it cannot be left behind: the system removes it with the last that holds it,
also when the process is killed.
"""

import mmap
import shutil
import tempfile
from typing import IO, Any

import numpy as np

from cronos_flax._solver.memory import available

_STEP = 2**26  # bytes that are allocated, or moved, at a time
_FEW_COLUMNS = 16  # a cache line


class Room:
    """Rows of features, in the order in which they are added; they are in memory once, while they come and at the end.

    Args:
        most: bytes that memory holds; None for as many as there are.
        where: the caller's name, for messages.
    """

    def __init__(self, most: int | None, where: str) -> None:
        self._most, self._where, self._rows, self._kept = most, where, 0, np.empty((0, 0))
        self._file: IO[bytes] | None = None

    @property
    def in_file(self) -> bool:
        """Whether the rows are in a file."""
        return self._file is not None

    def add(self, X: np.ndarray, share: float | None) -> None:
        """Keep rows ``(k, p)``, of one p and dtype.

        Args:
            X: the rows.
            share: which part of all rows there will be when these have been added; None where nobody knows.

        Raises:
            MemoryError: if memory has no room for them.
            OSError: if they are written to a file, and the disk has no room.
        """
        if not self._rows:
            self._kept = np.empty((0, X.shape[1]), X.dtype)
        rows = self._rows + len(X)
        bytes_ = rows * X.shape[1] * self._kept.itemsize
        if self._file is None and self._most is not None and bytes_ > self._most:
            self._spill(None if share is None else int(bytes_ / share))
        if self._file is not None:
            self._write(X.astype(self._kept.dtype, copy=False), None if share is None else int(bytes_ / share))
        else:
            self._grow(rows)
            self._kept[self._rows : rows] = X
        self._rows = rows

    def _grow(self, rows: int) -> None:
        """Have memory for so many rows: twice as many as before, but little more than are needed."""
        there, p = self._kept.shape
        if rows <= there:
            return
        rows = max(rows, there + min(there, _STEP // (p * self._kept.itemsize)))
        more, free = (rows - there) * p * self._kept.itemsize, available()
        if free is not None and more > free:
            raise MemoryError(
                f"{self._where}: the features do not fit into memory: {_size(self._kept.nbytes)} are there, and "
                f"{_size(free)} are free. Keep them in files: {_CACHE}."
            )
        self._kept.resize((rows, p), refcheck=False)  # moves no bytes where the system can map them elsewhere

    def _spill(self, needed: int | None) -> None:
        """Move what memory holds into a file."""
        directory = tempfile.gettempdir()
        free = shutil.disk_usage(directory).free
        if needed is not None and needed > free:
            raise OSError(self._no_room(needed, f"{_size(free)} are free"))
        self._file = tempfile.TemporaryFile(dir=directory, buffering=0)  # noqa: SIM115  (closed by `close`)
        self._write(self._kept[: self._rows], needed)
        self._kept = self._kept[:0].copy()

    def _write(self, X: np.ndarray, needed: int | None) -> None:
        assert self._file is not None
        content = np.ascontiguousarray(X).reshape(-1).data.cast("B")
        try:
            while content:
                content = content[self._file.write(content) :]
        except OSError as error:
            raise OSError(
                error.errno, self._no_room(needed, f"{error.strerror} after {_size(self._file.tell())}")
            ) from error

    def _no_room(self, needed: int | None, why: str) -> str:
        need = "more than that" if needed is None else f"about {_size(needed)}"
        return (
            f"{self._where}: the features are more than memory should hold ({_size(self._most or 0)}; `max_bytes` of "
            f"cf.Cronos changes it), and the temporary directory {tempfile.gettempdir()} has no room for them: {why}, "
            f"and they need {need}. Let TMPDIR name a directory with room, or keep the features: {_CACHE}."
        )

    def all(self) -> np.ndarray:
        """All rows: an array, or a ``np.memmap`` of the file."""
        if self._file is None:
            self._kept.resize((self._rows, self._kept.shape[1]), refcheck=False)
            return self._kept
        return np.memmap(self._file, self._kept.dtype, "r", shape=(self._rows, self._kept.shape[1]))

    def close(self) -> None:
        """Let go of the file; an array of :meth:`all` holds it as long as it needs it."""
        if self._file is not None:
            self._file.close()


_CACHE = (
    "features = cf.gather_features(head, variables, data, cache=DIRECTORY), then fit_head(head, variables, features)"
)


def reorder(X: np.ndarray, order: np.ndarray) -> None:
    """``X[:] = X[order]``, some columns at a time, so that little memory is taken."""
    width = max(_FEW_COLUMNS, _STEP // max(1, len(X) * X.itemsize))
    for start in range(0, X.shape[1], width):
        X[:, start : start + width] = X[order, start : start + width]


def release(X: np.ndarray) -> None:
    """Unmap what has been read of a mapped file: it stays in the system's cache, but is no memory of this process."""
    mapping: Any = getattr(X, "_mmap", None)
    if hasattr(mapping, "madvise"):
        mapping.madvise(mmap.MADV_DONTNEED)


def _size(size: int) -> str:
    return f"{size / 1e9:,.2f} GB" if size >= 1e8 else f"{size / 1e6:,.2f} MB"
