"""Pools that cannot be opened or read, or only just: refused in one line, or every row recorded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.pipelines.bad_input import (
    Command,
    as_column,
    check_refused,
    check_whole,
    parts_of,
    table,
    vectors,
    write,
)

ADVICE = "again|leave it out"
ALL_ROWS = ["--dedup-mode", "none", "--clip-fraction", "1"]


@pytest.fixture
def curate(capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(capsys)


# --- files ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["no.parquet", "no", "no/*.parquet", "*.pq", "no/no/no.tar"])
def test_nothing_there(curate: Command, tmp_path: Path, name: str) -> None:
    write(tmp_path / "other.parquet", table())
    ended = curate.prune(tmp_path / name, tmp_path / "run")
    check_refused(ended, 1, tmp_path / "run", "does not exist|holds no", r"give|\.parquet")
    assert not (tmp_path / "run").exists()


def test_file_of_another_kind(curate: Command, tmp_path: Path) -> None:
    csv = tmp_path / "pool.csv"
    csv.write_text("uid,text\n1,a\n")
    ended = curate.prune(csv, tmp_path / "run")
    check_refused(ended, 1, tmp_path / "run", r"pool\.csv", r"\.parquet", "convert")
    renamed = csv.rename(tmp_path / "pool.parquet")
    ended = curate.prune(renamed, tmp_path / "run")
    check_refused(ended, 1, tmp_path / "run", r"pool\.parquet", "cannot be read as Parquet")


def test_no_rows(curate: Command, tmp_path: Path) -> None:
    pool = write(tmp_path / "pool.parquet", table().slice(0, 0))
    check_refused(curate.prune(pool, tmp_path / "run"), 1, tmp_path / "run", "empty", "0 rows")
    pool = write(tmp_path / "none.parquet", pa.table({}))
    check_refused(curate.prune(pool, tmp_path / "run"), 1, tmp_path / "run", "no columns|empty")
    (tmp_path / "folder").mkdir()
    ended = curate.prune(tmp_path / "folder", tmp_path / "run")
    check_refused(ended, 1, tmp_path / "run", "holds no")


@pytest.mark.parametrize("size", [0, 4, 7, 0.3, 0.9, -1, -8])
def test_truncated(curate: Command, tmp_path: Path, size: float) -> None:
    pool = write(tmp_path / "pool.parquet", table())
    data = pool.read_bytes()
    pool.write_bytes(data[: int(size * len(data)) if 0 < size < 1 else int(size)])
    ended = curate.prune(pool, tmp_path / "run")
    check_refused(ended, 1, tmp_path / "run", r"pool\.parquet", "cut short", ADVICE)


def test_truncated_shard_among_good_ones(curate: Command, tmp_path: Path) -> None:
    shards = [write(tmp_path / "pool" / f"{i}.parquet", table(20)) for i in range(3)]
    shards[1].write_bytes(shards[1].read_bytes()[:-100])
    ended = curate.prune(tmp_path / "pool", tmp_path / "run")
    check_refused(ended, 1, tmp_path / "run", r"1\.parquet", "cut short", ADVICE)


@pytest.mark.parametrize("column", ["uid", "embedding", "similarity", "blob"])
def test_damaged_pages(curate: Command, tmp_path: Path, column: str) -> None:
    """The footer is whole, a page is not: found when it is read; the run goes on after a repair."""
    blob = [np.random.default_rng(i).bytes(500) for i in range(40)]
    score = np.linspace(0, 1, 40)
    pool = write(tmp_path / "pool.parquet", table(40, blob=blob, similarity=score))
    good = pool.read_bytes()
    chunk = pq.ParquetFile(pool).metadata.row_group(0)
    found = next(chunk.column(i) for i in range(chunk.num_columns) if _root(chunk, i) == column)
    start, size = (
        found.dictionary_page_offset or found.data_page_offset,
        found.total_compressed_size,
    )
    pool.write_bytes(good[:start] + b"\xff" * size + good[start + size :])
    ended = curate.prune(pool, tmp_path / "run")
    check_refused(ended, 1, tmp_path / "run", r"pool\.parquet", "damaged", ADVICE)

    pool.write_bytes(good)
    assert curate.prune(pool, tmp_path / "run", "--overwrite").code == 0
    check_whole(tmp_path / "run", 40, 11)


def _root(chunk: Any, column: int) -> str:
    return str(chunk.column(column).path_in_schema).split(".")[0]


def test_folder_with_other_things(curate: Command, tmp_path: Path) -> None:
    folder = tmp_path / "pool"
    write(folder / "a.parquet", table())
    for name in ("README.md", "stats.json", ".hidden.parquet", "_SUCCESS", "a.parquet.crc"):
        (folder / name).write_text("x")
    (folder / "empty").mkdir()
    assert curate.prune(folder, tmp_path / "run").code == 0
    check_whole(tmp_path / "run", 20, 6)

    (folder / "b.tar").write_bytes(b"\0" * 1024)
    ended = curate.prune(folder, tmp_path / "other")
    check_refused(ended, 1, tmp_path / "other", r"a\.parquet", "glob")


def test_broken_link(curate: Command, tmp_path: Path) -> None:
    write(tmp_path / "pool" / "a.parquet", table())
    (tmp_path / "pool" / "b.parquet").symlink_to(tmp_path / "gone.parquet")
    ended = curate.prune(tmp_path / "pool", tmp_path / "run")
    check_refused(ended, 1, tmp_path / "run", r"b\.parquet")


def test_shards_that_disagree(curate: Command, tmp_path: Path) -> None:
    write(tmp_path / "pool" / "a.parquet", table(extra=[1] * 20))
    other = write(tmp_path / "pool" / "b.parquet", table())
    ended = curate.prune(tmp_path / "pool", tmp_path / "run")
    check_refused(ended, 1, tmp_path / "run", r"b\.parquet", "'extra'", "glob")
    write(other, table(extra=["one"] * 20))
    ended = curate.prune(tmp_path / "pool", tmp_path / "run")
    check_refused(ended, 1, tmp_path / "run", r"b\.parquet", "'extra'", "string", "int64")


@pytest.mark.parametrize(
    "name", ["with space.parquet", "日本 ünïcode.parquet", "it's <b>.parquet", "-n.parquet", "50%"]
)
def test_unusual_names(
    curate: Command, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A relative path with them, `..` in it, and the folder beside the pool as output."""
    monkeypatch.chdir(tmp_path)
    pool = Path(name) / "pool.parquet" if name == "50%" else Path(name)
    write(pool, table())
    (tmp_path / "sub").mkdir()
    ended = curate("prune", "--pool", f"./sub/../{pool}", "--keep", "0.28")
    assert ended.code == 0, ended.err
    check_whole(tmp_path / pool.with_name(f"{pool.stem}-pruned"), 20, 6)


# --- columns ----------------------------------------------------------------------------------


def test_nothing_to_work_on(curate: Command, tmp_path: Path) -> None:
    pool = write(tmp_path / "pool.parquet", table(embedding=None))
    ended = curate.prune(pool, tmp_path / "run")
    check_refused(ended, 1, tmp_path / "run", "no image", "uid, text", "--image-col")


def test_addresses_only(curate: Command, tmp_path: Path) -> None:
    urls = [f"http://a/{i}.jpg" for i in range(20)]
    pool = write(tmp_path / "pool.parquet", table(embedding=None, url=urls))
    ended = curate.prune(pool, tmp_path / "run")
    check_refused(ended, 1, tmp_path / "run", r"curate download --pool .*pool\.parquet")


@pytest.mark.parametrize(
    ("name", "values", "says"),
    [
        ("image", list(range(20)), ["'image'", "int64", "binary", "--image-col"]),
        ("text", [0.5] * 20, ["'text'", "double", "string", "--text-col"]),
        ("uid", [0.5] * 20, ["'uid'", "double", "--uid-col"]),
        ("url", [[1]] * 20, ["'url'", "list", "--url-col"]),
        ("similarity", ["high"] * 20, ["'similarity'", "string", "--score-col"]),
        ("embedding", ["1,2,3"] * 20, ["no image", "--embedding-col"]),
        ("embedding", [[1, 2]] * 20, ["no image", "--embedding-col"]),
    ],
)
def test_wrong_type(
    curate: Command, tmp_path: Path, name: str, values: list[Any], says: list[str]
) -> None:
    pool = write(tmp_path / "pool.parquet", table(**{name: values}))
    check_refused(curate.prune(pool, tmp_path / "run"), 1, tmp_path / "run", *says)
    assert not (tmp_path / "run").exists()


def test_column_that_is_not_there(curate: Command, tmp_path: Path) -> None:
    pool = write(tmp_path / "pool.parquet", table())
    for flag, name in (("--text-col", "txt"), ("--embedding-col", "embeding")):
        ended = curate.prune(pool, tmp_path / "run", flag, name)
        check_refused(ended, 1, tmp_path / "run", flag, name, "did you mean", "columns: uid")
    ended = curate.prune(pool, tmp_path / "run", "--embedding-col", "text")
    check_refused(ended, 1, tmp_path / "run", "'text'", "string", "--embedding-col")


def test_column_twice(curate: Command, tmp_path: Path) -> None:
    data = table(extra=[1] * 20)
    data = data.rename_columns([*data.column_names[:-1], "text"])
    ended = curate.prune(write(tmp_path / "pool.parquet", data), tmp_path / "run")
    check_refused(ended, 1, tmp_path / "run", "more than one column", "'text'")


# --- uids -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 2])
def test_repeated_uids(curate: Command, tmp_path: Path, shards: int) -> None:
    uids = [f"row-{i:04d}" for i in range(20)]
    uids[17] = uids[3]
    data = table(uid=uids)
    for shard in range(shards):
        rows = 20 // shards
        write(tmp_path / "pool" / f"{shard}.parquet", data.slice(shard * rows, rows))
    ended = curate.prune(tmp_path / "pool", tmp_path / "run")
    check_refused(ended, 1, tmp_path / "run", "'row-0003'", "3 and 17", "--uid-col")
    again = curate.prune(tmp_path / "pool", tmp_path / "run")
    assert (again.code, again.errors) == (ended.code, ended.errors)


def test_uid_that_is_null(curate: Command, tmp_path: Path) -> None:
    uids = [f"row-{i}" for i in range(19)] + [None]
    pool = write(tmp_path / "pool.parquet", table(uid=uids))
    ended = curate.prune(pool, tmp_path / "run")
    check_refused(ended, 1, tmp_path / "run", "null", "row 19", "--uid-col")


def test_advice_on_uids_helps(curate: Command, tmp_path: Path) -> None:
    """The message says --uid-col '': the same command with that must go through."""
    pool = write(tmp_path / "pool.parquet", table(uid=["same"] * 20))
    advice = curate.prune(pool, tmp_path / "run").err
    flags = ["--uid-col", "", *(["--overwrite"] if "--overwrite" in advice else [])]
    ended = curate.prune(pool, tmp_path / "run", *flags)
    assert ended.code == 0, ended.err
    check_whole(tmp_path / "run", 20, 6)


# --- scores -----------------------------------------------------------------------------------


def test_scores_with_holes(curate: Command, tmp_path: Path) -> None:
    """A row without a score goes after all others, and says so where a score is asked for."""
    score = np.linspace(0, 1, 20)
    score[[2, 3]] = [np.nan, np.inf]
    column = pa.array(score, mask=np.arange(20) == 7)
    pool = write(tmp_path / "pool.parquet", table(similarity=column))
    flags = ["--dedup-mode", "none", "--clip-fraction", "1", "--min-clip-score", "0.5"]
    assert curate.prune(pool, tmp_path / "run", *flags).code == 0
    ledger = check_whole(tmp_path / "run", 20, 6).to_pylist()
    without = {row["uid"]: row["reason"] for row in ledger if row["clip_score"] is None}
    assert without == {f"row-{i:04d}": "no_clip_score" for i in (2, 3, 7)}
    low = {row["uid"] for row in ledger if row["reason"] == "low_clip_score"}
    assert low == {f"row-{i:04d}" for i in range(10)} - without.keys()


def test_scores_that_are_all_missing(curate: Command, tmp_path: Path) -> None:
    """No score at all is no quality stage: said aloud, and refused where one is asked for."""
    pool = write(tmp_path / "pool.parquet", table(similarity=[np.nan] * 20))
    ended = curate.prune(pool, tmp_path / "run")
    assert ended.code == 0
    assert "warning: no CLIP scores" in ended.err
    check_whole(tmp_path / "run", 20, 6)


@pytest.mark.parametrize("flag", [["--min-clip-score", "0.2"], ["--clip-fraction", "0.5"]])
def test_scores_asked_for_but_absent(curate: Command, tmp_path: Path, flag: list[str]) -> None:
    pool = write(tmp_path / "pool.parquet", table())
    ended = curate.prune(pool, tmp_path / "run", *flag)
    check_refused(ended, 1, tmp_path / "run", flag[0], "--score-col")


# --- sizes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "keep", "kept"),
    [(1, 0.5, 1), (1, 0.49, 0), (1, 1, 1), (2, 0.28, 1), (2, 1, 2), (20, 0.02, 0), (20, 1e-300, 0)],
)
def test_few_rows(curate: Command, tmp_path: Path, rows: int, keep: float, kept: int) -> None:
    """Exactly floor(keep * n + 0.5), also when that is none."""
    pool = write(tmp_path / "pool.parquet", table(rows))
    ended = curate.prune(pool, tmp_path / "run", *ALL_ROWS, keep=keep)
    assert ended.code == 0, ended.err
    check_whole(tmp_path / "run", rows, kept)
    exported = parts_of(tmp_path / "run" / "pool")
    assert exported.schema.equals(pq.read_schema(pool))


def test_all_rows_identical(curate: Command, tmp_path: Path) -> None:
    same = as_column(np.repeat(vectors(1), 20, axis=0))
    pool = write(tmp_path / "pool.parquet", table(embedding=same))
    ended = curate.prune(pool, tmp_path / "refused")
    check_refused(ended, 3, tmp_path / "refused", "20 rows is 6", "only 1 ", "19 duplicate")
    assert curate.prune(pool, tmp_path / "run", *ALL_ROWS, "--clusters", 7).code == 0
    check_whole(tmp_path / "run", 20, 6)
    assert curate.prune(pool, tmp_path / "fewer", "--allow-fewer").code == 0
    check_whole(tmp_path / "fewer", 20, 1)


def test_more_than_there_is(curate: Command, tmp_path: Path) -> None:
    x = vectors(20)
    x[10:] = x[:10]
    pool = write(tmp_path / "pool.parquet", table(embedding=as_column(x)))
    run = tmp_path / "run"
    ended = curate.prune(pool, run, keep=0.75)
    says = ["0.75 of 20 rows is 15", "only 10 ", "10 duplicate", "--allow-fewer", "--keep"]
    check_refused(ended, 3, run, *says)
    again = curate.prune(pool, run, keep=0.75)
    assert (again.code, again.errors) == (ended.code, ended.errors), "refused, not half done"

    flags = ["--allow-fewer", *(["--overwrite"] if "--overwrite" in ended.err else [])]
    fewer = curate.prune(pool, run, *flags, keep=0.75)
    assert fewer.code == 0, f"the advice must help: {fewer.err}"
    assert "warning: keep=0.75 of 20 rows is 15, but only 10 " in fewer.err
    check_whole(run, 20, 10)
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["budget"] == 15
    assert "only 10" in manifest["warnings"][-1]
