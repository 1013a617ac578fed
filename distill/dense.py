"""A network's answer at every cell of its last feature map, and pooling over a region of it."""

from __future__ import annotations

import torch
from torch.nn.functional import interpolate

from distill.teacher import Teacher


@torch.no_grad()
def dense_logits(teacher: Teacher, x: torch.Tensor, map_size: int | None = None) -> torch.Tensor:
    """Return (b, C, h, w) logits: what the classifier says of each cell alone.

    Of a network that ends in a mean over the cells and a linear layer their mean is the network's
    own answer.

    Parameters
    ----------
    teacher : Teacher
        A convolutional network of timm.
    x : (b, 3, size, size) float32
        Normalised, on the teacher's device.
    map_size : int, optional
        Cells of a side that are wanted: images are enlarged or shrunk, bilinearly, by the ratio to
        those that they have.

    Raises
    ------
    ValueError
        If the network has no such map, or cannot have one of that size.
    """
    features = _features(teacher, x)
    if map_size is not None and features.shape[-1] != map_size:
        side = round(x.shape[-1] * map_size / features.shape[-1])
        features = _features(
            teacher, interpolate(x, (side, side), mode="bilinear", align_corners=False)
        )
        if features.shape[-1] != map_size:
            raise ValueError(
                f"images of {side} pixels give {teacher.network!r} a map of "
                f"{features.shape[-1]} cells and not {map_size}; use another map_size"
            )
    b, channels, height, width = features.shape
    cells = features.permute(0, 2, 3, 1).reshape(-1, channels, 1, 1)
    logits: torch.Tensor = teacher.model.forward_head(cells)  # type: ignore[operator]
    return logits.float().reshape(b, height, width, -1).permute(0, 3, 1, 2)


def _features(teacher: Teacher, x: torch.Tensor) -> torch.Tensor:
    model = teacher.model
    known = hasattr(model, "forward_features") and hasattr(model, "forward_head")
    features = model.forward_features(x) if known else None  # type: ignore[operator]
    if not isinstance(features, torch.Tensor) or features.ndim != 4:
        raise ValueError(
            f"network {teacher.network!r} has no map of features that its classifier reads cell by "
            "cell; use a convolutional network of timm, such as resnet18"
        )
    return features


def region_weights(crop: torch.Tensor, size: int, height: int, width: int) -> torch.Tensor:
    """Return the (b, height, width) weights of cells in the RoIAlign of crops to one value.

    He et al. 2017 (Mask R-CNN), aligned to half cells, with as many samples along an axis as the
    crop has cells, rounded up.

    Parameters
    ----------
    crop : (b, 4) int
        Top, left, height, width in pixels; cut at the border of the image.
    size : int
        Pixels of a side of the image.
    height, width : int
        Cells of the map.
    """
    box = crop.double()
    start = box[:, :2].clamp(0, size - 1)
    length = ((box[:, :2] + box[:, 2:]).clamp(max=size) - start).clamp(min=1)
    rows = _axis(start[:, 0] * height / size, length[:, 0] * height / size, height)
    columns = _axis(start[:, 1] * width / size, length[:, 1] * width / size, width)
    return (rows[:, :, None] * columns[:, None, :]).float()


def _axis(start: torch.Tensor, length: torch.Tensor, cells: int) -> torch.Tensor:
    # Not a hair above a whole number, which would ask for one sample more.
    count = torch.ceil(length - 1e-9).clamp(min=1)[:, None]
    step = torch.arange(cells, dtype=torch.float64, device=start.device)
    place = start[:, None] - 0.5 + (step + 0.5) * length[:, None] / count
    near = place.clamp(0, cells - 1)[..., None]
    weight = (1 - (near - step).abs()).clamp(min=0) * (step < count)[..., None]
    return weight.sum(dim=1) / count
