"""The parts of a training loop that know no schedule: sources of batches, the gradient step, and scoring."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax.training.train_state import TrainState
from jax import Array

from cronos_flax._alternation.train_state import CronosTrainState, module_params
from cronos_flax._head.data import Batch, batches, flat_targets, flat_weight
from cronos_flax._head.head import Head, selected
from cronos_flax._solver.loss import Loss

_LEAST_SOLVED = 8_192  # rows of a solve; of fewer, losses are too noisy for the guard to compare
_SOLVE_BYTES = 2**32  # memory for a solve
_KEPT_COMPILED = 16  # compiled steps and scorings, for other losses and models


@dataclasses.dataclass(frozen=True)
class Arrays:
    """Rows in memory, in a new order for each epoch.

    Args:
        x: the module's input, a pytree of arrays ``(n, …)``.
        y: targets ``(n, …)``.
        batch_size: rows of a batch; rows that do not fill one are left out of the epoch.
        seed: of the orders and samples.
    """

    x: Any
    y: np.ndarray
    batch_size: int
    seed: int

    @classmethod
    def of(cls, x: Any, y: Any, batch_size: int, key: Array) -> Self:
        """Rows of equal number, as NumPy arrays.

        Raises:
            ValueError: if the numbers of rows differ, or are zero.
        """
        x, y = jax.tree.map(np.asarray, x), np.asarray(y)
        counts = {len(leaf) if leaf.ndim else 0 for leaf in (*jax.tree.leaves(x), y)}
        if len(counts) != 1 or 0 in counts:
            raise ValueError(
                "train: `data` = (x, y) must be arrays of equally many rows, at least one, got "
                f"{jax.tree.map(np.shape, (x, y))}."
            )
        return cls(x, y, min(batch_size, len(y)), int(jax.random.bits(key)))

    def epoch(self, number: int, start: int) -> Iterator[Batch]:
        """The batches of an epoch, from batch ``start`` on."""
        order = np.random.default_rng((self.seed, 0, number)).permutation(len(self.y))
        for i in range(start, len(order) // self.batch_size):
            x, y = self._take(order[i * self.batch_size : (i + 1) * self.batch_size])
            yield Batch.of((x,), {}, y)

    def to_solve(self, step: int, rows: int | None) -> tuple[Any, None]:
        """``data`` and ``unpack`` of a head solve on so many random rows; None for all rows."""
        if rows is None or rows >= len(self.y):
            return (self.x, self.y), None
        rng = np.random.default_rng((self.seed, 1, step))
        return self._take(np.sort(rng.choice(len(self.y), rows, replace=False))), None

    def affordable(self, solve_every: int | None, head: Head) -> int:
        """Rows of a solve: no more than the gradient steps between two solves take, and than fit into memory.

        Args:
            solve_every: steps between two solves; None for an epoch or more.
            head: the head that is solved for.
        """
        between = len(self.y) if solve_every is None else solve_every * self.batch_size
        return min(max(between, _LEAST_SOLVED), max(_SOLVE_BYTES // head.solve_bytes(1), 1))

    def _take(self, rows: np.ndarray) -> tuple[Any, np.ndarray]:
        return jax.tree.map(lambda leaf: leaf[rows], self.x), self.y[rows]


@dataclasses.dataclass(frozen=True)
class Batches:
    """The user's batches, in the order in which they come; ``unpack`` as for :func:`cronos_flax.fit_head`."""

    data: Any
    unpack: Callable[[Any], tuple] | None

    def epoch(self, number: int, start: int) -> Iterator[Batch]:
        """The batches of an epoch, from batch ``start`` on."""
        del number
        return itertools.islice(batches(self.data, self.unpack), start, None)

    def to_solve(self, step: int, rows: int | None) -> tuple[Any, Callable[[Any], tuple] | None]:
        """``data`` and ``unpack`` of a head solve, which takes all rows."""
        del step, rows
        return self.data, self.unpack


class _Keywords(dict):
    """Keyword arguments that hash: by value if all values do, else by identity."""

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


Step = Callable[[Any, Batch, Array], tuple[Any, Array]]  # of state, batch and key: the new state and the mean loss


def gradient_step(loss: Loss, kwargs: Mapping[str, Any] | None) -> Step:
    """One jitted step of the optimizer on the mean loss of a batch, as in any Flax loop; the state is donated.

    Args:
        loss: the loss of a row.
        kwargs: keyword arguments of ``apply_fn``.
    """
    return _gradient_step(loss, _Keywords(kwargs or {}))


@functools.lru_cache(maxsize=_KEPT_COMPILED)  # so that a sweep compiles once
def _gradient_step(loss: Loss, kwargs: _Keywords) -> Step:
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
) -> Callable[[Any, Any], dict[str, float]]:
    """A function that scores a state on rows.

    Args:
        state: a state with the ``apply_fn`` and the head of those to be scored.
        loss: the loss of a row.
        kwargs: keyword arguments of ``apply_fn``; None for those that the head was found with.
        unpack: how to take a batch apart, as for :func:`cronos_flax.fit_head`.

    Returns:
        A function of a state and rows, these as ``data`` of :func:`cronos_flax.fit_head`. It returns the mean ``loss``
        and, if the rows have labels, the ``accuracy`` in [0, 1].
    """
    if kwargs is None:
        kwargs = state.head.kwargs if isinstance(state, CronosTrainState) else {}
    kwargs = _Keywords({name: value for name, value in kwargs.items() if name != "mutable"})
    sums = _sums(state.apply_fn, _output_of(state), loss, kwargs)

    def score(state: Any, rows: Any) -> dict[str, float]:
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
    """Gives the sums, over a batch, of losses, correct rows and weights; and whether all rows have labels."""

    @jax.jit
    def sums(params: Any, collections: Any, batch: Batch) -> tuple[Array, Array, Array, Array]:
        out = apply_fn({"params": params, **collections}, *batch.args, **{**kwargs, **batch.kwargs})
        outputs, y, weight = _rows_of(out, batch, output, loss)
        hits = weight @ (loss.predicted(outputs) == loss.labels(y)).astype(weight.dtype)
        return weight @ loss.value(outputs, y), hits, jnp.sum(weight), jnp.asarray(loss.is_labelled(y))

    return sums


def _rows_of(out: Any, batch: Batch, output: Any, loss: Loss) -> tuple[Array, Array, Array]:
    """Outputs ``(rows, C)``, targets ``(rows, C)`` and weights ``(rows,)``, leading axes flattened."""
    out = selected(out, output)
    leading, C = out.shape[:-1], out.shape[-1]
    outputs = out.reshape(-1, C).astype(jnp.promote_types(out.dtype, jnp.float32))
    y = loss.targets(jnp.asarray(flat_targets(batch.y, leading, C)), C).astype(outputs.dtype)
    if batch.weight is None:
        return outputs, y, jnp.ones(len(outputs), outputs.dtype)
    return outputs, y, jnp.asarray(flat_weight(batch.weight, leading)).astype(outputs.dtype)


def _output_of(state: TrainState) -> Any:
    """Which output of the module is trained."""
    return state.head.module.output if isinstance(state, CronosTrainState) else None


def _collections(state: TrainState) -> Any:
    """The module's collections other than its parameters."""
    return getattr(state, "model_state", {})
