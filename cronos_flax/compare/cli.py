"""The command line: ``cronos-flax compare | merge | train | info``, the same as ``python -m cronos_flax``."""

import argparse
import dataclasses
import importlib.metadata
import json
import logging
import math
import os
import sys
import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

_EXTRA = "pip install 'cronos_flax[examples]'"
_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: the arguments; None for those of the process.

    Returns:
        The exit status: 0; 1 if all runs failed; or 130 after an interrupt. Wrong arguments and data exit with 2, as
        argparse does; a file or directory that cannot be read or written, or that another process holds, with 1.
    """
    try:
        import matplotlib  # noqa: F401
        import platformdirs  # noqa: F401
        import rich  # noqa: F401
        import sklearn  # noqa: F401
    except ImportError as error:
        print(f"cronos-flax needs {error.name}: {_EXTRA}", file=sys.stderr)
        return 2
    for name in ("absl", "asyncio"):  # TFDS and Orbax log through them; their errors are raised too
        logging.getLogger(name).setLevel(logging.CRITICAL)
    from cronos_flax.compare.options import parsers

    parser, commands = parsers()
    args = parser.parse_args(argv)
    if not args.compile_anew:
        from cronos_flax.compare import programs

        programs.keep()
    try:
        return {"compare": _compare, "merge": _merge, "train": _train, "info": _info}[args.command](args)
    except OSError as error:
        _refuse(commands[args.command], error, 1)
    except ValueError as error:
        _refuse(commands[args.command], error, 2)
    except KeyboardInterrupt:
        print("\nInterrupted. The same command resumes where this one stopped.", file=sys.stderr)
        return _INTERRUPTED


def _refuse(parser: argparse.ArgumentParser, error: Exception, status: int) -> NoReturn:
    """Exit as argparse does for a wrong option, with the message wrapped."""
    parser.exit(status, f"{parser.prog}: error:\n{_wrapped(str(error), '  ', '  ')}\n")


def _wrapped(text: str, first: str, others: str) -> str:
    """Lines of up to 79 characters, with names of files in one piece."""
    wrapper = textwrap.TextWrapper(79, subsequent_indent=others, break_long_words=False, break_on_hyphens=False)
    lines = []
    for number, line in enumerate(text.splitlines()):
        wrapper.initial_indent = others if number else first
        lines.append(wrapper.fill(line))
    return "\n".join(lines)


def _check_free(out: Path, name: str = "`--out`") -> None:
    """Raise before any work if the directory cannot be written to, or another process holds it."""
    from cronos_flax._head.files import LOCK, check_path, locked

    check_path("cronos-flax", name.strip("`"), out)
    there = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ValueError(
            f"{name} must be a directory, or one that can be made, got {out}: {there} cannot be written to."
        )
    if (out / LOCK).exists():
        with locked(out):
            pass


def _settings(args: argparse.Namespace, shots: int | None = None) -> Any:
    from cronos_flax.compare.task import Settings

    return Settings(
        dataset=args.dataset,
        model=args.model,
        loss=args.loss,
        epochs=getattr(args, "epochs", None),
        budget=getattr(args, "seconds", None),
        batch_size=args.batch_size,
        rows=args.rows,
        validation=args.validation,
        scaling=args.scaling,
        targets=args.targets,
        shots=shots,
        augment=args.augment,
        data_dir=args.data_dir,
    )


def _compare(args: argparse.Namespace) -> int:
    from cronos_flax._head.files import locked, replace
    from cronos_flax.compare.task import Task

    if args.epochs is None and args.seconds is None:
        args.epochs = 10
    if args.rate_range and args.rate_range[0] >= args.rate_range[1]:
        raise ValueError(f"`--rate-range` must be LOW HIGH with LOW < HIGH, got {args.rate_range}.")
    if args.seconds and args.jobs > 1:
        raise ValueError("`--seconds` needs runs that are timed: leave `--jobs` out.")
    if args.shard and args.target is not None:
        raise ValueError("`--target` is for the table, which a part does not have: give it to `cronos-flax merge`.")
    if args.shots and args.rows:
        raise ValueError("`--shots` says how many rows are fitted: leave `--rows` out.")
    _check_free(args.shard.directory(args.out) if args.shard else args.out)
    runs, most = _runs(args), args.shots[-1] if args.shots else None
    task = Task.of(_settings(args, most))
    _check_target(args.target, task.dataset.num_classes is not None)
    task.split(args.first_seed)  # whether there are so many rows
    if not args.quiet:
        _print_notes(task.dataset)
    if not args.shots:
        return _judged(_compare_once(args, args.out, runs, task))
    sweeps = {}
    for count in args.shots:
        of_count = dataclasses.replace(task, settings=dataclasses.replace(task.settings, shots=count))
        sweeps[count] = _compare_once(args, args.out / f"shots-{count}", runs, of_count)
    judged = _judged([row for rows in sweeps.values() for row in rows])
    if args.shard:
        return judged
    from cronos_flax.compare import shots

    with locked(args.out):
        replace(args.out / "shots.md", (text := shots.table(sweeps)).encode())
        shots.draw(sweeps, args.out / "shots.png")
    if not args.quiet:
        print(f"{text}\n{args.out}: shots.md, shots.png")
    return judged


def _compare_once(args: argparse.Namespace, whole: Path, runs: list[Any], task: Any) -> list[Any]:
    """One comparison, or a part of it, into a directory; its rows."""
    from cronos_flax._head.files import locked
    from cronos_flax.compare.methods import has_head
    from cronos_flax.compare.progress import Progress
    from cronos_flax.compare.results import by_run
    from cronos_flax.compare.sweep import fill

    shard = args.shard
    out = shard.directory(whole) if shard else whole
    _check_free(out)
    if any(has_head(run.method) for run in runs):
        _ = task.head
    mine = shard.deal(runs) if shard else runs
    with locked(out):
        with Progress(len(mine), quiet=args.quiet) as progress:
            rows = fill(task.settings, runs, out, jobs=args.jobs, watch=progress, task=task, shard=shard)
        done = by_run(rows)  # an earlier call may have done more runs, in another order
        rows = [row for run in mine for row in done[run]]
        if not shard:
            _write_figures(rows, out, args.target)
    if shard and not args.quiet:
        print(f"{out}: {len(mine)} of the {len(runs)} runs. When all parts are done:")
        print(f"  cronos-flax merge {whole} {whole}/part-*-of-{shard.of}")
    elif not args.quiet:
        progress.show(rows, out)
    return rows


def _runs(args: argparse.Namespace) -> list[Any]:
    """All runs of a sweep, in the order in which one machine does them."""
    from cronos_flax.compare.methods import PROBE, check_method, grid
    from cronos_flax.compare.task import Run

    methods = [check_method(name.strip()) for name in args.methods.split(",")]
    span = tuple(args.rate_range) if args.rate_range else None
    for option, given, without in (("--rate-range", span, (PROBE,)), ("--random-rates", args.random_rates, ())):
        if given is not None and all(method in without or grid(method, 1) == [None] for method in methods):
            raise ValueError(
                f"`{option}` is for optimizers with a grid of rates, got none in `--methods` {args.methods}."
            )
    return [
        Run(method, rate, seed)
        for seed in range(args.first_seed, args.first_seed + args.seeds)
        for method in dict.fromkeys(methods)
        for rate in dict.fromkeys(grid(method, args.rates, span, args.random_rates))
    ]


def _merge(args: argparse.Namespace) -> int:
    from cronos_flax._head.files import locked
    from cronos_flax.compare.merge import collected
    from cronos_flax.compare.progress import Progress

    _check_free(args.out, "OUT")
    merged = collected(args.parts)
    figures = {name for part in merged.parts for run in part.runs.values() for row in run for name in row}
    if "validation_loss" in figures:  # or all runs failed
        _check_target(args.target, "validation_accuracy" in figures)
    with locked(args.out):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always", UserWarning)
            rows = merged.add_to(args.out)
        _write_figures(rows, args.out, args.target)
    if not args.quiet:
        for each in said:
            print(_wrapped(f"warning: {each.message}", "", "  "), file=sys.stderr)
        Progress(0, quiet=False).show(rows, args.out)
    return _judged(rows)


def _judged(rows: list[Any]) -> int:
    """The exit status after a comparison: 1, with a word, if all of its runs failed."""
    if any("error" not in row for row in rows):
        return 0
    print(_wrapped(f"All runs failed, the first one with {rows[0]['error']}", "", "  "), file=sys.stderr)
    return 1


def _check_target(target: float | None, is_accuracy: bool) -> None:
    """Raise for a target that no run can reach, or each run at once."""
    if target is None:
        return
    if is_accuracy and not 1 <= target <= 100:
        raise ValueError(f"`--target` must be an accuracy in %, from 1 to 100, got {target:g}.")
    if not is_accuracy and not -math.inf < target <= 0:
        raise ValueError(f"`--target` must be minus a loss, as targets are values: a number ≤ 0, got {target:g}.")


def _write_figures(rows: list[Any], out: Path, target: float | None) -> None:
    from cronos_flax._head.files import replace
    from cronos_flax.compare import plots, tables

    replace(out / "table.md", tables.table(rows, target).encode())
    plots.draw_curves(rows, out / "curves.png")
    plots.draw_budget(rows, out / "budget.png")


def _train(args: argparse.Namespace) -> int:
    from cronos_flax._head.files import locked, replace
    from cronos_flax.compare import plots
    from cronos_flax.compare.methods import ALTERNATION, BASELINES
    from cronos_flax.compare.progress import Progress
    from cronos_flax.compare.runs import rows_of
    from cronos_flax.compare.task import Run, Task

    if args.optimizer not in BASELINES:
        raise ValueError(f"`--optimizer` must be one of {', '.join(BASELINES)}, got {args.optimizer!r}.")
    _check_free(args.out)
    task = Task.of(_settings(args))
    _ = task.head
    if not args.quiet:
        _print_notes(task.dataset)
    run = Run(f"{ALTERNATION}:{args.optimizer}", args.rate, args.seed)
    with locked(args.out):
        with Progress(args.epochs, quiet=args.quiet) as progress:
            rows = rows_of(task, run, progress.epoch, directory=args.out / "checkpoints")
        rows = [{**task.settings.shared(), **run._asdict(), **row} for row in rows]
        replace(args.out / "history.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
        plots.draw_curves(rows, args.out / "curves.png")
    return 0


def _info(args: argparse.Namespace) -> int:
    import jax

    from cronos_flax.compare.sweep import VERSIONS
    from cronos_flax.compare.task import Task

    for name in VERSIONS:
        print(f"{name:12} {importlib.metadata.version(name)}")
    for device in jax.devices():
        print(f"{'device':12} {device.platform} {device.device_kind}")
    task = Task.of(_settings(args))
    x = task.split(0).x
    print(f"{'data':12} {args.dataset}: {len(x)} rows to fit, loss {task.loss}")
    _print_notes(task.dataset)
    print()
    print(task.head)
    return 0


def _print_notes(dataset: Any) -> None:
    """Print what the arrays of the set were taken as."""
    for name, text in dataset.notes.items():
        print(_wrapped(text, f"{name:13}", " " * 13))
