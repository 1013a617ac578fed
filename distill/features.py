"""What a teacher's classifier reads: its features of images."""

from __future__ import annotations

from copy import deepcopy

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from distill.image_set import ImageSet
from distill.teacher import Teacher

_BATCH = 500


def classifier(model: nn.Module, classes: int) -> nn.Linear:
    """Return the last linear layer of a network.

    Raises
    ------
    ValueError
        If it does not give one number for each class.
    """
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if not layers or layers[-1].out_features != classes:
        raise ValueError(
            f"{type(model).__name__} does not end in a linear layer of {classes} outputs, whose "
            "inputs are its features: use another network, or feature_residual=0"
        )
    return layers[-1]


@torch.no_grad()
def source_features(
    teacher: Teacher, images: ImageSet, sources: NDArray[np.int64], device: torch.device
) -> torch.Tensor:
    """Return the mean features of the real images that each synthetic image began as.

    Squeezing several images into one, as in CIM (2026), aims at what the teacher sees in all of
    them. Here the features are those that its classifier reads, of whole images without
    augmentation.

    Parameters
    ----------
    teacher : Teacher
    images : ImageSet
    sources : (n, k) int64
        Rows of `images`.
    device : torch.device

    Returns
    -------
    (n, D) float32
    """
    model, seen = deepcopy(teacher.model).to(device), []
    classifier(model, teacher.classes).register_forward_pre_hook(
        lambda _, given: seen.append(given[0].flatten(1).float())
    )
    rows, place = np.unique(sources, return_inverse=True)
    for start in range(0, len(rows), _BATCH):
        model(teacher.normalise(images.batch(rows[start : start + _BATCH], device)))
    found = torch.cat(seen)[torch.from_numpy(place.reshape(sources.shape)).to(device)]
    return found.mean(dim=1)
