"""Synthesized images with where each came from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class DistilledImages:
    """The images of a distilled set, sorted by `ipc_rank`, then by class.

    Every prefix of ``ipc * C`` images is a balanced smaller set.

    Attributes
    ----------
    pixels : (n, size, size, 3) uint8
    labels : (n,) int64
        Class numbers.
    ipc_rank : (n,) int32
        0 to ipc - 1 inside each class.
    init_kind : (n,) str
        What the image began as: ``noise``, ``real``, ``patch``.
    init_id : (n,) str
        The id of the real image that it began as; empty for noise.
    teacher_confidence, recover_loss, bn_loss : (n,) float32
        The first teacher's probability of the label at the end, and the last losses; NaN where
        there is none.
    class_names : tuple of str
    mean, std : tuple of float
        Normalisation of pixels in [0, 1] that a student should use.
    soft_label : (n, C) float16, optional
        Static soft labels: the log-probabilities that the teachers give the whole images.
    """

    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64]
    ipc_rank: NDArray[np.int32]
    init_kind: NDArray[np.str_]
    init_id: NDArray[np.str_]
    teacher_confidence: NDArray[np.float32]
    recover_loss: NDArray[np.float32]
    bn_loss: NDArray[np.float32]
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    soft_label: NDArray[np.float16] | None = None

    def __post_init__(self) -> None:
        n, classes = len(self.pixels), len(self.class_names)
        if self.pixels.dtype != np.uint8 or self.pixels.ndim != 4:
            raise ValueError("pixels must be (n, size, size, 3) uint8")
        if n == 0 or n % classes:
            raise ValueError(f"{n} images of {classes} classes: every class needs as many")
        expected = np.arange(n)
        if not (
            np.array_equal(self.labels, expected % classes)
            and np.array_equal(self.ipc_rank, expected // classes)
        ):
            raise ValueError("images must be sorted by ipc_rank, then by class, one of each")
        static = self.soft_label
        if static is not None and (static.shape != (n, classes) or static.dtype != np.float16):
            raise ValueError(
                f"soft_label is {static.dtype} of {static.shape}; it must be float16 of "
                f"{(n, classes)}"
            )
        if static is not None and not np.isfinite(static).all():
            raise ValueError("soft_label must be finite")

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def ipc(self) -> int:
        """Images per class."""
        return len(self) // len(self.class_names)

    @property
    def size(self) -> int:
        """Pixels of a side."""
        return int(self.pixels.shape[1])

    def prefix(self, ipc: int) -> DistilledImages:
        """Return the first ``ipc`` images of every class.

        Raises
        ------
        ValueError
            If there are not as many.
        """
        if not 1 <= ipc <= self.ipc:
            raise ValueError(f"ipc is {ipc}; it must be between 1 and {self.ipc}")
        m = ipc * len(self.class_names)
        return DistilledImages(
            self.pixels[:m],
            self.labels[:m],
            self.ipc_rank[:m],
            self.init_kind[:m],
            self.init_id[:m],
            self.teacher_confidence[:m],
            self.recover_loss[:m],
            self.bn_loss[:m],
            self.class_names,
            self.mean,
            self.std,
            None if self.soft_label is None else self.soft_label[:m],
        )
