"""`curate distill --method datadam` and `dm`: images without the teacher, labels from it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import distill
import pipelines
from distill import recover_state
from pipelines import distilling
from pipelines.cli import run
from pipelines.distill_config import RECIPE_NAMES
from tests.conftest import IMAGE, MakePool, png, tree

TINY: dict[str, Any] = {
    "network": "convnet3",
    "squeeze_epochs": 1,
    "iterations": 3,
    "label_epochs": 2,
    "device": "cpu",
}


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def toy(n: int = 12, size: int = 8) -> pa.Table:
    rng = np.random.default_rng(0)
    cells = [{"bytes": png(rng, size), "path": None} for _ in range(n)]
    return pa.table({"image": pa.array(cells, IMAGE), "label": [i % 2 for i in range(n)]})


@pytest.mark.parametrize("method", ["datadam", "dm"])
def test_whole(
    make_pool: MakePool, tmp_path: Path, capsys: pytest.CaptureFixture[str], method: str
) -> None:
    out = tmp_path / "run"
    command = ["distill", "--pool", str(make_pool(toy())), "--ipc", "2", "--out", str(out)]
    command += ["--method", method, "--iterations", "3", "--network", "convnet3"]
    command += ["--squeeze-epochs", "1", "--label-epochs", "2", "--device", "cpu"]
    assert run([*command, "--dry-run"]) == 0
    assert f"4 images (2 per class) by {method}, 3 steps" in capsys.readouterr().out
    assert run(command) == 0
    assert "match: 3 steps" in capsys.readouterr().err
    found = distill.DistilledSet.open(out / "distilled")
    assert found.images.ipc == 2 and set(found.images.init_kind) == {"real"}
    assert np.isfinite(found.images.recover_loss).all()
    assert found.labels is not None and found.labels.epochs == 2
    assert found.provenance["method"] == method
    recipe = found.provenance["recipe"]
    assert (recipe["iterations"], recipe["mirror"], recipe["name"]) == (3, True, method)
    assert len(found.provenance["teachers"]) == 1
    assert not list(out.rglob("checkpoint*"))


def test_another_teacher_gives_other_labels_of_the_same_images(
    make_pool: MakePool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool, out = make_pool(toy()), tmp_path / "run"
    options = {**TINY, "method": "dm"}
    first = pipelines.distill_pool(pool, ipc=1, out=out, **options)
    monkeypatch.delattr(distilling, "match")
    options["squeeze_epochs"] = 2
    second = pipelines.distill_pool(pool, ipc=1, out=out, overwrite=True, **options)
    assert np.array_equal(first.images.pixels, second.images.pixels)
    assert first.provenance["teachers"] != second.provenance["teachers"]


class Killed(BaseException):
    """Stands for a kill: nothing may catch it."""


def test_killed_while_matching_and_continued_is_the_same(
    make_pool: MakePool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool, options = make_pool(toy()), {**TINY, "method": "datadam"}
    pipelines.distill_pool(pool, ipc=2, out=tmp_path / "whole", **options)
    monkeypatch.setattr("distill.matching._CHECKPOINT_SECONDS", 0.0)
    save, saves = recover_state.save, []

    def killed(*arguments: Any) -> None:
        save(*arguments)
        saves.append(arguments[2].batch)
        if len(saves) == 2:
            raise Killed

    monkeypatch.setattr(recover_state, "save", killed)
    with pytest.raises(Killed):
        pipelines.distill_pool(pool, ipc=2, out=tmp_path / "run", **options)
    pipelines.distill_pool(pool, ipc=2, out=tmp_path / "run", **options)
    assert saves == [1, 2, 3, 3]
    assert tree(tmp_path / "run") == tree(tmp_path / "whole")


def test_help_lists_the_methods() -> None:
    assert set(distill.MATCH_RECIPES) <= set(RECIPE_NAMES)


def test_images_too_small_for_the_random_networks_are_refused_at_once(
    make_pool: MakePool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A timm teacher would take them."""
    out = tmp_path / "run"
    command = ["distill", "--pool", str(make_pool(toy(size=4))), "--ipc", "1", "--out", str(out)]
    assert run([*command, "--method", "dm", "--network", "resnet18"]) == 2
    assert "images of 4 pixels are too small" in capsys.readouterr().err
    assert not out.exists()
