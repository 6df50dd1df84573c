"""Program ↔ network: neurons and directions of the solver, and the two layers of the user."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cronos_flax._solver.blocks import Blocks
from cronos_flax._solver.coordinates import Basis, Rows, root_mean_square_norm
from cronos_flax._solver.losses import Loss, Squared
from cronos_flax._solver.program import norms, unit_rows
from cronos_flax._solver.solution import TwoLayer
from cronos_flax._solver.types import Activations, Bias, Directions, Neurons, RowVector, Scalar

_DEAD = 1e-3  # a neuron below this fraction of the largest is treated as dead


def default_directions(m: int, C: int, dtype: jnp.dtype) -> Directions:
    """Directions for neurons that have none: ±e₁, ±e₂, … in turn, so that both signs of every output are there."""
    i = jnp.arange(m, dtype=jnp.int32)
    sign = jnp.where(i % 2 == 0, 1, -1).astype(dtype)
    return sign[:, None] * jax.nn.one_hot((i // 2) % C, C, dtype=dtype)


def from_network(params: TwoLayer, rows: Rows, basis: Basis) -> tuple[Neurons, Directions, Bias]:
    """``uᵢ = ‖W2ᵢ‖ W1ᵢ``, ``aᵢ = W2ᵢ/‖W2ᵢ‖``, and the mean output b: the same outputs, and no larger penalty."""
    m, C = params.kernel2.shape
    A = unit_rows(params.kernel2, default_directions(m, C, params.kernel2.dtype))
    U = basis.lift(params.kernel1, params.bias1) * jnp.linalg.norm(params.kernel2, axis=1)
    if params.bias2 is None:
        return U, A, None
    if isinstance(rows.loss, Squared):  # the best one is known, whatever the network
        return U, A, rows.best_constant()
    return U, A, params.bias2 + rows.mean(jax.nn.relu(rows.X @ U) @ A)


def to_network(rows: Rows, basis: Basis, U: Neurons, A: Directions, b: Bias, Z: Activations) -> TwoLayer:
    """The balanced network ``W1ᵢ = uᵢ/√‖uᵢ‖``, ``W2ᵢ = √‖uᵢ‖ aᵢ`` with the mean output b, in the user's units.

    ``Z = X U`` is known wherever this is asked for, and a product with X is not for nothing.
    """
    size = jnp.sqrt(norms(U))
    root_scale = jnp.sqrt(basis.scale)
    W1 = U / jnp.where(size > 0, size, 1)
    kernel1, bias1 = basis.lower(W1 * root_scale)
    bias2 = None if b is None else b - rows.mean(jax.nn.relu(Z) @ A)
    return TwoLayer(kernel1, bias1, (size / root_scale)[:, None] * A, bias2)


def predict(params: TwoLayer, X: Float[Array, "n p"] | Blocks) -> Float[Array, "n C"]:
    """Outputs of a two-layer ReLU network, ``relu(X kernel1 + bias1) kernel2 + bias2``."""
    hidden = X @ params.kernel1
    if params.bias1 is not None:
        hidden = hidden + params.bias1
    outputs = jax.nn.relu(hidden) @ params.kernel2
    return outputs if params.bias2 is None else outputs + params.bias2


def regularised_loss(
    params: TwoLayer,
    features: Float[Array, "n p"] | Blocks,
    targets: Float[Array, "n C"],
    weight: RowVector,
    beta: Scalar,
    loss: Loss,
) -> Scalar:
    """What a solve minimises, in the user's units, evaluated on the network itself.

    ``Σ w_j ℓ(f_j, y_j) / Σ w_j + (beta/2)(‖kernel1‖² + ‖bias1‖²/s² + ‖kernel2‖²)``
    """
    losses = loss.value(predict(params, features), targets)
    penalty = jnp.sum(jnp.square(params.kernel1)) + jnp.sum(jnp.square(params.kernel2))
    if params.bias1 is not None:
        penalty = penalty + jnp.sum(jnp.square(params.bias1 / root_mean_square_norm(features, weight)))
    return jnp.sum(weight * losses) / jnp.sum(weight) + 0.5 * beta * penalty


def random_neurons(key: Array, like: Neurons) -> Neurons:
    """Neurons of about unit norm in directions that are uniform on the solver's coordinates."""
    return jax.random.normal(key, like.shape, like.dtype) / jnp.sqrt(jnp.asarray(like.shape[0], like.dtype))


def dead(U: Neurons) -> Array:
    """Which neurons are (nearly) zero, and so have no gate of their own."""
    size = norms(U)
    return size <= _DEAD * jnp.max(size)
