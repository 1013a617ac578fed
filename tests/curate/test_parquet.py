import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curate.errors import PoolError
from curate.parquet import split_row_groups
from curate.pool import Pool
from tests.curate.pools import everything, table, write


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9))),
    st.integers(1, 20),
    st.integers(1, 20),
)
def test_logical_shards_cover_all_rows_in_order(groups, max_rows, max_bytes):
    shards = split_row_groups(groups, max_rows=max_rows, max_bytes=max_bytes)
    rows = [sum(n for n, _ in groups[start:stop]) for start, stop in shards]
    assert sum(rows) == sum(n for n, _ in groups) and 0 not in rows
    assert [start for start, _ in shards[1:]] == [stop for _, stop in shards[:-1]]
    for start, stop in shards:
        part = [group for group in groups[start:stop] if group[0]]
        size = sum(b for _, b in groups[start:stop])
        assert len(part) == 1 or (sum(n for n, _ in part) <= max_rows and size <= max_bytes)


def test_one_file_is_several_shards(tmp_path):
    small = pa.table({"url": [str(i) for i in range(200_000)]})
    pool = Pool.open(write(tmp_path / "a.parquet", small, row_group_size=10_000))
    assert [s.rows for s in pool.shards] == [60_000, 60_000, 60_000, 20_000]
    assert [s.file_row for s in pool.shards] == [0, 60_000, 120_000, 180_000]
    images = small.append_column("jpg", pa.array([b"x"] * len(small)))
    pool = Pool.open(write(tmp_path / "a.parquet", images, row_group_size=10_000))
    assert len(pool.shards) == 20


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, 30), min_size=1, max_size=4).filter(any),
    st.integers(1, 12),
    st.integers(1, 50),
)
def test_batches_of_any_size_are_the_table(counts, row_group, rows):
    with tempfile.TemporaryDirectory() as folder:
        parts, first = [], 0
        for i, count in enumerate(counts):
            ids = range(first, first + count)
            columns = {
                "uid": [str(n) for n in ids],
                "url": [None if n % 3 == 0 else f"u{n}" for n in ids],
                "tags": [[n] * (n % 4) for n in ids],
                "word": pa.array([f"w{n % 5}" for n in ids]).dictionary_encode(),
            }
            schema = pa.schema(
                [
                    ("uid", pa.string()),
                    ("url", pa.string()),
                    ("tags", pa.list_(pa.int64())),
                    ("word", pa.dictionary(pa.int32(), pa.string())),
                ]
            )
            parts.append(pa.table(columns, schema=schema))
            write(Path(folder, f"{i}.parquet"), parts[-1], row_group_size=row_group)
            first += count
        pool = Pool.open(folder)
        batches = list(pool.batches(rows))
        assert [b.num_rows for b in batches[:-1]] == [rows] * (len(batches) - 1)
        assert 0 < batches[-1].num_rows <= rows
        got = pa.Table.from_batches(batches).to_pylist()
        assert got == pa.concat_tables(parts).to_pylist()


def test_batches_of_some_shards_and_columns(tmp_path):
    for name in "ab":
        write(tmp_path / f"{name}.parquet", table(nr=range(10)))
    pool = Pool.open(tmp_path)
    (batch,) = pool.batches(shards=pool.shards[1:], columns=["nr", "text"])
    assert batch.schema.names == ["nr", "text"] and batch.num_rows == 10
    with pytest.raises(PoolError, match="did you mean 'text'"):
        list(pool.batches(columns=["txt"]))
    with pytest.raises(PoolError, match="at least one"):
        list(pool.batches(columns=[]))
    with pytest.raises(ValueError, match="at least 1"):
        list(pool.batches(0))


def test_dots_in_column_names(tmp_path):
    data = table(**{"exif.Model": ["m"] * 10, "exif": ["e"] * 10})
    assert everything(Pool.open(write(tmp_path / "a.parquet", data))).equals(data)


def test_memory_stays_bounded(tmp_path):
    noise = np.random.default_rng(0).bytes(100_000)
    with pq.ParquetWriter(tmp_path / "big.parquet", pa.schema([("jpg", pa.binary())])) as writer:
        for _ in range(10):  # row groups of 20 MB
            images = [noise[i:] + noise[:i] for i in range(200)]
            writer.write_table(pa.table({"jpg": pa.array(images, pa.binary())}))
    # Another process, since Arrow's peak counts from the start; not ru_maxrss, which a child
    # inherits from the process that forked it.
    code = (
        "import sys, pyarrow\n"
        "from curate.pool import Pool\n"
        "pool = Pool.open(sys.argv[1])\n"
        "assert sum(batch.num_rows for batch in pool.batches(64)) == 2000\n"
        "print(pyarrow.default_memory_pool().max_memory() >> 20)\n"
    )
    peak = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "big.parquet"],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).resolve().parents[2],
    )
    assert 0 < int(peak.stdout) < 90  # MiB, of 200
