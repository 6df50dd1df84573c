"""What the solver does on a GPU, ready to be run where there is one: no figure of this manual comes from it yet.

    python docs/benchmarks/gpu.py --data-dir DIR --out gpu.jsonl
    JAX_PLATFORMS=cpu python docs/benchmarks/gpu.py --tiny [--data-dir DIR] --out tiny.jsonl    # does it run?

``DIR`` holds prepared TFDS sets (fashion_mnist, cifar10_airplane_automobile); without it the cases that read them are
left out. Each case is one row of the file, with device, versions and sizes; cases that are there already are not run
again. Times exclude compilation. Nothing else should run meanwhile.

Cases: the ratios of ``solver.py``; an ImageNet-size head (random features of decaying spectrum, planted classes) to a
stated loss, against Adam at three rates in the same time; experiment #1 at equal time.
"""

import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import solver
from rows import missing, parser

import cronos_flax as cf
from cronos_flax._solver.losses import loss_of

RATES = (3e-4, 1e-3, 3e-3)  # of Adam
METHODS = "cronos-am,adam,adamw,sgd,yogi,dadapt_adamw,prodigy"  # of experiment #1


@partial(jax.jit, static_argnums=(1, 2, 3))
def planted(key: jax.Array, n: int, p: int, C: int) -> tuple[jax.Array, jax.Array]:
    """Features whose spectrum decays, and the classes that a random two-layer network of 256 neurons gives them."""
    feature_key, first_key, second_key = jax.random.split(key, 3)
    X = jax.random.normal(feature_key, (n, p)) / jnp.sqrt(1 + jnp.arange(p, dtype=jnp.float32))
    hidden = jax.nn.relu(X @ jax.random.normal(first_key, (p, 256)))
    return X, jnp.argmax((hidden - jnp.mean(hidden, axis=0)) @ jax.random.normal(second_key, (256, C)), axis=1)


def large_head(n: int, p: int, m: int, C: int, part: float, most: int) -> dict[str, Any]:
    """Seconds and iterations to a part of the loss of the best constant; and what Adam has in that time."""
    X, y = planted(jax.random.key(0), n, p, C)
    told: list[dict[str, float]] = []
    one = cf.Cronos(loss="softmax", max_iters=1).solve(X, y, hidden=m, num_classes=C)
    beta, null = one.stats.beta, float(one.stats.null_loss)
    ours = cf.Cronos(loss="softmax", beta=beta, tol=0.0, max_iters=most)
    for _ in range(2):  # the first compiles
        told.clear()
        last = ours.solve(X, y, hidden=m, num_classes=C, callback=told.append)
    reached = [row for row in told if row["objective"] <= part * null]
    row = {
        "null loss": null,
        "stated loss": part * null,
        "reached": bool(reached),
        "iterations": int((reached or told)[0 if reached else -1]["iteration"]),
        "seconds": float((reached or told)[0 if reached else -1]["seconds"]),
        "loss at the end": float(last.stats.objective),
        "seconds at the end": told[-1]["seconds"],
        "peak GB": (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", float("nan")) / 1e9,
    }
    by_rate = {str(rate): adam(X, y, last.params, float(beta), rate, row["seconds"]) for rate in RATES}
    return {**row, "Adam, loss in that time": by_rate}


def adam(X: jax.Array, y: jax.Array, like: cf.TwoLayer, beta: float, rate: float, budget: float) -> float:
    """The loss that Adam reaches in so many seconds, with a batch of 1,024; its own evaluation is not counted."""
    n, batch, tx = len(X), min(1024, len(X)), optax.adam(rate)
    solver_ = cf.Cronos(loss="softmax")
    scale, loss = jnp.sqrt(jnp.mean(jnp.sum(jnp.square(X), axis=1))), loss_of("softmax")
    C = like.kernel2.shape[1]

    @jax.jit
    def step(params: cf.TwoLayer, state: Any, key: jax.Array) -> tuple[cf.TwoLayer, Any]:
        def objective(params: cf.TwoLayer) -> jax.Array:
            rows = jax.random.randint(key, (batch,), 0, n)
            fit = jnp.mean(loss.value(cf.predict(params, X[rows]), jax.nn.one_hot(y[rows], C)))
            parts = params.kernel1, params.bias1 / scale, params.kernel2
            return fit + beta / 2 * sum(jnp.sum(jnp.square(part)) for part in parts)

        updates, state = tx.update(jax.grad(objective)(params), state, params)
        return optax.apply_updates(params, updates), state

    keys = jax.random.split(jax.random.key(1), 4)
    params = cf.TwoLayer(
        jax.random.normal(keys[0], like.kernel1.shape) / jnp.sqrt(like.kernel1.shape[0]),
        jnp.zeros_like(like.bias1),
        jax.random.normal(keys[1], like.kernel2.shape) / jnp.sqrt(like.kernel2.shape[0]),
        jnp.zeros_like(like.bias2),
    )
    state = tx.init(params)
    jax.block_until_ready(step(params, state, keys[2]))
    start, number = time.perf_counter(), 0
    while time.perf_counter() - start < budget:
        for _ in range(20):
            params, state = step(params, state, jax.random.fold_in(keys[3], number))
            number += 1
        jax.block_until_ready(params)
    return float(solver_.objective(params, X, y, beta))


def experiment(data_dir: Path, out: Path, seconds: float, seeds: int) -> dict[str, Any]:
    """The command line's comparison on experiment #1: each run has as many seconds of training."""
    arguments = ["--dataset", "cifar10_airplane_automobile", "--data-dir", str(data_dir), "--scaling", "unit"]
    arguments += ["--loss", "squared", "--batch-size", "1024", "--methods", METHODS, "--seconds", str(seconds)]
    arguments += ["--first-seed", "200", "--seeds", str(seeds), "--validation", "1000"]
    directory = out.with_suffix(".experiment1")
    command = [sys.executable, "-m", "cronos_flax", "compare", *arguments, "--out", str(directory), "--quiet"]
    subprocess.run(command, check=True)
    rows = [json.loads(line) for line in (directory / "results.jsonl").read_text().splitlines()]
    return {"rows": rows}


def main() -> None:
    """Run what is missing, print everything."""
    made = parser(__file__, __doc__, data=False)
    made.add_argument("--tiny", action="store_true", help="small sizes, to see that it runs")
    made.add_argument("--rows", type=int, default=1_281_167, help="of the large head")
    made.add_argument("--columns", type=int, default=2048, help="of its features")
    made.add_argument("--neurons", type=int, default=256)
    made.add_argument("--classes", type=int, default=1000)
    made.add_argument("--loss", type=float, default=0.5, help="to reach, as a part of the loss of the best constant")
    made.add_argument("--iterations", type=int, default=300, help="at most")
    made.add_argument("--seconds", type=float, default=15.0, help="of each run of experiment #1")
    given = made.parse_args()
    if given.tiny:
        given.rows, given.columns, given.neurons, given.classes, given.iterations = 4000, 32, 16, 10, 20
        given.seconds = min(given.seconds, 0.5)
    sizes = given.rows, given.columns, given.neurons, given.classes
    n, d, m = (2500, 63, 16) if given.tiny else (200_000, 2047, 256)
    cases: dict[str, Callable[[], dict[str, Any]]] = {
        f"iteration, n {n} d {d + 1} m {m}": lambda: solver.iteration(n, d, m, Path()),
        f"memory as compiled, n {n} d {d + 1} m {m}": lambda: solver.memory(n, d, m),
        "head, n {} p {} m {} C {}".format(*sizes): lambda: large_head(*sizes, given.loss, given.iterations),
    }
    if given.data_dir is not None:
        rows = 6000 if given.tiny else 60_000
        cases |= {
            "published, n 6000 d 785 m 64": lambda: solver.published(given.data_dir),
            f"Adam, n {rows}": lambda: solver.adam(given.data_dir, rows),
            f"Adam, softmax, n {rows}": lambda: solver.adam(given.data_dir, rows, "softmax"),
            "experiment #1": lambda: experiment(given.data_dir, given.out, given.seconds, 1 if given.tiny else 5),
        }
    device = jax.devices()[0]
    about = {
        "device": device.device_kind,
        "devices": jax.device_count(),
        "jax": jax.__version__,
        "python": platform.python_version(),
        "command": sys.argv[1:],
    }
    for row in missing(given.out, ("case",), ((name,) for name in cases), lambda name: {**about, **cases[name]()}):
        print(
            json.dumps({name: np.round(value, 6) if isinstance(value, float) else value for name, value in row.items()})
        )


if __name__ == "__main__":
    main()
