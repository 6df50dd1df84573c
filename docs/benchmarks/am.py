"""CRONOS-AM over backbone rates that are too low, right and far too high: does it hold, and what does each part do.

    python docs/benchmarks/am.py --data-dir DIR --out am.jsonl --case robust --jobs 2
    python docs/benchmarks/am.py --data-dir DIR --out am.jsonl --case defaults --jobs 2
    python docs/benchmarks/am.py --data-dir DIR --out am.jsonl --case ablation --jobs 2
    python docs/benchmarks/am.py --data-dir DIR --out am.jsonl --case profile
    python docs/benchmarks/am.py --out am.jsonl            # the tables of what is there

A run is one ``cf.train``, with 1,000 training images held out for validation; test splits are not touched. Its row is
written when it is done, and a row that is there is not run again. Rows of one case ran side by side on ``--jobs``
cores, one core each, so their seconds compare with each other only. ``profile`` runs alone, and adds rows each time.
"""

import contextlib
import dataclasses
import functools
import itertools
import multiprocessing
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import flax.linen as nn
import jax
import numpy as np
import optax
from flax.training.train_state import TrainState
from rows import keep, kept, parser

import cronos_flax as cf
from cronos_flax._alternation import guard as _guard
from cronos_flax._solver import descent
from cronos_flax._solver.transfer import copied
from cronos_flax.compare.data import load_tfds
from cronos_flax.compare.models import MLP
from cronos_flax.compare.tables import markdown

SETS = ("cifar pixels/255", "cifar standardised", "fashion_mnist cnn")
LARGE_BATCH = "cifar pixels/255, batch 1024"
RATES = tuple(float(rate) for rate in 10 ** np.arange(-4.5, -1.49, 0.5))
SEEDS, CHOOSING_SEEDS = (21, 22, 23), (31, 32, 33)
EPOCHS = {SETS[0]: 25, SETS[1]: 25, SETS[2]: 8, LARGE_BATCH: 50}
HELD, BATCH, BATCHES = 1000, 128, {LARGE_BATCH: 1024}
PROFILED_EPOCHS = 50
OPTIMIZERS = {"adam": optax.adam, "sgd": lambda rate: optax.sgd(rate, momentum=0.9)}


def pooled(x: jax.Array) -> jax.Array:
    """``nn.max_pool(x, (2, 2), (2, 2))`` of even sides, whose gradient takes XLA most of a step on CPUs."""
    n, height, width, channels = x.shape
    return x.reshape(n, height // 2, 2, width // 2, 2, channels).max(axis=(2, 4))


class CNN(nn.Module):
    """Two convolutions and a two-layer head."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Outputs ``(n, 10)`` for images ``(n, 28, 28, 1)``."""
        for features in (16, 32):
            x = pooled(nn.relu(nn.Conv(features, (3, 3))(x)))
        return nn.Dense(10)(nn.relu(nn.Dense(64)(x.reshape(len(x), -1))))


cached = functools.cache(load_tfds)


def load(name: str, data_dir: Path, seed: int) -> tuple[np.ndarray, ...]:
    """Rows to fit and rows held out of the training split: ``x, y, x_held, y_held``."""
    source = "fashion_mnist" if name == SETS[2] else "cifar10_airplane_automobile"
    images, labels = cached(source, "train", data_dir)
    order = np.random.default_rng(seed).permutation(len(images))
    held, fit = order[:HELD], order[HELD:][: 6000 if name == SETS[2] else None]
    x = images.astype("float32") / 255
    if name == SETS[2]:
        y = labels.astype(int)
    else:
        x, y = x.reshape(len(x), -1), (2 * labels - 1).astype("float32")
    if name == SETS[1]:
        mean, deviation = x[fit].mean(axis=0), x[fit].std(axis=0)
        x = (x - mean) / deviation
    return x[fit], y[fit], x[held], y[held]


def _stay(self: Any, parts: Any, stats: Any, rounding: float) -> Any:
    """The guard's decision, with the rate lowered but nothing gone back to."""
    guard, _ = judge(self, parts, stats, rounding)
    rate = guard.figures["backbone_rate"]
    parts = {**parts, "opt_state": optax.tree.set(parts["opt_state"], backbone_rate=np.float32(rate))}
    return guard.replace(kept=parts), copied(parts)


judge = cf.GuardState.judge
STRICT = cf.Alternation(head="frozen", decay=None, largest_step=None)  # what all rows are of
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "no guard": {"create": {"guard": False}},
    "rate lowered, nothing gone back to": {"patch": (cf.GuardState, {"judge": _stay})},
    "gone back, rate as before": {"create": {"guard": cf.Guard(decrease_factor=1.0, increase_factor=1.0)}},
    "rate raised beyond the optimizer's own": {"create": {"guard": cf.Guard(highest_rate=1e6)}},
    "rate never raised": {"create": {"guard": cf.Guard(increase_factor=1.0)}},
    "full steps or none, damping only raised": {
        "solver": {"refreshed": cf.Refreshed(step_lengths=(1.0, 0.0), damping_factors=(1.0, 4.0))},
    },
    "no revival": {"patch": (descent, {"revived": lambda rows, iterate, key: iterate})},
    "beta 1e-3, not scale-free": {"solver": {"beta": 1e-3}},
    "1 step a solve": {"solver": {"max_iters": 1}},
    "10 steps a solve": {"solver": {"max_iters": 10}},
    "5 steps of ADMM on the gates that are there": {"solver": {"gates": "fixed", "max_iters": 5}},
    "solve every 10 steps": {"train": {"solve_every": 10}},
    "solve at the start and at the end only": {"train": {"solve_every": 10**9}},
    "solve before every epoch": {"create": {"alternation": dataclasses.replace(STRICT, dense_epochs=1000)}},
}
REMOVED = ("solve when stale",)  # a schedule that the package no longer has; its rows are kept
CHOICES: dict[str, dict[str, Any]] = {
    f"beta ratio {ratio}, {steps} a solve": {"solver": {"beta_ratio": ratio, "max_iters": steps}}
    for ratio, steps in ((0.002, 3), (0.005, 3), (0.01, 3), (0.02, 1), (0.02, 3), (0.05, 3))
}


class Run(NamedTuple):
    """What identifies a run."""

    data: str
    method: str  # "CRONOS-AM" or "plain"
    optimizer: str
    rate: float
    seed: int
    variant: str = "default"


def runs(case: str) -> Iterator[Run]:
    """Those of a case."""
    if case == "robust":
        for seed, data, rate, optimizer in itertools.product(SEEDS, SETS, RATES, OPTIMIZERS):
            yield Run(data, "CRONOS-AM", optimizer, rate, seed)
        for seed, data, rate in itertools.product(SEEDS, SETS, RATES):
            yield Run(data, "plain", "adam", rate, seed)
    elif case == "defaults":
        for seed, variant, data, rate in itertools.product(
            CHOOSING_SEEDS, CHOICES, (*SETS, LARGE_BATCH), (RATES[1], RATES[3])
        ):
            yield Run(data, "CRONOS-AM", "adam", rate, seed, variant)
    else:
        sets = (*SETS, LARGE_BATCH)
        columns = *((data, RATES[3]) for data in sets), *((data, RATES[5]) for data in SETS[:2])
        for seed, variant, (data, rate) in itertools.product(SEEDS[:2], VARIANTS, columns):
            yield Run(data, "CRONOS-AM", "adam", rate, seed, variant)


def train(run: Run, data_dir: Path) -> dict[str, Any]:
    """Do a run; its row."""
    how = {**VARIANTS, **CHOICES}[run.variant]
    module, changes = how.get("patch", (_guard, {}))
    if changes:  # what is compiled does not know of them
        jax.clear_caches()
    with mock.patch.multiple(module, **changes) if changes else contextlib.nullcontext():
        row = _train(run, how, data_dir)
    if changes:
        jax.clear_caches()
    return {**run._asdict(), **row, "jax": jax.__version__}


def _train(run: Run, how: dict[str, Any], data_dir: Path) -> dict[str, Any]:
    x, y, x_held, y_held = load(run.data, data_dir, run.seed)
    is_cnn = run.data == SETS[2]
    model, loss = (CNN(), "softmax") if is_cnn else (MLP(1), "squared")
    variables, key = model.init(jax.random.key(run.seed), x[:1]), jax.random.key(run.seed)
    made = {"apply_fn": model.apply, "params": variables["params"], "tx": OPTIMIZERS[run.optimizer](run.rate)}
    state: Any
    row: dict[str, Any] = {}
    if run.method == "plain":
        state = TrainState.create(**made)
    else:
        head = cf.find_head(model, variables, x[:64])
        solver = cf.Cronos(loss=loss, **how.get("solver", {}))
        how_made = {"alternation": STRICT, **how.get("create", {})}
        state = cf.CronosTrainState.create(**made, head=head, solver=solver, **how_made)
        first, _ = state.solve_head((x, y), key=jax.random.fold_in(key, 0))
        outputs = np.asarray(model.apply({"params": first.params}, x_held))
        hit = outputs.argmax(axis=1) == y_held if is_cnn else np.sign(outputs[:, 0]) == y_held
        row["after_first_solve"] = 100 * float(np.mean(hit))
    state, history = cf.train(
        state,
        (x, y),
        epochs=EPOCHS[run.data],
        batch_size=BATCHES.get(run.data, BATCH),
        loss=loss,
        validation=(x_held, y_held),
        key=key,
        compile_first=True,
        **how.get("train", {}),
    )
    scores = [100 * r["validation_accuracy"] for r in history if "validation_accuracy" in r]
    row |= {"peak": max(scores), "final": scores[-1], "loss": history[-1]["loss"], "seconds": history[-1]["seconds"]}
    if run.method != "plain":
        row |= {"objective": history[-2]["objective"], "live": live(state), **state.figures}
    return row


def profile(data_dir: Path) -> Iterator[dict[str, Any]]:
    """Rows of the time that experiment #1 takes, and what of it solves and their passes for features take."""
    x, y, x_held, y_held = load(SETS[0], data_dir, SEEDS[0])
    model = MLP(1)
    params = model.init(jax.random.key(0), x[:1])["params"]
    head = cf.find_head(model, {"params": params}, x[:64])
    for batch_size in (BATCH, 1024):
        made = {"apply_fn": model.apply, "params": params, "tx": optax.adam(1e-3)}
        state = cf.CronosTrainState.create(**made, head=head, alternation=STRICT)
        state, history = cf.train(
            state,
            (x, y),
            epochs=PROFILED_EPOCHS,
            batch_size=batch_size,
            validation=(x_held, y_held),
            compile_first=True,
        )
        solves = [row["solve_seconds"] for row in history if "solve_seconds" in row]
        passes = []
        for _ in solves:
            began = time.perf_counter()
            head.gather(state.variables, (x, y), None, None)
            passes.append(time.perf_counter() - began)
        yield {
            "case": "profile",
            "batch_size": batch_size,
            "epochs": PROFILED_EPOCHS,
            "solves": len(solves),
            "seconds": history[-1]["seconds"],
            "solve_seconds": sum(solves),
            "passes_seconds": sum(passes),
            "jax": jax.__version__,
        }


def profile_table(rows: list[dict[str, Any]]) -> None:
    """Where the time of experiment #1 goes."""
    print("| batch | epochs | training, s | solves | of it in solves | in passes for features | a solve, in epochs |")
    print("|---|---|---|---|---|---|---|")
    for r in rows:
        solving, passes = r["solve_seconds"], r["passes_seconds"]
        epoch = (r["seconds"] - solving) / r["epochs"]
        shares = f"{solving / r['seconds']:.0%} | {passes / r['seconds']:.0%}"
        run = f"{r['batch_size']} | {r['epochs']} | {r['seconds']:.1f} | {r['solves']}"
        print(f"| {run} | {shares} | {solving / r['solves'] / epoch:.2f} |")


def live(state: cf.CronosTrainState) -> int:
    """Neurons of the head that pass something on."""
    return cf.prune_head(state.head.read(state.variables)).kernel2.shape[0]


def spread(values: list[float]) -> str:
    """Mean and standard deviation."""
    return f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else f"{values[0]:.2f}"


def robust_table(rows: list[dict[str, Any]]) -> None:
    """Final validation accuracy by rate; and the runs that collapsed, or ended far below their grid's median."""
    print("| data | method | " + " | ".join(f"{rate:.1e}" for rate in RATES) + " |")
    print("|---" * (len(RATES) + 2) + "|")
    for data, (method, optimizer) in itertools.product(
        SETS, (("CRONOS-AM", "adam"), ("plain", "adam"), ("CRONOS-AM", "sgd"))
    ):
        mine = [r for r in rows if (r["data"], r["method"], r["optimizer"]) == (data, method, optimizer)]
        cells = [[r["final"] for r in mine if np.isclose(r["rate"], rate)] for rate in RATES]
        if mine:
            print(f"| {data} | {method}, {optimizer} | " + " | ".join(spread(c) if c else "" for c in cells) + " |")
    for data in SETS:
        solved, plain = (
            [r["seconds"] for r in rows if (r["data"], r["method"], r["optimizer"]) == (data, method, "adam")]
            for method in ("CRONOS-AM", "plain")
        )
        if solved and plain:
            print(f"{data}: median time, CRONOS-AM over plain: {np.median(solved) / np.median(plain):.2f}")
    guarded = [r for r in rows if r["method"] == "CRONOS-AM"]
    print(
        f"\ncollapsed (a dead head, or an end below the first solve): {sum(map(collapsed, guarded))} of {len(guarded)}"
    )
    for data, seed in itertools.product(SETS, SEEDS):
        grid = [r for r in guarded if (r["data"], r["seed"], r["optimizer"]) == (data, seed, "adam")]
        if grid:
            finals = [r["final"] for r in grid]
            middle = np.median(finals)
            print(f"{data}, seed {seed}: median {middle:.2f}, the lowest {middle - min(finals):.2f} under it")


def variants_table(rows: list[dict[str, Any]], default: str) -> None:
    """Final validation accuracy of each variant, by set and rate; and a second table of what all of them together say.

    That is the difference from the default, the mean over seeds with its standard error; of the runs those that
    collapsed, and those that are the default's to the bit; of all their solves those that were rejected; and the median
    ratio of times.
    """
    there = dict.fromkeys((r["data"], r["rate"]) for r in rows)
    columns = sorted(there, key=lambda column: (list(EPOCHS).index(column[0]), column[1]))
    names = [f"{data.removeprefix('cifar ').removeprefix('fashion_mnist ')}, {rate:.0e}" for data, rate in columns]

    def by_run(variant: str) -> dict[tuple, dict[str, Any]]:
        return {(r["seed"], r["data"], r["rate"]): r for r in rows if r["variant"] == variant}

    reference, accuracies, together = by_run(default), [], []
    for variant in filter(by_run, [*VARIANTS, *REMOVED, *CHOICES]):
        mine = by_run(variant)
        cells = [[r["final"] for (_, *column), r in mine.items() if tuple(column) == c] for c in columns]
        both = [run for run in mine if run in reference]
        gains = [
            np.mean([mine[run]["final"] - reference[run]["final"] for run in both if run[0] == seed])
            for seed in sorted({run[0] for run in both})
        ]
        error = f" ± {np.std(gains, ddof=1) / len(gains) ** 0.5:.2f}" if len(gains) > 1 else ""
        time = np.median([mine[run]["seconds"] / reference[run]["seconds"] for run in both])
        accuracies.append([variant, *(spread(c) if c else "" for c in cells)])
        same = sum(mine[run]["objective"] == reference[run]["objective"] for run in both)
        rejected, solves = (sum(r.get(name, 0) for r in mine.values()) for name in ("rejections", "solves"))
        share = f"{rejected / solves:.0%}" if solves else "–"  # without a guard
        gain = "" if variant == default else f"{np.mean(gains):+.2f}{error}"
        together.append([variant, gain, str(sum(map(collapsed, mine.values()))), str(same), share, f"{time:.2f}"])
    print(*markdown(["variant", *names], accuracies), "", sep="\n")
    print(*markdown(["variant", "difference", "collapsed", "the same", "solves rejected", "time"], together), sep="\n")


def collapsed(row: dict[str, Any]) -> bool:
    """A dead head, or an end below the first solve."""
    return row["live"] <= 1 or row["final"] < row["after_first_solve"] - 0.05  # half a row: the same is not below


def _one_core(counter: Any) -> None:
    """Each worker on a core of its own, so that runs side by side do not share any."""
    cores = sorted(os.sched_getaffinity(0))
    with counter.get_lock():
        os.sched_setaffinity(0, {cores[counter.value % len(cores)]})
        counter.value += 1


def main() -> None:
    """Do what is missing, and print the tables."""
    options = parser(__file__, __doc__, data=False)
    options.add_argument("--case", choices=("robust", "defaults", "ablation", "profile"), default="robust")
    options.add_argument("--jobs", type=int, default=1)
    args = options.parse_args()
    if args.data_dir and args.case == "profile":  # alone, on all cores
        for row in profile(args.data_dir):
            keep(args.out, row)
    elif args.data_dir:
        done = {tuple(r.get(name) for name in ("case", *Run._fields)) for r in kept(args.out)}
        wanted = [run for run in runs(args.case) if (args.case, *run) not in done]
        context = multiprocessing.get_context("spawn")
        with context.Pool(args.jobs, _one_core, (context.Value("i", 0),)) as pool:
            for row in pool.imap_unordered(functools.partial(train, data_dir=args.data_dir), wanted):
                keep(args.out, {"case": args.case, **row})
    tables = {
        "robust": robust_table,
        "defaults": functools.partial(variants_table, default="beta ratio 0.005, 3 a solve"),
        "ablation": functools.partial(variants_table, default="default"),
        "profile": profile_table,
    }
    for case, table in tables.items():
        if rows := [r for r in kept(args.out) if r["case"] == case]:
            table(rows)
            print()


if __name__ == "__main__":
    main()
