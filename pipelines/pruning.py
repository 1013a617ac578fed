"""`curate prune`: from a pool to a smaller pool of exactly the size asked for.

decode and embed -> drop duplicates -> drop the lowest CLIP scores -> prune by the complexity of
concept clusters -> write the ledger, the kept rows and the report.
"""

from __future__ import annotations

import logging
import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from curate.embeddings import Embeddings
from curate.errors import BudgetError, FailedRowsError, PoolError
from curate.manifest import StepFolder, atomic_path, locked, open_step
from curate.pool import Pool
from curate.prune import PRESETS, Pruning, prune_clusters
from curate.scores import best_scores
from curate.selection import LEDGER, Selection
from curate.shards import missing_parts, write_parquet, write_part
from pipelines import stages
from pipelines.config import (
    ModelConfig,
    PoolConfig,
    PruneConfig,
    RunConfig,
    default_out,
    with_paths,
)
from pipelines.embedding import embed_pool
from pipelines.executor import Executor, make_executor
from pipelines.exporting import export_pool
from pipelines.indexing import index_pool, read_uids
from pipelines.source import (
    describe_source,
    open_pool,
    pool_path,
    resolve_source,
    source_fingerprint,
)
from pipelines.stages import Clustered, Duplicates, PoolRows

logger = logging.getLogger(__name__)

# They say where the rows come from and how the run goes, not what comes out.
_NOT_RESULT = {
    field.name for base in (PoolConfig, ModelConfig, RunConfig) for field in fields(base)
} - {"seed"}


def prune(pool: str | Path | Pool, *, keep: float, **options: Any) -> Selection:
    """Prune a pool to exactly ``floor(keep * rows + 0.5)`` rows.

    Parameters
    ----------
    pool : str, Path or Pool
        What `curate.Pool.open` takes, or a pool that is open.
    keep : float
        Kept fraction of the pool's rows, in (0, 1].
    **options
        The fields of `pipelines.config.PruneConfig`, which are the flags of ``curate prune``:
        out, model, pretrained, embeddings, epsilon, clusters, temperature, which, seed, ...

    Returns
    -------
    curate.Selection
        The ledger; ``path`` is the run's folder, ``path / "pool"`` holds the kept rows.

    Raises
    ------
    PoolError
        If the pool cannot be opened or has nothing to work on.
    FingerprintError
        If the output folder holds the result of other parameters and ``overwrite`` is off.
    BudgetError
        If fewer rows survive the earlier stages than must be kept, and ``allow_fewer`` is off.
    """
    opened = pool if isinstance(pool, Pool) else None
    name = pool_path(pool) if isinstance(pool, Pool) else str(pool)
    return run_prune(PruneConfig(pool=name, keep=keep, **with_paths(options)), opened)


def run_prune(config: PruneConfig, opened: Pool | None = None) -> Selection:
    """Prune as the configuration says; see `prune`."""
    pool = opened or open_pool(config)
    source = resolve_source(pool, config)
    out = config.out or default_out(config.pool, "pruned")
    with locked(out):
        run = open_step(
            out,
            step="prune",
            step_version=1,
            params=result_params(config),
            inputs={"pool": pool.fingerprint(), "embeddings": source_fingerprint(source)},
            overwrite=config.overwrite,
            keep_content=True,
        )
        if not (run.complete and _whole(run)):
            executor = make_executor(config.executor, config.workers, config.device)
            _Prune(config, pool, source, run, executor).run()
        else:
            logger.info("%s is complete already; nothing to do", out)
    return Selection.open(out)


def _whole(run: StepFolder) -> bool:
    """Return whether what a complete run has written is still there."""
    parts = int(run.manifest["parts"])
    gone = missing_parts(run.path / "pool", parts) + missing_parts(run.path / "selection", parts)
    return not gone and (run.path / "report.html").exists()


def result_params(config: PruneConfig) -> dict[str, Any]:
    """Return the parameters that decide the result, presets resolved."""
    params = {k: v for k, v in asdict(config).items() if k not in _NOT_RESULT}
    return params | prune_options(config) | {"score_col": config.score_col}


def prune_options(config: PruneConfig) -> dict[str, Any]:
    """Return temperature, neighbours and lower bound: the preset's unless given."""
    given = {k: getattr(config, k) for k in ("temperature", "neighbours", "lower", "lower_ratio")}
    given = {k: v for k, v in given.items() if v is not None}
    preset = dict(PRESETS[config.preset])
    if "lower" in given:
        preset.pop("lower_ratio", None)
    return {"lower": 0, "lower_ratio": None} | preset | given


def check_failed(selection: Selection, max_failed: float) -> None:
    """Check how many rows could not be used; the result is written in any case.

    Raises
    ------
    FailedRowsError
        If their share is above `max_failed`.
    """
    failed = sum(selection.counts.get(reason, 0) for reason in ("decode_failed", "bad_embedding"))
    if failed > max_failed * len(selection):
        raise FailedRowsError(
            f"{failed:,} of {len(selection):,} rows could not be decoded or embedded, more than "
            f"--max-failed {max_failed} allows; the ledger's column detail says why. The result "
            "is written"
        )


def exact_budget(keep: float, rows: int) -> int:
    """Return floor(keep * rows + 0.5).

    Examples
    --------
    >>> exact_budget(0.28, 12000), exact_budget(0.5, 3), exact_budget(1.0, 7)
    (3360, 2, 7)
    """
    return math.floor(keep * rows + 0.5)


@dataclass
class _Fates:
    """What has become of each row so far."""

    reason: NDArray[np.object_]
    alive: NDArray[np.bool_]
    stages: list[dict[str, Any]] = field(default_factory=list)

    def drop(self, stage: str, causes: dict[str, NDArray[np.bool_]]) -> None:
        """Drop rows for a cause each, and keep the account."""
        before = int(self.alive.sum())
        dropped = {}
        for reason, rows in causes.items():
            rows = rows & self.alive
            self.reason[rows] = reason
            self.alive[rows] = False
            dropped[reason] = int(rows.sum())
        after = int(self.alive.sum())
        self.stages.append(
            {"stage": stage, "rows_in": before, "dropped": dropped, "rows_out": after}
        )

    def counts(self) -> dict[str, int]:
        names, counts = np.unique(self.reason.astype(str), return_counts=True)
        pairs = zip(names.tolist(), counts.tolist(), strict=True)
        return dict(sorted(pairs, key=lambda pair: (-pair[1], pair[0])))


class _Prune:
    """One run; the methods are its stages, in their order."""

    def __init__(
        self, config: PruneConfig, pool: Pool, source: Any, run: StepFolder, executor: Executor
    ) -> None:
        self.config, self.pool, self.source = config, pool, source
        self.folder, self.step, self.executor = run.path, run, executor
        self.asked = exact_budget(config.keep, len(pool))
        self.budget = self.asked
        self.warnings: list[str] = []

    def run(self) -> None:
        """Run what is not there yet."""
        rows, embed, embeddings = self.embed()
        metadata = embeddings.metadata(["status", "detail"])
        fates = _Fates(np.full(len(rows), "", dtype=object), np.ones(len(rows), dtype=bool))
        fates.drop("decode", _by_status(metadata["status"]))
        self.require(fates, "could be embedded")
        score, score_fingerprint = self.score(rows, embeddings, embed)
        duplicates = self.dedup(rows, embeddings, embed, fates, score, score_fingerprint)
        self.cut_scores(rows, fates, score)
        clusters, found = stages.cluster_step(
            rows, embeddings, embed, self.folder / "clusters", alive=fates.alive, config=self.config
        )
        pruning = self.choose(rows, found, fates)
        selection = self.write_ledger(
            rows, metadata["detail"], fates, found, pruning, score, duplicates, clusters
        )
        self.finish(rows, fates, selection, found)

    def embed(self) -> tuple[PoolRows, StepFolder, Embeddings]:
        """Find the uids and the embeddings of all rows."""
        index = self.folder / "index"
        index_pool(self.pool, index, executor=self.executor, overwrite=True)
        uids = read_uids(self.pool, index)
        if isinstance(self.source, Embeddings):
            step, embeddings = check_embeddings(self.source, uids), self.source
        else:
            step, embeddings = embed_pool(
                self.pool,
                self.folder / "embeddings",
                index=index,
                source=self.source,
                executor=self.executor,
                overwrite=True,
            )
        return PoolRows(self.pool, uids), step, embeddings

    def score(
        self, rows: PoolRows, embeddings: Embeddings, embed: StepFolder
    ) -> tuple[NDArray[np.float32] | None, str]:
        """Score the pairs, where there is something to score them by."""
        source = stages.score_source(self.pool, embeddings, self.config)
        if source is None:
            self.check_scores_not_needed()
            return None, ""
        step, score = stages.score_step(rows, embeddings, embed, self.folder / "scores", source)
        if np.isnan(score).all():
            self.check_scores_not_needed()
            return None, ""
        return score, step.fingerprint

    def check_scores_not_needed(self) -> None:
        """Refuse a request that needs scores; warn where only the default does."""
        config = self.config
        if config.min_clip_score is not None or config.clip_fraction not in ("auto", 1):
            raise PoolError(
                "--clip-fraction and --min-clip-score need CLIP scores, and this pool has neither "
                "caption embeddings nor a score column: name one with --score-col, or embed with "
                "a model that has a text tower"
            )
        if config.which == "hard":
            self.warn(
                "no CLIP scores (no caption embeddings, no score column): hardest-first without a "
                "quality stage favours junk; pass --score-col, captions, or --which easy"
            )

    def warn(self, message: str) -> None:
        """Say it now and in the manifest."""
        logger.warning("%s", message)
        self.warnings.append(message)

    def dedup(
        self,
        rows: PoolRows,
        embeddings: Embeddings,
        embed: StepFolder,
        fates: _Fates,
        score: NDArray[np.float32] | None,
        score_fingerprint: str,
    ) -> Duplicates | None:
        """Drop the duplicates."""
        if self.config.dedup_mode == "none":
            return None
        found = stages.dedup_step(
            rows,
            embeddings,
            embed,
            self.folder / "duplicates",
            alive=fates.alive,
            score=score,
            score_fingerprint=score_fingerprint,
            config=self.config,
        )
        fates.drop("dedup", {"duplicate": found.duplicate_of >= 0})
        self.require(fates, "are left without duplicates")
        return found

    def cut_scores(self, rows: PoolRows, fates: _Fates, score: NDArray[np.float32] | None) -> None:
        """Drop the lowest CLIP scores, never below the budget."""
        if score is None:
            return
        missing = np.isnan(score)
        low = np.zeros(len(rows), dtype=bool)
        if self.config.min_clip_score is not None:
            low = missing | (score < np.float32(self.config.min_clip_score))
        survivors = np.flatnonzero(fates.alive & ~low)
        count = len(survivors)
        fraction = clip_fraction(self.config)
        if fraction < 1:
            count = min(count, max(self.budget, exact_budget(fraction, count)))
            best = best_scores(score[survivors], count, keys=rows.ranks[survivors])
            low[survivors[~best]] = True
        fates.drop("clip_score", {"no_clip_score": low & missing, "low_clip_score": low})
        self.require(fates, "are left above the lowest CLIP score")

    def require(self, fates: _Fates, what: str) -> None:
        """Check that enough rows are left for the budget."""
        left = int(fates.alive.sum())
        if left >= self.budget:
            return
        dropped = ", ".join(
            f"{count:,} {reason}"
            for stage in fates.stages
            for reason, count in stage["dropped"].items()
            if count
        )
        counts = (
            f"keep={self.config.keep} of {len(self.pool):,} rows is {self.asked:,}, but only "
            f"{left:,} {what} ({dropped})"
        )
        if not self.config.allow_fewer:
            raise BudgetError(
                f"{counts}. Lower --keep or --epsilon, or pass --allow-fewer to keep what there is"
            )
        self.warn(counts)
        self.budget = left

    def choose(self, rows: PoolRows, found: Clustered, fates: _Fates) -> Pruning | None:
        """Choose the rows to keep among those that are left."""
        kept = np.zeros(len(rows), dtype=bool)
        pruning = None
        if fates.alive.any():
            at_random = self.config.which == "random"
            pruning = prune_clusters(
                found.cluster,
                found.cosine_distance,
                found.centroids,
                self.budget,
                which=self.config.which,
                allocation=self.config.allocation,
                keys=rows.random_keys(0, "row") if at_random else rows.ranks,
                seed=self.config.seed,
                **prune_options(self.config),
            )
            kept = pruning.kept
        fates.drop("prune", {"over_budget": ~kept})
        fates.reason[fates.alive] = "kept"
        return pruning

    def write_ledger(
        self,
        rows: PoolRows,
        detail: pa.ChunkedArray,
        fates: _Fates,
        found: Clustered,
        pruning: Pruning | None,
        score: NDArray[np.float32] | None,
        duplicates: Duplicates | None,
        clusters: StepFolder,
    ) -> StepFolder:
        """Write one row per pool row: its fate and the evidence for it."""
        folder = self.folder / "selection"
        inputs = {
            "clusters": clusters.fingerprint,
            "kept": stages.row_set_fingerprint(fates.alive),
            "duplicates": "" if duplicates is None else duplicates.step.fingerprint,
            "run": self.step.fingerprint,
        }
        step = open_step(
            folder, step="select", step_version=1, params={}, inputs=inputs, overwrite=True
        )
        if step.complete and not missing_parts(folder, rows.parts):
            return step
        if pruning is not None:
            _write_summary(self.folder / "clusters" / "summary.parquet", found, pruning)
        none = np.full(len(rows), np.nan, dtype=np.float32)
        columns = _Ledger(
            rows=rows,
            reason=fates.reason,
            detail=detail,
            found=found,
            rank=np.full(len(rows), -1, np.int32) if pruning is None else pruning.rank,
            score=none if score is None else score,
            duplicate_of=None if duplicates is None else duplicates.duplicate_of,
        )
        for shard in missing_parts(folder, rows.parts):
            write_part(folder, shard, columns.shard(shard))
        step.finish(rows=len(rows), parts=rows.parts, counts=fates.counts())
        return step

    def finish(
        self, rows: PoolRows, fates: _Fates, selection: StepFolder, found: Clustered
    ) -> None:
        """Write the kept rows, the manifest and the report."""
        from pipelines.reporting import write_report

        counts = fates.counts()
        export_pool(
            self.pool,
            selection,
            self.folder / "pool",
            executor=self.executor,
            card=_card(self.config, len(rows), counts, self.step.fingerprint),
            overwrite=True,
        )
        facts = {
            "pool": {
                "path": str(Path(pool_path(self.pool)).resolve())
                if not self.pool.source.remote
                else self.config.pool,
                "mapping": asdict(self.pool.mapping),
                "image_root": None
                if self.config.image_root is None
                else str(self.config.image_root),
            },
            "source": describe_source(self.source),
            "rows": len(rows),
            "parts": rows.parts,
            "budget": self.asked,
            "counts": counts,
            "stages": fates.stages,
            "clusters": len(found.centroids),
            "warnings": self.warnings,
        }
        self.step.record(**facts)
        write_report(self.folder)
        self.step.finish()


@dataclass(frozen=True)
class _Ledger:
    """The columns of the ledger, cut into shards as they are written."""

    rows: PoolRows
    reason: NDArray[np.object_]
    detail: pa.ChunkedArray
    found: Clustered
    rank: NDArray[np.int32]
    score: NDArray[np.float32]
    duplicate_of: NDArray[np.int64] | None

    def shard(self, index: int) -> pa.Table:
        shard = self.rows.pool.shards[index]
        span = slice(shard.first_row, shard.first_row + shard.rows)
        reason = self.reason[span]
        kept = reason == "kept"
        cluster, score = self.found.cluster[span], self.score[span]
        there = cluster >= 0
        columns = {
            "uid": self.rows.uids.slice(shard.first_row, shard.rows),
            "kept": pa.array(kept.astype(bool)),
            "weight": pa.array(kept.astype(np.float32)),
            "reason": pa.array(reason, pa.string()),
            "detail": self.detail.slice(shard.first_row, shard.rows),
            "cluster": stages.nullable(cluster, there, pa.int32()),
            "rank": stages.nullable(self.rank[span], there, pa.int32()),
            "cosine_distance": stages.nullable(
                self.found.cosine_distance[span], there, pa.float32()
            ),
            "clip_score": stages.nullable(score, np.isfinite(score), pa.float32()),
            "duplicate_of": self._duplicates(span, reason == "duplicate"),
        }
        return pa.table(columns).cast(LEDGER)

    def _duplicates(self, span: slice, there: NDArray[np.bool_]) -> pa.Array:
        if self.duplicate_of is None:
            return pa.nulls(len(there), pa.string())
        row = pa.array(np.where(there, self.duplicate_of[span], 0), mask=~there)
        return self.rows.uids.take(row)


def _by_status(status: pa.ChunkedArray) -> dict[str, NDArray[np.bool_]]:
    """Return the rows of each status that is not ok; all undecodable ones are `decode_failed`."""
    from curate.embeddings import BAD_EMBEDDING, OK

    bad = pa.compute.equal(status, BAD_EMBEDDING).to_numpy()
    good = pa.compute.equal(status, OK).to_numpy()
    return {"bad_embedding": bad, "decode_failed": ~(good | bad)}


def clip_fraction(config: PruneConfig) -> float:
    """Return the share of the survivors that the CLIP score lets through."""
    return math.sqrt(config.keep) if config.clip_fraction == "auto" else float(config.clip_fraction)


def _write_summary(path: Path, found: Clustered, pruning: Pruning) -> None:
    sizes = np.bincount(found.cluster[found.cluster >= 0], minlength=len(found.centroids))
    summary = pa.table(
        {
            "cluster": pa.array(np.arange(len(sizes)), pa.int32()),
            "size": pa.array(sizes, pa.int64()),
            "d_intra": pruning.d_intra,
            "d_inter": pruning.d_inter,
            "complexity": pruning.complexity,
            "target": pruning.target,
            "kept": pa.array(pruning.allocated, pa.int64()),
        }
    )
    with atomic_path(path) as temporary:
        write_parquet(temporary, summary)


def _card(config: PruneConfig, rows: int, counts: dict[str, int], fingerprint: str) -> str:
    reasons = "\n".join(f"| {reason} | {count:,} |" for reason, count in counts.items())
    return (
        f"Kept {counts.get('kept', 0):,} of {rows:,} rows (keep = {config.keep}). "
        "Made with `curate prune`; what happened to every row is in `../selection`.\n\n"
        f"| reason | rows |\n|---|---|\n{reasons}\n\nFingerprint: `{fingerprint}`"
    )


def check_embeddings(embeddings: Embeddings, uids: pa.ChunkedArray) -> StepFolder:
    """Check that a folder of embeddings is of these rows, in this order."""
    from curate.manifest import read_manifest

    theirs = embeddings.metadata(["uid"])["uid"]
    if len(theirs) != len(uids):
        raise PoolError(
            f"{embeddings.path} holds {len(theirs):,} embeddings, the pool has {len(uids):,} rows: "
            "they are not of the same pool"
        )
    differs = np.flatnonzero(pa.compute.not_equal(theirs, uids).to_numpy())
    if len(differs):
        row = int(differs[0])
        raise PoolError(
            f"{embeddings.path} is of other rows: row {row} has uid {theirs[row].as_py()!r} there "
            f"and {uids[row].as_py()!r} in the pool"
        )
    return StepFolder(embeddings.path, read_manifest(embeddings.path) or {})
