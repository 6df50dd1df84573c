"""A run of ``cf.train`` under way: its epochs, its clock, its solves and its history."""

import contextlib
import dataclasses
import math
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax import Array

from cronos_flax._alternation.batch_check import BatchCheck
from cronos_flax._alternation.defaults import Alternation
from cronos_flax._alternation.position import Checkpoints, Position
from cronos_flax._alternation.sources import Arrays, Batches, HeldBack
from cronos_flax._head.data import Batch
from cronos_flax._solver.checks import all_finite
from cronos_flax._solver.meshes import automatically
from cronos_flax._solver.processes import agreed
from cronos_flax._solver.solution import Solution, Status
from cronos_flax._solver.transfer import batch_on_device, copied, folded, on_device, on_host
from cronos_flax._solver.user_warnings import warn

Row = dict[str, float]
_FIRST = 20  # gradient steps after a solve that are looked at
_CLEARLY = 17  # of these: by chance one time in 776


class Clock:
    """Seconds of training."""

    def __init__(self, seconds: float) -> None:
        self._start = time.perf_counter() - seconds

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._start

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """While something runs that is not training."""
        since = time.perf_counter()
        yield
        self._start += time.perf_counter() - since


@dataclasses.dataclass(frozen=True)
class LastSolve:
    """What a solve said of the loss, which gradient steps may contradict.

    Args:
        before: how many losses of gradient steps were there, of its epoch, when the head was solved for.
        objective: the regularised loss at its end; NaN if it was rejected.
        null: the loss of the best constant outputs.
    """

    before: int
    objective: float
    null: float


class AfterSolves:
    """Losses of the gradient steps that came first after a solve; of several solves where there are few between two."""

    def __init__(self) -> None:
        self._solves: list[LastSolve] = []  # the one under way, and those of this epoch
        self._seen: list[tuple[float, float, float]] = []  # losses, and what their solve had said
        self._looked_at = 0  # steps after the solve under way

    def solved(self, solve: LastSolve) -> None:
        """A solve before the next step."""
        self._solves.append(solve)

    def contradicted(self, losses: list[float]) -> str | None:
        """What to tell the user if constant outputs fit better in the first steps after solves, and not by chance.

        Args:
            losses: of all steps of the epoch.
        """
        for i, solve in enumerate(self._solves):
            end = self._solves[i + 1].before if i + 1 < len(self._solves) else len(losses)
            self._looked_at = 0 if i else self._looked_at
            first = losses[solve.before : end][: max(_FIRST - self._looked_at, 0)]
            self._looked_at += len(first)
            if math.isfinite(solve.objective):
                self._seen += [(loss, solve.objective, solve.null) for loss in first]
        self._solves = [dataclasses.replace(solve, before=0) for solve in self._solves[-1:]]
        told = None
        while told is None and len(self._seen) >= _FIRST:
            told = _contradiction(np.asarray(self._seen[:_FIRST]))
            del self._seen[:_FIRST]
        return told


def _contradiction(seen: np.ndarray) -> str | None:
    """What to tell of steps whose loss, objective of the solve and loss of the best constant are columns."""
    after, objective, null = seen.T
    if np.sum(after > objective) < _CLEARLY or not np.median(after) > np.median(null):
        return None
    return (
        f"train: in the first gradient steps after a solve, {_FIRST} in all, the median of the loss was "
        f"{np.median(after):.4g}, above {np.median(null):.4g} of the best constant outputs; the solve had ended at "
        f"{np.median(objective):.4g}. A solve does not see the noise of dropout, which large weights of the head "
        "enlarge: give the solver a larger beta_ratio. Nor does it see what the module does in training only "
        "(train_kwargs) behind the head, such as a scale. Else lower the optimizer's rate."
    )


_STAND_STILL = (
    "train: `train_kwargs` must call the module as in training, such as {'train': True}, for its head was found on the "
    "statistics of the batch, got a call that leaves the running statistics as they are: gradient steps see other "
    'features than solves. If they should take the running statistics, find the head with statistics="running".'
)


@dataclasses.dataclass
class Loop:
    """A run of :func:`train` under way.

    Args:
        state: the train state.
        position: how far the run is.
        clock: of the training time.
        source: of batches.
        to_solve: of rows to solve on.
        held_back: rows that the first part of the run does not see; None if there are none.
        schedule: when to solve: every so many steps, or by epochs; None for a state without a head.
        decay: the factor on the rate, of the share of the run that is done; None for none.
        epochs: of the whole run.
        solve_rows: rows of a solve; None for all.
        check: the check of a batch.
        step: the gradient step, of a state, a batch and the factor on the rate.
        validate: gives the figures of a state on the validation rows.
        key: of solves.
        callbacks: called with each row of the history.
        seconds: training time to keep to.
        checkpoints: of the run.
        keep_best: the figure of validation by which the best state is kept; None for none.
        best: the best state so far.
        losses: of this epoch's batches, not yet in ``position.loss_sum``: the loop does not wait for steps.
        after: losses of gradient steps after solves.
        accepted_at: the step of the last solve that was accepted in this process; -1 without one.
        told: whether the user knows that gradient steps contradict a solve.
        lost: whether the parameters are no longer finite, and no guard goes back.
    """

    state: Any
    position: Position
    clock: Clock
    source: Arrays | Batches
    to_solve: Arrays | Batches
    held_back: HeldBack | None
    schedule: int | Alternation | None
    decay: Callable[[float], float] | None
    epochs: int
    solve_rows: int | None
    check: BatchCheck
    step: Callable[[Any, Batch, Array | None], tuple[Any, Array]]
    validate: Callable[[Any], Row]
    key: Array
    callbacks: tuple[Callable[[Row], Any], ...]
    seconds: float | None
    checkpoints: Checkpoints
    keep_best: str | None = None
    best: Any = None
    losses: list[Array] = dataclasses.field(default_factory=list)
    after: AfterSolves = dataclasses.field(default_factory=AfterSolves)
    accepted_at: int = -1
    told: bool = False
    lost: bool = False

    def compile(self) -> None:
        """Compile by a solve and a step on copies, then restart the clock.

        The step comes last: of a loader with one iterator a solve would end what the epoch goes on with.
        """
        began, position = time.perf_counter(), self.position
        if self.schedule is not None:
            choice = {} if self.rest is None or self.held_back is None else {"validation": self.held_back.rows}
            with warnings.catch_warnings(action="ignore"):  # of a solve that is not the user's
                jax.block_until_ready(self.solved(self.state._with_dead_neuron(), **choice)[0].params)
        if (batch := (self.rest or self.source).ahead(position.epoch, position.batch)) is not None:
            jax.block_until_ready(self.stepped(copied(self.state), batch))
        all_finite(self.state.params)
        compile_seconds = time.perf_counter() - began
        self.clock = Clock(position.seconds)
        self.tell(compile_seconds=compile_seconds)

    def batches(self) -> Iterator[Batch]:
        """Those of this epoch that are not done."""
        return (self.rest or self.source).epoch(self.position.epoch, self.position.batch)

    @property
    def rest(self) -> Arrays | None:
        """The rows that there are while others are held back."""
        return self.held_back.rest if self.held_back is not None and self.position.holds_back else None

    @property
    def chooses_at(self) -> float:
        """The epoch before which β is chosen; infinity if it is not."""
        if self.position.chosen_at is not None:
            return self.position.chosen_at
        held = None if self.rest is None else self.held_back
        return math.inf if held is None else math.ceil(held.until * self.epochs)

    def stepped(self, state: Any, batch: Batch) -> tuple[Any, Array]:
        """The state after a gradient step, and the loss."""
        factor = None if self.decay is None else on_device(self.decay(self.share_done()), np.float32)
        return self.step(state, batch_on_device(self.check(batch)), factor)

    def share_done(self) -> float:
        """How much of the run is done, of its epochs or of its seconds."""
        done = self.position.share_done(self.epochs)
        return done if self.seconds is None else max(done, min(agreed(self.clock.seconds) / self.seconds, 1.0))

    def do_epoch(self) -> bool:
        """Run the rest of the epoch: gradient steps, due solves, validation, one history row.

        Returns:
            Whether it was the last epoch; the head is always solved for after that one.
        """
        position, began = self.position, self.clock.seconds
        for batch in self.batches():
            every = self.checkpoints.every
            if every is not None and position.step % every == 0 and position.batch:
                self.save()
            self.solve_if_due()
            before = self.statistics_of_batches() if position.step == 0 else []
            self.state, value = self.stepped(self.state, batch)
            if before and same(before, self.statistics_of_batches()) and self.leaves_statistics(batch):
                warn(_STAND_STILL)
            self.losses.append(value)
            position.step, position.batch = position.step + 1, position.batch + 1
        self.sum_losses()
        if not position.batch:
            assert isinstance(self.source, Batches)  # arrays have rows
            raise self.source.empty()
        jax.block_until_ready(self.state)
        position.epoch_seconds = self.clock.seconds - began + position.solve_seconds
        mean_loss = position.loss_sum / position.batch
        position.epoch, position.batch, position.batches = position.epoch + 1, 0, position.batch
        position.loss_sum = 0.0
        harmed = isinstance(self.schedule, Alternation) and position.has_risen(mean_loss)
        # The next epoch's solve comes before this one's validation, which then sees a head that fits its backbone.
        self.choose_if_due()
        self.solve_if_due(anyway=harmed)
        if harmed and self.accepted_at == position.step:
            self.compare_from_here()
        is_last = position.epoch >= self.epochs or self.time_is_up()
        position.holds_back = position.holds_back and not is_last
        self.solve_if_due(anyway=is_last)
        with self.clock.stopped():
            figures = self.validate(self.state)
        self.tell(loss=mean_loss, **figures)
        self.keep_if_best()
        self.save()
        return is_last

    def keep_if_best(self) -> None:
        """Keep a copy of the state if its figure of validation is the best so far."""
        name, position = self.keep_best, self.position
        if name is None or self.lost:
            return
        if name not in position.history[-1]:
            raise without_labels(name)
        if position.is_best_by(name):
            with self.clock.stopped():
                self.best, position.best_step = copied(self.state), position.step

    def statistics_of_batches(self) -> list[np.ndarray]:
        """The running statistics, which gradient steps change if their batch norms see what solves see: a batch."""
        head = getattr(self.state, "head", None)
        is_seen = head is not None and head.in_training
        return on_host(jax.tree.leaves(self.state.model_state.get("batch_stats", {}))) if is_seen else []

    def leaves_statistics(self, batch: Batch) -> bool:
        """Whether a gradient step leaves the running statistics as they are, whatever they are.

        Those of the batch itself stay where they are in any step.
        """
        state = copied(self.state)
        shifted = automatically(_shifted, state.model_state["batch_stats"])
        before = on_host(jax.tree.leaves(shifted))
        state = state.replace(model_state={**state.model_state, "batch_stats": shifted})
        after, _ = self.stepped(state, batch)
        return same(before, on_host(jax.tree.leaves(after.model_state["batch_stats"])))

    def solved(self, state: Any, **choice: Any) -> tuple[Any, Solution]:
        """A state with its head solved for, and the solution."""
        step = self.position.step
        rows, unpack = (self.rest or self.to_solve).rows(step, self.solve_rows)
        return state.solve_head(rows, unpack=unpack, key=folded(self.key, step), **choice)

    def choose_if_due(self) -> None:
        """Solve for the head with β chosen on the rows that are held back, which then join the others."""
        position, schedule = self.position, self.schedule
        if self.rest is None or self.held_back is None or schedule is None:
            return
        is_first = position.last_solve_step < 0
        may_be_first = isinstance(schedule, Alternation) and schedule.first_epoch is None
        may_be_first = may_be_first or position.solve_is_due(schedule, self.epochs)
        if self.share_done() >= self.held_back.until and (may_be_first or not is_first):
            self.solve(validation=self.held_back.rows)
            position.holds_back, position.chosen_at = False, position.epoch
            self.compare_from_here()

    def compare_from_here(self) -> None:
        """Take the losses of epochs from here on as they are: the guard has accepted what raised them."""
        self.position.compared_from = len(self.position.history)

    def solve_if_due(self, anyway: bool = False) -> None:
        """Solve for the head, with a row of the history; never twice at the same step."""
        position = self.position
        if self.schedule is None or position.last_solve_step == position.step:
            return
        if anyway or position.solve_is_due(self.schedule, self.epochs, self.chooses_at):
            self.solve()

    def solve(self, **choice: Any) -> None:
        """Solve for the head, with a row of the history."""
        position = self.position
        jax.block_until_ready(self.state)  # steps under way are not the solve's time
        began = self.clock.seconds
        self.state, solution = self.solved(self.state, **choice)
        stats = solution.stats
        before, after, null = (float(on_host(v)) for v in (stats.initial_objective, stats.objective, stats.null_loss))
        is_rejected = solution.status is Status.rejected
        self.accepted_at = self.accepted_at if is_rejected else position.step
        self.after.solved(LastSolve(len(self.losses), math.nan if is_rejected else after, null))
        position.last_solve_step, position.solve_seconds = position.step, self.clock.seconds - began
        position.null_loss = null
        figures = {"initial_objective": before, "objective": after, "beta": float(on_host(stats.beta))}
        self.tell(**figures, solve_seconds=position.solve_seconds, **self.state.figures)

    def tell(self, **figures: float) -> None:
        """Add a row to the history, and call the callbacks with copies of it."""
        jax.block_until_ready(self.state)
        position = self.position
        row = {"step": position.step, "epoch": position.epoch, "seconds": self.clock.seconds, **figures}
        position.history.append(row)
        with self.clock.stopped():
            for callback in self.callbacks:
                callback(dict(row))

    def save(self) -> None:
        """A checkpoint, unless this step has one, or the run has no directory."""
        if not self.checkpoints.is_missing(self.position.step):
            return
        self.sum_losses()
        if self.lost:  # what is there is worth more
            return
        jax.block_until_ready(self.state)
        self.position.seconds = self.clock.seconds
        with self.clock.stopped():
            self.checkpoints.save(self.state, self.position)

    def sum_losses(self) -> None:
        """Wait for the losses of this epoch; say it if they contradict a solve, or if parameters are not finite."""
        position, values = self.position, [float(value) for value in on_host(self.losses)]
        contradicted = self.after.contradicted(values)
        if contradicted and not self.told:
            self.told = True
            warn(contradicted)
        self.losses.clear()
        position.loss_sum = sum(values, position.loss_sum)
        if self.lost or getattr(self.state, "guard", None) is not None:
            return
        self.lost = not all_finite(self.state.params)
        if self.lost:
            kept = "" if self.checkpoints.directory is None else " They are not saved: checkpoints stay as they are."
            bad = next((i for i, value in enumerate(values) if not math.isfinite(value)), None)
            seen = f"after step {position.step}, whose own loss was finite"
            if bad is not None:
                number = position.batch - len(values) + bad
                seen = f"the loss of batch {number} of epoch {position.epoch} was {values[bad]} (both from 0)"
            warn(
                f"train: the parameters are not finite any more: {seen}. Look for rows of that batch that are not "
                f"finite, or lower the optimizer's rate.{kept}"
            )

    def time_is_up(self) -> bool:
        """Whether another epoch like the last would take too long."""
        epoch_seconds = self.position.epoch_seconds
        if self.seconds is None:
            return False
        return agreed(self.clock.seconds + epoch_seconds if epoch_seconds > 0 else 0.0) > self.seconds


def without_labels(keep_best: str) -> ValueError:
    """What to raise for an accuracy to keep the best of where rows have no labels."""
    loss = f"{keep_best.removesuffix('_accuracy')}_loss"
    return ValueError(
        f"train: `keep_best` must be a figure that there is, got {keep_best!r}: its rows have no labels. Give {loss!r}."
    )


def same(one: list[np.ndarray], two: list[np.ndarray]) -> bool:
    """Whether two lists of arrays are equal."""
    return all(map(np.array_equal, one, two))


@jax.jit
def _shifted(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf + 1, tree)
