from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from curate.embeddings import (
    Embeddings,
    ShardedRows,
    image_path,
    unit_float16,
    write_embedding_part,
)
from curate.errors import ShardError
from curate.manifest import open_step


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


def test_unit_rows_of_any_scale() -> None:
    x = np.array([[3, 4], [0, 0], [np.nan, 1], [np.inf, 0], [3e4, 4e4], [3e-5, 4e-5]])
    rows, good = unit_float16(x)
    assert good.tolist() == [True, False, False, False, True, True]
    np.testing.assert_allclose(rows[good].astype(float), [[0.6, 0.8]] * 3, atol=1e-3)
    assert not rows[~good].any()


def test_unit_rows_stay_as_they_are() -> None:
    """Whatever other rows are there."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(20, 64))
    x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float16)
    mixed = np.concatenate([x * np.float16(3), np.zeros((1, 64), np.float16), x])
    assert np.array_equal(unit_float16(x)[0], x)
    assert np.array_equal(unit_float16(mixed)[0][21:], x)


def folder(path: Path, *, complete: bool = True) -> Path:
    step = open_step(path, step="embed", step_version=1, params={}, inputs={})
    columns = {
        "uid": ["a", "b"],
        "status": ["ok", "missing"],
        "detail": [None, "x"],
        "text_status": ["ok", "ok"],
    }
    x = np.eye(2, dtype=np.float16)
    write_embedding_part(path, 0, image=x, text=None, metadata=pa.table(columns))
    if complete:
        step.finish(parts=1, rows=2)
    return path


def test_open(tmp_path: Path) -> None:
    found = Embeddings.open(folder(tmp_path / "emb"))
    assert len(found) == 2
    assert found.text is None
    assert found.metadata(["status"]).to_pylist() == [{"status": "ok"}, {"status": "missing"}]
    assert "2 rows x 2" in found._repr_html_()


def test_incomplete_or_damaged(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="no embeddings"):
        Embeddings.open(tmp_path)
    with pytest.raises(ShardError, match="not complete"):
        Embeddings.open(folder(tmp_path / "half", complete=False))
    damaged = folder(tmp_path / "emb")
    image_path(damaged, 0).write_bytes(b"\x93NUMPY")
    with pytest.raises(ShardError, match=r"img_emb_0000\.npy is missing or damaged"):
        _ = Embeddings.open(damaged).image
