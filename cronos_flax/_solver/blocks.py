"""Features that need not fit into memory: a matrix known by its products, accumulated block by block.

A :class:`Blocks` has what the solver asks of a matrix X: ``X @ U``, :func:`adjoint`, some of its rows, and folds over
its rows. The blocks are read from the host anew for each of these, one at a time; while the device computes with one, a
thread reads the next.
"""

import dataclasses
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from cronos_flax._solver import host
from cronos_flax._solver.transfer import has_x64
from cronos_flax._solver.types import RowVector, Scalar

_ROWS, _BYTES = 8192, 2**26  # at most, of the blocks as they are computed with, however they come
_COMPARED, _SAME = 16, 1e-2  # rows of a piece that are compared; by what share of their largest entry they may differ

Carry = TypeVar("Carry")


class Source:
    """A re-iterable of arrays ``(nᵢ, p)``, read in order and cut into pieces of equal length.

    Args:
        blocks: the re-iterable; it is read by one thread at a time.
        shape: ``(n, p)`` of the whole.
        dtype: of the pieces.
        known_finite: whether the caller has looked at the values already, and they cannot change.
    """

    def __init__(
        self, blocks: Iterable[Any], shape: tuple[int, int], dtype: np.dtype, known_finite: bool = False
    ) -> None:
        self._blocks, self.shape, self.dtype, self._known_finite = blocks, shape, dtype, known_finite
        self.rows = min(_ROWS, shape[0], max(1, _BYTES // max(1, shape[1] * dtype.itemsize)))
        self._lock = threading.Lock()
        self._seen: dict[int, np.ndarray] = {}  # some rows of each piece
        self._next, self._pieces = 0, self._cut()
        self._reader, self._ahead, self._x64 = ThreadPoolExecutor(1), _nothing(), has_x64()

    def _pass(self) -> Iterator[np.ndarray]:
        """The blocks, which may be others than those of the first pass."""
        rows = 0
        for block in map(np.asarray, self._blocks):
            if not (self._known_finite or np.all(np.isfinite(block))):
                raise self._others("NaN or infinite entries in a later one")
            rows += len(block)
            if rows > self.shape[0]:
                raise self._others(f"more than {self.shape[0]} rows in a later one")
            yield block
        if rows < self.shape[0]:
            raise self._others(f"{rows} rows in a later one, of {self.shape[0]}")

    def _others(self, what: str) -> ValueError:
        return ValueError(
            f"solve: the blocks of `X` must hold the same finite rows at every pass, got {what}. Look at what reads "
            "them: it must not shuffle, or change the rows."
        )

    def _compare(self, index: int, piece: np.ndarray) -> None:
        """Raise a ValueError if some rows of a piece are not those that it had when it was first read.

        Rows that are computed anew differ by rounding, and are the same.
        """
        if self._known_finite:
            return
        some = piece[:: max(1, self.rows // _COMPARED)]
        before = self._seen.setdefault(index, some.copy())
        if np.max(np.abs(some - before), initial=0) > _SAME * np.max(np.abs(before), initial=0):
            raise self._others("other rows, or the same in another order, in a later one")

    def _cut(self) -> Iterator[np.ndarray]:
        """Pieces of ``rows`` rows; the last one is filled up with zeros."""
        for index, piece in enumerate(self._pieces_of_pass()):
            self._compare(index, piece)
            yield piece

    def _pieces_of_pass(self) -> Iterator[np.ndarray]:
        piece, filled = np.zeros((self.rows, self.shape[1]), self.dtype), 0
        for block in self._pass():
            start = 0
            while start < len(block):
                part = block[start : start + self.rows - filled]
                piece[filled : filled + len(part)] = part
                start, filled = start + len(part), filled + len(part)
                if filled == self.rows:
                    yield piece
                    piece, filled = np.zeros_like(piece), 0
        if filled:
            yield piece

    def piece(self, index: int) -> np.ndarray:
        """Piece number ``index``; cheap in order, for the one that comes next is read while this one is used."""
        with self._lock:
            if index < self._next:
                wait([self._ahead])
                self._next, self._pieces, self._ahead = 0, self._cut(), _nothing()
            piece = None
            while self._next <= index:
                ahead, self._ahead = self._ahead.result(), _nothing()
                piece = self._read() if ahead is None else ahead
                self._next += 1
            assert piece is not None
            if self._next * self.rows < self.shape[0]:
                self._ahead = self._reader.submit(self._read)
            return piece

    def _read(self) -> np.ndarray:
        with jax.enable_x64(self._x64):  # blocks may be made by JAX, and this may be another thread than the caller's
            for piece in self._pieces:
                return piece
        raise self._others(f"fewer than {self.shape[0]} rows in a later one")

    def take(self, index: np.ndarray) -> np.ndarray:
        """Single rows, in one pass."""
        out, order = np.empty((len(index), self.shape[1]), self.dtype), np.argsort(index)
        start, done = 0, 0
        with self._lock:
            wait([self._ahead])
            for block in self._pass():
                end = done + int(np.searchsorted(index[order[done:]], start + len(block)))
                out[order[done:end]] = block[index[order[done:end]] - start]
                start, done = start + len(block), end
        return out

    def close(self) -> None:
        """Wait for what is being read; nothing is read after this."""
        self._reader.shutdown()


def _nothing() -> "Future[np.ndarray | None]":
    """A piece that has not been read ahead."""
    nothing: Future[np.ndarray | None] = Future()
    nothing.set_result(None)
    return nothing


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["number", "scale", "root", "rotation"],
    meta_fields=["rows", "columns", "piece", "dtype", "hidden_bias"],
)
@dataclasses.dataclass(frozen=True)
class Blocks:
    """A matrix with the rows ``rootⱼ (xⱼ/scale, 1) rotation`` of a source of raw rows ``xⱼ``.

    Args:
        number: of the :class:`Source`, while it is open.
        rows: n.
        columns: p, of the raw rows.
        piece: rows that are read at a time.
        dtype: of everything.
        scale: None for 1.
        root: shape ``(n,)``; None for ones.
        rotation: None for the identity.
        hidden_bias: whether the constant column is there.
    """

    number: Int[Array, ""]
    rows: int
    columns: int
    piece: int
    dtype: Any
    scale: Scalar | None = None
    root: RowVector | None = None
    rotation: Float[Array, "d d"] | None = None
    hidden_bias: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """``(n, d)``."""
        return self.rows, self.columns + self.hidden_bias

    def __matmul__(self, U: Float[Array, "d k"]) -> Float[Array, "n k"]:
        """``X @ U``."""
        U = U if self.rotation is None else self.rotation @ U
        count = -(-self.rows // self.piece)
        out = jax.lax.map(lambda i: self._read(i) @ U, jnp.arange(count, dtype=jnp.int32))
        out = out.reshape(count * self.piece, -1)[: self.rows]
        return out if self.root is None else self.root[:, None] * out

    def __getitem__(self, index: Int[Array, " k"]) -> Float[Array, "k d"]:
        """Some of the rows, in memory."""
        raw = self._fetch(_take, index, index.shape[0])
        root = None if self.root is None else self.root[index]
        return self._finish(self._extend(raw), root)

    def fold(self, step: Callable[..., Carry], start: Carry, *of_rows: Array) -> Carry:
        """``step(carry, X piece, pieces of the arrays of_rows)`` over all pieces; rows past the end are zero."""
        count = -(-self.rows // self.piece)
        past = count * self.piece - self.rows

        def pieces(array: Array) -> Array:
            padded = jnp.pad(array, [(0, past), *[(0, 0)] * (array.ndim - 1)])
            return padded.reshape(count, self.piece, *array.shape[1:])

        root = jnp.ones(self.rows, self.dtype) if self.root is None else self.root

        def body(carry: Carry, inputs: tuple) -> tuple[Carry, None]:
            index, root, rest = inputs
            return step(carry, self._finish(self._read(index), root), *rest), None

        indices = jnp.arange(count, dtype=jnp.int32)
        return jax.lax.scan(body, start, (indices, pieces(root), tuple(map(pieces, of_rows))))[0]

    def _read(self, index: Int[Array, ""]) -> Float[Array, "k d"]:
        """A piece, not yet weighted and rotated."""
        return self._extend(self._fetch(_piece, index, self.piece))

    def _fetch(self, call: Callable, index: Array, rows: int) -> Float[Array, "k p"]:
        """Raw rows; as bits, since callbacks run in a thread where the caller's ``jax.enable_x64`` does not hold."""
        words = jnp.dtype(self.dtype).itemsize // 4
        shape = jax.ShapeDtypeStruct((rows, self.columns, words), jnp.uint32)
        bits = jax.pure_callback(call, shape, self.number, index)
        return jax.lax.bitcast_convert_type(bits if words > 1 else bits[..., 0], self.dtype)

    def _extend(self, raw: Float[Array, "k p"]) -> Float[Array, "k d"]:
        X = raw if self.scale is None else raw / self.scale
        return jnp.concatenate([X, jnp.ones_like(X[:, :1])], axis=1) if self.hidden_bias else X

    def _finish(self, X: Float[Array, "k d"], root: Float[Array, " k"] | None) -> Float[Array, "k d"]:
        X = X if root is None else root[:, None] * X
        return X if self.rotation is None else X @ self.rotation


def fold(X: Array | Blocks, step: Callable[..., Carry], start: Carry, *of_rows: Array) -> Carry:
    """:meth:`Blocks.fold`, also for a matrix in memory."""
    return X.fold(step, start, *of_rows) if isinstance(X, Blocks) else step(start, X, *of_rows)


def adjoint(X: Array | Blocks, R: Float[Array, "n k"]) -> Float[Array, "d k"]:
    """``Xᵀ R``.

    If R is the narrower one, made as ``(Rᵀ X)ᵀ``: XLA's product for the CPU is 1.5 to 3 times as fast with the narrow
    matrix on the left, and twenty times if that has one row (docs/benchmarks/transposed.py). The barrier keeps
    it from exchanging the two again.
    """
    if isinstance(X, Blocks):
        start = jnp.zeros((X.shape[1], R.shape[1]), R.dtype)
        return X.fold(lambda total, X, R: total + adjoint(X, R), start, R)
    return X.T @ R if X.shape[1] <= R.shape[1] else jax.lax.optimization_barrier(R.T @ X).T


def _piece(number: Array, index: Array) -> np.ndarray:
    return _bits(host.called(number, lambda source: source.piece(int(index))))


def _take(number: Array, index: Array) -> np.ndarray:
    return _bits(host.called(number, lambda source: source.take(np.asarray(index))))


def _bits(array: np.ndarray) -> np.ndarray:
    return array.view(np.uint32).reshape(*array.shape, -1)
