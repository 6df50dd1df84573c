"""A two-layer head for linen modules that end in a single layer, or in none."""

from collections.abc import Callable, Mapping
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp

from cronos_flax._head.paths import Path, as_path, format_path
from cronos_flax._head.pointwise import check_features, check_replaceable
from cronos_flax._solver.checks import positive_integer
from cronos_flax._solver.meshes import automatically

Pool = Callable[..., Any]


def _two_layers(x: jax.Array, hidden: int, features: int, parent: nn.Module, **like: Any) -> jax.Array:
    """``Dense → relu → Dense`` as children of a module."""
    check_features(x)
    x = nn.relu(nn.Dense(hidden, parent=parent, name="hidden", **like)(x))
    return nn.Dense(features, parent=parent, name="output", **like)(x)


class Grafted(nn.Module):
    """A module with a two-layer head; made by :func:`graft`. Its parameters are those of ``backbone`` and of the head.

    Args:
        backbone: the module.
        at: path of the layer whose place the head takes; None for a head after the module's output.
        hidden: number of hidden neurons m.
        features: number of outputs C; None for as many as the layer had.
        pool: applied to the head's input first; None for nothing.
    """

    backbone: nn.Module
    at: Path | None
    hidden: int
    features: int | None
    pool: Pool | None

    @nn.compact
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the module is called."""

        def pooled(x: Any) -> Any:
            return x if self.pool is None else self.pool(x, *args, **kwargs)

        if self.at is None:
            assert self.features is not None
            return _two_layers(pooled(self.backbone(*args, **kwargs)), self.hidden, self.features, self)
        path, called = (*self.backbone.path, *self.at), []

        def swap(call: Callable, inputs: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
            layer = context.module
            if context.method_name != "__call__":
                return call(*inputs, **kwargs)
            called.append(layer.path)
            if layer.path != path:
                return call(*inputs, **kwargs)
            at = format_path(path[len(self.backbone.path) :])
            axes = getattr(next(iter(inputs), None), "ndim", None)
            check_replaceable(layer, at, "nn.Dense", self.pool is not None, axes)
            features = getattr(layer, "features", None) if self.features is None else self.features
            if not isinstance(features, int):
                raise ValueError(f"graft: `features` must be given where {type(layer).__name__} is replaced, got None.")
            like = {name: getattr(layer, name) for name in ("dtype", "precision") if hasattr(layer, name)}
            like["param_dtype"] = getattr(layer, "param_dtype", jnp.float32)
            # The head's layers become children of the one that they replace, so lifted transforms hold for them too.
            try:
                return _two_layers(pooled(inputs[0]), self.hidden, features, layer, **like)
            except flax.errors.AssignSubModuleError:
                raise ValueError(
                    f"graft: `at` must be the path of a layer, got {at}, a {type(layer).__name__} that makes its "
                    "layers in setup(). Give the path of one of these layers."
                ) from None

        with nn.intercept_methods(swap):
            out = self.backbone(*args, **kwargs)
        if path not in called:
            depth = len(self.backbone.path)
            there = ", ".join(dict.fromkeys(format_path(p[depth:]) for p in called))
            raise ValueError(
                f"graft: `at` must be the path of a layer that is called, got {format_path(self.at)}; {there}."
            )
        return out


def graft(
    model: nn.Module,
    at: str | Path | None = None,
    *,
    hidden: int,
    features: int | None = None,
    pool: Pool | None = None,
) -> nn.Module:
    """Replace a layer of a module by the head ``Dense(hidden) → relu → Dense(features)``.

    Most pretrained models end in one Dense, or in none; a grafted model has a head that can be solved for. It is an
    ordinary module, and is called like ``model`` (``__call__`` only). Its variables are those of ``model`` under
    ``backbone``, with ``hidden`` and ``output`` at the path of the replaced layer; :func:`graft_variables` copies
    pretrained ones.

    Args:
        model: any linen module; it is not changed.
        at: path of the layer to replace, within the module's parameters: ``("fc",)`` or ``"encoder/fc"``. None puts the
            head after the module's output; ``hidden`` and ``output`` are then beside ``backbone``.
        hidden: number of hidden neurons m.
        features: number of outputs C; None for as many as the layer has.
        pool: a function of the head's input and of all arguments of the module, that returns the new input of the head:
            for instance the mean over tokens, by a mask among the arguments.

    Returns:
        The grafted module.

    Raises:
        ValueError: for arguments outside their range; and, when the module is called, if it calls no layer at ``at``,
            or that is a module which makes its layers in ``setup``, or a layer of Flax that is more than a function of
            the last axis (a lookup, attention; without ``pool``, a convolution that is not 1×1).

    Example:
        >>> import jax, flax.linen as nn, cronos_flax as cf
        >>> model = nn.Sequential([nn.Dense(8), nn.tanh, nn.Dense(10)])
        >>> x = jax.random.normal(jax.random.key(0), (32, 5))
        >>> pretrained = model.init(jax.random.key(1), x)
        >>> grafted = cf.graft(model, at="layers_2", hidden=16)
        >>> variables = cf.graft_variables(grafted, pretrained, jax.random.key(2), x)
        >>> cf.find_head(grafted, variables, x).hidden_path
        ('backbone', 'layers_2', 'hidden')
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"graft: `model` must be a linen module, got {type(model).__name__}. For NNX: cf.nnx.graft.")
    positive_integer("graft", "hidden", hidden)
    if features is not None or at is None:
        positive_integer("graft", "features", features)
    if pool is not None and not callable(pool):
        raise ValueError(f"graft: `pool` must be a function, got {pool!r}.")
    return Grafted(model.clone(parent=None), None if at is None else as_path("graft: `at`", at), hidden, features, pool)


def graft_variables(grafted: nn.Module, pretrained: Mapping, rngs: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """The variables of a grafted module: pretrained ones for the backbone, random ones for the head.

    Args:
        grafted: from :func:`graft`.
        pretrained: the variables of the module that was grafted.
        rngs: as for ``grafted.init``.
        *args: as for ``grafted.init``.
        **kwargs: as for ``grafted.init``.

    Returns:
        New variables; ``pretrained`` is not changed.

    Raises:
        ValueError: if ``pretrained`` is not of the module that was grafted, and if this cannot be called.
    """
    if not isinstance(grafted, Grafted):
        raise ValueError(f"graft_variables: `grafted` must come from cf.graft, got {type(grafted).__name__}.")
    if not isinstance(pretrained, Mapping):
        raise ValueError(f"graft_variables: `pretrained` must be a mapping, got {type(pretrained).__name__}.")

    def made(rngs: Any, args: tuple, kwargs: dict) -> dict[Path, Any]:
        return flax.traverse_util.flatten_dict(flax.core.unfreeze(grafted.init(rngs, *args, **kwargs)))

    def shapes(_: Any, *called: Any) -> dict[Path, Any]:
        return jax.eval_shape(lambda: made(*called))

    given = flax.traverse_util.flatten_dict(flax.core.unfreeze(dict(pretrained)))
    with jax.transfer_guard("allow"):  # Flax counts its random streams on the host
        try:
            fresh = automatically(shapes, pretrained, rngs, args, kwargs)
        except TypeError as error:
            needs = "" if grafted.at is None else " What follows the layer at `at` may need outputs of its width."
            raise ValueError(
                f"graft_variables: the grafted module cannot be called with these arguments: {error}.{needs}"
            ) from error
    replaced = grafted.at

    def is_replaced(path: Path) -> bool:
        return replaced is not None and path[1 : 1 + len(replaced)] == replaced

    moved = {(path[0], "backbone", *path[1:]): leaf for path, leaf in given.items() if not is_replaced(path)}
    wanted = {path for path in fresh if path[1] == "backbone" and not is_replaced((path[0], *path[2:]))}
    wrong = wanted ^ moved.keys() | {p for p in wanted & moved.keys() if _shape(fresh[p]) != _shape(moved[p])}
    if wrong:
        names = ", ".join(sorted(format_path((path[0], *path[2:])) for path in wrong)[:5])
        raise ValueError(
            "graft_variables: `pretrained` must be the variables of the module that was grafted; missing, left over or "
            f"of another shape: {names}."
        )

    def head(_: Any, *called: Any) -> dict[Path, Any]:
        # What is not asked for is not computed: to draw a backbone that is replaced would take most of the time.
        return jax.jit(lambda: {path: leaf for path, leaf in made(*called).items() if path not in moved})()

    with jax.transfer_guard("allow"):
        drawn = automatically(head, pretrained, rngs, args, kwargs)
    return flax.traverse_util.unflatten_dict({path: moved[path] if path in moved else drawn[path] for path in fresh})


def _shape(leaf: Any) -> tuple[int, ...]:
    (array,) = jax.tree.leaves(leaf)  # not unboxed: an explicit mesh would compare it with its annotation
    return array.shape if isinstance(array, jax.ShapeDtypeStruct) else jnp.shape(array)
