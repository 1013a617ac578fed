"""Spherical k-means on all rows, with the same result for any row order, block size and device."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from curate.clusters import Clusters
from curate.codes import product_type
from curate.kmeans_faiss import fit_faiss
from curate.lloyd import Checkpoint, Lloyd, Progress
from curate.seeding import start
from curate.unit_rows import Rows, RowSource, full_float32, row_identity, unit_centroids

__all__ = ["BACKENDS", "Clusters", "KMeans", "assign", "assign_only", "fit"]

BACKENDS = ("auto", "torch", "faiss")


@dataclass(frozen=True, eq=False)
class KMeans:
    """What `fit` found.

    Attributes
    ----------
    centroids : (k, d) float32
        Unit vectors, on multiples of 2^-24.
    cluster : (n,) int32
        The nearest centroid of each row, as of `assign`.
    cosine_distance : (n,) float32
        The distance to it, as of `assign`.
    objective : float
        Mean cosine similarity of the rows to the nearest centroid; higher is better.
    iterations : int
        How many times the centroids were moved.
    counts : (k,) int64
        Rows per cluster, as `assign` puts them.
    backend : str
        ``"torch"`` or ``"faiss"``.
    products : str
        Of what type the fast products were: ``"int8"`` or ``"float32"``. It changes no result.
    empty_clusters : int
        Clusters without a row: only where there are fewer distinct rows than clusters.
    """

    centroids: NDArray[np.float32]
    cluster: NDArray[np.int32]
    cosine_distance: NDArray[np.float32]
    objective: float
    iterations: int
    counts: NDArray[np.int64]
    backend: str
    products: str
    empty_clusters: int


def fit(
    x: RowSource,
    k: int,
    *,
    iterations: int = 20,
    tolerance: float = 3e-4,
    seed: int = 0,
    backend: str = "auto",
    device: str | torch.device = "auto",
    keys: NDArray[np.uint64] | None = None,
    init: NDArray[np.float32] | None = None,
    progress: Progress | None = None,
    checkpoint: Checkpoint | None = None,
    block_bytes: int | None = None,
) -> KMeans:
    """Cluster unit rows by cosine similarity: spherical k-means (Dhillon and Modha, 2001).

    Lloyd's iterations run over all rows, never over a sample alone, and stop when they gain little.
    A cluster that loses its rows takes the row farthest from its own centroid.

    Parameters
    ----------
    x : (n, d) float16 or float32 (float64 is taken as float32)
        Unit rows: NumPy array or memory map, tensor on any device, or lazy shards.
    k : int
        Number of clusters, 1 to n.
    iterations : int
        At most that many moves of the centroids.
    tolerance : float
        Stop when a move would lower the mean cosine distance by less than this part of it; 0 goes
        on until nothing moves. Not for FAISS.
    seed : int
        Seed of the starting centroids.
    backend : {"auto", "torch", "faiss"}
        ``"auto"`` is ``"torch"`` always, so that results do not depend on what is installed.
        ``"faiss"`` needs the rows as float32 in memory, and is not bit-reproducible.
    device : str or torch.device
        Where to compute.
    keys : (n,) uint64, optional
        What identifies each row; with them the result does not depend on the rows' order.
        Default: the row's number.
    init : (k, d) array, optional
        Starting centroids; default k-means++ (Arthur and Vassilvitskii, 2007) and a few
        iterations, both on a sample.
    progress : callable, optional
        Called with the moves done and ``iterations``.
    checkpoint : callable, optional
        Called with the moves done and the (k, d) centroids after each: a fit with these as
        ``init`` and as many fewer ``iterations`` ends where this one does (not with FAISS).
    block_bytes : int, optional
        Memory of a block of rows and its products; results do not depend on it.

    Returns
    -------
    KMeans

    Raises
    ------
    ValueError
        If ``k`` does not suit n, an option is not known, or a row is not finite and unit.
    ImportError
        If ``backend="faiss"`` and FAISS is not installed.

    Examples
    --------
    >>> x = np.repeat(np.eye(2, dtype=np.float32), 3, axis=0)
    >>> fit(x, 2, device="cpu").counts
    array([3, 3])
    """
    rows = Rows(x, device, block_bytes)
    _check_request(rows, k, iterations, tolerance, backend)
    identity = row_identity(keys, rows.n)
    with full_float32():
        if init is None:
            centroids = start(rows, k, seed, identity)
        else:
            centroids = unit_centroids(init)
            if centroids.shape != (k, rows.d):
                raise ValueError(f"init has shape {centroids.shape}; it must be ({k}, {rows.d})")
        if backend == "faiss":
            centroids, done = fit_faiss(rows, centroids, iterations, seed, identity)
            lloyd = Lloyd(rows, centroids)
        else:
            lloyd = Lloyd(rows, centroids)
            done = lloyd.run(iterations, identity, progress, checkpoint, tolerance)
        distance = lloyd.settle(identity)
    counts = np.bincount(lloyd.cluster, minlength=k)
    return KMeans(
        centroids=lloyd.centroids,
        cluster=lloyd.cluster,
        cosine_distance=distance,
        objective=1.0 - float(distance.sum(dtype=np.float64)) / rows.n,
        iterations=done,
        counts=counts,
        backend="faiss" if backend == "faiss" else "torch",
        products=product_type(rows.device.type),
        empty_clusters=int((counts == 0).sum()),
    )


def assign(
    x: RowSource,
    centroids: NDArray[np.float32],
    *,
    device: str | torch.device = "auto",
    block_bytes: int | None = None,
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Return every row's nearest centroid by cosine similarity, and the cosine distance to it.

    Parameters
    ----------
    x : (n, d) float16 or float32 (float64 is taken as float32)
        Unit rows, as for `fit`.
    centroids : (k, d) array
        Centroids; they need a direction, not a length.
    device : str or torch.device
        Where to compute.
    block_bytes : int, optional
        Memory of a block of rows and its products; results do not depend on it.

    Returns
    -------
    cluster : (n,) int32
        The nearest centroid, exactly; the smallest number among equally near ones.
    cosine_distance : (n,) float32
        1 - cosine similarity, computed in float64, rounded to multiples of 2^-23, in [0, 2].

    Raises
    ------
    ValueError
        If the dimensions differ, there is no centroid, or a row is not finite and unit.

    Examples
    --------
    >>> assign(np.eye(2, dtype=np.float32), np.array([[0.0, 3.0]]), device="cpu")[1]
    array([1., 0.], dtype=float32)
    """
    lloyd = _nearest(x, centroids, device, block_bytes)
    with full_float32():
        return lloyd.cluster, lloyd.distance()


def assign_only(
    x: RowSource,
    centroids: NDArray[np.float32],
    *,
    device: str | torch.device = "auto",
    block_bytes: int | None = None,
) -> NDArray[np.int32]:
    """Return the clusters that `assign` returns, without the distances, in two thirds of its time.

    Examples
    --------
    >>> assign_only(np.eye(2, dtype=np.float32), np.array([[1.0, 0.1], [0.0, 3.0]]), device="cpu")
    array([0, 1], dtype=int32)
    """
    return _nearest(x, centroids, device, block_bytes).cluster


def _nearest(
    x: RowSource,
    centroids: NDArray[np.float32],
    device: str | torch.device,
    block_bytes: int | None,
) -> Lloyd:
    rows = Rows(x, device, block_bytes)
    unit = unit_centroids(centroids)
    if len(unit) == 0 or unit.shape[1] != rows.d:
        raise ValueError(
            f"centroids have shape {unit.shape} and x {(rows.n, rows.d)}; there must be at least "
            "one centroid, of the dimension of x: were both made by the same encoder?"
        )
    lloyd = Lloyd(rows, unit, once=True)
    with full_float32():
        lloyd.look(add=False)
    return lloyd


def _check_request(rows: Rows, k: int, iterations: int, tolerance: float, backend: str) -> None:
    if not 1 <= k <= rows.n:
        raise ValueError(
            f"k is {k}; with {rows.n} rows it must lie in 1 ... {rows.n}: ask for fewer clusters "
            "or give more rows"
        )
    if iterations < 1:
        raise ValueError(f"iterations is {iterations}; it must be at least 1")
    if not 0 <= tolerance < 1:
        raise ValueError(f"tolerance is {tolerance}; it must lie in 0 ... 1, such as 3e-4")
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is not known; use one of {', '.join(BACKENDS)}")
