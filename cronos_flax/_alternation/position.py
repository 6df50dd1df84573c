"""How far a run of ``cf.train`` is, and the checkpoints that it is resumed from."""

import contextlib
import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from flax.training.train_state import TrainState

from cronos_flax._alternation.backbone import module_params
from cronos_flax._alternation.checkpoint import restored, save_locked
from cronos_flax._alternation.defaults import Alternation
from cronos_flax._head.files import locked_by_all
from cronos_flax._head.fingerprint import Fingerprint, difference, said
from cronos_flax._solver.transfer import on_host
from cronos_flax._solver.user_warnings import warn

State = TypeVar("State", bound=TrainState)

_KEEP = 3  # checkpoints of a run
_ENTRIES = 16  # of each parameter, to know a state again
_RISE = 0.05  # of the mean loss of an epoch, in the loss of the best constant outputs


@dataclasses.dataclass
class Position:
    """How far a run is, between two steps: Python numbers, which a checkpoint holds beside the state.

    Args:
        step: gradient steps done.
        epoch: epochs done.
        batch: batches done of the epoch under way.
        batches: batches of an epoch, as of the last one; 0 before it is known.
        loss_sum: the sum of the losses of the epoch under way.
        last_solve_step: the step before which the head was last solved for.
        seconds: training time, with solves.
        solve_seconds: time of the last solve.
        epoch_seconds: time of the last epoch, with a solve.
        null_loss: the loss of the best constant outputs at the last solve; None before the first.
        held_back: rows that the first part of the run does not see; None before that is decided.
        holds_back: whether they are still unseen.
        chosen_at: the epoch before which β was chosen; None before that.
        compared_from: the row of the history from which on losses of epochs are compared.
        best_step: the step after which the figure to keep the best of was best; None if there is none.
        history: the rows so far.
    """

    step: int = 0
    epoch: int = 0
    batch: int = 0
    batches: int = 0
    loss_sum: float = 0.0
    last_solve_step: int = -1
    seconds: float = 0.0
    solve_seconds: float = 0.0
    epoch_seconds: float = 0.0
    null_loss: float | None = None
    held_back: int | None = None
    holds_back: bool = False
    chosen_at: int | None = None
    compared_from: int = 0
    best_step: int | None = None
    history: list[dict[str, float]] = dataclasses.field(default_factory=list)

    @property
    def first_solve(self) -> int | None:
        """The epoch before which the head was first solved for; None before that."""
        return next((int(row["epoch"]) for row in self.history if "beta" in row), None)

    def solve_is_due(self, schedule: int | Alternation, epochs: int, chooses_at: float = math.inf) -> bool:
        """Whether a solve comes before the next step.

        Args:
            schedule: when to solve: every so many steps, or by epochs.
            epochs: of the run.
            chooses_at: the epoch before which β is chosen; infinity if it is not.
        """
        if isinstance(schedule, int):
            return self.step % schedule == 0
        return self.batch == 0 and schedule.solve_is_due(self.epoch, epochs, chooses_at, self.first_solve)

    def has_risen(self, loss: float) -> bool:
        """Whether the mean loss of an epoch is clearly above that of an earlier one, if there was a solve."""
        if self.null_loss is None:
            return False
        rows = self.history[self.compared_from :]
        least = min((row["loss"] for row in rows if math.isfinite(row.get("loss", math.nan))), default=math.inf)
        return not loss <= least + _RISE * abs(self.null_loss)  # it may be NaN

    def is_best_by(self, figure: str) -> bool:
        """Whether the last row of the history has the best value so far: the highest accuracy, or the least loss."""
        sign = 1 if figure.endswith("accuracy") else -1
        before = [row[figure] for row in self.history if row["step"] == self.best_step and figure in row]
        now = self.history[-1][figure]
        return math.isfinite(now) and all(sign * now > sign * value for value in before)

    def share_done(self, epochs: int) -> float:
        """How much of a run of so many epochs is done, from 0 to 1."""
        of_epoch = min(self.batch / self.batches, 1.0) if self.batches else 0.0
        return min((self.epoch + of_epoch) / epochs, 1.0)


@dataclasses.dataclass
class Checkpoints:
    """The checkpoints of a run; without a directory there are none.

    Args:
        directory: where they lie.
        settings: a run is resumed only with the settings that it was saved with.
        marks: fingerprints of its data, by argument; it is resumed only with these data.
        start: some entries of each parameter, by name, of the state that the run began with; it is resumed only with
            that one, or with the state that it has come to.
        epochs: of the whole run.
        every: steps between two; None for one after each epoch.
        newest: the step of the newest.
        fixed: the fields that are no arrays of the state that the run was called with, by name.
    """

    directory: str | Path | None
    settings: dict[str, Any]
    marks: dict[str, Fingerprint]
    start: dict[str, list[float]]
    epochs: int
    every: int | None
    newest: int | None = None
    fixed: dict[str, Any] = dataclasses.field(default_factory=dict)

    def locked(self) -> contextlib.AbstractContextManager[None]:
        """Keep other runs from the directory."""
        if self.directory is None:
            return contextlib.nullcontext()
        return locked_by_all(Path(self.directory).absolute(), "train: `directory`")

    def resumed(self, given: State) -> tuple[State, Position, State | None]:
        """The saved state, its position, and the best state before; or, if there is none, the state given."""
        if self.directory is None:
            return given, Position(step=int(on_host(given.step))), None
        self.fixed = _fixed(given)  # not the state itself, whose arrays need not be kept alive
        state, self.newest, extra = restored(self.directory, given)
        if self.newest is None:
            return state, Position(step=int(on_host(state.step))), None
        self._check_is_run(extra)
        position = Position(**extra["position"])
        best = self._best(given, position)
        self._check_same_run(extra, [each for each in (state, best) if each is not None])
        self.start = extra["start"]
        return state, position, best

    def _best(self, given: State, position: Position) -> State | None:
        """The best state so far, if the run keeps it; without its checkpoint the best is one of the epochs to come."""
        step, found = position.best_step, None
        if step is None or self.directory is None:
            return None
        with contextlib.suppress(ValueError):
            state, found, _ = restored(self.directory, given, step=step)
        if found == step:
            return state
        warn(
            f"train: the checkpoint of step {step}, the best by {self.settings['keep_best']}, cannot be read any more "
            f"in {self.directory}. The best of the epochs from here on is kept."
        )
        position.best_step = None
        return None

    def is_missing(self, step: int) -> bool:
        """Whether there is a directory, and no checkpoint of this step yet."""
        return self.directory is not None and self.newest != step

    def save(self, state: Any, position: Position) -> None:
        """Save a checkpoint that is missing, while the directory is locked."""
        assert self.directory is not None
        self._check_settings_of(state)
        extra = {"settings": self.settings, "marks": self.marks, "start": self.start}
        extra["position"] = dataclasses.asdict(position)
        save_locked(self.directory, state, position.step, extra=extra, keep=_KEEP, besides=position.best_step)
        self.newest = position.step

    def _check_settings_of(self, state: Any) -> None:
        """Raise a ValueError if steps have changed what is no array in a state: a resumed run would not have it."""
        for name, now in _fixed(state).items():
            then = self.fixed[name]
            if now is not then and said(now) != said(then):
                raise ValueError(
                    f"train: with a `directory` steps must leave what is no array in a {type(state).__name__} as it "
                    f"is, for a checkpoint holds arrays only, got {name}={now!r}, which was {then!r}. Make it an "
                    "array, a field with pytree_node=True."
                )

    def _check_is_run(self, extra: Any) -> None:
        if not isinstance(extra, dict) or set(extra) != {"settings", "marks", "start", "position"}:
            raise ValueError(
                f"train: `directory` must hold a run of cf.train, got checkpoints of another kind in {self.directory}."
            )
        unknown = set(extra["position"]) - {field.name for field in dataclasses.fields(Position)}
        if unknown:
            raise ValueError(
                f"train: `directory` {self.directory} holds a run of a later version of cronos_flax, which saves "
                f"{', '.join(sorted(unknown))} too. Use that version, or another directory."
            )

    def _check_same_run(self, extra: Any, states: list[Any]) -> None:
        for name, value in self.settings.items():
            saved = extra["settings"].get(name)
            if saved != value:
                raise ValueError(
                    f"train: `directory` {self.directory} holds a run with {name}={saved!r}, and this one has "
                    f"{value!r}. Use the same, or another directory."
                )
        for name, mark in self.marks.items():
            before = extra["marks"][name]
            differs = difference(before, mark)
            if before.keys() != mark.keys():
                differs = f"it had the arrays {', '.join(sorted(before))}, and has {', '.join(sorted(mark))}"
            if differs is not None:
                raise ValueError(
                    f"train: `directory` {self.directory} holds a run with other `{name}`: {differs}. Use the "
                    "same data, or another directory."
                )
        known = [extra["start"], *(some_entries(module_params(state.params)) for state in states)]
        if not any(_alike(self.start, other) for other in known):
            raise ValueError(
                f"train: `directory` {self.directory} holds a run that began with other parameters than those of "
                "`state`. Give the same state, or the one that the run has come to, or another directory."
            )
        if extra["position"]["epoch"] > self.epochs:
            raise ValueError(
                f"train: `directory` {self.directory} holds a run of {extra['position']['epoch']} epochs, and `epochs` "
                f"is {self.epochs}. Give as many or more, or another directory."
            )


def _fixed(state: Any) -> dict[str, Any]:
    """The fields of a state that are no arrays, by name."""
    fields = (field for field in dataclasses.fields(state) if not field.metadata.get("pytree_node", True))
    return {field.name: getattr(state, field.name) for field in fields}


def some_entries(params: Any) -> dict[str, list[float]]:
    """A few entries of each array of a tree, by name."""
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        flat = np.asarray(on_host(leaf)).reshape(-1)
        places = np.linspace(0, flat.size - 1, min(_ENTRIES, flat.size)).astype(int)
        found[jax.tree_util.keystr(path)] = [float(value.real) for value in flat[places]]
    return found


def _alike(saved: Mapping[str, list[float]], now: Mapping[str, list[float]]) -> bool:
    """Whether entries agree but for rounding, as another device may draw them."""
    return saved.keys() == now.keys() and all(
        len(saved[name]) == len(values) and np.allclose(saved[name], values, 1e-3, 1e-6, equal_nan=True)
        for name, values in now.items()
    )


def all_said(name: str, settings: Any) -> dict[str, str]:
    """The fields of a dataclass of settings, in words."""
    return {f"{name}.{field.name}": said(getattr(settings, field.name)) for field in dataclasses.fields(settings)}
