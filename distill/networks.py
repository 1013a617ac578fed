"""The networks of the field: ConvNet-D, ResNet with the small-image stem, any timm model."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any

import timm
import torch
from torch import nn

SMALL_IMAGE = 64
_OWN = {"convnet3": 3, "convnet4": 4}


class ConvNet(nn.Module):
    """The ConvNet of the distillation literature: blocks of convolution, norm, ReLU, average pool.

    Parameters
    ----------
    depth : int
        Blocks; each halves the side.
    classes : int
        Outputs.
    size : int
        Pixels of a side; at least ``2 ** depth``.
    width : int
        Channels of every block.
    norm : {"batch", "instance"}
        Batch norm has the running statistics that recover matches; the matching family uses
        instance norm.
    """

    def __init__(
        self, depth: int, *, classes: int, size: int, width: int = 128, norm: str = "batch"
    ) -> None:
        super().__init__()
        if size < 2**depth:
            raise ValueError(f"images of {size} pixels are too small for {depth} halvings")
        blocks: list[nn.Module] = []
        for block in range(depth):
            blocks += [
                nn.Conv2d(3 if block == 0 else width, width, 3, padding=1),
                nn.BatchNorm2d(width) if norm == "batch" else nn.GroupNorm(width, width),
                nn.ReLU(),
                nn.AvgPool2d(2),
            ]
        self.features = nn.Sequential(*blocks)
        self.head = nn.Linear(width * (size // 2**depth) ** 2, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (b, classes) logits of (b, 3, size, size) images."""
        logits: torch.Tensor = self.head(torch.flatten(self.features(x), 1))
        return logits


def build(name: str, *, classes: int, size: int, seed: int = 0) -> nn.Module:
    """Return an untrained network; the same name, sizes and seed give the same weights.

    Parameters
    ----------
    name : str
        ``convnet3``, ``convnet4`` (batch norm; with ``-in`` instance norm), or any timm model.
        Of timm's ResNets up to 64 pixels the stem is the small-image one of the field: a 3 x 3
        convolution of stride 1, and no max-pool.
    classes : int
        Outputs.
    size : int
        Pixels of a side.
    seed : int
        Seed of the weights; the global stream is left as it is.

    Raises
    ------
    ValueError
        If the name is neither ours nor timm's; the message lists near names.

    Examples
    --------
    >>> build("convnet3", classes=10, size=32)(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # the CPU stream alone
        base = name.removesuffix("-in")
        if base in _OWN:
            norm = "instance" if name.endswith("-in") else "batch"
            return ConvNet(_OWN[base], classes=classes, size=size, norm=norm)
        if not timm.is_model(name):
            near = timm.list_models(f"*{name}*")[:5] or get_close_matches(
                name, [*_OWN, *timm.list_models()], n=3
            )
            raise ValueError(
                f"network {name!r} is not known; use convnet3, convnet4 or a timm model"
                + (
                    f", for example {', '.join(near)}"
                    if near
                    else " (timm.list_models() names them)"
                )
            )
        return _from_timm(name, classes, size)


def _from_timm(name: str, classes: int, size: int) -> nn.Module:
    options: dict[str, Any] = {"num_classes": classes}
    try:
        model: Any = timm.create_model(name, img_size=size, **options)
    except TypeError:  # convolutional networks take any size
        model = timm.create_model(name, **options)
    stem = getattr(model, "conv1", None)
    if size <= SMALL_IMAGE and isinstance(stem, nn.Conv2d) and hasattr(model, "maxpool"):
        model.conv1 = nn.Conv2d(3, stem.out_channels, 3, stride=1, padding=1, bias=False)
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
        model.maxpool = nn.Identity()
    network: nn.Module = model
    return network
