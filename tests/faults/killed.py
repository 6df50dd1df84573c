"""A process that is killed while it works: ``python -m tests.faults.killed`` forks one for each line that it reads.

The parent has imported everything and started nothing, so that a fork is sound and costs no import.
"""

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def _die() -> None:
    """As by the kernel: nothing is closed, flushed or told."""
    os.kill(os.getpid(), signal.SIGKILL)


def _work(job: dict[str, Any]) -> None:
    """The call of a subject, in the process that dies."""
    from .draw import SUBJECTS
    from .harm import Spoil, watched, written

    directory = Path(job["directory"])
    subject = SUBJECTS[job["function"]]()
    if job["largest"] is not None:  # TensorStore's writes are not Python's; so the kernel counts, and kills
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["largest"], job["largest"]))
    with watched(directory, job["operation"], _die, subject.reads), written(job["write"], job["part"], _die):
        subject.run(directory, Spoil())


def _tell(answer: dict[str, int]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


def main() -> None:
    """Read jobs, and write the status of each."""
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "1e9"  # a process that may be killed adds no program
    import cronos_flax.compare.cli
    import cronos_flax.compare.plots
    import cronos_flax.compare.progress
    import cronos_flax.compare.sweep  # noqa: F401

    threads = len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else 1
    _tell({"threads": threads})
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            status = 1
            with contextlib.suppress(BaseException):
                sys.stdin.close()
                _work(json.loads(line))
                status = 0
            os._exit(status)
        _, status = os.waitpid(child, 0)
        _tell({"status": os.waitstatus_to_exitcode(status)})


class Killer:
    """Starts that process when it is needed."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def __call__(self, **job: Any) -> int:
        """The status that the working process ended with."""
        if self._process is None:
            package = __package__ or "tests.faults"
            path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
            env = {**os.environ, "PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1"}
            command = [sys.executable, "-m", f"{package}.killed"]
            pipe = subprocess.PIPE
            self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=ROOT, env=env)
            assert json.loads(self._answer()) == {"threads": 1}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        return int(json.loads(self._answer())["status"])

    def _answer(self) -> str:
        assert self._process is not None
        assert self._process.stdout is not None
        return self._process.stdout.readline()

    def close(self) -> None:
        """End it."""
        if self._process is not None:
            self._process.communicate()
            self._process = None


if __name__ == "__main__":
    main()
