"""The feature residual and EDC's flatness, in the engine."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from distill import recover as module
from distill import recover_state
from distill.features import classifier, source_features
from distill.initialise import initialise
from distill.recipes import RECIPES, Recipe
from distill.recover import recover
from distill.teacher import pixel_range, pixels_of
from tests.distill.recover_toy import toy_images, toy_teacher
from tests.distill.test_recover import KilledError, same, views
from tests.references.residuals_reference import with_residuals

CPU = torch.device("cpu")
BASE = Recipe(
    "base", iterations=12, statistics=0.0, learning_rate=0.1, begin="patch", patch_factor=2
)


def run(recipe, *, ipc=2, teachers=None, **options):
    options.setdefault("precision", "float64")
    return recover(teachers or [toy_teacher()], toy_images(), ipc=ipc, method=recipe, **options)


def features_of(teacher, pixels):
    """What the last linear layer reads, found by running all layers before it."""
    model = deepcopy(teacher.model).double()
    x = teacher.normalise(torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2))
    with torch.no_grad():
        return model.features(x.double()).flatten(1)


def targets_of(found, images, teacher):
    """For each image the mean features of the real images that its id names."""
    ids = images.ids.tolist()
    means = []
    for name in found.init_id:
        # An image that gives two of the four patches is named once and counts twice; such images
        # are left out by taking as many candidates as there are.
        rows = [ids.index(one) for one in name.split("+")]
        means.append(features_of(teacher, images.images[rows]).mean(0))
    return torch.stack(means)


@pytest.mark.parametrize(
    ("flatness", "near"), [(3.0, 0.0), (0.0, 5.0), (3.0, 5.0)], ids=["flat", "near", "both"]
)
def test_the_terms_are_those_written_plainly(flatness, near):
    recipe = replace(
        BASE, flatness=flatness, flatness_decay=0.7, flatness_temperature=2.0, feature_residual=near
    )
    teacher, images = toy_teacher(), toy_images()
    got = run(recipe)
    assert all(name.count("+") == 3 for name in got.init_id)
    targets = targets_of(got, images, teacher)
    model = deepcopy(teacher.model).double()
    begun = initialise(recipe, teacher, images, ipc=2, seed=0, device=CPU).images.double()
    for rank in range(2):
        x, loss = with_residuals(
            model,
            model.head,
            begun[rank],
            torch.arange(3),
            views(recipe, (rank, 0)),
            learning_rate=0.1,
            limits=tuple(limit.double() for limit in pixel_range(teacher.mean, teacher.std)),
            flatness=flatness,
            decay=0.7,
            temperature=2.0,
            near=near,
            targets=targets[3 * rank : 3 * rank + 3],
        )
        mine = slice(3 * rank, 3 * rank + 3)
        wanted = pixels_of(x, teacher.mean, teacher.std).permute(0, 2, 3, 1).numpy()
        assert np.array_equal(got.pixels[mine], wanted)
        assert got.recover_loss[mine] == pytest.approx([loss] * 3, rel=1e-5)
    assert not same(got, run(BASE))


def test_check_j_without_weight_both_are_the_base():
    off = replace(BASE, flatness_decay=0.5, flatness_temperature=1.0)
    assert same(run(off), run(BASE))


def test_the_feature_residual_brings_features_near_those_of_the_sources():
    teacher, images = toy_teacher(), toy_images()
    recipe = replace(
        BASE, cross_entropy=0.0, feature_residual=1.0, iterations=60, crop="none", flip=False
    )
    before, after = run(replace(recipe, iterations=0)), run(recipe)
    targets = targets_of(before, images, teacher)
    distance = [
        (features_of(teacher, one.pixels) - targets).square().mean(1) for one in (before, after)
    ]
    assert (distance[1] < 0.5 * distance[0]).all()


def test_an_image_that_is_its_own_source_has_no_residual():
    recipe = replace(
        BASE, begin="real", patch_factor=1, crop="none", flip=False, cross_entropy=0.0,
        feature_residual=1.0, iterations=1,
    )  # fmt: skip
    got = run(recipe)
    assert got.recover_loss == pytest.approx(np.zeros(6), abs=1e-9)
    assert not np.isclose(
        run(replace(recipe, begin="patch", patch_factor=2)).recover_loss, 0, atol=1e-4
    ).any()


def test_flatness_is_zero_where_nothing_has_moved():
    recipe = replace(BASE, cross_entropy=0.0, flatness=1.0, iterations=3)
    assert run(recipe).recover_loss == pytest.approx(np.zeros(6), abs=1e-12)


def test_flatness_keeps_the_teachers_answer_near_that_of_the_average():
    """It slows what the teacher says, not only the pixels."""
    still = replace(BASE, crop="none", flip=False, begin="real", patch_factor=1, iterations=8)
    teacher = toy_teacher()

    def change(recipe):
        first, last = (
            teacher.normalise(torch.from_numpy(run(one).pixels).permute(0, 3, 1, 2))
            for one in (replace(recipe, iterations=0), recipe)
        )
        with torch.no_grad():
            return (teacher.model(last) - teacher.model(first)).abs().mean().item()

    assert change(replace(still, flatness=200.0, flatness_temperature=1.0)) < 0.8 * change(still)


EVERY = replace(
    BASE, iterations=6, flatness=1.0, flatness_decay=0.8, feature_residual=1.0, statistics=0.05,
    stages=2, stage_keep=0.5, round_robin=True, residual=0.5,
)  # fmt: skip


def test_check_c_merged_groups_are_separate_groups():
    teachers = [toy_teacher(), toy_teacher(seed=1)]
    apart, together = (run(EVERY, ipc=4, merge=m, teachers=teachers) for m in (1, 1000))
    assert np.array_equal(apart.pixels, together.pixels)
    assert np.allclose(apart.recover_loss, together.recover_loss, rtol=1e-7)


@pytest.mark.parametrize("after", [2, 5, 9])
def test_check_k_a_resumed_run_is_the_uninterrupted_one(tmp_path, after, monkeypatch):
    path = tmp_path / "recover.safetensors"
    options = {"ipc": 4, "merge": 6, "precision": "float32"}
    options["teachers"] = [toy_teacher(), toy_teacher(seed=1)]
    wanted = run(EVERY, **options)
    monkeypatch.setattr(module, "_CHECKPOINT_SECONDS", 0.0)
    save, saves = recover_state.save, []

    def killed(*arguments):
        save(*arguments)
        saves.append(1)
        if len(saves) == after:
            raise KilledError

    monkeypatch.setattr(recover_state, "save", killed)
    with pytest.raises(KilledError):
        run(EVERY, **options, checkpoint=path)
    monkeypatch.setattr(recover_state, "save", save)
    assert same(run(EVERY, **options, checkpoint=path), wanted)


def test_each_teacher_has_targets_of_its_own():
    teachers = [toy_teacher(), toy_teacher(seed=1)]
    recipe = replace(BASE, feature_residual=1.0, round_robin=True)
    assert not same(run(recipe, teachers=teachers), run(recipe, teachers=teachers[:1]))
    sources = np.array([[0, 3], [4, 7]])
    for teacher in teachers:
        got = source_features(teacher, toy_images(), sources, CPU)
        rows = features_of(teacher, toy_images().images[[0, 3, 4, 7]])
        assert torch.allclose(got.double(), rows.reshape(2, 2, -1).mean(1), atol=1e-5)


def test_each_teachers_turn_has_its_own_targets():
    """Whole real images that nothing else moves have no residual, whoever looks."""
    recipe = replace(
        BASE, begin="real", patch_factor=1, crop="none", flip=False, cross_entropy=0.0,
        feature_residual=1.0, iterations=2, round_robin=True, learning_rate=1e-9,
    )  # fmt: skip
    teachers = [toy_teacher(), toy_teacher(seed=1)]
    assert run(recipe, teachers=teachers).recover_loss == pytest.approx(np.zeros(6), abs=1e-9)


def test_the_average_begins_anew_with_a_stage(monkeypatch):
    seen = []
    original = module.Batch.step

    def watch(batch):
        original(batch)
        seen.append(torch.equal(batch.average, batch.x))

    monkeypatch.setattr(module.Batch, "step", watch)
    run(replace(BASE, iterations=4, flatness=1.0, stages=2, stage_keep=0.5), ipc=1)
    assert seen == [False, True, False, False]


def test_networks_without_a_classifier_are_refused():
    with pytest.raises(ValueError, match="does not end in a linear layer of 3 outputs"):
        classifier(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 5)), 3)
    assert classifier(toy_teacher().model, 3) is toy_teacher().model.head


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"begin": "noise", "feature_residual": 1.0}, "begin from noise: use"),
        ({"flatness_decay": 1.5}, r"flatness_decay is 1\.5; it must be in"),
        ({"flatness_temperature": 0.0}, r"flatness_temperature is 0\.0; it must be above 0"),
        ({"feature_residual": -1.0}, "must not be negative"),
        ({"ranges": (3, 2)}, "must be above 0 and increase"),
        ({"ranges": (0, 2)}, "must be above 0 and increase"),
        ({"begin": "patch", "ranges": (2,)}, "ranges choose real images and begin is 'patch'"),
        ({"student_epochs": 0}, "student_epochs is 0; it must be at least 1"),
    ],
)
def test_numbers_out_of_range(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(RECIPES["cudd"], **changes)


def test_published_defaults():
    assert RECIPES["edc"].flatness == 0.0
    assert (RECIPES["edc"].flatness_decay, RECIPES["edc"].flatness_temperature) == (0.99, 4.0)
