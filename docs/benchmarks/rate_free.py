"""CRONOS-AM with backbones that have no rate, against its own grid of Adam's rates; and these optimizers alone.

    python docs/benchmarks/rate_free.py --data-dir DIR --cache DIR [--out rate_free.jsonl]
    python docs/benchmarks/rate_free.py --out docs/benchmarks/rate_free.jsonl.gz  # the tables of kept rows

The backbones are those of ``examples/neighbours/mechanic.py``. Three tasks of the suite, five seeds; the epochs of a
task are the suite's, fewer for alternations, so that both take about the same time. Rows that are scored are held-out
training rows (digits: a third of the set), never those of a test split. The best cell of a grid is chosen on these very
rows: that favours the grid. Every run is one row of the file, written when it is done; rows that are there are not run
again.
"""

import functools
import itertools
import sys
import time
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from rows import Row, kept, missing, parser
from suite import split
from suite_tasks import TASKS, Places

import cronos_flax as cf
from cronos_flax._alternation.backbone import rated
from cronos_flax.compare.methods import BaselineState

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "neighbours"))
import mechanic as example

NAMES = ("digits, MLP", "news, features", "teacher, MLP")
RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
SEEDS = range(5)
OURS, FREE, ALONE = "CRONOS-AM", "CRONOS-AM, steps not limited", "alone"
ADAM = {f"adam {rate:g}": rate for rate in RATES}
MECHANIC, MECHANIC_SGD, PRODIGY = "mechanic", "mechanic, SGD", "prodigy"
METHODS = {
    OURS: (*ADAM, *example.BACKBONES),
    FREE: (MECHANIC, "cocob"),
    ALONE: (*ADAM, MECHANIC, PRODIGY),
}


@functools.cache
def optimizer(name: str, alone: bool) -> optax.GradientTransformation:
    """The same object each time, so that its step is compiled once; alone it is one whose rate can fall."""
    tx = optax.adam(ADAM[name]) if name in ADAM else example.BACKBONES[name]()
    return rated(tx) if alone else tx


def run(task: str, kind: str, name: str, seed: int, *, places: Places) -> Row:
    """Train once; the figures of the row."""
    its, rows, tx = TASKS[task], split(task, seed, places), optimizer(name, kind == ALONE)
    variables = its.model.init(jax.random.key(seed), rows.x[:1])
    common: dict[str, Any] = {"apply_fn": its.model.apply, "params": variables["params"], "tx": tx}
    state: Any
    if kind == ALONE:
        state = BaselineState.create(**common, run_decay="wsd")
    else:
        parts = cf.Alternation(largest_step=None) if kind == FREE else cf.Alternation()
        head = cf.find_head(its.model, variables, rows.x[:64])
        state = cf.CronosTrainState.create(**common, head=head, solver=cf.Cronos(loss=its.loss), alternation=parts)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        began = time.process_time()
        state, history = cf.train(
            state,
            (rows.x, rows.y),
            epochs=its.epochs if kind == ALONE else its.solved_epochs,
            batch_size=its.batch_size,
            loss=its.loss,
            validation=(rows.x_scored, rows.y_scored),
            key=jax.random.key(seed),
        )
        seconds = time.process_time() - began
    accuracies = [100 * row["validation_accuracy"] for row in history if "validation_accuracy" in row]
    rates = [row["backbone_rate"] for row in history if "backbone_rate" in row]
    return {
        "end": accuracies[-1],
        "solves": sum("objective" in row for row in history),
        "rejections": getattr(state, "figures", {}).get("rejections", 0),
        "lowest_rate": min(rates, default=1.0),
        "rate": rates[-1] if rates else 1.0,
        "scale": example.scale(state),
        "warned": sorted({str(warning.message)[:60] for warning in told if warning.category is UserWarning}),
        "cpu_seconds": seconds,
    }


def wanted() -> Iterable[tuple[str, str, str, int]]:
    """The key of every row, seed after seed of a task."""
    for task, seed in itertools.product(NAMES, SEEDS):
        yield from ((task, kind, name, seed) for kind, names in METHODS.items() for name in names)


# ------------------------------------------------------------------------------------------------ tables


def whole(rows: list[Row]) -> list[Row]:
    """The rows of tasks and seeds that all methods have, and how many seeds these are."""
    keys = list(wanted())
    done = {(row["task"], row["kind"], row["name"], row["seed"]) for row in rows}
    lacking = {(task, seed) for task, kind, name, seed in keys if (task, kind, name, seed) not in done}
    for task in NAMES:
        print(f"{task}: {sum((task, seed) not in lacking for seed in SEEDS)} seed(s)")
    return [row for row in rows if (row["task"], row["seed"]) not in lacking]


def table(rows: list[Row], kind: str) -> None:
    """Accuracy at the end, and the distance to the best cell of the kind's grid, paired by seed, ± standard error."""
    tasks = [task for task in NAMES if any(row["task"] == task for row in rows)]
    of: dict[tuple[str, str, str], dict[int, Row]] = {}
    for row in rows:
        of.setdefault((row["kind"], row["task"], row["name"]), {})[row["seed"]] = row
    grid = ALONE if kind == ALONE else OURS
    print(
        f"\n{kind}\n\n| optimizer | {' | '.join(f'{task} | less the best cell' for task in tasks)} | rejected solves |"
    )
    print(f"|---{'|---|---' * len(tasks)}|---|")
    for name in METHODS[kind]:
        cells, rejected = [], 0
        for task in tasks:
            own = of.get((kind, task, name), {})
            cell = max((of.get((grid, task, each), {}) for each in ADAM), key=mean_end)
            cells += [f"{mean_end(own):.2f}", "best" if own is cell else apart(own, cell)]
            rejected += sum(row["rejections"] for row in own.values())
        print(f"| {name} | {' | '.join(cells)} | {rejected} |")


def mean_end(cell: dict[int, Row]) -> float:
    """Of a method on a task, over seeds."""
    return float(np.mean([row["end"] for row in cell.values()])) if cell else float("nan")


def apart(ours: dict[int, Row], theirs: dict[int, Row]) -> str:
    """Mean difference, paired by seed, ± its standard error."""
    each = [ours[seed]["end"] - theirs[seed]["end"] for seed in ours if seed in theirs]
    return f"{np.mean(each):+.2f} ± {np.std(each, ddof=1) / len(each) ** 0.5:.2f}" if len(each) > 1 else "–"


def rates_table(rows: list[Row]) -> None:
    """What Mechanic's scale was at the end, the guard's lowest rate, and seconds."""
    print("\n| kind | optimizer | task | scale at the end | guard's lowest rate | rate at the end | CPU s |")
    print("|---|---|---|---|---|---|---|")
    for kind, name, task in itertools.product(METHODS, (MECHANIC, MECHANIC_SGD), NAMES):
        own = [row for row in rows if (row["kind"], row["name"], row["task"]) == (kind, name, task)]
        if own:
            scales = [row["scale"] for row in own]
            cells = [f"{min(scales):.2g} to {max(scales):.2g}", f"{min(row['lowest_rate'] for row in own):.2g}"]
            cells += [f"{min(row['rate'] for row in own):.2g}", f"{np.median([row['cpu_seconds'] for row in own]):.1f}"]
            print(f"| {kind} | {name} | {task} | {' | '.join(cells)} |")


def main() -> None:
    """Run what is missing, print the tables."""
    made = parser(__file__, __doc__, data=False)
    made.add_argument("--cache", type=Path, default=Path(), help="directory of features of suite_features.py")
    args: Any = made.parse_args()
    rows = kept(args.out)
    if args.data_dir is not None:
        do = functools.partial(run, places=Places(args.data_dir, args.cache))
        rows = missing(args.out, ("task", "kind", "name", "seed"), wanted(), do)
    rows = whole(rows)
    for kind in METHODS:
        table(rows, kind)
    rates_table(rows)
    told = {text for row in rows for text in row["warned"]}
    print(f"\nwarnings: {'; '.join(sorted(told)) or 'none'}")


if __name__ == "__main__":
    main()
