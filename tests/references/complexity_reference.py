"""Abbas, Rusak et al. (2024), section 3: d_intra, d_inter and their product, by loops."""

from __future__ import annotations

import numpy as np


def complexity(cluster, cosine_distance, centroids, neighbours):
    k = len(centroids)
    unit = centroids / np.linalg.norm(centroids.astype(np.float64), axis=1, keepdims=True)
    d_intra, d_inter = np.full(k, np.nan), np.full(k, np.nan)
    filled = [j for j in range(k) if (cluster == j).any()]
    for j in filled:
        d_intra[j] = np.mean(cosine_distance[cluster == j].astype(np.float64))
        others = sorted(1 - float(unit[j] @ unit[m]) for m in filled if m != j)[:neighbours]
        d_inter[j] = np.mean(others) if others else 0.0
    return d_intra, d_inter, d_intra * d_inter
