"""What an optimizer does, as far as its operations and the integers it counts by tell: its state tells neither."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax.training.train_state import TrainState
from jax.interpreters.partial_eval import dce_jaxpr

from cronos_flax._alternation.backbone import module_params, traced_update
from cronos_flax._head.operations import integers, operations, with_versions
from cronos_flax._solver.arrays import is_array


def made_of(state: Any) -> dict[str, Any] | None:
    """What the optimizer of a train state is made of, as JSON takes it; None for other trees, and if it is not known.

    There are the operations of an update, and the integers that decide how its counts go on, such as the
    ``every_k_schedule`` of ``optax.MultiSteps``. Rates and other real numbers are not there, nor are the lengths of
    schedules: a run may go on with others.
    """
    if not isinstance(state, TrainState):
        return None
    leaves, treedef = jax.tree.flatten((module_params(state.params), state.opt_state, state.params))
    shapes = (jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if is_array(leaf) else leaf for leaf in leaves)
    return _made_of(state.tx, treedef, tuple(shapes))


@functools.lru_cache(maxsize=16)  # a run asks at each checkpoint
def _made_of(tx: optax.GradientTransformation, treedef: Any, leaves: tuple) -> dict[str, Any] | None:
    grads, opt_state, params = jax.tree.unflatten(treedef, leaves)

    try:
        jaxpr, updates, new = traced_update(tx, grads, opt_state, params)
    except Exception:  # whatever an optimizer raises that needs more than is given here
        return None
    counts = [not jnp.issubdtype(leaf.dtype, jnp.inexact) for leaf in jax.tree.leaves(new)]
    of_counts = [False] * len(jax.tree.leaves(updates)) + counts
    found = with_versions(operations(jaxpr, jaxpr.outvars), "optax", "cronos_flax")
    return {**found, "integers": integers(dce_jaxpr(jaxpr, of_counts)[0])}
