"""`curate prune`: from a pool to a smaller pool of exactly the size asked for.

decode and embed -> drop duplicates -> drop the lowest CLIP scores -> prune by the complexity of
concept clusters -> write the ledger, the kept rows and the report.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from curate.embeddings import Embeddings
from curate.errors import BudgetError, FailedRowsError, PoolError
from curate.manifest import StepFolder, check_step, locked, open_step
from curate.pool import Pool
from curate.prune import Pruning, prune_clusters
from curate.runtime import resolve_device
from curate.scores import best_scores
from curate.selection import Selection
from pipelines import stages
from pipelines.config import PruneConfig
from pipelines.executor import Executor, make_executor
from pipelines.ledger import Evidence, Fates, undecodable, write_ledger
from pipelines.outputs import check_out, default_out, with_paths
from pipelines.pool_rows import PoolRows
from pipelines.prune_params import clip_fraction, exact_budget, prune_options, result_params
from pipelines.runs import check_enough, embed_rows, finish_run, index_rows, is_whole
from pipelines.scoring import score_source, score_step
from pipelines.source import (
    describe_source,
    load_early,
    open_pool,
    pool_path,
    resolve_source,
    source_fingerprint,
)
from pipelines.stages import Clustered, Duplicates

logger = logging.getLogger(__name__)


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
    resolve_device(config.device)  # a wrong one is told before hours of work, not after
    pool = opened or open_pool(config)
    out = config.out or default_out(config.pool, "pruned")
    if config.download and pool.url_only:
        config = _downloaded(pool, config)
        pool = open_pool(config)
    source = resolve_source(pool, config)
    check_out(config.pool, out)
    identity: dict[str, Any] = {
        "step": "prune",
        "step_version": 1,
        "params": result_params(config) | describe_source(source),
        "inputs": {"pool": pool.fingerprint(), "embeddings": source_fingerprint(source)},
    }
    with locked(out):
        check_step(out, **identity, overwrite=config.overwrite)
        load_early(source, out / "embeddings")
        run = open_step(out, **identity, overwrite=config.overwrite, keep_content=True)
        if not (run.complete and is_whole(run)):
            executor = make_executor(config.executor, config.workers, config.device)
            PruneRun(config, pool, source, run, executor).run()
        else:
            check_enough(run.manifest, allow_fewer=config.allow_fewer, lower="--keep")
            logger.info("%s is complete already; nothing to do", out)
    return Selection.open(out)


def _downloaded(pool: Pool, config: PruneConfig) -> PruneConfig:
    """Download a pool's images; return the configuration for the pool that they make."""
    from pipelines.downloading import run_download

    images = default_out(config.pool, "images")
    logger.info("%s", run_download(pool, images, overwrite=config.overwrite).summary())
    # img2dataset gives these columns names of its own, which are found by name.
    return replace(config, pool=str(images), image_col=None, text_col=None, url_col=None)


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


class PruneRun:
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
        rows = index_rows(self.pool, self.folder, self.executor)
        embed, embeddings = embed_rows(rows, self.folder, self.source, self.executor)
        metadata = embeddings.metadata(["status", "detail"])
        fates = Fates(len(rows))
        fates.drop("decode", undecodable(metadata["status"]))
        self.require(fates, "could be embedded")
        score, score_fingerprint = self.score(rows, embeddings, embed)
        duplicates = self.dedup(rows, embeddings, embed, fates, score, score_fingerprint)
        self.cut_scores(rows, fates, score)
        clusters, found = stages.cluster_step(
            rows, embeddings, embed, self.folder / "clusters", alive=fates.alive, config=self.config
        )
        pruning = self.choose(rows, found, fates)
        evidence = Evidence(metadata["detail"], found, pruning, score, duplicates)
        inputs = {"run": self.step.fingerprint, "clusters": clusters.fingerprint}
        selection = write_ledger(rows, self.folder, fates, evidence, inputs=inputs)
        finish_run(
            self.step,
            rows,
            selection,
            fates,
            self.executor,
            self.config,
            budget=self.asked,
            clusters=len(found.centroids),
            warnings=self.warnings,
        )

    def score(
        self, rows: PoolRows, embeddings: Embeddings, embed: StepFolder
    ) -> tuple[NDArray[np.float32] | None, str]:
        """Score the pairs, where there is something to score them by."""
        source = score_source(self.pool, embeddings, self.config)
        if source is None:
            self.check_scores_not_needed()
            return None, ""
        step, score = score_step(rows, embeddings, embed, self.folder / "scores", source)
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
        fates: Fates,
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

    def cut_scores(self, rows: PoolRows, fates: Fates, score: NDArray[np.float32] | None) -> None:
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

    def require(self, fates: Fates, what: str) -> None:
        """Check that enough rows are left for the budget."""
        left = int(fates.alive.sum())
        if left >= self.budget:
            return
        dropped = ", ".join(
            f"{count:,} {reason}" for reason, count in fates.counts().items() if reason
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

    def choose(self, rows: PoolRows, found: Clustered, fates: Fates) -> Pruning | None:
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
        fates.keep_the_rest()
        return pruning
