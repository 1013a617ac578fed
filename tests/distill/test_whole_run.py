"""Squeeze, recover, relabel, validate on real scans: the purpose of the package, in one run.

10 distilled images with soft labels against 10 random real images with hard labels, one of each
class. Students are trained alike for as many steps; three seeds. The images begin as noise, so that
nothing in them is a scan; the recipe is SRe2L's with its roll of 4 of 32 pixels brought to 8.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

import distill
from distill import DistilledSet, ImageSet, Teacher, Validation

IPC, EPOCHS, SEEDS = 1, 100, (0, 1, 2)


@pytest.fixture(scope="module")
def digits() -> tuple[ImageSet, ImageSet]:
    """1,397 real scans of 8 x 8 pixels, and 400 held out."""
    data = load_digits()
    pixels = np.repeat((data.images * 255 / 16).round().astype(np.uint8)[..., None], 3, axis=3)
    order = np.random.default_rng(0).permutation(len(pixels))
    train, test = (
        ImageSet.of(pixels[rows], data.target[rows], ids=[f"scan-{row}" for row in rows])
        for rows in (order[:1397], order[1397:])
    )
    return train, test


@pytest.fixture(scope="module")
def teacher(digits: tuple[ImageSet, ImageSet]) -> Teacher:
    train, test = digits
    return distill.squeeze(train, network="convnet3", epochs=3, test=test, device="cpu")


@pytest.fixture(scope="module")
def distilled(digits: tuple[ImageSet, ImageSet], teacher: Teacher) -> DistilledSet:
    recipe = distill.recipe_for("sre2l", size=8, classes=10, iterations=400)
    recipe = replace(recipe, jitter=(0, 1))
    images = distill.recover([teacher], digits[0], ipc=IPC, method=recipe, device="cpu")
    labels = distill.relabel(images, teacher, epochs=EPOCHS, batch_size=10, device="cpu")
    return DistilledSet(images, labels, {"teachers": [teacher.facts()]})


def compared(
    found: DistilledSet, teacher: Teacher, digits: tuple[ImageSet, ImageSet], **options: object
) -> Validation:
    return distill.validate(
        found,
        train=digits[0],
        test=digits[1],
        teachers=teacher,
        networks=("convnet3",),
        seeds=SEEDS,
        epochs=EPOCHS,
        coreset_methods=("herding",),
        device="cpu",
        **options,
    )


def test_distilled_beats_as_many_random_real_images_with_hard_labels(
    digits: tuple[ImageSet, ImageSet], teacher: Teacher, distilled: DistilledSet, tmp_path: Path
) -> None:
    """By more than the spread: the worst of three seeds is above the best of the other three."""
    opened = DistilledSet.open(distilled.write(tmp_path / "set"))
    found = compared(opened, teacher, digits)
    ours = found.row("distilled", "convnet3", "soft")
    theirs = found.row("random", "convnet3", "hard")
    assert len(ours.values) == len(theirs.values) == len(SEEDS)
    assert min(ours.values) > max(theirs.values), found.markdown()
    assert ours.mean - theirs.mean > 2 * max(ours.std, theirs.std), found.markdown()
    assert ours.mean < teacher.accuracy, "ten images cannot beat 1,397"


def test_noise_with_hard_labels_does_not(
    digits: tuple[ImageSet, ImageSet], teacher: Teacher, distilled: DistilledSet
) -> None:
    """The comparison can be lost: images that say nothing, labels that say no more."""
    noise = np.random.default_rng(0).integers(0, 256, distilled.images.pixels.shape, np.uint8)
    images = replace(distilled.images, pixels=noise)
    found = compared(DistilledSet(images, None, {}), teacher, digits)
    ours = found.row("distilled", "convnet3", "hard")
    assert ours.mean < found.row("random", "convnet3", "hard").mean
