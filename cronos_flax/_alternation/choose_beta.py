"""β chosen anew in the middle of a run, by the loss on rows that the run has not seen.

How strong the weight decay should be depends on the data and on the number of rows: on pictures the best one falls as
rows are added, on other data it stays (docs/benchmarks/suite-choices.md). Gradient steps have the weight decay of the
solves, so a wrong one bounds what the whole run can reach. Rows that were held back from the first part of a run show
which one is right.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
from jax import Array

from cronos_flax._alternation.first_solve import Solved
from cronos_flax._head.rows import GatheredRows
from cronos_flax._solver.cronos import Cronos
from cronos_flax._solver.meshes import on_automatic_axes_of
from cronos_flax._solver.processes import agreed
from cronos_flax._solver.solution import TwoLayer
from cronos_flax._solver.transfer import on_device, on_host

_FACTOR, _MOST = 4.0, 2  # β is tried at so many times its value and at its fraction, and so often in a row


def weaker(solver: Cronos) -> Cronos:
    """For a first solve that chooses: it begins at a quarter of the usual β.

    Steps before it had no weight decay, so that features and the head have grown. At a large β the few iterations of a
    solve would do little but make the head smaller; then the loss on unseen rows may fall all the same, and choose it.
    """
    ratio = solver.beta_ratio
    return solver if ratio is None else dataclasses.replace(solver, beta_ratio=ratio / _FACTOR)


def chosen(fit: Callable[[Cronos], Solved], first: Solved, solver: Cronos, unseen: GatheredRows) -> Solved:
    """Solve at larger β than the first, as long as the loss on unseen rows falls; if it never did, at smaller ones.

    Each solve starts from the same head.

    Args:
        fit: solves as a solver says.
        first: what it gave at the present β.
        solver: how the head is solved.
        unseen: the head's input, finite, for rows that neither the backbone nor the head has been fitted to.

    Returns:
        What ``fit`` gave at the chosen β.
    """

    def loss(solved: Solved) -> float:
        """The mean on the unseen rows; classes count as in the solves."""

        def measured(network: TwoLayer) -> Array:
            return solver.objective(network, unseen.X, unseen.y, 0.0, sample_weight=unseen.weight)

        return agreed(float(on_host(on_automatic_axes_of(unseen.mesh, measured, solved[1].params))))

    beta, best = on_host(first[1].stats.beta), first
    if not (np.isfinite(beta) and beta > 0):
        return first
    least = loss(first)
    for factor in (_FACTOR, 1 / _FACTOR):
        for power in range(1, _MOST + 1):
            tried = fit(dataclasses.replace(solver, beta=on_device(beta * np.asarray(factor**power, beta.dtype))))
            now = loss(tried)
            if not now < least:  # it may be NaN
                break
            best, least = tried, now
        if best is not first:
            break
    return best
