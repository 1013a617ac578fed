"""Images that are broken, huge, missing or somebody else's, and captions that bite.

All of them in one pool and one run, since a row must never spoil its neighbours.
"""

from __future__ import annotations

import io
import re
import struct
import time
import zlib
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines.cli import run as curate
from tests.conftest import IMAGE, png
from tests.pipelines.bad_input import (
    Command,
    check_error,
    check_refused,
    check_whole,
    files_below,
    parts_of,
    tiny_model,
    write,
)


def encoded(mode: str, kind: str, size: tuple[int, int] = (20, 16), **options: Any) -> bytes:
    rng = np.random.default_rng(len(mode) + len(kind))
    image = Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), np.uint8))
    if mode == "I;16":
        image = Image.fromarray(rng.integers(0, 65535, (size[1], size[0]), dtype=np.uint16))
    elif mode != "RGB":
        image = image.convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def animation() -> bytes:
    frames = [Image.new("RGB", (16, 16), (shade, 0, 0)) for shade in range(0, 250, 25)]
    buffer = io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    return buffer.getvalue()


def huge(width: int, height: int, *, colour: int = 0, bits: int = 1) -> bytes:
    """A whole, valid PNG of that many black pixels in a few kilobytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    packer = zlib.compressobj(1)
    row = bytes(1 + (width * bits + 7) // 8)
    data = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    signature = b"\x89PNG\r\n\x1a\n"
    return signature + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


GOOD = {
    "rgb": encoded("RGB", "PNG"),
    "rgba": encoded("RGBA", "PNG"),
    "cmyk": encoded("CMYK", "JPEG"),
    "grey": encoded("L", "JPEG"),
    "sixteen": encoded("I;16", "PNG"),
    "palette": encoded("P", "GIF"),
    "animated": animation(),
    "webp": encoded("RGBA", "WEBP"),
    "one pixel": encoded("RGB", "PNG", (1, 1)),
    "thin": encoded("RGB", "PNG", (2000, 1)),
    "bits": encoded("1", "PNG"),
}
FAILED = {
    "empty": (b"", "decode_failed"),
    "null": (None, "missing"),
    "html": (b"<html><body>404 Not Found</body></html>", "decode_failed"),
    "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "decode_failed"),
    "text": (b"GIF89a", "decode_failed"),
    "truncated": (encoded("RGB", "JPEG", (64, 64))[:300], "decode_failed"),
    "cut png": (encoded("RGB", "PNG", (64, 64))[:-400], "decode_failed"),
    "noise": (np.random.default_rng(0).bytes(5000), "decode_failed"),
    "eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "decode_failed"),
    "100 megapixels": (huge(10_000, 10_000), "too_large"),
    "100 megapixels of colour": (huge(10_000, 10_000, colour=2, bits=8), "too_large"),
    "lying": (huge(50_000, 50_000)[:2000], "too_large"),
}
CAPTIONS = [
    "<script>alert('x')</script>",
    "</td></table><img src=x onerror=alert(1)>",
    "\"' onmouseover='alert(1)' <b>&amp;&lt;",
    "{{7*7}} ${7*7} %s %(x)s \\x00 {0}",
    "control \x00\x01\x07\x1b[31m\x7f\x85\u2028\u2029\r\n\ttab",
    "10k " + "long " * 2000,
    "x" * 10_000,
    "🦊👩\u200d👩\u200d👧\u200d👦 emoji \U0010ffff",
    "\u202eright to left\u202c العربية",
    "z̷̢͎̓a̶l̵g̴o̷",
    "",
    "   \n ",
    None,
    "javascript:alert(1)",
    "<!-- --><style>*{display:none}</style>",
    "plain",
]


def hostile_pool() -> pa.Table:
    """Each image three times over, with the captions in turn."""
    named = GOOD | {name: data for name, (data, _) in FAILED.items()}
    names = [name for name in named for _ in range(3)]
    cells = [{"bytes": named[name], "path": f"../{name}<marquee>.png"} for name in names]
    captions = [CAPTIONS[i % len(CAPTIONS)] for i in range(len(names))]
    return pa.table(
        {
            "uid": [f"{i}<u>&'\"" for i in range(len(names))],
            "name": names,
            "image": pa.array(cells, IMAGE),
            "text": captions,
            "url": ["javascript:alert(1)//<script>"] * len(names),
        }
    )


class Run:
    """The hostile pool, embedded and pruned once."""

    def __init__(self, folder: Path) -> None:
        self.table = hostile_pool()
        self.pool = write(folder / "<marquee>pool" / "p.parquet", self.table, row_group_size=10)
        self.out = folder / "run"
        # The peak begins anew here.
        Path("/proc/self/clear_refs").write_text("5")
        before, start = peak_megabytes(), time.monotonic()
        flags = [*tiny_model(folder), "--dedup-mode", "none", "--clip-fraction", "1"]
        self.good = 3 * len(GOOD)
        keep = str(self.good / len(self.table))
        names = ["--pool", str(self.pool), "--out", str(self.out)]
        self.code = curate(["prune", *names, "--keep", keep, *flags, "--max-failed", "1"])
        self.seconds, self.megabytes = time.monotonic() - start, peak_megabytes() - before
        self.ledger = check_whole(self.out, len(self.table), self.good)


def peak_megabytes() -> float:
    status = Path("/proc/self/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert found is not None
    return int(found.group(1)) / 1024


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    folder = tmp_path_factory.mktemp("warm")
    rows = {"image": [GOOD["rgb"]] * 2, "text": ["a", "b"]}
    pool = write(folder / "p.parquet", pa.table(rows))
    # Libraries are loaded before time and memory are measured.
    flags = ["--keep", "1", "--out", str(folder / "run"), *tiny_model(folder)]
    curate(["prune", "--pool", str(pool), "--allow-fewer", *flags])
    yield Run(tmp_path_factory.mktemp("hostile"))


def test_every_image_has_its_status(hostile: Run) -> None:
    """Undecodable ones are rows with a reason, everything that a browser shows is embedded."""
    assert hostile.code == 0
    paths = sorted((hostile.out / "embeddings" / "metadata").glob("*.parquet"))
    metadata = pa.concat_tables([pq.read_table(path) for path in paths])
    names = hostile.table["name"].to_pylist()
    statuses = dict(zip(names, metadata["status"].to_pylist(), strict=True))
    assert statuses == dict.fromkeys(GOOD, "ok") | {k: status for k, (_, status) in FAILED.items()}
    for name, row in zip(names, hostile.ledger.to_pylist(), strict=True):
        assert row["kept"] == (name in GOOD)
        if name in FAILED:
            assert row["reason"] == "decode_failed"
            assert row["detail"]
    details = dict(zip(names, hostile.ledger["detail"].to_pylist(), strict=True))
    assert "10000 x 10000" in details["100 megapixels"]


def test_huge_images_cost_nothing(hostile: Run) -> None:
    """9 images of 100 megapixels and more would be 2.7 GB, decoded."""
    assert hostile.megabytes < 200
    assert hostile.seconds < 15


def test_ledger_is_in_pool_order(hostile: Run) -> None:
    assert hostile.ledger["uid"].to_pylist() == hostile.table["uid"].to_pylist()


def test_captions_are_exported_bit_for_bit(hostile: Run) -> None:
    kept = hostile.table.filter(hostile.ledger["kept"].combine_chunks())
    exported = parts_of(hostile.out / "pool")
    assert exported.column_names == kept.column_names
    for name in kept.column_names:
        assert exported[name].combine_chunks().equals(kept[name].combine_chunks()), name
    assert pc.count_distinct(kept["text"], mode="all").as_py() == len(CAPTIONS)


def test_captions_without_text_have_no_score(hostile: Run) -> None:
    """An empty caption is no caption: the model's vector of nothing would be a number like any."""
    rows = zip(hostile.table["text"].to_pylist(), hostile.ledger.to_pylist(), strict=True)
    for text, row in rows:
        there = text is not None and bool(text.strip()) and row["reason"] == "kept"
        assert (row["clip_score"] is not None) == there


class Tags(HTMLParser):
    """What a browser would make of the report."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_report_runs_nothing(hostile: Run) -> None:
    """No script, nothing from elsewhere, and captions as the words that they are."""
    report = (hostile.out / "report.html").read_text(encoding="utf-8")
    page = Tags()
    page.feed(report)
    assert not page.tags & {"script", "iframe", "object", "embed", "link", "base", "form"}
    assert not page.tags & {"u", "marquee"}, "uids, file names and addresses are escaped too"
    for name, value in page.attributes:
        assert not name.startswith("on"), name
        assert not value.lower().startswith(("javascript:", "http:", "https:", "//", "file:"))
        assert name != "src" or value.startswith("data:image/")
    shown = [text for text in CAPTIONS if text and text.strip()[:20] in page.text]
    assert any("<" in text for text in shown), "shown, as text"
    for character in "\x00\x01\x07\x1b\x7f":
        assert character not in report


def test_all_rows_fail(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit 3 with the counts; with --allow-fewer an empty result, whole, and exit 1."""
    command = Command(capsys)
    pool = write(tmp_path / "p.parquet", pa.table({"image": [b"x", None, b""], "text": ["a"] * 3}))
    model = tiny_model(tmp_path)
    ended = command.prune(pool, tmp_path / "run", *model, keep=0.5)
    check_refused(ended, 3, tmp_path / "run", "3 rows is 2", "only 0 ", "3 decode_failed")
    ended = command.prune(pool, tmp_path / "fewer", *model, "--allow-fewer", keep=0.5)
    check_error(ended, 1, "3 of 3 rows", "--max-failed", "result is written")
    ledger = check_whole(tmp_path / "fewer", 3, 0)
    assert ledger["reason"].to_pylist() == ["decode_failed"] * 3


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A picture that lies beside the pool's folder and is none of its business."""
    secret = tmp_path / "secret.png"
    secret.write_bytes(png(np.random.default_rng(7), 40))
    return secret


def test_paths_do_not_leave_the_pool(
    tmp_path: Path, outside: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "pool"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "inside.png").write_bytes(GOOD["rgb"])
    (folder / "linked.png").symlink_to(outside)
    (folder / "up").symlink_to(tmp_path)
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "fine.png").symlink_to("sub/inside.png")
    inside = ["sub/inside.png", str(folder / "sub" / "inside.png"), "sub/../fine.png"]
    tricks = [
        "../secret.png",
        str(outside),
        "linked.png",
        "up/secret.png",
        "sub/../../secret.png",
        f"file://{outside}",
        "/dev/zero",
        "/proc/self/environ",
        "loop.png",
        "sub",
        "gone.png",
        "nul\0.png",
        "x" * 5000,
        "http://169.254.169.254/secret.png",
        "",
        None,
    ]
    paths = inside + tricks
    captions = [f"caption {i}" for i in range(len(paths))]
    pool = write(folder / "p.parquet", pa.table({"file_name": paths, "text": captions}))
    flags = [*tiny_model(tmp_path), "--dedup-mode", "none", "--clip-fraction", "1"]
    run = tmp_path / "run"
    keep = len(inside) / len(paths)
    ended = Command(capsys).prune(pool, run, *flags, "--max-failed", 1, keep=keep)
    assert ended.code == 0, ended.err
    ledger = check_whole(run, len(paths), len(inside)).to_pylist()
    assert [row["kept"] for row in ledger] == [True] * len(inside) + [False] * len(tricks)
    assert all(row["detail"] for row in ledger if not row["kept"])
    leaks = [name for name, data in files_below(run).items() if outside.read_bytes() in data]
    assert not leaks
    exported = parts_of(run / "pool")["file_name"].to_pylist()
    assert [cell["bytes"] for cell in exported] == [GOOD["rgb"]] * len(inside)
    assert [cell["path"] for cell in exported] == inside
