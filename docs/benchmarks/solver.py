"""How fast the solver is, as ratios measured side by side in one run.

    python docs/benchmarks/solver.py --data-dir DIR --out solver.jsonl

``DIR`` holds prepared TFDS sets (fashion_mnist, cifar10_airplane_automobile). Every case is one row of the file,
written as soon as it is measured; cases that are there already are not run again. Nothing else should run meanwhile.
Times exclude compilation, for everyone. Ends with all rows, a line each.

Cases: the published algorithm against the default; an iteration against its own matrix products; memory against the
data; minibatch Adam against the default, squared loss and softmax; how far held gates get in 500 iterations; two ways
to revive dead neurons.
"""

import dataclasses
import json
import multiprocessing
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from rows import missing, parser
from sklearn.datasets import load_digits

import cronos_flax as cf
from cronos_flax._solver import beta_max as betas
from cronos_flax._solver import coordinates, descent, gauss_newton, program, refreshed, solve, staging
from cronos_flax.compare.data import load_tfds

RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
EPOCHS, BATCH = 10, 128
REVIVAL = ("digits", "fashion_mnist", "cifar10_airplane_automobile")


def seconds(run: Callable[[], Any], repeats: int = 3) -> float:
    """Median time of a call that has been compiled."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def fashion(data_dir: Path, n: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Pixels, ±1 for label < 5, and the program's β for .1 in sums over rows (method.md, "Units")."""
    images, labels = load_tfds("fashion_mnist", "train", data_dir)
    X = images[:n].reshape(n, -1).astype("float32")
    y = np.where(labels[:n] < 5, 1.0, -1.0).astype("float32")
    return X, y, 0.1 * (n / 6000) * float(np.sqrt(np.mean(np.sum(X**2, axis=1)))) / n


def time_to(solver: cf.Cronos, X: Any, y: Any, target: float, most: int = 300) -> dict[str, float]:
    """Seconds the default takes to a regularised loss, everything but compilation included."""
    long = dataclasses.replace(solver, tol=0.0, max_iters=most).solve(X, y, hidden=64)
    trace = np.asarray(long.stats.objective_trace)
    if trace[-1] > target:
        return {"default seconds": float("inf"), "default iterations": most}
    steps = int(np.argmax(trace <= target))
    short = dataclasses.replace(solver, tol=0.0, max_iters=max(steps, 1))
    short.solve(X, y, hidden=64)
    return {
        "default seconds": seconds(lambda: short.solve(X, y, hidden=64).params.kernel1),
        "default iterations": steps,
    }


def published(data_dir: Path) -> dict[str, Any]:
    """Time of the published mode to its best network in 20 iterations, over the default's to as good a one."""
    X, y, beta = fashion(data_dir, 6000)
    row: dict[str, Any] = {}
    for inner in (20, 50):
        solver = cf.NystromPCG(rank=20, max_steps=inner)

        def solve(iterations: int, solver: cf.NystromPCG = solver) -> cf.Solution:
            return cf.Cronos(
                beta=beta, gates="paired", linear_solver=solver, rho=0.1, max_iters=iterations, tol=0.0
            ).solve(X, y, hidden=64)

        best, most = min((float(solve(k).stats.objective), k) for k in (5, 10, 15, 20))
        taken = seconds(lambda solve=solve, most=most: solve(most).params.kernel1, 1)
        ours = time_to(cf.Cronos(beta=beta), X, y, best)
        row[f"{inner} CG steps"] = {"sum loss": best * 6000, "iterations": most, "seconds": taken, **ours}
        row[f"{inner} CG steps"]["ratio"] = taken / ours["default seconds"]
    return row


def spectrum_rows(n: int, d: int) -> tuple[np.ndarray, np.ndarray]:
    """Random features of decaying spectrum, and ±1 targets that are not linear in them."""
    rng = np.random.default_rng(0)
    X = rng.normal(size=(n, d)).astype("float32") / np.sqrt(1 + np.arange(d, dtype="float32"))
    return X, np.sign(np.sin(3 * X[:, 0]) + X[:, 1] * X[:, 2]).astype("float32")


def iteration(n: int, d: int, m: int, data_dir: Path) -> dict[str, Any]:
    """Time of one default iteration over the time of its products, each at its own size and transposition.

    First the products with X alone; then with those of the preconditioner and the gates as well.
    """
    X, y, beta = fashion(data_dir, n) if d == 784 else (*spectrum_rows(n, d), 1e-5)
    few, many = (cf.Cronos(beta=beta, tol=0.0, max_iters=k) for k in (5, 15))

    def once(solver: cf.Cronos) -> float:
        return seconds(lambda: solver.solve(X, y, hidden=m).params.kernel1, 1)

    counts = [int(solver.solve(X, y, hidden=m).stats.cg_steps) for solver in (few, many)]
    steps = (counts[1] - counts[0]) / 10
    rows, settings = jnp.asarray(np.hstack([X, np.ones((n, 1), "float32")])), cf.Refreshed()
    some = rows[: gauss_newton.sample_size(n, settings)]
    U, V = jnp.ones((d + 1, m)), jnp.ones((d + 1, settings.feature_rank))
    W, small = jnp.ones((m, settings.neuron_rank)), jnp.ones((settings.feature_rank, m))
    sizes = {  # left, right, transposed, how many: U × W twice for each resolvent
        "forward": (rows, U, False, 1),
        "back": (rows, jnp.ones((n, m)), True, 1),
        "forward, sample": (some, U, False, steps),
        "back, sample": (some, jnp.ones((len(some), m)), True, steps),
        "gates": (jnp.ones((len(some), m)), jnp.ones((len(some), m)), True, 1),
        "neurons": (U, W, False, 2 * steps),
        "neurons, leading": (small, W, False, 4 * steps),
        "into the sketch": (V, U, True, steps),
        "out of the sketch": (V, small, False, steps),
    }

    def product(left: jax.Array, right: jax.Array, transposed: bool, count: float) -> float:
        call = jax.jit(lambda a, b: a.T @ b) if transposed else jax.jit(jnp.matmul)
        call(left, right)
        return count * seconds(lambda: call(left, right), 5)

    # Whole and parts in turns, so that what else the machine does meets both.
    rounds = []
    for _ in range(7):
        whole = (once(many) - once(few)) / 10
        rounds.append((whole, {name: product(*size) for name, size in sizes.items()}))
    one = float(np.median([whole for whole, _ in rounds]))
    parts = {name: float(np.median([part[name] for _, part in rounds])) for name in sizes}
    with_X = sum(list(parts.values())[:4])
    return {
        "ms": 1e3 * one,
        "products with X, ms": 1e3 * with_X,
        "all products, ms": 1e3 * sum(parts.values()),
        "CG steps": steps,
        "ratio to products with X": one / with_X,
        "ratio to all products": one / sum(parts.values()),
    }


def memory(n: int, d: int, m: int) -> dict[str, Any]:
    """Peak of the compiled programs of a solve over the bytes of 2 X + 4 n m floats."""

    def planned(run: staging.Stage, *arguments: Any, **static: Any) -> tuple[float, Any]:
        """Bytes of arguments, results and what lies between them; and the shapes of the results."""
        lowered = run.compiled(arguments).lower(arguments, tuple(sorted(static.items())))
        plan = lowered.compile().memory_analysis()
        peak = plan.argument_size_in_bytes + plan.output_size_in_bytes + plan.temp_size_in_bytes
        return peak, lowered.out_info

    shaped = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((n, d), (n, 1), (n,))]
    solver = jax.tree.map(jnp.asarray, cf.Cronos(beta=1e-5))
    at_start, (begun, prepared, first, _) = planned(
        solve.begin_refreshed, solve.Asked(solver, *shaped, None, jax.random.key(0), None), hidden=m
    )
    begun = begun.with_targets(shaped[1])
    rows, beta, settings = begun.problem.rows, begun.problem.beta, begun.problem.refreshed
    index = jax.ShapeDtypeStruct((gauss_newton.sample_size(n, settings),), jnp.int32)
    # The same iterate is passed twice where no neuron is dead; and the features of the user are still there.
    at_step = (
        4 * n * d
        - 4 * n * m
        + max(
            planned(
                refreshed.stepped,
                rows,
                prepared,
                beta,
                first,
                first,
                index,
                index,
                None,
                settings=settings,
                known=known,
            )[0]
            for known in (False, True)
        )
    )
    peak = max(at_start, at_step)
    return {"peak MB": peak / 1e6, "ratio": peak / (4 * (2 * n * (d + 1) + 4 * n * m))}


def anonymous() -> float:
    """Anonymous resident memory of this process, in GiB."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["RssAnon"].split()[0]) / 2**20


def blocks(n: int, d: int, m: int) -> dict[str, Any]:
    """Peak anonymous memory of ten steps on features that lie on disk, in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_blocks, (n, d, m))


def _blocks(n: int, d: int, m: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as directory:
        X = np.lib.format.open_memmap(Path(directory) / "X.npy", "w+", "float32", (n, d))
        y = np.empty(n, "float32")
        pieces = [slice(i, min(i + 10_000, n)) for i in range(0, n, 10_000)]
        for i, piece in enumerate(pieces):
            rng = np.random.default_rng(i)
            X[piece] = rng.normal(size=(piece.stop - piece.start, d)) / np.sqrt(1 + np.arange(d))
            y[piece] = np.sign(np.sin(3 * X[piece, 0]) + X[piece, 1] * X[piece, 2])
        X.flush()
        peak, before, times = [anonymous()], anonymous(), []

        def watch(figures: dict[str, float]) -> None:
            times.append(figures["seconds"])

        ended = threading.Event()

        def sample() -> None:
            while not ended.wait(0.02):
                peak[0] = max(peak[0], anonymous())

        sampler = threading.Thread(target=sample)
        sampler.start()
        solution = cf.Cronos(beta=1e-5, max_iters=10).solve([X[p] for p in pieces], y, hidden=m, callback=watch)
        ended.set()
        sampler.join()
        stats = solution.stats
        return {
            "X GiB": X.nbytes / 2**30,
            "before GiB": before,
            "peak GiB": peak[0],
            "seconds an iteration": float(np.median(np.diff(times))),
            "loss": [float(stats.initial_objective), float(stats.objective)],
        }


def adam(data_dir: Path, n: int, loss: str = "squared") -> dict[str, Any]:
    """Time of Adam at its best rate of six to the regularised loss it has after ten epochs, over the default's.

    Squared loss: label < 5 at the β of the other cases; softmax: ten classes, at the default β. For softmax also both
    test accuracies, ours after as many iterations as fit into Adam's time.
    """
    X, y, beta = fashion(data_dir, n)
    scale = float(np.sqrt(np.mean(np.sum(X**2, axis=1))))
    X = X / scale
    if loss == "softmax":
        y = load_tfds("fashion_mnist", "train", data_dir)[1][:n].astype(int)
        beta = float(cf.Cronos(loss=loss, max_iters=1).solve(X, y, hidden=64).stats.beta)
    else:
        beta = beta / scale
    solver = cf.Cronos(loss=loss, beta=None if loss == "softmax" else beta)  # None: finding it is timed
    model = nn.Sequential([nn.Dense(64), nn.relu, nn.Dense(10 if loss == "softmax" else 1)])
    inputs, targets = jnp.asarray(X), jnp.asarray(y)

    def objective(params: Any, x: jax.Array, t: jax.Array) -> jax.Array:
        hidden, output = params["layers_0"], params["layers_2"]
        decay = sum(jnp.sum(v**2) for v in (hidden["kernel"], hidden["bias"], output["kernel"]))
        outputs = model.apply({"params": params}, x)
        if loss == "softmax":
            fit = jnp.mean(optax.softmax_cross_entropy_with_integer_labels(outputs, t))
        else:
            fit = 0.5 * jnp.mean(jnp.square(outputs[:, 0] - t))
        return fit + beta / 2 * decay

    results = {}
    for rate in RATES:
        tx = optax.adam(rate)

        @jax.jit
        def epoch(params: Any, state: Any, order: jax.Array, tx: optax.GradientTransformation = tx) -> Any:
            def step(carry: Any, rows: jax.Array) -> Any:
                params, state = carry
                grads = jax.grad(objective)(params, inputs[rows], targets[rows])
                updates, state = tx.update(grads, state, params)
                return (optax.apply_updates(params, updates), state), None

            return jax.lax.scan(step, (params, state), order)[0]

        params = model.init(jax.random.key(0), inputs[:1])["params"]
        state = tx.init(params)
        orders = [jax.random.permutation(jax.random.key(k), n)[: n // BATCH * BATCH] for k in range(EPOCHS)]
        orders = [order.reshape(-1, BATCH) for order in orders]
        jax.block_until_ready(epoch(params, state, orders[0]))
        start = time.perf_counter()
        for order in orders:
            params, state = epoch(params, state, order)
        jax.block_until_ready(params)
        results[rate] = (float(objective(params, inputs, targets)), time.perf_counter() - start, params)
    rate = min(results, key=lambda r: results[r][0] if np.isfinite(results[r][0]) else np.inf)
    target, taken, params = results[rate]
    row = {"rate": rate, "sum loss": target * n, "seconds": taken, **time_to(solver, inputs, targets, target, 40)}
    row["ratio"] = taken / row["default seconds"]
    if loss == "softmax":
        images, labels = load_tfds("fashion_mnist", "test", data_dir)
        images = images.reshape(len(images), -1).astype("float32") / scale
        clock: list[float] = []
        timed = dataclasses.replace(solver, tol=0.0, max_iters=30)
        for _ in range(2):  # the first compiles
            clock.clear()
            timed.solve(inputs, targets, hidden=64, callback=lambda figures: clock.append(figures["seconds"]))
        fitting = max(int(np.searchsorted(clock, taken, side="right")), 1)
        ours = dataclasses.replace(timed, max_iters=fitting).solve(inputs, targets, hidden=64)
        row["test accuracy of Adam"] = 100 * float(np.mean(model.apply({"params": params}, images).argmax(1) == labels))
        row["test accuracy"] = 100 * float(np.mean(cf.predict(ours.params, images).argmax(1) == labels))
        row |= {"iterations in Adam's time": fitting, "sum loss then": float(ours.stats.objective) * n}
    return row


def held(name: str, data_dir: Path) -> dict[str, Any]:
    """Relative gap and cone violation of held random gates after 500 iterations, at the default β and ρ."""
    if name == "digits":
        images, labels = load_digits(return_X_y=True)
        X, y, hidden = images[:1400], labels[:1400] % 2 == 0, 128
    elif name == "fashion_mnist":
        X, y, _ = fashion(data_dir, 6000)
        hidden, y = 64, y > 0
    else:
        images, labels = load_tfds(name, "train", data_dir)
        X, y, hidden = images[:6000].reshape(6000, -1), labels[:6000] == 0, 64
    y = np.where(y, 1.0, -1.0).astype("float32")
    stats = cf.Cronos(gates="fixed", max_iters=500).solve(X.astype("float32"), y, hidden=hidden).stats
    gap = abs(float(stats.program_objective - stats.lower_bound)) / float(stats.program_objective)
    return {"iterations": int(stats.iterations), "gap": gap, "cone violation": float(stats.cone_violation)}


def revival(name: str, data_dir: Path) -> dict[str, Any]:
    """Final loss where a dead neuron gets a random gate, over that where it gets the one that violates the dual most.

    At a large β, where neurons die; mean and standard deviation over five seeds.
    """

    def violating(rows: coordinates.Rows, iterate: refreshed.Iterate, key: jax.Array) -> refreshed.Iterate:
        outputs = program.network_outputs(rows, iterate.A, iterate.b, iterate.Z)
        alpha = rows.center(rows.gradient(outputs))
        u = program.random_neurons(key, iterate.U)
        return refreshed.on_gates_of(rows.X @ betas.climb(rows.X, alpha, u)[0], rows, iterate)

    if name == "digits":
        X, labels = load_digits(return_X_y=True)
    else:
        X, labels = load_tfds(name, "train", data_dir)
    X, labels = X[:3000].reshape(len(X[:3000]), -1).astype("float32"), labels[:3000]
    y = np.asarray(cf.signed_targets(labels, int(labels.max()) + 1))
    random, ends = descent.revived, {}
    for way, revive in (("random", random), ("violating", staging.Stage(violating))):
        descent.revived = revive
        for ratio in (0.03, 0.1):
            beta = ratio / solve.BETA_RATIO * float(cf.Cronos(max_iters=1).solve(X, y, hidden=4).stats.beta)
            stats = [cf.Cronos(beta=beta).solve(X, y, hidden=64, key=jax.random.key(seed)).stats for seed in range(5)]
            ends[way, ratio] = [(float(s.objective), int(s.active_neurons), int(s.iterations)) for s in stats]
    descent.revived = random
    return {
        f"ratio {ratio:g}": {
            way: dict(
                zip(("loss", "sd", "active", "iterations"), (
                    np.mean(ends[way, ratio], axis=0)[0], np.std(ends[way, ratio], axis=0, ddof=1)[0],
                    *np.mean(ends[way, ratio], axis=0)[1:],
                ), strict=True)
            )
            for way in ("random", "violating")
        }
        for ratio in (0.03, 0.1)
    }  # fmt: skip


def main() -> None:
    """Run what is missing, print everything."""
    args = parser(__file__, __doc__, data=True).parse_args()
    cases: dict[str, Callable[[], dict[str, Any]]] = {
        "published, n 6000 d 785 m 64": lambda: published(args.data_dir),
        "iteration, n 6000 d 785 m 64": lambda: iteration(6000, 784, 64, args.data_dir),
        "iteration, n 20000 d 512 m 256": lambda: iteration(20_000, 511, 256, args.data_dir),
        "memory, n 6000 d 785 m 64": lambda: memory(6000, 784, 64),
        "memory, n 20000 d 512 m 256": lambda: memory(20_000, 511, 256),
        "blocks, n 500000 d 512 m 64": lambda: blocks(500_000, 512, 64),
        "Adam, n 6000": lambda: adam(args.data_dir, 6000),
        "Adam, n 60000": lambda: adam(args.data_dir, 60_000),
        "Adam, softmax, n 60000": lambda: adam(args.data_dir, 60_000, "softmax"),
        **{f"revival, {name}": partial(revival, name, args.data_dir) for name in REVIVAL},
        "held gates, digits": lambda: held("digits", args.data_dir),
        "held gates, Fashion-MNIST": lambda: held("fashion_mnist", args.data_dir),
        "held gates, CIFAR": lambda: held("cifar10_airplane_automobile", args.data_dir),
    }
    device = {"jax": jax.__version__, "device": jax.devices()[0].device_kind}
    rows = missing(args.out, ("case",), ((name,) for name in cases), lambda name: {**device, **cases[name]()})
    for row in rows:
        print(json.dumps(row))


if __name__ == "__main__":
    main()
