"""Compiled programs kept on disk, in the user's cache folder: the same command compiles nothing the next time.

The folder holds at most 1 GiB when a command begins: see :func:`trim`.
"""

import contextlib
import hashlib
import os
import platform
import time
from pathlib import Path

import jax
import platformdirs

_SHORTEST = 0.05  # seconds of compilation that are worth a file
_LARGEST = 1 << 30  # bytes of all files
_UNUSED = 14 * 24 * 3600  # seconds after which a file goes


def directory() -> Path:
    """Where they are kept: a folder for each kind of CPU, as compiled code is for that."""
    cpuinfo = Path("/proc/cpuinfo")
    described = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    features = [line for line in described if line.startswith(("flags", "Features"))]
    kind = hashlib.sha256("".join([platform.machine(), *features[:1]]).encode()).hexdigest()[:12]
    return platformdirs.user_cache_path("cronos_flax") / f"jax-{kind}"


def keep() -> None:
    """Keep the programs of this process; where the user has chosen a folder for JAX's, or none, nothing changes."""
    if jax.config.values["jax_compilation_cache_dir"] is None and jax.config.values["jax_enable_compilation_cache"]:
        jax.config.update("jax_compilation_cache_dir", str(directory()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", _SHORTEST)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
        trim(directory(), _LARGEST)


def trim(folder: Path, largest: int) -> None:
    """Remove the files that were not used for a fortnight, and then the least recently used, down to ``largest`` bytes.

    JAX's own limit, ``jax_compilation_cache_max_size``, takes a lock at every read and looks through the folder at
    every write. What another process has removed meanwhile is passed over.
    """
    files: list[tuple[float, int, Path]] = []
    for file in folder.glob("*"):
        with contextlib.suppress(OSError):
            stat = file.stat()
            files.append((max(stat.st_atime, stat.st_mtime), stat.st_size, file))
    room, oldest = largest, time.time() - _UNUSED
    for used, size, file in sorted(files, reverse=True):
        room -= size
        if used < oldest or room < 0:
            with contextlib.suppress(OSError):
                os.unlink(file)
