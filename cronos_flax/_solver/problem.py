"""One solve on the solver's coordinates: what both paths are given, and what they give back."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
from jax import Array
from jaxtyping import Int

from cronos_flax._solver.coordinates import Basis, Rows, rotated
from cronos_flax._solver.linear_solvers import NystromPCG, Structured
from cronos_flax._solver.settings import Held, Refreshed
from cronos_flax._solver.types import Activations, Bias, Directions, Neurons, Scalar


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["rows", "basis", "total_weight", "beta", "rho", "tol", "progress"],
    meta_fields=["gates", "certify_iters", "linear_solver", "refreshed", "held"],
)
@dataclasses.dataclass(frozen=True)
class Problem:
    """One solve; β, ρ and tolerances are those of the program, in sums over rows and scaled features.

    Args:
        rows: the data.
        basis: the change of coordinates between these and the user's.
        total_weight: the sum of the weights.
        beta: β.
        rho: ADMM's first penalty, or the first damping.
        tol: when to stop.
        gates: as :class:`cronos_flax.Cronos` has them.
        certify_iters: iterations of ADMM on the final gates of the refreshed path.
        linear_solver: of ADMM.
        refreshed: constants of the refreshed path.
        held: constants of ADMM.
        progress: the number of the callback, None for none.
    """

    rows: Rows
    basis: Basis
    total_weight: Scalar
    beta: Scalar
    rho: Scalar
    tol: Scalar
    gates: str
    certify_iters: int
    linear_solver: Structured | NystromPCG
    refreshed: Refreshed
    held: Held
    progress: Int[Array, ""] | None

    def rotated(self) -> "Problem":
        """The same on the eigenbasis."""
        rows, basis = rotated(self.rows, self.basis)
        return dataclasses.replace(self, rows=rows, basis=basis)


class Ended(NamedTuple):
    """How a path ended.

    Args:
        network: neurons U, directions A, mean output b, and ``X U``.
        status: as a number.
        figures: for :class:`cronos_flax.Stats`.
        state_of: the state to go on from, of the final network.
    """

    network: tuple[Neurons, Directions, Bias, Activations]
    status: Array
    figures: dict[str, Array]
    state_of: Callable[[Any], Any]
