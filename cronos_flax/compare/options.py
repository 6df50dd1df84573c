"""The options of the command line, command by command."""

import argparse
import importlib.metadata
import textwrap
from pathlib import Path
from typing import Any

from cronos_flax._alternation.defaults import DECAYS
from cronos_flax.compare.arrays import KINDS
from cronos_flax.compare.data import EMBEDDED, SCALINGS
from cronos_flax.compare.methods import ALTERNATION, FROZEN, METHODS, PROBE, PROBED_FIRST, SOLVED_FIRST, STRICT
from cronos_flax.compare.models import MODELS
from cronos_flax.compare.shards import Shard


class Parser(argparse.ArgumentParser):
    """A parser whose help shows defaults and keeps line breaks, and whose options are to be written out."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(formatter_class=_Help, allow_abbrev=False, **kwargs)


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def parsers() -> tuple[Parser, dict[str, Parser]]:
    """The parser of ``cronos-flax``, and those of its commands by name."""
    parser = Parser(prog="cronos-flax", description="Convex training of the last two layers of Flax modules.")
    version = importlib.metadata.version("cronos_flax")
    parser.add_argument("--version", action="version", version=f"cronos_flax {version}")
    kinds = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    task = _task()
    return parser, {
        "compare": _compare(kinds, task),
        "merge": _merge(kinds),
        "train": _train(kinds, task),
        "info": _info(kinds, task),
    }


def _task() -> Parser:
    """The options that all commands have which read data and make a model."""
    task = Parser(add_help=False)
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
        "module, or a module and its variables; or of that and rngs, that returns an NNX model",
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
        "--validation", type=_rows_or_share, default=0.2, metavar="N",
        help="rows of the training split held back for validation; below 1, a fraction",
    )  # fmt: skip
    data.add_argument(
        "--batch-size", type=_positive, default=128, metavar="N", help="rows of a gradient step; at most all rows"
    )
    data.add_argument(
        "--augment", metavar="NAME",
        help="module:function of a batch of inputs and a NumPy Generator, which returns what gradient steps see; "
        "solves, probes and scores see the rows as they are",
    )  # fmt: skip
    return task


def _compare(kinds: Any, task: Parser) -> Parser:
    compare: Parser = kinds.add_parser(
        "compare", parents=[task], help="CRONOS-AM against tuned optimizers, on your model and data",
        description="Compare methods over grids of rates and over seeds, at equal budgets. The same command\n"
        "resumes where it was stopped. Writes into DIR:\n"
        "  results.jsonl  the checks of all runs\n"
        "  table.md       each method at its best rate, chosen by validation, and its grid\n"
        "  curves.png     validation scores during training, a panel for each method\n"
        "  budget.png     the test score to expect for a compute budget, tuning included",
        epilog="methods:\n" + "\n".join(_method_lines()),
    )  # fmt: skip
    runs = compare.add_argument_group("runs")
    runs.add_argument("--methods", default="cronos-am,adam,sgd", metavar="LIST", help="separated by commas; see below")
    runs.add_argument(
        "--seeds", type=_positive, default=3, metavar="N",
        help="number of seeds; a seed fixes split, weights, order of rows",
    )  # fmt: skip
    runs.add_argument(
        "--shots", type=_counts, metavar="LIST",
        help="fit on so many rows of each class only, such as 1,5,10,20: a comparison for each, into DIR/shots-N, and "
        "DIR/shots.md and shots.png of them all; a seed draws the rows",
    )  # fmt: skip
    runs.add_argument("--first-seed", type=_seed, default=0, metavar="N", help="seeds are N, N+1, …")
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
    runs.add_argument("--random-rates", type=_seed, metavar="SEED", help="draw rates at random instead of spacing them")
    runs.add_argument(
        "--jobs", type=_positive, default=1, metavar="N",
        help="runs side by side, one core each; with more than 1, times are not kept",
    )  # fmt: skip
    runs.add_argument(
        "--shard", type=_shard, metavar="K/N",
        help="do part K of N only, into DIR/part-K-of-N: results.jsonl and sweep.json; see merge",
    )  # fmt: skip
    shown = compare.add_argument_group("output")
    _add_target(shown)
    _add_output(shown)
    return compare


def _merge(kinds: Any) -> Parser:
    merge: Parser = kinds.add_parser(
        "merge", help="put the parts of compare --shard together",
        description="Merge the results.jsonl of all parts of a comparison (compare --shard K/N) into OUT, to what\n"
        "one machine would have written, and write the same table and pictures there. Nothing is\n"
        "written if runs are missing or the parts do not fit together; it is said which and why.",
    )  # fmt: skip
    merge.add_argument("out", type=_directory, metavar="OUT", help="directory of the results; what it holds is kept")
    merge.add_argument(
        "parts", type=_directory, nargs="+", metavar="PART", help="directories that compare --shard made"
    )
    shown = merge.add_argument_group("output")
    _add_target(shown)
    _add_quiet(shown)
    merge.set_defaults(compile_anew=True)  # there is nothing to compile
    return merge


def _train(kinds: Any, task: Parser) -> Parser:
    train: Parser = kinds.add_parser(
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
    how.add_argument("--seed", type=_seed, default=0, metavar="N", help="fixes split, weights and order of rows")
    _add_output(train.add_argument_group("output"))
    return train


def _info(kinds: Any, task: Parser) -> Parser:
    info: Parser = kinds.add_parser(
        "info", parents=[task], help="versions, devices, and the head of a model",
        description="Print versions and devices, and the head of a model, or the reason why it has none.",
    )  # fmt: skip
    return info


def _add_target(group: Any) -> None:
    group.add_argument(
        "--target", type=float, metavar="SCORE",
        help="validation score that times are given to: accuracy in %%, or minus the loss where targets are values",
    )  # fmt: skip


def _add_output(group: Any) -> None:
    group.add_argument("--out", type=_directory, required=True, metavar="DIR", help="directory of the results")
    _add_quiet(group)


def _add_quiet(group: Any) -> None:
    group.add_argument("--quiet", action="store_true", help="print nothing but errors")


def _method_lines() -> list[str]:
    said = {
        ALTERNATION: "CRONOS-AM with its defaults, and Adam at 3e-3",
        SOLVED_FIRST: "the same after the head was solved on the backbone as it is",
        STRICT: "CRONOS-AM with a head that only solves move, at a constant rate",
        FROZEN: "the head solved once, on the backbone as it is",
        PROBE: "a linear model on the features of the backbone as it is",
        PROBED_FIRST: "the best linear probe in the head, then Adam on all, over its grid",
    }
    optimizers = ", ".join(name for name in METHODS if name not in said)
    own = [f"  {name:<23}{text}" for name, text in said.items()]
    lines = textwrap.wrap(f"{optimizers}: over their grids", 77, initial_indent="  ", subsequent_indent="  ")
    kinds = ", ".join((ALTERNATION, SOLVED_FIRST, STRICT, PROBED_FIRST))
    own.append(f"  {'KIND:OPTIMIZER':<23}{kinds}: with another one, over its grid")
    decays = f"with a rate that follows {', '.join(filter(None, DECAYS))}; {PROBED_FIRST} too"
    return [*own, *lines, f"  {'OPTIMIZER+DECAY':<23}{decays}"]


def _shard(text: str) -> Shard:
    try:
        return Shard.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _directory(text: str) -> Path:
    if not text:  # which pathlib makes the directory where one is
        raise argparse.ArgumentTypeError("must be a directory, got ''")
    return Path(text)


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be an integer ≥ 1, got {text!r}")
    return value


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"must be an integer from 0 to {2**32 - 1}, got {text!r}")
    return int(text)


def _counts(text: str) -> tuple[int, ...]:
    return tuple(sorted(dict.fromkeys(_positive(part.strip()) for part in text.split(","))))


def _rows_or_share(text: str) -> float:
    value = _positive_float(text)
    if value > 1 and value != int(value):
        raise argparse.ArgumentTypeError(f"must be a number of rows, or a fraction below 1, got {text!r}")
    return value


def _positive_float(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a positive number, got {text!r}")
    return value
