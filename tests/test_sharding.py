"""Several devices, and several processes, against one."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def _free_port():
    with socket.socket() as any_port:
        any_port.bind(("127.0.0.1", 0))
        return any_port.getsockname()[1]


@pytest.mark.slow
def test_whatever_the_mesh_and_the_sharding_the_result_is_that_of_one_device(tmp_path):
    """Fits, solves, runs with checkpoints, grafts, linen and NNX; and parameters keep the shardings that they had."""
    command = [sys.executable, "tests/sharded.py", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def _run(count, directory, *extra):
    """What process 0 printed, of so many processes, which together have two devices; None if they are killed."""
    port = str(_free_port())
    arguments = [[port, str(number), str(count), str(directory), *extra] for number in range(count)]
    quiet = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    started = [subprocess.Popen([sys.executable, "tests/processes.py", *each], **quiet) for each in arguments]
    try:
        said = [started[0].communicate(timeout=120)]
        if extra:  # the others wait for process 0
            return None
        said += [process.communicate(timeout=120) for process in started[1:]]
    finally:
        for process in started:
            with process:
                process.kill()
    assert not any(process.returncode for process in started), [err[-2000:] for _, err in said]
    return json.loads(said[0][0].splitlines()[-1])


@pytest.mark.slow
def test_two_processes_that_are_killed_and_started_again_give_what_one_gives(tmp_path):
    """Each has a device and its rows; callbacks are called in the first, where the run is killed."""
    expected = _run(1, tmp_path / "one")
    _run(2, tmp_path / "two", "kill")
    assert sorted(p.name for p in (tmp_path / "two").iterdir() if p.name.isdecimal()) == ["3"]
    assert _run(2, tmp_path / "two") == pytest.approx(expected, rel=1e-7)
