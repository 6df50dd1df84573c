"""Sweeps and the command line."""

import contextlib
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from .harm import Spoil
from .subject import Subject, Value, told, untimed
from .trained import steps

_FILES = ("kill", "full disk", "flipped byte", "truncated file", "two writers", "read-only directory")
_TASK = ("--dataset", "wine", "--model", "two-layer", "--batch-size", "32", "--epochs", "2", "--quiet")


class CommandError(Exception):
    """A command that ended with an error.

    Args:
        status: its exit status.
        said: what it wrote to stderr.
    """

    def __init__(self, status: Any, said: str) -> None:
        super().__init__(f"status {status}: {said}")
        self.status, self.said = status, " ".join(said.split())


def finished_runs(directory: Path) -> dict[str, Any]:
    """The rows of each finished run in a directory, or what is said of the file."""
    from cronos_flax.compare.results import by_run, kept

    try:
        rows = kept(directory / "results.jsonl")
    except ValueError as error:
        return {"damaged": str(error).partition(" is damaged")[2]}
    return {str(run): untimed(rows) for run, rows in by_run(rows).items()}


class Sweep(Subject):
    """Three runs; the first is done."""

    name = "compare.sweep"
    faults = (*_FILES, "NaN in features", "raising callback")

    def make_template(self, directory: Path) -> None:
        self._sweep(directory, Spoil(), 1)

    def _sweep(self, directory: Path, spoil: Spoil, first: int) -> list[dict[str, Any]]:
        from cronos_flax.compare.sweep import sweep
        from cronos_flax.compare.task import Run, Settings

        runs = [Run("linear-probe", 1.0, 0), Run("adam", 1e-2, 0), Run("linear-probe", 2.0, 0)][:first]
        settings = Settings("wine", model="two-layer", epochs=2, batch_size=32)
        if spoil.nan is not None:
            directory = directory.parent / "other"
            settings = Settings(poisoned_file(directory, spoil), model="two-layer", epochs=2, batch_size=32)
        return sweep(settings, runs, directory, watch=spoil.callback)

    def run(self, directory: Path, spoil: Spoil) -> Value:
        rows, _ = told(lambda: self._sweep(directory, spoil, 3))
        return {str(number): row for number, row in enumerate(sorted(map(json.dumps, untimed(rows))))}

    def kept(self, directory: Path) -> Value:
        return finished_runs(directory)

    def lost(self, before: Value, after: Value) -> str | None:
        gone = [run for run in before if after.get(run) != before[run]]
        return f"the rows of {', '.join(gone)}" if gone else None

    def damageable(self, directory: Path) -> list[Path]:
        return [directory / "results.jsonl"]


def poisoned_file(directory: Path, spoil: Spoil) -> str:
    """An .npz file with a feature that is not finite."""
    rng = np.random.default_rng(0)
    assert spoil.nan is not None
    spoil.passed = 1
    x = spoil.features(spoil.nan[0], rng.normal(size=(64, 5)))
    path = directory.parent / "poisoned.npz"
    np.savez(path, x=x, y=(x[:, 0] > 0).astype(int))
    return str(path)


def command(*args: Any) -> str:
    """What a command says on success.

    Raises:
        CommandError: if it ends with an error.
    """
    from cronos_flax.compare.cli import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status, _ = told(lambda: main(list(map(str, args))))
        except SystemExit as stop:
            status = stop.code
    if status == 130:  # somebody stops the campaign
        raise KeyboardInterrupt
    if status:
        raise CommandError(status, err.getvalue())
    return err.getvalue()


class Compare(Sweep):
    """The command, with its table and pictures."""

    name = "cronos-flax compare"
    faults = (*_FILES, "NaN in features")

    def make_template(self, directory: Path) -> None:
        self._compare(directory, Spoil(), 1)
        for path in directory.iterdir():
            if path.name != "results.jsonl":
                path.unlink()

    def _compare(self, directory: Path, spoil: Spoil, seeds: int) -> str:
        task = list(_TASK)
        if spoil.nan is not None:
            directory = directory.parent / "other"
            task[1] = poisoned_file(directory, spoil)
        methods = ("--methods", "linear-probe,adam", "--rates", "1", "--rate-range", "0.005", "0.02")
        return command("compare", *task, *methods, "--seeds", seeds, "--out", directory)

    def run(self, directory: Path, spoil: Spoil) -> Value:
        said = self._compare(directory, spoil, 2)
        there = sorted(path.name for path in directory.iterdir() if path.stat().st_size)
        return {**finished_runs(directory), "said": said, "there": there}


class TrainCommand(Subject):
    """The other command; a first epoch is done."""

    name = "cronos-flax train"
    faults = (*_FILES, "NaN in features")

    def make_template(self, directory: Path) -> None:
        command("train", *_TASK, "--out", directory)
        for path in directory.iterdir():
            if path.name != "checkpoints":
                path.unlink()
        shutil.rmtree(directory / "checkpoints" / str(steps(directory / "checkpoints")[-1]))

    def run(self, directory: Path, spoil: Spoil) -> Value:
        task = list(_TASK)
        if spoil.nan is not None:
            task[1] = poisoned_file(directory, spoil)
        said = command("train", *task, "--out", directory)
        rows = [json.loads(line) for line in (directory / "history.jsonl").read_text().splitlines()]
        there = sorted(path.name for path in directory.iterdir() if path.is_dir() or path.stat().st_size)
        return {"rows": untimed(rows), "said": said, "there": there}

    def same(self, value: Value, other: Value) -> bool:
        given = isinstance(value, dict) and isinstance(other, dict)
        return given and {**value, "said": ""} == {**other, "said": ""}

    def kept(self, directory: Path) -> Value:
        return steps(directory / "checkpoints")

    def lost(self, before: Value, after: Value) -> str | None:
        gone = set(before) - set(after)
        return f"the checkpoints {sorted(gone)}" if gone else None

    def damageable(self, directory: Path) -> list[Path]:
        return super().damageable(directory / "checkpoints")
