"""The steps of `curate prune` on a pool: rows, bytes, memory and time, from what was measured.

Sizes come from where `curate prune` has them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from curate.codes import product_type
from curate.embeddings import Embeddings
from curate.lloyd import CODE_BYTES
from curate.pool import Pool
from curate.runtime import resolve_device
from curate.sharded_rows import MOST_MAPPED
from pipelines import stages
from pipelines.embed_workers import EncoderSpec
from pipelines.plan_config import PlanConfig
from pipelines.plan_kernels import KMeansTimes
from pipelines.plan_sample import SampleRun
from pipelines.source import Source

_FIRST = ("start", "index", "embed", "score")
_ORDER = (*_FIRST, "dedup", "cluster", "choose", "ledger", "export", "report")


@dataclass(frozen=True)
class Workload:
    """The sizes of a run.

    Rows of the pool, those `usable` with an embedding and those `left` for concept clusters;
    clusters as `curate prune` chooses them, those of dedup (0 without) from `fit_rows` rows; bytes
    of the pool's files, and of what is read to embed and to score; GPUs that embed; kind of device.
    """

    rows: int
    usable: int
    left: int
    dimensions: int
    dedup_clusters: int
    fit_rows: int
    clusters: int
    pool_bytes: int
    source_bytes: int
    score_bytes: int
    gpus: int = 0
    device: str = "cpu"

    @property
    def pass_bytes(self) -> int:
        """Bytes of all embeddings: float16."""
        return 2 * self.rows * self.dimensions


@dataclass(frozen=True)
class Rates:
    """What was measured beside the small run.

    Seconds to load the modules, and the encoder if there is one (`load_encoder`, and `encode` a
    row); k-means for concept clusters and for dedup, and as `compare` what `time_compare` found;
    bytes per second that come from the disk and not from memory.
    """

    start_up: float
    cluster: KMeansTimes
    disk_read: float
    dedup: KMeansTimes | None = None
    compare: tuple[float, float] | None = None
    load_encoder: float = 0.0
    encode: float = 0.0


@dataclass(frozen=True)
class Step:
    """One step of the run; bytes in all, memory at its peak."""

    step: str
    rows: int
    read_bytes: int
    written_bytes: int
    memory_bytes: int
    seconds: float


def workload(config: PlanConfig, pool: Pool, run: SampleRun, source: Source) -> Workload:
    """Return the sizes of the run, by the functions that `curate prune` takes them from."""
    rows = config.rows or len(pool)
    scale = rows / run.rows
    usable = round(run.left["decode"] * scale)
    left = round(run.left.get("clip_score", run.left.get("dedup", run.left["decode"])) * scale)
    duplicates = 0 if config.dedup_mode == "none" else stages.dedup_clusters(config, usable)
    dimensions = run.embeddings.shape[1]
    pool_bytes = round(pool.nbytes * rows / len(pool))
    one_side = 2 * rows * dimensions
    captions = run.has_text and config.score_col is None
    given = 0 if isinstance(source, Embeddings) else one_side * (1 + run.has_text)
    return Workload(
        rows=rows,
        usable=usable,
        left=left,
        dimensions=dimensions,
        dedup_clusters=duplicates,
        fit_rows=min(usable, stages.dedup_fit_rows(duplicates)),
        clusters=stages.prune_clusters_count(config, left),
        pool_bytes=pool_bytes,
        source_bytes=pool_bytes if isinstance(source, EncoderSpec) else given,
        score_bytes=2 * one_side if captions else 4 * rows,
        gpus=config.gpus,
        device=resolve_device(config.device).type,
    )


@dataclass(frozen=True)
class Part:
    """A step before it is reckoned up: bytes read, memory by pool row and beside that, seconds.

    `line` is the step of the small run whose time, by its rows, comes on top, and whose files are
    written; `embeddings` says that those are read, which may be in memory from the step before.
    """

    step: str
    rows: int
    read_bytes: float = 0.0
    row_bytes: float = 0.0
    line: str = ""
    seconds: float = 0.0
    held: float = 0.0
    embeddings: bool = False


def predict(work: Workload, rates: Rates, run: SampleRun, memory: int) -> tuple[Step, ...]:
    """Return the steps of a run, where `memory` bytes are there for it and for copies of files."""
    # What files do not fit in memory is read from the disk in every pass.
    cold = 0.0 if work.pass_bytes < memory else 1 / rates.disk_read
    steps = []
    for part in (*_ends(work, rates, run), *_clustered(work, rates, run)):
        seconds = part.seconds + cold * part.read_bytes * part.embeddings
        if part.line in run.seconds:
            seconds += run.seconds[part.line].at(work.rows)
        written = run.written.get(part.line, 0) * work.rows / run.rows
        peak = run.memory_bytes + part.row_bytes * (work.rows - run.rows) + part.held
        if part.embeddings:
            peak += max(0, _mapped(work.rows, work) - _mapped(run.rows, work))
        sizes = round(part.read_bytes), round(written), round(peak)
        steps.append(Step(part.step, part.rows, *sizes, seconds))
    return tuple(sorted(steps, key=lambda step: _ORDER.index(step.step.split()[0])))


def _ends(work: Workload, rates: Rates, run: SampleRun) -> Iterator[Part]:
    """Yield the steps whose time goes with the rows."""
    uid, n = run.uid_bytes + 4, work.rows
    yield Part("start", 0, seconds=rates.start_up + run.warm_up)
    # The uids are held as they were read, joined for the check that they are unique, hashed there.
    yield Part("index", n, min(n * uid, work.pool_bytes), 4 * uid + 40, "index")
    if rates.encode:
        seconds = rates.load_encoder + rates.encode * n / max(1, work.gpus)
        yield Part("embed", n, work.source_bytes, uid + 12, "embed", seconds)
    else:
        yield Part("embed", n, work.source_bytes, uid + 12, "embed", embeddings=True)
    if run.has_scores:
        yield Part("score", n, work.score_bytes, uid + 16, "score", embeddings=True)
    # Ranks, keys, the order of a sort, and each row's fate, score, cluster and distance.
    sorts = run.seconds["choose"].at(n) * math.log2(max(n, 2)) / math.log2(max(run.rows, 2))
    yield Part("choose", n, 0, uid + 90, seconds=sorts)
    yield Part("ledger", n, 0, 2 * uid + 190, "ledger")
    yield Part("export", n, work.pool_bytes, uid + 60, "export")
    yield Part("report", n, run.written["ledger"] * n / run.rows, uid + 60, "report")


def _clustered(work: Workload, rates: Rates, run: SampleRun) -> Iterator[Part]:
    """Yield the steps that compare rows: duplicates, then the concept clusters."""
    uid, row = run.uid_bytes + 4, 2 * work.dimensions

    def fit(step: str, rows: int, k: int, times: KMeansTimes, row_bytes: float) -> Part:
        read, codes = (
            times.passes * rows * row,
            _code_bytes(rows, work) - _code_bytes(run.rows, work),
        )
        seconds = times.seconds(rows, k)
        line = "cluster" if step == "cluster fit" else ""
        return Part(step, rows, read, row_bytes, line, seconds, max(codes, 0), embeddings=True)

    if rates.dedup and rates.compare:
        k, n, held = work.dedup_clusters, work.usable, uid + 60
        yield fit("dedup fit", work.fit_rows, k, rates.dedup, held)
        if work.fit_rows < n:
            seconds = n * rates.dedup.assign.at(k)
            yield Part("dedup assign", n, n * row, held, "", seconds, embeddings=True)
        seconds, passes = rates.compare
        read, seconds = passes * n * row, n * seconds
        yield Part("dedup compare", n, read, 2 * uid + 120, "dedup", seconds, embeddings=True)
    yield fit("cluster fit", work.left, work.clusters, rates.cluster, uid + 80)


def _mapped(rows: int, work: Workload) -> int:
    """Return the memory of embeddings that are mapped: those of small pools."""
    size = 2 * rows * work.dimensions
    return size if size <= MOST_MAPPED else 0


def _code_bytes(rows: int, work: Workload) -> int:
    """Return the memory of the rows' codes, which k-means keeps where they are not too many."""
    kept = product_type(work.device) == "int8" and rows * work.dimensions <= CODE_BYTES
    return rows * (work.dimensions + 8) if kept else 0
