"""`curate prune` with embeddings given against FAISS and the published code, whole commands.

Writes a made-up pool (clip-retrieval's layout) and prints Markdown for RESULTS.md. The baseline
works in memory and writes nothing; ours is the command: start-up, ledger, export, report. Run on an
idle machine: ``python -m tests.benchmarks.bench_prune [rows [repeats]]``; the baseline is left out
above 2 million rows, which it would hold as float32.
"""

from __future__ import annotations

import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

DIMENSIONS, CLUSTERS, KEEP, PART_ROWS = 512, 500, 0.28, 250_000
MOST_BASELINE_ROWS = 2_000_000


def write_pool(folder: Path, rows: int) -> None:
    """Rows around 1,000 centers, a fifth of them copies of others of their part."""
    (folder / "img_emb").mkdir(parents=True)
    (folder / "metadata").mkdir()
    centers = np.random.default_rng(0).normal(size=(1000, DIMENSIONS)).astype(np.float32)
    for part, first in enumerate(range(0, rows, PART_ROWS)):
        rng = np.random.default_rng((1, part))
        n = min(PART_ROWS, rows - first)
        x = centers[rng.integers(0, len(centers), n)]
        x += 0.9 * rng.standard_normal(x.shape, dtype=np.float32)
        x[rng.integers(0, n, n // 5)] = x[rng.integers(0, n, n // 5)]
        x /= np.linalg.norm(x, axis=1, keepdims=True)
        np.save(folder / "img_emb" / f"img_emb_{part:04d}.npy", x.astype(np.float16))
        table = pa.table(
            {
                "uid": [f"{number:032x}" for number in range(first, first + n)],
                "url": [f"https://example.org/{number}.jpg" for number in range(first, first + n)],
                "caption": [f"a photograph, number {number}" for number in range(first, first + n)],
                "similarity": rng.random(n, dtype=np.float32),
            }
        )
        pq.write_table(table, folder / "metadata" / f"metadata_{part:04d}.parquet")


def baseline(folder: Path) -> int:
    """k-means by FAISS with its defaults, search, the published deduplication and complexity."""
    import faiss
    import torch

    x = np.concatenate([np.load(p) for p in sorted((folder / "img_emb").glob("*.npy"))])
    x = x.astype(np.float32)
    trainer = faiss.Kmeans(DIMENSIONS, CLUSTERS, niter=20, spherical=True, seed=0)
    trainer.train(x)
    similarity, cluster = trainer.index.search(x, 1)
    cluster, distance = cluster[:, 0], 1 - similarity[:, 0]
    kept = np.ones(len(x), dtype=bool)
    for number in range(CLUSTERS):
        members = np.flatnonzero(cluster == number)
        members = members[np.argsort(-distance[members], kind="stable")]
        rows = torch.from_numpy(x[members])
        pairs = torch.triu(rows @ rows.T, diagonal=1)
        kept[members] = (pairs.max(dim=0).values <= 0.95).numpy()
    return int(kept.sum()) - len(prune_by_complexity(trainer.centroids, cluster, distance, kept))


def prune_by_complexity(
    centroids: np.ndarray, cluster: np.ndarray, distance: np.ndarray, kept: np.ndarray
) -> np.ndarray:
    """Return rows to drop: a share of each cluster by the softmax of its complexity."""
    rows = np.flatnonzero(kept)
    counts = np.bincount(cluster[rows], minlength=CLUSTERS)
    intra = np.bincount(cluster[rows], distance[rows], CLUSTERS) / np.maximum(counts, 1)
    apart = np.sort(1 - centroids @ centroids.T, axis=1)[:, 1:21].mean(axis=1)
    complexity = np.exp(intra * apart / 0.1)
    budget = np.floor(complexity / complexity.sum() * KEEP * len(cluster)).astype(int)
    dropped = []
    for number in range(CLUSTERS):
        members = rows[cluster[rows] == number]
        dropped.append(members[np.argsort(-distance[members])][budget[number] :])
    return np.concatenate(dropped)


def run(command: list[str]) -> tuple[float, float]:
    """Return the seconds and the peak memory, in GiB, of a process."""
    start = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise SystemExit(f"{command[0]} failed with {status}")
    return time.perf_counter() - start, usage.ru_maxrss / 2**20


def main() -> None:
    if sys.argv[1:2] == ["--baseline"]:
        baseline(Path(sys.argv[2]))
        return
    rows = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    repeats = int(sys.argv[2]) if len(sys.argv) > 2 else 3
    with tempfile.TemporaryDirectory() as name:
        pool, out = Path(name) / "pool", Path(name) / "run"
        write_pool(pool, rows)
        curate = [str(Path(sys.executable).with_name("curate")), "prune"]
        curate += ["--pool", str(pool / "metadata"), "--embeddings", str(pool), "--out", str(out)]
        curate += ["--score-col", "similarity", "--clip-fraction", "1", "--keep", str(KEEP)]
        curate += ["--clusters", str(CLUSTERS), "--allow-fewer"]
        theirs = [sys.executable, __file__, "--baseline", str(pool)]
        ours, baselines = [], []
        for _ in range(repeats):
            shutil.rmtree(out, ignore_errors=True)
            ours.append(run(curate))
            if rows <= MOST_BASELINE_ROWS:
                baselines.append(run(theirs))
    versions = ", ".join(f"{n} {version(n)}" for n in ("torch", "faiss-cpu", "numpy"))
    sys.stdout.write(
        f"{rows:,} x {DIMENSIONS} float16, k={CLUSTERS}, {os.cpu_count()} cores, "
        f"{platform.machine()}, {versions}; median of {repeats}\n\n"
        "| what | time | spread | peak memory |\n|---|---|---|---|\n"
    )
    for what, runs in (("`curate prune`", ours), ("FAISS, published code", baselines)):
        if runs:
            seconds = sorted(s for s, _ in runs)
            sys.stdout.write(
                f"| {what} | {statistics.median(seconds):.1f} s "
                f"| {seconds[0]:.1f}-{seconds[-1]:.1f} | {max(m for _, m in runs):.1f} GiB |\n"
            )
    if baselines:
        ratios = sorted(b[0] / a[0] for a, b in zip(ours, baselines, strict=True))
        sys.stdout.write(
            f"\nratio {statistics.median(ratios):.2f}x ({ratios[0]:.2f}-{ratios[-1]:.2f})\n"
        )


if __name__ == "__main__":
    main()
