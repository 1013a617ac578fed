"""The kept rows as Parquet shards: a pool again, which `datasets` opens with decoded images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from curate.errors import ShardError
from curate.manifest import StepFolder, open_step
from curate.pool import Pool
from curate.progress import task
from curate.shards import missing_parts, read_part, write_part
from pipelines.executor import Executor, ShardReport

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
