"""What the limit of steps costs: the time of a gradient step with it and without it, on the suite's reported tasks.

    python docs/benchmarks/step_limit.py --data-dir DIR --cache DIR

Adam on the network and the batch size of each task; steps with and without the limit take turns, in CPU seconds, which
other work on the machine disturbs least. From the shares of time that solves take in the suite's rows follows the time
of CRONOS-AM in that of an optimizer. A minute.
"""

import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rows import kept, parser
from suite import OURS, split
from suite import share as share_of
from suite_tasks import REPORTED, Places, Task

import cronos_flax as cf
from cronos_flax._alternation.backbone import rated
from cronos_flax._solver.losses import loss_of

TURNS, STEPS = 9, 15


def seconds(task: Task, x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """CPU seconds of a step without a limit, and with one: medians over turns."""
    runs = [training(task, x, y, limit) for limit in (None, cf.Alternation().largest_step)]
    taken: list[list[float]] = [[], []]
    for _ in range(TURNS):
        for times, run in zip(taken, runs, strict=True):
            began = time.process_time()
            run()
            times.append((time.process_time() - began) / STEPS)
    free, limited = (float(np.median(times)) for times in taken)
    return free, limited


def training(task: Task, x: np.ndarray, y: np.ndarray, limit: float | None) -> Any:
    """Some steps of training, as a function; they are compiled already."""
    variables = task.model.init(jax.random.key(0), x[:1])
    statistics = {name: tree for name, tree in variables.items() if name != "params"}
    loss = loss_of(task.loss)
    targets = loss.targets(jnp.asarray(y), int(y.max()) + 1 if y.ndim == 1 else None)
    tx, mutable = rated(optax.adam(3e-3), largest_step=limit), list(statistics)

    def value(params: Any) -> jax.Array:
        outputs, _ = task.model.apply({"params": params, **statistics}, x, **task.keywords[0], mutable=mutable)
        return loss.value(outputs, targets).mean()

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        updates, state = tx.update(jax.grad(value)(params), state, params)
        return optax.apply_updates(params, updates), state

    held = step(variables["params"], tx.init(variables["params"]))

    def run() -> None:
        nonlocal held
        for _ in range(STEPS):
            held = step(*held)
        jax.block_until_ready(held)

    return run


def main() -> None:
    """Measure, print the table."""
    made = parser(__file__, __doc__, data=True)
    made.add_argument("--cache", type=Path, required=True, help="directory of features")
    made.add_argument("--rows", type=Path, default=Path(__file__).parent / "suite.jsonl.gz", help="of the suite")
    given = made.parse_args()
    rows = [row for row in kept(given.rows) if row["method"] == OURS]
    print(
        "| task | step ms | limited ms | ratio | solving | epochs | time ÷ an optimizer's |", "|---" * 7 + "|", sep="\n"
    )
    for name, task in REPORTED.items():
        data = split(name, 0, Places(given.data_dir, given.cache))
        free, limited = seconds(task, data.x[: task.batch_size], data.y[: task.batch_size])
        runs = [row for row in rows if row["task"] == name]
        part, epochs = share_of(runs) if runs else np.nan, task.solved_epochs / task.epochs
        cells = f"{1e3 * free:.2f}", f"{1e3 * limited:.2f}", f"{limited / free:.2f}", f"{100 * part:.0f} %"
        cells += f"{task.solved_epochs} / {task.epochs}", f"{epochs * limited / free / (1 - part):.2f}"
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
