"""Where k-means starts: k-means++ on a sample that does not depend on the order of rows."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from curate.runtime import rng
from curate.unit_rows import Rows, exact_cosine, mixed_keys, on_grid, unit_centroids

BATCH = 64


def plus_plus(rows: Rows, k: int, seed: int, identity: NDArray[np.uint64]) -> NDArray[np.float32]:
    """Return k-means++ starting centroids, drawn from max(4096, 20 k) rows.

    Each is drawn with a probability in proportion to its cosine distance, half the squared
    Euclidean distance, to the nearest one before. Draws are made in batches with the weights of
    the batch's start; keeping each with probability (weight now / weight then) makes them draws
    with the weights of now, and turns k matrix-vector products into k / batch matrix products.
    """
    generator = rng(seed, "kmeans")
    sample = rows.read(_sample(rows.n, max(4096, 20 * k), seed, identity), check=True)
    weight = np.full(len(sample), 2.0)  # the largest distance, as long as nothing is drawn
    chosen: list[int] = []
    while len(chosen) < k:
        heap = np.cumsum(weight)  # exact: weights lie on a grid
        if heap[-1] == 0:
            break
        drawn = np.searchsorted(heap, generator.random(BATCH) * heap[-1], side="right")
        drawn = np.minimum(drawn, len(sample) - 1)
        between = _sample_distance(rows, sample[drawn], sample[drawn])
        kept: list[int] = []
        for i, coin in enumerate(generator.random(BATCH)):
            now = min([weight[drawn[i]], *between[i, kept]])
            if coin * weight[drawn[i]] < now and len(chosen) + len(kept) < k:
                kept.append(i)
        to_kept = _sample_distance(rows, sample, sample[drawn[kept]])
        weight = np.minimum(weight, to_kept.min(axis=1, initial=2.0))
        chosen += drawn[kept].tolist()
    # Fewer distinct rows than clusters: copies lose every tie, stay empty, and are filled later.
    chosen += chosen[:1] * (k - len(chosen))
    return unit_centroids(sample[chosen].cpu().numpy())


def _sample(n: int, size: int, seed: int, identity: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Return the rows with the smallest hashes, in that order: the same rows in any row order."""
    hashes = mixed_keys(identity, seed, "kmeans sample")
    rows = np.arange(n) if size >= n else np.argpartition(hashes, size)[:size]
    return np.asarray(rows[np.lexsort((rows, hashes[rows]))], dtype=np.int64)


def _sample_distance(rows: Rows, a: torch.Tensor, b: torch.Tensor) -> NDArray[np.float64]:
    wide = b.double()
    step = rows.block_rows(len(b))
    parts = [
        on_grid(1.0 - exact_cosine(part.double(), wide), 0.0).cpu() for part in torch.split(a, step)
    ]
    return np.asarray(torch.cat(parts).numpy(), dtype=np.float64)
