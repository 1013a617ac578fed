import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from curate.errors import PoolError
from curate.pool import Pool, unique_uids
from curate.uids import narrow
from tests.curate.pools import table, uids_of, write


def test_derived_uids_follow_the_contents_not_the_files(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "many").mkdir()
    data = table(20)
    write(tmp_path / "one/x.parquet", data)
    for i in range(4):
        part = data.slice(5 * i, 5).append_column("extra", pa.array(range(5)))
        write(tmp_path / f"many/{i}.parquet", part, row_group_size=2)
    one, many = uids_of(Pool.open(tmp_path / "one")), uids_of(Pool.open(tmp_path / "many"))
    assert one == many and len(set(one)) == 20 and {len(uid) for uid in one} == {32}


def test_derived_uids_of_rows_that_hold_the_same(tmp_path):
    data = pa.table({"url": ["a", "b", "a", "a"], "text": ["x", "x", "x", None]})
    got = uids_of(Pool.open(write(tmp_path / "p.parquet", data)))
    assert got[2] == f"{got[0]}-1" and len(set(got)) == 4


def test_derived_uid_of_a_failed_download_is_its_url(tmp_path):
    data = pa.table({"jpg": [b"a", None, None], "url": ["1", "2", "3"], "caption": ["x"] * 3})
    got = uids_of(Pool.open(write(tmp_path / "p.parquet", data)))
    assert not any("-" in uid for uid in got)


def test_null_uid_names_the_row(tmp_path):
    write(tmp_path / "a.parquet", table(uid=[str(i) for i in range(10)]))
    write(tmp_path / "b.parquet", table(uid=[*"abcd", None, *"efghi"]))
    pool = Pool.open(tmp_path)
    pool.shard_uids(pool.shards[0])
    with pytest.raises(PoolError, match="null in row 14"):
        pool.shard_uids(pool.shards[1])


def test_given_uids_that_repeat():
    with pytest.raises(
        PoolError, match=r"3 rows repeat.*'b' \(rows 1 and 2\), 'a' \(rows 0 and 4\)"
    ):
        unique_uids(pa.array(["a", "b", "b", "c", "a", "b"]), derived=False)


def test_numbered_uids_avoid_what_exists():
    got = unique_uids(pa.array(["a", "a", "a-1", "a", "a-1"]), derived=True).to_pylist()
    assert got[0] == "a" and got[2] == "a-1" and len(set(got)) == 5


@given(st.lists(st.sampled_from(["a", "b", "a-1", "a-1-1", "c"]), max_size=12), st.integers(1, 4))
def test_unique_uids_are_unique_and_keep_the_first(names, size):
    chunks = [pa.array(names[i : i + size]) for i in range(0, len(names), size)]
    got = unique_uids(pa.chunked_array(chunks, pa.string()), derived=True)
    assert got.type == pa.large_string()
    assert len(set(got.to_pylist())) == len(names)
    for row, name in enumerate(names):
        if names.index(name) == row:
            assert got[row].as_py() == name


def test_only_equal_uids_are_repeats_not_equal_hashes(monkeypatch):
    """Rows whose hashes collide are compared themselves."""
    import polars as pl

    collide = lambda self: pl.Series(np.zeros(len(self), dtype=np.uint64))  # noqa: E731
    monkeypatch.setattr(pl.Series, "hash", collide)
    different = pa.array(["b", "a", "c"])
    assert unique_uids(different, derived=False).to_pylist() == ["b", "a", "c"]
    again = pa.array(["b", "a", "b", "c", "a", "b"])
    assert unique_uids(again, derived=True).to_pylist() == ["b", "a", "b-1", "c", "a-1", "b-2"]
    with pytest.raises(PoolError, match=r"'b' \(rows 0 and 2\)"):
        unique_uids(again, derived=False)


def test_a_part_behind_the_first_two_gigabytes_is_stored():
    """Uids of 67 million rows and more: the memory before the part is never touched here."""
    size = 2**31 + 100
    data = np.zeros(size, dtype=np.uint8)
    data[-10:] = ord("a")
    offsets = np.array([0, 5, size - 10, size])
    buffers = pa.py_buffer(offsets), pa.py_buffer(data)
    uids = pa.LargeStringArray.from_buffers(3, *buffers)
    part = narrow(uids.slice(2))
    assert part.type == pa.string() and part.to_pylist() == ["a" * 10]
    assert narrow(uids.take(pa.array([None, 2]))).to_pylist() == [None, "a" * 10]
