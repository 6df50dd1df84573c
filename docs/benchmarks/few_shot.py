"""Fine-tuning pretrained networks on few rows, by ``cronos-flax compare``: a limit of seconds, rates searched.

    python docs/benchmarks/few_shot.py --data-dir DIR --weights DIR --cache DIR --out few_shot.jsonl [--seeds 5]
    python docs/benchmarks/few_shot.py --set flowers128 --data-dir DIR --weights DIR --cache DIR --out flowers.jsonl

banking77 (77 classes) on MiniLM, an NNX model, its texts cut after 32 tokens; or flowers128 (5 classes) on
EfficientNet-Lite0, a linen model, whose batch norms keep their statistics. Every run has the same limit of seconds,
from the first pass through the backbone on. These are CPU seconds of the process, so that other work beside it does not
count: run it on one core (``taskset -c 0``). The directory of ``--cache`` gets the rows and what ``compare`` writes,
which it goes on from; then all rows are written to the file of ``--out``.
``--out docs/benchmarks/few_shot.jsonl.gz``, without ``--cache``, prints the tables of the kept rows: scores; seconds;
CRONOS-AM less each other method, paired by the draw of the rows, ± standard error; and, by rate, scores and differences
at the end of the run, and what the guard rejected. ``--unguarded`` runs CRONOS-AM without its guard; give it a file of
its own, which ``--besides`` adds to the tables.
"""

import argparse
import functools
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from paired import difference, mean
from rows import Row, kept, parser
from sentences import example as text
from sentences import texts_of
from suite_features import example as images
from tokenizers import Tokenizer

import cronos_flax as cf
from cronos_flax._alternation.step_limit import limited
from cronos_flax.compare import cli, methods, shots, style
from cronos_flax.compare.data import load_tfds
from cronos_flax.compare.summaries import Cell, Summary, last, peak, summaries
from cronos_flax.compare.tables import markdown

WEIGHTS = "FEW_SHOT_WEIGHTS"  # the environment variable that tells the factories, which compare imports by name
SWEPT = "cronos-ft:adam"  # CRONOS-AM at several rates
OURS, UNGUARDED = ("cronos-ft", SWEPT), f"{SWEPT}, without its guard"
METHODS = *OURS, "lp-ft:adam", "lp-ft:adam+cosine", "adam+cosine", "cronos", "linear-probe"
# With the decay of CRONOS-AM, and with its limit of steps too: what is left is due to the solves, and to the guard.
CONTROLS = "lp-ft:adam+wsd", "lp-ft:limited_adam+wsd"


class Setting(NamedTuple):
    """What is fitted, and for how long."""

    model: str
    shots: int  # rows of each class to fit
    held: int  # validation rows
    scored: int  # test rows
    seconds: int  # of a run


SETTINGS = {
    "banking77": Setting("sentences", shots=5, held=231, scored=300, seconds=32),
    "flowers128": Setting("photographs", shots=20, held=100, scored=300, seconds=24),
}
LENGTH, SIDE = 32, 128  # tokens of a text, and pixels


def limited_adam(rate: float | jax.Array) -> optax.GradientTransformation:
    """Adam, its steps limited as those of CRONOS-AM are."""
    limit = functools.partial(limited, largest=cf.Alternation().largest_step)
    return optax.chain(optax.adam(rate), optax.stateless(limit))


class Sentences(nnx.Module):
    """The encoder as a function of token ids ``(n, length)``, 0 where a text has ended: features ``(n, 384)``."""

    def __init__(self, encoder: Any) -> None:
        self.encoder = encoder

    def __call__(self, ids: jax.Array) -> jax.Array:
        """Unit vectors."""
        ids = ids.astype("int32")
        mask = (ids > 0).astype("float32")
        return text.sentence(self.encoder(ids, mask), ids, mask)


def sentences(outputs: int, rngs: nnx.Rngs) -> nnx.Module:
    """MiniLM with its published weights, and a head of 512 neurons with fresh ones."""
    weights = Path(os.environ[WEIGHTS]) / "minilm"
    encoder = text.load(weights / "model.safetensors", json.loads((weights / "config.json").read_text()))
    width = encoder.words.embedding.shape[1]
    return cf.nnx.graft(Sentences(encoder), hidden=512, features=outputs, in_features=width, rngs=rngs)


def photographs(outputs: int) -> tuple[nn.Module, Any]:
    """EfficientNet-Lite0 with its published weights, and a head of 256 neurons with fresh ones."""
    x, lite = jnp.zeros((1, SIDE, SIDE, 3)), images.Lite()
    shapes = jax.eval_shape(lite.init, jax.random.key(0), x)
    pretrained = images.load(Path(os.environ[WEIGHTS]) / "efficientnet_lite0" / "model.safetensors", shapes)
    model = cf.graft(lite, at="fc", hidden=256, features=outputs)
    return Frozen(model), under(cf.graft_variables(model, pretrained, jax.random.key(0), x))


class Frozen(nn.Module):
    """A network whose batch norms keep the statistics that they have."""

    network: nn.Module

    def __call__(self, x: jax.Array) -> jax.Array:
        """Its outputs in evaluation."""
        return self.network(x, train=False)


def under(variables: Any) -> Any:
    """The variables of a network as those of :class:`Frozen`."""
    return {name: {"network": tree} for name, tree in variables.items()}


def file_of(name: str, args: argparse.Namespace) -> Path:
    """The file of rows to fit and to score, made if it is not there."""
    path = args.cache / f"{name}-rows.npz"
    if not path.exists():
        args.cache.mkdir(parents=True, exist_ok=True)
        make = tokens if name == "banking77" else pixels
        np.savez(path, **{f"{k}{end}": a for end in ("", "_test") for k, a in make(name, args, end).items()})
    return path


def tokens(name: str, args: argparse.Namespace, end: str) -> dict[str, np.ndarray]:
    """Token ids and labels of the training rows, or of some test rows."""
    tokenizer = Tokenizer.from_file(str(args.weights / "minilm" / "tokenizer.json"))
    tokenizer.enable_truncation(LENGTH)
    tokenizer.enable_padding(length=LENGTH)
    texts, labels = texts_of(args.data_dir, name, end[1:] or "train", SETTINGS[name].scored if end else None)
    return {
        "x": np.array([ids.ids for ids in tokenizer.encode_batch(texts)], "int32"),
        "y": labels["label"].astype("int32"),
    }


def pixels(name: str, args: argparse.Namespace, end: str) -> dict[str, np.ndarray]:
    """Photographs and labels of the training rows, or of some test rows."""
    x, y = load_tfds(name, end[1:] or "train", args.data_dir)
    some = np.random.default_rng(0).permutation(len(x))[: SETTINGS[name].scored if end else None]
    return {"x": np.asarray(x)[some], "y": np.asarray(y)[some].astype("int32")}


def main() -> None:
    """Run what is missing, print the table."""
    made = parser(__file__, __doc__, data=False, pretrained=True)
    made.add_argument("--set", choices=SETTINGS, default="banking77", dest="name")
    made.add_argument("--seeds", type=int, default=5)
    made.add_argument("--shots", help="rows of each class, such as 5,10")
    made.add_argument("--seconds", type=int, help="of a run")
    made.add_argument("--rates", type=int, default=7)
    made.add_argument("--methods", nargs="+")
    made.add_argument("--unguarded", action="store_true", help="CRONOS-AM without its guard, and nothing else")
    made.add_argument("--besides", type=Path, help="rows of --unguarded, for the tables")
    made.add_argument("--picture", type=Path, help="path of a picture of the rates")
    args = made.parse_args()
    if args.cache is not None:
        os.environ[WEIGHTS] = str(args.weights)
        sys.path.insert(0, str(Path(__file__).parent))
        time.perf_counter = time.process_time  # the clock of compare
        methods.BASELINES["limited_adam"] = methods.Baseline(limited_adam, -4.5, -1.5)
        setting, where = SETTINGS[args.name], args.cache / f"few_shot-{args.name}{'-unguarded' * args.unguarded}"
        names = args.methods or ((SWEPT,) if args.unguarded else (*METHODS, *CONTROLS))
        if args.unguarded:
            cf.CronosTrainState.create = functools.partial(cf.CronosTrainState.create, guard=False)
        data = f"--dataset {file_of(args.name, args)} --scaling none --batch-size 32 --validation {setting.held}"
        runs = f"--shots {args.shots or setting.shots} --seconds {args.seconds or setting.seconds} --seeds {args.seeds}"
        runs += f" --rates {args.rates} --rate-range 1e-5 1e-2"
        how = f"--model few_shot:{setting.model} --methods {','.join(names)} --out {where}"
        cli.main(["compare", *data.split(), *runs.split(), *how.split()])
        args.out.write_text("".join(path.read_text() for path in sorted(where.glob("shots-*/results.jsonl"))))
    rows = kept(args.out)
    rows += [] if args.besides is None else [{**row, "method": UNGUARDED} for row in kept(args.besides)]
    sweeps: dict[int, list[Any]] = {}
    for row in whole(rows):
        sweeps.setdefault(row["shots"], []).append(row)
    print(shots.table(sweeps))
    for swept in sweeps.values():
        report(swept)
        if args.picture is not None:
            draw(by_rate(summaries(swept)), f"{args.name}, test accuracy at the end of the run", args.picture)


def whole(rows: list[Row]) -> list[Row]:
    """The rows of the seeds that all methods and rates have been run with."""
    cells = {(row["method"], row["rate"]) for row in rows}
    done = {(row["method"], row["rate"], row["seed"]) for row in rows}
    return [row for row in rows if all((*cell, row["seed"]) in done for cell in cells)]


def report(rows: list[Row]) -> None:
    """Print what the table of scores leaves out: differences, all rates, epochs, and what the guard rejected."""
    found = summaries(rows)
    print("Rate and epoch chosen on validation rows; differences ± standard error over draws; epochs of all runs:\n")
    chosen(found, peak)
    print("The rate with the best validation score at the end of the run, and the last epoch:\n")
    chosen(found, last)
    ends = by_rate(found)
    if SWEPT not in ends:
        return
    rates, ours = list(ends[SWEPT]), ends[SWEPT]
    heads = [f"{rate:.3g}" for rate in rates]
    for title, which in ("with the epoch chosen on validation rows", peak), ("at the end of the run", last):
        print(f"Test accuracy {title}, by rate:\n")
        scores = {name: [mean(cells[rate], "test", which) for rate in rates] for name, cells in ends.items()}
        lines = {name: [*(f"{one:.1f}" for one in its), f"{max(its) - min(its):.1f}"] for name, its in scores.items()}
        printed(["method", *heads, "highest less lowest"], lines)
    print(f"{SWEPT} less each other method at the same rate, at the end of the run:\n")
    others = {name: cells for name, cells in ends.items() if name != SWEPT}
    less = {n: [difference(ours[rate], its[rate], "test", last) for rate in rates] for n, its in others.items()}
    printed(["less", *heads], less)
    if all("rejections" in last(run) for cell in ours.values() for run in cell.values()):
        print(f"What the guard of {SWEPT} rejected:\n")
        guarded = {f"{rate:.3g}": judged(cell) for rate, cell in ours.items()}
        printed(["rate", "runs", "solves of a run", "rejected solves", "in runs", "as their last solve"], guarded)


def chosen(found: list[Summary], which: Callable[[list[Row]], Row]) -> None:
    """Print each method at the rate that validation rows choose, and what CRONOS-AM has more there.

    Args:
        found: the methods.
        which: the check of a run that counts.
    """
    cells = {m.method: max(m.cells, key=lambda cell: mean(cell, "validation", which)) for m in found}
    ours = [name for name in OURS if name in cells]
    lines = {}
    for method in found:
        cell = cells[method.method]
        rate = next(iter(cell.values()))[0]["rate"]
        lines[method.method] = [
            "–" if rate is None else f"{rate:.3g}",
            f"{mean(cell, 'test', which):.2f}",
            *("" if name == method.method else difference(cells[name], cell, "test", which) for name in ours),
            span([last(run)["epoch"] for run in method.runs()]) if "step" in last(method.runs()[0]) else "–",
        ]
    printed(["method", "rate, or C", "test", *(f"{name} less it" for name in ours), "epochs"], lines)


def by_rate(found: list[Summary]) -> dict[str, dict[float, Cell]]:
    """The cells, from the lowest rate on, of the methods that train all layers at several rates."""
    swept = (method for method in found if "adam" in method.method)
    return {method.method: dict(sorted(zip(method.rates, method.cells, strict=True))) for method in swept}


def judged(cell: Cell) -> list[str]:
    """Runs, solves of one, rejected solves, runs that have any, and runs whose last solve is one."""
    ends = [last(run) for run in cell.values()]
    counts = (
        sum(end["rejections"] for end in ends),
        sum(end["rejections"] > 0 for end in ends),
        sum(not end["accepted"] for end in ends),
    )
    return [f"{len(ends)}", span([end["solves"] for end in ends]), *map(str, counts)]


def span(counts: list[int]) -> str:
    """The lowest and the highest."""
    low, high = min(counts), max(counts)
    return str(low) if low == high else f"{low} to {high}"


def printed(heads: list[str], lines: dict[str, list[str]]) -> None:
    """Print a table."""
    print("\n".join(markdown(heads, [[name, *cells] for name, cells in lines.items()])) + "\n")


def draw(ends: dict[str, dict[float, Cell]], title: str, path: Path) -> None:
    """Save a picture of the same."""
    looks = zip((style.OURS, *style.COLORS), ("*", *style.MARKERS), strict=False)
    with style.styled(7.2, 3.6) as figure:
        ax, labels = figure.subplots(), []
        for (method, cells), (color, marker) in zip(ends.items(), looks, strict=False):
            its = {rate: mean(cell, "test", last) for rate, cell in cells.items()}
            ours = color == style.OURS
            ax.plot(list(its), list(its.values()), marker=marker, color=color, linewidth=2.4 if ours else 1.3)
            labels.append(style.Label(max(its), its[max(its)], method, color, ours))
        style.log_axis(ax, min(its), max(its))
        ax.set(xlabel="rate of Adam", ylabel="%", ylim=(0, None))
        ax.set_title(title, color="0.35")
        style.label_ends(ax, labels)
        style.save(figure, path)


if __name__ == "__main__":
    main()
