"""Slow, plain numpy and CVXPY versions of what the solver does, written from method.md alone."""

import cvxpy as cp
import numpy as np


def scaled_features(X, weight, hidden_bias):
    """``[X/s, 1]`` and s; s is the weighted root mean squared row norm."""
    s = np.sqrt(np.average(np.sum(X**2, axis=1), weights=weight))
    X = X / s
    return (np.hstack([X, np.ones((len(X), 1))]) if hidden_bias else X), s


def program_optimum(X, Y, gates, directions, beta, weight=None, *, hidden_bias=True, output_bias=True):
    """Optimal value of program (P), in the units of ``Cronos`` (a weighted mean), by an interior-point method."""
    n = len(X)
    weight = np.ones(n) if weight is None else weight / weight.mean()
    Z, s = scaled_features(X, weight, hidden_bias)
    U = cp.Variable((Z.shape[1], gates.shape[1]))
    b = cp.Variable((1, Y.shape[1])) if output_bias else np.zeros((1, Y.shape[1]))
    pre = Z @ U
    outputs = cp.multiply(gates.astype(float), pre) @ directions + np.ones((n, 1)) @ b
    loss = 0.5 * cp.sum(cp.multiply(weight[:, None], cp.square(outputs - Y)))
    penalty = beta * n / s * cp.sum(cp.norm(U, axis=0))
    cone = cp.multiply(2.0 * gates - 1, pre) >= 0
    problem = cp.Problem(cp.Minimize(loss + penalty), [cone])
    return problem.solve(solver=cp.CLARABEL) / n


def regularised_loss(params, X, Y, beta, weight=None):
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
    outputs = np.maximum(hidden, 0) @ kernel2
    if params.bias2 is not None:
        outputs = outputs + np.asarray(params.bias2, float)
    loss = 0.5 * np.sum((outputs - Y) ** 2, axis=1)
    return np.average(loss, weights=weight) + beta / 2 * penalty
