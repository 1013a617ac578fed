"""What students train on: recorded views, or views drawn with hard labels or asked teachers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from distill.image_set import ImageSet
from distill.label_maps import LabelMaps
from distill.relabel import Ensemble
from distill.replay import Batch, ReplayedBatches, Source, Viewer
from distill.soft_labels import SoftLabels
from distill.teacher import Teacher
from distill.view_draw import ViewDraw
from distill.views import Views, mixed_targets

_TINY = float(np.finfo(np.float32).tiny)


class BatchSource(Protocol):
    """What a student trains on: `distill.replay.ReplayedBatches`, or `DrawnBatches`."""

    source: Source
    batch_size: int

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """Yield the batches of an epoch."""
        ...


class DrawnBatches:
    """Views drawn as the teachers would be shown them, with hard labels only.

    Parameters
    ----------
    source : Source
    draw : ViewDraw
        Its batch size is the student's.
    device : torch.device
    """

    def __init__(self, source: Source, draw: ViewDraw, device: torch.device) -> None:
        self.source, self.draw, self.batch_size = source, draw, draw.batch_size
        self._viewer = Viewer(source, source.size, device, draw.randaugment)
        self._classes = torch.from_numpy(source.labels.copy())

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """Yield the batches of an epoch; their logits are empty."""
        size, classes = self.source.size, len(self.source.class_names)
        where = self._viewer.device
        order = self.draw.order(len(self.source), epoch)
        for number, image in enumerate(torch.split(order, self.batch_size)):
            views = self.draw.views(image, epoch, number, source=size, size=size)
            targets = mixed_targets(self._classes, views, classes)
            logits = self.logits(views).to(where)
            yield Batch(self._viewer(views), logits, targets.to(where, non_blocking=True))

    def logits(self, views: Views) -> torch.Tensor:
        """Return soft labels of views; here (b, 0), none."""
        return torch.empty(len(views), 0)


class TaughtBatches(DrawnBatches):
    """Views drawn as the teachers would be shown them, about which they are asked at once.

    Nothing is stored, and every epoch has labels of its own.

    Parameters
    ----------
    source : Source
    draw : ViewDraw
        Its batch size is the student's.
    teachers : Teacher or sequence of Teacher
        The labels are their mean logits.
    device : torch.device
    """

    def __init__(
        self,
        source: Source,
        draw: ViewDraw,
        teachers: Sequence[Teacher] | Teacher,
        device: torch.device,
    ) -> None:
        super().__init__(source, draw, device)
        self._ensemble = Ensemble(source, teachers, source.size, device, draw.randaugment)

    def logits(self, views: Views) -> torch.Tensor:
        """Return the (b, C) logits of the teachers."""
        return self._ensemble.logits([views])


class StaticBatches(DrawnBatches):
    """Views drawn anew in every epoch, each with the one soft label of its image.

    Parameters
    ----------
    source : Source
    draw : ViewDraw
        Its batch size is the student's.
    device : torch.device
    soft_label : (n, C) float
        Log-probabilities; see `distill.static_labels`.

    Raises
    ------
    ValueError
        If they are not one for each image.
    """

    def __init__(
        self,
        source: Source,
        draw: ViewDraw,
        device: torch.device,
        soft_label: NDArray[np.floating[Any]],
    ) -> None:
        super().__init__(source, draw, device)
        wanted = (len(source), len(source.class_names))
        if soft_label.shape != wanted:
            raise ValueError(f"soft labels have shape {soft_label.shape}; it must be {wanted}")
        self._label = torch.from_numpy(soft_label.astype(np.float32))

    def logits(self, views: Views) -> torch.Tensor:
        """Return (b, C) log-probabilities, mixed as the pixels are."""
        return mixed_answers(self._label[views.image], views)


class MappedBatches(DrawnBatches):
    """Views of real images drawn anew in every epoch, labelled by where they lie in a label map.

    Parameters
    ----------
    images : ImageSet
    maps : LabelMaps
    draw : ViewDraw
        Its batch size is the student's.
    device : torch.device

    Raises
    ------
    ValueError
        If the maps were made for other images or classes.
    """

    def __init__(
        self, images: ImageSet, maps: LabelMaps, draw: ViewDraw, device: torch.device
    ) -> None:
        source = Source.real(images, maps.header.mean, maps.header.std)
        if (source.identity, source.classes_sha256, source.size) != (
            maps.header.source,
            maps.header.classes_sha256,
            maps.header.size,
        ):
            raise ValueError(
                f"the label maps were made for {maps.header.images} other images, or other "
                "classes; make them for these with distill.label_maps.store_label_maps"
            )
        super().__init__(source, draw, device)
        self._maps = maps

    def logits(self, views: Views) -> torch.Tensor:
        """Return the (b, C) logits of the crops, mixed as the pixels are."""
        return mixed_answers(self._maps.logits(views.image, views.crop), views)


def mixed_answers(logits: torch.Tensor, views: Views) -> torch.Tensor:
    """Return (b, C) logits whose probabilities are mixed as the pixels of the views are."""
    if views.mix_kind == "none":
        return logits
    own = logits.softmax(dim=1)
    mixed = views.mix_weight * own + (1 - views.mix_weight) * own[views.partner]
    return mixed.clamp(min=_TINY).log()


class HardBatches:
    """Recorded views with hard labels only: nobody can train on logits of other images.

    Parameters
    ----------
    source : Source
        Images in the places of those that the views were recorded of: as many, of the same size.
    labels : SoftLabels
        The views; see `distill.soft_labels`.
    batch_size : int
    device : torch.device
    """

    def __init__(
        self, source: Source, labels: SoftLabels, *, batch_size: int, device: torch.device
    ) -> None:
        header = replace(
            labels.header,
            source=source.identity,
            mean=tuple(source.mean),
            std=tuple(source.std),
        )
        shown = replace(
            labels, header=header, recompute=lambda v: torch.zeros(len(v), header.classes)
        )
        self.source, self.batch_size = source, batch_size
        self._replayed = ReplayedBatches(source, shown, batch_size=batch_size, device=device)

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """Yield the batches of an epoch; their logits are empty."""
        for batch in self._replayed.epoch(epoch):
            yield batch._replace(logits=batch.logits[:, :0])
