"""Where ``cf.train`` takes its batches and the rows of its solves from, and how it knows them again."""

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from cronos_flax._head.data import Batch, Unpack, UserData, length_said
from cronos_flax._head.fingerprint import Fingerprint, described
from cronos_flax._head.head import Head
from cronos_flax._solver.arrays import native
from cronos_flax._solver.transfer import on_host

_LEAST_SOLVED = 8_192  # rows of a solve; of fewer, losses are too noisy for the guard to compare
_SOLVE_BYTES = 2**32  # memory for a solve
_READ_BYTES = 2**26  # of larger arrays, the fingerprint takes some rows

_bits = jax.jit(functools.partial(jax.random.bits, dtype=jnp.uint32))


def source_of(data: UserData, batch_size: int, steps: int | None, key: Array) -> "Arrays | Batches":
    """The source that data of ``cf.train`` are.

    Args:
        data: the data.
        batch_size: rows of a batch, for arrays.
        steps: batches of an epoch; None for one pass.
        key: of the orders and samples, for arrays.

    Raises:
        ValueError: for data of another form; nothing of a loader is read.
    """
    data.check(repeatable=True)
    if data.is_arrays:
        return Arrays.of(data, batch_size, steps, key)
    is_one = isinstance(data.given, Mapping)
    return Batches(dataclasses.replace(data, given=[data.given]) if is_one else data, steps)


@dataclasses.dataclass(frozen=True)
class Arrays:
    """Rows in memory, in a new order for each pass.

    Args:
        x: the module's input, a pytree of arrays ``(n, …)``.
        y: targets ``(n, …)``.
        batch_size: rows of a batch; rows that do not fill one are left out of the pass.
        steps: batches of an epoch; None for one pass. An epoch goes on in the pass where the last one ended.
        seed: of the orders and samples.
        among: where the rows are that there are; None for all.
    """

    x: Any
    y: np.ndarray
    batch_size: int
    steps: int | None
    seed: int
    among: np.ndarray | None = None

    @classmethod
    def of(cls, data: UserData, batch_size: int, steps: int | None, key: Array) -> Self:
        """Rows of equal number, as NumPy arrays.

        Raises:
            ValueError: if they are not arrays of one process, or the numbers of rows differ or are zero.
        """
        x, y = data.arrays()
        if not all(leaf.is_fully_addressable for leaf in jax.tree.leaves((x, y)) if isinstance(leaf, Array)):
            raise ValueError(
                f"{data.where}: `{data.name}` = (x, y) must lie in one process, whose rows are shuffled, got arrays on "
                "several. Give an iterable of batches, each an array on several processes."
            )
        x, y = jax.tree.map(np.asarray, on_host((x, native(y, f"{data.where}: the targets"))))
        return cls(x, y, min(batch_size, len(y)), steps, int(on_host(_bits(key))))

    def __len__(self) -> int:
        """How many rows there are."""
        return len(self.y) if self.among is None else len(self.among)

    def held_back(self, count: int, until: float) -> "HeldBack":
        """So many random rows, and the others."""
        order = np.random.default_rng((self.seed, 2)).permutation(len(self.y))
        held, rest = (np.sort(part) for part in np.split(order, [count]))
        others = dataclasses.replace(self, among=rest, batch_size=min(self.batch_size, len(rest)))
        return HeldBack(self._take(held), others, until)

    def epoch(self, number: int, start: int) -> Iterator[Batch]:
        """The batches of an epoch, from batch ``start`` on."""
        in_pass, order, ordered = len(self) // self.batch_size, np.empty(0, int), -1
        steps = in_pass if self.steps is None else self.steps
        for i in range(number * steps + start, (number + 1) * steps):
            passed, place = divmod(i, in_pass)
            if passed != ordered:
                ordered, order = passed, np.random.default_rng((self.seed, 0, passed)).permutation(len(self))
            x, y = self._among(order[place * self.batch_size : (place + 1) * self.batch_size])
            yield Batch.of((x,), {}, y, None, "train")

    def ahead(self, number: int, start: int) -> Batch | None:
        """The batch that comes next; the epoch still has it."""
        return next(self.epoch(number, start), None)

    def known_batches(self) -> int:
        """Batches of an epoch."""
        return len(self) // self.batch_size if self.steps is None else self.steps

    def once(self) -> Iterator[Batch]:
        """All rows."""
        return UserData(self.rows(0, None)[0], None, "train").batches()

    def rows(self, step: int, count: int | None) -> tuple[Any, None]:
        """``data`` and ``unpack`` of a head solve on so many random rows; None for all rows."""
        if count is None or count >= len(self):
            return (self.x, self.y) if self.among is None else self._take(self.among), None
        rng = np.random.default_rng((self.seed, 1, step))
        return self._among(np.sort(rng.choice(len(self), count, replace=False))), None

    def affordable(self, between: int | None, head: Head) -> int:
        """Rows of a solve: no more than the gradient steps between two solves take, and than fit into memory.

        Args:
            between: rows of the gradient steps between two solves; None for all.
            head: the head that is solved for.
        """
        between = len(self) if between is None else between
        return min(max(between, _LEAST_SOLVED), max(_SOLVE_BYTES // head.solve_bytes(1), 1))

    def fingerprint(self) -> Fingerprint:
        """Of the rows; of large arrays some of them, evenly spaced, are read."""
        return described(_arrays({"x": self.x, "y": self.y}), _READ_BYTES)

    def _among(self, places: np.ndarray) -> tuple[Any, np.ndarray]:
        return self._take(places if self.among is None else self.among[places])

    def _take(self, rows: np.ndarray) -> tuple[Any, np.ndarray]:
        return jax.tree.map(lambda leaf: leaf[rows], self.x), self.y[rows]


@dataclasses.dataclass(frozen=True)
class HeldBack:
    """Rows that a run does not see at first.

    Args:
        rows: these, arrays ``(x, y)``.
        rest: the others.
        until: the share of the run from which on it sees them too.
    """

    rows: tuple[Any, np.ndarray]
    rest: Arrays
    until: float


@dataclasses.dataclass
class Batches:
    """The user's batches, in the order in which they come.

    Args:
        data: a re-iterable.
        steps: batches of an epoch; None for one pass. An epoch goes on where the last one ended, and a loader that has
            ended begins again.
    """

    data: UserData
    steps: int | None
    _next: int = -1  # the number of the batch that comes next, of all epochs
    _stream: Iterator[Batch] = dataclasses.field(default_factory=lambda: iter(()))
    _begun: Iterator[Batch] | None = None  # an epoch of which the first batch was looked at

    def epoch(self, number: int, start: int) -> Iterator[Batch]:
        """The batches of an epoch, from batch ``start`` on."""
        begun, self._begun = self._begun, None
        yield from self._epoch(number, start) if begun is None else begun

    def ahead(self, number: int, start: int) -> Batch | None:
        """The batch that comes next; the epoch, which must follow, still has it.

        A loader may go on where it was left, so what was read of it is not read again.
        """
        stream = self._epoch(number, start)
        first = list(itertools.islice(stream, 1))
        self._begun = itertools.chain(first, stream)
        return next(iter(first), None)

    def _epoch(self, number: int, start: int) -> Iterator[Batch]:
        if self.steps is None:
            yield from itertools.islice(self.once(), start, None)
            return
        first = number * self.steps + start
        if first != self._next:
            self._next, self._stream = first, itertools.islice(self._endless(), first, None)
        for batch in itertools.islice(self._stream, self.steps - start):
            self._next += 1
            yield batch

    def known_batches(self) -> int:
        """Batches of an epoch, as far as it is known before one has been read; else 0."""
        return length_said(self.data.given) if self.steps is None else self.steps

    def once(self) -> Iterator[Batch]:
        """The batches of one pass; of ``steps`` batches, where an epoch has so many."""
        return dataclasses.replace(self.data, given=self._first()).batches()

    def rows(self, step: int, count: int | None) -> tuple[Any, Unpack | None]:
        """``data`` and ``unpack`` of a head solve, which takes the rows of :meth:`once`."""
        del step, count
        return self._first(), self.data.unpack

    def check_begins_anew(self) -> None:
        """Raise a ValueError for a loader whose iterators are one: a solve in mid-epoch would end the epoch."""
        given = self.data.given
        if self.steps is None and iter(given) is iter(given):
            raise ValueError(
                f"train: with `solve_every` each pass through `data` must have an iterator of its own, got a "
                f"{type(given).__name__} whose __iter__ gives one and the same: a solve would read the rest of the "
                "epoch. Let __iter__ make a new one (in PyTorch: persistent_workers=False), or give the rows of solves "
                "as solve_data=."
            )

    def empty(self) -> ValueError:
        """What to raise for an epoch without a batch."""
        given = self.data.given
        return dataclasses.replace(self.data, given=given.loader if isinstance(given, _ReadAhead) else given).empty()

    def fingerprint(self) -> Fingerprint:
        """Of the first batch; what is not the same in a second reading is left out, for that loader shuffles.

        A loader whose ``__iter__`` gives one iterator again and again is read once: its next pass begins with the batch
        that was read, and nothing of it is known again but shapes and dtypes.
        """
        given, stream = self.data.given, iter(self.data.given)
        if (again := iter(given)) is stream:
            read = list(itertools.islice(stream, 1))
            self.data = dataclasses.replace(self.data, given=_ReadAhead(given, itertools.chain(read, stream)))
            batches = dataclasses.replace(self.data, given=read).batches()
            return {name: [*of, None] for name, (*of, _) in described(_arrays(_first_of(batches)), _READ_BYTES).items()}
        passes = dataclasses.replace(self.data, given=again), self.data
        one, two = (described(_arrays(_first_of(each.batches())), _READ_BYTES) for each in passes)
        return {
            name: [a if a == b else None for a, b in zip(one[name], two[name], strict=True)]
            for name in one
            if name in two
        }

    def _first(self) -> Iterable[Any]:
        """Those of one pass, or the first ones."""
        return self.data.given if self.steps is None else itertools.islice(self.data.given, self.steps)

    def _endless(self) -> Iterator[Batch]:
        """Pass after pass, until one is empty."""
        batch = object()
        while batch is not None:
            batch = None
            for batch in self.data.batches():
                yield batch


@dataclasses.dataclass
class _ReadAhead:
    """A loader of which something has been read, which the first pass gets."""

    loader: Any
    first: Iterator[Any] | None

    def __iter__(self) -> Iterator[Any]:
        first, self.first = self.first, None
        return iter(self.loader) if first is None else first

    def __len__(self) -> int:
        return len(self.loader)


def _first_of(some: Iterator[Batch]) -> dict[str, Any]:
    """The arrays of the first batch, by name; empty if there is none."""
    for batch in some:
        return {"argument": batch.args, "arguments": batch.kwargs, "y": batch.y, "weight": batch.weight}
    return {}


def _arrays(tree: Any) -> dict[str, Any]:
    """The arrays of a tree, by name; those of objects, which the check of batches refuses, are left out."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        if isinstance(leaf, Array) or (isinstance(leaf, np.ndarray | np.generic) and not leaf.dtype.hasobject)
    }
