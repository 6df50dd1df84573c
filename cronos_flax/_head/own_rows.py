"""Keyword arguments that belong to the rows of a batch, such as a mask: found by a change of one row, and checked."""

import contextlib
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from cronos_flax._head.data import as_arrays
from cronos_flax._head.fingerprint import checksum
from cronos_flax._solver.arrays import is_array, is_concrete, is_key
from cronos_flax._solver.checks import all_finite
from cronos_flax._solver.meshes import automatically, in_place_of
from cronos_flax._solver.transfer import on_device, on_host, taken

_MORE = 3.0  # how much further a row moves than most others by a change of its own; batch norm moves all a little
_TRIED = 3  # rows that are changed, at least and one at a time, until it can be told
_MUCH_MORE = 10.0  # the same for the row that moves most, if it is not known which
_SAME = 1e-2  # how far rows move by rounding, in what lies between two of them
_FEWEST = 8  # rows, from which on "most" of them means something
_ENOUGH = 2  # rows that must tell the same
_OF_FLAX = "rngs", "mutable"


class OwnRows(NamedTuple):
    """The keyword arguments of a call that belong to the rows of its batch.

    Args:
        names: their names.
        batch: checksums of all arrays of the call; empty if there are no such arguments.
    """

    names: tuple[str, ...] = ()
    batch: tuple[int, ...] = ()

    def check(self, args: tuple, given: Mapping, found: Mapping, where: str) -> None:
        """Raise a ValueError if a batch would get the mask of another one.

        Args:
            args: the positional arguments of the batch.
            given: the keyword arguments that came with it.
            found: those of the call that the head was found with, which stand in for what is not given.
            where: the caller's name.
        """
        missing = [name for name in self.names if name not in given]
        if not missing or _checksums(args, {**found, **given}) == self.batch:
            return
        names = ", ".join(f"`{name}`" for name in missing)
        example = ", ".join(f'"{name}": ...' for name in missing)
        how = (
            "Give it by keyword."
            if where == "inputs"
            else f"Give it with unpack=, which returns ({{{example}, and the other arguments by name}}, y)."
        )
        raise ValueError(
            f"{where}: each batch must come with {names} of its own rows, got other rows than those that the head was "
            f"found on, without: they would have what belongs to those. {how}"
        )


NO_OWN_ROWS = OwnRows()


def own_rows(
    features: Callable[..., Array],
    variables: Any,
    redrawn: Iterable[Any],
    args: tuple,
    kwargs: Mapping,
) -> OwnRows:
    """Which keyword arguments belong to the rows of the batch.

    One row of an argument is changed at a time. The argument belongs to the rows if the same row of the head's input
    moves, and much further than most others. Where this cannot be told (nothing moves, the input is not finite, the
    module raises, the batch has one row), it does if it has an entry for each row, and is boolean or has more axes.

    Args:
        features: the head's input ``(rows, ..., p)`` for variables and keyword arguments; or also for other positional
            arguments than those of the batch.
        variables: the module's variables.
        redrawn: others, which are taken if they give finite inputs: with zeros, a part of the module may do nothing.
        args: positional arguments of the batch.
        kwargs: keyword arguments.
    """
    given = {name: value for name, value in kwargs.items() if name not in _OF_FLAX and _arrays(value)}
    if not given:
        return NO_OWN_ROWS
    given = as_arrays(given, "the module's arguments")
    trial, before = _trial(features, variables, redrawn, kwargs)

    def belongs(name: str) -> bool:
        leaves, treedef = jax.tree.flatten(given[name])

        def moved(index: int, parts: int, axis: int, place: int) -> np.ndarray:
            """How far parts of the head's input move, by a change of one array at one place of an axis."""
            array = on_device(leaves[index])
            changed = in_place_of(automatically(partial(_changed, axis=axis), array, on_device(place)), array)
            value = jax.tree.unflatten(treedef, [*leaves[:index], changed, *leaves[index + 1 :]])
            now = features(trial, {**kwargs, name: value})
            return on_host(automatically(partial(_movement, rows=parts), now, before))

        def see_others() -> bool:
            """Whether rows see others: shuffled without this argument, they do not give the shuffled input."""
            order = on_device(np.random.default_rng(0).permutation(rows))

            def shuffled(tree: Any) -> Any:
                return jax.tree.map(lambda leaf: turned(leaf) if _arrays(leaf) and len(leaf) == rows else leaf, tree)

            def turned(leaf: Any) -> Array:
                array = on_device(leaf)
                return in_place_of(automatically(taken, array, order), array)

            try:
                now = features(trial, {**kwargs, **shuffled(others), name: given[name]}, shuffled(args))
            except Exception:  # the module's own, for values that it does not take
                return True
            here = turned(before)
            far, apart = (on_host(automatically(partial(_movement, rows=rows), each, here)) for each in (now, before))
            return not np.max(far) < _SAME * np.median(apart)

        others = {other: value for other, value in given.items() if other != name}
        rows = _rows_of(before)
        return any(_is_of_rows(leaf, rows, partial(moved, index), see_others) for index, leaf in enumerate(leaves))

    names = tuple(filter(belongs, given))
    return OwnRows(names, _checksums(args, kwargs)) if names else NO_OWN_ROWS


def _trial(features: Callable, variables: Any, redrawn: Iterable[Any], kwargs: Mapping) -> tuple[Any, Array]:
    """The first redrawn variables with which the head's input is finite, or those as they are; and that input."""
    for trial in redrawn:
        with contextlib.suppress(Exception):  # the module's own, for values that it does not take
            if all_finite(before := features(trial, kwargs)):
                return trial, before
    return variables, features(variables, kwargs)


def _is_of_rows(
    leaf: Any, rows: int, moved: Callable[[int, int, int], np.ndarray], see_others: Callable[[], bool]
) -> bool:
    """Whether an array has an entry for each row, or for each of equal blocks of rows (flattened tokens, say).

    Or on another axis, as of time first; or has numbers of rows, as the edges of a graph.

    Args:
        leaf: the array.
        rows: of the head's input ``(rows, ..., p)``.
        moved: how far each of so many parts of it moves if the array is changed at an axis and a place there.
        see_others: whether rows see others through the argument: numbers of rows are of no use to a row by itself.
    """
    if not _arrays(leaf):
        return False

    def told(parts: int, axis: int) -> bool | None:
        return _told(parts, lambda place: _moves_itself(moved(parts, axis, place), place))

    if rows % len(leaf) == 0:
        first = told(len(leaf), 0)
        if first or (first is None and len(leaf) == rows and (leaf.ndim > 1 or leaf.dtype == np.bool_)):
            return True
    if any(leaf.shape[axis] == rows and told(rows, axis) for axis in range(1, leaf.ndim)):
        return True
    longest = int(np.argmax(leaf.shape))
    return (
        _numbers_rows(leaf, rows)
        and bool(_told(leaf.shape[longest], lambda place: _moves_few(moved(rows, longest, place))))
        and see_others()
    )


def _rows_of(before: Array) -> int:
    """The rows of the head's input ``(rows, ..., p)``."""
    return len(before) if before.ndim > 1 else 1


def _told(places: int, answer: Callable[[int], bool | None]) -> bool | None:
    """What some places of an axis tell, which all must tell the same; None if it cannot be told."""
    told = 0
    for place in range(0, places, max(1, places // _TRIED)) if places > 1 else ():
        try:
            here = answer(place)
        except Exception:  # the module's own, for values that it does not take
            continue
        if here is not None:
            told += 1
            if not here or told == _ENOUGH:
                return here
    return True if told else None


def _moves_itself(far: np.ndarray, row: int) -> bool | None:
    """Whether a row's own change moves it much further than most others; None if this cannot be told."""
    others = np.median(np.delete(far, row))
    if np.isnan(far[row]) or not np.isfinite(others) or not np.any(far > 0):
        return None
    if far[row] > _MORE * others:
        return True
    return None if far[row] > others else False  # batch norm couples few rows strongly


def _moves_few(far: np.ndarray) -> bool | None:
    """Whether a change moves some rows much further than most; None if it moves none, or what is not finite."""
    if not np.all(np.isfinite(far)) or not np.any(far > 0):
        return None
    return bool(np.max(far) > _MUCH_MORE * np.median(far))


def _numbers_rows(leaf: Any, rows: int) -> bool:
    """Whether an array may have numbers of rows: integers from zero on, and of more than half of the rows."""
    if not np.issubdtype(leaf.dtype, np.integer) or rows < _FEWEST:
        return False
    host = np.asarray(on_host(leaf))
    return bool(host.min() >= 0 and rows // 2 <= host.max() < rows)


@partial(jax.jit, static_argnames="rows")
def _movement(now: Array, before: Array, rows: int) -> Array:
    """The largest change in each row: ∞ where it is not finite any more, nan where it was not finite before."""
    now, before = (v.astype(jnp.float32).reshape(rows, -1) for v in (now, before))
    far = jnp.where(jnp.isfinite(now), jnp.abs(now - before), jnp.inf)
    return jnp.where(jnp.all(jnp.isfinite(before), axis=1), jnp.max(far, axis=1), jnp.nan)


@partial(jax.jit, static_argnames="axis")
def _changed(array: Array, row: Array, axis: int) -> Array:
    """The array with other values at one place of an axis, such as a module may well take."""
    array = jnp.moveaxis(array, axis, 0)
    old = array[row]
    turned = ~old if array.dtype == jnp.bool_ else 1 - old
    if jnp.issubdtype(array.dtype, jnp.floating):
        even = jnp.arange(old.size).reshape(old.shape) % 2 == 0  # a softmax and a norm do not see a change of all alike
        other = jnp.where(even, jnp.where(old == 0, 1, old / 2), old)
    elif array.dtype == jnp.bool_:
        other = turned
    else:  # perhaps indices: of those that occur, if there are several
        least, most = jnp.min(array), jnp.max(array)
        other = _one_stays(old, jnp.where(least == most, old // 2, jnp.where(old == most, least, most)))
    is_binary = jnp.all((array == 0) | (array == 1))
    array = array.at[row].set(jnp.where(is_binary, _one_stays(old, turned), other).astype(array.dtype))
    return jnp.moveaxis(array, 0, axis)


def _one_stays(old: Array, new: Array) -> Array:
    """The new entries; but of old ones that are all alike one stays, as a mask must let something through."""
    axis = max((axis for axis, size in enumerate(old.shape) if size > 1), default=None)
    if axis is None:
        return new
    first = jax.lax.slice_in_dim(old, 0, 1, axis=axis)
    alike = jnp.all(old == first, axis=axis, keepdims=True)
    return jnp.where(alike & (jax.lax.broadcasted_iota(int, old.shape, axis) == 0), old, new)


def _arrays(tree: Any) -> list[Any]:
    """The arrays of a tree that have rows; random keys have none."""
    return [leaf for leaf in jax.tree.leaves(tree) if is_array(leaf) and np.ndim(leaf) and not is_key(leaf)]


def _checksums(args: tuple, kwargs: Mapping) -> tuple[int, ...]:
    """Those of the arrays of a call as JAX holds them, by position or by name; none of traced ones."""
    arrays = _arrays((args, {name: value for name, value in kwargs.items() if name not in _OF_FLAX}))
    if not all(map(is_concrete, arrays)):
        return ()
    hosts = (np.asarray(on_host(array)) for array in arrays)
    return tuple(sorted(checksum(host.astype(jax.dtypes.canonicalize_dtype(host.dtype))) for host in hosts))
