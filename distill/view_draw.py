"""How views are drawn for the teachers to label."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch

from curate.runtime import rng
from distill.randaugment import RandAugment
from distill.views import (
    MIX_KINDS,
    MixKind,
    Views,
    mixed,
    padded_crops,
    plain_views,
    random_flips,
    resized_crops,
)

Crop = Literal["resized", "padded", "none"]
_CROPS: tuple[Crop, ...] = ("resized", "padded", "none")
_MOST_EPOCHS = 32_767


@dataclass(frozen=True, kw_only=True)
class ViewDraw:
    """How views are drawn: batch j of epoch e is a pure function of this and (e, j).

    Attributes
    ----------
    epochs, batch_size : int
        In every epoch each image is shown once.
    crop : {"resized", "padded", "none"}
        Boxes of random area and aspect, shifts by up to `pad` pixels, or the whole image.
    scale : (float, float)
        The area of resized crops, a fraction of the image.
    pad : int, optional
        An eighth of the image by default.
    flip : bool
    mix : {"cutmix", "mixup", "none"}
        One weight, box and permutation for each batch.
    mix_alpha : float, optional
        Of Beta(a, a); 1 for CutMix and 0.8 for mixup by default (Yin et al. 2023, SRe2L).
    randaugment : RandAugment, optional
        What else is done to every view; see `distill.randaugment`.
    seed : int

    Raises
    ------
    ValueError
        If a value makes no sense.
    """

    epochs: int
    batch_size: int
    crop: Crop = "resized"
    scale: tuple[float, float] = (0.08, 1.0)
    pad: int | None = None
    flip: bool = True
    mix: MixKind = "cutmix"
    mix_alpha: float | None = None
    randaugment: RandAugment | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.epochs <= _MOST_EPOCHS or self.batch_size < 1:
            raise ValueError(
                f"epochs is {self.epochs} and batch_size {self.batch_size}; epochs must be 1 to "
                f"{_MOST_EPOCHS}, and batch_size at least 1"
            )
        if self.crop not in _CROPS or self.mix not in MIX_KINDS:
            raise ValueError(
                f"crop {self.crop!r} or mix {self.mix!r} is not known; crop is one of "
                f"{', '.join(_CROPS)}, mix one of {', '.join(MIX_KINDS)}"
            )
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale is {self.scale}; it must be 0 < least <= greatest <= 1")
        if self.mix_alpha is not None and not self.mix_alpha > 0:
            raise ValueError(f"mix_alpha is {self.mix_alpha}; it must be above 0")
        if self.pad is not None and self.pad < 0:
            raise ValueError(f"pad is {self.pad}; it must not be negative")

    def order(self, images: int, epoch: int) -> torch.Tensor:
        """Return the order in which an epoch shows the images, (n,) int64."""
        return torch.from_numpy(rng(self.seed, "relabel", "order", epoch).permutation(images))

    def views(
        self, image: torch.Tensor, epoch: int, number: int, *, source: int, size: int
    ) -> Views:
        """Return batch `number` of an epoch, which shows those images.

        Parameters
        ----------
        image : (b,) int64
        epoch, number : int
        source, size : int
            Pixels of a side of the images and of the views.
        """
        stream = rng(self.seed, "relabel", "views", epoch, number)
        generator = torch.Generator().manual_seed(int(stream.integers(2**63)))
        b, views = len(image), plain_views(image, source)
        if self.crop == "resized":
            views = replace(views, crop=resized_crops(b, source, generator, scale=self.scale))
        elif self.crop == "padded":
            reach = source // 8 if self.pad is None else self.pad
            views = replace(views, crop=padded_crops(b, source, reach, generator))
        if self.flip:
            views = replace(views, flip=random_flips(b, generator))
        usual = 0.8 if self.mix == "mixup" else 1.0
        alpha = usual if self.mix_alpha is None else self.mix_alpha
        views = mixed(views, self.mix, alpha, size, generator)
        if self.randaugment is not None:
            drawn = torch.randint(2**62, (b,), generator=generator)
            views = replace(views, augment_seed=drawn)
        # Rounded before use: what is stored is then what the teacher saw, to the last bit.
        return replace(views, mix_weight=float(np.float32(views.mix_weight)))
