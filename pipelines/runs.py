"""What every run that ends in a ledger does: its rows and embeddings first, its export last."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from curate.embeddings import Embeddings
from curate.errors import BudgetError
from curate.manifest import StepFolder
from curate.pool import Pool
from curate.runtime import resolve_device
from curate.shards import missing_parts
from pipelines.config import EmbedConfig, PruneConfig
from pipelines.embedding import embed_pool
from pipelines.executor import Executor
from pipelines.exporting import export_pool
from pipelines.indexing import index_pool, read_uids
from pipelines.ledger import Fates
from pipelines.pool_rows import PoolRows
from pipelines.source import Source, check_embeddings, pool_path


def is_whole(run: StepFolder) -> bool:
    """Return whether what a complete run has written is still there."""
    parts = int(run.manifest["parts"])
    gone = missing_parts(run.path / "pool", parts) + missing_parts(run.path / "selection", parts)
    return not gone and (run.path / "report.html").exists()


def check_enough(manifest: Mapping[str, Any], *, allow_fewer: bool, lower: str) -> None:
    """Check that a complete run kept what was asked for, or may have kept fewer.

    Raises
    ------
    BudgetError
        If it kept fewer, and `allow_fewer` is off now; `lower` is the flag to lower instead.
    """
    kept, budget = manifest["counts"].get("kept", 0), manifest["budget"]
    if kept < budget and not allow_fewer:
        raise BudgetError(
            f"{budget:,} rows were asked for, {kept:,} were kept with --allow-fewer, which is off "
            f"now; pass it again, or lower {lower}"
        )


def index_rows(pool: Pool, run: Path, executor: Executor) -> PoolRows:
    """Find the uids of all rows."""
    index_pool(pool, run / "index", executor=executor, overwrite=True)
    return PoolRows(pool, read_uids(pool, run / "index"))


def embed_rows(
    rows: PoolRows, run: Path, source: Source, executor: Executor
) -> tuple[StepFolder, Embeddings]:
    """Find the embeddings of all rows."""
    if isinstance(source, Embeddings):
        return check_embeddings(source, rows.uids), source
    return embed_pool(
        rows.pool,
        run / "embeddings",
        index=run / "index",
        source=source,
        executor=executor,
        overwrite=True,
    )


def finish_run(
    run: StepFolder,
    rows: PoolRows,
    selection: StepFolder,
    fates: Fates,
    executor: Executor,
    config: EmbedConfig | PruneConfig,
    **facts: Any,
) -> None:
    """Write the kept rows, the manifest and the report."""
    from pipelines.reporting import write_report

    export_pool(rows.pool, selection, run.path / "pool", executor=executor, overwrite=True)
    remote = rows.pool.source.remote
    run.record(
        pool={
            "path": config.pool if remote else str(Path(pool_path(rows.pool)).resolve()),
            "mapping": asdict(rows.pool.mapping),
            "image_root": None if config.image_root is None else str(config.image_root),
        },
        rows=len(rows),
        parts=rows.parts,
        counts=fates.counts(),
        stages=fates.stages,
        environment={
            "device": str(resolve_device(config.device)),
            "python": platform.python_version(),
        },
        **facts,
    )
    write_report(run.path)
    run.finish()
