"""How much there is to learn from a cluster: how spread out, and how far from the others, it is."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from curate.clusters import Clusters
from curate.unit_rows import DISTANCE_GRID, unit_centroids

BLOCK_BYTES = 64 << 20


class Complexity(NamedTuple):
    """Per cluster, (k,) float64 each; NaN for empty clusters.

    Attributes
    ----------
    d_intra : (k,) float64
        Mean cosine distance of the members to their centroid.
    d_inter : (k,) float64
        Mean cosine distance of the centroid to the nearest other ones.
    complexity : (k,) float64
        ``d_inter * d_intra``.
    """

    d_intra: NDArray[np.float64]
    d_inter: NDArray[np.float64]
    complexity: NDArray[np.float64]


def complexity(clusters: Clusters, *, neighbours: int = 20) -> Complexity:
    """Return the complexity of each cluster: Abbas, Rusak et al. (2024), equation 1.

    "Effective pruning of web-scale datasets based on complexity of concept clusters". The sums
    are exact, so the numbers do not depend on the order of rows or clusters.

    Parameters
    ----------
    clusters : Clusters
        Clusters, distances and centroids.
    neighbours : int
        How many nearest centroids count for ``d_inter``; all others where there are fewer.
        Empty clusters are no neighbours.

    Returns
    -------
    Complexity
        NaN for empty clusters. A cluster that is the only one has ``d_inter`` 0.

    Raises
    ------
    ValueError
        If ``neighbours`` is below 1.

    Examples
    --------
    >>> cluster, distance = np.array([0, 0, 1], np.int32), np.array([0.5, 0.25, 0.5], np.float32)
    >>> complexity(Clusters(cluster, distance, np.eye(2, dtype=np.float32))).complexity
    array([0.375, 0.5  ])
    """
    if neighbours < 1:
        raise ValueError(
            f"neighbours is {neighbours}; it must be at least 1: the number of nearest other "
            "centroids that a cluster's distance is averaged over (20 in the authors' code)"
        )
    counts = clusters.counts
    filled = np.flatnonzero(counts)
    d_intra = np.full(len(counts), np.nan)
    d_inter = np.full(len(counts), np.nan)
    member = clusters.cluster >= 0
    # On the grid sums are exact; distances that `kmeans.assign` returned are there already.
    steps = np.rint(clusters.cosine_distance[member].astype(np.float64) * DISTANCE_GRID)
    sums = np.bincount(clusters.cluster[member], weights=steps, minlength=len(counts))
    d_intra[filled] = sums[filled] / DISTANCE_GRID / counts[filled]
    if len(filled):
        d_inter[filled] = _mean_to_nearest(clusters.centroids[filled], neighbours)
    return Complexity(d_intra, d_inter, d_inter * d_intra)


def _mean_to_nearest(centroids: NDArray[np.float32], neighbours: int) -> NDArray[np.float64]:
    k = len(centroids)
    nearest = min(neighbours, k - 1)
    result = np.zeros(k)
    if nearest == 0:
        return result
    unit = unit_centroids(centroids).astype(np.float64)
    lengths = np.sqrt(np.einsum("ij,ij->i", unit, unit))
    block = max(1, BLOCK_BYTES // (16 * k))
    for start in range(0, k, block):
        rows = np.arange(start, min(start + block, k))
        cosine = unit[rows] @ unit.T / (lengths[rows, None] * lengths[None, :])
        steps = np.rint((1.0 - cosine) * DISTANCE_GRID).clip(0.0, 2 * DISTANCE_GRID)
        steps[np.arange(len(rows)), rows] = np.inf
        steps.partition(nearest - 1, axis=1)
        result[rows] = steps[:, :nearest].sum(axis=1) / DISTANCE_GRID / nearest
    return result
