"""The array kernels of pruning against FAISS and the published algorithm, in one run.

Prints Markdown for RESULTS.md: the ratio of the medians of several repeats, taken in turn.
Run on an idle machine: ``python tests/benchmarks/bench_kernels.py [rows]``.
"""

from __future__ import annotations

import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import faiss
import numpy as np
import torch

from curate import dedup, kmeans

DIMENSIONS, CLUSTERS, ITERATIONS, REPEATS = 512, 500, 10, 3


def pool(rows: int, seed: int = 0) -> np.ndarray:
    """Rows around 1,000 centers; a fifth are copies of others."""
    rng = np.random.default_rng(seed)
    centers = rng.normal(size=(1000, DIMENSIONS)).astype(np.float32)
    x = centers[rng.integers(0, 1000, rows)]
    x += 0.9 * rng.normal(size=x.shape).astype(np.float32)
    copies = rng.integers(0, rows, rows // 5)
    x[copies] = x[rng.integers(0, rows, rows // 5)]
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    return x.astype(np.float16)


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def compare(name: str, ours: Callable[[], object], baseline: Callable[[], object]) -> None:
    pairs = [(timed(ours), timed(baseline)) for _ in range(REPEATS)]
    mine, theirs = (statistics.median(times) for times in zip(*pairs, strict=True))
    ratios = sorted(b / a for a, b in pairs)
    row = f"| {name} | {mine:.1f} s | {theirs:.1f} s | {theirs / mine:.2f}x "
    sys.stdout.write(f"{row}| {ratios[0]:.2f}-{ratios[-1]:.2f} |\n")
    sys.stdout.flush()


def published_dedup(x: np.ndarray, cluster: np.ndarray, distance: np.ndarray) -> int:
    """Each cluster's whole float32 similarity matrix, its upper triangle, the column maxima."""
    removed = 0
    for number in np.unique(cluster):
        members = np.flatnonzero(cluster == number)
        members = members[np.argsort(-distance[members], kind="stable")]
        rows = torch.from_numpy(x[members].astype(np.float32))
        similarity = torch.triu(rows @ rows.T, diagonal=1)
        removed += int((similarity.max(dim=0).values > 0.95).sum())
    return removed


def main() -> None:
    rows = int(sys.argv[1]) if len(sys.argv) > 1 else 200_000
    x = pool(rows)
    wide = x.astype(np.float32)
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "faiss-cpu", "numpy"))
    sys.stdout.write(
        f"{rows:,} x {DIMENSIONS} float16, {os.cpu_count()} cores, {platform.machine()}, "
        f"{versions}; median of {REPEATS}\n\n"
        "| what | ours | baseline | ratio | spread |\n|---|---|---|---|---|\n"
    )

    def fit_faiss() -> None:
        faiss.Kmeans(
            DIMENSIONS,
            CLUSTERS,
            niter=ITERATIONS,
            spherical=True,
            seed=0,
            max_points_per_centroid=rows,
        ).train(wide)

    compare(
        f"k-means, k={CLUSTERS}, {ITERATIONS} iterations over all rows; faiss.Kmeans",
        lambda: kmeans.fit(x, CLUSTERS, iterations=ITERATIONS),
        fit_faiss,
    )
    centroids = kmeans.fit(x, CLUSTERS, iterations=3).centroids
    index = faiss.IndexFlatIP(DIMENSIONS)
    index.add(centroids)
    compare(
        f"assignment to {CLUSTERS} centroids; faiss.IndexFlatIP.search",
        lambda: kmeans.assign(x, centroids),
        lambda: index.search(wide, 1),
    )
    cluster, distance = kmeans.assign(x, centroids)
    compare(
        f"duplicates in {CLUSTERS} clusters, max-earlier; the published algorithm",
        lambda: dedup.find_duplicates(x, cluster, distance),
        lambda: published_dedup(x, cluster, distance),
    )


if __name__ == "__main__":
    main()
