import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import one_hot

from curate.errors import FingerprintError
from distill import students
from distill.distilled_images import DistilledImages
from distill.image_set import ImageSet
from distill.networks import ConvNet, build
from distill.relabel import relabel
from distill.replay import Batch, ReplayedBatches, Source
from distill.squeeze import accuracy
from distill.student_batches import DrawnBatches, HardBatches
from distill.students import StudentConfig, student_loss, train_student
from distill.teacher import Teacher
from distill.view_draw import ViewDraw
from distill.views import mixed_targets
from tests.distill.test_relabel import distilled_images, make_teacher
from tests.distill.test_squeeze import stripes

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    """Students of few channels, so that tests are quick."""

    def narrow_build(name, *, classes, size, seed):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            net = ConvNet(3, classes=classes, size=size, width=16)
            return nn.Sequential(net, nn.Dropout(0.3)) if name == "dropout" else net

    monkeypatch.setattr(students, "build", narrow_build)


def as_distilled(images: ImageSet, mean=None, std=None) -> DistilledImages:
    """Real images in the place of distilled ones; classes must alternate."""
    n, (own_mean, own_std) = len(images), images.moments()
    unknown = np.full(n, np.nan, np.float32)
    return DistilledImages(
        images.images,
        images.labels,
        (np.arange(n) // images.classes).astype(np.int32),
        np.full(n, "noise"),
        np.full(n, ""),
        unknown,
        unknown,
        unknown,
        images.class_names,
        mean or own_mean,
        std or own_std,
    )


def recorded(n: int = 9, *, batch_size: int | None = None, epochs: int = 3) -> ReplayedBatches:
    images = distilled_images(n // 3)
    labels = relabel(images, make_teacher(), epochs=epochs, batch_size=4, device="cpu")
    return ReplayedBatches(Source.distilled(images), labels, batch_size=batch_size)


def some_batch(seed: int = 0) -> tuple[torch.Tensor, Batch]:
    generator = torch.Generator().manual_seed(seed)
    z, t = (4 * torch.randn(5, 3, generator=generator) for _ in range(2))
    targets = torch.rand(5, 3, generator=generator)
    return z, Batch(torch.zeros(5), t, targets / targets.sum(1, keepdim=True))


def train(batches, *, labels="soft", network="convnet3", seed=0, size=8, **config) -> Teacher:
    config = StudentConfig(**{"epochs": 3, **config})
    return train_student(
        batches, network, config, labels=labels, size=size, seed=seed, device="cpu"
    )


@pytest.mark.parametrize("temperature", [1.0, 4.0, 20.0])
def test_the_kl_loss_is_the_formula_without_a_factor_of_t_squared(temperature):
    z, batch = some_batch()
    config = StudentConfig(epochs=1, temperature=temperature)
    p = torch.exp(batch.logits / temperature)
    p = p / p.sum(1, keepdim=True)
    q = torch.exp(z / temperature)
    q = q / q.sum(1, keepdim=True)
    expected = (p * (p.log() - q.log())).sum(1).mean()
    found = student_loss(z, batch, "soft", config)
    torch.testing.assert_close(found, expected)
    official = nn.KLDivLoss(reduction="batchmean")(q.log(), p)
    torch.testing.assert_close(found, official)


def test_squared_error_with_cross_entropy_on_labels_mixed_as_the_pixels_are():
    """G-VBSM takes the unmixed hard label of a mixed image."""
    z, batch = some_batch()
    config = StudentConfig(epochs=1, loss="mse+ce", ce_weight=0.1)
    log_q = z - torch.logsumexp(z, dim=1, keepdim=True)
    square = ((z - batch.logits) ** 2).sum() / z.numel()
    right = square - 0.1 * (batch.targets * log_q).sum(1).mean()
    unmixed = one_hot(batch.targets.argmax(1), 3).float()
    wrong = square - 0.1 * (unmixed * log_q).sum(1).mean()
    found = student_loss(z, batch, "soft", config)
    torch.testing.assert_close(found, right)
    assert abs(float(found - wrong)) > 1e-3


def test_hard_labels_are_plain_cross_entropy_whatever_the_soft_loss():
    z, batch = some_batch()
    log_q = z - torch.logsumexp(z, dim=1, keepdim=True)
    expected = -(batch.targets * log_q).sum(1).mean()
    for loss in ("kl", "mse+ce"):
        config = StudentConfig(epochs=1, loss=loss, temperature=7.0)
        torch.testing.assert_close(student_loss(z, batch, "hard", config), expected)


def test_soft_labels_that_are_hard_train_as_hard_ones():
    """With T = 1 and near-certain logits the two losses have the same gradient."""
    z, batch = some_batch()
    sure = one_hot(torch.tensor([0, 2, 1, 1, 0]), 3).float()
    batch = batch._replace(logits=200 * sure, targets=sure)
    config, gradients = StudentConfig(epochs=1, temperature=1.0), []
    for labels in ("soft", "hard"):
        leaf = z.clone().requires_grad_()
        student_loss(leaf, batch, labels, config).backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients)


def test_schedule_values(monkeypatch):
    smoothing = StudentConfig(epochs=1, lr=0.4)
    cosine = StudentConfig(epochs=1, lr=0.4, schedule="cosine")
    half = 0.4 * (1 + 0.5**0.5) / 2
    assert [smoothing.rate(i, 10) for i in (0, 5, 10)] == pytest.approx([0.4, half, 0.2])
    assert [cosine.rate(i, 10) for i in (0, 5, 10)] == pytest.approx([0.4, 0.2, 0.0])
    used, step = [], torch.optim.AdamW.step

    def seen(self, *args, **kwargs):
        used.append(self.param_groups[0]["lr"])
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", seen)
    train(recorded(), lr=0.4, epochs=4)  # 9 images in batches of 4: two steps and a single
    assert used == pytest.approx([smoothing.rate(i, 8) for i in range(8)])


def test_rded_bug_each_batch_goes_through_the_student_once(monkeypatch):
    """RDED runs its student in train mode a second time and so updates batch norm twice."""
    seen, forward = [], ConvNet.forward

    def recording(self, x):
        seen.append((self.training, x.clone()))
        return forward(self, x)

    batches = recorded()
    expected = [batch.x for e in range(3) for batch in batches.epoch(e) if len(batch.x) > 1]
    monkeypatch.setattr(ConvNet, "forward", recording)
    student = train(batches)
    assert len(seen) == len(expected) == 6 and all(training for training, _ in seen)
    assert all(torch.equal(x, y) for (_, x), y in zip(seen, expected, strict=True))
    norms = [m for m in student.model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 3 and all(int(m.num_batches_tracked) == 6 for m in norms)
    assert not student.model.training


def test_a_student_is_a_function_of_its_seed_and_the_global_streams_stay():
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    random.seed(5)
    before = torch.random.get_rng_state().tolist()
    state = (random.getstate(), np.random.get_state()[1].tolist())  # noqa: NPY002
    first = train(recorded(), network="dropout")
    assert torch.random.get_rng_state().tolist() == before
    after = (random.getstate(), np.random.get_state()[1].tolist())  # noqa: NPY002
    assert after == state
    torch.rand(3)
    assert train(recorded(), network="dropout").sha256 == first.sha256
    assert train(recorded(), network="dropout", seed=1).sha256 != first.sha256


def test_dropout_is_on_while_training(monkeypatch):
    """Otherwise the test above would show nothing about dropout's stream."""
    with monkeypatch.context() as off:
        off.setattr(nn.Dropout, "forward", lambda self, x: x)
        without = train(recorded(), network="dropout").sha256
    assert without != train(recorded(), network="dropout").sha256


def test_hard_and_soft_labels_start_from_the_same_weights_and_end_apart():
    soft, hard = train(recorded()), train(recorded(), labels="hard")
    assert soft.sha256 != hard.sha256
    starts = [train(recorded(), labels=kind, lr=1e-30).model for kind in ("soft", "hard")]
    for one, other in zip(*(model.parameters() for model in starts), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-20)


def test_a_student_learns_from_either_label():
    images = stripes(32)
    shown = as_distilled(images)
    teacher = Teacher(
        train(
            DrawnBatches(
                Source.distilled(shown),
                ViewDraw(epochs=40, batch_size=8, crop="padded", mix="none"),
                CPU,
            ),
            labels="hard",
            epochs=12,
            lr=0.01,
        ).model,
        "convnet3",
        8,
        images.class_names,
        shown.mean,
        shown.std,
        float("nan"),
        12,
    )
    test = stripes(64, seed=1)
    assert accuracy(teacher, test) > 0.9
    labels = relabel(
        shown, teacher, epochs=12, batch_size=8, crop="padded", mix="none", device="cpu"
    )
    for loss, temperature in (("kl", 4.0), ("mse+ce", 1.0)):
        student = train(
            ReplayedBatches(Source.distilled(shown), labels),
            epochs=12,
            lr=0.01,
            loss=loss,
            temperature=temperature,
            seed=3,
        )
        assert accuracy(student, test) > 0.9


def test_ema_is_the_moving_average_by_hand():
    model = nn.BatchNorm1d(2)
    average = students._Average(model, 0.5)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    for step in range(12):
        with torch.no_grad():
            for value in model.state_dict().values():
                value.add_(step + 1)
        average.add(model, step)
        decay = min(0.5, (1 + step) / (10 + step))
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                expected[name] = decay * expected[name] + (1 - decay) * value
            else:
                expected[name] = value.clone()
    for name, value in average.model.state_dict().items():
        torch.testing.assert_close(value, expected[name])


def test_ema_is_evaluated_in_place_of_the_weights_and_zero_is_none():
    batches = recorded()
    without, zero, half = (train(batches, ema=ema) for ema in (None, 0.0, 0.5))
    assert without.sha256 == zero.sha256 != half.sha256
    assert not any(p.requires_grad for p in half.model.parameters())


def test_bf16_is_another_precision_of_the_same_training():
    batches = recorded()
    full, half = train(batches, precision="fp32"), train(batches, precision="bf16")
    assert train(batches).sha256 == full.sha256 != half.sha256
    one, other = (s.model.state_dict()["head.weight"] for s in (full, half))
    assert one.dtype == other.dtype == torch.float32
    assert float((one - other).abs().max()) < 0.02


def test_other_batch_sizes_deal_out_the_same_views():
    small, large = recorded(batch_size=3), recorded(batch_size=9)
    one = torch.cat([batch.x for batch in small.epoch(1)])
    assert torch.equal(one, torch.cat([batch.x for batch in large.epoch(1)]))
    assert train(small).sha256 != train(large).sha256


def test_a_network_of_timm_trains(monkeypatch):
    monkeypatch.setattr(students, "build", build)
    batches = recorded(epochs=1)
    student = train(batches, network="resnet18", epochs=1)
    untrained = build("resnet18", classes=3, size=8)
    assert student.network == "resnet18" and student.classes == 3
    assert int(student.model.bn1.num_batches_tracked) == 2
    assert student.model.conv1.weight.shape == untrained.conv1.weight.shape == (64, 3, 3, 3)


def test_batches_of_a_single_image_are_refused():
    with pytest.raises(ValueError, match="at least two images"):
        train(recorded(batch_size=1))


def test_hard_batches_show_other_images_in_the_same_views_without_logits():
    labels = relabel(
        distilled_images(), make_teacher(), epochs=2, batch_size=4, codec="params", device="cpu"
    )
    labels = replace(labels, recompute=None)  # no teacher at hand
    other = Source.distilled(distilled_images(seed=7))
    hard = HardBatches(other, labels, batch_size=4, device=CPU)
    again = relabel(distilled_images(seed=7), make_teacher(), epochs=2, batch_size=4, device="cpu")
    pairs = zip(hard.epoch(1), ReplayedBatches(other, again).epoch(1), strict=True)
    for found, expected in pairs:
        assert torch.equal(found.x, expected.x) and torch.equal(found.targets, expected.targets)
        assert found.logits.shape == (len(found.x), 0)
    with pytest.raises(RuntimeError):
        train(hard, labels="soft")


def test_drawn_batches_are_a_function_of_the_epoch():
    source = Source.distilled(distilled_images())
    draw = ViewDraw(epochs=5, batch_size=4)
    batches = DrawnBatches(source, draw, CPU)
    first, again = list(batches.epoch(2)), list(batches.epoch(2))
    assert [len(batch.x) for batch in first] == [4, 4, 1]
    assert all(torch.equal(a.x, b.x) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0].x, next(batches.epoch(3)).x)
    views = draw.views(draw.order(9, 2)[:4], 2, 0, source=8, size=8)
    targets = mixed_targets(torch.from_numpy(source.labels), views, 3)
    assert torch.equal(first[0].targets, targets)


@pytest.mark.parametrize(
    "wrong",
    [
        {"epochs": 0},
        {"lr": 0.0},
        {"temperature": 0.0},
        {"weight_decay": -1.0},
        {"ce_weight": -1.0},
        {"ema": 1.0},
        {"schedule": "step"},
        {"loss": "mse"},
        {"precision": "fp16"},
    ],
)
def test_values_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        StudentConfig(**{"epochs": 1, **wrong})


class KilledError(Exception):
    pass


@pytest.mark.parametrize("after", [1, 2])
@pytest.mark.parametrize("ema", [None, 0.9])
def test_check_k_stopped_and_continued_is_never_stopped(tmp_path, monkeypatch, after, ema):
    """Dropout's stream, the moving average and Adam go on where they stood."""
    path, options = tmp_path / "student.pt", {"network": "dropout", "epochs": 3, "ema": ema}
    config = StudentConfig(epochs=3, ema=ema)

    def go(**others):
        return train_student(
            recorded(), "dropout", config, labels="soft", size=8, device="cpu", **others
        )

    wanted = train(recorded(), **options).sha256
    monkeypatch.setattr(students, "_CHECKPOINT_SECONDS", 0.0)
    original, saves = students._Training._save, []

    def dies(self):
        original(self)
        saves.append(1)
        if len(saves) == after:
            raise KilledError

    before = torch.get_rng_state()
    with monkeypatch.context() as patch:
        patch.setattr(students._Training, "_save", dies)
        with pytest.raises(KilledError):
            go(checkpoint=path)
    assert go(checkpoint=path).sha256 == wanted
    assert torch.equal(torch.get_rng_state(), before)
    monkeypatch.setattr(students._Training, "_descend", None)  # a finished one takes no step
    assert go(checkpoint=path).sha256 == wanted
    with pytest.raises(FingerprintError, match="of another student"):
        go(checkpoint=path, seed=1)
