import numpy as np
import pytest
import torch

from curate.errors import FingerprintError, ModelError
from distill import squeeze as squeezing
from distill.image_set import ImageSet
from distill.networks import build
from distill.squeeze import accuracy, squeeze
from distill.teacher import Teacher, normalise, pixel_range, pixels_of


def stripes(n: int = 24, size: int = 8, classes: int = 2, seed: int = 0) -> ImageSet:
    """Classes that differ in the direction and colour of their stripes."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % classes
    images = rng.integers(0, 90, (n, size, size, 3)).astype(np.uint8)
    for row, label in enumerate(labels):
        lines = images[row, ::2] if label % 2 == 0 else images[row, :, ::2]
        lines[..., label % 3] += 150
    return ImageSet.of(images, labels)


SMALL = {"network": "convnet3", "epochs": 4, "batch_size": 8, "device": "cpu"}


def test_a_teacher_learns_what_can_be_learnt():
    teacher = squeeze(stripes(64), test=stripes(32, seed=1), **{**SMALL, "epochs": 8})
    assert teacher.accuracy > 0.9
    assert teacher.accuracy == accuracy(teacher, stripes(32, seed=1))
    assert not any(p.requires_grad for p in teacher.model.parameters())
    assert not teacher.model.training


def test_stopped_and_continued_is_never_stopped(tmp_path, monkeypatch):
    whole = squeeze(stripes(), **SMALL)
    path = tmp_path / "squeeze.pt"
    real = squeezing._Trainer.epoch

    def dies(self, epoch):
        if epoch == 2:
            raise KeyboardInterrupt
        real(self, epoch)

    monkeypatch.setattr(squeezing._Trainer, "epoch", dies)
    with pytest.raises(KeyboardInterrupt):
        squeeze(stripes(), checkpoint=path, **SMALL)
    monkeypatch.setattr(squeezing._Trainer, "epoch", real)
    assert path.exists()
    continued = squeeze(stripes(), checkpoint=path, **SMALL)
    assert continued.sha256 == whole.sha256
    assert not path.exists()


def test_a_checkpoint_of_another_training_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "squeeze.pt"
    monkeypatch.setattr("pathlib.Path.unlink", lambda *_, **__: None)
    squeeze(stripes(), checkpoint=path, **SMALL)
    with pytest.raises(FingerprintError, match="another training"):
        squeeze(stripes(), checkpoint=path, **{**SMALL, "epochs": 5})


def test_the_same_seed_gives_the_same_weights_and_the_global_streams_stay():
    torch.manual_seed(3)
    before = torch.random.get_rng_state().tolist()
    first = squeeze(stripes(), **SMALL)
    assert torch.random.get_rng_state().tolist() == before
    assert first.sha256 == squeeze(stripes(), **SMALL).sha256
    assert first.sha256 != squeeze(stripes(), seed=1, **SMALL).sha256


def test_one_class_and_other_classes_are_refused():
    images = stripes(classes=2)
    with pytest.raises(ValueError, match="only one class"):
        squeeze(ImageSet.of(images.images, np.zeros(24, int)), **SMALL)
    swapped = ImageSet.of(images.images, images.labels, class_names=["1", "0"])
    with pytest.raises(ValueError, match=r"classes \('1', '0'\) are not"):
        squeeze(images, test=swapped, **SMALL)
    teacher = squeeze(images, **{**SMALL, "epochs": 1})
    assert np.isnan(teacher.accuracy)
    with pytest.raises(ValueError, match="in the same order"):
        accuracy(teacher, swapped)


@pytest.mark.parametrize(
    "wrong", [{"epochs": 0}, {"batch_size": 1}, {"lr": 0.0}, {"warmup": 1.0}, {"network": "resnet"}]
)
def test_parameters_that_make_no_sense(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        squeeze(stripes(), **{**SMALL, **wrong})


def test_a_last_batch_of_one_image_is_no_batch():
    squeeze(stripes(17), **{**SMALL, "epochs": 1})  # 8 + 8 + 1


def test_a_teacher_file_holds_everything(tmp_path):
    teacher = squeeze(stripes(), test=stripes(seed=1), **SMALL)
    teacher.save(tmp_path / "teacher.safetensors")
    again = Teacher.load(tmp_path / "teacher.safetensors")
    assert again.facts() == teacher.facts() and again.class_names == teacher.class_names
    x = teacher.normalise(stripes().batch(slice(0, 4)))
    torch.testing.assert_close(again.model(x), teacher.model(x), rtol=0, atol=0)


def test_a_file_that_is_no_teacher_is_refused(tmp_path):
    path = tmp_path / "teacher.safetensors"
    path.write_bytes(b"\x80\x04pickle")
    with pytest.raises(ModelError, match="not a safetensors file"):
        Teacher.load(path)
    with pytest.raises(ModelError, match="not a safetensors file"):
        Teacher.load(tmp_path / "missing.safetensors")
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(ModelError, match="not a teacher"):
        Teacher.load(path)


@pytest.mark.parametrize("name", ["convnet3", "convnet4", "convnet3-in", "resnet18"])
def test_networks_are_a_function_of_the_seed(name):
    one, same, other = (build(name, classes=3, size=16, seed=seed) for seed in (0, 0, 1))
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    for model in (one, same, other):
        model.eval()
    torch.testing.assert_close(one(x), same(x), rtol=0, atol=0)
    assert not torch.allclose(one(x), other(x))
    assert one(x).shape == (2, 3)


def test_the_resnet_of_small_images_keeps_the_resolution():
    small, large = (build("resnet18", classes=3, size=size) for size in (32, 128))
    assert small.conv1.stride == (1, 1) and isinstance(small.maxpool, torch.nn.Identity)
    assert large.conv1.stride == (2, 2)
    assert sum(p.numel() for p in small.parameters()) == 11_173_962 - 513 * 10 + 513 * 3


def test_unknown_networks_and_small_images_are_refused():
    with pytest.raises(ValueError, match="timm model, for example"):
        build("resnet1", classes=2, size=32)
    with pytest.raises(ValueError, match="too small"):
        build("convnet4", classes=2, size=8)


def test_pixels_survive_normalisation():
    """SRe2L truncated pixels when it wrote them; ours round."""
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(1, 3, 16, 16)
    mean, std = (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)
    torch.testing.assert_close(pixels_of(normalise(pixels, mean, std), mean, std), pixels)
    low, high = pixel_range(mean, std)
    assert torch.equal(normalise(pixels, mean, std).amin((0, 2, 3)), low.flatten())
    torch.testing.assert_close(normalise(pixels, mean, std).amax((0, 2, 3)), high.flatten())


def test_moments_are_those_of_the_pixels():
    images = stripes()
    mean, std = images.moments()
    np.testing.assert_allclose(mean, (images.images / 255).mean((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(std, (images.images / 255).std((0, 1, 2)), rtol=1e-9)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"images": np.zeros((2, 8, 9, 3), np.uint8)}, "size, size, 3"),
        ({"images": np.zeros((2, 8, 8, 1), np.uint8)}, "size, size, 3"),
        ({"images": np.zeros((2, 8, 8, 3), np.float32)}, "uint8"),
        ({"labels": [0]}, "one per image"),
        ({"labels": [0, 2]}, "class '1' has no images"),
        ({"labels": [0, -1]}, "labels must be"),
        ({"labels": [0, 1], "class_names": ["a", "b", "c"]}, "labels must be|has no images"),
    ],
)
def test_image_sets_that_contradict_themselves(parts, message):
    good = {"images": np.zeros((2, 8, 8, 3), np.uint8), "labels": [0, 1]}
    made = {**good, **parts}
    names = made.pop("class_names", None)
    with pytest.raises(ValueError, match=message):
        ImageSet.of(made["images"], made["labels"], class_names=names)
