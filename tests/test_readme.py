"""What the README shows is what happens."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import pipelines
from curate.selection import Selection
from pipelines.cli import app
from tests.conftest import REPOSITORY, embedded_table, image_table
from tests.pipelines.distilled_run import TINY, toy

README = (REPOSITORY / "README.md").read_text()
RESULTS = (REPOSITORY / "tests" / "benchmarks" / "RESULTS.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_python(tmp_path: Path, tiny_clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a pool that brings embeddings, since the default model's weights are not at hand."""
    monkeypatch.chdir(tmp_path)
    good = [i % 10 != 5 for i in range(150)]
    table = image_table(150).filter(good).rename_columns(["image", "text"])
    captions = table["text"].to_pylist()
    captions[::2] = ["short"] * len(captions[::2])
    table = table.set_column(1, "text", pa.array(captions))
    embedding = embedded_table(len(table), duplicates=0.0)["embedding"]
    pq.write_table(table.append_column("embedding", embedding), "laion.parquet")
    pipelines.prune("laion.parquet", keep=0.28)
    pool = toy(tmp_path / "toy.parquet", 8)
    pipelines.distill_pool(pool, ipc=1, out="cifar10-distilled", **TINY)
    model = f'encoder="{tiny_clip}", pretrained="none"'
    x = np.random.default_rng(0).normal(size=(600, 8)).astype(np.float32)
    for code in blocks("python"):
        code = code.replace('encoder="ViT-B-32"', model).replace("(x, 500)", "(x, 5)")
        exec(compile(code, "README.md", "exec"), {"x": x, "y": np.arange(len(x)) % 3})
    assert Selection.open("mine").counts["filtered:short-caption"] > 0


def test_every_command_is_there() -> None:
    verbs = set(re.findall(r"curate ([a-z]+) --", README)) | {"demo"}
    assert verbs <= set(app)
    flags = set(re.findall(r"`(--[a-z-]+)", README))
    configs = [f"{name}config.py" for name in ("", "distill_", "finished_", "plan_")]
    source = "config log_format".join((REPOSITORY / "pipelines" / c).read_text() for c in configs)
    assert {flag[2:].replace("-", "_") for flag in flags} <= set(re.findall(r"[a-z_]+", source))


def test_numbers_come_from_the_results() -> None:
    rows = [line for line in README.splitlines() if re.search(r"\d \+- \d", line)]
    assert len(rows) == 3
    for row in rows:
        for number in re.findall(r"\d+\.\d \+- \d\.\d", row):
            assert number in RESULTS
