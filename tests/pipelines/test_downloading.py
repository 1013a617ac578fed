from __future__ import annotations

import base64
import http.server
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

import pipelines
from curate.errors import CurateError, FingerprintError, PoolError
from curate.pool import Pool
from pipelines.download_shards import ImageShards
from pipelines.downloading import describe_download, run_download
from pipelines.img2dataset_process import VARIABLE, Fetch, find_img2dataset
from tests.conftest import REPOSITORY, MakePool, tree

# What img2dataset 1.47 writes, without a network: an address with "bad" in it fails, until a file
# `up` lies beside this program; rows come in another order than they were asked for.
FAKE = """#!{python}
import ast, json, os, sys, time
from pathlib import Path
import pyarrow as pa, pyarrow.parquet as pq

options = dict(argument[2:].split("=", 1) for argument in sys.argv[1:])
here = Path(__file__).parent
with (here / "calls").open("a") as calls:
    facts = [sys.argv[1:], os.environ.get("NO_ALBUMENTATIONS_UPDATE")]
    calls.write(json.dumps(facts) + "\\n")
if (here / "hang").exists():
    time.sleep(60)
if (here / "fail").exists():
    print("ValueError: something about it")
    sys.exit(3)
out = Path(options["output_folder"])
extra = ast.literal_eval(options["save_additional_columns"])
columns = extra + (["caption"] if "caption_col" in options else []) + ["url"]
shard = 0
for path in sorted(Path(options["url_list"]).glob("*.parquet")):
    table = pq.read_table(path, columns=columns, partitioning=None)
    for start in range(0, table.num_rows, int(options["number_sample_per_shard"])):
        part = table.slice(start, int(options["number_sample_per_shard"]))
        number, shard = shard, shard + 1
        if (out / f"{{number:05d}}_stats.json").exists() or (here / f"skip{{number}}").exists():
            continue
        rows = list(reversed(list(enumerate(part.to_pylist()))))
        bad = [("bad" in (r["url"] or "bad")) and not (here / "up").exists() for _, r in rows]
        opted = ["noai" in (r["url"] or "") for _, r in rows]
        status = ["failed_to_download" if b or o else "success" for b, o in zip(bad, opted)]
        why = ["Use of image disallowed by X-Robots-Tag directive" if o
               else "HTTP Error 404: Not Found" if b else None for b, o in zip(bad, opted)]
        done = part.take([i for i, _ in rows])
        done = done.append_column("key", [[f"{{number:05d}}{{i:04d}}" for i, _ in rows]])
        done = done.append_column("status", [status])
        done = done.append_column("error_message", pa.array(why, pa.string()))
        images = [r["url"].encode() if s == "success" else None for (_, r), s in zip(rows, status)]
        done = done.append_column("jpg", pa.array(images, pa.binary()))
        pq.write_table(done, out / f"{{number:05d}}.parquet")
        good = status.count("success")
        stats = {{"count": len(rows), "successes": good, "duration": 1.0,
                  "failed_to_download": len(rows) - good, "failed_to_resize": 0,
                  "status_dict": {{"success": good}}}}
        (out / f"{{number:05d}}_stats.json").write_text(json.dumps(stats))
"""


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "fake" / "img2dataset"
    path.parent.mkdir()
    path.write_text(FAKE.format(python=sys.executable))
    path.chmod(0o755)
    return path


@pytest.fixture
def addresses(make_pool: MakePool) -> Path:
    """Twenty-five rows: two that are gone, one that has opted out, one of this machine."""
    urls = [f"http://a/{i}.jpg" for i in range(25)]
    urls[3], urls[20], urls[8] = "http://a/bad3", "http://a/bad20", "http://a/noai"
    table = pa.table(
        {
            "URL": urls,
            "TEXT": [f"caption {i}" for i in range(25)],
            "LICENSE": ["cc-by"] * 25,
            "similarity": pa.array(np.arange(25) / 25, pa.float32()),
            "width": list(range(25)),
        }
    )
    return make_pool(table, "laion", shards=2)


def calls(program: Path) -> list[list[str]]:
    return [json.loads(line)[0] for line in (program.parent / "calls").read_text().splitlines()]


def images_of(out: Path) -> dict[str, dict[str, object]]:
    batches = Pool.open(out).batches()
    return {row["url"]: row for batch in batches for row in batch.to_pylist()}


def test_the_result_is_a_pool_with_every_row_and_column(
    addresses: Path, program: Path, tmp_path: Path
) -> None:
    pool = Pool.open(addresses)
    out = tmp_path / "out"
    found = run_download(pool, out, fetch=Fetch(samples_per_shard=5, program=program))
    assert (found.rows, found.successes) == (25, 22)
    assert found.failures == {
        "HTTP Error 404: Not Found": 2,
        "Use of image disallowed by X-Robots-Tag directive": 1,
    }
    assert "22 of 25 rows, 88.00 %" in found.summary()
    downloaded = Pool.open(out)
    assert downloaded.mapping.describe() == (
        "image=jpg text=caption url=url uid=uid score=similarity"
    )
    rows = images_of(out)
    assert len(rows) == 25
    for number in (0, 7, 24):
        row = rows[f"http://a/{number}.jpg"]
        assert row["caption"] == f"caption {number}"
        assert (row["LICENSE"], row["pool_width"]) == ("cc-by", number)
        assert row["jpg"] == f"http://a/{number}.jpg".encode()
    assert rows["http://a/bad3"]["jpg"] is None
    assert len({row["uid"] for row in rows.values()}) == 25


def test_img2dataset_is_asked_as_it_should_be(
    addresses: Path, program: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run_download(Pool.open(addresses), out, fetch=Fetch(program=program, processes=2, threads=7))
    (arguments,) = calls(program)
    assert json.loads((program.parent / "calls").read_text())[1] == "1"
    for expected in (
        "--url_col=url",
        "--caption_col=caption",
        "--output_format=parquet",
        "--enable_wandb=False",
        "--user_agent_token=curate",
        "--disallowed_header_directives=['noai', 'noimageai', 'noindex', 'noimageindex', 'noml']",
        "--save_additional_columns=['uid', 'LICENSE', 'similarity', 'pool_width']",
        "--resize_mode=no",
        "--skip_reencode=True",
        "--processes_count=2",
        "--thread_count=7",
    ):
        assert expected in arguments


@pytest.mark.parametrize(("mode", "shrinks"), [("keep_ratio", True), ("center_crop", False)])
def test_a_size_resizes(mode: str, shrinks: bool) -> None:
    options = dict(Fetch(image_size=224, resize_mode=mode).options())
    assert (options["image_size"], options["resize_mode"]) == (224, mode)
    assert options["resize_only_if_bigger"] is shrinks


def test_the_same_again_does_nothing(addresses: Path, program: Path, tmp_path: Path) -> None:
    fetch = Fetch(samples_per_shard=5, program=program)
    first = run_download(Pool.open(addresses), tmp_path / "out", fetch=fetch)
    before = tree(tmp_path / "out")
    assert run_download(Pool.open(addresses), tmp_path / "out", fetch=fetch) == first
    assert tree(tmp_path / "out") == before
    assert len(calls(program)) == 1


def test_shards_that_were_left_out_are_done_by_the_next_run(
    addresses: Path, program: Path, tmp_path: Path
) -> None:
    pool, out = Pool.open(addresses), tmp_path / "out"
    fetch = Fetch(samples_per_shard=5, program=program)
    (program.parent / "skip1").touch()
    with pytest.raises(CurateError, match=r"left out 1 of 6 shards.*run the same command again"):
        run_download(pool, out, fetch=fetch)
    before = (out / "images" / "00000.parquet").stat().st_mtime_ns
    (program.parent / "skip1").unlink()
    assert run_download(pool, out, fetch=fetch).rows == 25
    assert (out / "images" / "00000.parquet").stat().st_mtime_ns == before


def test_half_written_shards_are_done_again(addresses: Path, program: Path, tmp_path: Path) -> None:
    pool, out = Pool.open(addresses), tmp_path / "out"
    fetch = Fetch(samples_per_shard=5, program=program)
    (program.parent / "skip4").touch()
    with pytest.raises(CurateError):
        run_download(pool, out, fetch=fetch)
    (program.parent / "skip4").unlink()
    shard = out / "images" / "00001.parquet"
    shard.write_bytes(shard.read_bytes()[:50])
    (out / "images" / "00002_stats.json").write_text('{"count"')
    assert run_download(pool, out, fetch=fetch).rows == 25
    assert len(images_of(out)) == 25


def test_failed_rows_are_asked_for_again_and_put_in_their_place(
    addresses: Path, program: Path, tmp_path: Path
) -> None:
    pool, out = Pool.open(addresses), tmp_path / "out"
    fetch = Fetch(samples_per_shard=5, program=program)
    run_download(pool, out, fetch=fetch)
    before = images_of(out)
    (program.parent / "up").touch()
    found = run_download(pool, out, fetch=fetch, retry_failed=True)
    assert found.successes == 24
    assert found.failures == {"Use of image disallowed by X-Robots-Tag directive": 1}
    after = images_of(out)
    assert list(after) == list(before)
    assert [row["key"] for row in after.values()] == [row["key"] for row in before.values()]
    assert after["http://a/bad3"]["jpg"] == b"http://a/bad3"
    assert after["http://a/bad3"]["caption"] == "caption 3"
    same = set(before) - {"http://a/bad3", "http://a/bad20"}
    assert all(after[url] == before[url] for url in same)
    stats = [json.loads(p.read_text()) for p in sorted((out / "images").glob("*.json"))]
    assert sum(entry["successes"] for entry in stats) == 24
    assert not (out / "_retry").exists()
    assert run_download(pool, out, fetch=fetch) == found


def test_other_parameters_are_refused_by_name(
    addresses: Path, program: Path, tmp_path: Path
) -> None:
    pool, out = Pool.open(addresses), tmp_path / "out"
    run_download(pool, out, fetch=Fetch(program=program))
    with pytest.raises(FingerprintError, match="image_size"):
        run_download(pool, out, fetch=Fetch(program=program, image_size=64))
    # How it runs is not what comes out.
    run_download(pool, out, fetch=Fetch(program=program, threads=3, retries=2))
    run_download(pool, out, fetch=Fetch(program=program, image_size=64), overwrite=True)
    assert "--image_size=64" in calls(program)[-1]


def test_not_one_image_is_an_error(make_pool: MakePool, program: Path, tmp_path: Path) -> None:
    pool = Pool.open(make_pool(pa.table({"url": ["http://bad/1", "http://bad/2"]})))
    with pytest.raises(PoolError, match=r"not one of 2 images.*2 x HTTP Error 404"):
        run_download(pool, tmp_path / "out", fetch=Fetch(program=program))
    (program.parent / "up").touch()
    found = run_download(pool, tmp_path / "out", fetch=Fetch(program=program), retry_failed=True)
    assert found.successes == 2


def test_a_failure_shows_its_last_words(addresses: Path, program: Path, tmp_path: Path) -> None:
    (program.parent / "fail").touch()
    with pytest.raises(CurateError, match="exit code 3: ValueError: something about it"):
        run_download(Pool.open(addresses), tmp_path / "out", fetch=Fetch(program=program))


def test_the_program_is_found_or_the_command_to_install_it_is_named(
    program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(CurateError, match=r"pip install 'curate-distill\[download\]'"):
        find_img2dataset()
    monkeypatch.setenv("PATH", str(program.parent))
    assert find_img2dataset() == str(program)
    monkeypatch.setenv(VARIABLE, str(tmp_path / "nothing"))
    with pytest.raises(CurateError, match="is not a program"):
        find_img2dataset()
    assert find_img2dataset(program) == str(program)


def test_a_pool_without_addresses_is_refused(
    make_pool: MakePool, program: Path, tmp_path: Path
) -> None:
    pool = Pool.open(make_pool(pa.table({"image": [b"x"], "text": ["y"]})))
    with pytest.raises(PoolError, match="--url-col"):
        run_download(pool, tmp_path / "out", fetch=Fetch(program=program))
    assert not (tmp_path / "out").exists()


def test_wrong_numbers_and_names_are_refused(
    addresses: Path, program: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="resize_mode"):
        Fetch(resize_mode="stretch")
    with pytest.raises(ValueError, match="threads"):
        Fetch(threads=0)
    with pytest.raises(ValueError, match="cannot take"):
        run_download(Pool.open(addresses), tmp_path / "a[1]", fetch=Fetch(program=program))


def test_dry_run_prints_the_command_and_writes_nothing(addresses: Path, tmp_path: Path) -> None:
    said = describe_download(Pool.open(addresses), tmp_path / "out")
    assert "25 addresses" in said
    assert "img2dataset --url_list=" in said
    assert not (tmp_path / "out").exists()


def test_shards_are_planned_as_img2dataset_cuts_them(tmp_path: Path) -> None:
    assert ImageShards.plan(tmp_path, [12, 13], 5).counts == (5, 5, 2, 5, 5, 3)
    assert ImageShards.plan(tmp_path, [5], 5).counts == (5,)


def test_interrupting_stops_the_program(addresses: Path, program: Path, tmp_path: Path) -> None:
    (program.parent / "hang").touch()
    code = (
        "import sys; from curate.pool import Pool; from pipelines.downloading import *;"
        "from pipelines.img2dataset_process import Fetch;"
        "run_download(Pool.open(sys.argv[1]), sys.argv[2], fetch=Fetch(program=sys.argv[3]))"
    )
    arguments = [sys.executable, "-c", code, addresses, tmp_path / "out", program]
    with subprocess.Popen(arguments, cwd=REPOSITORY, stderr=subprocess.PIPE) as process:
        _until(lambda: (program.parent / "calls").exists())
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=20)
    _until(lambda: not _running(program))


def test_prune_downloads_first_on_request(
    make_pool: MakePool, program: Path, monkeypatch: pytest.MonkeyPatch, tiny_clip: Path
) -> None:
    picture = (
        "__import__('base64').b64decode('" + base64.b64encode(_jpeg(0)).decode() + "')[:-9]"
        " + bytes([sum(r['url'].encode()) % 256]) * 7 + bytes([255, 217])"
    )
    program.write_text(program.read_text().replace('r["url"].encode()', picture))
    monkeypatch.setenv(VARIABLE, str(program))
    n = 30
    table = pa.table(
        {
            "uid": [f"{i:032x}" for i in range(n)],
            "URL": [f"http://a/{'bad' if i % 10 == 0 else 'good'}/{i}" for i in range(n)],
            "TEXT": [f"caption {i}" for i in range(n)],
        }
    )
    pool = make_pool(table, "laion")
    with pytest.raises(PoolError, match="pass --download"):
        pipelines.prune(pool, keep=0.2)
    found = pipelines.prune(
        pool,
        keep=0.2,
        download=True,
        model=str(tiny_clip),
        pretrained="none",
        dedup_mode="none",
    )
    assert found.counts["kept"] == 6
    assert found.counts["decode_failed"] == 3
    assert found.path == pool.with_name("laion-pruned")
    assert set(found.table["uid"].to_pylist()) == set(table["uid"].to_pylist())


def _until(check: Callable[[], bool], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.05)


def _running(program: Path) -> bool:
    for entry in Path("/proc").iterdir():
        try:
            command = (entry / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        # The fake itself, not the Python that was told its name.
        if str(program).encode() in command[:2]:
            return True
    return False


def _jpeg(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (24, 24, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.fixture
def site() -> Iterator[tuple[str, dict[str, bytes]]]:
    """A web site on this machine: good images, a broken one, and one that has opted out."""
    pages = {f"/{i}.jpg": _jpeg(i) for i in range(6)}
    pages["/broken.jpg"] = pages["/0.jpg"][:100]
    pages["/noml.jpg"] = _jpeg(9)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path not in pages:
                self.send_error(404)
                return
            self.send_response(200)
            if "noml" in self.path:
                self.send_header("X-Robots-Tag", "noml")
            self.end_headers()
            self.wfile.write(pages[self.path])

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", pages
        server.shutdown()


@pytest.mark.slow
def test_the_real_img2dataset(
    site: tuple[str, dict[str, bytes]], make_pool: MakePool, tmp_path: Path
) -> None:
    named = os.environ.get(VARIABLE) or shutil.which("img2dataset")
    if named is None:
        pytest.skip("img2dataset is not installed")
    base, pages = site
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(_jpeg(1))
    urls = [base + path for path in [*pages, "/gone.jpg"]] + [secret.as_uri()]
    pool = Pool.open(make_pool(pa.table({"url": urls, "text": [f"c {u}" for u in urls]})))
    fetch = Fetch(samples_per_shard=5, threads=4, program=named)
    found = run_download(pool, tmp_path / "out", fetch=fetch)
    assert (found.rows, found.successes) == (10, 6)
    rows = images_of(tmp_path / "out")
    for path, data in pages.items():
        expected = None if path in ("/broken.jpg", "/noml.jpg") else data
        assert rows[base + path]["jpg"] == expected
    assert rows["refused+" + secret.as_uri()]["jpg"] is None
    pages["/gone.jpg"] = _jpeg(3)
    assert run_download(pool, tmp_path / "out", fetch=fetch, retry_failed=True).successes == 7
    assert images_of(tmp_path / "out")[base + "/gone.jpg"]["jpg"] == pages["/gone.jpg"]
