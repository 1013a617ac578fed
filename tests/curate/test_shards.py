from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from curate.errors import ShardError
from curate.shards import missing_parts, part_path, read_part, read_parts, write_part

SCHEMA = pa.schema([("number", pa.int64())])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(sizes=st.lists(st.integers(0, 40), max_size=8), group=st.integers(1, 50))
def test_row_groups_do_not_depend_on_the_batches(
    tmp_path: Path, sizes: list[int], group: int
) -> None:
    table = pa.table({"number": range(sum(sizes))}, schema=SCHEMA)
    batches, start = [], 0
    for size in sizes:
        batches += table.slice(start, size).to_batches()
        start += size
    rows = write_part(tmp_path, 0, iter(batches), schema=SCHEMA, row_group_rows=group)
    write_part(tmp_path, 1, table, row_group_rows=group)
    assert rows == len(table)
    assert part_path(tmp_path, 0).read_bytes() == part_path(tmp_path, 1).read_bytes()
    metadata = pq.ParquetFile(part_path(tmp_path, 0)).metadata
    groups = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    assert all(rows == group for rows in groups[:-1])
    assert read_part(tmp_path, 0).equals(table)


def test_missing_parts(tmp_path: Path) -> None:
    table = pa.table({"number": [1]})
    write_part(tmp_path, 1, table)
    assert missing_parts(tmp_path, 3) == [0, 2]
    write_part(tmp_path, 0, table)
    write_part(tmp_path, 2, table)
    assert read_parts(tmp_path, 3)["number"].to_pylist() == [1, 1, 1]


def test_a_damaged_part_is_named(tmp_path: Path) -> None:
    write_part(tmp_path, 0, pa.table({"number": range(100)}))
    path = part_path(tmp_path, 0)
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ShardError, match=r"part-00000\.parquet is missing or damaged"):
        read_part(tmp_path, 0)
    with pytest.raises(ShardError, match=r"part-00001\.parquet"):
        read_part(tmp_path, 1)


def test_batches_need_a_schema(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="schema"):
        write_part(tmp_path, 0, iter([]))
