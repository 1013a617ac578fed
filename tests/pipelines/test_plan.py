from __future__ import annotations

import json
import os
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from curate import kmeans
from curate.lloyd import CODE_BYTES
from curate.sharded_rows import ShardedRows
from pipelines import plan, plan_kernels, stages
from pipelines.cli import run
from pipelines.config import PruneConfig
from pipelines.plan_config import PlanConfig
from pipelines.plan_kernels import KMeansTimes, Line, sample_clusters
from pipelines.plan_sample import SampleRun, first_shards
from pipelines.plan_steps import Rates, Step, Workload, predict, workload
from pipelines.source import open_pool
from tests.conftest import MakePool, embedded_table, image_table, tree, unit_rows

STEPS = ("index", "embed", "score", "dedup", "cluster", "ledger", "export", "report", "choose")
RUN = SampleRun(
    rows=1_024,
    warm_up=0.5,
    seconds={step: Line(0.25, number * 1e-3) for number, step in enumerate(STEPS)},
    written=dict.fromkeys(STEPS[:7], 1_024),
    left={"decode": 900, "dedup": 700, "clip_score": 512},
    uid_bytes=32.0,
    memory_bytes=1_000,
    embeddings=ShardedRows([np.zeros((1, 8), np.float16)]),
    has_scores=True,
    has_text=False,
    warnings=(),
)
FIT = KMeansTimes(
    clusters=50, start=2.0, fit=1e-3, passes=1.5, iterations=4, assign=Line(1e-4, 1e-6)
)
RATES = Rates(start_up=3.0, cluster=FIT, disk_read=1e6, dedup=FIT, compare=(2e-3, 1.25))
WORK = Workload(
    rows=2**20,
    usable=900_000,
    left=500_000,
    dimensions=8,
    dedup_clusters=100,
    fit_rows=50_000,
    clusters=10,
    pool_bytes=70_000_000,
    source_bytes=16_000_000,
    score_bytes=4_000_000,
)
PLENTY = 1 << 40


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start no process to time that: it takes seconds."""
    monkeypatch.setattr(plan_kernels, "time_start", lambda: 2.0)


def by_name(steps: tuple[Step, ...]) -> dict[str, Step]:
    return {step.step: step for step in steps}


def test_steps_add_up() -> None:
    """Each by hand, from the rates above."""
    found = by_name(predict(WORK, RATES, RUN, PLENTY))
    rows = {step: 0.25 + 2**20 * number * 1e-3 for number, step in enumerate(STEPS)}
    seconds = {
        "start": 3.5,
        "index": rows["index"],
        "embed": rows["embed"],
        "score": rows["score"],
        "dedup fit": 4 * 2.0 + 50_000 * 1e-3 * 2e-4 / 1.5e-4,
        "dedup assign": 900_000 * 2e-4,
        "dedup compare": 900_000 * 2e-3 + rows["dedup"],
        "cluster fit": 2.0 / 25 + 500_000 * 1e-3 * 1.1e-4 / 1.5e-4 + rows["cluster"],
        "choose": 2 * rows["choose"],  # twice the binary digits
        "ledger": rows["ledger"],
        "export": rows["export"],
        "report": rows["report"],
    }
    assert {name: step.seconds for name, step in found.items()} == pytest.approx(seconds)
    assert list(found) == list(seconds)
    assert found["export"].read_bytes == 70_000_000
    assert found["export"].written_bytes == found["dedup compare"].written_bytes == 2**20
    assert found["dedup fit"].read_bytes == 1.5 * 50_000 * 16
    assert found["dedup compare"].read_bytes == 1.25 * 900_000 * 16


def test_memory_grows_with_the_rows_and_the_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.plan_steps.product_type", lambda device: "float32")
    plain = by_name(predict(WORK, RATES, RUN, PLENTY))
    row = (plain["ledger"].memory_bytes - 1_000) / (2**20 - 1_024)
    assert row == 2 * 36 + 190
    monkeypatch.setattr("pipelines.plan_steps.product_type", lambda device: "int8")
    kept = by_name(predict(WORK, RATES, RUN, PLENTY))
    more = {name: kept[name].memory_bytes - plain[name].memory_bytes for name in kept}
    assert more.pop("cluster fit") == (500_000 - 1_024) * (8 + 8)
    assert more.pop("dedup fit") == (50_000 - 1_024) * (8 + 8)
    assert not any(more.values())
    wide = replace(WORK, dimensions=CODE_BYTES // 500_000 + 1)
    step = by_name(predict(wide, RATES, RUN, PLENTY))["cluster fit"]
    mapped = 2 * WORK.dimensions * (WORK.rows - RUN.rows)  # too many to map, too
    assert step.memory_bytes == plain["cluster fit"].memory_bytes - mapped


def test_what_does_not_fit_in_memory_comes_from_the_disk() -> None:
    warm = by_name(predict(WORK, RATES, RUN, WORK.pass_bytes + 1))
    cold = by_name(predict(WORK, RATES, RUN, WORK.pass_bytes))
    extra = {name: cold[name].seconds - warm[name].seconds for name in warm}
    assert extra["cluster fit"] == pytest.approx(1.5 * 500_000 * 16 / 1e6)
    assert extra["dedup assign"] == pytest.approx(900_000 * 16 / 1e6)
    assert cold["export"] == warm["export"]


def test_gpus_share_the_embedding_alone() -> None:
    rates = replace(RATES, encode=0.01, load_encoder=4.0)
    made_up = replace(RUN, seconds={s: t for s, t in RUN.seconds.items() if s != "embed"})
    alone, four = (
        by_name(predict(replace(WORK, gpus=gpus), rates, made_up, PLENTY)) for gpus in (0, 4)
    )
    assert alone["embed"].seconds == pytest.approx(4 + 0.01 * 2**20)
    assert four["embed"].seconds == pytest.approx(4 + 0.01 * 2**20 / 4)
    assert {name for name in alone if alone[name] != four[name]} == {"embed"}


def test_no_dedup_no_scores_no_assignment() -> None:
    some = replace(RATES, dedup=None, compare=None)
    names = by_name(predict(WORK, some, replace(RUN, has_scores=False), PLENTY))
    assert not any(name.startswith("dedup") or name == "score" for name in names)
    every = replace(WORK, fit_rows=WORK.usable)  # the fit has put every row into its cluster
    assert "dedup assign" not in by_name(predict(every, RATES, RUN, PLENTY))


@pytest.mark.parametrize("rows", [10_000, 1_000_000, 440_000_000])
def test_sizes_are_those_of_prune(make_pool: MakePool, rows: int) -> None:
    pool = make_pool(embedded_table(50, images=False))
    config = PlanConfig(pool=str(pool), keep=0.28, rows=rows)
    work = workload(config, open_pool(config), replace(RUN, rows=1_000), object())
    prune = PruneConfig(pool=str(pool), keep=0.28)
    assert (work.usable, work.left) == (rows * 9 // 10, round(rows * 0.512))
    assert work.dedup_clusters == stages.dedup_clusters(prune, work.usable)
    assert work.fit_rows <= max(stages.dedup_fit_rows(work.dedup_clusters), 1)
    assert work.clusters == stages.prune_clusters_count(prune, work.left)


def spied_cluster_fits(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    fits, before = [], kmeans.fit

    def spy(x: object, k: int, **options: object) -> object:
        fits.append((len(options["keys"]), k))
        return before(x, k, **options)

    monkeypatch.setattr(kmeans, "fit", spy)
    return fits


@pytest.mark.usefixtures("loaded")
def test_the_real_run_has_the_sizes_of_the_plan(
    make_pool: MakePool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = make_pool(embedded_table(600, images=False))
    flags = {"pool": str(pool), "keep": 0.28, "out": tmp_path / "run", "dedup_clusters": 7}
    planned = plan.run_plan(PlanConfig(**flags)).work
    fits = spied_cluster_fits(monkeypatch)
    assert run(["prune", *(f"--{k.replace('_', '-')}={v}" for k, v in flags.items())]) == 0
    dedup, cluster = (planned.fit_rows, 7), (planned.left, planned.clusters)
    assert fits == [dedup, cluster]


@pytest.mark.parametrize(("rows", "kept"), [(3_000, True), (CODE_BYTES, False)])
def test_kmeans_times(monkeypatch: pytest.MonkeyPatch, rows: int, kept: bool) -> None:
    """Every look at the clock is a second later: one second for each piece, whatever it does."""
    ticks, asked = iter(range(1_000)), []
    before = plan_kernels.Lloyd

    def spy(*given: object, once: bool) -> object:
        asked.append(not once)
        return before(*given, once=once)

    monkeypatch.setattr(plan_kernels, "Lloyd", spy)
    x = ShardedRows([unit_rows(3_000, 8, duplicates=0.0)])
    config = PruneConfig(pool="", keep=0.5, device="cpu")
    found = plan_kernels.time_kmeans(x, 64, rows, config, lambda: float(next(ticks)))
    assert (found.start, found.fit) == (1.0, 1 / 3_000)
    assert found.assign.at(found.clusters) == pytest.approx(1 / 3_000)
    assert found.clusters == sample_clusters(64, rows, 3_000)
    assert 1 <= found.iterations <= config.kmeans_iterations
    assert found.passes >= 1
    assert asked == [kept]
    assert found.seconds(6_000, found.clusters) == pytest.approx(1 + 2)


def test_kmeans_times_with_faiss() -> None:
    pytest.importorskip("faiss")
    x = ShardedRows([unit_rows(2_000, 8, duplicates=0.0)])
    config = PruneConfig(pool="", keep=0.5, device="cpu", backend="faiss")
    found = plan_kernels.time_kmeans(x, 4, 2_000, config)
    assert found.clusters == 4 and found.fit > 0


def test_comparing_goes_with_the_squares_of_the_sizes() -> None:
    x = ShardedRows([unit_rows(2_000, 8, duplicates=0.0)])
    config = PruneConfig(pool="", keep=0.5, device="cpu")
    ticks = iter(range(1_000))
    found = {
        size: plan_kernels.time_compare(x, size, config, lambda: float(next(ticks)))
        for size in (100, 2_000, 20_000)
    }
    assert {size: seconds * 2_000 for size, (seconds, _) in found.items()} == pytest.approx(
        {100: 1.0, 2_000: 1.0, 20_000: 10.0}
    )
    assert all(passes >= 1 for _, passes in found.values())


def test_line_through_points() -> None:
    assert Line.through((100, 2.0), (50, 1.5)) == Line(1.0, 0.01)
    assert Line.through((10, 5.0), (20, 4.0)) == Line(0.0, 0.2)  # noise
    assert Line.through((10, 1.0), (20, 4.0)) == Line(0.0, 0.2)  # faster than in proportion
    assert Line.through((7, 3.0), (7, 3.0)).at(14) == 6.0


def test_peak_memory_sees_what_is_let_go_again() -> None:
    held = plan_kernels.peak_memory(lambda: None)
    if not held:
        pytest.skip("only Linux tells")
    assert 90 << 20 < plan_kernels.peak_memory(lambda: np.ones(12 << 20)) - held < 200 << 20


def snapshot(folder: Path) -> dict[str, tuple[object, int]]:
    return {
        path.relative_to(folder).as_posix(): (
            path.read_bytes() if path.is_file() else None,
            path.stat().st_mtime_ns if path.is_file() else 0,
        )
        for path in folder.rglob("*")
    }


def test_a_real_plan_writes_nothing(
    make_pool: MakePool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pool = make_pool(embedded_table(400, images=False), shards=2)
    before = snapshot(tmp_path)
    command = ["plan", "--pool", str(pool), "--keep", "0.28", "--out", str(tmp_path / "run")]
    assert run([*command, "--log-format", "json"]) == 0
    assert snapshot(tmp_path) == before
    said = capsys.readouterr()
    found = json.loads(said.out)
    names = [step["step"] for step in found["steps"]]
    assert names[0] == "start" and names[-1] == "report" and len(set(names)) == len(names) == 11
    assert found["rows"] == 400
    assert found["seconds"] == pytest.approx(sum(s["seconds"] for s in found["steps"]), abs=0.01)
    assert all(step["seconds"] > 0 for step in found["steps"])
    assert found["memory_bytes"] > 50 << 20
    assert all("event" not in json.loads(line) for line in said.err.splitlines())


@pytest.mark.usefixtures("loaded")
def test_a_pool_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pipelines.plan_sample.METADATA_SHARD_ROWS", 600)
    assert run(["plan", "--rows", "440e6", "--keep", "0.28", "--dim", "16"]) == 0
    assert list(tmp_path.iterdir()) == []
    said = capsys.readouterr().out
    assert "440,000,000" in said
    assert "the pool is not there" in said
    assert "16 dimensions" in said


@pytest.mark.usefixtures("loaded")
def test_images_are_embedded_for_the_measurement(
    make_pool: MakePool, tmp_path: Path, tiny_clip: Path
) -> None:
    pool = make_pool(image_table(60))
    before = tree(tmp_path)
    config = PlanConfig(
        pool=str(pool), keep=0.5, model=str(tiny_clip), out=tmp_path / "run", batch_size=16
    )
    found = plan.run_plan(config)
    assert tree(tmp_path) == before
    embed = next(step for step in found.steps if step.step == "embed")
    assert embed.seconds > 0
    assert embed.read_bytes == pool.stat().st_size
    assert found.work.dimensions == 32
    assert any("made up" in note for note in found.assumptions)


def test_interrupted_it_leaves_nothing(
    make_pool: MakePool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = make_pool(embedded_table(100, images=False), shards=2)
    before, seen = snapshot(tmp_path), []

    def interrupt(*_: object, **__: object) -> None:
        seen.extend(tmp_path.glob(".curate-plan-*/run/report.html"))
        raise KeyboardInterrupt

    monkeypatch.setattr(plan_kernels, "time_kmeans", interrupt)
    assert run(["plan", "--pool", str(pool), "--keep", "0.28"]) == 130
    assert len(seen) == 1  # it was at work there
    assert snapshot(tmp_path) == before


def test_beside_a_folder_that_cannot_be_written(
    make_pool: MakePool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = make_pool(embedded_table(100, images=False), shards=2)
    before, asked = snapshot(tmp_path), []

    def measured(config: object, folder: Path) -> None:
        asked.append(folder.parent)
        raise KeyboardInterrupt

    monkeypatch.setattr(plan, "_measured", measured)
    for writable in (True, False):
        monkeypatch.setattr(os, "access", lambda path, mode, here=writable: here)
        assert run(["plan", "--pool", str(pool), "--keep", "0.28"]) == 130
    assert asked == [tmp_path, Path(tempfile.gettempdir())]
    assert snapshot(tmp_path) == before


def test_first_shards_are_whole(make_pool: MakePool) -> None:
    config = PlanConfig(pool=str(make_pool(embedded_table(90, images=False), shards=9)), keep=0.5)
    pool = open_pool(config)
    assert [len(first_shards(pool, rows)) for rows in (1, 10, 29, 30, 1_000)] == [
        10,
        10,
        20,
        30,
        90,
    ]


def test_gpus_that_are_not_here_are_refused(
    make_pool: MakePool, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    there = torch.cuda.device_count()
    pool = make_pool(embedded_table(20, images=False))
    command = ["plan", "--pool", str(pool), "--keep", "0.5", "--gpus", str(there + 1)]
    assert run(command) == 2
    assert f"torch sees {there} CUDA device(s)" in capsys.readouterr().err
    plan.check_gpus(PlanConfig(pool=str(pool), keep=0.5, gpus=0))


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        ([], "--pool"),
        (["--rows", "3.5"], "whole number"),
        (["--rows", "-5"], "whole number"),
        (["--rows", "many"], "whole number"),
        (["--rows", "5", "--columns", "text"], "image or embedding"),
        (["--rows", "5", "--dim", "0"], "dim"),
    ],
)
def test_wrong_flags(flags: list[str], word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", "--keep", "0.28", *flags]) == 2
    assert word in capsys.readouterr().err
