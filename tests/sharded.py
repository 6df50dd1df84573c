"""Rows and parameters sharded over four devices, on automatic and explicit axes. Run in a process of its own.

All in float64, so that what one device gives is met to rounding. The directory of a checkpoint is the argument.
"""

import dataclasses
import sys

import flax.linen as nn
import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import cronos_flax as cf
from cronos_flax._solver.beta import choosable

ROWS, BATCH = 130, 44
FLOAT = {"param_dtype": "float64"}
# Samples are drawn, of rows that do not divide the devices.
SOLVER = cf.Cronos(loss="softmax", max_iters=3, refreshed=cf.Refreshed(few_rows=32, least_sample=48))


def batches():
    """Batches of equal length; the last one is filled up with rows of weight zero."""
    rng, count = np.random.default_rng(0), -(-ROWS // BATCH) * BATCH
    x = rng.normal(size=(count, 8))
    y, weight = np.argmax(x[:, :2], axis=1), 1.0 * (np.arange(count) < ROWS)
    return [tuple(array[i : i + BATCH] for array in (x, y, weight)) for i in range(0, count, BATCH)]


def unpack(batch):
    x, y, weight = batch
    return (x,), y, weight


def meshes():
    """One and two axes, automatic and explicit; with how kernels are sharded."""
    for axes in (AxisType.Auto, AxisType.Explicit):
        yield jax.make_mesh((4,), ("data",), axis_types=(axes,)), PartitionSpec("data")
        yield jax.make_mesh((2, 2), ("data", "model"), axis_types=(axes,) * 2), PartitionSpec("data", "model")


def put(tree, mesh, spec):
    """Arrays of ``tree`` that have so many axes, sharded like this; the others on all devices."""

    def place(leaf):
        return NamedSharding(mesh, spec if np.ndim(leaf) >= len(spec) else PartitionSpec())

    return jax.tree.map(lambda leaf: jax.device_put(leaf, place(leaf)), tree)


def shardings(tree):
    return [leaf.sharding for leaf in jax.tree.leaves(tree)]


def assert_as_before(new, old):
    for got, expected, leaf in zip(shardings(new), shardings(old), jax.tree.leaves(old), strict=True):
        assert getattr(got, "mesh", None) == getattr(expected, "mesh", None)
        assert got.is_equivalent_to(expected, leaf.ndim), (got, expected)


def layers(dense, kernel_init=None):
    of_kernel = {} if kernel_init is None else {"kernel_init": kernel_init}
    return [dense(8, **FLOAT, **of_kernel), nn.tanh, dense(12, **FLOAT, **of_kernel), nn.relu, dense(4, **FLOAT)]


MODEL = nn.Sequential(layers(nn.Dense))


def alternated(params, head, data, directory):
    """Losses of a run of two epochs; a checkpoint is written and read."""

    def fresh():
        made = {"apply_fn": MODEL.apply, "params": params, "tx": optax.adam(1e-2)}
        return cf.CronosTrainState.create(**made, head=head, solver=SOLVER)

    state, history = cf.train(fresh(), data, unpack=unpack, epochs=2)
    if directory is not None:
        cf.save_checkpoint(directory, state, 1)
        restored = cf.restore_checkpoint(directory, fresh())
        jax.tree.map(np.testing.assert_array_equal, restored.params, state.params)
        assert_as_before(restored.params, params)
        state = restored
        assert_as_before(state.params, params)
    return [row.get("objective", row.get("loss")) for row in history]


def fitted(params, head, data):
    """The loss after a fit."""
    variables, solution = cf.fit_head(head, {"params": params}, data, unpack=unpack, solver=SOLVER)
    assert_as_before(variables["params"], params)
    return float(solution.stats.objective)


def nnx_solved(mesh=None):
    """The loss after a solve; kernels are annotated, and made where a mesh is set."""
    annotated = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("data", "model"))
    init = {} if mesh is None else {"kernel_init": annotated}
    rngs = nnx.Rngs(0)
    first, last = nnx.Linear(8, 12, rngs=rngs, **FLOAT, **init), nnx.Linear(12, 4, rngs=rngs, **FLOAT, **init)
    model = nnx.Sequential(nnx.Linear(8, 8, rngs=rngs, **FLOAT, **init), nnx.tanh, first, nnx.relu, last)
    data = batches() if mesh is None else [put(batch, mesh, PartitionSpec("data")) for batch in batches()]
    optimizer = cf.nnx.CronosOptimizer(model, optax.sgd(1e-2), head=cf.nnx.find_head(model, data[0][0]), solver=SOLVER)
    before = nnx.state(model)
    solution = optimizer.solve_head(model, data, unpack=unpack)
    if mesh is not None:
        assert_as_before(nnx.state(model), before)
        assert first.kernel.sharding.spec == PartitionSpec("data", "model")
    return float(solution.stats.objective)


def grafted(mesh):
    """Linen's annotations stay, with their shardings, beside a new head."""
    model = nn.Sequential(layers(nn.Dense, nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))))
    x, *_ = batches()[0]
    variables = jax.jit(model.init)(jax.random.key(0), x)
    specs = nn.get_partition_spec(variables)
    is_spec = {"is_leaf": lambda node: isinstance(node, PartitionSpec)}
    variables = jax.device_put(variables, jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, **is_spec))
    module = cf.graft(model, at="layers_4", hidden=12)
    with jax.set_mesh(mesh):
        new = cf.graft_variables(module, variables, jax.random.key(2), x)
    for name in ("layers_0", "layers_2"):
        assert_as_before(new["params"]["backbone"][name], variables["params"][name])


def main(directory):
    data = batches()
    params = jax.jit(MODEL.init)(jax.random.key(0), data[0][0])["params"]
    head = cf.find_head(MODEL, {"params": params}, data[0][0])
    expected, alone = alternated(params, head, data, None), fitted(params, head, data)
    rows = [np.concatenate(arrays) for arrays in zip(*data, strict=True)]
    start = {"init": head.read({"params": params})}
    solver = dataclasses.replace(SOLVER, beta=1e-3, class_weight="balanced")
    solved = float(solver.solve(rows[0], rows[1], sample_weight=rows[2], **start).stats.objective)
    for mesh, spec in meshes():
        sharded = put(params, mesh, PartitionSpec(*spec, *[None] * (2 - len(spec))))
        given = [put(batch, mesh, PartitionSpec("data")) for batch in data]
        np.testing.assert_allclose(fitted(sharded, head, given), alone, rtol=1e-7)
        if len(spec) == 1:
            x, y, weight = put(rows, mesh, PartitionSpec("data"))
            start = {"init": head.read({"params": sharded})}
            with_mesh = solver.solve(x, y, sample_weight=weight, **start).stats.objective
            np.testing.assert_allclose(with_mesh, solved, rtol=1e-7)
            np.testing.assert_array_equal(choosable(x, y, weight).X, rows[0][:ROWS])  # for beta="path"
    cf.find_head(MODEL, {"params": sharded}, given[0][0])
    np.testing.assert_allclose(alternated(sharded, head, given, directory), expected, rtol=1e-7)
    with jax.set_mesh(mesh):
        inside = nnx_solved(mesh)
    np.testing.assert_allclose(inside, nnx_solved(), rtol=1e-7)
    grafted(mesh)


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 4)
    jax.config.update("jax_enable_x64", True)
    main(sys.argv[1])
