"""Input validation for ``Cronos.solve``: each error names the argument, what was expected, what came and what to do.

Values (finiteness, signs) are checked only where there are values: inside ``jit`` and ``vmap`` shapes and dtypes are,
and targets and weights that would be refused make the loss NaN.
"""

import dataclasses
import functools
import itertools
import math
import numbers
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from cronos_flax._solver.arrays import TO_NUMBERS, is_array, is_concrete, is_key, native
from cronos_flax._solver.blocks import Source
from cronos_flax._solver.loss import Loss
from cronos_flax._solver.meshes import automatically
from cronos_flax._solver.numerics import or_one
from cronos_flax._solver.solution import GatedTwoLayer, HeldState, Network, RefreshedState, check_arrays
from cronos_flax._solver.transfer import on_device, on_host

_WEIGHTS = 1e-30, 1e30  # the smallest and the largest of a row


def one_of(where: str, name: str, value: Any, choices: Iterable[str], other: str = "") -> None:
    """A setting that is one of a few words."""
    if not (isinstance(value, str) and value in choices):
        expected = " or ".join([repr(c) for c in choices] + [other] * bool(other))
        raise ValueError(f"{where}: `{name}` must be {expected}, got {value!r}.")


def relu_only(where: str, gates: str) -> None:
    """Refuse a solver whose networks are not those of a head, ``Dense → relu → Dense``."""
    if gates == "gated":
        raise ValueError(
            f"{where}: `solver` must give ReLU networks, got gates='gated', whose networks have gates of their own and "
            "do not fit Dense → relu → Dense. Take other gates, or call solver.solve on arrays."
        )


def folds_of_path(where: str, folds: int | None, beta: Any) -> None:
    """Refuse folds that nothing is chosen by."""
    if folds is not None and not isinstance(beta, str):
        raise ValueError(
            f'{where}: `folds` are for beta="path" only, got folds={folds} with another beta. Give beta="path", or '
            "folds=None."
        )


def number(where: str, name: str, value: Any, expected: str, fits: Callable[[Any], bool]) -> None:
    """A leaf of :class:`cronos_flax.Cronos`; traced values and the placeholders that JAX puts into pytrees pass."""
    bad_type = isinstance(value, (str, bytes, bool, list, tuple, dict, set)) or np.iscomplexobj(value)
    if isinstance(value, (np.ndarray, Array)) and is_concrete(value):
        bad_type = bad_type or value.ndim > 1  # a vector is a batch of solvers, for vmap
        numbers_there = on_host(value)
        ok = bool(np.all(np.isfinite(numbers_there)) and np.all(fits(numbers_there)))
    else:
        ok = not isinstance(value, (numbers.Real, np.number)) or (math.isfinite(value) and fits(value))
    if bad_type or not ok:
        raise ValueError(f"{where}: `{name}` must be {expected}, got {value!r}.")


def real_number(where: str, name: str, value: Any, expected: str, fits: Callable[[Any], bool]) -> None:
    """A number of Python's or NumPy's that is no bool."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not fits(value):
        raise ValueError(f"{where}: `{name}` must be {expected}, got {value!r}.")


def single(where: str, name: str, value: Any) -> None:
    """Raise a ValueError for a batch of numbers where a solve takes one: that is what ``vmap`` is for."""
    if not isinstance(value, str) and np.ndim(value) > 0:
        raise ValueError(
            f"{where}: `{name}` must be one number, got an array of shape {np.shape(value)}. For several of them use "
            "jax.vmap, or a loop."
        )


def random_key(where: str, key: Any) -> None:
    """Raise a ValueError unless ``key`` is one key of JAX, new or old style."""
    is_new = is_key(key)
    is_old = isinstance(key, Array | np.ndarray) and key.dtype == np.uint32
    if not (is_new or (is_old and _is_key_data(key))) or np.ndim(key) != (0 if is_new else 1):
        got = f"an array of shape {np.shape(key)} of {key.dtype}" if isinstance(key, Array | np.ndarray) else repr(key)
        raise ValueError(f"{where}: `key` must be one key, such as jax.random.key(0), got {got}.")


def _is_key_data(data: Array | np.ndarray) -> bool:
    """Whether the generator that JAX uses has keys of so many numbers."""
    try:
        jax.eval_shape(jax.random.wrap_key_data, data)
    except TypeError:
        return False
    return True


def positive_integer(where: str, name: str, value: Any, least: int = 1) -> None:
    """A count."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < least:
        raise ValueError(f"{where}: `{name}` must be an integer ≥ {least}, got {value!r}.")


def in_python(settings: Any, *names: str) -> None:
    """Make numbers of NumPy, among these fields of a frozen dataclass, Python's.

    The two are equal, and so share what is compiled; but NumPy's change the types of what is computed with them.
    """
    for name in names:
        object.__setattr__(settings, name, _in_python(getattr(settings, name)))


def _in_python(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_in_python, value))
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return value
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def on_the_host(what: str, values: Any) -> None:
    """Raise a ValueError inside ``jit`` and ``vmap``, for what a solve calls on the host.

    Args:
        what: how the error names it.
        values: all that the solve takes, a pytree.
    """
    here = on_device(0)  # inside jit it is traced, whatever else is
    if not all(map(is_concrete, jax.tree.leaves((here, values)))):
        raise ValueError(
            f"solve: {what} needs the host, which cannot be called inside jit or vmap, got traced values. Call solve "
            "outside of them."
        )


@jax.jit
def _are_finite(tree: Any) -> Array:
    so_far: Any = np.True_  # a constant of JAX would be sent to the device
    for leaf in jax.tree.leaves(tree):
        if jnp.issubdtype(leaf.dtype, jnp.inexact):  # NaN is not below infinity either, and no mask is written
            so_far = so_far & (jnp.max(jnp.abs(leaf), initial=0) < jnp.inf)
    return so_far


def all_finite(tree: Any) -> bool:
    """Whether a pytree of arrays has finite numbers only. Reads one of them from the device."""
    if isinstance(tree, np.ndarray):
        with np.errstate(over="ignore", invalid="ignore"):  # a sum costs less, and is enough unless it overflows
            return bool(np.isfinite(tree.sum())) or bool(np.all(np.isfinite(tree)))
    with jax.ensure_compile_time_eval():  # else, inside jit, even of constants nothing is known
        return bool(on_host(_are_finite(tree)))


def _floats(
    name: str, value: ArrayLike, shapes: str, ndims: tuple[int, ...], remedy: str, known_finite: bool = False
) -> Array:
    """``value`` as a finite floating array with one of these numbers of dimensions."""
    value = native(value, f"solve: `{name}`")
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise ValueError(f"solve: `{name}` must be a floating array, got dtype {value.dtype}. {remedy}")
    value = value.astype(jnp.float32) if value.dtype.itemsize < 4 else value
    return _finite(name, value, shapes, ndims, known_finite)


def _finite(
    name: str, value: Array | np.ndarray, shapes: str, ndims: tuple[int, ...], known_finite: bool = False
) -> Array:
    if value.ndim not in ndims:
        raise ValueError(f"solve: `{name}` must have shape {shapes}, got {value.shape}.")
    if jnp.issubdtype(value.dtype, jnp.floating):
        if isinstance(value, np.ndarray):
            with np.errstate(over="ignore"):  # which is told of here
                value = value.astype(jax.dtypes.canonicalize_dtype(value.dtype), copy=False)
        # What is on the host is looked at there, for on the device every shape would be a program.
        if not known_finite and is_concrete(value) and not all_finite(value):
            raise ValueError(
                f"solve: `{name}` must be finite in {value.dtype}, got NaN or infinite entries. Remove or impute those "
                "rows."
            )
    return on_device(value)


def _is_block(rows: Any) -> bool:
    """Whether the first of the things that X consists of is a block of rows; a ragged one is, for it is refused so."""
    try:
        return np.ndim(rows) == 2
    except ValueError:
        return True


def _blocks(X: Iterable[Any]) -> Source:
    """Features that come in blocks, checked in one pass."""
    if iter(X) is X:
        raise ValueError("solve: `X` must be re-iterable, got an iterator, which can be read once only. Give a list.")
    shape, dtype = None, np.dtype("float32")
    for block in X:
        block = native(block, "solve: the blocks of `X`")
        if block.ndim != 2 or not jnp.issubdtype(block.dtype, jnp.floating):
            raise ValueError(
                f"solve: the blocks of `X` must be floating arrays (n, p), got {block.dtype} of shape {block.shape}."
            )
        if shape is not None and block.shape[1] != shape[1]:
            raise ValueError(f"solve: the blocks of `X` must have {shape[1]} columns each, got shape {block.shape}.")
        dtype = jax.dtypes.canonicalize_dtype(np.promote_types(dtype, block.dtype))
        with np.errstate(over="ignore"):  # which is told of here
            is_finite = np.all(np.isfinite(np.asarray(block, dtype)))
        if not is_finite:
            raise ValueError(
                f"solve: `X` must be finite in {dtype}, got NaN or infinite entries. Remove or impute those rows."
            )
        shape = (len(block) if shape is None else shape[0] + len(block)), block.shape[1]
    return Source(X, shape or (0, 0), dtype)


def data(
    X: Any, y: ArrayLike, num_classes: int | None, outputs: int | None, loss: Loss, *, known_finite: bool = False
) -> tuple[Array | Source, Array]:
    """Features ``(n, p)`` and targets ``(n, C)`` of one dtype, as the loss takes them.

    Args:
        X: as :meth:`cronos_flax.Cronos.solve` takes it, as are y and num_classes; or a source of blocks, checked.
        y: the targets.
        num_classes: the number of classes, None for that of the data.
        outputs: the number of outputs of the starting network, None where there is none.
        loss: what the targets are for.
        known_finite: whether the caller has looked at the values of X already.
    """
    in_blocks = not is_array(X) and not isinstance(X, (str, bytes)) and isinstance(X, Iterable)
    if in_blocks and all(map(_is_block, itertools.islice(X, 1))):
        X = _blocks(X)
    elif not isinstance(X, Source):
        X = _floats("X", X, "(n, p)", (2,), "Convert it, e.g. X.astype('float32').", known_finite)
    if num_classes is not None:
        positive_integer("solve", "num_classes", num_classes)
    y = native(y, "solve: `y`")
    if is_key(y) or (y.dtype.kind not in "biuf" and not jnp.issubdtype(y.dtype, jnp.floating)):
        raise ValueError(f"solve: `y` must be real numbers, got dtype {y.dtype}. {TO_NUMBERS}")
    y = _finite("y", y, "(n,) or (n, C)", (1, 2))
    if X.shape[0] < 2 or X.shape[1] < 1:
        raise ValueError(f"solve: `X` must have at least 2 rows and 1 column, got shape {X.shape}.")
    if y.shape[0] != X.shape[0]:
        raise ValueError(f"solve: `y` must have one row for each of the {X.shape[0]} rows of X, got shape {y.shape}.")
    try:
        targets = loss.targets(y, outputs if num_classes is None else num_classes)
    except ValueError as error:
        raise ValueError(f"solve: {error}") from None
    if targets.shape[1] < 1:
        raise ValueError(f"solve: `y` must have at least one column, got shape {y.shape}.")
    if num_classes is not None and targets.shape[1] != num_classes:
        raise ValueError(f"solve: `num_classes` is {num_classes!r}, but `y` has {targets.shape[1]} column(s).")
    targets = targets.astype(X.dtype)
    _check_value(loss, targets.shape[1], targets.dtype)
    return X, targets


@functools.lru_cache(maxsize=64)
def _check_value(loss: Loss, C: int, dtype: np.dtype) -> None:
    """Raise a ValueError unless a loss has one value for each row."""
    n = C + 1
    rows = jax.ShapeDtypeStruct((n, C), dtype)
    shape = jax.eval_shape(loss.value, rows, rows).shape
    if shape != (n,):
        raise ValueError(
            f"solve: the `value` of {type(loss).__name__} must have one entry for each row, shape ({n},) for outputs "
            f"({n}, {C}), got {shape}. Sum over the outputs of a row, axis 1, and over nothing else."
        )


def balanced(loss: Loss, targets: Array, weight: Array) -> Array:
    """Weights ``n / (classes · rows of the class)``: every class that is there counts the same.

    A row of probabilities is counted for each class with its probability, and has the mean of the classes' weights by
    these. Rows of weight zero are not counted.
    """
    known = is_labelled(loss, targets) if is_concrete(targets) else loss.is_labelled(targets)
    if is_concrete(known) and not on_host(known):
        raise ValueError(
            "solve: `class_weight` needs targets that are one label a row, got others. For the losses that take values "
            "make them by cf.signed_targets(labels, num_classes)."
        )
    return automatically(partial(_balanced, loss), targets, weight)


@partial(jax.jit, static_argnums=0)
def is_labelled(loss: Loss, targets: Array) -> Array:
    """Whether the targets are one label a row."""
    return jnp.asarray(loss.is_labelled(targets))


@partial(jax.jit, static_argnums=0)
def class_sizes(loss: Loss, targets: Array, weight: Array) -> Array:
    """How many rows of positive weight each class has, ``(max(C, 2),)``; of probabilities their sums."""
    return jnp.sum(jnp.where((weight > 0)[:, None], loss.shares(targets), 0), axis=0)


@partial(jax.jit, static_argnums=0)
def _balanced(loss: Loss, targets: Array, weight: Array) -> Array:
    sizes = class_sizes(loss, targets, weight)
    n, classes = (jnp.count_nonzero(some).astype(targets.dtype) for some in (weight > 0, sizes))
    of_class = n / (classes * or_one(sizes))
    return jnp.sum(loss.shares(targets) * of_class[None], axis=1)


def weights_in_range(what: str, weight: np.ndarray) -> None:
    """Raise a ValueError unless all weights that are not zero are what float32 can multiply by losses, and sum.

    Args:
        what: how the error names them.
        weight: weights ≥ 0.
    """
    counted = weight[weight > 0]
    if counted.size and not _WEIGHTS[0] <= counted.min() <= counted.max() <= _WEIGHTS[1]:
        raise ValueError(
            f"{what} must be 0, or between {_WEIGHTS[0]:.0e} and {_WEIGHTS[1]:.0e}, got values from {counted.min()} to "
            f"{counted.max()}. Only their ratios count: divide them by their mean."
        )


def sample_weight(value: ArrayLike | None, y: Array) -> Array:
    """Weights ``(n,)`` in the dtype of y."""
    if value is None:
        return on_device(np.ones(y.shape[0]), y.dtype)
    weight = _floats("sample_weight", value, "(n,)", (1,), "Convert it, e.g. w.astype('float32').")
    if weight.shape[0] != y.shape[0]:
        raise ValueError(
            f"solve: `sample_weight` must have one entry for each of the {y.shape[0]} rows of X, got {weight.shape}."
        )
    if not is_concrete(weight):  # a negative one makes the loss NaN, which the status says
        return jnp.where(weight >= 0, weight, jnp.asarray(jnp.nan, weight.dtype)).astype(y.dtype)
    there = on_host(weight)
    if not (np.all(there >= 0) and np.any(there > 0)):
        raise ValueError("solve: `sample_weight` must be ≥ 0 and not all zero, got a negative entry or only zeros.")
    weights_in_range("solve: `sample_weight`", there)
    return weight.astype(y.dtype)


def start(
    gates: str, shape: tuple[int, int], y: Array, hidden: Any, init: Any, state: Any
) -> tuple[Network | RefreshedState | HeldState | None, int]:
    """The one place to start from, None for a random start; and the number of neurons."""
    given = [name for name, value in (("hidden", hidden), ("init", init), ("state", state)) if value is not None]
    if len(given) != 1:
        got = " and ".join(f"`{name}`" for name in given) or "none of them"
        raise ValueError(f"solve: give exactly one of `hidden`, `init` and `state`, got {got}.")
    if hidden is not None:
        positive_integer("solve", "hidden", hidden)
        return None, int(hidden)
    if init is not None:
        if isinstance(init, GatedTwoLayer) and gates != "gated":
            raise ValueError(
                f"solve: `init` must be a cf.TwoLayer for gates={gates!r}, got a cf.GatedTwoLayer, which is no ReLU "
                'network. Set gates="gated".'
            )
        if not isinstance(init, Network):
            either = "a cf.GatedTwoLayer or a cf.TwoLayer" if gates == "gated" else "a cf.TwoLayer"
            raise ValueError(f"solve: `init` must be {either}, got {type(init).__name__}.")
        return _network("init", init, shape, y), init.kernel2.shape[0]
    of_gates = state.gates if isinstance(state, HeldState) else "refreshed" * isinstance(state, RefreshedState)
    if of_gates != gates:
        init = "To start from a network alone pass init=solution.params."
        advice = {"gated": 'Set gates="gated".', "": init}.get(of_gates, f'Set gates="{of_gates}". {init}')
        raise ValueError(
            f"solve: `state` must be the state of a solve with gates={gates!r}, got a {type(state).__name__}"
            f"{f' of gates={of_gates!r}' if of_gates else ''}. {advice}"
        )
    if isinstance(state, HeldState) and state.D.shape[0] != shape[0]:
        raise ValueError(
            f"solve: `state` holds gates of {state.D.shape[0]} rows, but `X` has {shape[0]}. "
            "To go on with other rows pass init=solution.params."
        )
    params: Any = _network("state", state.params, shape, y)
    return dataclasses.replace(state, params=params), params.kernel2.shape[0]


def _network(name: str, network: Network, features: tuple[int, int], y: Array) -> Network:
    """The network in the dtype of y, its shapes checked against the data."""
    check_arrays(f"solve: `{name}`", network)
    m = jnp.shape(network.kernel1)[-1] if jnp.ndim(network.kernel1) == 2 else 0
    expected = {"kernel1": (features[1], m), "bias1": (m,), "kernel2": (m, y.shape[1]), "bias2": (y.shape[1],)}
    if isinstance(network, GatedTwoLayer):
        expected |= {"gate_kernel": (features[1], m), "gate_bias": (m,)}
    for field, shape in expected.items():
        value = getattr(network, field)
        if value is None and "bias" in field:
            continue
        if value is None or jnp.shape(value) != shape:
            got = "None" if value is None else jnp.shape(value)
            raise ValueError(f"solve: `{name}` must have a {field} of shape {shape} for these data, got {got}.")
    with jax.ensure_compile_time_eval():
        given = {field: getattr(network, field) for field in expected}
        known = {field: on_device(v) for field, v in given.items() if v is not None and is_concrete(v)}
    if not all_finite(known):  # one program for all
        bad = " and ".join(field for field, value in known.items() if not all_finite(value))
        raise ValueError(f"solve: `{name}` must be finite, got NaN or infinite entries in {bad}.")
    return jax.tree.map(lambda v: on_device(v, y.dtype), network)
