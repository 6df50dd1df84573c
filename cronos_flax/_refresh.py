"""The refreshed path (method.md section 5): gates renewed at every step, so the loss of the network can only fall.

With the gates of the current neurons, the U-step of ADMM is a Levenberg–Marquardt step on the network,

    (F*F + μ (I + XᵀX) + β/‖uᵢ‖) δ = −(F*(F U − Y) + β uᵢ/‖uᵢ‖)

solved roughly by conjugate gradients, preconditioned by all but ``F*F`` with a sketch of XᵀX, and followed by a line
search on the regularised loss of the network. The damping μ follows the line search, so nothing needs to be tuned.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from cronos_flax._basis import Rows
from cronos_flax._linsolve import conjugate_gradient
from cronos_flax._nystrom import Sketch, sketch
from cronos_flax._program import Program, network_objective, norms, unit_rows
from cronos_flax._solution import TwoLayer
from cronos_flax._types import Activations, Directions, Gates, Neurons, Scalar
from cronos_flax._weights import dead, random_neurons

_STEP_LENGTHS = (2.0, 1.0, 0.5, 0.25, 0.1, 0.03, 0.0)
_DAMPING_FACTORS = (0.25, 0.25, 1.0, 2.0, 2.0, 2.0, 4.0)  # what each of these lengths does to μ
_CG_STEPS = 10
_CG_TOL = 0.3
_NORM_FLOOR = 0.05  # ‖uᵢ‖ in the preconditioner is at least this fraction of the mean
_DAMPING_RANGE = (1e-8, 1e8)
_RANK = 64  # of the sketch
_WINDOW = 10  # iterations over which stagnation is judged


@partial(jax.tree_util.register_dataclass, data_fields=["sketch", "tail"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Spectrum:
    """``XᵀX`` by its leading eigenpairs and the mean of the eigenvalues that are left."""

    sketch: Sketch
    tail: Scalar

    def divide(self, damping: Scalar, ridge: Float[Array, " m"], R: Neurons) -> Neurons:
        """``(μ (I + XᵀX) + ridgeᵢ)⁻¹ rᵢ`` for every neuron, with this in place of XᵀX."""
        outside = 1 / (damping * (1 + self.tail) + ridge)
        inside = 1 / (damping * (1 + self.sketch.eigenvalues)[:, None] + ridge)
        return outside * R + self.sketch.vectors @ ((inside - outside) * (self.sketch.vectors.T @ R))


def spectrum(rows: Rows, key: Array) -> Spectrum:
    """The spectrum of the features, from two products with as many vectors as a network has neurons."""
    X = rows.X
    d = X.shape[1]
    rank = min(_RANK, d)
    leading = sketch(lambda V: X.T @ (X @ V), d, rank, key, X.dtype)
    rest = jnp.sum(jnp.square(X)) - jnp.sum(leading.eigenvalues)
    return Spectrum(leading, jnp.maximum(rest, 0) / max(d - rank, 1))


@partial(
    jax.tree_util.register_dataclass, data_fields=["U", "A", "objective", "damping", "key", "cg_steps"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class Iterate:
    """What one step hands to the next: network, objective, damping μ, key for revived neurons, CG steps so far."""

    U: Neurons
    A: Directions
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
    return Iterate(U, A, network_objective(rows, A, beta, U, rows.X @ U), damping, key, jnp.zeros((), jnp.int32))


def refit_directions(
    rows: Rows, U: Neurons, A: Directions, H: Activations, beta: Scalar
) -> tuple[Neurons, Directions, Float[Array, " m"]]:
    """The best output kernel for hidden activations ``H = relu(X U)``: a ridge problem.

    Returns the rebalanced neurons, the new directions, and the factor by which each neuron grew.
    """
    m = H.shape[1]
    root = jnp.sqrt(norms(U))
    live = root > 0
    H = rows.center(H / jnp.where(live, root, 1))
    gram = H.T @ H
    shift = beta + jnp.finfo(H.dtype).eps * jnp.trace(gram)
    factor = jax.scipy.linalg.cho_factor(gram + shift * jnp.eye(m, dtype=H.dtype))
    W2 = jax.scipy.linalg.cho_solve(factor, H.T @ rows.Y)
    growth = jnp.where(live, jnp.linalg.norm(W2, axis=1) / jnp.where(live, root, 1), 1)
    return U * growth, unit_rows(W2, A), growth


def gradient(program: Program, U: Neurons, Z: Activations) -> Neurons:
    """``F*(F U − Y) + β uᵢ/‖uᵢ‖``; at ``uᵢ = 0`` the subgradient of least norm."""
    g = program.rows.X.T @ program.Ft(program.residual(Z))
    size, slope = norms(U), norms(g)
    shrunk = g * (jnp.maximum(slope - program.beta, 0) / jnp.where(slope > 0, slope, 1))
    return jnp.where(size > 0, g + program.beta * U / jnp.where(size > 0, size, 1), shrunk)


def direction(
    program: Program, spectrum: Spectrum, damping: Scalar, U: Neurons, Z: Activations
) -> tuple[Neurons, Int[Array, ""]]:
    """The Levenberg–Marquardt step δ, roughly; and the conjugate-gradient steps it took."""
    X = program.rows.X
    size = norms(U)
    size = jnp.maximum(size, _NORM_FLOOR * jnp.mean(size))
    size = jnp.where(size > 0, size, 1)
    ridge = program.beta / size

    def operator(V: Neurons) -> Neurons:
        Z = X @ V
        return X.T @ (program.Ft(program.F(Z)) + damping * Z) + (damping + ridge) * V

    return conjugate_gradient(
        operator,
        -gradient(program, U, Z),
        preconditioner=lambda R: spectrum.divide(damping, ridge, R),
        tol=_CG_TOL,
        max_steps=_CG_STEPS,
    )


def revive(rows: Rows, U: Neurons, A: Directions, key: Array) -> tuple[Neurons, Activations, Gates]:
    """Give dead neurons a random gate: ``(U with them at zero, X U with the probe's values, gates)``."""
    is_dead = dead(U)
    Z = rows.X @ jnp.where(is_dead, random_neurons(key, U), U)
    return jnp.where(is_dead, 0, U), Z, Z > 0


def step(rows: Rows, spectrum: Spectrum, beta: Scalar, iterate: Iterate) -> Iterate:
    """One step; the objective of the result is never above that of ``iterate``."""
    key, probe_key = jax.random.split(iterate.key)
    U, Z, D = revive(rows, iterate.U, iterate.A, probe_key)
    A = iterate.A
    lives = norms(U) > 0
    probe = jnp.where(D, Z, 0)
    Z = jnp.where(lives, Z, 0)
    if A.shape[1] > 1:
        U, A, growth = refit_directions(rows, U, A, jnp.where(D, Z, 0), beta)
        Z = Z * growth
    # A revived neuron points where its probe lowers the loss.
    residual = rows.center(jnp.where(D, Z, 0) @ A - rows.Y)
    A = jnp.where(lives[:, None], A, unit_rows(-(probe.T @ residual), A))

    program = Program(rows, D, A, beta)
    delta, cg_steps = direction(program, spectrum, iterate.damping, U, Z)
    Z_delta = rows.X @ delta

    def objective(length: Scalar) -> Scalar:
        return network_objective(rows, A, beta, U + length * delta, Z + length * Z_delta)

    lengths = jnp.asarray(_STEP_LENGTHS, U.dtype)
    values = jax.lax.map(objective, lengths)
    values = jnp.where(jnp.isfinite(values), values, jnp.inf)
    best = jnp.argmin(values)
    length = lengths[best]
    damping = jnp.clip(iterate.damping * jnp.asarray(_DAMPING_FACTORS, U.dtype)[best], *_DAMPING_RANGE)
    # Reviving and refitting come before the line search; only their sum has to go down.
    better = values[best] < iterate.objective
    return Iterate(
        U=jnp.where(better, U + length * delta, iterate.U),
        A=jnp.where(better, A, iterate.A),
        objective=jnp.where(better, values[best], iterate.objective),
        damping=damping,
        key=key,
        cg_steps=iterate.cg_steps + cg_steps,
    )


def run(
    rows: Rows, spectrum: Spectrum, beta: Scalar, start: Iterate, *, tol: Scalar, max_iters: int
) -> tuple[Iterate, Array, Int[Array, ""], Float[Array, " k"]]:
    """Step until the loss stagnates or ``max_iters``: the iterate, whether it stagnated, steps done, the trace."""
    index = jnp.arange(max_iters + 1, dtype=jnp.int32)

    def stagnated(done: Int[Array, ""], trace: Float[Array, " k"]) -> Array:
        now, earlier = trace[done], trace[jnp.maximum(done - _WINDOW, 0)]
        return (done >= _WINDOW) & (earlier - now <= tol * now)

    def unfinished(carry: tuple) -> Array:
        done, iterate, trace = carry
        return (done < max_iters) & ~stagnated(done, trace) & jnp.isfinite(iterate.objective)

    def body(carry: tuple) -> tuple:
        done, iterate, trace = carry
        iterate = step(rows, spectrum, beta, iterate)
        return done + 1, iterate, jnp.where(index > done, iterate.objective, trace)

    trace = jnp.full(max_iters + 1, start.objective)
    done, iterate, trace = jax.lax.while_loop(unfinished, body, (jnp.zeros((), jnp.int32), start, trace))
    return iterate, stagnated(done, trace), done, trace
