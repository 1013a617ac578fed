"""The kept rows as Parquet shards: a pool again, which `datasets` opens with decoded images."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pyarrow as pa

from curate.errors import PoolError, ShardError
from curate.manifest import StepFolder, locked, open_step
from curate.pool import Pool
from curate.progress import task
from curate.selection import LEDGER, Selection
from curate.shards import missing_parts, read_part, write_part
from pipelines.executor import Executor, LocalExecutor, ShardReport
from pipelines.indexing import index_pool, read_uids

# Viewers and shuffling readers want small row groups of images; metadata alone wants large ones.
_ROWS_WITH_IMAGES = 256
_ROWS_WITHOUT = 65_536


@dataclass(frozen=True)
class ExportWorker:
    """Copies the kept rows of one shard, every original column unchanged."""

    pool: Pool
    selection: Path
    out: Path

    def __call__(self, shard: int) -> ShardReport:
        """Write the part; a shard of which nothing is kept has a part without rows."""
        kept = read_part(self.selection, shard, ["kept"])["kept"].to_numpy()
        rows = _ROWS_WITHOUT if self.pool.mapping.image is None else _ROWS_WITH_IMAGES
        written = write_part(
            self.out,
            shard,
            self.pool.export_batches(self.pool.shards[shard], kept, rows=rows),
            schema=self.pool.export_schema(),
            row_group_rows=rows,
        )
        if written != kept.sum():
            raise ShardError(
                f"shard {shard} of the pool gave {written} kept rows, expected {kept.sum()}: "
                "did the pool change while the command ran? Run it again with --overwrite"
            )
        return ShardReport(shard, len(kept))


def export_pool(
    pool: Pool,
    selection: StepFolder,
    folder: Path,
    *,
    executor: Executor,
    overwrite: bool = False,
) -> StepFolder:
    """Write the kept rows of a selection as Parquet shards.

    Parameters
    ----------
    pool : Pool
    selection : StepFolder
        A complete ledger of that pool.
    folder : Path
        Where to write.
    executor : Executor
    overwrite : bool
        Replace the export of another selection.
    """
    step = open_step(
        folder,
        step="export",
        step_version=1,
        params={"to": "parquet"},
        inputs={"selection": selection.fingerprint},
        overwrite=overwrite,
        beside=True,
    )
    todo = missing_parts(folder, len(pool.shards))
    if step.complete and not todo:
        return step
    make_worker: Callable[[], ExportWorker] = partial(ExportWorker, pool, selection.path, folder)
    done = len(pool) - sum(pool.shards[i].rows for i in todo)
    with task("export", total=len(pool), done=done) as advance:
        for report in executor.map(make_worker, todo):
            advance(report.rows)
    step.finish(rows=int(selection.manifest["counts"].get("kept", 0)), parts=len(pool.shards))
    return step


def export(
    pool: str | Path | Pool, selection: Selection, *, out: str | Path, overwrite: bool = False
) -> Selection:
    """Write the rows that any selection of a pool keeps, and its ledger.

    For selections that no run made: one by a rule of your own (`curate.Selection.from_mask`), or
    several combined by ``&``.

    Parameters
    ----------
    pool : str, Path or Pool
        The pool that the selection is of.
    selection : curate.Selection
    out : str or Path
        Folder: ``pool/`` gets the kept rows, ``selection/`` the ledger.
    overwrite : bool
        Replace the export of another selection.

    Returns
    -------
    curate.Selection
        Opened from `out`.

    Raises
    ------
    PoolError
        If the selection is of other rows.
    FingerprintError
        If the folder holds another export and `overwrite` is off.
    """
    opened = pool if isinstance(pool, Pool) else Pool.open(pool)
    folder, executor = Path(out), LocalExecutor()
    with locked(folder):
        index_pool(opened, folder / "index", executor=executor, overwrite=overwrite)
        uids = read_uids(opened, folder / "index")
        theirs = selection.table["uid"].cast(pa.large_string())
        if not theirs.equals(pa.chunked_array([uids])):
            raise PoolError("the selection is not of the rows of this pool, in their order")
        step = _write_ledger(opened, selection, folder / "selection", overwrite=overwrite)
        export_pool(opened, step, folder / "pool", executor=executor, overwrite=True)
    return Selection.open(folder)


def _write_ledger(pool: Pool, selection: Selection, folder: Path, *, overwrite: bool) -> StepFolder:
    table = selection.table
    for field in LEDGER:
        if field.name not in table.column_names:
            table = table.append_column(field, pa.nulls(len(table), field.type))
    table = table.select(LEDGER.names).cast(LEDGER)
    content = hashlib.sha256()
    for batch in table.combine_chunks().to_batches():
        content.update(batch.serialize())
    step = open_step(
        folder,
        step="select",
        step_version=1,
        params={},
        inputs={"pool": pool.fingerprint(), "ledger": content.hexdigest()},
        overwrite=overwrite,
        beside=True,
    )
    for shard in missing_parts(folder, len(pool.shards)):
        span = pool.shards[shard]
        write_part(folder, shard, table.slice(span.first_row, span.rows))
    step.finish(rows=len(table), parts=len(pool.shards), counts=selection.counts)
    return step
