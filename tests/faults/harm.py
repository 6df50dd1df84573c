"""The faults themselves: disks that are full or read-only, bytes that change, NaN, exceptions, a second writer."""

import contextlib
import ctypes
import dataclasses
import os
import resource
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

_REMOUNT, _READ_ONLY = 32, 1  # flags of mount(2)
_NOBODY = 65534
_PAGE = os.sysconf("SC_PAGE_SIZE")
_CHANGES = frozenset(["os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.truncate", "shutil.rmtree"])


class MineError(Exception):
    """An exception of the user's."""


class MineInterrupt(KeyboardInterrupt):
    """An interrupt that is drawn, not typed."""


KINDS: tuple[Callable[[str], BaseException], ...] = (
    MineError,
    ValueError,
    TypeError,
    KeyError,
    OSError,
    MineInterrupt,
)


class Disk:
    """A directory for the cases: a file system of its own (tmpfs) where the process may mount one."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._libc = ctypes.CDLL(None, use_errno=True)
        self.mounted = False
        self.mounted = self._mount(0, "size=64m")
        directory.chmod(0o755)

    def _mount(self, flags: int, options: str) -> bool:
        if flags and not self.mounted:
            return False
        return self._libc.mount(b"faults", str(self.directory).encode(), b"tmpfs", flags, options.encode()) == 0

    def close(self) -> None:
        """Give the file system back."""
        if self.mounted:
            self._libc.umount2(str(self.directory).encode(), 2)  # also if a file is still open

    @contextlib.contextmanager
    def full(self, free: int, largest: int, by_size: bool) -> Iterator[str]:
        """There is only so much room: on the disk, or, where nothing can be mounted or ``by_size``, for each file."""
        if self.mounted and not by_size:
            pages = sum(-(-p.lstat().st_size // _PAGE) for p in self.directory.rglob("*") if p.is_file())
            pages += free // _PAGE
            self._mount(_REMOUNT, f"size={(pages + 1) * _PAGE}")
            try:
                yield f"{free // _PAGE} pages free"
            finally:
                self._mount(_REMOUNT, "size=64m")
            return
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, before[1]))
        try:
            yield f"no file above {largest} bytes"
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    @contextlib.contextmanager
    def read_only(self, case: Path, remount: bool) -> Iterator[str]:
        """Nothing can be written: the file system says so, or the modes of the directories, for who is not root."""
        if remount and self._mount(_REMOUNT | _READ_ONLY, ""):
            try:
                yield "read-only file system"
            finally:
                self._mount(_REMOUNT, "size=64m")
            return
        directories = [case, *(path for path in case.rglob("*") if path.is_dir())]
        root = os.geteuid() == 0  # who may write anywhere
        for path in directories:
            path.chmod(0o555)
        try:
            if root:
                os.seteuid(_NOBODY)
            yield "modes 555"
        finally:
            if root:
                os.seteuid(0)
            for path in directories:
                path.chmod(0o755)


class _Watch:
    """Counts the operations of Python on files below a directory, and acts at one of them."""

    def __init__(self, directory: Path, at: int, act: Callable[[], Any], reads: bool) -> None:
        self.directory, self.at, self.act, self.reads, self.count = str(directory), at, act, reads, 0
        self.lock = threading.Lock()

    def __call__(self, event: str, arguments: tuple) -> None:
        if event == "open":
            flags = arguments[2] if isinstance(arguments[2], int) else 0
            if not self.reads and not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                return
        elif event not in _CHANGES:
            return
        if not any(str(a).startswith(self.directory) for a in arguments[:2]):
            return
        with self.lock:
            self.count += 1
            now = self.count == self.at
        if now:
            self.act()


_watch: _Watch | None = None
_hooked = False
_aside = threading.local()  # of threads that are not watched


def _hook(event: str, arguments: tuple) -> None:
    if _watch is not None and not getattr(_aside, "is_set", False):
        _watch(event, arguments)


@contextlib.contextmanager
def watched(
    directory: Path, at: int = 0, act: Callable[[], Any] = lambda: None, reads: bool = False
) -> Iterator[_Watch]:
    """Act before the operation number ``at``, from 1, on files below the directory; ``count`` says how many came."""
    global _watch, _hooked
    if not _hooked:
        sys.addaudithook(_hook)  # for ever, but idle when nothing is watched
        _hooked = True
    _watch = mine = _Watch(directory, at, act, reads)
    try:
        yield mine
    finally:
        _watch = None


@contextlib.contextmanager
def written(at: int = 0, part: float = 0.0, act: Callable[[], Any] = lambda: None) -> Iterator[list[int]]:
    """Act in the write number ``at``, from 1, of Python to a file descriptor, after a part of it; a list of one count.

    The buffered files of Python do not come this way.
    """
    write, count = os.write, [0]

    def counted(descriptor: int, content: bytes) -> int:
        count[0] += 1
        if count[0] == at:
            write(descriptor, content[: int(part * len(content))])
            act()
        return write(descriptor, content)

    os.write = counted  # type: ignore[assignment]
    try:
        yield count
    finally:
        os.write = write


class Beside:
    """Does something in a thread of its own, to its end, while the thread that calls waits; it is not watched."""

    def __init__(self, do: Callable[[], Any]) -> None:
        self.do, self.thread = do, threading.Thread(target=self._work)

    def _work(self) -> None:
        _aside.is_set = True
        self.do()

    def __call__(self) -> None:
        self.thread.start()
        self.thread.join(2)  # it may wait for what the first has locked

    def end(self) -> bool:
        """Wait for its end; whether it began."""
        if self.thread.ident is not None:
            self.thread.join()
        return self.thread.ident is not None


def flip(file: Path, where: float, bit: int) -> str:
    """Change one bit."""
    content = bytearray(file.read_bytes())
    place = int(where * len(content))
    content[place] ^= 1 << bit
    file.write_bytes(content)
    return f"byte {place} of {file.name}"


def truncate(file: Path, where: float) -> str:
    """Cut a file short."""
    size = int(where * file.stat().st_size)
    os.truncate(file, size)
    return f"{file.name} cut to {size} bytes"


def copied(template: Path, to: Path) -> None:
    """Lay out a copy."""
    shutil.copytree(template, to, dirs_exist_ok=True)


@dataclasses.dataclass
class Spoil:
    """What goes wrong in what a caller hands over; it counts what is asked of it.

    Args:
        nan: batch, row, column and value of a feature that is not finite.
        passes: of the loader, from the first to the last, that have it.
        loader_at: the batch, counted over all passes from 1, before which the loader raises.
        callback_at: the call, from 1, at which the callback raises.
        kind: of the exception.
        arrays: hand over whole arrays, where a function takes both.
    """

    nan: tuple[int, int, int, float] | None = None
    passes: tuple[float, float] = (0, np.inf)
    loader_at: int = 0
    callback_at: int = 0
    kind: Callable[[str], BaseException] = MineError
    arrays: bool = False
    read: int = 0
    passed: int = 0
    called: int = 0
    raised: BaseException | None = None

    def callback(self, *_: Any) -> None:
        """The user's callback."""
        self.called += 1
        if self.called == self.callback_at:
            self._raise("of the callback")

    def batch(self) -> None:
        """Before the loader gives a batch."""
        self.read += 1
        if self.read == self.loader_at:
            self._raise("of the loader")

    def features(self, number: int, x: np.ndarray) -> np.ndarray:
        """The features of a batch, from 0, as this pass gives them."""
        if self.nan is None or self.nan[0] != number or not self.passes[0] <= self.passed <= self.passes[1]:
            return x
        _, row, column, value = self.nan
        x = x.copy()
        x[row, column] = value
        return x

    def _raise(self, text: str) -> None:
        self.raised = self.kind(text)
        raise self.raised


class Loader:
    """A re-iterable of batches."""

    def __init__(self, batches: list[tuple[np.ndarray, np.ndarray]], spoil: Spoil) -> None:
        self.batches, self.spoil = batches, spoil

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        self.spoil.passed += 1
        for number, (x, y) in enumerate(self.batches):
            self.spoil.batch()
            yield self.spoil.features(number, x), y
