"""The command line on other people's files and directories: nothing is lost, nothing changes without a word."""

import contextlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest

from cronos_flax.compare import files, methods, results
from cronos_flax.compare.cli import main
from cronos_flax.compare.data import Dataset, Split, load
from cronos_flax.compare.results import add, kept, repaired
from cronos_flax.compare.sweep import sweep
from cronos_flax.compare.task import Run, Settings

ROOT = Path(__file__).resolve().parents[1]
WINE = ("--dataset", "wine", "--model", "two-layer", "--batch-size", "32")

# --- The directory of results ----------------------------------------------------------------------------------------

HOLDER = f"""
import importlib.util, pathlib, sys, time
spec = importlib.util.spec_from_file_location("files", {files.__file__!r})
files = importlib.util.module_from_spec(spec)
spec.loader.exec_module(files)
with files.held(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds `tmp_path / "out"`."""
    with subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path / "out"], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"held\n"
        yield process
        process.kill()


def stopped(args, capsys):
    """The exit status of a command that stops with an error, and what it says, in one line."""
    with pytest.raises(SystemExit) as stop:
        main(list(map(str, args)))
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return stop.value.code, " ".join(said.split())


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
    with files.held(tmp_path / "mine"), pytest.raises(BlockingIOError, match=f"is held by process {os.getpid()} on"):
        sweep(Settings("wine"), [Run("adam", 1e-3, 0)], tmp_path / "mine")


def test_what_a_killed_process_left_in_the_lock_does_not_hold(holder, tmp_path):
    """Nor does the number of a process that somebody else has now."""
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    lock = tmp_path / "out" / ".lock"
    assert f"process {holder.pid} on" in lock.read_text()
    for left in (lock.read_text(), f"process {os.getpid()} on {os.uname().nodename} since ever\n", "", "\0\xff"):
        lock.write_text(left, encoding="latin1")
        with files.held(tmp_path / "out"):
            assert lock.read_text().startswith(f"process {os.getpid()} on")
        assert lock.read_text() == ""
    with pytest.raises(ZeroDivisionError), files.held(tmp_path / "out"):
        raise ZeroDivisionError
    with files.held(tmp_path / "out"):
        pass


@pytest.mark.slow
def test_of_two_sweeps_started_together_no_finished_run_is_lost(tmp_path):
    def start(method):
        args = [*WINE, "--methods", method, "--rates", "2", "--seeds", "1", "--epochs", "2", "--out", tmp_path]
        return subprocess.Popen(
            [sys.executable, "-m", "cronos_flax", "compare", *args],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=ROOT,
            env={**os.environ, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1e9"},
        )  # fmt: skip

    both = {method: start(method) for method in ("adam", "sgd")}
    said = {method: process.communicate(timeout=300)[1] for method, process in both.items()}
    well = [method for method, process in both.items() if process.returncode == 0]
    assert well
    done = {row["method"] for row in kept(tmp_path / "results.jsonl")}
    assert done == set(well)
    for method in both.keys() - set(well):
        assert both[method].returncode == 1
        assert "is held by process" in " ".join(said[method].split())


def finished(method, rate=0.1, epochs=3):
    rows = [{"method": method, "rate": rate, "seed": 0, "epoch": e, "test_accuracy": 0.5 + e / 8} for e in (1, 2, 3)]
    return [*rows[: epochs - 1], {**rows[epochs - 1], "end": True}]


def test_many_writers_of_one_file_lose_no_run_that_is_finished(tmp_path):
    def work(name):
        for i in range(12):
            while True:
                with contextlib.suppress(BlockingIOError), files.held(tmp_path):
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


@contextlib.contextmanager
def largest_file(size):
    """Writes beyond this size fail, after a part of them, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_write_that_fails_leaves_nothing_and_names_the_file(path):
    whole = path.read_bytes()
    with largest_file(len(whole) + 100), pytest.raises(OSError, match=f"File too large: '{path}'"):
        add(path, finished("muon"))
    assert path.read_bytes() == whole
    with largest_file(20), pytest.raises(OSError, match=f"File too large: '{path}'"):
        files.replace(path, whole * 2)
    assert path.read_bytes() == whole
    assert os.listdir(path.parent) == [path.name]
    with largest_file(0), pytest.raises(OSError, match=r"File too large: '.*\.lock'"), files.held(path.parent):
        pass


@pytest.mark.parametrize("command", ["compare", "train"])
def test_a_disk_that_is_full_is_one_line_and_the_status_1(command, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".lock").touch()
    with largest_file(0):
        code, said = stopped([command, *WINE, "--out", tmp_path / "out", "--quiet"], capsys)
    assert code == 1
    assert said.startswith(f"cronos-flax {command}: error: [Errno 27] File too large: '{tmp_path}/out/.lock'")


def test_a_checkpoint_that_cannot_be_written_is_the_status_1(tmp_path, capsys, monkeypatch):
    """Orbax calls a full disk a ValueError."""

    def full(*_, **__):
        raise ValueError("RESOURCE_EXHAUSTED: No space left on device [os_error_code='28']")

    monkeypatch.setattr(methods, "rows_of", full)
    code, said = stopped(["train", *WINE, "--out", tmp_path, "--quiet"], capsys)
    assert code == 1
    assert f"{tmp_path}/checkpoints cannot be written to or read: RESOURCE_EXHAUSTED" in said


@pytest.mark.parametrize("command", ["compare", "train"])
def test_a_directory_that_is_none_is_refused(command, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        code, said = stopped([command, *WINE, "--out", out], capsys)
        assert code == 2
        assert f"`--out` must be a directory, or one that can be made, got {out}" in said
    assert (tmp_path / "file").read_text() == "mine"


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
            with pytest.raises(PermissionError, match=str(out)), files.held(out):
                pass
    finally:
        if root:
            os.seteuid(0)
        for p, mode in modes.items() if root else ():
            p.chmod(mode)


# --- Data in a file --------------------------------------------------------------------------------------------------

ROWS = 60
X = np.random.default_rng(0).normal(size=(ROWS, 3))
LABELS = np.arange(ROWS) % 3
NAMES = np.array(["cat", "dog", "emu"])


def stored(tmp_path, **arrays):
    np.savez(tmp_path / "set.npz", **{"x": X, "y": LABELS} | arrays)
    return str(tmp_path / "set.npz")


CLASSES = {
    "strings": (NAMES[LABELS], ("cat", "dog", "emu")),
    "bytes": (NAMES[LABELS].astype("S"), ("cat", "dog", "emu")),
    "big-endian strings": (NAMES[LABELS].astype(">U3"), ("cat", "dog", "emu")),
    "whole floats": (LABELS * 5.0 - 5, ("-5", "0", "5")),
    "big-endian half floats": ((LABELS + 1).astype(">f2"), ("1", "2", "3")),
    "bools": (LABELS > 0, ("False", "True")),
    "integers": (LABELS, None),
    "big-endian bytes": (LABELS.astype(">u2"), None),
}


@pytest.mark.parametrize("case", CLASSES)
def test_labels_of_every_kind_become_classes(case, tmp_path):
    """Bools and whole floats became regression, strings a traceback."""
    y, names = CLASSES[case]
    data = load(stored(tmp_path, y=y))
    assert data.classes == names
    assert data.num_classes == (len(names) if names else 3)
    assert data.y.dtype == data.y_test.dtype == "int64"
    split = load(stored(tmp_path, y=y, x_test=X[:7], y_test=y[:7]))
    expected = np.minimum(LABELS, (data.num_classes or 0) - 1)
    np.testing.assert_array_equal(split.y, expected)
    np.testing.assert_array_equal(split.y_test, expected[:7])
    said = split.notes["targets"]
    assert said.startswith(f"{data.num_classes} classes")
    assert all(f"{name!r} is {label}" in said for label, name in enumerate(names or ()))


@pytest.mark.parametrize(
    ("y", "kind"),
    [(X[:, 0], None), (X[:, 0].astype(">f4"), None), *((y, "values") for y in (LABELS, LABELS * 1.0, LABELS > 1))],
)
def test_values_are_those_that_are_not_whole_or_that_one_says_are_values(y, kind, tmp_path):
    data = load(stored(tmp_path, y=y, x_test=X[:5], y_test=y[:5]), kind=kind)
    assert data.num_classes is None
    assert data.notes["targets"] == "values (regression)"
    assert data.y.dtype == "float32"
    np.testing.assert_allclose(data.y, y.astype(float), rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float64", ">f8", ">f4", "float16", "longdouble", "int64", ">i2", "uint8", "bool"])
def test_inputs_of_every_real_dtype_are_the_same_numbers(dtype, tmp_path):
    x = np.round(X * 2 + 4).clip(0, 1 if dtype == "bool" else 9)
    data = load(stored(tmp_path, x=x.astype(dtype), x_test=x[:5].astype(dtype), y_test=LABELS[:5]))
    assert data.x.dtype.isnative
    np.testing.assert_array_equal(data.x.astype(float), x)
    expected = "(3,)" if dtype in ("bool", ">f4") else f"(3,) {np.dtype(dtype).newbyteorder('=')}, used as float32"
    assert data.notes["inputs"] == expected
    split = Split.of(data, 0, 12, "unit")
    assert split.x.dtype == split.x_test.dtype == "float32"


def at(array, place, value):
    array = array.copy()
    array[place] = value
    return array


RECORDS = np.zeros(ROWS, [("a", "f4"), ("b", "i4")])
DATES = np.arange(ROWS).astype("M8[D]")
TEST = {"x_test": X[:4], "y_test": LABELS[:4]}
REFUSED = {
    "complex x": ({"x": X * (1 + 1j)}, "x must be real numbers (bool, integer or float), got complex (complex128)"),
    "string x": ({"x": X.astype(str)}, "x must be real numbers (bool, integer or float), got text (<U"),
    "record x": ({"x": np.zeros((ROWS, 2), RECORDS.dtype)}, "got records or raw bytes"),
    "complex x_test": (TEST | {"x_test": X[:4] + 0j}, "x_test must be real numbers"),
    "complex y": ({"y": LABELS + 0j}, "y must be labels (integers, strings, bools, whole floats) or values (floats)"),
    "dates": ({"y": DATES}, "got dates (datetime64[D])"),
    "time spans": ({"y": DATES - DATES[0]}, "got time spans (timedelta64[D])"),
    "records": ({"y": RECORDS}, "got records or raw bytes"),
    "NaN labels": ({"y": at(LABELS * 1.0, 3, np.nan)}, "y must be finite, got NaN or infinity in 1 of 60 rows"),
    "NaN x": ({"x": at(X, (slice(2), 1), np.nan)}, "x must be finite, got NaN or infinity in 2 of 60 rows"),
    "infinite x_test": (TEST | {"x_test": at(X[:4], 0, np.inf)}, "x_test must be finite"),
    "values too large": ({"y": at(X[:, 0], 0, 1e300)}, "y as float32 must be finite"),
    "one column y": ({"y": LABELS[:, None]}, "y (n,), got (60, 3) and (60, 1)"),
    "scalar x": ({"x": np.float64(1), "y": np.float64(1)}, "must have shape"),
    "flat x": ({"x": X[:, 0]}, "x must have shape (n, ...), got (60,)"),
    "no columns": ({"x": X[:, :0]}, "x must have shape (n, ...), got (60, 0)"),
    "x_test of another width": (TEST | {"x_test": X[:4, :1]}, "x_test must have rows like those of x, (3,), got (1,)"),
    "x_test of another rank": (TEST | {"x_test": X[:4, :, None]}, "x_test must have rows like those of x"),
    "empty test split": ({"x_test": X[:0], "y_test": LABELS[:0]}, "x_test must have shape"),
    "strange test labels": (
        TEST | {"y": NAMES[LABELS], "y_test": np.array(["cat", "owl", "emu", "owl"])},
        "y_test must have labels that y has, got 1 that it does not: owl",
    ),
    "strange test numbers": (TEST | {"y_test": LABELS[:4] + 1}, "y_test must have labels that y has, got 1 that"),
    "other test kind": (TEST | {"y": NAMES[LABELS]}, "y and y_test must be of one kind, got <U3 and int64"),
    "one class": ({"y": np.ones(ROWS)}, "y must have at least two classes, got only 1"),
    "negative labels": ({"y": LABELS - 1}, "labels must be integers ≥ 0, got -1"),
    "huge labels": ({"y": LABELS.astype("uint64") + 2**63}, "labels must be 0, 1, …, number of classes − 1, got up to"),
    "either": ({"y": np.arange(ROWS) // 2 * 1.0}, "y has 30 different whole numbers as floats in 60 rows: these may"),
    "one row": ({"x": X[:1], "y": np.array([0.5])}, "there must be rows to fit and rows to hold back, got 1 rows"),
    "objects": ({"y": NAMES[LABELS].astype(object)}, "it has Python objects, which are not loaded"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_arrays_that_would_change_without_a_word_are_refused(case, tmp_path, capsys):
    arrays, message = REFUSED[case]
    code, said = stopped(["info", "--dataset", stored(tmp_path, **arrays)], capsys)
    assert code == 2
    assert message in said
    assert f"{tmp_path}/set.npz" in said


def test_kinds_that_do_not_fit_are_refused(tmp_path, capsys):
    for y, kind, message in (
        (NAMES[LABELS], "values", "y and y_test must be numbers to be values, got <U3"),
        (X[:, 0], "classes", "must be whole numbers to be classes"),
    ):
        code, said = stopped(["info", "--dataset", stored(tmp_path, y=y), "--targets", kind], capsys)
        assert (code, message in said) == (2, True)
    with pytest.raises(ValueError, match="`targets` must be one of classes, values, got 'labels'"):
        Dataset.of(X, LABELS, kind="labels")


def test_objects_that_nobody_asked_for_are_left_alone(tmp_path):
    data = load(stored(tmp_path, names=np.array([{}, None])))
    assert len(data.y) + len(data.y_test) == ROWS


def test_files_cut_anywhere_or_of_another_kind_are_one_line(tmp_path, capsys):
    whole = Path(stored(tmp_path)).read_bytes()
    path = tmp_path / "bad.npz"
    for size in (0, 3, 100, len(whole) // 2, len(whole) - 300, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=rf"load: {path} must be an \.npz file of plain arrays, not cut short"):
            load(str(path))
    path.write_bytes(whole[:700] + bytes([whole[700] ^ 1]) + whole[701:])
    with pytest.raises(ValueError, match="Bad CRC"):
        load(str(path))
    with path.open("wb") as file:
        np.save(file, X)
    with pytest.raises(ValueError, match=r"one array \(\.npy\)"):
        load(str(path))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", b"no array")
    with pytest.raises(ValueError, match="must"):
        load(str(path))
    (tmp_path / "folder.npz").mkdir()
    code, said = stopped(["info", "--dataset", tmp_path / "folder.npz"], capsys)
    assert code == 2
    assert f"Is a directory: '{tmp_path}/folder.npz'" in said


def test_prepared_sets_that_are_not_whole_are_one_line(tmp_path, capsys):
    (tmp_path / "birds" / "1.0.0").mkdir(parents=True)
    (tmp_path / "birds" / "1.0.0" / "dataset_info.json").write_text('{"name": "bir')
    code, said = stopped(["info", "--dataset", "birds", "--data-dir", tmp_path], capsys)
    assert code == 2
    assert f"load_tfds: split 'train' of 'birds' in {tmp_path} cannot be read as array_record" in said


def test_a_sweep_does_not_go_on_with_other_data_of_the_same_name(tmp_path):
    """The rows of both would have stood in one table."""
    settings = Settings(stored(tmp_path), model="two-layer", epochs=1, validation=20)
    run = Run("linear-probe", 1.0, 0)
    rows = sweep(settings, [run, run], tmp_path / "out")
    assert sweep(settings, [run], tmp_path / "out") == rows == kept(tmp_path / "out" / "results.jsonl")
    assert len(rows) == 1
    stored(tmp_path, x=at(X, 0, 1.5))
    with pytest.raises(ValueError, match=r"holds runs on other data: .*set\.npz has changed since"):
        sweep(settings, [run], tmp_path / "out")


# --- Rare classes, and what is said ----------------------------------------------------------------------------------


@pytest.mark.parametrize("alone", [1, 2, 20, 58])
def test_classes_of_one_row_are_never_held_back(alone, tmp_path):
    """A class with one row ended `info` in scikit-learn's own error."""
    y = np.concatenate([np.arange(ROWS - alone) % 2, np.arange(2, 2 + alone)])
    data = load(stored(tmp_path, y=y))
    assert (f"{alone} classes have one row" in data.notes.get("rare", "")) == (alone < 58)
    whole = load(stored(tmp_path, y=y, x_test=X[:5], y_test=y[:5]))
    held = ROWS // 5
    for rows in (None, 10):
        split = Split.of(whole, 0, held, "none", rows)
        assert len(split.y_validation) == held
        assert len(split.y) == (rows or ROWS - held)
        if alone < 58:  # otherwise there are no other rows
            assert split.y_validation.max() < 2
    if alone < 3:
        assert set(Split.of(whole, 0, held, "none").y) == set(y)


def test_info_says_what_it_took_the_arrays_as(tmp_path, capsys):
    y = at(NAMES[LABELS], 0, "auk")
    path = stored(tmp_path, x=(X > 0).astype("uint8"), y=y, x_test=X[:4], y_test=y[3:7])
    assert main(["info", "--dataset", path, "--model", "two-layer"]) == 0
    out = capsys.readouterr().out
    assert "inputs       (3,) uint8, used as float32\n" in out
    assert "targets      4 classes: 'auk' is 0, 'cat' is 1, 'dog' is 2, 'emu' is 3\n" in out
    assert "rare         1 classes have one row, which is never held back: auk\n" in out
