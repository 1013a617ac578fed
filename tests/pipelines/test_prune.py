from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import datasets
import numpy as np
import polars as pl
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pipelines
from curate.errors import BudgetError, FingerprintError, PoolError, ShardError
from curate.pool import Pool
from curate.selection import LEDGER, Selection
from curate.shards import read_parts
from tests.conftest import MakePool, embedded_table, tree

NO_FILTERS = {"dedup_mode": "none", "clip_fraction": 1}


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    n=st.integers(1, 60),
    keep=st.floats(0.001, 1.0),
    groups=st.integers(1, 5),
    clusters=st.sampled_from(["auto", 1, 3, 1000]),
    which=st.sampled_from(["hard", "easy", "random"]),
    copies=st.sampled_from([0.0, 0.95]),
)
def test_exactly_the_rows_asked_for(
    tmp_path_factory: pytest.TempPathFactory,
    n: int,
    keep: float,
    groups: int,
    clusters: int | str,
    which: str,
    copies: float,
) -> None:
    """Also with ties, copies, clusters of one row and more clusters than distinct points."""
    folder = tmp_path_factory.mktemp("exact")
    table = embedded_table(n, images=False, groups=groups, duplicates=copies)
    pq.write_table(table, folder / "pool.parquet")
    found = pipelines.prune(
        folder / "pool.parquet",
        keep=keep,
        out=folder / "run",
        clusters=clusters,
        which=which,
        **NO_FILTERS,
    )
    assert len(found.kept_uids) == math.floor(keep * n + 0.5)
    kept = read_parts(folder / "run" / "pool", 1)
    assert kept["uid"].to_pylist() == found.kept_uids


def test_keep_everything(make_pool: MakePool, tmp_path: Path) -> None:
    pool = make_pool(embedded_table(50))
    found = pipelines.prune(pool, keep=1.0, out=tmp_path / "run", **NO_FILTERS)
    assert found.counts == {"kept": 50}


@pytest.mark.parametrize("backend", ["torch", "faiss"])
@pytest.mark.parametrize("mode", ["max-earlier", "greedy", "connected-components"])
def test_same_rows_for_any_shards_and_order(
    make_pool: MakePool, tmp_path: Path, mode: str, backend: str
) -> None:
    table = embedded_table(600)
    order = np.random.default_rng(1).permutation(600)
    pools = {
        "one": make_pool(table, "one"),
        "seven": make_pool(table, "seven", shards=7),
        "shuffled": make_pool(table.take(order), "shuffled", shards=3, row_group_rows=17),
    }
    options = {"dedup_mode": mode, "backend": backend, "clusters": 9, "dedup_clusters": 4}
    kept = {
        name: set(
            pipelines.prune(pool, keep=0.3, out=tmp_path / f"{name}-run", **options).kept_uids
        )
        for name, pool in pools.items()
    }
    assert kept["one"] == kept["seven"] == kept["shuffled"]


def test_ledger_explains_every_row(make_pool: MakePool, tmp_path: Path) -> None:
    table = embedded_table(500)
    pool = make_pool(table, shards=4)
    found = pipelines.prune(pool, keep=0.28, out=tmp_path / "run")
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    ledger = found.table
    assert ledger.schema == LEDGER
    assert ledger["uid"].to_pylist() == table["uid"].to_pylist()
    assert found.counts == manifest["counts"]
    assert sum(found.counts.values()) == 500
    dropped = {
        reason: count
        for stage in manifest["stages"]
        for reason, count in stage["dropped"].items()
        if count
    }
    assert {k: v for k, v in found.counts.items() if k != "kept"} == dropped
    for before, after in itertools.pairwise(manifest["stages"]):
        assert before["rows_out"] == after["rows_in"]
    duplicates = ledger.filter(pc.equal(ledger["reason"], "duplicate"))
    assert duplicates["duplicate_of"].null_count == 0
    others = ledger.filter(pc.not_equal(ledger["reason"], "duplicate"))
    assert others["duplicate_of"].null_count == len(others)
    report = (tmp_path / "run" / "report.html").read_text()
    for reason, count in found.counts.items():
        assert reason in report
        assert f"{count:,}" in report


def test_kept_rows_carry_every_column(make_pool: MakePool, tmp_path: Path) -> None:
    table = embedded_table(200)
    pool = make_pool(table, shards=2)
    found = pipelines.prune(pool, keep=0.4, out=tmp_path / "run")
    exported = read_parts(tmp_path / "run" / "pool", len(Pool.open(pool).shards))
    expected = table.filter(found.table["kept"].combine_chunks())
    assert exported.combine_chunks().equals(expected.combine_chunks())


def test_another_parameter_is_refused_by_name(make_pool: MakePool, tmp_path: Path) -> None:
    pool = make_pool(embedded_table(100))
    run = tmp_path / "run"
    pipelines.prune(pool, keep=0.3, out=run)
    before = tree(run)
    with pytest.raises(FingerprintError, match=r"temperature \(made with 0.1, asked for 0.2\)"):
        pipelines.prune(pool, keep=0.3, out=run, temperature=0.2)
    with pytest.raises(FingerprintError, match=r"keep .*seed"):
        pipelines.prune(pool, keep=0.4, out=run, seed=3)
    assert tree(run) == before


def test_overwrite_equals_a_fresh_run(make_pool: MakePool, tmp_path: Path) -> None:
    pool = make_pool(embedded_table(300), shards=2)
    pipelines.prune(pool, keep=0.3, out=tmp_path / "run")
    embedded = (tmp_path / "run" / "embeddings" / "manifest.json").stat().st_mtime_ns
    changed = {"keep": 0.2, "temperature": 0.3, "which": "easy"}
    pipelines.prune(pool, out=tmp_path / "run", overwrite=True, **changed)
    pipelines.prune(pool, out=tmp_path / "fresh", **changed)
    assert tree(tmp_path / "run") == tree(tmp_path / "fresh")
    again = (tmp_path / "run" / "embeddings" / "manifest.json").stat().st_mtime_ns
    assert again == embedded, "embeddings do not depend on keep and must be used again"


def test_fewer_than_asked_for(make_pool: MakePool, tmp_path: Path) -> None:
    pool = make_pool(embedded_table(200, duplicates=0.6))
    with pytest.raises(BudgetError, match=r"190, but only \d+ are left .*\d+ duplicate"):
        pipelines.prune(pool, keep=0.95, out=tmp_path / "run")
    found = pipelines.prune(pool, keep=0.95, out=tmp_path / "fewer", allow_fewer=True)
    assert found.counts["kept"] == 200 - found.counts["duplicate"]


def test_deleted_output_is_made_again(make_pool: MakePool, tmp_path: Path) -> None:
    pool = make_pool(embedded_table(100), shards=2)
    pipelines.prune(pool, keep=0.3, out=tmp_path / "run")
    before = tree(tmp_path / "run")
    (tmp_path / "run" / "pool" / "part-00001.parquet").unlink()
    (tmp_path / "run" / "report.html").unlink()
    pipelines.prune(pool, keep=0.3, out=tmp_path / "run")
    assert tree(tmp_path / "run") == before


def test_epsilon_is_a_threshold_on_what_is_stored(make_pool: MakePool, tmp_path: Path) -> None:
    pool = make_pool(embedded_table(200))
    run = tmp_path / "run"
    pipelines.prune(pool, keep=0.05, out=run, epsilon=0.05)
    evidence = (run / "duplicates" / "part-00000.parquet").stat().st_mtime_ns
    pipelines.prune(pool, keep=0.05, out=run, epsilon=0.2, overwrite=True)
    assert (run / "duplicates" / "part-00000.parquet").stat().st_mtime_ns == evidence
    pipelines.prune(pool, keep=0.05, out=tmp_path / "fresh", epsilon=0.2)
    assert tree(run) == tree(tmp_path / "fresh")
    # Beyond what was looked for.
    pipelines.prune(pool, keep=0.05, out=run, epsilon=0.3, overwrite=True)
    assert (run / "duplicates" / "part-00000.parquet").stat().st_mtime_ns > evidence


def test_whoever_reads_a_folder_finds_a_table(make_pool: MakePool, tmp_path: Path) -> None:
    """No file but Parquet lies beside the kept rows and the ledger."""
    pool = make_pool(embedded_table(100), shards=3)
    found = pipelines.prune(pool, keep=0.3, out=tmp_path / "run")
    kept, ledger = tmp_path / "run" / "pool", tmp_path / "run" / "selection"
    for folder, rows in ((kept, 30), (ledger, 100)):
        assert pq.read_table(folder).num_rows == rows
        assert pl.read_parquet(folder).height == rows
    cache = str(tmp_path / "cache")
    mapped = datasets.load_dataset(str(kept), split="train", cache_dir=cache)
    files = str(kept / "*.parquet")
    streamed = datasets.load_dataset("parquet", data_files=files, split="train", streaming=True)
    assert mapped["uid"][:] == [row["uid"] for row in streamed] == found.kept_uids
    for row in (mapped[0], next(iter(streamed))):
        assert row["image"].size == (8, 8)


def test_allow_fewer_after_a_refusal(make_pool: MakePool, tmp_path: Path) -> None:
    """The advice of the error is good for the same folder, and does not outlive its flag."""
    pool = make_pool(embedded_table(200, duplicates=0.6))
    run = tmp_path / "run"
    with pytest.raises(BudgetError, match="--allow-fewer"):
        pipelines.prune(pool, keep=0.95, out=run)
    assert pipelines.prune(pool, keep=0.95, out=run, allow_fewer=True).counts["kept"] < 190
    with pytest.raises(BudgetError, match=r"190 rows were asked for"):
        pipelines.prune(pool, keep=0.95, out=run)


def test_a_rule_of_one_s_own(make_pool: MakePool, tmp_path: Path) -> None:
    """Combined with a run's selection, and written as a pool with its ledger."""
    table = embedded_table(200)
    pool = make_pool(table, shards=3)
    pruned = pipelines.prune(pool, keep=0.3, out=tmp_path / "run")
    mine = Selection.from_mask(
        table["uid"], table["extra"].to_numpy() > 0, reason="filtered:negative"
    )
    both = pruned & mine
    written = pipelines.export(pool, both, out=tmp_path / "mine")
    assert written.counts == both.counts
    assert written.counts["filtered:negative"] + written.counts["kept"] == 60
    expected = table.filter(both.table["kept"].combine_chunks())
    assert pq.read_table(tmp_path / "mine" / "pool").equals(expected)
    before = tree(tmp_path / "mine")
    pipelines.export(pool, both, out=tmp_path / "mine")
    assert tree(tmp_path / "mine") == before
    with pytest.raises(FingerprintError, match="ledger"):
        pipelines.export(pool, pruned, out=tmp_path / "mine")
    with pytest.raises(PoolError, match="not of the rows"):
        pipelines.export(make_pool(table.slice(1), "other"), both, out=tmp_path / "none")


def test_a_selection_knows_its_run(make_pool: MakePool, tmp_path: Path) -> None:
    pool = make_pool(embedded_table(200))
    found = pipelines.prune(pool, keep=0.3, out=tmp_path / "run")
    assert found.clusters["kept"].to_numpy().sum() == 60
    assert found.manifest["counts"] == found.counts
    with pytest.raises(ShardError, match="not opened from"):
        _ = (found & found).clusters
