"""The refreshed path (method.md section 5): gates renewed at every step, so the loss of the network can only fall.

With the gates D of the current neurons, outputs are linear in a step ``δ = (δU, δA, δb)`` of neurons, directions and
output bias, ``J δ = P ((D ∘ X δU) A + relu(X U) δA) + 1 δbᵀ``, and the step is Levenberg–Marquardt's,

    (J*H J + μ (I + J₁*J₁) + β/‖uᵢ‖) δ = −∇(loss of the network),      J₁ δ = (X δU, relu(X U) δA, 1 δbᵀ)

with H the curvature of the loss. Directions move within their tangent, ``δaᵢ ⟂ aᵢ``: their lengths are those of the
neurons. With one output they stay, and with the squared loss so does the bias; then δ is the U-step of ADMM.

The system is solved roughly, by conjugate gradients on a sample of the rows, preconditioned by a Kronecker
approximation; a line search on the regularised loss of the network follows. The damping μ follows the line search, so
nothing needs to be tuned. All rows are needed twice a step: for the gradient, and for where the step leads.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from cronos_flax._solver.blocks import fold
from cronos_flax._solver.coordinates import Rows
from cronos_flax._solver.linear_solvers import conjugate_gradient
from cronos_flax._solver.nystrom import sketch, test_matrix
from cronos_flax._solver.program import network_objective, network_outputs, norms, unit_rows
from cronos_flax._solver.solution import TwoLayer
from cronos_flax._solver.types import Activations, Bias, Directions, Gates, Neurons, Outputs, Scalar
from cronos_flax._solver.weights import dead, random_neurons

_STEP_LENGTHS = (2.0, 1.0, 0.5, 0.25, 0.1, 0.03, 0.0)
_DAMPING_FACTORS = (0.25, 0.25, 1.0, 2.0, 2.0, 2.0, 4.0)  # what each of these lengths does to μ
_DAMPING_RANGE = (1e-8, 1e8)
_NORM_FLOOR = 0.05  # ‖uᵢ‖ in the system is at least this fraction of the mean
_CG_STEPS, _PRECISE_CG_STEPS = 2, 10  # of conjugate gradients, on a sample and on all rows
_CG_TOL = 0.1
_FEATURE_RANK, _NEURON_RANK = 48, 32  # of the sketches that the preconditioner is made of
_ROWS_PER_FEATURE = 4  # that the first is made from, at least
_SAMPLED, _LEAST_SAMPLE, _MOST_SAMPLE = 10, 128, 65_536  # a sample is one row in so many, within these limits
_WARM_UP, _LEAST_WARM_UP, _WARM_UP_STEPS = 8, 512, 8  # likewise, for the first steps from a random start
_WINDOW = 10  # iterations over which stagnation is judged
_SAMPLED_TOL = 0.01  # decrease over the window at which samples have done what they can


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["U", "A", "b", "Z", "objective", "damping", "key", "cg_steps"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Iterate:
    """What one step hands to the next: network, ``Z = X U``, objective, damping μ, key, CG steps so far."""

    U: Neurons
    A: Directions
    b: Bias
    Z: Activations
    objective: Scalar
    damping: Scalar
    key: Array
    cg_steps: Int[Array, ""]


@partial(jax.tree_util.register_dataclass, data_fields=["params", "damping", "key"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class State:
    """Where a solve stands between calls, in the user's units; good for any rows of as many features and outputs."""

    params: TwoLayer
    damping: Scalar
    key: Array


def init(rows: Rows, U: Neurons, A: Directions, b: Bias, beta: Scalar, damping: Scalar, key: Array) -> Iterate:
    """The iterate for a start from the network (U, A, b)."""
    Z = rows.X @ U
    objective = network_objective(rows, A, b, beta, U, Z)
    return Iterate(U, A, b, Z, objective, damping, key, jnp.zeros((), jnp.int32))


def sample_size(n: int, least: int = _LEAST_SAMPLE) -> int:
    """How many of n rows a sample has."""
    return min(n, max(n // _SAMPLED, least), _MOST_SAMPLE)


def sample(rows: Rows, key: Array, size: int) -> tuple[Rows, Int[Array, " k"] | slice]:
    """Some rows, one at random out of each stretch of equal length; and which."""
    n = rows.Y.shape[0]
    if size == n:
        return rows, slice(None)
    stretch = n // size
    first_key, place_key = jax.random.split(key)
    first = jax.random.randint(first_key, (), 0, n, jnp.int32)
    place = jax.random.randint(place_key, (size,), 0, stretch, jnp.int32)
    index = (first + stretch * jnp.arange(size, dtype=jnp.int32) + place) % n
    return rows.take(index), index


@partial(jax.tree_util.register_dataclass, data_fields=["vectors", "eigenvalues", "tail"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Spectrum:
    """A positive semidefinite matrix by its leading eigenpairs and the mean of the eigenvalues that are left."""

    vectors: Float[Array, "N r"]
    eigenvalues: Float[Array, " r"]
    tail: Scalar

    @classmethod
    def of(cls, operator: Callable[[Array], Array], trace: Scalar, test: Float[Array, "N r"]) -> Self:
        """From products of the matrix with a test matrix."""
        size, rank = test.shape
        leading = sketch(operator, test)
        rest = jnp.maximum(trace - jnp.sum(leading.eigenvalues), 0)
        return cls(leading.vectors, leading.eigenvalues, rest / max(size - rank, 1))

    def resolvent(self, shift: Array, R: Float[Array, "k N"]) -> Float[Array, "k N"]:
        """``(1 + shiftⱼ · matrix)⁻¹ rⱼ`` for each row ``rⱼ`` of R."""
        outside, inside = 1 / (1 + shift * self.tail), 1 / (1 + shift * self.eigenvalues)
        return outside * R + ((inside - outside) * (R @ self.vectors)) @ self.vectors.T


@partial(jax.tree_util.register_dataclass, data_fields=["features", "test"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Prepared:
    """What all steps share: the spectrum of ``XᵀX/n``, and a test matrix for the neurons' side."""

    features: Spectrum
    test: Float[Array, "m r"]


def prepare(rows: Rows, m: int, key: Array) -> Prepared:
    """For networks of m neurons; the spectrum is that of a sample of the rows."""
    sample_key, feature_key, neuron_key = jax.random.split(key, 3)
    n, d = rows.X.shape
    X = sample(rows, sample_key, sample_size(n, _ROWS_PER_FEATURE * d))[0].X
    k = X.shape[0]
    trace = fold(X, lambda total, X: total + jnp.sum(jnp.square(X)), jnp.zeros((), X.dtype)) / k
    test = test_matrix(d, _FEATURE_RANK, feature_key, X.dtype)
    features = Spectrum.of(lambda V: X.T @ (X @ V) / k, trace, test)
    return Prepared(features, test_matrix(m, _NEURON_RANK, neuron_key, X.dtype))


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


@partial(jax.tree_util.register_dataclass, data_fields=["rows", "D", "H", "A", "outputs", "stretch"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Model:
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
    stretch: float

    def take(self, rows: Rows, index: Int[Array, " k"] | slice) -> Self:
        """The same on fewer rows."""
        H = None if self.H is None else self.H[index]
        D, outputs = self.D[index], self.outputs[index]
        return dataclasses.replace(
            self, rows=rows, D=D, H=H, outputs=outputs, stretch=self.stretch * len(self.D) / len(D)
        )

    def forward(self, Z: Activations, delta: Step) -> Outputs:
        """``J δ``, given ``Z = X δU``."""
        T = jnp.where(self.D, Z, 0) @ self.A
        if self.H is not None and delta.W is not None:
            T = T + self.H @ delta.W
        return self.rows.center(T) + self.rows.constant(delta.b)

    def backward(self, R: Outputs) -> tuple[Activations, Directions | None, Bias]:
        """The adjoint of :meth:`forward`; its first part is that of Z."""
        T = self.rows.center(R)
        # One output needs no product of matrices, which would cost more than the memory it writes.
        Z = jnp.where(self.D, T * self.A.T if T.shape[1] == 1 else T @ self.A.T, 0)
        W = None if self.H is None else self.tangent(self.H.T @ T)
        return Z, W, self.rows.root @ R if self.rows.output_bias else None

    def tangent(self, W: Directions) -> Directions:
        """W without what only lengthens a direction."""
        return W - jnp.sum(W * self.A, axis=1, keepdims=True) * self.A


def gradient(model: Model, beta: Scalar, U: Neurons) -> Step:
    """Of the regularised loss; at ``uᵢ = 0`` the subgradient of least norm."""
    Z, W, b = model.backward(model.rows.gradient(model.outputs))
    g = model.rows.X.T @ Z
    size, slope = norms(U), norms(g)
    shrunk = g * (jnp.maximum(slope - beta, 0) / jnp.where(slope > 0, slope, 1))
    return Step(jnp.where(size > 0, g + beta * U / jnp.where(size > 0, size, 1), shrunk), W, b)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["features", "neurons", "kernel", "root", "bias", "model"],
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
        model: whose tangents the kernel's steps lie in.
    """

    features: Spectrum
    neurons: Spectrum
    kernel: Spectrum | None
    root: Float[Array, " m"]
    bias: Scalar
    model: Model

    @classmethod
    def of(cls, prepared: Prepared, model: Model, N: Float[Array, " m"], damping: Scalar) -> Self:
        """For the curvature that a model has."""
        D, A, rows, root = model.D.astype(N.dtype), model.A, model.rows, 1 / jnp.sqrt(N)
        h, n = rows.mean_curvature(model.outputs), model.stretch * len(D)

        def spectrum(K: Float[Array, "m m"]) -> Spectrum:
            K = root[:, None] * K * root
            return Spectrum.of(lambda V: K @ V, jnp.trace(K), prepared.test)

        M = model.stretch * (D.T @ (h[:, None] * D)) * (A @ A.T) + n * damping * jnp.eye(len(A), dtype=N.dtype)
        kernel = None
        if model.H is not None:
            H = rows.center(model.H)
            kernel = spectrum(model.stretch * (H.T @ ((h + damping)[:, None] * H)))
        bias = model.stretch * (rows.weight @ (h + damping))
        return cls(prepared.features, spectrum(M), kernel, root, bias, model)

    def divide(self, R: Step) -> Step:
        """The inverse applied to R."""
        U = R.U * self.root
        tail, leading, V = self.features.tail, self.features.eigenvalues[:, None], self.features.vectors
        inside = V.T @ U
        inside = self.neurons.resolvent(leading, inside) - self.neurons.resolvent(tail, inside)
        U = (self.neurons.resolvent(tail, U) + V @ inside) * self.root
        W = R.W
        if self.kernel is not None and W is not None:
            root = self.root[:, None]
            W = self.model.tangent(root * self.kernel.resolvent(jnp.ones((), U.dtype), (root * W).T).T)
        return Step(U, W, None if R.b is None else R.b / self.bias)


def direction(
    model: Model,
    sampled: Model,
    prepared: Prepared,
    beta: Scalar,
    damping: Scalar,
    U: Neurons,
    g: Step,
    precise: Array | bool,
) -> tuple[Step, Int[Array, ""]]:
    """The Levenberg–Marquardt step δ for a gradient g, roughly; and the conjugate-gradient steps it took.

    With the curvature on all rows, or, if it need not be precise, on some of them.
    """
    N = damping + beta / floored(U)
    preconditioner = Preconditioner.of(prepared, sampled, N, damping)

    def solve(model: Model, max_steps: int) -> tuple[Step, Int[Array, ""]]:
        rows, stretch = model.rows, model.stretch

        def operator(V: Step) -> Step:
            Z = rows.X @ V.U
            Z_back, W, b = model.backward(rows.curvature(model.outputs, model.forward(Z, V)))
            if model.H is not None and V.W is not None and W is not None:
                W = stretch * (W + damping * model.tangent(model.H.T @ (model.H @ V.W))) + N[:, None] * V.W
            if V.b is not None and b is not None:
                b = stretch * (b + damping * jnp.sum(rows.weight) * V.b)
            return Step(stretch * (rows.X.T @ (Z_back + damping * Z)) + N * V.U, W, b)

        return conjugate_gradient(
            operator,
            jax.tree.map(jnp.negative, g),
            preconditioner=preconditioner.divide,
            max_steps=max_steps,
            tol=_CG_TOL,
        )

    if model is sampled:
        return solve(model, _PRECISE_CG_STEPS)
    if precise is False:
        return solve(sampled, _CG_STEPS)
    return jax.lax.cond(precise, lambda: solve(model, _PRECISE_CG_STEPS), lambda: solve(sampled, _CG_STEPS))


def floored(U: Neurons) -> Float[Array, " m"]:
    """``‖uᵢ‖``, at least a fraction of the mean, to divide by."""
    size = norms(U)
    size = jnp.maximum(size, _NORM_FLOOR * jnp.mean(size))
    return jnp.where(size > 0, size, 1)


def revive(rows: Rows, iterate: Iterate, key: Array) -> Iterate:
    """The iterate with dead neurons at zero, on random gates: Z there is that of a probe."""
    is_dead = dead(iterate.U)
    Z = jax.lax.cond(
        jnp.any(is_dead),
        lambda: jnp.where(is_dead, rows.X @ random_neurons(key, iterate.U), iterate.Z),
        lambda: iterate.Z,
    )
    return dataclasses.replace(iterate, U=jnp.where(is_dead, 0, iterate.U), Z=Z)


def search(objective: Callable[[Scalar], Scalar], estimate: Callable[[Scalar], Scalar], now: Scalar) -> tuple:
    """The step length of least estimated objective, or the next shorter one that lowers the objective.

    Returns its index in the list of lengths, whose last is 0, and the objective there.
    """
    lengths = jnp.asarray(_STEP_LENGTHS, now.dtype)
    values = jax.lax.map(estimate, lengths)
    first = jnp.argmin(jnp.where(jnp.isfinite(values), values, jnp.inf))

    def rises(carry: tuple) -> Array:
        index, value = carry
        return ~(value < now) & (index < len(lengths) - 1)

    def shorten(carry: tuple) -> tuple:
        index, _ = carry
        return index + 1, objective(lengths[index + 1])

    return jax.lax.while_loop(rises, shorten, (first, objective(lengths[first])))


def step(rows: Rows, prepared: Prepared, beta: Scalar, iterate: Iterate, precise: Array | bool) -> Iterate:
    """One step; the objective of the result is never above that of ``iterate``."""
    key, probe_key, sample_key = jax.random.split(iterate.key, 3)
    revived = revive(rows, iterate, probe_key)
    U, A, b = revived.U, revived.A, revived.b
    D, lives = revived.Z > 0, norms(U) > 0
    Z = jnp.where(lives, revived.Z, 0)
    outputs = network_outputs(rows, A, b, Z)
    # A revived neuron points where its probe lowers the loss.
    A = jax.lax.cond(
        jnp.all(lives),
        lambda: A,
        lambda: jnp.where(
            lives[:, None], A, unit_rows(-jax.nn.relu(revived.Z).T @ rows.center(rows.gradient(outputs)), A)
        ),
    )

    n, size = rows.Y.shape[0], floored(U)
    H = jnp.where(D, Z, 0) / size if A.shape[1] > 1 else None
    model = Model(rows, D, H, A, outputs, 1.0)
    some, index = sample(rows, sample_key, sample_size(n))
    sampled = model if some is rows else model.take(some, index)
    g = gradient(model, beta, U)
    delta, cg_steps = direction(model, sampled, prepared, beta, iterate.damping, U, g, precise)
    A_delta = jnp.zeros_like(A) if delta.W is None else delta.W / size[:, None]
    Z_delta = rows.X @ delta.U

    def moved(length: Scalar) -> tuple[Neurons, Directions, Bias]:
        return (
            U + length * delta.U,
            A + length * A_delta,
            None if b is None or delta.b is None else b + length * delta.b,
        )

    def objective(length: Scalar) -> Scalar:
        U, A, b = moved(length)
        return network_objective(rows, A, b, beta, U, Z + length * Z_delta)

    def estimate(length: Scalar) -> Scalar:
        U, A, b = moved(length)
        return network_objective(some, A, b, beta / sampled.stretch, U, Z[index] + length * Z_delta[index])

    chosen, value = search(objective, estimate, iterate.objective)
    length = jnp.asarray(_STEP_LENGTHS, U.dtype)[chosen]
    U, A, b = moved(length)
    growth = jnp.linalg.norm(A, axis=1)
    after = Iterate(
        U=U * growth,
        A=A / growth[:, None],
        b=b,
        Z=(Z + length * Z_delta) * growth,
        objective=value,
        damping=jnp.clip(iterate.damping * jnp.asarray(_DAMPING_FACTORS, U.dtype)[chosen], *_DAMPING_RANGE),
        key=key,
        cg_steps=iterate.cg_steps + cg_steps,
    )
    # Reviving comes before the line search; only their sum has to go down.
    stayed = dataclasses.replace(iterate, damping=after.damping, key=key, cg_steps=after.cg_steps)
    return jax.tree.map(lambda new, old: jnp.where(value < iterate.objective, new, old), after, stayed)


def warm_up(rows: Rows, prepared: Prepared, beta: Scalar, start: Iterate) -> Iterate:
    """A few steps on few rows: from a random start these lead about as far as steps on all of them."""
    n = rows.Y.shape[0]
    size = min(n // _WARM_UP, _MOST_SAMPLE)
    if size < _LEAST_WARM_UP:
        return start
    key, sample_key = jax.random.split(start.key)
    few, _ = sample(rows, sample_key, size)
    share = beta * size / n
    first = init(few, start.U, start.A, start.b, share, start.damping, key)
    last = jax.lax.fori_loop(0, _WARM_UP_STEPS, lambda _, iterate: step(few, prepared, share, iterate, False), first)
    warm = init(rows, last.U, last.A, last.b, beta, last.damping, last.key)
    return jax.tree.map(lambda new, old: jnp.where(warm.objective < start.objective, new, old), warm, start)


class Run(NamedTuple):
    """A run between two steps: steps done, whether they have become precise, and since which, and the trace."""

    done: Int[Array, ""]
    precise: Array
    since: Int[Array, ""]
    iterate: Iterate
    trace: Float[Array, " k"]


def run(
    rows: Rows,
    prepared: Prepared,
    beta: Scalar,
    start: Iterate,
    *,
    tol: Scalar,
    max_iters: int,
    tell: Callable[[Int[Array, ""], Iterate], None],
) -> tuple[Iterate, Array, Int[Array, ""], Float[Array, " k"]]:
    """Step until the loss stagnates or ``max_iters``: the iterate, whether it stagnated, steps done, the trace.

    Steps take their curvature from a sample of the rows until that leads no further, and then from all of them.
    ``tell`` is called with the steps done and every iterate.
    """
    index = jnp.arange(max_iters + 1, dtype=jnp.int32)

    def stagnates(now: Run, tol: Scalar | float) -> Array:
        loss, earlier = now.trace[now.done], now.trace[jnp.maximum(now.done - _WINDOW, 0)]
        return (now.done >= now.since + _WINDOW) & (earlier - loss <= tol * loss)

    def unfinished(now: Run) -> Array:
        ended = now.precise & stagnates(now, tol)
        return (now.done < max_iters) & ~ended & jnp.isfinite(now.iterate.objective)

    def body(now: Run) -> Run:
        precise = now.precise | stagnates(now, _SAMPLED_TOL)
        iterate = step(rows, prepared, beta, now.iterate, precise)
        tell(now.done + 1, iterate)
        return Run(
            done=now.done + 1,
            precise=precise,
            since=jnp.where(precise & ~now.precise, now.done, now.since),
            iterate=iterate,
            trace=jnp.where(index > now.done, iterate.objective, now.trace),
        )

    zero, n = jnp.zeros((), jnp.int32), rows.Y.shape[0]
    first = Run(zero, jnp.asarray(sample_size(n) == n), zero, start, jnp.full(max_iters + 1, start.objective))
    last = jax.lax.while_loop(unfinished, body, first)
    return last.iterate, last.precise & stagnates(last, tol), last.done, last.trace
