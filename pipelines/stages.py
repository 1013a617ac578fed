"""The steps of pruning between the embeddings and the ledger; each a folder that can be resumed.

Arrays here have one entry per pool row, in pool order. What is written is cut into the pool's
shards again.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from curate import dedup, kmeans
from curate.embeddings import Embeddings
from curate.manifest import StepFolder, open_step
from curate.progress import task
from curate.shards import missing_parts, read_array, write_array
from curate.unit_rows import mixed_keys
from pipelines.config import PruneConfig
from pipelines.pool_rows import PoolRows, floats, nullable, row_set_fingerprint

logger = logging.getLogger(__name__)

_PAIRS_EXACTLY = 20_000
_SECONDS_BETWEEN_CHECKPOINTS = 30.0  # of k-means, which can run for hours
# The clusters of the dedup step only bring near-copies together: centroids from a sample do that
# as well as those from all rows. (The concept clusters that rows are pruned by use every row.)
_FIT_ROWS, _FIT_ROWS_PER_CLUSTER = 50_000, 256


# --- duplicates -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Duplicates:
    """For every row its duplicate, if it is one, and the evidence.

    Attributes
    ----------
    duplicate_of : (n,) int64
        Pool row that stands for this one; -1 if it is no duplicate.
    """

    step: StepFolder
    duplicate_of: NDArray[np.int64]


def dedup_clusters(config: PruneConfig, rows: int) -> int:
    """Return the number of clusters inside which duplicates are sought."""
    if config.dedup_clusters != "auto":
        return min(int(config.dedup_clusters), max(rows, 1))
    return 1 if rows <= _PAIRS_EXACTLY else round(math.sqrt(rows / 4))


def dedup_fit_rows(clusters: int) -> int:
    """Return from how many rows, where there are more, the centroids of that many clusters come."""
    return max(_FIT_ROWS, _FIT_ROWS_PER_CLUSTER * clusters)


def dedup_step(
    rows: PoolRows,
    embeddings: Embeddings,
    embed: StepFolder,
    folder: Path,
    *,
    alive: NDArray[np.bool_],
    score: NDArray[np.float32] | None,
    score_fingerprint: str,
    config: PruneConfig,
) -> Duplicates:
    """Find the duplicates among the rows that are alive.

    What is stored does not depend on epsilon up to 0.2 (except in the greedy mode), so that another
    one is a threshold on it.
    """
    keep = effective_dedup_keep(config, scored=score is not None)
    params: dict[str, Any] = {
        "dedup_mode": config.dedup_mode,
        "dedup_keep": keep,
        "dedup_clusters": dedup_clusters(config, int(alive.sum())),
        "kmeans_iterations": config.kmeans_iterations,
        "kmeans_tolerance": config.kmeans_tolerance,
        "backend": config.backend,
        "seed": config.seed,
    }
    if config.dedup_mode == "greedy":
        params["epsilon"] = config.epsilon
    else:
        params["least_similarity"] = _least_similarity(config)
    inputs = {"embeddings": embed.fingerprint, "rows": row_set_fingerprint(alive)}
    if keep == "clip-score":
        inputs["scores"] = score_fingerprint
    step = open_step(
        folder, step="dedup", step_version=3, params=params, inputs=inputs, overwrite=True
    )
    if not step.complete or missing_parts(folder, rows.parts):
        nearest, similarity = _evidence(rows, embeddings, step, alive, score, keep, config)
        there = nearest >= 0
        columns = {
            "nearest": rows.uids.take(pa.array(nearest, mask=~there)),
            "nearest_row": nullable(nearest, there, pa.int64()),
            "cosine_similarity": nullable(similarity, np.isfinite(similarity), pa.float32()),
        }
        rows.write(folder, columns)
        step.finish(rows=len(rows), parts=rows.parts)
    table = rows.read(folder, ["nearest_row", "cosine_similarity"])
    nearest = table["nearest_row"].fill_null(-1).to_numpy()
    similarity = floats(table["cosine_similarity"])
    return Duplicates(step, _threshold(nearest, similarity, config))


def _least_similarity(config: PruneConfig) -> float:
    """Return down to where evidence is looked for: so that the usual epsilons share it."""
    return min(dedup.LEAST_SIMILARITY, 1.0 - config.epsilon)


def effective_dedup_keep(config: PruneConfig, *, scored: bool) -> str:
    """Return which duplicate stays: the hardest where there is no CLIP score."""
    no_score = config.dedup_keep == "clip-score" and not scored
    return "hard" if no_score else config.dedup_keep


def ranks_by_distance(keep: str) -> bool:
    """Return whether which duplicate stays depends on the distances to the centroids."""
    return keep in ("hard", "easy")


def _evidence(
    rows: PoolRows,
    embeddings: Embeddings,
    step: StepFolder,
    alive: NDArray[np.bool_],
    score: NDArray[np.float32] | None,
    keep: str,
    config: PruneConfig,
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    k = dedup_clusters(config, int(alive.sum()))
    clustered = cluster_rows(
        rows,
        embeddings,
        step.path,
        alive,
        k,
        config,
        label="clusters for dedup",
        note=step.record,
        fit_rows=dedup_fit_rows(k),
        distances=ranks_by_distance(keep),
    )
    priority: NDArray[np.float64] | None = None
    if keep == "clip-score" and score is not None:
        priority = score.astype(np.float64)
    elif keep == "easy":
        priority = -clustered.cosine_distance.astype(np.float64)
    elif keep == "random":
        priority = rows.random_keys(config.seed, "dedup").astype(np.float64)
    options: dict[str, Any] = {
        "mode": config.dedup_mode,
        "priority": priority,
        "keys": rows.ranks,
        "device": config.device,
    }
    x = embeddings.image
    with task("dedup", total=int(alive.sum())) as advance:
        if config.dedup_mode == "greedy":
            found = dedup.find_duplicates(
                x, clustered.cluster, clustered.cosine_distance, epsilon=config.epsilon, **options
            )
        else:
            found = dedup.duplicate_evidence(
                x,
                clustered.cluster,
                clustered.cosine_distance,
                least_similarity=_least_similarity(config),
                **options,
            )
        advance(int(alive.sum()))
    return found


def _threshold(
    nearest: NDArray[np.int64], similarity: NDArray[np.float32], config: PruneConfig
) -> NDArray[np.int64]:
    if config.dedup_mode == "greedy":
        return nearest
    return dedup.threshold_duplicates(
        nearest, similarity, epsilon=config.epsilon, mode=config.dedup_mode
    )


# --- clusters ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Clustered:
    """The cluster of every row (-1 for rows left out), its distance (NaN there), the centroids."""

    cluster: NDArray[np.int32]
    cosine_distance: NDArray[np.float32]
    centroids: NDArray[np.float32]


def cluster_rows(
    rows: PoolRows,
    embeddings: Embeddings,
    folder: Path,
    alive: NDArray[np.bool_],
    k: int,
    config: PruneConfig,
    *,
    label: str,
    note: Callable[..., None],
    fit_rows: int | None = None,
    distances: bool = True,
) -> Clustered:
    """Cluster the rows that are alive; the centroids are kept in case the rest is interrupted.

    With `fit_rows` the centroids come from that many rows, those of the smallest hashes. Without
    `distances`, which take a third of the time, they are 0.
    """
    cluster = np.full(len(rows), -1, dtype=np.int32)
    distance = np.full(len(rows), np.nan, dtype=np.float32)
    index = np.flatnonzero(alive)
    path = folder / "centroids.npy"
    if len(index) == 0:
        centroids = np.empty((0, embeddings.image.shape[1]), np.float32)
        write_array(path, centroids)
        return Clustered(cluster, distance, centroids)
    x = embeddings.image.subset(index)
    assigned = None
    if path.exists():
        centroids = read_array(path)
    else:
        sample = index
        if fit_rows is not None and fit_rows < len(index):
            keys = mixed_keys(rows.ranks[index], config.seed, label)
            sample = np.sort(index[np.argpartition(keys, fit_rows)[:fit_rows]])
        x_fit = embeddings.image.subset(sample)
        fitted = _fit(x_fit, k, rows.ranks[sample], config, folder, label, note)
        centroids = fitted.centroids
        write_array(path, centroids)
        if sample is index:
            assigned = fitted.cluster, fitted.cosine_distance
    for checkpoint in _checkpoints(folder):
        checkpoint.unlink()
    if assigned is not None:
        cluster[index], distance[index] = assigned
    elif distances:
        cluster[index], distance[index] = kmeans.assign(x, centroids, device=config.device)
    else:
        cluster[index] = kmeans.assign_only(x, centroids, device=config.device)
        distance[index] = 0.0
    return Clustered(cluster, distance, centroids)


def _fit(
    x: Any,
    k: int,
    keys: NDArray[np.uint64],
    config: PruneConfig,
    folder: Path,
    label: str,
    note: Callable[..., None],
) -> kmeans.KMeans:
    done, init = _last_checkpoint(folder)
    total, last = config.kmeans_iterations, time.monotonic()

    def save(moves: int, centroids: NDArray[np.float32]) -> None:
        nonlocal last
        due = time.monotonic() - last >= _SECONDS_BETWEEN_CHECKPOINTS
        if due and done + moves < total:  # after the last one there is nothing to go on with
            before = _checkpoints(folder)
            write_array(folder / f"iteration-{done + moves:05d}.npy", centroids)
            for path in before:
                path.unlink()
            last = time.monotonic()

    with task(label, total=total, unit="iterations", done=done) as advance:
        result = kmeans.fit(
            x,
            k,
            iterations=total - done,
            tolerance=config.kmeans_tolerance,
            seed=config.seed,
            backend=config.backend,
            device=config.device,
            keys=keys,
            init=init,
            progress=lambda moves, total: advance(1),
            checkpoint=save,
        )
    note(
        fit_rows=len(x),
        objective=result.objective,
        iterations=done + result.iterations,
        empty_clusters=result.empty_clusters,
        backend=result.backend,
        products=result.products,
    )
    return result


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob("iteration-*.npy"))


def _last_checkpoint(folder: Path) -> tuple[int, NDArray[np.float32] | None]:
    """Return how many iterations an interrupted fit had done, and its centroids."""
    paths = _checkpoints(folder)
    if not paths:
        return 0, None
    return int(paths[-1].stem.removeprefix("iteration-")), read_array(paths[-1])


def prune_clusters_count(config: PruneConfig, rows: int) -> int:
    """Return the number of concept clusters for that many rows."""
    if config.clusters != "auto":
        return min(int(config.clusters), max(rows, 1))
    return int(min(500, max(1, round(math.sqrt(rows) / 4))))


def cluster_step(
    rows: PoolRows,
    embeddings: Embeddings,
    embed: StepFolder,
    folder: Path,
    *,
    alive: NDArray[np.bool_],
    config: PruneConfig,
) -> tuple[StepFolder, Clustered]:
    """Put the rows that are left into concept clusters."""
    k = prune_clusters_count(config, int(alive.sum()))
    step = open_step(
        folder,
        step="cluster",
        step_version=3,
        params={
            "clusters": k,
            "kmeans_iterations": config.kmeans_iterations,
            "kmeans_tolerance": config.kmeans_tolerance,
            "backend": config.backend,
            "seed": config.seed,
        },
        inputs={"embeddings": embed.fingerprint, "rows": row_set_fingerprint(alive)},
        overwrite=True,
    )
    there = (folder / "centroids.npy").exists() and not missing_parts(folder, rows.parts)
    if not (step.complete and there):
        found = cluster_rows(
            rows, embeddings, folder, alive, k, config, label="cluster", note=step.record
        )
        columns = {
            "cluster": nullable(found.cluster, alive, pa.int32()),
            "cosine_distance": nullable(found.cosine_distance, alive, pa.float32()),
        }
        rows.write(folder, columns)
        step.finish(rows=len(rows), parts=rows.parts, clusters=k)
        return step, found
    table = rows.read(folder, ["cluster", "cosine_distance"])
    cluster = table["cluster"].fill_null(-1).to_numpy().astype(np.int32)
    distance = floats(table["cosine_distance"])
    return step, Clustered(cluster, distance, read_array(folder / "centroids.npy"))
