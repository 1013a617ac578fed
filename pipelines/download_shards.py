"""The shards that img2dataset writes: which are whole, what they hold, and how to mend them.

A shard is a Parquet file with a row for every address, and a file of statistics that is written
last. img2dataset goes by the latter when it decides what is done.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from curate.errors import ShardError
from curate.manifest import atomic_path, atomic_write_json
from curate.shards import write_parquet, write_part
from pipelines.url_list import UrlColumns

SUCCESS = "success"
_OPTED_OUT = "X-Robots-Tag"
_ROW_GROUP = 256


@dataclass(frozen=True)
class ImageShards:
    """A folder that img2dataset writes to, and the rows of each shard that it should hold.

    Attributes
    ----------
    folder : Path
    counts : tuple of int
        Rows of shard 0, 1, ...
    """

    folder: Path
    counts: tuple[int, ...]

    @classmethod
    def plan(cls, folder: Path, parts: Sequence[int], samples_per_shard: int) -> ImageShards:
        """Return the shards into which img2dataset cuts the files of a list.

        Every file is cut by itself, in order; only the last shard of a file is smaller.

        Examples
        --------
        >>> ImageShards.plan(Path("images"), [25, 10], 10).counts
        (10, 10, 5, 10)
        """
        counts = [
            min(samples_per_shard, rows - start)
            for rows in parts
            for start in range(0, rows, samples_per_shard)
        ]
        return cls(folder, tuple(counts))

    def __len__(self) -> int:
        return len(self.counts)

    def path(self, number: int) -> Path:
        """Return a shard's Parquet file."""
        return self.folder / f"{number:05d}.parquet"

    def stats_path(self, number: int) -> Path:
        """Return a shard's statistics."""
        return self.folder / f"{number:05d}_stats.json"

    def missing(self) -> list[int]:
        """Return the shards that are not done."""
        return [
            number
            for number in range(len(self))
            if not (self.stats_path(number).exists() and self.path(number).exists())
        ]

    def done_rows(self) -> int:
        """Return the rows of the shards that are done."""
        return sum(self.counts) - sum(self.counts[number] for number in self.missing())

    def remove_damaged(self) -> None:
        """Remove what a killed run left half written, so that img2dataset does it again."""
        for number in range(len(self)):
            stats = self.stats_path(number)
            if stats.exists() and not (_is_json(stats) and _is_parquet(self.path(number))):
                stats.unlink()

    def read(self, number: int, columns: Sequence[str] | None = None) -> pa.Table:
        """Read a shard.

        Raises
        ------
        ShardError
            If it is missing or damaged.
        """
        path = self.path(number)
        try:
            return pq.read_table(path, columns=columns, partitioning=None)
        except (OSError, pa.ArrowException) as error:
            raise ShardError(
                f"{path} is missing or damaged; remove it and {self.stats_path(number).name}, and "
                "run the same command again"
            ) from error

    def outcome(self) -> tuple[int, int, Counter[str]]:
        """Return the rows, those with an image, and the reasons of the others."""
        rows = successes = 0
        failures: Counter[str] = Counter()
        for number in range(len(self)):
            table = self.read(number, ["status", "error_message"])
            good, reasons = _count(table)
            rows, successes = rows + table.num_rows, successes + good
            failures += reasons
        return rows, successes, failures


def _is_json(path: Path) -> bool:
    try:
        return isinstance(json.loads(path.read_text(encoding="utf-8")), dict)
    except (OSError, ValueError):
        return False


def _is_parquet(path: Path) -> bool:
    try:
        pq.read_metadata(path)
    except (OSError, pa.ArrowException):
        return False
    return True


def _count(table: pa.Table) -> tuple[int, Counter[str]]:
    good = pc.equal(table["status"], SUCCESS)
    failed = table.filter(pc.invert(good))
    messages = pc.coalesce(failed["error_message"], failed["status"])
    pairs = messages.value_counts().to_pylist()
    return int(pc.sum(good).as_py() or 0), Counter(
        {str(pair["values"]): int(pair["counts"]) for pair in pairs}
    )


def write_failed(images: ImageShards, folder: Path, columns: UrlColumns) -> dict[int, int]:
    """Write the addresses that failed as a list, one part for each shard that has some.

    What servers have opted out of is not asked for again.

    Returns
    -------
    dict of int to int
        Shards with such rows, and how many; part *k* of the list belongs to the k-th of them.
    """
    caption = [] if columns.caption is None else ["caption"]
    names = ["uid", "url", *caption, *(name for _, name in columns.others)]
    counts: dict[int, int] = {}
    for number in range(len(images)):
        table = images.read(number, [*names, "status", "error_message"])
        message = pc.fill_null(table["error_message"], "")
        again = pc.and_(
            pc.not_equal(table["status"], SUCCESS),
            pc.invert(pc.match_substring(message, _OPTED_OUT)),
        )
        failed = table.filter(again).select(names)
        if failed.num_rows:
            write_part(folder, len(counts), failed)
            counts[number] = failed.num_rows
    return counts


def merge_retried(again: ImageShards, number: int, images: ImageShards, shard: int) -> None:
    """Put the rows of a second attempt in the place of those of the first, by their uid."""
    second = again.read(number)
    position = {uid: row for row, uid in enumerate(second["uid"].to_pylist())}
    path = images.path(shard)
    with atomic_path(path) as temporary, pq.ParquetFile(path) as first:
        schema = first.schema_arrow
        batches = (
            _replaced(batch, second, position)
            for batch in first.iter_batches(_ROW_GROUP, use_threads=False)
        )
        write_parquet(temporary, batches, schema=schema, row_group_rows=_ROW_GROUP)
    _write_stats(images, shard)


def _replaced(batch: pa.RecordBatch, second: pa.Table, position: dict[str, int]) -> pa.RecordBatch:
    rows = [position.get(uid, -1) for uid in batch.column("uid").to_pylist()]
    found = [(row, where) for row, where in enumerate(rows) if where >= 0]
    if not found:
        return batch
    # Row by row: the images of a whole shard do not fit into one array of 32-bit offsets.
    newer = [second.slice(where, 1).combine_chunks().to_batches()[0] for _, where in found]
    both = pa.concat_batches([batch, *(row.select(batch.schema.names) for row in newer)])
    take = np.arange(batch.num_rows)
    take[[row for row, _ in found]] = batch.num_rows + np.arange(len(found))
    merged = both.take(pa.array(take))
    # The key says where the row lies, which has not changed.
    place = batch.schema.get_field_index("key")
    return merged.set_column(place, batch.schema.field(place), batch.column(place))


def _write_stats(images: ImageShards, shard: int) -> None:
    """Bring the statistics up to date, for tools that read them and not the rows."""
    path = images.stats_path(shard)
    table = images.read(shard, ["status", "error_message"])
    stats = json.loads(path.read_text(encoding="utf-8"))
    good, failures = _count(table)
    statuses = Counter(table["status"].to_pylist())
    counted = {
        "count": table.num_rows,
        "successes": good,
        "failed_to_download": statuses["failed_to_download"],
        "failed_to_resize": statuses["failed_to_resize"],
        "status_dict": {SUCCESS: good, **failures},
    }
    atomic_write_json(path, {**stats, **counted})
