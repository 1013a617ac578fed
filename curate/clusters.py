"""Which cluster each row is in: the type that passes from k-means to complexity and pruning."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Clusters:
    """Every row's cluster and its distance to the centroid.

    Attributes
    ----------
    cluster : (n,) int32
        The cluster's number, -1 for rows without an embedding.
    cosine_distance : (n,) float32
        1 - cosine similarity to the own centroid, in [0, 2]; NaN where ``cluster`` is -1.
    centroids : (k, d) float32
        The centroids.

    Raises
    ------
    ValueError
        If the shapes do not agree, a cluster has no centroid, or a distance is not in [0, 2].

    Examples
    --------
    >>> eye = np.eye(2, dtype=np.float32)
    >>> Clusters(np.array([0, -1], np.int32), np.array([0.5, np.nan], np.float32), eye).counts
    array([1, 0])
    """

    cluster: NDArray[np.int32]
    cosine_distance: NDArray[np.float32]
    centroids: NDArray[np.float32]

    def __post_init__(self) -> None:
        check_clusters(self.cluster, self.cosine_distance, self.centroids)

    @property
    def counts(self) -> NDArray[np.int64]:
        """Rows per cluster, (k,) int64."""
        return np.bincount(self.cluster[self.cluster >= 0], minlength=len(self.centroids))


def check_clusters(
    cluster: NDArray[np.int32],
    cosine_distance: NDArray[np.float32],
    centroids: NDArray[np.float32] | None = None,
) -> None:
    """Check that clusters and distances belong together, and with the centroids if given.

    Raises
    ------
    ValueError
        If they do not.
    """
    if cluster.ndim != 1 or cluster.dtype.kind not in "iu":
        raise ValueError(
            f"cluster is {cluster.dtype} of shape {cluster.shape}; it must be (n,) integers, one "
            "cluster number per row: curate.kmeans.assign returns them"
        )
    if cosine_distance.shape != cluster.shape:
        raise ValueError(
            f"cosine_distance has shape {cosine_distance.shape} and cluster {cluster.shape}; both "
            "must be (n,): take the two that curate.kmeans.assign returned together"
        )
    if centroids is not None and centroids.ndim != 2:
        raise ValueError(f"centroids have shape {centroids.shape}; they must be (k, d)")
    if len(cluster) == 0:
        return
    high = len(centroids) if centroids is not None else np.iinfo(np.int32).max
    if cluster.min() < -1 or cluster.max() >= high:
        raise ValueError(
            f"cluster numbers run from {cluster.min()} to {cluster.max()}; with {high} centroids "
            "they must lie in 0 ... k - 1, or be -1 for rows without an embedding"
        )
    known = cosine_distance[cluster >= 0]
    if not bool(((known >= 0) & (known <= 2)).all()):
        row = np.flatnonzero((cluster >= 0) & ~((cosine_distance >= 0) & (cosine_distance <= 2)))[0]
        raise ValueError(
            f"cosine_distance of row {row} is {cosine_distance[row]}; it must lie in [0, 2]: "
            "give rows without an embedding the cluster -1"
        )


def rows_of_clusters(cluster: NDArray[np.int32]) -> list[NDArray[np.int64]]:
    """Return the rows of each cluster that has some; clusters and their rows ascend.

    Parameters
    ----------
    cluster : (n,) int32
        -1 leaves a row out.
    """
    rows = np.flatnonzero(cluster >= 0)
    own = cluster[rows]
    if own.max(initial=0) < 1 << 15:
        own = own.astype(np.int16)  # is sorted by radix: twice as fast
    order = np.argsort(own, kind="stable")
    bounds = np.flatnonzero(np.diff(own[order])) + 1
    return np.split(rows[order], bounds) if len(rows) else []
