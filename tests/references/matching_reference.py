"""Distribution matching written plainly, image by image and class by class, in float64.

Zhao and Bilen 2023 (DM), Sajedi et al. 2023 (DataDAM), Zhao and Bilen 2021 (DSA). What is random
comes in from outside: the networks, the real batches and what each class is shown as.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import nn

View = Callable[[torch.Tensor], torch.Tensor]


def embedding_and_maps(
    layers: nn.Sequential, image: torch.Tensor, power: int
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return what one (3, h, w) image gives: its embedding, its attention maps but the last."""
    x, maps = image[None], []
    for layer in layers:
        x = layer(x)
        if isinstance(layer, nn.ReLU):
            attention = torch.zeros_like(x[0, 0])
            for channel in x[0]:
                attention = attention + channel.abs() ** power
            maps.append(attention / attention.square().sum().sqrt())
    return x.flatten(), maps[:-1]


def class_loss(
    layers: nn.Sequential,
    real: torch.Tensor,
    synthetic: torch.Tensor,
    view: View,
    *,
    embedding: float,
    attention: float,
    power: int,
    mirror: bool,
) -> torch.Tensor:
    """Return the loss of one class."""
    both = []
    for batch in (real, synthetic):
        if mirror:
            batch = torch.cat([batch, batch.flip(3)])
        seen = [embedding_and_maps(layers, image, power) for image in view(batch)]
        count = len(seen)
        mean = sum(one[0] for one in seen) / count
        maps = [sum(one[1][k] for one in seen) / count for k in range(len(seen[0][1]))]
        both.append((mean, maps))
    (wanted, wanted_maps), (found, found_maps) = both
    loss = embedding * ((found - wanted) ** 2).sum()
    for one, other in zip(found_maps, wanted_maps, strict=True):
        loss = loss + attention * ((one - other) ** 2).sum()
    return loss


def run(
    begun: Sequence[torch.Tensor],
    steps: Sequence[tuple[nn.Sequential, Sequence[torch.Tensor], Sequence[View]]],
    *,
    learning_rate: float,
    momentum: float,
    limits: tuple[torch.Tensor, torch.Tensor],
    **weights: float,
) -> tuple[list[torch.Tensor], list[float]]:
    """Return the images of each class and their last losses.

    `steps` has for every step the network, the real images of each class and its view.
    """
    images = [one.clone().requires_grad_(True) for one in begun]
    optimizer = torch.optim.SGD(images, lr=learning_rate, momentum=momentum)
    losses: list[torch.Tensor] = []
    for layers, real, views in steps:
        losses = [
            class_loss(layers, real[c], images[c], views[c], **weights) for c in range(len(images))
        ]
        optimizer.zero_grad()
        sum(losses).backward()
        optimizer.step()
        with torch.no_grad():
            for one in images:
                one.copy_(torch.minimum(torch.maximum(one, limits[0]), limits[1]))
    return [one.detach() for one in images], [loss.item() for loss in losses]


def color(x: torch.Tensor, brightness: float, saturation: float, contrast: float) -> torch.Tensor:
    shown = []
    for image in x:
        image = image + brightness
        grey = (image[0] + image[1] + image[2]) / 3
        image = torch.stack([(channel - grey) * saturation + grey for channel in image])
        middle = image.sum() / image.numel()
        shown.append((image - middle) * contrast + middle)
    return torch.stack(shown)


def shift(x: torch.Tensor, right: int, down: int) -> torch.Tensor:
    """Return what lies `right` and `down` pixels further; zero outside."""
    out, size = torch.zeros_like(x), x.shape[-1]
    for i in range(size):
        for j in range(size):
            if 0 <= i + down < size and 0 <= j + right < size:
                out[:, :, i, j] = x[:, :, i + down, j + right]
    return out


def cutout(x: torch.Tensor, top: int, left: int, bottom: int, right: int) -> torch.Tensor:
    out, size = x.clone(), x.shape[-1]
    for i in range(max(top, 0), min(bottom, size)):
        for j in range(max(left, 0), min(right, size)):
            out[:, :, i, j] = 0
    return out


def stretch(x: torch.Tensor, across: float, down: float) -> torch.Tensor:
    return _from(x, lambda u, v: (u * across, v * down))


def turn(x: torch.Tensor, angle: float) -> torch.Tensor:
    cos, sin = math.cos(angle), math.sin(angle)
    return _from(x, lambda u, v: (u * cos - v * sin, u * sin + v * cos))


def _from(x: torch.Tensor, where: Callable[[float, float], tuple[float, float]]) -> torch.Tensor:
    """Bilinear, zero outside; `where` maps distances from the middle, in pixels."""
    size = x.shape[-1]
    out, middle = torch.zeros_like(x), (size - 1) / 2
    for i in range(size):
        for j in range(size):
            across, down = where(j - middle, i - middle)
            column, row = across + middle, down + middle
            for r in (math.floor(row), math.floor(row) + 1):
                for c in (math.floor(column), math.floor(column) + 1):
                    if 0 <= r < size and 0 <= c < size:
                        share = (1 - abs(row - r)) * (1 - abs(column - c))
                        out[:, :, i, j] += share * x[:, :, r, c]
    return out
