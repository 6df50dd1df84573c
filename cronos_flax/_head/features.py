"""One pass over the user's batches: the head's input for every row, with its target and its weight.

Only features are kept, in host memory: a batch is released after its pass through the backbone. Rows of weight zero
(masked tokens) are dropped. The rows that :func:`gather` returns are sorted by target, and then along a fixed random
direction. So a fit does not depend on the order of the batches, and a sample of consecutive stretches of rows has its
share of every class.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from cronos_flax._head.data import Batch, Unpack, batches, flat_targets, flat_weight
from cronos_flax._solver.transfer import on_host

Pass = Callable[[tuple, Mapping], Array]  # from positional and keyword arguments to the head's input (..., p)


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
    tap: Pass,
    outputs: int,
    data: Any,
    unpack: Unpack | None,
    callback: Callable[[dict[str, float]], Any] | None,
    shuffled: bool = False,
) -> GatheredRows:
    """All rows of ``data``.

    Args:
        tap: gives the head's input for one batch.
        outputs: the head's number of outputs C, which the targets must fit.
        data: as for :func:`cronos_flax.fit_head`.
        unpack: as for :func:`cronos_flax.fit_head`.
        callback: called after every batch with ``rows`` (so far) and ``seconds``.
        shuffled: whether batches of whole arrays are of random rows: statistics of a batch need rows of all classes.

    Raises:
        ValueError: for data that do not fit the module, or each other.
    """
    if callback is not None and not callable(callback):
        raise ValueError(f"fit_head: `callback` must be a function of one dict, got {callback!r}.")
    pieces: list[GatheredRows] = []
    start, count = time.perf_counter(), 0
    pending: tuple[Array, Batch] | None = None

    def finish(features: Array, batch: Batch) -> None:
        nonlocal count
        pieces.append(_rows(features, batch, outputs))
        count += len(pieces[-1].X)
        if callback is not None:
            callback({"rows": count, "seconds": time.perf_counter() - start})

    for batch in batches(data, unpack, shuffled=shuffled):
        features = tap(batch.args, batch.kwargs)
        if pending is not None:  # copied to the host while the device works on this batch
            finish(*pending)
        pending = features, batch
    if pending is None:
        raise ValueError("fit_head: `data` must have at least one batch with a row of positive weight, got none.")
    finish(*pending)
    if len({piece.weight is None for piece in pieces}) > 1:
        raise ValueError("fit_head: `unpack` must return a weight for every batch or for none.")
    if len({piece.y.shape[1:] for piece in pieces}) > 1:
        raise ValueError("fit_head: the targets must be labels in every batch, or have one value for each output.")
    return _joined(pieces)


def _rows(features: Array, batch: Batch, outputs: int) -> GatheredRows:
    """A batch in host memory, leading axes flattened, without the rows of weight zero."""
    leading, p = features.shape[:-1], features.shape[-1]
    X = np.asarray(on_host(features), jnp.promote_types(features.dtype, jnp.float32)).reshape(-1, p)
    y, weight = flat_targets(batch.y, leading, outputs), None
    if batch.weight is not None:
        weight = flat_weight(batch.weight, leading).astype(X.dtype)
        counts = weight != 0
        X, y, weight = X[counts], y[counts], weight[counts]
    return GatheredRows(X, y, weight, bool(np.all(np.isfinite(X))))


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
