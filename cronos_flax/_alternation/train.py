"""``cf.train``: the loop around a train state, with head solves, validation, callbacks and checkpoints."""

import functools
import itertools
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.training.train_state import TrainState
from jax import Array

from cronos_flax._alternation.apply_fn import with_method
from cronos_flax._alternation.backbone import RatedState, module_params
from cronos_flax._alternation.batch_check import BatchCheck, balanced_weights
from cronos_flax._alternation.defaults import DECAYS, choosing_share
from cronos_flax._alternation.loop import Clock, Loop, Row, without_labels
from cronos_flax._alternation.optimizer_state import sets_its_rate
from cronos_flax._alternation.position import Checkpoints, all_said, some_entries
from cronos_flax._alternation.sources import Arrays, Batches, source_of
from cronos_flax._alternation.steps import gradient_step, scoring
from cronos_flax._alternation.train_state import CronosTrainState
from cronos_flax._head.data import UserData
from cronos_flax._head.files import check_path
from cronos_flax._head.fingerprint import said
from cronos_flax._head.head import check_there
from cronos_flax._head.nnx_collections import NnxFunction
from cronos_flax._solver.arrays import is_array
from cronos_flax._solver.checks import positive_integer, random_key, real_number
from cronos_flax._solver.loss import Loss, check_told_apart
from cronos_flax._solver.losses import LOSSES, loss_of
from cronos_flax._solver.processes import on_first
from cronos_flax._solver.transfer import copied, default_key, folded, on_device, on_host
from cronos_flax._solver.user_warnings import warn

State = TypeVar("State", bound=TrainState)

_HELD_EVERY, _LEAST_HELD, _MOST_HELD = 10, 50, 2000  # one row in so many is held back, to choose β on
_RNGS = ("dropout",)  # the streams of a linen module
_MOST_COPIED = 2**30  # bytes of arrays of which rows are held back: a solve on the others copies these


def train(
    state: State,
    data: Any,
    *,
    epochs: int,
    batch_size: int = 128,
    steps_per_epoch: int | None = None,
    solve_every: int | None = None,
    solve_rows: int | None = None,
    solve_data: Any = None,
    loss: str | Loss | None = None,
    unpack: Callable[[Any], tuple] | None = None,
    validation: Any = None,
    train_kwargs: Mapping[str, Any] | None = None,
    eval_kwargs: Mapping[str, Any] | None = None,
    rngs: Iterable[str] | Mapping[str, Array] = _RNGS,
    key: Array | None = None,
    callbacks: Iterable[Callable[[Row], Any]] = (),
    seconds: float | None = None,
    directory: str | Path | None = None,
    save_every: int | None = None,
    keep_best: str | None = None,
    compile_first: bool = False,
) -> tuple[State, list[Row]]:
    """Train a module: gradient steps, and head solves between them.

    An ordinary ``TrainState`` is trained by gradients alone, in the same loop: use it for comparisons.

    An NNX model is trained in a state that is made of it, :class:`cronos_flax.nnx.CronosTrainState` or, for gradients
    alone, :class:`cronos_flax.nnx.TrainState`. The model itself is not changed; ``state.model`` is the trained one.
    Gradient steps are made as after ``model.train()``, validation and solves as after ``model.eval()``.

    The rate of a :class:`CronosTrainState`'s gradient steps falls to zero towards the end of the run, in epochs or in
    ``seconds``, as ``state.alternation.decay`` says.

    With a ``directory`` the run is saved as it goes, and the same call resumes it; on CPU to the bit, unless it is
    ended by ``seconds``, as its rate then falls by the clock.

    Args:
        state: a :class:`CronosTrainState`, that of an NNX model, or any ``flax.training.train_state.TrainState``; it
            is not changed, and its arrays are not donated.
        data: whole arrays ``(x, y)``, in a new order for each epoch, some of which the first part of the run does not
            see (``choose_beta`` of :class:`Alternation`); or a re-iterable of batches, as for
            :func:`cronos_flax.fit_head`, in the order in which they come. Batches without a row of positive weight are
            passed over.
        epochs: passes through the data, of the whole run. A run that is resumed with more of them ends later; its rate
            decays to the new end.
        batch_size: rows of a gradient step, for arrays; rows that do not fill a batch are left out of the epoch.
        steps_per_epoch: batches of an epoch, for loaders that do not end; None means one pass. An epoch goes on where
            the last one ended, and data that end begin again, arrays in a new order.
        solve_every: steps between two head solves. None solves before the epochs that ``state.alternation`` says. There
            is also a solve at the end. With a number the first solve is before the first step.
        solve_rows: for arrays, the number of random rows of a solve. None means all rows, or as many as are not held
            back at first (``choose_beta`` of :class:`Alternation`); or, with ``solve_every``, as
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
        train_kwargs: keyword arguments of ``apply_fn`` in a gradient step, such as ``{"train": True}``; for NNX, of the
            model. The method that the head was found in is called, unless they name a ``"method"``. The collections in
            ``state.model_state`` are mutable there, and there are the ``rngs``.
        eval_kwargs: keyword arguments of ``apply_fn`` in validation, such as ``{"train": False}``; None means those
            that the head was found with.
        rngs: the rng streams of gradient steps: names, whose keys come from ``key``; or a dict of keys. Each key is
            folded with the step. Not for NNX models, whose own streams go on from call to call.
        key: of the order of rows, rng streams (those of NNX models have their own) and solves; None means a fixed one.
        callbacks: functions that are called with a copy of each row of the history as it is made; of several processes
            in the first one only.
        seconds: limit on the training time; the run ends when the time left is shorter than the last epoch took.
        directory: where the checkpoints of this run lie; a run that is there is resumed, if its settings (those of the
            solver and the guard too), its data and its first parameters are the same; another optimizer is warned of,
            another rate is not. A second run into it is refused meanwhile. Of data it knows shapes, dtypes and a
            checksum: of arrays up to 64 MB all rows, of larger ones 4,096 rows; of a loader the first batch, as far as
            it is the same when it is read twice.
        save_every: steps between checkpoints; None saves after each epoch.
        keep_best: the figure of ``validation`` by which the state to return is chosen: that after the epoch with the
            least ``"validation_loss"`` or the highest ``"validation_accuracy"``, the first of several such epochs; of a
            dict of sets, with the prefix of one. It is kept in memory, and in the ``directory``. None means the state
            at the end.
        compile_first: compile before the clock starts, by a step and a solve whose results are not used; the first row
            of the history then has ``compile_seconds``.

    Returns:
        The state, that at the end or that of ``keep_best``, and the history. The history is a list of flat dicts of
        numbers. There is one for each solve, with ``objective``, ``initial_objective``, ``beta``, ``solve_seconds``
        (the pass for features included) and ``state.figures``; and one for each epoch, with ``loss`` (the mean over its
        batches), ``validation_loss`` and, if there are labels, ``validation_accuracy``, a share of rows.
        ``class_weight`` counts in losses, not in accuracies. Each has ``step``, ``epoch`` and ``seconds``, the training
        time with solves and without validation and checkpoints.

    Raises:
        ValueError: for arguments that do not fit, and for a ``directory`` with a run of other settings or data.
        FloatingPointError: if the loss is not finite at the first solve.
        BlockingIOError: if another process or run holds the ``directory``.
        OSError: if it cannot be written to; the checkpoints there are as before.

    Warns:
        UserWarning: if the parameters are no longer finite, and no guard goes back: they are not saved. If ``loss`` is
            not that of ``state.solver``. If ``keep_best`` never was finite. If the loss of gradient steps contradicts
            that of a solve. If these have the running statistics of batch norms, and solves those of the batch. If a
            linen module sows into collections such as ``"losses"``, which the loss does not hold. And where
            :meth:`CronosTrainState.solve_head` warns.

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
        >>> [row["epoch"] for row in history if "objective" in row]  # solves; in the first β is chosen
        [2, 3]
        >>> history[-1]["validation_accuracy"] > 0.7
        True
    """
    loss = _loss_for(state, loss)
    check_there("train", state)
    _check_counts(epochs=epochs, batch_size=batch_size)
    _check_counts(
        optional=True,
        solve_every=solve_every,
        save_every=save_every,
        steps_per_epoch=steps_per_epoch,
    )
    if solve_rows is not None:
        positive_integer("train", "solve_rows", solve_rows, least=2)
    for name, given in {"train_kwargs": train_kwargs, "eval_kwargs": eval_kwargs}.items():
        if given is not None and not (isinstance(given, Mapping) and all(isinstance(each, str) for each in given)):
            raise ValueError(f"train: `{name}` must be a dict of keyword arguments by name, got {given!r}.")
    if directory is not None:
        check_path("train", "directory", directory)
    head = state.head if isinstance(state, CronosTrainState) else None
    train_kwargs = with_method(state.apply_fn, head, train_kwargs or {})
    alternation = state.alternation if isinstance(state, CronosTrainState) else None
    schedule = None if alternation is None else alternation if solve_every is None else int(solve_every)
    if seconds is not None:
        real_number("train", "seconds", seconds, "a positive number", lambda v: v > 0)
    if not isinstance(callbacks, Iterable) or not all(map(callable, callbacks := tuple(callbacks))):
        raise ValueError(f"train: `callbacks` must be a list of functions, got {callbacks!r}.")
    if key is not None:
        random_key("train", key)
    key = default_key() if key is None else key
    streams = _streams_of(state, rngs, key, train_kwargs)
    source = source_of(UserData(data, unpack, "train"), batch_size, steps_per_epoch, key)
    to_solve = source
    if solve_data is not None:
        to_solve = source_of(UserData(solve_data, unpack, "train", "solve_data"), batch_size, None, key)
    sets = _validation_sets(validation, unpack)
    _check_keep_best(keep_best, sets)
    settings = _settings(
        state,
        key,
        batch_size=batch_size,
        steps_per_epoch=steps_per_epoch,
        solve_rows=solve_rows,
        solve_every=solve_every,
        keep_best=keep_best,
        loss=said(loss),
        rngs=_described(streams),
        train_kwargs=said(train_kwargs),
    )
    if isinstance(state, CronosTrainState):
        if solve_rows is not None and not isinstance(to_solve, Arrays):
            raise ValueError("train: `solve_rows` is for arrays, got a loader. Give the rows of solves as solve_data=.")
        if solve_every is not None and isinstance(source, Batches) and (solve_data is None or solve_data is data):
            source.check_begins_anew()
        if solve_rows is None and isinstance(to_solve, Arrays):
            between = schedule * batch_size if isinstance(schedule, int) else None
            solve_rows = to_solve.affordable(between, state.head)

    marks = {}
    if directory is not None:
        marks["data"] = source.fingerprint()
        is_one = to_solve is source or solve_data is data  # to read one loader twice may begin it anew
        marks["solve_data"] = marks["data"] if is_one else to_solve.fingerprint()
    start = {} if directory is None else some_entries(module_params(state.params))
    checkpoints = Checkpoints(directory, settings, marks, start, epochs, save_every)
    with checkpoints.locked():
        state = state.replace(step=on_device(state.step))  # Flax starts with an int
        state, position, best = checkpoints.resumed(state)
        position.batches = position.batches or source.known_batches()
        check = BatchCheck(state, loss, train_kwargs, streams)
        _check_what_is_in_memory(check, source, to_solve, sets, keep_best)
        class_weight = None
        if isinstance(state, CronosTrainState) and state.solver.class_weight is not None:
            class_weight = on_device(balanced_weights(loss, map(check, source.once())))
        if position.held_back is None:
            position.held_back = _to_hold_back(state, source, to_solve, epochs)
            position.holds_back = position.held_back > 0
        held_back = None
        if position.held_back and isinstance(source, Arrays) and alternation is not None:
            held_back = source.held_back(position.held_back, choosing_share(alternation))
            most = len(held_back.rest)  # in all solves, so that they are one program
            solve_rows = most if solve_rows is None else min(solve_rows, most)
        loop = Loop(
            state=copied(state),  # the loop donates its own
            position=position,
            clock=Clock(position.seconds),
            source=source,
            to_solve=to_solve,
            held_back=held_back,
            schedule=schedule,
            decay=_decay_for(state),
            epochs=epochs,
            solve_rows=solve_rows,
            check=check,
            step=functools.partial(
                gradient_step(state, loss, train_kwargs), streams=streams, class_weight=class_weight
            ),
            validate=_validation(sets, scoring(state, loss, eval_kwargs, class_weight)),
            key=key,
            callbacks=tuple(map(on_first, callbacks)),
            seconds=seconds,
            checkpoints=checkpoints,
            keep_best=keep_best,
            best=best,
        )
        if compile_first:
            loop.compile()
        over = position.epoch >= epochs or loop.time_is_up()
        while not over:
            over = loop.do_epoch()
    if keep_best is not None and not any(np.isfinite(row.get(keep_best, np.nan)) for row in position.history):
        warn(
            f"train: `keep_best` must be a figure that is finite after an epoch, got {keep_best!r}, which never was: "
            "the state is that at the end. Look for validation rows that are not finite."
        )
    state = loop.state if loop.best is None else loop.best
    if isinstance(state.opt_state, RatedState):  # whoever goes on with it has a rate of his own
        state = state.replace(opt_state=state.opt_state._replace(run_decay=on_device(1, jnp.float32)))
    return state, position.history


def _loss_for(state: Any, loss: str | Loss | None) -> Loss:
    """The loss given; None means that of the state's solver."""
    if isinstance(state, nnx.Module):
        raise ValueError(
            f"train: `state` must be a train state, got the NNX model {type(state).__name__}. Make one of it: "
            "cf.nnx.CronosTrainState.create(model=model, tx=optax.adam(1e-3), head=cf.nnx.find_head(model, x)); or, "
            "for gradient steps alone, cf.nnx.TrainState.create(model=model, tx=optax.adam(1e-3)). The trained model "
            "is the `model` of the state that train returns."
        )
    if not isinstance(state, TrainState):
        raise ValueError(
            f"train: `state` must be a CronosTrainState or another flax TrainState, got {type(state).__name__}."
        )
    if loss is None and isinstance(state, CronosTrainState):
        loss = state.solver.loss
    if not isinstance(loss, Loss) and loss not in LOSSES:
        raise ValueError(f"train: `loss` must be {' or '.join(map(repr, LOSSES))} or a cf.Loss, got {loss!r}.")
    loss = loss_of(loss)
    check_told_apart("train", loss)
    if isinstance(state, CronosTrainState) and said(loss) != said(loss_of(state.solver.loss)):
        warn(
            f"train: gradient steps lower {said(loss)}, and solves {said(loss_of(state.solver.loss))}: each undoes "
            "what the other does. Give the solver of the state the same loss."
        )
    return loss


def _to_hold_back(state: Any, source: Arrays | Batches, to_solve: Arrays | Batches, epochs: int) -> int:
    """How many rows a run that begins holds back, to choose β on."""
    if not isinstance(state, CronosTrainState) or not isinstance(source, Arrays) or to_solve is not source:
        return 0
    is_chosen = np.isfinite(on_host(state.beta))
    is_in_time = choosing_share(state.alternation) * epochs <= epochs - 1  # before the last epoch
    fits = sum(leaf.nbytes for leaf in jax.tree.leaves(source.x)) <= _MOST_COPIED
    held = min(len(source) // _HELD_EVERY, _MOST_HELD)
    return held if not is_chosen and is_in_time and fits and held >= _LEAST_HELD else 0


def _settings(state: Any, key: Array, **given: Any) -> dict[str, Any]:
    """What must be the same in a directory for a run to go on there: what was given, and what the state has."""
    settings = {**given, "key": on_host(jax.random.key_data(key)).tolist()}
    if isinstance(state.apply_fn, NnxFunction):
        settings["train_mode"] = f"of all parts but {list(state.apply_fn.kept_back)}"
    if isinstance(state, CronosTrainState):
        settings |= all_said("solver", state.solver)
        if state.guard is not None:
            settings |= all_said("guard", state.guard.settings)
        settings["alternation"] = repr(state.alternation)
    return settings


def _decay_for(state: Any) -> Callable[[float], float] | None:
    """The factor on the rate as a function of the share of the run that is done; None for none."""
    if not isinstance(state.opt_state, RatedState):
        return None
    decay = state.alternation.decay if isinstance(state, CronosTrainState) else state.run_decay
    return DECAYS[None if sets_its_rate(state.opt_state) else decay]


def _check_counts(optional: bool = False, **counts: Any) -> None:
    """Raise a ValueError unless each is a positive integer or, if optional, None."""
    for name, value in counts.items():
        if value is not None or not optional:
            positive_integer("train", name, value)


def _streams_of(state: Any, rngs: Any, key: Array, train_kwargs: Mapping[str, Any]) -> dict[str, Array]:
    """The key of each rng stream that a gradient step gives to the module."""
    if isinstance(state.apply_fn, NnxFunction):
        for name, given in train_kwargs.items():
            if isinstance(given, nnx.Rngs | nnx.RngStream):
                raise ValueError(
                    f"train: `train_kwargs` must hold no random streams, got `{name}`, which would give the same "
                    "numbers in each step. Give the streams to the layers as the model is made: nnx.Dropout(0.1, "
                    "rngs=rngs)."
                )
        if rngs != _RNGS:
            raise ValueError(
                "train: `rngs` must not be given for an NNX model, which has random streams of its own, got "
                f"{rngs!r}. Make the model with the streams that you want: nnx.Rngs(0, dropout=1)."
            )
        return {}
    try:
        if isinstance(rngs, Mapping):
            if not any(map(np.ndim, itertools.chain(*_described(rngs).values()))):  # they are keys, each a single one
                return dict(rngs)
        elif not isinstance(rngs, str):
            return {name: folded(key, np.uint32(zlib.crc32(name.encode()))) for name in rngs}
    except (TypeError, AttributeError):
        pass
    raise ValueError(f'train: `rngs` must be names, such as ("dropout",), or a dict of keys, got {rngs!r}.')


def _described(keys: Mapping[str, Array]) -> dict[str, list]:
    """Keys as JSON takes them."""
    return {name: on_host(jax.random.key_data(key)).tolist() for name, key in keys.items()}


def _validation_sets(validation: Any, unpack: Callable[[Any], tuple] | None) -> dict[str, UserData]:
    """The sets of validation rows by prefix; what can be read only once is refused."""
    several = isinstance(validation, Mapping) and not any(map(is_array, validation.values()))
    given = validation if several else {"validation": validation}
    return {
        prefix: UserData(rows, unpack, "train", f"validation[{prefix!r}]" if several else "validation").check(True)
        for prefix, rows in given.items()
        if rows is not None
    }


def _check_keep_best(keep_best: str | None, sets: Mapping[str, UserData]) -> None:
    """Raise a ValueError unless it is the name of a figure of the validation rows."""
    figures = [f"{prefix}_{figure}" for prefix in sets for figure in ("loss", "accuracy")]
    if keep_best is not None and keep_best not in figures:
        there = " or ".join(map(repr, figures)) if figures else "a figure of `validation`, which is not given"
        raise ValueError(f"train: `keep_best` must be {there}, got {keep_best!r}.")


def _check_what_is_in_memory(
    check: BatchCheck,
    source: Arrays | Batches,
    to_solve: Arrays | Batches,
    sets: Mapping[str, UserData],
    keep_best: str | None,
) -> None:
    """Check all targets of arrays before training; those of loaders are checked as they come."""
    given = {"train": source} if to_solve is source else {"train: `solve_data`": to_solve, "train": source}
    for place, each in given.items():
        for batch in each.once() if isinstance(each, Arrays) else ():
            check(batch, place)
    for prefix, data in sets.items():
        for batch in data.batches() if isinstance(data.given, tuple) and data.unpack is None else ():
            y = check(batch, data.place).y
            if keep_best == f"{prefix}_accuracy" and not check.has_labels(y):
                raise without_labels(keep_best)


def _validation(sets: Mapping[str, UserData], score: Callable[[Any, UserData], Row]) -> Callable[[Any], Row]:
    """A function that gives the figures of a state on the validation rows, each with its prefix."""

    def validate(state: Any) -> Row:
        scores = {prefix: score(state, data) for prefix, data in sets.items()}
        return {f"{prefix}_{figure}": value for prefix, row in scores.items() for figure, value in row.items()}

    return validate
