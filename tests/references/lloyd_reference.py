"""Spherical k-means by the definition: every row looks at every centroid in every iteration."""

import numpy as np


def lengths(a):
    return np.sqrt((a * a).sum(axis=1))


def on_grid(vectors):
    """Unit vectors on the 2^-24 grid; those that rounding may have left so already stay."""
    steps = np.asarray(vectors, np.float64) * 2.0**24
    long = lengths(steps) / 2.0**24
    off = abs(long - 1) / (2.0**-25 * np.sqrt(steps.shape[1]))
    stays = (off < 1.001) & (steps == np.round(steps)).all(axis=1)
    return np.round(steps / np.where(stays, 1.0, long)[:, None]) / 2.0**24


def similarities(x, centroids):
    return x @ centroids.T / (lengths(x)[:, None] * lengths(centroids))


def assign(x, centroids):
    """The nearest centroid, the first of equals, and the distance on the 2^-23 grid."""
    s = similarities(x, centroids)
    cluster = s.argmax(axis=1)
    best = s[np.arange(len(x)), cluster]
    return cluster, np.clip(np.round((1 - best) * 2.0**23) / 2.0**23, 0, 2)


def means(x, cluster, centroids):
    """The directions of the clusters' sums; a centroid without rows stays."""
    sums = np.stack([x[cluster == j].sum(axis=0) for j in range(len(centroids))])
    return on_grid(np.where(lengths(sums)[:, None] < 1e-6, centroids, sums))


def fill(x, cluster, distance, centroids, identity):
    """Put the empty clusters' centroids on the farthest distinct rows; no cluster loses its last.

    Returns the centroids and how many were filled.
    """
    centroids = centroids.copy()
    counts = np.bincount(cluster, minlength=len(centroids))
    empty = [j for j in range(len(centroids)) if counts[j] == 0]
    filled, taken = 0, []
    for row in sorted(range(len(x)), key=lambda i: (-distance[i], identity[i])):
        fresh = not any((x[row] == other).all() for other in taken)
        if filled < len(empty) and distance[row] > 0 and counts[cluster[row]] > 1 and fresh:
            taken.append(x[row])
            counts[cluster[row]] -= 1
            centroids[empty[filled]] = on_grid(x[row : row + 1])[0]
            filled += 1
    return centroids, filled


def lloyd(x, centroids, iterations, identity):
    """The centroids, and how often they were moved."""
    x, centroids = x.astype(np.float64), centroids.astype(np.float64)
    for done in range(iterations):
        cluster, distance = assign(x, centroids)
        moved = means(x, cluster, centroids)
        moved, _ = fill(x, cluster, distance, moved, identity)
        if (moved == centroids).all():
            return centroids, done
        centroids = moved
    return centroids, iterations


def settle(x, centroids, identity):
    """The centroids without empty clusters, and each row's cluster and distance."""
    x, centroids = x.astype(np.float64), centroids.astype(np.float64)
    cluster, distance = assign(x, centroids)
    for _ in range(10):
        centroids, filled = fill(x, cluster, distance, centroids, identity)
        if filled == 0:
            break
        cluster, distance = assign(x, centroids)
    return centroids, cluster, distance
