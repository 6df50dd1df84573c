"""``cf.train``: the loop around a train state, with head solves, validation, callbacks and checkpoints."""

import contextlib
import dataclasses
import functools
import itertools
import math
import time
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from flax.training.train_state import TrainState
from jax import Array

from cronos_flax._alternation.defaults import SolveSchedule
from cronos_flax._alternation.guard import copied
from cronos_flax._alternation.position import Checkpoints, Position
from cronos_flax._alternation.sources import Arrays, Batches, source_of
from cronos_flax._alternation.steps import Door, balanced_weights, gradient_step, scoring
from cronos_flax._alternation.train_state import CronosTrainState
from cronos_flax._head.data import Batch, at, batches, check_repeatable
from cronos_flax._solver.arrays import is_array
from cronos_flax._solver.checks import all_finite, positive_integer
from cronos_flax._solver.loss import Loss
from cronos_flax._solver.losses import LOSSES, loss_of
from cronos_flax._solver.solution import Solution
from cronos_flax._solver.transfer import batch_on_device, default_key, folded, on_device, on_host

State = TypeVar("State", bound=TrainState)
Row = dict[str, float]


def train(
    state: State,
    data: Any,
    *,
    epochs: int,
    batch_size: int = 128,
    steps_per_epoch: int | None = None,
    solve_every: int | SolveSchedule | None = None,
    solve_rows: int | None = None,
    solve_data: Any = None,
    loss: str | Loss | None = None,
    unpack: Callable[[Any], tuple] | None = None,
    validation: Any = None,
    train_kwargs: Mapping[str, Any] | None = None,
    eval_kwargs: Mapping[str, Any] | None = None,
    rngs: Iterable[str] | Mapping[str, Array] = ("dropout",),
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
            :func:`cronos_flax.fit_head`, in the order in which they come. Batches without a row of positive weight are
            passed over.
        epochs: passes through the data, of the whole run.
        batch_size: rows of a gradient step, for arrays; rows that do not fill a batch are left out of the epoch.
        steps_per_epoch: batches of an epoch, for loaders that do not end; None means one pass. An epoch goes on where
            the last one ended, and data that end begin again, arrays in a new order.
        solve_every: steps between two head solves. None solves before each of the first five epochs, and then before
            every third. There is also a solve at the end.
        solve_rows: for arrays, the number of random rows of a solve. None means all rows; or, with ``solve_every``, as
            many as the steps between two solves take, at least 8,192. A solve takes at most 4 GB.
        solve_data: the rows of the solves, in the form of ``data``, if they are others: clean ones where ``data``
            augments. None means those of ``data``: for a loader one pass, or the first ``steps_per_epoch`` batches of
            one.
        loss: the loss of a row; gradients are those of its mean, weighted by ``unpack``'s weights and by the
            ``class_weight`` of ``state.solver``, as solves are. None means the loss of ``state.solver``.
        unpack: how to take a batch apart, as for :func:`cronos_flax.fit_head`.
        validation: rows to score after each epoch, and after the solve that follows it, in the form of ``data``; or a
            dict of several, by the prefix of their figures (a dict with arrays in it is one batch). If a state has
            ``eval_params`` (an average, or the result of ``optax.contrib.schedule_free_eval_params``), these are
            scored.
        train_kwargs: keyword arguments of ``apply_fn`` in a gradient step, such as ``{"train": True}``. The collections
            in ``state.model_state`` are mutable there, and there are the ``rngs``.
        eval_kwargs: keyword arguments of ``apply_fn`` in validation, such as ``{"train": False}``; None means those
            that the head was found with.
        rngs: the rng streams of gradient steps: names, whose keys come from ``key``; or a dict of keys. Each key is
            folded with the step.
        key: of the order of rows, rng streams and solves; None means a fixed one.
        callbacks: functions that are called with each row of the history as it is made.
        seconds: limit on the training time; the run ends when the time left is shorter than the last epoch took.
        directory: where the checkpoints of this run lie; a run that is there is resumed, if its settings and data are
            the same. A second run into it is refused meanwhile. Of data it knows shapes, dtypes and a checksum: of
            arrays up to 64 MB all rows, of larger ones 4,096 rows; of a loader the first batch, as far as it is the
            same when it is read twice.
        save_every: steps between checkpoints; None saves after each epoch.
        compile_first: compile before the clock starts, by a step and a solve whose results are not used; the first row
            of the history then has ``compile_seconds``.

    Returns:
        The state, and the history. The history is a list of flat dicts of numbers. There is one for each solve, with
        ``objective``, ``initial_objective``, ``solve_seconds`` (the pass for features included) and ``state.figures``;
        and one for each epoch, with ``loss`` (the mean over its batches), ``validation_loss`` and, if there are labels,
        ``validation_accuracy``, a share of rows. ``class_weight`` counts in losses, not in accuracies. Each has
        ``step``, ``epoch`` and ``seconds``, the training time with solves and without validation and checkpoints.

    Raises:
        ValueError: for arguments that do not fit, and for a ``directory`` with a run of other settings or data.
        FloatingPointError: if the loss is not finite at the first solve.
        BlockingIOError: if another process or run holds the ``directory``.
        OSError: if it cannot be written to; the checkpoints there are as before.

    Warns:
        UserWarning: if the parameters are no longer finite, and no guard goes back. They are not saved.

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
    _check_counts(optional=True, save_every=save_every, solve_rows=solve_rows, steps_per_epoch=steps_per_epoch)
    if seconds is not None and not (isinstance(seconds, int | float) and seconds > 0):
        raise ValueError(f"train: `seconds` must be a positive number, got {seconds!r}.")
    key = default_key() if key is None else key
    streams = _streams_of(rngs, key)
    source = source_of(data, unpack, batch_size, steps_per_epoch, key, "data")
    to_solve = source if solve_data is None else source_of(solve_data, unpack, batch_size, None, key, "solve_data")
    sets = _validation_sets(validation, unpack)
    settings: dict[str, Any] = {"batch_size": batch_size, "steps_per_epoch": steps_per_epoch}
    settings |= {"solve_rows": solve_rows, "loss": repr(loss), "rngs": _described(streams)}
    settings["solve_every"] = schedule if isinstance(schedule, int) else repr(schedule)
    settings["key"] = on_host(jax.random.key_data(key)).tolist()
    if not isinstance(state, CronosTrainState):
        schedule = None
    elif not isinstance(to_solve, Arrays):
        if solve_rows is not None:
            raise ValueError("train: `solve_rows` is for arrays, got a loader. Give the rows of solves as solve_data=.")
    elif solve_rows is None:
        between = schedule * batch_size if isinstance(schedule, int) else None
        solve_rows = to_solve.affordable(between, state.head)

    marks = {} if directory is None else {"data": source.fingerprint(), "solve_data": to_solve.fingerprint()}
    checkpoints = Checkpoints(directory, settings, marks, save_every)
    with checkpoints.held():
        state, position = checkpoints.resumed(state.replace(step=on_device(state.step)))  # Flax starts with an int
        door = Door(state, loss, train_kwargs or {}, streams)
        _check_what_is_in_memory(door, source, to_solve, sets, unpack)
        class_weight = None
        if isinstance(state, CronosTrainState) and state.solver.class_weight is not None:
            class_weight = on_device(balanced_weights(loss, map(door, source.once())))
        loop = _Loop(
            state=copied(state),  # the loop donates its own
            position=position,
            clock=_Clock(position.seconds),
            source=source,
            to_solve=to_solve,
            schedule=schedule,
            solve_rows=solve_rows,
            door=door,
            step=functools.partial(gradient_step(loss, train_kwargs), streams=streams, class_weight=class_weight),
            validate=_validation(sets, scoring(state, loss, eval_kwargs, unpack, class_weight)),
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


def _streams_of(rngs: Any, key: Array) -> dict[str, Array]:
    """The key of each rng stream."""
    try:
        if isinstance(rngs, Mapping):
            _described(rngs)  # they are keys
            return dict(rngs)
        if not isinstance(rngs, str):
            return {name: folded(key, np.uint32(zlib.crc32(name.encode()))) for name in rngs}
    except (TypeError, AttributeError):
        pass
    raise ValueError(f'train: `rngs` must be names, such as ("dropout",), or a dict of keys, got {rngs!r}.')


def _described(keys: Mapping[str, Array]) -> dict[str, list]:
    """Keys as JSON takes them."""
    return {name: on_host(jax.random.key_data(key)).tolist() for name, key in keys.items()}


def _validation_sets(validation: Any, unpack: Callable[[Any], tuple] | None) -> dict[str, tuple[str, Any]]:
    """The sets of validation rows by prefix, with what errors call them; what can be read only once is refused."""
    several = isinstance(validation, Mapping) and not any(map(is_array, validation.values()))
    given = validation if several else {"validation": validation}
    named = {prefix: (f"validation[{prefix!r}]" if several else "validation", rows) for prefix, rows in given.items()}
    sets = {prefix: (name, rows) for prefix, (name, rows) in named.items() if rows is not None}
    for name, rows in sets.values():
        check_repeatable(rows, unpack, "train", name)
    return sets


def _check_what_is_in_memory(
    door: Door,
    source: Arrays | Batches,
    to_solve: Arrays | Batches,
    sets: Mapping[str, tuple[str, Any]],
    unpack: Callable[[Any], tuple] | None,
) -> None:
    """Check all targets of arrays before training; those of loaders are checked as they come."""
    for name, each in {"solve_data": to_solve, "data": source}.items():
        if isinstance(each, Arrays) and (name == "data" or to_solve is not source):
            for batch in each.once():
                door(batch, at("train", name))
    for name, rows in sets.values():
        if isinstance(rows, tuple) and unpack is None:
            for batch in batches(rows, None, "train", name):
                door(batch, at("train", name))


def _validation(sets: Mapping[str, tuple[str, Any]], score: Callable[..., Row]) -> Callable[[Any], Row]:
    """A function that gives the figures of a state on the validation rows, each with its prefix."""

    def validate(state: Any) -> Row:
        scores = {prefix: score(state, rows, name) for prefix, (name, rows) in sets.items()}
        return {f"{prefix}_{figure}": value for prefix, row in scores.items() for figure, value in row.items()}

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
        source: of batches.
        to_solve: of rows to solve on.
        schedule: when to solve: every so many steps, or by epochs; None for a state without a head.
        solve_rows: rows of a solve; None for all.
        door: the check of a batch.
        step: the gradient step, of a state and a batch.
        validate: gives the figures of a state on the validation rows.
        key: of solves.
        callbacks: called with each row of the history.
        seconds: training time to keep to.
        checkpoints: of the run.
        losses: of this epoch's batches, not yet in ``position.loss_sum``: the loop does not wait for steps.
        lost: whether the parameters are no longer finite, and no guard goes back.
    """

    state: Any
    position: Position
    clock: _Clock
    source: Arrays | Batches
    to_solve: Arrays | Batches
    schedule: int | SolveSchedule | None
    solve_rows: int | None
    door: Door
    step: Callable[[Any, Batch], tuple[Any, Array]]
    validate: Callable[[Any], Row]
    key: Array
    callbacks: tuple[Callable[[Row], Any], ...]
    seconds: float | None
    checkpoints: Checkpoints
    losses: list[Array] = dataclasses.field(default_factory=list)
    lost: bool = False

    def compile(self) -> None:
        """Compile by a step and a solve on copies, then restart the clock."""
        began, position = time.perf_counter(), self.position
        for batch in itertools.islice(self.source.epoch(position.epoch, position.batch), 1):
            jax.block_until_ready(self.step(copied(self.state), batch_on_device(self.door(batch))))
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
            self.state, value = self.step(self.state, batch_on_device(self.door(batch)))
            self.losses.append(value)
            position.step, position.batch = position.step + 1, position.batch + 1
        self.sum_losses()
        if not position.batch:
            raise ValueError("train: `data` must have at least one batch with a row of positive weight, got none.")
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
        rows, unpack = self.to_solve.rows(step, self.solve_rows)
        return self.state.solve_head(rows, unpack=unpack, key=folded(self.key, step))

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
        before, after = (float(on_host(v)) for v in (solution.stats.initial_objective, solution.stats.objective))
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
        if self.lost:  # what is there is worth more
            return
        jax.block_until_ready(self.state)
        self.position.seconds = self.clock.seconds
        with self.clock.stopped():
            self.checkpoints.save(self.state, self.position)

    def sum_losses(self) -> None:
        """Wait for the losses of this epoch; say it if one has taken the parameters with it."""
        position, values = self.position, [float(value) for value in on_host(self.losses)]
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
            warnings.warn(
                f"train: the parameters are not finite any more: {seen}. Look for rows of that batch that are not "
                f"finite, or lower the optimizer's rate.{kept}",
                UserWarning,
                stacklevel=4,
            )

    def time_is_up(self) -> bool:
        """Whether another epoch like the last would take too long."""
        epoch_seconds = self.position.epoch_seconds
        return self.seconds is not None and epoch_seconds > 0 and self.clock.seconds + epoch_seconds > self.seconds
