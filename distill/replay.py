"""Recorded views as training batches: the pixels that the teacher saw, and what it said."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import IterableDataset, get_worker_info

from curate.manifest import digest
from distill.distilled_images import DistilledImages
from distill.image_set import ImageSet
from distill.label_parts import LabelHeader
from distill.randaugment import RandAugment
from distill.soft_labels import SoftLabels
from distill.teacher import normalise
from distill.views import Augment, Views, mixed_targets, show


@dataclass(frozen=True)
class Source:
    """The images that views refer to, with what they are called.

    Attributes
    ----------
    pixels : (n, size, size, 3) uint8
        In memory, or mapped from disk.
    labels : (n,) int64
    class_names : tuple of str
    mean, std : tuple of float
        The normalisation in which views are made.
    identity : str
        What tells these images from others.
    """

    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64]
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    identity: str

    @classmethod
    def distilled(cls, images: DistilledImages) -> Source:
        """Return distilled images as a source; their identity is the hash of their pixels."""
        found = hashlib.sha256(np.ascontiguousarray(images.pixels).data).hexdigest()
        names, mean, std = images.class_names, tuple(images.mean), tuple(images.std)
        return cls(images.pixels, images.labels, names, mean, std, found)

    @classmethod
    def real(cls, images: ImageSet, mean: tuple[float, ...], std: tuple[float, ...]) -> Source:
        """Return real images as a source; their identity is that of their ids and labels."""
        found = digest({"ids": images.ids.tolist(), "labels": images.labels.tolist()})
        return cls(images.images, images.labels, images.class_names, mean, std, found)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def size(self) -> int:
        """Pixels of a side."""
        return int(self.pixels.shape[1])

    @property
    def classes_sha256(self) -> str:
        """The hash of the class names in their order."""
        return digest(list(self.class_names))

    def check(self, header: LabelHeader) -> None:
        """Compare with what labels were made of.

        Raises
        ------
        ValueError
            If the labels belong to other images, classes or another order of the classes.
        """
        if header.classes_sha256 != self.classes_sha256:
            raise ValueError(
                "the labels were made for other classes, or for these in another order; "
                "relabel these images"
            )
        same = (header.images, header.source_size) == (len(self), self.size)
        if not same or header.source != self.identity:
            raise ValueError(
                f"the labels were made for {header.images} other images of {header.source_size} "
                "pixels; relabel these images"
            )
        if (header.mean, header.std) != (tuple(self.mean), tuple(self.std)):
            raise ValueError(
                f"the labels were made with the normalisation {header.mean}, {header.std}, and "
                f"the images have {self.mean}, {self.std}; relabel these images"
            )


class Viewer:
    """Makes the pixels of views on a device.

    The images go to a GPU once, as uint8, if they fit a quarter of its free memory.

    Parameters
    ----------
    source : Source
    size : int
        Pixels of a side of the views.
    device : torch.device
    randaugment : RandAugment, optional
        Of views that have numbers for it.
    """

    def __init__(
        self,
        source: Source,
        size: int,
        device: torch.device,
        randaugment: RandAugment | None = None,
    ) -> None:
        self.source, self.size, self.device = source, size, device
        self._augment: Augment | None = None
        if randaugment is not None:
            self._augment = partial(randaugment, mean=source.mean, std=source.std)
        self._resident: torch.Tensor | None = None
        if device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(device)
            if source.pixels.nbytes < free // 4:
                self._resident = torch.from_numpy(np.array(source.pixels)).to(device)

    def __call__(self, views: Views) -> torch.Tensor:
        """Return the (b, 3, size, size) normalised pixels of views, channels last in memory."""
        if self._resident is None:
            rows = np.ascontiguousarray(self.source.pixels[views.image.numpy()])
            taken = torch.from_numpy(rows).to(self.device, non_blocking=True)
        else:
            taken = self._resident[views.image.to(self.device, non_blocking=True)]
        x = normalise(taken.permute(0, 3, 1, 2), self.source.mean, self.source.std)
        here = replace(views, image=torch.arange(len(views)))
        seen = show(x, here, self.size, self._augment)
        return seen.contiguous(memory_format=torch.channels_last)


class Batch(NamedTuple):
    """A training batch.

    Attributes
    ----------
    x : (b, 3, size, size) float32
        Normalised views.
    logits : (b, C) float32
        The teacher's logits of them.
    targets : (b, C) float32
        The hard labels, mixed as the pixels are.
    """

    x: torch.Tensor
    logits: torch.Tensor
    targets: torch.Tensor


class ReplayedBatches(IterableDataset[Batch]):
    """Recorded views as training batches, in the recorded order.

    In a `torch.utils.data.DataLoader` use ``batch_size=None``. Its workers share the batches:
    each one comes exactly once, in the same order whatever the number of workers.

    Parameters
    ----------
    source : Source
        The images that the labels belong to.
    labels : SoftLabels
    epochs : iterable of int, optional
        Which ones iteration goes through; all that were asked for by default.
    batch_size : int, optional
        Rows of a batch; the recorded number by default. Each row keeps its own label: mixing was
        settled when the labels were made.
    device : str or torch.device
        Where views are made; see `Viewer`.

    Raises
    ------
    ValueError
        If the labels were made for other images, or the batch size is below 1.
    """

    def __init__(
        self,
        source: Source,
        labels: SoftLabels,
        *,
        epochs: Iterable[int] | None = None,
        batch_size: int | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        source.check(labels.header)
        self.labels, self.source, self.device = labels, source, torch.device(device)
        self.epochs = tuple(range(labels.epochs) if epochs is None else epochs)
        self.batch_size = labels.header.batch_size if batch_size is None else batch_size
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
        header = labels.header
        self._viewer = Viewer(source, header.view_size, self.device, header.randaugment)
        self._classes = torch.from_numpy(np.array(source.labels))

    def __len__(self) -> int:
        return len(self.epochs) * -(-self.labels.header.images // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        mine, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        each = len(self) // max(len(self.epochs), 1)
        for place, epoch in enumerate(self.epochs):
            yield from self._some(epoch, range((mine - place * each) % workers, each, workers))

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """Yield the batches of one epoch."""
        return self._some(epoch, range(-(-self.labels.header.images // self.batch_size)))

    def _some(self, epoch: int, numbers: range) -> Iterator[Batch]:
        recorded, images = self.labels.header.batch_size, self.labels.header.images
        if self.batch_size == recorded:
            for number in numbers:
                yield self._recorded(epoch, number)
            return
        held: dict[int, Batch] = {}
        for number in numbers:
            start, stop = number * self.batch_size, min((number + 1) * self.batch_size, images)
            touched = range(start // recorded, (stop - 1) // recorded + 1)
            held = {
                one: held[one] if one in held else self._recorded(epoch, one) for one in touched
            }
            joined = (torch.cat(parts) for parts in zip(*held.values(), strict=True))
            first = start - touched.start * recorded
            yield Batch(*(whole[first : first + stop - start] for whole in joined))

    def _recorded(self, epoch: int, number: int) -> Batch:
        views, logits = self.labels.batch(epoch, number)
        targets = mixed_targets(self._classes, views, len(self.source.class_names))
        return Batch(
            self._viewer(views),
            logits.to(self.device, non_blocking=True),
            targets.to(self.device, non_blocking=True),
        )
