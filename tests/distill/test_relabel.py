from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from curate.errors import BudgetError, FingerprintError, ShardError
from distill import relabel as relabelling
from distill.distilled_images import DistilledImages
from distill.image_set import ImageSet
from distill.networks import build
from distill.relabel import attach, relabel
from distill.replay import ReplayedBatches, Source
from distill.soft_labels import SoftLabels
from distill.stored_labels import open_stored_labels, store_labels, stored_batches
from distill.teacher import Teacher, normalise
from distill.view_draw import ViewDraw
from distill.views import Views, plain_views, show

SIZE, CLASSES = 8, 3
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
SMALL = {"epochs": 3, "batch_size": 4, "device": "cpu"}


def distilled_images(
    ipc: int = 3, *, size: int = SIZE, names: tuple[str, ...] = ("cat", "dog", "owl"), seed: int = 0
) -> DistilledImages:
    n = ipc * len(names)
    rng = np.random.default_rng(seed)
    return DistilledImages(
        rng.integers(0, 256, (n, size, size, 3)).astype(np.uint8),
        np.arange(n) % len(names),
        (np.arange(n) // len(names)).astype(np.int32),
        np.array(["real", "noise", "patch"])[np.arange(n) % 3],
        np.array([f"cifar/{row}" if row % 3 != 1 else "" for row in range(n)]),
        rng.random(n).astype(np.float32),
        rng.random(n).astype(np.float32),
        np.where(np.arange(n) % 2, np.nan, 1).astype(np.float32),
        names,
        MEAN,
        STD,
    )


def make_teacher(
    *,
    seed: int = 0,
    size: int = SIZE,
    names: tuple[str, ...] = ("cat", "dog", "owl"),
    mean: tuple[float, ...] = MEAN,
    std: tuple[float, ...] = STD,
    dropout: bool = False,
) -> Teacher:
    model = build("convnet3", classes=len(names), size=size, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # statistics unlike those of a batch
            module.running_mean += torch.randn(module.num_features, generator=generator) / 4
            module.running_var *= 1 + torch.rand(module.num_features, generator=generator)
    model.head.weight.data *= 100
    whole = nn.Sequential(model, nn.Dropout(0.5)) if dropout else model
    return Teacher(whole, "convnet3", size, names, mean, std, 0.9, 1)


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    return make_teacher()


@pytest.fixture(scope="module")
def images() -> DistilledImages:
    return distilled_images()


def direct(images: DistilledImages, teacher: Teacher, views: Views) -> torch.Tensor:
    """The logits of views, made from the whole set at once and one view at a time."""
    x = normalise(torch.from_numpy(images.pixels).permute(0, 3, 1, 2), MEAN, STD)
    seen = show(x, views, images.size)
    with torch.no_grad():
        return torch.cat([teacher.model(one[None]) for one in seen])


def same(one: SoftLabels, other: SoftLabels) -> bool:
    return [p if isinstance(p, bytes) else p.read_bytes() for p in one.parts] == [
        p if isinstance(p, bytes) else p.read_bytes() for p in other.parts
    ]


@pytest.mark.parametrize("mix", ["cutmix", "mixup", "none"])
@pytest.mark.parametrize("crop", ["resized", "padded"])
def test_check_e_replay_gives_the_teachers_input(images, teacher, crop, mix):
    """Check (e): recomputed logits of stored crop, flip and mix differ by half precision only."""
    labels = relabel(images, teacher, crop=crop, mix=mix, **SMALL)
    moved = 0.0
    for epoch in range(3):
        for views, logits in labels.batches(epoch):
            expected = direct(images, teacher, views)
            torch.testing.assert_close(logits, expected, rtol=2**-10, atol=1e-4)
            assert views.mix_kind == mix and views.crop.dtype == torch.int16
            beside = replace(views, crop=views.crop + torch.tensor([0, 1, 0, 0]).short())
            other = direct(images, teacher, beside) - expected
            moved = max(moved, (other.abs() / expected.abs().clamp(min=0.1)).max().item())
    assert moved > 100 * 2**-10  # a crop that is one pixel off would be seen


def test_every_epoch_shows_each_image_once_and_differs(images, teacher):
    labels = relabel(images, teacher, **SMALL)
    epochs = [[views for views, _ in labels.batches(epoch)] for epoch in range(3)]
    orders = [torch.cat([views.image for views in one]).tolist() for one in epochs]
    assert [sorted(order) for order in orders] == [list(range(9))] * 3
    assert [len(views) for views in epochs[0]] == [4, 4, 1]
    assert orders[0] != orders[1] and orders[1] != orders[2]
    flips = torch.cat([views.flip for one in epochs for views in one])
    assert 0 < flips.sum() < len(flips)
    assert len({views.mix_box for one in epochs for views in one}) > 3
    assert all(views.partner.max() < len(views) for one in epochs for views in one)


def test_a_seed_is_a_pure_function_and_the_global_streams_stay(images, teacher):
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    before = torch.random.get_rng_state().tolist(), np.random.get_state()[1].tolist()  # noqa: NPY002
    one = relabel(images, teacher, **SMALL)
    after = torch.random.get_rng_state().tolist(), np.random.get_state()[1].tolist()  # noqa: NPY002
    assert before == after
    assert same(one, relabel(images, teacher, **SMALL))
    assert not same(one, relabel(images, teacher, seed=1, **SMALL))
    longer = relabel(images, teacher, **{**SMALL, "epochs": 5})
    for epoch in range(3):  # an epoch does not depend on how many there are
        pairs = zip(one.batches(epoch), longer.batches(epoch), strict=True)
        for (views, logits), (other, logits_of_other) in pairs:
            assert torch.equal(views.crop, other.crop) and views.mix_box == other.mix_box
            torch.testing.assert_close(logits, logits_of_other)


def test_labels_do_not_depend_on_batch_norm_or_dropout_in_train_mode(images, teacher):
    """CV-DD and SRe2L's CIFAR scripts labelled in train mode: neighbours changed the labels."""
    left_on = make_teacher(dropout=True)
    left_on.model.train()
    before = {name: value.clone() for name, value in left_on.model.state_dict().items()}
    expected, found = relabel(images, teacher, **SMALL), relabel(images, left_on, **SMALL)
    pairs = zip(expected.batches(0), found.batches(0), strict=True)
    for (_, logits), (_, seen) in pairs:
        torch.testing.assert_close(seen, logits)
    for name, value in left_on.model.state_dict().items():
        assert torch.equal(value, before[name])
    with torch.no_grad():  # and train mode would have changed them
        x = torch.randn(4, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
        evaluated = teacher.model(x)
        trained = make_teacher().model.train()(x)
    assert not torch.allclose(evaluated, trained, rtol=0.05)


def test_several_teachers_give_their_mean_each_in_its_own_normalisation(images, teacher):
    other = make_teacher(seed=1, mean=(0.3, 0.3, 0.3), std=(0.5, 0.4, 0.3))
    labels = relabel(images, [teacher, other], crop="resized", **SMALL)
    assert labels.header.teachers == (teacher.sha256, other.sha256)
    pixels = torch.from_numpy(images.pixels).permute(0, 3, 1, 2)
    for views, logits in labels.batches(1):
        theirs = show(normalise(pixels, other.mean, other.std), views, SIZE)
        with torch.no_grad():
            second = other.model(theirs)
        expected = (direct(images, teacher, views) + second) / 2
        torch.testing.assert_close(logits, expected, rtol=2**-9, atol=5e-3)


def test_class_order_that_differs_is_refused(images):
    """RDED and others: folders in another order than the teacher's head gave 10 % accuracy."""
    with pytest.raises(ValueError, match=r"in the same order: they differ at number 0 \('owl'"):
        relabel(images, make_teacher(names=("owl", "dog", "cat")), **SMALL)
    with pytest.raises(ValueError, match=r"number 2 \(none and 'owl'\)"):
        relabel(images, make_teacher(names=("cat", "dog")), **SMALL)
    with pytest.raises(ValueError, match="takes images of 16 pixels, the views have 8"):
        relabel(images, make_teacher(size=16), **SMALL)
    with pytest.raises(ValueError, match="no teachers"):
        relabel(images, [], **SMALL)


def test_views_only_ask_the_same_teachers_again(images, teacher, tmp_path):
    labels = relabel(images, teacher, codec="params", **SMALL)
    exact = relabel(images, teacher, codec="fp16", **SMALL)
    assert labels.nbytes < exact.nbytes
    opened = SoftLabels.open(labels.write(tmp_path))
    with pytest.raises(ValueError, match=r"distill\.relabel\.attach"):
        next(opened.batches(0))
    for one in (labels, attach(opened, images, teacher, device="cpu")):
        for (views, logits), (other, stored) in zip(one.batches(2), exact.batches(2), strict=True):
            assert torch.equal(views.crop, other.crop)
            torch.testing.assert_close(logits, stored, rtol=2**-10, atol=1e-4)
            assert not logits.is_inference()  # a student's loss may keep them
    with pytest.raises(ValueError, match="not the teachers that the labels were made with"):
        attach(opened, images, make_teacher(seed=1), device="cpu")
    with pytest.raises(ValueError, match="other images"):
        attach(opened, distilled_images(seed=1), teacher, device="cpu")


NAMES = tuple(f"class {number}" for number in range(120))


@pytest.fixture(scope="module")
def wide():
    """Enough classes for every codec to matter."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE**2, len(NAMES)))
    weight = np.random.default_rng(0).normal(size=(len(NAMES), 3 * SIZE**2)) / 5
    model[1].weight.data = torch.from_numpy(weight).float()
    nn.init.zeros_(model[1].bias)
    return (
        distilled_images(1, names=NAMES),
        Teacher(model, "linear", SIZE, NAMES, MEAN, STD, 0.9, 1),
    )


MANY = {"epochs": 12, "batch_size": 50, "device": "cpu"}


def test_a_budget_takes_the_richest_that_fits(wide):
    """In the documented order, against writing each of them whole."""
    images, teacher = wide
    whole = [
        relabel(images, teacher, codec="fp16", **MANY),
        relabel(images, teacher, codec="uint8", **MANY),
        *(relabel(images, teacher, codec="top-k", top_k=k, **MANY) for k in (20, 10, 5)),
    ]
    sizes = [labels.nbytes for labels in whole]
    assert sizes == sorted(sizes, reverse=True)
    for budget in (10**9, sizes[0], sizes[0] - 1, sizes[1], sizes[2], sizes[3] + 1, sizes[4]):
        labels = relabel(images, teacher, label_bytes=budget, **MANY)
        first = next(place for place, size in enumerate(sizes) if size <= budget)
        assert labels.nbytes <= budget and labels.stored_epochs == labels.epochs == 12
        assert (labels.codec.name, labels.codec.k) == (
            whole[first].codec.name,
            whole[first].codec.k,
        )
        assert same(labels, whole[first])


def test_less_than_that_stores_fewer_epochs_and_then_views_only(wide):
    images, teacher = wide
    smallest = relabel(images, teacher, codec="top-k", top_k=5, **MANY)
    one = relabel(images, teacher, codec="top-k", top_k=5, **{**MANY, "epochs": 1})
    middle = (smallest.nbytes + one.nbytes) // 2
    labels = relabel(images, teacher, label_bytes=middle, **MANY)
    assert (labels.codec.name, labels.codec.k) == ("top-k", 5)
    assert 1 < labels.stored_epochs < 12 == labels.epochs and labels.nbytes <= middle
    longer = smallest.truncated(labels.stored_epochs + 1)
    assert longer.nbytes > middle and same(smallest.truncated(labels.stored_epochs), labels)

    stored = labels.stored_epochs  # a label pool: used again in turn
    for epoch in (0, 1):
        pairs = zip(labels.batches(epoch), labels.batches(epoch + 2 * stored), strict=True)
        for (views, logits), (again, logits_again) in pairs:
            assert torch.equal(views.crop, again.crop) and torch.equal(logits, logits_again)

    views_only = relabel(images, teacher, codec="params", **{**MANY, "epochs": 1})
    labels = relabel(images, teacher, label_bytes=one.nbytes - 200, **MANY)
    assert labels.codec.name == "params" and labels.nbytes <= one.nbytes - 200
    assert labels.stored_epochs >= 1 and views_only.nbytes < one.nbytes - 200
    for codec in ("auto", "params"):
        with pytest.raises(BudgetError, match=r"label_bytes is 900, and one epoch of 120 views"):
            relabel(images, teacher, codec=codec, label_bytes=900, **MANY)
    with pytest.raises(BudgetError, match="as fp16 takes"):
        relabel(images, teacher, codec="fp16", label_bytes=one.nbytes, **MANY)


@pytest.mark.parametrize("codec", ["auto", "fp16"])
def test_a_budget_is_never_exceeded_over_several_files(wide, monkeypatch, codec):
    images, teacher = wide
    monkeypatch.setattr("distill.label_parts._MAX_ROWS", 130)  # two batches a file
    free = relabel(images, teacher, codec=codec, **MANY)
    assert len(free.parts) == 18
    for share in (1.0, 0.7, 0.45, 0.2):
        budget = int(free.nbytes * share)
        labels = relabel(images, teacher, codec=codec, label_bytes=budget, **MANY)
        assert labels.nbytes <= budget
        if codec == "fp16":
            assert labels.stored_epochs >= int(11.5 * share)
        replayed = list(labels.batches(labels.stored_epochs - 1))
        assert sum(len(views) for views, _ in replayed) == 120


@pytest.mark.parametrize("budget", [None, 30_000])
def test_stopped_and_continued_is_never_stopped(wide, tmp_path, monkeypatch, budget):
    """Check (k) for labels: the files are the same, and what is there is not made again."""
    images, teacher = wide
    monkeypatch.setattr("distill.label_parts._MAX_ROWS", 130)
    options = {"codec": "top-k", "top_k": 5, "label_bytes": budget, **MANY}
    whole = relabel(images, teacher, folder=tmp_path / "whole", **options)
    assert same(whole, relabel(images, teacher, **options))
    real, calls = relabelling.Ensemble.logits, []

    def dies(self, batches):
        calls.append(len(batches))
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(self, batches)

    monkeypatch.setattr(relabelling.Ensemble, "logits", dies)
    with pytest.raises(KeyboardInterrupt):
        relabel(images, teacher, folder=tmp_path / "cut", **options)
    with pytest.raises(ShardError, match="not written to their end"):
        open_stored_labels(tmp_path / "cut")
    continued = relabel(images, teacher, folder=tmp_path / "cut", **options)
    assert same(continued, whole)
    made = len(calls)
    assert same(relabel(images, teacher, folder=tmp_path / "cut", **options), whole)
    assert len(calls) == made <= len(whole.parts) + 4
    with pytest.raises(FingerprintError, match="seed"):
        relabel(images, teacher, folder=tmp_path / "cut", seed=9, **options)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"epochs": 0}, "epochs is 0"),
        ({"epochs": 40_000}, "1 to 32767"),
        ({"batch_size": 0}, "batch_size 0"),
        ({"crop": "random"}, "crop is one of"),
        ({"mix": "cut"}, "mix one of"),
        ({"scale": (0.0, 1.0)}, "scale is"),
        ({"scale": (0.5, 0.2)}, "scale is"),
        ({"mix_alpha": 0.0}, "mix_alpha is"),
        ({"pad": -1}, "pad is"),
        ({"codec": "gzip"}, "use auto or one of"),
        ({"codec": "top-k", "top_k": 4}, "k must be between 1 and 3"),
        ({"label_bytes": 0}, "at least 1, or None"),
    ],
)
def test_parameters_that_make_no_sense(images, teacher, wrong, message):
    with pytest.raises(ValueError, match=message):
        relabel(images, teacher, **{**SMALL, **wrong})


def test_the_plain_view_is_among_what_can_be_drawn(images, teacher):
    labels = relabel(images, teacher, crop="none", flip=False, mix="none", **SMALL)
    for views, logits in labels.batches(0):
        plain = plain_views(views.image, SIZE)
        assert torch.equal(views.crop, plain.crop) and not views.flip.any()
        torch.testing.assert_close(logits, direct(images, teacher, plain), rtol=1e-3, atol=1e-4)


def real_images(n: int = 20, size: int = 12) -> ImageSet:
    pixels = np.random.default_rng(3).integers(0, 256, (n, size, size, 3)).astype(np.uint8)
    return ImageSet.of(pixels, np.arange(n) % CLASSES, class_names=["cat", "dog", "owl"])


def test_stored_labels_of_real_images_in_smaller_views(teacher, tmp_path):
    """FKD and dataset reinforcement: NS views of every image with their top-k."""
    images = real_images()
    draw = ViewDraw(epochs=4, batch_size=6, scale=(0.25, 1.0), mix="none")
    labels = store_labels(
        images, teacher, draw, folder=tmp_path, view_size=SIZE, codec="top-k", top_k=2, device="cpu"
    )
    opened = open_stored_labels(tmp_path)
    assert same(labels, opened) and opened.header.view_size == SIZE
    batches = list(stored_batches(images, opened, epochs=[3]))
    assert [len(one.x) for one in batches] == [6, 6, 6, 2]
    for one, (views, logits) in zip(batches, opened.batches(3), strict=True):
        x = normalise(torch.from_numpy(images.images).permute(0, 3, 1, 2), MEAN, STD)
        torch.testing.assert_close(one.x, show(x, views, SIZE), rtol=1e-5, atol=1e-5)
        with torch.no_grad():
            p = teacher.model(one.x).softmax(1)
        torch.testing.assert_close(logits.softmax(1), p, rtol=6e-3, atol=1e-6)
        assert torch.equal(one.targets.argmax(1), torch.from_numpy(images.labels)[views.image])
    shuffled = images.subset(np.random.default_rng(0).permutation(20))
    with pytest.raises(ValueError, match="20 other images"):
        stored_batches(shuffled, opened)
    with pytest.raises(ValueError, match="no teachers"):
        store_labels(images, [], draw)


def test_labels_of_other_images_or_classes_are_refused(images, teacher):
    labels = relabel(images, teacher, **SMALL)
    for other, message in (
        (distilled_images(seed=1), "9 other images"),
        (distilled_images(4), "9 other images"),
        (distilled_images(names=("dog", "cat", "owl")), "another order"),
    ):
        with pytest.raises(ValueError, match=message):
            ReplayedBatches(Source.distilled(other), labels)
