"""A fit and a run of ``cf.train`` on two devices of one process or of two: ``processes.py PORT ID COUNT DIRECTORY``.

With ``kill`` behind these the run ends in the middle, as if the machine had been taken away; it is resumed if it is
called again. Process 0 writes what it found, as JSON.
"""

import contextlib
import json
import os
import sys
from unittest import mock

import flax.linen as nn
import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

import cronos_flax as cf

FLOAT = {"param_dtype": "float64"}


def keep_programs():
    """In every process: JAX writes only those of process 0 into its cache, and the others compile in every run."""
    with contextlib.suppress(ImportError, AttributeError):  # these names are JAX's own; without them it is only slower
        from jax._src import compiler, distributed

        write = compiler._cache_write

        def written(*args):
            with mock.patch.object(distributed.global_state, "process_id", 0):
                write(*args)

        compiler._cache_write = written


def assert_keys_are_copied(place):
    """A train state has a model's random keys, where they lie on devices of several processes too."""
    model = nnx.Dropout(0.5, rngs=nnx.Rngs(0))
    keys = nnx.state(model, nnx.RngKey)
    nnx.update(model, jax.jit(lambda keys: keys, out_shardings=place)(keys))
    made = nnx.state(cf.nnx.TrainState.create(model=model, tx=optax.sgd(0.1)).model, nnx.RngKey)
    for got, expected in zip(*map(jax.tree.leaves, (made, keys)), strict=True):
        assert got.sharding == place
        np.testing.assert_array_equal(jax.random.key_data(got.addressable_data(0)), jax.random.key_data(expected))


def main(directory, dies):
    mesh = jax.make_mesh((2,), ("data",))

    def put(array, *axes):
        place = NamedSharding(mesh, PartitionSpec(*axes))
        return jax.make_array_from_callback(array.shape, place, lambda index: array[index])

    model = nn.Sequential([nn.Dense(8, **FLOAT), nn.tanh, nn.Dense(12, **FLOAT), nn.relu, nn.Dense(4, **FLOAT)])
    rng = np.random.default_rng(0)
    x = rng.normal(size=(96, 8))
    y, weight = np.argmax(x[:, :2], axis=1), 1.0 * (np.arange(96) < 90)
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape) / 3, shapes)
    params = jax.tree.map(lambda leaf: put(leaf, *["data"][: leaf.ndim - 1]), params)
    batches = [tuple(put(a[i : i + 32], "data") for a in (x, y, weight)) for i in range(0, 96, 32)]
    solver = cf.Cronos(loss="softmax", max_iters=3, refreshed=cf.Refreshed(few_rows=32, least_sample=48))
    arguments = {"unpack": lambda batch: ((batch[0],), *batch[1:])}

    head = cf.find_head(model, {"params": params}, batches[0][0])
    if not dies:
        assert_keys_are_copied(NamedSharding(mesh, PartitionSpec()))
    told = []
    if not dies:
        new, solution = cf.fit_head(head, {"params": params}, batches, solver=solver, callback=told.append, **arguments)
        assert bool(told) == (jax.process_index() == 0)
        for got, expected in zip(*map(jax.tree.leaves, (new["params"], params)), strict=True):
            assert got.sharding == expected.sharding
    state = cf.CronosTrainState.create(
        apply_fn=model.apply, params=params, tx=optax.adam(1e-2), head=head, solver=solver
    )

    def die(row):
        if dies and "loss" in row and row["epoch"] == 2:
            os._exit(9)

    _, history = cf.train(state, batches, epochs=3, solve_every=3, directory=directory, callbacks=[die], **arguments)
    if jax.process_index() == 0:
        objectives = [row["objective"] for row in history if "objective" in row]
        sys.stdout.write(json.dumps([float(solution.stats.objective), *objectives, history[-1]["loss"]]))


if __name__ == "__main__":
    port, number, count = map(int, sys.argv[1:4])
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_num_cpu_devices", 2 // count)
    if count > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"127.0.0.1:{port}", count, number)
    dies = sys.argv[5:] == ["kill"]
    if not dies:  # one that is killed while it writes would leave half a program
        keep_programs()
    main(sys.argv[4], dies)
