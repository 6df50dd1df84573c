"""The convex program of method.md, "The program", one function per symbol.

With gates ``D`` and output directions ``A`` held fixed,

    minimise over U, b      L(F X U + 1bᵀ) + β Σᵢ ‖uᵢ‖₂      subject to      G X U ≥ 0

where ``F Z = P (D ∘ Z) A`` and ``G Z = (2D − 1) ∘ Z`` act on pre-activations ``Z = X U``, ``P`` removes what the output
bias b can make, and L is the weighted loss, summed over rows. Acting on pre-activations lets one product with X serve
both. The program of a gated network has no constraint, ``G = 0``. Below the program: the way from a network of the user
to neurons and directions of the program, and back.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cronos_flax._solver.blocks import Blocks, adjoint
from cronos_flax._solver.coordinates import Basis, Rows, root_mean_square_norm
from cronos_flax._solver.loss import Loss
from cronos_flax._solver.numerics import or_one
from cronos_flax._solver.solution import GatedTwoLayer, Network, TwoLayer, predict
from cronos_flax._solver.types import Activations, Bias, Directions, Gates, Neurons, Outputs, RowVector, Scalar

_DEAD = 1e-3  # a neuron below this fraction of the largest is treated as dead


def norms(U: Neurons) -> Float[Array, " m"]:
    """``‖uᵢ‖₂`` of each neuron."""
    return jnp.linalg.norm(U, axis=0)


def unit_rows(T: Float[Array, "k C"], fallback: Float[Array, "k C"]) -> Float[Array, "k C"]:
    """Rows of T divided by their norms; the row of ``fallback`` where T's is zero."""
    size = jnp.linalg.norm(T, axis=1, keepdims=True)
    return jnp.where(size > 0, T / or_one(size), fallback)


@partial(
    jax.tree_util.register_dataclass, data_fields=["rows", "D", "A", "beta", "eigenvalues"], meta_fields=["has_cones"]
)
@dataclasses.dataclass(frozen=True)
class Program:
    """The program for given gates and directions.

    Args:
        rows: the data on the solver's coordinates.
        D: gates, True where a neuron is on.
        A: unit output directions.
        beta: β, the group penalty (in sums over rows).
        eigenvalues: of the Gram matrix, where the rows are on its eigenbasis; else None.
        has_cones: whether ``G X U ≥ 0`` is asked for; not of a gated network.
    """

    rows: Rows
    D: Gates
    A: Directions
    beta: Scalar
    eigenvalues: Float[Array, " d"] | None
    has_cones: bool = True

    def F(self, Z: Activations) -> Outputs:
        """``P (D ∘ Z) A``."""
        return self.rows.center(jnp.where(self.D, Z, 0) @ self.A)

    def Ft(self, R: Outputs) -> Activations:
        """The adjoint of :meth:`F`: ``D ∘ (P R Aᵀ)``."""
        return through_gates(self.D, self.rows.center(R), self.A)

    def G(self, Z: Activations | Scalar) -> Activations | Scalar:
        """``(2D − 1) ∘ Z``, its own adjoint and inverse; without cones the number zero."""
        return jnp.where(self.D, Z, -Z) if self.has_cones else jnp.zeros((), Z.dtype)

    @property
    def K(self) -> Float[Array, " d"]:
        """The diagonal of ``K = I + X* G*G X``, which is ``I + XᵀX`` on its eigenbasis, and I without cones."""
        if not self.has_cones:
            return jnp.ones(self.rows.X.shape[1], self.A.dtype)
        assert self.eigenvalues is not None
        return 1 + self.eigenvalues

    def outputs(self, Z: Activations, b: Bias) -> Outputs:
        """``F Z + 1bᵀ``."""
        return self.F(Z) + self.rows.constant(b)

    def objective(self, U: Neurons, b: Bias, Z: Activations) -> Scalar:
        """The program's objective at U and b, given ``Z = X U``."""
        return self.rows.value(self.outputs(Z, b)) + self.beta * jnp.sum(norms(U))


def through_gates(D: Gates, R: Outputs, A: Directions) -> Activations:
    """``D ∘ (R Aᵀ)``."""
    # One output needs no product of matrices, which would cost more than the memory it writes.
    return jnp.where(D, R * A.T if R.shape[1] == 1 else R @ A.T, 0)


def activated(Z: Activations, D: Gates | None) -> Activations:
    """``D ∘ Z`` of a gated network; ``relu(Z)`` of a ReLU network (D is None), whose gates follow the signs."""
    return jax.nn.relu(Z) if D is None else jnp.where(D, Z, 0)


def network_outputs(rows: Rows, A: Directions, b: Bias, Z: Activations, D: Gates | None = None) -> Outputs:
    """Outputs of the network with pre-activations Z."""
    return rows.center(activated(Z, D) @ A) + rows.constant(b)


def network_objective(
    rows: Rows, A: Directions, b: Bias, beta: Scalar, U: Neurons, Z: Activations, D: Gates | None = None
) -> Scalar:
    """Regularised loss of the network with neurons U and directions A of any length."""
    return objective_of(rows, network_outputs(rows, A, b, Z, D), A, beta, U)


def objective_of(rows: Rows, outputs: Outputs, A: Directions, beta: Scalar, U: Neurons) -> Scalar:
    """The same of a network with these outputs."""
    return rows.value(outputs) + beta * jnp.sum(norms(U) * jnp.linalg.norm(A, axis=1))


def group_prox(U: Neurons, threshold: Scalar) -> Neurons:
    """``argmin_V ½‖V − U‖² + threshold Σᵢ ‖vᵢ‖``."""
    size = norms(U)
    return U * (jnp.maximum(size - threshold, 0) / or_one(size))[None, :]


def lower_bound(program: Program, alpha: Outputs, nu: Activations | Scalar) -> Scalar:
    """A number no point of the program is below (method.md, "Held gates").

    With α a gradient of the loss that the output bias cannot lower, and any ``ν ≥ 0``, weak duality gives ``−L*(cα)``
    for every ``c ≥ 0`` with ``c · maxᵢ ‖Fᵢ*α − Gᵢ*νᵢ‖ ≤ β``; for the squared loss the best such c has a closed form.
    """
    rows, tiny = program.rows, jnp.finfo(alpha.dtype).tiny
    alpha = rows.dual(alpha)
    dual_norm = jnp.max(norms(adjoint(rows.X, program.Ft(alpha) - program.G(nu))))
    largest = program.beta / jnp.maximum(dual_norm, tiny)
    if rows.loss.is_quadratic:
        best = -jnp.sum(alpha * rows.root[:, None] * rows.Y) / jnp.maximum(jnp.sum(jnp.square(alpha)), tiny)
    else:
        best = jnp.ones((), alpha.dtype)
    return -rows.conjugate(jnp.clip(best, 0, largest) * alpha)


def default_directions(m: int, C: int, dtype: jnp.dtype) -> Directions:
    """Directions for neurons that have none: ±e₁, ±e₂, … in turn, so that both signs of every output are there."""
    i = jnp.arange(m, dtype=jnp.int32)
    sign = jnp.where(i % 2 == 0, 1, -1).astype(dtype)
    return sign[:, None] * jax.nn.one_hot((i // 2) % C, C, dtype=dtype)


def from_network(params: Network, rows: Rows, basis: Basis, D: Gates | None = None) -> tuple[Neurons, Directions, Bias]:
    """``uᵢ = ‖W2ᵢ‖ W1ᵢ``, ``aᵢ = W2ᵢ/‖W2ᵢ‖``, and the mean output b: the same outputs, and no larger penalty."""
    m, C = params.kernel2.shape
    A = unit_rows(params.kernel2, default_directions(m, C, params.kernel2.dtype))
    U = basis.lift(params.kernel1, params.bias1) * jnp.linalg.norm(params.kernel2, axis=1)[None, :]
    if params.bias2 is None:
        return U, A, None
    if rows.loss.is_quadratic:  # the best one is known, whatever the network
        return U, A, rows.best_constant()
    return U, A, params.bias2 + rows.mean(activated(rows.X @ U, D) @ A)


def to_network(
    rows: Rows, basis: Basis, U: Neurons, A: Directions, b: Bias, Z: Activations, D: Gates | None = None
) -> TwoLayer:
    """The balanced network ``W1ᵢ = uᵢ/√‖uᵢ‖``, ``W2ᵢ = √‖uᵢ‖ aᵢ`` with the mean output b, in the user's units.

    ``Z = X U`` is known wherever this is asked for, and a product with X is not for nothing. With D, these are the
    layers of a gated network.
    """
    size = jnp.sqrt(norms(U))
    root_scale = jnp.sqrt(basis.scale)
    W1 = U / or_one(size)[None, :]
    kernel1, bias1 = basis.lower(W1 * root_scale)
    bias2 = None if b is None else b - rows.mean(activated(Z, D) @ A)
    return TwoLayer(kernel1, bias1, (size / root_scale)[:, None] * A, bias2)


def gated(params: TwoLayer, U: Neurons, basis: Basis, key: Array) -> GatedTwoLayer:
    """The gated network with the outputs of a ReLU network whose neurons are U; dead neurons get random gates."""
    off, (kernel, bias) = dead(U), basis.lower(random_neurons(key, U))
    gate_kernel = jnp.where(off[None, :], kernel, params.kernel1)
    gate_bias = None if bias is None or params.bias1 is None else jnp.where(off, bias, params.bias1)
    return GatedTwoLayer(**vars(params), gate_kernel=gate_kernel, gate_bias=gate_bias)


def regularised_loss(
    params: Network,
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
    losses = jnp.where((weight > 0) | jnp.isfinite(losses), losses, 0)  # of a row of no weight it need not be finite
    penalty = jnp.sum(jnp.square(params.kernel1)) + jnp.sum(jnp.square(params.kernel2))
    if params.bias1 is not None:
        penalty = penalty + jnp.sum(jnp.square(params.bias1 / root_mean_square_norm(features, weight)))
    return jnp.sum(weight * losses) / jnp.sum(weight) + 0.5 * beta * penalty


compiled_loss = jax.jit(regularised_loss, static_argnames="loss")  # to be called from Python


def random_neurons(key: Array, like: Neurons) -> Neurons:
    """Neurons of about unit norm in directions that are uniform on the solver's coordinates."""
    return jax.random.normal(key, like.shape, like.dtype) / jnp.sqrt(jnp.asarray(like.shape[0], like.dtype))


def dead(U: Neurons) -> Array:
    """Which neurons are (nearly) zero, and so have no gate of their own."""
    size = norms(U)
    return size <= _DEAD * jnp.max(size)
