"""Several devices, and several processes, against one."""

import json
import socket

import pytest
from forked import Forked


def _free_port():
    with socket.socket() as any_port:
        any_port.bind(("127.0.0.1", 0))
        return any_port.getsockname()[1]


@pytest.mark.slow
@pytest.mark.parametrize("whose", ["solves", "models"])
def test_whatever_the_mesh_and_the_sharding_the_result_is_that_of_one_device(tmp_path, whose):
    """Fits, solves, runs with checkpoints, grafts, linen and NNX; and parameters keep the shardings that they had.

    On meshes of one axis and of two, of both kinds of axes.

    Steps send sums only. Before: restored scalars on device 0, ShardingTypeError on explicit axes.
    """
    status, _, err = Forked(tmp_path, "tests/sharded.py", tmp_path / "run", whose).wait(900)
    assert status == 0, err[-4000:]


def _begun(count, directory, *extra):
    """So many processes, which together have two devices; they are killed if ``extra`` says so."""
    port = str(_free_port())
    arguments = [[port, number, count, directory, *extra] for number in range(count)]
    return [Forked(directory.parent, "tests/processes.py", *each) for each in arguments]


def _ended(processes, *, killed=False):
    """What process 0 printed; of killed ones, whose others wait for process 0, nothing."""
    try:
        ended = [process.wait() for process in (processes[:1] if killed else processes)]
    finally:
        for process in processes:
            process.kill()
    if killed:
        return None
    assert not any(status for status, _, _ in ended), [err[-2000:] for _, _, err in ended]
    return json.loads(ended[0][1].splitlines()[-1])


@pytest.mark.slow
def test_two_processes_that_are_killed_and_started_again_give_what_one_gives(tmp_path):
    """Each has a device and its rows; callbacks are called in the first, where the run is killed.

    Before: fit_head on a global batch failed.
    """
    alone, two = _begun(1, tmp_path / "one"), _begun(2, tmp_path / "two", "kill")
    _ended(two, killed=True)
    assert sorted(p.name for p in (tmp_path / "two").iterdir() if p.name.isdecimal()) == ["3"]
    again = _begun(2, tmp_path / "two")
    assert _ended(again) == pytest.approx(_ended(alone), rel=1e-7)
