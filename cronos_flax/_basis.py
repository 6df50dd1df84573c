"""The coordinates a solve works in: scaled and weighted features; where it pays, their eigenbasis; and the way back.

Features ``x`` (one row) become ``√w · (x/s, 1) Q``, where ``s`` is the root mean squared row norm, the constant carries
the hidden bias, ``w`` are the sample weights normalised to mean one, and ``Q`` is the identity or the eigenvectors of
the Gram matrix. Nothing is centred: that would change what weight decay means.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cronos_flax._types import Features, Neurons, Outputs, RowVector, Scalar


@partial(jax.tree_util.register_dataclass, data_fields=["X", "Y", "ones"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Rows:
    """Everything that has one entry per example.

    Args:
        X: features, scaled and perhaps rotated, rows multiplied by √w.
        Y: targets, rows multiplied by √w.
        ones: √w, the column that the output bias multiplies; None for a network without output bias.
    """

    X: Features
    Y: Outputs
    ones: RowVector | None

    def center(self, T: Outputs) -> Outputs:
        """``P T``: what is left of T after the best output bias has been subtracted."""
        if self.ones is None:
            return T
        return T - jnp.outer(self.ones, self.ones @ T) / jnp.sum(jnp.square(self.ones))

    def bias(self, T: Outputs) -> Float[Array, " C"] | None:
        """The best output bias for residuals T."""
        return None if self.ones is None else self.ones @ T / jnp.sum(jnp.square(self.ones))


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


def root_mean_square_norm(features: Float[Array, "n p"], weight: RowVector) -> Scalar:
    """``√(Σ w_j ‖x_j‖² / Σ w_j)``, without overflow; 1 for features that are all zero."""
    largest = jnp.max(jnp.abs(features))
    safe = jnp.where(largest > 0, largest, 1)
    mean = jnp.sum(weight[:, None] * jnp.square(features / safe)) / jnp.sum(weight)
    return jnp.where(largest > 0, safe * jnp.sqrt(mean), 1)


def scaled(
    features: Float[Array, "n p"], targets: Outputs, weight: RowVector, *, hidden_bias: bool, output_bias: bool
) -> tuple[Rows, Basis]:
    """Rows in the coordinates of this module without rotation, and the change of coordinates.

    Args:
        features: shape ``(n, p)``, finite.
        targets: shape ``(n, C)``.
        weight: shape ``(n,)``, non-negative with mean one.
        hidden_bias: add the constant column that carries the hidden bias.
        output_bias: whether the network has an output bias.
    """
    root = jnp.sqrt(weight)
    scale = root_mean_square_norm(features, weight)
    X = features / scale
    if hidden_bias:
        X = jnp.concatenate([X, jnp.ones_like(X[:, :1])], axis=1)
    rows = Rows(root[:, None] * X, root[:, None] * targets, root if output_bias else None)
    return rows, Basis(scale, hidden_bias)


def rotated(rows: Rows, basis: Basis) -> tuple[Rows, Basis]:
    """The same on the eigenbasis of the Gram matrix, from coordinates without rotation."""
    eigenvalues, Q = jnp.linalg.eigh(rows.X.T @ rows.X)
    rows = dataclasses.replace(rows, X=rows.X @ Q)
    return rows, dataclasses.replace(basis, rotation=Q, eigenvalues=jnp.maximum(eigenvalues, 0))
