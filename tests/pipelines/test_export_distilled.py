"""`curate export` and `curate explain` of a run of `curate distill`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import ImageFolder

import distill
from curate.errors import FingerprintError, PoolError, ShardError
from curate.manifest import open_step
from pipelines.cli import run as command
from pipelines.export_formats import To, run_export
from pipelines.finished_config import ExportConfig
from tests.conftest import tree
from tests.pipelines.distilled_run import (
    NAMES,
    copy_of,
    make_judged,
    make_plain,
    many,
    quick,
)


@pytest.fixture(autouse=True, scope="module")
def _quick() -> Iterator[None]:
    with quick():
        yield


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_judged(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_plain(tmp_path_factory.mktemp("runs"))


# --- export ---------------------------------------------------------------------------------------


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "manifest.json"
    }


def test_image_folder_holds_the_images(judged: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    exported = run_export(judged, "image-folder", out)
    assert (exported.path, exported.rows, exported.written) == (out, 4, 4)
    assert "4 images" in exported.summary() and "ImageFolder" in exported.summary()
    images = distill.DistilledSet.open(judged / "distilled").images
    loaded = ImageFolder(out)
    assert len(loaded) == 4
    for number, (path, label) in enumerate(loaded.samples):
        row = (number % 2) * 2 + label
        np.testing.assert_array_equal(np.asarray(Image.open(path)), images.pixels[row])
    assert json.loads((out / "classes.json").read_text())["classes"] == NAMES
    before = tree(out)
    assert run_export(judged, "image-folder", out) == exported
    assert tree(out) == before
    Path(loaded.samples[0][0]).unlink()
    run_export(judged, "image-folder", out)
    assert files_of(out) == {name: data for name, data in before.items() if name in files_of(out)}
    assert run_export(judged, "image-folder").path == judged / "export-image-folder"
    shutil.rmtree(judged / "export-image-folder")


def test_image_folder_elsewhere(judged: Path, plain: Path, tmp_path: Path) -> None:
    out, foreign = tmp_path / "out", tmp_path / "foreign"
    run_export(judged, "image-folder", out)
    with pytest.raises(FingerprintError, match="another result"):
        run_export(plain, "image-folder", out)
    run_export(plain, "image-folder", out, overwrite=True)
    assert len(ImageFolder(out)) == 2
    foreign.mkdir()
    (foreign / "mine.txt").write_text("mine")
    with pytest.raises(FingerprintError, match="not made by this tool"):
        run_export(judged, "image-folder", foreign, overwrite=True)
    assert files_of(foreign) == {"mine.txt": b"mine"}
    before = tree(plain)
    for inside in (plain, plain.parent):
        with pytest.raises(PoolError, match="holds the run itself"):
            run_export(plain, "image-folder", inside, overwrite=True)
    assert tree(plain) == before


class Killed(BaseException):
    """Stands for a kill: nothing may catch it."""


def test_export_killed_and_continued(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before a file that it would write or move, then continued, it ends with the same."""
    run_export(plain, "image-folder", tmp_path / "whole")
    expected, left = files_of(tmp_path / "whole"), [0]
    for name in ("replace", "rename"):
        original = getattr(Path, name)

        def move(self: Path, target: Path, original: Any = original) -> Path:
            left[0] -= 1
            if left[0] == 0:
                raise Killed
            found: Path = original(self, target)
            return found

        monkeypatch.setattr(Path, name, move)
    for again in (False, True):  # a fresh export, and one that puts back what is gone
        event = 0
        while True:
            event += 1
            out, left[0] = tmp_path / f"out-{again}-{event}", 0
            if again:
                shutil.copytree(tmp_path / "whole", out)
                (out / "classes.json").unlink()
            left[0] = event
            try:
                run_export(plain, "image-folder", out)
            except Killed:
                if event > 1:
                    assert json.loads((out / "manifest.json").read_text())["complete"] is False
                run_export(plain, "image-folder", out)
                assert files_of(out) == expected, f"killed at the file of number {event}"
                continue
            break
        assert event > 6 and files_of(out) == expected


def test_formats_of_the_other_kind_are_refused(
    judged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for to in set(get_args(To)) - {"image-folder"}:
        with pytest.raises(PoolError, match=rf"--to {to} does not apply. Use --to image-folder"):
            run_export(judged, to, tmp_path / "out")
    other = tmp_path / "other"
    open_step(other, step="prune", step_version=1, params={}, inputs={})
    flags = ["export", "--to", "image-folder", "--out", str(tmp_path / "out")]
    for run in (other, tmp_path / "nothing"):
        assert command([*flags, "--run", str(run)]) == 1
        assert "not the folder of a run of curate distill" in capsys.readouterr().err
    unfinished = copy_of(judged, tmp_path / "unfinished", complete=False)
    with pytest.raises(ShardError, match="not complete"):
        run_export(unfinished, "image-folder", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_help_lists_the_formats(capsys: pytest.CaptureFixture[str]) -> None:
    assert get_args(get_type_hints(ExportConfig)["to"]) == get_args(To)
    assert command(["export", "--help"]) == 0
    assert "image-folder" in capsys.readouterr().out


# --- explain --------------------------------------------------------------------------------------


def test_explain_answers_by_image_id(judged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["explain", "--run", str(judged), "--uid", "3", "--uid", "0"]) == 0
    third, first = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    images = distill.DistilledSet.open(judged / "distilled").images
    assert third == {
        "image_id": 3,
        "class": NAMES[1],
        "label": 1,
        "ipc_rank": 1,
        "init_kind": "patch",
        "init_id": str(images.init_id[3]),
        "teacher_conf": float(images.teacher_confidence[3]),
        "recover_loss": float(images.recover_loss[3]),
        "bn_loss": float(images.bn_loss[3]),
    }
    assert first["image_id"] == 0 and first["class"] == NAMES[0]
    for wrong in ("4", "-1", "cat", "²", ""):
        assert command(["explain", "--run", str(judged), "--uid", wrong]) == 1
        assert "image_id, 0 to 3" in capsys.readouterr().err


def test_explain_has_no_numbers_that_json_lacks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = many(tmp_path / "run", classes=2, ipc=1, size=16)
    assert command(["explain", "--run", str(run), "--uid", "1"]) == 0
    assert json.loads(capsys.readouterr().out)["recover_loss"] is None
