"""Find the two-layer head of a module, and verify it numerically.

Names and class attributes do not tell where a head is, so the search records the calls of all fully connected layers.
A pair of layers whose shapes fit is a candidate. It is the head if the formula ``relu(x kernel1 + bias1) kernel2 +
bias2``, applied to the recorded input, gives the module's outputs: with the module's own weights, and with random ones.
"""

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from cronos_flax._head.functional import Call, Functional, Watched
from cronos_flax._head.head import Head, check_there, predicted, relative_difference
from cronos_flax._head.jitted import jitted
from cronos_flax._head.others import moved, rescaled, warning
from cronos_flax._head.own_rows import own_rows
from cronos_flax._head.paths import Path, as_path, format_path
from cronos_flax._solver.checks import all_finite
from cronos_flax._solver.meshes import automatically
from cronos_flax._solver.solution import TwoLayer
from cronos_flax._solver.transfer import on_device, on_host

_TOL, _TOL_HALF = 1e-4, 6e-2  # difference of outputs, relative to the largest, in float32 and in fewer bits
_SPREADS = 0.3, 0.03  # of redrawn variables, relative; the second where the first makes outputs that are not finite
_DEVIATIONS = 16  # the largest of normal numbers, in standard deviations, with a margin
_LARGE = 1e2  # scale of the second random head: shows activations and outputs that are clipped
_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": jax.nn.relu,  # first: others agree with it on small inputs
    "nothing": lambda z: z,
    "gelu": partial(jax.nn.gelu, approximate=True),
    "exact gelu": partial(jax.nn.gelu, approximate=False),
    "silu": jax.nn.silu,
    "tanh": jnp.tanh,
    "sigmoid": jax.nn.sigmoid,
    "elu": jax.nn.elu,
    "selu": jax.nn.selu,
    "leaky relu": jax.nn.leaky_relu,
    "softplus": jax.nn.softplus,
    "relu6": jax.nn.relu6,
    "hard swish": jax.nn.hard_swish,
}
_ENDS: dict[str, Callable[[Array], Array]] = {
    "a softmax": jax.nn.softmax,
    "a log-softmax": jax.nn.log_softmax,
    **{f"a {name}": f for name, f in _ACTIVATIONS.items() if name != "nothing"},
}


class _Pass(NamedTuple):
    """One call of the module: the weights of two layers, the layers' inputs, and the module's output.

    ``every`` are the arrays of all outputs by name, if one was chosen.
    """

    network: TwoLayer
    features: Array
    hidden: Array
    out: Array
    every: dict[str, Array]

    @classmethod
    def of(cls, network: TwoLayer, pair: tuple[Path, Path], seen: Watched) -> Self:
        """The pass that was watched."""
        inputs = {call.layer.path: call.input for call in seen.calls}
        features, hidden = (inputs[path] for path in pair)
        assert features is not None
        assert hidden is not None
        return cls(network, features, hidden, seen.out, seen.every)


class _Verdict(NamedTuple):
    """Whether two layers are the head.

    Args:
        error: largest difference between outputs seen, relative to the largest output.
        reason: why they are not; empty if they are.
        far: of those that are not, whether the module's output is not even that of the second layer.
        others: of those that are, the names of other outputs that use the hidden layer.
    """

    error: float
    reason: str = ""
    far: bool = False
    others: tuple[str, ...] = ()


def find(
    module: Functional, variables: Any, args: tuple, kwargs: Mapping, paths: Any = None, recalibrate: bool = True
) -> Head:
    """The head of a module, verified.

    Args:
        module: the module as pure functions.
        variables: its variables.
        args: positional arguments of one batch.
        kwargs: keyword arguments.
        paths: the paths of the hidden and the output layer, still verified; None to search.
        recalibrate: whether solves of this head set running statistics.

    Raises:
        ValueError: if there is no head; the message says what was found instead and what to do.
    """
    check_there("find_head", (variables, args, dict(kwargs)))
    if any(np.size(leaf) == 0 for leaf in jax.tree.leaves((args, dict(kwargs)))):
        raise ValueError("find_head: the batch must not be empty; give one real batch.")
    run = jitted(module.watch)

    def call_with(pair: tuple[Path, Path], network: TwoLayer, spread: float = 0.0) -> _Pass:
        written = module.write(_redrawn(variables, spread) if spread else variables, pair, network)
        there = module.read(written, pair)
        _check_kept(network, there, pair)
        return _Pass.of(there, pair, run(written, args, kwargs))

    def features_of(path: Path, variables: Any, kwargs: Mapping) -> Array:
        inputs = {call.layer.path: call.input for call in run(variables, args, kwargs).calls}
        features = inputs[path]
        assert features is not None
        return features

    with jax.default_matmul_precision("highest"):
        try:
            watched = run(variables, args, kwargs)
        except Exception as raised:
            shapes = jax.tree.map(np.shape, args)
            raise ValueError(
                f"find_head: the module cannot be applied to these variables and a batch of shapes {shapes}: {raised}"
            ) from raised
        out, calls = watched.out, watched.calls
        _check_output(out)
        candidates: Iterable[tuple[Path, Path]] = _candidates(module, variables, calls, out)
        if paths is not None:
            candidates = [_given(paths, candidates, calls, module.numbered, _extended(module, variables, calls))]
        refused: list[tuple[bool, str]] = []  # whether the pair is far from a head, and why it is none
        for pair in candidates:
            seen = _Pass.of(module.read(variables, pair), pair, watched)
            kinds = _kinds(seen, pair, calls)
            tol, largest = _tolerance(kinds), _largest(kinds)
            verdict = _verified(seen, partial(call_with, pair), tol, largest / _DEVIATIONS)
            if not verdict.reason:
                times = max(call.layer.times for call in calls if call.layer.path in pair)
                if verdict.others or (len(watched.every) > 1 and times > 1):
                    told = warning(module.name, module.output, verdict.others, times, module.graft)
                    warnings.warn(told, UserWarning, stacklevel=3)
                head = _head(module, variables, kwargs, pair, seen, verdict.error, tol, largest)
                redrawn = (_redrawn(variables, spread) for spread in _SPREADS)
                own = own_rows(partial(features_of, pair[0]), variables, redrawn, args, kwargs)
                return dataclasses.replace(head, recalibrate=recalibrate, own_rows=own)
            refused.append((verdict.far, f"{format_path(pair[0])} → {format_path(pair[1])}: {verdict.reason}"))
    nearest = min(refused, key=lambda one: one[0], default=(True, ""))[1]
    again = _called_again(module, variables, calls, out)
    raise ValueError(_refusal(module, calls, nearest, again) + _flat(out) + _extended(module, variables, calls))


def _check_kept(written: TwoLayer, read: TwoLayer, pair: tuple[Path, Path]) -> None:
    """Raise a ValueError if weights are not kept as they are written: a solve would end in another network."""
    differences = vars(on_host(automatically(_differences, read, written)))
    for name, difference in differences.items():
        if difference is not None and not difference <= _TOL:
            raise ValueError(
                f"find_head: the layers of a head must keep weights as they are written, but {name[:-1]} of "
                f"{format_path(pair[name.endswith('2')])} is read as another: something changes it on its way, such as "
                "a hook of an nnx.Variable (on_get_value, on_set_value) or a box of flax.linen.meta. Let it hold "
                "the weights that it multiplies by."
            )


@jax.jit
def _differences(read: TwoLayer, written: TwoLayer) -> TwoLayer:
    def difference(a: Array, b: Array) -> Array:
        a, b = a.astype(jnp.float32), b.astype(a.dtype).astype(jnp.float32)
        return jnp.max(jnp.abs(a - b)) / (jnp.max(jnp.abs(b)) + jnp.finfo(jnp.float32).tiny)

    return jax.tree.map(difference, read, written)


def _head(
    module: Functional,
    variables: Any,
    kwargs: Mapping,
    pair: tuple[Path, Path],
    seen: _Pass,
    error: float,
    tolerance: float,
    largest: float,
) -> Head:
    solved = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(seen.network))
    return Head(
        *pair,
        features=seen.features.shape[-1],
        hidden=seen.hidden.shape[-1],
        outputs=seen.out.shape[-1],
        error=error,
        tolerance=tolerance,
        largest=largest,
        rows=math.prod(seen.features.shape[:-1]),
        frozen=module.count(variables) - solved,
        module=module,
        kwargs=kwargs,
    )


def _check_output(out: Any) -> None:
    if not isinstance(out, Array) or out.ndim < 1:
        raise ValueError(
            f"find_head: the module must return one array (..., C), got {jax.tree.map(np.shape, out)}. "
            "Choose one with output=: a key, an index, or a function of the outputs."
        )
    if not jnp.issubdtype(out.dtype, jnp.floating) or not all_finite(out):
        raise ValueError(
            "find_head: the module's outputs on the batch must be finite floats. Check batch and variables."
        )


def _candidates(module: Functional, variables: Any, calls: tuple[Call, ...], out: Array) -> Iterator[tuple[Path, Path]]:
    """Pairs of layers whose shapes fit, the pair called last first."""
    for i in range(len(calls) - 1, 0, -1):
        last = calls[i]
        if _width(module, variables, last) == out.shape[-1]:
            for first in reversed(calls[:i]):
                if _feeds(module, variables, first, last):
                    yield first.layer.path, last.layer.path


def _width(module: Functional, variables: Any, call: Call) -> int | None:
    """Outputs of a layer, if it has a plain kernel for the last axis of its input, and this was recorded."""
    shape = module.kernel_shape(variables, call.layer.path)
    plain = len(shape) == 2 and not module.own_parameters(variables, call.layer.path)
    return shape[1] if plain and call.input is not None and call.input.shape[-1:] == shape[:1] else None


def _feeds(module: Functional, variables: Any, first: Call, last: Call) -> bool:
    """Whether a layer's outputs have the width of another's inputs."""
    return last.input is not None and _width(module, variables, first) == last.input.shape[-1]


def _called_again(module: Functional, variables: Any, calls: tuple[Call, ...], out: Array) -> str:
    """What to say of a hidden layer whose last call comes after that of its output layer; empty without one."""
    for i, last in enumerate(calls):
        for first in calls[i + 1 :]:
            is_pair = _width(module, variables, last) == out.shape[-1] and _feeds(module, variables, first, last)
            if is_pair and first.layer.times > 1:
                hidden, output = format_path(first.layer.path), format_path(last.layer.path)
                return f"{hidden} is called again after {output}, and a solve of the two would change that call too"
    return ""


def _given(
    paths: Any, candidates: Iterable[tuple[Path, Path]], calls: tuple[Call, ...], numbered: bool, remark: str
) -> tuple[Path, Path]:
    """The pair that the user named, if it is a candidate."""
    if not isinstance(paths, tuple | list) or len(paths) != 2:
        raise ValueError(f"find_head: `paths` must be two paths, of the hidden and of the output layer, got {paths!r}.")
    first, last = (as_path("find_head: each of `paths`", path, numbered) for path in paths)
    if (first, last) not in list(candidates):
        called = ", ".join(format_path(call.layer.path) for call in calls) or "none"
        raise ValueError(
            f"find_head: `paths` must be two layers whose shapes fit together and to the output, got "
            f"{format_path(first)} and {format_path(last)}; layers called: {called}.{remark}"
        )
    return first, last


def _extended(module: Functional, variables: Any, calls: Iterable[Call]) -> str:
    """A remark that names the layers with parameters of their own, which no head can have; empty without any."""
    own = {call.layer.path: module.own_parameters(variables, call.layer.path) for call in calls}
    named = ", ".join(f"{format_path(path)} ({', '.join(names)})" for path, names in own.items() if names)
    if not named:
        return ""
    return (
        f" The layers of a head must have a kernel and a bias only, got more at {named}. Merge them into the kernel, "
        f"or replace the layers with {module.graft}."
    )


def _kinds(seen: _Pass, pair: tuple[Path, Path], calls: Iterable[Call]) -> list[Any]:
    """The dtypes that the two layers compute in, the first one that of their weights."""
    computed = (call.layer.dtype for call in calls if call.layer.path in pair)
    return [jnp.result_type(seen.network.kernel1), seen.out.dtype, seen.features.dtype, *computed]


def _tolerance(kinds: list[Any]) -> float:
    """Relative difference of outputs that rounding explains, in the precision of the two layers."""
    return _TOL if all(jnp.finfo(kind).bits >= 32 for kind in kinds[1:]) else _TOL_HALF


def _largest(kinds: list[Any]) -> float:
    """The largest number that weights and outputs of the two layers can be, at most that of float32."""
    return min(float(jnp.finfo(kind).max) for kind in (jnp.float32, *kinds))


@partial(jax.jit, static_argnames="turned")
def _changed(leaves: list[Array], draws: list[Array], spread: Array, turned: bool) -> list[Array]:
    """Each number times ``exp(spread · draw)``; where it is zero, ``spread · |draw|``. Signs stay, so variances do.

    In masks every second entry is turned over, if ``turned``.
    """

    def changed(leaf: Array, draw: Array) -> Array:
        draw = jnp.broadcast_to(draw, leaf.shape)
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf ^ draw.astype(leaf.dtype) if turned else leaf
        value = leaf.astype(jnp.float32)
        return jnp.where(value == 0, spread * jnp.abs(draw), value * jnp.exp(spread * draw)).astype(leaf.dtype)

    return [changed(leaf, draw) for leaf, draw in zip(leaves, draws, strict=True)]


def _is_mask(leaf: Any) -> bool:
    """Whether a variable may be a mask or a switch: bools, or an array of integers that are all 0 or 1."""
    kind = jnp.result_type(leaf)
    if not jnp.issubdtype(kind, jnp.integer) or jnp.ndim(leaf) == 0:  # a single integer counts steps
        return bool(kind == np.bool_)
    return bool(np.all(np.isin(on_host(leaf), (0, 1))))


def _redrawn(variables: Any, spread: float) -> Any:
    """The variables with all floating arrays and masks in all collections changed: nothing stays 0, 1 or its inverse.

    Masks change with the wide spread only, as some of them must not let nothing through.
    """
    leaves, treedef = jax.tree.flatten(variables)
    rng, draws = np.random.default_rng(0), {}
    for i, leaf in enumerate(leaves):
        width = jnp.shape(leaf)[-1:]
        if jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            draws[i] = on_device(rng.normal(size=width), jnp.float32)
        elif _is_mask(leaf):
            draws[i] = on_device(np.resize([True, False], width))
    changed = partial(_changed, turned=spread == _SPREADS[0])
    old = [on_device(leaves[i]) for i in draws]
    new = automatically(changed, old, list(draws.values()), on_device(spread, jnp.float32))
    for i, leaf in zip(draws, new, strict=True):
        leaves[i] = leaf
    return jax.tree.unflatten(treedef, leaves)


def _verified(seen: _Pass, call_with: Callable[..., _Pass], tol: float, largest: float) -> _Verdict:
    """Compare the module's outputs with the formula: its own weights, random ones, and with all else redrawn too.

    Args:
        seen: the pass with the module's own variables.
        call_with: gives the pass with another head; and, given a spread, with all other variables redrawn.
        tol: relative difference that rounding explains.
        largest: standard deviation of random weights that their dtypes hold.
    """
    features, error = seen.features, 0.0
    # With its own weights perhaps no neuron is off, and a tied layer or a bound on outputs does not show.
    for size in (None, 1.0, _LARGE):
        if size is not None:
            seen = call_with(_random_like(seen.network, features, size, largest))
            if not relative_difference(seen.features, features) <= tol:
                reason = "the head's own input changes with the head's weights, so they are used elsewhere too"
                return _Verdict(error, reason)
        difference = relative_difference(predicted(seen.network, seen.features), seen.out)
        if not difference <= tol:
            return _diagnosis(seen, difference, tol)
        error = max(error, difference)
    # Fresh statistics, a scale of 1, a branch with factor 0, a mask of ones or an adapter are the identity by chance.
    for spread in _SPREADS:
        seen = call_with(_random_like(seen.network, features, 1.0, largest), spread)
        difference = relative_difference(predicted(seen.network, seen.features), seen.out)
        if math.isfinite(difference):
            break
    if difference <= tol:
        others = _using(seen, call_with, tol, spread) if seen.every else ()
        return _Verdict(max(error, difference), others=others)
    return _Verdict(
        error,
        f"its outputs are those of Dense → relu → Dense for the present values of its other variables only; with these "
        f"redrawn they differ by {difference:.2g} of their size. Something around the two layers is the identity now: "
        "a norm with fresh statistics, a scale of 1, a branch with factor 0, a mask that lets all through, an adapter",
    )


def _using(seen: _Pass, call_with: Callable[..., _Pass], tol: float, spread: float) -> tuple[str, ...]:
    """The names of outputs that change with the hidden layer while the head remains the same function.

    Args:
        seen: the pass with a random head, and all other variables redrawn.
        call_with: as for :func:`_verified`.
        tol: as for :func:`_verified`.
        spread: with which they were redrawn.
    """
    random = seen.network
    present = moved(call_with(random).every, call_with(rescaled(random)).every, tol)
    # Kernels of zeros hide what they multiply.
    redrawn = moved(seen.every, call_with(rescaled(random, swapped=True), spread).every, tol)
    return tuple(dict.fromkeys([*present, *redrawn]))


def _diagnosis(seen: _Pass, error: float, tol: float) -> _Verdict:
    """Why outputs differ: the known function between the two layers, or after them, that explains it."""

    @jax.jit
    def dense(x: Array, kernel: Array, bias: Array | None) -> Array:
        y = x.astype(jnp.float32) @ kernel.astype(jnp.float32)
        return y if bias is None else y + jnp.broadcast_to(bias.astype(jnp.float32), y.shape)

    def known(functions: Mapping[str, Callable], x: Array, y: Array) -> str | None:
        return next((name for name, f in functions.items() if relative_difference(jax.jit(f)(x), y) <= tol), None)

    network = seen.network
    between = known(_ACTIVATIONS, dense(seen.features, network.kernel1, network.bias1), seen.hidden)
    last = dense(seen.hidden, network.kernel2, network.bias2)
    after = known(_ENDS, last, seen.out)
    far = after is None and not relative_difference(last, seen.out) <= tol
    reason = f"its outputs differ from those of Dense → relu → Dense by {error:.2g} of their size"
    if between == "relu":
        reason += f": {after or 'something'} follows, or is added"
    elif between is not None:
        reason += f": {between} stands between the two, where relu must"
    return _Verdict(error, reason, far)


@jax.jit
def _scaled_to(draw: TwoLayer, features: Array, size: Array, largest: Array) -> TwoLayer:
    """A random head with about half of its neurons active on a row, and activations of about this size.

    Of a smaller size, biases with them, where the kernel would else exceed ``largest``.
    """
    rows = features.reshape(-1, features.shape[-1]).astype(jnp.float32)
    norm = jnp.sqrt(jnp.mean(jnp.sum(jnp.square(rows), axis=1)))
    norm = jnp.where(norm > 0, norm, 1)
    reached = jnp.minimum(size, largest * norm)
    return TwoLayer(
        kernel1=reached * draw.kernel1 / norm,
        bias1=None if draw.bias1 is None else reached * draw.bias1,
        kernel2=draw.kernel2 / jnp.sqrt(draw.kernel2.shape[0]),
        bias2=None if draw.bias2 is None else reached / size * draw.bias2,
    )


def _random_like(network: TwoLayer, features: Array, size: float, largest: float) -> TwoLayer:
    rng = np.random.default_rng(0)  # on the host: to compile random numbers for every shape takes long
    draw = jax.tree.map(lambda leaf: on_device(rng.normal(size=jnp.shape(leaf)), float), network)
    return automatically(_scaled_to, draw, features, on_device(size, jnp.float32), on_device(largest, jnp.float32))


def _flat(out: Array) -> str:
    """A remark on outputs without an axis for them, which no layer fits; empty for others."""
    if out.ndim > 1:
        return ""
    return (
        f" The outputs on the batch have one axis, {out.shape}: if the module takes that of its one output away, give "
        "it back with output=lambda out: out[:, None]."
    )


def _refusal(module: Functional, calls: tuple[Call, ...], nearest: str, again: str) -> str:
    """The error message: what was found instead of a head, and what to do."""
    space, _, dense = module.dense.partition(".")
    expected = f"find_head: {module.name} must end in {dense} → relu → {dense}"
    if nearest:
        return (
            f"{expected}; the nearest candidate is {nearest}. If something stands between or after the two layers "
            "(another activation, a norm, dropout, a skip, a softmax), take it away, or choose another output with "
            f"output=; or give the module a new head with {module.graft}."
        )
    inside = ", ".join(format_path(call.layer.path) for call in calls if call.input is None)
    if inside:
        others = ", nn.WeightNorm and others that change its weights" if space == "nn" else ""
        return (
            f"{expected}, outside transforms: {space}.scan, {space}.vmap{others}; got {inside} inside of one. Move the "
            f"head out of it, or give the module a new head with {module.graft}."
        )
    if again:
        return f"{expected}, but {again}. Give it a two-layer head of its own with {module.graft}."
    names = ", ".join(format_path(call.layer.path) for call in calls)
    found = {0: f"it calls no {module.dense}", 1: f"it calls one {module.dense} only ({names})"}.get(
        len(calls), f"no two of its layers ({names}) fit together and to the output"
    )
    return f"{expected}, but {found}. Give it a two-layer head with {module.graft}."
