"""The CLIP score of every pair of a pool: from its embeddings, or from a column."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from curate.embeddings import Embeddings
from curate.manifest import StepFolder, open_step
from curate.pool import Pool
from curate.progress import task
from curate.scores import clip_scores
from curate.shards import missing_parts, write_part
from pipelines.config import PruneConfig
from pipelines.pool_rows import PoolRows, floats, nullable


def score_source(pool: Pool, embeddings: Embeddings, config: PruneConfig) -> str | None:
    """Say where CLIP scores come from: a column, the embeddings, or nowhere (None)."""
    if config.score_col:
        return f"column {pool.mapping.score}"
    if embeddings.text is not None:
        return "embeddings"
    return f"column {pool.mapping.score}" if pool.mapping.score else None


def score_step(
    rows: PoolRows, embeddings: Embeddings, embed: StepFolder, folder: Path, source: str
) -> tuple[StepFolder, NDArray[np.float32]]:
    """Score every pair; NaN where the image or the caption has no embedding, or no score."""
    step = open_step(
        folder,
        step="score",
        step_version=1,
        params={"source": source},
        inputs={"embeddings": embed.fingerprint},
        overwrite=True,
    )
    if not step.complete or missing_parts(folder, rows.parts):
        todo = missing_parts(folder, rows.parts)
        done = len(rows) - sum(rows.pool.shards[i].rows for i in todo)
        with task("score", total=len(rows), done=done) as advance:
            for index in todo:
                score = _shard_scores(rows.pool, embeddings, index, source)
                there = np.isfinite(score)
                column = nullable(score, there, pa.float32())
                write_part(
                    folder, index, pa.table({"uid": rows.shard_uids(index), "clip_score": column})
                )
                advance(len(score))
        step.finish(rows=len(rows), parts=rows.parts)
    return step, floats(rows.read(folder, ["clip_score"])["clip_score"])


def _shard_scores(
    pool: Pool, embeddings: Embeddings, index: int, source: str
) -> NDArray[np.float32]:
    shard = pool.shards[index]
    if source == "embeddings":
        span = slice(shard.first_row, shard.first_row + shard.rows)
        if embeddings.text is None:
            raise RuntimeError("the embeddings hold no captions")
        return clip_scores(embeddings.image[span], embeddings.text[span])
    batches = pool.batches(65_536, shards=[shard], columns=[str(pool.mapping.score)])
    columns = [floats(pa.chunked_array([batch.column(0)])) for batch in batches]
    return np.concatenate(columns) if columns else np.empty(0, np.float32)
