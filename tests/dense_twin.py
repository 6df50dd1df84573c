"""Slow, plain numpy and CVXPY versions of what the solver does, written from method.md alone."""

import cvxpy as cp
import numpy as np
import scipy.special


def scaled_features(X, weight, hidden_bias):
    """``[X/s, 1]`` and s; s is the weighted root mean squared row norm."""
    s = np.sqrt(np.average(np.sum(X**2, axis=1), weights=weight))
    X = X / s
    return (np.hstack([X, np.ones((len(X), 1))]) if hidden_bias else X), s


def loss_of_rows(loss, outputs, Y):
    """Each row's loss as a CVXPY expression, column by column where it is a sum over columns."""
    margins = cp.multiply(Y, outputs)
    return {
        "squared": lambda: 0.5 * cp.sum(cp.square(outputs - Y), axis=1),
        "softmax": lambda: cp.log_sum_exp(outputs, axis=1) - cp.sum(margins, axis=1),
        "logistic": lambda: cp.sum(cp.logistic(outputs) - margins, axis=1),
        "huber": lambda: cp.sum(0.5 * cp.huber(outputs - Y, 1.0), axis=1),
        "hinge": lambda: cp.sum(cp.pos(1 - margins), axis=1),
    }[loss]()


def program_optimum(
    X,
    Y,
    gates,
    directions,
    beta,
    weight=None,
    *,
    loss="squared",
    hidden_bias=True,
    output_bias=True,
    has_cones=True,
):
    """Optimal value of program (P), in the units of ``Cronos`` (a weighted mean), by an interior-point method."""
    n = len(X)
    weight = np.ones(n) if weight is None else weight / weight.mean()
    Z, s = scaled_features(X, weight, hidden_bias)
    U = cp.Variable((Z.shape[1], gates.shape[1]))
    b = cp.Variable((1, Y.shape[1])) if output_bias else np.zeros((1, Y.shape[1]))
    pre = Z @ U
    outputs = cp.multiply(gates.astype(float), pre) @ directions + np.ones((n, 1)) @ b
    loss = weight @ loss_of_rows(loss, outputs, Y)
    penalty = beta * n / s * cp.sum(cp.norm(U, axis=0))
    cones = [cp.multiply(2.0 * gates - 1, pre) >= 0] if has_cones else []
    problem = cp.Problem(cp.Minimize(loss + penalty), cones)
    return problem.solve(solver=cp.CLARABEL) / n


def losses_of(loss, outputs, Y):
    """Each row's loss, in numpy."""
    r, margins = outputs - Y, outputs * Y
    return {
        "squared": lambda: 0.5 * np.sum(r**2, axis=1),
        "softmax": lambda: scipy.special.logsumexp(outputs, axis=1) - np.sum(margins, axis=1),
        "logistic": lambda: np.sum(np.logaddexp(0, outputs) - margins, axis=1),
        "huber": lambda: np.sum(np.where(np.abs(r) <= 1, 0.5 * r**2, np.abs(r) - 0.5), axis=1),
        "hinge": lambda: np.sum(np.maximum(1 - margins, 0), axis=1),
    }[loss]()


def regularised_loss(params, X, Y, beta, weight=None, loss="squared"):
    """The formula of the ``Cronos`` docstring, in float64."""
    weight = np.ones(len(X)) if weight is None else np.asarray(weight, float)
    X, Y = np.asarray(X, float), np.asarray(Y, float)
    kernel1, kernel2 = np.asarray(params.kernel1, float), np.asarray(params.kernel2, float)
    s = np.sqrt(np.average(np.sum(X**2, axis=1), weights=weight)) or 1.0
    hidden = X @ kernel1
    penalty = np.sum(kernel1**2) + np.sum(kernel2**2)
    if params.bias1 is not None:
        bias1 = np.asarray(params.bias1, float)
        hidden = hidden + bias1
        penalty += np.sum(bias1**2) / s**2
    if hasattr(params, "gate_kernel"):
        Z = X @ np.asarray(params.gate_kernel, float)
        on = (Z if params.gate_bias is None else Z + np.asarray(params.gate_bias, float)) >= 0
        outputs = (on * hidden) @ kernel2
    else:
        outputs = np.maximum(hidden, 0) @ kernel2
    if params.bias2 is not None:
        outputs = outputs + np.asarray(params.bias2, float)
    return np.average(losses_of(loss, outputs, Y), weights=weight) + beta / 2 * penalty


def admm(X, Y, gates, directions, beta, rho, relax=1.0, *, V, Lambda, center=lambda T: T):
    """The iterates ``(V, Λ, S, N)`` of ADMM on (P), by dense matrices and with every variable written out."""
    (n, d), m = X.shape, gates.shape[1]
    signs = 2.0 * gates - 1

    def matrix(apply):
        return np.stack([np.asarray(apply(X @ e.reshape(d, m))).ravel() for e in np.eye(d * m)], axis=1)

    F, G = matrix(lambda Z: center((gates * Z) @ directions)), matrix(lambda Z: signs * Z)
    system = np.eye(d * m) + G.T @ G + F.T @ F / rho
    S = np.maximum(signs * (X @ V), 0)
    N = np.zeros_like(S)
    while True:
        rhs = (V - Lambda).ravel() + G.T @ (S - N).ravel() + F.T @ np.asarray(Y).ravel() / rho
        U = np.linalg.solve(system, rhs)
        U, GU = relax * U.reshape(d, m) + (1 - relax) * V, relax * (G @ U).reshape(n, m) + (1 - relax) * S
        size = np.linalg.norm(U + Lambda, axis=0)
        V = (U + Lambda) * np.maximum(1 - beta / rho / size, 0)
        S = np.maximum(GU + N, 0)
        Lambda, N = Lambda + U - V, N + GU - S
        yield V, Lambda, S, N
