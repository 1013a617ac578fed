"""The array kernels of pruning against FAISS and the published algorithm, in one run.

Prints Markdown for RESULTS.md: the ratio of the medians of several repeats, taken in turn.
Run on an idle machine: ``python -m tests.benchmarks.bench_kernels [rows]``.
"""

from __future__ import annotations

import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path

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
    x += 0.9 * rng.standard_normal(x.shape, dtype=np.float32)
    copies = rng.integers(0, rows, rows // 5)
    x[copies] = x[rng.integers(0, rows, rows // 5)]
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    return x.astype(np.float16)


def spread_pool(rows: int, seed: int = 0) -> np.ndarray:
    """Rows without clusters, as hard as they get: a common mean, variances that fall off slowly."""
    rng = np.random.default_rng(seed)
    scale = 4 * (1 + np.arange(DIMENSIONS)) ** -0.6
    turn = np.linalg.qr(rng.normal(size=(DIMENSIONS, DIMENSIONS)))[0]
    turn = (scale[:, None] * turn).astype(np.float32)
    mean = 0.3 * rng.standard_normal(DIMENSIONS, dtype=np.float32)
    mean[7] = 6.0  # CLIP's embeddings have such a dimension
    x = np.empty((rows, DIMENSIONS), dtype=np.float16)
    for start in range(0, rows, 100_000):
        part = x[start : start + 100_000]
        wide = rng.standard_normal(part.shape, dtype=np.float32) @ turn + mean
        part[:] = wide / np.linalg.norm(wide, axis=1, keepdims=True)
    return x


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


def measure(name: str, x: np.ndarray) -> None:
    """Print a row for each kernel."""
    wide = x.astype(np.float32)
    objective = {}

    def fit_faiss() -> None:
        trainer = faiss.Kmeans(
            DIMENSIONS,
            CLUSTERS,
            niter=ITERATIONS,
            spherical=True,
            seed=0,
            max_points_per_centroid=len(x),
        )
        trainer.train(wide)
        objective["FAISS"] = float(trainer.index.search(wide, 1)[0].mean())

    def fit(label: str, **options: float) -> None:
        objective[label] = kmeans.fit(x, CLUSTERS, **options).objective

    compare(
        f"{name}: k-means, k={CLUSTERS}, {ITERATIONS} iterations over all rows; faiss.Kmeans",
        lambda: fit("ours", iterations=ITERATIONS, tolerance=0.0),
        fit_faiss,
    )
    compare(
        f"{name}: k-means, k={CLUSTERS}, our defaults; {ITERATIONS} iterations of faiss.Kmeans",
        lambda: fit("our defaults"),
        fit_faiss,
    )
    centroids = kmeans.fit(x, CLUSTERS).centroids
    index = faiss.IndexFlatIP(DIMENSIONS)
    index.add(centroids)
    compare(
        f"{name}: assignment to {CLUSTERS} centroids; faiss.IndexFlatIP.search",
        lambda: kmeans.assign_only(x, centroids),
        lambda: index.search(wide, 1),
    )
    compare(
        f"{name}: the same with exact distances",
        lambda: kmeans.assign(x, centroids),
        lambda: index.search(wide, 1),
    )
    for rows in (len(x) // 5, len(x)):
        some = x[:rows]
        cluster, distance = kmeans.assign(some, centroids)
        compare(
            f"{name}: duplicates, {CLUSTERS} clusters of {rows // CLUSTERS:,} rows; the published "
            "algorithm",
            partial(dedup.find_duplicates, some, cluster, distance),
            partial(published_dedup, some, cluster, distance),
        )
    means = ", ".join(f"{who} {value:.4f}" for who, value in objective.items())
    notes.append(f"{name}: mean cosine similarity after k-means: {means}")


def measure_many_centroids(x: np.ndarray) -> None:
    """Assign a tenth of the rows to 50,000 others."""
    some, centroids = x[: len(x) // 10], x[-50_000:].astype(np.float32)
    index = faiss.IndexFlatIP(DIMENSIONS)
    index.add(centroids)
    wide = some.astype(np.float32)
    compare(
        f"assignment of {len(some):,} rows to 50,000 centroids; faiss.IndexFlatIP.search",
        lambda: kmeans.assign_only(some, centroids),
        lambda: index.search(wide, 1),
    )


def large_cluster(rows: int) -> None:
    """Print what duplicates take where one cluster holds three tenths of the rows."""
    x = pool(rows)
    cluster = np.random.default_rng(0).integers(1, CLUSTERS, rows).astype(np.int32)
    cluster[: 3 * rows // 10] = 0
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    held = _resident("VmRSS")
    seconds = timed(lambda: dedup.find_duplicates(x, cluster, np.zeros(rows, np.float32)))
    grown = (_resident("VmHWM") - held) / 2**20
    sys.stdout.write(
        f"- {rows:,} rows, three tenths of them in one cluster: {seconds:.0f} s, {grown:.2f} GiB\n"
    )


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


notes: list[str] = []


def main() -> None:
    rows = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "faiss-cpu", "numpy"))
    sys.stdout.write(
        f"{rows:,} x {DIMENSIONS} float16, {os.cpu_count()} cores, {platform.machine()}, "
        f"{versions}, {kmeans.product_type('cpu')} products; median of {REPEATS}\n\n"
        "| what | ours | baseline | ratio | spread |\n|---|---|---|---|---|\n"
    )
    measure("clusters", pool(rows))
    measure("no clusters", spread_pool(rows))
    measure_many_centroids(pool(rows))
    sys.stdout.write("\n" + "\n".join(f"- {note}" for note in notes) + "\n")
    sys.stdout.flush()
    large_cluster(rows)


if __name__ == "__main__":
    main()
