"""Views of images: integer crops, flips and mixing partners that can be stored and replayed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch.nn.functional import grid_sample, one_hot

MixKind = Literal["none", "cutmix", "mixup"]
Augment = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
MIX_KINDS: tuple[MixKind, ...] = ("none", "cutmix", "mixup")


@dataclass(frozen=True)
class Views:
    """One batch of views; everything that is needed to make the same pixels again.

    Attributes
    ----------
    image : (b,) int64
        Which image each view shows.
    crop : (b, 4) int16
        Top, left, height, width of the box in pixels of the source. It may reach over the border:
        what lies outside is zero in the normalised space (the mean colour).
    flip : (b,) bool
        Mirrored left to right, after the crop.
    partner : (b,) int64
        The position in this batch of the view that is mixed in.
    mix_kind : {"none", "cutmix", "mixup"}
        How the batch is mixed.
    mix_box : (4,) int16
        Top, left, height, width of the CutMix box, in pixels of the view.
    mix_weight : float
        Weight of the view's own label; its partner's is the rest.
    augment_seed : (b,) int64, optional
        What `distill.randaugment` does to each view, after crop and flip and before mixing.
    """

    image: torch.Tensor
    crop: torch.Tensor
    flip: torch.Tensor
    partner: torch.Tensor
    mix_kind: MixKind = "none"
    mix_box: tuple[int, int, int, int] = (0, 0, 0, 0)
    mix_weight: float = 1.0
    augment_seed: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.image)


def plain_views(image: torch.Tensor, size: int) -> Views:
    """Return the views that show whole images as they are."""
    b = len(image)
    crop = torch.tensor([0, 0, size, size], dtype=torch.int16).expand(b, 4)
    return Views(image, crop, torch.zeros(b, dtype=torch.bool), torch.arange(b))


def padded_crops(n: int, size: int, pad: int, generator: torch.Generator) -> torch.Tensor:
    """Return (n, 4) int16 crops of the whole size, shifted by up to ``pad`` pixels each way."""
    shift = torch.randint(-pad, pad + 1, (n, 2), generator=generator)
    return torch.cat([shift, torch.full((n, 2), size)], dim=1).to(torch.int16)


def resized_crops(
    n: int,
    size: int,
    generator: torch.Generator,
    *,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> torch.Tensor:
    """Return (n, 4) int16 boxes as torchvision's RandomResizedCrop draws them.

    The area is uniform in `scale` and the log of the aspect in `ratio`; a box that does not fit is
    drawn again up to ten times, and then is the largest one of the nearest allowed aspect.
    """
    low, high = torch.log(torch.tensor(ratio, dtype=torch.float64)).tolist()
    area = torch.empty(n, 10, dtype=torch.float64).uniform_(*scale, generator=generator)
    aspect = torch.empty(n, 10, dtype=torch.float64).uniform_(low, high, generator=generator).exp()
    width = torch.round(size * torch.sqrt(area * aspect)).long()
    height = torch.round(size * torch.sqrt(area / aspect)).long()
    fits = (width >= 1) & (width <= size) & (height >= 1) & (height <= size)
    first = fits.int().argmax(dim=1, keepdim=True)
    w, h = width.gather(1, first)[:, 0], height.gather(1, first)[:, 0]
    none = ~fits.any(dim=1)
    w, h = torch.where(none, size, w), torch.where(none, size, h)
    place = torch.rand(n, 2, dtype=torch.float64, generator=generator)
    top = (place[:, 0] * (size - h + 1)).long()
    left = (place[:, 1] * (size - w + 1)).long()
    return torch.stack([top, left, h, w], dim=1).to(torch.int16)


def random_flips(n: int, generator: torch.Generator) -> torch.Tensor:
    """Return (n,) bool, half of them true on average."""
    return torch.rand(n, generator=generator) < 0.5


def mixed(
    views: Views, kind: MixKind, alpha: float, size: int, generator: torch.Generator
) -> Views:
    """Return the views with partners drawn, one weight and one box for the batch (Beta(a, a))."""
    if kind == "none":
        return views
    weight = _beta(alpha, generator)
    partner = torch.randperm(len(views), generator=generator)
    if kind == "mixup":
        return replace(views, partner=partner, mix_kind=kind, mix_weight=weight)
    box = _cutmix_box(weight, size, generator)
    kept = 1 - box[2] * box[3] / size**2
    return replace(views, partner=partner, mix_kind=kind, mix_box=box, mix_weight=kept)


def _beta(alpha: float, generator: torch.Generator) -> float:
    if alpha == 1.0:
        return float(torch.rand((), dtype=torch.float64, generator=generator))
    concentration = torch.full((2,), alpha, dtype=torch.float64)
    gamma = torch._standard_gamma(concentration, generator=generator)
    return float(gamma[0] / gamma.sum())


def _cutmix_box(weight: float, size: int, generator: torch.Generator) -> tuple[int, int, int, int]:
    side = int(size * (1 - weight) ** 0.5)
    y, x = torch.randint(0, size, (2,), generator=generator).tolist()
    top, left = max(y - side // 2, 0), max(x - side // 2, 0)
    bottom, right = min(y + side // 2, size), min(x + side // 2, size)
    return top, left, bottom - top, right - left


def cropped(x: torch.Tensor, crop: torch.Tensor, flip: torch.Tensor, size: int) -> torch.Tensor:
    """Return (b, c, size, size): each image's box, bilinear, mirrored where ``flip``.

    Parameters
    ----------
    x : (b, c, h, w) float
        Images in the normalised space; differentiable.
    crop : (b, 4) int
        Top, left, height, width in pixels of ``x``.
    flip : (b,) bool
    size : int
        Pixels of a side of the result.
    """
    height, width = x.shape[-2:]
    box = crop.to(x.device, torch.float32)
    step = (torch.arange(size, device=x.device, dtype=torch.float32) + 0.5) / size
    across = torch.where(flip.to(x.device)[:, None], 1 - step, step)
    # Pixel centres in grid_sample's coordinates, where -1 and 1 are the image's outer edges.
    rows = 2 * (box[:, :1] + step * box[:, 2:3]) / height - 1
    columns = 2 * (box[:, 1:2] + across * box[:, 3:4]) / width - 1
    grid = torch.stack(
        [columns[:, None, :].expand(-1, size, -1), rows[:, :, None].expand(-1, -1, size)], dim=-1
    )
    seen = grid_sample(
        x, grid.to(x.dtype), mode="bilinear", padding_mode="border", align_corners=False
    )
    # Border padding keeps edges from fading to grey; only what lies wholly outside is zero.
    inside = (rows.abs() <= 1)[:, None, :, None] & (columns.abs() <= 1)[:, None, None, :]
    return seen * inside


def show(x: torch.Tensor, views: Views, size: int, augment: Augment | None = None) -> torch.Tensor:
    """Return the (b, c, size, size) pixels of the views of normalised images ``x[views.image]``.

    Parameters
    ----------
    x : (n, c, h, w) float
        All images that the views refer to, normalised.
    views : Views
    size : int
        Pixels of a side of the result.
    augment : callable, optional
        Changes views by their `augment_seed`.

    Raises
    ------
    ValueError
        If the views have such seeds and it is not given.
    """
    seen = cropped(x[views.image.to(x.device)], views.crop, views.flip, size)
    if views.augment_seed is not None:
        if augment is None:
            raise ValueError("these views are augmented further, and nobody says how")
        seen = augment(seen, views.augment_seed)
    if views.mix_kind == "none":
        return seen
    other = seen[views.partner.to(x.device)]
    if views.mix_kind == "mixup":
        return views.mix_weight * seen + (1 - views.mix_weight) * other
    top, left, height, width = views.mix_box
    out = seen.clone()
    inside = (slice(None), slice(None), slice(top, top + height), slice(left, left + width))
    out[inside] = other[inside]
    return out


def mixed_targets(labels: torch.Tensor, views: Views, classes: int) -> torch.Tensor:
    """Return the (b, C) hard targets of the views, mixed as their pixels are."""
    own = one_hot(labels[views.image.to(labels.device)], classes).float()
    if views.mix_kind == "none":
        return own
    other = own[views.partner.to(labels.device)]
    return views.mix_weight * own + (1 - views.mix_weight) * other
