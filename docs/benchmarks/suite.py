"""The suite: CRONOS-AM and optimizers, each with one fixed setting for all tasks.

    python docs/benchmarks/suite.py --data-dir DIR --weights DIR --cache DIR --part development --out rows.jsonl
    python docs/benchmarks/suite.py --data-dir DIR --weights DIR --cache DIR --part reported --out rows.jsonl
    python docs/benchmarks/suite.py --out docs/benchmarks/suite.jsonl.gz       # the tables of kept rows

``suite_tasks.py`` has the tasks, and makes the features that some of them need. Settings are chosen on the development
tasks; the chosen ones are run on the reported tasks. Every run is one row of the file, written when it is done; rows
that are there are not run again. Seed after seed, task after task, all methods one after the other. A run of CRONOS-AM
has four fifths of the epochs of an optimizer, as solves may take a fifth of its time.
"""

import functools
import itertools
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from rows import Row, kept, missing, parser
from suite_tasks import DEVELOPMENT, REPORTED, TASKS, Places, Rows

import cronos_flax as cf
from cronos_flax.compare.methods import BASELINES, BaselineState, optimizer
from cronos_flax.compare.task import targets_for

SHARE = 0.8  # of the epochs of an optimizer


class Method(NamedTuple):
    """A setting: the optimizer of all layers, or of the backbone; and the parts of the alternation, if it is one."""

    optimizer: str
    rate: float
    decay: str | None = None
    alternation: cf.Alternation | None = None
    solver: tuple[tuple[str, Any], ...] = ()


def alone(name: str, rates: tuple[float, ...], decays: tuple[str | None, ...]) -> dict[str, Method]:
    """An optimizer with some rates and schedules."""
    return {
        f"{name} {rate:g}{'' if decay is None else f' {decay}'}": Method(name, rate, decay)
        for rate, decay in itertools.product(rates, decays)
    }


def ours(
    name: str, rate: float = 3e-3, optimizer: str = "adam", solver: dict[str, Any] | None = None, **parts: Any
) -> dict[str, Method]:
    """An alternation."""
    return {name: Method(optimizer, rate, None, cf.Alternation(**parts), tuple((solver or {}).items()))}


OPTIMIZERS = (
    alone("adam", (3e-4, 1e-3, 3e-3, 1e-2), (None, "cosine", "wsd"))
    | alone("adamw", (1e-3, 3e-3), ("cosine",))
    | alone("nadamw", (1e-3, 3e-3), ("cosine", "wsd"))
    | alone("sgd", (0.03, 0.1), ("cosine", "wsd"))
    | alone("muon", (3e-3, 1e-2), ("cosine",))
    | alone("schedule_free_adamw", (2.5e-3, 1e-2), (None,))
    | alone("prodigy", (1.0,), (None, "cosine", "wsd"))
)
OURS = "CRONOS-AM"
ALTERNATIONS = ours(OURS) | {
    f"{OURS}, {name}": setting
    for name, setting in (
        ours("rate 1e-3", 1e-3)
        | ours("rate 5e-3", 5e-3)
        | ours("rate 1e-2", 1e-2)
        | ours("NadamW", optimizer="nadamw")
        | ours("SGD .03", 0.03, "sgd")
        | ours("Muon", optimizer="muon")
        | ours("Prodigy", 1.0, "prodigy")
        | ours("Prodigy, cosine decay", 1.0, "prodigy", decay="cosine")
        | ours("cosine decay", decay="cosine")
        | ours("linear decay", decay="linear")
        | ours("no decay", decay=None)
        | ours("frozen head", head="frozen")
        | ours("strict", head="frozen", decay=None)
        | ours("beta_ratio .005", solver={"beta_ratio": 0.005})
        | ours("beta_ratio .05", solver={"beta_ratio": 0.05})
        | ours("one step a solve", solver={"max_iters": 1})
        | ours("ten steps a solve", solver={"max_iters": 10})
        | ours("solved at the start", first_epoch=0)
        | ours("solved before every third epoch", then_every=3)
        | ours("solved before every fifth epoch", then_every=5)
        | ours("solved twice", then_every=10**6)
        | ours("solved at the end only", first_epoch=10**6)
    ).items()
}
METHODS = OPTIMIZERS | ALTERNATIONS


@functools.cache
def split(task: str, seed: int, places: Places) -> Rows:
    """The rows of a task, with targets as its loss takes them."""
    rows = TASKS[task].rows(seed, places)
    classes = int(rows.y.max()) + 1
    y, y_scored = (targets_for(TASKS[task].loss, y, classes)[0] for y in (rows.y, rows.y_scored))
    return Rows(rows.x.astype("float32"), y, rows.x_scored.astype("float32"), y_scored)


def run(task: str, method: str, seed: int, *, places: Places) -> Row:
    """Train once; the figures of the row."""
    its, setting, rows = TASKS[task], METHODS[method], split(task, seed, places)
    training, evaluating = its.keywords
    variables = its.model.init(jax.random.key(seed), rows.x[:1])
    statistics = {name: tree for name, tree in variables.items() if name != "params"}
    common: dict[str, Any] = {"apply_fn": its.model.apply, "params": variables["params"], "model_state": statistics}
    tx, epochs = optimizer(setting.optimizer, setting.rate, setting.decay is not None), its.epochs
    state: Any
    if setting.alternation is None:
        evaluate = BASELINES[setting.optimizer].evaluate
        state = BaselineState.create(**common, tx=tx, evaluate=evaluate, run_decay=setting.decay)
    else:
        epochs = round(SHARE * epochs)
        found = {**evaluating, "statistics": "batch"} if statistics else {}
        state = cf.CronosTrainState.create(
            **common,
            tx=tx,
            head=cf.find_head(its.model, variables, rows.x[:64], **found),
            solver=cf.Cronos(loss=its.loss, **dict(setting.solver)),
            alternation=setting.alternation,
        )
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        began = time.process_time()
        state, history = cf.train(
            state,
            (rows.x, rows.y),
            epochs=epochs,
            batch_size=its.batch_size,
            loss=its.loss,
            validation=(rows.x_scored, rows.y_scored),
            train_kwargs=training,
            eval_kwargs=evaluating,
            key=jax.random.key(seed),
            compile_first=True,
        )
    accuracies = [100 * row["validation_accuracy"] for row in history if "validation_accuracy" in row]
    figures = getattr(state, "figures", {})
    return {
        "end": accuracies[-1],
        "peak": max(accuracies),
        "before": accuracies[-2],
        "seconds": history[-1]["seconds"],
        "solving": sum(row.get("solve_seconds", 0.0) for row in history),
        "rejections": figures.get("rejections", 0),
        "rate": figures.get("backbone_rate", 1.0),
        "warned": sorted({str(warning.message)[:60] for warning in told if warning.category is UserWarning}),
        "cpu_seconds": time.process_time() - began,
    }


def wanted(tasks: list[str], methods: list[str], seeds: range) -> Iterator[tuple[str, str, int]]:
    """Runs in their order: the methods side by side."""
    for seed, task, method in itertools.product(seeds, tasks, methods):
        yield task, method, seed


def table(rows: list[Row], tasks: list[str]) -> str:
    """Accuracy at the end by method and task, mean rank and distance to the best; for methods run on all of them."""
    by: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        by.setdefault(row["method"], {}).setdefault(row["task"], []).append(row)
    whole = {name: own for name, own in by.items() if all(task in own for task in tasks)}
    if not whole:
        return ""
    least = {name: min(len(own[task]) for task in tasks) for name, own in whole.items()}
    means = np.array([[np.mean([row["end"] for row in own[task]]) for task in tasks] for own in whole.values()])
    under = means - means.max(axis=0)
    lines = [f"| method | seeds | {' | '.join(tasks)} | mean | worst | solving | rejected | s |"]
    lines.append("|---" * (len(tasks) + 7) + "|")
    for i in np.argsort(-means.mean(axis=1)):
        name, own = list(whole.items())[i]
        each = [row for task in tasks for row in own[task]]
        most = max(sum(r["solving"] for r in own[task]) / sum(r["seconds"] for r in own[task]) for task in tasks)
        cells = [f"{value:.2f}" for value in means[i]]
        cells += [f"{means[i].mean():.2f}", f"{under[i].min():.1f}", f"{100 * most:.0f} %"]
        cells += [f"{sum(row['rejections'] for row in each):.0f}"]
        cells += [f"{sum(np.mean([row['seconds'] for row in own[task]]) for task in tasks):.0f}"]
        lines.append(f"| {name} | {least[name]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Run what is missing, print the tables."""
    made = parser(__file__, __doc__, data=False)
    made.add_argument("--weights", type=Path, help="directory of published weights")
    made.add_argument("--cache", type=Path, help="directory of features")
    made.add_argument("--part", choices=("development", "reported"), default="development")
    made.add_argument("--methods", nargs="*", default=list(METHODS), help="some of the methods")
    made.add_argument("--tasks", nargs="*", help="some of the tasks")
    made.add_argument("--seeds", type=int, default=5)
    given = made.parse_args()
    tasks = given.tasks or list(DEVELOPMENT if given.part == "development" else REPORTED)
    if given.data_dir is None:
        rows = kept(given.out)
    else:
        places = Places(given.data_dir, given.weights, given.cache)
        do = functools.partial(run, places=places)
        rows = missing(given.out, ("task", "method", "seed"), wanted(tasks, given.methods, range(given.seeds)), do)
    print(table(rows, tasks))


if __name__ == "__main__":
    main()
