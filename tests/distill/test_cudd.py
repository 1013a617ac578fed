"""CUDD whole: ranges of ranks, with a student of what was distilled before."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from distill import recover as module
from distill import recover_state, students
from distill.cudd import parts_of
from distill.recipes import RECIPES, Recipe
from distill.recover import recover
from distill.replay import Source
from distill.student_batches import TaughtBatches
from distill.view_draw import ViewDraw
from tests.distill.recover_toy import toy_images, toy_teacher
from tests.distill.test_recover import KilledError, same

CPU = torch.device("cpu")
CUDD = replace(RECIPES["cudd"], iterations=3, ranges=(2, 4), student_epochs=2)


def run(recipe=CUDD, *, ipc=5, **options):
    options.setdefault("precision", "float32")
    options.setdefault("merge", 1)
    return recover([toy_teacher()], toy_images(), ipc=ipc, method=recipe, **options)


@pytest.fixture(scope="module")
def whole():
    """The run, and for each later part the images so far and the student it was given."""
    seen = []
    original = module.student_of

    def watch(earlier, *arguments, **options):
        student = original(earlier, *arguments, **options)
        seen.append((earlier["pixels"].clone(), student))
        return student

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "student_of", watch)
        return run(), seen


def test_parts_are_the_ranges_that_begin_before_the_end():
    recipe = RECIPES["cudd"]
    assert parts_of(recipe, 10) == [(0, 10)] and parts_of(recipe, 20) == [(0, 20)]
    assert parts_of(recipe, 60) == [(0, 20), (20, 50), (50, 60)]
    assert parts_of(Recipe("plain"), 60) == [(0, 60)]


def test_a_student_is_trained_on_what_was_distilled_before(whole):
    got, seen = whole
    assert [len(pixels) for pixels, _ in seen] == [6, 12]
    for pixels, student in seen:
        assert np.array_equal(pixels.permute(0, 2, 3, 1).numpy(), got.pixels[: len(pixels)])
        assert not student.model.training
    assert len({student.sha256 for _, student in seen}) == 2
    assert got.ipc == 5 and set(got.init_kind) == {"real"}


def test_no_real_image_is_used_twice(whole):
    got, _ = whole
    rows = [int(name.removeprefix("img")) for name in got.init_id]
    assert len(set(rows)) == 15
    assert np.array_equal(toy_images().labels[rows], got.labels)


def test_each_part_begins_as_the_curriculum_says(whole):
    """First what the teacher knows; later that and the student errs, both err, the rest."""
    got, seen = whole
    images, teacher = toy_images(), toy_teacher()
    labels = torch.from_numpy(images.labels)

    def right(one):
        with torch.no_grad():
            x = one.normalise(images.batch(slice(None)))
            return (one.model(x).argmax(1) == labels).numpy()

    known = right(teacher)
    taken = set()
    for part, (first, stop) in enumerate(parts_of(CUDD, 5)):
        learnt = right(seen[part - 1][1]) if part else np.zeros(len(labels), bool)
        kinds = np.select([known & ~learnt, ~known & ~learnt], [0, 1], 2)
        for c in range(3):
            mine = [
                int(got.init_id[3 * rank + c].removeprefix("img")) for rank in range(first, stop)
            ]
            free = [row for row in np.flatnonzero(images.labels == c) if row not in taken]
            best = np.sort(kinds[free])[: stop - first]
            assert sorted(kinds[mine]) == best.tolist()
            taken |= set(mine)
    assert (kinds == 0).any() and (kinds == 2).any()  # the students do tell images apart


def test_the_first_part_is_the_run_of_fewer_images(whole):
    got, _ = whole
    assert same(run(ipc=2), got.prefix(2))
    assert same(run(ipc=4), got.prefix(4))
    assert same(run(replace(CUDD, ranges=())).prefix(2), got.prefix(2))


def test_check_j_the_adversarial_term_acts_in_later_parts_alone(whole):
    got, _ = whole
    off = run(replace(CUDD, adversarial=0.0))
    assert same(off.prefix(2), got.prefix(2))
    assert (off.pixels[6:] != got.pixels[6:]).any(axis=(1, 2, 3)).all()


def test_check_j_ranges_alone_change_nothing():
    """Real images at random and no opposition: the parts are those of a run of one part."""
    recipe = replace(CUDD, choice="random", adversarial=0.0)
    assert same(run(recipe), run(replace(recipe, ranges=())))


def test_without_ranges_it_is_one_part_and_needs_no_student(monkeypatch):
    monkeypatch.setattr(module, "student_of", None)
    assert run(replace(CUDD, ranges=(5, 9))).ipc == 5
    given = toy_teacher(seed=3, steps=2)
    assert not same(run(student=given), run(replace(CUDD, ranges=())))


def killing(monkeypatch, after):
    """Die after so many writes, of the run's checkpoint or the student's; 0 is never."""
    writes = []
    monkeypatch.setattr(module, "_CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(students, "_CHECKPOINT_SECONDS", 0.0)
    for owner, name in ((recover_state, "save"), (students._Training, "_save")):
        original = getattr(owner, name)

        def dies(*arguments, original=original, name=name):
            original(*arguments)
            writes.append(name)
            if len(writes) == after:
                raise KilledError

        monkeypatch.setattr(owner, name, dies)
    return writes


@pytest.mark.parametrize("after", [1, 6, 7, 8, 9, 10, 13, 17, 18, 19, 20, 24])
def test_check_k_killed_anywhere_and_continued_is_the_uninterrupted_run(
    tmp_path, after, monkeypatch, whole
):
    path = tmp_path / "recover.safetensors"
    with monkeypatch.context() as patch:
        writes = killing(patch, after)
        with pytest.raises(KilledError):
            run(checkpoint=path)
    trained = []
    original = students._Training._descend
    with monkeypatch.context() as patch:
        patch.setattr(students._Training, "_descend", lambda *a: trained.append(1) or original(*a))
        assert same(run(checkpoint=path), whole[0])
    # Two students of two epochs of one batch each; those that were done are not trained again.
    assert len(trained) == 4 - writes.count("_save")
    assert list(tmp_path.iterdir()) == [path]
    monkeypatch.setattr(module.Batch, "step", None)
    assert same(run(checkpoint=path), whole[0])


def test_the_kills_above_meet_every_stage(tmp_path, monkeypatch):
    writes = killing(monkeypatch, 0)
    run(checkpoint=tmp_path / "recover.safetensors")
    places = [number + 1 for number, name in enumerate(writes) if name == "_save"]
    assert (len(writes), places) == (24, [8, 9, 18, 19])


def test_too_few_real_images_are_told_before_any_work(monkeypatch):
    monkeypatch.setattr(module, "initialise", None)
    with pytest.raises(ValueError, match=r"class 'c0' has 16 images and ipc is 17: lower ipc"):
        run(ipc=17)


def test_taught_batches_have_the_teachers_answers():
    teacher, images = toy_teacher(), toy_images()
    draw = ViewDraw(epochs=2, batch_size=20, mix="cutmix", seed=3)
    source = Source.real(images, teacher.mean, teacher.std)
    batches = TaughtBatches(source, draw, teacher, CPU)
    first = list(batches.epoch(0))
    assert [len(batch.x) for batch in first] == [20, 20, 8]
    for batch in first:
        with torch.no_grad():
            assert torch.allclose(batch.logits, teacher.model(batch.x), atol=1e-5)
        assert torch.allclose(batch.targets.sum(1), torch.ones(len(batch.x)))
    again, other = next(batches.epoch(0)), next(batches.epoch(1))
    assert torch.equal(again.x, first[0].x) and not torch.equal(other.x, first[0].x)
