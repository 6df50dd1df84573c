"""Accuracy on clean and on attacked rows: adversarial Adam, and CRONOS-AM with its head solved on attacked rows.

    python docs/benchmarks/robust.py --data-dir DIR [--out robust.jsonl]
    python docs/benchmarks/robust.py --out docs/benchmarks/robust.jsonl.gz  # the tables of kept rows

The network and the attacks are those of ``examples/neighbours/adversarial.py``; 2,000 rows of Fashion-MNIST to fit, 500
other training rows to choose Adam's rate on, and 1,000 test rows, which only report. Three seeds, two sizes of attack.
CRONOS-AM has fewer epochs than Adam, so that both take about the same time. Before the last solve its state is kept,
and other last solves begin from there too. Every run is one row of the file, written when it is done; rows that are
there are not run again.
"""

import dataclasses
import functools
import itertools
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from flax.training.train_state import TrainState
from jax.sharding import AxisType
from rows import Row, kept, missing, parser

from cronos_flax.compare.data import load_tfds

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "neighbours"))
import adversarial as example
from adversarial import Attack, Rows

FIT, HELD, TEST, BATCH = 2000, 500, 1000, 100
EPS = {"8/255": 8 / 255, ".1": 0.1}
SEEDS = range(3)
RATES = (1e-3, 3e-3, 1e-2)
RATE = 3e-3  # of CRONOS-AM, of Adam on clean rows, and of Adam in the state of CRONOS-AM without solves
STEPS, REPORTED, MANY = 3, 20, 100  # of an attack in training, and of those that report
CLEAN = Attack(0.0, 0)
FAILED = 20.0  # accuracy of a run that is near chance, %


class Method(NamedTuple):
    """A way to train."""

    rate: float
    epochs: int
    trained: bool = True  # on attacked rows
    alternates: bool = False
    solve: str | None = None  # rows of solves: "attacked" or "clean"


ADAM = {f"Adam {rate:g}, attacked rows": Method(rate, 8) for rate in RATES}
PLAIN = "Adam, clean rows"
CONTROL, LONGER = "CRONOS-AM without solves, 6 epochs", "CRONOS-AM without solves, 8 epochs"
OURS, OURS_CLEAN = "CRONOS-AM, solved on attacked rows", "CRONOS-AM, solved on clean rows"
OTHERS = {
    OURS: Method(RATE, 6, alternates=True, solve="attacked"),
    OURS_CLEAN: Method(RATE, 6, alternates=True, solve="clean"),
    PLAIN: Method(RATE, 8, trained=False),
    CONTROL: Method(RATE, 6, alternates=True),
    LONGER: Method(RATE, 8, alternates=True),
}
METHODS = ADAM | OTHERS


class Last(NamedTuple):
    """A last solve."""

    rows: str  # "attacked" or "clean"
    iterations: int = 3
    factor: float = 1.0  # on β
    attacks: int = 1  # so often rows are attacked anew, added, and solved on with those before


LASTS = {"attacked": Last("attacked"), "clean": Last("clean")}
# Other last solves of the state of CRONOS-AM that was solved on attacked rows before.
MORE = {
    "last solve on clean rows": Last("clean"),
    "last solve with 100 iterations": Last("attacked", 100),
    "last solve with 16 β": Last("attacked", factor=16.0),
    "three attacks and solves in turn": Last("attacked", attacks=3),
}
names = ("eps", "method", "seed")


@functools.cache
def mesh() -> Any:
    """One device."""
    return jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))


@functools.cache
def split(seed: int, data: Path) -> tuple[Rows, Rows]:
    """Rows to fit, with held-out rows and with test rows to score."""
    x, y = load_tfds("fashion_mnist", "train[:10000]", data)
    chosen = np.random.default_rng(seed).permutation(len(x))[: FIT + HELD]
    x, y = x[chosen].astype("float32") / 255, y[chosen]
    x_test, y_test = load_tfds("fashion_mnist", f"test[:{TEST}]", data)
    held = Rows(x[:FIT], y[:FIT], x[FIT:], y[FIT:])
    return held, held._replace(x_scored=x_test.astype("float32") / 255, y_scored=y_test)


@functools.cache
def optimizer(rate: float, epochs: int) -> optax.GradientTransformation:
    """The same object each time, so that its step is compiled once."""
    steps = epochs * (FIT // BATCH)
    return optax.adam(optax.warmup_cosine_decay_schedule(0.0, rate, steps // 20, steps))


def score(params: Any, rows: Rows, attack: Attack) -> float:
    """Accuracy in %."""
    return example.accuracy(params, rows, BATCH, mesh(), attack)


def scores(params: Any, rows: Rows, eps: float) -> list[float]:
    """Accuracy on clean rows and under PGD-20."""
    return [score(params, rows, CLEAN), score(params, rows, Attack(eps, REPORTED))]


@functools.cache
def trained(eps: float, method: str, seed: int, data: Path) -> tuple[Any, float]:
    """The state before the last solve, and CPU seconds without compilation."""
    its, rows = METHODS[method], split(seed, data)[0]
    attack = Attack(eps, STEPS)
    solve = {None: None, "attacked": attack, "clean": CLEAN}[its.solve]
    tx = optimizer(its.rate, its.epochs)
    state: Any = example.create(tx, seed, rows, mesh())
    if not its.alternates:
        state = TrainState.create(apply_fn=example.MODEL.apply, params=state.params, tx=tx)
    few = rows._replace(x=rows.x[: 3 * BATCH], y=rows.y[: 3 * BATCH])
    on = attack if its.trained else CLEAN
    jax.block_until_ready(example.train(state, few, mesh(), on, 1, BATCH, seed).params)  # compiles
    if solve is not None:
        state.solve_head(example.batches(rows[:2], BATCH, mesh()))
    began = time.process_time()
    state = example.train(state, rows, mesh(), on, its.epochs, BATCH, seed, solve)
    jax.block_until_ready(state.params)
    return state, time.process_time() - began


def last(state: Any, rows: Rows, attack: Attack, setting: Last) -> tuple[Any, Any, list[tuple]]:
    """A last solve: the state, the solution, and the batches that it saw."""
    solver = dataclasses.replace(state.solver, max_iters=setting.iterations)
    state, data = state.replace(solver=solver, beta=np.float32(setting.factor) * state.beta), []
    for i in range(setting.attacks):
        on = attack if setting.rows == "attacked" else CLEAN
        data += example.under(on, state.params, rows[:2], BATCH, mesh(), jax.random.key(2 + i))
        state, solution = state.solve_head(data)
    jax.block_until_ready(state.params)
    return state, solution, data


def masked(params: Any, test: Rows, eps: float, source: Any) -> Row:
    """Accuracy on 300 test rows: under PGD-20, PGD-100, and PGD-20 on another model."""
    some = test._replace(x_scored=test.x_scored[:300], y_scored=test.y_scored[:300])
    row = {f"PGD-{steps}": score(params, some, Attack(eps, steps)) for steps in (REPORTED, MANY)}
    other = example.under(Attack(eps, REPORTED), source, some[2:], BATCH, mesh(), jax.random.key(1))
    return row | {"transfer": float(np.mean([example.right(params, *batch) for batch in other]))}


def best(rows: list[Row], eps: str) -> str:
    """Adam's best rate by held-out rows of the first seed under PGD-20, of the rates that no seed failed with."""
    held: dict[str, list[float]] = {}
    for row in sorted(rows, key=lambda row: row["seed"]):
        if row["eps"] == eps and row["method"] in ADAM:
            held.setdefault(row["method"], []).append(row["held"][1])
    return max((method for method in held if min(held[method]) > FAILED), key=lambda method: held[method][0])


def run(eps: str, method: str, seed: int, *, data: Path, out: Path) -> Row:
    """Train once; accuracies on test rows, of Adam on held-out rows too."""
    size, (held, test) = EPS[eps], split(seed, data)
    attack = Attack(size, STEPS)
    state, seconds = trained(size, OURS if method in MORE else method, seed, data)
    setting = MORE.get(method) or LASTS.get(METHODS[method].solve or "")
    row: Row = {}
    if setting is not None:
        if method not in MORE:
            row["before"] = scores(state.params, test, size)
        began = time.process_time()
        state, solution, seen = last(state, held, attack, setting)
        seconds += time.process_time() - began
        anew = example.under(attack, state.params, held[:2], BATCH, mesh(), jax.random.key(9))
        for name, rows in (("seen", seen), ("anew", anew)):  # accuracy on the rows to fit
            row[name] = float(np.mean([example.right(state.params, *batch) for batch in rows]))
        row |= {"beta": float(state.beta), "objective": float(solution.stats.objective)}
    row["scores"] = scores(state.params, test, size)
    if method in ADAM:
        row["held"] = scores(state.params, held, size)
    if method == OURS:
        row["source"] = best(kept(out), eps)
        row |= masked(state.params, test, size, trained(size, row["source"], seed, data)[0].params)
    return row | {"seconds": seconds}


def wanted(out: Path) -> Iterable[tuple[str, str, int]]:
    """The key of every row: all rates of Adam for the first seed, the best one for the others."""
    for seed, eps in itertools.product(SEEDS, EPS):
        yield from ((eps, method, seed) for method in ADAM if seed == SEEDS[0])
        while (method := best(kept(out), eps)) not in tried(kept(out), eps, seed):
            yield eps, method, seed
        yield from ((eps, method, seed) for method in (OURS, OURS_CLEAN))
    for method, seed, eps in itertools.product((*MORE, PLAIN, CONTROL, LONGER), SEEDS, EPS):
        yield eps, method, seed


def tried(rows: list[Row], eps: str, seed: int) -> set[str]:
    """The methods that have a row."""
    return {row["method"] for row in rows if (row["eps"], row["seed"]) == (eps, seed)}


# ------------------------------------------------------------------------------------------------ tables

BEFORE = ", before the last solve"


def by_method(rows: list[Row], eps: str) -> dict[str, dict[int, list[float]]]:
    """Accuracies on clean and on attacked test rows, by method and seed; states before a last solve are methods too."""
    found: dict[str, dict[int, list[float]]] = {}
    for row in rows:
        if row["eps"] == eps:
            if "before" in row:
                found.setdefault(row["method"] + BEFORE, {})[row["seed"]] = row["before"]
            found.setdefault(row["method"], {})[row["seed"]] = row["scores"]
    return found


def cells(own: dict[int, list[float]], other: dict[int, list[float]]) -> list[str]:
    """Seeds, mean accuracies, and their differences from another method, paired by seed, ± standard error."""
    made = [str(len(own)), *(f"{np.mean([each[i] for each in own.values()]):.1f}" for i in (0, 1))]
    for i in (0, 1):
        each = [own[seed][i] - other[seed][i] for seed in own if seed in other]
        error = f" ± {np.std(each, ddof=1) / len(each) ** 0.5:.1f}" if len(each) > 1 else ""
        made.append("–" if own is other or not each else f"{np.mean(each):+.1f}{error}")
    return made


def table(rows: list[Row], eps: str, names: Iterable[str], other: str, what: str) -> None:
    """One line a method, its differences from another one."""
    found = by_method(rows, eps)
    columns = ("seeds", "clean, %", "PGD-20, %", f"clean less {what}", f"PGD-20 less {what}", "CPU s")
    print(f"\neps {eps}\n\n| method | {' | '.join(columns)} |\n|---{'|---' * len(columns)}|")
    for name in names:
        if name in found:
            seconds = [row["seconds"] for row in rows if (row["eps"], row["method"]) == (eps, name)]
            took = f"{np.median(seconds):.1f}" if seconds and name not in MORE else "–"
            print(f"| {name} | {' | '.join([*cells(found[name], found[other]), took])} |")


def answered(rows: list[Row]) -> None:
    """Run by run: β, test accuracy before and after a last solve; on rows to fit as seen, and attacked anew."""
    columns = ("last solve", "eps", "seed", "β", "PGD-20 before, %", "after, %", "seen rows, %", "attacked anew, %")
    print(f"\n| {' | '.join(columns)} |\n|---{'|---' * (len(columns) - 1)}|")
    before = {(row["eps"], row["seed"]): row["before"][1] for row in rows if row["method"] == OURS}
    for method, eps, seed in itertools.product((OURS, OURS_CLEAN, *MORE), EPS, SEEDS):
        for row in rows:
            if (row["method"], row["eps"], row["seed"]) == (method, eps, seed):
                first = row["before"][1] if "before" in row else before[eps, seed]
                shown = [f"{value:.1f}" for value in (first, row["scores"][1], row["seen"], row["anew"])]
                print(f"| {method} | {eps} | {seed} | {row['beta']:.3f} | {' | '.join(shown)} |")


def masks(rows: list[Row]) -> None:
    """Accuracy of CRONOS-AM under longer and transferred attacks, of the same rows; not from an Adam that failed."""
    print(f"\n| eps | seeds | PGD-{REPORTED}, % | PGD-{MANY}, % | PGD-{REPORTED} on Adam, % |\n|---|---|---|---|---|")
    failed = {(r["eps"], r["method"], r["seed"]) for r in rows if r["scores"][1] < FAILED}
    for eps in EPS:
        own = [row for row in rows if row["eps"] == eps and "transfer" in row]
        own = [row for row in own if (eps, row["source"], row["seed"]) not in failed]
        shown = [np.mean([row[name] for row in own]) for name in (f"PGD-{REPORTED}", f"PGD-{MANY}", "transfer")]
        print(f"| {eps} | {len(own)} | {' | '.join(f'{value:.1f}' for value in shown)} |")


def rates(rows: list[Row]) -> None:
    """Held-out accuracy of Adam's rates under PGD-20, seed by seed."""
    print("\n| eps | rate | held-out PGD-20 by seed, % |\n|---|---|---|")
    for eps, method in itertools.product(EPS, ADAM):
        own = {row["seed"]: row["held"][1] for row in rows if (row["eps"], row["method"]) == (eps, method)}
        print(f"| {eps} | {METHODS[method].rate:g} | {', '.join(f'{own[seed]:.1f}' for seed in sorted(own))} |")


def main() -> None:
    """Run what is missing, print the tables."""
    args: Any = parser(__file__, __doc__, data=False).parse_args()
    if args.data_dir is not None:
        missing(args.out, names, wanted(args.out), functools.partial(run, data=args.data_dir, out=args.out))
    rows = kept(args.out)
    rates(rows)
    for eps in EPS:
        own = (*ADAM, OURS + BEFORE, OURS, OURS_CLEAN + BEFORE, OURS_CLEAN, CONTROL, LONGER, PLAIN)
        table(rows, eps, own, best(rows, eps), "Adam")
    for eps in EPS:
        table(rows, eps, (OURS + BEFORE, OURS, *MORE), OURS + BEFORE, "before")
    answered(rows)
    masks(rows)


if __name__ == "__main__":
    main()
