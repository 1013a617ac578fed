from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from curate.embeddings import (
    Embeddings,
    image_path,
    unit_float16,
    write_embedding_part,
)
from curate.errors import ShardError
from curate.manifest import open_step


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
