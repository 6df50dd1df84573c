"""Finding the two-layer head of a module, and proving it, whatever the module is written in.

Names do not tell where a head is, so the calls of fully connected layers are watched; and what was watched is not
believed until the module's outputs have been reproduced from the head's input, with the weights that are there and
with random ones. A module takes part through :class:`Functional`; linen and NNX each have one.
"""

import dataclasses
import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, ClassVar, NamedTuple, Protocol, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from cronos_flax._solver.solution import TwoLayer, predict

Path = tuple[Hashable, ...]

_TOL, _TOL_HALF = 1e-4, 6e-2  # of outputs, relative to the largest, computed in float32 and in fewer bits
_LARGE = 1e2  # of a second probe, in which bounds of activations and outputs show
_PEAK = 1.25  # of a compiled solve, over the bytes of two copies of X and four arrays (n, m)
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


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Layer:
    """A fully connected layer that was called: its path, and the dtype of what it returned."""

    path: Path
    dtype: Any


class Call(NamedTuple):
    """A call of a layer, and its input; None where a transform keeps that from view."""

    layer: Layer
    input: Array | None


class Functional(Protocol):
    """A module in functional form: what the finder asks of linen and of NNX."""

    dense: ClassVar[str]  # what a fully connected layer is called there
    graft: ClassVar[str]  # what puts a two-layer head in the place of one layer
    numbered: ClassVar[bool]  # whether paths have indices in them

    @property
    def name(self) -> str:
        """Of the module's class."""

    def watch(self, variables: Any, args: tuple, kwargs: Mapping) -> tuple[Any, tuple[Call, ...]]:
        """The chosen output, and every fully connected layer in the order of its last call."""

    def kernel_shape(self, variables: Any, path: Path) -> tuple[int, ...]:
        """The kernel's shape; () if there is no plain one."""

    def read(self, variables: Any, paths: tuple[Path, Path]) -> TwoLayer:
        """The weights of the two layers."""

    def write(self, variables: Any, paths: tuple[Path, Path], network: TwoLayer) -> Any:
        """Variables with these weights, in the dtypes that were there."""

    def count(self, variables: Any) -> int:
        """How many parameters there are."""


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Found:
    """Where the head of a module is, how large it is, and how well that was proved.

    Attributes:
        hidden_path: path of the hidden layer.
        output_path: path of the output layer.
        features: width p of the head's input.
        hidden: number m of hidden neurons.
        outputs: number C of outputs.
        error: largest difference between the module's outputs and those of the head, relative to the largest output,
            over the weights that were there and random ones.
        rows: how many rows that was tried on.
        frozen: how many parameters of the module a solve leaves alone.
        module: the module in functional form.
        kwargs: the keyword arguments that it was called with.
    """

    hidden_path: Path
    output_path: Path
    features: int
    hidden: int
    outputs: int
    error: float
    rows: int
    frozen: int
    module: Any
    kwargs: Mapping[str, Any]

    @property
    def paths(self) -> tuple[Path, Path]:
        """The two paths that a solve writes, hidden first."""
        return self.hidden_path, self.output_path

    def solve_bytes(self, rows: int) -> int:
        """About how much memory a solve on so many rows of float32 features needs."""
        return int(_PEAK * 4 * rows * (2 * (self.features + 1) + 4 * self.hidden))

    def __str__(self) -> str:
        solved = self.hidden * (self.features + 1) + self.outputs * (self.hidden + 1)
        hidden, output = (slashed(path) for path in self.paths)
        width = max(len(hidden), len(output))
        megabytes = self.solve_bytes(10_000) / 1e6
        agree = f"agree to {self.error:.0e}" if self.error else "are the same"
        return "\n".join(
            (
                f"Head of {self.module.name}",
                f"  hidden  {hidden:<{width}}  {self.features} → {self.hidden}, relu",
                f"  output  {output:<{width}}  {self.hidden} → {self.outputs}",
                f"  proved  by value on {self.rows} rows: outputs {agree}, also with random weights",
                f"  solved  about {solved:,} parameters of these two layers",
                f"  frozen  {self.frozen:,} other parameters",
                f"  memory  about {megabytes:,.0f} MB for a solve on 10,000 rows",
            )
        )

    __repr__ = __str__


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Static:
    """The arguments of a call that are not arrays, and the places of those that are."""

    treedef: Any
    rest: tuple

    @classmethod
    def split(cls, arguments: Any) -> tuple[list[Any], Self]:
        leaves, treedef = jax.tree.flatten(arguments)
        is_array = [isinstance(leaf, Array | np.ndarray | np.generic) for leaf in leaves]
        # With its type: 1 and True are equal, but not to a module.
        rest = tuple(None if is_one else (leaf, type(leaf)) for leaf, is_one in zip(leaves, is_array, strict=True))
        return [leaf for leaf, is_one in zip(leaves, is_array, strict=True) if is_one], cls(treedef, rest)

    def join(self, arrays: list[Any]) -> Any:
        remaining = iter(arrays)
        return jax.tree.unflatten(self.treedef, [next(remaining) if r is None else r[0] for r in self.rest])


def jitted(call: Callable[[Any, tuple, Mapping], Any]) -> Callable[[Any, tuple, Mapping], Any]:
    """``jax.jit`` of a call with variables, positional and keyword arguments, of which only arrays are traced."""

    @jax.jit
    def run(variables: Any, arrays: list[Any], static: _Static) -> Any:
        return call(variables, *static.join(arrays))

    def split(variables: Any, args: tuple, kwargs: Mapping) -> Any:
        return run(variables, *_Static.split((args, dict(kwargs))))

    return split


def selected(out: Any, output: Any) -> Any:
    """The output that the user chose: by a key, an index, or a function."""
    if output is None or callable(output):
        return out if output is None else output(out)
    try:
        return out[output]
    except (KeyError, IndexError, TypeError):
        there = sorted(map(str, out)) if isinstance(out, Mapping) else type(out).__name__
        raise ValueError(f"`output` must be a key or an index of the outputs, or a function, got {output!r}; "
                         f"the outputs: {there}") from None  # fmt: skip


def slashed(path: Path) -> str:
    """A path as it is printed."""
    return "/".join(map(str, path)) or "the module itself"


def as_path(where: str, path: Any, numbered: bool = False) -> Path:
    """A path that a user gave, ``"a/b"`` or a tuple; numbers in it are indices where layers are ``numbered``."""
    if isinstance(path, str):
        return tuple(int(key) if numbered and key.isdigit() else key for key in path.split("/"))
    if not isinstance(path, tuple) or not all(isinstance(key, str | int) for key in path):
        raise ValueError(f"{where} must be a path, such as ('backbone', 'fc') or 'backbone/fc', got {path!r}.")
    return path


def find(module: Functional, variables: Any, args: tuple, kwargs: Mapping, paths: Any = None) -> Found:
    """The proved head of a module.

    Args:
        module: the module in functional form.
        variables: its variables.
        args: positional arguments of one batch.
        kwargs: keyword arguments.
        paths: the paths of hidden and output layer, to be proved; None to look for them.

    Raises:
        ValueError: if there is none; the message says what was found instead, and what can be done.
    """
    if any(np.size(leaf) == 0 for leaf in jax.tree.leaves((args, dict(kwargs)))):
        raise ValueError("find_head: the batch must not be empty; give one real batch.")
    run = jitted(module.watch)
    with jax.default_matmul_precision("highest"):
        try:
            out, calls = run(variables, args, kwargs)
        except Exception as raised:
            shapes = jax.tree.map(np.shape, args)
            raise ValueError(
                f"find_head: the module cannot be applied to the batch given, of shapes {shapes}: {raised}"
            ) from raised
        _check_output(out)
        inputs = {call.layer.path: call.input for call in calls if call.input is not None}
        dtypes = {call.layer.path: call.layer.dtype for call in calls}
        candidates: Iterable[tuple[Path, Path]] = _candidates(module, variables, calls, out)
        if paths is not None:
            candidates = [_given(paths, candidates, calls, module.numbered)]
        refused: list[tuple[bool, str]] = []  # whether it is far from a head, and why
        for pair in candidates:
            features = inputs[pair[0]]
            kinds = out.dtype, features.dtype, dtypes[pair[0]], dtypes[pair[1]]
            tol = _TOL if all(jnp.finfo(kind).bits >= 32 for kind in kinds) else _TOL_HALF

            def again(network: TwoLayer, pair: tuple[Path, Path] = pair) -> tuple[TwoLayer, Array, Array, Array]:
                probed = module.write(variables, pair, network)
                out, calls = run(probed, args, kwargs)
                return module.read(probed, pair), _input(calls, pair[0]), _input(calls, pair[1]), out

            network = module.read(variables, pair)
            proof = _prove(network, features, inputs[pair[1]], out, again, tol)
            if not proof.refuted:
                solved = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(network))
                return Found(
                    *pair,
                    features=features.shape[-1],
                    hidden=inputs[pair[1]].shape[-1],
                    outputs=out.shape[-1],
                    error=proof.error,
                    rows=math.prod(features.shape[:-1]),
                    frozen=module.count(variables) - solved,
                    module=module,
                    kwargs=kwargs,
                )
            refused.append((proof.far, f"{slashed(pair[0])} → {slashed(pair[1])}: {proof.refuted}"))
    nearest = min(refused, key=lambda one: one[0], default=(True, ""))[1]
    raise ValueError(_refusal(module, calls, nearest))


def _input(calls: Iterable[Call], path: Path) -> Array:
    (found,) = [call.input for call in calls if call.layer.path == path]
    assert found is not None
    return found


def _check_output(out: Any) -> None:
    if not isinstance(out, Array) or out.ndim < 1:
        raise ValueError(
            f"find_head: the module must return one array (..., C), got {jax.tree.map(np.shape, out)}. "
            "Choose one with output=: a key, an index, or a function of the outputs."
        )
    if not jnp.issubdtype(out.dtype, jnp.floating) or not bool(jnp.all(jnp.isfinite(out))):
        raise ValueError(
            "find_head: the module's outputs on the batch must be finite floats. Check batch and variables."
        )


def _candidates(module: Functional, variables: Any, calls: tuple[Call, ...], out: Array) -> Iterator[tuple[Path, Path]]:
    """Pairs of layers whose shapes fit, the last ones called first."""

    def width(call: Call) -> int | None:
        """Outputs of a layer with a plain kernel and an input that was seen."""
        shape = module.kernel_shape(variables, call.layer.path)
        return shape[1] if len(shape) == 2 and call.input is not None else None

    for i in range(len(calls) - 1, 0, -1):
        last = calls[i]
        if width(last) != out.shape[-1] or last.input is None:
            continue
        for first in reversed(calls[:i]):
            if width(first) == last.input.shape[-1]:
                yield first.layer.path, last.layer.path


def _given(
    paths: Any, candidates: Iterable[tuple[Path, Path]], calls: tuple[Call, ...], numbered: bool
) -> tuple[Path, Path]:
    """The pair that the user named, if it can be one."""
    if not isinstance(paths, tuple | list) or len(paths) != 2:
        raise ValueError(f"find_head: `paths` must be two paths, of the hidden and of the output layer, got {paths!r}.")
    first, last = (as_path("find_head: each of `paths`", path, numbered) for path in paths)
    pair = first, last
    if pair not in list(candidates):
        called = ", ".join(slashed(call.layer.path) for call in calls) or "none"
        raise ValueError(
            f"find_head: `paths` must be two layers whose shapes fit together and to the output, got "
            f"{slashed(pair[0])} and {slashed(pair[1])}; layers called: {called}."
        )
    return pair


def _difference(a: Array, b: Array) -> float:
    """Largest difference, relative to the largest entry of b."""
    if a.shape != b.shape:
        return math.inf
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return float(jnp.max(jnp.abs(a - b)) / (jnp.max(jnp.abs(b)) + jnp.finfo(jnp.float32).tiny))


class _Proof(NamedTuple):
    """That a module is a head after its backbone, or why not."""

    error: float  # largest seen
    refuted: str = ""
    far: bool = False  # the output is not even that of the second layer


def _prove(
    network: TwoLayer, features: Array, hidden: Array, out: Array, again: Callable[[TwoLayer], tuple], tol: float
) -> _Proof:
    """By value, with the weights that are there and with random ones."""

    def outputs(network: TwoLayer, features: Array) -> Array:
        return predict(jax.tree.map(lambda v: v.astype(jnp.float32), network), features.astype(jnp.float32))

    error = _difference(outputs(network, features), out)
    if not error <= tol:
        return _diagnosis(network, features, hidden, out, error, tol)
    # With the weights that are there, no neuron might be off, or a tied layer or a bound go unseen: try random ones.
    for size in (1.0, _LARGE):
        network, moved, hidden, out = again(_random_like(network, features, size))
        if not _difference(moved, features) <= tol:
            return _Proof(error, "the head's own input changes with the head's weights, so they are used elsewhere too")
        with_others = _difference(outputs(network, moved), out)
        if not with_others <= tol:
            return _diagnosis(network, moved, hidden, out, with_others, tol)
        error = max(error, with_others)
    return _Proof(error)


def _diagnosis(network: TwoLayer, features: Array, hidden: Array, out: Array, error: float, tol: float) -> _Proof:
    """What stands between the two layers or after them, if it is anything known."""

    def dense(x: Array, kernel: Array, bias: Array | None) -> Array:
        y = x.astype(jnp.float32) @ kernel.astype(jnp.float32)
        return y if bias is None else y + bias.astype(jnp.float32)

    def known(functions: Mapping[str, Callable], x: Array, y: Array) -> str | None:
        return next((name for name, f in functions.items() if _difference(f(x), y) <= tol), None)

    between = known(_ACTIVATIONS, dense(features, network.kernel1, network.bias1), hidden)
    last = dense(hidden, network.kernel2, network.bias2)
    after = known(_ENDS, last, out)
    far = after is None and not _difference(last, out) <= tol
    differ = f"its outputs differ from those of Dense → relu → Dense by {error:.2g} of their size"
    if between not in (None, "relu"):
        return _Proof(error, f"{differ}: {between} stands between the two, where relu must", far)
    if between == "relu":
        return _Proof(error, f"{differ}: {after or 'something'} follows, or is added", far)
    return _Proof(error, differ, far)


def _random_like(network: TwoLayer, features: Array, large: float) -> TwoLayer:
    """A head whose neurons are on for about half of the rows, and about so large."""
    leaves, treedef = jax.tree.flatten(network)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    noise = [jax.random.normal(key, jnp.shape(leaf)) for key, leaf in zip(keys, leaves, strict=True)]
    draw = jax.tree.unflatten(treedef, noise)
    rows = features.reshape(-1, features.shape[-1]).astype(jnp.float32)
    size = jnp.sqrt(jnp.mean(jnp.sum(jnp.square(rows), axis=1)))
    return dataclasses.replace(
        draw,
        kernel1=large * draw.kernel1 / jnp.where(size > 0, size, 1),
        bias1=None if draw.bias1 is None else large * draw.bias1,
        kernel2=draw.kernel2 / jnp.sqrt(draw.kernel2.shape[0]),
    )


def _refusal(module: Functional, calls: tuple[Call, ...], nearest: str) -> str:
    """What was found in place of a head, and what can be done."""
    space, _, dense = module.dense.partition(".")
    expected = f"find_head: {module.name} must end in {dense} → relu → {dense}"
    if nearest:
        return (
            f"{expected}; the nearest candidate is {nearest}. If something stands between or after the two layers "
            "(another activation, a norm, dropout, a skip, a softmax), take it away, or choose another output with "
            f"output=; or give the module a new head with {module.graft}."
        )
    hidden = [call.layer.path for call in calls if call.input is None]
    names = ", ".join(slashed(call.layer.path) for call in calls)
    if hidden:
        inside = ", ".join(map(slashed, hidden))
        return (
            f"{expected}, outside {space}.scan and {space}.vmap; got {inside} inside such a transform. "
            "Move the head out of it."
        )
    found = {0: f"it calls no {module.dense}", 1: f"it calls one {module.dense} only ({names})"}.get(
        len(calls), f"no two of its layers ({names}) fit together and to the output"
    )
    return f"{expected}, but {found}. Give it a two-layer head with {module.graft}."
