"""Runs of `curate distill` on toy pools, for the tests of what is done with a finished run."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import distill
import pipelines
from curate.manifest import open_step
from pipelines.report_distill_pictures import keep_beginnings
from tests.conftest import IMAGE

NAMES = ['<script>alert("1")</script>', "\"><img src=x onerror='alert(2)'>"]
TINY: dict[str, Any] = {
    "network": "convnet3",
    "squeeze_epochs": 1,
    "iterations": 2,
    "label_epochs": 2,
    "device": "cpu",
}


@contextmanager
def quick() -> Iterator[None]:
    """No waiting for the disk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


def encoded(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def toy(path: Path, n: int, seed: int = 0) -> Path:
    """Dark and bright noise: class i % 2."""
    rng = np.random.default_rng(seed)
    cells = [
        {"bytes": encoded(rng.integers(0, 120, (8, 8, 3), np.uint8) + 120 * (i % 2)), "path": None}
        for i in range(n)
    ]
    labels = pa.array([i % 2 for i in range(n)], pa.int64())
    features = {"image": {"_type": "Image"}, "label": {"names": NAMES, "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    table = pa.table(
        {"image": pa.array(cells, IMAGE), "label": labels, "uid": [f"<u{i}>" for i in range(n)]}
    )
    pq.write_table(table.replace_schema_metadata(metadata), path)
    return path


def make_judged(folder: Path) -> Path:
    """A run with students, whose images began as patches."""
    pool, test = toy(folder / "pool.parquet", 24), toy(folder / "test.parquet", 8, seed=1)
    options = {**TINY, "ipc": 2, "test_pool": test, "validate_epochs": 1}
    pipelines.distill_pool(pool, out=folder / "judged", **options)
    return folder / "judged"


def make_plain(folder: Path) -> Path:
    """One image for each class, no labels, no students, no test images; began as noise."""
    options = {**TINY, "ipc": 1, "method": "cda", "label_epochs": 0}
    pipelines.distill_pool(toy(folder / "pool.parquet", 24), out=folder / "plain", **options)
    return folder / "plain"


def copy_of(run: Path, target: Path, **fields: Any) -> Path:
    shutil.copytree(run, target)
    manifest = json.loads((target / "manifest.json").read_text())
    (target / "manifest.json").write_text(json.dumps(manifest | fields))
    return target


def many(out: Path, *, classes: int, ipc: int, size: int, prefix: str = "c") -> Path:
    """Noise that no code can make smaller, as a run without a teacher's training."""
    rng, n = np.random.default_rng(0), classes * ipc
    half, names = (0.5, 0.5, 0.5), tuple(f"{prefix}{c}" for c in range(classes))
    images = distill.DistilledImages(
        rng.integers(0, 256, (n, size, size, 3), np.uint8),
        np.arange(n) % classes,
        (np.arange(n) // classes).astype(np.int32),
        np.full(n, "noise"),
        np.full(n, ""),
        *(np.full(n, value, np.float32) for value in (0.5, np.nan, np.nan)),
        class_names=names,
        mean=half,
        std=half,
    )
    step = open_step(out, step="distill", step_version=1, params={}, inputs={})
    distill.DistilledSet(images, None, {}).write(out / "distilled")
    pixels = np.zeros((classes, size, size, 3), np.uint8)
    train = distill.ImageSet.of(pixels, range(classes), class_names=names)
    model = distill.build("convnet3", classes=classes, size=size)
    teacher = distill.Teacher(model, "convnet3", size, names, half, half, float("nan"), 0)
    keep_beginnings(out, train, [teacher], recipe=distill.RECIPES["cda"], seed=0)
    facts = {"pool": {"path": "p", "mapping": {}}, "rows": classes, "counts": {"ok": classes}}
    step.finish(**facts, images=n, bytes={"images": 1, "labels": 0}, teachers=[teacher.facts()])
    return out
