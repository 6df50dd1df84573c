"""The constants of the two paths of the solver, as settings: all static, none needs to be tuned for a data set."""

import dataclasses
import math
import numbers
from typing import Any

from cronos_flax._solver.checks import in_python, positive_integer, real_number


class _Settings:
    """Numbers are checked, and made Python's; only what differs from the defaults is printed."""

    def __post_init__(self) -> None:
        where = type(self).__name__
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if isinstance(field.default, int):
                positive_integer(where, field.name, value)
            elif isinstance(field.default, float):
                real_number(where, field.name, value, "a finite number > 0", lambda v: 0 < v < math.inf)
            elif not (isinstance(value, tuple) and value and all(map(_is_number, value))):
                raise ValueError(f"{where}: `{field.name}` must be a tuple of numbers, got {value!r}.")
        in_python(self, *(field.name for field in dataclasses.fields(self)))  # type: ignore[arg-type]

    def __repr__(self) -> str:
        each = [(field, getattr(self, field.name)) for field in dataclasses.fields(self)]  # type: ignore[arg-type]
        changed = (f"{field.name}={value!r}" for field, value in each if value != field.default)
        return f"{type(self).__name__}({', '.join(changed)})"


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


@dataclasses.dataclass(frozen=True, repr=False)
class Refreshed(_Settings):
    """Constants of ``gates="refreshed"``; one set of defaults for all data (method.md, "Refreshed gates").

    Args:
        step_lengths: lengths θ that the line search tries, from the longest to 0.
        damping_factors: the factor on the damping μ after each of these lengths, one for each.
        damping_range: the least and the largest μ.
        norm_floor: ``‖uᵢ‖`` in the linear system is at least this fraction of its mean over neurons.
        cg_steps: conjugate-gradient steps of an iteration, the first of which goes along the step before, if there was
            one, until the loss stagnates. From then on iterations are precise; with no more than ``least_sample`` rows
            they are so from the start.
        precise_cg_steps: most conjugate-gradient steps of a precise iteration, which takes all rows.
        cg_tol: relative residual at which these end early.
        feature_rank: rank of the sketch of ``XᵀX/n`` in the preconditioner.
        neuron_rank: rank of the sketches on the side of the neurons.
        rows_per_feature: rows that the first sketch is made from, for each feature, at least.
        few_rows: up to so many rows the curvature is taken from all of them.
        sample_every: a sample has one row in this many.
        least_sample: the fewest rows of a sample; up to ``few_rows`` rows, those that step lengths are compared on.
        most_sample: the most rows of a sample.
        warm_up_every: each of the first iterations from a random start uses one row in this many, drawn anew.
        least_warm_up: no warm-up if that leaves fewer rows.
        warm_up_steps: number of these iterations.
        window: iterations over which the decrease of the loss is judged.
        sampled_tol: relative decrease over the window below which iterations turn from samples to all rows.
        least_gain: without a ``tol``, the fraction of what the network explains that a longer window must bring.
        window_products: multiplications with features and directions, ``n m (d + C)`` an iteration, that the longer
            window has at least, so that a small problem, whose iterations cost little, goes on.

    Raises:
        ValueError: for a setting outside its range.

    Example:
        >>> import cronos_flax as cf
        >>> cf.Refreshed(precise_cg_steps=20)
        Refreshed(precise_cg_steps=20)
    """

    step_lengths: tuple[float, ...] = (2.0, 1.0, 0.5, 0.25, 0.1, 0.03, 0.0)
    damping_factors: tuple[float, ...] = (0.25, 0.25, 1.0, 2.0, 2.0, 2.0, 4.0)
    damping_range: tuple[float, float] = (1e-8, 1e8)
    norm_floor: float = 0.05
    cg_steps: int = 3
    precise_cg_steps: int = 10
    cg_tol: float = 0.1
    feature_rank: int = 48
    neuron_rank: int = 32
    rows_per_feature: int = 4
    few_rows: int = 2048
    sample_every: int = 10
    least_sample: int = 128
    most_sample: int = 65_536
    warm_up_every: int = 8
    least_warm_up: int = 512
    warm_up_steps: int = 8
    window: int = 10
    sampled_tol: float = 0.01
    least_gain: float = 0.005
    window_products: int = 4_000_000_000

    def __post_init__(self) -> None:
        super().__post_init__()
        lengths, factors, bounds = self.step_lengths, self.damping_factors, self.damping_range
        if len(lengths) != len(factors) or lengths[-1] != 0 or list(lengths) != sorted(set(lengths), reverse=True):
            raise ValueError(
                "Refreshed: `step_lengths` must decrease to 0 and have one entry for each of `damping_factors`, got "
                f"{lengths!r} and {factors!r}."
            )
        if len(bounds) != 2 or not 0 < bounds[0] <= bounds[1]:
            raise ValueError(f"Refreshed: `damping_range` must be (least, most) with 0 < least ≤ most, got {bounds!r}.")
        if self.least_sample > self.most_sample:
            raise ValueError(
                "Refreshed: `least_sample` must not exceed `most_sample`, got "
                f"{self.least_sample} and {self.most_sample}."
            )


@dataclasses.dataclass(frozen=True, repr=False)
class Held(_Settings):
    """Constants of ADMM, for ``gates="fixed"``, ``"paired"`` and ``"gated"`` (method.md, "Held gates").

    Args:
        over_relaxation: of the U-step, in (0, 2); ``cf.NystromPCG`` takes 1.
        kappa: κ = ρ/τ where there is a third split.
        check_every: iterations between two checks of the certificate.
        extrapolate_every: iterations between two Anderson extrapolations; ``cf.NystromPCG`` takes none.
        residual_ratio: ratio of the primal to the dual residual that ρ is steered to.
        least_adaptation: smaller factors leave ρ as it is, ``≥ 1``.
        most_adaptation: the largest factor that ρ is changed by.
        last_adaptation: the iteration after which ρ is held, for convergence needs finitely many changes.
        step_lengths: lengths that are tried on the way from the starting network to the solution of the program.

    Raises:
        ValueError: for a setting outside its range.

    Example:
        >>> import cronos_flax as cf
        >>> cf.Held(check_every=5)
        Held(check_every=5)
    """

    over_relaxation: float = 1.6
    kappa: float = 4.0
    check_every: int = 10
    extrapolate_every: int = 5
    residual_ratio: float = 0.1
    least_adaptation: float = 1.5
    most_adaptation: float = 4.0
    last_adaptation: int = 10_000
    step_lengths: tuple[float, ...] = (1.0, 0.5, 0.25, 0.1, 0.03, 0.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.over_relaxation < 2:
            raise ValueError(f"Held: `over_relaxation` must lie in (0, 2), got {self.over_relaxation!r}.")
        if self.step_lengths[-1] != 0:
            raise ValueError(f"Held: `step_lengths` must end with 0, got {self.step_lengths!r}.")
        if not 1 <= self.least_adaptation <= self.most_adaptation:
            raise ValueError(
                "Held: `least_adaptation` must lie in [1, most_adaptation], got "
                f"{self.least_adaptation!r} and {self.most_adaptation!r}."
            )
