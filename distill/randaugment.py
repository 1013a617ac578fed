"""RandAugment that can be replayed: what is done to a view follows from a number kept with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torchvision.transforms import functional

from distill.teacher import normalise, pixels_of

_GOLDEN, _MIX1, _MIX2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_Change = Callable[[torch.Tensor, float], torch.Tensor]


@dataclass(frozen=True)
class RandAugment:
    """How views are changed in colour and shape (Cubuk et al. 2020).

    Attributes
    ----------
    count : int
        Operations one after another, each drawn from `OPERATIONS`.
    magnitude : float
        Their strength in [0, 1]: 0.3 is 9 of torchvision's 30, 0.6 is timm's m6.

    Raises
    ------
    ValueError
        If a number is out of range.
    """

    count: int = 2
    magnitude: float = 0.3

    def __post_init__(self) -> None:
        if self.count < 1 or not 0 <= self.magnitude <= 1:
            raise ValueError(
                f"RandAugment of count {self.count} and magnitude {self.magnitude}: the count must "
                "be at least 1, the magnitude in [0, 1]; leave it out to change nothing"
            )

    def drawn(self, seed: torch.Tensor) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Return the (b, count) numbers of the operations, and which of them go the other way.

        Parameters
        ----------
        seed : (b,) int64
            Of each view; a number gives the same operations everywhere.
        """
        start = seed.cpu().numpy().astype(np.uint64)[:, None]
        step = np.arange(1, self.count + 1, dtype=np.uint64) * np.uint64(_GOLDEN)
        value = _hashed(start + step)
        operation = (value >> np.uint64(33)) % np.uint64(len(OPERATIONS))
        return operation.astype(np.int64), (value & np.uint64(1)).astype(bool)

    def __call__(
        self,
        x: torch.Tensor,
        seed: torch.Tensor,
        mean: tuple[float, ...],
        std: tuple[float, ...],
    ) -> torch.Tensor:
        """Return (b, 3, h, w) views changed as their numbers say; pixels become whole.

        Parameters
        ----------
        x : (b, 3, h, w) float
            Normalised.
        seed : (b,) int64
        mean, std : tuple of float
        """
        pixels = pixels_of(x, mean, std)
        operation, other_way = self.drawn(seed)
        changes = list(OPERATIONS.values())
        for place in range(self.count):
            for number, sign in np.unique(
                np.stack([operation[:, place], other_way[:, place]]), axis=1
            ).T:
                mine = (operation[:, place] == number) & (other_way[:, place] == sign)
                rows = torch.from_numpy(np.flatnonzero(mine)).to(x.device)
                strength = -self.magnitude if sign else self.magnitude
                pixels[rows] = changes[number](pixels[rows], strength)
        return normalise(pixels, mean, std).to(x.dtype)


def _hashed(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Steele et al. 2014 (SplitMix64): whatever the seeds are, the draws look independent."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(_MIX1)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(_MIX2)
    mixed: NDArray[np.uint64] = value ^ (value >> np.uint64(31))
    return mixed


def _affine(
    x: torch.Tensor,
    *,
    angle: float = 0.0,
    move: tuple[int, int] = (0, 0),
    shear: tuple[float, float] = (0.0, 0.0),
) -> torch.Tensor:
    # Shears turn about the corner, rotations about the middle, as in AutoAugment.
    centre = [0, 0] if any(shear) else None
    degrees = [float(np.degrees(np.arctan(one))) for one in shear]
    moved: torch.Tensor = functional.affine(x, angle, list(move), 1.0, degrees, center=centre)
    return moved


def _posterized(x: torch.Tensor, m: float) -> torch.Tensor:
    coarse: torch.Tensor = functional.posterize(x, 8 - round(4 * abs(m)))
    return coarse


def _moved(x: torch.Tensor, m: float) -> int:
    return int(150 / 331 * x.shape[-1] * m)


#: Those of torchvision, in its order; strengths at magnitude 1 are its largest.
OPERATIONS: dict[str, _Change] = {
    "identity": lambda x, m: x,
    "shear-x": lambda x, m: _affine(x, shear=(0.3 * m, 0.0)),
    "shear-y": lambda x, m: _affine(x, shear=(0.0, 0.3 * m)),
    "translate-x": lambda x, m: _affine(x, move=(_moved(x, m), 0)),
    "translate-y": lambda x, m: _affine(x, move=(0, _moved(x, m))),
    "rotate": lambda x, m: functional.rotate(x, 30 * m),
    "brightness": lambda x, m: functional.adjust_brightness(x, 1 + 0.9 * m),
    "color": lambda x, m: functional.adjust_saturation(x, 1 + 0.9 * m),
    "contrast": lambda x, m: functional.adjust_contrast(x, 1 + 0.9 * m),
    "sharpness": lambda x, m: functional.adjust_sharpness(x, 1 + 0.9 * m),
    "posterize": _posterized,
    "solarize": lambda x, m: functional.solarize(x, 255 * (1 - abs(m))),
    "autocontrast": lambda x, m: functional.autocontrast(x),
    "equalize": lambda x, m: functional.equalize(x),
}
