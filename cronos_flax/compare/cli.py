"""The command line: ``cronos-flax compare | train | info``, the same as ``python -m cronos_flax``."""

import argparse
import importlib.metadata
import json
import logging
import os
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

_EXTRA = "pip install 'cronos_flax[examples]'"
_INTERRUPTED = 130


class _Parser(argparse.ArgumentParser):
    """A parser whose help shows defaults and keeps line breaks."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(formatter_class=_Help, **kwargs)


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: the arguments; None for those of the process.

    Returns:
        The exit status: 0, or 130 after an interrupt. Wrong arguments and data exit with 2, as argparse does; a file
        or directory that cannot be read or written, or that another process holds, with 1.
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
    parser, commands = _parsers()
    args = parser.parse_args(argv)
    if not args.compile_anew:
        from cronos_flax.compare import programs

        programs.keep()
    try:
        return {"compare": _compare, "train": _train, "info": _info}[args.command](args)
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
    return textwrap.fill(
        text, 79, initial_indent=first, subsequent_indent=others, break_long_words=False, break_on_hyphens=False
    )


def _parsers() -> tuple[_Parser, dict[str, _Parser]]:
    from cronos_flax.compare.arrays import KINDS
    from cronos_flax.compare.data import EMBEDDED, SCALINGS
    from cronos_flax.compare.methods import METHODS
    from cronos_flax.compare.models import MODELS

    parser = _Parser(prog="cronos-flax", description="Convex training of the last two layers of Flax modules.")
    version = importlib.metadata.version("cronos_flax")
    parser.add_argument("--version", action="version", version=f"cronos_flax {version}")
    kinds = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    task = _Parser(add_help=False)
    task.add_argument(
        "--compile-anew", action="store_true",
        help="keep no compiled programs in the user's cache folder, and use none that are there",
    )  # fmt: skip
    data = task.add_argument_group("data and model")
    data.add_argument(
        "--dataset", default="digits", metavar="NAME",
        help=f"{', '.join(EMBEDDED)}; a file.npz with x, y (and x_test, y_test); or the name of a prepared TFDS set",
    )  # fmt: skip
    data.add_argument("--data-dir", metavar="DIR", help="directory of prepared TFDS sets")
    data.add_argument(
        "--model", default="mlp", metavar="NAME",
        help=f"{', '.join(MODELS)}; or module:factory, a function of the number of outputs that returns a linen "
        "module, or a module and its variables",
    )  # fmt: skip
    data.add_argument(
        "--loss", choices=("softmax", "squared", "logistic", "huber", "hinge"),
        help="if not given: softmax for classes, squared for regression",
    )  # fmt: skip
    data.add_argument(
        "--targets", choices=KINDS,
        help="if not given: classes for integers, strings, bools and whole floats, values for other floats",
    )  # fmt: skip
    data.add_argument("--scaling", choices=SCALINGS, default="standardise", help="of the inputs")
    data.add_argument("--rows", type=_positive, metavar="N", help="fit on N rows only")
    data.add_argument(
        "--validation", type=_positive_float, default=0.2, metavar="N",
        help="rows of the training split held back for validation; below 1, a fraction",
    )  # fmt: skip
    data.add_argument("--batch-size", type=_positive, default=128, metavar="N", help="rows of a gradient step")

    compare = kinds.add_parser(
        "compare", parents=[task], help="CRONOS-AM against tuned optimizers, on your model and data",
        description="Compare methods over grids of rates and over seeds, at equal budgets. The same command\n"
        "resumes where it was stopped. Writes into DIR:\n"
        "  results.jsonl  the checks of all runs\n"
        "  table.md       each method at its best rate, chosen by validation, and its grid\n"
        "  curves.png     validation scores during training, a panel for each method\n"
        "  budget.png     the test score to expect for a compute budget, tuning included",
        epilog="methods:\n" + "\n".join(_method_lines(METHODS)),
    )  # fmt: skip
    runs = compare.add_argument_group("runs")
    runs.add_argument("--methods", default="cronos-am,adam,sgd", metavar="LIST", help="separated by commas; see below")
    runs.add_argument(
        "--seeds",
        type=_positive,
        default=3,
        metavar="N",
        help="number of seeds; a seed fixes split, weights, order of rows",
    )
    runs.add_argument("--first-seed", type=int, default=0, metavar="N", help="seeds are N, N+1, …")
    budget = runs.add_mutually_exclusive_group()
    budget.add_argument(
        "--epochs", type=_positive, metavar="N", help="length of each run; 10 if --seconds is not given"
    )
    budget.add_argument(
        "--seconds", type=_positive_float, metavar="S", help="training time of each run, in place of epochs"
    )
    runs.add_argument("--rates", type=_positive, default=7, metavar="N", help="rates in each method's grid")
    runs.add_argument(
        "--rate-range", type=_positive_float, nargs=2, metavar=("LOW", "HIGH"),
        help="of all optimizers; if not given, three decades that are usual for each",
    )  # fmt: skip
    runs.add_argument("--random-rates", type=int, metavar="SEED", help="draw rates at random instead of spacing them")
    runs.add_argument(
        "--jobs", type=_positive, default=1, metavar="N",
        help="runs side by side, one core each; with more than 1, times are not kept",
    )  # fmt: skip
    shown = compare.add_argument_group("output")
    shown.add_argument(
        "--target", type=float, metavar="SCORE", help="validation accuracy in %% that times are given to"
    )
    _add_output(shown)

    train = kinds.add_parser(
        "train", parents=[task], help="one run of CRONOS-AM",
        description="Train by CRONOS-AM. Writes checkpoints, history.jsonl and curves.png into DIR; the\n"
        "same command resumes where it was stopped.",
    )  # fmt: skip
    how = train.add_argument_group("run")
    how.add_argument("--epochs", type=_positive, default=10, metavar="N", help="passes through the rows")
    how.add_argument(
        "--optimizer", default="adam", metavar="NAME", help="of the backbone: one of the optimizers of compare"
    )
    how.add_argument("--rate", type=_positive_float, default=3e-3, metavar="R", help="its learning rate")
    how.add_argument("--seed", type=int, default=0, metavar="N", help="fixes split, weights and order of rows")
    _add_output(train.add_argument_group("output"))

    info = kinds.add_parser(
        "info", parents=[task], help="versions, devices, and the head of a model",
        description="Print versions and devices, and the head of a model, or the reason why it has none.",
    )  # fmt: skip
    return parser, {"compare": compare, "train": train, "info": info}


def _add_output(group: Any) -> None:
    group.add_argument("--out", type=Path, required=True, metavar="DIR", help="directory of the results")
    group.add_argument("--quiet", action="store_true", help="print nothing but errors")


def _method_lines(names: Sequence[str]) -> list[str]:
    from cronos_flax._alternation.defaults import DECAYS
    from cronos_flax.compare.methods import ALTERNATION, FROZEN, PROBE, STRICT

    said = {
        ALTERNATION: "CRONOS-AM with its defaults, and Adam at 3e-3",
        STRICT: "the same with a head that only solves move, at a constant rate",
        FROZEN: "the head solved once, on the untrained backbone",
        PROBE: "a linear model on the features of the untrained backbone",
    }
    optimizers = ", ".join(name for name in names if name not in said)
    own = [f"  {name:<23}{text}" for name, text in said.items()]
    lines = textwrap.wrap(f"{optimizers}: over their grids", 77, initial_indent="  ", subsequent_indent="  ")
    own.append(f"  {ALTERNATION + ':OPTIMIZER':<23}CRONOS-AM with another one, over its grid")
    return [*own, *lines, f"  {'OPTIMIZER+DECAY':<23}with a rate that follows {', '.join(filter(None, DECAYS))}"]


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be an integer ≥ 1, got {text!r}")
    return value


def _positive_float(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a positive number, got {text!r}")
    return value


def _check_free(out: Path) -> None:
    """Raise before any work if the directory cannot be written to, or another process holds it."""
    from cronos_flax._head.files import LOCK, held

    there = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ValueError(
            f"`--out` must be a directory, or one that can be made, got {out}: {there} cannot be written to."
        )
    if (out / LOCK).exists():
        with held(out):
            pass


def _settings(args: argparse.Namespace) -> Any:
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
        data_dir=args.data_dir,
    )


def _compare(args: argparse.Namespace) -> int:
    from cronos_flax._head.files import held, replace
    from cronos_flax.compare import plots, tables
    from cronos_flax.compare.methods import check_method, grid, has_head
    from cronos_flax.compare.progress import Progress
    from cronos_flax.compare.results import by_run
    from cronos_flax.compare.summaries import summaries
    from cronos_flax.compare.sweep import fill
    from cronos_flax.compare.task import Run, Task

    if args.epochs is None and args.seconds is None:
        args.epochs = 10
    if args.rate_range and args.rate_range[0] >= args.rate_range[1]:
        raise ValueError(f"`--rate-range` must be LOW HIGH with LOW < HIGH, got {args.rate_range}.")
    if args.seconds and args.jobs > 1:
        raise ValueError("`--seconds` needs runs that are timed: leave `--jobs` out.")
    _check_free(args.out)
    settings = _settings(args)
    methods = [check_method(name.strip()) for name in args.methods.split(",")]
    span = tuple(args.rate_range) if args.rate_range else None
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    runs = [
        Run(method, rate, seed)
        for seed in seeds
        for method in dict.fromkeys(methods)
        for rate in dict.fromkeys(grid(method, args.rates, span, args.random_rates))
    ]
    task = Task.of(settings)
    task.split(seeds[0])
    if any(map(has_head, methods)):
        _ = task.head
    if not args.quiet:
        _print_notes(task.dataset)
    with held(args.out):
        with Progress(len(runs), quiet=args.quiet) as progress:
            rows = fill(settings, runs, args.out, jobs=args.jobs, watch=progress, task=task)
        done = by_run(rows)  # an earlier call may have done more runs, in another order
        rows = [row for run in runs for row in done[run]]
        replace(args.out / "table.md", tables.table(rows, args.target).encode())
        plots.draw_curves(rows, args.out / "curves.png")
        plots.draw_budget(rows, args.out / "budget.png")
    if not args.quiet:
        progress.show(summaries(rows), args.out)
    return 0


def _train(args: argparse.Namespace) -> int:
    from cronos_flax._head.files import held, replace
    from cronos_flax.compare import plots
    from cronos_flax.compare.methods import ALTERNATION, BASELINES, rows_of
    from cronos_flax.compare.progress import Progress
    from cronos_flax.compare.task import Run, Task

    if args.optimizer not in BASELINES:
        raise ValueError(f"`--optimizer` must be one of {', '.join(BASELINES)}, got {args.optimizer!r}.")
    _check_free(args.out)
    task = Task.of(_settings(args))
    _ = task.head
    if not args.quiet:
        _print_notes(task.dataset)
    run = Run(f"{ALTERNATION}:{args.optimizer}", args.rate, args.seed)
    with held(args.out):
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
