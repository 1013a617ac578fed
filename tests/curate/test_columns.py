import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from curate.columns import ColumnMapping, map_columns
from curate.errors import PoolError
from curate.pool import Pool
from tests.curate.pools import one_line, table, write


def schema(**columns):
    return pa.schema(list(columns.items()))


@pytest.mark.parametrize(
    ("names", "echo"),
    [
        (["URL", "TEXT", "similarity", "NSFW"],
         "image=none text=TEXT url=URL uid=derived score=similarity"),
        (["uid", "url", "text", "clip_b32_similarity_score", "clip_l14_similarity_score"],
         "image=none text=text url=url uid=uid score=clip_l14_similarity_score"),
        (["caption", "url", "key", "status", "jpg"], "image=jpg text=caption url=url uid=derived"),
        (["Text", "TEXT", "text", "url"], "image=none text=text url=url uid=derived"),
        (["caption", "TEXT", "image_path", "PNG"], "image=PNG text=TEXT url=none uid=derived"),
    ],
)  # fmt: skip
def test_aliases(names, echo):
    kinds = {name: pa.float32() if "simil" in name else pa.string() for name in names}
    assert map_columns(schema(**kinds), given={}).describe() == echo


@given(st.permutations(["Image", "CAPTION", "Text", "URL", "other", "uid"]))
def test_aliases_do_not_depend_on_the_order(names):
    found = map_columns(pa.schema([(name, pa.string()) for name in names]), given={})
    assert found == ColumnMapping(image="Image", text="Text", url="URL", uid="uid")


def test_embedding_alias_needs_floats():
    assert map_columns(schema(emb=pa.list_(pa.int64())), given={}).embedding is None
    for kind in (pa.list_(pa.float16()), pa.list_(pa.float64(), 4), pa.large_list(pa.float32())):
        assert map_columns(schema(emb=kind), given={}).embedding == "emb"


def test_an_alias_of_the_wrong_type_gives_way_to_the_next():
    found = map_columns(schema(image=pa.int64(), jpg=pa.binary()), given={})
    assert found.image == "jpg"


@pytest.mark.parametrize(
    ("role", "kind"),
    [("image", pa.int64()), ("text", pa.float32()), ("text", pa.list_(pa.string())),
     ("url", pa.binary()), ("uid", pa.float64()), ("clip_score", pa.string())],
)  # fmt: skip
def test_wrong_types(role, kind):
    with pytest.raises(PoolError, match=r"has type .* allowed: ") as caught:
        map_columns(schema(**{role: kind}), given={})
    assert str(kind) in one_line(caught)


def test_named_columns(tmp_path):
    path = write(tmp_path / "a.parquet", table(TEKST=["t"] * 10, nr=range(10), url=["u"] * 10))
    pool = Pool.open(path, text_col="TEKST", uid_col="nr", image_col="")
    assert pool.mapping == ColumnMapping(text="TEKST", uid="nr", url="url")
    assert pool.shard_uids(pool.shards[0])[3].as_py() == "3" and pool.url_only
    with pytest.raises(PoolError, match=r"--text-col: .*did you mean 'TEKST'.*Columns: image"):
        Pool.open(path, text_col="tekst_")
    with pytest.raises(PoolError, match="int64"):
        Pool.open(path, text_col="nr")


def test_neither_image_nor_url(tmp_path):
    path = write(tmp_path / "a.parquet", pa.table({"text": ["a"], "n": [1]}))
    with pytest.raises(PoolError, match=r"columns are text, n\. Name one with --image-col"):
        Pool.open(path)


def test_repeated_column_names(tmp_path):
    twice = pa.Table.from_arrays([pa.array(["a"])] * 2, names=["url", "url"])
    with pytest.raises(PoolError, match="more than one column named 'url'"):
        Pool.open(write(tmp_path / "a.parquet", twice))
