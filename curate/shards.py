"""Parts of a folder: the one place that writes Parquet and .npy files.

Part *i* of any folder of a run belongs to shard *i* of the pool. A part is written to a temporary
name, fsynced and renamed, so that a part that exists is whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import DTypeLike, NDArray

from curate.errors import ShardError
from curate.manifest import atomic_path


def part_path(folder: Path, index: int) -> Path:
    """Return the path of a part.

    Examples
    --------
    >>> part_path(Path("run/selection"), 3).as_posix()
    'run/selection/part-00003.parquet'
    """
    return folder / f"part-{index:05d}.parquet"


def write_part(
    folder: Path,
    index: int,
    data: pa.Table | Iterable[pa.RecordBatch],
    *,
    schema: pa.Schema | None = None,
    row_group_rows: int = 65_536,
) -> int:
    """Write one part, whole or not at all; return its rows.

    Parameters
    ----------
    folder : Path
        The step's folder.
    index : int
        The part's number, which is the shard's.
    data : pyarrow.Table or iterable of pyarrow.RecordBatch
        The rows; batches are written as they come.
    schema : pyarrow.Schema, optional
        Needed for batches, since there may be none.
    row_group_rows : int
        Most rows in a row group; small (100 to 1000) for columns of image bytes.
    """
    path = part_path(folder, index)
    with atomic_path(path) as temporary:
        return write_parquet(temporary, data, schema=schema, row_group_rows=row_group_rows)


def write_parquet(
    path: Path,
    data: pa.Table | Iterable[pa.RecordBatch],
    *,
    schema: pa.Schema | None = None,
    row_group_rows: int = 65_536,
) -> int:
    """Write a Parquet file with this tool's settings; return its rows."""
    if isinstance(data, pa.Table):
        schema, data = data.schema, data.to_batches(max_chunksize=row_group_rows)
    if schema is None:
        raise TypeError("schema is needed to write batches")
    rows = 0
    with pq.ParquetWriter(path, schema, compression="zstd", compression_level=1) as writer:
        for table in _grouped(data, schema, row_group_rows):
            writer.write_table(table, row_group_size=row_group_rows)
            rows += table.num_rows
    return rows


def _grouped(batches: Iterable[pa.RecordBatch], schema: pa.Schema, rows: int) -> Iterator[pa.Table]:
    """Join small batches, so that the row groups do not depend on how the rows came."""
    held: list[pa.RecordBatch] = []
    count = 0
    for batch in batches:
        while count + batch.num_rows >= rows:
            taken = rows - count
            yield pa.Table.from_batches([*held, batch.slice(0, taken)], schema)
            held, count, batch = [], 0, batch.slice(taken)
        if batch.num_rows:
            held.append(batch)
            count += batch.num_rows
    if held:
        yield pa.Table.from_batches(held, schema)


def read_part(folder: Path, index: int, columns: Sequence[str] | None = None) -> pa.Table:
    """Read one part.

    Raises
    ------
    ShardError
        If the part is missing or damaged.
    """
    path = part_path(folder, index)
    try:
        return pq.read_table(path, columns=columns, partitioning=None)
    except (OSError, pa.ArrowException) as error:
        raise ShardError(
            f"{path} is missing or damaged ({str(error).splitlines()[0]}); "
            "remove it and run the same command again"
        ) from error


def read_parts(folder: Path, parts: int, columns: Sequence[str] | None = None) -> pa.Table:
    """Read the parts 0 to `parts` - 1 as one table."""
    return pa.concat_tables([read_part(folder, index, columns) for index in range(parts)])


def missing_parts(folder: Path, parts: int) -> list[int]:
    """Return the numbers of the parts that are not there yet."""
    return [index for index in range(parts) if not part_path(folder, index).exists()]


def write_array(path: Path, array: NDArray[Any]) -> None:
    """Write a .npy file, whole or not at all."""
    write_blocks(path, [array], array.shape, array.dtype)


def write_blocks(
    path: Path, blocks: Iterable[NDArray[Any]], shape: tuple[int, ...], dtype: DTypeLike
) -> None:
    """Write a .npy file of that shape, whole or not at all, from blocks of its rows.

    Not by `np.save`: where the disk is full that says how many items were written, but not why.
    """
    empty = np.empty((0, *shape[1:]), dtype)
    header = np.lib.format.header_data_from_array_1_0(empty) | {"shape": shape}
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for block in blocks:
            file.write(np.ascontiguousarray(block, dtype).reshape(-1).view(np.uint8).data)


def read_array(path: Path) -> NDArray[Any]:
    """Read a .npy file.

    Raises
    ------
    ShardError
        If the file is missing or damaged.
    """
    try:
        array: NDArray[Any] = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ShardError(
            f"{path} is missing or damaged ({error}); remove it and run the same command again"
        ) from error
    return array
