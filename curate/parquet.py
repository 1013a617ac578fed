"""Parquet files as logical shards: footers, one schema for all, batches that stream."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from curate.errors import CurateError, PoolError, ShardError
from curate.sources import Shard, SourceFile, open_file

#: A logical shard of a pool with images, and of one without.
# A shard of images is what a crash costs: minutes of embedding on a CPU, a second on a GPU.
IMAGE_SHARD_ROWS, METADATA_SHARD_ROWS = 4_096, 65_536
SHARD_BYTES = 1 << 30
#: A batch is cut short before it grows beyond this, whatever number of rows was asked for.
BATCH_BYTES = 256 << 20
# Without a buffer the reader holds a whole column chunk. With one it holds a page, which many
# writers, pyarrow among them, let grow as large as a row group of up to 1024 images.
_READ_BUFFER = 4 << 20
_FOOTER_THREADS = 8


@dataclass(frozen=True)
class Footer:
    """What planning needs of a file's footer.

    Attributes
    ----------
    schema : pyarrow.Schema
        With its metadata.
    row_groups : tuple of (int, int)
        Rows and uncompressed bytes of each row group.
    """

    schema: pa.Schema
    row_groups: tuple[tuple[int, int], ...]


@contextmanager
def _as_error(kind: type[CurateError], message: str) -> Iterator[None]:
    """Turn whatever pyarrow and the file system raise on bad data into one line of ours."""
    try:
        yield
    except (OSError, pa.ArrowException, ValueError, MemoryError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise kind(f"{message}: {first[:300]}") from error


def _open(path: str) -> Any:
    # pyarrow's own file does not take the interpreter's lock for every read.
    return open_file(path) if "://" in path else pa.OSFile(path)


def read_footer(file: SourceFile) -> Footer:
    """Read a Parquet file's footer.

    Raises
    ------
    PoolError
        If the file is not Parquet, or cut short.
    """
    with (
        _as_error(
            PoolError,
            f"{file.path} cannot be read as Parquet (cut short, or another format): "
            "write or download it again, or leave it out",
        ),
        _open(file.path) as opened,
    ):
        parquet = pq.ParquetFile(opened)
        metadata, schema = parquet.metadata, parquet.schema_arrow
        groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
        return Footer(schema, tuple((group.num_rows, group.total_byte_size) for group in groups))


def read_footers(files: Sequence[SourceFile]) -> list[Footer]:
    """Read the footers of all files, some at a time; raises like `read_footer`."""
    with ThreadPoolExecutor(min(_FOOTER_THREADS, len(files))) as threads:
        return list(threads.map(read_footer, files))


def unify(files: Sequence[SourceFile], footers: Sequence[Footer]) -> pa.Schema:
    """Return the one schema of all files.

    A column that holds nothing but nulls in one file may have type null there: that is what
    pandas writes. Everything else must agree, so that no value changes on the way.

    Raises
    ------
    PoolError
        Naming the file and the column that differ.
    """
    schema = footers[0].schema
    for file, footer in zip(files, footers, strict=True):
        names = footer.schema.names
        if not names:
            raise PoolError(f"{file.name} has no columns")
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise PoolError(f"{file.name} has more than one column named {repeated[0]!r}")
        extra, lacking = set(names) - set(schema.names), set(schema.names) - set(names)
        if extra or lacking:
            name = sorted(extra or lacking)[0]
            raise PoolError(
                f"{file.name} {'has' if extra else 'lacks'} the column {name!r}, unlike "
                f"{files[0].name}; all shards of a pool need the same columns: name one set of "
                "files with a glob"
            )
        for position, field in enumerate(schema):
            kind = footer.schema.field(field.name).type
            if pa.types.is_null(field.type):
                schema = schema.set(position, field.with_type(kind))
            elif kind != field.type and not pa.types.is_null(kind):
                raise PoolError(
                    f"column {field.name!r} is {kind} in {file.name} but {field.type} in "
                    f"{files[0].name}; all shards of a pool need the same types (also the same "
                    "width): cast the column, or name one set of files with a glob"
                )
    return schema


def split_row_groups(
    row_groups: Sequence[tuple[int, int]], *, max_rows: int, max_bytes: int = SHARD_BYTES
) -> list[tuple[int, int]]:
    """Cut a file into logical shards at row-group boundaries.

    Parameters
    ----------
    row_groups : sequence of (int, int)
        Rows and bytes of each row group.
    max_rows, max_bytes : int
        The largest shard; a single row group beyond them is a shard of its own.

    Returns
    -------
    list of (int, int)
        Row groups ``[start, stop)``, in order, without those at the ends that hold no rows.

    Examples
    --------
    >>> split_row_groups([(100, 1), (100, 1), (100, 1)], max_rows=200)
    [(0, 2), (2, 3)]
    """
    shards: list[tuple[int, int]] = []
    start = rows = size = 0
    for index, (more_rows, more_bytes) in enumerate(row_groups):
        if rows and (rows + more_rows > max_rows or size + more_bytes > max_bytes):
            shards.append((start, index))
            start, rows, size = index, 0, 0
        rows, size = rows + more_rows, size + more_bytes
    if rows:
        shards.append((start, len(row_groups)))
    return shards


def plan_shards(
    files: Sequence[SourceFile], footers: Sequence[Footer], *, max_rows: int
) -> tuple[Shard, ...]:
    """Return the logical shards of all files; a file without rows has none."""
    shards: list[Shard] = []
    first_row = 0
    for file, footer in zip(files, footers, strict=True):
        file_row = 0
        for start, stop in split_row_groups(footer.row_groups, max_rows=max_rows):
            rows = sum(count for count, _ in footer.row_groups[start:stop])
            shards.append(Shard(len(shards), file.path, (start, stop), rows, first_row, file_row))
            first_row, file_row = first_row + rows, file_row + rows
    return tuple(shards)


def _conform(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    """Return the batch in the order and the types of the pool's schema."""
    arrays = []
    for field in schema:
        array = batch.column(batch.schema.get_field_index(field.name))
        arrays.append(array if array.type == field.type else array.cast(field.type))
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def only(batches: Iterator[pa.RecordBatch], kept: NDArray[np.bool_]) -> Iterator[pa.RecordBatch]:
    """Yield of each batch the rows that are kept."""
    start = 0
    for batch in batches:
        chosen = batch.filter(pa.array(kept[start : start + batch.num_rows]))
        start += batch.num_rows
        if chosen.num_rows:
            yield chosen


def read_batches(
    shard: Shard, schema: pa.Schema, rows: int, kept: NDArray[np.bool_] | None = None
) -> Iterator[pa.RecordBatch]:
    """Read a shard as a stream.

    Parameters
    ----------
    shard : Shard
        Of a Parquet file; its row groups.
    schema : pyarrow.Schema
        The columns to read, in this order.
    rows : int
        The most rows of a batch; fewer where rows are large.
    kept : (r,) bool, optional
        Which of the shard's rows; row groups without any are not read.

    Yields
    ------
    pyarrow.RecordBatch

    Raises
    ------
    ShardError
        If the pages are damaged, or the file is not the one that was opened.
    """
    groups = range(*(shard.row_groups or (0, 0)))
    with (
        _as_error(
            ShardError, f"{shard.label} is damaged: write or download it again, or leave it out"
        ),
        _open(shard.path) as opened,
    ):
        parquet = pq.ParquetFile(opened, buffer_size=_READ_BUFFER, pre_buffer=False)
        if parquet.metadata.num_row_groups < groups.stop or shard.rows != sum(
            parquet.metadata.row_group(group).num_rows for group in groups
        ):
            raise ShardError(f"{shard.path} changed since the pool was opened; start again")
        sizes = [parquet.metadata.row_group(group) for group in groups]
        widest = max(size.total_byte_size // max(size.num_rows, 1) for size in sizes)
        rows = max(1, min(rows, BATCH_BYTES // max(widest, 1)))
        wanted = list(groups)
        if kept is not None:
            parts = np.split(kept, np.cumsum([size.num_rows for size in sizes])[:-1])
            wanted = [group for group, part in zip(groups, parts, strict=True) if part.any()]
            kept = np.concatenate([part for part in parts if part.any()] or [kept[:0]])
        batches = parquet.iter_batches(rows, row_groups=wanted, columns=schema.names)
        for batch in batches if kept is None else only(batches, kept):
            yield _conform(batch, schema)


def coalesce(batches: Iterator[pa.RecordBatch], rows: int) -> Iterator[pa.RecordBatch]:
    """Cut and join batches to ``rows`` rows each; fewer at the end, or where rows are large."""
    held: list[pa.RecordBatch] = []
    count = size = 0
    for batch in batches:
        while batch.num_rows:
            part = batch.slice(0, rows - count)
            if held and size + part.nbytes > BATCH_BYTES:
                yield _join(held)
                held, count, size = [], 0, 0
                continue
            held.append(part)
            count, size = count + part.num_rows, size + part.nbytes
            batch = batch.slice(part.num_rows)
            if count == rows:
                yield _join(held)
                held, count, size = [], 0, 0
    if held:
        yield _join(held)


def _join(batches: list[pa.RecordBatch]) -> pa.RecordBatch:
    if len(batches) == 1:
        return batches[0]
    return pa.concat_batches(batches)
