"""CRONOS-AM on several processes: each reads its own part of the rows, and all train and solve together.

On one machine, two processes with two CPU devices each (the loss is the same with ``--processes 1``):

    python examples/multihost.py --processes 2

With SLURM, one process for each node or for each GPU; JAX reads the addresses from the environment:

    srun --nodes 4 --ntasks-per-node 1 python examples/multihost.py --slurm --directory /shared/run

Started again with the same ``--directory``, on a file system that all processes see, a run that was killed goes on.
"""

import argparse
import socket
import subprocess
import sys
from collections.abc import Iterator

import flax.linen as nn
import jax
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

import cronos_flax as cf

DEVICES = 4  # of all processes together, without SLURM
ROWS, BATCH = 4096, 512


def rows_of(start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
    """Some of the rows; in earnest this reads files, and each process its own."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(ROWS, 16)).astype("float32")
    return x[start:stop], np.argmax(x[start:stop, :4] * x[start:stop, 4:8], axis=1)


class Loader:
    """Batches whose rows lie on the devices of the process that read them: the same number for each process."""

    def __init__(self, mesh: jax.sharding.Mesh) -> None:
        self.place = NamedSharding(mesh, PartitionSpec("data"))
        mine = ROWS // jax.process_count()
        self.x, self.y = rows_of(jax.process_index() * mine, (jax.process_index() + 1) * mine)

    def __iter__(self) -> Iterator[tuple[jax.Array, ...]]:
        size = BATCH // jax.process_count()
        for start in range(0, len(self.x), size):
            part = self.x[start : start + size], self.y[start : start + size]
            yield tuple(jax.make_array_from_process_local_data(self.place, array) for array in part)

    def __len__(self) -> int:
        return ROWS // BATCH


def train(directory: str | None) -> None:
    """Train; every process calls this."""
    mesh = jax.make_mesh((jax.device_count(),), ("data",))
    model = nn.Sequential([nn.Dense(64), nn.relu, nn.Dense(64), nn.tanh, nn.Dense(64), nn.relu, nn.Dense(4)])
    loader = Loader(mesh)
    x, _ = next(iter(loader))
    # The same parameters on all devices. A large model is made sharded: jax.jit(model.init, out_shardings=...).
    init = jax.jit(model.init, out_shardings=NamedSharding(mesh, PartitionSpec()))
    params = init(jax.random.key(0), np.zeros((2, 16), "float32"))["params"]
    head = cf.find_head(model, {"params": params}, x)
    state = cf.CronosTrainState.create(
        apply_fn=model.apply,
        params=params,
        tx=optax.adam(1e-3),
        head=head,
        solver=cf.Cronos(loss="softmax"),
    )
    # Callbacks are called in process 0 only; checkpoints are written by all processes.
    state, history = cf.train(state, loader, epochs=4, validation=loader, directory=directory, callbacks=[show])
    if jax.process_index() == 0:
        print(f"{jax.process_count()} process(es), loss {history[-1]['validation_loss']:.4f}")


def show(row: dict[str, float]) -> None:
    """A line for each solve and each epoch."""
    print({name: round(row[name], 4) for name in ("epoch", "objective", "loss", "validation_accuracy") if name in row})


def start_here(count: int, arguments: list[str]) -> int:
    """Start so many processes on this machine, and wait for them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, __file__, *arguments, "--coordinator", f"127.0.0.1:{port}", "--number"]
    started = [subprocess.Popen([*command, str(number)]) for number in range(count)]
    return max(process.wait() for process in started)


def main() -> int:
    """Read the command line, connect, train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2, help="on this machine, with four CPU devices in all")
    parser.add_argument("--slurm", action="store_true", help="this is one of the processes that srun has started")
    parser.add_argument("--directory", help="of checkpoints")
    parser.add_argument("--coordinator", help=argparse.SUPPRESS)
    parser.add_argument("--number", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.slurm:
        jax.distributed.initialize()
    elif given.number is None and given.processes > 1:
        return start_here(given.processes, sys.argv[1:] or ["--processes", "2"])
    else:
        jax.config.update("jax_num_cpu_devices", DEVICES // given.processes)
        if given.processes > 1:
            jax.config.update("jax_cpu_collectives_implementation", "gloo")
            jax.distributed.initialize(given.coordinator, given.processes, given.number)
    train(given.directory)
    return 0


if __name__ == "__main__":
    sys.exit(main())
