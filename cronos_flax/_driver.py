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

from cronos_flax import _checks
from cronos_flax._checkpoint import restored, save_checkpoint
from cronos_flax._features import Batch, batches, flat_targets
from cronos_flax._find import selected
from cronos_flax._guard import copied
from cronos_flax._losses import LOSSES, Logistic, Loss, Softmax, loss_of
from cronos_flax._solution import Solution
from cronos_flax._train_state import CronosTrainState, module_params

State = TypeVar("State", bound=TrainState)
Row = dict[str, float]

_DENSE_EPOCHS, _THEN_EVERY = 5, 3  # a solve before each of the first epochs, then before every third
_GAIN_LOW, _GAIN_HIGH = 0.02, 0.1  # relative decrease of a solve below which the next one may wait, or must not
_LONGEST = 8  # epochs between solves
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
        solve_at: the epoch of the next solve, for ``solve_every="stale"``.
        interval: epochs between solves, likewise.
        seconds: training time, solves included.
        solve_seconds: that the last solve took.
        epoch_seconds: that the last epoch took, and a solve after it.
        history: rows so far.
    """

    step: int = 0
    epoch: int = 0
    batch: int = 0
    loss_sum: float = 0.0
    solve_at: int = 0
    interval: int = 1
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
            return self.epoch >= self.solve_at
        return self.epoch < _DENSE_EPOCHS or (self.epoch - _DENSE_EPOCHS) % _THEN_EVERY == _THEN_EVERY - 1

    def solved(self, gain: float, seconds: float) -> None:
        """When to solve next, after a solve that lowered the loss by this fraction and took so long."""
        self.solve_seconds = seconds
        if gain > _GAIN_HIGH:
            self.interval = max(self.interval // 2, 1)
        elif gain < _GAIN_LOW:
            self.interval = min(self.interval * 2, _LONGEST)
        self.solve_at = self.epoch + self.interval


@dataclasses.dataclass(frozen=True)
class _Arrays:
    """Rows in memory, in a new order for every epoch."""

    x: Any
    y: np.ndarray
    batch_size: int
    solve_rows: int | None
    seed: int

    @classmethod
    def of(cls, x: Any, y: Any, batch_size: int, solve_rows: int | None, key: Array) -> "_Arrays":
        x, y = jax.tree.map(np.asarray, x), np.asarray(y)
        counts = {len(leaf) if leaf.ndim else 0 for leaf in (*jax.tree.leaves(x), y)}
        if len(counts) != 1 or 0 in counts:
            raise ValueError(
                "train: `data` = (x, y) must be arrays of equally many rows, at least one, got "
                f"{jax.tree.map(np.shape, (x, y))}."
            )
        return cls(x, y, min(batch_size, len(y)), solve_rows, int(jax.random.bits(key)))

    def take(self, rows: np.ndarray) -> tuple[Any, np.ndarray]:
        return jax.tree.map(lambda leaf: leaf[rows], self.x), self.y[rows]

    def epoch(self, epoch: int, start: int) -> Iterator[Batch]:
        """Its batches from number ``start`` on."""
        order = np.random.default_rng((self.seed, 0, epoch)).permutation(len(self.y))
        for i in range(start, len(order) // self.batch_size):
            x, y = self.take(order[i * self.batch_size : (i + 1) * self.batch_size])
            yield Batch.of((x,), {}, y)

    def to_solve(self, step: int) -> tuple[Any, None]:
        """What a head solve takes, with its ``unpack``."""
        if self.solve_rows is None or self.solve_rows >= len(self.y):
            return (self.x, self.y), None
        rng = np.random.default_rng((self.seed, 1, step))
        return self.take(np.sort(rng.choice(len(self.y), self.solve_rows, replace=False))), None


@dataclasses.dataclass(frozen=True)
class _Batches:
    """Batches in the order in which they come."""

    data: Any
    unpack: Callable[[Any], tuple] | None

    def epoch(self, epoch: int, start: int) -> Iterator[Batch]:
        """Its batches from number ``start`` on."""
        del epoch
        return itertools.islice(batches(self.data, self.unpack), start, None)

    def to_solve(self, step: int) -> tuple[Any, Callable[[Any], tuple] | None]:
        """What a head solve takes, with its ``unpack``."""
        del step
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
        solve_every: when the head is solved for. None: before each of the first five epochs, then before every third.
            An integer: every so many steps. ``"stale"``: before an epoch, after longer and longer intervals while
            solves gain little, and shorter ones when they gain much. In any case also at the end.
        solve_rows: for arrays, how many rows a solve takes, at random; None for all.
        loss: whose mean over rows the gradients are of; None for that of ``state.solver``.
        unpack: how to take a batch apart, as for :func:`cronos_flax.fit_head`.
        validation: rows for the figures after each epoch, in the form of ``data``; or a dict of several such, by the
            names that go before their figures. Where a state has ``eval_params`` (an average, or what
            ``optax.contrib.schedule_free_eval_params`` gives), these are what is validated.
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
        [0, 1, 2, 2]
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
        source = _Arrays.of(*data, batch_size, solve_rows, key)
    else:
        if isinstance(data, Iterator):
            raise ValueError(
                "train: `data` must be re-iterable, got an iterator, which can be read only once. Give a list."
            )
        source = _Batches(data, unpack)
    callbacks, solves = tuple(callbacks), isinstance(state, CronosTrainState)
    step, score = _gradient_step(loss, _Keywords(train_kwargs or {})), scoring(state, loss, eval_kwargs, unpack)
    scored = validation if isinstance(validation, Mapping) else {"validation": validation}
    scored = {name: rows for name, rows in scored.items() if rows is not None}
    settings = {"batch_size": batch_size, "solve_every": solve_every, "solve_rows": solve_rows, "loss": repr(loss)}
    settings["key"] = np.asarray(jax.random.key_data(key)).tolist()

    run, saved_at = _Run(step=int(state.step)), None
    state = state.replace(step=jnp.asarray(state.step))  # Flax starts with a Python number
    if directory is not None:
        state, saved_at, extra = restored(directory, state)
        if saved_at is not None:
            run = _Run(**_of_same_run(extra, settings, directory))
    state = copied(state)  # this function's own, and donated from here on

    def solved(state: Any) -> tuple[Any, Solution]:
        rows, how = source.to_solve(run.step)
        return state.solve_head(rows, unpack=how, key=jax.random.fold_in(key, run.step))

    def compiled() -> float:
        """Seconds that it takes to compile, and to do once, what an epoch does."""
        began = time.perf_counter()
        for batch in itertools.islice(source.epoch(run.epoch, run.batch), 1):
            jax.block_until_ready(step(copied(state), batch, key))
        jax.block_until_ready(solved(state)[0].params if solves else state.params)
        return time.perf_counter() - began

    compile_seconds = compiled() if compile_first else None
    clock = _Clock(run.seconds)

    def tell(**figures: float) -> None:
        jax.block_until_ready(state)
        row = {"step": run.step, "epoch": run.epoch, "seconds": clock.seconds, **figures}
        run.history.append(row)
        with clock.stopped():
            for callback in callbacks:
                callback(row)

    def solve() -> None:
        nonlocal state
        jax.block_until_ready(state)  # steps under way are not the solve's time
        began = clock.seconds
        new, solution = solved(state)
        state = new
        before, after = float(solution.stats.initial_objective), float(solution.stats.objective)
        run.solved(1 - after / before if before > 0 else 0.0, clock.seconds - began)
        tell(initial_objective=before, objective=after, solve_seconds=run.solve_seconds, **new.figures)

    def save() -> None:
        nonlocal saved_at
        if directory is None or saved_at == run.step:
            return
        jax.block_until_ready(state)
        with clock.stopped():
            run.seconds = clock.seconds
            extra = {"settings": settings, "run": dataclasses.asdict(run)}
            save_checkpoint(directory, state, run.step, extra=extra, keep=_KEEP)
        saved_at = run.step

    losses: list[Array] = []  # of this epoch, not in its sum yet: steps are not waited for

    def sum_up() -> None:
        run.loss_sum = sum(map(float, losses), run.loss_sum)
        losses.clear()

    def time_is_up() -> bool:
        return seconds is not None and run.epoch_seconds > 0 and clock.seconds + run.epoch_seconds > seconds

    if compile_seconds is not None:
        tell(compile_seconds=compile_seconds)
    while run.epoch < epochs and not time_is_up():
        began = clock.seconds
        for batch in source.epoch(run.epoch, run.batch):
            if save_every is not None and run.step % save_every == 0 and run.batch:
                sum_up()
                save()
            if solves and run.solve_is_due(solve_every):
                solve()
            state, value = step(state, batch, key)
            losses.append(value)
            run.step, run.batch = run.step + 1, run.batch + 1
        sum_up()
        if not run.batch:
            raise ValueError("train: `data` must have at least one batch, got none.")
        jax.block_until_ready(state)
        run.epoch_seconds = clock.seconds - began + run.solve_seconds
        if solves and (run.epoch == epochs - 1 or time_is_up()):
            solve()
        mean_loss = run.loss_sum / run.batch
        run.epoch, run.batch, run.loss_sum = run.epoch + 1, 0, 0.0
        figures: Row = {}
        with clock.stopped():
            for name, rows in scored.items():
                figures |= {f"{name}_{figure}": value for figure, value in score(state, rows).items()}
        tell(loss=mean_loss, **figures)
        save()
    return state, run.history


def _check(**counts: Any) -> None:
    """Each a positive integer, or, where that is a choice, None; ``solve_every`` also a word."""
    for name, value in counts.items():
        optional = name in ("save_every", "solve_every", "solve_rows")
        if not (optional and value is None) and not (name == "solve_every" and value == "stale"):
            _checks.positive_integer("train", name, value)


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
    weight = batch.weight.reshape(batch.weight.shape + (1,) * (len(leading) - batch.weight.ndim))
    return outputs, y, jnp.broadcast_to(weight, leading).reshape(-1).astype(outputs.dtype)


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
