"""Output folders that are full, read-only, somebody else's or in use; pools that change."""

from __future__ import annotations

import fcntl
import json
import os
import re
import resource
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import embedded_table, tree
from tests.pipelines.bad_input import (
    Command,
    check_error,
    check_nothing_whole,
    check_refused,
    check_whole,
    files_below,
    is_complete,
    table,
    write,
)

FULL = "no space left|file too large|disk"


@pytest.fixture
def curate(capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(capsys)


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    return write(tmp_path / "pool.parquet", table())


# --- full disk --------------------------------------------------------------------------------


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file may become longer, as on a full disk; Python ignores the signal that goes with it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """A small file system of its own, where that is allowed."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("file systems can only be mounted by root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def image_pool(folder: Path) -> tuple[Path, list[str]]:
    """A pool whose output has files of very different sizes, so that any of them can be the one."""
    pool = write(folder / "pictures.parquet", embedded_table(200), row_group_size=40)
    return pool, ["--clusters", "4"]


def test_file_too_large(curate: Command, tmp_path: Path) -> None:
    """At every step in turn; whatever was whole by then is used by the run that finishes."""
    pool, flags = image_pool(tmp_path)
    assert curate.prune(pool, tmp_path / "whole", *flags).code == 0
    expected = tree(tmp_path / "whole")
    sizes = sorted({len(data) for data in expected.values() if isinstance(data, bytes)})
    run = tmp_path / "run"
    for size in [100, *np.quantile(sizes[:-1], [0, 0.3, 0.6, 0.8, 1]).astype(int).tolist()]:
        with largest_file(size):
            ended = curate.prune(pool, run, *flags)
        check_error(ended, 1, FULL, "run/", "again")
        assert not is_complete(run)
        assert not list(run.rglob("*.tmp"))
        for name, data in tree(run).items():
            assert name.endswith("manifest.json") or data == expected[name], name
    ended = curate.prune(pool, run, *flags)
    assert ended.code == 0, ended.err
    assert tree(run) == expected


def test_disk_that_fills_up(curate: Command, tmp_path: Path) -> None:
    pool, flags = image_pool(tmp_path)
    assert curate.prune(pool, tmp_path / "whole", *flags).code == 0
    expected = tree(tmp_path / "whole")
    with mounted(tmp_path / "disk", "size=4m") as disk:
        for free in (4, 24, 64, 128):
            with (disk / "ballast").open("wb") as ballast:
                os.posix_fallocate(ballast.fileno(), 0, (4096 - free) << 10)
            ended = curate.prune(pool, disk / "run", *flags)
            check_error(ended, 1, "no space left", str(disk), "again")
            assert not is_complete(disk / "run")
            assert not list(disk.rglob("*.tmp"))
            (disk / "ballast").unlink()
        ended = curate.prune(pool, disk / "run", *flags)
        assert ended.code == 0, ended.err
        assert tree(disk / "run") == expected


# --- folders that are not ours ----------------------------------------------------------------


def test_read_only_folder(curate: Command, pool: Path, tmp_path: Path) -> None:
    """The error names the folder; with the same command and a folder that can be written, on."""
    if os.geteuid() != 0:
        (tmp_path / "locked").mkdir(mode=0o500)
        ended = curate.prune(pool, tmp_path / "locked" / "run")
        check_refused(ended, 1, tmp_path / "locked" / "run", "permission|read-only", "locked")
        return
    with mounted(tmp_path / "locked", "size=4m") as disk:
        (disk / "run").mkdir()
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        for name in ("run", "new"):
            ended = curate.prune(pool, disk / name)
            check_error(ended, 1, "read-only", str(disk / name))
            check_nothing_whole(disk / name)
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
        assert curate.prune(pool, disk / "run").code == 0
        check_whole(disk / "run", 20, 6)


def test_complete_run_in_a_read_only_folder(curate: Command, pool: Path, tmp_path: Path) -> None:
    """There is nothing to do, so nothing needs to be written."""
    with mounted(tmp_path / "locked", "size=4m") as disk:
        assert curate.prune(pool, disk / "run").code == 0
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        ended = curate.prune(pool, disk / "run")
        assert ended.code == 0, ended.err
        assert "nothing to do" in ended.err


@pytest.mark.parametrize("flags", [[], ["--overwrite"]])
@pytest.mark.parametrize("name", ["thesis.tex", "manifest.json", "pool/part-00000.parquet"])
def test_somebodys_files(
    curate: Command, pool: Path, tmp_path: Path, name: str, flags: list[str]
) -> None:
    """Left alone, also with --overwrite and if they are called like ours."""
    path = tmp_path / "mine" / name
    path.parent.mkdir(parents=True)
    path.write_text('{"name": "my web app"}')
    ended = curate.prune(pool, tmp_path / "mine", *flags)
    check_error(ended, 1, "mine", "not.* by this tool", "--out|another output folder")
    assert files_below(tmp_path / "mine") == {name: b'{"name": "my web app"}'}


@pytest.mark.parametrize("content", ["{", "[]", '{"format": "curate/1"}', "\xff"])
def test_damaged_manifest(curate: Command, pool: Path, tmp_path: Path, content: str) -> None:
    assert curate.prune(pool, tmp_path / "run").code == 0
    manifest = tmp_path / "run" / "manifest.json"
    manifest.write_text(content, encoding="latin-1")
    before = files_below(tmp_path / "run")
    ended = curate.prune(pool, tmp_path / "run")
    check_error(ended, 1, r"manifest\.json")
    assert files_below(tmp_path / "run") == before


INTERMEDIATE = [
    "index/part-00000.parquet",
    "embeddings/metadata/metadata_0000.parquet",
    "embeddings/img_emb/img_emb_0000.npy",
    "scores/part-00000.parquet",
    "duplicates/part-00000.parquet",
    "clusters/part-00000.parquet",
    "clusters/centroids.npy",
    "clusters/summary.parquet",
    "selection/part-00000.parquet",
]


@pytest.mark.parametrize("name", INTERMEDIATE)
def test_damaged_part_of_an_earlier_run(curate: Command, tmp_path: Path, name: str) -> None:
    """Found when the run goes on, named, and the advice helps: remove it, and the same command."""
    pool = write(tmp_path / "pool.parquet", table(similarity=np.linspace(0, 1, 20)))
    run = tmp_path / "run"
    assert curate.prune(pool, run).code == 0
    expected = tree(run)
    (run / name).write_bytes(b"PAR1 and no more")
    (run / "pool" / "part-00000.parquet").unlink()
    (run / "report.html").unlink()
    ended = curate.prune(pool, run)
    if ended.code == 0:  # made again, or not needed
        assert {**tree(run), name: None} == {**expected, name: None}
        return
    check_error(ended, 1, re.escape(name), "damaged", "remove", "again")
    (run / name).unlink()
    ended = curate.prune(pool, run)
    assert ended.code == 0, f"the advice must help: {ended.err}"
    assert tree(run) == expected


@pytest.mark.parametrize("place", ["pool.parquet", "pool.parquet/run", "file"])
def test_output_that_is_a_file(curate: Command, pool: Path, tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("x")
    before = files_below(tmp_path)
    ended = curate.prune(pool, tmp_path / place)
    check_error(ended, 1, place, "not a (folder|directory)|is a file", "--out")
    assert files_below(tmp_path) == before


def test_output_is_the_pools_folder(curate: Command, tmp_path: Path) -> None:
    write(tmp_path / "pool" / "a.parquet", table())
    before = files_below(tmp_path / "pool")
    for flags in ([], ["--overwrite"]):
        ended = curate.prune(tmp_path / "pool", tmp_path / "pool", *flags)
        check_error(ended, 1, "left alone", "--out")
        assert files_below(tmp_path / "pool") == before


@pytest.mark.parametrize(
    "pattern", ["", "*.parquet", "*/*.parquet", "**/*.parquet", "*/*/*.parquet"]
)
def test_output_inside_the_pool(curate: Command, tmp_path: Path, pattern: str) -> None:
    """Its own output must not become input: done already the second time, or refused at once."""
    folder = tmp_path / "pool"
    write(folder / ("sub/" * pattern.count("*/")) / "a.parquet", table())
    run = folder / "run"
    ended = curate.prune(folder / pattern, run)
    if ended.code:
        check_refused(ended, ended.code, run, "--out", "pool")
        return
    check_whole(run, 20, 6)
    before = tree(run)
    again = curate.prune(folder / pattern, run)
    assert again.code == 0, again.err
    assert "nothing to do" in again.err
    assert tree(run) == before


def test_output_inside_a_pool_of_folders(curate: Command, tmp_path: Path) -> None:
    """A pool of subfolders: a run beside them must not be taken for one of them."""
    for name in ("a", "b"):
        rows = table(uid=[f"{name}-{i}" for i in range(20)])
        write(tmp_path / "pool" / name / "0.parquet", rows)
    for out in ("run", "selection"):
        for _ in range(2):
            ended = curate.prune(tmp_path / "pool", tmp_path / "pool" / out)
            assert ended.code == 0, ended.err
        check_whole(tmp_path / "pool" / out, 40, 11)


def test_pruned_pool_is_a_pool(curate: Command, pool: Path, tmp_path: Path) -> None:
    """The folder of kept rows, and not the run around it, whose ledger is no pool."""
    assert curate.prune(pool, tmp_path / "run").code == 0
    ended = curate.prune(tmp_path / "run" / "pool", tmp_path / "again", keep=0.5)
    assert ended.code == 0, ended.err
    check_whole(tmp_path / "again", 6, 3)
    ended = curate.prune(tmp_path / "run", tmp_path / "wrong", keep=0.5)
    check_refused(ended, 1, tmp_path / "wrong", "run/pool")


# --- folders in use, inputs that change -------------------------------------------------------


def test_two_runs_at_once(curate: Command, pool: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    handle = os.open(run, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        for verb in (["prune", "--keep", "0.28"], ["embed"]):
            ended = curate(*verb, "--pool", pool, "--out", run)
            check_error(ended, 1, "run", "another process", "wait", "--out")
            assert not list(run.iterdir())
    finally:
        os.close(handle)
    assert curate.prune(pool, run).code == 0


def test_pool_that_changes(curate: Command, pool: Path, tmp_path: Path) -> None:
    """Refused by name until --overwrite; then equal to a fresh run."""
    run = tmp_path / "run"
    assert curate.prune(pool, run).code == 0
    before = tree(run)
    write(pool, table(text=[f"another {i}" for i in range(20)]))
    ended = curate.prune(pool, run)
    check_error(ended, 1, "different: .*pool", "--out", "--overwrite")
    assert "keep" not in ended.errors[0]
    assert tree(run) == before
    assert curate.prune(pool, run, "--overwrite").code == 0
    assert curate.prune(pool, tmp_path / "fresh").code == 0
    assert tree(run) == tree(tmp_path / "fresh")


def test_pool_that_moves(curate: Command, pool: Path, tmp_path: Path) -> None:
    """The place is no part of the result: the same content elsewhere is the same run."""
    assert curate.prune(pool, tmp_path / "run").code == 0
    (tmp_path / "elsewhere").mkdir()
    moved = pool.rename(tmp_path / "elsewhere" / "pool.parquet")
    ended = curate.prune(moved, tmp_path / "run")
    assert ended.code == 0, ended.err
    assert "nothing to do" in ended.err


def test_parameters_that_change(curate: Command, pool: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert curate.prune(pool, run).code == 0
    ended = curate.prune(pool, run, "--temperature", 0.2, "--seed", 3, keep=0.3)
    check_error(ended, 1, r"keep \(made with 0.28, asked for 0.3\)", "seed", "temperature")
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["params"]["keep"] == 0.28
    check_whole(run, 20, 6)
