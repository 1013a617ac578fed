"""What recover begins from: noise, real images, or the best crops of real images."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import cross_entropy

from curate.runtime import rng
from distill.curriculum import axis_weights, resample, resized_boxes
from distill.image_set import ImageSet
from distill.recipes import Recipe
from distill.teacher import Teacher

_BATCH = 500


@dataclass(frozen=True)
class Beginning:
    """Images sorted by rank, then by class.

    Attributes
    ----------
    images : (ipc, C, 3, size, size) float32
        Normalised as the first teacher expects.
    kind : (ipc * C,) str
        ``noise``, ``real`` or ``patch``.
    ids : (ipc * C,) str
        The real images; several are joined by ``+``.
    sources : (ipc * C, k) int64
        The rows of the real images; k is 0 for noise.
    """

    images: torch.Tensor
    kind: NDArray[np.str_]
    ids: NDArray[np.str_]
    sources: NDArray[np.int64]


def initialise(
    recipe: Recipe,
    teacher: Teacher,
    images: ImageSet,
    *,
    ipc: int,
    seed: int,
    device: torch.device,
    student: Teacher | None = None,
    taken: NDArray[np.int64] | None = None,
) -> Beginning:
    """Return the images from which recover starts.

    Rank r of a class does not depend on how many ranks there are, except that RDED and its kin
    sort all their crops of a class.

    Parameters
    ----------
    recipe : Recipe
        Its `begin`, `choice` and patch numbers count.
    teacher : Teacher
        Judges real images; on `device`.
    images : ImageSet
    ipc : int
        Images of each class.
    seed : int
    device : torch.device
    student : Teacher, optional
        Trained on what was distilled before; images it gets wrong come first (CUDD).
    taken : (m,) int64, optional
        Rows of real images that others began as, as many of each class: they are not taken again.

    Raises
    ------
    ValueError
        If a class has too few images.
    """
    if recipe.begin == "noise":
        return _noise(images, ipc, seed, device)
    if recipe.begin == "real":
        used = np.zeros(0, np.int64) if taken is None else taken
        return _real(recipe, teacher, images, ipc, seed, device, student, used)
    return _patches(recipe, teacher, images, ipc, seed, device)


def _noise(images: ImageSet, ipc: int, seed: int, device: torch.device) -> Beginning:
    drawn = []
    for rank in range(ipc):
        number = int(rng(seed, "recover", "noise", rank).integers(2**63))
        generator = torch.Generator().manual_seed(number)
        shape = (images.classes, 3, images.size, images.size)
        drawn.append(torch.randn(shape, generator=generator))
    n = ipc * images.classes
    x, ids = torch.stack(drawn).to(device), np.full(n, "", dtype=np.str_)
    return Beginning(x, np.full(n, "noise"), ids, np.empty((n, 0), np.int64))


def check_enough(images: ImageSet, ipc: int) -> None:
    """Check that every class has as many real images.

    Raises
    ------
    ValueError
        If one has not.
    """
    c = int(images.counts.argmin())
    if images.counts[c] < ipc:
        raise ValueError(
            f"class {images.class_names[c]!r} has {images.counts[c]} images and ipc is {ipc}: "
            "lower ipc, or use a method that begins from noise (sre2l, cda)"
        )


def _real(
    recipe: Recipe,
    teacher: Teacher,
    images: ImageSet,
    ipc: int,
    seed: int,
    device: torch.device,
    student: Teacher | None,
    taken: NDArray[np.int64],
) -> Beginning:
    check_enough(images, ipc + len(taken) // images.classes)
    chosen = np.empty((ipc, images.classes), np.int64)
    for c in range(images.classes):
        rows = rng(seed, "recover", "real", c).permutation(np.flatnonzero(images.labels == c))
        rows = rows[~np.isin(rows, taken)]
        chosen[:, c] = rows[_preferred(recipe, teacher, images, rows, device, student)[:ipc]]
    pixels = images.batch(chosen.ravel(), device)
    shape = (ipc, images.classes, 3, images.size, images.size)
    x = teacher.normalise(pixels).contiguous().reshape(shape)
    kind = np.full(chosen.size, "real")
    return Beginning(x, kind, images.ids[chosen.ravel()], chosen.reshape(-1, 1))


def _preferred(
    recipe: Recipe,
    teacher: Teacher,
    images: ImageSet,
    rows: NDArray[np.int64],
    device: torch.device,
    student: Teacher | None,
) -> NDArray[np.int64]:
    """Return the positions in `rows`, the most wanted first; ties keep their order."""
    if recipe.choice == "random":
        return np.arange(len(rows))
    logits = _logits(teacher, teacher.normalise(images.batch(rows, device)))
    labels = torch.from_numpy(images.labels[rows]).to(device)
    if recipe.choice != "correct":
        loss = cross_entropy(logits, labels, reduction="none").cpu().numpy()
        return _ordered(loss, recipe.choice)
    wrong = (logits.argmax(dim=1) != labels).cpu().numpy()
    if student is None:
        return np.argsort(wrong, kind="stable")
    seen = _logits(student, student.normalise(images.batch(rows, device)))
    missed = (seen.argmax(dim=1) != labels).cpu().numpy()
    # Teacher right and student wrong; then both wrong; then what the student knows already.
    order: NDArray[np.int64] = np.lexsort((wrong, ~missed))
    return order


def _ordered(loss: NDArray[np.float32], choice: str) -> NDArray[np.int64]:
    order = np.argsort(loss, kind="stable")
    if choice != "median":
        return order
    distance = np.abs(np.arange(len(order)) - (len(order) - 1) / 2)
    middle: NDArray[np.int64] = order[np.argsort(distance, kind="stable")]
    return middle


@torch.no_grad()
def _logits(model: Teacher, x: torch.Tensor) -> torch.Tensor:
    return torch.cat([model.model(part).float() for part in torch.split(x, _BATCH)])


@dataclass(frozen=True)
class Patches:
    """The crops chosen for one class, the best first.

    Attributes
    ----------
    images : (m, 3, side, side) float32
    rows : (m,) int64
        The real image of each.
    boxes : (m, 4) int64
        Top, left, height, width in it.
    """

    images: torch.Tensor
    rows: NDArray[np.int64]
    boxes: torch.Tensor


def best_patches(
    recipe: Recipe,
    teacher: Teacher,
    images: ImageSet,
    label: int,
    *,
    count: int,
    seed: int,
    device: torch.device,
) -> Patches:
    """Return the best crops of a class (RDED, Sun et al. 2024).

    Each of up to `patch_candidates` real images gives `patch_crops` random square crops, resized
    to ``size / patch_factor``; the teacher judges each crop, padded to the full size. Of every
    image the crop of lowest cross-entropy counts, then of those the best `count`: the lowest, or
    for ``median`` the middle ones. Where there are fewer images than `count`, their second-best
    crops follow.

    Parameters
    ----------
    recipe : Recipe
    teacher : Teacher
        On `device`.
    images : ImageSet
    label : int
        The class.
    count : int
        Crops wanted.
    seed : int
    device : torch.device

    Raises
    ------
    ValueError
        If the class cannot give as many crops.
    """
    rows, boxes = candidate_boxes(recipe, images, label, seed)
    if rows.size * recipe.patch_crops < count:
        raise ValueError(
            f"class {images.class_names[label]!r} gives {rows.size * recipe.patch_crops} crops "
            f"and {count} are needed: lower ipc, or raise patch_crops"
        )
    side = images.size // recipe.patch_factor
    repeated = np.repeat(rows, recipe.patch_crops)
    crops = _cut(teacher, images, repeated, boxes, side, device)
    loss = _crop_losses(teacher, crops, label, images.size).reshape(len(rows), -1)
    within = np.argsort(loss, axis=1, kind="stable")
    chosen: list[int] = []
    for place in range(recipe.patch_crops):  # every image's best crop, then the second, ...
        best = np.take_along_axis(loss, within[:, place : place + 1], axis=1)[:, 0]
        order = _ordered(best, "median" if recipe.choice == "median" else "lowest")
        chosen += (order * recipe.patch_crops + within[order, place]).tolist()
        if len(chosen) >= count:
            break
    picked = np.array(chosen[:count])
    return Patches(crops[torch.from_numpy(picked).to(device)], repeated[picked], boxes[picked])


def candidate_boxes(
    recipe: Recipe, images: ImageSet, label: int, seed: int
) -> tuple[NDArray[np.int64], torch.Tensor]:
    """Return the (k,) real images tried for a class and their (k * patch_crops, 4) crops."""
    stream = rng(seed, "recover", "patches", label)
    rows = stream.permutation(np.flatnonzero(images.labels == label))[: recipe.patch_candidates]
    n = len(rows) * recipe.patch_crops
    generator = torch.Generator().manual_seed(int(stream.integers(2**63)))
    lowest = torch.full((n,), recipe.patch_scale[0], dtype=torch.float64)
    boxes = resized_boxes(lowest, recipe.patch_scale[1], images.size, generator, ratio=(1.0, 1.0))
    return rows, boxes


def _cut(
    teacher: Teacher,
    images: ImageSet,
    rows: NDArray[np.int64],
    boxes: torch.Tensor,
    side: int,
    device: torch.device,
) -> torch.Tensor:
    parts = []
    for start in range(0, len(rows), _BATCH):
        x = teacher.normalise(images.batch(rows[start : start + _BATCH], device))
        box = boxes[start : start + _BATCH].to(device, torch.float32)
        down, across = (
            axis_weights(box[:, i], box[:, i + 2], source=images.size, out=side, antialias=True)
            for i in (0, 1)
        )
        parts.append(resample(x.contiguous()[:, None], down, across)[:, 0])
    return torch.cat(parts)


def _crop_losses(
    teacher: Teacher, crops: torch.Tensor, label: int, size: int
) -> NDArray[np.float32]:
    before = (size - crops.shape[-1]) // 2
    after = size - crops.shape[-1] - before
    shown = torch.nn.functional.pad(crops, (before, after, before, after))
    logits = _logits(teacher, shown)
    target = torch.full((len(logits),), label, device=logits.device)
    loss: NDArray[np.float32] = cross_entropy(logits, target, reduction="none").cpu().numpy()
    return loss


def _patches(
    recipe: Recipe,
    teacher: Teacher,
    images: ImageSet,
    ipc: int,
    seed: int,
    device: torch.device,
) -> Beginning:
    factor = recipe.patch_factor
    if images.size % factor:
        raise ValueError(f"images of {images.size} pixels cannot be cut into {factor} parts")
    x = torch.empty(ipc, images.classes, 3, images.size, images.size, device=device)
    rows = np.empty((ipc, images.classes, factor**2), np.int64)
    for c in range(images.classes):
        found = best_patches(
            recipe, teacher, images, c, count=ipc * factor**2, seed=seed, device=device
        )
        tiles = found.images.reshape(ipc, factor, factor, 3, *found.images.shape[-2:])
        x[:, c] = tiles.permute(0, 3, 1, 4, 2, 5).reshape(ipc, 3, images.size, images.size)
        rows[:, c] = found.rows.reshape(ipc, factor**2)
    sources = rows.reshape(-1, factor**2)
    return Beginning(x, np.full(len(sources), "patch"), names_of(images, sources), sources)


def names_of(images: ImageSet, sources: NDArray[np.int64]) -> NDArray[np.str_]:
    """Return the (n,) ids of the real images in (n, k) rows; several are joined by ``+``."""
    return np.array(["+".join(dict.fromkeys(images.ids[row])) for row in sources], dtype=np.str_)
