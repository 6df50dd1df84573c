"""The parts of an alternation, and its defaults: it solves again and again, and needs less of a solve than one fit."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax

from cronos_flax._head.head import Head
from cronos_flax._solver.checks import in_python, one_of, positive_integer, real_number
from cronos_flax._solver.cronos import Cronos
from cronos_flax._solver.user_warnings import warn

HEADS = ("moving", "frozen")
# The factor on the rate, as a function of the share of the run that is done.
DECAYS: dict[str | None, Callable[[float], float]] = {
    None: lambda done: 1.0,
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
    "linear": lambda done: 1 - done,
    "wsd": lambda done: min(0.05 + 19 * done, 1, 3 * (1 - done)),
}
_MAX_ITERS = 3
_BETA_RATIO = {"moving": 0.02, "frozen": 0.005}
_LARGEST_GROWTH = 16.0
_CHOOSE_BETA = 0.4
# The first epoch with a solve before it, how many have one each, and one in how many after these.
_SOLVES = {"moving": (1, 1, 10), "frozen": (0, 5, 3)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Alternation:
    """The parts of CRONOS-AM, given as ``alternation=`` to ``CronosTrainState.create`` or ``CronosOptimizer``.

    All parts lower one objective, ``F = loss + (β/2) (‖kernel1‖² + ‖kernel2‖²)``, with the head's two kernels (a solve
    also counts the hidden bias, see :class:`cronos_flax.Cronos`). Gradient steps lower it along the gradient. A solve
    lowers it in the head, where it is convex. ``Alternation(head="frozen", decay=None,
    largest_step=None)`` is the alternation of the paper, in which only solves move the head.

    Args:
        head: what gradient steps do to the head between solves. ``"moving"``: they move it with the backbone, on F, so
            the optimizer sees the gradient of its weight decay too; after a solve its first moments for the head begin
            anew. ``"frozen"``: it stands still. Then a weaker β does better: the default of ``beta_ratio`` is .02 for a
            moving head and .005 for a frozen one.
        first_epoch: of :func:`cronos_flax.train`: the epoch, from 0, before which the head is first solved for. None
            takes 1 for a moving head, so that it is not solved on features of random weights, and 0 for a frozen one;
            but that before which β is chosen (``choose_beta``), if it is less than ``then_every / 2`` later: a short
            run has no time for both. For a pretrained backbone call ``state.solve_head(data)`` before training.
        dense_epochs: of :func:`cronos_flax.train`: so many epochs from there on each have a solve before them, ``≥ 1``.
            None takes 1 for a moving head and 5 for a frozen one.
        then_every: after these, one solve in so many epochs, ``≥ 1``, but none in the last ``then_every / 2`` before
            that of the end, or around that which chooses β. None takes 10 for a moving head and 3 for a frozen one.
            There is a solve too after an epoch whose mean loss is above that of an earlier one, by more than a
            twentieth of the loss of the best constant outputs: where gradient steps have done harm, the guard goes
            back.
        decay: of :func:`cronos_flax.train`: how the rate of gradient steps falls to zero at the end of the run:
            ``"wsd"`` (warm-up, stable, decay) warms up over the first twentieth, stays, and falls over the last third;
            the others are ``"cosine"`` and ``"linear"``; None keeps the rate. It is left out for optimizers with a
            schedule of their own, and for schedule-free ones. (A schedule within ``optax.contrib``'s prodigy,
            dadapt_adamw and momo is not seen: say None.) In a loop of your own give the optimizer an Optax schedule.
        largest_step: how far one gradient step may move a kernel, as a share of its size, ``> 0``; None for no limit.
            The spectral norm of an update is at most this share of that of a random matrix as large as the kernel; a
            larger update is made smaller as a whole. So a rate that is too high for a layer (Adam at .003 on thousands
            of inputs of one sign, wide blocks) does not wreck it. The guard's rate and ``decay`` come on top. Biases
            and scales are not limited; but a step of L-BFGS is made smaller as a whole, with all kernels and biases.
        largest_growth: how many times larger the loss's gradient in the features (root mean square over rows) may be
            after the first solve than before it, ``> 0``. While it is larger, that solve is done again with twice the
            β. A gradient that is smaller than that of a head of fresh weights counts as such a one. None takes 16,
            and no limit (``math.inf``) for a solver with ``beta`` or ``beta_ratio`` of its own; that of another state
            has a ``beta_ratio``.
        choose_beta: of :func:`cronos_flax.train`, for arrays: the share of the run, ``> 0``, after which β is chosen,
            at the end of an epoch, by the loss on a tenth of the rows (2,000 at most) that neither steps nor solves
            have seen until then; see ``validation`` of :meth:`CronosTrainState.solve_head`. From there on they are rows
            like the others. All solves take as many rows as the first. None takes .4 for a moving head, and
            infinity, which is never, for a frozen one and for a solver with ``beta`` or ``beta_ratio`` of its own. β
            stays, too, with fewer than 500 rows or more than a GiB of them, with ``solve_data``, for a state that has
            been solved for before the run, and where the choice would come only after the last epoch. Rows of a loader
            cannot be told apart: in a loop of your own give ``validation`` to a solve.

    Raises:
        ValueError: for a setting outside its range.

    Example:
        >>> import cronos_flax as cf
        >>> cf.Alternation(head="frozen")
        Alternation(head='frozen', ...)

    References:
        Feng, Frangella, Pilanci, arXiv:2411.01088, for the frozen head.
    """

    head: str = "moving"
    first_epoch: int | None = None
    dense_epochs: int | None = None
    then_every: int | None = None
    decay: str | None = "wsd"
    largest_step: float | None = 0.02
    largest_growth: float | None = None
    choose_beta: float | None = None

    def __post_init__(self) -> None:
        one_of("Alternation", "head", self.head, HEADS)
        for name, least in (("first_epoch", 0), ("dense_epochs", 1), ("then_every", 1)):
            value = getattr(self, name)
            if value is not None:
                positive_integer("Alternation", name, value, least=least)
        if self.decay is not None:
            one_of("Alternation", "decay", self.decay, filter(None, DECAYS), "None")
        for name in ("largest_step", "largest_growth", "choose_beta"):
            limit = getattr(self, name)
            if limit is not None:
                real_number("Alternation", name, limit, "a number > 0 or None", lambda v: v > 0)
        in_python(self, *(field.name for field in dataclasses.fields(self)))

    def moves(self, head: Head) -> bool:
        """Whether gradient steps move this head; one without a backbone is only solved for."""
        return self.head == "moving" and head.frozen > 0

    def solve_is_due(
        self, epoch: int, end: float = math.inf, chooses_at: float = math.inf, first: int | None = None
    ) -> bool:
        """Whether a solve comes before this epoch; the first is number 0.

        Args:
            epoch: the epoch.
            end: their number. The end has a solve of its own.
            chooses_at: the epoch before which β is chosen, by a solve of its own. If ``first_epoch`` is None, there is
                none shortly before it; and shortly after it, as shortly before the end, none but those of dense epochs.
            first: the epoch before which the head was first solved for; None for the usual one.
        """
        given = first if self.first_epoch is None else self.first_epoch, self.dense_epochs, self.then_every
        first, dense, every = (
            usual if value is None else value for value, usual in zip(given, _SOLVES[self.head], strict=True)
        )
        ahead = chooses_at - epoch if self.first_epoch is None else math.inf
        if epoch < first or 0 <= ahead < every / 2:
            return False
        later = epoch - first - (dense - 1)  # than the last of the dense epochs
        return later <= 0 or (later % every == 0 and min(abs(ahead), end - epoch) >= every / 2)


def alternation_settings(where: str, alternation: Alternation | None, solver: Cronos, head: Head) -> Alternation:
    """The parts that a user asked for by ``alternation=``, None for the default ones; filled in as the head asks.

    Args:
        where: the caller's name.
        alternation: what was given.
        solver: the user's solver, as it was given.
        head: the head that it solves for.
    """
    alternation = Alternation() if alternation is None else alternation
    if not isinstance(alternation, Alternation):
        raise ValueError(f"{where}: `alternation` must be a cf.Alternation, got {type(alternation).__name__}.")
    is_free = head.frozen > 0 and solver.beta is None and solver.beta_ratio is None
    usual: dict[str, Any] = {
        "largest_growth": _LARGEST_GROWTH if is_free else math.inf,
        "choose_beta": _CHOOSE_BETA if is_free and alternation.moves(head) else math.inf,
    }
    missing = {name: value for name, value in usual.items() if getattr(alternation, name) is None}
    return dataclasses.replace(alternation, **missing)


# Of a state, whose user may have replaced the parts that were filled in.


def growth_limit(alternation: Alternation) -> float:
    """``largest_growth``."""
    return _LARGEST_GROWTH if alternation.largest_growth is None else alternation.largest_growth


def choosing_share(alternation: Alternation) -> float:
    """``choose_beta``."""
    usual = _CHOOSE_BETA if alternation.head == "moving" else math.inf
    return usual if alternation.choose_beta is None else alternation.choose_beta


def alternation_defaults(solver: Cronos, head: Head, alternation: Alternation) -> Cronos:
    """Fill in the settings of ``solver`` that are None.

    | setting                             | head moving | head frozen | single fit |
    |-------------------------------------|-------------|-------------|------------|
    | ``max_iters``, iterations per solve | 3           | 3           | 500        |
    | ``beta_ratio``, β / β_max           | .02         | .005        | .001       |

    A module that is nothing but its head has no backbone to alternate with: its solver stays as it is.

    Args:
        solver: the user's solver.
        head: the head that it solves for.
        alternation: the parts of the alternation.

    Returns:
        The solver of the alternation; ``print(state.solver)`` shows its settings.
    """
    if not head.frozen:
        return solver
    return dataclasses.replace(
        solver,
        max_iters=_MAX_ITERS if solver.max_iters is None else solver.max_iters,
        beta_ratio=_BETA_RATIO[alternation.head] if solver.beta_ratio is None else solver.beta_ratio,
    )


def warn_of_running_statistics(where: str, head: Head, statistics: Any) -> None:
    """Warn if a model has running statistics, and solves use them where gradient steps use those of the batch.

    Args:
        where: the caller's name.
        head: the head that is solved for.
        statistics: the running statistics of the model; empty if it has none.
    """
    if not jax.tree.leaves(statistics) or head.in_training or head.module.statistics is not None:
        return
    warn(
        f"{where}: `head` was found with the running statistics of batch norms, but training steps use those of the "
        "batch, so solves fit other features than gradients see; this can cost accuracy. Call find_head with "
        'statistics="batch"; or with statistics="running", if batch norms use these in training steps too, or if there '
        "are none: spectral norms keep such numbers too."
    )
