"""`curate distill --method cudd`: ranges of ranks, each opposed to a student of the ones before."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import distill
import pipelines
from distill import recipes, students
from pipelines.cli import run
from tests.conftest import IMAGE, MakePool, png, tree

TINY: dict[str, Any] = {
    "method": "cudd",
    "network": "convnet3",
    "squeeze_epochs": 1,
    "iterations": 2,
    "label_epochs": 1,
    "device": "cpu",
}


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranges of two ranks instead of twenty and more."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    small = replace(recipes.RECIPES["cudd"], ranges=(2, 4), student_epochs=2)
    monkeypatch.setattr(recipes, "RECIPES", {**recipes.RECIPES, "cudd": small})


def toy(n: int = 14, size: int = 8) -> pa.Table:
    rng = np.random.default_rng(0)
    cells = [{"bytes": png(rng, size), "path": None} for _ in range(n)]
    return pa.table({"image": pa.array(cells, IMAGE), "label": [i % 2 for i in range(n)]})


def test_whole(make_pool: MakePool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pool, out = make_pool(toy()), tmp_path / "run"
    command = ["distill", "--pool", str(pool), "--ipc", "5", "--out", str(out)]
    command += ["--method", "cudd", "--iterations", "2", "--network", "convnet3"]
    command += ["--squeeze-epochs", "1", "--label-epochs", "1", "--device", "cpu"]
    assert run(command) == 0
    said = capsys.readouterr().err
    assert "student of 2 ranks" in said and "student of 4 ranks" in said
    found = distill.DistilledSet.open(out / "distilled")
    assert found.images.ipc == 5 and found.provenance["method"] == "cudd"
    assert found.provenance["recipe"]["ranges"] == [2, 4]
    assert len(set(found.images.init_id)) == 10
    assert not list(out.rglob("checkpoint*"))


class KilledError(Exception):
    pass


@pytest.mark.parametrize("after", [1, 3])
def test_killed_while_a_student_is_trained_and_continued_is_the_same(
    make_pool: MakePool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    pool = make_pool(toy())
    pipelines.distill_pool(pool, ipc=5, out=tmp_path / "whole", **TINY)
    monkeypatch.setattr(students, "_CHECKPOINT_SECONDS", 0.0)
    original, saves = students._Training._save, []

    def dies(self: students._Training) -> None:
        original(self)
        saves.append(1)
        if len(saves) == after:
            raise KilledError

    monkeypatch.setattr(students._Training, "_save", dies)
    with pytest.raises(KilledError):
        pipelines.distill_pool(pool, ipc=5, out=tmp_path / "cut", **TINY)
    assert list((tmp_path / "cut").rglob("checkpoint*.student"))
    pipelines.distill_pool(pool, ipc=5, out=tmp_path / "cut", **TINY)
    assert len(saves) == 4
    assert tree(tmp_path / "cut") == tree(tmp_path / "whole")
