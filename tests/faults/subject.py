"""A function under test: what lies there before, how it is called, which results are right, what must not be lost."""

import functools
import json
import shutil
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .harm import Spoil, copied, watched, written

Value = Any  # what a call gives, as JSON has it


class Undisturbed(NamedTuple):
    """An undisturbed call.

    Args:
        value: its result.
        spoil: what was asked of the caller.
        operations: on files, by Python.
        writes: of Python to file descriptors.
        size: bytes of the files that it wrote.
        largest: bytes of the largest file.
    """

    value: Value
    spoil: Spoil
    operations: int
    writes: int
    size: int
    largest: int


class Subject:
    """A public function with the faults that can befall it.

    Attributes:
        name: as users call it.
        faults: by name, see ``attack``.
        files: whether it writes files.
    """

    name: str
    faults: tuple[str, ...]
    files = True

    def make_template(self, directory: Path) -> None:
        """Lay out, once, what an earlier call has left."""

    def prepare(self, directory: Path, several: bool = False) -> None:
        """Lay out what is there before the call; ``several`` results of earlier ones, where there can be."""
        copied(self.template, directory)

    def run(self, directory: Path, spoil: Spoil) -> Value:
        """The call; what it gives."""
        raise NotImplementedError

    def beside(self, directory: Path, rng: np.random.Generator) -> Value:
        """What a second writer does meanwhile."""
        return self.run(directory, Spoil())

    def variables(self) -> Any:
        """The caller's variables, which no call may change: a tree of arrays."""
        return ()

    def damageable(self, directory: Path) -> list[Path]:
        """The files that damage can meet."""
        return sorted(path for path in directory.rglob("*") if path.is_file() and path.stat().st_size)

    def is_right(self, value: Value, spoil: Spoil, damaged: bool) -> bool:
        """Whether this is a right result."""
        return self.same(value, self.reference)

    def same(self, value: Value, other: Value) -> bool:
        """Whether two results are the same."""
        return value == other

    def kept(self, directory: Path) -> Value:
        """What is there for good: as it is read, with none of it changed."""
        return None

    def lost(self, before: Value, after: Value) -> str | None:
        """What of it was lost by a call; None for nothing."""
        return None if before == after else "what was there is not there"

    def dirties(self, damaged: bool) -> bool:
        """Whether the call with the fault taken away may still be refused, for what lies there is damaged."""
        return damaged

    # What an undisturbed call does, found once.

    home: Path  # for templates

    @functools.cached_property
    def template(self) -> Path:
        """The directory that cases begin with."""
        directory = self.home / "".join(c if c.isalnum() else "-" for c in self.name)
        directory.mkdir()
        self.make_template(directory)
        return directory

    @functools.cached_property
    def undisturbed(self) -> "Undisturbed":
        """What an undisturbed call does."""
        directory, spoil = self.home / "undisturbed", Spoil()
        self.prepare(directory)
        before = {path: path.stat().st_size for path in directory.rglob("*") if path.is_file()}
        self.run(self.home / "warm", Spoil())  # imports, compilation
        with watched(directory, reads=self.reads) as watch, written() as writes:
            value = self.run(directory, spoil)
        sizes = [p.stat().st_size - before.get(p, 0) for p in directory.rglob("*") if p.is_file()]
        largest = max([p.stat().st_size for p in directory.rglob("*") if p.is_file()], default=0)
        remove(directory)
        remove(self.home / "warm")
        return Undisturbed(value, spoil, watch.count, writes[0], sum(sizes), largest)

    reads = False  # whether a second writer may come between its reads

    @property
    def reference(self) -> Value:
        """The result of the undisturbed call."""
        return self.undisturbed.value


def remove(directory: Path) -> None:
    """Remove a directory, if it is there."""
    shutil.rmtree(directory, ignore_errors=True)


def checksum(tree: Any) -> int:
    """Of all arrays in a tree, keys included."""
    import jax

    total = 0
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, jax.Array) and jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        array = np.asarray(leaf)
        total = zlib.crc32(f"{array.shape}{array.dtype}".encode() + array.tobytes(), total)
    return total


def untimed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows without their times, as JSON gives them back."""
    times = ("seconds", "solve_seconds", "compile_seconds")
    return json.loads(json.dumps([{k: v for k, v in row.items() if k not in times} for row in rows]))


def told(call: Callable[[], Any]) -> tuple[Any, list[str]]:
    """What a call returns, and the warnings that it gave."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        value = call()
    return value, [str(warning.message) for warning in said]
