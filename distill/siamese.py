"""Differentiable siamese augmentation: real and synthetic images of a class change alike.

Zhao and Bilen 2021, "Dataset Condensation with Differentiable Siamese Augmentation", ICML.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

import torch
from torch.nn.functional import affine_grid, grid_sample

Operation = Literal["color", "crop", "cutout", "flip", "scale", "rotate"]
OPERATIONS: tuple[Operation, ...] = ("color", "crop", "cutout", "flip", "scale", "rotate")

_BRIGHTNESS = 1.0  # the width of what is added
_SATURATION = 2.0  # factors from 0
_CONTRAST = 0.5  # factors from here, one wide
_CROP = 0.125  # of a side
_CUTOUT = 0.5  # of a side
_SCALE = 1.2
_ROTATE = 15.0  # degrees


@dataclass(frozen=True)
class Siamese:
    """What a step does to the images of each of C classes; one operation each, or nothing.

    Attributes
    ----------
    brightness, saturation, contrast : (C,) float64
        Added to all pixels; the factors of the distances from a pixel's grey and from the image's
        mean. In this order.
    affine : (C, 2, 3) float64
        From coordinates of the result to those of the image, both from -1 to 1. Outside of the
        image lies zero, which is the mean colour.
    box : (C, 4) int64
        Top, left, bottom, right of what is cut out; bottom and right are outside of it.
    """

    brightness: torch.Tensor
    saturation: torch.Tensor
    contrast: torch.Tensor
    affine: torch.Tensor
    box: torch.Tensor

    def __call__(self, x: torch.Tensor, owner: torch.Tensor) -> torch.Tensor:
        """Return the changed images, (n, 3, size, size); differentiable.

        Parameters
        ----------
        x : (n, 3, size, size) float
            Normalised images.
        owner : (n,) int64
            The class of each, by position in the attributes; on the device of the images.
        """
        x = self._coloured(x, owner)
        affine = self.affine.to(x.device, x.dtype, non_blocking=True)[owner]
        x = _Warp.apply(x, affine)
        place = torch.arange(x.shape[-1], device=x.device)
        box = self.box.to(x.device, non_blocking=True)[owner]
        rows = (place >= box[:, :1]) & (place < box[:, 2:3])
        columns = (place >= box[:, 1:2]) & (place < box[:, 3:])
        return x.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0)

    def _coloured(self, x: torch.Tensor, owner: torch.Tensor) -> torch.Tensor:
        brightness, saturation, contrast = (
            value.to(x.device, x.dtype, non_blocking=True)[owner][:, None, None, None]
            for value in (self.brightness, self.saturation, self.contrast)
        )
        x = x + brightness
        x = torch.lerp(x.mean(dim=1, keepdim=True), x, saturation)
        return torch.lerp(x.mean(dim=(1, 2, 3), keepdim=True), x, contrast)


def draw_siamese(
    classes: int,
    size: int,
    generator: torch.Generator,
    *,
    operations: tuple[Operation, ...] = OPERATIONS,
) -> Siamese:
    """Draw one of the operations for each class, with its parameters.

    Parameters
    ----------
    classes : int
    size : int
        Pixels of a side.
    generator : torch.Generator
    operations : tuple of str
        Each is as likely. Color: brightness up to 0.5 up or down (in the normalised space),
        saturation by 0 to 2, contrast by 0.5 to 1.5. Crop: shifts by up to an eighth of the side.
        Cutout: a square of half the side. Flip: a mirror image, in half of the draws. Scale: each
        axis by 1/1.2 to 1.2. Rotate: up to 15 degrees.

    Examples
    --------
    >>> draw_siamese(4, 32, torch.Generator(), operations=("crop",)).affine.shape
    torch.Size([4, 2, 3])
    """
    uniform = torch.rand(classes, 10, dtype=torch.float64, generator=generator).unbind(dim=1)
    which = torch.randint(len(operations), (classes,), generator=generator)
    chosen = {name: which == number for number, name in enumerate(operations)}
    none = torch.zeros(classes, dtype=torch.bool)
    color = chosen.get("color", none)
    return Siamese(
        torch.where(color, (uniform[0] - 0.5) * _BRIGHTNESS, 0.0),
        torch.where(color, uniform[1] * _SATURATION, 1.0),
        torch.where(color, uniform[2] + _CONTRAST, 1.0),
        _affine({name: chosen.get(name, none) for name in OPERATIONS}, uniform[3:8], size),
        _box(chosen.get("cutout", none), uniform[8:], size),
    )


def _affine(
    chosen: dict[Operation, torch.Tensor], uniform: tuple[torch.Tensor, ...], size: int
) -> torch.Tensor:
    angle = (2 * uniform[0] - 1) * math.radians(_ROTATE) * chosen["rotate"]
    cos, sin = angle.cos(), angle.sin()
    mirror = torch.where(chosen["flip"] & (uniform[0] < 0.5), -1.0, 1.0)
    across, down = (
        torch.where(chosen["scale"], 1 / _SCALE + u * (_SCALE - 1 / _SCALE), 1.0)
        for u in uniform[1:3]
    )
    reach = int(size * _CROP + 0.5)
    # Two on the scale of coordinates is a side.
    right, low = (
        torch.where(chosen["crop"], ((u * (2 * reach + 1)).floor() - reach) * 2 / size, 0.0)
        for u in uniform[3:5]
    )
    first = torch.stack([cos * across * mirror, -sin, right], dim=1)
    return torch.stack([first, torch.stack([sin, cos * down, low], dim=1)], dim=1)


def _box(chosen: torch.Tensor, uniform: tuple[torch.Tensor, ...], size: int) -> torch.Tensor:
    side = int(size * _CUTOUT + 0.5)
    centres = size + 1 - side % 2
    start = torch.stack([(u * centres).floor() for u in uniform], dim=1).long() - side // 2
    box = torch.cat([start, start + side], dim=1)
    return torch.where(chosen[:, None], box, 0)


class _Warp(torch.autograd.Function):
    """Bilinear sampling whose gradient is the same in every run, on every device.

    That of `grid_sample` adds up in the order of the moment on CUDA. Here each pixel of the image
    collects from the nine pixels of the result that can have seen it: no draw of this module
    shrinks a step of one pixel to less than 1 / 1.5, so that the others are too far away.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, affine: torch.Tensor) -> torch.Tensor:
        """Return the (n, c, size, size) images seen through (n, 2, 3) maps."""
        ctx.save_for_backward(affine)
        grid = affine_grid(affine, list(x.shape), align_corners=False)
        return grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Return the gradient of the images."""
        (affine,) = ctx.saved_tensors
        return _collected(gradients[0], affine), None


def _collected(gradient: torch.Tensor, affine: torch.Tensor) -> torch.Tensor:
    n, channels, size, _ = gradient.shape
    pixel = torch.arange(size, device=gradient.device, dtype=affine.dtype)
    (a, b, right), (c, d, low) = (row.unbind(1) for row in affine[:, :, :, None, None].unbind(1))
    # The same map in pixels, from the middle of the image.
    x, y = pixel - (size - 1) / 2, (pixel - (size - 1) / 2)[:, None]
    right, low = right * size / 2, low * size / 2
    scale = 1 / (a * d - b * c)
    near_x = ((d * (x - right) - b * (y - low)) * scale + (size - 1) / 2).round()
    near_y = ((a * (y - low) - c * (x - right)) * scale + (size - 1) / 2).round()
    flat, found = gradient.reshape(n, channels, size * size), torch.zeros_like(gradient)
    for down, across in product((-1, 0, 1), repeat=2):
        u, v = near_x + across, near_y + down
        inside = (u >= 0) & (u < size) & (v >= 0) & (v < size)
        from_x, from_y = u - (size - 1) / 2, v - (size - 1) / 2
        weight = (1 - (a * from_x + b * from_y + right - x).abs()).clamp(min=0)
        weight = weight * (1 - (c * from_x + d * from_y + low - y).abs()).clamp(min=0) * inside
        index = (v.clamp(0, size - 1) * size + u.clamp(0, size - 1)).long()
        seen = flat.gather(2, index.reshape(n, 1, -1).expand(-1, channels, -1))
        found += weight[:, None] * seen.reshape(gradient.shape)
    return found
