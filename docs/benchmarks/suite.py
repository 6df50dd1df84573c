"""The suite: CRONOS-AM and optimizers, each with one fixed setting for all tasks.

    python docs/benchmarks/suite.py --data-dir DIR --cache DIR --part development --out rows.jsonl
    python docs/benchmarks/suite.py --data-dir DIR --cache DIR --part limit --out rows.jsonl
    python docs/benchmarks/suite.py --data-dir DIR --cache DIR --part reported --out rows.jsonl
    python docs/benchmarks/suite.py --data-dir DIR --cache DIR --part rates --out rows.jsonl
    python docs/benchmarks/suite.py --data-dir DIR --cache DIR --part weight-decay --out rows.jsonl
    python docs/benchmarks/suite.py --data-dir DIR --cache DIR --part tuned --out rows.jsonl
    python docs/benchmarks/suite.py --out docs/benchmarks/suite.jsonl.gz --seeds 2  # a table of kept rows

``suite_tasks.py`` has the tasks, and ``suite_features.py`` makes the features that some of them need. Settings are
chosen on the development tasks; the chosen ones, or those of ``--methods``, are run on the reported tasks. Every run is
one row of the file, written when it is done; rows that are there are not run again. Seed after seed, task after task,
all methods one after the other. A run of CRONOS-AM has the epochs that take as long as those of an optimizer; its
variants whose steps are not limited have four fifths of these.
"""

import functools
import itertools
import math
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from rows import Row, kept, missing, parser
from suite_tasks import DECAYS, DEVELOPMENT, GRID, LIMIT, REPORTED, TASKS, Places, Rows

import cronos_flax as cf
from cronos_flax._alternation.backbone import rated
from cronos_flax.compare import style
from cronos_flax.compare.budget import expected_best
from cronos_flax.compare.methods import BASELINES, BaselineState
from cronos_flax.compare.task import targets_for

PARTS = {
    "development": DEVELOPMENT, "limit": LIMIT, "reported": REPORTED, "tuned": REPORTED, "rates": GRID,
    "weight-decay": DECAYS,
}  # fmt: skip
OURS = "CRONOS-AM"
SHARE = 0.8  # of the epochs of an optimizer that variants of CRONOS-AM without a limit of steps have


class Method(NamedTuple):
    """A setting: the optimizer of all layers, or of the backbone; and the parts of the alternation, if it is one."""

    optimizer: str
    rate: float
    decay: str | None = None
    alternation: cf.Alternation | None = None
    solver: tuple[tuple[str, Any], ...] = ()
    largest_step: float | None = None  # of an optimizer alone


def alone(name: str, rates: tuple[float, ...], decays: tuple[str | None, ...]) -> dict[str, Method]:
    """An optimizer with some rates and schedules."""
    return {
        f"{name} {rate:g}{'' if decay is None else f' {decay}'}": Method(name, rate, decay)
        for rate, decay in itertools.product(rates, decays)
    }


def ours(rate: float = 3e-3, optimizer: str = "adam", solver: dict[str, Any] | None = None, **parts: Any) -> Method:
    """An alternation."""
    return Method(optimizer, rate, None, cf.Alternation(**parts), tuple((solver or {}).items()))


unchosen = functools.partial(ours, choose_beta=math.inf)  # β stays as it is at the first solve
free = functools.partial(unchosen, largest_step=None)


OPTIMIZERS = (
    alone("adam", (3e-4, 1e-3, 3e-3, 1e-2), (None, "cosine", "wsd"))
    | alone("adamw", (1e-3, 3e-3), ("cosine",))
    | alone("nadamw", (3e-4, 1e-3, 3e-3, 1e-2), ("cosine", "wsd"))
    | alone("sgd", (0.01, 0.03, 0.1, 0.3), ("cosine", "wsd"))
    | alone("muon", (3e-3, 1e-2, 3e-2), ("cosine", "wsd"))
    | alone("schedule_free_adamw", (1e-3, 2.5e-3, 1e-2), (None,))
    | alone("prodigy", (1.0,), (None, "cosine", "wsd"))
)
# Optimizers with the limit of steps that CRONOS-AM has, and no solves.
LIMITED = {
    f"{name} {rate:g} wsd, limited": Method(name, rate, "wsd", largest_step=cf.Alternation().largest_step)
    for name, rate in (("adam", 1e-3), ("adam", 3e-3), ("adam", 1e-2))
}
RATIOS = {"beta_ratio .04": 0.04, "beta_ratio .01": 0.01, "beta_ratio .005": 0.005, "beta_ratio .0025": 0.0025}
UNCHOSEN = f"{OURS}, β not chosen"  # as all alternations were before β was chosen
VARIANTS = {
    "rate 1e-3": unchosen(1e-3),
    "rate 1e-2": unchosen(1e-2),
    "largest_step .01": unchosen(largest_step=0.01),
    "largest_step .03": unchosen(largest_step=0.03),
    "beta_ratio .05": unchosen(solver={"beta_ratio": 0.05}),
} | {name: unchosen(solver={"beta_ratio": ratio}) for name, ratio in RATIOS.items()}
MUON = {f"{OURS}, Muon {rate:g}": ours(rate, "muon") for rate in (0.003, 0.01, 0.03)}
EARLY = f"{OURS}, first_epoch 1"  # as it was at first: always a solve before that which chooses
FREE = f"{OURS}, steps not limited"  # as all alternations were before the limit
FREE_VARIANTS = {
    "four fifths of the epochs": free(),
    "rate 1e-3": free(1e-3),
    "rate 5e-3": free(5e-3),
    "rate 1e-2": free(1e-2),
    "NadamW": free(optimizer="nadamw"),
    "SGD .03": free(0.03, "sgd"),
    "Muon": free(optimizer="muon"),
    "Prodigy": free(1.0, "prodigy"),
    "Prodigy, cosine decay": free(1.0, "prodigy", decay="cosine"),
    "cosine decay": free(decay="cosine"),
    "linear decay": free(decay="linear"),
    "no decay": free(decay=None),
    "frozen head": free(head="frozen"),
    "strict": free(head="frozen", decay=None),
    "beta_ratio .005": free(solver={"beta_ratio": 0.005}),
    "beta_ratio .05": free(solver={"beta_ratio": 0.05}),
    "one step a solve": free(solver={"max_iters": 1}),
    "ten steps a solve": free(solver={"max_iters": 10}),
    "solved at the start": free(first_epoch=0),
    "solved before every third epoch": free(then_every=3),
    "solved before every fifth epoch": free(then_every=5),
    "solved twice": free(then_every=10**6),
    "solved at the end only": free(first_epoch=10**6),
}
ALTERNATIONS = (
    {OURS: ours(), EARLY: ours(first_epoch=1), UNCHOSEN: unchosen(), FREE: free()}
    | {f"{UNCHOSEN}, {name}": method for name, method in VARIANTS.items()}
    | {f"{FREE}, {name}": method for name, method in FREE_VARIANTS.items()}
)
LOWEST = {"adam": -4.5, "sgd": -3.5}  # exponents of the lowest of seven rates, which are half a decade apart
RATES = [(name, rate) for name, low in LOWEST.items() for rate in 10 ** np.arange(low, low + 3.1, 0.5)]
RATED = {f"{OURS}, {name} {rate:.2g}": ours(rate, name) for name, rate in RATES}
UNCHOSEN_RATED = {f"{UNCHOSEN}, {name} {rate:.2g}": unchosen(rate, name) for name, rate in RATES}
FREE_RATED = {f"{FREE}, {name} {rate:.2g}": free(rate, name) for name, rate in RATES}
CHOSEN = (  # one setting of each, from the development tasks
    OURS,
    "prodigy 1 cosine",
    "adam 0.001 wsd",
    "sgd 0.03 cosine",
    "adam 0.003 cosine",
    "adam 0.001 cosine",
    "nadamw 0.003 cosine",
    "schedule_free_adamw 0.0025",
)
DECAYED = (OURS, EARLY, UNCHOSEN, *(f"{UNCHOSEN}, {name}" for name in RATIOS), "adam 0.003 wsd, limited")
TUNED = tuple(name for name, setting in OPTIMIZERS.items() if setting.optimizer not in ("adamw", "muon"))
USUAL = {"reported": CHOSEN, "tuned": (OURS, *TUNED), "rates": RATED, "weight-decay": DECAYED}
METHODS = OPTIMIZERS | LIMITED | ALTERNATIONS | MUON | RATED | UNCHOSEN_RATED | FREE_RATED


@functools.cache
def optimizer(name: str, rate: float, decays: bool = False) -> optax.GradientTransformation:
    """The same object each time, so that its step is compiled once."""
    tx = BASELINES[name].make(rate)
    return rated(tx) if decays else tx


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
    if setting.largest_step is not None:
        tx = rated(optimizer(setting.optimizer, setting.rate), largest_step=setting.largest_step)
    state: Any
    if setting.alternation is None:
        evaluate = BASELINES[setting.optimizer].evaluate
        state = BaselineState.create(**common, tx=tx, evaluate=evaluate, run_decay=setting.decay)
    else:
        epochs = its.unchosen_epochs if method.startswith(UNCHOSEN) else its.solved_epochs
        epochs = round(SHARE * its.epochs) if method.startswith(f"{FREE}, ") else epochs
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
    scored = [row for row in history if "validation_accuracy" in row]
    accuracies = [100 * row["validation_accuracy"] for row in scored]
    solved = next((row["step"] for row in history if "beta" in row), 0)
    figures = getattr(state, "figures", {})
    return {
        "end": accuracies[-1],
        "first": next(a for a, row in zip(accuracies, scored, strict=True) if row["step"] >= solved),  # solve, or epoch
        "before": accuracies[-2],
        "seconds": history[-1]["seconds"],
        "solving": sum(row.get("solve_seconds", 0.0) for row in history),
        "rejections": figures.get("rejections", 0),
        "rate": figures.get("backbone_rate", 1.0),
        "warned": sorted({str(warning.message)[:60] for warning in told if warning.category is UserWarning}),
        "cpu_seconds": time.process_time() - began,
    }


def mean_ranks(scores: np.ndarray) -> np.ndarray:
    """Of methods, over tasks; of scores by method and task."""
    return np.mean(1 + np.sum(scores[None] > scores[:, None], axis=1), axis=1)


def share(runs: list[Row]) -> float:
    """Of training time that solves and their feature passes take."""
    return sum(row["solving"] for row in runs) / sum(row["seconds"] for row in runs)


def markdown(columns: list[str], rows: list[list[str]]) -> str:
    """A table."""
    lines = [f"| {' | '.join(cells)} |" for cells in (columns, *rows)]
    return "\n".join([lines[0], "|---" * len(columns) + "|", *lines[1:]])


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

    def ends(self, figure: str = "end") -> np.ndarray:
        """Accuracy at the end (or before the last epoch) in %, by method, task and seed."""
        return np.array([[[row[figure] for row in runs] for runs in own] for own in self.runs])

    @property
    def means(self) -> np.ndarray:
        """Accuracy at the end in %, mean over seeds, by method and task."""
        return self.ends().mean(axis=2)

    @property
    def ranks(self) -> np.ndarray:
        """Mean rank of the means over tasks, by method: 1 is the best."""
        return mean_ranks(self.means)

    def table(self) -> str:
        """Mean rank, of each seed alone too; mean accuracy; the most under the best of a task; pairs. Then by task."""
        means, before = self.means, self.ends("before").mean(axis=(1, 2))
        each = np.stack([mean_ranks(ends) for ends in np.moveaxis(self.ends(), 2, 0)], axis=1)
        under = np.max(means.max(axis=0) - means, axis=1)
        mine = next((name for name in (OURS, FREE) if name in self.methods), self.methods[0])
        first = means[self.methods.index(mine)]
        order = np.lexsort((-means.mean(axis=1), self.ranks))
        rows = []
        for i in order:
            cells = [self.methods[i], f"{self.ranks[i]:.2f}", ", ".join(f"{rank:.2f}" for rank in each[i])]
            cells += [f"{means[i].mean():.2f}", f"{before[i]:.2f}", f"{under[i]:.2f}"]
            cells += [f"{np.sum(first > means[i])}" if self.methods[i] != mine else ""]
            cells += [f"{sum(row['rejections'] for runs in self.runs[i] for row in runs):.0f}"]
            most = max(map(share, self.runs[i]))
            rows.append([*cells, f"{100 * most:.0f} %" if most else ""])
        columns = ["method", "mean rank", "of each seed", "mean", "mean an epoch before", "furthest under"]
        summary = markdown([*columns, f"{mine} ahead on", "rejected", "solving"], rows)
        return f"{summary}\n\n{self.by_task([int(i) for i in order])}"

    def by_task(self, order: list[int]) -> str:
        """Accuracies in %, of methods in this order: tasks are the rows, unless there are more methods than tasks."""
        methods = [self.methods[i] for i in order]
        cells = [[f"{value:.2f}" for value in self.means[i]] for i in order]
        if len(methods) > len(self.tasks):
            return markdown(["method", *self.tasks], [[name, *own] for name, own in zip(methods, cells, strict=True)])
        turned = zip(*cells, strict=True)
        return markdown(["task", *methods], [[task, *own] for task, own in zip(self.tasks, turned, strict=True)])

    def pair(self) -> str:
        """The first of two methods less the second, paired by seed, ± standard error, by task and of the mean."""
        apart = np.subtract(*self.ends())
        lines = [f"\n{self.methods[0]} less {self.methods[1]}, paired by seed, ± standard error:"]
        for task, row in zip((*self.tasks, "mean"), (*apart, apart.mean(axis=0)), strict=True):
            lines.append(f"{task}: {row.mean():+.2f} ± {row.std(ddof=1) / len(row) ** 0.5:.2f}")
        return "\n".join(lines)

    def draw(self, path: Path) -> None:
        """Save a picture: how far each method is under the best of all, a dot for each task."""
        under, order = self.means.max(axis=0) - self.means, np.argsort(-self.ranks)
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
    columns = "the seven rates", "below the first solve", "furthest under the median", "lowest rate", "below .01, told"
    lines: list[list[str]] = []
    kinds = {"limited": RATED, "limited, β not chosen": UNCHOSEN_RATED, "not limited": FREE_RATED}
    for task, name, kind in itertools.product(GRID, LOWEST, kinds):
        methods = [method for method, setting in kinds[kind].items() if setting.optimizer == name]
        if not all((task, method, seed) in of for method in methods for seed in range(seeds)):
            continue
        each = [[of[task, method, seed] for method in methods] for seed in range(seeds)]
        runs = [row for own in each for row in own]
        ends = np.array([[row["end"] for row in own] for own in each])
        below = [row["first"] - row["end"] for row in runs if row["end"] < row["first"]]
        low = [row for row in runs if row["rate"] < 0.01]
        cells = [task, name, kind, " ".join(f"{value:.1f}" for value in ends.mean(axis=0))]
        cells += [f"{len(below)}, by {min(below):.1f} to {max(below):.1f}" if below else "0"]
        cells += [f"{np.max(np.median(ends, axis=1, keepdims=True) - ends):.1f}"]
        cells += [f"{min(row['rate'] for row in runs):.2g}", f"{len(low)}, {sum(bool(r['warned']) for r in low)}"]
        lines.append(cells)
    return markdown(["task", "optimizer", "steps", *columns], lines)


def tuned_table(scores: Scores) -> str:
    """CRONOS-AM less the best setting of each optimizer on each task; and what random search finds of its settings."""
    ours = scores.ends()[scores.methods.index(OURS)]
    counts = (1, 2, 4, 8)
    head = ["optimizer", "settings", "mean of the best", "ahead on", "furthest behind"]
    drawn = ["optimizer", *(f"best of {count}" for count in counts), "of all", f"draws to match {OURS}"]
    drawn.append(f"chosen with the other seeds, less {OURS}")
    summary: list[list[str]] = []
    searches: list[list[str]] = []
    gaps: dict[str, list[str]] = {}
    groups = {name: [name] for name in dict.fromkeys(METHODS[m].optimizer for m in scores.methods if m != OURS)}
    for group, names in (groups | {"all": list(groups)}).items():
        own = [i for i, m in enumerate(scores.methods) if m != OURS and METHODS[m].optimizer in names]
        if len(own) < 2:
            continue
        means = scores.means[own]
        best = np.argmax(means, axis=0)
        apart = ours.mean(axis=1) - means.max(axis=0)
        cells = [group, f"{len(own)}", f"{means.max(axis=0).mean():.2f}", f"{np.sum(apart > 0)}", f"{-apart.min():.2f}"]
        summary.append(cells)
        gaps[group] = [f"{gap:+.2f} ({scores.methods[own[i]]})" for gap, i in zip(apart, best, strict=True)]
        expected = np.mean([expected_best(of, of) for of in means.T], axis=0)  # of each task, by its own scores
        enough = np.flatnonzero(expected >= ours.mean())
        found = [f"{expected[count - 1]:.2f}" if count <= len(own) else "" for count in counts]
        matched = f"{enough[0] + 1}" if len(enough) else f"> {len(own)}"
        each = scores.ends()[own]
        fair = []
        for seed in range(each.shape[2]) if each.shape[2] > 1 else ():
            others = np.delete(each, seed, axis=2).mean(axis=2)
            there = each[np.argmax(others, axis=0), np.arange(len(scores.tasks)), seed]
            fair.append(f"{there.mean() - ours[:, seed].mean():+.2f}")
        searches.append([group, *found, f"{expected[-1]:.2f}", matched, ", ".join(fair)])
    turned = zip(*gaps.values(), strict=True)
    by_task = markdown(["task", *gaps], [[task, *own] for task, own in zip(scores.tasks, turned, strict=True)])
    one = f"{OURS}, one setting: {ours.mean():.2f}"
    return "\n\n".join([markdown(head, summary), by_task, one, markdown(drawn, searches)])


def main() -> None:
    """Run what is missing, print the tables."""
    made = parser(__file__, __doc__, data=False)
    made.add_argument("--cache", type=Path, default=Path(), help="directory of features")
    made.add_argument("--part", choices=list(PARTS), default="development")
    made.add_argument("--methods", nargs="*", help="some of the methods")
    made.add_argument("--tasks", nargs="*", help="some of the tasks")
    made.add_argument("--seeds", type=int, default=3)
    made.add_argument("--picture", type=Path, help="where to draw the scores")
    made.add_argument("--instead", type=Path, help="rows to show in the place of those of the same runs")
    given = made.parse_args()
    methods = given.methods or USUAL.get(given.part, OPTIMIZERS | ALTERNATIONS)
    if given.part == "tuned":  # the others are compared with it
        methods = list(dict.fromkeys((OURS, *methods)))
    tasks = given.tasks or list(PARTS[given.part])
    if given.data_dir is None:
        rows = kept(given.out)
    else:
        places = Places(given.data_dir, given.cache)
        do = functools.partial(run, places=places)
        wanted = ((task, method, s) for s, task, method in itertools.product(range(given.seeds), tasks, methods))
        rows = missing(given.out, ("task", "method", "seed"), wanted, do)
    if given.instead is not None:
        rows = list({(row["task"], row["method"], row["seed"]): row for row in rows + kept(given.instead)}.values())
    if given.part == "rates":
        print(rates_table(rows, given.seeds))
        return
    scores = Scores.of([row for row in rows if row["method"] in methods], tasks, given.seeds)
    if not scores.methods:
        raise SystemExit(f"No method has rows of {given.seeds} seeds on all of these tasks: {', '.join(tasks)}.")
    if given.part == "tuned":
        print(tuned_table(scores))
        return
    print(scores.table())
    if len(scores.methods) == 2 and given.seeds > 1:
        print(scores.pair())
    if given.picture is not None:
        scores.draw(given.picture)


if __name__ == "__main__":
    main()
