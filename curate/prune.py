"""Prune by the complexity of clusters: how many rows each cluster keeps, and which."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from curate.allocation import allocate, project
from curate.clusters import Clusters, rows_of_clusters
from curate.complexity import complexity
from curate.unit_rows import mixed_keys, row_identity

__all__ = ["PRESETS", "Pruning", "allocate", "project", "prune_by_complexity", "prune_clusters"]

WHICH = ("hard", "easy", "random")
ALLOCATIONS = ("complexity", "uniform")
PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "paper": MappingProxyType({"temperature": 0.1, "neighbours": 20, "lower": 1}),
        # The authors' code: each cluster keeps at least half of an even share.
        "repo": MappingProxyType({"temperature": 0.5, "neighbours": 20, "lower_ratio": 0.5}),
    }
)


@dataclass(frozen=True, eq=False)
class Pruning:
    """Which rows are kept, and why.

    Attributes
    ----------
    kept : (n,) bool
        Exactly as many as the budget.
    rank : (n,) int32
        Place of the row in its cluster's order of choice, from 0; -1 where the cluster is -1.
        A row is kept if its rank is below ``allocated`` of its cluster.
    allocated : (k,) int64
        Rows that each cluster keeps.
    target : (k,) float64
        Rows that each cluster would keep if it had them: the budget times its share.
    d_intra, d_inter, complexity : (k,) float64
        As `curate.complexity.complexity` returns them.
    """

    kept: NDArray[np.bool_]
    rank: NDArray[np.int32]
    allocated: NDArray[np.int64]
    target: NDArray[np.float64]
    d_intra: NDArray[np.float64]
    d_inter: NDArray[np.float64]
    complexity: NDArray[np.float64]


def prune_by_complexity(
    cluster: NDArray[np.int32],
    cosine_distance: NDArray[np.float32],
    centroids: NDArray[np.float32],
    budget: int,
    *,
    temperature: float = 0.1,
    neighbours: int = 20,
    lower: int = 1,
    lower_ratio: float | None = None,
    which: str = "hard",
    allocation: str = "complexity",
    keys: NDArray[np.uint64] | None = None,
    seed: int = 0,
) -> NDArray[np.bool_]:
    """Return the rows to keep: `prune_clusters` without the account of why.

    Parameters
    ----------
    cluster, cosine_distance, centroids, budget
        As for `prune_clusters`.
    temperature, neighbours, lower, lower_ratio, which, allocation, keys, seed
        As for `prune_clusters`.

    Returns
    -------
    (n,) bool
        Exactly ``budget`` rows are True.

    Raises
    ------
    ValueError
        As `prune_clusters`.

    Examples
    --------
    >>> cluster, distance = np.zeros(3, np.int32), np.array([0.1, 0.3, 0.2], np.float32)
    >>> prune_by_complexity(cluster, distance, np.eye(1, 2, dtype=np.float32), 1)
    array([False,  True, False])
    """
    return prune_clusters(
        cluster,
        cosine_distance,
        centroids,
        budget,
        temperature=temperature,
        neighbours=neighbours,
        lower=lower,
        lower_ratio=lower_ratio,
        which=which,
        allocation=allocation,
        keys=keys,
        seed=seed,
    ).kept


def prune_clusters(
    cluster: NDArray[np.int32],
    cosine_distance: NDArray[np.float32],
    centroids: NDArray[np.float32],
    budget: int,
    *,
    temperature: float = 0.1,
    neighbours: int = 20,
    lower: int = 1,
    lower_ratio: float | None = None,
    which: str = "hard",
    allocation: str = "complexity",
    keys: NDArray[np.uint64] | None = None,
    seed: int = 0,
) -> Pruning:
    """Keep exactly ``budget`` rows, more of complex clusters: Abbas, Rusak et al. (2024).

    A cluster's share is the softmax of its complexity over the temperature; `allocate` makes the
    shares of the budget whole numbers that its size allows. Of each cluster the rows farthest
    from the centroid are kept. The kept set does not depend on the order of rows (given
    ``keys``) nor on the numbering of the clusters.

    Parameters
    ----------
    cluster : (n,) int32
        Cluster of each row; rows with -1 are never kept.
    cosine_distance : (n,) float32
        Distance of each row to its centroid.
    centroids : (k, d) float32
        The centroids.
    budget : int
        How many rows to keep.
    temperature : float
        Of the softmax; lower gives complex clusters more (0.1 in the paper, 0.5 in its code).
    neighbours : int
        Nearest centroids that count for a cluster's distance to the others.
    lower : int
        Rows that each cluster keeps at least, if it has them. Where the budget does not suffice
        for all of these there is no such bound.
    lower_ratio : float, optional
        Instead of ``lower``: that fraction of budget / k, rounded down (0.5 in the code).
    which : {"hard", "easy", "random"}
        Rows to keep: the farthest from the centroid, the nearest, or any.
    allocation : {"complexity", "uniform"}
        ``"uniform"`` gives every cluster the same share; with ``which="hard"`` that is pruning
        by self-supervised prototypes with balanced clusters (Sorscher et al., 2022).
    keys : (n,) uint64, optional
        What identifies each row, and orders rows at equal distance; default the row's number.
    seed : int
        Seed of ``which="random"``.

    Returns
    -------
    Pruning

    Raises
    ------
    ValueError
        If an option is out of range, or there are fewer rows with a cluster than the budget.

    Examples
    --------
    >>> cluster, distance = np.zeros(3, np.int32), np.array([0.1, 0.3, 0.2], np.float32)
    >>> prune_clusters(cluster, distance, np.eye(1, 2, dtype=np.float32), 2).rank
    array([2, 0, 1], dtype=int32)
    """
    cluster = np.asarray(cluster)
    clusters = Clusters(cluster, np.asarray(cosine_distance), np.asarray(centroids))
    identity = row_identity(keys, len(cluster))
    counts = clusters.counts
    _check_options(budget, int(counts.sum()), len(cluster), temperature, which, allocation)
    measured = complexity(clusters, neighbours=neighbours)
    even = np.where(counts > 0, 0.0, np.nan)
    share = _softmax(measured.complexity if allocation == "complexity" else even, temperature)
    target = budget * share
    least = _lower_bounds(counts, budget, lower, lower_ratio)
    first = np.full(len(counts), np.iinfo(np.uint64).max)
    np.minimum.at(first, cluster[cluster >= 0], identity[cluster >= 0])
    allocated = allocate(target, least, counts, budget, priority=first)
    rank = _rank(clusters, which, identity, seed)
    kept = (rank >= 0) & (rank < np.append(allocated, 0)[cluster])
    return Pruning(kept, rank, allocated, target, *measured)


def _check_options(
    budget: int, clustered: int, rows: int, temperature: float, which: str, allocation: str
) -> None:
    if not 0 <= budget <= clustered:
        raise ValueError(
            f"budget is {budget}; of {rows} rows {clustered} are in a cluster, so it must lie in "
            f"0 ... {clustered}: ask for fewer rows"
        )
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(
            f"temperature is {temperature}; it must be positive and finite (0.1 in the paper); "
            "for equal shares use allocation='uniform'"
        )
    for name, value, known in (
        ("which", which, WHICH),
        ("allocation", allocation, ALLOCATIONS),
    ):
        if value not in known:
            raise ValueError(f"{name} {value!r} is not known; use one of {', '.join(known)}")


def _softmax(scores: NDArray[np.float64], temperature: float) -> NDArray[np.float64]:
    """Return the softmax over the numbers that are not NaN; 0 for those that are."""
    share = np.zeros(len(scores))
    real = np.flatnonzero(~np.isnan(scores))
    if len(real) == 0:
        return share
    highest = float(scores[real].max())
    # Scalar exp and an exactly rounded sum: a vectorised loop may round the last elements of an
    # array differently, and then a cluster's number would matter.
    powers = [math.exp((score - highest) / float(temperature)) for score in scores[real].tolist()]
    share[real] = np.array(powers) / math.fsum(powers)
    return share


def _lower_bounds(
    counts: NDArray[np.int64], budget: int, lower: int, lower_ratio: float | None
) -> NDArray[np.int64]:
    if lower < 0:
        raise ValueError(f"lower is {lower}; it must be 0 or more rows per cluster")
    least = lower
    if lower_ratio is not None:
        if not 0 <= lower_ratio <= 1:
            raise ValueError(
                f"lower_ratio is {lower_ratio}; it must lie in 0 ... 1, a fraction of an even "
                "share of the budget"
            )
        least = math.floor(lower_ratio * budget / max(1, len(counts)))
    bounds = np.minimum(least, counts)
    return bounds if bounds.sum() <= budget else np.zeros_like(bounds)


def _rank(
    clusters: Clusters, which: str, identity: NDArray[np.uint64], seed: int
) -> NDArray[np.int32]:
    """Return each row's place in its cluster, in the order in which rows are kept."""
    cluster = clusters.cluster
    order_by: NDArray[Any]
    if which == "random":
        order_by = mixed_keys(identity, seed, "prune random")
    else:
        order_by = clusters.cosine_distance * np.float32(-1 if which == "hard" else 1)
    rank = np.full(len(cluster), -1, dtype=np.int32)
    for members in rows_of_clusters(cluster):
        order = np.lexsort((identity[members], order_by[members]))
        rank[members[order]] = np.arange(len(members))
    return rank
