"""Memory of features that are gathered and solved on: in memory, and in files that are read in blocks.

    python docs/benchmarks/memory.py --out memory.jsonl

500,000 rows, made batch by batch, go through a small backbone to 512 or 2,048 features; a head of 64 neurons and
ten classes is solved on them, two iterations at one β (to find the default one takes time, not memory). *To the end*:
the second iteration takes its curvature from all rows, as the last ones of a solve do. Each line is a process of its
own. Memory is that of the process while it gathers or fits, looked at every hundredth of a second: *anonymous* is what
only the process holds (RssAnon), *resident* also counts the pages of files that are mapped, which the system can drop
(VmRSS). Both have the size of the imported packages in them, which is a column of its own. Some minutes on an idle
machine, 14 GB of memory and 9 GB of disk in the temporary directory. Without `--out` the committed rows are printed.
"""

import dataclasses
import multiprocessing
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from rows import Row, kept, missing, parser

import cronos_flax as cf

ROWS, INPUTS, HIDDEN, CLASSES, BATCH = 500_000, 32, 64, 10, 2_000
WIDTHS = (2048, 512)
ALL, FEW = 2**40, 2**28  # bytes of features that a fit may take into memory: as many as there are; a quarter of a GiB
PRECISE = cf.Refreshed(window=1, sampled_tol=1e9, precise_cg_steps=2)  # the second iteration is precise already
KEPT = Path(__file__).with_suffix(".jsonl.gz")
CASES = (
    ("gather", "files"),
    ("fit features", "streamed"),
    ("fit features to the end", "streamed"),
    ("fit batches", "streamed"),
    ("gather", "memory"),
    ("fit features", "memory"),
)


class Stream:
    """Rows of ten classes that no linear map tells apart, made batch by batch."""

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        teacher = np.random.default_rng(0).normal(size=(INPUTS, CLASSES))
        for i in range(ROWS // BATCH):
            x = np.random.default_rng(i + 1).normal(size=(BATCH, INPUTS)).astype("float32")
            yield x, np.argmax(np.abs(x @ teacher), axis=1)


def found(features: int) -> tuple[cf.Head, Any]:
    """A head on so many features, and the variables of its module."""
    model = nn.Sequential([nn.Dense(features), nn.tanh, nn.Dense(HIDDEN), nn.relu, nn.Dense(CLASSES)])
    x, _ = next(iter(Stream()))
    variables = model.init(jax.random.key(0), x)
    return cf.find_head(model, variables, x), variables


def memory(name: str) -> float:
    """A line of the process's status, in GiB."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[name].split()[0]) / 2**20


def watched(do: Callable[[], Any]) -> tuple[Any, Row]:
    """What a function returns; and the peak of memory, in GiB, and the seconds that it took."""
    peak, ended, before = {"RssAnon": 0.0, "VmRSS": 0.0}, threading.Event(), memory("RssAnon")

    def sample() -> None:
        while not ended.wait(0.01):
            for name in peak:
                peak[name] = max(peak[name], memory(name))

    thread = threading.Thread(target=sample)
    thread.start()
    start = time.perf_counter()
    try:
        result = do()
        seconds = time.perf_counter() - start
    finally:
        ended.set()
        thread.join()
    return result, {"before": before, "anonymous": peak["RssAnon"], "resident": peak["VmRSS"], "seconds": seconds}


def measured(features: int, step: str, where: str, cache: Path) -> Row:
    """One line."""
    head, variables = found(features)
    if step == "gather":
        place = cache if where == "files" else None
        return watched(lambda: cf.gather_features(head, variables, Stream(), cache=place))[1]
    solver = cf.Cronos(loss="softmax", beta=1e-3, max_iters=2, max_bytes=FEW if where == "streamed" else ALL)
    if step == "fit features to the end":
        solver = dataclasses.replace(solver, refreshed=PRECISE)
    data = Stream() if step == "fit batches" else cf.gather_features(head, variables, Stream(), cache=cache)
    (_, solution), row = watched(lambda: cf.fit_head(head, variables, data, solver=solver))
    return row | {"objectives": [float(solution.stats.initial_objective), float(solution.stats.objective)]}


def in_a_process(features: int, step: str, where: str, cache: Path) -> Row:
    """The same in a process of its own."""
    if step == "gather" and where == "files":
        shutil.rmtree(cache, ignore_errors=True)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measured, (features, step, where, cache))


def show(rows: list[Row]) -> None:
    """The table."""
    print("| features | | features, GB | before, GiB | anonymous, GiB | resident, GiB | seconds | objective |")
    print("|---|---|---|---|---|---|---|---|")
    for row in sorted(rows, key=lambda row: (row["features"], row["step"], row["where"])):
        name = f"{row['step']}, {row['where']}"
        figures = " | ".join(f"{row[key]:.2f}" for key in ("before", "anonymous", "resident"))
        objective = "" if "objectives" not in row else "{:.5f} → {:.5f}".format(*row["objectives"])
        size = ROWS * row["features"] * 4 / 1e9
        print(
            f"| {ROWS:,} × {row['features']:,} | {name} | {size:.2f} | {figures} | {row['seconds']:.0f} | {objective} |"
        )


def main() -> None:
    """Measure what has no row yet, and print the table."""
    made = parser(__file__, __doc__)
    made.set_defaults(out=None)
    made.add_argument("--widths", type=int, nargs="+", default=WIDTHS, help="numbers of features")
    given = made.parse_args()
    if given.out is None:
        show(kept(KEPT))
        return
    for features in given.widths:
        with tempfile.TemporaryDirectory() as cache:
            rows = missing(
                given.out,
                ("features", "step", "where"),
                [(features, *case) for case in CASES],
                lambda *case, cache=Path(cache): in_a_process(*case, cache),
            )
    show(rows)


if __name__ == "__main__":
    main()
