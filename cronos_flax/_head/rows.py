"""The rows of a feature pass, batch by batch and all together, and where they are kept.

All together they are sorted by target (by the first value of several), and rows of one target along a fixed random
direction.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple, Protocol

import numpy as np
from jax.sharding import Mesh

from cronos_flax._head.data import Batch
from cronos_flax._head.norms import Population
from cronos_flax._head.room import Room, reorder


class GatheredRows(NamedTuple):
    """The rows of a fit.

    Args:
        X: features ``(n, p)``.
        y: labels ``(n,)`` or targets ``(n, C)``.
        weight: ``(n,)``, positive; None if all are equal.
        finite: whether all features are finite.
        order: where the n rows are in X, y and weight, if these are in a temporary file, as they came, or lie on
            several devices and are filled up with rows of weight zero; None for 0 … n − 1.
        mesh: the devices that features came on; None for arrays in host memory or in files.
    """

    X: Any
    y: Any
    weight: Any
    finite: bool
    order: np.ndarray | None = None
    mesh: Mesh | None = None


class Piece(NamedTuple):
    """What a batch leaves.

    Args:
        rows: those of positive weight.
        norms: mean and variance that batch norms saw, by path.
        passed: the number of rows that they saw.
    """

    rows: GatheredRows
    norms: dict[tuple, tuple[np.ndarray, np.ndarray]]
    passed: int

    @property
    def form(self) -> dict[str, Any]:
        """What is the same for all batches: dtypes, and shapes of a row."""
        X, y, weight, *_ = self.rows
        return {
            "X": [str(X.dtype), list(X.shape[1:])],
            "y": [str(y.dtype), list(y.shape[1:])],
            "weight": weight is not None,
        }


class Gathered(NamedTuple):
    """All rows of some data.

    Args:
        rows: sorted, or with the ``order`` in which they are.
        order: ``(n,)``; row i is number ``order[i]`` of the rows of positive weight as they came.
        moments: mean and variance of the batch norms by path, over all rows.
    """

    rows: GatheredRows
    order: np.ndarray
    moments: dict[tuple, tuple[np.ndarray, np.ndarray]]


class Store(Protocol):
    """Where the rows of a pass are kept, batch by batch."""

    def rows_left(self, number: int, batch: Batch) -> int | None:
        """How many rows batch ``number`` has left in an earlier pass; None if it has not been passed yet."""

    def compare(self, piece: Piece) -> None:
        """Raise a ValueError unless the first batch, passed again, gives what is there."""

    def add(self, batch: Batch, piece: Piece, share: float | None) -> None:
        """Keep what the next batch has left; ``share`` is the part of all data that has been passed, if it is known."""

    def joined(self, count: int) -> Gathered:
        """All rows, of so many batches."""

    def close(self) -> None:
        """Let go of what is held; what has been joined stays."""


class Collected:
    """What stores share that keep nothing beyond the process: the pieces, as they came."""

    def __init__(self) -> None:
        self._pieces: list[GatheredRows] = []
        self._population = Population()

    def rows_left(self, number: int, batch: Batch) -> None:
        """Nothing is there from an earlier pass."""
        del number, batch

    def compare(self, piece: Piece) -> None:
        """There is nothing to compare with."""

    def add(self, batch: Batch, piece: Piece, share: float | None) -> None:
        """Keep the rows."""
        del batch, share
        self._pieces.append(piece.rows)
        self._population.add(piece.norms, piece.passed)

    def close(self) -> None:
        """Nothing is held that memory does not hold."""


class InMemory(Collected):
    """Rows in host memory, sorted; or, if that should not hold them, in a temporary file, as they came.

    Args:
        most: bytes of features that memory holds; None for as many as there are.
        where: the caller's name, for messages.
    """

    def __init__(self, most: int | None = None, where: str = "gather_features") -> None:
        super().__init__()
        self._room, self._along = Room(most, where), list[np.ndarray]()

    def add(self, batch: Batch, piece: Piece, share: float | None) -> None:
        """Keep the rows."""
        X = piece.rows.X
        self._room.add(X, share)
        self._along.append(along(X))
        super().add(batch, piece._replace(rows=piece.rows._replace(X=None)), share)

    def joined(self, count: int) -> Gathered:
        """All rows."""
        del count
        y = np.concatenate([piece.y for piece in self._pieces])
        weighted, finite = self._pieces[0].weight is not None, all(piece.finite for piece in self._pieces)
        order, X = ordered(y, np.concatenate(self._along)), self._room.all()
        weight = np.concatenate([piece.weight for piece in self._pieces]).astype(X.dtype) if weighted else None
        moments = self._population.moments if finite else {}
        if self._room.in_file:
            return Gathered(GatheredRows(X, y, weight, finite, order.astype(np.int32)), order, moments)
        reorder(X, order)
        return Gathered(GatheredRows(X, y[order], None if weight is None else weight[order], finite), order, moments)

    def close(self) -> None:
        """Let go of the file."""
        self._room.close()


def sorted_by_target(pieces: Iterable[GatheredRows]) -> np.ndarray:
    """The order of all rows; the pieces are read once, one at a time."""
    y, places = zip(*((piece.y, along(piece.X)) for piece in pieces), strict=True)
    return ordered(np.concatenate(y), np.concatenate(places))


def ordered(y: np.ndarray, places: np.ndarray) -> np.ndarray:
    """The order of rows with these targets, and these places along the direction."""
    return np.lexsort((places, y if y.ndim == 1 else y[:, 0]))


def along(X: np.ndarray) -> np.ndarray:
    """What rows of one target are sorted by."""
    return X @ direction(X.shape[1], X.dtype)


def direction(columns: int, dtype: Any) -> np.ndarray:
    """The direction that rows of one target are sorted along, of so many features."""
    return np.asarray(np.random.default_rng(0).normal(size=columns), dtype)
