"""A directory of results: held by one process at a time; files in it are added to or replaced whole."""

import errno
import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from cronos_flax._solver.processes import by_first, is_first

try:
    import fcntl
except ImportError:  # not Unix
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
_URL = re.compile("[A-Za-z][A-Za-z0-9+.-]+:/")  # pathlib makes one slash of two; a drive has one letter
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)


def check_path(where: str, name: str, value: Any) -> None:
    """Raise a ValueError unless an argument is the path of a file or of a directory of this machine."""
    text = os.fspath(value) if isinstance(value, str | os.PathLike) else ""
    if not isinstance(text, str) or not text:
        raise ValueError(f"{where}: `{name}` must be a path, as a str or a pathlib.Path, got {value!r}.")
    if _URL.match(text):  # as a path it would be a folder of that name, here
        raise ValueError(
            f"{where}: `{name}` must be a path of this machine's file systems, got the URL {text}. Mount what it names,"
            " or give a local path and copy the files."
        )
    if text == "~" or text.startswith("~/"):
        raise ValueError(f"{where}: `{name}` must be a path without ~, got {text}. Give os.path.expanduser({text!r}).")


@contextmanager
def locked(directory: Path, name: str = "`out`") -> Iterator[None]:
    """Hold a directory, so that nobody else writes results there; it is made if it does not exist.

    The lock is the operating system's, on the file ``.lock``, which says who holds it. It ends with its process, also
    with one that is killed: what a process that is gone has left in the file does not count. On a file system without
    such locks nothing is held.

    Args:
        directory: the directory.
        name: what the caller calls it, for the message.

    Raises:
        BlockingIOError: if it is held already, by another process or by this one; the message says by which.
        OSError: if it cannot be made or written to.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:  # a file has its name, or the name of a folder above
        there = next(path for path in (directory, *directory.parents) if os.path.lexists(path))
        kind = "a file" if there.exists() else "a link to what does not exist"
        raise NotADirectoryError(
            f"{name} must be a directory, or the name of one to make, got {directory}, and {there} is {kind}."
        ) from error
    path = directory / LOCK
    lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        with named(path):
            if not _locked(lock):
                raise _held_already(lock, directory, name, "Wait until it ends, stop it, or give another directory.")
            os.ftruncate(lock, 0)
            _write(lock, f"process {os.getpid()} on {socket.gethostname()} since {time.ctime()}\n".encode())
        yield
        os.ftruncate(lock, 0)
    finally:
        os.close(lock)


@contextmanager
def locked_by_all(directory: Path, name: str) -> Iterator[None]:
    """:func:`locked`, by the first of several processes for all of them; they see the same directory."""
    with ExitStack() as stack:
        try:
            by_first(lambda: stack.enter_context(locked(directory, name)))
        except OSError as error:
            if is_first():
                raise
            raise BlockingIOError(
                f"{name} {directory} could not be held by process 0, whose error says why."
            ) from error
        yield


@contextmanager
def at_rest(directory: Path, name: str) -> Iterator[None]:
    """Read a directory that nobody holds; nobody can hold it meanwhile. Nothing is written, so it may be read-only.

    Args:
        directory: the directory.
        name: what the caller calls it, for the message.

    Raises:
        BlockingIOError: if it is held; the message says by which process.
    """
    path = directory / LOCK
    if not path.exists():  # never held, or a copy
        yield
        return
    lock = os.open(path, os.O_RDONLY)
    try:
        with named(path):
            if not _locked(lock, shared=True):
                raise _held_already(lock, directory, name, "Wait until it ends, or stop it.")
        yield
    finally:
        os.close(lock)


def _locked(descriptor: int, *, shared: bool = False) -> bool:
    """Whether the lock could be had; True where there are no locks."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    return True


def _held_already(lock: int, directory: Path, name: str, remedy: str) -> BlockingIOError:
    holder = os.read(lock, 1000).decode(errors="replace").strip() or "another process"
    return BlockingIOError(f"{name} {directory} is held by {holder}, which writes its results there. {remedy}")


@contextmanager
def named(path: Path) -> Iterator[None]:
    """An error of the operating system inside names the file, as those of a write (a full disk) do not."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
        raise


def append(path: Path, content: bytes) -> None:
    """Add to a file, all or nothing, and onto the disk; what a kill in between leaves is the reader's to repair."""
    with named(path), path.open("ab", buffering=0) as file:
        size = file.tell()
        try:
            _write(file.fileno(), content)
        except OSError:
            file.truncate(size)
            raise


def replace(path: Path, content: bytes) -> None:
    """Write a file anew: it has its old content or the new one, at any moment and after any error."""
    fresh = path.with_name(f"{path.name}.new")
    try:
        with named(path), fresh.open("wb", buffering=0) as file:
            _write(file.fileno(), content)
        fresh.replace(path)
    except OSError:
        fresh.unlink(missing_ok=True)
        raise


def _write(descriptor: int, content: bytes) -> None:
    while content:
        content = content[os.write(descriptor, content) :]
    os.fsync(descriptor)
