"""Spherical k-means on all rows, with the same result for any row order, block size and device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from curate.clusters import Clusters
from curate.kmeans_faiss import fit_faiss
from curate.seeding import plus_plus
from curate.unit_rows import (
    Rows,
    RowSource,
    exact_cosine,
    fast_product,
    full_float32,
    lengths64,
    on_grid,
    row_dots,
    row_identity,
    tolerance,
    top_two,
    unit_centroids,
)

__all__ = ["BACKENDS", "Clusters", "KMeans", "assign", "fit"]

BACKENDS = ("auto", "torch", "faiss")
Progress = Callable[[int, int], None]
Checkpoint = Callable[[int, NDArray[np.float32]], None]


@dataclass(frozen=True, eq=False)
class KMeans:
    """What `fit` found.

    Attributes
    ----------
    centroids : (k, d) float32
        Unit vectors, on multiples of 2^-24.
    objective : float
        Mean cosine similarity of the rows to the nearest centroid; higher is better.
    iterations : int
        How many times the centroids were moved.
    counts : (k,) int64
        Rows per cluster, as `assign` puts them.
    backend : str
        ``"torch"`` or ``"faiss"``.
    empty_clusters : int
        Clusters without a row: only where there are fewer distinct rows than clusters.
    """

    centroids: NDArray[np.float32]
    objective: float
    iterations: int
    counts: NDArray[np.int64]
    backend: str
    empty_clusters: int


def fit(
    x: RowSource,
    k: int,
    *,
    iterations: int = 20,
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

    Lloyd's iterations run over all rows, never over a sample, and stop when no row changes its
    cluster. A cluster that loses its rows takes the row farthest from its own centroid.

    Parameters
    ----------
    x : (n, d) float16 or float32 (float64 is taken as float32)
        Unit rows: NumPy array or memory map, tensor on any device, or lazy shards.
    k : int
        Number of clusters, 1 to n.
    iterations : int
        At most that many moves of the centroids.
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
        Starting centroids; default k-means++ (Arthur and Vassilvitskii, 2007) on a sample.
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
    _check_request(rows, k, iterations, backend)
    identity = row_identity(keys, rows.n)
    with full_float32():
        if init is None:
            centroids = plus_plus(rows, k, seed, identity)
        else:
            centroids = unit_centroids(init)
            if centroids.shape != (k, rows.d):
                raise ValueError(f"init has shape {centroids.shape}; it must be ({k}, {rows.d})")
        if backend == "faiss":
            centroids, done = fit_faiss(rows, centroids, iterations, seed, identity)
        else:
            centroids, done = _lloyd(rows, centroids, iterations, identity, progress, checkpoint)
        centroids, cluster, distance = _without_empty(rows, centroids, identity)
    counts = np.bincount(cluster, minlength=k)
    return KMeans(
        centroids=centroids,
        objective=1.0 - float(distance.sum(dtype=np.float64)) / rows.n,
        iterations=done,
        counts=counts,
        backend="faiss" if backend == "faiss" else "torch",
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
    rows = Rows(x, device, block_bytes)
    unit = unit_centroids(centroids)
    if len(unit) == 0 or unit.shape[1] != rows.d:
        raise ValueError(
            f"centroids have shape {unit.shape} and x {(rows.n, rows.d)}; there must be at least "
            "one centroid, of the dimension of x: were both made by the same encoder?"
        )
    with full_float32():
        return _assign(rows, unit, check=True)


def _check_request(rows: Rows, k: int, iterations: int, backend: str) -> None:
    if not 1 <= k <= rows.n:
        raise ValueError(
            f"k is {k}; with {rows.n} rows it must lie in 1 ... {rows.n}: ask for fewer clusters "
            "or give more rows"
        )
    if iterations < 1:
        raise ValueError(f"iterations is {iterations}; it must be at least 1")
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is not known; use one of {', '.join(BACKENDS)}")


def _assign(
    rows: Rows, centroids: NDArray[np.float32], *, check: bool = False
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    cluster = np.empty(rows.n, dtype=np.int32)
    distance = np.empty(rows.n, dtype=np.float32)
    c = torch.from_numpy(centroids).to(rows.device)
    for start, block in rows.blocks(len(c), check=check):
        nearest = _nearest(rows, block, c)
        stop = start + len(block)
        cluster[start:stop] = nearest.cpu().numpy()
        distance[start:stop] = _distances(block, c, nearest)
    return cluster, distance


def _distances(block: torch.Tensor, c: torch.Tensor, own: torch.Tensor) -> NDArray[np.float32]:
    """Return the exact cosine distance of each row of the block to its own centroid."""
    wide, centers = block.double(), c.double()
    lengths = lengths64(wide) * lengths64(centers)[own]
    similarity = row_dots(wide, centers[own]) / lengths
    return np.asarray(on_grid(1.0 - similarity, 0.0).cpu().numpy(), dtype=np.float32)


def _nearest(rows: Rows, block: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """Return the exact nearest centroid of each row of the block, the first among equals."""
    first, nearest, second = top_two(fast_product(block, c))
    close = torch.nonzero(first - second < tolerance(rows.d))[:, 0]
    if len(close):
        wide = c.double()
        step = max(1, rows.block_bytes // (24 * len(c) + 16 * rows.d))
        for part in torch.split(close, step):
            # argmax returns the first of several maxima, on every device.
            nearest[part] = exact_cosine(block[part].double(), wide).argmax(dim=1)
    return nearest


def _lloyd(
    rows: Rows,
    centroids: NDArray[np.float32],
    iterations: int,
    identity: NDArray[np.uint64],
    progress: Progress | None,
    checkpoint: Checkpoint | None,
) -> tuple[NDArray[np.float32], int]:
    k = len(centroids)
    cluster = np.full(rows.n, -1, dtype=np.int32)
    sums = torch.zeros((k, rows.d), dtype=torch.float64, device=rows.device)
    for done in range(iterations):
        _move(rows, centroids, cluster, sums, check=done == 0)
        means = _directions(sums.cpu().numpy(), centroids)
        filled = 0
        if np.bincount(cluster, minlength=k).min() == 0:
            distance = _own_distance(rows, cluster, centroids)
            filled = _fill_empty(rows, means, cluster, distance, identity)
        # The sums are exact: centroids that stay are those whose rows stay. Only the centroids
        # decide what comes next, so that a fit can go on from them alone.
        if filled == 0 and np.array_equal(means, centroids):
            return centroids, done
        centroids = means
        if progress is not None:
            progress(done + 1, iterations)
        if checkpoint is not None:
            checkpoint(done + 1, centroids)
    return centroids, iterations


def _move(
    rows: Rows,
    centroids: NDArray[np.float32],
    cluster: NDArray[np.int32],
    sums: torch.Tensor,
    *,
    check: bool,
) -> None:
    """Put each row into its nearest cluster, in place.

    The sums are exact, so taking a row out leaves what they would be without it: only the rows
    that changed are added up.
    """
    c = torch.from_numpy(centroids).to(rows.device)
    for start, block in rows.blocks(len(c), check=check):
        own = cluster[start : start + len(block)]
        before = torch.from_numpy(own).to(block.device).long()
        after = _nearest(rows, block, c)
        at = torch.nonzero(after != before)[:, 0]
        if len(at) == 0:
            continue
        _add_up(sums, block, at, after[at], before[at])
        own[:] = after.cpu().numpy()


def _add_up(
    sums: torch.Tensor,
    block: torch.Tensor,
    at: torch.Tensor,
    after: torch.Tensor,
    before: torch.Tensor,
) -> None:
    """Add the block's rows `at` to the sums of their clusters, take them out of those before."""
    had = before >= 0
    target = torch.cat((after, before[had]))
    sign = torch.ones(len(target), dtype=torch.float64, device=block.device)
    sign[len(after) :] = -1.0
    # Positions among the rows `at`: those that come, then again those that had a cluster.
    position = torch.arange(len(at), device=block.device)
    position = torch.cat((position, position[had]))
    target, order = target.sort()
    touched, counts = torch.unique_consecutive(target, return_counts=True)
    # Sums of runs of rows: 20 times as fast as index_add_ on a CPU, and exact like it.
    sums[touched] += torch.nn.functional.embedding_bag(
        position[order],
        (block if len(at) == len(block) else block[at]).double(),
        counts.cumsum(0) - counts,
        mode="sum",
        per_sample_weights=sign[order],
    )


def _directions(sums: NDArray[np.float64], before: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the sums scaled to length 1; where rows cancel out or lack, the centroid before."""
    lost = np.sqrt((sums * sums).sum(axis=1)) < 1e-6
    return unit_centroids(np.where(lost[:, None], before, sums))


def _own_distance(
    rows: Rows, cluster: NDArray[np.int32], centroids: NDArray[np.float32]
) -> NDArray[np.float32]:
    distance = np.empty(rows.n, dtype=np.float32)
    c = torch.from_numpy(centroids).to(rows.device)
    for start, block in rows.blocks(0):
        own = torch.from_numpy(cluster[start : start + len(block)]).to(block.device).long()
        distance[start : start + len(block)] = _distances(block, c, own)
    return distance


def _without_empty(
    rows: Rows, centroids: NDArray[np.float32], identity: NDArray[np.uint64]
) -> tuple[NDArray[np.float32], NDArray[np.int32], NDArray[np.float32]]:
    """Return centroids, clusters and distances, no cluster empty while distinct rows are left."""
    centroids = centroids.copy()
    cluster, distance = _assign(rows, centroids, check=True)
    for _ in range(10):  # a filled cluster can, rarely, take the last rows of another
        if _fill_empty(rows, centroids, cluster, distance, identity) == 0:
            break
        cluster, distance = _assign(rows, centroids)
    return centroids, cluster, distance


def _fill_empty(
    rows: Rows,
    centroids: NDArray[np.float32],
    cluster: NDArray[np.int32],
    distance: NDArray[np.float32],
    identity: NDArray[np.uint64],
) -> int:
    """Put empty clusters' centroids, in place, on the farthest rows; return how many were."""
    counts = np.bincount(cluster, minlength=len(centroids))
    empty = np.flatnonzero(counts == 0)
    if len(empty) == 0:
        return 0
    # A row at distance 0 equals its centroid: making it one would make the same cluster twice.
    rows_left = np.flatnonzero((distance > 0) & (counts[cluster] > 1))
    order = rows_left[np.lexsort((identity[rows_left], -distance[rows_left]))]
    seen: set[bytes] = set()
    step = 4 * len(empty)
    for start in range(0, len(order), step):
        window = order[start : start + step]
        vectors = rows.read(window).cpu().numpy() + np.float32(0)  # -0 and 0 are the same number
        for row, vector in zip(window, vectors, strict=True):
            fresh = vector.tobytes() not in seen
            if fresh and counts[cluster[row]] > 1:
                seen.add(vector.tobytes())
                counts[cluster[row]] -= 1
                centroids[empty[len(seen) - 1]] = unit_centroids(vector[None])[0]
            if len(seen) == len(empty):
                return len(seen)
    return len(seen)
