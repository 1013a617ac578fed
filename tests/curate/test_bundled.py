import pickle

import numpy as np
import pyarrow as pa
import pytest

from curate.errors import PoolError
from curate.pool import Pool
from tests.curate.pools import rows_of, uids_of, write


def embeddings_of(pool):
    parts = [pool.bundled_embeddings.rows_of(shard) for shard in pool.shards]
    images = np.concatenate([image for image, _ in parts])
    return images, None if parts[0][1] is None else np.concatenate([text for _, text in parts])


def make_clip_retrieval(folder, counts=(70_000, 10)):
    for name in ("img_emb", "text_emb", "metadata"):
        (folder / name).mkdir(parents=True)
    total = sum(counts)
    vectors = np.arange(total * 2, dtype=np.float32).reshape(total, 2)
    first = 0
    for i, count in enumerate(counts):
        part = vectors[first : first + count]
        np.save(folder / f"img_emb/img_emb_{i:02}.npy", part)
        np.save(folder / f"text_emb/text_emb_{i:02}.npy", -part)
        data = pa.table({"image_path": [f"{j:09}" for j in range(count)], "caption": ["c"] * count})
        write(folder / f"metadata/metadata_{i:02}.parquet", data, row_group_size=1000)
        first += count
    return vectors


def test_clip_retrieval(tmp_path):
    vectors = make_clip_retrieval(tmp_path / "run")
    pool = Pool.open(tmp_path / "run")
    assert len(pool) == 70_010
    assert [shard.rows for shard in pool.shards] == [65_000, 5_000, 10]
    assert pool.bundled_embeddings.kind == "clip-retrieval"
    images, texts = embeddings_of(pickle.loads(pickle.dumps(pool)))
    np.testing.assert_array_equal(images, vectors)
    np.testing.assert_array_equal(texts, -vectors)
    assert isinstance(pool.bundled_embeddings.rows_of(pool.shards[1])[0], np.memmap)
    before = pool.fingerprint()
    np.save(tmp_path / "run/img_emb/img_emb_01.npy", np.ones((10, 2), np.float32))
    assert Pool.open(tmp_path / "run").fingerprint() != before


def test_clip_retrieval_that_does_not_fit(tmp_path):
    make_clip_retrieval(tmp_path, (5, 5))
    np.save(tmp_path / "img_emb/img_emb_01.npy", np.ones((4, 2), np.float16))
    with pytest.raises(PoolError, match=r"metadata_01\.parquet has 5 rows but .* has 4"):
        Pool.open(tmp_path)
    (tmp_path / "img_emb/img_emb_01.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(PoolError, match=r"cannot be read as \.npy"):
        Pool.open(tmp_path)
    (tmp_path / "img_emb/img_emb_01.npy").unlink()
    with pytest.raises(PoolError, match=r"has no img_emb/img_emb_1\.npy"):
        Pool.open(tmp_path)
    assert len(Pool.open(f"{tmp_path}/metadata/*.parquet")) == 10


def test_pickled_npy_is_not_loaded(tmp_path):
    make_clip_retrieval(tmp_path, (2,))
    np.save(tmp_path / "img_emb/img_emb_00.npy", np.array([{}, {}], dtype=object))
    with pytest.raises(PoolError, match=r"cannot be read as \.npy"):
        Pool.open(tmp_path)


def test_datacomp(tmp_path):
    vectors = np.random.default_rng(0).normal(size=(30, 4)).astype(np.float16)
    for i in range(3):
        part = vectors[10 * i : 10 * i + 10]
        data = pa.table({"uid": [f"{i}{j}" for j in range(10)], "url": ["u"] * 10})
        write(tmp_path / f"{i}.parquet", data, row_group_size=3)
        np.savez(tmp_path / f"{i}.npz", l14_img=part, l14_txt=-part, b32_img=part[:, :2])
    pool = Pool.open(tmp_path)
    found = pool.bundled_embeddings
    assert (found.kind, found.name, found.has_text) == ("datacomp", "l14", True)
    images, texts = embeddings_of(pool)
    np.testing.assert_array_equal(images, vectors)
    np.testing.assert_array_equal(texts, -vectors)
    np.savez(tmp_path / "2.npz", l14_img=vectors[:9])
    with pytest.raises(PoolError, match=r"2\.parquet has 10 rows but .*2\.npz has 9"):
        Pool.open(tmp_path)
    np.savez(tmp_path / "2.npz", other=vectors[:10])
    with pytest.raises(PoolError, match="in common"):
        Pool.open(tmp_path)
    assert Pool.open(tmp_path / "2.parquet").bundled_embeddings is None
    (tmp_path / "2.npz").write_bytes(b"PK")
    with pytest.raises(PoolError, match=r"cannot be read as \.npz"):
        Pool.open(tmp_path)
    (tmp_path / "2.npz").unlink()
    with pytest.raises(PoolError, match=r"2\.parquet has no 2\.npz"):
        Pool.open(tmp_path)


@pytest.mark.parametrize(
    "kind",
    [pa.list_(pa.float16()), pa.list_(pa.float32(), 3), pa.list_(pa.float16(), 3),
     pa.large_list(pa.float64())],
    ids=str,
)  # fmt: skip
def test_embedding_column(tmp_path, kind):
    vectors = np.arange(60, dtype=np.float32).reshape(20, 3)
    rows = [None if i in (0, 7, 19) else list(vectors[i]) for i in range(20)]
    width = [np.float16(v) if kind.value_type == pa.float16() else v for v in range(60)]
    rows = [None if r is None else [width[int(v)] for v in r] for r in rows]
    data = pa.table({"emb": pa.array(rows, kind)}).slice(0, 20)
    pool = Pool.open(write(tmp_path / "p.parquet", data, row_group_size=6))
    assert pool.bundled_embeddings.kind == "column"
    images, texts = embeddings_of(pool)
    vectors[[0, 7, 19]] = np.nan
    np.testing.assert_array_equal(images.astype(np.float32), vectors)
    assert texts is None and len(set(uids_of(pool))) == 20
    assert [row["detail"] for row in rows_of(pool)] == ["the pool holds no images"] * 20


def test_embedding_column_of_several_lengths(tmp_path):
    data = pa.table({"emb": [[1.0, 2.0], [1.0]]})
    pool = Pool.open(write(tmp_path / "p.parquet", data))
    with pytest.raises(PoolError, match="rows of 1 and of 2 numbers"):
        pool.bundled_embeddings.rows_of(pool.shards[0])
