import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from curate.errors import ShardError
from distill import students
from distill import validate as module
from distill.baselines import coreset_subset, penultimate, random_subset
from distill.distilled import DistilledSet, encode_image
from distill.image_set import ImageSet
from distill.networks import ConvNet
from distill.relabel import relabel
from distill.replay import ReplayedBatches, Source
from distill.squeeze import accuracy
from distill.students import StudentConfig, train_student
from distill.teacher import Teacher
from distill.validate import Row, Validation, validate
from tests.distill.test_squeeze import stripes
from tests.distill.test_students import as_distilled
from tests.references import dd_ranking_reference as reference

NAMES = ("red rows", "green columns")


def narrow(name, *, classes, size, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ConvNet(3 if name == "convnet3" else 2, classes=classes, size=size, width=16)


@pytest.fixture(autouse=True)
def small_networks(monkeypatch):
    monkeypatch.setattr(students, "build", narrow)


def named(images: ImageSet, names=NAMES, prefix: str = "img") -> ImageSet:
    ids = [f"{prefix}{row}" for row in range(len(images))]
    return ImageSet.of(images.images, images.labels, class_names=names, ids=ids)


TRAIN, TEST = named(stripes(48)), named(stripes(40, seed=1), prefix="test")


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    model = narrow("convnet3", classes=2, size=8)
    mean, std = TRAIN.moments()
    made = Teacher(model, "convnet3", 8, NAMES, mean, std, 0.9, 1)
    x, y = made.normalise(TRAIN.batch(slice(None))), torch.from_numpy(TRAIN.labels)
    optimizer = torch.optim.Adam(model.requires_grad_(True).parameters(), lr=0.01)
    model.train()
    for _ in range(12):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return Teacher(model, "convnet3", 8, NAMES, mean, std, 0.9, 1)


@pytest.fixture(scope="module")
def distilled(teacher) -> DistilledSet:
    images = as_distilled(named(stripes(8, seed=5)), teacher.mean, teacher.std)
    labels = relabel(images, teacher, epochs=3, batch_size=8, codec="fp16", device="cpu")
    return DistilledSet(images, labels, {})


def run(distilled, teacher, **options) -> Validation:
    given = {"train": TRAIN, "test": TEST, "teachers": teacher, "networks": ("convnet3",)}
    given |= {"coreset_methods": ("herding", "k-center"), "device": "cpu", "lr": 0.01}
    return validate(distilled, **{**given, **options})


@pytest.fixture(scope="module")
def whole(distilled, teacher) -> Validation:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(students, "build", narrow)
        return run(distilled, teacher, networks=("convnet3", "convnet2"), without_augmentation=True)


def test_everything_stands_side_by_side(whole, teacher, distilled):
    found = {(r.name, r.network, r.labels, r.augmented) for r in whole.rows}
    expected = {
        (name, network, labels, augmented)
        for name in ("distilled", "random", "coreset")
        for network in ("convnet3", "convnet2")
        for labels in ("soft", "hard")
        for augmented in (True, False)
    } | {("teacher", "convnet3", "hard", True)}
    assert found == expected and len(whole.rows) == len(expected)
    assert all(len(row.values) == 3 for row in whole.rows if row.name != "teacher")
    assert whole.row("teacher", "convnet3", "hard").values == (accuracy(teacher, TEST),)
    assert (whole.ipc, whole.epochs, whole.batch_size, whole.seeds) == (4, 3, 8, (0, 1, 2))
    assert [row.network for row in whole.rows[:12]] == ["convnet3"] * 12


def test_a_row_is_what_a_student_alone_reaches(whole, distilled):
    batches = ReplayedBatches(distilled.source, distilled.labels, batch_size=8)
    config = StudentConfig(epochs=3, lr=0.01)
    for labels in ("soft", "hard"):
        values = tuple(
            accuracy(
                train_student(
                    batches, "convnet3", config, labels=labels, size=8, seed=seed, device="cpu"
                ),
                TEST,
            )
            for seed in (0, 1, 2)
        )
        row = whole.row("distilled", "convnet3", labels)
        assert row.values == values
        assert row.mean == pytest.approx(sum(values) / 3)
        assert row.std == pytest.approx(np.std(values, ddof=1))


def test_random_images_with_the_same_labels_are_drawn_anew_for_each_seed(
    monkeypatch, distilled, teacher
):
    """As relabel alone would do it: same teacher, codec, epochs, and views by the same seed."""
    trained, real, config = {}, module.train_student, StudentConfig(epochs=3, lr=0.01)

    def recording(batches, network, config, **options):
        student = real(batches, network, config, **options)
        trained[student.sha256] = (options["labels"], options["seed"])
        return student

    monkeypatch.setattr(module, "train_student", recording)
    run(distilled, teacher)
    for seed in (0, 1, 2):
        images = random_subset(TRAIN, distilled.images, seed=seed)
        labels = relabel(images, teacher, epochs=3, batch_size=8, codec="fp16", device="cpu")
        batches = ReplayedBatches(Source.distilled(images), labels)
        for kind in ("soft", "hard"):
            alone = real(batches, "convnet3", config, labels=kind, size=8, seed=seed, device="cpu")
            assert trained[alone.sha256] == (kind, seed)


def test_label_and_image_bytes(whole, distilled):
    for row in whole.rows:
        if row.labels == "hard":
            assert row.label_bytes == 0
        else:
            assert abs(row.label_bytes / distilled.labels.nbytes - 1) < 0.1
    files = sum(len(encode_image(one)) for one in distilled.images.pixels)
    row = whole.row("distilled", "convnet3", "soft")
    assert (row.image_bytes, row.label_bytes) == (files, distilled.labels.nbytes)
    many = np.repeat(distilled.images.pixels[:1], 3000, axis=0)
    assert module._image_bytes(many) == 3000 * len(encode_image(many[0]))


def test_every_student_is_judged_once_and_after_its_last_epoch(monkeypatch, distilled, teacher):
    """Best-on-test (RDED, EDC, DD-Ranking) cannot happen: the test images are seen once."""
    judged, trained = [], []
    monkeypatch.setattr(
        module, "accuracy", lambda t, i: judged.append((t.epochs, i.ids[0][:3])) or 0.5
    )
    real = module.train_student

    def recording(*args, **kwargs):
        trained.append(kwargs["seed"])
        return real(*args, **kwargs)

    monkeypatch.setattr(module, "train_student", recording)
    run(distilled, teacher)
    # two coreset methods on training images, 3 sets x 2 kinds of labels x 3 seeds, the teacher
    assert len(trained) == 2 + 18 and len(judged) == 20 + 1
    assert [place for _, place in judged[:2]] == ["img", "img"]
    assert [place for _, place in judged[2:]] == ["tes"] * 19
    assert all(epochs == 3 for epochs, _ in judged[:-1])


def test_the_best_coreset_is_named_and_settled_off_the_test_images(
    monkeypatch, whole, distilled, teacher
):
    assert set(whole.coreset_trials) == {"herding", "k-center"}
    assert whole.coreset_method == max(whole.coreset_trials, key=whole.coreset_trials.get)
    seen, real, judged = [], module._held_out, []

    def recording(train, taken, seed):
        seen.append((real(train, taken, seed), taken))
        return seen[-1][0]

    monkeypatch.setattr(module, "_held_out", recording)
    monkeypatch.setattr(module, "train_student", lambda b, *_, **__: b)
    x = penultimate(teacher, TRAIN, device="cpu")
    wanted = coreset_subset(TRAIN, x, distilled.images, method="k-center")

    def prefers_k_center(batches, images):
        judged.append(images)
        return float(np.array_equal(batches.source.pixels, wanted.pixels))

    monkeypatch.setattr(
        module,
        "accuracy",
        lambda t, i: 0.9 if isinstance(t, Teacher) else prefers_k_center(t, i),
    )
    found = run(distilled, teacher)
    assert found.coreset_method == "k-center"
    assert found.row("coreset", "convnet3", "soft").mean == 1.0
    assert found.row("distilled", "convnet3", "soft").mean == 0.0
    held_out, taken = seen[0]
    assert all(images is held_out for images in judged[:2])
    assert all(images is TEST for images in judged[2:]) and len(judged) == 2 + 18
    used = {one for images in taken for one in images.init_id}
    assert not used & set(held_out.ids) and set(held_out.ids) <= set(TRAIN.ids)


def test_one_coreset_method_needs_no_trial(distilled, teacher):
    found = run(distilled, teacher, coreset_methods=("moderate",), epochs=1)
    assert (found.coreset_method, found.coreset_trials, found.epochs) == ("moderate", {}, 1)


def test_where_no_image_is_left_the_training_images_settle_it(distilled):
    few = TRAIN.subset(np.arange(8))
    images = random_subset(few, distilled.images)
    assert module._held_out(few, [images], 0) is few


def test_without_soft_labels_there_are_hard_ones_only(distilled, teacher):
    bare = DistilledSet(distilled.images, None, {})
    found = run(bare, teacher, epochs=2, without_augmentation=True)
    assert {row.labels for row in found.rows} == {"hard"} and len(found.rows) == 7
    assert found.label_robust_scores("convnet3") and found.augmentation_robust_scores("convnet3")


def test_labels_of_views_only_ask_the_teachers(distilled, teacher):
    labels = relabel(
        distilled.images, teacher, epochs=1, batch_size=8, codec="params", device="cpu"
    )
    bare = replace(labels, recompute=None)  # as DistilledSet.open gives them
    found = run(DistilledSet(distilled.images, bare, {}), teacher)
    asked = run(DistilledSet(distilled.images, labels, {}), teacher)
    assert found.rows == asked.rows


def test_it_is_a_function_of_its_inputs_and_the_global_streams_stay(distilled, teacher):
    torch.manual_seed(1)
    before = torch.random.get_rng_state().tolist()
    numpy_before = np.random.get_state()[1].tolist()  # noqa: NPY002
    first = run(distilled, teacher, epochs=2)
    assert torch.random.get_rng_state().tolist() == before
    assert np.random.get_state()[1].tolist() == numpy_before  # noqa: NPY002
    torch.rand(1)
    assert run(distilled, teacher, epochs=2) == first


def test_stopped_and_continued_is_never_stopped(tmp_path, monkeypatch, distilled, teacher):
    """Check (k) for students."""
    path, real, trained = tmp_path / "students.json", module.train_student, []
    expected = run(distilled, teacher, epochs=1)

    def dies(*args, **kwargs):
        if len(trained) == 9:
            raise KeyboardInterrupt
        trained.append(1)
        return real(*args, **kwargs)

    monkeypatch.setattr(module, "train_student", dies)
    with pytest.raises(KeyboardInterrupt):
        run(distilled, teacher, epochs=1, checkpoint=path)
    assert len(json.loads(path.read_text())) == 9
    trained.clear()
    monkeypatch.setattr(module, "train_student", lambda *a, **k: trained.append(1) or real(*a, **k))
    assert run(distilled, teacher, epochs=1, checkpoint=path) == expected
    assert len(trained) == 20 - 9
    assert run(distilled, teacher, epochs=1, checkpoint=path) == expected
    assert len(trained) == 11
    run(distilled, teacher, epochs=1, checkpoint=path, temperature=3.0)
    assert len(trained) == 11 + 20  # another recipe: other students


def test_a_damaged_checkpoint_is_refused(tmp_path, distilled, teacher):
    path = tmp_path / "students.json"
    path.write_text('{"a": 3}')
    with pytest.raises(ShardError, match="remove it"):
        run(distilled, teacher, checkpoint=path)


def test_class_order_of_teacher_train_and_test_is_asserted(distilled, teacher):
    turned = NAMES[::-1]
    with pytest.raises(ValueError, match=r"test images.*same order"):
        run(distilled, teacher, test=named(TEST, turned))
    with pytest.raises(ValueError, match=r"training images.*same order"):
        run(distilled, teacher, train=named(TRAIN, turned))
    with pytest.raises(ValueError, match=r"teacher 0.*same order"):
        run(distilled, replace(teacher, class_names=turned))


def test_what_cannot_be_compared_is_refused(distilled, teacher):
    with pytest.raises(ValueError, match="at least 3"):
        run(distilled, teacher, seeds=(0, 1))
    with pytest.raises(ValueError, match="different"):
        run(distilled, teacher, seeds=(0, 1, 1))
    with pytest.raises(ValueError, match="at least one teacher"):
        run(distilled, ())
    with pytest.raises(ValueError, match="16 pixels"):
        run(distilled, teacher, test=named(stripes(8, size=16)))
    other = Teacher(
        narrow("convnet3", classes=2, size=8, seed=4),
        "convnet3",
        8,
        NAMES,
        teacher.mean,
        teacher.std,
        0.9,
        1,
    )
    with pytest.raises(ValueError, match="the soft labels were made with"):
        run(distilled, other)
    with pytest.raises(ValueError, match="fewer than the 4"):
        run(distilled, teacher, train=named(stripes(6)))


def test_dd_ranking_of_a_validation(whole):
    take = {
        (row.name, row.labels, row.augmented): row.values
        for row in whole.rows
        if row.network == "convnet3"
    }
    full = take["teacher", "hard", True][0]
    lrs = whole.label_robust_scores("convnet3", weight=0.3)
    ars = whole.augmentation_robust_scores("convnet3", weight=0.3)
    for seed in range(3):
        hard, soft, other = (
            take[key][seed]
            for key in (
                ("distilled", "hard", True),
                ("distilled", "soft", True),
                ("random", "soft", True),
            )
        )
        assert lrs[seed] == pytest.approx(reference.lrs(full, hard, soft, other, 0.3))
        plain = (take[name, "soft", False][seed] for name in ("distilled", "random"))
        assert ars[seed] == pytest.approx(reference.ars(soft, other, *plain, 0.3))
    assert whole.label_robust_scores("convnet2", real_hard=1.0) != lrs
    assert len(whole.label_robust_scores("convnet2")) == 3  # by the teacher that there is


def test_the_table(whole):
    rows = (
        Row("distilled", "resnet18", "soft", True, (0.66, 0.68, 0.67), 27_000, 3_000_000),
        Row("distilled", "resnet18", "hard", False, (0.3, 0.3, 0.3), 27_000, 0),
        Row("teacher", "resnet18", "hard", True, (0.95,), 100, 0),
    )
    made = Validation(rows, (0, 1, 2), 10, 300, 50, "herding", {"herding": 0.4})
    lines = made.markdown().splitlines()
    assert "10 images per class, last of 300 epochs" in lines[0] and "herding" in lines[0]
    assert lines[4] == (
        "| distilled | resnet18 | soft | 67.00 ± 1.00 | 66.00 68.00 67.00 | 27,000 | 3,000,000 |"
    )
    assert "| hard, no augmentation | 30.00 ± 0.00 |" in lines[5]
    assert "| 95.00 | 95.00 |" in lines[6] and len(lines) == 7
    assert json.loads(json.dumps(made.facts()))["rows"][0]["mean"] == pytest.approx(0.67)
    assert len(whole.markdown().splitlines()) == 4 + 25
    with pytest.raises(ValueError, match="no row random resnet18 soft"):
        made.row("random", "resnet18", "soft")
    with pytest.raises(ValueError, match="without_augmentation=True"):
        replace(made, rows=rows[::2]).augmentation_robust_scores("resnet18")


def test_the_usual_batch_is_that_of_rded(distilled):
    images = as_distilled(named(stripes(200)))
    assert [module.usual_batch(images.prefix(ipc)) for ipc in (1, 9, 10, 49, 50, 100)] == [
        2,
        10,
        20,
        50,
        100,
        100,
    ]
