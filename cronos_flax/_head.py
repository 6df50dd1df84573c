"""The layer-solver: find the two-layer head of a linen module, prove it, and replace it by a solve.

A head is ``Dense → relu → Dense`` at the end of the module. Names do not tell where it is, so the calls are watched;
and what was watched is not believed until the module's outputs have been reproduced from the head's input, with the
weights that are there and with random ones.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import FrozenDict
from jax import Array
from jaxtyping import Float

from cronos_flax._cronos import Cronos
from cronos_flax._solution import Solution, Status, TwoLayer
from cronos_flax._weights import predict

_TAPPED = "cronos_flax_tapped"  # the collection that inputs are sown into
_CHUNK = 1024  # rows per feature pass where data come as whole arrays

Path = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class _Call:
    """How the module is called, apart from its variables and positional arguments."""

    model: nn.Module
    method: Any
    kwargs: Mapping[str, Any]
    output: Any

    def __call__(
        self, variables: Mapping, args: tuple, tap: Callable[[Path], bool]
    ) -> tuple[Array, dict[Path, Array], list[Path]]:
        """The chosen output, the inputs of the Dense layers that ``tap`` names, and all Dense layers in call order."""
        order: list[Path] = []

        def watch(call: Callable, inputs: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
            module = context.module
            if isinstance(module, nn.Dense) and context.method_name == "__call__":
                if module.path in order:
                    order.remove(module.path)
                order.append(module.path)
                if inputs and tap(module.path):
                    module.sow(_TAPPED, "input", inputs[0], init_fn=lambda: None, reduce_fn=lambda _, new: new)
            return call(*inputs, **kwargs)

        kwargs = dict(self.kwargs)
        mutable = kwargs.pop("mutable", False)
        if mutable is not True:
            mutable = [*([mutable] if isinstance(mutable, str) else mutable or ()), _TAPPED]
        with nn.intercept_methods(watch):
            out, updates = self.model.apply(variables, *args, method=self.method, mutable=mutable, **kwargs)
        sown = flax.traverse_util.flatten_dict(flax.core.unfreeze(updates.get(_TAPPED, {})))
        inputs = {path[:-1]: value for path, value in sown.items()}
        return _select(out, self.output), inputs, order


def _select(out: Any, output: Any) -> Any:
    if output is None:
        return out
    return output(out) if callable(output) else out[output]


@dataclasses.dataclass(frozen=True, eq=False)
class Head:
    """The two-layer head of a module: where it is, and how to read, write and feed it.

    Made by :func:`find_head`. ``str(head)`` is a report.

    Args:
        call: the module and how it is called.
        hidden_path: path of the hidden Dense within ``variables["params"]``.
        output_path: path of the output Dense.
        features: width p of the head's input.
        hidden: number m of hidden neurons.
        outputs: number C of outputs.
    """

    call: _Call
    hidden_path: Path
    output_path: Path
    features: int
    hidden: int
    outputs: int

    @property
    def paths(self) -> tuple[Path, Path]:
        """The two paths that a solve writes, hidden first."""
        return self.hidden_path, self.output_path

    def read(self, variables: Mapping) -> TwoLayer:
        """The head's weights as they are in ``variables``."""
        hidden, output = (_at(variables["params"], path) for path in self.paths)
        return TwoLayer(hidden["kernel"], hidden.get("bias"), output["kernel"], output.get("bias"))

    def write(self, variables: Mapping, network: TwoLayer) -> Mapping:
        """A copy of ``variables`` with these weights in the head, in the dtypes that were there."""
        params = variables["params"]
        for path, kernel, bias in (
            (self.hidden_path, network.kernel1, network.bias1),
            (self.output_path, network.kernel2, network.bias2),
        ):
            old = _at(params, path)
            new = {"kernel": kernel} if bias is None else {"kernel": kernel, "bias": bias}
            params = _replace(params, path, jax.tree.map(lambda o, v: jnp.asarray(v, o.dtype), dict(old), new))
        return _replace(variables, ("params",), params)

    def inputs(self, variables: Mapping, *args: Any) -> Float[Array, "n p"]:
        """The head's input for a batch, leading axes flattened: one jitted pass through the backbone."""
        try:
            tapped = self._tap(variables, args)
        except (flax.errors.FlaxError, TypeError, ValueError) as error:
            shapes = jax.tree.map(jnp.shape, args)
            raise ValueError(
                f"fit_head: the batch must be one that the model takes, got arguments of shapes {shapes}: {error}"
            ) from error
        return tapped.reshape(-1, self.features)

    @functools.cached_property
    def _tap(self) -> Callable[[Mapping, tuple], Array]:
        wanted = self.hidden_path
        return jax.jit(lambda variables, args: self.call(variables, args, lambda path: path == wanted)[1][wanted])

    def __str__(self) -> str:
        hidden, output = (_names([path]) for path in self.paths)
        return (
            f"Head of {type(self.call.model).__name__}: {hidden} ({self.features} → {self.hidden}), relu, "
            f"{output} ({self.hidden} → {self.outputs}); proved by value. A solve writes these two layers, "
            "everything else is left as it is."
        )


def _at(tree: Mapping, path: Path) -> Mapping:
    for key in path:
        tree = tree[key]
    return nn.meta.unbox(tree)


def _replace(tree: Mapping, path: Path, value: Any) -> Mapping:
    """A copy of nested mappings, frozen or boxed where they were, with ``value`` at ``path``."""
    if path:
        new = {**tree, path[0]: _replace(tree[path[0]], path[1:], value)}
    else:
        new = nn.meta.replace_boxed(dict(tree), dict(value))
    return FrozenDict(new) if isinstance(tree, FrozenDict) else new


def find_head(
    model: nn.Module, variables: Mapping, *args: Any, method: Any = None, output: Any = None, **kwargs: Any
) -> Head:
    """Find the head ``Dense → relu → Dense`` that a linen module ends in, and prove it by value.

    Called as ``model.apply`` would be, on one real batch; the arguments given by keyword (``train=False``, ``rngs``, …)
    are used again for every feature pass. The module and the variables are not changed.

    Args:
        model: a linen module; nothing in it needs to be prepared.
        variables: its variables, with ``"params"``.
        *args: the positional arguments of ``model.apply`` for one batch of at least two rows.
        method: as for ``model.apply``.
        output: which output ends in the head, where there are several: a key, an index, or a function of the outputs.
        **kwargs: the keyword arguments of ``model.apply``.

    Returns:
        The :class:`Head`.

    Raises:
        ValueError: if the module has no such head; the message says what was found instead.

    Example:
        >>> import jax, flax.linen as nn, cronos_flax as cf
        >>> model = nn.Sequential([nn.Dense(8), nn.tanh, nn.Dense(16), nn.relu, nn.Dense(3)])
        >>> x = jax.random.normal(jax.random.key(0), (32, 5))
        >>> head = cf.find_head(model, model.init(jax.random.key(1), x), x)
        >>> head.hidden_path, head.output_path
        (('layers_2',), ('layers_4',))
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"find_head: `model` must be a linen module, got {type(model).__name__}.")
    if not isinstance(variables, Mapping) or "params" not in variables:
        raise ValueError("find_head: `variables` must be a mapping with 'params', as model.init returns it.")
    if any(jnp.size(leaf) == 0 for leaf in jax.tree.leaves(args)):
        raise ValueError("find_head: the batch must not be empty; give one real batch.")
    call = _Call(model, method, kwargs, output)
    order: list[Path] = []

    def watch(variables: Mapping, args: tuple) -> tuple[Array, dict[Path, Array]]:
        out, inputs, calls = call(variables, args, lambda _: True)
        order[:] = calls
        return out, inputs

    run = jax.jit(watch)
    try:
        out, inputs = run(variables, args)
    except (flax.errors.FlaxError, TypeError, ValueError) as error:
        shapes = jax.tree.map(jnp.shape, args)
        raise ValueError(
            f"find_head: the module cannot be applied to the batch given, of shapes {shapes}: {error}"
        ) from error
    if not isinstance(out, Array) or out.ndim < 1:
        raise ValueError(
            f"find_head: the module must return one array (..., C), got {jax.tree.map(jnp.shape, out)}. "
            "Choose one with output=: a key, an index, or a function of the outputs."
        )
    if not jnp.issubdtype(out.dtype, jnp.floating) or not bool(jnp.all(jnp.isfinite(out))):
        raise ValueError(
            "find_head: the module's outputs on the batch must be finite floats. Check batch and variables."
        )

    nearest = ""
    for hidden_path, output_path in _candidates(variables, order, inputs, out):
        features, hidden = inputs[hidden_path].shape[-1], inputs[output_path].shape[-1]
        head = Head(call, hidden_path, output_path, features, hidden, out.shape[-1])
        reason = _disproof(head, run, variables, args, out, inputs[hidden_path])
        if reason is None:
            return head
        nearest = nearest or f"{_names([hidden_path])} → {_names([output_path])}: {reason}"
    raise ValueError(_refusal(model, order, inputs, nearest))


def _candidates(
    variables: Mapping, order: list[Path], inputs: Mapping[Path, Array], out: Array
) -> Iterable[tuple[Path, Path]]:
    """Pairs of Dense layers whose shapes fit, the last ones called first."""

    def width(path: Path) -> int | None:
        """Outputs of a Dense with plain parameters; None where a transform has stacked or hidden them."""
        try:
            kernel = _at(variables["params"], path)["kernel"]
        except (KeyError, TypeError):
            return None
        return kernel.shape[1] if kernel.ndim == 2 and path in inputs else None

    for i in range(len(order) - 1, 0, -1):
        if width(order[i]) != out.shape[-1]:
            continue
        for j in range(i - 1, -1, -1):
            if width(order[j]) == inputs[order[i]].shape[-1]:
                yield order[j], order[i]


def _disproof(head: Head, run: Callable, variables: Mapping, args: tuple, out: Array, features: Array) -> str | None:
    """Why the module is not ``head`` after its backbone; None if it is, on this batch."""
    tol = 6e-2 if jnp.finfo(out.dtype).bits < 32 else 1e-4

    def error(network: TwoLayer, features: Array, out: Array) -> float:
        rows = features.reshape(-1, head.features).astype(jnp.float32)
        network = jax.tree.map(lambda v: v.astype(jnp.float32), network)
        with jax.default_matmul_precision("highest"):
            expected = predict(network, rows)
        got = out.reshape(-1, head.outputs).astype(jnp.float32)
        if expected.shape != got.shape:
            return float("inf")
        return float(jnp.max(jnp.abs(expected - got)) / (jnp.max(jnp.abs(got)) + jnp.finfo(jnp.float32).tiny))

    found = error(head.read(variables), features, out)
    if not found <= tol:
        return f"its outputs differ from those of Dense → relu → Dense by {found:.2g} of their size"
    # With the weights that are there, no neuron might be off, or a tied layer might go unseen: try random ones.
    probe = _random_like(head.read(variables), features)
    probe_out, probe_inputs = run(head.write(variables, probe), args)
    moved = float(jnp.max(jnp.abs(probe_inputs[head.hidden_path].astype(jnp.float32) - features.astype(jnp.float32))))
    if moved > tol * float(jnp.max(jnp.abs(features)) + 1):
        return "the head's own input changes with the head's weights, so they are used elsewhere too"
    found = error(head.read(head.write(variables, probe)), features, probe_out)
    if not found <= tol:
        return f"with other weights its outputs differ from Dense → relu → Dense by {found:.2g} of their size"
    return None


def _random_like(network: TwoLayer, features: Array) -> TwoLayer:
    """A head whose neurons are on for about half of the rows."""
    leaves, treedef = jax.tree.flatten(network)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    noise = [jax.random.normal(key, jnp.shape(leaf)) for key, leaf in zip(keys, leaves, strict=True)]
    draw = jax.tree.unflatten(treedef, noise)
    rows = features.reshape(-1, features.shape[-1]).astype(jnp.float32)
    size = jnp.sqrt(jnp.mean(jnp.sum(jnp.square(rows), axis=1)))
    return dataclasses.replace(
        draw,
        kernel1=draw.kernel1 / jnp.where(size > 0, size, 1),
        kernel2=draw.kernel2 / jnp.sqrt(draw.kernel2.shape[0]),
    )


def _names(paths: Iterable[Path]) -> str:
    return ", ".join("/".join(path) or "the module itself" for path in paths)


def _refusal(model: nn.Module, order: list[Path], inputs: Mapping[Path, Array], nearest: str) -> str:
    expected = f"find_head: {type(model).__name__} must end in Dense → relu → Dense"
    if nearest:
        return (
            f"{expected}; the nearest candidate is {nearest}. Something else stands between or after the two layers "
            "(another activation, a norm, dropout, a skip), or they are shared. End the module in a plain "
            "nn.Dense, nn.relu, nn.Dense, or choose another output with output=."
        )
    hidden = [path for path in order if path not in inputs]
    if hidden:
        return f"{expected}, outside nn.scan and nn.vmap; got {_names(hidden)} inside such a transform."
    names = _names(order)
    found = {0: "it calls no nn.Dense", 1: f"it calls one nn.Dense only ({names})"}.get(
        len(order), f"no two of its Dense layers ({names}) fit together and to the output"
    )
    return f"{expected}, but {found}. Give it a hidden layer: nn.Dense(m), nn.relu, nn.Dense(C)."


def fit_head(
    head: Head,
    variables: Mapping,
    data: Any,
    *,
    solver: Cronos | None = None,
    unpack: Callable[[Any], tuple] | None = None,
    key: Array | None = None,
    throw: bool = True,
) -> tuple[Mapping, Solution]:
    """Solve for the head of a module on its own features, everything else frozen, starting from the head that is there.

    The regularised loss of the network (see :class:`cronos_flax.Cronos`) never rises; ``variables`` are not changed.

    Args:
        head: from :func:`find_head`.
        variables: the module's variables.
        data: ``(x, y)``, whole arrays; or an iterable of batches, each ``(x, y)``. Targets are what the solver's
            loss takes: labels, or floats with the shape of the module's output, the last axis optional for one output.
        solver: None means ``Cronos()``.
        unpack: for batches of another form: ``unpack(batch)`` returns ``(args, y)`` or ``(args, y, weight)`` with
            ``args`` the tuple of positional arguments of the module.
        key: as for :meth:`cronos_flax.Cronos.solve`.
        throw: raise on numerical failure; else ``solution.status`` tells.

    Returns:
        New variables, and the :class:`Solution`.

    Raises:
        ValueError: for data that do not fit the module, or each other.
        FloatingPointError: if the loss of the present head is not finite, and ``throw``.
    """
    if not isinstance(head, Head):
        raise ValueError(f"fit_head: `head` must come from cf.find_head, got {type(head).__name__}.")
    solver = Cronos() if solver is None else solver
    if not isinstance(solver, Cronos):
        raise ValueError(f"fit_head: `solver` must be a cf.Cronos, got {type(solver).__name__}.")
    X, y, weight = _gather(head, variables, data, unpack)
    network = head.read(variables)
    solution = solver.solve(X, y, init=network, sample_weight=weight, key=key)
    if throw and solution.status == Status.nonfinite:
        raise FloatingPointError(f"fit_head: {solution.status.message}")
    fitted = head.write(variables, solution.params)
    if jnp.result_type(network.kernel1, network.kernel2) != solution.params.kernel1.dtype:
        # Rounding to the parameters' own precision comes after the solve, and may undo it.
        rounded = jax.tree.map(lambda v: v.astype(X.dtype), head.read(fitted))
        objective = solver.objective(rounded, X, y, solution.stats.beta, sample_weight=weight)
        accepted = bool(objective <= solution.stats.initial_objective)
        objective = objective if accepted else solution.stats.initial_objective
        fitted = fitted if accepted else variables
        params = rounded if accepted else jax.tree.map(lambda v: v.astype(X.dtype), network)
        stats = dataclasses.replace(solution.stats, objective=objective)
        solution = dataclasses.replace(solution, params=params, stats=stats)
    return fitted, solution


def _gather(
    head: Head, variables: Mapping, data: Any, unpack: Callable[[Any], tuple] | None
) -> tuple[Array, Array, Array | None]:
    """Features ``(n, p)``, targets ``(n, C)`` and weights of all batches."""
    features, targets, weights = [], [], []
    for batch in _batches(data, unpack):
        args, y, weight = batch
        rows = head.inputs(variables, *args)
        features.append(rows.astype(jnp.promote_types(rows.dtype, jnp.float32)))
        targets.append(_flat(head, y, rows.shape[0]))
        if weight is not None:
            weights.append(jnp.ravel(jnp.asarray(weight)))
    if not features:
        raise ValueError("fit_head: `data` must have at least one batch, got none.")
    if weights and len(weights) != len(features):
        raise ValueError("fit_head: `unpack` must return a weight for every batch or for none.")
    return jnp.concatenate(features), jnp.concatenate(targets), jnp.concatenate(weights) if weights else None


def _flat(head: Head, y: Any, rows: int) -> Array:
    """Labels ``(rows,)`` or targets ``(rows, C)``; what the loss makes of them, the solver says."""
    y = jnp.asarray(y)
    if not jnp.issubdtype(y.dtype, jnp.floating) and y.size == rows and head.outputs > 1:
        return y.reshape(rows)
    if y.size != rows * head.outputs or (y.ndim > 1 and y.shape[-1] != head.outputs and head.outputs > 1):
        raise ValueError(
            f"fit_head: the targets must have {head.outputs} value(s), or a label, for each of the {rows} rows that "
            f"reach the head, got shape {y.shape}."
        )
    return y.reshape(rows, head.outputs)


def _batches(data: Any, unpack: Callable[[Any], tuple] | None) -> Iterable[tuple[tuple, Any, Any]]:
    """``(args, y, weight)`` of every batch."""
    if isinstance(data, tuple) and len(data) == 2 and unpack is None:
        x, y = data
        count = {leaf.shape[0] if jnp.ndim(leaf) else 0 for leaf in jax.tree.leaves((x, y))}
        if len(count) != 1 or 0 in count:
            raise ValueError(
                "fit_head: `data` = (x, y) must be arrays of equally many rows, at least one, got shapes "
                f"{jax.tree.map(jnp.shape, (x, y))}."
            )
        for i in range(0, count.pop(), _CHUNK):
            part_x, part_y = jax.tree.map(lambda leaf, i=i: leaf[i : i + _CHUNK], (x, y))
            yield (part_x,), part_y, None
        return
    if not isinstance(data, Iterable) or isinstance(data, (str, bytes, Mapping)):
        raise ValueError(f"fit_head: `data` must be (x, y) or an iterable of batches, got {type(data).__name__}.")
    for batch in data:
        if unpack is not None:
            unpacked = unpack(batch)
            if not isinstance(unpacked, tuple) or len(unpacked) not in (2, 3) or not isinstance(unpacked[0], tuple):
                raise ValueError(
                    "fit_head: `unpack` must return (args, y) or (args, y, weight) with args a tuple, "
                    f"got {type(unpacked).__name__}."
                )
            yield unpacked if len(unpacked) == 3 else (*unpacked, None)
        elif isinstance(batch, (tuple, list)) and len(batch) == 2:
            yield (batch[0],), batch[1], None
        else:
            raise ValueError(f"fit_head: each batch must be (x, y), got {type(batch).__name__}. Give unpack=.")
