"""The quadratic program min |x - t|^2, sum x = N, l <= x <= u, given to a general solver."""

from __future__ import annotations

import numpy as np
from scipy.optimize import minimize


def project(target, lower, upper, budget):
    t, low, high = (np.asarray(a, dtype=float) for a in (target, lower, upper))
    room = (high - low).sum()
    start = low + (high - low) * ((budget - low.sum()) / room if room else 0.0)
    scale = max(1.0, float(np.abs(t).max()))
    found = minimize(
        lambda x: ((x - t) ** 2).sum() / scale,
        start,
        jac=lambda x: 2 * (x - t) / scale,
        bounds=list(zip(low, high, strict=True)),
        constraints={"type": "eq", "fun": lambda x: x.sum() - budget, "jac": np.ones_like},
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 1000},
    )
    return found.x


def largest_remainder(x, upper):
    """Round to whole numbers with the same sum: one more each for the largest remainders."""
    result = np.floor(x + 1e-9).astype(int)
    remainder = np.round(x - result, 9)
    missing = round(float(np.sum(x))) - result.sum()
    for at in sorted(range(len(x)), key=lambda j: (-remainder[j], j)):
        if missing and result[at] < upper[at]:
            result[at] += 1
            missing -= 1
    return result
