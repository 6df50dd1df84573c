"""A solve for the head of a train state, and what the guard says of it: the same for linen and NNX."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float

from cronos_flax._alternation.backbone import check_optimizer
from cronos_flax._alternation.choose_beta import chosen, weaker
from cronos_flax._alternation.defaults import Alternation, alternation_defaults, alternation_settings, growth_limit
from cronos_flax._alternation.first_solve import first_solved
from cronos_flax._alternation.guard import Guard, GuardState, guard_settings
from cronos_flax._head.data import Unpack
from cronos_flax._head.fit import fit_rows, most_in_memory, nonfinite_solution, solver_or_default
from cronos_flax._head.head import Compare, Head, check_head
from cronos_flax._head.rows import GatheredRows
from cronos_flax._solver.cronos import Cronos
from cronos_flax._solver.processes import agreed, on_first
from cronos_flax._solver.solution import Solution, Stats, Status, TwoLayer
from cronos_flax._solver.transfer import copied, default_key, folded, on_device, on_host
from cronos_flax._solver.user_warnings import warn

# The user is told if more than this share of the loss of the best constant outputs is left after a first solve, which
# may find features of which only large weights make something, or after a later one.
_MOST_LEFT = {True: 1.01, False: 0.999}
_ROUNDING = float(jnp.finfo(jnp.float32).eps)


def asked_for(
    where: str,
    tx: optax.GradientTransformation,
    head: Head,
    kind: type,
    solver: Cronos | None,
    guard: Guard | bool | None,
    alternation: Alternation | None,
) -> tuple[Cronos, Alternation, Guard | None]:
    """What a user asked for, with the defaults filled in; ``kind`` is that of the modules that the head may be of.

    Returns:
        How the head is solved, between which steps, and the settings of the guard, None for none.

    Raises:
        ValueError: for an argument of the wrong kind.
    """
    check_optimizer(where, tx)
    check_head(where, head, kind)
    solver = solver_or_default(where, solver)
    alternation = alternation_settings(where, alternation, solver, head)
    return alternation_defaults(solver, head, alternation), alternation, guard_settings(where, guard)


class GuardedSolve(NamedTuple):
    """What a solve makes of a state: the guard's new state, the weight decay, the parts to go on with, the solution.

    ``solution.status`` says if the guard rejected it: then the parts are those of before.
    """

    guard: GuardState | None
    beta: Float[Array, ""]
    parts: dict[str, Any]
    solution: Solution


def solve_guarded(
    guard: GuardState | None,
    beta: Float[Array, ""],
    head: Head,
    variables: Any,
    solver: Cronos,
    alternation: Alternation,
    parts: Callable[[TwoLayer | None, Any], dict[str, Any]],
    data: Any,
    *,
    validation: Any,
    unpack: Unpack | None,
    key: Array | None,
    step: ArrayLike,
    callback: Callable[[dict[str, float]], Any] | None,
    throw: bool,
    compare: Compare | None = None,
) -> GuardedSolve:
    """Solve for a head, and accept the new state or go back.

    Args:
        guard: None accepts every solve.
        beta: weight decay of the alternation; infinity lets this solve choose it, as ``solver`` says.
        head: the head.
        variables: the variables of a linen module, or an NNX model.
        solver: how the head is solved.
        alternation: the parts of the alternation.
        parts: gives the guarded parts of the state with this head, None for the present one, and these moments of
            batch norms.
        data: as for :func:`cronos_flax.fit_head`.
        validation: other rows, to choose ``beta`` on anew; None keeps it.
        unpack: how to take a batch apart.
        key: key of samples and revived neurons; None derives one from ``step``.
        step: the number of gradient steps so far.
        callback: called during the solve, and with the guard's figures at the end.
        throw: raise if the loss is not finite and no earlier state can be restored.
        compare: called with what the first batch gave, see :meth:`Head.gather`.

    Raises:
        ValueError: for data that do not fit.
        FloatingPointError: if the loss is not finite at the first solve, or without guard, and ``throw``.
    """
    where = "solve_head"
    rows, moments = head.gather(
        variables, data, unpack, callback, most_bytes=most_in_memory(solver), where=where, compare=compare
    )
    unseen = None
    if validation is not None:
        unseen = head.gather(variables, validation, unpack, where=where, name="validation")[0]
    key = folded(default_key(), step) if key is None else key
    network, callback = head.read(variables), on_first(callback)
    is_first = not np.isfinite(on_host(beta))
    if rows.finite and (unseen is None or unseen.finite):

        def fit(solver: Cronos) -> tuple[TwoLayer | None, Solution]:
            return fit_rows(network, rows, solver, key, callback, throw=False)

        if is_first:
            at_first = solver if unseen is None else weaker(solver)
            new, solution = first_solved(fit, network, rows, at_first, growth_limit(alternation))
        else:
            new, solution = fit(dataclasses.replace(solver, beta=beta))
        if unseen is not None:
            new, solution = chosen(fit, (new, solution), solver, unseen)
        if (is_first or unseen is not None) and np.isfinite(on_host(solution.stats.beta)):
            beta = on_device(solution.stats.beta, beta.dtype)
        if guard is not None and not guard.has_weight_decay(beta):  # losses with another one say nothing
            guard = guard.forgetful()
    else:
        new, solution = None, nonfinite_solution(network)
    if throw and solution.status == Status.nonfinite and (guard is None or int(on_host(guard.solves)) == 0):
        raise _nonfinite(where, rows, unseen, solution)
    changed = parts(new, moments)
    if np.isfinite(on_host(beta)):  # gradient steps of the head have the same weight decay
        head_decay = copied(on_device(beta, jnp.float32))
        changed["opt_state"] = changed["opt_state"]._replace(head_decay=head_decay)
    rounding = _rounding(rows)
    if guard is None:
        _warn_if_constant(new, solution.stats, rounding, is_first)
        return GuardedSolve(None, beta, changed, solution)
    guard, changed = guard.judge(changed, solution.stats, rounding)
    if not on_host(guard.accepted):
        solution = dataclasses.replace(solution, status_code=on_device(Status.rejected, jnp.int32))
    else:
        _warn_if_constant(new, solution.stats, rounding, is_first)
    if callback is not None:
        callback(guard.figures)
    return GuardedSolve(guard, beta, changed, solution)


def _nonfinite(where: str, rows: GatheredRows, unseen: GatheredRows | None, solution: Solution) -> FloatingPointError:
    """What to raise for a loss that is not finite: it names the data whose features are not, if there are any."""
    finite = {"data": rows.finite, "validation": unseen is None or unseen.finite}
    of = " and ".join(f"`{name}`" for name, is_finite in finite.items() if not is_finite)
    why = (
        f"the features of {of} must be finite, got NaN or infinite entries. Check the parameters of the backbone, "
        "and remove or impute the rows that are not finite."
    )
    return FloatingPointError(f"{where}: {why if of else solution.status.message}")


def _warn_if_constant(network: TwoLayer | None, stats: Stats, rounding: float, is_first: bool) -> None:
    """Warn if a solve leads no further than outputs that are the same for all rows, unless these are perfect."""
    if network is None:
        return
    objective, beta, null = (float(on_host(value)) for value in (stats.objective, stats.beta, stats.null_loss))
    kernels = on_host((network.kernel1, network.kernel2))
    squares = sum(float(np.sum(np.square(kernel.astype(float)))) for kernel in kernels)
    loss = agreed(objective - beta / 2 * squares)  # what is left of the penalty is that of a bias
    if abs(null) <= rounding or not loss > null + (_MOST_LEFT[is_first] - 1) * abs(null):
        return
    warn(
        f"solve_head: the loss is {loss:.4g} after a solve, and {null:.4g} for outputs that are the same for all rows, "
        "so the network explains next to nothing. If gradient steps came before, start again at a lower rate. Else "
        "look at the features and the targets, or give the solver a smaller beta or beta_ratio."
    )


def _rounding(rows: GatheredRows) -> float:
    """Rounding of a mean loss: of the loss at zero outputs, which is about the square of real targets, or one."""
    if not jnp.issubdtype(rows.y.dtype, jnp.floating):
        return _ROUNDING
    y = on_host(rows.y).astype(float)  # in float16 the square of 256 is infinite
    return _ROUNDING * float(np.mean(np.square(y if rows.order is None else y[rows.order])))
