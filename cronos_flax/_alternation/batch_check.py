"""The check of a batch before it is trained or scored on."""

from collections.abc import Iterable, Mapping
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import DenyList
from flax.training.train_state import TrainState
from jax import Array

from cronos_flax._alternation.apply_fn import called, not_taken
from cronos_flax._alternation.backbone import module_params
from cronos_flax._alternation.train_state import CronosTrainState
from cronos_flax._head.data import Batch, several_said, shapes_said
from cronos_flax._head.functional import WrongOutputError
from cronos_flax._head.nnx_collections import NnxFunction
from cronos_flax._solver.checks import class_sizes, is_labelled
from cronos_flax._solver.loss import Loss
from cronos_flax._solver.meshes import evaluated, mesh_of, shapes_of
from cronos_flax._solver.transfer import on_device, on_host
from cronos_flax._solver.user_warnings import warn

_NO_LOSSES = {"params", "intermediates", "perturbations"}  # collections of Flax

_OF_BOTH = (
    "If the module returns something else with train_kwargs than without, give output= a function that takes both, "
    "such as output=lambda out: out[0] if isinstance(out, tuple) else out."
)


class BatchCheck:
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
        self._loss = loss
        self._known: dict[Any, tuple[int, ...]] = {}
        collections = collections_of(state)
        variables = {"params": module_params(state.params), **collections}
        self._collections = f"one with {list(collections)}" if collections else "none"
        self._variables, self._mesh = shapes_of(variables), mesh_of(variables)
        mutable = list(collections) if streams is not None else []
        apply_fn, output = state.apply_fn, output_of(state)  # the state itself must not be kept alive
        self._apply_fn, self._extra = apply_fn, ["mutable"] * bool(mutable) + ["rngs"] * bool(streams)
        self._streams = None if streams is None else list(streams)

        def outputs(variables: Any, args: tuple, given: Mapping) -> Array:
            return called(apply_fn, output, variables, args, {**kwargs, **given}, mutable, streams)[0]

        def sown_into(variables: Any, args: tuple, given: Mapping) -> Mapping:
            return called(apply_fn, output, variables, args, {**kwargs, **given}, DenyList(("params",)), streams)[1]

        self._outputs = outputs
        self._expected = _NO_LOSSES | set(collections)
        self._sown_into = None if streams is None or isinstance(apply_fn, NnxFunction) else sown_into

    def __call__(self, batch: Batch, where: str = "train") -> Batch:
        """The batch, checked; ``where`` begins an error.

        Raises:
            ValueError: for a batch that the module or the loss does not take.
        """
        *leading, C = self._shape(batch, where)
        return batch.flat(tuple(leading), C, self._loss, where)

    def has_labels(self, y: np.ndarray) -> bool:
        """Whether these targets of a checked batch are one label a row."""
        return _has_labels(self._loss, y)

    def _shape(self, batch: Batch, where: str) -> tuple[int, ...]:
        """The shape of the module's output, found without computing, once for each shape of batch."""
        given = batch.args, batch.kwargs
        leaves, structure = jax.tree.flatten(given)
        key = structure, tuple((np.shape(leaf), getattr(leaf, "dtype", type(leaf))) for leaf in leaves)
        if key not in self._known:
            try:
                out: Any = evaluated(self._outputs, self._mesh, self._variables, *given)
            except flax.errors.ScopeCollectionNotFound as error:
                raise ValueError(
                    f"{where}: `state` must have the module's collections in a field `model_state`, as "
                    f'model_state={{"batch_stats": …}}, got {self._collections}. A field of another name, such as '
                    f"`batch_stats`, is not looked at. {error}"
                ) from error
            except WrongOutputError as error:
                raise ValueError(f"{where}: {error} {_OF_BOTH}") from error
            except flax.errors.InvalidRngError as error:
                there = "scoring has none: give eval_kwargs under which the module needs none, such as train=False"
                if self._streams is not None:
                    there = f"a gradient step has those that are named by `rngs`, got {self._streams}"
                raise ValueError(f"{where}: the module needs a random stream, and {there}. {error}") from error
            except (flax.errors.FlaxError, AttributeError, TypeError, ValueError) as error:
                if refused := not_taken(self._apply_fn, self._extra, error):
                    raise ValueError(f"{where}: {refused} {error}") from error
                if self._streams is None and isinstance(error, flax.errors.ModifyScopeVariableError):
                    raise ValueError(
                        f"{where}: the module must change no collection where it is scored: give eval_kwargs under "
                        "which it does not, such as train=False. If training is an attribute of the module, give an "
                        "`apply_fn` that takes it: lambda variables, x, train=False, **kwargs: "
                        f"Net(train).apply(variables, x, **kwargs). {error}"
                    ) from error
                shapes = shapes_said(given[0] or given[1])
                raise ValueError(
                    f"{where}: the batch must be one that the model takes, got arguments of shapes {shapes}: {error}"
                    f"{several_said(given[0])}"
                ) from error
            self._known[key] = _shape_of(out, where)
            self._warn_of_sown(given)
        return self._known[key]

    def _warn_of_sown(self, given: tuple[Any, ...]) -> None:
        """Warn, once, of collections that the module sows into: a training step takes no losses from there."""
        sown_into, self._sown_into = self._sown_into, None
        if sown_into is None:
            return
        try:
            sown = evaluated(sown_into, self._mesh, self._variables, *given)
        except Exception:  # a function of the user's own may take no `mutable`
            return
        named = sorted(name for name in set(sown) - self._expected if jax.tree.leaves(sown[name]))
        if named:
            warn(
                f"train: the module sows into {named}, and the loss of cf.train holds nothing of that. If these are "
                "auxiliary losses, as of a mixture of experts, they are not trained on: take gradient steps of your "
                f"own (apply_fn with mutable={named}, then state.apply_gradients), and solve with state.solve_head. If "
                'not, sow them into "intermediates".'
            )


def _shape_of(out: Any, where: str) -> tuple[int, ...]:
    """The shape of outputs, if they are one array of floats."""
    if not isinstance(out, jax.ShapeDtypeStruct) or not out.ndim:
        raise ValueError(
            f"{where}: the module must return one array (..., C), got {jax.tree.map(np.shape, out)}. Choose one with "
            f"output= of find_head, or, in a state without a head, by its apply_fn. {_OF_BOTH}"
        )
    if not jnp.issubdtype(out.dtype, jnp.floating):
        raise ValueError(f"{where}: the module must return floats, got {out.dtype}. Look at the inputs of the batch.")
    return out.shape


def balanced_weights(loss: Loss, flat: Iterable[Batch]) -> np.ndarray:
    """The weight of each class for ``class_weight="balanced"``: ``n / (classes · rows of the class)``.

    A row whose target are probabilities is counted for each class with its probability.

    Args:
        loss: the loss of a row.
        flat: all batches, as a :class:`BatchCheck` gives them.

    Returns:
        Weights ``(max(C, 2),)``; 1 for a class without rows.

    Raises:
        ValueError: for targets that are not one label a row.
    """
    counts = np.zeros(2)
    for batch in flat:
        y: Any = batch.y
        if not _has_labels(loss, y):
            raise ValueError("train: `class_weight` needs targets that are one label a row, got others.")
        if y.ndim == 1:
            some = np.bincount(y if batch.weight is None else y[batch.weight > 0], minlength=2)
        else:
            weight = np.ones(len(y), y.dtype) if batch.weight is None else batch.weight
            some = on_host(class_sizes(loss, on_device(y), on_device(weight)))
        C = max(len(counts), len(some))
        counts = np.pad(counts, (0, C - len(counts))) + np.pad(some, (0, C - len(some)))
    there = counts > 0
    return np.where(there, counts.sum() / (there.sum() * np.where(there, counts, 1)), 1.0).astype("float32")


def _has_labels(loss: Loss, y: np.ndarray) -> bool:
    """Whether flat targets are one label a row."""
    return y.ndim == 1 or bool(on_host(is_labelled(loss, on_device(y))))


def output_of(state: TrainState) -> Any:
    """Which output of the module is trained."""
    return state.head.module.output if isinstance(state, CronosTrainState) else None


def collections_of(state: TrainState) -> Any:
    """The module's collections other than its parameters."""
    return getattr(state, "model_state", {})
