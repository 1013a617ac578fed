from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from curate import sharded_rows
from curate.errors import ShardError
from curate.sharded_rows import ShardedRows, StoredRows


@given(sizes=st.lists(st.integers(0, 5), min_size=1, max_size=6), data=st.data())
def test_sharded_rows_are_one_array(sizes: list[int], data: st.DataObject) -> None:
    n = sum(sizes)
    whole = np.arange(2 * n, dtype=np.float16).reshape(n, 2)
    parts = np.split(whole, np.cumsum(sizes)[:-1])
    rows = ShardedRows(parts)
    assert rows.shape == (n, 2)
    start, stop = sorted([data.draw(st.integers(0, n)), data.draw(st.integers(0, n))])
    assert np.array_equal(rows[start:stop], whole[start:stop])
    assert np.array_equal(rows[::-1], whole[::-1])
    picked = st.lists(st.integers(0, n - 1), max_size=8) if n else st.just([])
    index = np.array(data.draw(picked), dtype=np.int64)
    assert np.array_equal(rows[index], whole[index])
    index.sort()
    subset = rows.subset(index)
    assert np.array_equal(subset[0 : len(index)], whole[index])
    assert np.array_equal(subset[1:3], whole[index][1:3])
    again = subset.subset(np.arange(len(index))[::2])
    assert np.array_equal(again[0 : len(again)], whole[index][::2])


def stored(folder: Path, parts: list[np.ndarray]) -> list[Path]:
    paths = [folder / f"{number}.npy" for number in range(len(parts))]
    for path, part in zip(paths, parts, strict=True):
        np.save(path, part)
    return paths


@pytest.mark.parametrize("mapped", [1 << 30, 0])
@pytest.mark.parametrize("order", ["C", "F"])
def test_rows_of_files(tmp_path, monkeypatch, mapped, order):
    """Mapped or read by need: the same rows for slices, and for numbers near and far apart."""
    monkeypatch.setattr(sharded_rows, "MOST_MAPPED", mapped)
    g = np.random.default_rng(0)
    whole = g.standard_normal((4000, 3)).astype(np.float16)
    parts = [np.asarray(part, order=order) for part in np.split(whole, [0, 7, 7, 1500, 2000])]
    rows = ShardedRows.of_files(stored(tmp_path, parts))
    assert isinstance(rows._parts[0], StoredRows) == (mapped == 0)
    assert rows.shape == whole.shape and rows.dtype == whole.dtype
    alive = np.flatnonzero(g.random(4000) < 0.7)
    for found, expected in ((rows, whole), (rows.subset(alive), whole[alive])):
        n = len(expected)
        np.testing.assert_array_equal(np.asarray(found), expected)
        np.testing.assert_array_equal(found[5 : n - 3], expected[5 : n - 3])
        np.testing.assert_array_equal(found[::3], expected[::3])
        for count in (0, 1, 9, 1000):
            index = g.integers(0, n, count)
            np.testing.assert_array_equal(found[index], expected[index])
            np.testing.assert_array_equal(found[np.sort(index)], expected[np.sort(index)])


def test_many_files_hold_none_open(tmp_path, monkeypatch):
    """A pool of ten thousand shards: a map each would be above the usual limit of open files."""
    resource = pytest.importorskip("resource")
    paths = stored(tmp_path, [np.full((2, 2), number) for number in range(300)])
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (250, hard))
    try:
        rows = ShardedRows.of_files(paths)
        assert rows[:,].sum() == 4 * sum(range(300))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("wanted", [slice(0, 100), np.arange(100), np.array([3, 99])])
def test_a_file_that_shrinks_is_told(tmp_path, monkeypatch, wanted):
    monkeypatch.setattr(sharded_rows, "MOST_MAPPED", 0)
    (path,) = stored(tmp_path, [np.zeros((100, 8))])
    rows = ShardedRows.of_files([path])
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 4)
    with pytest.raises(ShardError, match="shorter than when it was opened"):
        rows[wanted]


@pytest.mark.parametrize("damage", [b"", b"no array at all"])
def test_a_damaged_file_is_told(tmp_path, damage):
    path = tmp_path / "0.npy"
    path.write_bytes(damage)
    with pytest.raises(ShardError, match="missing or damaged"):
        ShardedRows.of_files([path])
