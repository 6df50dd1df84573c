"""Flax's own examples, and the same loops with CRONOS-AM swapped in, at equal CPU time.

    python docs/benchmarks/clients.py --data-dir tfds --out clients.jsonl

The loops are in ``flax_examples``; the lines that are swapped are read from ``clients.md``. Every run is a row of the
file, written when it is done; rows that are there are not run again. Ends with the tables;
``--out docs/benchmarks/clients.jsonl.gz`` prints those of the kept rows.
"""

import contextlib
import difflib
import functools
import re
import time
import types
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import tensorflow_datasets as tfds
from flax import nnx
from rows import missing, parser

from cronos_flax.compare.data import load_tfds

HERE = Path(__file__).parent
OWN, OURS, ADAM = "its own optimizer", "CRONOS-AM", "Adam 0.001"
MOVING, RATIO = "CRONOS-AM, head moving", "CRONOS-AM, beta_ratio .2"
WEAK, MOVING_WEAK = "CRONOS-AM, β not raised", "CRONOS-AM, head moving, β not raised"
QUIET, SLOW, BOTH = (f"{WEAK}, {what}" for what in ("no dropout", "SGD .01", "no dropout, SGD .01"))
FIRST = "first solve"  # and nothing more
SEEDS = (0, 1, 2)
FROM_TRAINING = 100  # seeds from here on score other training rows: settings are chosen with these
SCORED = 2000
WORDS, LENGTH = 8000, 24  # of texts
TEXTS = {"noisy_ag_news": "text", "banking77": "text"}  # sets, and what they call a text
_COMPILED = "/jax/core/compile/backend_compile_duration"


class Client(NamedTuple):
    """What a loop is trained on: data, rows to fit, and how many epochs by method, for equal time."""

    data: str
    rows: int
    epochs: dict[str, int]
    classes: int | None = None  # if others than the loop's
    scored: int = SCORED  # rows


CLIENTS = {
    "mnist": Client("fashion_mnist", 4000, {OWN: 7, OURS: 4, MOVING: 4, ADAM: 7}),
    "sst2": Client(
        "noisy_ag_news",
        9000,
        {OWN: 8, OURS: 5, MOVING: 5, RATIO: 5, WEAK: 5, MOVING_WEAK: 5, QUIET: 5, SLOW: 5, BOTH: 5, ADAM: 8},
    ),
    "sst2, banking77": Client(
        "banking77", 8000, {OWN: 8, OURS: 5, MOVING: 5, WEAK: 5, MOVING_WEAK: 5, ADAM: 8}, classes=77, scored=3080
    ),
    "imagenet": Client("cifar10_airplane_automobile", 4000, {OWN: 7, OURS: 5, MOVING: 5}),
    "tutorial": Client("fashion_mnist", 4000, {OWN: 6, OURS: 3, MOVING: 3}),
}


def sources(name: str) -> dict[str, str]:
    """The loop as Flax has it, with the lines of ``clients.md``, with variants of these, and with Adam for SGD.

    What could make a weak β fail is taken out of three of them: the dropout, the rate of SGD, both.
    """
    loop, classes = name.partition(",")[0], CLIENTS[name].classes
    own = (HERE / "flax_examples" / f"{loop}.py").read_text()
    own = own if classes is None else own.replace("classes: int = 4", f"classes: int = {classes}")
    (diff,) = re.findall(rf"`{loop}\.py`:\n\n```diff\n(.*?)```", (HERE / "clients.md").read_text(), re.DOTALL)
    ours = patched(own, diff)
    ratio = ours.replace('loss="softmax"', 'loss="softmax", beta_ratio=0.2')
    weak = ours.replace('head="frozen"', 'head="frozen", largest_growth=float("inf")')
    moving, moving_weak = (lines.replace('head="frozen"', 'head="moving"') for lines in (ours, weak))
    adam = own.replace("sgd(0.1, momentum=0.9)", "adam(1e-3)")
    quiet = re.sub(r"dropout: float = [\d.]+", "dropout: float = 0.0", weak)
    slow, both = (lines.replace("sgd(0.1,", "sgd(0.01,") for lines in (weak, quiet))
    swapped = {OURS: ours, MOVING: moving, RATIO: ratio, WEAK: weak, MOVING_WEAK: moving_weak}
    return {OWN: own, **swapped, QUIET: quiet, SLOW: slow, BOTH: both, ADAM: adam}


def patched(source: str, diff: str) -> str:
    """The source after a diff whose hunks are separated by ``@@``.

    Raises:
        ValueError: if the old lines of a hunk are not in the source exactly once.
    """
    for hunk in diff.split("@@\n"):
        lines = hunk.splitlines()
        old, new = ("\n".join(line[1:] for line in lines if line[:1] in (" ", sign)) for sign in "-+")
        if source.count(old) != 1:
            raise ValueError(f"patched: `diff` must have lines that are in the source once, got {old!r}.")
        source = source.replace(old, new)
    return source


def changed_lines(old: str, new: str) -> int:
    """The number of lines that differ; a line in the place of another counts once."""
    matcher = difflib.SequenceMatcher(None, old.splitlines(), new.splitlines(), autojunk=False)
    return sum(max(i2 - i1, j2 - j1) for tag, i1, i2, j1, j2 in matcher.get_opcodes() if tag != "equal")


def loaded(name: str, source: str) -> types.ModuleType:
    """The module of a source."""
    module = types.ModuleType(name)
    exec(compile(source, f"{name}.py", "exec"), module.__dict__)
    return module


def word_ids(text: str) -> np.ndarray:
    """Numbers of the first words of a text, by a hash; 0 is padding, 1 an unknown word."""
    ids = [2 + zlib.crc32(word.encode()) % (WORDS - 2) for word in re.findall(r"\w+", text.lower())[:LENGTH]]
    return np.asarray(ids + [0] * (LENGTH - len(ids)), "int32")


@functools.cache
def whole(name: str, split: str, data_dir: Path) -> tuple[np.ndarray, np.ndarray]:
    """All inputs of a split, as the loops take them, and labels."""
    if name not in TEXTS:
        images, labels = load_tfds(name, split, data_dir)
        return images.astype("float32") / 255, labels
    source = tfds.data_source(name, split=split, data_dir=str(data_dir))
    examples = source.__getitems__(range(len(source)))
    # Training texts have two labels; those of the test split are right.
    labels = np.asarray([example.get("true_label", example["label"]) for example in examples])
    return np.stack([word_ids(example[TEXTS[name]].decode()) for example in examples]), labels


def rows_of(client: Client, seed: int, data_dir: Path) -> tuple[np.ndarray, ...]:
    """Rows to fit, a random choice of the training split, and rows to score."""
    x, y = whole(client.data, "train", data_dir)
    order = np.random.default_rng(seed).permutation(len(x))
    fit, held = order[: client.rows], order[client.rows :][:SCORED]
    if seed >= FROM_TRAINING:
        return x[fit], y[fit], x[held], y[held]
    x_test, y_test = whole(client.data, "test", data_dir)
    return x[fit], y[fit], x_test[: client.scored], y_test[: client.scored]


@contextlib.contextmanager
def compilations() -> Iterator[list[float]]:
    """The seconds of every compilation in the block."""
    seconds: list[float] = []

    def listen(event: str, duration: float, **_: Any) -> None:
        if event == _COMPILED:
            seconds.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seconds
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def run(module: types.ModuleType, data: tuple[np.ndarray, ...], epochs: int, seed: int) -> dict[str, Any]:
    """Train once, after an epoch that is thrown away, in which everything is compiled; the figures of the row."""
    x, y, x_test, y_test = data

    def accuracy(state: Any) -> float:
        parts = [slice(i, i + 500) for i in range(0, len(x_test), 500)]
        return 100 * float(np.mean(np.concatenate([module.predicted(state, x_test[i]) == y_test[i] for i in parts])))

    start = module.create(x, jax.random.key(seed), epochs * (len(x) // module.BATCH_SIZE))
    is_nnx = isinstance(start, tuple)  # model and optimizer, which training changes in place
    *_, state = module.train(nnx.clone(start) if is_nnx else start, x, y, np.random.default_rng(seed), 1)
    accuracy(state)
    seconds, scores, spent = [], [], 0.0
    with compilations() as compiled:
        states = module.train(start, x, y, np.random.default_rng(seed), epochs)
        while True:
            began = time.process_time()
            state = next(states, None)
            jax.block_until_ready(jax.tree.leaves(nnx.state(state) if is_nnx else state))
            spent += time.process_time() - began
            if state is None:
                break
            last, seconds, scores = state, [*seconds, spent], [*scores, accuracy(state)]
    figures = getattr(last[1] if is_nnx else last, "figures", {})
    return {
        "seconds": [round(value, 2) for value in seconds],
        "scores": [round(value, 2) for value in scores],
        "rejections": figures.get("rejections", 0),
        "backbone_rate": figures.get("backbone_rate"),
        "compilations": len(compiled),
        "jax": jax.__version__,
    }


def first_solve(module: types.ModuleType, data: tuple[np.ndarray, ...], seed: int) -> dict[str, Any]:
    """Solve once, before any training; the figures of the row: the size ‖W₁‖·‖W₂‖ of the head before and after."""
    x, y, _, _ = data

    def size(state: Any) -> float:
        head, variables = (
            (state[1].solving.head, state[0]) if isinstance(state, tuple) else (state.head, state.variables)
        )
        network = head.read(variables)
        return float(np.linalg.norm(network.kernel1) * np.linalg.norm(network.kernel2))

    state = module.create(x, jax.random.key(seed), 1)
    before = size(state)
    (solved,) = module.train(state, x, y, np.random.default_rng(seed), 0)  # no epoch: the solve at the end
    return {"size_before": before, "size": size(solved)}


def main() -> None:
    """Run what is missing, print the tables."""
    options = parser(__file__, __doc__, data=True)
    options.add_argument("--first-seed", type=int, default=0, help=f"from {FROM_TRAINING}: score training rows")
    args = options.parse_args()
    seeds = [args.first_seed + i for i in range(len(SEEDS))]
    warnings.simplefilter("ignore", UserWarning)  # of the guard: rows have its figures

    def do(name: str, seed: int, method: str) -> dict[str, Any]:
        client, (what, _, how) = CLIENTS[name], method.rpartition(": ")
        module, data = loaded(name, sources(name)[how]), rows_of(client, seed, args.data_dir)
        return first_solve(module, data, seed) if what else run(module, data, client.epochs[how], seed)

    wanted = [(name, seed, method) for name, client in CLIENTS.items() for seed in seeds for method in client.epochs]
    wanted += [
        (name, seed, f"{FIRST}: {how}") for name, seed, how in wanted if how in (OURS, WEAK) and seed == seeds[0]
    ]
    rows = [row for row in missing(args.out, ("client", "seed", "method"), wanted, do) if row["seed"] in seeds]
    table(rows)
    print("\n| client | method | size of the head at first | after the first solve |\n|---|---|---|---|")
    for row in rows:
        if row["method"].startswith(FIRST):
            method = row["method"].removeprefix(f"{FIRST}: ")
            print(f"| {titled(row['client'])} | {method} | {row['size_before']:.0f} | {row['size']:.0f} |")
    print("\nLines that change: ", end="")
    print(", ".join(f"{name} {changed_lines(s[OWN], s[OURS])}" for name in CLIENTS if (s := sources(name))))


def table(rows: list[dict[str, Any]]) -> None:
    """Print test accuracies at the end, and differences to the loop's own optimizer and to Adam, paired by seed."""

    def runs(name: str, method: str) -> dict[int, dict[str, Any]]:
        return {row["seed"]: row for row in rows if (row["client"], row["method"]) == (name, method)}

    def minus(mine: dict[int, dict[str, Any]], theirs: dict[int, dict[str, Any]]) -> list[str]:
        at_end = [mine[seed]["scores"][-1] - theirs[seed]["scores"][-1] for seed in mine]
        at_best = [mine[seed]["scores"][-1] - max(theirs[seed]["scores"]) for seed in mine]
        return [mean(at_end, "+"), mean(at_best, "+")]

    print("\n| client | method | epochs | CPU s | at the end | minus own optimizer | minus its best epoch | rejected |")
    print("|---|---|---|---|---|---|---|---|")
    for name, client in CLIENTS.items():
        for method, epochs in client.epochs.items():
            mine = runs(name, method)
            spent = np.mean([row["seconds"][-1] for row in mine.values()])
            rejected = "" if method in (OWN, ADAM) else str(sum(row["rejections"] for row in mine.values()))
            less = ["", ""] if method == OWN else minus(mine, runs(name, OWN))
            ends = mean([row["scores"][-1] for row in mine.values()])
            print(f"| {' | '.join([titled(name), method, str(epochs), f'{spent:.1f}', ends, *less, rejected])} |")
    for name, client in CLIENTS.items():
        if ADAM in client.epochs:
            at_end, at_best = minus(runs(name, OURS), runs(name, ADAM))
            print(f"\n{titled(name)}, {OURS} minus {ADAM}: {at_end} at the end, {at_best} against its best epoch")


def titled(name: str) -> str:
    """The loop's file, and the data if they are others than the loop's."""
    loop, *data = name.split(", ")
    return ", ".join([f"{loop}.py", *data])


def mean(values: list[float], sign: str = "") -> str:
    """Mean ± standard error."""
    return f"{np.mean(values):{sign}.2f} ± {np.std(values, ddof=1) / np.sqrt(len(values)):.2f}"


if __name__ == "__main__":
    main()
