"""The uids of a pool: the first step of every run, and what aligns all that follows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from curate.manifest import StepFolder, digest, open_step
from curate.pool import Pool, unique_uids
from curate.progress import task
from curate.shards import missing_parts, read_parts, write_part
from curate.uids import narrow
from pipelines.executor import Executor, ShardReport

_DERIVED_LENGTH = 32  # hexadecimal digits of a derived uid, before the number of a repeat


@dataclass(frozen=True)
class IndexWorker:
    """Writes the uids of one shard."""

    pool: Pool
    folder: Path
    in_threads: ClassVar[bool] = True

    def __call__(self, shard: int) -> ShardReport:
        """Read or derive the uids of the shard's rows."""
        uids = self.pool.shard_uids(self.pool.shards[shard])
        rows = write_part(self.folder, shard, pa.table({"uid": uids}))
        return ShardReport(shard, rows)


def index_pool(
    pool: Pool, folder: Path, *, executor: Executor, overwrite: bool = False
) -> StepFolder:
    """Write the uid of every row of the pool, and check that they are unique.

    Raises
    ------
    PoolError
        If the pool's own uids repeat.
    """
    step = open_step(folder, **_identity(pool), overwrite=overwrite)
    todo = missing_parts(folder, len(pool.shards))
    if not step.complete or todo:
        make_worker: Callable[[], IndexWorker] = partial(IndexWorker, pool, folder)
        done = len(pool) - sum(pool.shards[i].rows for i in todo)
        with task("index", total=len(pool), done=done) as advance:
            for report in executor.map(make_worker, todo):
                advance(report.rows)
        _make_unique(pool, folder, derived=pool.mapping.uid is None)
        step.finish(rows=len(pool), parts=len(pool.shards))
    return step


def index_fingerprint(pool: Pool) -> str:
    """Return the fingerprint of a pool's index, which need not be there yet."""
    return digest(_identity(pool))


def _identity(pool: Pool) -> dict[str, Any]:
    return {
        "step": "index",
        "step_version": 1,
        "params": {"uid": pool.mapping.uid or "derived"},
        "inputs": {"pool": pool.fingerprint()},
    }


def read_uids(pool: Pool, folder: Path) -> pa.LargeStringArray:
    """Return the uid of every row, from a complete index."""
    uids = read_parts(folder, len(pool.shards), ["uid"])["uid"].cast(pa.large_string())
    return pa.concat_arrays(uids.chunks)  # in one piece, from which taking some is fast


def _make_unique(pool: Pool, folder: Path, *, derived: bool) -> None:
    """Give repeats of derived uids a number, and write the parts that have some again."""
    written = read_parts(folder, len(pool.shards), ["uid"])["uid"]
    base = written
    if derived:
        # A run that was killed while it wrote the numbers: begin from the bare digests again.
        chunks = [pa.compute.utf8_slice_codeunits(c, 0, _DERIVED_LENGTH) for c in written.chunks]
        base = pa.chunked_array(chunks, pa.string())
    unique = unique_uids(base, derived=derived)
    for shard in pool.shards:
        part = narrow(unique.slice(shard.first_row, shard.rows))
        if not part.equals(written.slice(shard.first_row, shard.rows).combine_chunks()):
            write_part(folder, shard.index, pa.table({"uid": part}))


def uid_ranks(uids: pa.LargeStringArray) -> NDArray[np.uint64]:
    """Return the place of each uid in the order of all uids: what breaks ties.

    Returns
    -------
    (n,) uint64
    """
    import polars as pl

    order = pl.Series(pl.from_arrow(uids)).arg_sort().to_numpy()
    ranks = np.empty(len(order), dtype=np.uint64)
    ranks[order] = np.arange(len(order), dtype=np.uint64)
    return ranks
