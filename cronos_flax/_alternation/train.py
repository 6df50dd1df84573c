"""``cf.train``: the loop around a train state, with head solves, validation, callbacks and checkpoints."""

import contextlib
import dataclasses
import functools
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

from cronos_flax._alternation.checkpoint import restored, save_checkpoint
from cronos_flax._alternation.guard import copied
from cronos_flax._alternation.train_state import CronosTrainState, module_params
from cronos_flax._head.features import Batch, batches, flat_targets, flat_weight
from cronos_flax._head.head import Head, selected
from cronos_flax._solver import checks
from cronos_flax._solver.losses import LOSSES, Logistic, Loss, Softmax, loss_of
from cronos_flax._solver.solution import Solution

State = TypeVar("State", bound=TrainState)
Row = dict[str, float]

_DENSE_EPOCHS, _THEN_EVERY = 5, 3  # a solve before each of the first epochs, then before every third
_GAIN_LOW, _GAIN_HIGH = 0.02, 0.1  # relative decrease of a solve below which the next one may wait, or must not
_LONGEST = 8  # epochs between solves
_LEAST_SOLVED = 8_192  # rows of a solve: of fewer, losses are too noisy for the guard to compare
_SOLVE_BYTES = 2**32  # of memory for a solve
_NEVER = "never"  # of a state without a head, what ``solve_every`` is
_KEEP = 3  # checkpoints
_KEPT_COMPILED = 16  # steps and scorings of other losses and models


@dataclasses.dataclass
class _Run:
    """Where a run stands between two steps; all of it is Python numbers, and is saved with the state.

    Args:
        step: gradient steps done.
        epoch: epochs done.
        batch: batches of the next epoch done.
        loss_sum: of their losses.
        next_solve_epoch: the epoch of the next solve, for ``solve_every="stale"``.
        interval: epochs between solves, likewise.
        last_solve_step: the step of the last solve.
        seconds: training time, solves included.
        solve_seconds: that the last solve took.
        epoch_seconds: that the last epoch took, and a solve after it.
        history: rows so far.
    """

    step: int = 0
    epoch: int = 0
    batch: int = 0
    loss_sum: float = 0.0
    next_solve_epoch: int = 0
    interval: int = 1
    last_solve_step: int = -1
    seconds: float = 0.0
    solve_seconds: float = 0.0
    epoch_seconds: float = 0.0
    history: list[Row] = dataclasses.field(default_factory=list)

    def solve_is_due(self, solve_every: int | str | None) -> bool:
        """Before the next step."""
        if isinstance(solve_every, int):
            return self.step % solve_every == 0
        if self.batch:
            return False
        if solve_every == "stale":
            return self.epoch >= self.next_solve_epoch
        return self.epoch < _DENSE_EPOCHS or (self.epoch - _DENSE_EPOCHS) % _THEN_EVERY == _THEN_EVERY - 1

    def solved(self, gain: float, seconds: float) -> None:
        """When to solve next, after a solve that lowered the loss by this fraction and took so long."""
        self.last_solve_step, self.solve_seconds = self.step, seconds
        if gain > _GAIN_HIGH:
            self.interval = max(self.interval // 2, 1)
        elif gain < _GAIN_LOW:
            self.interval = min(self.interval * 2, _LONGEST)
        self.next_solve_epoch = self.epoch + self.interval


@dataclasses.dataclass(frozen=True)
class _Arrays:
    """Rows in memory, in a new order for every epoch."""

    x: Any
    y: np.ndarray
    batch_size: int
    seed: int

    @classmethod
    def of(cls, x: Any, y: Any, batch_size: int, key: Array) -> "_Arrays":
        x, y = jax.tree.map(np.asarray, x), np.asarray(y)
        counts = {len(leaf) if leaf.ndim else 0 for leaf in (*jax.tree.leaves(x), y)}
        if len(counts) != 1 or 0 in counts:
            raise ValueError(
                "train: `data` = (x, y) must be arrays of equally many rows, at least one, got "
                f"{jax.tree.map(np.shape, (x, y))}."
            )
        return cls(x, y, min(batch_size, len(y)), int(jax.random.bits(key)))

    def take(self, rows: np.ndarray) -> tuple[Any, np.ndarray]:
        return jax.tree.map(lambda leaf: leaf[rows], self.x), self.y[rows]

    def epoch(self, epoch: int, start: int) -> Iterator[Batch]:
        """Its batches from number ``start`` on."""
        order = np.random.default_rng((self.seed, 0, epoch)).permutation(len(self.y))
        for i in range(start, len(order) // self.batch_size):
            x, y = self.take(order[i * self.batch_size : (i + 1) * self.batch_size])
            yield Batch.of((x,), {}, y)

    def to_solve(self, step: int, rows: int | None) -> tuple[Any, None]:
        """What a head solve takes, with its ``unpack``."""
        if rows is None or rows >= len(self.y):
            return (self.x, self.y), None
        rng = np.random.default_rng((self.seed, 1, step))
        return self.take(np.sort(rng.choice(len(self.y), rows, replace=False))), None

    def affordable(self, solve_every: int | str | None, head: Head) -> int:
        """Rows of a solve: no more than the gradient steps between two of them take, and than memory holds."""
        between = solve_every * self.batch_size if isinstance(solve_every, int) else len(self.y)
        return min(max(between, _LEAST_SOLVED), max(_SOLVE_BYTES // head.solve_bytes(1), 1))


@dataclasses.dataclass(frozen=True)
class _Batches:
    """Batches in the order in which they come."""

    data: Any
    unpack: Callable[[Any], tuple] | None

    def epoch(self, epoch: int, start: int) -> Iterator[Batch]:
        """Its batches from number ``start`` on."""
        del epoch
        return itertools.islice(batches(self.data, self.unpack), start, None)

    def to_solve(self, step: int, rows: int | None) -> tuple[Any, Callable[[Any], tuple] | None]:
        """What a head solve takes, with its ``unpack``."""
        del step, rows
        return self.data, self.unpack


def train(
    state: State,
    data: Any,
    *,
    epochs: int,
    batch_size: int = 128,
    solve_every: int | str | None = None,
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

    An ordinary ``TrainState`` is trained by gradients alone, in the same loop: that is how to compare.

    With a ``directory`` the run is saved as it goes, and the same call goes on where it stopped; on CPU to the bit.

    Args:
        state: a :class:`CronosTrainState`, or any ``flax.training.train_state.TrainState``; it is not changed, and its
            arrays are not donated.
        data: ``(x, y)``, whole arrays, shuffled anew for every epoch; or a re-iterable of batches, as for
            :func:`cronos_flax.fit_head`, taken in the order in which they come.
        epochs: passes through the data, of the whole run.
        batch_size: rows of a step, for arrays; rows that do not fill a batch are left out of the epoch.
        solve_every: when the head is solved for. None: at the start, after each of the first four epochs, and then
            after every third. An integer: every so many steps. ``"stale"``: after an epoch, at longer and longer
            intervals while solves gain little, and shorter ones when they gain much. In any case also at the end.
        solve_rows: for arrays, how many rows a solve takes, at random. None: all, if it is solved by epochs; as many
            as the steps between two solves take, at least 8,192, if by steps. Never more than a solve in 4 GB takes.
        loss: whose mean over rows the gradients are of; None for that of ``state.solver``.
        unpack: how to take a batch apart, as for :func:`cronos_flax.fit_head`.
        validation: rows for the figures after each epoch, and after the solve that follows it, in the form of ``data``;
            or a dict of several such, by the names that go before their figures. Where a state has ``eval_params`` (an
            average, or what ``optax.contrib.schedule_free_eval_params`` gives), these are what is validated.
        train_kwargs: keyword arguments of ``apply_fn`` in a gradient step, such as ``{"train": True}``. Collections in
            ``state.model_state`` are mutable there, and there is an rng ``"dropout"``.
        eval_kwargs: keyword arguments of ``apply_fn`` for validation, such as ``{"train": False}``; None for those that
            the head was found with.
        key: of the order of the rows, dropout and solves; None for a fixed one.
        callbacks: functions that are called with each row of the history as it is made.
        seconds: training time after which to end early: with the last epoch that leaves time for no other.
        directory: where checkpoints of this run go, and where it goes on from.
        save_every: steps between checkpoints; None saves after each epoch.
        compile_first: compile before the clock starts, by a step and a solve whose results are thrown away; the first
            row of the history then has the ``compile_seconds`` that it took.

    Returns:
        The state, and the history: rows of flat numbers, one for each solve (``objective``, ``initial_objective``,
        ``solve_seconds``, with the pass for features, and ``state.figures``), and one for each epoch
        (``loss``, the mean over its batches, ``validation_loss`` and, where there are labels, ``validation_accuracy``).
        Every row has ``step``, ``epoch`` and ``seconds``, the training time with solves and without validation and
        checkpoints.

    Raises:
        ValueError: for arguments that do not fit, naming the argument, what was expected and what came; also for a
            ``directory`` with a run of other settings.
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
    if seconds is not None and not (isinstance(seconds, int | float) and seconds > 0):
        raise ValueError(f"train: `seconds` must be a positive number, got {seconds!r}.")
    _check(epochs=epochs, batch_size=batch_size, save_every=save_every, solve_every=solve_every, solve_rows=solve_rows)
    key = jax.random.key(0) if key is None else key
    source: _Arrays | _Batches
    if isinstance(data, tuple) and len(data) == 2 and unpack is None:
        source = _Arrays.of(*data, batch_size, key)
    else:
        if isinstance(data, Iterator):
            raise ValueError(
                "train: `data` must be re-iterable, got an iterator, which can be read only once. Give a list."
            )
        source = _Batches(data, unpack)
    scored = validation if isinstance(validation, Mapping) else {"validation": validation}
    settings = {"batch_size": batch_size, "solve_every": solve_every, "solve_rows": solve_rows, "loss": repr(loss)}
    settings["key"] = np.asarray(jax.random.key_data(key)).tolist()

    head = state.head if isinstance(state, CronosTrainState) else None
    if solve_rows is None and head is not None and isinstance(source, _Arrays):
        solve_rows = source.affordable(solve_every, head)

    run, saved_at = _Run(step=int(state.step)), None
    state = state.replace(step=jnp.asarray(state.step))  # Flax starts with a Python number
    if directory is not None:
        state, saved_at, extra = restored(directory, state)
        if saved_at is not None:
            run = _Run(**_of_same_run(extra, settings, directory))
    loop = _Loop(
        state=copied(state),  # this function's own, and donated from here on
        run=run,
        clock=_Clock(run.seconds),
        source=source,
        step=_gradient_step(loss, _Keywords(train_kwargs or {})),
        score=scoring(state, loss, eval_kwargs, unpack),
        scored={name: rows for name, rows in scored.items() if rows is not None},
        key=key,
        solve_every=_NEVER if head is None else solve_every,
        solve_rows=solve_rows,
        callbacks=tuple(callbacks),
        seconds=seconds,
        directory=directory,
        settings=settings,
        save_every=save_every,
        saved_at=saved_at,
    )
    if compile_first:
        loop.compile()
    over = run.epoch >= epochs or loop.time_is_up()
    while not over:
        over = loop.do_epoch(epochs)
    return loop.state, run.history


@dataclasses.dataclass
class _Loop:
    """A run of :func:`train` in progress; arguments that are not named here are those of that.

    Args:
        run: where it stands.
        clock: of the training time.
        source: of batches, and of rows to solve on.
        step: what a gradient step is.
        score: what gives the figures of a state on rows.
        scored: the validation rows, by name.
        settings: what a run that goes on must have in common with the one that was saved.
        saved_at: the step of the newest checkpoint.
        losses: of this epoch, not in its sum yet: steps are not waited for.
    """

    state: Any
    run: _Run
    clock: "_Clock"
    source: _Arrays | _Batches
    step: Callable[[Any, Batch, Array], tuple[Any, Array]]
    score: Callable[[Any, Any], Row]
    scored: Mapping[str, Any]
    key: Array
    solve_every: int | str | None
    solve_rows: int | None
    callbacks: tuple[Callable[[Row], Any], ...]
    seconds: float | None
    directory: str | Path | None
    settings: dict[str, Any]
    save_every: int | None
    saved_at: int | None
    losses: list[Array] = dataclasses.field(default_factory=list)

    def compile(self) -> None:
        """What an epoch needs, by doing a step and a solve; the state stays as it is."""
        began = time.perf_counter()
        for batch in itertools.islice(self.source.epoch(self.run.epoch, self.run.batch), 1):
            jax.block_until_ready(self.step(copied(self.state), batch, self.key))
        if self.solve_every != _NEVER:
            jax.block_until_ready(self.solved()[0].params)
        compile_seconds = time.perf_counter() - began
        self.clock = _Clock(self.run.seconds)
        self.tell(compile_seconds=compile_seconds)

    def do_epoch(self, epochs: int) -> bool:
        """Gradient steps on all batches that are left of it, with the solves that are due, and its row.

        Returns:
            Whether it was the last, for which the head is always solved.
        """
        run, began = self.run, self.clock.seconds
        for batch in self.source.epoch(run.epoch, run.batch):
            if self.save_every is not None and run.step % self.save_every == 0 and run.batch:
                self.save()
            self.solve_if_due()
            self.state, value = self.step(self.state, batch, self.key)
            self.losses.append(value)
            run.step, run.batch = run.step + 1, run.batch + 1
        self.sum_up()
        if not run.batch:
            raise ValueError("train: `data` must have at least one batch, got none.")
        jax.block_until_ready(self.state)
        run.epoch_seconds = self.clock.seconds - began + run.solve_seconds
        mean_loss = run.loss_sum / run.batch
        run.epoch, run.batch, run.loss_sum = run.epoch + 1, 0, 0.0
        # Solves come before validation, which is then of a head that fits its backbone.
        self.solve_if_due()
        is_last = run.epoch >= epochs or self.time_is_up()
        self.solve_if_due(anyway=is_last)
        with self.clock.stopped():
            scores = {name: self.score(self.state, rows) for name, rows in self.scored.items()}
        self.tell(loss=mean_loss, **{f"{name}_{key}": row[key] for name, row in scores.items() for key in row})
        self.save()
        return is_last

    def solved(self) -> tuple[Any, Solution]:
        """The state with its head solved for."""
        rows, unpack = self.source.to_solve(self.run.step, self.solve_rows)
        return self.state.solve_head(rows, unpack=unpack, key=jax.random.fold_in(self.key, self.run.step))

    def solve_if_due(self, anyway: bool = False) -> None:
        """Solve for the head, and its row; not twice at the same step, and never without a head."""
        if self.solve_every == _NEVER or self.run.last_solve_step == self.run.step:
            return
        if not (anyway or self.run.solve_is_due(self.solve_every)):
            return
        jax.block_until_ready(self.state)  # steps under way are not the solve's time
        began = self.clock.seconds
        self.state, solution = self.solved()
        before, after = float(solution.stats.initial_objective), float(solution.stats.objective)
        self.run.solved(1 - after / before if before > 0 else 0.0, self.clock.seconds - began)
        solve_seconds = self.run.solve_seconds
        self.tell(initial_objective=before, objective=after, solve_seconds=solve_seconds, **self.state.figures)

    def tell(self, **figures: float) -> None:
        """A row of the history, also to the callbacks."""
        jax.block_until_ready(self.state)
        row = {"step": self.run.step, "epoch": self.run.epoch, "seconds": self.clock.seconds, **figures}
        self.run.history.append(row)
        with self.clock.stopped():
            for callback in self.callbacks:
                callback(row)

    def save(self) -> None:
        """A checkpoint, unless there is no place for it, or one of this step."""
        if self.directory is None or self.saved_at == self.run.step:
            return
        self.sum_up()
        jax.block_until_ready(self.state)
        with self.clock.stopped():
            self.run.seconds = self.clock.seconds
            extra = {"settings": self.settings, "run": dataclasses.asdict(self.run)}
            save_checkpoint(self.directory, self.state, self.run.step, extra=extra, keep=_KEEP)
        self.saved_at = self.run.step

    def sum_up(self) -> None:
        """Wait for the losses of this epoch."""
        self.run.loss_sum = sum(map(float, self.losses), self.run.loss_sum)
        self.losses.clear()

    def time_is_up(self) -> bool:
        """Whether another epoch like the last would take too long."""
        epoch_seconds = self.run.epoch_seconds
        return self.seconds is not None and epoch_seconds > 0 and self.clock.seconds + epoch_seconds > self.seconds


def _check(**counts: Any) -> None:
    """Each a positive integer, or, where that is a choice, None; ``solve_every`` also a word."""
    for name, value in counts.items():
        optional = name in ("save_every", "solve_every", "solve_rows")
        if not (optional and value is None) and not (name == "solve_every" and value == "stale"):
            checks.positive_integer("train", name, value)


def _loss_for(state: Any, loss: str | Loss | None) -> Loss:
    """The loss that is asked for, or else that of the state's solver."""
    if not isinstance(state, TrainState):
        raise ValueError(
            f"train: `state` must be a CronosTrainState or another flax TrainState, got {type(state).__name__}."
        )
    if loss is None and isinstance(state, CronosTrainState):
        loss = state.solver.loss
    if not isinstance(loss, Loss) and loss not in LOSSES:
        raise ValueError(f"train: `loss` must be {' or '.join(map(repr, LOSSES))} or a cf.Loss, got {loss!r}.")
    return loss_of(loss)


def _of_same_run(extra: Any, settings: dict[str, Any], directory: str | Path) -> dict[str, Any]:
    """Where the run that was saved stands."""
    if not isinstance(extra, dict) or set(extra) != {"settings", "run"}:
        raise ValueError(
            f"train: `directory` must hold a run of cf.train, got checkpoints of another kind in {directory}."
        )
    for name, value in settings.items():
        if extra["settings"].get(name) != value:
            raise ValueError(
                f"train: `directory` {directory} holds a run with {name}={extra['settings'].get(name)!r}, and this one "
                f"has {value!r}. Use the same, or another directory."
            )
    return extra["run"]


class _Clock:
    """Seconds of training."""

    def __init__(self, seconds: float) -> None:
        self._start = time.perf_counter() - seconds

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._start

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """While something runs that does not count."""
        since = time.perf_counter()
        yield
        self._start += time.perf_counter() - since


def _rows_of(out: Any, batch: Batch, output: Any, loss: Loss) -> tuple[Array, Array, Array]:
    """Outputs ``(rows, C)``, targets and weights, leading axes flattened."""
    out = selected(out, output)
    leading, C = out.shape[:-1], out.shape[-1]
    outputs = out.reshape(-1, C).astype(jnp.promote_types(out.dtype, jnp.float32))
    y = loss.targets(jnp.asarray(flat_targets(batch.y, leading, C)), C).astype(outputs.dtype)
    if batch.weight is None:
        return outputs, y, jnp.ones(len(outputs), outputs.dtype)
    return outputs, y, flat_weight(batch.weight, leading).astype(outputs.dtype)


def _output_of(state: TrainState) -> Any:
    return state.head.module.output if isinstance(state, CronosTrainState) else None


def _collections(state: TrainState) -> Any:
    return getattr(state, "model_state", {})


class _Keywords(dict):
    """Keyword arguments that hash: by value where values do, else by identity."""

    def __hash__(self) -> int:  # type: ignore[override]
        try:
            return hash(frozenset(self.items()))
        except TypeError:
            return id(self)

    def __eq__(self, other: object) -> bool:
        try:
            hash(frozenset(self.items()))
        except TypeError:
            return self is other
        return dict.__eq__(self, other)


@functools.lru_cache(maxsize=_KEPT_COMPILED)  # so that a sweep compiles once
def _gradient_step(loss: Loss, kwargs: _Keywords) -> Callable[[Any, Batch, Array], tuple[Any, Array]]:
    """One step of the optimizer on the mean loss of a batch, as in any Flax loop."""

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: Any, batch: Batch, key: Array) -> tuple[Any, Array]:
        collections = _collections(state)
        mutable = list(collections)

        def mean_loss(params: Any) -> tuple[Array, Any]:
            out = state.apply_fn(
                {"params": params, **collections},
                *batch.args,
                rngs={"dropout": jax.random.fold_in(key, state.step)},
                **({"mutable": mutable} if mutable else {}),
                **{**kwargs, **batch.kwargs},
            )
            out, updates = out if mutable else (out, {})
            outputs, y, weight = _rows_of(out, batch, _output_of(state), loss)
            return weight @ loss.value(outputs, y) / jnp.sum(weight), updates

        (value, updates), grads = jax.value_and_grad(mean_loss, has_aux=True)(module_params(state.params))
        structure = jax.tree.structure(collections)
        changed = {"model_state": jax.tree.unflatten(structure, jax.tree.leaves(updates))} if mutable else {}
        return state.apply_gradients(grads=grads, **changed), value

    return step


def scoring(
    state: TrainState, loss: Loss, kwargs: Mapping[str, Any] | None, unpack: Callable[[Any], tuple] | None = None
) -> Callable[[Any, Any], Row]:
    """A function of a state and rows: their mean loss and, where there are labels, accuracy in [0, 1]."""
    if kwargs is None:
        kwargs = state.head.kwargs if isinstance(state, CronosTrainState) else {}
    kwargs = _Keywords({name: value for name, value in kwargs.items() if name != "mutable"})
    sums = _sums(state.apply_fn, _output_of(state), loss, kwargs)

    def score(state: Any, rows: Any) -> Row:
        params = getattr(state, "eval_params", None)
        params = module_params(state.params) if params is None else params
        each = [sums(params, _collections(state), batch) for batch in batches(rows, unpack)]
        total, hits, count, labelled = map(np.asarray, zip(*each, strict=True))
        figures = {"loss": float(total.sum() / count.sum())}
        if labelled.all():
            figures["accuracy"] = float(hits.sum() / count.sum())
        return figures

    return score


@functools.lru_cache(maxsize=_KEPT_COMPILED)
def _sums(apply_fn: Callable, output: Any, loss: Loss, kwargs: _Keywords) -> Callable[..., tuple[Array, ...]]:
    """Of a batch: the sums of losses, of rows that are right, and of weights; and whether there are labels."""

    @jax.jit
    def sums(params: Any, collections: Any, batch: Batch) -> tuple[Array, Array, Array, Array]:
        out = apply_fn({"params": params, **collections}, *batch.args, **{**kwargs, **batch.kwargs})
        outputs, y, weight = _rows_of(out, batch, output, loss)
        if outputs.shape[1] > 1:
            hits = jnp.argmax(outputs, axis=1) == jnp.argmax(y, axis=1)
        else:
            hits = (outputs[:, 0] > 0) == (y[:, 0] > (0.5 if isinstance(loss, Logistic) else 0))
        takes_labels = isinstance(loss, Softmax) or (isinstance(loss, Logistic) and outputs.shape[1] == 1)
        labelled = takes_labels | jnp.all(jnp.abs(y) == 1)
        return weight @ loss.value(outputs, y), weight @ hits.astype(weight.dtype), jnp.sum(weight), labelled

    return sums
