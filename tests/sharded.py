"""Rows and parameters sharded over four devices against one device. Run in a process of its own.

All in float64, so that what one device gives is met to rounding. Arguments: a directory, and whose results: of
``solves`` on arrays, or of ``models``.
"""

import contextlib
import dataclasses
import functools
import math
import re
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import cronos_flax as cf
from cronos_flax._solver import descent, gauss_newton, refreshed
from cronos_flax._solver.beta_path import Data, choosable
from cronos_flax._solver.meshes import place_of_rows
from cronos_flax._solver.sample import Sample

ROWS, BATCH, HIDDEN, OUTPUTS = 130, 44, 12, 4
FLOAT = {"param_dtype": "float64"}
# Samples are drawn, of rows that do not divide the devices.
SOLVER = cf.Cronos(loss="softmax", max_iters=5, refreshed=cf.Refreshed(few_rows=32, least_sample=48))


def batches():
    """Batches of equal length; the last one is filled up with rows of weight zero."""
    rng, count = np.random.default_rng(0), -(-ROWS // BATCH) * BATCH
    x = rng.normal(size=(count, 8))
    y, weight = np.argmax(x[:, :2], axis=1), 1.0 * (np.arange(count) < ROWS)
    return [tuple(array[i : i + BATCH] for array in (x, y, weight)) for i in range(0, count, BATCH)]


def unpack(batch):
    x, y, weight = batch
    return (x,), y, weight


def meshes_and_specs():
    """One and two axes, of both kinds; with how kernels are sharded."""
    for axes in (AxisType.Auto, AxisType.Explicit):
        yield jax.make_mesh((4,), ("data",), axis_types=(axes,)), PartitionSpec("data", None)
        yield jax.make_mesh((2, 2), ("data", "model"), axis_types=(axes,) * 2), PartitionSpec("data", "model")


def put(tree, mesh, spec):
    """Arrays of ``tree`` that have so many axes, sharded like this; the others on all devices."""

    def place(leaf):
        return NamedSharding(mesh, spec if np.ndim(leaf) >= len(spec) else PartitionSpec())

    return jax.tree.map(lambda leaf: jax.device_put(leaf, place(leaf)), tree)


def by_rows(tree, mesh):
    """The tree as it is without a mesh, and with its rows over the devices."""
    return tree if mesh is None else put(tree, mesh, PartitionSpec("data"))


def shardings(tree):
    return [leaf.sharding for leaf in jax.tree.leaves(tree)]


def assert_as_before(new, old):
    for got, expected, leaf in zip(shardings(new), shardings(old), jax.tree.leaves(old), strict=True):
        assert getattr(got, "mesh", None) == getattr(expected, "mesh", None)
        assert got.is_equivalent_to(expected, leaf.ndim), (got, expected)


def layers(dense, kernel_init=None):
    of_kernel = {} if kernel_init is None else {"kernel_init": kernel_init}
    return [
        dense(8, **FLOAT, **of_kernel),
        nn.tanh,
        dense(HIDDEN, **FLOAT, **of_kernel),
        nn.relu,
        dense(OUTPUTS, **FLOAT),
    ]


MODEL = nn.Sequential(layers(nn.Dense))


@functools.cache
def initial():
    return jax.jit(MODEL.init)(jax.random.key(0), batches()[0][0])["params"]


def begun(mesh, spec):
    """Parameters, the head and batches."""
    params = initial() if mesh is None else put(initial(), mesh, spec)
    data = [by_rows(batch, mesh) for batch in batches()]
    return params, cf.find_head(MODEL, {"params": params}, data[0][0]), data


def alternated(mesh, spec, directory):
    """Losses of ``cf.train``, and of a step and solves of what a checkpoint gives back; the β that one chooses."""
    params, head, data = begun(mesh, spec)

    def fresh():
        made = {"apply_fn": MODEL.apply, "params": params, "tx": optax.adam(1e-2)}
        return cf.CronosTrainState.create(**made, head=head, solver=SOLVER)

    state, history = cf.train(fresh(), data, unpack=unpack, epochs=2)
    cf.save_checkpoint(directory, state, 1)
    restored = cf.restore_checkpoint(directory, fresh())
    jax.tree.map(np.testing.assert_array_equal, restored.params, state.params)
    assert_as_before(restored.params, params)
    stepped = restored.apply_gradients(grads=jax.tree.map(jnp.ones_like, restored.params))
    assert_as_before(stepped.params, params)
    solved, solution = stepped.solve_head(data, unpack=unpack)
    assert_as_before(solved.params, params)
    chosen, again = solved.solve_head(data[1:], validation=data[:1], unpack=unpack)
    assert_as_before(chosen.params, params)
    objectives = (float(each.stats.objective) for each in (solution, again))
    return [*(row.get("objective", row.get("loss")) for row in history), *objectives, float(chosen.beta)]


def fitted(mesh, spec, directory):
    """The loss after a fit; and after one of features that were gathered before, which are those of one device."""
    params, head, data = begun(mesh, spec)
    variables, solution = cf.fit_head(head, {"params": params}, data, unpack=unpack, solver=SOLVER)
    assert_as_before(variables["params"], params)
    features = cf.gather_features(head, {"params": params}, data, unpack=unpack)
    variables, again = cf.fit_head(head, {"params": params}, features, solver=SOLVER)
    assert_as_before(variables["params"], params)
    return [float(solution.stats.objective), float(again.stats.objective), float(np.sum(features.X**3))]


def solved(mesh, spec, directory):
    """Losses of solves on arrays: from a network, and from a random start; rows and columns sharded."""
    params, head, _ = begun(mesh, spec)
    X, y, weight = (np.concatenate(arrays) for arrays in zip(*batches(), strict=True))
    balanced = dataclasses.replace(SOLVER, beta=1e-3, class_weight="balanced")
    start = {"init": head.read({"params": params})}
    places = [PartitionSpec("data"), spec] if mesh is not None else [None, None]
    given = [X if place is None else jax.device_put(X, NamedSharding(mesh, place)) for place in places]
    if mesh is not None:
        chosen = choosable(Data(given[0], *by_rows((y, weight), mesh)))  # for beta="path"
        np.testing.assert_array_equal(chosen.X, X[:ROWS])
    found = [
        balanced.solve(x, *by_rows((y,), mesh), sample_weight=by_rows(weight, mesh), **start).stats.objective
        for x in given
    ]
    # Targets and weights may lie elsewhere.
    found.append(balanced.solve(given[0], y, sample_weight=weight, **start).stats.objective)
    return [float(each) for each in found]


def features_and_labels(n):
    rng = np.random.default_rng(1)
    X = rng.normal(size=(n, 32))
    return X, np.argmax(X[:, :OUTPUTS], axis=1), 1.0 * (np.arange(n) % 40 > 0)


def warmed_up(mesh, spec, directory):
    """The loss from a random start, whose first steps are on samples of the rows; of gates that are held, too."""
    arrays = by_rows(features_and_labels(1024), mesh)
    some = dataclasses.replace(SOLVER.refreshed, least_warm_up=16)
    solver = dataclasses.replace(SOLVER, refreshed=some)
    held = cf.Cronos(loss="squared", gates="fixed", max_iters=5)
    targets = 1.0 * (arrays[1] > 1)
    return [
        float(solver.solve(*arrays[:2], sample_weight=arrays[2], hidden=HIDDEN).stats.objective),
        float(held.solve(arrays[0], targets, hidden=HIDDEN).stats.program_objective),
    ]


def in_nnx(mesh, spec, directory):
    """Losses of a fit, and of a solve after a step; kernels are annotated, and made where a mesh is set."""
    init = {} if mesh is None else {"kernel_init": nnx.with_partitioning(nnx.initializers.lecun_normal(), tuple(spec))}
    rngs = nnx.Rngs(0)
    first, last = (nnx.Linear(*sizes, rngs=rngs, **FLOAT, **init) for sizes in ((8, HIDDEN), (HIDDEN, OUTPUTS)))
    model = nnx.Sequential(nnx.Linear(8, 8, rngs=rngs, **FLOAT, **init), nnx.tanh, first, nnx.relu, last)
    data = [by_rows(batch, mesh) for batch in batches()]
    head, before = cf.nnx.find_head(model, data[0][0]), nnx.state(model)
    solution = cf.nnx.fit_head(head, model, data, unpack=unpack, solver=SOLVER)
    optimizer = cf.nnx.CronosOptimizer(model, optax.sgd(1e-2), head=head, solver=SOLVER)
    optimizer.update(model, jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param)))
    again = optimizer.solve_head(model, data, unpack=unpack)
    if mesh is not None:
        assert_as_before(nnx.state(model), before)
        assert first.kernel.sharding.spec == spec
    return [float(each.stats.objective) for each in (solution, again)]


def grafted(mesh, spec, directory):
    """The loss of a new head; linen's annotations stay, with their shardings, beside it."""
    axis = "data" if mesh is None else mesh.axis_names[-1]
    model = nn.Sequential(layers(nn.Dense, nn.with_partitioning(nn.initializers.lecun_normal(), (None, axis))))
    data = [by_rows(batch, mesh) for batch in batches()]
    x = batches()[0][0]
    variables = jax.jit(model.init)(jax.random.key(0), x)
    if mesh is not None:
        specs = nn.get_partition_spec(variables)
        is_spec = {"is_leaf": lambda node: isinstance(node, PartitionSpec)}
        variables = jax.device_put(variables, jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, **is_spec))
    module = cf.graft(model, at="layers_4", hidden=12)
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        new = cf.graft_variables(module, variables, jax.random.key(2), x)
    if mesh is not None:
        for name in ("layers_0", "layers_2"):
            assert_as_before(new["params"]["backbone"][name], variables["params"][name])
    new = nn.unbox(new)
    head = cf.find_head(module, new, data[0][0])
    return [float(cf.fit_head(head, new, data, unpack=unpack, solver=SOLVER)[1].stats.objective)]


def used(mesh, spec, directory):
    """A solve on β of a path, one that goes on from there, what is said of their network, and a new head in NNX."""
    X, y, _ = (np.concatenate(arrays)[:128] for arrays in zip(*batches(), strict=True))
    x, labels = by_rows((X, y), mesh)
    first = dataclasses.replace(SOLVER, beta="path", folds=2).solve(x, labels, hidden=HIDDEN, num_classes=OUTPUTS)
    again = dataclasses.replace(SOLVER, beta=1e-3).solve(x, labels, state=first.state, num_classes=OUTPUTS)
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(nnx.Linear(8, 8, rngs=rngs, **FLOAT), nnx.tanh, nnx.Linear(8, OUTPUTS, rngs=rngs, **FLOAT))
    new = cf.nnx.graft(model, at="layers/2", hidden=HIDDEN, rngs=nnx.Rngs(1))
    if mesh is not None:
        nnx.update(new, put(nnx.state(new), mesh, spec))
    head = cf.nnx.find_head(new, x)
    return [
        *(float(each) for each in (first.stats.beta, first.stats.objective, again.stats.objective)),
        float(SOLVER.objective(again.params, x, labels, 1e-3)),
        float(np.sum(np.square(cf.predict(again.params, x)))),
        float(cf.nnx.fit_head(head, new, (x, labels), solver=SOLVER).stats.objective),
    ]


def across(mesh, spec, directory):
    """What a network gives, and a solve on β of a path: neurons on the axis of rows, or columns on one of theirs."""
    X, y, _ = features_and_labels(128)
    rng = np.random.default_rng(2)
    network = cf.TwoLayer(*(rng.normal(size=size) for size in ((32, HIDDEN), HIDDEN, (HIDDEN, OUTPUTS), OUTPUTS)))
    if mesh is not None:
        columns = mesh.axis_names[1:]
        X = jax.device_put(X, NamedSharding(mesh, PartitionSpec("data", *columns)))
        network, y = put(network, mesh, PartitionSpec(*(columns or (None,)), "data")), by_rows(y, mesh)
    solution = dataclasses.replace(SOLVER, beta="path", folds=2).solve(X, y, init=network)
    found = [np.sum(np.square(cf.predict(network, X))), SOLVER.objective(network, X, y, 1e-3), solution.stats.objective]
    return [float(each) for each in found]


SURFACE = {"solves": [solved, warmed_up, used, across], "models": [alternated, fitted, in_nnx, grafted]}
# On all meshes. The others are on one axis of the one kind and on two of the other: explicit axes are computed on as
# automatic ones, and cost as much again.
EVERYWHERE = solved, alternated


def assert_samples_stay(mesh):
    """The rows of a sample, on their devices: the same as on one, and not many places more."""
    n, size = 4096, 400
    x = by_rows(np.arange(1.0, n + 1), mesh)
    place = place_of_rows(x)
    sample, take = jax.jit(lambda index: Sample.of(index, n, n, place)), jax.jit(lambda some, x: some.take(x))
    for seed in range(20):
        order = None if seed % 2 else jax.random.permutation(jax.random.key(seed), n)
        index = gauss_newton.places(n, size, jax.random.key(seed), order)
        some = sample(index)
        taken = np.asarray(take(some, jax.device_put(x, place)))
        np.testing.assert_array_equal(taken[some.order], np.asarray(x)[index])
        assert (np.count_nonzero(taken), np.count_nonzero(some.counts)) == (size, size)
        assert len(taken) < n / 4


def sent(mesh, n):
    """Numbers of entries of the collectives in the programs of a solve's iterations on n rows."""
    texts = []

    def recorded(program):
        compiled = type(program).compiled

        def watched(arguments):
            jitted = compiled(program, arguments)

            def run(arrays, static):
                ready = jitted.lower(arrays, static).compile()
                texts.append(ready.as_text())
                return ready(arrays)

            return run

        program.compiled = watched

    programs = [descent.drawn, refreshed.stepped, refreshed.revived]
    for program in programs:
        recorded(program)
    try:
        X, y, _ = by_rows(features_and_labels(n), mesh)
        # It is precise from the second window on.
        some = cf.Refreshed(few_rows=32, least_sample=48, window=1, sampled_tol=1.0)
        stats = cf.Cronos(loss="softmax", beta=1e-3, tol=0.0, max_iters=4, refreshed=some).solve(X, y, hidden=12).stats
        assert stats.iterations == 4
    finally:
        for program in programs:
            del program.compiled
    kinds = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter|collective-broadcast"
    found = []
    for text in sorted(set(texts)):
        for shapes in re.findall(rf"= (\(?.*?\)?) (?:{kinds})(?:-start)?\(", text):
            sizes = re.findall(r"\b(?:pred|[a-z]+\d+)\[([\d,]*)\]", shapes)
            found.append(sum(math.prod(map(int, size.split(","))) if size else 1 for size in sizes))
    return sorted(found)


def assert_only_sums_are_sent(mesh):
    """No collective is larger than (d + C) m and a constant, and none depends on the number of rows."""
    few, many = sent(mesh, 512), sent(mesh, 2048)
    assert few == many
    assert 33 * HIDDEN <= max(many) <= (33 + OUTPUTS) * HIDDEN + 64, many


def main(directory, whose):
    meshes = list(meshes_and_specs())
    if whose == "solves":
        for mesh, _ in meshes:
            assert_samples_stay(mesh)
        for mesh, _ in (meshes[0], meshes[-1]):
            assert_only_sums_are_sent(mesh)
    for surface in SURFACE[whose]:
        name = surface.__name__
        expected = surface(None, None, directory / f"{name}-one")
        for number, (mesh, spec) in enumerate(meshes if surface in EVERYWHERE else (meshes[0], meshes[-1])):
            with jax.set_mesh(mesh) if surface is in_nnx else contextlib.nullcontext():
                found = surface(mesh, spec, directory / f"{name}-{number}")
            np.testing.assert_allclose(found, expected, rtol=1e-7, err_msg=f"{name}, {mesh}")


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 4)
    jax.config.update("jax_enable_x64", True)
    main(Path(sys.argv[1]), sys.argv[2])
