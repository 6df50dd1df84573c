"""One pass over the user's batches: the head's input for every row, with its target and its weight.

Only features are kept, in host memory or in files: a batch is released after its pass through the backbone. Rows of
weight zero (masked tokens) are dropped. The rows that :func:`gather` returns are sorted by target, and then along a
fixed random direction. So a fit does not depend on the order of the batches, and a sample of consecutive stretches of
rows has its share of every class.
"""

import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp
import numpy as np
from jax import Array

from cronos_flax._head.data import Batch, Unpack, batches, flat_targets, flat_weight
from cronos_flax._head.fingerprint import Fingerprint
from cronos_flax._head.norms import Moments, Population
from cronos_flax._solver.checks import positive_integer
from cronos_flax._solver.transfer import on_host

# From positional and keyword arguments to the head's input (..., p) and the statistics of batch norms.
Pass = Callable[[tuple, Mapping], tuple[Array, tuple[Moments, ...]]]
_BLOCK = 65_536  # rows of a block, where features are read in blocks


class GatheredRows(NamedTuple):
    """The rows of a fit.

    Args:
        X: features ``(n, p)``.
        y: labels ``(n,)`` or targets ``(n, C)``.
        weight: ``(n,)``, positive; None if all are equal.
        finite: whether all features are finite.
    """

    X: np.ndarray
    y: np.ndarray
    weight: np.ndarray | None
    finite: bool


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
        X, y, weight, _ = self.rows
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


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Features:
    """The head's input for all rows of some data, with their targets: made by :func:`cronos_flax.gather_features`.

    It stands for ``data`` wherever a head is solved for: in ``fit_head`` and in ``solve_head``, of linen and NNX. Such
    a fit costs the solve only. It is refused for a backbone other than that of the features; the head may be another.

    Attributes:
        X: features, shape ``(n, p)``; a ``np.memmap``, which is read as it is used, if there is a cache.
        y: labels ``(n,)`` or targets ``(n, C)``.
        weight: ``(n,)``, positive; None if all are equal.
        order: ``(n,)``: row i is number ``order[i]`` of the rows of positive weight, in the order in which they came.
            Rows here are sorted by target.
        finite: whether all features are finite.
        backbone: what tells the backbone from others.
        moments: mean and variance of batch norms over all rows, by path, for features of batch statistics.

    Example:
        See :func:`cronos_flax.gather_features`.
    """

    X: np.ndarray
    y: np.ndarray
    weight: np.ndarray | None
    order: np.ndarray
    finite: bool
    backbone: Fingerprint
    moments: Mapping[tuple, tuple[np.ndarray, np.ndarray]]

    @property
    def rows(self) -> GatheredRows:
        """The rows of a fit."""
        return GatheredRows(self.X, self.y, self.weight, self.finite)

    def take(self, rows: np.ndarray) -> "Features":
        """Some of the rows, in memory: for few-shot draws and cross-validation.

        Args:
            rows: their indices into ``X``, in any order and each at most once, or a mask ``(n,)`` of bools. For rows
                of the data as they came: ``np.isin(features.order, rows)``.

        Raises:
            ValueError: for anything else, and for no row at all.
        """
        n, given = len(self.X), np.asarray(rows)
        index = np.flatnonzero(given) if given.dtype == bool and given.shape == (n,) else given
        chosen = np.unique(index)
        is_index = index.ndim == 1 and index.size > 0 and index.dtype.kind in "iu" and len(chosen) == len(index)
        if not is_index or chosen[0] < 0 or chosen[-1] >= n:
            raise ValueError(
                f"take: `rows` must be at least one index in [0, {n}), each at most once, or a mask of {n} bools, got "
                f"{given!r}."
            )
        X, weight = np.asarray(self.X[chosen]), None if self.weight is None else self.weight[chosen]
        finite = self.finite or bool(np.all(np.isfinite(X)))
        return dataclasses.replace(self, X=X, y=self.y[chosen], weight=weight, order=self.order[chosen], finite=finite)

    def blocks(self, rows: int = _BLOCK) -> list[np.ndarray]:
        """X as consecutive blocks of so many rows, for ``Cronos.solve``: then X is never in memory as a whole."""
        positive_integer("blocks", "rows", rows)
        return in_blocks(self.X, rows)

    def __str__(self) -> str:
        where = f" in {self.X.filename}" if isinstance(self.X, np.memmap) else ""
        weights = "" if self.weight is None else ", weighted"
        return f"Features: {len(self.X):,} rows of {self.X.shape[1]:,} {self.X.dtype}{weights}{where}"

    __repr__ = __str__


def in_blocks(X: np.ndarray, rows: int = _BLOCK) -> list[np.ndarray]:
    """Views of consecutive rows."""
    return [X[i : i + rows] for i in range(0, len(X), rows)]


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


def gather(
    tap: Pass,
    outputs: int,
    data: Any,
    unpack: Unpack | None,
    callback: Callable[[dict[str, float]], Any] | None,
    shuffled: bool = False,
    where: str = "fit_head",
    store: Store | None = None,
) -> Gathered:
    """All rows of ``data``.

    Args:
        tap: gives the head's input for one batch, and what its batch norms saw.
        outputs: the head's number of outputs C, which the targets must fit.
        data: as for :func:`cronos_flax.fit_head`.
        unpack: as for :func:`cronos_flax.fit_head`.
        callback: called after every batch with ``rows`` (so far) and ``seconds``.
        shuffled: whether batches of whole arrays are of random rows: statistics of a batch need rows of all classes.
        where: the caller's name, for messages.
        store: where to keep rows; None for memory.

    Raises:
        ValueError: for data that do not fit the module, or each other.
    """
    if callback is not None and not callable(callback):
        raise ValueError(f"{where}: `callback` must be a function of one dict, got {callback!r}.")
    store = InMemory() if store is None else store
    start, rows, count = time.perf_counter(), 0, 0
    pending: tuple[tuple[Array, tuple[Moments, ...]], Batch] | None = None
    form: dict[str, Any] | None = None

    def piece_of(seen: tuple[Array, tuple[Moments, ...]], batch: Batch) -> Piece:
        nonlocal form
        features, norms = seen
        moments = {each.norm.path: on_host((each.mean, each.var)) for each in norms}
        piece = Piece(_rows(features, batch, outputs, where), moments, features.size // features.shape[-1])
        form = piece.form if form is None else form
        if form["weight"] != piece.form["weight"]:
            raise ValueError(f"{where}: `unpack` must return a weight for every batch or for none.")
        if form["y"][1] != piece.form["y"][1]:
            raise ValueError(f"{where}: the targets must be labels in every batch, or have one value for each output.")
        return piece

    def tell(more: int) -> None:
        nonlocal rows
        rows += more
        if callback is not None:
            callback({"rows": rows, "seconds": time.perf_counter() - start})

    def finish(seen: tuple[Array, tuple[Moments, ...]], batch: Batch) -> None:
        piece = piece_of(seen, batch)
        store.add(batch, piece)
        tell(len(piece.rows.X))

    for batch in batches(data, unpack, where, shuffled=shuffled):
        count += 1
        if (known := store.held(count - 1, batch)) is not None:
            if count == 1:
                store.compare(piece_of(tap(batch.args, batch.kwargs), batch))
            tell(known)
            continue
        seen = tap(batch.args, batch.kwargs)
        if pending is not None:  # copied to the host while the device works on this batch
            finish(*pending)
        pending = seen, batch
    if not count:
        raise ValueError(f"{where}: `data` must have at least one batch with a row of positive weight, got none.")
    if pending is not None:
        finish(*pending)
    return store.joined(count)


def _rows(features: Array, batch: Batch, outputs: int, where: str) -> GatheredRows:
    """A batch in host memory, leading axes flattened, without the rows of weight zero."""
    leading, p = features.shape[:-1], features.shape[-1]
    X = np.asarray(on_host(features), jnp.promote_types(features.dtype, jnp.float32)).reshape(-1, p)
    y, weight = flat_targets(batch.y, leading, outputs, where), None
    if batch.weight is not None:
        weight = flat_weight(batch.weight, leading, where).astype(X.dtype)
        counts = weight != 0
        X, y, weight = X[counts], y[counts], weight[counts]
    return GatheredRows(X, y, weight, bool(np.all(np.isfinite(X))))


class InMemory:
    """Rows in host memory."""

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
    direction: np.ndarray | None = None
    for piece in pieces:
        if direction is None:
            direction = np.asarray(np.random.default_rng(0).normal(size=piece.X.shape[1]), piece.X.dtype)
        first.append(piece.y if piece.y.ndim == 1 else piece.y[:, 0])
        along.append(piece.X @ direction)
    return np.lexsort((np.concatenate(along), np.concatenate(first)))
