"""Share out a budget: the whole numbers nearest to a target that bounds and the sum allow."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

Bounds = tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]]


def project(
    target: ArrayLike, lower: ArrayLike, upper: ArrayLike, budget: int
) -> NDArray[np.float64]:
    """Return the point nearest to the target within the bounds that sums to the budget.

    The quadratic program min |x - target|^2, sum x = budget, lower <= x <= upper of Abbas,
    Rusak et al. (2024) needs no solver: by its optimality conditions x = clip(target + shift,
    lower, upper) with one number, and the sum is piecewise linear in it. What a full cluster
    cannot take is thus added to the others in equal parts, not in proportion.

    Parameters
    ----------
    target : (k,) array
        Wished amounts, finite.
    lower, upper : (k,) array or int
        Bounds, whole numbers.
    budget : int
        The sum.

    Returns
    -------
    (k,) float64

    Raises
    ------
    ValueError
        If a bound or target is not usable, or no such point exists.

    Examples
    --------
    >>> project([1.0, 5.0, 6.0], 0, [10, 3, 10], 12)
    array([2., 3., 7.])
    """
    t, low, high = _checked(target, lower, upper, budget)
    return np.clip(t + _shift(t, low, high, budget), low, high)


def allocate(
    target: ArrayLike,
    lower: ArrayLike,
    upper: ArrayLike,
    budget: int,
    *,
    priority: NDArray[np.uint64] | None = None,
) -> NDArray[np.int64]:
    """Return whole numbers within the bounds that sum to the budget exactly.

    `project`, rounded down; what is missing goes, one each, to the largest remainders.

    Parameters
    ----------
    target : (k,) array
        Wished amounts, finite.
    lower, upper : (k,) array or int
        Bounds, whole numbers.
    budget : int
        The sum.
    priority : (k,) uint64, optional
        Among equal remainders the smaller comes first, then the smaller index.

    Returns
    -------
    (k,) int64

    Raises
    ------
    ValueError
        If a bound or target is not usable, or the budget is not between the sums of the bounds.

    Examples
    --------
    >>> allocate([2.5, 2.5, 5.0], 0, 9, 10)
    array([3, 2, 5])
    """
    t, low, high = _checked(target, lower, upper, budget)
    if priority is not None and np.shape(priority) != t.shape:
        raise ValueError(f"priority has shape {np.shape(priority)}; it must be {t.shape}")
    x = np.clip(t + _shift(t, low, high, budget), low, high)
    whole = np.floor(x)
    # Rounded, so that remainders that are equal but for the last bits count as equal.
    remainder = np.round(x - whole, 9)
    result = np.where(remainder == 1, whole + 1, whole).astype(np.int64)
    remainder[remainder == 1] = 0.0
    ties = np.zeros(len(t), dtype=np.uint64) if priority is None else priority
    order = np.lexsort((ties, -remainder))
    # Once around is enough but for huge targets, whose float64 remainders are noise.
    while missing := budget - int(result.sum()):
        step = 1 if missing > 0 else -1
        able = (result < high) if missing > 0 else (result > low)
        turn = order[able[order]] if missing > 0 else order[able[order]][::-1]
        result[turn[: abs(missing)]] += step
    return result


def _checked(target: ArrayLike, lower: ArrayLike, upper: ArrayLike, budget: int) -> Bounds:
    t = np.asarray(target, dtype=np.float64)
    if t.ndim != 1 or not bool(np.isfinite(t).all()):
        raise ValueError(f"target has shape {t.shape} or is not finite; it must be (k,) numbers")
    low, high = (_whole(name, bound, t) for name, bound in (("lower", lower), ("upper", upper)))
    if bool((low > high).any()):
        at = int(np.flatnonzero(low > high)[0])
        raise ValueError(
            f"lower is {low[at]} and upper {high[at]} at {at}; lower must not be above upper"
        )
    if not int(low.sum()) <= budget <= int(high.sum()):
        raise ValueError(
            f"budget is {budget}; the bounds allow {low.sum()} ... {high.sum()} in all: change "
            "the budget, or widen the bounds"
        )
    return t, low, high


def _whole(name: str, bound: ArrayLike, target: NDArray[np.float64]) -> NDArray[np.int64]:
    given = np.asarray(bound)
    if given.shape not in ((), target.shape) or not bool((given == np.rint(given)).all()):
        raise ValueError(
            f"{name} has shape {given.shape}; it must be one whole number, or {target.shape} "
            "whole numbers, one for each target"
        )
    return np.broadcast_to(given.astype(np.int64), target.shape)


def _shift(
    t: NDArray[np.float64], low: NDArray[np.int64], high: NDArray[np.int64], budget: int
) -> float:
    """Return the number that, added to the target and clipped to the bounds, meets the budget."""
    # Between two neighbouring corners the sum is linear: find the last corner not above the
    # budget by bisection, then solve. fsum rounds once, so that the order of k cannot matter.
    corners = np.unique(np.concatenate((low - t, high - t)))
    if len(corners) == 0:
        return 0.0
    left, right = 0, len(corners) - 1
    while left < right:
        middle = (left + right + 1) // 2
        if math.fsum(np.clip(t + corners[middle], low, high)) <= budget:
            left = middle
        else:
            right = middle - 1
    corner = float(corners[left])
    inside = (low - t <= corner) & (corner < high - t)
    if not inside.any():
        return corner
    fixed = np.where(corner >= high - t, high, low)[~inside]
    total = math.fsum([budget, *(-fixed), *(-t[inside])])
    return total / int(inside.sum())
