"""Embeddings that do not fit, are damaged or hostile; rows of them that have no direction."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from tests.conftest import tree
from tests.pipelines.bad_input import (
    Command,
    Trap,
    as_column,
    check_error,
    check_nothing_whole,
    check_refused,
    check_whole,
    is_complete,
    parts_of,
    table,
    vectors,
    write,
    write_embeddings,
)


@pytest.fixture
def curate(capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(capsys)


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    """Two shards of ten rows, with embeddings of their own that the flag goes before."""
    for shard in range(2):
        write(tmp_path / "pool" / f"{shard}.parquet", table(20).slice(10 * shard, 10))
    return tmp_path / "pool"


# --- rows without a direction -----------------------------------------------------------------


def spoiled(kind: type[np.floating[Any]]) -> np.ndarray:
    x = vectors(20).astype(kind)
    x[0], x[5, 3], x[6, 0], x[7] = np.nan, np.nan, np.inf, 0
    x[19, 7] = -np.inf
    return x


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_bad_rows_of_a_column(curate: Command, tmp_path: Path, kind: Any) -> None:
    """They are recorded, and the kept fraction is still of all rows."""
    pool = write(tmp_path / "pool.parquet", table(embedding=as_column(spoiled(kind))))
    ended = curate.prune(pool, tmp_path / "run", "--dedup-mode", "none", keep=0.75)
    assert ended.code == 0, ended.err
    check_bad_rows(check_whole(tmp_path / "run", 20, 15), {0, 5, 6, 7, 19})


def test_bad_rows_of_a_folder(curate: Command, pool: Path, tmp_path: Path) -> None:
    x = spoiled(np.float16)
    folder = write_embeddings(tmp_path / "emb", x[:7], x[7:])
    ended = curate.prune(pool, tmp_path / "run", "--embeddings", folder, "--dedup-mode", "none")
    assert ended.code == 0, ended.err
    check_bad_rows(check_whole(tmp_path / "run", 20, 6), {0, 5, 6, 7, 19})


def test_null_rows(curate: Command, tmp_path: Path) -> None:
    """Null rows, and lists with a null in them, of a list column without a fixed length."""
    rows: list[Any] = vectors(20).tolist()
    rows[2], rows[4][1] = None, None
    column = pa.array(rows, pa.list_(pa.float32()))
    pool = write(tmp_path / "pool.parquet", table(embedding=column), row_group_size=3)
    ended = curate.prune(pool, tmp_path / "run", "--dedup-mode", "none")
    assert ended.code == 0, ended.err
    check_bad_rows(check_whole(tmp_path / "run", 20, 6), {2, 4})


def check_bad_rows(ledger: pa.Table, bad: set[int]) -> None:
    for number, row in enumerate(ledger.to_pylist()):
        assert (row["reason"] == "bad_embedding") == (number in bad), row
        if number in bad:
            assert row["detail"], "a row that failed says why"
            assert (row["kept"], row["cluster"], row["cosine_distance"]) == (False, None, None)


def test_numbers_beyond_float32(curate: Command, tmp_path: Path) -> None:
    """Of a double column; whatever becomes of those rows, it is recorded without a fuss."""
    x = vectors(20).astype(np.float64)
    x[0] *= 1e300
    x[1] *= 1e-300
    pool = write(tmp_path / "pool.parquet", table(embedding=as_column(x)))
    ended = curate.prune(pool, tmp_path / "run", "--dedup-mode", "none")
    assert ended.code == 0, ended.err
    assert "RuntimeWarning" not in ended.err
    check_whole(tmp_path / "run", 20, 6)


def test_too_many_bad_rows(curate: Command, tmp_path: Path) -> None:
    """Above --max-failed the exit code is 1, and the output is whole all the same."""
    x = vectors(20)
    x[:11] = np.nan
    pool = write(tmp_path / "pool.parquet", table(embedding=as_column(x)))
    run = tmp_path / "run"
    for _ in range(2):  # the second time there is nothing to do, but the rows failed all the same
        ended = curate.prune(pool, run, "--dedup-mode", "none")
        check_error(ended, 1, "11 of 20 rows", "--max-failed 0.5", "result is written")
        check_whole(run, 20, 6)
    assert curate.prune(pool, run, "--dedup-mode", "none", "--max-failed", 0.55).code == 0
    strict = curate.prune(pool, run, "--dedup-mode", "none", "--max-failed", 0)
    check_error(strict, 1, "11 of 20 rows")


def test_no_good_row(curate: Command, tmp_path: Path) -> None:
    """Nothing is left to keep: exit 3 with the counts, or an empty result that is whole."""
    pool = write(tmp_path / "pool.parquet", table(embedding=as_column(np.zeros((20, 8), "f4"))))
    ended = curate.prune(pool, tmp_path / "refused")
    check_refused(ended, 3, tmp_path / "refused", "20 rows is 6", "only 0 ", "20 bad_embedding")
    ended = curate.prune(pool, tmp_path / "run", "--allow-fewer", "--max-failed", 1)
    assert ended.code == 0, ended.err
    check_bad_rows(check_whole(tmp_path / "run", 20, 0), set(range(20)))
    empty = pa.nulls(20, pa.list_(pa.float32()))
    pool = write(tmp_path / "null.parquet", table(embedding=empty))
    ended = curate.prune(pool, tmp_path / "null", "--allow-fewer", "--max-failed", 1)
    assert ended.code == 0, ended.err
    check_bad_rows(check_whole(tmp_path / "null", 20, 0), set(range(20)))


def test_shard_without_any(curate: Command, tmp_path: Path) -> None:
    """Every row of a shard is null, in lists without a fixed length: rows like any bad ones."""
    kind = pa.list_(pa.float32())
    full, none = pa.array(vectors(20).tolist(), kind), pa.nulls(20, kind)
    for shard, rows in enumerate((none, full, none)):
        uids = [f"{shard}-{i}" for i in range(20)]
        write(tmp_path / "pool" / f"{shard}.parquet", table(uid=uids, embedding=rows))
    flags = ["--dedup-mode", "none", "--max-failed", 1]
    ended = curate.prune(tmp_path / "pool", tmp_path / "run", *flags)
    assert ended.code == 0, ended.err
    check_bad_rows(check_whole(tmp_path / "run", 60, 17), {*range(20), *range(40, 60)})


@pytest.mark.parametrize("group", [4, 100])
def test_rows_of_different_lengths(curate: Command, tmp_path: Path, group: int) -> None:
    rows = vectors(20).tolist()
    rows[13] = rows[13][:5]
    column = pa.array(rows, pa.list_(pa.float32()))
    pool = write(tmp_path / "pool.parquet", table(embedding=column), row_group_size=group)
    ended = curate.prune(pool, tmp_path / "run")
    check_refused(ended, 1, tmp_path / "run", "'embedding'", "5.*8|8.*5", "one length")


def test_shards_of_different_lengths(curate: Command, tmp_path: Path) -> None:
    """In shards, each of one length; lists without a fixed length have one schema."""
    for shard, width in enumerate((8, 5)):
        uids = [f"{shard}-{i}" for i in range(20)]
        rows = pa.array(vectors(20, width).tolist(), pa.list_(pa.float32()))
        write(tmp_path / "pool" / f"{shard}.parquet", table(uid=uids, embedding=rows))
    ended = curate.prune(tmp_path / "pool", tmp_path / "run")
    check_refused(ended, 1, tmp_path / "run", "5.*8|8.*5", "one length|width")


def test_own_files_of_different_lengths(curate: Command, tmp_path: Path) -> None:
    """The same in the pool's own .npy files, as clip-retrieval leaves them beside the metadata."""
    folder = write_embeddings(tmp_path / "pool", vectors(10, 8), vectors(10, 5))
    for shard in range(2):
        rows = table(20, embedding=None).slice(10 * shard, 10)
        write(folder / "metadata" / f"metadata_{shard}.parquet", rows)
    ended = curate.prune(folder, tmp_path / "run")
    check_refused(ended, 1, tmp_path / "run", "img_emb|metadata_1", "5.*8|8.*5", "one length|width")


# --- --embeddings of another pool -------------------------------------------------------------


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ([19], ["19 rows", "20"]),
        ([21], ["21 rows", "20"]),
        ([10, 9], ["19 rows", "20"]),
        ([0], ["0 rows", "20"]),
    ],
)
def test_another_number_of_rows(
    curate: Command, pool: Path, tmp_path: Path, parts: list[int], says: list[str]
) -> None:
    folder = write_embeddings(tmp_path / "emb", *(vectors(n) for n in parts))
    ended = curate.prune(pool, tmp_path / "run", "--embeddings", folder)
    check_refused(ended, 1, tmp_path / "run", "emb", *says, "same rows")
    assert not (tmp_path / "run").exists()


def test_captions_of_another_number_or_width(curate: Command, pool: Path, tmp_path: Path) -> None:
    folder = write_embeddings(tmp_path / "emb", vectors(20))
    write_embeddings(folder, vectors(19), side="text_emb")
    ended = curate.prune(pool, tmp_path / "run", "--embeddings", folder)
    check_refused(ended, 1, tmp_path / "run", "text_emb", "19 rows", "20")
    write_embeddings(folder, vectors(20, 6), side="text_emb")
    ended = curate.prune(pool, tmp_path / "run", "--embeddings", folder)
    check_refused(ended, 1, tmp_path / "run", "text", "6", "8")
    assert not (tmp_path / "run").exists(), "known from the headers, before anything is written"


def test_parts_of_different_widths(curate: Command, pool: Path, tmp_path: Path) -> None:
    folder = write_embeddings(tmp_path / "emb", vectors(10, 8), vectors(10, 6))
    ended = curate.prune(pool, tmp_path / "run", "--embeddings", folder)
    check_refused(ended, 1, tmp_path / "run", "img_emb", "different widths", "6", "8")


@pytest.mark.parametrize(
    "array",
    [
        np.ones((20, 8), np.int8),
        np.ones((20, 8), np.complex64),
        np.ones((20, 8), bool),
        np.full((20, 8), "a"),
        np.zeros((20, 8), "datetime64[s]"),
        np.zeros(20, [("a", "f4"), ("b", "f4")]),
        np.ones(20, np.float32),
        np.ones((20, 8, 2), np.float32),
        np.float32(1),
        np.ones((20, 0), np.float32),
    ],
    ids=lambda array: f"{array.dtype.kind}{array.ndim}",
)
def test_wrong_kind_of_array(
    curate: Command, pool: Path, tmp_path: Path, array: np.ndarray
) -> None:
    """Quantised or complex numbers read as if they were embeddings would give a wrong result."""
    folder = write_embeddings(tmp_path / "emb", array)
    ended = curate.prune(pool, tmp_path / "run", "--embeddings", folder)
    check_refused(ended, 1, tmp_path / "run", "emb", "float|width|shape|rows")
    assert not (tmp_path / "run").exists()


def test_pickles_are_not_opened(curate: Command, pool: Path, tmp_path: Path) -> None:
    """As --embeddings, as the pool's own layout, and as DataComp's .npz: never executed."""
    trap = tmp_path / "executed"
    evil = np.empty((20, 8), object)
    evil[:] = Trap(trap)
    folder = write_embeddings(tmp_path / "emb", evil)
    ended = curate.prune(pool, tmp_path / "run", "--embeddings", folder)
    check_refused(ended, 1, tmp_path / "run", "emb", "object|pickle")

    write(folder / "metadata" / "metadata_0.parquet", table(embedding=None))
    ended = curate.prune(folder, tmp_path / "run")
    check_refused(ended, 1, tmp_path / "run", "img_emb", "object|pickle")

    write(tmp_path / "datacomp" / "a.parquet", table(embedding=None))
    np.savez(tmp_path / "datacomp" / "a.npz", allow_pickle=True, l14_img=evil)
    ended = curate.prune(tmp_path / "datacomp", tmp_path / "run")
    check_refused(ended, 1, tmp_path / "run", r"a\.npz", "object|float|pickle")

    raw = (folder / "img_emb" / "img_emb_0000.npy").read_bytes()
    (folder / "img_emb" / "img_emb_0000.npy").write_bytes(raw[raw.index(b"\x80") :])  # bare pickle
    shutil.rmtree(folder / "metadata")
    ended = curate.prune(pool, tmp_path / "run", "--embeddings", folder)
    check_refused(ended, 1, tmp_path / "run", "emb", "damaged|pickle|cannot")
    assert not trap.exists()


@pytest.mark.parametrize("cut", [0, 5, 64, 200])
def test_truncated(curate: Command, pool: Path, tmp_path: Path, cut: int) -> None:
    folder = write_embeddings(tmp_path / "emb", vectors(20))
    path = folder / "img_emb" / "img_emb_0000.npy"
    path.write_bytes(path.read_bytes()[:cut])
    ended = curate.prune(pool, tmp_path / "run", "--embeddings", folder)
    check_refused(ended, 1, tmp_path / "run", "img_emb", "damaged")


def test_folder_of_something_else(curate: Command, pool: Path, tmp_path: Path) -> None:
    missing = curate.prune(pool, tmp_path / "run", "--embeddings", tmp_path / "none")
    check_refused(missing, 1, tmp_path / "run", "--embeddings", "none", "not a folder|not exist")
    (tmp_path / "empty").mkdir()
    empty = curate.prune(pool, tmp_path / "run", "--embeddings", tmp_path / "empty")
    check_refused(empty, 1, tmp_path / "run", "img_emb", "curate embed")


# --- embeddings that this tool made -----------------------------------------------------------


def test_ours_of_other_rows(curate: Command, pool: Path, tmp_path: Path) -> None:
    """A run's embeddings fit the same rows in the same order, and nothing else."""
    other = table(20, uid=[f"other-{i}" for i in range(20)])
    write(tmp_path / "other.parquet", other)
    write(tmp_path / "fewer.parquet", table(19))
    write(tmp_path / "reversed.parquet", table(20).take(list(range(20))[::-1]))
    assert curate.prune(pool, tmp_path / "made").code == 0
    for name, says in {
        "other": ["row 0", "'row-0000'", "'other-0'"],
        "fewer": ["20 embeddings", "19 rows"],
        "reversed": ["row 0", "'row-0000'", "'row-0019'"],
    }.items():
        run = tmp_path / f"run-{name}"
        ended = curate.prune(
            tmp_path / f"{name}.parquet", run, "--embeddings", tmp_path / "made" / "embeddings"
        )
        check_refused(ended, 1, run, *says)
    ended = curate.prune(pool, tmp_path / "again", "--embeddings", tmp_path / "made")
    assert ended.code == 0, ended.err
    again, made = (parts_of(tmp_path / name / "selection") for name in ("again", "made"))
    assert again.equals(made)


def test_ours_half_done_or_damaged(curate: Command, pool: Path, tmp_path: Path) -> None:
    assert curate("embed", "--pool", pool, "--out", tmp_path / "emb").code == 0
    assert is_complete(tmp_path / "emb")
    before = tree(tmp_path / "emb")
    part = tmp_path / "emb" / "img_emb" / "img_emb_0001.npy"
    part.write_bytes(part.read_bytes()[:50])
    ended = curate.prune(pool, tmp_path / "run", "--embeddings", tmp_path / "emb")
    check_error(ended, 1, "img_emb_0001", "damaged")
    check_nothing_whole(tmp_path / "run")
    shutil.rmtree(tmp_path / "run")

    manifest = tmp_path / "emb" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"complete": true', '"complete": false'))
    ended = curate.prune(pool, tmp_path / "run", "--embeddings", tmp_path / "emb")
    check_refused(ended, 1, tmp_path / "run", "emb", "not complete", "again")
    for path in (part, tmp_path / "emb" / "metadata" / "metadata_0001.parquet"):
        path.unlink()
    assert curate("embed", "--pool", pool, "--out", tmp_path / "emb").code == 0
    assert tree(tmp_path / "emb") == before
