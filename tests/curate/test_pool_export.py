import io
import json
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from curate.pool import Pool
from tests.curate.pools import HF_IMAGE, everything, jpeg, table, write

DATA = Path(__file__).resolve().parents[2].parent / "shared/data"


def export(pool, path, kept=lambda row: True):
    schema = pool.export_schema()
    with pq.ParquetWriter(path, schema) as writer:
        for shard in pool.shards:
            mask = np.array([kept(shard.first_row + row) for row in range(shard.rows)])
            for batch in pool.export_batches(shard, mask, rows=4):
                assert batch.schema.equals(schema, check_metadata=True)
                writer.write_batch(batch)
    return path


def load(path, tmp_path, **options):
    return datasets.load_dataset(
        "parquet", data_files=str(path), split="train", cache_dir=str(tmp_path / "hf"), **options
    )


@pytest.mark.parametrize("kind", ["binary", "large_binary", "struct", "large_struct", "path"])
def test_export_is_decoded_by_datasets(tmp_path, kind):
    files = [jpeg(20 * i) for i in range(10)]
    for i, file in enumerate(files):
        (tmp_path / f"{i}.jpg").write_bytes(file)
    structs = [{"bytes": file, "path": f"{i}.jpg"} for i, file in enumerate(files)]
    large = pa.struct([("bytes", pa.large_binary()), ("path", pa.large_string())])
    images = {
        "binary": pa.array(files),
        "large_binary": pa.array(files, pa.large_binary()),
        "struct": pa.array(structs, HF_IMAGE),
        "large_struct": pa.array(structs, large),
        "path": pa.array([f"{i}.jpg" for i in range(10)]),
    }[kind]
    data = pa.table({"n": range(10), "image": images, "text": ["<b>"] * 10})
    pool = Pool.open(write(tmp_path / "p.parquet", data, row_group_size=3))
    path = export(pool, tmp_path / "out.parquet", lambda row: row % 2 == 1)
    for streaming in (False, True):
        rows = list(load(path, tmp_path, streaming=streaming))
        assert [row["n"] for row in rows] == [1, 3, 5, 7, 9]
        for row in rows:
            assert isinstance(row["image"], Image.Image)
            expected = Image.open(io.BytesIO(files[row["n"]]))
            np.testing.assert_array_equal(np.asarray(row["image"]), np.asarray(expected))
    again = Pool.open(path)
    assert len(again) == 5 and again.mapping.image == "image"
    stored = pq.read_table(path)["image"].to_pylist()
    assert stored[0]["bytes"] == files[1]
    assert stored[0]["path"] == (None if "binary" in kind else "1.jpg")


def test_export_keeps_other_features_and_metadata(tmp_path):
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])}
    )
    metadata = {**features.arrow_schema.metadata, b"mine": b"kept"}
    data = pa.table({"image": pa.array([{"bytes": jpeg(1), "path": None}], HF_IMAGE), "label": [1]})
    data = data.replace_schema_metadata(metadata)
    pool = Pool.open(write(tmp_path / "p.parquet", data))
    path = export(pool, tmp_path / "out.parquet")
    assert load(path, tmp_path).features["label"].names == ["cat", "dog"]
    assert pq.read_schema(path).metadata[b"mine"] == b"kept"
    assert everything(Pool.open(path)).equals(everything(pool))


@pytest.mark.parametrize("broken", [b"{", b"[]", b'{"info": 3}', b'{"info": {"features": []}}'])
def test_export_mends_a_broken_huggingface_key(tmp_path, broken):
    data = table().replace_schema_metadata({"huggingface": broken})
    pool = Pool.open(write(tmp_path / "p.parquet", data))
    merged = json.loads(pool.export_schema().metadata[b"huggingface"])
    assert merged["info"]["features"]["image"] == {"_type": "Image"}


def test_export_of_missing_images_and_bad_masks(tmp_path):
    data = pa.table({"image": ["../x.jpg", None], "text": ["a", "b"]})
    pool = Pool.open(write(tmp_path / "p.parquet", data))
    (shard,) = pool.shards
    (batch,) = pool.export_batches(shard, np.array([True, True]))
    assert batch.column("image").to_pylist() == [{"bytes": None, "path": "../x.jpg"}, None]
    assert list(pool.export_batches(shard, np.array([False, False]))) == []
    for wrong in (np.array([True]), np.array([1, 0])):
        with pytest.raises(ValueError, match="2 bool values"):
            list(pool.export_batches(shard, wrong))


def test_export_of_a_pool_without_images(tmp_path):
    data = pa.table({"URL": ["a", "b"], "TEXT": ["x", "y"]})
    pool = Pool.open(write(tmp_path / "p.parquet", data))
    assert pool.url_only and pool.export_schema() == pool.schema
    (batch,) = pool.export_batches(pool.shards[0], np.array([False, True]))
    assert batch.to_pylist() == [{"URL": "b", "TEXT": "y"}]


@pytest.mark.parametrize(
    ("name", "rows"),
    [("imagenet-1-per-class", 1000), ("cifar10-test", 10_000), ("cifar10-train", 50_000)],
)
def test_real_data(name, rows, tmp_path):
    path = DATA / f"{name}.parquet"
    if not path.exists():
        pytest.skip("research data, not part of the repository")
    pool = Pool.open(path)
    assert len(pool) == rows == sum(shard.rows for shard in pool.shards)
    assert sum(batch.num_rows for batch in pool.batches(columns=pool.columns[1:])) == rows
    first = next(pool.samples(pool.shards[-1]))
    assert first.column("image").null_count == 0
    out = export(pool, tmp_path / "o.parquet", lambda row: row < 6)
    assert (
        load(out, tmp_path)[5]["image"].size
        == Image.open(io.BytesIO(first.column("image")[5].as_py())).size
        or len(pool.shards) > 1
    )
