"""The refreshed path (method.md section 5): gates renewed at every step, so the loss of the network can only fall.

With the gates of the current neurons, the U-step of ADMM is a Levenberg–Marquardt step on the network,

    (F*F + μ (I + XᵀX) + β/‖uᵢ‖) δ = −(F*(F U − Y) + β uᵢ/‖uᵢ‖)

solved roughly by conjugate gradients on a sample of the rows, preconditioned by a Kronecker approximation of the same
system, and followed by a line search on the regularised loss of the network. The damping μ follows the line search, so
nothing needs to be tuned. All rows are needed twice a step: for the gradient, and for where the step leads.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from cronos_flax._basis import Rows
from cronos_flax._blocks import fold
from cronos_flax._linsolve import conjugate_gradient
from cronos_flax._nystrom import sketch, test_matrix
from cronos_flax._program import Program, network_objective, norms, unit_rows
from cronos_flax._solution import TwoLayer
from cronos_flax._types import Activations, Directions, Neurons, Scalar
from cronos_flax._weights import dead, random_neurons

_STEP_LENGTHS = (2.0, 1.0, 0.5, 0.25, 0.1, 0.03, 0.0)
_DAMPING_FACTORS = (0.25, 0.25, 1.0, 2.0, 2.0, 2.0, 4.0)  # what each of these lengths does to μ
_DAMPING_RANGE = (1e-8, 1e8)
_NORM_FLOOR = 0.05  # ‖uᵢ‖ in the system is at least this fraction of the mean
_CG_STEPS = 2
_CG_TOL = 0.1
_REFIT_STEPS, _REFIT_TOL = 50, 1e-3  # of conjugate gradients for the output kernel
_FEATURE_RANK, _NEURON_RANK = 48, 32  # of the sketches that the preconditioner is made of
_ROWS_PER_FEATURE = 4  # that the first is made from, at least
_SAMPLED, _LEAST_SAMPLE, _MOST_SAMPLE = 10, 128, 65_536  # a sample is one row in so many, within these limits
_WARM_UP, _LEAST_WARM_UP, _WARM_UP_STEPS = 8, 128, 3  # likewise, for the first steps from a random start
_WINDOW = 10  # iterations over which stagnation is judged
_SAMPLED_TOL = 0.01  # decrease over the window at which samples have done what they can


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["U", "A", "Z", "objective", "damping", "key", "cg_steps"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Iterate:
    """What one step hands to the next: network, ``Z = X U``, objective, damping μ, key, CG steps so far."""

    U: Neurons
    A: Directions
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


def init(rows: Rows, U: Neurons, A: Directions, beta: Scalar, damping: Scalar, key: Array) -> Iterate:
    """The iterate for a start from the network (U, A)."""
    Z = rows.X @ U
    return Iterate(U, A, Z, network_objective(rows, A, beta, U, Z), damping, key, jnp.zeros((), jnp.int32))


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


@partial(jax.tree_util.register_dataclass, data_fields=["features", "neurons", "root"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Preconditioner:
    """The system if gates did not depend on features: a sum of two Kronecker products.

        XᵀX/n ⊗ M + I ⊗ N  =  (I ⊗ √N) (I + XᵀX/n ⊗ N^-½ M N^-½) (I ⊗ √N)

        M = (DᵀD) ∘ (A Aᵀ) + n μ I,      N = μ I + diag(β/‖uᵢ‖)

    with the leading spectrum of both factors in place of the factors.

    Args:
        features: the spectrum of ``XᵀX/n``.
        neurons: the spectrum of ``N^-½ M N^-½``.
        root: the diagonal of ``N^-½``.
    """

    features: Spectrum
    neurons: Spectrum
    root: Float[Array, " m"]

    @classmethod
    def of(cls, prepared: Prepared, M: Float[Array, "m m"], N: Float[Array, " m"]) -> Self:
        """From M and the diagonal of N."""
        root = 1 / jnp.sqrt(N)
        K = root[:, None] * M * root
        return cls(prepared.features, Spectrum.of(lambda V: K @ V, jnp.trace(K), prepared.test), root)

    def divide(self, R: Neurons) -> Neurons:
        """The inverse applied to R."""
        R = R * self.root
        tail, leading, V = self.features.tail, self.features.eigenvalues[:, None], self.features.vectors
        inside = V.T @ R
        inside = self.neurons.resolvent(leading, inside) - self.neurons.resolvent(tail, inside)
        return (self.neurons.resolvent(tail, R) + V @ inside) * self.root


def refit_directions(
    rows: Rows, U: Neurons, A: Directions, H: Activations, beta: Scalar
) -> tuple[Neurons, Directions, Float[Array, " m"]]:
    """The best output kernel for hidden activations ``H = relu(X U)``: a ridge problem, from the present kernel on.

    Returns the rebalanced neurons, the new directions, and the factor by which each neuron grew.
    """
    size = norms(U)
    root = jnp.where(size > 0, jnp.sqrt(size), 1)
    H = rows.center(H / root)
    gram, present = H.T @ H, (jnp.where(size > 0, root, 0) * A.T).T
    ridge = beta + jnp.finfo(H.dtype).eps * jnp.trace(gram)
    W2, _ = conjugate_gradient(
        lambda W: gram @ W + ridge * W,
        H.T @ rows.Y,
        preconditioner=lambda R: R / jnp.maximum(jnp.diag(gram) + ridge, jnp.finfo(R.dtype).tiny)[:, None],
        guess=present,
        tol=_REFIT_TOL,
        max_steps=_REFIT_STEPS,
    )
    growth = jnp.where(size > 0, jnp.linalg.norm(W2, axis=1) / root, 1)
    return U * growth, unit_rows(W2, A), growth


def gradient(program: Program, U: Neurons, Z: Activations) -> Neurons:
    """``F*(F U − Y) + β uᵢ/‖uᵢ‖``; at ``uᵢ = 0`` the subgradient of least norm."""
    g = program.rows.X.T @ program.Ft(program.residual(Z))
    size, slope = norms(U), norms(g)
    shrunk = g * (jnp.maximum(slope - program.beta, 0) / jnp.where(slope > 0, slope, 1))
    return jnp.where(size > 0, g + program.beta * U / jnp.where(size > 0, size, 1), shrunk)


def direction(
    program: Program,
    sampled: Program,
    prepared: Prepared,
    damping: Scalar,
    U: Neurons,
    g: Neurons,
    precise: Array | bool,
) -> tuple[Neurons, Int[Array, ""]]:
    """The Levenberg–Marquardt step δ for a gradient g, roughly; and the conjugate-gradient steps it took.

    With the curvature of the program, or, if it need not be precise, of the same program on some of the rows.
    """
    D, A, n = sampled.D.astype(g.dtype), sampled.A, len(program.D)
    size = norms(U)
    size = jnp.maximum(size, _NORM_FLOOR * jnp.mean(size))
    N = damping + program.beta / jnp.where(size > 0, size, 1)
    M = n / len(D) * (D.T @ D) * (A @ A.T) + n * damping * jnp.eye(len(A), dtype=g.dtype)
    preconditioner = Preconditioner.of(prepared, M, N)

    def solve(program: Program) -> tuple[Neurons, Int[Array, ""]]:
        X, stretch = program.rows.X, n / len(program.D)

        def operator(V: Neurons) -> Neurons:
            Z = X @ V
            return stretch * (X.T @ (program.Ft(program.F(Z)) + damping * Z)) + N * V

        return conjugate_gradient(operator, -g, preconditioner=preconditioner.divide, max_steps=_CG_STEPS, tol=_CG_TOL)

    if len(D) == n:
        return solve(program)
    return jax.lax.cond(precise, lambda: solve(program), lambda: solve(sampled))


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
    U, A, Z = revived.U, revived.A, revived.Z
    D = Z > 0
    lives = norms(U) > 0
    probe = jnp.where(D, Z, 0)
    Z = jnp.where(lives, Z, 0)
    if A.shape[1] > 1:
        U, A, growth = refit_directions(rows, U, A, jnp.where(D, Z, 0), beta)
        Z = Z * growth
    # A revived neuron points where its probe lowers the loss.
    A = jax.lax.cond(
        jnp.all(lives),
        lambda: A,
        lambda: jnp.where(lives[:, None], A, unit_rows(-probe.T @ rows.center(jnp.where(D, Z, 0) @ A - rows.Y), A)),
    )

    n = rows.Y.shape[0]
    some, index = sample(rows, sample_key, sample_size(n))
    program, sampled = Program(rows, D, A, beta), Program(some, D[index], A, beta * some.Y.shape[0] / n)
    g = gradient(program, U, Z)
    delta, cg_steps = direction(program, sampled, prepared, iterate.damping, U, g, precise)
    Z_delta = rows.X @ delta

    def objective(length: Scalar) -> Scalar:
        return network_objective(rows, A, beta, U + length * delta, Z + length * Z_delta)

    def estimate(length: Scalar) -> Scalar:
        return network_objective(some, A, sampled.beta, U + length * delta, Z[index] + length * Z_delta[index])

    chosen, value = search(objective, estimate, iterate.objective)
    length = jnp.asarray(_STEP_LENGTHS, U.dtype)[chosen]
    # Reviving and refitting come before the line search; only their sum has to go down.
    better = value < iterate.objective
    return Iterate(
        U=jnp.where(better, U + length * delta, iterate.U),
        A=jnp.where(better, A, iterate.A),
        Z=jnp.where(better, Z + length * Z_delta, iterate.Z),
        objective=jnp.where(better, value, iterate.objective),
        damping=jnp.clip(iterate.damping * jnp.asarray(_DAMPING_FACTORS, U.dtype)[chosen], *_DAMPING_RANGE),
        key=key,
        cg_steps=iterate.cg_steps + cg_steps,
    )


def warm_up(rows: Rows, prepared: Prepared, beta: Scalar, start: Iterate) -> Iterate:
    """A few steps on few rows: from a random start these lead as far as steps on all of them."""
    n = rows.Y.shape[0]
    size = min(n // _WARM_UP, _MOST_SAMPLE)
    if size < _LEAST_WARM_UP:
        return start
    key, sample_key = jax.random.split(start.key)
    few, _ = sample(rows, sample_key, size)
    share = beta * size / n
    first = init(few, start.U, start.A, share, start.damping, key)
    last = jax.lax.fori_loop(0, _WARM_UP_STEPS, lambda _, iterate: step(few, prepared, share, iterate, False), first)
    warm = init(rows, last.U, last.A, beta, last.damping, last.key)
    return jax.tree.map(lambda new, old: jnp.where(warm.objective < start.objective, new, old), warm, start)


class Progress(NamedTuple):
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

    def stagnates(progress: Progress, tol: Scalar | float) -> Array:
        now, earlier = progress.trace[progress.done], progress.trace[jnp.maximum(progress.done - _WINDOW, 0)]
        return (progress.done >= progress.since + _WINDOW) & (earlier - now <= tol * now)

    def unfinished(progress: Progress) -> Array:
        ended = progress.precise & stagnates(progress, tol)
        return (progress.done < max_iters) & ~ended & jnp.isfinite(progress.iterate.objective)

    def body(progress: Progress) -> Progress:
        precise = progress.precise | stagnates(progress, _SAMPLED_TOL)
        iterate = step(rows, prepared, beta, progress.iterate, precise)
        tell(progress.done + 1, iterate)
        return Progress(
            done=progress.done + 1,
            precise=precise,
            since=jnp.where(precise & ~progress.precise, progress.done, progress.since),
            iterate=iterate,
            trace=jnp.where(index > progress.done, iterate.objective, progress.trace),
        )

    zero, n = jnp.zeros((), jnp.int32), rows.Y.shape[0]
    first = Progress(zero, jnp.asarray(sample_size(n) == n), zero, start, jnp.full(max_iters + 1, start.objective))
    last = jax.lax.while_loop(unfinished, body, first)
    return last.iterate, last.precise & stagnates(last, tol), last.done, last.trace
