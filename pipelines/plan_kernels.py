"""What pruning takes on this machine: its own functions, timed on a sample of the rows."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from curate import dedup, kmeans, seeding
from curate.lloyd import Lloyd, code_bytes
from curate.pool import Pool
from curate.runtime import rng
from curate.unit_rows import Rows, RowSource, full_float32, row_identity, unit_centroids
from pipelines.config import PruneConfig
from pipelines.embed_workers import EmbedWorker, EncoderSpec, forget_encoder
from pipelines.executor import LocalExecutor
from pipelines.indexing import index_pool

Clock = Callable[[], float]

# So many rows for each cluster, and k-means goes about a fit as it does for any larger number.
_FIT_ROWS_PER_CLUSTER = 256
_ASSIGNED_ROWS, _MOST_CENTROIDS = 16_384, 4_096
_ROUGH_ITERATIONS = 5
_DISK_BYTES = 128 << 20
_IMPORTS = "import polars, pyarrow.dataset, torch, pipelines.pruning, pipelines.reporting"
_PROCESS, _SYSTEM = Path("/proc/self"), Path("/proc/meminfo")


@dataclass(frozen=True)
class Line:
    """Seconds as a straight line in what they grow with.

    Examples
    --------
    >>> Line.through((10, 3.0), (20, 5.0)).at(100)
    21.0
    """

    fixed: float
    slope: float

    @classmethod
    def through(cls, a: tuple[float, float], b: tuple[float, float]) -> Line:
        """Return the line through two points; one alone, or falling ones, mean in proportion."""
        (x, low), (y, high) = sorted((a, b))
        slope = (high - low) / (y - x) if y > x else -1.0
        fixed = high - slope * y
        return cls(fixed, slope) if slope >= 0 and fixed >= 0 else cls(0.0, high / y)

    def at(self, x: float) -> float:
        """Return the seconds at a point."""
        return self.fixed + self.slope * x


class CountedRows:
    """Rows that count how many of them are read."""

    def __init__(self, rows: RowSource) -> None:
        self.rows, self.shape, self.read = rows, rows.shape, 0

    def __getitem__(self, chosen: Any) -> Any:
        found = self.rows[chosen]
        self.read += len(found)
        return found


def timed(work: Callable[[], object], clock: Clock) -> float:
    """Return the seconds of a piece of work."""
    start = clock()
    work()
    return clock() - start


# --- k-means ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class KMeansTimes:
    """What a fit of some `clusters` took on a sample.

    Seconds until there were first centroids (`start`), and of a row from then on (`fit`) and to
    find its centroid (`assign`, by centroids); how often a row was read (`passes`), and after how
    many `iterations` too little was gained to go on.
    """

    clusters: int
    start: float
    fit: float
    passes: float
    iterations: int
    assign: Line

    def seconds(self, rows: int, k: int) -> float:
        """Return the seconds of a fit of so many rows to `k` clusters."""
        # It starts from so many rows per cluster, each compared to every cluster.
        start = self.start * (k / self.clusters) ** 2
        return start + rows * self.fit * self.assign.at(k) / self.assign.at(self.clusters)


def sample_clusters(k: int, rows: int, sample: int) -> int:
    """Return into how many clusters a sample goes so that its fit is like that of all rows.

    Examples
    --------
    >>> sample_clusters(500, 1_000_000, 50_000), sample_clusters(500, 50_000, 25_000)
    (195, 250)
    """
    per_cluster = min(max(rows, 1) / k, _FIT_ROWS_PER_CLUSTER)
    return max(1, min(k, sample, round(sample / per_cluster)))


def time_kmeans(
    x: RowSource,
    k: int,
    rows: int,
    config: PruneConfig,
    clock: Clock = time.perf_counter,
    *,
    distances: bool = True,
) -> KMeansTimes:
    """Time k-means on a sample `x` as `curate.kmeans.fit` would go about `k` clusters of `rows`.

    And the assignment of rows to such clusters, with or without `distances`.
    """
    assign = kmeans.assign if distances else kmeans.assign_only
    counted = CountedRows(x)
    sample = Rows(counted, config.device)
    few, identity = sample_clusters(k, rows, sample.n), row_identity(None, sample.n)
    with full_float32():
        marks = [clock()]
        centroids = seeding.start(sample, few, config.seed, identity)
        marks.append(clock())
        if config.backend == "faiss":
            options: dict[str, Any] = {"iterations": config.kmeans_iterations, "init": centroids}
            fitted = kmeans.fit(counted, few, backend="faiss", device=config.device, **options)
            centroids, cluster, moves = fitted.centroids, fitted.cluster, fitted.iterations
        else:
            # The codes of many rows are not kept: a sample's are not either then.
            lloyd = Lloyd(sample, centroids, once=rows * sample.d > code_bytes(sample.device))
            limits = config.kmeans_iterations, identity, None, None, config.kmeans_tolerance
            moves = lloyd.run(*limits)
            lloyd.settle(identity)
            centroids, cluster = lloyd.centroids, lloyd.cluster
        marks.append(clock())
    start, fit = np.diff(marks).tolist()
    line = _time_assign(
        partial(assign, device=config.device), x, centroids, cluster, k=k, clock=clock
    )
    return KMeansTimes(few, start, fit / sample.n, counted.read / sample.n, max(moves, 1), line)


def _time_assign(
    assign: Callable[[RowSource, NDArray[np.float32]], Any],
    x: RowSource,
    centroids: NDArray[np.float32],
    cluster: NDArray[np.int32],
    *,
    k: int,
    clock: Clock,
) -> Line:
    """Time assignment to these centroids, and to as many as there will be."""
    some = np.unique(np.linspace(0, len(cluster) - 1, _ASSIGNED_ROWS).astype(np.int64))
    rows = np.asarray(x[some])

    def point(centers: NDArray[np.float32]) -> tuple[float, float]:
        again = [timed(lambda: assign(rows, centers), clock) for _ in "abc"]
        return len(centers), float(np.median(again)) / len(rows)

    many = min(k, _MOST_CENTROIDS)
    if many <= len(centroids):
        return Line.through(point(centroids), (0, 0.0))
    # Between a row and its centroid, as the centroids of smaller clusters are.
    near = np.linspace(0, len(some) - 1, many).astype(np.int64)
    between = rows[near].astype(np.float32) + centroids[cluster[some[near]]]
    few, more = point(centroids), point(unit_centroids(between))
    return Line.through(few, (more[0], max(few[1], more[1])))


# --- duplicates -------------------------------------------------------------------------------


def time_compare(
    x: RowSource, size: float, config: PruneConfig, clock: Clock = time.perf_counter
) -> tuple[float, float]:
    """Time the search for duplicates in clusters of a sample, of `size` rows on average.

    Returns
    -------
    seconds : float
        Of a row. The sample's clusters are as uneven as k-means makes them.
    passes : float
        How many times a row is read.
    """
    n = int(x.shape[0])
    k = max(1, min(n, round(n / size)))
    found = kmeans.fit(x, k, iterations=_ROUGH_ITERATIONS, device=config.device)
    counted, near = CountedRows(x), (found.cluster, found.cosine_distance)
    options: dict[str, Any] = {"epsilon": config.epsilon, "mode": config.dedup_mode}
    seconds = timed(
        lambda: dedup.find_duplicates(counted, *near, device=config.device, **options), clock
    )
    # All pairs of a cluster are compared, and a sample may be smaller than one cluster of the run.
    return max(1.0, size * k / n) * seconds / n, counted.read / n


# --- the encoder, the process, the disk, memory -----------------------------------------------


def time_encoder(spec: EncoderSpec, pool: Pool, folder: Path, clock: Clock) -> tuple[float, float]:
    """Return the seconds to build an encoder, and those of a row to decode and embed it."""
    forget_encoder()
    load = timed(spec.load, clock)
    index_pool(pool, folder / "index", executor=LocalExecutor())
    worker = EmbedWorker(pool, folder / "index", folder / "first", spec)
    worker(0)  # the first pass plans kernels and fills caches
    worker.out = folder / "second"
    seconds = timed(lambda: worker(0), clock) / len(pool)
    forget_encoder()
    return load, seconds


def time_start() -> float:
    """Return the seconds that a new process takes to load the modules, and to end."""
    command = [sys.executable, "-c", _IMPORTS]
    return timed(lambda: subprocess.run(command, check=True), time.perf_counter)


def time_disk(folder: Path, clock: Clock) -> float:
    """Return the bytes per second at which the disk gives back what memory no longer holds."""
    with tempfile.TemporaryFile(dir=folder) as file:
        block = rng(0, "plan disk").bytes(8 << 20)
        for _ in range(_DISK_BYTES // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        return _DISK_BYTES / max(timed(lambda: _drain(file.read), clock), 1e-9)


def _drain(read: Callable[[int], bytes]) -> None:
    while read(8 << 20):
        pass


def peak_memory(work: Callable[[], object]) -> int:
    """Do a piece of work; return the most bytes that this process held, 0 where none can tell."""
    try:
        (_PROCESS / "clear_refs").write_text("5")  # forgets the peak so far
    except OSError:  # not Linux, or not allowed
        work()
        return 0
    work()
    return _field(_PROCESS / "status", "VmHWM") or 0


def free_memory() -> int:
    """Return the bytes of memory that are free or hold nothing but copies of files."""
    available = _field(_SYSTEM, "MemAvailable")
    if available is not None:
        return available
    return int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def _field(path: Path, name: str) -> int | None:
    try:
        lines = path.read_text().splitlines()
    except OSError:  # not Linux
        return None
    return next(
        (int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":")), None
    )
