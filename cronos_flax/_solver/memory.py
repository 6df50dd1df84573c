"""How much memory there is: of the machine, of the control group of the process, and of the accelerator."""

import functools
from pathlib import Path
from typing import NamedTuple

import jax

_SHARE = 6  # a solve in memory holds its features two to three times (docs/benchmarks/memory.md), and more may start
_UNKNOWN = 2**32  # bytes of features, where no system says what is free
_NONE = 2**62  # bytes: for no limit, version 1 of control groups says a number above this


def available(root: Path = Path("/")) -> int | None:
    """Bytes of host memory that this process can still take; None where the system does not say.

    That is Linux's ``MemAvailable``, or what the limits of the control groups (versions 1 and 2) leave, if that is
    less. Pages of files, which the system can drop, count as free.

    Args:
        root: of the file system.
    """
    machine = _named(root / "proc/meminfo").get("MemAvailable:")
    left = [] if machine is None else [machine * 1024]
    for group, names in _with_a_limit(root):
        most, now = _number(group / names.limit), _number(group / names.used)
        if most is not None and now is not None:
            droppable = _named(group / "memory.stat")
            left.append(max(most - now + sum(droppable.get(name, 0) for name in names.droppable), 0))
    return min(left, default=None)


class _Names(NamedTuple):
    """Names of the files of a control group, and of the lines of ``memory.stat`` with pages that can be dropped."""

    limit: str
    used: str
    droppable: tuple[str, str]


_VERSIONS = (
    _Names("memory.max", "memory.current", ("active_file", "inactive_file")),
    _Names("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_active_file", "total_inactive_file")),
)


@functools.cache  # a solve asks several times how much is free, and there are many groups without a limit
def _with_a_limit(root: Path) -> list[tuple[Path, _Names]]:
    """The control groups that had a limit when they were first asked for."""
    found = [(group, names) for group in _groups(root) for names in _VERSIONS]
    limits = [_number(group / names.limit) for group, names in found]
    return [each for each, limit in zip(found, limits, strict=True) if limit is not None and limit < _NONE]


def most_bytes(given: int | None, held: int = 0) -> int:
    """Most bytes of features to take into memory.

    Args:
        given: as the user set it; None for a share of what is free.
        held: bytes of features that are in host memory already.
    """
    if given is not None:
        return given
    host = available()
    left = [None if host is None else host + held, *map(_free_on, jax.local_devices())]
    return min((size // _SHARE for size in left if size is not None), default=_UNKNOWN)


def _free_on(device: jax.Device) -> int | None:
    """Bytes that a device can still take; None where it does not say, as the CPU does not."""
    stats = device.memory_stats() or {}
    return stats["bytes_limit"] - stats.get("bytes_in_use", 0) if "bytes_limit" in stats else None


def _groups(root: Path) -> list[Path]:
    """The directories of the control groups that the process is in, up to the topmost."""
    found = []
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory"):
            top = root / "sys/fs/cgroup" / controllers
            inside = top / path.strip().lstrip("/")
            found += [inside, *inside.parents[: len(inside.parts) - len(top.parts)]]
    return found


def _named(path: Path) -> dict[str, int]:
    """The numbers of a file with a name and a number in each line."""
    words = [line.split() for line in _lines(path)]
    return {line[0]: int(line[1]) for line in words if len(line) > 1 and line[1].isdigit()}


def _number(path: Path) -> int | None:
    """The number in a file; None for another word, such as ``max``, and where there is no file."""
    first = (_lines(path) or [""])[0].strip()
    return int(first) if first.isdigit() else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
