"""The coordinates a solve works in: scaled and weighted features; where it pays, their eigenbasis; and the way back.

Features ``x`` (one row) become ``√w · (x/s, 1) Q``, where ``s`` is the root mean squared row norm, the constant carries
the hidden bias, ``w`` are the sample weights normalised to mean one, and ``Q`` is the identity or the eigenvectors of
the Gram matrix. Nothing is centred: that would change what weight decay means.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, SingleDeviceSharding
from jaxtyping import Array, Float, Int

from cronos_flax._solver.blocks import Blocks, fold
from cronos_flax._solver.loss import Loss
from cronos_flax._solver.numerics import or_one
from cronos_flax._solver.sample import Sample
from cronos_flax._solver.types import Design, Neurons, Outputs, RowVector, Scalar

_MANY_BYTES, _PIECE_BYTES = 2**23, 2**21  # more than a cache holds, and what it holds


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["X", "Y", "root", "order", "length"],
    meta_fields=["loss", "output_bias", "place", "piece"],
)
@dataclasses.dataclass(frozen=True)
class Rows:
    """Everything that has one entry per example; and the loss, weighted, of outputs that are scaled as the rows are.

    Outputs here are ``√w f``: with rows of X multiplied by √w, so are pre-activations and what F makes of them.

    Args:
        X: features, scaled and perhaps rotated, rows multiplied by √w; in memory or in blocks.
        Y: targets, as the loss takes them.
        root: √w; what the output bias is multiplied by.
        loss: the loss of one row.
        output_bias: whether the network has an output bias.
        order: the places of the rows that samples are drawn from, in the order of the draws: all rows of positive
            weight, where they lie on several devices; None for all places in their own order.
        length: how many of the places come before those of rows of weight zero that pad the others; None for all.
        place: how the rows are sharded over devices; None where they are on one, and where it is not known.
        piece: how many rows :meth:`summed` and :meth:`mapped` take at a time; None for all of them.
    """

    X: Design | Blocks
    Y: Outputs
    root: RowVector
    loss: Loss
    output_bias: bool
    order: Int[Array, " k"] | None = None
    length: Int[Array, ""] | None = None
    place: NamedSharding | None = None
    piece: int | None = None

    def in_pieces(self, m: int) -> "Rows":
        """The same with a ``piece``, where arrays with an entry for each row and neuron are far larger than a cache.

        Of rows on one CPU: elsewhere pieces would be computed one after the other for nothing.

        Args:
            m: neurons.
        """
        place, bytes_of_row = self.root.sharding, m * self.root.dtype.itemsize
        if not isinstance(place, SingleDeviceSharding) or len(self.Y) * bytes_of_row < _MANY_BYTES:
            return self
        device: Any = next(iter(place.device_set))
        piece = max(1, _PIECE_BYTES // bytes_of_row) if device.platform == "cpu" else None
        return dataclasses.replace(self, piece=piece)

    def summed(self, of: Callable[..., Array], *of_rows: Array) -> Array:
        """``of(*of_rows)``, a sum over rows that is zero for rows of zeros, piece by piece."""
        count, size = self._pieces
        if count == 1:
            return of(*of_rows)

        def add(i: Array, total: Array) -> Array:
            start, rows = self._piece(i, of_rows)
            is_new = start + jnp.arange(size, dtype=jnp.int32) >= i * size
            return total + of(*(jnp.where(jnp.expand_dims(is_new, range(1, part.ndim)), part, 0) for part in rows))

        like = jax.eval_shape(of, *of_rows)
        return jax.lax.fori_loop(0, count, add, jnp.zeros(like.shape, like.dtype))

    def mapped(self, of: Callable[..., Array], *of_rows: Array) -> Array:
        """``of(*of_rows)``, row by row, piece by piece."""
        count, _ = self._pieces
        if count == 1:
            return of(*of_rows)

        def put(i: Array, made: Array) -> Array:
            start, rows = self._piece(i, of_rows)
            return jax.lax.dynamic_update_slice_in_dim(made, of(*rows), start, 0)

        like = jax.eval_shape(of, *of_rows)
        return jax.lax.fori_loop(0, count, put, jnp.zeros(like.shape, like.dtype))

    @property
    def _pieces(self) -> tuple[int, int]:
        """How many pieces there are, and how many rows each has."""
        n = len(self.Y)
        count = 1 if self.piece is None else -(-n // self.piece)
        return count, -(-n // count)

    def _piece(self, i: Array, of_rows: tuple[Array, ...]) -> tuple[Array, list[Array]]:
        """Where a piece starts, and its rows; the last one overlaps the one before."""
        n, (_, size) = len(self.Y), self._pieces
        start = jnp.minimum(i * size, n - size)
        return start, [jax.lax.dynamic_slice_in_dim(rows, start, size) for rows in of_rows]

    def sample(self, index: Int[Array, " k"]) -> Sample:
        """Where the rows with these numbers are."""
        return Sample.of(index, len(self.Y), self.places, self.place)

    def take(self, index: Int[Array, " k"]) -> "Rows":
        """The rows with these numbers; over several devices also rows of weight zero, which do not count."""
        some = self.sample(index)
        X, Y, root = some.take(self.X), some.take(self.Y), some.take(self.root)
        return dataclasses.replace(self, X=X, Y=Y, root=root, order=some.order, length=None)

    @property
    def places(self) -> int:
        """How many places samples are drawn from, padding among them."""
        return len(self.Y) if self.order is None else len(self.order)

    @property
    def count(self) -> Scalar | int:
        """The number of rows, without those that pad them."""
        return self.places if self.length is None else self.length.astype(self.root.dtype)

    @property
    def weight(self) -> RowVector:
        """The weights w of the rows."""
        return jnp.square(self.root)

    def _unscaled(self, T: Outputs) -> Outputs:
        return T / or_one(self.root)[:, None]

    def _counted(self, each: Array) -> Array:
        """What the loss says of each row; 0 for rows of no weight: at their outputs, 0, it need not be finite."""
        return jnp.where(jnp.expand_dims(self.root > 0, tuple(range(1, each.ndim))), each, 0)

    def value(self, T: Outputs) -> Scalar:
        """The weighted loss of outputs T, summed over rows."""
        return self.weight @ self._counted(self.loss.value(self._unscaled(T), self.Y))

    def gradient(self, T: Outputs) -> Outputs:
        """Of :meth:`value`."""
        return self.root[:, None] * self._counted(self.loss.gradient(self._unscaled(T), self.Y))

    def curvature(self, T: Outputs, R: Outputs) -> Outputs:
        """The Hessian of :meth:`value` at T, or what the loss gives in its place, times R."""
        return self._counted(self.loss.curvature(self._unscaled(T), self.Y, R))

    def mean_curvature(self, T: Outputs) -> RowVector:
        """The mean diagonal of each row's curvature."""
        return self._counted(self.loss.mean_curvature(self._unscaled(T), self.Y))

    def prox(self, T: Outputs, step: Scalar) -> Outputs:
        """Of ``step`` times :meth:`value`."""
        return self.root[:, None] * self._counted(self.loss.prox(self._unscaled(T), self.Y, step))

    def dual(self, T: Outputs) -> Outputs:
        """Gradients T of :meth:`value` moved to where their conjugate is finite and the output bias is at its best."""
        if not self.output_bias:
            return T
        return self.root[:, None] * self.loss.balance(self._unscaled(T), self.Y, self.weight)

    def conjugate(self, T: Outputs) -> Scalar:
        """Of :meth:`value`, at T."""
        return self.weight @ self._counted(self.loss.conjugate(self._unscaled(T), self.Y))

    def mean(self, T: Outputs) -> Float[Array, " C"]:
        """The constant b nearest to outputs T, that is to say with the least ``‖T − √w b‖``."""
        return self.root @ T / jnp.sum(self.weight)

    def bias(self, T: Outputs) -> Float[Array, " C"] | None:
        """:meth:`mean`; None for a network without output bias."""
        return self.mean(T) if self.output_bias else None

    def constant(self, b: Float[Array, " C"] | None) -> Outputs | Scalar:
        """The outputs of a bias b alone."""
        return jnp.zeros((), self.root.dtype) if b is None else jnp.outer(self.root, b)

    def center(self, T: Outputs) -> Outputs:
        """``P T``: T without what the output bias can make, ``P = I − √w √wᵀ/Σw``; T itself where there is no bias."""
        return T - self.constant(self.mean(T)) if self.output_bias else T

    def best_constant(self) -> Float[Array, " C"] | None:
        """The best output bias of a network that is otherwise zero; None where it has none."""
        return self.loss.constant(self.Y, self.weight) if self.output_bias else None

    def misfit(self) -> Scalar:
        """The size of the targets: the root of twice the mean loss of the best constant; 1 where that is not > 0."""
        null = self.value(self.constant(self.loss.constant(self.Y, self.weight))) / jnp.sum(self.weight)
        return jnp.where(null > 0, jnp.sqrt(2 * jnp.maximum(null, 0)), 1)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["scale", "rotation", "eigenvalues"],
    meta_fields=["hidden_bias"],
)
@dataclasses.dataclass(frozen=True)
class Basis:
    """The linear change between hidden kernels of the user and neurons of the solver.

    Args:
        scale: s, the root mean squared row norm of the features.
        hidden_bias: whether the features were extended by a constant column.
        rotation: Q, orthogonal, shape ``(d, d)``; None is the identity.
        eigenvalues: λ ≥ 0, the Gram matrix in the basis Q; None where there is no Q.
    """

    scale: Scalar
    hidden_bias: bool
    rotation: Float[Array, "d d"] | None = None
    eigenvalues: Float[Array, " d"] | None = None

    def lift(self, kernel: Float[Array, "p m"], bias: Float[Array, " m"] | None) -> Neurons:
        """Neurons with the pre-activations of the hidden layer ``(kernel, bias)``."""
        neurons = self.scale * kernel
        if bias is not None:
            neurons = jnp.concatenate([neurons, bias[None, :]])
        return neurons if self.rotation is None else self.rotation.T @ neurons

    def lower(self, neurons: Neurons) -> tuple[Float[Array, "p m"], Float[Array, " m"] | None]:
        """The hidden layer ``(kernel, bias)`` with the pre-activations of these neurons."""
        if self.rotation is not None:
            neurons = self.rotation @ neurons
        if self.hidden_bias:
            return neurons[:-1] / self.scale, neurons[-1]
        return neurons / self.scale, None


def root_mean_square_norm(features: Float[Array, "n p"] | Blocks, weight: RowVector) -> Scalar:
    """``√(Σ w_j ‖x_j‖² / Σ w_j)``, without overflow; 1 for features that are all zero where there is weight."""
    zero = jnp.zeros((), weight.dtype)

    def larger(largest: Scalar, X: Float[Array, "n p"], w: RowVector) -> Scalar:
        return jnp.maximum(largest, jnp.max(jnp.where((w > 0)[:, None], jnp.abs(X), 0)))

    largest = fold(features, larger, zero, weight)
    safe = or_one(largest)

    def add(total: Scalar, X: Float[Array, "n p"], w: RowVector) -> Scalar:
        squares = jnp.square(X / safe)  # of rows of no weight perhaps infinite
        return total + jnp.sum(w[:, None] * jnp.where((w > 0)[:, None] | jnp.isfinite(squares), squares, 0))

    total = fold(features, add, zero, weight)
    return jnp.where(largest > 0, safe * jnp.sqrt(total / jnp.sum(weight)), 1)


def normalised(weight: RowVector) -> RowVector:
    """Weights that sum to the number of rows of positive weight, so that the other rows are as if absent."""
    return weight * (jnp.count_nonzero(weight).astype(weight.dtype) / jnp.sum(weight))


def scaled(
    features: Float[Array, "n p"] | Blocks,
    targets: Outputs,
    weight: RowVector,
    loss: Loss,
    *,
    hidden_bias: bool,
    output_bias: bool,
    order: Int[Array, " k"] | None = None,
    place: NamedSharding | None = None,
) -> tuple[Rows, Basis]:
    """Rows in the coordinates of this module without rotation, and the change of coordinates.

    Args:
        features: shape ``(n, p)``, finite.
        targets: shape ``(n, C)``.
        weight: shape ``(n,)``, non-negative with mean one.
        loss: of one row.
        hidden_bias: add the constant column that carries the hidden bias.
        output_bias: whether the network has an output bias.
        order: as in :class:`Rows`.
        place: as in :class:`Rows`.
    """
    root = jnp.sqrt(weight)
    scale = root_mean_square_norm(features, weight)
    X: Design | Blocks
    if isinstance(features, Blocks):
        X = dataclasses.replace(features, scale=scale, root=root, hidden_bias=hidden_bias)
    else:
        X = features * (root / scale)[:, None]
        X = jnp.pad(X, ((0, 0), (0, 1))).at[:, -1].set(root) if hidden_bias else X
    return Rows(X, targets, root, loss, output_bias, order, place=place), Basis(scale, hidden_bias)


def rotated(rows: Rows, basis: Basis) -> tuple[Rows, Basis]:
    """The same on the eigenbasis of the Gram matrix, from coordinates without rotation."""
    X, d = rows.X, rows.X.shape[1]
    gram = fold(X, lambda gram, X: gram + X.T @ X, jnp.zeros((d, d), X.dtype))
    eigenvalues, Q = jnp.linalg.eigh(gram)
    rows = dataclasses.replace(rows, X=dataclasses.replace(X, rotation=Q) if isinstance(X, Blocks) else X @ Q)
    return rows, dataclasses.replace(basis, rotation=Q, eigenvalues=jnp.maximum(eigenvalues, 0))
