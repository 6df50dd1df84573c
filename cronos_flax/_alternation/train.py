"""``cf.train``: the loop around a train state, with head solves, validation, callbacks and checkpoints."""

import contextlib
import dataclasses
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax.training.train_state import TrainState
from jax import Array

from cronos_flax._alternation.defaults import SolveSchedule
from cronos_flax._alternation.guard import copied
from cronos_flax._alternation.position import Checkpoints, Position
from cronos_flax._alternation.steps import Arrays, Batches, Step, gradient_step, scoring
from cronos_flax._alternation.train_state import CronosTrainState
from cronos_flax._solver.checks import positive_integer
from cronos_flax._solver.loss import Loss
from cronos_flax._solver.losses import LOSSES, loss_of
from cronos_flax._solver.solution import Solution

State = TypeVar("State", bound=TrainState)
Row = dict[str, float]


def train(
    state: State,
    data: Any,
    *,
    epochs: int,
    batch_size: int = 128,
    solve_every: int | SolveSchedule | None = None,
    solve_rows: int | None = None,
    loss: str | Loss | None = None,
    unpack: Callable[[Any], tuple] | None = None,
    validation: Any = None,
    train_kwargs: Mapping[str, Any] | None = None,
    eval_kwargs: Mapping[str, Any] | None = None,
    key: Array | None = None,
    callbacks: Iterable[Callable[[Row], Any]] = (),
    seconds: float | None = None,
    directory: str | Path | None = None,
    save_every: int | None = None,
    compile_first: bool = False,
) -> tuple[State, list[Row]]:
    """Train a module: gradient steps for the backbone, and head solves between them.

    An ordinary ``TrainState`` is trained by gradients alone, in the same loop: use it for comparisons.

    With a ``directory`` the run is saved as it goes, and the same call resumes it; on CPU to the bit.

    Args:
        state: a :class:`CronosTrainState`, or any ``flax.training.train_state.TrainState``; it is not changed, and its
            arrays are not donated.
        data: whole arrays ``(x, y)``, in a new order for each epoch; or a re-iterable of batches, as for
            :func:`cronos_flax.fit_head`, in the order in which they come.
        epochs: passes through the data, of the whole run.
        batch_size: rows of a gradient step, for arrays; rows that do not fill a batch are left out of the epoch.
        solve_every: steps between two head solves. None solves before each of the first five epochs, and then before
            every third. There is also a solve at the end.
        solve_rows: for arrays, the number of random rows of a solve. None means all rows; or, with ``solve_every``, as
            many as the steps between two solves take, at least 8,192. A solve takes at most 4 GB.
        loss: the loss of a row; gradients are those of its mean. None means that of ``state.solver``.
        unpack: how to take a batch apart, as for :func:`cronos_flax.fit_head`.
        validation: rows to score after each epoch, and after the solve that follows it, in the form of ``data``; or a
            dict of several, by the prefix of their figures. If a state has ``eval_params`` (an average, or the result
            of ``optax.contrib.schedule_free_eval_params``), these are scored.
        train_kwargs: keyword arguments of ``apply_fn`` in a gradient step, such as ``{"train": True}``. The collections
            in ``state.model_state`` are mutable there, and there is an rng ``"dropout"``.
        eval_kwargs: keyword arguments of ``apply_fn`` in validation, such as ``{"train": False}``; None means those
            that the head was found with.
        key: of the order of rows, dropout and solves; None means a fixed one.
        callbacks: functions that are called with each row of the history as it is made.
        seconds: limit on the training time; the run ends when the time left is shorter than the last epoch took.
        directory: where the checkpoints of this run lie; a run that is there is resumed.
        save_every: steps between checkpoints; None saves after each epoch.
        compile_first: compile before the clock starts, by a step and a solve whose results are not used; the first row
            of the history then has ``compile_seconds``.

    Returns:
        The state, and the history. The history is a list of flat dicts of numbers. There is one for each solve, with
        ``objective``, ``initial_objective``, ``solve_seconds`` (the pass for features included) and ``state.figures``;
        and one for each epoch, with ``loss`` (the mean over its batches), ``validation_loss`` and, if there are labels,
        ``validation_accuracy``. Each has ``step``, ``epoch`` and ``seconds``, the training time with solves and without
        validation and checkpoints.

    Raises:
        ValueError: for arguments that do not fit, and for a ``directory`` with a run of other settings.
        FloatingPointError: if the loss is not finite at the first solve.

    Example:
        >>> import jax, jax.numpy as jnp, flax.linen as nn, optax, cronos_flax as cf
        >>> x = jax.random.normal(jax.random.key(0), (600, 8))
        >>> y = (x[:, 0] * x[:, 1] > 0).astype(int)
        >>> model = nn.Sequential([nn.Dense(16), nn.tanh, nn.Dense(16), nn.relu, nn.Dense(2)])
        >>> params = model.init(jax.random.key(1), x)["params"]
        >>> state = cf.CronosTrainState.create(
        ...     apply_fn=model.apply, params=params, tx=optax.adam(1e-2),
        ...     head=cf.find_head(model, {"params": params}, x), solver=cf.Cronos(loss="softmax"),
        ... )
        >>> state, history = cf.train(state, (x[:500], y[:500]), epochs=3, validation=(x[500:], y[500:]))
        >>> [row["epoch"] for row in history if "objective" in row]  # solves
        [0, 1, 2, 3]
        >>> history[-1]["validation_accuracy"] > 0.7
        True
    """
    loss = _loss_for(state, loss)
    schedule: int | SolveSchedule | None = _schedule_for(solve_every)
    _check_counts(epochs=epochs, batch_size=batch_size)
    _check_counts(optional=True, save_every=save_every, solve_rows=solve_rows)
    if seconds is not None and not (isinstance(seconds, int | float) and seconds > 0):
        raise ValueError(f"train: `seconds` must be a positive number, got {seconds!r}.")
    key = jax.random.key(0) if key is None else key
    source = _source_of(data, batch_size, unpack, key)
    settings = {"batch_size": batch_size, "solve_rows": solve_rows, "loss": repr(loss)}
    settings["solve_every"] = schedule if isinstance(schedule, int) else repr(schedule)
    settings["key"] = np.asarray(jax.random.key_data(key)).tolist()
    if not isinstance(state, CronosTrainState):
        schedule = None
    elif solve_rows is None and isinstance(source, Arrays):
        solve_rows = source.affordable(schedule if isinstance(schedule, int) else None, state.head)

    checkpoints = Checkpoints(directory, settings, save_every)
    state, position = checkpoints.resumed(state.replace(step=jnp.asarray(state.step)))  # Flax starts with an int
    loop = _Loop(
        state=copied(state),  # the loop donates its own
        position=position,
        clock=_Clock(position.seconds),
        source=source,
        schedule=schedule,
        solve_rows=solve_rows,
        step=gradient_step(loss, train_kwargs),
        validate=_validation(validation, scoring(state, loss, eval_kwargs, unpack)),
        key=key,
        callbacks=tuple(callbacks),
        seconds=seconds,
        checkpoints=checkpoints,
    )
    if compile_first:
        loop.compile()
    over = position.epoch >= epochs or loop.time_is_up()
    while not over:
        over = loop.do_epoch(epochs)
    return loop.state, position.history


def _loss_for(state: Any, loss: str | Loss | None) -> Loss:
    """The loss given; None means that of the state's solver."""
    if not isinstance(state, TrainState):
        raise ValueError(
            f"train: `state` must be a CronosTrainState or another flax TrainState, got {type(state).__name__}."
        )
    if loss is None and isinstance(state, CronosTrainState):
        loss = state.solver.loss
    if not isinstance(loss, Loss) and loss not in LOSSES:
        raise ValueError(f"train: `loss` must be {' or '.join(map(repr, LOSSES))} or a cf.Loss, got {loss!r}.")
    return loss_of(loss)


def _schedule_for(solve_every: Any) -> int | SolveSchedule:
    """Steps between two solves, or the schedule by epochs; None means the default one."""
    if solve_every is None or isinstance(solve_every, SolveSchedule):
        return solve_every or SolveSchedule()
    positive_integer("train", "solve_every", solve_every)
    return int(solve_every)


def _check_counts(optional: bool = False, **counts: Any) -> None:
    """Raise a ValueError unless each is a positive integer or, if optional, None."""
    for name, value in counts.items():
        if value is not None or not optional:
            positive_integer("train", name, value)


def _source_of(data: Any, batch_size: int, unpack: Callable[[Any], tuple] | None, key: Array) -> Arrays | Batches:
    """Where batches come from."""
    if isinstance(data, tuple) and len(data) == 2 and unpack is None:
        return Arrays.of(*data, batch_size, key)
    if isinstance(data, Iterator):
        raise ValueError(
            "train: `data` must be re-iterable, got an iterator, which can be read only once. Give a list."
        )
    return Batches(data, unpack)


def _validation(validation: Any, score: Callable[[Any, Any], Row]) -> Callable[[Any], Row]:
    """A function that gives the figures of a state on the validation rows, each with its prefix."""
    named = validation if isinstance(validation, Mapping) else {"validation": validation}

    def validate(state: Any) -> Row:
        scores = {name: score(state, rows) for name, rows in named.items() if rows is not None}
        return {f"{name}_{figure}": value for name, row in scores.items() for figure, value in row.items()}

    return validate


class _Clock:
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


@dataclasses.dataclass
class _Loop:
    """A run of :func:`train` under way.

    Args:
        state: the train state.
        position: how far the run is.
        clock: of the training time.
        source: of batches, and of rows to solve on.
        schedule: when to solve: every so many steps, or by epochs; None for a state without a head.
        solve_rows: rows of a solve; None for all.
        step: the gradient step.
        validate: gives the figures of a state on the validation rows.
        key: of dropout and solves.
        callbacks: called with each row of the history.
        seconds: training time to keep to.
        checkpoints: of the run.
        losses: of this epoch's batches, not yet in ``position.loss_sum``: the loop does not wait for steps.
    """

    state: Any
    position: Position
    clock: _Clock
    source: Arrays | Batches
    schedule: int | SolveSchedule | None
    solve_rows: int | None
    step: Step
    validate: Callable[[Any], Row]
    key: Array
    callbacks: tuple[Callable[[Row], Any], ...]
    seconds: float | None
    checkpoints: Checkpoints
    losses: list[Array] = dataclasses.field(default_factory=list)

    def compile(self) -> None:
        """Compile by a step and a solve on copies, then restart the clock."""
        began, position = time.perf_counter(), self.position
        for batch in itertools.islice(self.source.epoch(position.epoch, position.batch), 1):
            jax.block_until_ready(self.step(copied(self.state), batch, self.key))
        if self.schedule is not None:
            jax.block_until_ready(self.solved()[0].params)
        compile_seconds = time.perf_counter() - began
        self.clock = _Clock(position.seconds)
        self.tell(compile_seconds=compile_seconds)

    def do_epoch(self, epochs: int) -> bool:
        """Run the rest of the epoch: gradient steps, due solves, validation, one history row.

        Returns:
            Whether it was the last epoch; the head is always solved for after that one.
        """
        position, began = self.position, self.clock.seconds
        for batch in self.source.epoch(position.epoch, position.batch):
            every = self.checkpoints.every
            if every is not None and position.step % every == 0 and position.batch:
                self.save()
            self.solve_if_due()
            self.state, value = self.step(self.state, batch, self.key)
            self.losses.append(value)
            position.step, position.batch = position.step + 1, position.batch + 1
        self.sum_losses()
        if not position.batch:
            raise ValueError("train: `data` must have at least one batch, got none.")
        jax.block_until_ready(self.state)
        position.epoch_seconds = self.clock.seconds - began + position.solve_seconds
        mean_loss = position.loss_sum / position.batch
        position.epoch, position.batch, position.loss_sum = position.epoch + 1, 0, 0.0
        # The next epoch's solve comes before this one's validation, which then sees a head that fits its backbone.
        self.solve_if_due()
        is_last = position.epoch >= epochs or self.time_is_up()
        self.solve_if_due(anyway=is_last)
        with self.clock.stopped():
            figures = self.validate(self.state)
        self.tell(loss=mean_loss, **figures)
        self.save()
        return is_last

    def solved(self) -> tuple[Any, Solution]:
        """The state with its head solved for, and the solution."""
        step = self.position.step
        rows, unpack = self.source.to_solve(step, self.solve_rows)
        return self.state.solve_head(rows, unpack=unpack, key=jax.random.fold_in(self.key, step))

    def solve_if_due(self, anyway: bool = False) -> None:
        """Solve for the head, with a row of the history; never twice at the same step."""
        position = self.position
        if self.schedule is None or position.last_solve_step == position.step:
            return
        if not (anyway or position.solve_is_due(self.schedule)):
            return
        jax.block_until_ready(self.state)  # steps under way are not the solve's time
        began = self.clock.seconds
        self.state, solution = self.solved()
        before, after = float(solution.stats.initial_objective), float(solution.stats.objective)
        position.last_solve_step, position.solve_seconds = position.step, self.clock.seconds - began
        self.tell(initial_objective=before, objective=after, solve_seconds=position.solve_seconds, **self.state.figures)

    def tell(self, **figures: float) -> None:
        """Add a row to the history, and call the callbacks with it."""
        jax.block_until_ready(self.state)
        position = self.position
        row = {"step": position.step, "epoch": position.epoch, "seconds": self.clock.seconds, **figures}
        position.history.append(row)
        with self.clock.stopped():
            for callback in self.callbacks:
                callback(row)

    def save(self) -> None:
        """A checkpoint, unless this step has one, or the run has no directory."""
        if not self.checkpoints.is_missing(self.position.step):
            return
        self.sum_losses()
        jax.block_until_ready(self.state)
        self.position.seconds = self.clock.seconds
        with self.clock.stopped():
            self.checkpoints.save(self.state, self.position)

    def sum_losses(self) -> None:
        """Wait for the losses of this epoch."""
        self.position.loss_sum = sum(map(float, self.losses), self.position.loss_sum)
        self.losses.clear()

    def time_is_up(self) -> bool:
        """Whether another epoch like the last would take too long."""
        epoch_seconds = self.position.epoch_seconds
        return self.seconds is not None and epoch_seconds > 0 and self.clock.seconds + epoch_seconds > self.seconds
