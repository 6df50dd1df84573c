"""The parts of a sweep merge to what one machine would have written; or it is said why not, and nothing is written."""

import dataclasses
import json
import os
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from disks import largest_file
from forked import ADDS_NONE, Forked
from stopped import stopped

from cronos_flax._head import files
from cronos_flax.compare import tables
from cronos_flax.compare.cli import main
from cronos_flax.compare.data import load
from cronos_flax.compare.merge import merge
from cronos_flax.compare.results import add, by_run, kept
from cronos_flax.compare.shards import Plan, Shard
from cronos_flax.compare.sweep import sweep
from cronos_flax.compare.task import Run, Settings, Task

DIGITS = Settings("digits", model="two-layer", epochs=2, batch_size=32, rows=300)
COMMAND = ("compare", "--dataset", "digits", "--model", "two-layer", "--epochs", "2", "--batch-size", "32")
COMMAND += ("--rows", "300", "--methods", "linear-probe,adam", "--rates", "2", "--seeds", "2")
RUNS = [
    Run(method, rate, seed)
    for seed in (0, 1)
    for method, rate in (("linear-probe", 0.001), ("linear-probe", 1000.0), ("adam", 3.16e-5), ("adam", 3.16e-2))
]
COPIED = Run("adam", 3.16e-2, 0)  # of the first part
ENVIRONMENT = ("seconds", "compile_seconds", "versions", "device", "cores", "crc32")


def figures(rows):
    return [{name: value for name, value in row.items() if name not in ENVIRONMENT} for row in rows]


def lines(directory):
    """The lines of the file, as they are, but for times and what follows from them."""
    return figures(map(json.loads, (directory / "results.jsonl").read_text().splitlines()))


def contents(directory):
    """All files below a directory, but for locks."""
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file() and path.name != ".lock"}


@pytest.fixture(scope="module")
def task():
    return Task.of(DIGITS)


@pytest.fixture(scope="module")
def swept(task, tmp_path_factory):
    """A sweep by one machine, and the same by three."""
    directory = tmp_path_factory.mktemp("swept")
    sweep(DIGITS, RUNS, directory / "whole", task=task)
    for number in (1, 2, 3):
        sweep(DIGITS, RUNS, directory / "sweep", task=task, shard=Shard(number, 3))
    return directory


@pytest.fixture
def parts(swept, tmp_path):
    """A copy of the three parts."""
    shutil.copytree(swept / "sweep", tmp_path / "sweep")
    return [tmp_path / "sweep" / f"part-{number}-of-3" for number in (1, 2, 3)]


@pytest.mark.parametrize("of", [1, 2, 3, 5, 7, 8, 15, 45, 60])
@pytest.mark.parametrize("seeds", [1, 3])
def test_parts_have_each_run_once_and_as_many_of_each_method_as_the_others(of, seeds):
    kinds = {"cronos-am": [None], "adam": range(1, 8), "sgd": range(1, 8)}
    runs = [Run(method, rate, s) for s in range(seeds) for method, rates in kinds.items() for rate in rates]
    dealt = [Shard(number, of).deal(runs + runs[:3]) for number in range(1, of + 1)]
    assert sorted(str(run) for mine in dealt for run in mine) == sorted(map(str, runs))
    for mine in dealt:
        assert mine == [run for run in runs if run in mine]
    for method in (*kinds, None):
        counts = [sum(run.method == (method or run.method) for run in mine) for mine in dealt]
        assert max(counts) - min(counts) <= 1


def test_merged_parts_are_what_one_machine_would_have_written(swept, parts, tmp_path):
    before = contents(tmp_path / "sweep")
    rows = merge(tmp_path / "out", parts)
    assert contents(tmp_path / "sweep") == before
    whole = kept(swept / "whole" / "results.jsonl")
    assert rows == kept(tmp_path / "out" / "results.jsonl")
    assert figures(rows) == figures(whole)
    assert list(by_run(rows)) == RUNS
    assert lines(tmp_path / "out") == lines(swept / "whole")
    untimed = [[{**row, "seconds": None, "compile_seconds": None} for row in each] for each in (rows, whole)]
    assert tables.table(untimed[0]) == tables.table(untimed[1])
    whatever = [parts[2], parts[0], *parts]  # in any order, and twice
    merge(tmp_path / "other", whatever)
    assert (tmp_path / "other" / "results.jsonl").read_bytes() == (tmp_path / "out" / "results.jsonl").read_bytes()
    written = contents(tmp_path / "out")
    assert merge(tmp_path / "out", parts) == rows
    assert contents(tmp_path / "out") == written


def test_a_merged_sweep_goes_on_as_any_other(task, parts, tmp_path):
    """Runs can be added by one machine; and those of a second sweep, in parts, by merging the parts of both."""
    more = [Run("adam", 3.16e-2, seed) for seed in (2, 3)]
    merge(tmp_path / "out", parts)
    done = []
    sweep(DIGITS, RUNS + more, tmp_path / "out", task=task, watch=lambda event, run, _: done.append((event, run)))
    assert [run for event, run in done if event == "done"] == more
    added = [tmp_path / "more" / f"part-{number}-of-2" for number in (1, 2)]
    for number in (1, 2):
        sweep(DIGITS, more, tmp_path / "more", task=task, shard=Shard(number, 2))
    rows = merge(tmp_path / "both", [*parts, *added])
    assert figures(rows) == figures(kept(tmp_path / "out" / "results.jsonl"))
    merge(tmp_path / "later", parts)
    first = (tmp_path / "later" / "results.jsonl").read_bytes()
    merge(tmp_path / "later", added)
    assert (tmp_path / "later" / "results.jsonl").read_bytes().startswith(first)
    assert lines(tmp_path / "later") == lines(tmp_path / "both")


def test_more_parts_than_runs_are_no_error(task, tmp_path):
    out, run = tmp_path / "sweep", Run("linear-probe", 1.0, 0)
    found = [sweep(DIGITS, [run], out, task=task, shard=Shard(number, 2)) for number in (1, 2)]
    assert [len(rows) for rows in found] == [1, 0]
    assert merge(tmp_path / "out", [out / "part-2-of-2", out / "part-1-of-2"]) == found[0]


# The command, which is killed where it begins to write a file (the first argument) for the second time.
KILLED = """
import os, signal, sys
from cronos_flax.compare.cli import main
opened = []
def on_file(event, arguments):
    if event == "open" and str(arguments[0]).endswith(sys.argv[1]) and str(arguments[1])[0] in "aw":
        opened.append(arguments)
        if len(opened) == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(on_file)
sys.exit(main(sys.argv[3:]))
"""


def killed(tmp_path, at, time, *arguments):
    """Run the command until it begins to write a file for the n-th time."""
    process = Forked(tmp_path, "-c", KILLED, at, time, *arguments, config=ADDS_NONE)
    assert process.wait()[0] == -signal.SIGKILL


@pytest.mark.slow
def test_a_part_that_was_killed_is_missed_and_goes_on_and_then_all_is_as_by_one_machine(tmp_path, capsys):
    command = [*COMMAND, "--methods", "cronos-am,linear-probe,adam", "--seeds", "1"]
    out = tmp_path / "sweep"
    parts = [str(out / f"part-{number}-of-3") for number in (1, 2, 3)]
    assert main([*command, "--out", str(tmp_path / "whole"), "--quiet"]) == 0
    for number in (2, 3):
        assert main([*command, "--out", str(out), "--shard", f"{number}/3"]) == 0
        said = " ".join(capsys.readouterr().out.split())
        assert said.endswith(f"of the 5 runs. When all parts are done: cronos-flax merge {out} {out}/part-*-of-3")
        assert {path.name for path in Path(parts[number - 1]).iterdir()} == {".lock", "results.jsonl", "sweep.json"}
    killed(tmp_path, "results.jsonl", 2, *command, "--out", out, "--shard", "1/3")
    merging = ["merge", str(out), *parts]
    code, said = stopped(merging, capsys)
    assert code == 2
    assert "1 of 5 runs are missing, and nothing was merged." in said
    assert f"`--shard 1/3`, PART {parts[0]}: 1 missing: adam 3.16e-05, seed 0." in said
    assert not (out / "results.jsonl").exists()
    assert main([*command, "--out", str(out), "--shard", "1/3"]) == 0
    said = capsys.readouterr().out
    assert "[2/2] adam" in said
    assert "[1/2]" not in said  # CRONOS-AM was done before the kill
    killed(tmp_path, "results.jsonl.new", 1, *merging)
    assert not (out / "results.jsonl").exists()
    assert main(merging) == 0
    shown, err = capsys.readouterr()
    assert err == ""
    assert "".join(shown.split()).endswith(f"{out}:results.jsonl,table.md,curves.png,budget.png")  # a line may break
    assert lines(out) == lines(tmp_path / "whole")
    assert all((out / name).stat().st_size > 1000 for name in ("table.md", "curves.png", "budget.png"))
    table = (out / "table.md").read_text()
    for method in ("cronos-am", "linear-probe", "adam"):
        assert f"│ {method} " in shown
        assert f"\n| {method} |" in table


def rewritten(part, change):
    """Write the rows of a part anew, with the changes that ``change`` makes in each run."""
    path = part / "results.jsonl"
    runs = by_run(kept(path))
    path.unlink()
    for run, rows in runs.items():
        add(path, change(run, rows))


def damaged(path, old, new):
    path.write_bytes(path.read_bytes().replace(old, new, 1))


def copied(parts, change):
    """Add a run of the first part to the last, changed."""
    add(parts[2] / "results.jsonl", change(by_run(kept(parts[0] / "results.jsonl"))[COPIED]))


def cut(path):
    """Take the end of the last line away, as a kill does."""
    path.write_bytes(path.read_bytes()[:-20])


REFUSED = {
    "a part is not given": (
        lambda parts: parts.pop(1),
        r"3 of 8 runs are missing, and nothing was merged\. `--shard 2/3`, not among the parts given: 3 missing: "
        r"adam 3\.16e-05, seed 0; linear-probe 0\.001, seed 1; adam 0\.0316, seed 1\. Give the `compare` command again",
    ),
    "runs of a part are missing": (
        lambda parts: (parts[1] / "results.jsonl").unlink(),
        r"3 of 8 runs are missing.*`--shard 2/3`, PART \S+part-2-of-3: 3 missing: adam 3\.16e-05",
    ),
    "the last run has not ended": (
        lambda parts: cut(parts[0] / "results.jsonl"),
        r"1 of 8 runs are missing.*`--shard 1/3`, PART \S+part-1-of-3: 1 missing: ",
    ),
    "there is no such part": (
        lambda parts: parts.append(parts[0] / "no"),
        r"PART \S+no must be a directory that .* none",
    ),
    "the directory of all parts": (
        lambda parts: parts.insert(0, parts[0].parent),
        r"PART (\S+) must be a directory that `compare --shard` made, with the file sweep\.json, .* Give the parts "
        r"that lie in it: \1/part-\*\.",
    ),
    "no part": (
        lambda parts: (parts[0] / "sweep.json").unlink(),
        r"PART \S+part-1-of-3 must be a directory .* sweep\.json, and there is none in it\. Give the parts of a sweep",
    ),
    "a damaged line": (
        lambda parts: damaged(parts[1] / "results.jsonl", b'"seed": ', b'"seed":  '),
        r"PART \S+part-2-of-3: line 1 of \S+part-2-of-3/results\.jsonl is damaged: it does not fit its checksum",
    ),
    "a damaged plan": (
        lambda parts: damaged(parts[1] / "sweep.json", b'"of": 3', b'"of": 4'),
        r"PART \S+part-2-of-3: \S+part-2-of-3/sweep\.json is damaged\. Nothing was changed\. Take the file from a copy",
    ),
    "a run with other figures": (
        lambda parts: copied(parts, lambda rows: [*rows[:1], {**rows[1], "test_loss": 0.125}]),
        r"PART \S+part-1-of-3 and PART \S+part-3-of-3 both have the run adam 0\.0316, seed 0, with different rows: "
        r"test_loss at epoch 2 is 0\.\d+, and 0\.125\. Find out why",
    ),
    "a run with more checks": (
        lambda parts: copied(parts, lambda rows: rows[1:]),
        r"both have the run adam 0\.0316, seed 0, with different rows: 2 checks, and 1\.",
    ),
    "rows of other settings": (
        lambda parts: rewritten(parts[2], lambda run, rows: [{**row, "batch_size": 64} for row in rows]),
        r"PART \S+part-3-of-3 holds a comparison with batch_size=64, and its sweep\.json has 32\. Only parts of",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_parts_that_do_not_make_a_sweep_are_refused_and_nothing_is_written(case, parts, tmp_path, capsys):
    change, message = REFUSED[case]
    change(parts)
    before = contents(tmp_path)
    code, said = stopped(["merge", tmp_path / "out", *parts], capsys)
    assert code == 2
    assert said.startswith("cronos-flax merge: error: ")
    assert re.search(message, said), said
    assert contents(tmp_path) == before
    assert not (tmp_path / "out").exists()


def test_a_target_that_no_run_can_reach_is_refused_and_nothing_is_written(parts, tmp_path, capsys):
    code, said = stopped(["merge", tmp_path / "out", *parts, "--target", "150"], capsys)
    assert code == 2
    assert "`--target` must be an accuracy in %, from 1 to 100, got 150." in said
    assert not (tmp_path / "out").exists()


def test_parts_of_other_settings_and_other_data_are_refused(task, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    digits, run = load("digits"), Run("linear-probe", 1.0, 0)

    def part(number, directory, labels, **settings):
        np.savez("digits.npz", x=digits.x[:200], y=labels)
        runs = [run, run._replace(seed=1)]
        sweep(Settings("digits.npz", "two-layer", epochs=1, **settings), runs, Path(directory), shard=Shard(number, 2))
        return Path(directory) / f"part-{number}-of-2"

    labels = digits.y[:200]
    first, second = part(1, "a", labels), part(2, "a", labels)
    other_labels = part(2, "b", np.roll(labels, 1))
    other_setting = part(2, "c", labels, scaling="unit")
    message = r"PART b/part-2-of-2 holds runs on other data: digits\.npz has changed since .*PART a/part-1-of-2 has"
    with pytest.raises(ValueError, match=message):
        merge(Path("out"), [first, other_labels])
    message = r"PART c/part-2-of-2 holds a comparison with scaling='unit', and PART a/part-1-of-2 has 'standardise'"
    with pytest.raises(ValueError, match=message):
        merge(Path("out"), [first, other_setting])
    assert not Path("out").exists()
    merge(Path("out"), [first, second])
    before = contents(Path("out"))
    for part_of_others, message in ((other_labels, "other data"), (other_setting, "scaling='standardise'")):
        plan = Plan.read(part_of_others)
        Plan(Shard(2, 2), plan.shared, (run._replace(seed=1),)).write(part_of_others)
        with pytest.raises(ValueError, match=rf"`out` out holds .*{message}.*Give another directory"):
            merge(Path("out"), [part_of_others])
    assert contents(Path("out")) == before


def test_a_part_with_more_seeds_than_the_others_is_said(task, parts, tmp_path):
    shutil.rmtree(parts[2])
    more = [*RUNS, *(run._replace(seed=2) for run in RUNS[:4])]
    sweep(DIGITS, more, parts[0].parent, task=task, shard=Shard(3, 3))
    with pytest.raises(ValueError, match=r"are missing") as error:
        merge(tmp_path / "out", parts)
    first, *others = str(error.value).splitlines()
    missing = set(more) - {run for part in parts for run in by_run(kept(part / "results.jsonl"))}
    assert first == f"{len(missing)} of 12 runs are missing, and nothing was merged."
    assert others[:2] == [
        "The parts are of 2 sweeps, not of one.",
        f"Of the sweep of 8 runs (PART {parts[0]}; PART {parts[1]}):",
    ]
    assert f"Of the sweep of 12 runs (PART {parts[2]}):" in others


def test_results_that_are_there_already_stay_or_are_refused(swept, parts, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(swept / "whole", out)
    whole = (out / "results.jsonl").read_bytes()
    with pytest.warns(
        UserWarning, match=r"`out` \S+ and PART \S+ both have .*: with equal figures.* The rows in `out` \S+ are"
    ):
        merge(out, parts)
    assert (out / "results.jsonl").read_bytes() == whole
    rewritten(out, lambda run, rows: [{**row, "test_loss": 0.5} for row in rows] if run == COPIED else rows)
    other = (out / "results.jsonl").read_bytes()
    with pytest.raises(
        ValueError, match=r"`out` \S+ and PART \S+ both have the run adam 0\.0316, seed 0, with different"
    ):
        merge(out, parts)
    assert (out / "results.jsonl").read_bytes() == other
    damaged(out / "results.jsonl", b'"seed": ', b'"seed":  ')
    with pytest.raises(ValueError, match=r"`out`: line 1 of \S+ is damaged"):
        merge(out, parts)
    before = contents(parts[0].parent)
    with pytest.raises(ValueError, match=r"`out` must be none of the parts, got \S+part-2-of-3"):
        merge(parts[1], parts)
    with pytest.raises(ValueError, match=r"`parts` must be at least one directory, got none"):
        merge(out, [])
    assert contents(parts[0].parent) == before


def test_a_part_that_is_being_written_is_refused_and_one_that_is_read_only_is_not(parts, tmp_path, capsys):
    with files.locked(parts[1]):
        code, said = stopped(["merge", tmp_path / "out", *parts], capsys)
    assert code == 1
    assert f"PART {parts[1]} is held by process {os.getpid()} on" in said
    assert said.endswith("Wait until it ends, or stop it.")
    assert not (tmp_path / "out").exists()
    with files.locked(tmp_path / "out"):
        code, said = stopped(["merge", tmp_path / "out", *parts], capsys)
    assert code == 1
    assert f"out is held by process {os.getpid()} on" in said
    (parts[2] / ".lock").unlink()  # a copy without hidden files
    with files.at_rest(parts[0], "PART"), files.at_rest(parts[0], "PART"), files.at_rest(parts[2], "PART"):
        with pytest.raises(BlockingIOError, match="is held by another process"), files.locked(parts[0]):
            pass
        assert len(merge(tmp_path / "out", parts)) == 12
    assert not (parts[2] / ".lock").exists()


def test_a_run_that_was_done_twice_counts_once_and_machines_that_differ_are_said(parts, tmp_path, capsys):
    copied(parts, lambda rows: [{**row, "seconds": 1e3} for row in rows])
    with pytest.warns(
        UserWarning, match=r"part-1-of-3 and PART \S+ both have adam 0\.0316, seed 0: with equal figures"
    ):
        rows = merge(tmp_path / "out", parts)
    assert max(row["seconds"] for row in rows) < 1e3
    device = {"device": "gpu NVIDIA H200", "cores": 7}
    rewritten(parts[1], lambda run, rows: [{**row, **device} for row in rows])
    args = ["merge", str(tmp_path / "other"), *map(str, parts)]
    assert main(args) == 0
    err = " ".join(capsys.readouterr().err.split())
    assert "warning: The parts were made in different ways: device cpu " in err
    assert f"device gpu NVIDIA H200 in PART {parts[1]}" in err
    assert f"cores 7 in PART {parts[1]}" in err
    assert "jax" not in err
    assert "Their seconds cannot be compared." in err
    table = (tmp_path / "other" / "table.md").read_text()
    assert "and on gpu NVIDIA H200, 7 cores; cronos_flax" in table
    assert main([*args, "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")


def test_a_disk_that_is_full_leaves_what_was_there(parts, tmp_path):
    out, size = tmp_path / "out", (parts[0] / "results.jsonl").stat().st_size
    rows = by_run(kept(parts[0] / "results.jsonl"))
    out.mkdir()
    add(out / "results.jsonl", rows[COPIED])
    before = (out / "results.jsonl").read_bytes()
    with largest_file(size), pytest.raises(OSError, match=r"File too large: '\S+results\.jsonl'"):
        merge(out, parts)
    assert (out / "results.jsonl").read_bytes() == before
    assert sorted(os.listdir(out)) == [".lock", "results.jsonl"]
    merge(out, parts)
    assert list(by_run(kept(out / "results.jsonl"))) == [COPIED, *(run for run in RUNS if run != COPIED)]


def test_a_part_does_not_take_another_sweep(task, parts):
    before = contents(parts[0])
    out = parts[0].parent
    with pytest.raises(
        ValueError, match=r"part-1-of-3 holds part 1/3 of a sweep with 8 runs, and this one is part 1/3 of 7"
    ):
        sweep(DIGITS, RUNS[:7], out, task=task, shard=Shard(1, 3))
    with pytest.raises(ValueError, match=r"holds a comparison with epochs=2, and this one has 3"):
        sweep(dataclasses.replace(DIGITS, epochs=3), RUNS, out, shard=Shard(1, 3))
    assert contents(parts[0]) == before
    for wrong in ((0, 3), (4, 3), (1, 0)):
        with pytest.raises(ValueError, match=r"`shard` must be K/N with 1 ≤ K ≤ N, such as 2/8"):
            Shard(*wrong)


@pytest.mark.parametrize("bits", [0x01, 0x07, 0x20, 0x80])
def test_a_byte_of_a_plan_that_changed_is_found(bits, parts):
    path = parts[0] / "sweep.json"
    whole = path.read_bytes()
    assert Plan.read(parts[0]).runs == tuple(RUNS)
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ bits]) + whole[place + 1 :])
        with pytest.raises(ValueError, match=r"`out`: \S+sweep\.json is damaged\. Nothing was changed"):
            Plan.read(parts[0])
