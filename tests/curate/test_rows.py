import pyarrow as pa
import pytest

from curate.errors import PoolError
from curate.pool import Pool
from curate.rows import sample_batches
from tests.curate.pools import HF_IMAGE, rows_of, write

IMAGE_COLUMNS = [
    pa.array([b"a", None, b"c"]),
    pa.array([b"a", None, b"c"], pa.large_binary()),
    pa.array([{"bytes": b"a", "path": "x"}, None, {"bytes": b"c", "path": None}], HF_IMAGE),
    pa.array([{"bytes": b"a"}, {"bytes": None}, {"bytes": b"c"}]),
    pa.array(["a.jpg", None, "c.jpg"]),
    pa.array(["a.jpg", "", "c.jpg"]).dictionary_encode(),
    pa.array([{"bytes": None, "path": "a.jpg"}, None, {"bytes": b"c", "path": "x"}], HF_IMAGE),
]


@pytest.mark.parametrize("images", IMAGE_COLUMNS, ids=lambda a: str(a.type)[:30])
@pytest.mark.parametrize("rows", [1, 2, 256])
def test_every_kind_of_image_column(tmp_path, images, rows):
    (tmp_path / "a.jpg").write_bytes(b"a")
    (tmp_path / "c.jpg").write_bytes(b"c")
    pool = Pool.open(write(tmp_path / "p.parquet", pa.table({"image": images})))
    got = rows_of(pool, rows=rows)
    assert [row["image"] for row in got] == [b"a", None, b"c"]
    assert [row["detail"] for row in got] == [None, "the row holds no image", None]
    assert [row["text"] for row in got] == [None] * 3


def test_paths_outside_the_image_root(tmp_path):
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    root = tmp_path / "images"
    root.mkdir()
    (root / "in.jpg").write_bytes(b"in")
    (root / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    names = [
        "in.jpg",
        "../secret.jpg",
        str(tmp_path / "secret.jpg"),
        "link.jpg",
        "a\0b",
        "none.jpg",
    ]
    path = write(tmp_path / "p.parquet", pa.table({"file_name": names}))
    got = rows_of(Pool.open(path, image_root=root))
    assert [row["image"] for row in got] == [b"in"] + [None] * 5
    assert all("outside the image root" in row["detail"] for row in got[1:4])
    assert rows_of(Pool.open(path))[1]["image"] is None
    with pytest.raises(PoolError, match="not a folder"):
        Pool.open(path, image_root=tmp_path / "nowhere")


@pytest.mark.parametrize("images", IMAGE_COLUMNS[:4], ids=lambda a: str(a.type)[:30])
def test_sliced_arrays(images):
    padded = pa.concat_arrays([images.slice(1, 1), images, images.slice(0, 1)])
    whole = pa.RecordBatch.from_arrays([padded, pa.array(list("zabcz"))], names=["image", "text"])
    batches = sample_batches(whole.slice(1, 3), image="image", text="text", url=None, folder=None)
    (got,) = batches
    assert got.column("image").to_pylist() == [b"a", None, b"c"]
    assert got.column("text").to_pylist() == ["a", "b", "c"]


def test_text_is_untouched_but_valid(tmp_path):
    texts = pa.array([b"<script>alert(1)</script>", b"caf\xe9", None, b""]).view(pa.string())
    pool = Pool.open(write(tmp_path / "p.parquet", pa.table({"url": ["u"] * 4, "text": texts})))
    got = rows_of(pool)
    assert [row["text"] for row in got] == ["<script>alert(1)</script>", "caf\ufffd", None, ""]
    assert [row["url"] for row in got] == ["u"] * 4
    assert len(set(pool.shard_uids(pool.shards[0]).to_pylist())) == 4
