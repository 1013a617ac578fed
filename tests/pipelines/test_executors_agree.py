"""In this process, in two processes and on Ray: the same bytes."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

import pipelines
from curate.errors import PoolError
from pipelines.executor import LocalExecutor, ShardReport
from tests.conftest import MakePool, image_table, tree


@dataclass
class Recorder:
    folder: Path

    def __call__(self, shard: int) -> ShardReport:
        if shard == 99:
            raise PoolError("shard 99 is broken")
        (self.folder / f"{shard}").write_text(str(os.getpid()))
        return ShardReport(shard, shard * 10)


def factory(folder: Path) -> Callable[[], Recorder]:
    from functools import partial

    return partial(Recorder, folder)


@pytest.mark.parametrize("workers", [1, 2])
def test_every_shard_once(tmp_path: Path, workers: int) -> None:
    reports = list(LocalExecutor(workers).map(factory(tmp_path), [3, 0, 5]))
    assert sorted(report.shard for report in reports) == [0, 3, 5]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "3", "5"]
    assert list(LocalExecutor(workers).map(factory(tmp_path), [])) == []


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_in_a_worker_is_the_caller_s(tmp_path: Path, workers: int) -> None:
    with pytest.raises(PoolError, match="shard 99"):
        list(LocalExecutor(workers).map(factory(tmp_path), [1, 99]))


def test_processes_and_ray_agree(
    make_pool: MakePool, tmp_path: Path, tiny_clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = make_pool(image_table(60), shards=3)
    options = {"keep": 0.3, "model": str(tiny_clip), "pretrained": "none", "epsilon": 1e-5}
    pipelines.prune(pool, out=tmp_path / "one", **options)
    expected = tree(tmp_path / "one")
    pipelines.prune(pool, out=tmp_path / "two", workers=2, **options)
    assert tree(tmp_path / "two") == expected
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[2]))
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    try:
        pipelines.prune(pool, out=tmp_path / "ray", workers=2, executor="ray", **options)
    finally:
        ray.shutdown()
    assert tree(tmp_path / "ray") == expected
