from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from curate.errors import FingerprintError, ShardError
from curate.manifest import (
    atomic_path,
    atomic_write_bytes,
    digest,
    locked,
    open_step,
    read_manifest,
)
from tests.conftest import REPOSITORY

IDENTITY: dict[str, Any] = {
    "step": "cluster",
    "step_version": 1,
    "params": {"clusters": 10, "seed": 0},
    "inputs": {"embeddings": "a" * 64},
}


def test_a_file_is_whole_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "part"

    def fail_half_way() -> None:
        with atomic_path(path) as temporary:
            temporary.write_bytes(b"half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail_half_way()
    assert list(tmp_path.iterdir()) == []
    atomic_write_bytes(path, b"whole")
    assert [p.name for p in tmp_path.iterdir()] == ["part"]


def test_begin_continue_complete(tmp_path: Path) -> None:
    folder = tmp_path / "clusters"
    step = open_step(folder, **IDENTITY)
    assert not step.complete
    (folder / "part-00000.parquet").write_bytes(b"x")
    assert not open_step(folder, **IDENTITY).complete
    step.finish(rows=3)
    again = open_step(folder, **IDENTITY)
    assert again.complete
    assert again.manifest["rows"] == 3
    assert (folder / "part-00000.parquet").exists()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"params": {"clusters": 20, "seed": 0}}, r"clusters \(made with 10, asked for 20\)"),
        ({"params": {"clusters": 10}}, r"seed \(made with 0, asked for null\)"),
        ({"inputs": {"embeddings": "b" * 64}}, r'embeddings \(made with "aaaaaaaaaaaa\.\.\."'),
        ({"step_version": 2}, "step_version"),
        ({"step": "other"}, "step "),
    ],
)
def test_another_result_is_refused_by_key(
    tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    open_step(tmp_path / "run", **IDENTITY).finish()
    with pytest.raises(FingerprintError, match=named):
        open_step(tmp_path / "run", **(IDENTITY | change))


@pytest.mark.parametrize("keep_content", [False, True])
def test_overwrite(tmp_path: Path, keep_content: bool) -> None:
    folder = tmp_path / "run"
    open_step(folder, **IDENTITY).finish()
    (folder / "inner").mkdir()
    (folder / "inner" / "part").write_bytes(b"x")
    changed = IDENTITY | {"params": {"clusters": 3}}
    step = open_step(folder, **changed, overwrite=True, keep_content=keep_content)
    assert not step.complete
    assert (folder / "inner").exists() == keep_content


def test_somebody_elses_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(FingerprintError, match=r"no manifest\.json.*left alone"):
        open_step(tmp_path, **IDENTITY, overwrite=True)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize("content", [b"not json", b"[]", b'{"format": "other"}', b"\xff\xfe"])
def test_a_foreign_manifest_is_an_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(ShardError, match=r"manifest\.json"):
        open_step(tmp_path, **IDENTITY, overwrite=True)
    assert (tmp_path / "manifest.json").read_bytes() == content


def test_no_manifest(tmp_path: Path) -> None:
    assert read_manifest(tmp_path) is None


def test_digest_tells_values_apart() -> None:
    assert digest({"a": 1}) != digest({"a": 1.5}) != digest({"b": 1})
    with pytest.raises(ValueError, match="JSON"):
        digest(float("nan"))


def test_a_folder_belongs_to_one_process_at_a_time(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from curate.manifest import locked\n"
        "with locked(Path(sys.argv[1])):\n"
        "    print('locked', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
    )
    assert other.stdout is not None
    assert other.stdout.readline() == b"locked\n"
    with pytest.raises(FingerprintError, match="another process"), locked(tmp_path):
        pass
    other.kill()
    other.communicate()
    with locked(tmp_path):
        assert list(tmp_path.iterdir()) == []
