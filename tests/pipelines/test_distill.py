"""`curate distill` and `pipelines.distill_pool`: the whole path on toy pools, and wrong pools."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import distill
import pipelines
from curate.errors import BudgetError, FailedRowsError, FingerprintError, PoolError
from pipelines import distilling
from pipelines.cli import run
from pipelines.distill_config import RECIPE_NAMES
from tests.conftest import IMAGE, REPOSITORY, MakePool, tree

TINY: dict[str, Any] = {
    "network": "convnet3",
    "squeeze_epochs": 2,
    "iterations": 3,
    "label_epochs": 2,
    "device": "cpu",
}
FLAGS = [
    *("--network", "convnet3", "--squeeze-epochs", "2", "--iterations", "3"),
    *("--label-epochs", "2", "--device", "cpu"),
]


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def encoded(array: np.ndarray, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, kind)
    return buffer.getvalue()


def toy(
    n: int = 24, *, size: int = 16, labels: list[Any] | None = None, **options: Any
) -> pa.Table:
    """Dark and bright noise: class i % 2."""
    rng = np.random.default_rng(0)
    cells = [
        {"bytes": encoded(rng.integers(0, 120, (size, size, 3), np.uint8) + 120 * (i % 2)),
         "path": None}
        for i in range(n)
    ]  # fmt: skip
    kind = options.get("kind")
    values = pa.array(labels if labels is not None else [i % 2 for i in range(n)], kind)
    table = pa.table({"image": pa.array(cells, IMAGE), "label": values})
    if names := options.get("names"):
        features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
        described = json.dumps({"info": {"features": features}})
        table = table.replace_schema_metadata({"huggingface": described})
    return table


def with_image(table: pa.Table, row: int, data: bytes | None) -> pa.Table:
    cells = table["image"].to_pylist()
    cells[row] = {"bytes": data, "path": None}
    return table.set_column(0, "image", pa.array(cells, IMAGE))


def pixels_of(out: Path) -> np.ndarray:
    loaded: np.ndarray = np.load(out / "images" / "pixels.npy")
    return loaded


# --- the whole path ---------------------------------------------------------------------------


def test_whole(make_pool: MakePool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pool = make_pool(toy(names=["night", "day"]), shards=2)
    test = make_pool(toy(8, labels=[1, 0] * 4, names=["day", "night"]), "test")
    out = tmp_path / "run"
    command = ["distill", "--pool", str(pool), "--ipc", "2", "--out", str(out), *FLAGS]
    command += ["--test-pool", str(test)]
    assert run(command) == 0
    said = capsys.readouterr()
    assert str(out / "distilled") in said.out and "4 of 2 classes" in said.out
    for step in ("decode", "squeeze convnet3", "recover"):
        assert step in said.err
    found = distill.DistilledSet.open(out / "distilled")
    assert found.images.class_names == ("night", "day")
    assert found.images.ipc == 2 and found.images.size == 16
    assert found.labels is not None and found.labels.epochs == 2
    (teacher,) = found.provenance["teachers"]
    assert teacher["accuracy"] is not None and teacher["network"] == "convnet3"
    assert found.provenance["source"]["counts"] == {"ok": 24}
    loaded = distill.Teacher.load(out / "teacher-0" / "teacher.safetensors")
    assert loaded.sha256 == teacher["sha256"]
    assert not list(out.rglob("checkpoint*")) and not list(out.rglob("*.tmp"))
    before = tree(out)
    assert run(command) == 0
    assert "complete already" in capsys.readouterr().err
    assert tree(out) == before


def test_load_dataset_reads_the_result(make_pool: MakePool, tmp_path: Path) -> None:
    pool = make_pool(toy(names=["night", "day"]))
    pipelines.distill_pool(pool, ipc=1, out=tmp_path / "run", **TINY)
    where, cache = str(tmp_path / "run" / "distilled"), str(tmp_path / "cache")
    images = datasets.load_dataset(where, "images", split="train", cache_dir=cache)
    assert images.features["label"].names == ["night", "day"]
    assert images[0]["image"].size == (16, 16)
    streamed = datasets.load_dataset(where, "labels", split="train", streaming=True)
    assert len(list(streamed)) == 2 * 2


def test_the_images_are_those_of_the_pool(make_pool: MakePool, tmp_path: Path) -> None:
    """Pixels, classes and ids stay together; a seed decides the rest."""
    table = toy(labels=["b", "a"] * 12).append_column("uid", pa.array([f"u{i}" for i in range(24)]))
    pool = make_pool(table, shards=3)
    first = pipelines.distill_pool(pool, ipc=1, out=tmp_path / "a", method="rded", **TINY)
    rows = pq.read_table(tmp_path / "a" / "images" / "rows.parquet")
    assert rows["uid"].to_pylist() == [f"u{i}" for i in range(24)]
    assert rows["label"].to_pylist() == [1, 0] * 12
    assert first.images.class_names == ("a", "b")
    expected = [np.asarray(Image.open(io.BytesIO(c["bytes"]))) for c in table["image"].to_pylist()]
    np.testing.assert_array_equal(pixels_of(tmp_path / "a"), np.stack(expected))
    for label, uid in zip(first.images.labels, first.images.init_id, strict=True):
        assert int(uid[1:]) % 2 == 1 - label
    other = pipelines.distill_pool(pool, ipc=1, out=tmp_path / "b", seed=1, **TINY)
    assert not np.array_equal(other.images.pixels, first.images.pixels)


def test_dry_run_writes_nothing(
    make_pool: MakePool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pool = make_pool(toy())
    before = set(tmp_path.rglob("*"))
    command = ["distill", "--pool", str(pool), "--ipc", "3", "--out", str(tmp_path / "run"), *FLAGS]
    assert run([*command, "--dry-run"]) == 0
    assert set(tmp_path.rglob("*")) == before
    said = capsys.readouterr().out
    assert "2 in label, 12 to 12 rows" in said and "16 x 16" in said
    assert "6 images (3 per class) by default, 3 steps" in said


def test_validation(
    make_pool: MakePool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pool, test = make_pool(toy()), make_pool(toy(8), "test")
    out = tmp_path / "run"
    command = ["distill", "--pool", str(pool), "--ipc", "1", "--out", str(out), *FLAGS]
    command += ["--test-pool", str(test), "--validate-epochs", "1"]
    assert run(command) == 0
    said = capsys.readouterr().out
    for name in ("distilled", "random", "coreset", "teacher"):
        assert f"| {name} |" in said
    results = json.loads((out / "validation" / "results.json").read_text())
    assert results["rows"]


# --- folders ----------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for a kill: nothing may catch it."""


def test_killed_and_continued_is_the_same(
    make_pool: MakePool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before a file that it would write, then continued, a run ends with the same."""
    pool = make_pool(toy())
    pipelines.distill_pool(pool, ipc=2, out=tmp_path / "whole", **TINY)
    monkeypatch.setattr("distill.recover._CHECKPOINT_SECONDS", 0.0)
    original, left = Path.replace, [0]

    def replace(self: Path, target: Path) -> Path:
        left[0] -= 1
        if left[0] == 0:
            raise Killed
        return original(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    expected, event = tree(tmp_path / "whole"), -1
    while True:
        event += 3  # all of them take too long for every test run; they hold, too
        out = tmp_path / f"run-{event}"
        left[0] = event
        try:
            pipelines.distill_pool(pool, ipc=2, out=out, **TINY)
        except Killed:
            pipelines.distill_pool(pool, ipc=2, out=out, **TINY)
            assert tree(out) == expected, f"killed at the file of number {event}"
            continue
        break
    assert event > 25


def test_only_what_changed_is_made_again(
    make_pool: MakePool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool, out = make_pool(toy()), tmp_path / "run"
    pipelines.distill_pool(pool, ipc=1, out=out, **TINY)
    with pytest.raises(FingerprintError, match=r"ipc \(made with 1, asked for 2\)"):
        pipelines.distill_pool(pool, ipc=2, out=out, **TINY)
    with monkeypatch.context() as patch:
        patch.delattr(distilling, "squeeze")
        found = pipelines.distill_pool(pool, ipc=2, out=out, overwrite=True, **TINY)
        assert found.images.ipc == 2
        patch.delattr(distilling, "recover")
        changed = {**TINY, "label_epochs": 3}
        found = pipelines.distill_pool(pool, ipc=2, out=out, overwrite=True, **changed)
    assert found.labels is not None and found.labels.epochs == 3
    pipelines.distill_pool(pool, ipc=2, out=tmp_path / "fresh", **changed)
    assert tree(out) == tree(tmp_path / "fresh")


def test_two_teachers(make_pool: MakePool, tmp_path: Path) -> None:
    options = {**TINY, "network": ("convnet3", "convnet3"), "label_epochs": 0}
    found = pipelines.distill_pool(make_pool(toy()), ipc=1, out=tmp_path / "run", **options)
    first, second = found.provenance["teachers"]
    assert first["sha256"] != second["sha256"]
    assert found.labels is None


def test_label_bytes_are_a_budget(make_pool: MakePool, tmp_path: Path) -> None:
    pool, options = make_pool(toy()), {**TINY, "label_epochs": 200}
    free = pipelines.distill_pool(pool, ipc=1, out=tmp_path / "free", **options)
    tight = pipelines.distill_pool(pool, ipc=1, label_bytes=6000, out=tmp_path / "run", **options)
    assert free.labels is not None and tight.labels is not None
    assert tight.labels.nbytes <= 6000 < free.labels.nbytes
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["bytes"]["labels"] == tight.labels.nbytes


# --- what pools may hold ----------------------------------------------------------------------


def test_grey_alpha_and_mixed_sizes(make_pool: MakePool, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    grey = rng.integers(0, 255, (16, 16), np.uint8)
    alpha = rng.integers(0, 255, (16, 16, 4), np.uint8)
    table = with_image(with_image(toy(), 2, encoded(grey)), 3, encoded(alpha))
    mixed = with_image(table, 5, encoded(rng.integers(0, 255, (20, 31, 3), np.uint8)))
    with pytest.raises(PoolError, match=r"31 x 20.*16 x 16.*--size"):
        pipelines.distill_pool(make_pool(mixed, "mixed"), ipc=1, out=tmp_path / "no", **TINY)
    pipelines.distill_pool(make_pool(mixed), ipc=1, size=16, out=tmp_path / "run", **TINY)
    pixels = pixels_of(tmp_path / "run")
    assert pixels.shape == (24, 16, 16, 3)
    np.testing.assert_array_equal(pixels[2], np.repeat(grey[..., None], 3, axis=2))
    np.testing.assert_array_equal(pixels[3], alpha[..., :3])


def test_broken_rows_have_a_reason(make_pool: MakePool, tmp_path: Path) -> None:
    table = with_image(toy(labels=[0, 1, None, *([1, 0] * 10), 1]), 4, b"<html>")
    pool = make_pool(with_image(table, 6, None))
    found = pipelines.distill_pool(pool, ipc=1, out=tmp_path / "run", **TINY)
    counts = {"decode_failed": 1, "missing": 1, "no_label": 1, "ok": 21}
    assert found.provenance["source"]["counts"] == counts
    rows = pq.read_table(tmp_path / "run" / "images" / "rows.parquet").to_pylist()
    bad = {i: row["reason"] for i, row in enumerate(rows) if not row["kept"]}
    assert bad == {2: "no_label", 4: "decode_failed", 6: "missing"}
    assert all(rows[i]["detail"] for i in bad)
    assert len(pixels_of(tmp_path / "run")) == 21
    with pytest.raises(FailedRowsError, match=r"3 of 24 rows .*--max-failed 0.1"):
        pipelines.distill_pool(pool, ipc=1, max_failed=0.1, out=tmp_path / "no", **TINY)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"labels": [3, 7] * 12}, ("3", "7")),
        ({"labels": [10, 9] * 12}, ("9", "10")),
        ({"labels": ["b", "a"] * 12}, ("a", "b")),
        ({"labels": [True, False] * 12}, ("False", "True")),
        ({"labels": [1.0, 2.0] * 11 + [None, 2.0]}, ("1", "2")),
        ({"labels": [0, 2] * 12, "names": ["zero", "one", "two"]}, ("zero", "two")),
    ],
)
def test_label_gaps(
    make_pool: MakePool, tmp_path: Path, options: dict[str, Any], names: tuple[str, ...]
) -> None:
    pool = make_pool(toy(**options))
    found = pipelines.distill_pool(pool, ipc=1, out=tmp_path / "run", **{**TINY, "label_epochs": 0})
    assert found.images.class_names == names


def unlabelled(table: pa.Table) -> pa.Table:
    return table.rename_columns(["image", "kind"])


@pytest.mark.parametrize(
    ("make", "flags", "code", "says"),
    [
        (lambda: unlabelled(toy()), [], 1, r"--label-col.*kind"),
        (lambda: toy(), ["--label-col", "lable"], 1, r"did you mean 'label'"),
        (lambda: toy(labels=[4] * 24), [], 1, r"only one class, '4'"),
        (lambda: toy(labels=[None] * 24, kind=pa.int64()), [], 1, r"no class"),
        (lambda: toy(labels=[[1]] * 24), [], 1, r"--label-col label has type list"),
        (lambda: toy(labels=[0.5, 1.5] * 12), [], 1, r"type double"),
        (lambda: toy(labels=[0, 2] * 12, names=["a", "b"]), [], 1, r"class 2.*names 2 classes"),
        (lambda: toy(), ["--ipc", "13"], 3, r"class '0' has 12 usable.*lower --ipc"),
        (lambda: toy(), ["--method", "sre3l"], 2, r"sre2l"),
        (lambda: toy(), ["--network", "convnet9"], 2, r"convnet9.*convnet3"),
        (lambda: toy(size=4), [], 2, r"too small"),
        (lambda: toy(), ["--validate-epochs", "1"], 2, r"--test-pool"),
        (lambda: toy(), ["--ipc", "0"], 2, r"ipc"),
        (lambda: toy(), ["--test-pool", ""], 2, r"--test-pool is empty"),
    ],
)
def test_refused(
    make_pool: MakePool,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    make: Callable[[], pa.Table],
    flags: list[str],
    code: int,
    says: str,
) -> None:
    """One line that says what is wrong, and nothing written."""
    pool, out = make_pool(make()), tmp_path / "run"
    given = FLAGS if "--network" not in flags else FLAGS[2:]
    ipc = [] if "--ipc" in flags else ["--ipc", "1"]
    command = ["distill", "--pool", str(pool), "--out", str(out), *ipc, *given, *flags]
    assert run(command) == code
    err = capsys.readouterr().err
    (line,) = (line for line in err.splitlines() if line.startswith("error:"))
    assert re.search(says, line), line
    assert not out.exists()


def test_too_few_images_decode(make_pool: MakePool, tmp_path: Path) -> None:
    table = toy()
    for row in range(0, 24, 2):
        table = with_image(table, row, b"no image" if row else table["image"][0]["bytes"].as_py())
    with pytest.raises(BudgetError, match="class '0' has 1 usable"):
        pipelines.distill_pool(make_pool(table), ipc=2, out=tmp_path / "run", **TINY)


def test_test_pool_of_other_classes(make_pool: MakePool, tmp_path: Path) -> None:
    pool = make_pool(toy(labels=["a", "b"] * 12))
    test = make_pool(toy(labels=["a", "c"] * 12), "test")
    with pytest.raises(PoolError, match=r"without 'b' and with 'c'"):
        pipelines.distill_pool(pool, ipc=1, test_pool=test, out=tmp_path / "run", **TINY)
    bare = make_pool(unlabelled(toy()), "bare")
    with pytest.raises(PoolError, match=r"--test-pool .*bare.*--label-col"):
        pipelines.distill_pool(pool, ipc=1, test_pool=bare, out=tmp_path / "run", **TINY)


def test_the_first_images_may_be_no_square(make_pool: MakePool, tmp_path: Path) -> None:
    wide = encoded(np.zeros((8, 12, 3), np.uint8))
    with pytest.raises(PoolError, match=r"12 x 8, no square; pass --size"):
        pipelines.distill_pool(make_pool(with_image(toy(), 0, wide)), ipc=1, **TINY)


# --- names ------------------------------------------------------------------------------------


def test_recipes_that_help_lists() -> None:
    assert set(RECIPE_NAMES) == {*distill.RECIPES, *distill.MATCH_RECIPES}


def test_public_names_can_be_called() -> None:
    """Whether the submodule of the same name was imported before or not."""
    for name in distill.__all__:
        assert callable(getattr(distill, name)) or name in ("RECIPES", "MATCH_RECIPES"), name
    assert distill.squeeze.squeeze is __import__("distill.squeeze", fromlist=["squeeze"]).squeeze
    with pytest.raises(ValueError, match="layout"):
        distill.export(None, Path("x"), layout="none")  # type: ignore[arg-type]


def test_help_without_torch() -> None:
    code = (
        "import sys, pipelines.cli as c\n"
        "try: c.main(['distill', '--help'])\n"
        "finally: assert not {'torch', 'pyarrow', 'numpy'} & set(sys.modules)"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr
    assert "--label-bytes" in found.stdout and "fadrm" in found.stdout
