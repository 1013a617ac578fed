"""What the tests of bad input share: the command in this process, hostile pools, and what holds.

A refusal is one line that names the problem, an exit code, and no output that looks whole.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curate.manifest import read_manifest
from pipelines.cli import run

TINY_MODEL = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


@dataclass(frozen=True)
class Ended:
    """How a run of the command ended."""

    code: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.startswith("error:")]


class Command:
    """`curate`, run in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys

    def __call__(self, *arguments: object) -> Ended:
        self.capsys.readouterr()
        with pytest.MonkeyPatch.context() as patch:
            # Half of the time of a small run is waiting for the disk; no test here pulls the plug.
            patch.setattr(os, "fsync", lambda handle: None)
            code = run([str(argument) for argument in arguments])
        captured = self.capsys.readouterr()
        return Ended(code, captured.out, captured.err)

    def prune(self, pool: object, out: Path, *arguments: object, keep: object = 0.28) -> Ended:
        return self("prune", "--pool", pool, "--keep", keep, "--out", out, *arguments)


def check_error(ended: Ended, code: int, *phrases: str) -> str:
    """Check the exit code and that there is one line of error, the last, that says all of these."""
    assert ended.code == code, ended.err
    assert "Traceback" not in ended.err
    assert len(ended.errors) == 1, ended.err
    error = ended.errors[0]
    assert ended.err.splitlines()[-1] == error, "the error must be the last line"
    assert error.startswith("error: ")
    assert error.isprintable(), "an error must not carry control characters to the terminal"
    for phrase in phrases:
        assert re.search(phrase, error, re.IGNORECASE), f"{phrase!r} is not in: {error}"
    return error


def check_nothing_whole(out: Path) -> None:
    """Check that whoever finds the folder cannot take it for a result."""
    if not out.exists():
        return
    assert not is_complete(out)
    assert not list(out.glob("pool/part-*")), "kept rows without a finished run"
    assert not list(out.rglob("*.tmp")), "a temporary file was left"
    assert not (out / "report.html").exists()


def check_refused(ended: Ended, code: int, out: Path, *phrases: str) -> str:
    """Check a refusal; wrong usage (2) is found before anything is written."""
    error = check_error(ended, code, *phrases)
    check_nothing_whole(out)
    assert code != 2 or not out.exists(), "wrong usage must be found before anything is written"
    return error


def is_complete(folder: Path) -> bool:
    manifest = read_manifest(folder)
    return manifest is not None and bool(manifest["complete"])


def check_whole(out: Path, rows: int, kept: int) -> pa.Table:
    """Check a finished run: every row has a fate, exactly so many are kept. Return the ledger."""
    assert is_complete(out)
    for step in ("index", "selection", "pool"):
        assert is_complete(out / step), step
    assert (out / "report.html").exists()
    assert not list(out.rglob("*.tmp"))
    ledger, exported = parts_of(out / "selection"), parts_of(out / "pool")
    counts = json.loads((out / "manifest.json").read_text())["counts"]
    assert ledger.num_rows == rows == sum(counts.values())
    assert "" not in ledger["reason"].unique().to_pylist()
    assert sum(ledger["kept"].to_pylist()) == kept == exported.num_rows == counts.get("kept", 0)
    return ledger


def parts_of(folder: Path) -> pa.Table:
    return pa.concat_tables([pq.read_table(path) for path in sorted(folder.glob("part-*.parquet"))])


def vectors(n: int, d: int = 8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)


def as_column(x: np.ndarray) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), x.shape[1])


def table(n: int = 20, **columns: Any) -> pa.Table:
    """A pool with uids, captions and embeddings, no images; a column that is None is left out."""
    base: dict[str, Any] = {
        "uid": [f"row-{i:04d}" for i in range(n)],
        "text": [f"caption {i}" for i in range(n)],
        "embedding": as_column(vectors(n)),
    }
    return pa.table({k: v for k, v in (base | columns).items() if v is not None})


def write(path: Path, data: pa.Table, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(data, path, **options)
    return path


def write_embeddings(folder: Path, *parts: np.ndarray, side: str = "img_emb") -> Path:
    """Write clip-retrieval's layout; object arrays are pickled, as a hostile file would be."""
    (folder / side).mkdir(parents=True, exist_ok=True)
    for number, part in enumerate(parts):
        np.save(folder / side / f"{side}_{number:04d}.npy", part, allow_pickle=True)
    return folder


def tiny_model(folder: Path) -> list[str]:
    """Return the flags of an untrained encoder that needs no download."""
    path = folder / "tiny.json"
    path.write_text(json.dumps(TINY_MODEL))
    return ["--model", str(path), "--pretrained", "none"]


def files_below(folder: Path, *, without: Sequence[Path] = ()) -> dict[str, bytes]:
    """Every file by name with its bytes, to show that nothing was touched."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not any(path.is_relative_to(other) for other in without)
    }


class Trap:
    """Pickled, it writes a file when somebody unpickles it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.path, "executed")
