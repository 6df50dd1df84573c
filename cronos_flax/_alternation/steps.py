"""The parts of a training loop that know no schedule: the check of a batch, the gradient step, and scoring."""

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.training.train_state import TrainState
from jax import Array

from cronos_flax._alternation.apply_fn import with_method
from cronos_flax._alternation.train_state import CronosTrainState, module_params, with_value
from cronos_flax._head.data import Batch, UserData
from cronos_flax._head.functional import selected
from cronos_flax._head.jitted import Static
from cronos_flax._head.linen import on_one_device
from cronos_flax._solver.checks import is_labelled, labels_of
from cronos_flax._solver.loss import Loss
from cronos_flax._solver.meshes import Places, at_places, automatically, evaluated, mesh_of, places_of, shapes_of
from cronos_flax._solver.transfer import batch_on_device, on_device, on_host

Made = TypeVar("Made")

_KEPT_COMPILED = 16  # compiled steps and scorings, for other losses and models


def _kept(make: Callable[..., Made]) -> Callable[..., Made]:
    """Make the same once, so that a sweep compiles once. Of what does not hash, as it may change, all is made anew."""
    kept = functools.lru_cache(maxsize=_KEPT_COMPILED)(make)

    @functools.wraps(make)
    def made(*of: Any) -> Made:
        try:
            hash(of)
        except TypeError:
            return make(*of)
        return kept(*of)

    return made


class Door:
    """The check of batches that are trained or scored on, on the host: targets become flat, see :meth:`Batch.flat`.

    Args:
        state: a state with the ``apply_fn``, the head and the shapes of those to come.
        loss: the loss of a row.
        kwargs: keyword arguments of ``apply_fn``.
        streams: keys of the rng streams of a training step; None for scoring, where nothing is mutable either.
    """

    def __init__(
        self, state: TrainState, loss: Loss, kwargs: Mapping[str, Any], streams: Mapping[str, Array] | None = None
    ) -> None:
        self._loss, self._output = loss, _output_of(state)
        self._known: dict[Any, tuple[int, ...]] = {}
        collections = _collections(state)
        variables = {"params": module_params(state.params), **collections}
        self._collections = f"one with {list(collections)}" if collections else "none"
        self._variables, self._mesh = shapes_of(variables), mesh_of(variables)
        mutable = list(collections) if streams is not None else []
        apply_fn = state.apply_fn  # the state itself must not be kept alive

        def outputs(variables: Any, args: tuple, given: Mapping) -> Array:
            extra: dict[str, Any] = {"mutable": mutable} if mutable else {}
            extra |= {"rngs": dict(streams)} if streams else {}
            with nn.intercept_methods(on_one_device):
                out = apply_fn(variables, *args, **extra, **{**kwargs, **given})
            return selected(out[0] if mutable else out, self._output)

        self._outputs = outputs

    def __call__(self, batch: Batch, where: str = "train") -> Batch:
        """The batch, checked; ``where`` begins an error.

        Raises:
            ValueError: for a batch that the module or the loss does not take.
        """
        *leading, C = self._shape(batch, where)
        return batch.flat(tuple(leading), C, self._loss, where)

    def _shape(self, batch: Batch, where: str) -> tuple[int, ...]:
        """The shape of the module's output, found without computing, once for each shape of batch."""
        given = batch.args, batch.kwargs
        leaves, structure = jax.tree.flatten(given)
        key = structure, tuple((np.shape(leaf), getattr(leaf, "dtype", type(leaf))) for leaf in leaves)
        if key not in self._known:
            try:
                self._known[key] = evaluated(self._outputs, self._mesh, self._variables, *given).shape
            except flax.errors.ScopeCollectionNotFound as error:
                raise ValueError(
                    f"{where}: `state` must have the module's collections in a field `model_state`, as "
                    f'model_state={{"batch_stats": …}}, got {self._collections}. A field of another name, such as '
                    f"`batch_stats`, is not looked at. {error}"
                ) from error
            except (flax.errors.FlaxError, AttributeError, TypeError, ValueError) as error:
                shapes = jax.tree.map(np.shape, given[0] or given[1])
                raise ValueError(
                    f"{where}: the batch must be one that the model takes, got arguments of shapes {shapes}: {error}"
                ) from error
        return self._known[key]


def balanced_weights(loss: Loss, flat: Iterable[Batch]) -> np.ndarray:
    """The weight of each class for ``class_weight="balanced"``: ``n / (classes · rows of the class)``.

    Args:
        loss: the loss of a row.
        flat: all batches, as a :class:`Door` gives them.

    Returns:
        Weights ``(max(C, 2),)``; 1 for a class without rows.

    Raises:
        ValueError: for targets that are not one label a row.
    """
    counts = np.zeros(2)
    for batch in flat:
        y: Any = batch.y
        if y.ndim == 2 and not on_host(is_labelled(loss, on_device(y))):
            raise ValueError("train: `class_weight` needs targets that are one label a row, got others.")
        labels = y if y.ndim == 1 else on_host(labels_of(loss, on_device(y)))
        C = max(len(counts), int(labels.max()) + 1, y.shape[1] if y.ndim == 2 else 2)
        counts = np.pad(counts, (0, C - len(counts)))
        counts += np.bincount(labels if batch.weight is None else labels[batch.weight > 0], minlength=C)
    there = counts > 0
    return np.where(there, counts.sum() / (there.sum() * np.maximum(counts, 1)), 1.0).astype("float32")


# Of `state`, `batch` (as a Door gives it), `run_decay` (None for a state without), `streams` (keys) and `class_weight`:
# the new state and the mean loss.
Step = Callable[..., tuple[Any, Array]]


def gradient_step(loss: Loss, kwargs: Mapping[str, Any] | None) -> Step:
    """One jitted step of the optimizer on the mean loss of a batch, as in any Flax loop; the state is donated.

    Each rng stream is folded with the step. The mean is weighted: ``Σ w ℓ / Σ w``, with the weight of the row times
    that of its class.

    Args:
        loss: the loss of a row.
        kwargs: keyword arguments of ``apply_fn``.
    """
    return _gradient_step(loss, Static.of(dict(kwargs or {})))


@_kept
def _gradient_step(loss: Loss, static: Static) -> Step:
    kwargs = static.join()

    @functools.partial(jax.jit, donate_argnums=0, static_argnums=5)
    def jitted(
        state: Any,
        batch: Batch,
        run_decay: Array | None,
        streams: Mapping[str, Array],
        class_weight: Array | None,
        places: Places,
    ) -> tuple[Any, Array]:
        if run_decay is not None:
            state = state.replace(opt_state=state.opt_state._replace(run_decay=run_decay))
        collections = _collections(state)
        mutable = list(collections)

        def mean_loss(params: Any) -> tuple[Array, Any]:
            rngs = {name: jax.random.fold_in(key, state.step) for name, key in streams.items()}
            with nn.intercept_methods(on_one_device):
                out = state.apply_fn(
                    {"params": params, **collections},
                    *batch.args,
                    **({"rngs": rngs} if rngs else {}),
                    **({"mutable": mutable} if mutable else {}),
                    **{**kwargs, **batch.kwargs},
                )
            out, updates = out if mutable else (out, {})
            outputs, y, weight = _rows_of(out, batch, _output_of(state), loss)
            weight = _of_classes(weight, class_weight, y, loss)
            return weight @ loss.value(outputs, y) / jnp.sum(weight), updates

        (value, updates), grads = jax.value_and_grad(mean_loss, has_aux=True)(module_params(state.params))
        changed = {"model_state": _as_before(collections, updates)} if mutable else {}
        return at_places(with_value(state, value, grads=grads, **changed), places), value

    def step(state: Any, batch: Batch, run_decay: Array | None, **others: Any) -> tuple[Any, Array]:
        def run(state: Any, *arguments: Any) -> tuple[Any, Array]:
            return jitted(state, *arguments, places_of(state))  # JAX would shard the new state as it likes

        return automatically(run, state, batch, run_decay, others["streams"], others["class_weight"])

    return step


def _as_before(collections: Any, updates: Any) -> Any:
    """The collections that a step has changed, in the containers that they had."""
    counts = {name: [len(jax.tree.leaves(tree[name])) for tree in (collections, updates)] for name in collections}
    if other := [name for name, (before, after) in counts.items() if before != after]:
        raise ValueError(
            "train: a step must leave as many arrays in `state.model_state` as it found, but it changes the number in "
            f"{', '.join(other)}. A module that sows values there adds to them in every step: leave such a collection "
            "out of `model_state`."
        )
    return jax.tree.unflatten(jax.tree.structure(collections), jax.tree.leaves(updates))


def scoring(
    state: TrainState,
    loss: Loss,
    kwargs: Mapping[str, Any] | None,
    class_weight: Array | None = None,
) -> Callable[[Any, UserData], dict[str, float]]:
    """A function that scores a state on rows.

    Args:
        state: a state with the ``apply_fn`` and the head of those to be scored.
        loss: the loss of a row.
        kwargs: keyword arguments of ``apply_fn``; None for those that the head was found with.
        class_weight: weights of classes, which count in the loss.

    Returns:
        A function of a state and of data. It returns the mean ``loss`` and, if the rows have labels, the ``accuracy``
        in [0, 1].
    """
    head = state.head if isinstance(state, CronosTrainState) else None
    given_by = head if kwargs is None else None
    if kwargs is None:
        kwargs = {} if head is None else head.kwargs
    kwargs = with_method(state.apply_fn, head, {name: value for name, value in kwargs.items() if name != "mutable"})
    sums = _sums(state.apply_fn, _output_of(state), loss, Static.of(dict(kwargs)))
    door = Door(state, loss, kwargs)

    def score(state: Any, data: UserData) -> dict[str, float]:
        params, collections = _params_to_score(state), _collections(state)
        each: list[tuple[Array, ...]] = []
        for batch in data.batches():
            if given_by is not None:
                given_by.check_own_rows(batch.args, batch.kwargs, data.place)
            checked = batch_on_device(door(batch, data.place))
            each.append(automatically(sums, params, collections, checked, class_weight))
        if not each:
            raise data.empty()
        total, weights, hits, count, labelled = map(np.asarray, zip(*on_host(each), strict=True))
        figures = {"loss": float(total.sum() / weights.sum())}
        if labelled.all():
            figures["accuracy"] = float(hits.sum() / count.sum())
        return figures

    return score


def _params_to_score(state: TrainState) -> Any:
    """The ``eval_params`` of a state that has them, else the parameters that the module is applied with."""
    # Not getattr with a default: what a property raises is the user's to see.
    given = state.eval_params if inspect.getattr_static(state, "eval_params", None) is not None else None  # type: ignore[attr-defined]
    return module_params(state.params) if given is None else given


@_kept
def _sums(apply_fn: Callable, output: Any, loss: Loss, static: Static) -> Callable[..., tuple[Array, ...]]:
    """Gives sums over a batch: losses, their weights, correct rows, their weights; and whether all rows have labels."""
    kwargs = static.join()

    @jax.jit
    def sums(params: Any, collections: Any, batch: Batch, class_weight: Array | None) -> tuple[Array, ...]:
        out = apply_fn({"params": params, **collections}, *batch.args, **{**kwargs, **batch.kwargs})
        outputs, y, weight = _rows_of(out, batch, output, loss)
        hits = weight @ (loss.predicted(outputs) == loss.labels(y)).astype(weight.dtype)
        weighted = _of_classes(weight, class_weight, y, loss)
        labelled = jnp.asarray(loss.is_labelled(y))
        return weighted @ loss.value(outputs, y), jnp.sum(weighted), hits, jnp.sum(weight), labelled

    return sums


def _rows_of(out: Any, batch: Batch, output: Any, loss: Loss) -> tuple[Array, Array, Array]:
    """Outputs ``(rows, C)``, leading axes flattened, targets ``(rows, C)`` and weights ``(rows,)``."""
    out = selected(out, output)
    C = out.shape[-1]
    outputs = out.reshape(-1, C).astype(jnp.promote_types(out.dtype, jnp.float32))
    y = loss.targets(jnp.asarray(batch.y), C).astype(outputs.dtype)
    if batch.weight is None:
        return outputs, y, jnp.ones(len(outputs), outputs.dtype)
    weight = jnp.asarray(batch.weight, outputs.dtype)
    return jnp.where(weight[:, None] > 0, outputs, 0), y, weight  # what a padded row gives may not be finite


def _of_classes(weight: Array, class_weight: Array | None, y: Array, loss: Loss) -> Array:
    """The weights of rows, each times that of the row's class."""
    return weight if class_weight is None else weight * class_weight.astype(weight.dtype)[loss.labels(y)]


def _output_of(state: TrainState) -> Any:
    """Which output of the module is trained."""
    return state.head.module.output if isinstance(state, CronosTrainState) else None


def _collections(state: TrainState) -> Any:
    """The module's collections other than its parameters."""
    return getattr(state, "model_state", {})
