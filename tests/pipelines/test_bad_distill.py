"""Wrong requests for a distilled set, and pools as they come: one line, or the right pixels."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Callable, Iterator
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
from pipelines import labelled_images
from pipelines.distill_config import DistillConfig
from tests.conftest import IMAGE, MakePool, tree
from tests.pipelines.bad_input import (
    Command,
    Ended,
    check_error,
    check_refused,
    files_below,
    write,
)
from tests.pipelines.test_resume import Server, check_kill, uninterrupted

N = 24
LEAST: dict[str, Any] = {
    "ipc": 1,
    "method": "rded",
    "network": "convnet3",
    "squeeze_epochs": 1,
    "label_epochs": 0,
    "device": "cpu",
}
FLAGS = {
    "--method": "rded",
    "--network": "convnet3",
    "--squeeze-epochs": "1",
    "--label-epochs": "1",
    "--device": "cpu",
}


@pytest.fixture
def curate(capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(capsys)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def pool_of(labels: Any, *, files: list[bytes | None] | None = None, names: Any = None) -> pa.Table:
    if files is None:
        files = [encoded(Image.fromarray(noise(row, 16, 16, 3))) for row in range(len(labels))]
    cells = [{"bytes": data, "path": None} for data in files]
    table = pa.table({"image": pa.array(cells, IMAGE), "label": labels})
    if names is None:
        return table
    features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
    described = json.dumps({"info": {"features": features}})
    return table.replace_schema_metadata({"huggingface": described})


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    return write(tmp_path / "pool.parquet", pool_of(["cat", "dog"] * (N // 2)))


def ask(curate: Command, pool: Path, out: Path, *flags: object, ipc: object = 1) -> Ended:
    given = [one for pair in FLAGS.items() if pair[0] not in flags for one in pair]
    counted = [] if "--ipc" in flags else ["--ipc", ipc]
    return curate("distill", "--pool", pool, "--out", out, *counted, *given, *flags)


# --- flags ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--ipc", 0], ["ipc", ">= 1"]),
        (["--ipc", -1], ["ipc", ">= 1"]),
        (["--ipc", 2.5], ["ipc", "int"]),
        (["--ipc", "many"], ["ipc", "int"]),
        (["--method", "edcc"], ["method", "edcc", 'did you mean.*"edc"']),
        (["--network", "convnet9"], ["convnet9", "convnet3"]),
        (["--network", "resnet81"], ["resnet81", "timm"]),
        (["--network", "resnt18"], ["resnt18", "resnet18"]),
        (["--network", ""], ["network"]),
        (["--network", "vgg11_bn"], ["vgg11_bn does not take images of 16 x 16", "larger --size"]),
        (["--network", "convnet3-in", "--method", "edc"], ["convnet3-in has no batch norm"]),
        (["--size", 0], ["size", ">= 1"]),
        (["--size", 4], ["too small"]),
        (["--size", 100_000], ["--size 100000", "--max-pixels"]),
        (["--iterations", -1], ["iterations", ">= 0"]),
        (["--squeeze-epochs", 0], ["squeeze-epochs", ">= 1"]),
        (["--sqeeze-epochs", 3], ["did you mean --squeeze-epochs"]),
        (["--label-epochs", 32_768], ["label_epochs", "at most 32767"]),
        (["--label-bytes", 0], ["label-bytes", ">= 1"]),
        (["--max-failed", 1.5], ["max-failed", "<= 1"]),
        (["--max-failed", "nan"], ["max-failed", "must be"]),
        (["--seed", -1], ["seed", ">= 0"]),
        (["--seed", 2**80], ["seed", "at most"]),
        (["--workers", 0], ["workers", ">= 1"]),
        (["--device", "cuda:99"], ["device", "cpu"]),
        (["--device", "gpu"], ["device", "'gpu'", "cpu"]),
        (["--validate-epochs", 1], ["--validate-epochs", "--test-pool"]),
        (["--test-pool", ""], ["--test-pool is empty"]),
    ],
)
def test_flags(
    curate: Command, pool: Path, tmp_path: Path, flags: list[object], says: list[str]
) -> None:
    check_refused(ask(curate, pool, tmp_path / "run", *flags), 2, tmp_path / "run", *says)


def test_ipc_must_be_given(curate: Command, pool: Path, tmp_path: Path) -> None:
    ended = curate("distill", "--pool", pool, "--out", tmp_path / "run")
    check_refused(ended, 2, tmp_path / "run", "--ipc")


@pytest.mark.parametrize(
    ("name", "value"),
    [("ipc", 1.0), ("ipc", True), ("size", "16"), ("seed", None), ("max_failed", float("nan"))],
)
def test_values_of_python_callers(name: str, value: Any) -> None:
    given = {"pool": "p.parquet", "ipc": 1, name: value}
    if value is None:
        assert DistillConfig(**given).seed is None
        return
    with pytest.raises(ValueError, match=name):
        DistillConfig(**given)
    assert DistillConfig(pool="p.parquet", ipc=np.int64(3)).ipc == 3  # type: ignore[arg-type]


# --- classes ----------------------------------------------------------------------------------


def of(kind: pa.DataType, *values: Any) -> pa.Array:
    return pa.array((values * N)[:N], kind)


@pytest.mark.parametrize(
    ("labels", "names", "code", "says"),
    [
        (of(pa.float64(), 0.0, float("inf")), None, 1, ["row 1", "inf", "whole numbers"]),
        (of(pa.float64(), 0.0, 1e300), None, 1, ["row 1", "1e.300"]),
        (of(pa.float32(), 0.0, 1.5), None, 1, ["row 1", "1.5"]),
        (of(pa.int64(), 3), None, 1, ["only one class, '3'"]),
        (of(pa.null(), None), None, 1, ["type null"]),
        (of(pa.string(), None), None, 1, ["no class"]),
        (of(pa.float64(), float("nan")), None, 1, ["no class"]),
        (of(pa.binary(), b"a", b"b"), None, 1, ["type binary"]),
        (of(pa.date32(), 1, 2), None, 1, ["type date"]),
        (of(pa.list_(pa.int64()), [1], [2]), None, 1, ["type list"]),
        (of(pa.uint8(), 0, 2), ["a", "b"], 1, ["row 1", "class 2", "2 classes, 0 to 1"]),
        (of(pa.int64(), 0, -2), ["a", "b"], 1, ["row 1", "class -2"]),
        (of(pa.int64(), -1), ["a", "b"], 1, ["no class"]),
        (of(pa.int64(), *range(N)), None, 3, ["--ipc 2", "class '0' has 1 usable"]),
    ],
)
def test_labels_that_are_refused(
    curate: Command, tmp_path: Path, labels: pa.Array, names: Any, code: int, says: list[str]
) -> None:
    pool, out = write(tmp_path / "p.parquet", pool_of(labels, names=names)), tmp_path / "run"
    check_refused(ask(curate, pool, out, ipc=2), code, out, *says)
    assert not out.exists(), "told before anything is decoded"
    check_error(ask(curate, pool, out, "--dry-run", ipc=2), code, *says)


@pytest.mark.parametrize(
    ("labels", "names", "classes", "first"),
    [
        (of(pa.float32(), 2.0, float("nan"), 1.0), None, ("1", "2"), [1, None, 0]),
        (of(pa.float64(), -0.0, 7.0), None, ("0", "7"), [0, 1]),
        (of(pa.uint64(), 2**63 + 1, 5), None, ("5", str(2**63 + 1)), [1, 0]),
        (of(pa.int8(), -3, 4), None, ("-3", "4"), [0, 1]),
        (of(pa.uint8(), 1, None, 0), ["a", "b"], ("a", "b"), [1, None, 0]),
        (of(pa.int64(), 2, -1, 0), ["a", "b", "c"], ("a", "c"), [1, None, 0]),
        (of(pa.int64(), 1, 0), ["same", "same"], ("same (0)", "same (1)"), [1, 0]),
        (of(pa.int64(), 9, 3), {"0": "a"}, ("3", "9"), [1, 0]),
        (of(pa.bool_(), True, None, False), None, ("False", "True"), [1, None, 0]),
        (of(pa.large_string(), "é", "e"), None, ("e", "é"), [1, 0]),
        (of(pa.string(), "", " "), None, ("", " "), [0, 1]),
        (of(pa.dictionary(pa.int8(), pa.string()), "b", None, "a"), None, ("a", "b"), [1, None, 0]),
        (of(pa.string(), "<script>\x1b[2J", "a\nb: [c]"), None, None, [0, 1]),
    ],
)
def test_labels_that_are_read(
    tmp_path: Path, labels: pa.Array, names: Any, classes: Any, first: list[Any]
) -> None:
    pool, out = write(tmp_path / "p.parquet", pool_of(labels, names=names)), tmp_path / "run"
    found = pipelines.distill_pool(pool, out=out, **LEAST)
    assert found.images.class_names == (classes or ("<script>\x1b[2J", "a\nb: [c]"))
    rows = pq.read_table(out / "images" / "rows.parquet")
    assert rows["label"].to_pylist() == (first * N)[:N]
    loaded = datasets.load_dataset(
        str(out / "distilled"), "images", split="train", cache_dir=str(tmp_path / "cache")
    )
    assert tuple(loaded.features["label"].names) == found.images.class_names


def test_other_metadata_does_not_hide_the_class_names(tmp_path: Path) -> None:
    """Hugging Face describes lists by lists, and columns that the file does not have."""
    table = pool_of(of(pa.int64(), 0, 1), names=["cat", "dog"])
    described = json.loads(table.schema.metadata[b"huggingface"])
    described["info"]["features"] |= {"tags": [{"dtype": "string", "_type": "Value"}]}
    described["info"]["features"] |= {"gone": {"_type": "ClassLabel", "names": ["x"]}}
    table = table.replace_schema_metadata({"huggingface": json.dumps(described)})
    found = pipelines.distill_pool(
        write(tmp_path / "p.parquet", table), out=tmp_path / "run", **LEAST
    )
    assert found.images.class_names == ("cat", "dog")


# --- images -----------------------------------------------------------------------------------


def grey16() -> bytes:
    return encoded(Image.fromarray(noise(3, 16, 16).astype(np.uint16) * 257))


def animated() -> bytes:
    frames = [Image.fromarray(noise(seed, 16, 16)) for seed in (4, 5)]
    return encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])


def test_images_of_every_kind(tmp_path: Path) -> None:
    """What is not RGB becomes RGB, what is broken gets a reason; no row shifts another."""
    grey, rgb, alpha = noise(0, 16, 16), noise(1, 16, 16, 3), noise(2, 16, 16, 4)
    whole = encoded(Image.fromarray(rgb))
    cmyk = Image.fromarray(rgb).convert("CMYK")
    palette = Image.fromarray(grey).convert("P")
    given: list[tuple[bytes | None, Any]] = [
        (encoded(Image.fromarray(grey)), np.repeat(grey[..., None], 3, axis=2)),
        (encoded(Image.fromarray(alpha)), alpha[..., :3]),
        (encoded(cmyk, "TIFF"), np.asarray(cmyk.convert("RGB"))),
        (grey16(), np.repeat(noise(3, 16, 16)[..., None], 3, axis=2)),
        (animated(), np.repeat(noise(4, 16, 16)[..., None], 3, axis=2)),
        (encoded(palette), np.asarray(palette.convert("RGB"))),
        (encoded(Image.fromarray(grey > 127)), np.repeat(255 * (grey > 127)[..., None], 3, axis=2)),
        (whole[: len(whole) // 2], "decode_failed"),
        (whole[:20], "decode_failed"),
        (b"", "decode_failed"),
        (b"<html>", "decode_failed"),
        (None, "missing"),
        (encoded(Image.fromarray(noise(6, 40, 16, 3))), "too_large"),
        (encoded(Image.fromarray(rgb), "WEBP", lossless=True), rgb),
    ]
    files = [data for data, _ in given] + [whole] * (N - len(given))
    table = pool_of(of(pa.int64(), 0, 1), files=files)
    out = tmp_path / "run"
    pipelines.distill_pool(write(tmp_path / "p.parquet", table), out=out, max_pixels=600, **LEAST)
    rows = pq.read_table(out / "images" / "rows.parquet").to_pylist()
    expected = [wanted for _, wanted in given] + [rgb] * (N - len(given))
    reasons = [wanted if isinstance(wanted, str) else "ok" for wanted in expected]
    assert [row["reason"] for row in rows] == reasons
    images = [wanted for wanted in expected if not isinstance(wanted, str)]
    np.testing.assert_array_equal(np.load(out / "images" / "pixels.npy"), np.stack(images))
    for row in rows:
        assert row["kept"] == (row["reason"] == "ok") and bool(row["detail"]) != row["kept"]


def test_no_image_at_all(curate: Command, tmp_path: Path) -> None:
    out = tmp_path / "run"
    broken = pool_of(of(pa.int64(), 0, 1), files=[b"no"] * N)
    ended = ask(curate, write(tmp_path / "p.parquet", broken), out)
    check_refused(ended, 1, out, "no image", "decoded")
    empty = write(tmp_path / "e.parquet", broken.slice(0, 0))
    check_refused(ask(curate, empty, out), 1, out, "empty")
    links = pa.table({"url": ["http://a/1.jpg"] * N, "label": [0, 1] * (N // 2)})
    ended = ask(curate, write(tmp_path / "u.parquet", links), out)
    check_refused(ended, 1, out, "no images", "curate download")


def test_sizes(curate: Command, tmp_path: Path) -> None:
    """Mixed sizes are refused with the row, unless --size says what they shall be."""
    files: list[bytes | None] = [
        encoded(Image.fromarray(np.full((16, 16 + 8 * (row == 7), 3), 5 * row, np.uint8)))
        for row in range(N)
    ]
    pool = write(tmp_path / "p.parquet", pool_of(of(pa.int64(), 0, 1), files=files))
    out = tmp_path / "run"
    says = ["row 7 is 24 x 16", "16 x 16", "--size"]
    check_refused(ask(curate, pool, out), 1, out, *says)
    assert ask(curate, pool, out, "--size", 16).code == 0, "the folder goes on with what is right"
    pixels = np.load(out / "images" / "pixels.npy")
    np.testing.assert_array_equal(pixels[:, 8, 8, 0], 5 * np.arange(N))


# --- test pools -------------------------------------------------------------------------------


def test_test_pools(curate: Command, pool: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    bare = pool_of(["cat", "dog"] * 4)
    cases: dict[str, tuple[pa.Table, list[str]]] = {
        "bare": (bare.rename_columns(["image", "kind"]), ["bare.parquet", "--label-col"]),
        "more": (pool_of(["cat", "dog", "cow"] * 3), ["with 'cow'", "--pool does not have"]),
        "less": (pool_of(["dog"] * 4), ["without 'cat'"]),
        "list": (pool_of([[1], [2]] * 4), ["type list"]),
        "none": (pool_of(pa.array([None] * 4, pa.string())), ["without 'cat', 'dog'"]),
    }
    for name, (table, says) in cases.items():
        test = write(tmp_path / f"{name}.parquet", table)
        ended = ask(curate, pool, out, "--test-pool", test)
        check_refused(ended, 1, out, "--test-pool", *says)
        assert not out.exists()
    check_refused(ask(curate, pool, out, "--test-pool", tmp_path / "no.parquet"), 1, out, "no.parq")


def test_class_order_of_the_test_pool(curate: Command, tmp_path: Path) -> None:
    """Numbers of the two files differ, names decide: the same accuracy either way."""
    dark = [encoded(Image.fromarray(noise(row, 16, 16, 3) // 3)) for row in range(N)]
    bright = [encoded(Image.fromarray(255 - noise(row, 16, 16, 3) // 3)) for row in range(N)]
    files = [(dark, bright)[row % 2][row] for row in range(N)]
    pool = write(
        tmp_path / "p.parquet",
        pool_of(of(pa.int64(), 0, 1), files=files, names=["night", "day"]),
    )
    accuracies = []
    for number, names in enumerate((["night", "day"], ["day", "night"])):
        labels = of(pa.int64(), *((0, 1) if number == 0 else (1, 0)))
        table = pool_of(labels, files=files, names=names)
        test = write(tmp_path / f"t{number}.parquet", table)
        out = tmp_path / f"run{number}"
        ended = ask(curate, pool, out, "--test-pool", test, "--squeeze-epochs", 6)
        assert ended.code == 0, ended.err
        (teacher,) = distill.DistilledSet.open(out / "distilled").provenance["teachers"]
        accuracies.append(teacher["accuracy"])
    assert accuracies[0] == accuracies[1] == 1


def test_the_pool_itself_as_the_test(curate: Command, pool: Path, tmp_path: Path) -> None:
    ended = ask(curate, pool, tmp_path / "run", "--test-pool", pool)
    assert ended.code == 0 and "training images" in ended.err


# --- folders ----------------------------------------------------------------------------------


def test_out_is_in_use(curate: Command, pool: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "photos"
    write(foreign / "thesis.txt", pool_of(["a"]))
    before = files_below(foreign)
    for flags in ([], ["--overwrite"]):
        ended = ask(curate, pool, foreign, *flags)
        check_error(ended, 1, "photos", "not made by this tool", "--out")
        assert files_below(foreign) == before
    file = tmp_path / "file"
    file.write_text("mine")
    check_error(ask(curate, pool, file), 1, "file", "--out")
    assert file.read_text() == "mine"


def test_out_of_another_verb(curate: Command, pool: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert ask(curate, pool, out).code == 0
    check_error(ask(curate, pool, out, ipc=2), 1, "ipc .made with 1, asked for 2", "--overwrite")
    before = files_below(out)
    ended = curate("coreset", "--pool", pool, "--out", out, "--budget", 2, "--method", "uniform")
    assert ended.code != 0 and files_below(out) == before


@pytest.mark.parametrize("gone", ["distilled", "images", "recovered", "teacher-0", "soft-labels"])
def test_what_was_removed_is_made_again(
    curate: Command, pool: Path, tmp_path: Path, gone: str
) -> None:
    out = tmp_path / "run"
    assert ask(curate, pool, out).code == 0
    before = tree(out / "distilled")
    shutil.rmtree(out / gone)
    ended = ask(curate, pool, out, "--overwrite")
    assert ended.code == 0, ended.err
    assert tree(out / "distilled") == before


def test_folder_of_splits(curate: Command, tmp_path: Path) -> None:
    """As Hugging Face lays data sets out: training and test files in one folder."""
    data = datasets.Dataset.from_dict(
        {
            "img": [Image.fromarray(noise(row, 16, 16, 3)) for row in range(N)],
            "label": [row % 2 for row in range(N)],
        },
        features=datasets.Features(
            {"img": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])}
        ),
    )
    folder = tmp_path / "hub" / "data"
    folder.mkdir(parents=True)
    data.select(range(16)).to_parquet(folder / "train-00000-of-00001.parquet")
    data.select(range(16, N)).to_parquet(folder / "test-00000-of-00001.parquet")
    train, test = folder / "train-*.parquet", folder / "test-*.parquet"
    ended = ask(curate, train, tmp_path / "run", "--test-pool", test)
    assert ended.code == 0, ended.err
    found = distill.DistilledSet.open(tmp_path / "run" / "distilled")
    assert found.images.class_names == ("cat", "dog")
    assert found.provenance["source"]["counts"] == {"ok": 16}
    ended = ask(curate, tmp_path / "hub", tmp_path / "mixed")
    assert ended.code == 0 and "test" in ended.err and "train-*.parquet" in ended.err
    data.save_to_disk(tmp_path / "arrow")
    ended = ask(curate, tmp_path / "arrow", tmp_path / "other")
    check_refused(ended, 1, tmp_path / "other", "parquet")


def test_classes_of_a_webdataset(tmp_path: Path) -> None:
    folder = tmp_path / "tars"
    folder.mkdir()
    with tarfile.open(folder / "00000.tar", "w") as tar:
        for row in range(N):
            image = encoded(Image.fromarray(noise(row, 16, 16, 3)))
            for kind, data in (("png", image), ("cls", str(3 + row % 2).encode())):
                member = tarfile.TarInfo(f"{row:05d}.{kind}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    found = pipelines.distill_pool(folder, out=tmp_path / "run", **LEAST)
    assert found.images.class_names == ("3", "4")
    rows = pq.read_table(tmp_path / "run" / "images" / "rows.parquet")
    assert rows["label"].to_pylist() == [0, 1] * (N // 2)


# --- stopped runs -----------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for a kill: nothing may catch it."""


def test_decoding_goes_on_after_the_last_whole_shard(
    make_pool: MakePool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files: list[bytes | None] = [
        None if row == 3 else encoded(Image.fromarray(noise(row, 16, 16, 3))) for row in range(N)
    ]
    pool = make_pool(pool_of(of(pa.int64(), 0, 1), files=files), shards=4)
    pipelines.distill_pool(pool, out=tmp_path / "whole", **LEAST)
    original, seen = labelled_images.decode, []

    def stops(stop: int) -> Callable[..., Any]:
        def decode(data: bytes | None, **options: Any) -> Any:
            seen.append(data)
            if len(seen) > stop + 1:  # the first look is for the size
                raise Killed
            return original(data, **options)

        return decode

    out = tmp_path / "run"
    for stop in (15, 4, 8):  # in the third shard, in it again, in the last
        seen.clear()
        monkeypatch.setattr(labelled_images, "decode", stops(stop))
        with pytest.raises(Killed):
            pipelines.distill_pool(pool, out=out, **LEAST)
        with (out / "images" / "pixels.partial").open("ab") as file:
            file.write(b"what a killed run wrote last")
    seen.clear()
    monkeypatch.setattr(labelled_images, "decode", stops(1000))
    pipelines.distill_pool(pool, out=out, **LEAST)
    assert seen[1:] == files[18:], "three of four shards were there"
    assert tree(out) == tree(tmp_path / "whole")


def least() -> list[str]:
    return [one for pair in FLAGS.items() for one in pair]


STEPS = ("images-index", "images", "test-images-index", "test-images", "teacher-0")
STEPS += ("recovered", "soft-labels", "distilled")


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


@pytest.mark.slow
def test_killed_at_any_moment(server: Server, make_pool: MakePool, tmp_path: Path) -> None:
    """A SIGKILL in each of 12 runs, over all steps; continued, the bytes are the same."""
    pool = make_pool(pool_of(of(pa.int64(), 0, 1)), shards=3)
    test = make_pool(pool_of(of(pa.int64(), 1, 0)), "test")
    command = ["distill", "--pool", str(pool), "--ipc", "1", *least(), "--test-pool", str(test)]
    events, expected = uninterrupted(server, command, tmp_path / "whole")
    struck = {
        check_kill(server, command, tmp_path / f"killed-{moment}", int(moment), expected, STEPS)
        for moment in np.linspace(1, events - 1, 12).round()
    }
    assert len(struck) >= 6, struck


@pytest.mark.slow
def test_killed_again_and_again(server: Server, make_pool: MakePool, tmp_path: Path) -> None:
    """One run that is killed at random times until it is done."""
    pool = make_pool(pool_of(of(pa.int64(), 0, 1)), shards=3)
    command = ["distill", "--pool", str(pool), "--ipc", "2", *least(), "--out"]
    whole = server.run([*command, str(tmp_path / "whole")])
    assert whole["code"] == 0
    rng, struck = np.random.default_rng(0), 0
    for _ in range(10):
        after = float(rng.uniform(0, 0.9 * whole["seconds"]))
        struck += server.run([*command, str(tmp_path / "run")], kill_after=after)["killed"]
    assert server.run([*command, str(tmp_path / "run")])["code"] == 0
    assert tree(tmp_path / "run") == tree(tmp_path / "whole")
    assert struck >= 3
