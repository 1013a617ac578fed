"""Bugs of published code (section 7 of the notes) that no other test covers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from distill import squeeze as squeeze_module
from distill.groups import merged, plan
from distill.image_set import ImageSet
from distill.relabel import Ensemble, relabel
from distill.replay import Source
from distill.squeeze import squeeze
from distill.views import plain_views
from tests.distill.recover_toy import toy_teacher
from tests.distill.test_recover import SMALL, run
from tests.distill.test_relabel import distilled_images, make_teacher
from tests.distill.test_squeeze import stripes


def test_edc_labels_are_made_without_a_graph():
    """`with torch.no_grad() and autocast(...)` keeps the second alone."""
    teacher = make_teacher()
    teacher.model.requires_grad_(True)
    images = distilled_images()
    ensemble = Ensemble(Source.distilled(images), teacher, images.size, torch.device("cpu"))
    logits = ensemble.logits([plain_views(torch.arange(3), images.size)])
    assert not logits.requires_grad and logits.grad_fn is None


def test_g_vbsm_and_edc_the_teacher_is_that_of_the_last_epoch(monkeypatch):
    """They save every tenth epoch, or the first: a teacher whose rate has not come down."""
    trainers, rates = [], []
    original = squeeze_module._Trainer.epoch

    def watch(self, epoch):
        original(self, epoch)
        trainers.append(self)
        rates.append(self.optimizer.param_groups[0]["lr"])

    monkeypatch.setattr(squeeze_module._Trainer, "epoch", watch)
    teacher = squeeze(stripes(16), network="convnet3", epochs=3, batch_size=8, device="cpu")
    last = trainers[-1].model.state_dict()
    assert len(trainers) == 3 and rates[-1] < 1e-6 < rates[0]
    assert all(torch.equal(v, last[name]) for name, v in teacher.model.state_dict().items())


def test_sre2l_and_dwa_the_normalisation_is_that_of_the_images_throughout():
    """CIFAR-100 with CIFAR-10's numbers; deviations that differ between two stages."""
    bright = stripes(16)
    bright = ImageSet.of(bright.images // 2 + 100, bright.labels, class_names=bright.class_names)
    teacher = squeeze(bright, network="convnet3", epochs=1, batch_size=8, device="cpu")
    assert (teacher.mean, teacher.std) == bright.moments()
    assert np.allclose(teacher.mean, (bright.images / 255).mean((0, 1, 2)))
    found = run()
    assert (found.mean, found.std) == (toy_teacher().mean, toy_teacher().std)
    labels = relabel(found, toy_teacher(), epochs=1, batch_size=6, device="cpu")
    assert (labels.header.mean, labels.header.std) == (found.mean, found.std)


def test_rded_a_factor_of_one_still_crops():
    """It makes the least area of a student's crop 1 / factor: with factor 1 there is no crop."""
    found = run(replace(SMALL, begin="patch", patch_factor=1, iterations=0))
    labels = relabel(found, toy_teacher(), epochs=4, batch_size=6, device="cpu")
    areas = torch.cat(
        [views.crop[:, 2:].prod(1) for e in range(4) for views, _ in labels.batches(e)]
    )
    assert (areas < 32).float().mean() > 0.3


def test_sre2l_the_image_norm_of_a_ragged_batch():
    """Groups of two images and of one; each has the loss that it has alone."""
    recipe = replace(SMALL, batch_images=2, image_norm=0.5, total_variation=0.01)
    sizes = [len(group.rows) for group in plan(recipe, ipc=2, classes=3)]
    assert sorted(sizes) == [1, 1, 2, 2]
    assert len(merged(plan(recipe, ipc=2, classes=3), most_images=100)) == 2
    apart, together = (run(recipe, merge=m) for m in (1, 100))
    assert np.array_equal(apart.pixels, together.pixels)
    assert not np.array_equal(apart.pixels, run(replace(recipe, image_norm=0.0)).pixels)
