"""Compiled programs kept on disk, in the user's cache folder: the same command compiles nothing the next time."""

import hashlib
import platform
from pathlib import Path

import jax
import platformdirs

_SHORTEST = 0.05  # seconds of compilation that are worth a file


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
