"""The parts of CRONOS-AM on development tasks: a table that confirmed the defaults of ``cf.Alternation``.

    python docs/benchmarks/alternation.py --data-dir tfds --out alternation.jsonl

Six tasks, none of which a comparison in these pages reports: rows, classes, widths or networks are others, and all rows
are of training splits. Every method has the same epochs and batches. Adam alone can be run with and without a cosine
decay at five rates; the kept rows have two. Every run is a row of the file, written when it is done; rows that are
there are not run again. Ends with the table; ``--out docs/benchmarks/alternation.jsonl.gz`` prints that of kept rows.
"""

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from flax.training.train_state import TrainState
from rows import Row, missing, parser
from suite_tasks import (
    CLOTHES,
    Net,
    Places,
    Rows,
    drawn,
    pictures,
    some_clothes,
    some_vehicles,
    standardised,
    teacher,
)

import cronos_flax as cf

SEEDS = (0, 1)
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)


class Case(NamedTuple):
    """A task: its rows by seed, its network and how it is trained."""

    rows: Callable[[int, Places], Rows]
    model: Net
    batch_size: int
    epochs: int


def of_teacher(seed: int, places: Places) -> Rows:
    """Those of the suite's teacher, standardised and in another order."""
    x, y, x_scored, y_scored = teacher(seed, places)
    order = drawn(x, None, seed)
    x, x_scored = standardised(x[order], x_scored)
    return Rows(x, y[order], x_scored, y_scored)


tops = partial(pictures, name=CLOTHES, pool=(0, 13_000), classes=(2, 4, 6))
CASES = {
    "clothes, CNN": Case(partial(some_clothes, rows=4000), Net("cnn", (12, 24), 64, 10), 64, 15),
    "vehicles, CNN": Case(partial(some_vehicles, rows=4000), Net("cnn", (16, 32, 32), 64, 2), 64, 20),
    "vehicles, MLP": Case(partial(some_vehicles, rows=3000), Net("dense", (200, 80), 64, 2), 128, 40),
    "tops, MLP": Case(partial(tops, rows=4000), Net("dense", (256, 128), 64, 3), 128, 25),
    "teacher, MLP": Case(of_teacher, Net("dense", (128, 64), 64, 6), 64, 25),
    "clothes, ViT": Case(partial(some_clothes, rows=2000), Net("vit", (96, 96), 64, 10), 64, 12),
}
MOVING = cf.Alternation(decay="cosine", then_every=5, largest_step=None)  # the default when the rows were made
FROZEN = dataclasses.replace(MOVING, head="frozen")
# By name: the rate of Adam, the parts, and settings of the solver.
VARIANTS: dict[str, tuple[float, cf.Alternation, dict[str, Any]]] = {
    "default": (1e-3, MOVING, {}),
    **{f"default, rate {rate:g}": (rate, MOVING, {}) for rate in RATES if rate != 1e-3},
    "frozen head": (1e-3, FROZEN, {}),
    "frozen head, no decay": (1e-3, dataclasses.replace(FROZEN, decay=None), {}),
    "no decay": (1e-3, dataclasses.replace(MOVING, decay=None), {}),
    "linear decay": (1e-3, dataclasses.replace(MOVING, decay="linear"), {}),
    "solved at the start": (1e-3, dataclasses.replace(MOVING, first_epoch=0), {}),
    "solved before each epoch": (1e-3, dataclasses.replace(MOVING, then_every=1), {}),
    "solved before every third epoch": (1e-3, dataclasses.replace(MOVING, then_every=3), {}),
    "beta_ratio .005": (1e-3, MOVING, {"beta_ratio": 0.005}),
    "beta_ratio .05": (1e-3, MOVING, {"beta_ratio": 0.05}),
}
ADAM = {
    f"Adam {rate:g}{name}": (rate, decay)
    for (name, decay), rate in itertools.product({"": False, ", cosine": True}.items(), RATES)
}


def run(task: str, method: str, seed: int, *, data_dir: Path) -> Row:
    """Train once; the figures of the row."""
    case = CASES[task]
    x, y, x_held, y_held = case.rows(seed, Places(data_dir))
    params = case.model.init(jax.random.key(seed), x[:1])["params"]
    common: dict[str, Any] = {"apply_fn": case.model.apply, "params": params}
    steps = case.epochs * (len(x) // case.batch_size)
    state: TrainState
    if method in ADAM:
        rate, decays = ADAM[method]
        state = TrainState.create(**common, tx=_adam(rate, steps if decays else None))
    else:
        rate, alternation, settings = VARIANTS[method]
        head = cf.find_head(case.model, {"params": params}, x[:64])
        solver = cf.Cronos(loss="softmax", **settings)
        state = cf.CronosTrainState.create(
            **common, tx=_adam(rate, None), head=head, solver=solver, alternation=alternation
        )
    began = time.process_time()
    state, history = cf.train(
        state,
        (x, y),
        epochs=case.epochs,
        batch_size=case.batch_size,
        loss="softmax",
        validation=(x_held, y_held),
        key=jax.random.key(seed),
        compile_first=True,
    )
    accuracies = [100 * row["validation_accuracy"] for row in history if "validation_accuracy" in row]
    solving = sum(row.get("solve_seconds", 0.0) for row in history)
    return {
        "end": accuracies[-1],
        "peak": max(accuracies),
        "rejections": getattr(state, "figures", {}).get("rejections", 0),
        "solving": solving / history[-1]["seconds"],
        "cpu_seconds": time.process_time() - began,
    }


@functools.cache
def _adam(rate: float, steps: int | None) -> optax.GradientTransformation:
    """Adam, with a cosine decay over so many steps."""
    return optax.adam(rate if steps is None else optax.cosine_decay_schedule(rate, steps))


def table(rows: list[Row]) -> str:
    """Accuracy at the end by method and task, and its mean difference to Adam at 0.001 with a cosine decay."""
    by = {(row["task"], row["method"], row["seed"]): row for row in rows}
    reference = "Adam 0.001, cosine"
    lines = [f"| method | {' | '.join(CASES)} | minus {reference} | rejected | solving |"]
    lines.append("|---" * (len(CASES) + 4) + "|")
    for method in (*VARIANTS, *ADAM):
        there = {task: [by[key] for s in SEEDS if (key := (task, method, s)) in by] for task in CASES}
        if not all(there.values()):
            continue
        pairs = [
            row["end"] - by[task, reference, row["seed"]]["end"]
            for task, runs in there.items()
            for row in runs
            if (task, reference, row["seed"]) in by
        ]
        error = np.std(pairs, ddof=1) / len(pairs) ** 0.5 if len(pairs) > 1 else np.nan
        each = [row for runs in there.values() for row in runs]
        cells = [f"{np.mean([row['end'] for row in runs]):.2f}" for runs in there.values()]
        cells.append(f"{np.mean(pairs):+.2f} ± {error:.2f}" if pairs else "")
        cells.append(f"{sum(row['rejections'] for row in each):.0f}")
        cells.append(f"{100 * np.mean([row['solving'] for row in each]):.0f} %")
        lines.append(f"| {method} | {' | '.join(cells)} |")
    if all((task, method, seed) in by for task in CASES for method in ADAM for seed in SEEDS):
        best = [np.mean([max(by[task, m, s]["end"] for m in ADAM) for s in SEEDS]) for task in CASES]
        cells = [f"{value:.2f}" for value in best]
        lines.append(f"| Adam, the best of ten on these rows | {' | '.join(cells)} | | | |")
    return "\n".join(lines)


if __name__ == "__main__":
    arguments = parser(__file__, __doc__, data=False)
    arguments.add_argument("--methods", nargs="*", default=[*VARIANTS, *ADAM], help="some of the methods")
    options = arguments.parse_args()
    wanted = [] if options.out.suffix == ".gz" else itertools.product(SEEDS, options.methods, CASES)
    keys = ((task, method, seed) for seed, method, task in wanted)
    do = partial(run, data_dir=options.data_dir)
    print(table(missing(options.out, ("task", "method", "seed"), keys, do)))
