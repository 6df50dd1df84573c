"""The data that users give: batches, targets and weights in any form, checked on the host.

What a batch holds becomes arrays that JAX takes. Targets and weights are checked by value, in the type that they came
in. Batches without a row of positive weight are passed over: they count for nothing, wherever they come. Nor do rows of
weight zero: where their inputs are not finite, they are those of rows that count, for NaN · 0 is NaN in a gradient.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from cronos_flax._solver.arrays import is_array, native, numbers, opened
from cronos_flax._solver.checks import weights_in_range
from cronos_flax._solver.loss import Loss
from cronos_flax._solver.meshes import automatically
from cronos_flax._solver.transfer import on_device, on_host, taken

_CHUNK_BYTES, _LEAST_CHUNK, _MOST_CHUNK = 16 << 20, 16, 1024  # bytes and rows of whole arrays in one pass

Unpack = Callable[[Any], tuple]


class Batch(NamedTuple):
    """The module's arguments, the targets and the weights; the last two are copies."""

    args: tuple
    kwargs: Mapping[str, Any]
    y: np.ndarray
    weight: np.ndarray | None

    @classmethod
    def of(cls, args: tuple, kwargs: Mapping[str, Any], y: Any, weight: Any = None, where: str = "fit_head") -> Self:
        """A batch with arrays that JAX takes; ``where`` is the caller's name, for messages.

        The inputs of rows of weight zero are finite: see :func:`_filled`.

        Raises:
            ValueError: for arrays that are not numbers, and weights that are negative, not finite, or beyond float32.
        """
        args, kwargs = as_arrays((tuple(args), dict(kwargs)), f"{where}: the module's arguments")
        y = _real(y, f"{where}: the targets")
        if weight is None:
            return cls(args, kwargs, y, None)
        weight = _real(weight, f"{where}: `weight`")
        if not (np.all(np.isfinite(weight)) and np.all(weight >= 0)):
            raise ValueError(
                f"{where}: `weight` must be finite and ≥ 0, got {weight[~(np.isfinite(weight) & (weight >= 0))][0]}. "
                "Rows to be left out have weight 0."
            )
        weights_in_range(f"{where}: `weight`", weight)
        args, kwargs = jax.tree.map(lambda leaf: _filled(leaf, weight), (args, kwargs))
        return cls(args, kwargs, y, weight)

    @property
    def counts(self) -> bool:
        """Whether there is a row of positive weight."""
        return self.y.size > 0 and (self.weight is None or bool(np.any(self.weight)))

    def flat(self, leading: tuple[int, ...], outputs: int, loss: Loss, where: str) -> Self:
        """The same with targets ``(rows,)`` or ``(rows, C)`` and weights ``(rows,)``, the targets checked by value.

        Rows of weight zero get the target of a row that counts: theirs is often none at all, such as −100.

        Args:
            leading: the leading axes of the module's output.
            outputs: the number of outputs C.
            loss: what the targets are for.
            where: the caller's name, for messages.

        Raises:
            ValueError: for shapes that do not fit, and targets that the loss does not take.
        """
        y, weight = flat_targets(self.y, leading, outputs, where), None
        if self.weight is not None:
            weight = flat_weight(self.weight, leading, where)
            y = np.where((weight > 0).reshape(-1, *[1] * (y.ndim - 1)), y, y[np.argmax(weight)])
        if jnp.issubdtype(y.dtype, jnp.floating) and not np.all(np.isfinite(y)):
            raise ValueError(f"{where}: the targets must be finite, got NaN or infinite entries.")
        try:
            loss.check_targets(y, outputs)
            made = _shape_of_targets(loss, y.shape, y.dtype, outputs)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        if made != (len(y), outputs):
            raise ValueError(
                f"{where}: the targets must have {outputs} value(s), shape {(*leading, outputs)}, for each row that "
                f"reaches the head, got shape {self.y.shape} of {self.y.dtype}, one label a row. The loss "
                f"{type(loss).__name__} does not take labels for {outputs} outputs."
            )
        return self._replace(y=y, weight=weight)


@functools.lru_cache(maxsize=256)
def _shape_of_targets(loss: Loss, shape: tuple[int, ...], dtype: np.dtype, outputs: int) -> tuple[int, ...]:
    """The shape of what a loss makes of targets of this kind, found without computing."""
    return jax.eval_shape(lambda y: loss.targets(y, outputs), jax.ShapeDtypeStruct(shape, dtype)).shape


def _real(value: Any, what: str) -> np.ndarray:
    """A copy of an array of real numbers, in host memory."""
    array = np.array(on_host(numbers(value, what)))
    if array.dtype.kind == "c":
        raise ValueError(f"{what} must be real numbers, got dtype {array.dtype}.")
    return array


def _filled(leaf: Any, weight: np.ndarray) -> Any:
    """An input of the module in which rows of weight zero that are not finite are replaced by rows that count, in turn.

    Copies, and not zeros: batch norms then see no values that are foreign to the data. Finite rows stay as they are,
    for they may be seen by rows that count: other tokens of a sequence, neighbours in a graph. So do infinities of an
    array with one number for each token: that is what a mask adds to the scores of attention.

    Args:
        leaf: an array whose leading axes are those of ``weight``, or the first of them; all else is returned as it is.
        weight: weights of a batch.
    """
    equal = [a == b for a, b in zip(np.shape(leaf), weight.shape, strict=False)]
    leading = (*equal, False).index(False)
    if not (leading and is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.inexact)):
        return leaf
    counts = np.any(weight > 0, axis=tuple(range(leading, weight.ndim)))
    if np.all(counts) or not np.any(counts):
        return leaf
    place = (np.cumsum(~counts) - 1).reshape(counts.shape) % np.count_nonzero(counts)
    sources = tuple(axis[place] for axis in np.nonzero(counts))
    if isinstance(leaf, Array):  # which stays where it is, and is not waited for
        return _filled_on_device(leaf, on_device(counts), tuple(map(on_device, sources)))
    holes = ~counts & np.any(_unfit(leaf, leading), axis=tuple(range(leading, leaf.ndim)))
    if not np.any(holes):
        return leaf
    filled = leaf.copy()
    filled[holes] = leaf[tuple(axis[holes] for axis in sources)]
    return filled


def _unfit(leaf: Any, leading: int) -> Any:
    """Which entries a row of weight zero must not have."""
    is_mask = leading > 1 and leaf.ndim == leading
    xp = jnp if isinstance(leaf, Array) else np
    return xp.isnan(leaf) if is_mask else ~xp.isfinite(leaf)


@jax.jit
def _filled_on_device(leaf: Array, counts: Array, sources: tuple[Array, ...]) -> Array:
    axes = tuple(range(counts.ndim, leaf.ndim))
    holes = ~counts & jnp.any(_unfit(leaf, counts.ndim), axis=axes)
    rows = leaf.at[sources].get(out_sharding=jax.typeof(leaf).sharding)  # explicit meshes want it said
    return jnp.where(jnp.expand_dims(holes, axes), rows, leaf)


def as_arrays(tree: Any, what: str) -> Any:
    """The tree with every array in it as one of NumPy or JAX; the rest as it is."""
    return jax.tree.map(lambda leaf: numbers(leaf, what) if is_array(leaf) else leaf, tree)


def shapes_said(args: Any) -> Any:
    """The shapes of a module's arguments, for messages; lists of numbers, which are no arrays, are said as such."""

    def is_listed(node: Any) -> bool:
        return isinstance(node, list) and not any(map(is_array, jax.tree.leaves(node)))

    def said(node: Any) -> Any:
        return "a list of numbers, which is no array" if is_listed(node) else np.shape(node)

    return jax.tree.map(said, args, is_leaf=is_listed)


def several_said(args: tuple) -> str:
    """A remark on arguments that came as one, a tuple; empty for others."""
    if not (len(args) == 1 and isinstance(args[0], tuple)):
        return ""
    return " If the model takes several arguments, give each by itself; in data by unpack=, which returns ((a, b), y)."


def flat_targets(y: np.ndarray, leading: tuple[int, ...], outputs: int, where: str) -> np.ndarray:
    """Labels ``(rows,)`` or targets ``(rows, C)``, from an array with the leading axes of the features or flat.

    Args:
        y: the targets of a batch.
        leading: the leading axes of the features.
        outputs: the number of outputs C; for ``C = 1`` the last axis is optional.
        where: the caller's name, for messages.

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
        f"{where}: the targets must have {outputs} value(s), shape {(*leading, outputs)}, or an integer label, "
        f"{leading}, for each row that reaches the head, got shape {y.shape} of {y.dtype}."
        + (" If these are labels, give y.astype(int)." if is_float and y.shape in (leading, (rows,)) else "")
        + (" If these are labels, give y[:, 0]." if not is_float and y.shape == (rows, 1) else "")
    )


def flat_weight(weight: np.ndarray, leading: tuple[int, ...], where: str) -> np.ndarray:
    """Weights ``(rows,)``, from one for each row or one for each example.

    Args:
        weight: the weights of a batch.
        leading: the leading axes of the features: the first is that of examples, all together are those of rows.
        where: the caller's name, for messages.

    Raises:
        ValueError: for any other shape.
    """
    if weight.shape != leading[: weight.ndim]:
        raise ValueError(
            f"{where}: `weight` must have one entry for each row, shape {leading}, or for each example, shape "
            f"{leading[:1]}, got {weight.shape}."
        )
    return weight.reshape(-1).repeat(math.prod(leading[weight.ndim :]))


@dataclasses.dataclass(frozen=True)
class UserData:
    """Data in any form that :func:`cronos_flax.fit_head` takes; nothing of them is read before it is asked for.

    Args:
        given: whole arrays ``(x, y)``, an iterable of batches, or, with ``unpack``, one dict of arrays: one batch.
        unpack: how to take a batch apart.
        where: the caller's name, for messages.
        name: the name of the argument there.
    """

    given: Any
    unpack: Unpack | None = None
    where: str = "fit_head"
    name: str = "data"

    @property
    def place(self) -> str:
        """How an error about what is in a batch begins: with the caller and, unless that is ``data``, the argument."""
        return self.where if self.name == "data" else f"{self.where}: `{self.name}`"

    @property
    def is_arrays(self) -> bool:
        """Whether these are whole arrays ``(x, y)``."""
        return isinstance(self.given, tuple) and len(self.given) == 2 and self.unpack is None

    def check(self, repeatable: bool = False) -> Self:
        """Return the data if they have a form that can be taken, and if they can be read again where that is asked for.

        Raises:
            ValueError: if they have not; if they are an iterator, which can be read only once; for ``(x, y)`` beside an
                ``unpack``, which would take each of the two arrays for a batch.
        """
        given, unpack = self.given, self.unpack
        if unpack is not None and not callable(unpack):
            raise ValueError(f"{self.where}: `unpack` must be a function of one batch, got {unpack!r}.")
        if isinstance(given, Mapping) and unpack is None:
            raise ValueError(
                f"{self.where}: `{self.name}` is a dict ({', '.join(map(str, given))}), one batch that only `unpack` "
                "can take apart. Give unpack=, or the arrays as (x, y)."
            )
        if unpack is not None and isinstance(given, tuple) and len(given) == 2 and is_array(given[1]):
            raise ValueError(
                f"{self.where}: `{self.name}` must be a list of batches if `unpack` is given, got a tuple of two "
                "arrays. If these are (x, y), give a list with one batch, as `unpack` takes it."
            )
        kind = type(given).__name__
        if not isinstance(given, Iterable) or isinstance(given, str | bytes) or is_array(given):
            raise ValueError(
                f"{self.where}: `{self.name}` must be (x, y) or an iterable of batches, got {kind}.{_remedy(given)}"
            )
        if repeatable and isinstance(given, Iterator):
            raise ValueError(
                f"{self.where}: `{self.name}` must be re-iterable, got an iterator ({kind}), which can be read only "
                "once. Give a list, or an object whose __iter__ starts anew."
            )
        return self

    def batches(self, shuffled: bool = False) -> Iterator[Batch]:
        """The batches that count; those of whole arrays are of random rows if ``shuffled``.

        Raises:
            ValueError: for data that are none.
        """
        return (batch for batch in self._all_batches(shuffled) if batch.counts)

    def arrays(self) -> tuple[Any, Any]:
        """Of whole arrays: the module's input, a tree, and the targets, of equally many rows; not yet :func:`native`.

        Raises:
            ValueError: if they are not arrays, or the numbers of rows differ or are zero.
        """
        x, y = self.given
        what = f"{self.where}: `{self.name}`"
        if _is_pair_of_arrays(x) and _is_pair_of_arrays(y):
            raise ValueError(
                f"{what} must be (x, y) or an iterable of batches, got a tuple of two tuples of two arrays each, which "
                "may be either. Two batches are given as a list."
            )
        y = opened(y, f"{self.place}: the targets")
        arrays = all(map(is_array, jax.tree.leaves(x)))
        x = jax.tree.map(lambda leaf: opened(leaf, what), x) if arrays else x
        leaves = jax.tree.leaves(x)
        counts = {len(leaf) if np.ndim(leaf) else 0 for leaf in (*leaves, y)} if arrays else set()
        if len(counts) != 1 or 0 in counts or not leaves or not all(np.size(leaf) for leaf in leaves):
            got = jax.tree.map(np.shape, (x, y)) if arrays else f"{type(x).__name__} and {type(y).__name__}"
            raise ValueError(
                f"{what} = (x, y) must be arrays of equally many rows, at least one, got {got}. An iterable of batches "
                "must not be a tuple of two."
            )
        return x, y

    def empty(self) -> ValueError:
        """What to raise for data without a batch that counts."""
        can_be_read_once = not isinstance(self.given, tuple | list | Mapping) and iter(self.given) is iter(self.given)
        remark = (
            f" An iterator ({type(self.given).__name__}) can be read only once: give a list, or an object whose "
            "__iter__ starts anew."
        )
        return ValueError(
            f"{self.where}: `{self.name}` must have at least one batch with a row of positive weight, got none."
            f"{remark if can_be_read_once else ''}"
        )

    def _all_batches(self, shuffled: bool) -> Iterator[Batch]:
        self.check()
        if self.is_arrays:
            yield from _chunks(*self.arrays(), self.place, shuffled)
            return
        if isinstance(self.given, Mapping):
            yield _unpacked(self.given, self.unpack, self.place)
            return
        for batch in self.given:
            yield _of_its_own(_unpacked(batch, self.unpack, self.place))


def _of_its_own(batch: Batch) -> Batch:
    """A batch that shares no memory with its loader, which may write the next one there while this is computed."""

    def own(leaf: Any) -> Any:
        return leaf.copy() if isinstance(leaf, np.ndarray) else leaf

    return batch._replace(args=jax.tree.map(own, batch.args), kwargs=jax.tree.map(own, batch.kwargs))


def _unpacked(batch: Any, unpack: Unpack | None, place: str) -> Batch:
    """A batch of a user, taken apart."""
    if unpack is not None:
        unpacked = unpack(batch)
        if not (isinstance(unpacked, tuple) and len(unpacked) in (2, 3) and isinstance(unpacked[0], tuple | dict)):
            raise ValueError(
                f"{place}: `unpack` must return (args, y) or (args, y, weight) with args a tuple of positional or "
                f"a dict of keyword arguments, got {_kind(unpacked)}."
            )
        args, y, weight = unpacked if len(unpacked) == 3 else (*unpacked, None)
        args, kwargs = ((), args) if isinstance(args, dict) else (args, {})
    elif isinstance(batch, tuple | list) and len(batch) == 2 and not _is_pair_of_arrays(batch[1]):
        args, kwargs, y, weight = (batch[0],), {}, batch[1], None
    else:
        raise ValueError(f"{place}: each batch must be (x, y) with one array y, got {_kind(batch)}. Give unpack=.")
    return Batch.of(args, kwargs, y, weight, place)


def _is_pair_of_arrays(value: Any) -> bool:
    """Whether a value is a tuple ``(x, y)`` of arrays, as a batch is, rather than an array or a list of its rows."""
    return isinstance(value, tuple) and len(value) == 2 and all(is_array(part) and np.ndim(part) for part in value)


def length_said(given: Any) -> int:
    """The length of arrays or of a loader; 0 if it says none, as PyTorch's over a stream, whose ``len`` raises."""
    try:
        return len(given)
    except (TypeError, NotImplementedError):
        return 0


def _kind(value: Any) -> str:
    if not isinstance(value, tuple | list):
        return type(value).__name__
    inside = ", ".join(sorted({type(part).__name__ for part in value}))
    return f"{type(value).__name__} of {len(value)}" + (f" ({inside})" if inside else "")


def _remedy(given: Any) -> str:
    """What to do with what cannot be iterated over."""
    if hasattr(given, "__getitem__") and hasattr(given, "__len__") and not is_array(given):
        return (
            " It can be read by index only. If its items are batches, give [data[i] for i in range(len(data))]; if "
            "rows, a loader that makes batches of them, or arrays of all rows as (x, y)."
        )
    if callable(given):
        return " If it is a function that makes batches, give an object whose __iter__ calls it, or list(function())."
    return ""


def _chunks(x: Any, y: Any, where: str, shuffled: bool) -> Iterator[Batch]:
    """Whole arrays in pieces of equal size, so that a pass through the backbone needs little memory."""
    y, leaves, n = on_host(native(y, f"{where}: the targets")), jax.tree.leaves(x), len(y)
    size = int(np.clip(_CHUNK_BYTES * n / sum(leaf.nbytes for leaf in leaves), _LEAST_CHUNK, _MOST_CHUNK))
    pieces, parts = -(-n // size), _parts(leaves)
    if parts > 1:  # each piece has rows of every device, which stay there
        yield from _chunks_of_parts(x, y, parts, pieces, where, shuffled)
        return
    order = np.random.default_rng(0).permutation(n) if shuffled else None
    for i in range(pieces):
        part = slice(i * n // pieces, (i + 1) * n // pieces)
        rows = part if order is None else order[part]
        yield Batch.of((jax.tree.map(lambda leaf, rows=rows: _rows_of(leaf, rows), x),), {}, y[rows], None, where)


def _parts(leaves: list[Any]) -> int:
    """The number of parts that all arrays have their rows in, on as many devices; 1 unless it is the same for all."""
    parts = {len(leaf) // leaf.sharding.shard_shape(leaf.shape)[0] if isinstance(leaf, Array) else 1 for leaf in leaves}
    return parts.pop() if len(parts) == 1 else 1


def _chunks_of_parts(x: Any, y: Any, parts: int, pieces: int, where: str, shuffled: bool) -> Iterator[Batch]:
    """:func:`_chunks` of rows on several devices."""
    each = len(y) // parts
    order, pieces = np.random.default_rng(0).permutation(each) if shuffled else np.arange(each), min(pieces, each)
    for i in range(pieces):
        rows = order[i * each // pieces : (i + 1) * each // pieces]
        index = on_device(rows.astype(np.int32))
        part = jax.tree.map(lambda leaf, index=index: automatically(partial(_of_parts, parts=parts), leaf, index), x)
        of_all = (np.arange(parts)[:, None] * each + rows).reshape(-1)
        yield Batch.of((part,), {}, y[of_all], None, where)


@partial(jax.jit, static_argnames="parts")
def _of_parts(leaf: Array, index: Array, parts: int) -> Array:
    """These rows of each part."""
    taken = leaf.reshape(parts, -1, *leaf.shape[1:])[:, index]
    return taken.reshape(-1, *leaf.shape[1:])


def _rows_of(leaf: Any, rows: slice | np.ndarray) -> Any:
    """``leaf[rows]``."""
    if not isinstance(leaf, Array):
        return leaf[rows]
    return (
        jax.lax.slice_in_dim(leaf, rows.start, rows.stop) if isinstance(rows, slice) else taken(leaf, on_device(rows))
    )
