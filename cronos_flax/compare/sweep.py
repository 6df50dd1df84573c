"""A sweep: many runs over methods, rates and seeds. The rows of each run are written when it ends.

A sweep that was interrupted resumes with the runs whose rows are missing.
"""

import functools
import importlib.metadata
import itertools
import json
import math
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax

from cronos_flax.compare.methods import rows_of
from cronos_flax.compare.task import Row, Run, Settings, Task

VERSIONS = ("cronos_flax", "jax", "flax", "optax", "numpy")


def kept(path: Path) -> list[Row]:
    """The rows of all finished runs; lines cut short, and runs without their last row, are left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    ended = {_run_of(row) for row in rows if row.get("end")}
    return [row for row in rows if _run_of(row) in ended]


def by_run(rows: Iterable[Row]) -> dict[Run, list[Row]]:
    """The rows of each run."""
    runs: dict[Run, list[Row]] = {}
    for row in rows:
        runs.setdefault(_run_of(row), []).append(row)
    return runs


def sweep(
    settings: Settings,
    runs: Iterable[Run],
    out: Path,
    *,
    jobs: int = 1,
    watch: Callable[[str, Run, Any], Any] = lambda *_: None,
    task: Task | None = None,
) -> list[Row]:
    """Do the runs that are missing from ``out / "results.jsonl"``.

    Args:
        settings: what all runs share.
        runs: all runs of the sweep.
        out: the directory; made if it does not exist.
        jobs: how many runs go side by side, one core each; with more than one, their seconds are not kept.
        watch: called with ``"check"``, a run and a row; with ``"done"``, a run and its rows; and with ``"before"``,
            a run that an earlier call finished, and its rows.
        task: the task of these settings, if it is made already.

    Returns:
        All rows, those of earlier calls included.

    Raises:
        ValueError: if the directory holds rows of other settings.
        OSError: if the directory cannot be written to.
    """
    out.mkdir(parents=True, exist_ok=True)
    path = out / "results.jsonl"
    rows = kept(path)
    for name, value in settings.shared().items():
        if rows and rows[0].get(name) != value:
            raise ValueError(
                f"`out` {out} holds a comparison with {name}={rows[0].get(name)!r}, and this one has {value!r}. Give "
                "another directory."
            )
    # Drop unfinished runs from the file, in one atomic move: a kill loses nothing.
    fresh = path.with_suffix(".new")
    fresh.write_text("".join(json.dumps(row) + "\n" for row in rows))
    fresh.replace(path)
    done, missing = by_run(rows), []
    for run in runs:
        if run in done:
            watch("before", run, done[run])
        else:
            missing.append(run)
    with path.open("a") as file:
        for run, new in _done(settings, missing, jobs, watch, task):
            file.write("".join(json.dumps(row) + "\n" for row in new))
            file.flush()
            os.fsync(file.fileno())
            rows += new
            watch("done", run, new)
    return rows


def _done(
    settings: Settings, runs: list[Run], jobs: int, watch: Callable[[str, Run, Any], Any], task: Task | None
) -> Iterator[tuple[Run, list[Row]]]:
    """Each run as it ends, with its rows."""
    if jobs == 1:
        for run in runs:
            task = Task.of(settings) if task is None else task
            yield run, _finished(task, run, functools.partial(watch, "check", run))
        return
    context = multiprocessing.get_context("spawn")
    with context.Pool(jobs, _one_core, (context.Value("i", 0),)) as pool:
        for run, rows in pool.imap_unordered(_worked, zip(itertools.repeat(settings), runs, strict=False)):
            yield run, [{**row, "seconds": None, "compile_seconds": None} for row in rows]


def _finished(task: Task, run: Run, watch: Callable[[Row], Any] = lambda _: None) -> list[Row]:
    """A run's rows as they are kept; a run that failed has one row, with the error."""
    try:
        rows = rows_of(task, run, watch)
    except Exception as error:  # the other runs go on
        rows = [{"epoch": 0, "error": f"{type(error).__name__}: {error}"}]
    known = {**task.settings.shared(), **run._asdict(), **_environment()}
    rows = [{**known, **{name: _plain(value) for name, value in row.items()}} for row in rows]
    rows[-1]["end"] = True
    return rows


def _plain(value: Any) -> Any:
    """None for NaN and infinity, which JSON does not have."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


@functools.cache
def _environment() -> Row:
    device = jax.devices()[0]
    return {
        "versions": {name: importlib.metadata.version(name) for name in VERSIONS},
        "device": f"{device.platform} {device.device_kind}",
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    }


def _run_of(row: Row) -> Run:
    return Run(row["method"], row["rate"], row["seed"])


_task_of = functools.cache(Task.of)  # once in each worker process


def _worked(job: tuple[Settings, Run]) -> tuple[Run, list[Row]]:
    settings, run = job
    return run, _finished(_task_of(settings), run)


def _one_core(counter: Any) -> None:
    """Bind each worker process to a core of its own."""
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        with counter.get_lock():
            os.sched_setaffinity(0, {cores[counter.value % len(cores)]})
            counter.value += 1
