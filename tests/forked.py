"""Scripts in processes of their own that import nothing anew: to import the package takes three CPU seconds each time.

They are forked from a process that has imported it, and has started neither a device nor a thread.
"""

import atexit
import multiprocessing
import os
import runpy
import sys
import tempfile
import warnings
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
IMPORTED = ["cronos_flax.compare.cli", "cronos_flax.compare.plots", "cronos_flax.compare.sweep", "forked"]
# Programs are read from the cache of these tests. A process that may be killed while it writes adds none.
ADDS_NONE = {"jax_persistent_cache_min_compile_time_secs": 1e9}


class Forked:
    """``python ARGUMENTS``, which has begun: a script, or ``-m`` and a module, or ``-c`` and code, and its arguments.

    Args:
        files: a directory for what it says.
        arguments: as on the command line.
        config: settings of JAX, by name.
        strict: a ``UserWarning`` is an error, as with ``-W error::UserWarning``.
    """

    def __init__(self, files, *arguments, config=None, strict=False):
        self._said = [_new_file(files) for _ in ("stdout", "stderr")]
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(IMPORTED)
        with mock.patch.dict(os.environ, OPENBLAS_NUM_THREADS="1"):  # a process with threads cannot be forked
            forkserver.ensure_running()
        self._process = context.Process(target=_run, args=(list(map(str, arguments)), self._said, config or {}, strict))
        self._process.start()

    @property
    def pid(self):
        return self._process.pid

    def kill(self):
        """End it, if it has not ended."""
        self._process.kill()

    def wait(self, timeout=300):
        """The status that it ended with, or None if it has not; what it wrote to stdout, and to stderr."""
        self._process.join(timeout)
        return self._process.exitcode, *(Path(file).read_text() for file in self._said)


def _new_file(directory):
    number, name = tempfile.mkstemp(dir=directory)
    os.close(number)
    return name


def _run(arguments, said, config, strict):
    for number, file in enumerate(said, start=1):
        os.dup2(os.open(file, os.O_WRONLY), number)
    threads = Path(f"/proc/{os.getppid()}/task")
    assert not threads.is_dir() or len(list(threads.iterdir())) == 1, "a process with threads was forked"
    os.chdir(ROOT)
    import jax

    for name, value in config.items():
        jax.config.update(name, value)
    if strict:
        warnings.simplefilter("error", UserWarning)
    first, *rest = arguments
    sys.argv = arguments if first not in ("-m", "-c") else [first, *rest[1:]]
    try:
        if first == "-m":
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        elif first == "-c":
            exec(rest[0], {"__name__": "__main__"})
        else:
            sys.path.insert(0, os.path.dirname(first))
            runpy.run_path(first, run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # forked processes of multiprocessing leave them out
