"""Many fits at once: sums of power laws and a constant, by the Huber loss of the logarithm.

`log L = log(exp(c_1 - g_1 x_1) + ... + exp(c_K - g_K x_K) + exp(e))`, where `x` are logarithms of parameters, tokens or
FLOPs. The objective is `sum_i huber(log L(x_i) - y_i)` with delta 1e-3, as Hoffmann et al. fit (arXiv 2203.15556,
Appendix D.3), summed and driven to a zero gradient: their average over runs met the optimiser's tolerance before it had
converged (Besiroglu et al., arXiv 2404.10102).

Starts, resamples and trial values of further parameters are rows of one batch, each a problem of its own, so that the
hundreds of fits of a bootstrap take some tenths of a second. Newton steps with the exact Hessian, its eigenvalues made
positive and damped, go downhill from everywhere and end at machine precision.

Shapes: B problems, n runs, K power laws, P = 2K + 1 parameters in the order c_1..c_K, g_1..g_K, e.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

CONVERGED = 1e-6
"""Gradient norms up to this are zero. Fits that converged have 1e-8 and less, Chinchilla's early stop 1e-2."""
EXACT = 1e-13
"""Residuals (of log L) up to this are rounding; a fit that has no others has converged."""


@dataclass(frozen=True)
class Solutions:
    """What `minimise` found for each row of the batch."""

    theta: Array
    """(B, P)"""
    objective: Array
    """(B,)"""
    gradient_norm: Array
    """(B,)"""

    @property
    def converged(self) -> NDArray[np.bool_]:
        """(B,): the gradient is zero."""
        return self.gradient_norm <= CONVERGED


def log_law(theta: Array, x: Array) -> Array:
    """Logarithm of the law. (B, P), (B or 1, n, K) -> (B, n)."""
    return _terms(theta, x)[0]


def gradient_norm(theta: Array, x: Array, y: Array, delta: float) -> Array:
    """(B,): the largest entry of the gradient, as a share of the sum of what the runs pull it to and fro.

    0 where the pulls cancel, about 1 far from an optimum. It does not depend on the number of runs, and not on the
    units of x if x is centred and scaled.
    """
    return _evaluate(theta, x, y, delta)[2]


def minimise(theta: Array, x: Array, y: Array, *, delta: float, max_steps: int = 400) -> Solutions:
    """Fit each row of the batch from its own start. `theta` (B, P), `x` (B or 1, n, K), `y` (B or 1, n)."""
    rows, runs = len(theta), x.shape[1]
    x = np.broadcast_to(x, (rows, runs, x.shape[2]))
    y = np.broadcast_to(y, (rows, runs))
    best = theta.copy()
    objective, norm = np.empty(rows), np.empty(rows)
    active = np.arange(rows)
    damping = np.full(rows, 1e-2)
    value, gradient, size, hessian, bound = _evaluate(best, x, y, delta)
    objective[:], norm[:] = value, size
    for _ in range(max_steps):
        running = (norm[active] > CONVERGED * 1e-3) & (damping[active] < 1e12)
        if not running.any():
            break
        active, gradient, hessian, bound = active[running], gradient[running], hessian[running], bound[running]
        scale, vectors = np.linalg.eigh(hessian + damping[active, None, None] * bound)  # (B, P), (B, P, P)
        step = -np.einsum("bij,bj->bi", vectors, np.einsum("bji,bj->bi", vectors, gradient) / (np.abs(scale) + 1e-300))
        length = np.abs(step).max(axis=1, keepdims=True)
        trial = best[active] + step / np.maximum(length / 5.0, 1.0)  # no exponent or coefficient jumps by more than 5
        value, new_gradient, size, new_hessian, new_bound = _evaluate(trial, x[active], y[active], delta)
        # At the end the objective only changes by rounding, and the gradient still tells better from worse
        tie = (value <= objective[active] * (1 + 1e-15)) & (size < norm[active])
        better = (value < objective[active]) | tie
        improved = active[better]
        best[improved], objective[improved], norm[improved] = trial[better], value[better], size[better]
        gradient[better], hessian[better], bound[better] = new_gradient[better], new_hessian[better], new_bound[better]
        damping[active] = np.where(better, np.maximum(damping[active] / 4, 1e-12), damping[active] * 5)
    return Solutions(best, objective, norm)


def _terms(theta: Array, x: Array) -> tuple[Array, Array]:
    """log L (B, n) and the share of each power law and of the constant in L (B, n, K + 1)."""
    laws = x.shape[2]
    logs = np.empty((len(theta), x.shape[1], laws + 1))
    logs[:, :, :laws] = theta[:, None, :laws] - theta[:, None, laws : 2 * laws] * x
    logs[:, :, laws] = theta[:, None, 2 * laws]
    top = logs.max(axis=2, keepdims=True)
    share = np.exp(logs - top)
    total = share.sum(axis=2, keepdims=True)
    return (top + np.log(total))[:, :, 0], share / total


def _evaluate(theta: Array, x: Array, y: Array, delta: float) -> tuple[Array, Array, Array, Array, Array]:
    """Objective (B,), gradient (B, P), its norm (B,), Hessian (B, P, P) and what bounds its curvature (B, P, P)."""
    laws = x.shape[2]
    law, share = _terms(theta, x)
    residual = law - y
    large = np.abs(residual) > delta
    value = np.where(large, delta * (np.abs(residual) - delta / 2), residual**2 / 2).sum(axis=1)
    pull = np.clip(residual, -delta, delta)  # derivative of the Huber loss, (B, n)
    jacobian = np.concatenate([share[:, :, :laws], -x * share[:, :, :laws], share[:, :, laws:]], axis=2)  # (B, n, P)
    gradient = np.einsum("bn,bnp->bp", pull, jacobian)
    pulls = np.abs(pull).sum(axis=1)
    exact = np.abs(residual).max(axis=1) <= EXACT
    norm = np.where(exact, 0.0, np.abs(gradient).max(axis=1) / np.maximum(pulls, 1e-300))
    weighted = (np.where(large, 0.0, 1.0) - pull)[:, :, None] * jacobian
    hessian = np.einsum("bnp,bnq->bpq", weighted, jacobian)
    # The law is a log-sum-exp of lines: its second derivative is that of its softmax
    index = np.arange(laws)
    shares = pull[:, :, None] * share
    first, second = (shares[:, :, :laws] * x).sum(axis=1), (shares[:, :, :laws] * x**2).sum(axis=1)
    hessian[:, index, index] += shares[:, :, :laws].sum(axis=1)
    hessian[:, index, laws + index] -= first
    hessian[:, laws + index, index] -= first
    hessian[:, laws + index, laws + index] += second
    hessian[:, 2 * laws, 2 * laws] += shares[:, :, laws].sum(axis=1)
    # Where no run is within delta the objective is a polyhedron, without curvature. Parabolas that touch it from above
    # have one: those of iteratively reweighted least squares
    weights = np.minimum(1.0, delta / np.maximum(np.abs(residual), 1e-300))
    bound = np.einsum("bnp,bnq->bpq", weights[:, :, None] * jacobian, jacobian)
    bound += np.eye(bound.shape[1]) * (1e-6 * np.trace(bound, axis1=1, axis2=2)[:, None, None])
    return value, gradient, norm, hessian, bound
