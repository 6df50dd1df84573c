"""What one iteration of a solve costs on k devices: collectives, floating-point operations, memory, transfers.

    python docs/benchmarks/scaling.py

Compiles the programs of a solve for 1, 2, 4 and 8 CPU devices, without data, and prints the tables of ``scaling.md``:
collectives and memory as compiled, transfers as counted, and times as calculated from the assumptions below. Two
minutes on two cores.
"""

import argparse
import json
import math
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import cronos_flax as cf
from cronos_flax._solver import descent, gauss_newton, refreshed, solve, staging
from cronos_flax._solver.sample import most_on_a_device

N, P, M, C = 1_281_168, 2048, 256, 1000  # ImageNet's rows, one more so that eight devices have as many each
FEW = 160_000  # with which no sum may be smaller
GPU = {  # assumed, not measured
    "flops": 40e12,  # float32 products a second, at full precision
    "memory": 3e12,  # bytes a second, of the device's memory
}
LINKS = {  # assumed: GPUs of one host, GPUs of several hosts; bytes a second and device, seconds a collective
    "one host": (200e9, 20e-6),
    "hosts": (25e9, 60e-6),
}
KINDS = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter|collective-broadcast"
Compiled = Any


class Compiler:
    """Compiles the programs of a solve on n rows over k devices from shapes alone."""

    def __init__(self, k: int, n: int) -> None:
        mesh = jax.make_mesh((k,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:k])
        self.rows = NamedSharding(mesh, PartitionSpec("data")) if k > 1 else None
        self.whole = NamedSharding(mesh, PartitionSpec()) if k > 1 else None
        self.n = n

    def shaped(self, *shape: int, dtype: Any = jnp.float32, by_rows: bool = False) -> jax.ShapeDtypeStruct:
        """An array that is not there."""
        return jax.ShapeDtypeStruct(shape, dtype, sharding=self.rows if by_rows else self.whole)

    def compiled(self, run: staging.Stage, *arguments: Any, **static: Any) -> tuple[Compiled, Any]:
        """The program, and the shapes and shardings of what it returns."""
        lowered = run.compiled(arguments).lower(arguments, tuple(sorted(static.items())))
        made = lowered.compile()

        def placed(sharding: Any, leaf: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding if self.rows else None)

        return made, jax.tree.map(placed, made.output_shardings, lowered.out_info)

    def programs(self) -> Iterator[tuple[str, Compiled]]:
        """All of a solve, in their order."""
        n, whole = self.n, self.shaped
        data = (
            self.shaped(n, P, by_rows=True),
            self.shaped(n, C, by_rows=True),
            self.shaped(n, by_rows=True),
        )
        solver = jax.tree.map(jnp.asarray, cf.Cronos(loss="softmax", beta=1e-5))
        asked = solve.Asked(solver, *data, None, jax.random.key(0), None)
        program, (begun, prepared, first, key) = self.compiled(solve.begin_refreshed, asked, hidden=M, place=self.rows)
        yield "begin", program
        begun = begun.with_targets(data[1])
        rows, beta, settings = begun.problem.rows, begun.problem.beta, begun.problem.refreshed
        size = min(n // settings.warm_up_every, settings.most_sample)
        yield "warm-up", self.compiled(descent.few, rows, descent.point(first), beta, key, size=size)[0]
        index = whole(gauss_newton.sample_size(n, settings), dtype=jnp.int32)
        for name, known in (("step", False), ("precise step", True)):
            arguments = rows, prepared, beta, first, first, index, index, None
            yield name, self.compiled(refreshed.stepped, *arguments, settings=settings, known=known)[0]
        yield "revive", self.compiled(refreshed.revived, rows, first, key)[0]
        done = whole(dtype=jnp.int32), whole(dtype=bool)
        yield "end", self.compiled(solve.end_refreshed, begun, first, *done, key, *data)[0]


def collectives(text: str) -> Iterator[tuple[str, int, int, int]]:
    """From the text of a program: where it is, its number of arrays and of entries, and of its largest array's."""
    in_loop = True
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith(" "):
            in_loop = not line.startswith("ENTRY")
        found = re.search(rf"= (\(?.*?\)?) (?:{KINDS})(?:-start)?\(", line)
        if found:
            sizes = [math.prod(map(int, shape.split(","))) if shape else 1 for shape in shapes_in(found[1])]
            name = (re.search(r'op_name="([^"]*)"', line) or [""])[0]
            where = "once" if not in_loop else "each CG step" if "/cond/" in name else "each length"
            yield where, len(sizes), sum(sizes), max(sizes)


def shapes_in(text: str) -> list[str]:
    """Of arrays, as ``8,10``."""
    return re.findall(r"\b(?:pred|[a-z]+\d+)\[([\d,]*)\]", text)


def figures(k: int) -> dict[str, Any]:
    """What the compiled programs say, for k devices."""
    rows: dict[str, Any] = {"devices": k}
    for n in (N, FEW) if k in (2, 4) else (N,):
        for name, program in Compiler(k, n).programs():
            plan, cost = program.memory_analysis(), program.cost_analysis()
            found = Counter(collectives(program.as_text()))
            rows[f"{name}, {n}"] = {
                "collectives": [[*each, count] for each, count in sorted(found.items())],
                "bytes": [getattr(plan, f"{part}_size_in_bytes") for part in ("argument", "output", "temp")],
                "flops": cost["flops"],
            }
    return rows


def transfers() -> dict[str, list[int]]:
    """Arrays and bytes that ten iterations more send to the host and to the device; nothing else may travel."""
    rng = np.random.default_rng(0)
    X = jax.device_put(rng.normal(size=(3000, 16)).astype("float32"))
    y = jax.device_put((rng.normal(size=3000) > 0).astype("float32"))
    counted: dict[str, list[int]] = {}

    def counting(name: str, function: Any) -> Any:
        def counted_too(tree: Any, *args: Any, **kwargs: Any) -> Any:
            for leaf in jax.tree.leaves(tree):
                if isinstance(leaf, jax.Array) == (name == "device_get"):
                    counted[name][0] += 1
                    counted[name][1] += np.dtype(leaf.dtype).itemsize * np.size(leaf)
            return function(tree, *args, **kwargs)

        return counted_too

    def ran(iterations: int) -> dict[str, list[int]]:
        counted.update(device_get=[0, 0], device_put=[0, 0])
        kept = {name: getattr(jax, name) for name in counted}
        try:
            for name, function in kept.items():
                setattr(jax, name, counting(name, function))
            with jax.transfer_guard("disallow"):
                cf.Cronos(beta=1e-4, tol=0.0, max_iters=iterations).solve(X, y, hidden=16, key=key)
        finally:
            for name, function in kept.items():
                setattr(jax, name, function)
        return {name: list(value) for name, value in counted.items()}

    key = jax.random.key(0)
    few, many = ran(5), ran(15)
    return {name: [more - less for more, less in zip(many[name], few[name], strict=True)] for name in few}


def seconds(k: int, precise: bool, link: str) -> dict[str, float]:
    """Of one iteration on k devices, from the assumptions: products, memory, network."""
    d, settings = P + 1, cf.Refreshed()
    s = N if precise else gauss_newton.sample_size(N, settings)
    steps = settings.precise_cg_steps if precise else settings.cg_steps
    tail = gauss_newton.sample_size(N, settings)
    with_X = 2 * d * M * (2 * N + 2 * steps * s)
    with_head = 2 * M * C * (4 * N + 6 * steps * s)  # outputs, their gradient back, the kernel's, one length
    curvature = 2 * M * M * 2 * tail
    passes = 4 * (2 * N + 2 * steps * s) * d + 4 * C * (8 * N + 6 * steps * s)  # bytes of X, and of arrays n × C
    bandwidth, latency = LINKS[link]
    sums = (steps + 1) * (d + C) * M + M * M + M * settings.neuron_rank
    count = 4 + 3 * steps + 2 * len(settings.step_lengths) + 2  # as compiled; one length is tried on all rows
    network = 0.0 if k == 1 else count * latency + 4 * sums * 2 * (k - 1) / k / bandwidth
    return {
        "products": (with_X + with_head + curvature) / k / GPU["flops"],
        "memory": passes / k / GPU["memory"],
        "network": network,
    }


def print_collectives(all_figures: list[dict[str, Any]]) -> None:
    """The first table, and that none of it depends on the number of rows."""
    print(f"\nn {N:,}, p {P}, m {M}, C {C}: d = p + 1 = {P + 1}, (d + C) m = {(P + 1 + C) * M:,}, m² = {M * M:,}\n")
    print(
        "| devices | program | where | collectives | entries, all | entries, largest array |\n|---|---|---|---|---|---|"
    )
    for rows in all_figures:
        for name in ("step", "precise step"):
            found, same = rows[f"{name}, {N}"]["collectives"], rows[f"{name}, {FEW}"]["collectives"]
            for where in ("once", "each CG step", "each length"):
                here = [each for each in found if each[0] == where]
                total, largest = sum(e[2] * e[4] for e in here), max((e[3] for e in here), default=0)
                print(f"| {rows['devices']} | {name} | {where} | {sum(e[4] for e in here)} | {total:,} | {largest:,} |")
            print(f"| | | with {FEW:,} rows | {'the same' if found == same else 'OTHERS'} | | |")


def print_memory(all_figures: list[dict[str, Any]]) -> None:
    """The table of memory and operations of each device."""
    d = P + 1
    print("\n| devices | program | arguments GB | results GB | between GB | held GB | Gflop |")
    print("|---|---|---|---|---|---|---|")
    for rows in all_figures:
        k, peak = rows["devices"], 0.0
        caller, again = 4 * N * P / k, 4 * N * M / k  # X as given; Z, which a step is given twice
        for name in ("begin", "warm-up", "step", "precise step", "revive", "end"):
            arguments, results, between = rows[f"{name}, {N}"]["bytes"]
            held = arguments + results + between
            if name not in ("begin", "end"):
                held += caller
            if name == "end":  # the scaled features are there, and not asked for
                held += 4 * N * d / k
            if "step" in name:
                held -= again
            peak = max(peak, held)
            sizes = " | ".join(f"{size / 1e9:.2f}" for size in (arguments, results, between, held))
            print(f"| {k} | {name} | {sizes} | {rows[f'{name}, {N}']['flops'] / 1e9:,.0f} |")
        whole, copy, given = (4 * size / k for size in (N * P + N * d + 3 * N * C + 4 * N * M, N * d, N * P + N * C))
        for name, must in (
            ("what must be held", whole),
            ("the same without the copy of X", whole - copy),
            ("features and targets", given),
        ):
            print(f"| {k} | peak ÷ {name} | | | | {peak / 1e9:.1f} ÷ {must / 1e9:.1f} = {peak / must:.2f} | |")


def print_times() -> None:
    """The table of times from the assumptions."""
    print(f"\nAssumed: {GPU}, {LINKS}\n")
    print("| devices | iteration | products ms | memory ms | network ms | all ms | share of ideal |")
    print("|---|---|---|---|---|---|---|")
    for precise in (False, True):
        for k in (1, 2, 4, 8, 32, 256, 1024):
            parts = seconds(k, precise, "one host" if k <= 8 else "hosts")
            total, alone = sum(parts.values()), sum(seconds(1, precise, "one host").values())
            each = " | ".join(f"{1e3 * value:.2f}" for value in (*parts.values(), total))
            name = "precise" if precise else "sampled"
            print(f"| {k} | {name} | {each} | {100 * alone / k / total:.0f} % |")
    size = gauss_newton.sample_size(N, cf.Refreshed())
    more = {k: most_on_a_device(N // k, size, N) * k / size - 1 for k in (8, 32, 256)}
    print("\nPlaces for a sample beyond its rows:", ", ".join(f"{k}: {100 * each:.0f} %" for k, each in more.items()))


def main() -> None:
    """Compile for each number of devices in a process of its own, and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--devices", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.devices:
        jax.config.update("jax_num_cpu_devices", given.devices)
        print(json.dumps(figures(given.devices)))
        return
    commands = [[sys.executable, __file__, "--devices", str(k)] for k in (1, 2, 4, 8)]
    found = [json.loads(subprocess.run(each, stdout=subprocess.PIPE, check=True).stdout) for each in commands]
    print_collectives(found[1:3])
    print_memory([found[0], found[-1]])
    print(f"\nTen iterations more send, arrays and bytes: {transfers()}")
    print_times()


if __name__ == "__main__":
    main()
