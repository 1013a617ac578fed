import io
import json
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from curate.errors import FingerprintError, ShardError
from distill import distilled as module
from distill.card import plain
from distill.distilled import DistilledSet, encode_image, sizes
from distill.distilled_images import DistilledImages
from distill.relabel import attach, relabel
from tests.distill.test_relabel import SIZE, SMALL, direct, distilled_images, make_teacher

PROVENANCE = {"method": "sre2l", "seed": 3, "teachers": [{"sha256": "ab", "accuracy": None}]}
ARRAYS = ("pixels", "labels", "ipc_rank", "init_kind", "init_id")
NUMBERS = ("teacher_confidence", "recover_loss", "bn_loss")


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def whole() -> DistilledSet:
    images = distilled_images()
    return DistilledSet(images, relabel(images, make_teacher(), **SMALL), PROVENANCE)


@pytest.fixture
def folder(whole, tmp_path) -> Path:
    return whole.write(tmp_path / "set")


def equal(one: DistilledImages, other: DistilledImages) -> bool:
    kept = all(np.array_equal(getattr(one, name), getattr(other, name)) for name in ARRAYS)
    pairs = ((getattr(one, name), getattr(other, name)) for name in NUMBERS)
    numbers = all(np.array_equal(a, b, equal_nan=True) for a, b in pairs)
    rest = ("class_names", "mean", "std")
    return kept and numbers and all(getattr(one, name) == getattr(other, name) for name in rest)


def test_written_and_opened_is_the_same(whole, folder):
    opened = DistilledSet.open(folder)
    assert equal(opened.images, whole.images) and opened.provenance == PROVENANCE
    assert opened.images.pixels.dtype == np.uint8 and opened.labels is not None
    assert opened.labels.header == whole.labels.header
    pairs = zip(opened.torch_dataset(), whole.torch_dataset(), strict=True)
    for one, other in pairs:
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    found = sizes(folder)
    assert found["labels"] == whole.labels.nbytes and found["images"] > whole.images.pixels.size
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["complete"] and manifest["bytes"] == found


def test_check_e_from_disk_with_the_teacher_at_hand(whole, folder):
    """Check (e), through the files: pixels decoded from PNG, views read from Parquet."""
    opened, teacher = DistilledSet.open(folder), make_teacher()
    for batch, (views, stored) in zip(
        opened.torch_dataset(epochs=[2]), opened.labels.batches(2), strict=True
    ):
        with torch.no_grad():
            seen = teacher.model(batch.x)
        torch.testing.assert_close(batch.logits, seen, rtol=2**-10, atol=1e-4)
        torch.testing.assert_close(
            stored, direct(whole.images, teacher, views), rtol=1e-3, atol=1e-4
        )


@pytest.mark.parametrize(
    ("size", "kind"), [(8, b"PNG"), (64, b"PNG"), (65, b"WEBP"), (96, b"WEBP")]
)
def test_check_g_images_are_lossless(size, kind):
    """Check (g). SRe2L wrote JPEG of quality 75, off by 15 levels at 32 pixels (measured)."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (size, size, 3)).astype(np.uint8)
    for pixels in (noise, np.zeros_like(noise), noise // 255 * 255):
        data = encode_image(pixels)
        assert kind in data[:16]
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(data)).convert("RGB")), pixels)


def test_large_images_survive(tmp_path):
    images = distilled_images(1, size=72)
    opened = DistilledSet.open(DistilledSet(images, None, {}).write(tmp_path / "set"))
    assert equal(opened.images, images) and opened.labels is None
    with pytest.raises(ValueError, match="make them with distill"):
        opened.torch_dataset()


@pytest.mark.parametrize("streaming", [False, True])
def test_load_dataset_decodes_images(whole, folder, streaming):
    found = datasets.load_dataset(str(folder), "images", split="train", streaming=streaming)
    assert found.features["label"].names == ["cat", "dog", "owl"]
    rows = list(found)
    assert len(rows) == 9
    for number, row in enumerate(rows):
        assert np.array_equal(np.asarray(row["image"]), whole.images.pixels[number])
        assert row["label"] == whole.images.labels[number] and row["image_id"] == number
        assert row["init_id"] == whole.images.init_id[number]
    first = datasets.load_dataset(str(folder), split="train", streaming=True)
    assert "image" in next(iter(first))  # the default configuration


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("codec", ["fp16", "uint8", "top-k", "params"])
def test_load_dataset_reads_labels(whole, tmp_path, streaming, codec):
    labels = relabel(whole.images, make_teacher(), codec=codec, top_k=2, **SMALL)
    folder = replace(whole, labels=labels).write(tmp_path / "set")
    found = datasets.load_dataset(str(folder), "labels", split="train", streaming=streaming)
    rows = list(found)
    assert [row["image_id"] for row in rows[:4]] == next(labels.batches(0))[0].image.tolist()
    assert [row["crop"] for row in rows[:4]] == next(labels.batches(0))[0].crop.tolist()
    assert len(rows) == 27
    if codec == "fp16":
        logits = torch.tensor([row["logits"] for row in rows[:4]])
        assert torch.equal(logits, next(labels.batches(0))[1])


def test_every_prefix_of_the_rows_is_a_balanced_smaller_set(whole, folder):
    """Check (i): MDC's property, on disk."""
    rows = list(datasets.load_dataset(str(folder), "images", split="train", streaming=True))
    for ipc in (1, 2, 3):
        kept = rows[: ipc * 3]
        assert sorted((row["ipc_rank"], row["label"]) for row in kept) == [
            (rank, label) for rank in range(ipc) for label in range(3)
        ]
        smaller = whole.prefix(ipc)
        assert np.array_equal(smaller.images.pixels, whole.images.pixels[: ipc * 3])
    with pytest.raises(ValueError, match="between 1 and 3"):
        whole.prefix(4)


def test_a_prefix_keeps_labels_only_where_they_stay_true(whole, tmp_path):
    assert whole.prefix(3) is whole and whole.prefix(2).labels is None
    images = whole.images
    plain_labels = relabel(images, make_teacher(), mix="none", **SMALL)
    kept = replace(whole, labels=plain_labels).prefix(2)
    assert kept.labels is not None and kept.provenance["prefix_of_ipc"] == 3
    opened = DistilledSet.open(kept.write(tmp_path / "kept"))
    for views, logits in opened.labels.batches(1):
        torch.testing.assert_close(
            logits, direct(images, make_teacher(), views), rtol=1e-3, atol=1e-4
        )


def test_the_same_set_is_left_alone_and_another_is_refused(whole, folder):
    stamp = (folder / "manifest.json").stat().st_mtime_ns
    whole.write(folder)
    assert (folder / "manifest.json").stat().st_mtime_ns == stamp
    other = replace(whole, labels=None)
    with pytest.raises(FingerprintError, match="labels"):
        other.write(folder)
    other.write(folder, overwrite=True)
    assert DistilledSet.open(folder).labels is None and not (folder / "labels").exists()


def test_an_opened_set_can_replace_itself(folder):
    opened = DistilledSet.open(folder)
    replace(opened, provenance={"method": "other"}).write(folder, overwrite=True)
    again = DistilledSet.open(folder)
    assert again.provenance == {"method": "other"} and len(list(again.labels.batches(0))) == 3


def test_killed_while_writing_is_no_set_and_goes_on(whole, tmp_path, monkeypatch):
    expected = whole.write(tmp_path / "whole")

    def dies(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "card", dies)
        with pytest.raises(KeyboardInterrupt):
            whole.write(tmp_path / "cut")
    with pytest.raises(ShardError, match="not written to its end"):
        DistilledSet.open(tmp_path / "cut")
    whole.write(tmp_path / "cut")
    names = [
        "README.md",
        *(f"{kind}/train-00000-of-00001.parquet" for kind in ("images", "labels")),
    ]
    for name in names:
        assert (tmp_path / "cut" / name).read_bytes() == (expected / name).read_bytes()


def test_views_only_on_disk_and_their_teacher(whole, tmp_path):
    labels = relabel(whole.images, make_teacher(), codec="params", **SMALL)
    opened = DistilledSet.open(replace(whole, labels=labels).write(tmp_path / "set"))
    with_teacher = attach(opened.labels, opened.images, make_teacher(), device="cpu")
    ready = replace(opened, labels=with_teacher)
    for one, other in zip(ready.torch_dataset(), whole.torch_dataset(), strict=True):
        torch.testing.assert_close(one.logits, other.logits, rtol=1e-3, atol=1e-4)


def test_several_files_of_images(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_ROWS_PER_FILE", 4)
    folder = whole.write(tmp_path / "set")
    assert len(list((folder / "images").iterdir())) == 3
    assert equal(DistilledSet.open(folder).images, whole.images)
    rows = datasets.load_dataset(str(folder), "images", split="train", streaming=True)
    assert [row["image_id"] for row in rows] == list(range(9))
    (folder / "images" / "train-00001-of-00003.parquet").unlink()
    with pytest.raises(ShardError, match=r"not complete.*train-00001-of-00003"):
        DistilledSet.open(folder)


def test_class_names_are_data_in_the_card(tmp_path):
    names = ('"; - x: 1\n---\n# evil', "<script>alert(1)</script>", "[a](http://b) | `c` *d*")
    images = distilled_images(1, names=names)
    folder = DistilledSet(images, None, {"</pre><b>": "---"}).write(tmp_path / "set")
    text = (folder / "README.md").read_text()
    assert "<script" not in text and "</pre><b>" not in text and "[a](" not in text
    assert text.count("\n---\n") == 1 and "# evil" not in text
    found = datasets.load_dataset(str(folder), "images", split="train")
    assert found.features["label"].names == list(names)
    assert DistilledSet.open(folder).images.class_names == names
    assert plain("a\u2028b\x00c") == "a b c"


def test_the_card_says_what_labels_take(whole, folder):
    text, found = (folder / "README.md").read_text(), sizes(folder)
    assert (
        f"{found['labels']:,} bytes, {found['labels'] / found['images']:.2f} x the images" in text
    )
    assert f"{found['images']:,} bytes" in text and "sre2l" in text


def test_provenance_that_json_cannot_hold(whole):
    for bad in ({"a": float("nan")}, {"a": object()}):
        with pytest.raises(ValueError, match="what JSON cannot"):
            replace(whole, provenance=bad)


def rewritten(folder: Path, change) -> None:
    path = folder / "images" / "train-00000-of-00001.parquet"
    pq.write_table(change(pq.read_table(path)), path)


def cells(table: pa.Table, name: str, row: int, value: object) -> pa.Table:
    values = table.column(name).to_pylist()
    values[row] = value
    field = table.schema.field(name)
    return table.set_column(table.schema.get_field_index(name), field, pa.array(values, field.type))


def bomb(side: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.slice(0, 8), "8 images, but 3 for each of 3 classes"),
        (lambda t: t.slice(0, 0), "0 images"),
        (lambda t: t.take(list(range(8, -1, -1))), "image_id must count"),
        (lambda t: cells(t, "label", 0, 1), "one of each"),
        (lambda t: cells(t, "ipc_rank", 0, 1), "one of each"),
        (lambda t: cells(t, "label", 0, None), "empty cells"),
        (lambda t: cells(t, "image", 2, {"bytes": b"\x80\x04pickle"}), "image 2 does not decode"),
        (lambda t: cells(t, "image", 2, {"bytes": None}), "image 2 does not decode"),
        (lambda t: cells(t, "image", 2, {"bytes": bomb(2000)}), "the limit is 64"),
        (lambda t: cells(t, "image", 2, {"bytes": bomb(4)}), r"must be \(8, 8\)"),
        (lambda t: t.drop_columns(["init_id"]), "damaged|no distilled set"),
        (lambda t: t.replace_schema_metadata(None), "no distilled set"),
        (lambda t: cells(t, "image", 2, {"bytes": bomb(8)}), "other images"),
    ],
)
def test_folders_that_are_wrong(folder, change, message):
    rewritten(folder, change)
    with pytest.raises(ShardError, match=message):
        DistilledSet.open(folder)


def test_folders_that_are_no_sets(folder, tmp_path):
    for path in (tmp_path / "nothing", tmp_path):
        with pytest.raises(ShardError, match="is this a distilled set"):
            DistilledSet.open(path)
    (folder / "images" / "train-00000-of-00001.parquet").write_bytes(b"\x80\x04pickle")
    with pytest.raises(ShardError, match="damaged"):
        DistilledSet.open(folder)


def test_a_set_from_the_hub_has_no_manifest(whole, folder):
    (folder / "manifest.json").unlink()
    assert equal(DistilledSet.open(folder).images, whole.images)


def test_labels_of_other_images_do_not_make_a_set(whole):
    with pytest.raises(ValueError, match="other images"):
        replace(whole, images=distilled_images(seed=4))


def test_neither_pickle_nor_datasets_is_needed(folder):
    """No file of a set is a pickle, and reading needs no more than pyarrow and Pillow."""
    for path in folder.rglob("*"):
        assert path.is_dir() or path.suffix in (".parquet", ".md", ".json")
    held = {name: sys.modules[name] for name in list(sys.modules) if name.startswith("datasets")}
    sys.modules["datasets"] = None  # type: ignore[assignment]
    try:
        with warnings.catch_warnings():
            assert DistilledSet.open(folder).images.size == SIZE
    finally:
        sys.modules.update(held)
