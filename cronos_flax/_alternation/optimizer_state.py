"""States of Optax optimizers as trees: what goes back, what begins anew with a new head, and what users see."""

import functools
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.interpreters.partial_eval import dce_jaxpr

from cronos_flax._head.paths import Path, at_path
from cronos_flax._solver.meshes import in_place_of
from cronos_flax._solver.transfer import copied, on_device, on_host

# Fields of Optax's states that hold the direction of the next updates; the last three are MADGRAD's and COCOB's, which
# step from where they began.
_DIRECTIONS = (
    *("mu", "trace", "m", "m1", "m2", "exp_avg", "acc_grads", "grad_acc", "ema", "momentum"),
    *("prev_updates", "previous_gradient", "s", "cumulative_gradients", "reward"),
)
# The same of states in which these names, or others, mean something else.
_THEIR_DIRECTIONS = {optax.ScaleBySM3State: ("nu",), optax.ScaleByAdanState: ("m", "v", "g")}
# Fields of Optax's states that schedules and users read, whatever stands beside them.
_GO_ON = ("hyperparams", "hyperparams_states", "step_count", "gradient_step")


def gone_back(kept: Any, present: Any) -> Any:
    """An earlier state of an optimizer, but with the present counts of schedules.

    What is kept for each parameter (moments, averages, gathered gradients) goes back, and with it the scalars of the
    same node, as Adam corrects the bias of its moments by its count. A node without such arrays goes on: a schedule,
    injected hyperparameters, the patience of ``reduce_on_plateau``.

    Args:
        kept: the earlier state.
        present: the state now, of the same structure.
    """
    if jax.tree_util.all_leaves([kept]):
        return kept
    old, treedef = _children(kept)
    new, now_treedef = _children(present)
    if treedef != now_treedef:  # what `optax.monitor` measures is there after a first step only
        return present
    goes_back = any(_is_per_parameter(child) for name, child in old if name not in _GO_ON)

    def chosen(name: str | None, before: Any, now: Any) -> Any:
        counts = name is not None and _is_scalar(before) and not goes_back
        return now if counts or name in _GO_ON else gone_back(before, now)

    children = [chosen(name, before, now) for (name, before), (_, now) in zip(old, new, strict=True)]
    return jax.tree.unflatten(treedef, children)


def with_head(optimizer_state: Any, paths: tuple[Path, Path], params: Mapping[str, Any]) -> Any:
    """The state of an optimizer of the backbone, with the head's parameters where it keeps nothing for them.

    So it has the structure of the optimizer's state without the wrapper. What holds nothing for parameters is the same
    object as before: injected hyperparameters can be set there.

    Args:
        optimizer_state: of the user's optimizer, with ``optax.MaskedNode`` for the head.
        paths: of the head's two layers.
        params: ``variables["params"]``.
    """

    def filled(node: Any, keys: Path) -> Any:  # keys of dicts since the last field of a state
        if isinstance(node, optax.MaskedNode):
            return at_path(params, keys) if any(keys[: len(path)] == path for path in paths) else node
        if not has_node(node, lambda inside: isinstance(inside, optax.MaskedNode)):
            return node
        children = jax.tree_util.tree_leaves_with_path(node, is_leaf=lambda child: child is not node)
        found = [filled(child, (*keys, key.key) if hasattr(key, "key") else ()) for (key,), child in children]
        return jax.tree.unflatten(_children(node)[1], found)

    return filled(optimizer_state, ())


def begun_anew(present: Any, tx: optax.GradientTransformation, params: Any, paths: tuple[Path, Path]) -> Any:
    """The state of an optimizer after a solve: it does not drag the new head where the old one was going.

    For the head, directions (first moments, gathered gradients) begin anew, and what an optimizer keeps of the
    parameters themselves (schedule-free ones do, and Prodigy) is of the new ones. Sizes of gradients (second moments)
    stay: with none, an optimizer that shares one count with the backbone would take steps several times its rate. Of
    arrays with all parameters in a row, as ``optax.flatten`` makes them, this holds for the entries of the head.

    Args:
        present: the state now.
        tx: the optimizer, whose ``init`` tells how the state begins.
        params: the parameters with the new head.
        paths: of the head's two layers.
    """
    size = sum(map(np.size, jax.tree.leaves(params)))
    with jax.transfer_guard("allow"):  # Optax makes its zeros on the host
        new = _by_names(_head_at_start(tx, params, paths))
        others = jax.tree_util.tree_map_with_path(lambda at, p: _another(p) if _is_inside(at, paths) else p, params)
        with_others = _by_names(_head_at_start(tx, others, paths))
    nodes = jax.tree_util.tree_leaves_with_path(present, is_leaf=lambda node: type(node) in _THEIR_DIRECTIONS)
    theirs = {path: _THEIR_DIRECTIONS[type(node)] for path, node in nodes if type(node) in _THEIR_DIRECTIONS}

    def chosen(path: tuple, now: Any) -> Any:
        names, is_flat = _names(path), _is_flat(path, now, size)
        if names not in new or not (is_flat or _is_inside(path, paths)):
            return now
        heads = _in_row(params, paths) if is_flat else ...
        directions = next((theirs[path[:n]] for n in range(len(path) + 1) if path[:n] in theirs), _DIRECTIONS)
        is_direction = any(getattr(entry, "name", None) in directions for entry in path)
        if not is_direction and np.array_equal(*(of[heads] for of in on_host((new[names], with_others[names])))):
            return now
        # A copy, as the parameters themselves are in the state of the training, and a user's step may donate both.
        return in_place_of(_mixed(on_device(heads), new[names], now) if is_flat else copied(new[names]), now)

    return jax.tree_util.tree_map_with_path(chosen, present)


def _in_row(params: Any, paths: tuple[Path, Path]) -> np.ndarray:
    """Which entries of all parameters, in a row, are those of these layers."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return np.concatenate([np.full(np.size(leaf), _is_inside(path, paths)) for path, leaf in leaves])


def _is_flat(path: tuple, leaf: Any, size: int) -> bool:
    """Whether a leaf of a state holds something for all of so many entries of parameters, in a row."""
    return np.shape(leaf) == (size,) and not (path and hasattr(path[-1], "key"))


_another = jax.jit(lambda param: 2 * param + 1)
_mixed = jax.jit(jnp.where)


def _head_at_start(tx: optax.GradientTransformation, params: Any, paths: tuple[Path, Path]) -> Any:
    """``tx.init(params)``, with 0 in the place of leaves that are not the head's: of a deep network these are many."""
    leaves, treedef = jax.tree.flatten(params)
    if not all(getattr(leaf, "is_fully_addressable", True) for leaf in leaves):
        return tx.init(params)  # of several processes: what is made of shapes alone would lie in each of them
    shapes = tuple(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves)
    try:
        init, inside, structure = _traced_init(tx, treedef, shapes, paths)
    except Exception:  # it looks at values, or at where they are
        return tx.init(params)
    made = iter(init(leaves))
    return jax.tree.unflatten(structure, [next(made) if is_inside else 0 for is_inside in inside])


@functools.lru_cache(maxsize=16)  # a run asks at each solve
def _traced_init(tx: optax.GradientTransformation, treedef: Any, shapes: tuple, paths: tuple[Path, Path]) -> tuple:
    """What makes the head's leaves of a state from parameters; which leaves these are; and the state's structure."""
    closed, state = jax.make_jaxpr(tx.init, return_shape=True)(jax.tree.unflatten(treedef, shapes))
    size = sum(math.prod(shape.shape) for shape in shapes)
    leaves = jax.tree_util.tree_leaves_with_path(state)
    inside = [_is_inside(path, paths) or _is_flat(path, leaf, size) for path, leaf in leaves]
    jaxpr, used = dce_jaxpr(closed.jaxpr, inside)

    @jax.jit  # one program
    def init(leaves: list[Any]) -> list[Any]:
        return jax.core.eval_jaxpr(jaxpr, closed.consts, *itertools.compress(leaves, used))

    return init, inside, jax.tree.structure(state)


def sets_its_rate(optimizer_state: Any) -> bool:
    """Whether an optimizer follows a schedule of its own, or is one of those that must have none."""
    kinds = (
        optax.ScaleByScheduleState,
        optax.contrib.ReduceLROnPlateauState,
        optax.contrib.ScheduleFreeState,
    )

    def is_one(node: Any) -> bool:
        return isinstance(node, kinds) or bool(getattr(node, "hyperparams_states", ()))

    return has_node(optimizer_state, is_one)


def learns_from_steps(optimizer_state: Any) -> bool:
    """Whether an optimizer takes the curvature of the loss from the steps that were made, as L-BFGS does."""
    return has_node(optimizer_state, lambda node: isinstance(node, optax.ScaleByLBFGSState))


def has_node(tree: Any, is_one: Callable[[Any], bool]) -> bool:
    """Whether a tree has such a node: a leaf, or the state of an optimizer within that of another."""
    return any(map(is_one, jax.tree.leaves(tree, is_leaf=is_one)))


def _is_inside(path: tuple, paths: tuple[Path, Path]) -> bool:
    """Whether a leaf of a state belongs to a parameter of these layers."""
    keys: Path = ()  # of dicts since the last field of a state
    for entry in path:
        keys = (*keys, entry.key) if hasattr(entry, "key") else ()
        if keys in paths:
            return True
    return False


def _by_names(tree: Any) -> dict[Path, Any]:
    """The leaves of a tree by the fields, keys and indices that lead there.

    After a step, NNX has others in the place of lists, and the state of ``optax.monitor`` more leaves than at first.
    """
    return {_names(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _names(path: tuple) -> Path:
    return tuple(getattr(entry, "name", getattr(entry, "key", getattr(entry, "idx", entry))) for entry in path)


def _children(node: Any) -> tuple[list[tuple[str | None, Any]], Any]:
    """The direct children, each with the name of its field (None for keys and indices); and the structure of those."""
    children, treedef = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda child: child is not node)
    return [(getattr(path[0], "name", None), child) for path, child in children], treedef


def _is_scalar(node: Any) -> bool:
    return jax.tree_util.all_leaves([node]) and jnp.ndim(node) == 0


def _is_per_parameter(node: Any) -> bool:
    """Whether a child of a state is a tree of real arrays, one for each parameter; other states are named tuples."""
    leaves = jax.tree.leaves(node, is_leaf=lambda child: bool(getattr(child, "_fields", ())))
    return not _is_scalar(node) and any(
        hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.inexact) for leaf in leaves
    )
