import io
import pickle
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.utils.data import DataLoader

from curate.errors import ShardError
from distill.codecs import Codec
from distill.relabel import relabel
from distill.replay import ReplayedBatches, Source
from distill.soft_labels import SoftLabels
from distill.views import mixed_targets
from tests.distill.test_relabel import SIZE, SMALL, distilled_images, make_teacher


@pytest.fixture(scope="module")
def images():
    return distilled_images()


@pytest.fixture(scope="module")
def labels(images):
    return relabel(images, make_teacher(), **SMALL)


def table_of(labels: SoftLabels, part: int = 0) -> pa.Table:
    return pq.read_table(io.BytesIO(labels.parts[part]))


def test_the_columns_are_those_of_the_layout(labels):
    """Section 4 of the notes, but that crops are signed: padded ones begin outside."""
    table = table_of(labels)
    assert {name: str(table.schema.field(name).type) for name in table.column_names} == {
        "epoch": "int16",
        "batch": "int32",
        "image_id": "int32",
        "crop": "fixed_size_list<element: int16>[4]",
        "flip": "bool",
        "mix_kind": "int8",
        "mix_id": "int32",
        "mix_box": "fixed_size_list<element: int16>[4]",
        "mix_lam": "float",
        "logits": "fixed_size_list<element: halffloat>[3]",
    }
    assert table.num_rows == 27
    assert table.column("epoch").to_pylist() == [0] * 9 + [1] * 9 + [2] * 9
    assert table.column("batch").to_pylist() == [0, 0, 0, 0, 1, 1, 1, 1, 2] * 3


@pytest.mark.parametrize(
    ("codec", "columns"),
    [("uint8", {"logits_u8", "scale", "zero"}), ("top-k", {"top_idx", "top_val", "top_rest"})],
)
def test_the_columns_of_other_codecs(images, codec, columns):
    found = relabel(images, make_teacher(), codec=codec, top_k=2, **SMALL)
    assert columns < set(table_of(found).column_names)


def test_written_and_opened_replays_the_same(labels, tmp_path):
    opened = SoftLabels.open(labels.write(tmp_path))
    assert opened.header == labels.header and opened.nbytes == labels.nbytes
    assert opened.nbytes == sum(path.stat().st_size for path in tmp_path.iterdir())
    assert opened.epochs == opened.stored_epochs == 3
    for epoch in range(3):
        pairs = zip(labels.batches(epoch), opened.batches(epoch), strict=True)
        for (views, logits), (other, again) in pairs:
            for name in ("image", "crop", "flip", "partner"):
                assert torch.equal(getattr(views, name), getattr(other, name))
                assert getattr(views, name).dtype == getattr(other, name).dtype
            assert (views.mix_box, views.mix_weight) == (other.mix_box, other.mix_weight)
            assert torch.equal(logits, again)


def test_replay_depends_on_no_seed_no_order_of_calls_and_no_batch_size(images, labels):
    """SRe2L: replay is right only with seed 42, the same sampler and the same batch size."""
    source = Source.distilled(images)
    whole = list(ReplayedBatches(source, labels).epoch(1))
    torch.manual_seed(99)
    list(labels.batches(2))
    for size in (1, 2, 3, 4, 5, 9, 50):
        other = list(ReplayedBatches(source, labels, batch_size=size).epoch(1))
        assert [len(one.x) for one in other[:-1]] == [size] * (len(other) - 1)
        assert len(other) == -(-9 // size)
        for expected, found in zip(zip(*whole, strict=True), zip(*other, strict=True), strict=True):
            assert torch.equal(torch.cat(expected), torch.cat(found))


def test_hard_targets_are_mixed_as_the_pixels(images, labels):
    for batch, (views, logits) in zip(
        ReplayedBatches(Source.distilled(images), labels).epoch(0), labels.batches(0), strict=True
    ):
        expected = mixed_targets(torch.from_numpy(images.labels), views, 3)
        assert torch.equal(batch.targets, expected) and torch.equal(batch.logits, logits)
        assert batch.x.shape[1:] == (3, SIZE, SIZE) and batch.x.dtype == torch.float32


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("batch_size", [None, 2])
@pytest.mark.parametrize("workers", [0, 1, 2, 3])
def test_workers_share_the_batches(images, labels, workers, batch_size):
    """A sharded IterableDataset repeats everything in every worker if nobody cares."""
    dataset = ReplayedBatches(
        Source.distilled(images), labels, epochs=[0, 2, 1, 0], batch_size=batch_size
    )
    loader = DataLoader(dataset, batch_size=None, num_workers=workers)
    found, expected = list(loader), list(dataset)
    assert len(found) == len(dataset) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.x, other.x) and torch.equal(one.logits, other.logits)


def test_a_pickled_copy_replays_the_same(labels):
    list(labels.batches(0))
    again = pickle.loads(pickle.dumps(labels))
    assert len(pickle.dumps(labels)) < labels.nbytes + 5000  # no decoded copy goes along
    for (_, one), (_, other) in zip(labels.batches(2), again.batches(2), strict=True):
        assert torch.equal(one, other)


def test_fewer_epochs_are_the_first_ones(labels):
    for epochs in (1, 2, 3):
        cut = labels.truncated(epochs)
        assert cut.stored_epochs == epochs and cut.epochs == 3
        for (views, logits), (other, again) in zip(cut.batches(0), labels.batches(0), strict=True):
            assert torch.equal(views.crop, other.crop) and torch.equal(logits, again)


def test_labels_of_the_first_images(images):
    plain = relabel(images, make_teacher(), mix="none", **SMALL)
    kept = plain.prefix(6, source="smaller")
    assert kept is not None and kept.stored_epochs == 3 and kept.header.images == 6
    for epoch in range(3):
        before = [(v.image, v.crop, z) for v, z in plain.batches(epoch)]
        image, crop, logits = (torch.cat(column) for column in zip(*before, strict=True))
        mine = image < 6
        after = [(v.image, v.crop, z) for v, z in kept.batches(epoch)]
        assert [len(one[0]) for one in after] == [4, 2]
        found = [torch.cat(column) for column in zip(*after, strict=True)]
        for one, other in zip((image, crop, logits), found, strict=True):
            assert torch.equal(one[mine], other)
    assert plain.prefix(9, source="") is plain
    mixed = relabel(images, make_teacher(), mix="mixup", **SMALL)
    assert mixed.prefix(6, source="") is None


def test_batches_that_are_not_there(labels):
    for epoch, number in ((-1, 0), (0, 3), (0, -1)):
        with pytest.raises(ValueError, match="epochs begin at 0 and have 3 batches"):
            labels.batch(epoch, number)


def changed(labels: SoftLabels, name: str, change) -> SoftLabels:
    table = table_of(labels)
    values = table.column(name).combine_chunks()
    place = table.schema.get_field_index(name)
    table = table.set_column(place, table.schema.field(name), change(values))
    return written(labels, table)


def written(labels: SoftLabels, table: pa.Table) -> SoftLabels:
    sink = io.BytesIO()
    pq.write_table(table, sink)
    return SoftLabels(labels.header, (sink.getvalue(),))


def reversed_rows(values: pa.Array) -> pa.Array:
    return values.take(pa.array(np.arange(len(values))[::-1]))


def with_first(value):
    def change(values: pa.Array) -> pa.Array:
        return pa.array([value, *values.to_pylist()[1:]], values.type)

    return change


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("epoch", reversed_rows, "not in the order of the epochs"),
        ("batch", reversed_rows, "not in the order of the batches"),
        ("image_id", with_first(9), "outside of 0 to 8"),
        ("mix_id", with_first(-1), "outside of 0 to 8"),
        ("mix_kind", with_first(2), "another way than cutmix"),
        ("mix_box", with_first([0, 0, 9, 1]), "outside of its view"),
        ("mix_lam", with_first(1.5), r"not in \[0, 1\]"),
        ("crop", with_first([0, 0, 0, 3]), "no height or width"),
        ("crop", with_first(None), "holes"),
        ("logits", with_first([1.0, float("nan"), 0.0]), "not finite"),
        ("mix_lam", with_first(0.123), "different boxes or weights"),
    ],
)
def test_files_that_contradict_themselves(labels, name, change, message):
    with pytest.raises(ShardError, match=message):
        list(changed(labels, name, change).batches(0))


def test_an_image_twice_in_a_batch_or_a_partner_from_elsewhere(labels):
    ids = table_of(labels).column("image_id").to_pylist()
    for name, value in (("image_id", ids[1]), ("mix_id", ids[5])):
        with pytest.raises(ShardError, match="an image twice, or lacks the partner"):
            list(changed(labels, name, with_first(value)).batches(0))


def test_files_that_are_damaged_or_of_others(images, labels, tmp_path, monkeypatch):
    paths = labels.write(tmp_path)
    good = paths[0].read_bytes()
    with pytest.raises(ShardError, match="no files of soft labels"):
        SoftLabels.open([])
    with pytest.raises(ShardError, match="missing or damaged"):
        SoftLabels.open([tmp_path / "missing.parquet"])
    for bad in (b"", b"\x80\x04pickle", good[:-200]):
        paths[0].write_bytes(bad)
        with pytest.raises(ShardError, match="missing or damaged"):
            SoftLabels.open(paths)
    caught = 0
    for place in range(10, len(good), 29):  # pages have checksums: seen, or of no consequence
        flipped = bytes([good[place] ^ 1])
        paths[0].write_bytes(good[:place] + flipped + good[place + 1 :])
        try:
            again = torch.cat([logits for _, logits in SoftLabels.open(paths).batches(0)])
        except ShardError:
            caught += 1
        else:
            assert torch.equal(again, torch.cat([logits for _, logits in labels.batches(0)]))
    assert caught > 40
    pq.write_table(pa.table({"a": [1]}), paths[0])
    with pytest.raises(ShardError, match="holds no soft labels of format"):
        SoftLabels.open(paths)
    monkeypatch.setattr("distill.label_parts._MAX_ROWS", 8)
    several = relabel(images, make_teacher(), **SMALL)
    paths = several.write(tmp_path)
    assert len(paths) == 5 and SoftLabels.open(paths).stored_epochs == 3
    with pytest.raises(ShardError, match="does not hold what its header says"):
        list(SoftLabels.open([paths[1], paths[0], *paths[2:]]).batches(0))
    with pytest.raises(ShardError, match="no whole number of epochs"):
        SoftLabels.open(paths[:-1])
    other = relabel(images, make_teacher(), seed=1, **SMALL).write(tmp_path / "other")
    with pytest.raises(ShardError, match="belongs to other labels"):
        SoftLabels.open([*paths[:-1], *other])


@pytest.mark.parametrize(
    "wrong", [{"codec": "pickle"}, {"batch_size": 0}, {"classes": -1}, {"k": 2}, {"mix": "x"}]
)
def test_headers_that_make_no_sense(labels, wrong, tmp_path):
    header = replace(labels.header, **wrong)
    table = table_of(labels).replace_schema_metadata(header.metadata())
    pq.write_table(table, tmp_path / "train-00000-of-00001.parquet")
    with pytest.raises(ShardError, match="holds no soft labels of format"):
        SoftLabels.open([tmp_path / "train-00000-of-00001.parquet"])


def test_a_view_takes_the_bytes_that_the_codec_says():
    """About 13 bytes for the parameters, and the label's own (section 4 of the notes)."""
    names = tuple(str(number) for number in range(100))
    images = distilled_images(5, names=names)
    teacher = make_teacher(names=names)
    options = {"epochs": 4, "batch_size": 100, "device": "cpu"}
    sizes = {}
    for codec, k in (("params", 0), ("fp16", 0), ("uint8", 0), ("top-k", 10)):
        labels = relabel(images, teacher, codec=codec, top_k=10, **options)
        rows = (labels.nbytes - labels.truncated(1).nbytes) / 1500
        sizes[codec] = rows - sizes.get("params", 0)
        assert sizes[codec] <= Codec(codec, 100, k).bytes_per_view + 14
    assert sizes["params"] < 14
