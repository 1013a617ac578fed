"""The parts of a step of distribution matching: what it draws, its network, its distances."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.functional import normalize

from curate.runtime import rng
from distill.image_set import ImageSet
from distill.match_recipes import MatchRecipe
from distill.networks import build
from distill.siamese import Siamese, draw_siamese


@dataclass(frozen=True)
class Draw:
    """What one step draws.

    Attributes
    ----------
    rows : list of (b,) int64
        The real images of each class.
    prefix : int
        How many synthetic images of each class are matched, from the first.
    siamese : Siamese or None
    network : torch.Generator
        The stream of the random network.
    """

    rows: list[NDArray[np.int64]]
    prefix: int
    siamese: Siamese | None
    network: torch.Generator


def draw_step(
    recipe: MatchRecipe,
    rows: Sequence[NDArray[np.int64]],
    *,
    size: int,
    ipc: int,
    seed: int,
    step: int,
) -> Draw:
    """Return what a step draws; a pure function of the arguments.

    Parameters
    ----------
    recipe : MatchRecipe
    rows : sequence of (n,) int64
        The real images of each class.
    size, ipc, seed, step : int
        Pixels of a side; images per class; the run's seed; the number of the step.
    """
    stream = rng(seed, "match", step)
    batch = [
        own[stream.choice(len(own), min(recipe.batch_real, len(own)), replace=False, shuffle=False)]
        for own in rows
    ]
    prefix = int(stream.integers(1, ipc + 1)) if recipe.nested else ipc
    generator = torch.Generator().manual_seed(int(stream.integers(2**63)))
    siamese = None
    if recipe.augment:
        siamese = draw_siamese(len(rows), size, generator, operations=recipe.augment)
    return Draw(batch, prefix, siamese, generator)


class RandomNetwork:
    """The features of a network whose weights are drawn anew for every step.

    Parameters
    ----------
    recipe : MatchRecipe
    images : ImageSet
        Gives the size and the classes.
    device : torch.device
    dtype : torch.dtype
        What convolutions compute in; distances are float32 or wider.

    Raises
    ------
    ValueError
        If the network is not one of the ConvNets without batch norm.
    """

    def __init__(
        self, recipe: MatchRecipe, images: ImageSet, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.recipe, self.device, self.dtype = recipe, device, dtype
        self.exact = torch.float64 if dtype == torch.float64 else torch.float32
        built = build(recipe.network, classes=images.classes, size=images.size)
        found = getattr(built, "features", None)
        if not isinstance(found, nn.Sequential) or not recipe.network.endswith("-in"):
            raise ValueError(
                f"network {recipe.network!r} cannot be matched with; use convnet3-in or "
                "convnet4-in, whose instance norm keeps each image to itself"
            )
        # The head is not asked: the embedding is what it would be given.
        # Not channels last: there the norm of single channels takes longer than the convolutions.
        self.layers = found.requires_grad_(False).to(device, self.exact)
        self.convolutions = [layer for layer in found if isinstance(layer, nn.Conv2d)]
        self.depth = sum(isinstance(layer, nn.ReLU) for layer in found)

    def redraw(self, generator: torch.Generator) -> None:
        """Draw the weights as torch does for new convolutions: uniform, up to 1/sqrt(inputs)."""
        weights = [w for c in self.convolutions for w in (c.weight, c.bias) if w is not None]
        drawn = torch.rand(sum(w.numel() for w in weights), generator=generator)
        if self.device.type == "cuda":
            # One transfer that does not wait for what the device is doing.
            drawn = drawn.pin_memory().to(self.device, non_blocking=True)
        bounds = [c.weight[0].numel() ** -0.5 for c in self.convolutions for _ in range(2)]
        pieces = torch.split(drawn, [w.numel() for w in weights])
        for weight, piece, bound in zip(weights, pieces, bounds, strict=True):
            weight.copy_(piece.view(weight.shape).to(self.exact).mul_(2 * bound).sub_(bound))

    def __call__(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Return the features that are matched, the embedding last.

        Parameters
        ----------
        x : (n, 3, size, size) float

        Returns
        -------
        list of (n, d) float
            Unit attention maps of all ReLU blocks but the last, where the recipe has them; and
            the flattened output of the last block.
        """
        x = x.contiguous()
        found, seen = [], 0
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            for layer in self.layers:
                x = layer(x)
                seen += isinstance(layer, nn.ReLU)
                if self.recipe.attention and isinstance(layer, nn.ReLU) and seen < self.depth:
                    found.append(attention_map(x.to(self.exact), self.recipe.power))
        return [*found, x.to(self.exact).flatten(1)]


def attention_map(features: torch.Tensor, power: int) -> torch.Tensor:
    """Return (n, h * w) unit maps: the sum over channels of ``|features| ** power``.

    Parameters
    ----------
    features : (n, c, h, w) float
    power : int

    Examples
    --------
    >>> attention_map(torch.tensor([[[[3.0, 4.0]]]]), 1)
    tensor([[0.6000, 0.8000]])
    """
    square = features * features
    # A square of a square is quicker than a general power.
    raised = square * square if power == 4 else features.abs() ** power
    return normalize(raised.sum(dim=1).flatten(1), dim=1)


def class_means(features: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    """Return the (C, d) means of (n, d) features that lie class by class, `counts` of each."""
    if len(set(counts)) == 1:
        return features.reshape(len(counts), counts[0], -1).mean(dim=1)
    return torch.stack([part.mean(dim=0) for part in torch.split(features, list(counts))])


def distances(
    found: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor], recipe: MatchRecipe
) -> torch.Tensor:
    """Return each class's weighted squared distance of the means, (C,).

    Parameters
    ----------
    found, wanted : sequence of (C, d) float
        Means of the synthetic and of the real images, the embedding last.
    recipe : MatchRecipe
        Its weights count.
    """
    squared = [(a - b).square().sum(dim=1) for a, b in zip(found, wanted, strict=True)]
    loss = recipe.embedding * squared[-1]
    for one in squared[:-1]:
        loss = loss + recipe.attention * one
    return loss
