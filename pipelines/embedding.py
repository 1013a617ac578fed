"""`curate embed`: unit embeddings of every image and caption, shard by shard."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from curate.embeddings import OK, Embeddings, part_exists
from curate.errors import FailedRowsError, PoolError
from curate.manifest import StepFolder, check_step, locked, open_step
from curate.pool import Pool
from curate.progress import task
from curate.runtime import resolve_device
from pipelines.config import EmbedConfig
from pipelines.embed_workers import (
    EmbedWorker,
    EncoderSpec,
    ImportWorker,
    forget_encoder,
    no_advance,
)
from pipelines.executor import Executor, LocalExecutor, Worker, make_executor
from pipelines.indexing import index_fingerprint, index_pool
from pipelines.outputs import check_out, default_out, with_paths
from pipelines.source import (
    describe_source,
    load_early,
    open_pool,
    pool_path,
    resolve_source,
    source_fingerprint,
)

logger = logging.getLogger(__name__)


def embed(pool: str | Path | Pool, *, encoder: str | None = None, **options: Any) -> Embeddings:
    """Embed the images and captions of a pool.

    Parameters
    ----------
    pool : str, Path or Pool
        What `curate.Pool.open` takes, or a pool that is open.
    encoder : str, optional
        The model: an open_clip name, a configuration in JSON, or ``timm:NAME``. Default: the
        embeddings that the pool brings, else ViT-B-32.
    **options
        The fields of `pipelines.config.EmbedConfig`, which are the flags of ``curate embed``: out,
        pretrained, batch_size, precision, device, ...

    Returns
    -------
    curate.Embeddings
        Row-aligned with the pool, read by need.

    Raises
    ------
    PoolError, ModelError, FingerprintError
        If the pool or the model cannot be opened, or the folder holds other embeddings.
    """
    opened = pool if isinstance(pool, Pool) else None
    name = pool_path(pool) if isinstance(pool, Pool) else str(pool)
    return run_embed(EmbedConfig(pool=name, model=encoder, **with_paths(options)), opened)


def run_embed(config: EmbedConfig, opened: Pool | None = None) -> Embeddings:
    """Embed as the configuration says; see `embed`."""
    resolve_device(config.device)  # a wrong one is told before hours of work, not after
    pool = opened or open_pool(config)
    source = resolve_source(pool, config)
    if isinstance(source, Embeddings):
        raise PoolError(f"{config.embeddings} holds embeddings of this tool already")
    out = config.out or default_out(config.pool, "embeddings")
    check_out(config.pool, out)
    with locked(out):
        _, embeddings = embed_pool(
            pool,
            out,
            index=out / "index",
            source=source,
            executor=make_executor(config.executor, config.workers, config.device),
            overwrite=config.overwrite,
        )
    return embeddings


def check_failed(embeddings: Embeddings, max_failed: float) -> None:
    """Check how many rows could not be embedded; see `pipelines.pruning.check_failed`."""
    status = embeddings.metadata(["status"])["status"]
    failed = int(pc.sum(pc.not_equal(status, OK)).as_py() or 0)
    if failed > max_failed * len(status):
        raise FailedRowsError(
            f"{failed:,} of {len(status):,} rows could not be embedded, more than --max-failed "
            f"{max_failed} allows; metadata/ says why. The result is written"
        )


def embed_pool(
    pool: Pool,
    folder: Path,
    *,
    index: Path,
    source: EncoderSpec | Any,
    executor: Executor,
    overwrite: bool = False,
) -> tuple[StepFolder, Embeddings]:
    """Make or continue the embeddings of a pool.

    Parameters
    ----------
    pool : Pool
    folder : Path
        Where the embeddings lie.
    index : Path
        The folder of the pool's uids (`index_pool`); made if it is not there.
    source : EncoderSpec or what a pool brings
        An encoder to run, or embeddings to import (an object with `rows_of`).
    executor : Executor
    overwrite : bool
        Replace embeddings of another encoder or pool.
    """
    encodes = isinstance(source, EncoderSpec)
    identity: dict[str, Any] = {
        "step": "embed",
        "step_version": 1,
        "params": describe_source(source),
        "inputs": {"index": index_fingerprint(pool), "source": source_fingerprint(source)},
    }
    check_step(folder, **identity, overwrite=overwrite)
    load_early(source, folder)
    step = open_step(folder, **identity, overwrite=overwrite)
    todo = [s.index for s in pool.shards if not part_exists(folder, s.index)]
    if step.complete and not todo:
        return step, Embeddings.open(folder)
    index_pool(pool, index, executor=executor, overwrite=True)
    done = len(pool) - sum(pool.shards[i].rows for i in todo)
    with task("embed", total=len(pool), done=done) as advance:
        # In this process progress can be told row by row, elsewhere when a shard is done.
        by_row = encodes and isinstance(executor, LocalExecutor) and executor.runs_here(todo)
        if not by_row:
            forget_encoder()  # the workers have their own
        make_worker: Callable[[], Worker]
        if isinstance(source, EncoderSpec):
            within = advance if by_row else no_advance
            make_worker = partial(EmbedWorker, pool, index, folder, source, within)
        else:
            make_worker = partial(ImportWorker, pool, source, index, folder)
        for report in executor.map(make_worker, todo):
            advance(0 if by_row else report.rows)
    forget_encoder()  # what follows needs the memory
    step.finish(rows=len(pool), parts=len(pool.shards))
    return step, Embeddings.open(folder)
