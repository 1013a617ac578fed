"""ReLabel's maps and static soft labels."""

from __future__ import annotations

from dataclasses import replace

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torchvision.ops import roi_align

from curate.errors import FingerprintError, ShardError
from distill import label_maps as module
from distill.dense import dense_logits, region_weights
from distill.distilled import DistilledSet
from distill.label_maps import LabelMaps, store_label_maps
from distill.networks import build
from distill.replay import Source
from distill.static_labels import static_labels, with_static_labels
from distill.student_batches import MappedBatches, StaticBatches
from distill.students import StudentConfig, student_loss
from distill.teacher import Teacher
from distill.view_draw import ViewDraw
from tests.distill.recover_toy import toy_images, toy_teacher
from tests.distill.test_relabel import distilled_images, make_teacher

CPU = torch.device("cpu")
SIZE, CLASSES = 32, 3


@pytest.fixture(scope="module")
def images():
    return toy_images(n=9, classes=CLASSES, size=SIZE)


def network(images, seed=0, name="resnet18"):
    model = build(name, classes=CLASSES, size=SIZE, seed=seed)
    # Random running statistics, so that normalisation is not the identity.
    generator = torch.Generator().manual_seed(seed)
    for module_ in model.modules():
        if isinstance(module_, torch.nn.BatchNorm2d):
            module_.running_mean.normal_(0, 0.1, generator=generator)
            module_.running_var.uniform_(0.5, 1.5, generator=generator)
    mean, std = images.moments()
    return Teacher(model, name, SIZE, images.class_names, mean, std, 0.5, 1)


@pytest.fixture(scope="module")
def teacher(images):
    return network(images)


def seen(teacher, images):
    return teacher.normalise(images.batch(slice(None)))


def test_the_mean_of_the_cells_is_the_networks_answer(images, teacher):
    x = seen(teacher, images)
    maps = dense_logits(teacher, x)
    assert maps.shape == (9, CLASSES, 4, 4)
    with torch.no_grad():
        assert torch.allclose(maps.mean((2, 3)), teacher.model(x), atol=1e-4)
    assert maps.std(dim=(2, 3)).min() > 1e-3  # cells differ


def test_a_map_of_the_published_size(images, teacher):
    maps = dense_logits(teacher, seen(teacher, images)[:2], 15)
    assert maps.shape == (2, CLASSES, 15, 15)
    large = torch.nn.functional.interpolate(
        seen(teacher, images)[:2], (120, 120), mode="bilinear", align_corners=False
    )
    with torch.no_grad():
        assert torch.allclose(maps.mean((2, 3)), teacher.model(large), atol=1e-4)


@pytest.mark.parametrize(("height", "width"), [(4, 4), (16, 16), (8, 2), (1, 1)])
def test_regions_are_torchvisions_roi_align(height, width):
    generator = torch.Generator().manual_seed(0)
    draw = ViewDraw(epochs=1, batch_size=200, mix="none")
    crop = draw.views(torch.arange(200), 0, 0, source=32, size=32).crop
    maps = torch.randn(200, 2, height, width, dtype=torch.float64, generator=generator)
    top, left, h, w = crop.double().T
    scale = torch.tensor([width / 32, height / 32, width / 32, height / 32])
    boxes = torch.stack([left, top, left + w, top + h], dim=1) * scale
    wanted = roi_align(maps, list(boxes[:, None]), (1, 1), aligned=True)[:, :, 0, 0]
    got = torch.einsum("bchw,bhw->bc", maps, region_weights(crop, 32, height, width).double())
    assert torch.allclose(got, wanted, atol=1e-6)
    assert got.std() > 0.1


def test_the_whole_image_is_the_mean_of_its_cells_and_borders_cut():
    whole = torch.tensor([[0, 0, 32, 32], [-4, -4, 32, 32], [0, 0, 28, 28], [5, 9, 1, 1]])
    got = region_weights(whole, 32, 4, 4)
    assert torch.allclose(got[0], torch.full((4, 4), 1 / 16))
    assert torch.equal(got[1], got[2])
    assert torch.allclose(got.sum((1, 2)), torch.ones(4))


@pytest.mark.parametrize("top_k", [CLASSES, 2])
def test_labels_of_crops_are_the_roi_align_of_the_kept_entries(images, teacher, tmp_path, top_k):
    maps = store_label_maps(images, teacher, tmp_path, top_k=top_k, device="cpu")
    dense = dense_logits(teacher, seen(teacher, images)).double()
    order = dense.argsort(dim=1, descending=True)
    kept = torch.zeros_like(dense, dtype=torch.bool).scatter(1, order[:, :top_k], True)
    if top_k < CLASSES:
        rest = (dense * ~kept).sum(1, keepdim=True) / (CLASSES - top_k)
        dense = torch.where(kept, dense - rest, 0.0)
    draw = ViewDraw(epochs=1, batch_size=9, mix="none")
    crop = draw.views(torch.arange(9), 0, 0, source=SIZE, size=SIZE).crop
    top, left, h, w = crop.double().T / 8
    boxes = torch.stack([left, top, left + w, top + h], dim=1)
    wanted = roi_align(dense, list(boxes[:, None]), (1, 1), aligned=True)[:, :, 0, 0]
    got = maps.logits(torch.arange(9), crop)
    assert torch.allclose(got.double(), wanted, rtol=2e-3, atol=2e-3)
    again = LabelMaps.open(tmp_path).logits(torch.tensor([4, 2]), crop[[4, 2]])
    assert torch.equal(again, got[[4, 2]])


def test_what_is_left_out_is_as_likely_as_the_mean_of_the_others(images, teacher, tmp_path):
    """With one class kept of three, the softmax keeps the odds against the others' mean."""
    maps = store_label_maps(images, teacher, tmp_path, top_k=1, device="cpu")
    whole = torch.tensor([[0, 0, SIZE, SIZE]]).expand(9, 4)
    one_cell = replace(maps.header, height=1, width=1)
    index, value = maps.entries
    dense = dense_logits(teacher, seen(teacher, images))
    shifted = dense.max(1).values - (dense.sum(1) - dense.max(1).values) / 2
    assert np.allclose(value[:, 0], shifted, rtol=2e-3, atol=2e-3) and one_cell.entries == 1
    assert (value >= 0).all() and np.array_equal(index[:, 0], dense.argmax(1).numpy())
    assert torch.isfinite(maps.logits(torch.arange(9), whole)).all()


def test_the_files(images, teacher, tmp_path):
    maps = store_label_maps(images, teacher, tmp_path, top_k=2, device="cpu")
    table = pq.read_table(maps.parts[0])
    assert {f.name: str(f.type) for f in table.schema} == {
        "image_id": "int32",
        "top_idx": "fixed_size_list<element: uint8>[32]",
        "top_val": "fixed_size_list<element: halffloat>[32]",
    }
    assert table["image_id"].to_pylist() == list(range(9))
    loaded = datasets.load_dataset(
        "parquet", data_files=str(maps.parts[0]), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert len(loaded) == 9
    assert maps.nbytes == maps.parts[0].stat().st_size


class KilledError(Exception):
    pass


def test_stopped_and_continued_is_never_stopped(images, teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_PART_BYTES", 2 * 2 * 16 * 3 + 1)  # two images a file
    whole = store_label_maps(images, teacher, tmp_path / "whole", top_k=2, device="cpu")
    assert len(whole.parts) == 5
    write, written = module._write, []

    def dies(path, *rest):
        if len(written) == 3:
            raise KilledError
        written.append(path)
        write(path, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(module, "_write", dies)
        with pytest.raises(KilledError):
            store_label_maps(images, teacher, tmp_path / "cut", top_k=2, device="cpu")
    with pytest.raises(ShardError, match="not written to their end"):
        LabelMaps.open(tmp_path / "cut")
    monkeypatch.setattr(
        module, "_write", lambda path, *rest: written.append(path) or write(path, *rest)
    )
    cut = store_label_maps(images, teacher, tmp_path / "cut", top_k=2, device="cpu")
    assert len(written) == 5
    for one, other in zip(whole.parts, cut.parts, strict=True):
        assert one.read_bytes() == other.read_bytes()
    written.clear()
    store_label_maps(images, teacher, tmp_path / "cut", top_k=2, device="cpu")
    assert not written
    with pytest.raises(FingerprintError):
        store_label_maps(images, teacher, tmp_path / "cut", top_k=1, device="cpu")


def test_several_teachers_give_their_mean(images, teacher, tmp_path):
    other = network(images, seed=1)
    other = replace(other, mean=(0.5, 0.5, 0.5), std=(0.3, 0.3, 0.3))
    both = store_label_maps(images, [teacher, other], tmp_path, top_k=CLASSES, device="cpu")
    mean = sum(dense_logits(one, seen(one, images)) for one in (teacher, other)) / 2
    index, value = both.entries
    got = np.take_along_axis(mean.numpy(), index.astype(np.int64), axis=1)
    assert np.allclose(value, got, rtol=2e-3, atol=2e-3)


def test_batches_of_new_crops_in_every_epoch(images, teacher, tmp_path):
    maps = store_label_maps(images, teacher, tmp_path, top_k=CLASSES, device="cpu")
    for mix in ("none", "cutmix"):
        draw = ViewDraw(epochs=2, batch_size=5, mix=mix, seed=1)
        batches = MappedBatches(images, maps, draw, CPU)
        for epoch in (0, 1):
            order = draw.order(9, epoch)
            for number, batch in enumerate(batches.epoch(epoch)):
                image = torch.split(order, 5)[number]
                views = draw.views(image, epoch, number, source=SIZE, size=SIZE)
                p = maps.logits(image, views.crop).softmax(1)
                p = views.mix_weight * p + (1 - views.mix_weight) * p[views.partner]
                assert torch.allclose(batch.logits.softmax(1), p, atol=1e-6)
                loss = student_loss(batch.logits, batch, "soft", StudentConfig(epochs=1))
                assert abs(loss.item()) < 1e-6
    with pytest.raises(ValueError, match="made for 9 other images"):
        MappedBatches(images.subset(np.arange(9)[::-1]), maps, draw, CPU)


def test_what_cannot_be_labelled_is_refused(images, teacher, tmp_path):
    with pytest.raises(ValueError, match="no teachers"):
        store_label_maps(images, [], tmp_path)
    with pytest.raises(ValueError, match="top_k is 4; it must be between 1 and 3"):
        store_label_maps(images, teacher, tmp_path, top_k=4)
    with pytest.raises(ValueError, match="'convnet3' has no map of features"):
        store_label_maps(toy_images(), toy_teacher(), tmp_path, top_k=1)
    turned = replace(teacher, class_names=("c1", "c0", "c2"))
    with pytest.raises(ValueError, match="in the same order"):
        store_label_maps(images, turned, tmp_path, top_k=1)
    assert not list(tmp_path.iterdir())


def test_damaged_and_foreign_files(images, teacher, tmp_path):
    maps = store_label_maps(images, teacher, tmp_path, top_k=2, device="cpu")
    with pytest.raises(ShardError, match="holds no label maps"):
        LabelMaps.open(tmp_path / "nothing")
    data = bytearray(maps.parts[0].read_bytes())
    data[40] ^= 255
    maps.parts[0].write_bytes(bytes(data))
    with pytest.raises(ShardError):
        _ = LabelMaps.open(tmp_path).entries
    maps.parts[0].write_bytes(b"nothing")
    with pytest.raises(ShardError, match="holds no label maps of format"):
        LabelMaps.open(tmp_path)


def test_a_static_label_is_the_answer_to_the_whole_image():
    found, judge = distilled_images(), make_teacher()
    labelled = with_static_labels(found, judge, device="cpu")
    pixels = torch.from_numpy(found.pixels).permute(0, 3, 1, 2)
    with torch.no_grad():
        wanted = judge.model(
            (pixels.float() / 255 - torch.tensor(found.mean)[:, None, None])
            / torch.tensor(found.std)[:, None, None]
        ).log_softmax(1)
    assert labelled.soft_label.dtype == np.float16
    assert np.allclose(labelled.soft_label, wanted, rtol=2e-3, atol=2e-3)
    assert np.allclose(np.exp(labelled.soft_label.astype(np.float32)).sum(1), 1, atol=5e-3)
    assert np.array_equal(labelled.prefix(2).soft_label, labelled.soft_label[: 2 * CLASSES])
    real = toy_images()
    source = Source.real(real, toy_teacher().mean, toy_teacher().std)
    assert static_labels(source, toy_teacher(), device="cpu").shape == (48, 3)


def test_a_static_label_is_a_column(tmp_path):
    found, judge = distilled_images(), make_teacher()
    labelled = with_static_labels(found, judge, device="cpu")
    DistilledSet(labelled, None, {}).write(tmp_path / "with")
    DistilledSet(found, None, {}).write(tmp_path / "without")
    opened = DistilledSet.open(tmp_path / "with").images
    assert np.array_equal(opened.soft_label, labelled.soft_label)
    assert DistilledSet.open(tmp_path / "without").images.soft_label is None
    with pytest.raises(FingerprintError):
        DistilledSet(found, None, {}).write(tmp_path / "with")
    for streaming in (False, True):
        rows = datasets.load_dataset(
            str(tmp_path / "with"), "images", split="train", streaming=streaming,
            cache_dir=str(tmp_path / "cache"),
        )  # fmt: skip
        row = next(iter(rows))
        assert np.allclose(row["soft_label"], labelled.soft_label[0]) and row["label"] == 0


def test_a_static_label_does_for_every_view_and_is_mixed_as_the_pixels():
    found = with_static_labels(distilled_images(), make_teacher(), device="cpu")
    source = Source.distilled(found)
    draw = ViewDraw(epochs=1, batch_size=9, mix="mixup")
    (batch,) = StaticBatches(source, draw, CPU, found.soft_label).epoch(0)
    order = draw.order(9, 0)
    views = draw.views(order, 0, 0, source=source.size, size=source.size)
    p = np.exp(found.soft_label.astype(np.float32))
    p = p / p.sum(1, keepdims=True)
    mine, other = p[order], p[order[views.partner]]
    wanted = views.mix_weight * mine + (1 - views.mix_weight) * other
    assert np.allclose(batch.logits.softmax(1), wanted, atol=1e-5)
    with pytest.raises(ValueError, match="soft labels have shape"):
        StaticBatches(source, draw, CPU, found.soft_label[:4])


def test_static_labels_of_another_shape_are_refused():
    found = distilled_images()
    n = len(found)
    for wrong in (np.zeros((n, 2), np.float16), np.zeros((n, CLASSES), np.float32)):
        with pytest.raises(ValueError, match="it must be float16 of"):
            replace(found, soft_label=wrong)
    with pytest.raises(ValueError, match="must be finite"):
        replace(found, soft_label=np.full((n, CLASSES), np.nan, np.float16))
