"""The linear system of a refreshed step (method.md, "Refreshed gates"), its preconditioner, and its solution.

With the gates D of the current neurons, outputs are linear in a step ``δ = (δU, δA, δb)`` of neurons, directions and
output bias, and the step is Levenberg–Marquardt's,

    (J₁* (J₂*H J₂ + μ) J₁ + μ + β/‖uᵢ‖) δ = −∇(loss of the network)

    J₁ δ = (X δU, relu(X U) δA, 1 δbᵀ),      J₂ (Z, Y, B) = P ((D ∘ Z) A + Y) + B

with H the curvature of the loss. Directions move within their tangent, ``δaᵢ ⟂ aᵢ``: their lengths are those of the
neurons. With one output they stay, and with the squared loss so does the bias; then δ is the U-step of ADMM.

The system is solved roughly, by conjugate gradients on a sample of the rows, preconditioned by a Kronecker
approximation. They begin along the last step, so that rough solutions of one system after the other add up.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from cronos_flax._solver.blocks import adjoint, fold
from cronos_flax._solver.coordinates import Rows
from cronos_flax._solver.numerics import conjugate_gradient, or_one, sketch, test_matrix
from cronos_flax._solver.program import group_prox, norms, through_gates
from cronos_flax._solver.sample import Sample
from cronos_flax._solver.settings import Refreshed
from cronos_flax._solver.types import Activations, Bias, Directions, Gates, Neurons, Outputs, Scalar


def sample_size(n: int, settings: Refreshed, least: int | None = None) -> int:
    """How many of n rows a sample has: at least ``least``, if there are so many (None: ``settings.least_sample``)."""
    if n <= settings.few_rows:
        return n
    least = settings.least_sample if least is None else least
    return min(n, max(n // settings.sample_every, least), settings.most_sample)


def places(
    n: int, size: int, key: Array, order: Int[Array, " n"] | None = None, length: Int[Array, ""] | None = None
) -> Int[Array, " k"] | None:
    """Where the rows of a sample of n are: one at random out of each stretch of equal length; None for all of them.

    Args:
        n: places that are drawn from.
        size: of the sample.
        key: of the draw.
        order: the n places; None for 0 … n − 1.
        length: draw from the first so many only; None for all.
    """
    if size == n:
        return None
    among = n if length is None else length
    stretch = among // size if length is None else jnp.maximum(among // size, 1)  # of fewer some are drawn twice
    first_key, place_key = jax.random.split(key)
    first = jax.random.randint(first_key, (), 0, among, jnp.int32)
    place = jax.random.randint(place_key, (size,), 0, stretch, jnp.int32)
    drawn = (first + stretch * jnp.arange(size, dtype=jnp.int32) + place) % among
    return drawn if order is None else order[drawn]


def sample(rows: Rows, key: Array, size: int) -> Rows:
    """Some rows, one at random out of each stretch of equal length."""
    index = places(rows.places, size, key, rows.order, rows.length)
    return rows if index is None else rows.take(index)


@partial(jax.tree_util.register_dataclass, data_fields=["vectors", "eigenvalues", "tail"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Spectrum:
    """A positive semidefinite matrix by its leading eigenpairs and the mean of the eigenvalues that are left."""

    vectors: Float[Array, "N r"]
    eigenvalues: Float[Array, " r"]
    tail: Scalar

    @classmethod
    def of(cls, image: Float[Array, "N r"], trace: Scalar, test: Float[Array, "N r"]) -> Self:
        """From the product of the matrix with a test matrix."""
        size, rank = test.shape
        leading = sketch(image, test)
        rest = jnp.maximum(trace - jnp.sum(leading.eigenvalues), 0)
        return cls(leading.vectors, leading.eigenvalues, rest / max(size - rank, 1))

    def resolvent(self, shift: Array, R: Float[Array, "k N"]) -> Float[Array, "k N"]:
        """``(1 + shiftⱼ · matrix)⁻¹ rⱼ`` for each row ``rⱼ`` of R."""
        outside, inside = 1 / (1 + shift * self.tail), 1 / (1 + shift * self.eigenvalues[None, :])
        return outside * R + ((inside - outside) * (R @ self.vectors)) @ self.vectors.T


@partial(jax.tree_util.register_dataclass, data_fields=["features", "test", "least"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Prepared:
    """What all steps share.

    Args:
        features: the spectrum of ``XᵀX/n``.
        test: a test matrix for the neurons' side.
        least: the norm up to which a neuron counts as zero: what it does is lost in the rounding of activations.
    """

    features: Spectrum
    test: Float[Array, "m r"]
    least: Scalar


def prepare(rows: Rows, m: int, key: Array, settings: Refreshed) -> Prepared:
    """For networks of m neurons; the spectrum is that of a sample of the rows."""
    sample_key, feature_key, neuron_key = jax.random.split(key, 3)
    d = rows.X.shape[1]
    some = sample(rows, sample_key, sample_size(rows.places, settings, settings.rows_per_feature * d))
    X, k = some.X, some.count
    trace = fold(X, lambda total, X: total + jnp.sum(jnp.square(X)), jnp.zeros((), X.dtype)) / k
    test = test_matrix(d, settings.feature_rank, feature_key, X.dtype)
    features = Spectrum.of(adjoint(X, X @ test) / k, trace, test)
    least = jnp.sqrt(jnp.finfo(X.dtype).eps) * rows.misfit() / m
    return Prepared(features, test_matrix(m, settings.neuron_rank, neuron_key, X.dtype), least)


class Step(NamedTuple):
    """A step of the network; None for what does not move.

    Args:
        U: of the neurons, shape ``(d, m)``.
        W: of the output kernel, ``‖uᵢ‖ δaᵢ``, across the directions; shape ``(m, C)``; None with one output.
        b: of the output bias.
    """

    U: Neurons
    W: Directions | None
    b: Bias


class Effect(NamedTuple):
    """What a step does; None for what it does not move.

    Args:
        Z: to the pre-activations.
        Y: to the outputs, by the output kernel.
        B: to the outputs, by the output bias; shape ``(n, C)``.
    """

    Z: Activations
    Y: Outputs | None
    B: Outputs | None


class Here(NamedTuple):
    """Where a network is, on some rows.

    Args:
        Z: pre-activations; of a neuron that is zero, those of the gates it has.
        scale: ``1/‖uᵢ‖``, floored; 0 for neurons that are zero.
        A: output directions.
        outputs: those of the network.
    """

    Z: Activations
    scale: Float[Array, " m"]
    A: Directions
    outputs: Outputs

    def take(self, some: Sample) -> "Here":
        """The same on fewer rows."""
        return self._replace(Z=some.take(self.Z), outputs=some.take(self.outputs))


@partial(jax.tree_util.register_dataclass, data_fields=["rows", "D", "H", "A", "outputs", "stretch"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class LocalModel:
    """The network to first order, and its loss to second, on some of the rows.

    Args:
        rows: these rows.
        D: their gates.
        H: hidden activations of neurons of unit length; None with one output.
        A: output directions.
        outputs: where the curvature is taken.
        stretch: rows of the whole problem for each of these.
    """

    rows: Rows
    D: Gates
    H: Activations | None
    A: Directions
    outputs: Outputs
    stretch: Scalar | float

    @classmethod
    def of(cls, rows: Rows, here: Here, stretch: Scalar | float) -> Self:
        """Of the network at these rows."""
        D = here.Z > 0
        H = None if here.A.shape[1] == 1 else jnp.where(D, here.Z, 0) * here.scale[None, :]
        return cls(rows, D, H, here.A, here.outputs, stretch)

    def effect(self, delta: Step) -> Effect:
        """``J₁ δ``."""
        Y = None if self.H is None or delta.W is None else self.H @ delta.W
        return Effect(self.rows.X @ delta.U, Y, None if delta.b is None else self.rows.constant(delta.b))

    def effect_adjoint(self, effect: Effect) -> Step:
        """``J₁*``, onto steps that leave the directions' lengths."""
        W = None
        if self.H is not None and effect.Y is not None:
            W = tangent(self.rows.summed(adjoint, self.H, effect.Y), self.A)
        B = None if effect.B is None else self.rows.root @ effect.B
        return Step(adjoint(self.rows.X, effect.Z), W, B)

    def outputs_of(self, effect: Effect) -> Outputs:
        """``J₂``."""
        T = jnp.where(self.D, effect.Z, 0) @ self.A
        T = self.rows.center(T if effect.Y is None else T + effect.Y)
        return T if effect.B is None else T + effect.B

    def outputs_adjoint(self, R: Outputs) -> Effect:
        """``J₂*``."""
        T = self.rows.center(R)
        Z = through_gates(self.D, T, self.A)
        return Effect(Z, None if self.H is None else T, R if self.rows.output_bias else None)


def tangent(W: Directions, A: Directions) -> Directions:
    """W without what only lengthens the directions A."""
    return W - jnp.sum(W * A, axis=1, keepdims=True) * A


def gradient(rows: Rows, here: Here, beta: Scalar, U: Neurons) -> Step:
    """Of the regularised loss; at ``uᵢ = 0`` the subgradient of least norm.

    By ``J*`` as in :class:`LocalModel`, but without its arrays D and H.
    """
    A, R = here.A, rows.gradient(here.outputs)
    T, W = rows.center(R), None
    if A.shape[1] > 1:
        W = rows.summed(lambda Z, T: adjoint(jax.nn.relu(Z), T), here.Z, T)
        W = tangent(here.scale[:, None] * W, A)
    g = adjoint(rows.X, through_gates(here.Z > 0, T, A))
    size = norms(U)
    U = jnp.where((size > 0)[None, :], g + beta * U / or_one(size)[None, :], group_prox(g, beta))
    return Step(U, W, rows.root @ R if rows.output_bias else None)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["features", "neurons", "kernel", "root", "bias", "A"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Preconditioner:
    """The system if gates did not depend on features, and U, W and b not on each other.

    For the neurons that is a sum of two Kronecker products,

        XᵀX/n ⊗ M + I ⊗ N  =  (I ⊗ √N) (I + XᵀX/n ⊗ N^-½ M N^-½) (I ⊗ √N)

        M = (Dᵀ h D) ∘ (A Aᵀ) + n μ I,      N = μ I + diag(β/‖uᵢ‖)

    with h the mean curvature of each row; for the output kernel ``Hᵀ (h + μ) H + N``. The leading spectra of the
    factors stand for the factors.

    Args:
        features: the spectrum of ``XᵀX/n``.
        neurons: the spectrum of ``N^-½ M N^-½``.
        kernel: the spectrum of ``N^-½ Hᵀ (h + μ) H N^-½``; None with one output.
        root: the diagonal of ``N^-½``.
        bias: ``1ᵀ (h + μ) 1``.
        A: output directions, across which the kernel's steps lie.
    """

    features: Spectrum
    neurons: Spectrum
    kernel: Spectrum | None
    root: Float[Array, " m"]
    bias: Scalar
    A: Directions

    @classmethod
    def of(cls, prepared: Prepared, model: LocalModel, N: Float[Array, " m"], damping: Scalar) -> Self:
        """For the curvature that a model has."""
        D, A, rows, root = model.D.astype(N.dtype), model.A, model.rows, 1 / jnp.sqrt(N)
        h, n, test = rows.mean_curvature(model.outputs), model.stretch * rows.count, prepared.test
        M = model.stretch * (D.T @ (h[:, None] * D)) * (A @ A.T) + n * damping * jnp.eye(len(A), dtype=N.dtype)
        M = root[:, None] * M * root[None, :]
        of_neurons = M @ test, jnp.trace(M)
        if model.H is None:
            neurons, kernel = Spectrum.of(*of_neurons, test), None
        else:  # two products with H cost less than HᵀH; both spectra are made by one program
            H = rows.center(model.H) * root[None, :]
            weighted = (model.stretch * (h + damping))[:, None] * H
            of_kernel = adjoint(weighted, H @ test), jnp.sum(weighted * H)
            images, traces = map(jnp.stack, zip(of_neurons, of_kernel, strict=True))
            both = jax.vmap(Spectrum.of, (0, 0, None))(images, traces, test)
            neurons, kernel = (jax.tree.map(lambda part, i=i: part[i], both) for i in range(2))
        bias = model.stretch * (rows.weight @ (h + damping))
        return cls(prepared.features, neurons, kernel, root, bias, A)

    def divide(self, R: Step) -> Step:
        """The inverse applied to R."""
        U, V = R.U * self.root[None, :], self.features.vectors
        inside = V.T @ U
        shifts = jnp.append(jnp.full(len(U), self.features.tail), self.features.eigenvalues)
        parts = self.neurons.resolvent(shifts[:, None], jnp.concatenate([U - V @ inside, inside]))
        U = (parts[: len(U)] + V @ parts[len(U) :]) * self.root[None, :]
        W = R.W
        if self.kernel is not None and W is not None:
            root = self.root[:, None]
            W = tangent(root * self.kernel.resolvent(jnp.ones((), U.dtype), (root * W).T).T, self.A)
        return Step(U, W, None if R.b is None else R.b / self.bias)


def direction(
    sampled: LocalModel,
    whole: Callable[[], LocalModel] | None,
    prepared: Prepared,
    beta: Scalar,
    damping: Scalar,
    U: Neurons,
    g: Step,
    last: Step,
    precise: Array | bool,
    settings: Refreshed,
) -> tuple[Step, Int[Array, ""]]:
    """The Levenberg–Marquardt step δ for a gradient g, roughly; and the conjugate-gradient steps it took.

    With the curvature on some rows, or, if it is to be precise, on all of them, which is made only then (None: the same
    ones). Conjugate gradients begin along the last step, zero for none.
    """
    last = Step(last.U, None if last.W is None else tangent(last.W, sampled.A), last.b)
    N = damping + beta / floored(U, settings)
    preconditioner = Preconditioner.of(prepared, sampled, N, damping)
    max_steps = jnp.where(precise, settings.precise_cg_steps, settings.cg_steps)

    def solve(model: LocalModel) -> tuple[Step, Int[Array, ""]]:
        def operator(V: Step) -> Step:
            effect = model.effect(V)
            back = model.outputs_adjoint(model.rows.curvature(model.outputs, model.outputs_of(effect)))
            both = jax.tree.map(lambda curved, damped: model.stretch * (curved + damping * damped), back, effect)
            U, W, b = model.effect_adjoint(both)
            W = None if W is None or V.W is None else W + N[:, None] * V.W
            return Step(U + N[None, :] * V.U, W, b)

        return conjugate_gradient(
            operator,
            jax.tree.map(jnp.negative, g),
            preconditioner=preconditioner.divide,
            first=last,
            max_steps=max_steps,
            tol=settings.cg_tol,
        )

    if whole is None:
        return solve(sampled)
    if isinstance(precise, bool):
        return solve(whole() if precise else sampled)
    return jax.lax.cond(precise, lambda: solve(whole()), lambda: solve(sampled))


def floored(U: Neurons, settings: Refreshed) -> Float[Array, " m"]:
    """``‖uᵢ‖``, at least a fraction of the mean, to divide by."""
    size = norms(U)
    return or_one(jnp.maximum(size, settings.norm_floor * jnp.mean(size)))
