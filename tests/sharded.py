"""Rows and parameters sharded over two devices. Run in a process of its own.

Parameters: solved, stepped, saved, restored, stepped again. Rows, on a mesh of explicit axes as jax.make_mesh makes it:
a solve and an alternation give what one device gives. The directory of the checkpoint is the argument.
"""

import sys

import flax.linen as nn
import jax
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import cronos_flax as cf


def rows_over_devices():
    """What one device gives, to rounding; in float64, as few rows and steps make much of rounding in float32."""
    mesh = jax.make_mesh((2,), ("devices",), axis_types=(AxisType.Explicit,))
    over_rows = NamedSharding(mesh, PartitionSpec("devices"))
    x = np.random.default_rng(0).normal(size=(64, 8))  # as wide as the head's input: one shape for all solves
    y = np.argmax(x[:, :2], axis=1)
    data = jax.device_put((x, y), over_rows)
    model = nn.Sequential([nn.Dense(8), nn.tanh, nn.Dense(6), nn.relu, nn.Dense(2)])
    params = jax.jit(model.init)(jax.random.key(0), x)["params"]
    head = cf.find_head(model, {"params": params}, x)
    solver = cf.Cronos(loss="softmax", max_iters=3)

    def alternated(params, x, y):
        made = {"apply_fn": model.apply, "params": params, "tx": optax.sgd(1e-2)}
        state, _ = cf.CronosTrainState.create(**made, head=head, solver=solver).solve_head((x, y))

        def loss(params):
            return optax.softmax_cross_entropy_with_integer_labels(model.apply({"params": params}, x), y).mean()

        state, solution = state.apply_gradients(grads=jax.grad(loss)(state.params)).solve_head((x, y))
        return solution.stats.objective

    alone = solver.solve(x, y, hidden=6).stats.objective, alternated(params, x, y)
    everywhere = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    outside = solver.solve(*data, hidden=6).stats.objective
    with jax.set_mesh(mesh):
        inside = alternated(everywhere, *data)
    np.testing.assert_allclose((float(outside), float(inside)), [*map(float, alone)], rtol=1e-6)


def main(directory):
    mesh = jax.make_mesh((2,), ("devices",), axis_types=(AxisType.Auto,))
    model = nn.Sequential([nn.Dense(8), nn.tanh, nn.Dense(6), nn.relu, nn.Dense(2)])
    x = np.random.default_rng(0).normal(size=(64, 4)).astype("float32")
    y = (x[:, 0] > 0).astype(int)
    params = model.init(jax.random.key(0), x)["params"]
    head = cf.find_head(model, {"params": params}, x)
    split = jax.tree.map(lambda leaf: NamedSharding(mesh, PartitionSpec(*[None] * (leaf.ndim - 1), "devices")), params)
    params = jax.device_put(params, split)

    @jax.jit
    def step(state):
        def loss(params):
            return optax.softmax_cross_entropy_with_integer_labels(state.apply_fn({"params": params}, x), y).mean()

        return state.apply_gradients(grads=jax.grad(loss)(state.params))

    def fresh():
        solver = cf.Cronos(loss="softmax", max_iters=2)
        made = {"apply_fn": model.apply, "params": params, "tx": optax.adam(1e-2)}
        return cf.CronosTrainState.create(**made, head=head, solver=solver)

    saved = step(fresh().solve_head((x, y))[0])
    cf.save_checkpoint(directory, saved, 1)
    restored = step(cf.restore_checkpoint(directory, fresh()))
    expected = step(saved)
    assert [leaf.sharding for leaf in jax.tree.leaves(restored)] == [
        leaf.sharding for leaf in jax.tree.leaves(expected)
    ]
    jax.tree.map(np.testing.assert_array_equal, restored.params, expected.params)
    restored.solve_head((x, y))
    jax.config.update("jax_enable_x64", True)
    rows_over_devices()


if __name__ == "__main__":
    main(sys.argv[1])
