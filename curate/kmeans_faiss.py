"""The FAISS backend of k-means; FAISS itself, an extra, is imported when it is asked for."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from curate.unit_rows import Rows, unit_centroids


def fit_faiss(
    rows: Rows,
    centroids: NDArray[np.float32],
    iterations: int,
    seed: int,
    identity: NDArray[np.uint64],
) -> tuple[NDArray[np.float32], int]:
    """Return the centroids of `faiss.Kmeans` from these starting ones, and the iterations.

    All rows are trained on, in the order of their keys, held in memory as float32.

    Raises
    ------
    ImportError
        If FAISS is not installed.
    """
    try:
        import faiss
    except ImportError as error:
        raise ImportError(
            "backend='faiss' needs FAISS, which is not installed; run "
            "pip install 'curate-distill[cpu]', or use backend='torch'"
        ) from error
    order = np.argsort(identity, kind="stable")
    data = np.empty((rows.n, rows.d), dtype=np.float32)
    step = rows.block_rows(0)
    for start in range(0, rows.n, step):
        data[start : start + step] = rows.read(order[start : start + step], check=True).cpu()
    trainer = faiss.Kmeans(
        rows.d,
        len(centroids),
        niter=iterations,
        seed=seed % 2**31,
        spherical=True,
        gpu=rows.device.type == "cuda" and faiss.get_num_gpus() > 0,
        # The defaults, 39 and 256, warn about small data and silently train on a sample.
        min_points_per_centroid=1,
        max_points_per_centroid=min(rows.n, 2**31 - 1),
    )
    trainer.train(data, init_centroids=centroids)
    return unit_centroids(np.asarray(trainer.centroids)), iterations
