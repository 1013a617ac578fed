"""Tar shards that are damaged, empty or hostile: refused in one line, or rows like any other."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import png
from tests.pipelines.bad_input import (
    Command,
    check_refused,
    check_whole,
    files_below,
    parts_of,
    tiny_model,
    vectors,
    write_embeddings,
)

ADVICE = "again|leave it out"
Member = tuple[str, bytes | tarfile.TarInfo]


@pytest.fixture
def curate(capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(capsys)


def make_tar(path: Path, members: list[Member]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            if isinstance(content, bytes):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
            else:
                archive.addfile(content)
    return path


def samples(n: int = 10, *, prefix: str = "") -> list[Member]:
    rng = np.random.default_rng(0)
    members: list[Member] = []
    for i in range(n):
        members += [(f"{prefix}{i:04d}.png", png(rng)), (f"{prefix}{i:04d}.txt", b"caption %d" % i)]
    return members


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> Member:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return name, info


def no_model(tmp_path: Path, rows: int) -> list[str]:
    return ["--embeddings", str(write_embeddings(tmp_path / "emb", vectors(rows)))]


@pytest.mark.parametrize("cut", [100, 600, 1000, 8000, -2000, -1100])
def test_truncated(curate: Command, tmp_path: Path, cut: int) -> None:
    """A pool that silently lacks its last rows would be worse than none."""
    path = make_tar(tmp_path / "pool" / "0.tar", samples())
    path.write_bytes(without_padding(path)[:cut])
    ended = curate.prune(tmp_path / "pool", tmp_path / "run", *no_model(tmp_path, 10))
    check_refused(ended, 1, tmp_path / "run", r"0\.tar", "damaged", r"\d+ samples", ADVICE)
    assert not (tmp_path / "run").exists()


def test_cut_between_two_members(curate: Command, tmp_path: Path) -> None:
    """Every header is whole and only the end mark is missing: said, or rows are lost in silence."""
    path = make_tar(tmp_path / "pool" / "0.tar", samples())
    with tarfile.open(path) as archive:
        start = archive.getmember("0006.png").offset
    path.write_bytes(path.read_bytes()[:start])
    ended = curate.prune(tmp_path / "pool", tmp_path / "run", *no_model(tmp_path, 6))
    said = [line for line in ended.err.splitlines() if line.startswith(("warning: ", "error: "))]
    assert any("0.tar" in line for line in said), ended.err


def without_padding(path: Path) -> bytes:
    """Return an archive that ends with its two blocks of zeros, not with twenty."""
    with tarfile.open(path) as archive:
        last = archive.getmembers()[-1]
    end = last.offset_data + -(-last.size // 512) * 512
    return path.read_bytes()[: end + 1024]


def test_damaged_in_the_middle(curate: Command, tmp_path: Path) -> None:
    path = make_tar(tmp_path / "pool" / "0.tar", samples())
    data = bytearray(path.read_bytes())
    data[512 * 8 : 512 * 9] = b"\xff" * 512
    path.write_bytes(data)
    ended = curate.prune(tmp_path / "pool", tmp_path / "run", *no_model(tmp_path, 10))
    check_refused(ended, 1, tmp_path / "run", r"0\.tar", "damaged", ADVICE)


def test_not_a_tar(curate: Command, tmp_path: Path) -> None:
    """A compressed one, under the name of a plain one, is the usual case."""
    path = tmp_path / "pool" / "0.tar"
    path.parent.mkdir()
    with tarfile.open(path, "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("a.jpg"))
    ended = curate.prune(tmp_path / "pool", tmp_path / "run")
    check_refused(ended, 1, tmp_path / "run", r"0\.tar", "damaged")


@pytest.mark.parametrize("content", [b"", b"\0" * 1024, b"\0" * 10_240])
def test_empty(curate: Command, tmp_path: Path, content: bytes) -> None:
    path = make_tar(tmp_path / "pool" / "0.tar", [])
    path.write_bytes(content)
    ended = curate.prune(tmp_path / "pool", tmp_path / "run")
    check_refused(ended, 1, tmp_path / "run", "empty", "0 rows")


def test_empty_shard_among_good_ones(curate: Command, tmp_path: Path) -> None:
    make_tar(tmp_path / "pool" / "0.tar", samples(10, prefix="a"))
    make_tar(tmp_path / "pool" / "1.tar", [])
    make_tar(tmp_path / "pool" / "2.tar", samples(10, prefix="c"))
    ended = curate.prune(tmp_path / "pool", tmp_path / "run", *no_model(tmp_path, 20))
    assert ended.code == 0, ended.err
    check_whole(tmp_path / "run", 20, 6)


TRICKS = [
    "../../escaped.png",
    "/tmp/escaped-absolute.png",
    "a/../../b/escaped.png",
    "C:\\escaped.png",
    "new\nline.png",
    "\x1b[2Jclear.png",
    "<script>alert(1)</script>.png",
    "x" * 3000 + ".png",
    "~/escaped.png",
    "$(touch escaped).png",
]
# By WebDataset's rule these have no key or no extension.
PASSED_OVER = ["nul\0byte.png", "..\\..\\escaped.png", ".png", "README"]


def test_names_with_tricks(curate: Command, tmp_path: Path) -> None:
    """The names are data: nothing is written or read where they point, each image is a row."""
    rng = np.random.default_rng(1)
    secret = tmp_path / "secret.png"
    secret.write_bytes(png(rng, 24))
    members: list[Member] = [(name, png(rng)) for name in TRICKS + PASSED_OVER]
    members += [
        link("linked.png", str(secret)),
        link("passwd.png", "../../../../etc/passwd"),
        link("hard.png", "../secret.png", tarfile.LNKTYPE),
        link("folder.png", "", tarfile.DIRTYPE),
        link("pipe.png", "", tarfile.FIFOTYPE),
    ]
    make_tar(tmp_path / "pool" / "0.tar", members)
    before = files_below(tmp_path)
    run = tmp_path / "run"
    flags = [*tiny_model(tmp_path), "--dedup-mode", "none", "--clip-fraction", "1"]
    ended = curate.prune(tmp_path / "pool", run, *flags, keep=1)
    assert ended.code == 0, ended.err
    check_whole(run, len(TRICKS), len(TRICKS))
    written = files_below(tmp_path, without=[run, tmp_path / "tiny.json"])
    assert written == before
    assert not list(Path("/tmp").glob("escaped*"))
    exported = parts_of(run / "pool").to_pylist()
    images = [content for name, content in members if name in TRICKS]
    assert [row["image"]["bytes"] for row in exported] == images
    for key in (row["key"] for row in exported):
        assert key.isprintable(), "names go to logs and reports"
    report = (run / "report.html").read_text()
    assert "<script" not in report
    assert not [name for name, data in files_below(run).items() if secret.read_bytes() in data]


def test_members_that_disagree(curate: Command, tmp_path: Path) -> None:
    """Samples without an image, without a caption, with json that is none: rows all the same."""
    rng = np.random.default_rng(2)
    members: list[Member] = [
        ("0.png", png(rng)),
        ("1.txt", b"no image"),
        ("2.png", b""),
        ("2.json", b"{"),
        ("3.png", png(rng)),
        ("3.txt", b"\xff\xfe not utf-8"),
        ("4.png", png(rng)),
        ("4.json", json.dumps({"caption": "\ud800", "url": []}).encode()),
        ("5.png", png(rng)),
        ("5.json", b"[" * 100_000),
    ]
    make_tar(tmp_path / "pool" / "0.tar", members)
    flags = ["--dedup-mode", "none", "--clip-fraction", "1", *tiny_model(tmp_path)]
    ended = curate.prune(tmp_path / "pool", tmp_path / "run", *flags, keep=4 / 6)
    assert ended.code == 0, ended.err
    ledger = check_whole(tmp_path / "run", 6, 4).to_pylist()
    failed = {number for number, row in enumerate(ledger) if row["reason"] == "decode_failed"}
    assert failed == {1, 2}
    assert all(ledger[number]["detail"] for number in failed)
