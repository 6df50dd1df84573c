"""How much a first solve enlarges the gradient that the backbone gets, on networks of these pages.

    python docs/benchmarks/growth.py --data-dir tfds

The six development tasks of ``alternation.py`` and the linen loops of ``clients.py``: the rows of seed 0, before
training and after one epoch of gradient steps, at the weight decays of a frozen and of a moving head and four and
sixteen times the latter. Prints how many times larger the gradient is after three steps of a solve; the limit of
``cf.Alternation(largest_growth=)`` lies between these numbers. Little training, so minutes on two cores.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import alternation
import clients
import jax
import numpy as np
import optax
from flax.training.train_state import TrainState
from rows import parser
from suite_tasks import Places

import cronos_flax as cf
from cronos_flax._alternation.first_solve import gradient_growth
from cronos_flax._head.rows import GatheredRows
from cronos_flax._solver.losses import loss_of

RATIOS = (0.005, 0.02, 0.08, 0.32)
LOOPS = ("mnist", "sst2", "sst2, banking77", "imagenet")


def growths(head: Any, variables: Any, data: tuple[np.ndarray, np.ndarray]) -> list[float]:
    """By weight decay."""
    features = cf.gather_features(head, variables, data)
    rows = GatheredRows(features.X, features.y, None, True)
    before, found = head.read(variables), []
    for ratio in RATIOS:
        solver = cf.Cronos(loss="softmax", beta_ratio=ratio, max_iters=3)
        _, solution = cf.fit_head(head, variables, features, solver=solver)
        found.append(gradient_growth(before, solution.params, rows, loss_of("softmax")))
    return found


def on_tasks(data_dir: Path) -> Iterator[tuple[str, list[float]]]:
    """Before training, and after an epoch."""
    for name, case in alternation.CASES.items():
        x, y, *_ = case.rows(0, Places(data_dir))
        params = jax.jit(case.model.init)(jax.random.key(0), x[:1])["params"]
        head = cf.find_head(case.model, {"params": params}, x[:64])
        state = TrainState.create(apply_fn=case.model.apply, params=params, tx=optax.adam(1e-3))
        yield f"{name}, untrained", growths(head, {"params": params}, (x, y))
        state, _ = cf.train(state, (x, y), epochs=1, batch_size=case.batch_size, loss="softmax")
        yield f"{name}, one epoch", growths(head, {"params": state.params}, (x, y))


def on_loops(data_dir: Path) -> Iterator[tuple[str, list[float]]]:
    """Before training; and after an epoch of the loop's own optimizer, where it has the same parameters."""
    for name in LOOPS:
        own, ours = (clients.loaded(name, clients.sources(name)[how]) for how in (clients.OWN, clients.OURS))
        x, y, *_ = clients.rows_of(clients.CLIENTS[name], 0, data_dir)
        state = ours.create(x, jax.random.key(0), 100)
        yield f"{name}, untrained", growths(state.head, state.variables, (x, y))
        if name != "imagenet":
            start = own.create(x, jax.random.key(0), 100)
            trained = next(iter(own.train(start, x, y, np.random.default_rng(0), 1)))
            yield f"{name}, one epoch", growths(state.head, {"params": trained.params}, (x, y))


def main() -> None:
    """Print the table."""
    arguments = parser(__file__, __doc__, data=True)
    data_dir = arguments.parse_args().data_dir
    print(f"| β/β_max | {' | '.join(map(str, RATIOS))} |\n|---{'|---' * len(RATIOS)}|")
    for rows in (on_tasks(data_dir), on_loops(data_dir)):
        for name, found in rows:
            print(f"| {name} | {' | '.join(f'{value:.1f}' for value in found)} |", flush=True)


if __name__ == "__main__":
    main()
