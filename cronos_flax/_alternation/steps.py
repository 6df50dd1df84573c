"""The parts of a training loop that know no schedule: the gradient step, and scoring."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.training.train_state import TrainState
from jax import Array
from jax.tree_util import PyTreeDef

from cronos_flax._alternation.apply_fn import called, with_method
from cronos_flax._alternation.backbone import module_params
from cronos_flax._alternation.batch_check import BatchCheck, collections_of, output_of
from cronos_flax._alternation.train_state import CronosTrainState, with_value
from cronos_flax._head.data import Batch, UserData
from cronos_flax._head.jitted import Static, made_once
from cronos_flax._solver.loss import Loss
from cronos_flax._solver.meshes import Places, at_places, automatically, check_together, places_of
from cronos_flax._solver.transfer import batch_on_device, on_host

_KEPT_COMPILED = 16  # compiled steps and scorings, for other losses and models


# Of `state`, `batch` (as a BatchCheck gives it), `run_decay` (None for a state without), `streams` (keys) and
# `class_weight`: the new state and the mean loss.
Step = Callable[..., tuple[Any, Array]]


def gradient_step(state: TrainState, loss: Loss, kwargs: Mapping[str, Any] | None) -> Step:
    """One jitted step of the optimizer on the mean loss of a batch, as in any Flax loop; the state is donated.

    Each rng stream is folded with the step. The mean is weighted: ``Σ w ℓ / Σ w``, with the weight of the row times
    that of its class.

    Args:
        state: a state with the structure of those to be stepped.
        loss: the loss of a row.
        kwargs: keyword arguments of ``apply_fn``.
    """
    return _gradient_step(jax.tree.structure(state), loss, Static.of(dict(kwargs or {})))


@made_once(_KEPT_COMPILED)
def _gradient_step(structure: PyTreeDef, loss: Loss, static: Static) -> Step:
    """A program of one structure, model and optimizer included, so that it can be given up with them.

    Of the state it takes and gives the arrays alone: JAX would keep the structures, and the models in them.
    """
    kwargs = static.join()
    structures = [structure]  # of the state, before and after a step

    @functools.partial(jax.jit, donate_argnums=0, static_argnums=5)
    def jitted(
        leaves: list[Array],
        batch: Batch,
        run_decay: Array | None,
        streams: Mapping[str, Array],
        class_weight: Array | None,
        places: Places,
    ) -> tuple[list[Array], Array]:
        state: Any = jax.tree.unflatten(structure, leaves)
        if run_decay is not None:
            state = state.replace(opt_state=state.opt_state._replace(run_decay=run_decay))
        collections = collections_of(state)

        def mean_loss(params: Any) -> tuple[Array, Any]:
            rngs = {name: jax.random.fold_in(key, state.step) for name, key in streams.items()}
            variables = {"params": params, **collections}
            given = {**kwargs, **batch.kwargs}
            out, updates = called(
                state.apply_fn, output_of(state), variables, batch.args, given, list(collections), rngs
            )
            outputs, y, weight = _rows_of(out, batch, loss)
            weight = _of_classes(weight, class_weight, y, loss)
            return weight @ loss.value(outputs, y) / jnp.sum(weight), updates

        (value, updates), grads = jax.value_and_grad(mean_loss, has_aux=True)(module_params(state.params))
        changed = {"model_state": _as_before(collections, updates)} if collections else {}
        state = with_value(state, value, grads=grads, **changed)
        structures[1:] = [jax.tree.structure(state)]
        _check_as_many(type(state).__name__, *structures)
        return jax.tree.leaves(at_places(state, places)), value

    def step(state: Any, batch: Batch, run_decay: Array | None, **others: Any) -> tuple[Any, Array]:
        def run(state: Any, *arguments: Any) -> tuple[Any, Array]:
            # JAX would shard the new state as it likes, were it not for the places.
            leaves, value = jitted(jax.tree.leaves(state), *arguments, places_of(state))
            return jax.tree.unflatten(structures[-1], leaves), value

        if jax.tree.structure(state) != structure:
            return gradient_step(state, loss, kwargs)(state, batch, run_decay, **others)
        try:
            return automatically(run, state, batch, run_decay, others["streams"], others["class_weight"])
        except ValueError:
            check_together("train", state=state, batch=batch, rngs=others["streams"])
            raise

    return step


def _check_as_many(kind: str, *structures: PyTreeDef) -> None:
    """Raise a ValueError unless states of this kind, before and after a step, have as many arrays in each field."""
    before, after = (_counts(jax.tree.unflatten(each, range(each.num_leaves))) for each in structures)
    said = {name: f"{count} in `{name}`, {before[name]} before" for name, count in after.items()}
    if other := [said[name] for name in after if after[name] != before[name]]:
        raise ValueError(
            f"train: `apply_gradients` of {kind} must leave as many arrays in the state as it found, got "
            f"{' and '.join(other)}. Let a field that is None at first begin with its arrays. An optimizer whose state "
            "grows, such as optax.monitor, is for a loop of your own."
        )


def _counts(state: Any) -> dict[str, int]:
    """How many arrays each field of a state has."""
    names = [field.name for field in dataclasses.fields(state) if field.metadata.get("pytree_node", True)]
    return {name: len(jax.tree.leaves(getattr(state, name))) for name in names}


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
    sums = _sums(state.apply_fn, output_of(state), loss, Static.of(dict(kwargs)))
    check = BatchCheck(state, loss, kwargs)

    def score(state: Any, data: UserData) -> dict[str, float]:
        params, collections = _params_to_score(state), collections_of(state)
        each: list[tuple[Array, ...]] = []
        for batch in data.batches():
            if given_by is not None:
                given_by.check_own_rows(batch.args, batch.kwargs, data.place)
            checked = batch_on_device(check(batch, data.place))
            try:
                each.append(automatically(sums, params, collections, checked, class_weight))
            except ValueError:
                check_together(data.place, state=(params, collections), batch=checked)
                raise
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


@made_once(_KEPT_COMPILED)
def _sums(apply_fn: Callable, output: Any, loss: Loss, static: Static) -> Callable[..., tuple[Array, ...]]:
    """Gives sums over a batch: losses, their weights, correct rows, their weights; and whether all rows have labels."""
    kwargs = static.join()

    @jax.jit
    def sums(params: Any, collections: Any, batch: Batch, class_weight: Array | None) -> tuple[Array, ...]:
        variables = {"params": params, **collections}
        out, _ = called(apply_fn, output, variables, batch.args, {**kwargs, **batch.kwargs})
        outputs, y, weight = _rows_of(out, batch, loss)
        hits = weight @ (loss.predicted(outputs) == loss.labels(y)).astype(weight.dtype)
        weighted = _of_classes(weight, class_weight, y, loss)
        labelled = jnp.asarray(loss.is_labelled(y))
        return weighted @ loss.value(outputs, y), jnp.sum(weighted), hits, jnp.sum(weight), labelled

    return sums


def _rows_of(out: Array, batch: Batch, loss: Loss) -> tuple[Array, Array, Array]:
    """Outputs ``(rows, C)``, leading axes flattened, targets ``(rows, C)`` and weights ``(rows,)``."""
    C = out.shape[-1]
    outputs = out.reshape(-1, C).astype(jnp.promote_types(out.dtype, jnp.float32))
    y = loss.targets(jnp.asarray(batch.y), C).astype(outputs.dtype)
    if batch.weight is None:
        return outputs, y, jnp.ones(len(outputs), outputs.dtype)
    weight = jnp.asarray(batch.weight, outputs.dtype)
    return jnp.where(weight[:, None] > 0, outputs, 0), y, weight  # what a padded row gives may not be finite


def _of_classes(weight: Array, class_weight: Array | None, y: Array, loss: Loss) -> Array:
    """The weights of rows, each times that of the row's class; of probabilities, the mean of the classes' by these."""
    if class_weight is None:
        return weight
    shares = loss.shares(y)
    missing = shares.shape[1] - len(class_weight)  # outputs above the last class that there is
    of_class = jnp.pad(class_weight.astype(weight.dtype), (0, missing), constant_values=1)
    return weight * jnp.sum(shares * of_class[None], axis=1)
