"""Real images in place of distilled ones: as many for each class, with labels of the same bytes."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

import coreset
from curate.runtime import resolve_device, rng
from distill.distilled_images import DistilledImages
from distill.image_set import ImageSet
from distill.label_writer import LabelFiles, LabelWriter
from distill.relabel import Ensemble
from distill.replay import Source
from distill.soft_labels import SoftLabels
from distill.teacher import Teacher
from distill.views import Views, plain_views

#: Coreset methods that are tried by default: the class mean, the covering, the medoids.
CORESET_METHODS = ("herding", "k-center", "facility-location")


def real_subset(train: ImageSet, rows: NDArray[np.int64], like: DistilledImages) -> DistilledImages:
    """Return real images in the order of a distilled set.

    Parameters
    ----------
    train : ImageSet
    rows : (n,) int64
        Rows of `train`, as many of each class as `like` has; inside a class their order is kept.
    like : DistilledImages
        Gives the classes, the images per class and the normalisation.

    Raises
    ------
    ValueError
        If classes or sizes differ, or a class has another number of rows.
    """
    check_real(train, like)
    labels, ipc, classes = train.labels[rows], like.ipc, train.classes
    counts = np.bincount(labels, minlength=classes)
    if (counts != ipc).any():
        c = int(np.argmax(counts != ipc))
        raise ValueError(
            f"class {train.class_names[c]!r} has {counts[c]} rows; it must have {ipc} like the "
            "distilled set"
        )
    by_class = np.stack([rows[labels == c] for c in range(classes)])
    order = by_class.T.reshape(-1)  # sorted by rank, then by class
    unknown = np.full(len(order), np.nan, np.float32)
    return DistilledImages(
        np.ascontiguousarray(train.images[order]),
        like.labels,
        like.ipc_rank,
        np.full(len(order), "real"),
        train.ids[order],
        unknown,
        unknown,
        unknown,
        like.class_names,
        like.mean,
        like.std,
    )


def check_real(train: ImageSet, like: DistilledImages) -> None:
    """Compare the real images with a distilled set.

    Raises
    ------
    ValueError
        If the classes, their order or the sizes differ, or a class has fewer images than the IPC.
    """
    if train.class_names != like.class_names:
        raise ValueError(
            f"the training images' classes {train.class_names[:4]} are not the distilled set's "
            f"{like.class_names[:4]}, in the same order"
        )
    if train.size != like.size:
        raise ValueError(
            f"training images have {train.size} pixels a side, distilled ones {like.size}; "
            "recorded views fit one size only"
        )
    if train.counts.min() < like.ipc:
        c = int(train.counts.argmin())
        raise ValueError(
            f"class {train.class_names[c]!r} has {train.counts[c]} training images, fewer than "
            f"the {like.ipc} per class of the distilled set"
        )


def random_subset(train: ImageSet, like: DistilledImages, *, seed: int = 0) -> DistilledImages:
    """Return random real images, as many of each class as `like` has.

    Raises
    ------
    ValueError
        See `check_real`.
    """
    check_real(train, like)
    order = rng(seed, "random-subset").permutation(len(train))
    mine = [order[train.labels[order] == c][: like.ipc] for c in range(train.classes)]
    return real_subset(train, np.concatenate(mine).astype(np.int64), like)


def coreset_subset(
    train: ImageSet,
    features: NDArray[np.float32],
    like: DistilledImages,
    *,
    method: str,
    seed: int = 0,
) -> DistilledImages:
    """Return the real images that a coreset method chooses inside each class.

    Parameters
    ----------
    train : ImageSet
    features : (n, d) float32
        See `penultimate`.
    like : DistilledImages
    method : str
        Of `coreset.METHODS`, one that reads features, or features and labels.
    seed : int

    Raises
    ------
    ValueError
        See `check_real`; or if the method is unknown or needs something else.
    """
    check_real(train, like)
    chosen = coreset.select(
        features,
        like.ipc * train.classes,
        method=method,
        labels=train.labels,
        per_class="balanced",
        seed=seed,
    )
    return real_subset(train, chosen.indices, like)


@torch.inference_mode()
def penultimate(
    teacher: Teacher,
    images: ImageSet,
    *,
    device: str | torch.device = "auto",
    batch_size: int = 512,
) -> NDArray[np.float32]:
    """Return what the teacher's last linear layer reads, (n, d) float32.

    Of a network whose classifier is no linear layer they are its logits.
    """
    where = resolve_device(device)
    own = next(teacher.model.parameters()).device
    model = teacher.model if own == where else deepcopy(teacher.model).to(where)
    layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
    seen: list[torch.Tensor] = []
    found: list[NDArray[np.float32]] = []
    hook = None
    if layers and layers[-1].out_features == teacher.classes:
        hook = layers[-1].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    try:
        for start in range(0, len(images), batch_size):
            seen.clear()
            logits = model(teacher.normalise(images.batch(slice(start, start + batch_size), where)))
            x = seen[-1] if hook is not None else logits
            found.append(x.flatten(1).float().cpu().numpy())
    finally:
        if hook is not None:
            hook.remove()
    return np.concatenate(found)


def same_labels(
    labels: SoftLabels,
    images: DistilledImages,
    teachers: Sequence[Teacher] | Teacher,
    *,
    plain: bool = False,
    device: str | torch.device = "auto",
) -> SoftLabels:
    """Ask the same teachers about the very views of other labels, shown on other images.

    Crops, flips, partners, boxes, codec and the number of stored epochs are those of `labels`; so
    are the bytes before compression, to the last one.

    Parameters
    ----------
    labels : SoftLabels
        Of the distilled set.
    images : DistilledImages
        As many, of the same size; row i of the same class.
    teachers : Teacher or sequence of Teacher
        Those that made `labels`, in their order.
    plain : bool
        Show whole images, not cropped, flipped or mixed; the order stays.
    device : str or torch.device

    Raises
    ------
    ValueError
        If these are other teachers, or the images do not fit the views.
    """
    source = Source.distilled(images)
    augment = None if plain else labels.header.randaugment
    size = labels.header.view_size
    ensemble = Ensemble(source, teachers, size, resolve_device(device), augment)
    _check_same(labels, source, ensemble)
    header = replace(
        labels.header,
        source=source.identity,
        mean=tuple(source.mean),
        std=tuple(source.std),
        epochs=labels.stored_epochs,
        mix="none" if plain else labels.header.mix,
        augment_count=0 if augment is None else augment.count,
    )
    recorded = labels
    if labels.codec.name == "params":  # the views are enough, nobody need be asked
        recorded = replace(labels, recompute=lambda v: torch.zeros(len(v), header.classes))

    def views(epoch: int, number: int) -> Views:
        shown, _ = recorded.batch(epoch, number)
        return plain_views(shown.image, source.size) if plain else shown

    writer = LabelWriter(header, views, ensemble.logits, LabelFiles(None))
    found = writer.run(([labels.codec], [labels.codec]), None)
    if bytes_before_compression(found) != bytes_before_compression(labels):
        raise RuntimeError("labels of other bytes than those that they are compared with")
    return replace(found, recompute=ensemble) if labels.codec.name == "params" else found


def bytes_before_compression(labels: SoftLabels) -> tuple[int, int]:
    """Return the number of stored views, and the bytes of all their labels."""
    views = labels.stored_epochs * labels.header.images
    return views, views * labels.codec.bytes_per_view


def _check_same(labels: SoftLabels, source: Source, ensemble: Ensemble) -> None:
    if ensemble.sha256 != labels.header.teachers:
        raise ValueError(
            "these are not the teachers that the distilled set's labels were made with, or not in "
            "their order; a comparison needs the same ones"
        )
    wanted = (labels.header.images, labels.header.source_size)
    if (len(source), source.size) != wanted:
        raise ValueError(
            f"{len(source)} images of {source.size} pixels; the recorded views need {wanted[0]} "
            f"of {wanted[1]}"
        )
