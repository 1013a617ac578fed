"""RandAugment of views: what is recorded is enough to do the same again."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import RandAugment as Published
from torchvision.transforms.autoaugment import _apply_op

from curate.errors import ShardError
from distill.baselines import same_labels
from distill.distilled import DistilledSet
from distill.randaugment import OPERATIONS, RandAugment
from distill.relabel import attach, relabel
from distill.replay import ReplayedBatches, Source, Viewer
from distill.student_batches import DrawnBatches, HardBatches
from distill.teacher import normalise
from distill.view_draw import ViewDraw
from distill.views import plain_views, show
from tests.distill.test_relabel import distilled_images, make_teacher

CPU = torch.device("cpu")
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
OPTIONS = {"epochs": 2, "batch_size": 4, "seed": 5, "device": "cpu"}


@pytest.fixture
def pixels():
    """Smooth pictures, so that a shift by a rounding error is no other pixel."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(6, 3, 4, 4, generator=generator) * 255
    fine = torch.nn.functional.interpolate(coarse, (32, 32), mode="bicubic")
    return fine.clamp(0, 255).to(torch.uint8)


@pytest.mark.parametrize("m", [9, 18])
@pytest.mark.parametrize("place", range(14))
def test_operations_are_torchvisions_on_pillow_images(pixels, place, m):
    space = Published()._augmentation_space(31, (32, 32))
    name, (magnitudes, signed) = list(space.items())[place]
    size = float(magnitudes[m]) if magnitudes.ndim else 0.0
    ours = list(OPERATIONS.values())[place]
    assert list(OPERATIONS)[place].replace("-", "") == name.lower()
    for sign in (1, -1):
        got = ours(pixels.clone(), sign * m / 30)
        value = sign * size if signed else size
        for image, one in zip(pixels, got, strict=True):
            picture = Image.fromarray(image.permute(1, 2, 0).numpy())
            wanted = _apply_op(picture, name, value, InterpolationMode.NEAREST, None)
            wanted = torch.from_numpy(np.array(wanted)).permute(2, 0, 1)
            near = (one.int() - wanted.int()).abs() <= 2
            assert near.float().mean() > 0.93, name
        if name != "Identity":
            assert (got != pixels).float().mean() > 0.05


def test_every_operation_is_drawn_as_often_and_either_way():
    operation, sign = RandAugment(count=3).drawn(torch.arange(14_000))
    for place in range(3):
        counts = np.bincount(operation[:, place], minlength=14)
        assert abs(counts - 1000).max() < 150  # five standard deviations
        assert abs(sign[:, place].mean() - 0.5) < 0.03
    assert (operation[:, 0] == operation[:, 1]).mean() < 0.1
    both = np.bincount(operation[:, 0] * 2 + sign[:, 0], minlength=28)
    assert abs(both - 500).max() < 120


def test_a_view_depends_on_its_own_number_alone(pixels):
    augment = RandAugment(count=2, magnitude=0.5)
    x, seed = normalise(pixels, MEAN, STD), torch.arange(6) * 1_000_003
    together = augment(x, seed, MEAN, STD)
    for row in (0, 3, 5):
        alone = augment(x[row : row + 1], seed[row : row + 1], MEAN, STD)
        assert torch.equal(alone[0], together[row])
    assert torch.equal(augment(x, seed, MEAN, STD), together)
    assert torch.equal(x, normalise(pixels, MEAN, STD))  # the input stays
    assert not torch.equal(augment(x, seed + 1, MEAN, STD), together)
    operation, _ = augment.drawn(torch.tensor([0, 2**62 - 1]))
    assert operation.min() >= 0 and operation.max() < 14


def test_pixels_are_whole_and_in_range(pixels):
    augment = RandAugment(count=3, magnitude=1.0)
    x = normalise(pixels, MEAN, STD)
    got = augment(x, torch.arange(6), MEAN, STD)
    levels = (got * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]) * 255
    assert (levels - levels.round()).abs().max() < 1e-2
    assert levels.min() > -0.01 and levels.max() < 255.01


@pytest.mark.parametrize("mix", ["none", "cutmix"])
def test_check_e_replay_gives_the_teachers_input(tmp_path, mix):
    images, teacher = distilled_images(), make_teacher()
    augment = RandAugment(count=2, magnitude=0.4)
    labels = relabel(images, teacher, **OPTIONS, mix=mix, randaugment=augment, codec="fp16")
    plain = relabel(images, teacher, **OPTIONS, mix=mix, codec="fp16")
    DistilledSet(images, labels, {}).write(tmp_path)
    opened = DistilledSet.open(tmp_path)
    assert opened.labels.header.randaugment == augment
    changed = 0
    for epoch in range(2):
        for batch, other in zip(
            opened.torch_dataset().epoch(epoch),
            ReplayedBatches(Source.distilled(images), plain).epoch(epoch),
            strict=True,
        ):
            with torch.no_grad():
                wanted = teacher.model(batch.x)
            torch.testing.assert_close(batch.logits, wanted, rtol=2e-3, atol=2e-3)
            changed += int((batch.x != other.x).any())
    assert changed >= 4
    views = opened.labels.batch(1, 0)[0]
    again = opened.labels.batch(1, 0)[0]
    assert views.augment_seed.dtype == torch.int64
    assert torch.equal(views.augment_seed, again.augment_seed)


def test_off_draws_the_same_views_as_before():
    draw = ViewDraw(epochs=1, batch_size=4, seed=2)
    on = replace(draw, randaugment=RandAugment())
    one, two = (d.views(torch.arange(4), 0, 0, source=8, size=8) for d in (draw, on))
    assert one.augment_seed is None and two.augment_seed is not None
    assert torch.equal(one.crop, two.crop) and one.mix_box == two.mix_box
    images, teacher = distilled_images(), make_teacher()
    labels = relabel(images, teacher, **OPTIONS, codec="fp16")
    assert "aug_seed" not in labels._part(0) and labels.header.randaugment is None


def test_labels_that_ask_the_teachers_again_and_those_of_real_images():
    images, teacher = distilled_images(), make_teacher()
    augment = RandAugment(count=2, magnitude=0.4)
    full = relabel(images, teacher, **OPTIONS, randaugment=augment, codec="fp16")
    asked = relabel(images, teacher, **OPTIONS, randaugment=augment, codec="params")
    asked = attach(replace(asked, recompute=None), images, teacher, device="cpu")
    torch.testing.assert_close(asked.batch(1, 1)[1], full.batch(1, 1)[1], rtol=2e-3, atol=2e-3)
    other = distilled_images(seed=1)
    same = same_labels(full, other, teacher, device="cpu")
    assert same.header.randaugment == augment
    (batch, *_) = ReplayedBatches(Source.distilled(other), same).epoch(0)
    with torch.no_grad():
        torch.testing.assert_close(batch.logits, teacher.model(batch.x), rtol=2e-3, atol=2e-3)
    plain = same_labels(full, other, teacher, plain=True, device="cpu")
    assert plain.header.randaugment is None and plain.batch(0, 0)[0].augment_seed is None


def test_students_with_hard_labels_see_augmented_views():
    images, teacher = distilled_images(), make_teacher()
    augment = RandAugment(count=2, magnitude=0.4)
    source = Source.distilled(images)
    draw = ViewDraw(epochs=1, batch_size=4, mix="none", randaugment=augment)
    (batch, *_) = DrawnBatches(source, draw, CPU).epoch(0)
    (other, *_) = DrawnBatches(source, replace(draw, randaugment=None), CPU).epoch(0)
    assert (batch.x != other.x).any() and torch.equal(batch.targets, other.targets)
    labels = relabel(images, teacher, **OPTIONS, randaugment=augment, codec="fp16")
    (hard, *_) = HardBatches(source, labels, batch_size=4, device=CPU).epoch(0)
    (soft, *_) = ReplayedBatches(source, labels).epoch(0)
    assert torch.equal(hard.x, soft.x)


def test_wrong_numbers_and_views_that_nobody_can_make():
    for wrong in ({"count": 0}, {"magnitude": 1.5}):
        with pytest.raises(ValueError, match="leave it out"):
            RandAugment(**wrong)
    images, teacher = distilled_images(), make_teacher()
    views = replace(plain_views(torch.arange(2), images.size), augment_seed=torch.arange(2))
    with pytest.raises(ValueError, match="nobody says how"):
        show(torch.zeros(2, 3, 8, 8), views, 8)
    with pytest.raises(ValueError, match="nobody says how"):
        Viewer(Source.distilled(images), images.size, CPU)(views)
    labels = relabel(images, teacher, **OPTIONS, randaugment=RandAugment(), codec="fp16")
    header = replace(labels.header, augment_count=0)
    assert replace(labels, header=header).batch(0, 0)[0].augment_seed is None
    plain = relabel(images, teacher, **OPTIONS, codec="fp16")
    broken = replace(plain, header=replace(plain.header, augment_count=2, augment_magnitude=0.3))
    with pytest.raises(ShardError, match="lacks a column"):
        broken.batch(0, 0)
