"""The suite: CRONOS-AM and optimizers, each with one fixed setting for all tasks.

    python docs/benchmarks/suite.py --data-dir DIR --weights DIR --cache DIR --part development --out rows.jsonl
    python docs/benchmarks/suite.py --data-dir DIR --weights DIR --cache DIR --part reported --out rows.jsonl
    python docs/benchmarks/suite.py --data-dir DIR --weights DIR --cache DIR --part rates --out rows.jsonl
    python docs/benchmarks/suite.py --out docs/benchmarks/suite.jsonl.gz       # the tables of kept rows

``suite_tasks.py`` has the tasks, and makes the features that some of them need. Settings are chosen on the development
tasks; the chosen ones are run on the reported tasks. Every run is one row of the file, written when it is done; rows
that are there are not run again. Seed after seed, task after task, all methods one after the other. A run of CRONOS-AM
has the epochs that take as long as those of an optimizer; its variants have four fifths of these.
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
from suite_tasks import DEVELOPMENT, GRID, REPORTED, TASKS, Places, Rows

import cronos_flax as cf
from cronos_flax.compare import style
from cronos_flax.compare.methods import BASELINES, BaselineState, optimizer
from cronos_flax.compare.task import targets_for

PARTS = {"development": DEVELOPMENT, "reported": REPORTED, "rates": GRID}
SHARE = 0.8  # of the epochs of an optimizer that variants of CRONOS-AM have


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
        ours("four fifths of the epochs")
        | ours("rate 1e-3", 1e-3)
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
# For rates a thousand times apart.
LOWEST = {"adam": -4.5, "sgd": -3.5}
RATES = {
    name: [f"{OURS}, {name} {10**exponent:.2g}" for exponent in np.arange(low, low + 3.1, 0.5)]
    for name, low in LOWEST.items()
}
RATED = {
    method: ours(method, 10 ** (low + i / 2), name)[method]
    for name, low in LOWEST.items()
    for i, method in enumerate(RATES[name])
}
METHODS = OPTIMIZERS | ALTERNATIONS | RATED


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
        epochs = its.solved_epochs if method == OURS else round(SHARE * epochs)
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
        "first": accuracies[0],  # after the first solve, if that comes after the first epoch
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


class Scores(NamedTuple):
    """What methods reach on tasks: those that have been run on all of them, with the same seeds."""

    methods: list[str]
    tasks: list[str]
    runs: list[list[list[Row]]]  # by method and task

    @classmethod
    def of(cls, rows: list[Row], tasks: list[str], seeds: int) -> "Scores":
        """Of so many seeds."""
        found: dict[tuple[str, str], list[Row]] = {}
        for row in rows:
            if row["seed"] < seeds:
                found.setdefault((row["method"], row["task"]), []).append(row)
        names = dict.fromkeys(row["method"] for row in rows)
        whole = [name for name in names if all(len(found.get((name, task), ())) == seeds for task in tasks)]
        return cls(whole, tasks, [[found[name, task] for task in tasks] for name in whole])

    @property
    def means(self) -> np.ndarray:
        """Accuracy at the end in %, mean over seeds, by method and task."""
        return np.array([[np.mean([row["end"] for row in runs]) for runs in own] for own in self.runs])

    @property
    def ranks(self) -> np.ndarray:
        """Of the means, by method and task: 1 is the best."""
        return 1 + np.sum(self.means[None] > self.means[:, None], axis=1)

    def table(self) -> str:
        """Accuracies with mean rank, the task where the method is furthest under the best, time and share of solves."""
        means, ranks = self.means, self.ranks.mean(axis=1)
        under = means - means.max(axis=0)
        lines = [f"| method | mean rank | mean | furthest under | {' | '.join(self.tasks)} | rejected | solving | s |"]
        lines.append("|---" * (len(self.tasks) + 7) + "|")
        for i in np.lexsort((-means.mean(axis=1), ranks)):
            shares = [sum(r["solving"] for r in runs) / sum(r["seconds"] for r in runs) for runs in self.runs[i]]
            cells = [self.methods[i], f"{ranks[i]:.2f}", f"{means[i].mean():.2f}", f"{-under[i].min():.2f}"]
            cells += [f"{value:.2f}" for value in means[i]]
            cells += [f"{sum(row['rejections'] for runs in self.runs[i] for row in runs):.0f}"]
            cells += [f"{100 * max(shares):.0f} %" if max(shares) else ""]
            cells += [f"{sum(np.mean([row['seconds'] for row in runs]) for runs in self.runs[i]):.0f}"]
            lines.append(f"| {' | '.join(cells)} |")
        return "\n".join(lines)

    def draw(self, path: Path) -> None:
        """Save a picture: how far each method is under the best of all, a dot for each task."""
        under, order = self.means.max(axis=0) - self.means, np.argsort(-self.ranks.mean(axis=1))
        with style.styled(8, 1.2 + 0.42 * len(order)) as figure:
            axes = figure.subplots()
            for place, i in enumerate(order):
                color = style.OURS if self.methods[i] == OURS else style.QUIET
                axes.plot(under[i], np.full(len(self.tasks), place), "o", color=color, markersize=6, alpha=0.8)
                axes.plot([np.median(under[i])] * 2, [place - 0.28, place + 0.28], color="0.2", linewidth=1.6)
            axes.set_yticks(range(len(order)), [self.methods[i] for i in order])
            axes.set_xscale("symlog", linthresh=1)
            ticks = (0, 0.5, 1, 2, 5, 10, 20)
            axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            axes.set_xlim(-0.05, 1.1 * under.max())
            axes.set_xlabel("points under the best method of the task; the line is the median over tasks")
            axes.set_title("One setting for all tasks")
            style.save(figure, path)


def rates_table(rows: list[Row], seeds: int) -> str:
    """Accuracy at the end by rate, and what a run must not do: end below its first solve, or far under its grid."""
    of = {(row["task"], row["method"], row["seed"]): row for row in rows}
    lines = [
        "| task | optimizer | the seven rates | below the first solve | furthest under the median | lowest rate, told |"
    ]
    lines.append("|---" * 6 + "|")
    for task, (name, methods) in itertools.product(GRID, RATES.items()):
        if not all((task, method, seed) in of for method in methods for seed in range(seeds)):
            continue
        runs = [[of[task, method, seed] for method in methods] for seed in range(seeds)]
        ends = np.array([[row["end"] for row in own] for own in runs])
        below = sum(row["end"] < row["first"] for own in runs for row in own)
        low = [row for own in runs for row in own if row["rate"] < 0.01]
        told = f"{sum(bool(row['warned']) for row in low)} of {len(low)}" if low else "none below .01"
        under = float(np.max(np.median(ends, axis=1, keepdims=True) - ends))
        cells = [task, name, " ".join(f"{value:.1f}" for value in ends.mean(axis=0)), str(below), f"{under:.1f}"]
        lines.append(f"| {' | '.join(cells)} | {min(row['rate'] for own in runs for row in own):.2g}, {told} |")
    return "\n".join(lines)


def main() -> None:
    """Run what is missing, print the tables."""
    made = parser(__file__, __doc__, data=False)
    made.add_argument("--weights", type=Path, help="directory of published weights")
    made.add_argument("--cache", type=Path, help="directory of features")
    made.add_argument("--part", choices=list(PARTS), default="development")
    made.add_argument("--methods", nargs="*", help="some of the methods")
    made.add_argument("--tasks", nargs="*", help="some of the tasks")
    made.add_argument("--seeds", type=int, default=3)
    made.add_argument("--picture", type=Path, help="where to draw the scores")
    given = made.parse_args()
    methods = given.methods or list(RATED if given.part == "rates" else OPTIMIZERS | ALTERNATIONS)
    tasks = given.tasks or list(PARTS[given.part])
    if given.data_dir is None:
        rows = kept(given.out)
    else:
        places = Places(given.data_dir, given.weights, given.cache)
        do = functools.partial(run, places=places)
        rows = missing(given.out, ("task", "method", "seed"), wanted(tasks, methods, range(given.seeds)), do)
    if given.part == "rates":
        print(rates_table(rows, given.seeds))
        return
    scores = Scores.of(rows, tasks, given.seeds)
    print(scores.table())
    if given.picture is not None:
        scores.draw(given.picture)


if __name__ == "__main__":
    main()
