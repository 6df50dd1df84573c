"""One pass over the user's batches: the head's input of every row, with its target and its weight.

Only features are kept, on the host: a batch may go as soon as it has been through the backbone, and rows of no weight
(masked tokens) are dropped with it. Rows come out in an order of their own, by target and then along a fixed random
direction, so that a fit does not depend on the order in which batches came, and what is sampled from consecutive
stretches of rows has every class in its share.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

_CHUNK_BYTES, _LEAST_CHUNK, _MOST_CHUNK = 16 << 20, 16, 1024  # of whole arrays, per pass through the backbone

Tap = Callable[[tuple, Mapping], Array]  # of positional and keyword arguments: the head's input (..., p)
Unpack = Callable[[Any], tuple]


class Batch(NamedTuple):
    """What the module is called with, the targets, and the weights (copies: loaders use their buffers again)."""

    args: tuple
    kwargs: Mapping[str, Any]
    y: np.ndarray
    weight: np.ndarray | None

    @classmethod
    def of(cls, args: tuple, kwargs: Mapping[str, Any], y: Any, weight: Any = None) -> Self:
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


class Rows(NamedTuple):
    """Features ``(n, p)``, labels ``(n,)`` or targets ``(n, C)``, and weights ``(n,)`` or None."""

    X: np.ndarray
    y: np.ndarray
    weight: np.ndarray | None


def gather(
    tap: Tap, outputs: int, data: Any, unpack: Unpack | None, callback: Callable[[dict[str, float]], Any] | None
) -> Rows:
    """All rows of ``data``.

    Args:
        tap: the head's input for one batch.
        outputs: the number of outputs of the head, which the targets must have.
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
    pieces: list[Rows] = []
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
        if pending is not None:  # while this batch is under way
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


def _rows(features: Array, batch: Batch, outputs: int) -> Rows:
    """A batch on the host, leading axes flattened, without the rows of weight zero."""
    leading, p = features.shape[:-1], features.shape[-1]
    X = np.asarray(features, jnp.promote_types(features.dtype, jnp.float32)).reshape(-1, p)
    y = flat_targets(batch.y, leading, outputs)
    if batch.weight is None:
        return Rows(X, y, None)
    weight = batch.weight
    if weight.shape[: len(leading)] != leading[: weight.ndim] or weight.ndim > len(leading):
        raise ValueError(
            f"fit_head: `weight` must have one entry for each row, shape {leading}, or for each example, shape "
            f"{leading[:1]}, got {weight.shape}."
        )
    weight = weight.reshape(weight.shape + (1,) * (len(leading) - weight.ndim))
    weight = np.broadcast_to(weight, leading).reshape(-1).astype(X.dtype)
    there = weight != 0
    return Rows(X[there], y[there], weight[there])


def flat_targets(y: np.ndarray, leading: tuple[int, ...], outputs: int) -> np.ndarray:
    """Labels ``(rows,)`` or targets ``(rows, C)``; what the loss makes of them, the solver says."""
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


def _joined(pieces: list[Rows]) -> Rows:
    """All pieces in an order that does not depend on theirs; each is let go as soon as it has been copied."""
    n, (p, dtype) = sum(len(piece.X) for piece in pieces), (pieces[0].X.shape[1], pieces[0].X.dtype)
    direction = np.asarray(np.random.default_rng(0).normal(size=p), dtype)
    first = [piece.y if piece.y.ndim == 1 else piece.y[:, 0] for piece in pieces]
    place = np.empty(n, int)
    place[np.lexsort((np.concatenate([piece.X @ direction for piece in pieces]), np.concatenate(first)))] = np.arange(n)
    whole = Rows(
        np.empty((n, p), dtype),
        np.empty((n, *pieces[0].y.shape[1:]), np.result_type(*(piece.y for piece in pieces))),
        None if pieces[0].weight is None else np.empty(n, dtype),
    )
    start = 0
    while pieces:
        piece = pieces.pop(0)
        to = place[start : start + len(piece.X)]
        for field, value in zip(whole, piece, strict=True):
            if field is not None:
                field[to] = value
        start += len(piece.X)
    return whole


def batches(data: Any, unpack: Unpack | None) -> Iterator[Batch]:
    """The batches of what :func:`cronos_flax.fit_head` takes."""
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
    """Whole arrays, cut so that a pass through the backbone stays small."""
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
