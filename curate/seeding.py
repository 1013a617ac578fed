"""Where k-means starts: k-means++ on a sample that does not depend on the order of rows."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from curate.runtime import rng
from curate.unit_rows import Rows, lengths64, mixed_keys, on_grid, unit_centroids


def plus_plus(rows: Rows, k: int, seed: int, identity: NDArray[np.uint64]) -> NDArray[np.float32]:
    """Return k-means++ starting centroids, drawn from max(4096, 20 k) rows.

    A row is drawn with a probability in proportion to its cosine distance, half the squared
    Euclidean distance, to the nearest centroid so far. Of 2 + log k draws the one that leaves the
    smallest sum of distances is taken: the greedy variant that Arthur and Vassilvitskii (2007)
    recommend. All sums are exact, so that every device and row order gives the same centroids.
    """
    generator = rng(seed, "kmeans")
    sample = rows.read(_sample(rows.n, max(4096, 20 * k), seed, identity), check=True)
    wide = sample.double()
    lengths = lengths64(wide)
    weight = torch.full_like(lengths, 2.0)  # the largest distance: the first draw is uniform
    chosen: list[int] = []
    while len(chosen) < k:
        heap = weight.cumsum(0)
        total = float(heap[-1])
        if total == 0:
            break
        coins = torch.from_numpy(generator.random(2 + int(np.log(k))) * total)
        drawn = torch.searchsorted(heap, coins.to(heap.device), right=True).clamp(max=len(heap) - 1)
        cosine = (wide[drawn] @ wide.T) / (lengths[drawn][:, None] * lengths[None, :])
        left = torch.minimum(on_grid(1.0 - cosine, 0.0), weight)
        best = int(left.sum(dim=1).argmin())
        weight = left[best]
        chosen.append(int(drawn[best]))
    # Fewer distinct rows than clusters: copies lose every tie, stay empty, and are filled later.
    chosen += chosen[:1] * (k - len(chosen))
    return unit_centroids(sample[chosen].cpu().numpy())


def _sample(n: int, size: int, seed: int, identity: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Return the rows with the smallest hashes, in that order: the same rows in any row order."""
    hashes = mixed_keys(identity, seed, "kmeans sample")
    rows = np.arange(n) if size >= n else np.argpartition(hashes, size)[:size]
    return np.asarray(rows[np.lexsort((rows, hashes[rows]))], dtype=np.int64)
