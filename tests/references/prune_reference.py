"""Pruning by complexity as the paper describes it, with a solver and plain sorting."""

from __future__ import annotations

import numpy as np
from scipy.special import softmax

from tests.references.allocation_reference import largest_remainder, project
from tests.references.complexity_reference import complexity


def prune(cluster, cosine_distance, centroids, budget, temperature, neighbours, which="hard"):
    """Keep `budget` rows, at least one per cluster; every cluster has a row, no distances tie."""
    sizes = np.bincount(cluster, minlength=len(centroids))
    _, _, c = complexity(cluster, cosine_distance, centroids, neighbours)
    x = project(budget * softmax(c / temperature), np.minimum(1, sizes), sizes, budget)
    kept = np.zeros(len(cluster), dtype=bool)
    for j, amount in enumerate(largest_remainder(x, sizes)):
        members = np.flatnonzero(cluster == j)
        order = members[np.argsort(cosine_distance[members])]
        kept[order[len(order) - amount :] if which == "hard" else order[:amount]] = True
    return kept
