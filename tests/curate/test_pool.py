import pickle
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curate.columns import ColumnMapping
from curate.errors import PoolError, ShardError
from curate.pool import Pool
from tests.curate.pools import everything, one_line, table, write


def test_a_file(tmp_path):
    pool = Pool.open(write(tmp_path / "a.parquet", table()))
    assert len(pool) == 10 and pool.columns == ["image", "text"]
    assert pool.mapping == ColumnMapping(image="image", text="text")
    assert not pool.url_only


def test_a_folder_in_order_of_names(tmp_path):
    for name, shift in (("b", 10), ("a", 0), ("c", 20)):
        rows = [f"caption {i + shift}" for i in range(10)]
        write(tmp_path / f"{name}.parquet", table(text=rows))
    (tmp_path / "README.md").write_text("x")
    (tmp_path / ".hidden.parquet").write_text("x")
    (tmp_path / "_metadata.parquet").write_text("x")
    pool = Pool.open(tmp_path)
    assert everything(pool)["text"].to_pylist() == [f"caption {i}" for i in range(30)]
    assert [(s.index, s.rows, s.first_row) for s in pool.shards] == [
        (0, 10, 0),
        (1, 10, 10),
        (2, 10, 20),
    ]
    assert len(Pool.open(f"{tmp_path}/[ab].parquet")) == 20


def test_one_level_of_folders(tmp_path):
    (tmp_path / "data").mkdir()
    write(tmp_path / "data/train-0.parquet", table())
    assert len(Pool.open(tmp_path)) == 10
    write(tmp_path / "top.parquet", table())
    with pytest.raises(PoolError, match="glob"):
        Pool.open(tmp_path)


def test_a_folder_whose_name_looks_like_a_glob(tmp_path):
    folder = tmp_path / "data[1]"
    folder.mkdir()
    write(folder / "a.parquet", table())
    assert len(Pool.open(folder)) == 10


@pytest.mark.parametrize("source", ["nothing", "nothing.parquet", "*.parquet"])
def test_nothing_there(tmp_path, source):
    with pytest.raises(PoolError, match=r"does not exist|holds no") as caught:
        Pool.open(tmp_path / source)
    one_line(caught)


def test_an_empty_folder_and_a_csv(tmp_path):
    with pytest.raises(PoolError, match="holds no"):
        Pool.open(tmp_path)
    (tmp_path / "a.csv").write_text("a,b")
    with pytest.raises(PoolError, match="must end in"):
        Pool.open(tmp_path / "a.csv")


def test_remote():
    filesystem = fsspec.filesystem("memory")
    for i in range(2):
        with filesystem.open(f"/bucket/pool/{i}.parquet", "wb") as file:
            pq.write_table(table(), file)
    pool = Pool.open("memory://bucket/pool")
    assert len(pool) == 20 and everything(pool).num_rows == 20
    assert len(Pool.open("memory://bucket/pool/*.parquet")) == 20
    assert len(Pool.open("memory://bucket/pool/0.parquet")) == 10
    assert sum(b.num_rows for s in pool.shards for b in pool.samples(s)) == 20
    assert len(pool.fingerprint()) == 64
    with pytest.raises(PoolError, match="does not exist"):
        Pool.open("memory://bucket/none")
    with pytest.raises(PoolError, match="fsspec"):
        Pool.open("nosuchprotocol://bucket/x.parquet")


def test_remote_paths_need_an_image_root():
    with fsspec.open("memory://paths/a.parquet", "wb") as file:
        pq.write_table(pa.table({"file_name": ["a.jpg"]}), file)
    with pytest.raises(PoolError, match="image-root"):
        Pool.open("memory://paths/a.parquet")


@pytest.mark.parametrize("keep", [0, 3, 0.5, -1])
def test_truncated_parquet(tmp_path, keep):
    path = write(tmp_path / "a.parquet", table())
    raw = path.read_bytes()
    path.write_bytes(raw[: int(len(raw) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(PoolError, match=r"a\.parquet cannot be read as Parquet") as caught:
        Pool.open(path)
    one_line(caught)


def test_damaged_pages(tmp_path):
    path = write(tmp_path / "a.parquet", table(1000), row_group_size=100)
    pool = Pool.open(path)
    raw = bytearray(path.read_bytes())
    raw[100:60_000] = b"\xff" * 59_900
    path.write_bytes(raw)
    with pytest.raises(ShardError, match=r"a\.parquet \(row groups 0 to 9\) is damaged"):
        everything(pool)


def test_row_groups_without_a_kept_row_are_not_read(tmp_path):
    """A report that shows ten rows of a shard of a gigabyte reads ten row groups."""
    data = table(1000)
    path = write(tmp_path / "a.parquet", data, row_group_size=100)
    pool = Pool.open(path)
    raw = bytearray(path.read_bytes())
    start = pq.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    stop = pq.ParquetFile(path).metadata.row_group(3).column(0).dictionary_page_offset or 0
    assert 0 < start < stop
    raw[start:stop] = b"\xff" * (stop - start)
    path.write_bytes(raw)
    kept = np.zeros(1000, dtype=bool)
    kept[[0, 17, 99, 301, 999]] = True
    (batch,) = pool.export_batches(pool.shards[0], kept)
    assert batch["text"].to_pylist() == data["text"].filter(pa.array(kept)).to_pylist()
    kept[150] = True
    with pytest.raises(ShardError, match="damaged"):
        list(pool.export_batches(pool.shards[0], kept))


def test_a_file_that_changes_afterwards(tmp_path):
    pool = Pool.open(write(tmp_path / "a.parquet", table(10)))
    write(tmp_path / "a.parquet", table(11))
    with pytest.raises(ShardError, match="changed since"):
        everything(pool)


def test_no_rows(tmp_path):
    write(tmp_path / "a.parquet", table().slice(0, 0))
    with pytest.raises(PoolError, match="0 rows"):
        Pool.open(tmp_path)
    write(tmp_path / "b.parquet", table())
    pool = Pool.open(tmp_path)
    assert len(pool) == 10 and [s.index for s in pool.shards] == [0]


def test_shards_must_agree(tmp_path):
    write(tmp_path / "a.parquet", table(score=pa.array(range(10), pa.int32())))
    write(tmp_path / "b.parquet", table(score=pa.array(range(10), pa.int64())))
    with pytest.raises(PoolError, match=r"'score' is int64 in b\.parquet but int32 in a\.parquet"):
        Pool.open(tmp_path)
    write(tmp_path / "b.parquet", table())
    with pytest.raises(PoolError, match=r"b\.parquet lacks the column 'score'"):
        Pool.open(tmp_path)


def test_shards_may_differ_in_order_and_in_columns_of_nulls(tmp_path):
    write(tmp_path / "a.parquet", table(note=pa.nulls(10)))
    write(tmp_path / "b.parquet", table(note=["n"] * 10).select(["note", "text", "image"]))
    whole = everything(Pool.open(tmp_path))
    assert whole.column_names == ["image", "text", "note"]
    assert whole["note"].to_pylist() == [None] * 10 + ["n"] * 10


def test_fingerprint(tmp_path):
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        for name in "ab":
            write(tmp_path / folder / f"{name}.parquet", table())
    x, y = Pool.open(tmp_path / "x"), Pool.open(tmp_path / "y")
    assert x.fingerprint() == y.fingerprint() == Pool.open(tmp_path / "x").fingerprint()
    assert Pool.open(tmp_path / "y", text_col="").fingerprint() != x.fingerprint()
    raw = bytearray((tmp_path / "y/b.parquet").read_bytes())
    raw[20] ^= 1
    (tmp_path / "y/b.parquet").write_bytes(raw)
    assert y.fingerprint() != x.fingerprint()


def test_pickle_and_repr(tmp_path):
    folder = tmp_path / "<b>x"
    folder.mkdir()
    pool = Pool.open(write(folder / "a.parquet", table()))
    again = pickle.loads(pickle.dumps(pool))
    assert everything(again).equals(everything(pool)) and again.shards == pool.shards
    assert "rows: 10" in repr(pool) and "image=image" in repr(pool)
    shown = pool._repr_html_()
    assert "<b>x" not in shown and "&lt;b&gt;x" in shown


def test_take_rows_for_a_look(tmp_path: Path) -> None:
    numbers = list(range(300))
    table = pa.table({"image": [b"%d" % i for i in numbers], "text": [str(i) for i in numbers]})
    pq.write_table(table, tmp_path / "p.parquet", row_group_size=40)
    pool = Pool.open(tmp_path / "p.parquet")
    found = pool.take([250, 3, 250, 41])
    assert found["text"].to_pylist() == ["250", "3", "250", "41"]
    assert found["image"][1].as_py()["bytes"] == b"3"
    assert pool.take([]).num_rows == 0
    with pytest.raises(IndexError, match=r"0 \.\.\. 299"):
        pool.take([300])
