from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import pipelines
from curate.errors import FingerprintError, PoolError, ShardError
from curate.pool import Pool
from curate.selection import Selection
from curate.tar import read_samples
from pipelines.export_formats import run_export, subset_entries
from pipelines.url_list import safe_urls
from pipelines.webdataset_export import TarWorker, image_extension
from tests.conftest import IMAGE, MakePool, embedded_table, tree

U16 = np.dtype("u8,u8")


def encoded(seed: int, kind: str) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def pool_table(n: int = 120) -> pa.Table:
    """JPEG, PNG and WebP in turn, under names that no one should use as paths."""
    kinds = ["JPEG", "PNG", "WEBP"]
    cells = [{"bytes": encoded(i, kinds[i % 3]), "path": f"../../{i}.exe"} for i in range(n)]
    table = embedded_table(n, images=False)
    table = table.append_column("image", pa.array(cells, IMAGE))
    table = table.append_column("URL", [[f"http://a/{i}.jpg" for i in range(n)]])
    table = table.append_column("width", [list(range(n))])
    table = table.append_column("odd", [[float("nan") if i % 2 else 0.5 for i in range(n)]])
    return table.append_column("tags", [[["a", "b"]] * n])


@pytest.fixture
def run(make_pool: MakePool, tmp_path: Path) -> Path:
    pool = make_pool(pool_table(), shards=3)
    pipelines.prune(pool, keep=0.5, out=tmp_path / "run", dedup_mode="none")
    return tmp_path / "run"


def kept(run: Path) -> pa.Table:
    return pa.concat_tables([pq.read_table(p) for p in sorted((run / "pool").glob("*.parquet"))])


def members(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as archive:
        found = {}
        for info in archive:
            file = archive.extractfile(info)
            assert file is not None
            found[info.name] = file.read()
        return found


def test_tars_hold_the_kept_rows_in_their_order(run: Path) -> None:
    exported = run_export(run, "webdataset", samples_per_tar=25)
    rows = kept(run).to_pylist()
    assert exported.path == run / "export-webdataset"
    assert (exported.rows, exported.written) == (60, 60)
    tars = sorted(exported.path.glob("*.tar"))
    assert [path.name for path in tars] == ["00000.tar", "00001.tar", "00002.tar"]
    sizes = json.loads((exported.path / "sizes.json").read_text())
    assert sizes == {"00000.tar": 25, "00001.tar": 25, "00002.tar": 10}
    found: dict[str, bytes] = {}
    for path in tars:
        found |= members(path)
    assert len(found) == 3 * 60
    for number, row in enumerate(rows):
        key = f"{number:09d}"
        extension = image_extension(row["image"]["bytes"])
        assert found[f"{key}.{extension}"] == row["image"]["bytes"]
        assert found[f"{key}.txt"].decode() == row["text"]
        facts = json.loads(found[f"{key}.json"])
        assert facts["uid"] == row["uid"]
        assert facts["url"] == row["URL"]
        assert facts["width"] == row["width"]
        assert facts["extra"] == row["extra"]
        assert facts["odd"] == (0.5 if row["odd"] == 0.5 else None)
        assert set(facts) == {"uid", "url", "similarity", "extra", "width", "odd"}
    assert "--train-num-samples 60" in exported.summary()
    assert "{00000..00002}.tar" in exported.summary()


def test_tars_are_plain_and_the_same_every_time(run: Path, tmp_path: Path) -> None:
    first = run_export(run, "webdataset", tmp_path / "a", samples_per_tar=25)
    run_export(run, "webdataset", tmp_path / "b", samples_per_tar=25, workers=2)
    one, two = tree(tmp_path / "a"), tree(tmp_path / "b")
    # The manifest names the folder in the command to run next.
    assert one.pop("manifest.json") != two.pop("manifest.json")
    assert one == two
    with tarfile.open(tmp_path / "a" / "00000.tar") as archive:
        for info in archive:
            facts = (info.mtime, info.uid, info.gid, info.mode, info.uname, info.gname)
            assert facts == (0, 0, 0, 0o644, "", "")
            assert info.isreg()
    raw = (tmp_path / "a" / "00000.tar").read_bytes()
    assert raw[257:263] == b"ustar\0"
    assert run_export(run, "webdataset", tmp_path / "a", samples_per_tar=25) == first


def test_our_own_reader_opens_the_tars(run: Path) -> None:
    exported = run_export(run, "webdataset", samples_per_tar=25)
    with (exported.path / "00001.tar").open("rb") as file:
        samples = list(read_samples(file, name="00001.tar"))
    assert [sample.key for sample in samples] == [f"{n:09d}" for n in range(25, 50)]
    pool = Pool.open(exported.path)
    uids = [uid for shard in pool.shards for uid in pool.shard_uids(shard).to_pylist()]
    assert uids == Selection.open(run).kept_uids


def test_an_interrupted_export_writes_what_is_missing(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_export(run, "webdataset", tmp_path / "whole", samples_per_tar=10)
    original, calls = TarWorker.__call__, []

    def dies(self: TarWorker, number: int) -> object:
        calls.append(number)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(self, number)

    monkeypatch.setattr(TarWorker, "__call__", dies)
    with pytest.raises(KeyboardInterrupt):
        run_export(run, "webdataset", tmp_path / "out", samples_per_tar=10)
    run_export(run, "webdataset", tmp_path / "out", samples_per_tar=10)
    assert calls == [0, 1, 2, 2, 3, 4, 5]
    one, two = tree(tmp_path / "out"), tree(tmp_path / "whole")
    assert one.pop("manifest.json") != two.pop("manifest.json")
    assert one == two


def test_rows_without_a_usable_image_are_left_out_and_recorded(
    make_pool: MakePool, tmp_path: Path
) -> None:
    table = embedded_table(20)
    cells = table["image"].to_pylist()
    cells[3], cells[7] = None, {"bytes": encoded(0, "GIF"), "path": None}
    table = table.set_column(table.column_names.index("image"), "image", pa.array(cells, IMAGE))
    pool = make_pool(table)
    pipelines.prune(pool, keep=1.0, out=tmp_path / "run", dedup_mode="none", clip_fraction=1)
    exported = run_export(tmp_path / "run", "webdataset")
    assert (exported.rows, exported.written) == (20, 18)
    assert "1 missing_image, 1 unsupported_format" in exported.summary()
    assert json.loads((exported.path / "sizes.json").read_text()) == {"00000.tar": 18}
    sidecar = pq.read_table(exported.path / "00000.parquet").to_pylist()
    assert [row["status"] for row in sidecar if row["status"] != "success"] == [
        "missing_image",
        "unsupported_format",
    ]
    assert sidecar[3]["uid"] == table["uid"][3].as_py()
    assert "000000003.json" not in members(exported.path / "00000.tar")


def test_open_clip_reads_the_tars(run: Path) -> None:
    pytest.importorskip("webdataset")
    data = pytest.importorskip("open_clip_train.data")
    exported = run_export(run, "webdataset", samples_per_tar=30)
    size, shards = data.get_dataset_size(f"{exported.path}/{{00000..00001}}.tar")
    assert (size, shards) == (60, 2)


def test_datacomp_subset_is_what_the_resharder_searches(run: Path) -> None:
    exported = run_export(run, "datacomp")
    subset = np.load(exported.path / "subset.npy", mmap_mode="r", allow_pickle=False)
    assert subset.dtype == U16
    selection = Selection.open(run)
    wanted = set(selection.kept_uids)
    for uid in selection.table["uid"].to_pylist():
        # These three lines are how resharder.py looks a row up.
        key = np.array([divmod(int(uid, 16), 2**64)], U16)[0]
        count = np.searchsorted(subset, key, "right") - np.searchsorted(subset, key, "left")
        assert count == (uid in wanted)


def test_datacomp_repeats_and_sorts_by_both_halves() -> None:
    uids = [f"{high:016x}{low:016x}" for high, low in [(2, 1), (1, 9), (2**64 - 1, 0), (1, 2)]]
    entries = subset_entries(pa.chunked_array([uids]), pa.chunked_array([[1.0, 3.0, 1.0, 1.0]]))
    expected = [(2, 1), (1, 9), (1, 9), (1, 9), (2**64 - 1, 0), (1, 2)]
    assert entries.tolist() == expected
    with pytest.raises(PoolError, match="not a whole number"):
        subset_entries(pa.chunked_array([uids[:1]]), pa.chunked_array([[0.5]]))


def test_datacomp_needs_its_kind_of_uid(make_pool: MakePool, tmp_path: Path) -> None:
    table = embedded_table(20).drop_columns(["uid"]).append_column("uid", [[*map(str, range(20))]])
    pipelines.prune(make_pool(table), keep=0.5, out=tmp_path / "run")
    with pytest.raises(PoolError, match="--to uids"):
        run_export(tmp_path / "run", "datacomp")
    assert not (tmp_path / "run" / "export-datacomp").exists()


def test_datacomp_warns_about_derived_uids(make_pool: MakePool, tmp_path: Path) -> None:
    table = embedded_table(20).drop_columns(["uid"])
    pipelines.prune(make_pool(table), keep=0.5, out=tmp_path / "run")
    assert "will find none" in run_export(tmp_path / "run", "datacomp").summary()


def test_uids(run: Path) -> None:
    exported = run_export(run, "uids")
    uids = Selection.open(run).kept_uids
    assert (exported.path / "kept.txt").read_text().splitlines() == uids
    table = pq.read_table(exported.path / "kept.parquet")
    assert table["uid"].to_pylist() == uids
    assert set(table["weight"].to_pylist()) == {1.0}


def test_a_uid_of_two_lines_is_refused(make_pool: MakePool, tmp_path: Path) -> None:
    table = embedded_table(4).drop_columns(["uid"]).append_column("uid", [["a", "b\nc", "d", "e"]])
    pipelines.prune(make_pool(table), keep=1.0, out=tmp_path / "run", dedup_mode="none")
    with pytest.raises(PoolError, match="line break"):
        run_export(tmp_path / "run", "uids")


def test_parquet_is_there_already(run: Path, tmp_path: Path) -> None:
    exported = run_export(run, "parquet")
    assert exported.path == run / "pool"
    assert "already" in exported.summary()
    linked = run_export(run, "parquet", tmp_path / "out")
    assert linked.written == 60
    for path in sorted((run / "pool").glob("part-*.parquet")):
        assert (tmp_path / "out" / path.name).samefile(path)
    assert len(Pool.open(tmp_path / "out")) == 60


def test_parquet_is_copied_where_links_do_not_work(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr("pipelines.export_formats.os.link", no_links)
    run_export(run, "parquet", tmp_path / "out")
    for path in (run / "pool").glob("part-*.parquet"):
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
        assert not (tmp_path / "out" / path.name).samefile(path)


def test_img2dataset_list(run: Path) -> None:
    exported = run_export(run, "img2dataset")
    rows = kept(run)
    found = pa.concat_tables(
        [pq.read_table(p) for p in sorted(exported.path.glob("part-*.parquet"))]
    )
    names = ["uid", "url", "caption", "similarity", "extra", "pool_width", "odd", "tags"]
    assert found.column_names == names
    assert found["url"].to_pylist() == rows["URL"].to_pylist()
    assert found["caption"].to_pylist() == rows["text"].to_pylist()
    assert found["pool_width"].to_pylist() == rows["width"].to_pylist()
    assert found["uid"].to_pylist() == Selection.open(run).kept_uids
    said = exported.summary()
    assert "--url_col=url --caption_col=caption" in said
    assert "'noml'" in said.replace("'\"'\"'", "'")
    assert "width is pool_width" in said


def test_img2dataset_needs_addresses(make_pool: MakePool, tmp_path: Path) -> None:
    pipelines.prune(make_pool(embedded_table(20)), keep=0.5, out=tmp_path / "run")
    with pytest.raises(PoolError, match=r"no column of addresses.*--url-col"):
        run_export(tmp_path / "run", "img2dataset")


def test_tars_need_images(make_pool: MakePool, tmp_path: Path) -> None:
    pipelines.prune(make_pool(embedded_table(20, images=False)), keep=0.5, out=tmp_path / "run")
    with pytest.raises(PoolError, match="hold no images"):
        run_export(tmp_path / "run", "webdataset")


def test_addresses_that_are_not_of_the_web_are_marked() -> None:
    urls = pa.array([" https://a/1 ", "FILE:///etc/passwd", "ftp://a", "data:,x", None, "HTTP://b"])
    assert safe_urls(urls).to_pylist() == [
        "https://a/1",
        "refused+FILE:///etc/passwd",
        "refused+ftp://a",
        "refused+data:,x",
        None,
        "HTTP://b",
    ]


def test_another_selection_is_not_mixed_in(run: Path, make_pool: MakePool, tmp_path: Path) -> None:
    pipelines.prune(make_pool(pool_table(), "b"), keep=0.25, out=tmp_path / "other")
    run_export(run, "uids", tmp_path / "out")
    with pytest.raises(FingerprintError, match="selection"):
        run_export(tmp_path / "other", "uids", tmp_path / "out")
    assert run_export(tmp_path / "other", "uids", tmp_path / "out", overwrite=True).rows == 30
    assert len((tmp_path / "out" / "kept.txt").read_text().splitlines()) == 30


def test_what_is_no_run_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(PoolError, match="curate prune"):
        run_export(tmp_path / "nothing", "uids")
    with pytest.raises(ValueError, match="to must be one of"):
        run_export(run, "csv")  # type: ignore[arg-type]
    part = run / "pool" / "part-00001.parquet"
    part.write_bytes(part.read_bytes()[:100])
    with pytest.raises(ShardError, match="part-00001"):
        run_export(run, "webdataset")
    part.unlink()
    with pytest.raises(ShardError, match="part-00001"):
        run_export(run, "parquet", tmp_path / "out")
