"""The two-layer head of a module: where it is, and how to read, write and feed it.

A :class:`Head` is the same for every kind of module. All that depends on the kind is asked of its ``module``, a
:class:`Functional`; linen and NNX each implement one.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from cronos_flax._head.data import Batch, UserData, several_said, shapes_said
from cronos_flax._head.features import Features, gather
from cronos_flax._head.fingerprint import Fingerprint, checksum, described, difference
from cronos_flax._head.functional import Functional, Kind, Tap, WrongOutputError
from cronos_flax._head.jitted import jitted
from cronos_flax._head.norms import Moments
from cronos_flax._head.operations import other_names
from cronos_flax._head.own_rows import NO_OWN_ROWS, OwnRows
from cronos_flax._head.paths import Path, format_path
from cronos_flax._head.redraw import DEVIATIONS, random_like
from cronos_flax._head.rows import Gathered, GatheredRows, Store
from cronos_flax._solver.arrays import is_concrete
from cronos_flax._solver.meshes import automatically, check_together
from cronos_flax._solver.solution import TwoLayer, predict
from cronos_flax._solver.transfer import on_device, on_host

# Of variables, the positional and the keyword arguments of a call, and its chosen output.
Compare = Callable[[Any, tuple, Mapping, Array], None]

_CHANGED = 1e-2  # difference of outputs after which a head no longer holds; rounding of fast products is below it
_PEAK = 1.25  # memory of a compiled solve, relative to two copies of X and four arrays (n, m)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Head:
    """The two-layer head ``Dense → relu → Dense`` that a module ends in.

    Made by :func:`cronos_flax.find_head` or :func:`cronos_flax.nnx.find_head`. ``print(head)`` shows where it is, how
    it was verified, how many parameters a solve changes, and how much memory a solve takes.

    The methods take ``variables``: the variables of a linen module (``model.init`` returns them), or an NNX model.

    Attributes:
        hidden_path: path of the hidden layer.
        output_path: path of the output layer.
        features: width p of the head's input.
        hidden: number m of hidden neurons.
        outputs: number C of outputs.
        error: largest difference between the module's outputs and those of the head, relative to the largest output,
            over the module's own weights and random ones.
        tolerance: largest difference that counts as rounding, in the precision of the two layers.
        largest: largest number in that precision, at most that of float32.
        rows: number of rows that the head was verified on.
        frozen: number of parameters that a solve does not change.
        module: the module as pure functions.
        kwargs: the keyword arguments that the module was called with; feature passes use them again.
        recalibrate: whether a solve writes the statistics of batch norms in its pass in place of the running ones.
        own_rows: the keyword arguments that belong to the rows of the batch, such as a mask.
        operations: what the head's input is made of, by name: how a checkpoint knows the backbone again.
    """

    hidden_path: Path
    output_path: Path
    features: int
    hidden: int
    outputs: int
    error: float
    tolerance: float
    largest: float
    rows: int
    frozen: int
    module: Functional
    kwargs: Mapping[str, Any]
    recalibrate: bool = True
    own_rows: OwnRows = NO_OWN_ROWS
    operations: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def paths(self) -> tuple[Path, Path]:
        """The paths of the hidden and of the output layer."""
        return self.hidden_path, self.output_path

    @property
    def of_rows(self) -> tuple[str, ...]:
        """The names of keyword arguments that belong to the rows of the batch: each batch must come with its own."""
        return self.own_rows.names

    @property
    def in_training(self) -> bool:
        """Whether features are those of a training step, with batch statistics rather than running averages."""
        return self.module.in_training(self.kwargs)

    def read(self, variables: Any) -> TwoLayer:
        """The head's weights in ``variables``."""
        return self.module.read(variables, self.paths)

    def write(self, variables: Any, network: TwoLayer) -> Any:
        """Write weights into the head, in the dtypes of the old ones; nothing else changes.

        Args:
            variables: the variables of a linen module, which are not changed, or an NNX model, which is changed in
                place: both layers, or neither.
            network: the weights. In linen they may have another width m, for a module of that width.

        Returns:
            The variables with these weights: a copy for linen, the same model for NNX.

        Raises:
            ValueError: if ``network`` is not a network with the head's biases, features and outputs, or, in NNX, has
                another width.
        """
        _check_network(network, self.read(variables))
        self._check_widths(network)
        return self.module.store(variables, self.paths, network)

    def _check_widths(self, network: TwoLayer) -> None:
        """Raise a ValueError unless ``network`` has the head's features and outputs, and one width."""
        got = {name: jnp.shape(value) for name, value in vars(network).items() if value is not None}
        p, C, m = self.features, self.outputs, (*got["kernel1"], None)[1]
        fits = {"kernel1": (p, m), "bias1": (m,), "kernel2": (m, C), "bias2": (C,)}
        if any(fits[name] != shape for name, shape in got.items()):
            shapes = ", ".join(f"{name} {shape}" for name, shape in got.items())
            raise ValueError(
                f"write: `network` must have the widths of the head: kernel1 ({p}, m), bias1 (m,), kernel2 (m, {C}), "
                f"bias2 ({C},), with one m; got {shapes}."
            )

    def inputs(self, variables: Any, *args: Any, **kwargs: Any) -> Any:
        """The head's input for a batch, by one jitted pass through the backbone.

        Args:
            variables: the variables of a linen module, or an NNX model.
            *args: positional arguments of the module.
            **kwargs: keyword arguments; those of ``find_head`` are used where none is given.

        Returns:
            Features ``(n, p)``, leading axes flattened. If ``mutable`` is among the keyword arguments of a linen
            module, the features and the collections that changed, as from ``model.apply``.

        Raises:
            ValueError: if the module does not take the batch, or this comes without a mask of its own rows.
        """
        seen = self._pass(self.module.variables(variables, "inputs"), args, kwargs, "inputs")
        rows = seen.features.reshape(-1, self.features)
        return rows if seen.updates is None else (rows, seen.updates)

    def gather(
        self,
        variables: Any,
        data: Any,
        unpack: Callable[[Any], tuple] | None = None,
        callback: Callable[[dict[str, float]], Any] | None = None,
        *,
        most_bytes: int | None = None,
        where: str = "fit_head",
        name: str = "data",
        compare: Compare | None = None,
    ) -> tuple[GatheredRows, Mapping[Path, tuple[Any, Any]]]:
        """The head's input for all rows of ``data``, with targets and weights.

        Args:
            variables: the variables of a linen module, or an NNX model.
            data: as for :func:`cronos_flax.fit_head`, as are the other arguments; of :class:`Features` their rows.
            unpack: how to take a batch apart.
            callback: called after each batch with ``rows`` (so far) and ``seconds``.
            most_bytes: of features that host memory holds; more are in a temporary file. None for as many as there are.
            where: the caller's name, for messages.
            name: the name of ``data`` there.
            compare: called with variables, the first batch and what it gave, unless the rows are :class:`Features`.

        Returns:
            The rows, in host memory or in files; and mean and variance of the batch norms by path, over all rows. The
            latter are empty if features are not those of batch statistics, if there is nothing to ``recalibrate``, or
            if anything is not finite.

        Raises:
            ValueError: for data that do not fit the module, or each other; if the module's outputs for rows that count
                are no longer those of the two layers; for :class:`Features` of another backbone.
            MemoryError: if memory does not hold the features.
            OSError: if the disk does not hold them.
        """
        given = UserData(data, unpack, where, name)
        if not isinstance(data, Features):
            passed = self.passed(variables, given, callback=callback, most_bytes=most_bytes, compare=compare)
            self._check_in_reach(passed.rows.y, given.place)
            return passed.rows, passed.moments
        if unpack is not None:
            raise ValueError(f"{where}: `unpack` must be None for features, which are not in batches.")
        changed = difference(data.backbone, self.backbone(variables, where))
        if changed is None and (other := other_names(data.operations, self.operations)):
            changed = f"only one of the two has the operations {other}"
        if changed is not None:
            raise ValueError(
                f"{where}: `{name}` must be features of this backbone, got those of another: {changed}. Gather them "
                "again, with the variables of now: cf.gather_features(head, variables, …)."
            )
        self._check_in_reach(data.rows.y, given.place)
        return data.rows, data.moments if self.recalibrate else {}

    def outputs_apart(self, out: Array, expected: Array) -> float | None:
        """The relative difference of outputs if it is more than rounding, of fast products too; else None."""
        difference = relative_difference(out, expected)
        return difference if math.isfinite(difference) and difference > max(self.tolerance, _CHANGED) else None

    def check_own_rows(self, args: tuple, kwargs: Mapping, where: str) -> None:
        """Raise a ValueError if a batch would get the mask of the batch that the head was found on, and is another.

        Args:
            args: the positional arguments of the batch.
            kwargs: the keyword arguments that came with it.
            where: the caller's name.
        """
        self.own_rows.check(args, kwargs, self.kwargs, where)

    def _check_in_reach(self, y: Any, where: str) -> None:
        """Raise a ValueError for targets that outputs in the precision of the two layers cannot be."""
        if self.largest == jnp.finfo(jnp.float32).max or not jnp.issubdtype(y.dtype, jnp.floating):
            return
        largest = float(on_host(abs(y).max()))
        if largest > self.largest:
            raise ValueError(
                f"{where}: the targets must be numbers that the two layers can give, up to {self.largest:.4g} in their "
                f"precision, got {largest:.4g}. Scale the targets, or compute the head in bfloat16 or float32."
            )

    def passed(
        self,
        variables: Any,
        data: UserData,
        *,
        callback: Callable[[dict[str, float]], Any] | None,
        store: Store | None = None,
        most_bytes: int | None = None,
        compare: Compare | None = None,
    ) -> Gathered:
        """All rows by a pass through the backbone, kept in ``store``; the rest is as for :meth:`gather`."""
        where, is_first = data.where, True
        variables = seen_with = self.module.variables(variables, where)
        check_there(where, (variables, data.given if isinstance(data.given, tuple) else ()))
        in_training = self.in_training
        observed = in_training and self.recalibrate
        apart = on_device(np.zeros(3), jnp.float32)

        def tap(batch: Batch) -> tuple[Array, tuple[Moments, ...]]:
            nonlocal is_first, apart, seen_with
            seen = self._pass(seen_with, batch.args, batch.kwargs, data.place, observed)
            if is_first:
                self._check_still_holds(variables, batch, seen, where)
                if self._has_zero_outputs(variables, seen.features):  # a scale or a mask of them does not show
                    network = random_like(self.read(variables), seen.features, 1.0, self.largest / DEVIATIONS)
                    seen_with = self.module.write(variables, self.paths, network)
                    seen = self._pass(seen_with, batch.args, batch.kwargs, data.place, observed)
                if compare is not None:
                    compare(seen_with, batch.args, {**self.kwargs, **batch.kwargs}, seen.out)
            is_checked = is_first and seen_with is variables
            if not is_checked:
                apart = self._further_apart(apart, seen_with, batch, seen)  # not waited for
            is_first = False
            return seen.features, seen.norms if observed else ()

        gathered = gather(
            tap, self.outputs, data, callback=callback, shuffled=in_training, store=store, most_bytes=most_bytes
        )
        difference, size, bias = map(float, on_host(apart))
        if self._is_no_rounding(difference, size, bias):
            first, other = f"the first batch of `{data.name}`", "a later one"
            if seen_with is not variables:
                first, other = "the batch that the head was found on", "another one"
            raise ValueError(
                f"{where}: the outputs of {self.module.name} must be those of Dense → relu → Dense at "
                f"{format_path(self.hidden_path)} and {format_path(self.output_path)} for all rows that count, as for "
                f"{first}; in {other} they differ by {difference:.2g}, of {size:.2g} at most without the bias. What a "
                "batch brings, such as a mask of outputs, changes them after the two layers: let the module return "
                "what these give, and mask that; or give rows that do not count weight 0."
            )
        return gathered

    def backbone(self, variables: Any, where: str) -> Fingerprint:
        """What tells the backbone from others, however the head is: all that a solve does not change, and the call."""
        found = described(self.module.backbone(self.module.variables(variables, where), self.paths))
        call = {"statistics": "batch" if self.in_training else "running", "keyword arguments": dict(self.kwargs)}
        return found | {f"the call's {name}": [[], "", checksum(value)] for name, value in call.items()}

    def _check_still_holds(self, variables: Any, batch: Batch, seen: Tap, where: str) -> None:
        """Raise a ValueError if the module's outputs are not those of the two layers any more."""
        of_size = self.outputs_apart(predicted(self.read(variables), seen.features), seen.out)
        apart = self._further_apart(on_device(np.zeros(3), jnp.float32), variables, batch, seen)
        difference, size, bias = map(float, on_host(apart))
        if of_size is None and self._is_no_rounding(difference, size, bias):
            of_size = difference / size if size else math.inf
        if of_size is not None:
            raise ValueError(
                f"{where}: the outputs of {self.module.name} must be those of Dense → relu → Dense at "
                f"{format_path(self.hidden_path)} and {format_path(self.output_path)}, as when the head was found; now "
                f"they differ by {of_size:.2g} of their size. Something around the two layers (a norm, a scale, an "
                "adapter, a mask) has changed since. Call find_head again: it says what."
            )

    def _further_apart(self, apart: Array, variables: Any, batch: Batch, seen: Tap) -> Array:
        """:func:`_further`, with a batch whose outputs have the leading axes of the head's input, as they must."""
        if seen.out.shape[:-1] != seen.features.shape[:-1]:
            return apart
        # Of float16, outputs may be infinite that are not of the two layers in float32.
        whole = on_device(self.largest > float(jnp.finfo(jnp.float16).max))
        counts, network = _counts(batch, seen.out), self.read(variables)
        return automatically(_further, apart, network, seen.features, seen.out, counts, whole)

    def _is_no_rounding(self, difference: float, size: float, bias: float) -> bool:
        """Whether outputs differ by more than rounding; a bias, even a large one, is not rounded as products are."""
        return difference > max(self.tolerance, _CHANGED) * size + self.tolerance * bias

    def _has_zero_outputs(self, variables: Any, features: Array) -> bool:
        """Whether one of the outputs of the two layers is zero for all rows, as fresh ones often are."""
        outputs = on_host(automatically(_largest_outputs, predicted(self.read(variables), features)))
        return bool(np.any(outputs == 0))

    def solve_bytes(self, rows: int) -> int:
        """Roughly the memory, in bytes, of a solve on so many rows of float32 features."""
        return int(_PEAK * 4 * rows * (2 * (self.features + 1) + 4 * self.hidden))

    def _pass(self, variables: Any, args: tuple, kwargs: Mapping, where: str, observed: bool = False) -> Tap:
        """One jitted pass, with the keyword arguments that the head was found with where none is given."""
        self.check_own_rows(args, kwargs, where)
        given = {**self.kwargs, **kwargs}
        try:
            return (self._observed if observed else self._tap)(variables, args, given)
        except WrongOutputError as error:
            raise ValueError(f"{where}: {error}") from error
        except (flax.errors.FlaxError, AttributeError, TypeError, ValueError) as error:
            check_together(where, variables=variables, batch=(args, given))
            shapes = shapes_said(args or dict(kwargs))
            kernel = self.module.kernel_shape(variables, self.hidden_path)
            if len(kernel) == 3 and kernel[1:] == (self.features, self.hidden):
                raise ValueError(
                    f"{where}: the variables must be those of one model on one device, got a kernel of shape {kernel} "
                    f"at {format_path(self.hidden_path)}, as flax.jax_utils.replicate makes it, or jax.vmap over keys. "
                    "Take a copy by flax.jax_utils.unreplicate, and replicate the result again; or model i of several "
                    "by jax.tree.map(lambda leaf: leaf[i], variables)."
                ) from error
            raise ValueError(
                f"{where}: the batch must be one that the model takes with these variables, got arguments of shapes "
                f"{shapes}: {error}{several_said(args)}"
            ) from error

    @functools.cached_property
    def _tap(self) -> Callable[[Any, tuple, Mapping], Tap]:
        return self._jitted(observed=False)

    @functools.cached_property
    def _observed(self) -> Callable[[Any, tuple, Mapping], Tap]:
        return self._jitted(observed=True)

    def _jitted(self, observed: bool) -> Callable[[Any, tuple, Mapping], Tap]:
        return jitted(
            lambda variables, args, kwargs: self.module.tap(variables, args, kwargs, self.hidden_path, observed)
        )

    def __getstate__(self) -> dict[str, Any]:
        """Its fields, for pickles and copies: what was compiled for it stays behind, as functions are not pickled."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def __str__(self) -> str:
        hidden, output = map(format_path, self.paths)
        width = max(len(hidden), len(output))
        same = f"agree to {self.error:.0e}" if self.error else "are the same"
        solved = self.hidden * (self.features + 1) + self.outputs * (self.hidden + 1)
        lines = {
            "hidden": f"{hidden:<{width}}  {self.features} → {self.hidden}, relu",
            "output": f"{output:<{width}}  {self.hidden} → {self.outputs}",
            "verified": f"numerically on {self.rows} rows: outputs {same}, also with random weights",
            "solved": f"about {solved:,} parameters of these two layers",
            "frozen": f"{self.frozen:,} other parameters",
            "memory": f"about {self.solve_bytes(10_000) / 1e6:,.0f} MB for a solve on 10,000 rows",
        }
        if self.in_training:
            lines["norms"] = "statistics of the batch" + ("; a solve sets the running ones" if self.recalibrate else "")
        longest = max(map(len, lines))
        return "\n".join(
            [f"Head of {self.module.name}", *(f"  {label:<{longest}}  {line}" for label, line in lines.items())]
        )

    __repr__ = __str__


def relative_difference(a: Array, b: Array) -> float:
    """Largest difference, relative to the largest entry of b."""
    return math.inf if a.shape != b.shape else float(on_host(automatically(_relative_difference, a, b)))


@jax.jit
def _relative_difference(a: Array, b: Array) -> Array:
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return jnp.max(jnp.abs(a - b)) / (jnp.max(jnp.abs(b)) + jnp.finfo(jnp.float32).tiny)


def predicted(network: TwoLayer, features: Array) -> Array:
    """``relu(features kernel1 + bias1) kernel2 + bias2`` in float32."""
    return automatically(_predicted, network, features)


@jax.jit
def _predicted(network: TwoLayer, features: Array) -> Array:
    return predict(jax.tree.map(lambda v: v.astype(jnp.float32), network), features.astype(jnp.float32))


@jax.jit
def _largest_outputs(outputs: Array) -> Array:
    """The size of each output, over all rows."""
    return jnp.max(jnp.abs(outputs), axis=range(outputs.ndim - 1))


@jax.jit
def _further(apart: Array, network: TwoLayer, features: Array, out: Array, counts: Array, whole: Array) -> Array:
    """How far outputs are from those of the two layers, the size of these without the bias, and that of the bias.

    Args:
        apart: the largest of each in the batches before, shape ``(3,)``.
        network: the two layers.
        features: their input ``(..., p)``.
        out: outputs ``(..., C)`` of the module.
        counts: which of them count.
        whole: whether those count that are not finite while those of the two layers are.
    """
    expected, out = _predicted(network, features), out.astype(jnp.float32)
    counts &= jnp.isfinite(expected) & (whole | jnp.isfinite(out))
    bias = jnp.zeros(()) if network.bias2 is None else network.bias2.astype(jnp.float32)
    bias = jnp.broadcast_to(bias, expected.shape)
    each = jnp.stack([jnp.abs(jnp.nan_to_num(out, nan=jnp.inf) - expected), jnp.abs(expected - bias), jnp.abs(bias)])
    return jnp.maximum(apart, jnp.max(jnp.where(counts, each, 0), axis=range(1, each.ndim), initial=0))


def _counts(batch: Batch, out: Array) -> Array:
    """Which outputs of a batch count ``(..., 1)``: all without weights. Those of another shape are refused later."""
    weight = np.ones(()) if batch.weight is None else batch.weight
    fits = weight.shape == out.shape[: weight.ndim]
    return on_device(weight.reshape(*weight.shape, *[1] * (out.ndim - weight.ndim)) > 0 if fits else np.True_)


def check_there(where: str, tree: Any) -> None:
    """Raise a ValueError for traced and for deleted arrays, and for shapes alone: a pass is checked on the host."""
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(tree)):
        raise ValueError(
            f"{where}: variables and data must be arrays with values, got shapes alone, as of jax.eval_shape or "
            "nnx.eval_shape. Draw or restore the values first."
        )
    arrays = [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, Array)]
    if not all(map(is_concrete, arrays)):
        raise ValueError(
            f"{where}: variables and data must be arrays with values, got traced ones, as inside jit, vmap and grad. "
            "Call it outside, between compiled steps."
        )
    if any(array.is_deleted() for array in arrays):
        raise ValueError(
            f"{where}: variables and data must be those of now, got arrays that a step has deleted, as "
            "jit(donate_argnums=...) does. Give what the last step returned."
        )


def check_head(where: str, head: Any, kind: type[Kind]) -> None:
    """Raise a ValueError unless ``head`` was found in a module of this kind."""
    if not isinstance(head, Head):
        raise ValueError(f"{where}: `head` must come from {kind.finder}, got {type(head).__name__}.")
    if not isinstance(head.module, kind):
        raise ValueError(f"{where}: `head` must come from {kind.finder}, got one that {head.module.finder} found.")


def _check_network(network: Any, like: TwoLayer) -> None:
    """Raise a ValueError unless ``network`` is a network with the biases of ``like``; widths may differ."""
    fits = isinstance(network, TwoLayer) and all(
        (getattr(network, name) is None) == (getattr(like, name) is None) for name in ("bias1", "bias2")
    )
    if not fits:
        raise ValueError(
            "write: `network` must be a cf.TwoLayer with the biases that the head has, "
            f"{'a' if like.bias1 is not None else 'no'} bias1 and {'a' if like.bias2 is not None else 'no'} bias2, got "
            f"{network!r}."
        )
