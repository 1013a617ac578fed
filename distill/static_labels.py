"""One soft label for each image, of the whole image: the least that can be stored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from curate.runtime import resolve_device
from distill.distilled_images import DistilledImages
from distill.relabel import Ensemble
from distill.replay import Source
from distill.teacher import Teacher
from distill.views import plain_views

_BATCH = 256
_HALF_MIN = float(np.finfo(np.float16).min)


def static_labels(
    images: Source | DistilledImages,
    teachers: Sequence[Teacher] | Teacher,
    *,
    device: str | torch.device = "auto",
) -> NDArray[np.float16]:
    """Return the log-probabilities that the teachers give whole images, (n, C) float16.

    Several teachers give the softmax of their mean logits, as in `distill.relabel`.

    Parameters
    ----------
    images : DistilledImages or Source
        ``Source.real`` makes a source of real images.
    teachers : Teacher or sequence of Teacher
    device : str or torch.device

    Raises
    ------
    ValueError
        If the teachers know other classes or another image size.
    """
    source = images if isinstance(images, Source) else Source.distilled(images)
    ensemble = Ensemble(source, teachers, source.size, resolve_device(device))
    found = []
    for rows in torch.split(torch.arange(len(source)), _BATCH):
        logits = ensemble.logits([plain_views(rows, source.size)])
        found.append(logits.log_softmax(dim=1).clamp(min=_HALF_MIN).half().cpu())
    return torch.cat(found).numpy()


def with_static_labels(
    images: DistilledImages,
    teachers: Sequence[Teacher] | Teacher,
    *,
    device: str | torch.device = "auto",
) -> DistilledImages:
    """Return the images with a static soft label each, the column ``soft_label`` on disk."""
    return replace(images, soft_label=static_labels(images, teachers, device=device))
