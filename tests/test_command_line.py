"""The directory of results: held by one process, never rewritten, and damage in it is found."""

import contextlib
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from disks import largest_file
from forked import ADDS_NONE, Forked
from stopped import stopped

from cronos_flax._head import files
from cronos_flax.compare import results
from cronos_flax.compare.results import add, kept, repaired
from cronos_flax.compare.sweep import sweep
from cronos_flax.compare.task import Run, Settings

ROOT = Path(__file__).resolve().parents[1]
WINE = ("--dataset", "wine", "--model", "two-layer", "--batch-size", "32")

HOLDER = """
import pathlib, sys, time
from cronos_flax._head import files
with files.locked(pathlib.Path(sys.argv[1])):
    pathlib.Path(sys.argv[2]).touch()
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path, tmp_path_factory):
    """Another process that holds `tmp_path / "out"`."""
    told = tmp_path_factory.mktemp("told")
    process = Forked(told, "-c", HOLDER, tmp_path / "out", told / "held")
    while not (told / "held").exists():
        assert process.wait(0.01)[0] is None
    yield process
    process.kill()
    process.wait()


@pytest.mark.parametrize("command", ["compare", "train"])
def test_a_directory_that_another_process_holds_is_refused_at_once(command, holder, tmp_path, capsys):
    """Two sweeps into one directory both ended well, and kept 1 of 14 runs."""
    code, said = stopped([command, *WINE, "--out", tmp_path / "out"], capsys)
    assert code == 1
    assert f"out is held by process {holder.pid} on {os.uname().nodename} since " in said
    assert said.endswith("Wait until it ends, stop it, or give another directory.")
    assert os.listdir(tmp_path / "out") == [".lock"]


def test_a_sweep_of_the_library_is_refused_too_and_nothing_is_read_or_written(holder, tmp_path):
    with pytest.raises(BlockingIOError, match=f"is held by process {holder.pid} on"):
        sweep(Settings("wine"), [Run("adam", 1e-3, 0)], tmp_path / "out")
    with files.locked(tmp_path / "mine"), pytest.raises(BlockingIOError, match=f"is held by process {os.getpid()} on"):
        sweep(Settings("wine"), [Run("adam", 1e-3, 0)], tmp_path / "mine")


def test_what_a_killed_process_left_in_the_lock_does_not_hold(holder, tmp_path):
    """Nor does the number of a process that somebody else has now."""
    holder.kill()
    holder.wait()
    lock = tmp_path / "out" / ".lock"
    assert f"process {holder.pid} on" in lock.read_text()
    for left in (lock.read_text(), f"process {os.getpid()} on {os.uname().nodename} since ever\n", "", "\0\xff"):
        lock.write_text(left, encoding="latin1")
        with files.locked(tmp_path / "out"):
            assert lock.read_text().startswith(f"process {os.getpid()} on")
        assert lock.read_text() == ""
    with pytest.raises(ZeroDivisionError), files.locked(tmp_path / "out"):
        raise ZeroDivisionError
    with files.locked(tmp_path / "out"):
        pass


@pytest.mark.slow
def test_of_two_sweeps_started_together_no_finished_run_is_lost(tmp_path, tmp_path_factory):
    """Before: 1 of 14 finished runs was kept."""
    said = tmp_path_factory.mktemp("said")

    def start(method):
        args = [*WINE, "--methods", method, "--rates", "2", "--seeds", "1", "--epochs", "2", "--out", tmp_path]
        return Forked(said, "-m", "cronos_flax", "compare", *args, config=ADDS_NONE)

    both = {method: start(method) for method in ("adam", "sgd")}
    ended = {method: process.wait() for method, process in both.items()}
    well = [method for method, (status, _, _) in ended.items() if status == 0]
    assert well
    done = {row["method"] for row in kept(tmp_path / "results.jsonl")}
    assert done == set(well)
    for method in both.keys() - set(well):
        status, _, err = ended[method]
        assert status == 1
        assert "is held by process" in " ".join(err.split())


def finished(method, rate=0.1, epochs=3):
    rows = [{"method": method, "rate": rate, "seed": 0, "epoch": e, "test_accuracy": 0.5 + e / 8} for e in (1, 2, 3)]
    return [*rows[: epochs - 1], {**rows[epochs - 1], "end": True}]


def test_many_writers_of_one_file_lose_no_run_that_is_finished(tmp_path):
    def work(name):
        for i in range(12):
            while True:
                with contextlib.suppress(BlockingIOError), files.locked(tmp_path):
                    before = repaired(tmp_path / "results.jsonl")
                    add(tmp_path / "results.jsonl", finished(name, i))
                    assert kept(tmp_path / "results.jsonl") == before + finished(name, i)
                    break

    writers = [threading.Thread(target=work, args=(name,)) for name in "abc"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    runs = results.by_run(kept(tmp_path / "results.jsonl"))
    assert runs == {Run(name, i, 0): finished(name, i) for name in "abc" for i in range(12)}


@pytest.fixture
def path(tmp_path):
    """A file of two finished runs."""
    add(tmp_path / "results.jsonl", finished("adam"))
    add(tmp_path / "results.jsonl", finished("sgd"))
    return tmp_path / "results.jsonl"


def test_a_file_cut_anywhere_keeps_its_finished_runs_and_takes_more(path):
    whole = path.read_bytes()
    ends = whole.index(b'{"method": "sgd"')
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        runs = (finished("adam") if size >= ends - 1 else []) + (finished("sgd") if size >= len(whole) - 1 else [])
        assert kept(path) == runs
        assert path.read_bytes() == whole[:size]  # reading changes nothing
        assert repaired(path) == runs
        add(path, finished("muon"))
        assert kept(path) == runs + finished("muon")


@pytest.mark.parametrize("bits", [0x01, 0x07, 0x20, 0x80])
def test_a_byte_that_changed_is_found_and_nothing_is_changed(path, bits):
    """A figure could change on the disk and be reported."""
    whole, rows = path.read_bytes(), kept(path)
    for place in range(len(whole)):
        changed = whole[:place] + bytes([whole[place] ^ bits]) + whole[place + 1 :]
        path.write_bytes(changed)
        if changed[-1:] == b"\r":  # nothing is wrong with the line
            assert kept(path) == rows
            continue
        number = whole[:place].count(b"\n") + 1
        for read in (kept, repaired):
            with pytest.raises(ValueError, match=rf"line {number} of {path} is damaged: .* Nothing was changed\. Take"):
                read(path)
            assert path.read_bytes() == changed


def without(number):
    return lambda lines: lines[: number - 1] + lines[number:]


DAMAGE = {
    "a line is gone": (without(2), "line 2 .* checksum"),
    "the first line of a run is gone": (without(4), "line 4 .* checksum"),
    "the end of a run is gone": (without(3), "line 3 .* checksum"),
    "the same in a file of an earlier version": (
        lambda lines: [re.sub(rb', "crc32.*', b"}", line) for line in without(3)(lines)],
        "line 3 .* belongs to another run than line 1, which has not ended",
    ),
    "a run is there twice": (lambda lines: lines + lines[:3], "line 7 .* begins a run that line 1 has begun already"),
    "half a line in the middle": (lambda lines: [*lines[:1], lines[1][:30], *lines[2:]], "line 2 .* is not JSON"),
    "no row": (lambda lines: [*lines[:3], b"[1, 2]", *lines[3:]], "line 4 .* is not a row of a run"),
    "a line by hand": (
        lambda lines: [*lines, json.dumps(finished("yogi", epochs=1)[0]).encode()],
        "line 7 .* has no checksum",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_in_the_middle_is_reported_by_number(path, case):
    change, message = DAMAGE[case]
    path.write_bytes(b"\n".join(change(path.read_bytes().splitlines())) + b"\n")
    with pytest.raises(ValueError, match=message):
        kept(path)


def test_files_of_earlier_versions_are_read_and_go_on(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text("".join(json.dumps(row) + "\r\n" for row in finished("adam") + finished("sgd")))
    add(path, finished("muon"))
    assert repaired(path) == finished("adam") + finished("sgd") + finished("muon")
    assert kept(tmp_path / "none.jsonl") == []


def test_whole_runs_can_be_taken_out_and_files_put_together(path):
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[3:] + lines[:3]))
    assert kept(path) == finished("sgd") + finished("adam")
    path.write_bytes(b"".join(lines[3:]))
    assert kept(path) == finished("sgd")


def test_a_sweep_into_a_damaged_file_stops_before_any_run(path, tmp_path):
    damaged = path.read_bytes().replace(b"0.625", b"0.725", 1)
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"line 1 .* is damaged: it does not fit its checksum"):
        sweep(Settings("wine"), [Run("muon", 1e-3, 0)], tmp_path)
    assert path.read_bytes() == damaged


def test_a_write_that_fails_leaves_nothing_and_names_the_file(path):
    whole = path.read_bytes()
    with largest_file(len(whole) + 100), pytest.raises(OSError, match=f"File too large: '{path}'"):
        add(path, finished("muon"))
    assert path.read_bytes() == whole
    with largest_file(20), pytest.raises(OSError, match=f"File too large: '{path}'"):
        files.replace(path, whole * 2)
    assert path.read_bytes() == whole
    assert os.listdir(path.parent) == [path.name]
    with largest_file(0), pytest.raises(OSError, match=r"File too large: '.*\.lock'"), files.locked(path.parent):
        pass


@pytest.mark.parametrize("command", ["compare", "train"])
def test_a_disk_that_is_full_is_one_line_and_the_status_1(command, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".lock").touch()
    with largest_file(0):
        code, said = stopped([command, *WINE, "--out", tmp_path / "out", "--quiet"], capsys)
    assert code == 1
    assert said.startswith(f"cronos-flax {command}: error: [Errno 27] File too large: '{tmp_path}/out/.lock'")


@pytest.mark.parametrize("command", ["compare", "train"])
def test_a_directory_that_is_none_is_refused(command, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        code, said = stopped([command, *WINE, "--out", out], capsys)
        assert code == 2
        assert f"`--out` must be a directory, or one that can be made, got {out}" in said
    assert (tmp_path / "file").read_text() == "mine"
    code, said = stopped([command, *WINE, "--out", "s3://bucket/run"], capsys)  # it was a folder s3: here
    assert code == 2
    assert "`--out` must be a path of this machine's file systems, got the URL s3:/bucket/run" in said
    code, said = stopped([command, *WINE, "--out", ""], capsys)  # as of a variable that is not set; it was the one here
    assert code == 2
    assert "argument --out: must be a directory, got ''" in said


def test_a_directory_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "out").mkdir(mode=0o555)
    root = os.geteuid() == 0  # who may write anywhere
    tops = [p for p in tmp_path.parents if p.stat().st_mode & 0o005 != 0o005] if root else []
    modes = {p: p.stat().st_mode for p in (tmp_path, *tops)}
    for p in modes if root else ():
        p.chmod(0o755)
    try:
        if root:
            os.seteuid(65534)
        for out in (tmp_path / "out", tmp_path / "out" / "below"):
            with pytest.raises(PermissionError, match=str(out)), files.locked(out):
                pass
    finally:
        if root:
            os.seteuid(0)
        for p, mode in modes.items() if root else ():
            p.chmod(mode)


def test_compiled_programs_are_kept_unless_the_user_says_no(tmp_path):
    """The same command again compiled everything again."""
    said = (
        "import jax, sys; from cronos_flax.compare.cli import main\n"
        "for more in (['--compile-anew'], []):\n"
        "    main(['info', '--dataset', 'wine', '--model', 'two-layer', *more])\n"
        "    print('kept in', jax.config.values['jax_compilation_cache_dir'])"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_COMPILATION_CACHE")}
    environment |= {"XDG_CACHE_HOME": str(tmp_path), "JAX_ENABLE_COMPILATION_CACHE": "1"}
    run = subprocess.run([sys.executable, "-c", said], env=environment, capture_output=True, text=True, check=True)
    kept = re.findall("kept in (.*)", run.stdout)
    assert kept[0] == "None"
    assert Path(kept[1]).parent == tmp_path / "cronos_flax"
