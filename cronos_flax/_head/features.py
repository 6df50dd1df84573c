"""One pass over the user's batches: the head's input for every row, with its target and its weight.

Only features are kept, in host memory or in files: a batch is released after its pass through the backbone. Rows of
weight zero (masked tokens) are dropped. The rows that :func:`gather` returns are sorted by target, and then along a
fixed random direction. So a fit does not depend on the order of the batches, and a sample of consecutive stretches of
rows has its share of every class.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from cronos_flax._head.data import Batch, UserData, flat_targets, flat_weight, length_said
from cronos_flax._head.fingerprint import Fingerprint
from cronos_flax._head.norms import Moments
from cronos_flax._head.room import release
from cronos_flax._head.rows import Gathered, GatheredRows, InMemory, Piece, Store
from cronos_flax._head.spread import OverDevices
from cronos_flax._solver.blocks import Source
from cronos_flax._solver.checks import positive_integer
from cronos_flax._solver.meshes import mesh_of
from cronos_flax._solver.processes import on_first
from cronos_flax._solver.transfer import on_host

Seen = tuple[Array, tuple[Moments, ...]]  # the head's input (..., p) for a batch, and the statistics of batch norms
Pass = Callable[[Batch], Seen]
_BLOCK = 65_536  # rows of a block, where features are read in blocks
_READ = 2**24  # bytes of a file that are mapped at a time


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Features:
    """The head's input for all rows of some data, with their targets: made by :func:`cronos_flax.gather_features`.

    It stands for ``data`` wherever a head is solved for: in ``fit_head`` and in ``solve_head``, of linen and NNX. Such
    a fit costs the solve only. It is refused for a backbone with other parameters than that of the features; the head
    may be another. Other code with the same parameters is noticed by the names of its operations, such as tanh;
    ``gather_features`` with a ``cache`` compares numbers.

    Attributes:
        X: features, shape ``(n, p)``; a ``np.memmap``, which is read as it is used, if there is a cache.
        y: labels ``(n,)`` or targets ``(n, C)``.
        weight: ``(n,)``, positive; None if all are equal.
        order: ``(n,)``: row i is number ``order[i]`` of the rows of positive weight, in the order in which they came.
            Rows here are sorted by target.
        finite: whether all features are finite.
        backbone: what tells the backbone from others.
        moments: mean and variance of batch norms over all rows, by path, for features of batch statistics.
        operations: what the backbone is made of, by name.

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
    operations: Mapping[str, int]

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
        file = getattr(self.X, "filename", None)  # an array that was pickled has none
        where = "" if file is None else f" in {file}"
        weights = "" if self.weight is None else ", weighted"
        return f"Features: {len(self.X):,} rows of {self.X.shape[1]:,} {self.X.dtype}{weights}{where}"

    __repr__ = __str__


def in_blocks(X: np.ndarray, rows: int = _BLOCK) -> list[np.ndarray]:
    """Views of consecutive rows."""
    return [X[i : i + rows] for i in range(0, len(X), rows)]


class FromFile:
    """Consecutive rows of a mapped file, read anew at each pass; what has been read is not kept mapped.

    Args:
        X: the features.
    """

    def __init__(self, X: np.memmap) -> None:
        self._X = X

    def __iter__(self) -> Iterator[np.ndarray]:
        for block in in_blocks(self._X, max(1, _READ // (self._X.shape[1] * self._X.itemsize))):
            yield block
            release(self._X)


def as_source(X: np.ndarray) -> Source:
    """The source of a solve in blocks on finite features."""
    blocks: Any = FromFile(X) if isinstance(X, np.memmap) else in_blocks(X)
    return Source(blocks, X.shape, jax.dtypes.canonicalize_dtype(X.dtype), known_finite=True)


def gather(
    tap: Pass,
    outputs: int,
    data: UserData,
    *,
    callback: Callable[[dict[str, float]], Any] | None,
    shuffled: bool = False,
    store: Store | None = None,
    most_bytes: int | None = None,
) -> Gathered:
    """All rows of ``data``.

    Args:
        tap: gives the head's input for one batch, and what its batch norms saw.
        outputs: the head's number of outputs C, which the targets must fit.
        data: the data.
        callback: called after every batch with ``rows`` (so far) and ``seconds``.
        shuffled: whether batches of whole arrays are of random rows: statistics of a batch need rows of all classes.
        store: where to keep rows; None for host memory or, of features on several devices, for these.
        most_bytes: of features that host memory holds if ``store`` is None; more are in a temporary file. None for as
            many as there are.

    Raises:
        ValueError: for data that do not fit the module, or each other.
        MemoryError: if memory does not hold the features.
        OSError: if the disk does not hold them.
    """
    if callback is not None and not callable(callback):
        raise ValueError(f"{data.where}: `callback` must be a function of one dict, got {callback!r}.")
    return _Gathering(tap, outputs, data, on_first(callback), store, most_bytes).run(shuffled)


class _Gathering:
    """A pass over the data under way; the arguments are those of :func:`gather`."""

    def __init__(
        self,
        tap: Pass,
        outputs: int,
        data: UserData,
        callback: Callable[[dict[str, float]], Any] | None,
        store: Store | None,
        most_bytes: int | None,
    ) -> None:
        self._tap, self._outputs, self._data, self._callback = tap, outputs, data, callback
        self._store, self._most_bytes = store, most_bytes
        self._form: dict[str, Any] | None = None  # that all batches have
        self._start, self._rows, self._progress = time.perf_counter(), 0, Progress(data)

    def run(self, shuffled: bool) -> Gathered:
        """Pass all batches, but those that the store has."""
        count = 0
        pending: tuple[Seen, Batch] | None = None
        try:
            for batch in self._data.batches(shuffled):
                count += 1
                left = None if self._store is None else self._store.rows_left(count - 1, batch)
                if self._store is not None and left is not None:
                    if count == 1:
                        self._store.compare(self._piece_of(self._tap(batch), batch))
                    self._tell(left)
                    continue
                seen = self._tap(batch)
                if pending is not None:  # copied to the host while the device works on this batch
                    self._keep(*pending)
                pending = seen, batch
            if not count:
                raise self._data.empty()
            if pending is not None:
                self._keep(*pending)
            assert self._store is not None
            return self._store.joined(count)
        finally:
            if self._store is not None:
                self._store.close()

    def _keep(self, seen: Seen, batch: Batch) -> None:
        piece = self._piece_of(seen, batch)
        assert self._store is not None
        self._store.add(batch, piece, self._progress.share(batch))
        self._tell(len(piece.rows.X))

    def _piece_of(self, seen: Seen, batch: Batch) -> Piece:
        """What is kept of a batch; the first one decides where, and what form all must have."""
        features, norms = seen
        place, leading, weight = self._data.place, features.shape[:-1], None
        if self._store is None:
            mesh = mesh_of(features)
            self._store = InMemory(self._most_bytes, self._data.where) if mesh is None else OverDevices(mesh)
        moments = {each.norm.path: on_host((each.mean, each.var)) for each in norms}
        y = flat_targets(batch.y, leading, self._outputs, place)
        if batch.weight is not None:
            weight = flat_weight(batch.weight, leading, place)
        store = self._store
        rows = store.part(features, y, weight) if isinstance(store, OverDevices) else _on_host(features, y, weight)
        piece = Piece(rows, moments, features.size // features.shape[-1])
        self._form = piece.form if self._form is None else self._form
        if self._form["weight"] != piece.form["weight"]:
            raise ValueError(f"{place}: `unpack` must return a weight for every batch or for none.")
        if self._form["y"][1] != piece.form["y"][1]:
            raise ValueError(f"{place}: the targets must be labels in every batch, or have one value for each output.")
        return piece

    def _tell(self, more: int) -> None:
        self._rows += more
        if self._callback is not None:
            self._callback({"rows": self._rows, "seconds": time.perf_counter() - self._start})


class Progress:
    """Which part of the data has been passed.

    Args:
        data: whole arrays, or batches, perhaps with a length.
    """

    def __init__(self, data: UserData) -> None:
        self._whole, given = data.is_arrays, data.given
        sized = given[1] if self._whole else given
        self._passed, self._all = 0, 0 if isinstance(given, Mapping) else length_said(sized)

    def share(self, batch: Batch) -> float | None:
        """The part when this batch is passed too; None if the data do not say how many they are."""
        self._passed += len(batch.y) if self._whole else 1
        return None if not self._all else min(self._passed / self._all, 1.0)


def _on_host(features: Array, y: np.ndarray, weight: np.ndarray | None) -> GatheredRows:
    """A batch in host memory, leading axes flattened, without the rows of weight zero."""
    dtype = jnp.promote_types(features.dtype, jnp.float32)
    X = np.asarray(on_host(features), dtype).reshape(-1, features.shape[-1])
    if weight is not None:
        weight = weight.astype(X.dtype)
        counts = weight != 0
        X, y, weight = X[counts], y[counts], weight[counts]
    return GatheredRows(X, y, weight, bool(np.all(np.isfinite(X))))
