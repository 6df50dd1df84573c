"""A sweep: many runs over methods, rates and seeds. The rows of each run are written when it ends.

A sweep that was interrupted resumes with the runs whose rows are missing.
"""

import functools
import importlib.metadata
import math
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import jax

from cronos_flax._head.files import locked
from cronos_flax.compare.results import add, by_run, check_same, repaired
from cronos_flax.compare.runs import rows_of
from cronos_flax.compare.shards import Plan, Shard
from cronos_flax.compare.task import Row, Run, Settings, Task

VERSIONS = ("cronos_flax", "jax", "flax", "optax", "numpy")


def sweep(
    settings: Settings,
    runs: Iterable[Run],
    out: Path,
    *,
    jobs: int = 1,
    watch: Callable[[str, Run, Any], Any] = lambda *_: None,
    task: Task | None = None,
    shard: Shard | None = None,
) -> list[Row]:
    """Do the runs that are missing from ``out / "results.jsonl"``. The directory is held meanwhile.

    Args:
        settings: what all runs share.
        runs: all runs of the sweep; one that is given twice is done once.
        out: the directory; made if it does not exist.
        jobs: how many runs go side by side, one core each; with more than one, their seconds are not kept.
        watch: called with ``"check"``, a run and a row; with ``"done"``, a run and its rows; and with ``"before"``,
            a run that an earlier call finished, and its rows.
        task: the task of these settings, if it is made already.
        shard: do this part of the runs, in ``shard.directory(out)``; :func:`cronos_flax.compare.merge.merge` puts the
            parts together.

    Returns:
        All rows, those of earlier calls included; of a part, its rows.

    Raises:
        ValueError: if the directory holds rows of other settings or other data, a part of another sweep, or damaged
            rows.
        BlockingIOError: if another sweep writes into the directory; the message says which process does.
        ChildProcessError: if a run side by side with others was killed, as when memory runs out.
        OSError: if the directory cannot be written to.
    """
    out = shard.directory(out) if shard else out
    with locked(out):
        return fill(settings, runs, out, jobs=jobs, watch=watch, task=task, shard=shard)


def fill(
    settings: Settings,
    runs: Iterable[Run],
    out: Path,
    *,
    jobs: int = 1,
    watch: Callable[[str, Run, Any], Any] = lambda *_: None,
    task: Task | None = None,
    shard: Shard | None = None,
) -> list[Row]:
    """As :func:`sweep`, in a directory that the caller holds: with a shard, that of the part."""
    path = out / "results.jsonl"
    rows = repaired(path)
    plan = Plan.read(out) if shard else None
    known = [*rows, *([plan.shared] if plan else [])]
    check_same(known, settings.shared(), f"`out` {out}", "this one", "Give another directory.")
    task = Task.of(settings) if task is None else task
    check_same(known, task.made_of, f"`out` {out}", "this one", "Give another directory.")
    if shard:
        runs = Plan(shard, settings.shared() | task.made_of, tuple(dict.fromkeys(runs))).begin(out)
    done, missing = by_run(rows), []
    for run in dict.fromkeys(runs):
        if run in done:
            watch("before", run, done[run])
        else:
            missing.append(run)
    for run, new in _done(settings, missing, jobs, watch, task):
        add(path, new)
        rows += new
        watch("done", run, new)
    return rows


def _done(
    settings: Settings, runs: list[Run], jobs: int, watch: Callable[[str, Run, Any], Any], task: Task
) -> Iterator[tuple[Run, list[Row]]]:
    """Each run as it ends, with its rows."""
    if jobs == 1:
        for run in runs:
            yield run, _finished(task, run, functools.partial(watch, "check", run))
        return
    lost = False
    for future in _beside(jobs, [(settings, run) for run in runs]):
        if isinstance(future.exception(), BrokenProcessPool):
            lost = True  # others may have ended before
        else:
            run, rows = future.result()
            yield run, [{**row, "seconds": None, "compile_seconds": None} for row in rows]
    if lost:
        raise ChildProcessError(
            "`--jobs` must be fewer than memory has room for: the system has ended a run, as it does when memory runs "
            f"out, got {jobs}. What is done is kept; the same command with fewer goes on from there."
        )


def _beside(jobs: int, work: list[tuple[Settings, Run]]) -> Iterator[Future]:
    """Each job as it ends, in so many processes, which end with the caller's loop."""
    context, others = multiprocessing.get_context("spawn"), multiprocessing.active_children()
    pool = ProcessPoolExecutor(jobs, context, _one_core, (context.Value("i", 0),))
    try:
        yield from as_completed([pool.submit(_worked, job) for job in work])
    finally:
        for worker in set(multiprocessing.active_children()).difference(others):
            worker.terminate()
        pool.shutdown(cancel_futures=True)


def _finished(task: Task, run: Run, watch: Callable[[Row], Any] = lambda _: None) -> list[Row]:
    """A run's rows as they are kept; a run that failed has one row, with the error."""
    raised = []

    def watched(row: Row) -> None:
        try:
            watch(row)
        except Exception as error:
            raised.append(error)
            raise

    try:
        rows = rows_of(task, run, watched)
    except Exception as error:  # the other runs go on
        if error in raised:  # the caller's, not the run's
            raise
        rows = [{"epoch": 0, "error": f"{type(error).__name__}: {error}"}]
    known = {**task.settings.shared(), **run._asdict(), **task.made_of, **_environment()}
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
