"""One pass over the user's batches: the head's input for every row, with its target and its weight.

Only features are kept, in host memory: a batch is released after its pass through the backbone. Rows of weight zero
(masked tokens) are dropped. The rows that :func:`gather` returns are sorted by target, and then along a fixed random
direction. So a fit does not depend on the order of the batches, and a sample of consecutive stretches of rows has its
share of every class.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

_CHUNK_BYTES, _LEAST_CHUNK, _MOST_CHUNK = 16 << 20, 16, 1024  # bytes and rows of whole arrays in one pass

Tap = Callable[[tuple, Mapping], Array]  # from positional and keyword arguments to the head's input (..., p)
Unpack = Callable[[Any], tuple]


class Batch(NamedTuple):
    """The module's arguments, the targets and the weights; the last two are copies, as loaders reuse their buffers."""

    args: tuple
    kwargs: Mapping[str, Any]
    y: np.ndarray
    weight: np.ndarray | None

    @classmethod
    def of(cls, args: tuple, kwargs: Mapping[str, Any], y: Any, weight: Any = None) -> Self:
        """A batch with targets and weights as arrays of numbers."""
        return cls(args, kwargs, _numbers("targets", y), None if weight is None else _numbers("`weight`", weight))


def _numbers(name: str, value: Any) -> np.ndarray:
    """A copy of an array of numbers."""
    try:
        array = np.array(value)
    except ValueError as error:  # ragged
        raise ValueError(
            f"fit_head: the {name} must be an array of numbers, got {type(value).__name__}: {error}"
        ) from None
    if array.dtype.kind not in "biuf" and not jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(f"fit_head: the {name} must be numbers, got dtype {array.dtype}.")
    return array


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


def gather(
    tap: Tap, outputs: int, data: Any, unpack: Unpack | None, callback: Callable[[dict[str, float]], Any] | None
) -> GatheredRows:
    """All rows of ``data``.

    Args:
        tap: gives the head's input for one batch.
        outputs: the head's number of outputs C, which the targets must fit.
        data: as for :func:`cronos_flax.fit_head`.
        unpack: as for :func:`cronos_flax.fit_head`.
        callback: called after every batch with ``rows`` (so far) and ``seconds``.

    Raises:
        ValueError: for data that do not fit the module, or each other.
    """
    if callback is not None and not callable(callback):
        raise ValueError(f"fit_head: `callback` must be a function of one dict, got {callback!r}.")
    if unpack is not None and not callable(unpack):
        raise ValueError(f"fit_head: `unpack` must be a function of one batch, got {unpack!r}.")
    pieces: list[GatheredRows] = []
    start, count = time.perf_counter(), 0
    pending: tuple[Array, Batch] | None = None

    def finish(features: Array, batch: Batch) -> None:
        nonlocal count
        pieces.append(_rows(features, batch, outputs))
        count += len(pieces[-1].X)
        if callback is not None:
            callback({"rows": count, "seconds": time.perf_counter() - start})

    for batch in batches(data, unpack):
        features = tap(batch.args, batch.kwargs)
        if pending is not None:  # copied to the host while the device works on this batch
            finish(*pending)
        pending = features, batch
    if pending is None:
        raise ValueError("fit_head: `data` must have at least one batch, got none.")
    finish(*pending)
    if len({piece.weight is None for piece in pieces}) > 1:
        raise ValueError("fit_head: `unpack` must return a weight for every batch or for none.")
    if len({piece.y.shape[1:] for piece in pieces}) > 1:
        raise ValueError("fit_head: the targets must be labels in every batch, or have one value for each output.")
    if not count:
        raise ValueError("fit_head: `data` must have at least one row of positive weight, got none.")
    return _joined(pieces)


def _rows(features: Array, batch: Batch, outputs: int) -> GatheredRows:
    """A batch in host memory, leading axes flattened, without the rows of weight zero."""
    leading, p = features.shape[:-1], features.shape[-1]
    X = np.asarray(features, jnp.promote_types(features.dtype, jnp.float32)).reshape(-1, p)
    y, weight = flat_targets(batch.y, leading, outputs), None
    if batch.weight is not None:
        weight = flat_weight(batch.weight, leading).astype(X.dtype)
        counts = weight != 0
        X, y, weight = X[counts], y[counts], weight[counts]
    return GatheredRows(X, y, weight, bool(np.all(np.isfinite(X))))


def flat_targets(y: np.ndarray, leading: tuple[int, ...], outputs: int) -> np.ndarray:
    """Labels ``(rows,)`` or targets ``(rows, C)``, from an array with the leading axes of the features or flat.

    Args:
        y: the targets of a batch.
        leading: the leading axes of the features.
        outputs: the number of outputs C; for ``C = 1`` the last axis is optional.

    Raises:
        ValueError: for any other shape.
    """
    rows = int(np.prod(leading))
    is_float = jnp.issubdtype(y.dtype, jnp.floating)
    if y.shape in (leading, (rows,)) and (outputs == 1 or not is_float):
        return y.reshape(rows, 1) if outputs == 1 else y.reshape(rows)
    if y.shape in ((*leading, outputs), (rows, outputs)):
        return y.reshape(rows, outputs)
    raise ValueError(
        f"fit_head: the targets must have {outputs} value(s), shape {(*leading, outputs)}, or a label, {leading}, "
        f"for each row that reaches the head, got shape {y.shape} of {y.dtype}."
    )


def flat_weight(weight: Any, leading: tuple[int, ...]) -> Any:
    """Weights ``(rows,)``, from one for each row or one for each example.

    Args:
        weight: an array of NumPy or JAX.
        leading: the leading axes of the features: the first is that of examples, all together are those of rows.

    Raises:
        ValueError: for any other shape.
    """
    if weight.shape != leading[: weight.ndim]:
        raise ValueError(
            f"fit_head: `weight` must have one entry for each row, shape {leading}, or for each example, shape "
            f"{leading[:1]}, got {weight.shape}."
        )
    return weight.reshape(-1).repeat(math.prod(leading[weight.ndim :]))


def _joined(pieces: list[GatheredRows]) -> GatheredRows:
    """All rows, sorted as the module's docstring says; each piece is released as soon as it is copied."""
    n, (p, dtype) = sum(len(piece.X) for piece in pieces), (pieces[0].X.shape[1], pieces[0].X.dtype)
    direction = np.asarray(np.random.default_rng(0).normal(size=p), dtype)
    first = [piece.y if piece.y.ndim == 1 else piece.y[:, 0] for piece in pieces]
    place = np.empty(n, int)
    place[np.lexsort((np.concatenate([piece.X @ direction for piece in pieces]), np.concatenate(first)))] = np.arange(n)
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
    return whole


def batches(data: Any, unpack: Unpack | None) -> Iterator[Batch]:
    """The batches of ``data``, in any form that :func:`cronos_flax.fit_head` takes."""
    if isinstance(data, tuple) and len(data) == 2 and unpack is None:
        yield from _chunks(*data)
        return
    if not isinstance(data, Iterable) or isinstance(data, (str, bytes, Mapping)):
        raise ValueError(f"fit_head: `data` must be (x, y) or an iterable of batches, got {type(data).__name__}.")
    for batch in data:
        if unpack is not None:
            unpacked = unpack(batch)
            if not (isinstance(unpacked, tuple) and len(unpacked) in (2, 3) and isinstance(unpacked[0], tuple | dict)):
                raise ValueError(
                    "fit_head: `unpack` must return (args, y) or (args, y, weight) with args a tuple of positional or "
                    f"a dict of keyword arguments, got {_kind(unpacked)}."
                )
            args, y, weight = unpacked if len(unpacked) == 3 else (*unpacked, None)
            yield Batch.of((), args, y, weight) if isinstance(args, dict) else Batch.of(args, {}, y, weight)
        elif isinstance(batch, tuple | list) and len(batch) == 2:
            yield Batch.of((batch[0],), {}, batch[1])
        else:
            raise ValueError(f"fit_head: each batch must be (x, y), got {_kind(batch)}. Give unpack=.")


def _kind(value: Any) -> str:
    return f"{type(value).__name__} of {len(value)}" if isinstance(value, tuple | list) else type(value).__name__


def _chunks(x: Any, y: Any) -> Iterator[Batch]:
    """Whole arrays in pieces, so that a pass through the backbone needs little memory."""
    leaves = jax.tree.leaves(x)
    arrays = all(isinstance(leaf, np.ndarray | Array) for leaf in (*leaves, y))
    counts = {len(leaf) if np.ndim(leaf) else 0 for leaf in (*leaves, y)} if arrays else set()
    if len(counts) != 1 or 0 in counts or not leaves or not all(np.size(leaf) for leaf in leaves):
        got = jax.tree.map(np.shape, (x, y)) if arrays else f"{type(x).__name__} and {type(y).__name__}"
        raise ValueError(
            f"fit_head: `data` = (x, y) must be arrays of equally many rows, at least one, got {got}. An iterable of "
            "batches must not be a tuple of two."
        )
    n = counts.pop()
    size = int(np.clip(_CHUNK_BYTES * n / sum(leaf.nbytes for leaf in leaves), _LEAST_CHUNK, _MOST_CHUNK))
    for i in range(0, n, size):
        part_x, part_y = jax.tree.map(lambda leaf, i=i: leaf[i : i + size], (x, y))
        yield Batch.of((part_x,), {}, part_y)
