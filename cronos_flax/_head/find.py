"""Find the two-layer head of a module, and verify it numerically.

Names and class attributes do not tell where a head is, so the search records the calls of all fully connected layers.
A pair of layers whose shapes fit is a candidate. It is the head if the formula ``relu(x kernel1 + bias1) kernel2 +
bias2``, applied to the recorded input, gives the module's outputs: with the module's own weights, and with random ones.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from cronos_flax._head import noise
from cronos_flax._head.candidates import called_again, candidates, given
from cronos_flax._head.data import shapes_said
from cronos_flax._head.functional import Call, Functional, Watched, WrongOutputError
from cronos_flax._head.head import Head, check_there, predicted, relative_difference
from cronos_flax._head.jitted import Jitted, jitted
from cronos_flax._head.others import moved, rescaled, warning
from cronos_flax._head.own_rows import own_rows
from cronos_flax._head.paths import Path, format_path
from cronos_flax._head.redraw import DEVIATIONS, SPREADS, check_kept, random_like, redrawn
from cronos_flax._head.refusals import check_output, convolved, extended, flat, refusal
from cronos_flax._solver.checks import all_finite
from cronos_flax._solver.meshes import check_together
from cronos_flax._solver.solution import TwoLayer
from cronos_flax._solver.user_warnings import warn

_TOL, _TOL_HALF = 1e-4, 6e-2  # difference of outputs, relative to the largest, in float32 and in fewer bits
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
        features, hidden = map(seen.input_of, pair)
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

    def call_with(pair: tuple[Path, Path], network: TwoLayer, spread: float = 0.0, check: bool = False) -> _Pass:
        written = module.write(redrawn(variables, spread) if spread else variables, pair, network)
        there = module.read(written, pair)
        if check:
            check_kept(network, there, pair)
        return _Pass.of(there, pair, run(written, args, kwargs))

    def features_of(path: Path, variables: Any, kwargs: Mapping, args: tuple = args) -> Array:
        return run(variables, args, kwargs).input_of(path)

    def is_random(path: Path, tol: float) -> bool:
        """Whether the head's input changes with the random keys; also with other variables, as zeros hide a branch."""
        for trial in itertools.chain((variables,), (redrawn(variables, spread) for spread in SPREADS)):
            other_keys = noise.reseeded(trial, kwargs, args)
            if other_keys is None:
                return False
            before = features_of(path, trial, kwargs)
            is_finite = all_finite(before)
            if is_finite and not relative_difference(features_of(path, *other_keys), before) <= tol:
                return True
            if is_finite and trial is not variables:
                return False
        return False

    with jax.default_matmul_precision("highest"):
        watched = _first_call(run, variables, args, kwargs)
        out, calls = watched.out, watched.calls
        check_output(out)
        pairs: Iterable[tuple[Path, Path]] = candidates(module, variables, calls, out)
        if paths is not None:
            pairs = [given(paths, pairs, calls, module.numbered, extended(module, variables, calls))]
        refused: list[tuple[bool, str]] = []  # whether the pair is far from a head, and why it is none
        for pair in pairs:
            seen = _Pass.of(module.read(variables, pair), pair, watched)
            kinds = _kinds(seen, pair, calls)
            names = f"{format_path(pair[0])} → {format_path(pair[1])}"
            if unreal := [kind for kind in kinds if jnp.issubdtype(kind, jnp.complexfloating)]:
                refused.append((True, f"{names}: its weights and inputs must be real, got {unreal[0]}"))
                continue
            tol, largest = _tolerance(kinds), _largest(kinds)
            verdict = _verified(seen, partial(call_with, pair), tol, largest / DEVIATIONS)
            if not verdict.reason:
                times = max(call.layer.times for call in calls if call.layer.path in pair)
                if verdict.others or (len(watched.every) > 1 and times > 1):
                    warn(warning(module.name, module.output, verdict.others, times, module.graft))
                if is_random(pair[0], tol):
                    warn(noise.warning(module.finder))
                head = _head(module, variables, kwargs, pair, seen, verdict.error, tol, largest)
                others = (redrawn(variables, spread) for spread in SPREADS)
                own = own_rows(partial(features_of, pair[0]), variables, others, args, kwargs)
                wanted = [leaf is seen.features for leaf in jax.tree.leaves(watched)]
                made_of = run.operations(variables, args, kwargs, wanted)
                return dataclasses.replace(head, recalibrate=recalibrate, own_rows=own, operations=made_of)
            refused.append((verdict.far, f"{names}: {verdict.reason}"))
    nearest = min(refused, key=lambda one: one[0], default=(True, ""))[1]
    again = called_again(module, variables, calls, out)
    remarks = flat(module, variables, calls, out) + extended(module, variables, calls)
    remarks += convolved(module, variables, watched)
    raise ValueError(refusal(module, calls, nearest, again) + remarks)


def _first_call(run: Jitted, variables: Any, args: tuple, kwargs: Mapping) -> Watched:
    """A call of the module as the user gave it, whose errors say what does not fit."""
    try:
        return run(variables, args, kwargs)
    except WrongOutputError as raised:
        raise ValueError(f"find_head: {raised}") from raised
    except Exception as raised:
        check_together("find_head", variables=variables, args=(args, dict(kwargs)))
        shapes = shapes_said(args or dict(kwargs))
        raise ValueError(
            f"find_head: the module cannot be applied to these variables and a batch of shapes {shapes}: {raised}"
        ) from raised


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


def _kinds(seen: _Pass, pair: tuple[Path, Path], calls: Iterable[Call]) -> list[Any]:
    """The dtypes that the two layers compute in, the first one that of their weights."""
    computed = (call.layer.dtype for call in calls if call.layer.path in pair)
    kinds = [jnp.result_type(seen.network.kernel1), seen.out.dtype, seen.features.dtype, *computed]
    return [kind for kind in kinds if jnp.issubdtype(kind, jnp.inexact)]  # integers, as of counts, are not rounded


def _tolerance(kinds: list[Any]) -> float:
    """Relative difference of outputs that rounding explains, in the precision of the two layers."""
    return _TOL if all(jnp.finfo(kind).bits >= 32 for kind in kinds[1:]) else _TOL_HALF


def _largest(kinds: list[Any]) -> float:
    """The largest number that weights and outputs of the two layers can be, at most that of float32."""
    return min(float(jnp.finfo(kind).max) for kind in (jnp.float32, *kinds))


def _verified(seen: _Pass, call_with: Callable[..., _Pass], tol: float, largest: float) -> _Verdict:
    """Compare the module's outputs with the formula: its own weights, random ones, and with all else redrawn too.

    Args:
        seen: the pass with the module's own variables.
        call_with: gives the pass with another head; and, given a spread, with all other variables redrawn.
            With ``check``, it raises if weights are not kept as they are written.
        tol: relative difference that rounding explains.
        largest: standard deviation of random weights that their dtypes hold.
    """
    features, error = seen.features, 0.0
    # With its own weights perhaps no neuron is off, and a tied layer or a bound on outputs does not show.
    for size in (None, 1.0, _LARGE):
        if size is not None:
            seen = call_with(random_like(seen.network, features, size, largest), check=True)
            if not relative_difference(seen.features, features) <= tol:
                reason = "the head's own input changes with the head's weights, so they are used elsewhere too"
                return _Verdict(error, reason)
        difference = relative_difference(predicted(seen.network, seen.features), seen.out)
        if not difference <= tol:
            return _diagnosis(seen, difference, tol)
        error = max(error, difference)
    # Fresh statistics, a scale of 1, a branch with factor 0, a mask of ones or an adapter are the identity by chance.
    for spread in SPREADS:
        seen = call_with(random_like(seen.network, features, 1.0, largest), spread)
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
    elsewhere = moved(seen.every, call_with(rescaled(random, swapped=True), spread).every, tol)
    return tuple(dict.fromkeys([*present, *elsewhere]))


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
    if last.shape != seen.out.shape:
        reason = f"its outputs have the shape {last.shape}, and the module's {seen.out.shape}: something follows"
        if last.size == seen.out.size:
            reason += f". If it is a reshape only, undo it with output=lambda out: out.reshape{(-1, *last.shape[1:])}"
    elif between == "relu":
        reason += f": {after or 'something'} follows, or is added"
    elif between is not None:
        reason += f": {between} stands between the two, where relu must"
    return _Verdict(error, reason, far)
