"""The path of held gates: ADMM to a certificate, and the way from its iterate back to a network.

The loop checks its certificate every few iterations (method.md, "Held gates"), adapts ρ, and extrapolates by Anderson
acceleration. The program's iterate may break its cones, and its network then be worse than the start's; so the network
goes towards it only as far as its own loss falls.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from cronos_flax._solver import host
from cronos_flax._solver.admm import Iterate, Iteration, init, step
from cronos_flax._solver.blocks import adjoint
from cronos_flax._solver.coordinates import Basis
from cronos_flax._solver.numerics import Memory, best_of
from cronos_flax._solver.problem import Ended, Problem
from cronos_flax._solver.program import (
    Program,
    dead,
    default_directions,
    lower_bound,
    network_objective,
    random_neurons,
)
from cronos_flax._solver.settings import Held
from cronos_flax._solver.solution import HeldState, Network, Status
from cronos_flax._solver.types import Activations, Bias, Directions, Gates, Neurons, Scalar

_SAME = 1e-5  # relative difference of the marks of the same rows, at most


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["V", "b", "program_objective", "lower_bound", "cone_violation", "primal_residual", "dual_residual"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Check:
    """The figures of one check; :class:`cronos_flax.Stats` says what they mean."""

    V: Neurons
    b: Bias
    program_objective: Scalar
    lower_bound: Scalar
    cone_violation: Scalar
    primal_residual: Scalar
    dual_residual: Scalar

    def converged(self, tol: Scalar) -> Array:
        """Whether gap and cone violation are both within tol."""
        gap = jnp.abs(self.program_objective - self.lower_bound)
        return (gap <= tol * jnp.abs(self.program_objective)) & (self.cone_violation <= tol)


def check(program: Program, before: Iterate, step: Iteration, is_start: Array) -> Check:
    """The certificate and the residuals of a step from ``before``; of the start, where no step was taken."""
    X, U, GXU = program.rows.X, step.U, step.GXU
    V_old, _, S_old, _ = before.split(program.beta)
    V, Lambda, S, N = step.image.split(program.beta)
    Z_old, _ = before.split_outputs(program)
    Z, M = step.image.split_outputs(program)
    b = program.rows.bias(Z - M)
    XV = X @ V
    GV = program.G(XV)
    dual = Lambda + adjoint(X, program.G(N)) if program.has_cones else Lambda
    squared = step.outputs is None
    alpha = program.rows.gradient(program.outputs(XV, b)) if squared else step.image.tau * M
    Z, Z_old = (jnp.zeros_like(Z),) * 2 if squared else (Z, Z_old)
    gap = Z if step.outputs is None else jnp.where(is_start, 0, step.outputs - Z)
    tiny = jnp.finfo(U.dtype).tiny

    def size(*parts: Array) -> Scalar:
        return jnp.sqrt(sum((jnp.sum(jnp.square(part)) for part in parts), start=jnp.zeros((), U.dtype)))

    return Check(
        V=V,
        b=b,
        program_objective=program.objective(V, b, XV),
        lower_bound=lower_bound(program, alpha, -step.image.rho * N),
        cone_violation=jnp.linalg.norm(jnp.minimum(GV, 0)) / jnp.maximum(jnp.linalg.norm(GV), tiny),
        primal_residual=size(U - V, GXU - S, gap) / jnp.maximum(jnp.maximum(size(U, GXU), size(V, S, Z)), tiny),
        dual_residual=size(V - V_old + adjoint(X, program.G(S - S_old) + program.Ft(Z - Z_old) / step.image.kappa))
        / jnp.maximum(size(dual), tiny),
    )


def better_rho(check: Check, image: Iterate, settings: Held) -> tuple[Scalar, Array]:
    """The penalty that the residuals ask for, and whether it is time for a change and the change worth it."""
    least, most, k = settings.least_adaptation, settings.most_adaptation, image.iteration
    checks = k // settings.check_every
    due = (k % settings.check_every == 0) & (checks & (checks - 1) == 0) & (k <= settings.last_adaptation)
    dual = jnp.maximum(check.dual_residual, jnp.finfo(image.rho.dtype).eps)
    factor = jnp.clip(jnp.sqrt(check.primal_residual / (settings.residual_ratio * dual)), 1 / most, most)
    return image.rho * factor, due & ((factor > least) | (factor < 1 / least))


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["done", "iterate", "memory", "prepared", "stale", "check", "objectives", "bounds"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class HeldLoop:
    """The carry of the loop.

    Args:
        done: iterations done; −1 before the start was checked.
        iterate: the iterate.
        memory: of the acceleration; None without.
        prepared: what the linear solver has prepared.
        stale: whether that is to be renewed before the next step.
        check: the last check.
        objectives: of the program at the start and after every iteration, as of the last check.
        bounds: the lower bounds, likewise.
    """

    done: Int[Array, ""]
    iterate: Iterate
    memory: Memory | None
    prepared: Any
    stale: Bool[Array, ""]
    check: Check
    objectives: Float[Array, " k"]
    bounds: Float[Array, " k"]


def _blank(function: Callable[[], Any]) -> Any:
    """Zeros in the place of what a function returns."""
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(function))


def gates_of(problem: Problem, U: Neurons, key: Array) -> Gates:
    """The gates of neurons U, random ones for dead neurons."""
    return problem.rows.X @ jnp.where(dead(U)[None, :], random_neurons(key, U), U) >= 0


def _program(problem: Problem, D: Gates, A: Directions, *, has_cones: bool) -> Program:
    """The program of these data with these gates and directions."""
    return Program(problem.rows, D, A, problem.beta, problem.basis.eigenvalues, has_cones)


def program_of(problem: Problem, U: Neurons, A: Directions, b: Bias, key: Array) -> tuple[Program, Iterate]:
    """The program with the gates of neurons U, random ones for dead neurons, and U as its iterate."""
    program = _program(problem, gates_of(problem, U, key), A, has_cones=True)
    return program, init(program, U, b, problem.rho, problem.held)


def _mark(problem: Problem) -> tuple[Scalar, Scalar]:
    """A number by which rows and their order are known, whatever the eigenbasis, and what it is to be compared with."""
    X, Q = problem.rows.X, problem.basis.rotation
    n, d = X.shape
    direction = jnp.cos(jnp.arange(d, dtype=X.dtype))
    each = (X @ (direction if Q is None else Q.T @ direction)[:, None])[:, 0]
    return jnp.cos(jnp.arange(n, dtype=X.dtype)) @ each, jnp.sum(jnp.abs(each))


def _unmoved(program: Program, iterate: Iterate) -> Iteration:
    """The iteration that leaves the iterate where it is."""
    V, _, S, _ = iterate.split(program.beta)
    return Iteration(iterate, V, S, iterate.Z_plus_dual)


def _iterate(
    problem: Problem, program: Program, prepared: Any, now: HeldLoop, count: Int[Array, ""]
) -> tuple[Iterate, Iteration, Memory | None]:
    """``count`` iterations: the iterate before the last of them, the last, and the memory of the acceleration."""
    settings = problem.held

    def advance(i: Array, carry: tuple) -> tuple[Iterate, Iteration, Memory | None]:
        _, last, memory = carry
        before = last.image
        last = step(program, problem.linear_solver, prepared, before, settings)
        if memory is None:
            return before, last, None
        # Never at a check, whose figures are of a plain step.
        image, to_check = last.image.flat(), i == count - 1
        extrapolate = last.image.iteration % settings.extrapolate_every == settings.extrapolate_every // 2
        point, memory = memory.advance(before.flat(), image, extrapolate & ~to_check)
        moved = last.image.at(jnp.where(to_check, image, point))
        return before, dataclasses.replace(last, image=moved), memory

    return jax.lax.fori_loop(0, count, advance, (now.iterate, _unmoved(program, now.iterate), now.memory))


def _tell(problem: Problem, done: Int[Array, ""], check: Check, iterate: Iterate) -> None:
    """Tell the caller's callback of a check, if there is one, and the check was not of the start."""
    if problem.progress is None:
        return

    def tell() -> None:
        gap = jnp.abs(check.program_objective - check.lower_bound) / jnp.abs(check.program_objective)
        host.report(
            problem.progress,
            iteration=done,
            program_objective=check.program_objective / problem.total_weight,
            lower_bound=check.lower_bound / problem.total_weight,
            gap=gap,
            cone_violation=check.cone_violation,
            primal_residual=check.primal_residual,
            dual_residual=check.dual_residual,
            rho=iterate.rho,
            active_neurons=jnp.sum(~dead(check.V)),
        )

    jax.lax.cond(done > 0, tell, lambda: None)


def solve_program(
    problem: Problem, program: Program, first: Iterate, key: Array, until: Int[Array, ""] | int, length: int
) -> HeldLoop:
    """ADMM until a check passes, or ``until`` iterations are done; the caller's callback is told of every check.

    What stands in the loop is compiled for every place where it stands. So step, check and preparation stand there
    once: the loop first checks the start, after no step.

    Args:
        problem: the settings; the data and β are those of the program.
        program: the program.
        first: the iterate to start from.
        key: of the linear solver.
        until: most iterations.
        length: of the traces, at least ``until + 1``.
    """
    settings, linear_solver = problem.held, problem.linear_solver
    renews = linear_solver.accelerated and first.Z_plus_dual is None  # else κ does not change

    def prepare(iterate: Iterate) -> Any:
        return linear_solver.prepare(program, iterate.kappa, key)

    def unfinished(now: HeldLoop) -> Array:
        goes_on = (now.done < until) & ~now.check.converged(problem.tol) & jnp.isfinite(now.check.program_objective)
        return (now.done < 0) | goes_on

    def body(now: HeldLoop) -> HeldLoop:
        prepared, is_start = now.prepared, now.done < 0
        if renews:
            prepared = jax.lax.cond(now.stale, lambda: prepare(now.iterate), lambda: now.prepared)
        count = jnp.where(is_start, 0, jnp.minimum(settings.check_every, until - now.done))
        before, last, memory = _iterate(problem, program, prepared, now, count)
        found, image, stale = check(program, before, last, is_start), last.image, jnp.zeros((), bool)
        if memory is not None:
            rho, change = better_rho(found, image, settings)
            stale = change & ~is_start
            image = image.with_rho(jnp.where(stale, rho, image.rho), program)
            memory = dataclasses.replace(memory, count=jnp.where(stale, 0, memory.count))
        done = jnp.maximum(now.done, 0) + count
        _tell(problem, done, found, image)
        later = jnp.arange(length, dtype=jnp.int32) > now.done
        objectives = jnp.where(later, found.program_objective, now.objectives)
        bounds = jnp.where(later, found.lower_bound, now.bounds)
        return HeldLoop(done, image, memory, prepared, stale, found, objectives, bounds)

    blank = jnp.zeros(length, first.rho.dtype)
    start = HeldLoop(
        done=jnp.asarray(-1, jnp.int32),
        iterate=first,
        memory=Memory.empty(first.flat()) if linear_solver.accelerated else None,
        prepared=_blank(lambda: prepare(first)) if renews else prepare(first),
        stale=jnp.ones((), bool),
        check=_blank(lambda: check(program, first, _unmoved(program, first), jnp.ones((), bool))),
        objectives=blank,
        bounds=blank,
    )
    return jax.lax.while_loop(unfinished, body, start)


def figures(problem: Problem, run: HeldLoop) -> dict[str, Array]:
    """What a run of ADMM has to say of its program, for :class:`cronos_flax.Stats`."""
    total = problem.total_weight
    return {
        "program_objective": run.check.program_objective / total,
        "lower_bound": run.check.lower_bound / total,
        "lower_bound_trace": run.bounds / total,
        "cone_violation": run.check.cone_violation,
        "primal_residual": run.check.primal_residual,
        "dual_residual": run.check.dual_residual,
    }


def _gates(problem: Problem, U: Neurons, gated_by: Gates | None, key: Array) -> Gates:
    """The gates to hold: those of a gated network, those of neurons U, or random ones that two neurons each share."""
    if gated_by is not None:
        return gated_by
    if problem.gates == "fixed":
        return gates_of(problem, U, key)
    # Directions alternate in sign, so neighbours are the pairs (v, w) of the paper.
    return problem.rows.X @ jnp.repeat(random_neurons(key, U[:, ::2]), 2, axis=1)[:, : U.shape[1]] >= 0


def _iterate_of(state: HeldState, basis: Basis) -> Iterate:
    """Where ADMM stood when it left this state."""
    return Iterate(
        V_plus_dual=basis.lift(*state.hidden_plus_dual),
        S_plus_dual=state.S_plus_dual,
        Z_plus_dual=state.Z_plus_dual,
        z=state.z,
        rho=state.rho,
        iteration=state.iteration,
        kappa_of_split=state.kappa,
    )


def _state_of(params: Network, problem: Problem, program: Program, last: Iterate, mark: Scalar) -> HeldState:
    """The state from which :func:`_iterate_of` has the last iterate again."""
    return HeldState(
        params=params,
        hidden_plus_dual=problem.basis.lower(last.V_plus_dual),
        D=program.D,
        A=program.A,
        S_plus_dual=last.S_plus_dual,
        Z_plus_dual=last.Z_plus_dual,
        z=last.z,
        rho=last.rho,
        iteration=last.iteration,
        kappa=last.kappa_of_split,
        mark=mark,
        gates=problem.gates,
    )


def _toward(
    program: Program, start: tuple[Neurons, Bias], end: tuple[Neurons, Bias], gated_by: Gates | None, settings: Held
) -> tuple[Neurons, Bias, Activations]:
    """U, b and ``X U`` on the way from the start to the program's iterate, where the network's loss is least.

    That iterate may break the program's cones, and its network then be worse than the start's.
    """
    rows = program.rows
    here, there = ((U, b, rows.X @ U) for U, b in (start, end))
    way = jax.tree.map(jnp.subtract, there, here)

    def at(length: Scalar) -> tuple[Neurons, Bias, Activations]:
        return jax.tree.map(lambda now, step: now + length * step, here, way)

    def objective(network: tuple[Neurons, Bias, Activations]) -> Scalar:
        U, b, Z = network
        return network_objective(rows, program.A, b, program.beta, U, Z, gated_by)

    found, _ = best_of(at, objective, jnp.asarray(settings.step_lengths, way[0].dtype))
    return found


def held(
    problem: Problem,
    network: tuple[Neurons, Directions, Bias],
    gated_by: Gates | None,
    start: Any,
    key: Array,
    until: Int[Array, ""],
    length: int,
) -> Ended:
    """Solve the convex program of held gates by ADMM, and go there as far as the network's loss falls.

    Args:
        problem: the data and the settings.
        network: neurons, directions and mean output to start from.
        gated_by: the gates of a gated network, None for a ReLU network.
        start: the state to go on from, if there is one.
        key: of random gates and of the linear solver.
        until: most iterations.
        length: of the traces, at least ``until + 1``.
    """
    (U, A, b), (gate_key, run_key) = network, jax.random.split(key)
    state, has_cones = start if isinstance(start, HeldState) else None, gated_by is None
    if gated_by is None and problem.gates == "paired" and state is None:
        U, A = jnp.zeros_like(U), default_directions(A.shape[0], A.shape[1], A.dtype)
    D = _gates(problem, U, gated_by, gate_key)
    mark, size = _mark(problem)
    if state is None:
        program = _program(problem, D, A, has_cones=has_cones)
        first = init(program, U, b, problem.rho, problem.held)
    else:
        # With the gates of other rows the lower bound would be none.
        of_these = jnp.abs(mark - state.mark) <= _SAME * size
        D = D if gated_by is not None else jnp.where(of_these, state.D, D)
        program = _program(problem, D, state.A, has_cones=has_cones)
        first = _iterate_of(state, problem.basis)
    run = solve_program(problem, program, first, run_key, until, length)
    U, b, Z = _toward(program, (U, b), (run.check.V, run.check.b), gated_by, problem.held)
    return Ended(
        network=(U, program.A, b, Z),
        status=jnp.where(run.check.converged(problem.tol), Status.converged, Status.max_iters),
        figures={
            **figures(problem, run),
            "iterations": run.done,
            "objective_trace": run.objectives / problem.total_weight,
        },
        state_of=lambda params: _state_of(params, problem, program, run.iterate, mark),
    )
