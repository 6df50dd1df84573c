"""What all runs of a comparison share: settings, data, the model and its head."""

import dataclasses
import functools
import inspect
import itertools
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cronos_flax._head.head import Head
from cronos_flax._solver.losses import LOSSES, loss_of
from cronos_flax.compare.data import Dataset, Split, load
from cronos_flax.compare.models import Model, model_of
from cronos_flax.compare.own import function

Row = dict[str, Any]  # one check of one run: figures by name

_SAMPLE = 64  # rows that the head is found with


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings that all runs of a comparison share.

    Args:
        dataset: a name for :func:`cronos_flax.compare.data.load`.
        model: a name for :func:`cronos_flax.compare.models.model_of`.
        loss: a name that ``cf.Cronos`` knows; None for ``"softmax"``, or ``"squared"`` where there are no classes.
        epochs: the length of each run; or
        budget: its length in seconds of training.
        batch_size: rows of a gradient step.
        rows: how many rows to fit at most.
        validation: how many rows are held back for validation; below 1, which fraction.
        scaling: one of ``cronos_flax.compare.data.SCALINGS``.
        targets: ``"classes"`` or ``"values"``; None for what the dtype of the set's targets says.
        shots: how many rows of each class to fit; None for no such choice.
        augment: ``module:function``: what gradient steps see of a batch, see :class:`Augmented`; None for the batch.
        data_dir: where TFDS sets lie; two comparisons that differ only in this are the same.
    """

    dataset: str
    model: str = "mlp"
    loss: str | None = None
    epochs: int | None = None
    budget: float | None = None
    batch_size: int = 128
    rows: int | None = None
    validation: float = 0.2
    scaling: str = "standardise"
    targets: str | None = None
    shots: int | None = None
    augment: str | None = None
    data_dir: str | None = dataclasses.field(default=None, compare=False)

    def shared(self) -> Row:
        """The settings as every row repeats them."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.compare}


class Run(NamedTuple):
    """One cell of a method's grid at one seed; ``rate`` is None for a method without a grid."""

    method: str
    rate: float | None
    seed: int

    @property
    def name(self) -> str:
        """As a text."""
        return self.method + ("" if self.rate is None else f" {self.rate:g}") + f", seed {self.seed}"


@dataclasses.dataclass(frozen=True)
class Augmented:
    """Batches of all rows without end, in a new order for each epoch, changed by a function of the user's.

    The same for the same seed; rows that do not fill a batch are left out of the epoch.

    Args:
        x: inputs, scaled.
        y: targets.
        batch_size: rows of a batch.
        seed: of the orders, and of what the function draws.
        augment: a function of inputs ``(batch_size, ...)`` and a ``np.random.Generator`` that returns inputs of the
            same shape.
    """

    x: np.ndarray
    y: np.ndarray
    batch_size: int
    seed: int
    augment: Callable[[np.ndarray, np.random.Generator], Any]

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """From the first epoch on."""
        for epoch in itertools.count():
            random = np.random.default_rng((self.seed, epoch))
            order = random.permutation(len(self.y))
            for i in range(0, len(order) - self.batch_size + 1, self.batch_size):
                rows = order[i : i + self.batch_size]
                yield self.changed(self.x[rows], random), self.y[rows]

    def changed(self, x: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """What the function makes of inputs.

        Raises:
            ValueError: if these are not finite inputs of the same shape, or it does not take what it is given.
        """
        try:
            inspect.signature(self.augment).bind(x, random)
        except TypeError as error:
            raise ValueError(
                "`augment` must be a function of two arguments, a batch of inputs and a np.random.Generator, got "
                f"{getattr(self.augment, '__name__', self.augment)}{inspect.signature(self.augment)}: {error}."
            ) from None
        except ValueError:  # no signature, as of some functions in C
            pass
        new = np.asarray(self.augment(x.copy(), random))
        if new.shape != x.shape or new.dtype.kind != "f":
            raise ValueError(
                f"`augment` must return floats of the shape that it was given, {x.shape}, got {new.dtype} of shape "
                f"{new.shape}."
            )
        if not np.all(np.isfinite(new)):
            raise ValueError(
                f"`augment` must return finite inputs, got {np.sum(~np.isfinite(new))} entries that are not."
            )
        return new.astype("float32")


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """The data, the model and its head, made once for all runs."""

    settings: Settings
    dataset: Dataset
    loss: str
    model: Model
    augment: Callable[..., Any] | None = None

    @classmethod
    def of(cls, settings: Settings) -> "Task":
        """Read the data and make the model.

        Raises:
            ValueError: if one of them does not exist, or if they do not fit together.
        """
        dataset = load(settings.dataset, settings.data_dir, settings.targets)
        loss = settings.loss or ("softmax" if dataset.num_classes else "squared")
        _, outputs = targets_for(loss, dataset.y, dataset.num_classes)
        said = "a function of a batch of inputs and a random generator"
        augment = None if settings.augment is None else function("augment", settings.augment, said)
        task = cls(settings, dataset, loss, model_of(settings.model, outputs), augment)
        if augment is not None:
            next(iter(task.augmented(0, 2)))  # whether it is such a function
        return task

    @property
    def held_back(self) -> int:
        """The number of validation rows."""
        share = self.settings.validation
        return round(share * len(self.dataset.y)) if share < 1 else int(share)

    def labelled(self, seed: int) -> Split:
        """The rows that this seed splits off, with labels, or values for regression."""
        settings = self.settings
        return Split.of(self.dataset, seed, self.held_back, settings.scaling, settings.rows, settings.shots)

    def augmented(self, seed: int, batch_size: int) -> Augmented:
        """Batches of the rows to fit, as gradient steps see them if there is an ``augment``."""
        data = self.split(seed)
        assert self.augment is not None
        return Augmented(data.x, data.y, min(batch_size, len(data.y)), seed, self.augment)

    @functools.cached_property
    def made_of(self) -> Row:
        """What all runs share besides settings: checksums of the data and, of a model of the user's, of its variables.

        Of the variables it is that of their names, shapes and dtypes: all seeds share these.
        """
        data = {"data": self.dataset.checksum}
        if ":" not in self.settings.model:
            return data
        variables = jax.tree_util.tree_leaves_with_path(self.model.init(0, self.split(0).x[:_SAMPLE]))
        said = [f"{jax.tree_util.keystr(path)} {jnp.shape(leaf)} {jnp.result_type(leaf)}" for path, leaf in variables]
        return {**data, "variables": f"{zlib.crc32(chr(10).join(said).encode()):08x}"}

    @functools.lru_cache(maxsize=1)  # noqa: B019 - a task lives as long as its process
    def split(self, seed: int) -> Split:
        """The same rows, with targets for the loss."""
        split = self.labelled(seed)
        y, y_validation, y_test = (
            targets_for(self.loss, part, self.dataset.num_classes)[0]
            for part in (split.y, split.y_validation, split.y_test)
        )
        return split._replace(y=y, y_validation=y_validation, y_test=y_test)

    @functools.cached_property
    def head(self) -> Head:
        """The head of the model as it is evaluated; found once, so that all seeds share its compiled programs.

        Raises:
            ValueError: if the model has no head, or one of another number of outputs; the message says why and what to
                do.
        """
        head = self.model.head(self.split(0).x[:_SAMPLE])
        _, outputs = targets_for(self.loss, self.dataset.y, self.dataset.num_classes)
        if head.outputs != outputs:
            raise ValueError(
                f"`model` {self.settings.model!r} must have the {outputs} outputs that it is asked for, got "
                f"{head.outputs}."
            )
        return head

    @functools.cached_property
    def head_in_training(self) -> Head:
        """The head to alternate on: solves see the features that gradients see.

        Where the model has running statistics, features are those of evaluation with the statistics of the batch; with
        norms that are not Flax's own, they are those of training.
        """
        return self.model.head_in_training(self.split(0).x[:_SAMPLE]) or self.head


def targets_for(loss: str, y: np.ndarray, num_classes: int | None) -> tuple[np.ndarray, int]:
    """The targets that a loss takes, and the number of outputs that a module needs for them.

    Args:
        loss: a name that :class:`cronos_flax.Cronos` knows.
        y: labels, or values for regression.
        num_classes: the number of classes; None for regression.

    Raises:
        ValueError: if the loss does not fit such labels or values.
    """
    made = loss_of(loss)
    if num_classes is None:
        if not made.takes_values:
            takes = " or ".join(repr(name) for name, each in LOSSES.items() if each.takes_values)
            raise ValueError(f"`loss` must be {takes} for a set without classes, got {loss!r}.")
        return y[:, None], 1
    targets = np.asarray(made.from_labels(y, num_classes))
    if targets.ndim == 1:
        return targets, num_classes
    return targets.astype("float32"), targets.shape[1]
