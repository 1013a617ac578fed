from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from distill import baselines
from distill.baselines import (
    bytes_before_compression,
    coreset_subset,
    penultimate,
    random_subset,
    real_subset,
    same_labels,
)
from distill.image_set import ImageSet
from distill.relabel import relabel
from distill.soft_labels import SoftLabels
from distill.teacher import Teacher
from tests.distill.test_relabel import MEAN, STD, direct, distilled_images, make_teacher
from tests.references.herding_reference import herding

NAMES = ("cat", "dog", "owl")


def real(n: int = 40, *, size: int = 8, names=NAMES, seed: int = 0) -> ImageSet:
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(n) % len(names))
    images = rng.integers(0, 256, (n, size, size, 3)).astype(np.uint8)
    return ImageSet.of(images, labels, class_names=names, ids=[f"img{i}" for i in range(n)])


def labels_of(**options) -> SoftLabels:
    given = {"epochs": 3, "batch_size": 4, "device": "cpu", **options}
    return relabel(distilled_images(), make_teacher(), **given)


def rows_of(train: ImageSet, found) -> list[int]:
    return [train.ids.tolist().index(one) for one in found.init_id]


def test_real_images_stand_where_distilled_ones_did():
    train, like = real(), distilled_images(2)
    rows = np.concatenate([np.flatnonzero(train.labels == c)[[4, 1]] for c in (2, 0, 1)])
    found = real_subset(train, rows, like)
    assert (
        found.labels.tolist() == [0, 1, 2, 0, 1, 2] and found.ipc_rank.tolist() == [0] * 3 + [1] * 3
    )
    taken = rows_of(train, found)
    assert sorted(taken) == sorted(rows.tolist())
    assert taken[0] == np.flatnonzero(train.labels == 0)[4]  # the order of choice is kept
    assert np.array_equal(found.pixels, train.images[taken])
    assert np.array_equal(found.labels, train.labels[taken])
    assert (found.mean, found.std, set(found.init_kind)) == (MEAN, STD, {"real"})


def test_a_random_subset_is_a_function_of_the_seed_and_no_class_is_short():
    train, like = real(), distilled_images(3)
    draws = [random_subset(train, like, seed=seed).init_id.tolist() for seed in range(20)]
    assert draws[0] == random_subset(train, like, seed=0).init_id.tolist()
    assert all(len(set(draw)) == 9 for draw in draws)
    assert {one for draw in draws for one in draw} == set(
        train.ids.tolist()
    )  # every image has its chance
    whole = real(9)
    assert set(random_subset(whole, like).init_id) == set(whole.ids)


def test_the_coreset_is_chosen_inside_each_class():
    train, like = real(), distilled_images(4)
    x = np.random.default_rng(1).normal(size=(40, 5)).astype(np.float32)
    found = rows_of(train, coreset_subset(train, x, like, method="herding"))
    for c in range(3):
        mine = np.flatnonzero(train.labels == c)
        expected, _ = herding(x[mine], 4)
        assert found[c::3] == mine[expected].tolist()


@pytest.mark.parametrize("method", baselines.CORESET_METHODS)
def test_default_methods_fit_and_do_not_touch_the_global_stream(method):
    train, like = real(), distilled_images(4)
    x = np.random.default_rng(1).normal(size=(40, 5)).astype(np.float32)
    before = torch.random.get_rng_state().tolist()
    one = coreset_subset(train, x, like, method=method, seed=2)
    assert torch.random.get_rng_state().tolist() == before
    assert (
        one.init_id.tolist()
        == coreset_subset(train, x, like, method=method, seed=2).init_id.tolist()
    )
    assert np.bincount(one.labels).tolist() == [4, 4, 4]


def test_penultimate_features_give_the_logits():
    teacher, images = make_teacher(), real()
    x = penultimate(teacher, images, device="cpu", batch_size=16)
    head = teacher.model.head
    logits = x @ head.weight.numpy().T + head.bias.numpy()
    expected = teacher.model(teacher.normalise(images.batch(slice(None))))
    assert x.shape == (40, 128) and x.dtype == np.float32
    np.testing.assert_allclose(logits, expected.numpy(), rtol=1e-4, atol=1e-4)
    assert not head._forward_pre_hooks


def test_a_teacher_without_a_linear_head_gives_its_logits():
    model = nn.Sequential(nn.Conv2d(3, 3, 8), nn.Flatten())
    teacher = Teacher(model, "none", 8, NAMES, MEAN, STD, 0.5, 1)
    images = real()
    expected = model(teacher.normalise(images.batch(slice(None))))
    np.testing.assert_allclose(penultimate(teacher, images, device="cpu"), expected, rtol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"codec": "fp16"},
        {"codec": "uint8"},
        {"codec": "top-k", "top_k": 2},
        {"codec": "params"},
        {"codec": "fp16", "mix": "mixup", "crop": "padded"},
        {"codec": "fp16", "mix": "none", "batch_size": 9},
    ],
)
def test_same_labels_are_the_same_views_and_bytes_of_other_images(options):
    labels, teacher = labels_of(**options), make_teacher()
    images = random_subset(real(), distilled_images())
    found = same_labels(labels, images, teacher, device="cpu")
    assert bytes_before_compression(found) == bytes_before_compression(labels)
    assert (found.codec, found.stored_epochs) == (labels.codec, 3)
    assert abs(found.nbytes - labels.nbytes) < 0.1 * labels.nbytes
    for epoch in range(3):
        pairs = zip(found.batches(epoch), labels.batches(epoch), strict=True)
        for (views, logits), (recorded, old) in pairs:
            for name in ("image", "crop", "flip", "partner"):
                assert torch.equal(getattr(views, name), getattr(recorded, name))
            assert (views.mix_kind, views.mix_box) == (recorded.mix_kind, recorded.mix_box)
            assert views.mix_weight == recorded.mix_weight
            truth = direct(images, teacher, views)
            if options["codec"] in ("fp16", "params"):
                torch.testing.assert_close(logits, truth, rtol=2e-3, atol=5e-3)
            assert torch.equal(logits.argmax(1), truth.argmax(1))
            assert not torch.equal(logits, old)


def test_a_budget_that_leaves_fewer_epochs_leaves_as_few_for_the_real_images():
    whole = labels_of(codec="fp16", epochs=12)
    labels = labels_of(codec="fp16", epochs=12, label_bytes=whole.nbytes - 200)
    assert labels.stored_epochs < 12
    images = random_subset(real(), distilled_images())
    found = same_labels(labels, images, make_teacher(), device="cpu")
    assert found.stored_epochs == labels.stored_epochs
    assert bytes_before_compression(found) == bytes_before_compression(labels)


def test_labels_of_other_bytes_are_noticed(monkeypatch):
    images, labels = random_subset(real(), distilled_images()), labels_of()
    run = baselines.LabelWriter.run
    monkeypatch.setattr(
        baselines.LabelWriter, "run", lambda self, *given: run(self, *given).truncated(2)
    )
    with pytest.raises(RuntimeError, match="other bytes"):
        same_labels(labels, images, make_teacher(), device="cpu")


def test_plain_labels_are_of_whole_images_in_the_same_order_and_bytes():
    labels, teacher = labels_of(codec="fp16"), make_teacher()
    images = random_subset(real(), distilled_images())
    plain = same_labels(labels, images, teacher, plain=True, device="cpu")
    assert bytes_before_compression(plain) == bytes_before_compression(labels)
    x = teacher.model(teacher.normalise(torch.from_numpy(images.pixels).permute(0, 3, 1, 2)))
    for epoch in range(3):
        pairs = zip(plain.batches(epoch), labels.batches(epoch), strict=True)
        for (views, logits), (recorded, _) in pairs:
            assert torch.equal(views.image, recorded.image) and views.mix_kind == "none"
            torch.testing.assert_close(logits, x[views.image], rtol=2e-3, atol=5e-3)


def test_other_teachers_and_other_numbers_of_images_are_refused():
    images, labels = random_subset(real(), distilled_images()), labels_of()
    with pytest.raises(ValueError, match="not the teachers"):
        same_labels(labels, images, make_teacher(seed=1), device="cpu")
    with pytest.raises(ValueError, match="recorded views need 9"):
        same_labels(labels, images.prefix(2), make_teacher(), device="cpu")


def test_real_images_that_do_not_fit_are_refused():
    like = distilled_images(3)
    with pytest.raises(ValueError, match="in the same order"):
        random_subset(real(names=("dog", "cat", "owl")), like)
    with pytest.raises(ValueError, match="16 pixels"):
        random_subset(real(size=16), like)
    with pytest.raises(ValueError, match="fewer than the 3"):
        random_subset(real(8), like)
    train = real()
    rows = np.flatnonzero(train.labels == 0)[:9]
    with pytest.raises(ValueError, match="it must have 3"):
        real_subset(train, rows, like)
    with pytest.raises(ValueError, match="not known"):
        coreset_subset(train, np.zeros((40, 2), np.float32), like, method="best")


def test_labels_in_another_normalisation_keep_the_students_own():
    """The views are made in the distilled set's normalisation, whatever the teacher's."""
    teacher = make_teacher(mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2))
    labels = relabel(distilled_images(), teacher, epochs=1, batch_size=4, device="cpu")
    images = random_subset(real(), distilled_images())
    found = same_labels(labels, images, teacher, device="cpu")
    assert (found.header.mean, found.header.std) == (MEAN, STD)
    assert replace(found.header, source="") == replace(labels.header, source="")
