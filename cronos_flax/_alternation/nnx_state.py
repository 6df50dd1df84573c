"""Train states of NNX models, for ``cf.train`` and for loops in the style of linen."""

from collections.abc import Callable, Mapping
from typing import Any, Self

import flax.training.train_state
import jax
import optax
from flax import nnx, struct
from flax.traverse_util import flatten_dict

from cronos_flax._alternation import train_state
from cronos_flax._alternation.backbone import check_lookahead, check_optimizer, module_params
from cronos_flax._alternation.defaults import Alternation
from cronos_flax._alternation.guard import Guard
from cronos_flax._head.head import Head, check_head
from cronos_flax._head.nnx import NnxModule, module_at
from cronos_flax._head.nnx_collections import NnxFunction, functional, on_collections
from cronos_flax._head.paths import format_path
from cronos_flax._solver.cronos import Cronos
from cronos_flax._solver.transfer import copied


class TrainState(flax.training.train_state.TrainState):
    """Flax's ``TrainState`` of an NNX model: gradient steps alone, in :func:`cronos_flax.train` or your own loop.

    Args:
        model_state: the Variables of the model that are not ``nnx.Param``, as for :class:`CronosTrainState`.
    """

    model_state: Any = struct.field(default_factory=dict)

    @classmethod
    def create(  # type: ignore[override]
        cls,
        *,
        model: nnx.Module,
        tx: optax.GradientTransformation,
        method: str | Callable | None = None,
        train_mode: bool = True,
        **kwargs: Any,
    ) -> Self:
        """A state of a copy of the model; the model itself is not changed, now or later.

        Args:
            model: any NNX model.
            tx: any Optax optimizer; it moves all of ``nnx.Param``.
            method: the name of the method to call, or a function of the model and the arguments; None calls the model.
            train_mode: as for :meth:`CronosTrainState.create`.
            **kwargs: the fields of subclasses.

        Raises:
            ValueError: for a ``model`` or ``tx`` of the wrong kind.
        """
        check_optimizer("TrainState", tx)
        function, variables = _functional("TrainState", model, method, train_mode)
        params = variables.pop("params")
        with jax.transfer_guard("allow"):  # Optax makes its zeros on the host
            state = super().create(apply_fn=function, params=params, tx=tx, model_state=variables, **kwargs)
        check_lookahead("TrainState", state.params, state.opt_state)
        return state

    @property
    def model(self) -> nnx.Module:
        """The trained model, a new one: see :attr:`CronosTrainState.model`."""
        return _model_of(self)


class CronosTrainState(train_state.CronosTrainState):
    """:class:`cronos_flax.CronosTrainState` of an NNX model: what that one does for linen, this one does for NNX.

    The state holds the model's arrays; the model itself is never changed. :attr:`model` makes a new one of them.

    ``params`` are those of all ``nnx.Param``, nested dicts with the model's names and indices as keys. In
    ``model_state`` are the other Variables: ``"batch_stats"``, ``"streams"`` (the state of random streams) and
    ``"others"``. ``head`` is the head for ``variables`` of this form. The guard goes back with all but the streams.

    ``apply_fn(variables, x)`` is the model as after ``model.eval()``. With ``mutable=`` it is the model in training,
    and returns a pair, as in linen: the outputs, and the collections after the call, in which streams have gone on.
    """

    @classmethod
    def create(  # type: ignore[override]
        cls,
        *,
        model: nnx.Module,
        tx: optax.GradientTransformation,
        head: Head,
        solver: Cronos | None = None,
        guard: Guard | bool | None = True,
        alternation: Alternation | None = None,
        train_mode: bool = True,
        **kwargs: Any,
    ) -> Self:
        """A state of a copy of the model; the model itself is not changed, now or later.

        Args:
            model: the model that the head was found in, or one of the same structure.
            tx: any Optax optimizer; it moves all of ``nnx.Param``. Keep some where they are by Optax, as in linen.
            head: from :func:`cronos_flax.nnx.find_head`; its ``method`` is called in gradient steps too.
            solver: as for :meth:`cronos_flax.CronosTrainState.create`.
            guard: as there.
            alternation: as there.
            train_mode: whether gradient steps are made as after ``model.train()``, whatever the mode of the model is:
                with dropout, and batch statistics in norms. False makes them in the mode that each part of the model is
                in now, as for norms that keep their running statistics in fine-tuning.
            **kwargs: the fields of subclasses.

        Raises:
            ValueError: for a ``model``, ``tx``, ``head``, ``solver``, ``guard`` or ``alternation`` of the wrong kind.

        Example:
            >>> import jax, optax, cronos_flax as cf
            >>> from flax import nnx
            >>> rngs = nnx.Rngs(0)
            >>> layers = nnx.Linear(8, 16, rngs=rngs), nnx.tanh, nnx.Linear(16, 16, rngs=rngs), nnx.relu
            >>> model = nnx.Sequential(*layers, nnx.Linear(16, 2, rngs=rngs))
            >>> x = jax.random.normal(jax.random.key(0), (600, 8))
            >>> y = (x[:, 0] * x[:, 1] > 0).astype(int)
            >>> state = cf.nnx.CronosTrainState.create(
            ...     model=model, tx=optax.adam(1e-2), head=cf.nnx.find_head(model, x), solver=cf.Cronos(loss="softmax")
            ... )
            >>> state, history = cf.train(state, (x[:500], y[:500]), epochs=3, validation=(x[500:], y[500:]))
            >>> trained = state.model
            >>> bool((trained(x[500:]).argmax(axis=1) == y[500:]).mean() > 0.7)
            True
        """
        where = "CronosTrainState"
        check_head(where, head, NnxModule)
        assert isinstance(head.module, NnxModule)
        function, variables = _functional(where, model, head.module.method, train_mode)
        head.module.variables(model, where)  # whether it is the model of the head
        params = variables.pop("params")
        for path in head.paths:
            layer = module_at(model, path)
            weights = {"kernel": layer.kernel, "bias": layer.bias}
            others = [name for name, v in weights.items() if v is not None and not isinstance(v, nnx.Param)]
            if others:
                raise ValueError(
                    f"{where}: kernels and biases of the head must be nnx.Param, as gradient steps move these, got "
                    f"another kind of nnx.Variable for {' and '.join(others)} of {format_path(path)}."
                )
        return super().create(
            apply_fn=function,
            params=params,
            tx=tx,
            head=on_collections(head),
            solver=solver,
            guard=guard,
            alternation=alternation,
            model_state=variables,
            **kwargs,
        )

    @property
    def _statistics_in_training(self) -> Any:
        assert isinstance(self.apply_fn, NnxFunction)
        kept_back, statistics = self.apply_fn.kept_back, flatten_dict(self.model_state.get("batch_stats", {}))
        return {path: leaf for path, leaf in statistics.items() if format_path(path[:-1]) not in kept_back}

    @property
    def model(self) -> nnx.Module:
        """The model with the arrays of the state: a new one each time, in the mode that the model was given in.

        Its arrays are those of the state, so a step of yours that donates the state deletes them.
        """
        return _model_of(self)


def _functional(where: str, model: Any, method: Any, train_mode: bool) -> tuple[NnxFunction, dict[str, Any]]:
    if not isinstance(model, nnx.Module):
        raise ValueError(
            f"{where}: `model` must be an NNX module, got {type(model).__name__}. For linen: cf.CronosTrainState, or "
            "Flax's TrainState."
        )
    dicts = [format_path(path) for path, part in nnx.iter_graph(model) if _is_dict(part)]
    if dicts:
        raise ValueError(
            f"{where}: no nnx.Variable of `model` may hold a dict, got one at {', '.join(dicts)}. Give each array a "
            "Variable of its own, in an nnx.Dict; or train by cf.nnx.CronosOptimizer, which takes it."
        )
    function, variables = functional(model, method, train_mode)
    return function, copied(variables)  # a step of the user's may donate the state, and the model must stay


def _is_dict(part: Any) -> bool:
    """Whether a part of a model is a Variable that holds a dict: among collections it looks like more Variables."""
    is_kept = isinstance(part, nnx.Variable) and not isinstance(part, nnx.Intermediate)
    return is_kept and isinstance(part.get_value(), Mapping)


def _model_of(state: Any) -> nnx.Module:
    return state.apply_fn.model({"params": module_params(state.params), **state.model_state})
