"""The rows of a feature pass, batch by batch and all together, and where they are kept."""

from collections.abc import Iterable
from typing import Any, NamedTuple, Protocol

import numpy as np
from jax.sharding import Mesh

from cronos_flax._head.data import Batch
from cronos_flax._head.norms import Population


class GatheredRows(NamedTuple):
    """The rows of a fit.

    Args:
        X: features ``(n, p)``.
        y: labels ``(n,)`` or targets ``(n, C)``.
        weight: ``(n,)``, positive; None if all are equal.
        finite: whether all features are finite.
        order: where the n rows are in X, y and weight, if these lie on several devices and are filled up with rows of
            weight zero; None for 0 … n − 1.
        mesh: the devices that features came on, then; None for arrays in host memory or in files.
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
        rows: sorted, as the module's docstring says.
        order: ``(n,)``; row i is number ``order[i]`` of the rows of positive weight as they came.
        moments: mean and variance of the batch norms by path, over all rows.
    """

    rows: GatheredRows
    order: np.ndarray
    moments: dict[tuple, tuple[np.ndarray, np.ndarray]]


class Store(Protocol):
    """Where the rows of a pass are kept, batch by batch."""

    def held(self, number: int, batch: Batch) -> int | None:
        """How many rows batch ``number`` has left in an earlier pass; None if it has not been passed yet."""

    def compare(self, piece: Piece) -> None:
        """Raise a ValueError unless the first batch, passed again, gives what is there."""

    def add(self, batch: Batch, piece: Piece) -> None:
        """Keep what the next batch has left."""

    def joined(self, count: int) -> Gathered:
        """All rows, of so many batches."""


class Collected:
    """What stores share that keep nothing beyond the process: the pieces, as they came."""

    def __init__(self) -> None:
        self._pieces: list[GatheredRows] = []
        self._population = Population()

    def held(self, number: int, batch: Batch) -> None:
        """Nothing is there from an earlier pass."""
        del number, batch

    def compare(self, piece: Piece) -> None:
        """There is nothing to compare with."""

    def add(self, batch: Batch, piece: Piece) -> None:
        """Keep the rows."""
        del batch
        self._pieces.append(piece.rows)
        self._population.add(piece.norms, piece.passed)


class InMemory(Collected):
    """Rows in host memory."""

    def joined(self, count: int) -> Gathered:
        """All rows; each piece is released as soon as it is copied."""
        del count
        pieces = self._pieces
        n, p, dtype = sum(len(piece.X) for piece in pieces), pieces[0].X.shape[1], pieces[0].X.dtype
        order = sorted_by_target(pieces)
        place = np.empty(n, int)
        place[order] = np.arange(n)
        whole = GatheredRows(
            np.empty((n, p), dtype),
            np.empty((n, *pieces[0].y.shape[1:]), np.result_type(*(piece.y for piece in pieces))),
            None if pieces[0].weight is None else np.empty(n, dtype),
            all(piece.finite for piece in pieces),
        )
        start = 0
        while pieces:
            piece = pieces.pop(0)
            to = place[start : start + len(piece.X)]
            whole.X[to], whole.y[to] = piece.X, piece.y
            if whole.weight is not None:
                whole.weight[to] = piece.weight
            start += len(piece.X)
        return Gathered(whole, order, self._population.moments if whole.finite else {})


def sorted_by_target(pieces: Iterable[GatheredRows]) -> np.ndarray:
    """The order of all rows that the module's docstring speaks of; the pieces are read once, one at a time."""
    first, along = [], []
    for piece in pieces:
        first.append(piece.y if piece.y.ndim == 1 else piece.y[:, 0])
        along.append(piece.X @ direction(piece.X.shape[1], piece.X.dtype))
    return np.lexsort((np.concatenate(along), np.concatenate(first)))


def direction(columns: int, dtype: Any) -> np.ndarray:
    """The direction that rows of one target are sorted along, of so many features."""
    return np.asarray(np.random.default_rng(0).normal(size=columns), dtype)
