"""Gradients that an optimizer passes on: as updates they are added to the parameters, and the loss rises."""

from typing import Any

import jax
import optax

from cronos_flax._alternation.backbone import begins_with, traced_update
from cronos_flax._alternation.optimizer_state import has_node
from cronos_flax._head.paths import Path, format_path
from cronos_flax._solver.user_warnings import warn

_KEEPS = {"clamp", "convert_element_type", "copy", "max", "min", "select_n"}  # the value, in one case at least
_SHOWN = 3  # parameters that are named


def warn_of_gradients_passed_on(
    where: str, tx: optax.GradientTransformation, params: Any, grads: Any, left_out: tuple[Path, ...] = ()
) -> None:
    """Warn if an optimizer leaves the gradients of some parameters as they are, as ``optax.masked`` does.

    Also within ``optax.apply_if_finite``, and within ``optax.MultiSteps`` if that is the outermost.

    Args:
        where: the caller's name.
        tx: the optimizer of the user; only one with ``optax.masked`` in it is looked at.
        params: the parameters.
        grads: a tree of the structure that gradients have.
        left_out: paths of layers that ``tx`` does not move.
    """
    tx = _within(tx)
    try:
        with jax.transfer_guard("allow"):  # Optax makes its constants on the host
            opt_state = jax.eval_shape(tx.init, params)
            has_mask = has_node(opt_state, lambda node: isinstance(node, optax.MaskedState))
            passed = _passed_on(tx, grads, opt_state, params) if has_mask else []
    except Exception:  # an optimizer that needs more than is given here is refused at its first step
        return
    paths = [path for path in passed if not begins_with(path, left_out)]
    if paths:
        names = [format_path(tuple(getattr(entry, "key", entry) for entry in path)) for path in paths[:_SHOWN]]
        others = f" and {len(paths) - _SHOWN} more" if len(paths) > _SHOWN else ""
        warn(
            f"{where}: `tx` should turn gradients into steps, but it passes on those of {', '.join(names)}{others} as "
            "they are, as optax.masked does with what its mask leaves out: they are added to the parameters, and the "
            "loss rises. To keep these parameters where they are, give optax.partition({'trained': ..., 'kept': "
            "optax.set_to_zero()}, labels). If they are the head's, leave the mask out and give "
            'alternation=cf.Alternation(head="frozen"): then only solves move the head.'
        )


def _within(tx: Any) -> Any:
    """The optimizer that ``optax.MultiSteps`` gives the mean of gradients to, in the place of a gradient."""
    owner = getattr(tx.update, "__self__", None)  # also of its gradient_transformation()
    return owner.inner_opt if isinstance(owner, optax.MultiSteps) else tx


def _passed_on(tx: optax.GradientTransformation, grads: Any, opt_state: Any, params: Any) -> list[tuple]:
    """The paths of the updates that may be gradients as they came."""
    jaxpr, updates, _ = traced_update(tx, grads, opt_state, params)
    gradients = len(jax.tree.leaves(grads))
    kept = _kept(jaxpr, [place < gradients for place in range(len(jaxpr.invars))])
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(updates)]
    return [path for path, is_kept in zip(paths, kept, strict=False) if is_kept]  # outputs of the state come after


def _kept(jaxpr: Any, given: list[bool]) -> list[bool]:
    """Which outputs of a jaxpr may be one of these inputs, without a change."""
    may_be = dict(zip(jaxpr.invars, given, strict=True))

    def known(variables: Any) -> list[bool]:
        return [not hasattr(each, "val") and may_be.get(each, False) for each in variables]

    for equation in jaxpr.eqns:
        before = known(equation.invars)
        if equation.primitive.name == "jit":
            may_be.update(zip(equation.outvars, _kept(equation.params["jaxpr"].jaxpr, before), strict=True))
        elif equation.primitive.name == "cond":
            for branch in equation.params["branches"]:
                kept = _kept(branch.jaxpr, before[1:])
                may_be.update((made, True) for made, is_kept in zip(equation.outvars, kept, strict=True) if is_kept)
        elif equation.primitive.name in _KEEPS:
            may_be[equation.outvars[0]] = any(before)
    return known(jaxpr.outvars)
