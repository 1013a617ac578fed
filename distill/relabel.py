"""Relabel: ask the teachers about recorded views, and keep what they say within a byte budget."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path
from typing import Literal

import torch

from curate.manifest import open_step
from curate.runtime import resolve_device
from distill.codecs import CodecName
from distill.distilled_images import DistilledImages
from distill.label_parts import LabelHeader, batches_per_part
from distill.label_writer import LabelFiles, LabelWriter, candidates
from distill.randaugment import RandAugment
from distill.replay import Source, Viewer
from distill.soft_labels import SoftLabels
from distill.teacher import Teacher
from distill.view_draw import Crop, ViewDraw
from distill.views import MixKind, Views

_FORWARD = 512


def relabel(
    images: DistilledImages,
    teachers: Sequence[Teacher] | Teacher,
    *,
    epochs: int,
    batch_size: int,
    crop: Crop = "resized",
    scale: tuple[float, float] = (0.08, 1.0),
    pad: int | None = None,
    flip: bool = True,
    mix: MixKind = "cutmix",
    mix_alpha: float | None = None,
    randaugment: RandAugment | None = None,
    codec: CodecName | Literal["auto"] = "auto",
    top_k: int = 10,
    label_bytes: int | None = None,
    seed: int = 0,
    device: str | torch.device = "auto",
    folder: Path | None = None,
) -> SoftLabels:
    """Label views of distilled images with the mean logits of the teachers.

    With a budget, ``auto`` takes the first of these that fits: every epoch as ``fp16``, as
    ``uint8``, as ``top-k`` with k of 50, 20, 10 and 5 (where that is smaller than ``uint8``); the
    last of them with as many epochs as fit, used again in turn; views only, as many epochs as
    fit, about which the teachers are asked at replay.

    Parameters
    ----------
    images : DistilledImages
    teachers : Teacher or sequence of Teacher
        Of the same classes in the same order. They stay in evaluation mode: batch norm by running
        statistics, no dropout, so that a label does not depend on its neighbours in the batch.
    epochs, batch_size, crop, scale, pad, flip, mix, mix_alpha, randaugment, seed
        See `ViewDraw`.
    codec : {"auto", "fp16", "uint8", "top-k", "params"}
        See `distill.codecs`; ``auto`` without a budget is ``fp16``.
    top_k : int
        Classes that ``top-k`` keeps where it is asked for by name.
    label_bytes : int, optional
        Most bytes of the labels' files, headers included; never exceeded.
    device : str or torch.device
    folder : Path, optional
        Keep the files here, not in memory. A run that was stopped goes on after the last of them.

    Returns
    -------
    SoftLabels

    Raises
    ------
    ValueError
        If the teachers know other classes or another image size, or a parameter makes no sense.
    BudgetError
        If not even the views of one epoch fit.
    FingerprintError
        If the folder holds other labels.
    """
    draw = ViewDraw(
        epochs=epochs,
        batch_size=batch_size,
        crop=crop,
        scale=scale,
        pad=pad,
        flip=flip,
        mix=mix,
        mix_alpha=mix_alpha,
        randaugment=randaugment,
        seed=seed,
    )
    return label_views(
        Source.distilled(images),
        teachers,
        draw,
        codec=codec,
        top_k=top_k,
        label_bytes=label_bytes,
        device=device,
        folder=folder,
    )


def label_views(
    source: Source,
    teachers: Sequence[Teacher] | Teacher,
    draw: ViewDraw,
    *,
    view_size: int | None = None,
    codec: CodecName | Literal["auto"] = "auto",
    top_k: int = 10,
    label_bytes: int | None = None,
    device: str | torch.device = "auto",
    folder: Path | None = None,
) -> SoftLabels:
    """Label views of any images; see `relabel`.

    Parameters
    ----------
    source : Source
    draw : ViewDraw
    view_size : int, optional
        Pixels of a side of the views; those of the images by default.
    """
    size = source.size if view_size is None else view_size
    codecs = candidates(codec, len(source.class_names), top_k)
    ensemble = Ensemble(source, teachers, size, resolve_device(device), draw.randaugment)
    header = _header(source, ensemble, draw)
    if label_bytes is not None and label_bytes < 1:
        raise ValueError(f"label_bytes is {label_bytes}; it must be at least 1, or None")
    params = {**asdict(draw), "view_size": size, "codec": codec, "top_k": top_k}
    inputs = {"images": source.identity, "classes": source.classes_sha256}
    inputs |= {f"teacher {number}": value for number, value in enumerate(header.teachers)}
    step = None
    if folder is not None:
        params["label_bytes"] = label_bytes
        step = open_step(folder, step="relabel", step_version=1, params=params, inputs=inputs)
    orders: dict[int, torch.Tensor] = {}

    def views(epoch: int, number: int) -> Views:
        if epoch not in orders:
            orders.clear()
            orders[epoch] = draw.order(len(source), epoch)
        image = torch.split(orders[epoch], header.batch_size)[number]
        return draw.views(image, epoch, number, source=source.size, size=size)

    writer = LabelWriter(header, views, ensemble.logits, LabelFiles(step))
    labels = writer.run(codecs, label_bytes)
    return replace(labels, recompute=ensemble) if labels.header.codec == "params" else labels


class Ensemble:
    """Teachers that give the mean of their logits about views.

    Parameters
    ----------
    source : Source
        The images, in whose normalisation views are made.
    teachers : Teacher or sequence of Teacher
    size : int
        Pixels of a side of the views.
    device : torch.device
    randaugment : RandAugment, optional
        Of views that have numbers for it.

    Raises
    ------
    ValueError
        If a teacher knows other classes, the same in another order, or another image size.
    """

    def __init__(
        self,
        source: Source,
        teachers: Sequence[Teacher] | Teacher,
        size: int,
        device: torch.device,
        randaugment: RandAugment | None = None,
    ) -> None:
        self.source, self.size, self.device = source, size, device
        self.teachers = (teachers,) if isinstance(teachers, Teacher) else tuple(teachers)
        if not self.teachers:
            raise ValueError("there are no teachers; relabel needs at least one")
        for teacher in self.teachers:
            _check(teacher, source, size)
        self.sha256 = tuple(teacher.sha256 for teacher in self.teachers)
        self._viewer = Viewer(source, size, device, randaugment)
        self._models = [self._placed(teacher) for teacher in self.teachers]

    def __call__(self, views: Views) -> torch.Tensor:
        """Return (b, C) float32 logits on the CPU."""
        return self.logits([views]).cpu()

    @torch.no_grad()
    def logits(self, batches: Sequence[Views]) -> torch.Tensor:
        """Return the (n, C) float32 logits of several batches, one after the other."""
        found, held, rows = [], [], 0
        for number, views in enumerate(batches):
            held.append(self._viewer(views))
            rows += len(views)
            if rows >= _FORWARD or number == len(batches) - 1:
                found.append(self._mean(torch.cat(held)))
                held, rows = [], 0
        return torch.cat(found)

    def _mean(self, x: torch.Tensor) -> torch.Tensor:
        total = torch.zeros((), device=self.device)
        for teacher, model in zip(self.teachers, self._models, strict=True):
            total = total + model(self._as_seen_by(teacher, x)).float()
        return total / len(self.teachers)

    def _as_seen_by(self, teacher: Teacher, x: torch.Tensor) -> torch.Tensor:
        own = (tuple(self.source.mean), tuple(self.source.std))
        if own == (tuple(teacher.mean), tuple(teacher.std)):
            return x
        mean, std, shift, scale = (
            torch.tensor(values, device=x.device)[:, None, None]
            for values in (*own, teacher.mean, teacher.std)
        )
        return (x * std + mean - shift) / scale

    def _placed(self, teacher: Teacher) -> torch.nn.Module:
        model = teacher.model.eval()
        parameter = next(model.parameters(), None)
        if parameter is None or parameter.device == self.device:
            return model
        return deepcopy(model).to(self.device)


def attach(
    labels: SoftLabels,
    images: DistilledImages | Source,
    teachers: Sequence[Teacher] | Teacher,
    *,
    device: str | torch.device = "auto",
) -> SoftLabels:
    """Give labels of the ``params`` codec the teachers that replay asks.

    Raises
    ------
    ValueError
        If these are other images or other teachers than the labels were made with.
    """
    source = images if isinstance(images, Source) else Source.distilled(images)
    source.check(labels.header)
    header = labels.header
    ensemble = Ensemble(
        source, teachers, header.view_size, resolve_device(device), header.randaugment
    )
    if ensemble.sha256 != labels.header.teachers:
        raise ValueError(
            "these are not the teachers that the labels were made with, or not in their order: "
            f"the hashes are {_short(ensemble.sha256)} and {_short(labels.header.teachers)}"
        )
    return replace(labels, recompute=ensemble)


def _check(teacher: Teacher, source: Source, size: int) -> None:
    if teacher.class_names != source.class_names:
        place = next(
            (
                number
                for number, (one, other) in enumerate(
                    zip(teacher.class_names, source.class_names, strict=False)
                )
                if one != other
            ),
            min(teacher.classes, len(source.class_names)),
        )
        raise ValueError(
            f"the teacher's {teacher.classes} classes are not the {len(source.class_names)} of the "
            f"images, in the same order: they differ at number {place} "
            f"({_at(teacher.class_names, place)} and {_at(source.class_names, place)})"
        )
    if teacher.size != size:
        raise ValueError(
            f"the teacher takes images of {teacher.size} pixels, the views have {size}; use "
            "another teacher or another size of the views"
        )


def _at(names: tuple[str, ...], place: int) -> str:
    return repr(names[place]) if place < len(names) else "none"


def _short(hashes: Sequence[str]) -> str:
    return ", ".join(value[:12] for value in hashes)


def _header(source: Source, ensemble: Ensemble, draw: ViewDraw) -> LabelHeader:
    header = LabelHeader(
        codec="params",
        k=0,
        classes=len(source.class_names),
        images=len(source),
        source_size=source.size,
        view_size=ensemble.size,
        epochs=draw.epochs,
        batch_size=min(draw.batch_size, len(source)),
        batches_per_part=1,
        mix=draw.mix,
        mean=tuple(source.mean),
        std=tuple(source.std),
        seed=draw.seed,
        source=source.identity,
        classes_sha256=source.classes_sha256,
        teachers=ensemble.sha256,
        augment_count=0 if draw.randaugment is None else draw.randaugment.count,
        augment_magnitude=0.0 if draw.randaugment is None else draw.randaugment.magnitude,
    )
    return replace(header, batches_per_part=batches_per_part(header))
