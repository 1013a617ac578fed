"""Image-text pools and their row-aligned companions: embeddings, clusters, selections.

Names are loaded when they are used: the array kernels (`curate.kmeans`, `dedup`, `complexity`,
`prune`) need only NumPy and torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from curate import complexity, dedup, errors, images, kmeans, prune, scores
    from curate.clusters import Clusters
    from curate.embeddings import Embeddings
    from curate.pool import Pool
    from curate.selection import Selection

__all__ = [
    "Clusters",
    "Embeddings",
    "Pool",
    "Selection",
    "complexity",
    "dedup",
    "errors",
    "images",
    "kmeans",
    "prune",
    "scores",
]

_HOMES = {
    "Clusters": "curate.clusters",
    "Embeddings": "curate.embeddings",
    "Pool": "curate.pool",
    "Selection": "curate.selection",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    if name in __all__:
        return import_module(f"curate.{name}")
    raise AttributeError(f"module 'curate' has no attribute {name!r}")
