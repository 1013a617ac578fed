"""Validate: what students learn from a distilled set, beside what real images would have given."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from curate.errors import ShardError
from curate.manifest import atomic_write_bytes, digest
from curate.progress import task
from curate.runtime import resolve_device, rng
from distill.baselines import (
    CORESET_METHODS,
    check_real,
    coreset_subset,
    penultimate,
    random_subset,
    same_labels,
)
from distill.distilled import DistilledSet, encode_image
from distill.distilled_images import DistilledImages
from distill.image_set import ImageSet
from distill.relabel import attach
from distill.replay import ReplayedBatches, Source
from distill.soft_labels import SoftLabels
from distill.squeeze import accuracy
from distill.student_batches import BatchSource, DrawnBatches, HardBatches
from distill.students import LabelKind, StudentConfig, train_student
from distill.teacher import Teacher
from distill.validation import Row, Validation
from distill.view_draw import ViewDraw

__all__ = ["Row", "Validation", "validate"]

_EPOCHS, _LEAST_SEEDS = 300, 3
_HELD_OUT, _ENCODED = 10_000, 1024
_PLAIN: dict[str, Any] = {"crop": "none", "flip": False, "mix": "none"}


def validate(
    distilled: DistilledSet,
    *,
    train: ImageSet,
    test: ImageSet,
    teachers: Sequence[Teacher] | Teacher,
    networks: Sequence[str] = ("resnet18",),
    seeds: Sequence[int] = (0, 1, 2),
    epochs: int | None = None,
    batch_size: int | None = None,
    coreset_methods: Sequence[str] = CORESET_METHODS,
    without_augmentation: bool = False,
    device: str | torch.device = "auto",
    checkpoint: Path | None = None,
    **options: Any,
) -> Validation:
    """Train students on a distilled set, and on as many real images with labels of the same bytes.

    Random images and the coreset are labelled by the same teachers, in the same views and the same
    codec; hard labels stand beside soft ones, in the same views. Every student is trained alike
    and judged once, after its last epoch.

    The coreset is the best of a few methods, chosen inside each class on the first teacher's
    penultimate features. Which is best is settled on training images that are in none of the
    coresets, so that the test images choose nothing.

    Parameters
    ----------
    distilled : DistilledSet
        Without soft labels there are rows of hard labels only, in views as `relabel` draws them.
    train, test : ImageSet
        Of the same classes in the same order, and of the same size as the distilled images.
    teachers : Teacher or sequence of Teacher
        Those that made the labels, in their order.
    networks : sequence of str
        Students; see `distill.networks.build`.
    seeds : sequence of int
        At least three, all different.
    epochs : int, optional
        By default as many as there are soft labels for, or 300. Later epochs begin with the first
        labels again.
    batch_size : int, optional
        By default 10 below 10 images per class, 50 below 50, then 100 (Sun et al. 2024, RDED);
        the recorded views are dealt out anew. Small batches are worth many points.
    coreset_methods : sequence of str
        Names in `coreset.METHODS` that read features.
    without_augmentation : bool
        Train on whole images too, as DD-Ranking's augmentation-robust score needs.
    device : str or torch.device
    checkpoint : Path, optional
        A JSON file of the students that are done; a run that was stopped leaves these out. It
        stays, and serves any other run with the same students.
    **options
        The other fields of `StudentConfig`.

    Returns
    -------
    Validation

    Raises
    ------
    ValueError
        If classes, their order or sizes differ, there are fewer than three seeds, or a parameter
        makes no sense.
    ShardError
        If the checkpoint is damaged.
    """
    judges = (teachers,) if isinstance(teachers, Teacher) else tuple(teachers)
    _check(distilled, train, test, judges, networks, seeds, coreset_methods)
    recorded = _EPOCHS if distilled.labels is None else distilled.labels.epochs
    config = StudentConfig(epochs=recorded if epochs is None else epochs, **options)
    size = usual_batch(distilled.images) if batch_size is None else batch_size
    bench = _Bench(distilled, judges, config, size, resolve_device(device), checkpoint)
    plains = (False, True) if without_augmentation else (False,)
    kinds: tuple[LabelKind, ...] = ("hard",) if distilled.labels is None else ("soft", "hard")
    total = 3 * len(networks) * len(seeds) * len(plains) * len(kinds)
    tries = len(coreset_methods) if len(coreset_methods) > 1 else 0
    with task("validate", total=total + tries, unit="students") as advance:
        method, chosen, trials = _best_coreset(
            bench, train, coreset_methods, networks[0], seeds[0], advance
        )
        subjects: dict[str, Callable[[int], DistilledImages]] = {
            "distilled": lambda _: distilled.images,
            "random": lambda seed: random_subset(train, distilled.images, seed=seed),
            "coreset": lambda _: chosen,
        }
        rows = [
            row
            for name, images in subjects.items()
            for plain in plains
            for row in _rows(bench, name, images, networks, kinds, plain, seeds, test, advance)
        ]
    rows.sort(key=lambda row: (networks.index(row.network), not row.augmented))
    rows += [_of_teacher(teacher, train, test) for teacher in judges]
    return Validation(
        tuple(rows), tuple(seeds), distilled.images.ipc, config.epochs, size, method, trials
    )


class _Bench:
    """Trains and judges one student at a time, each of them once."""

    def __init__(
        self,
        distilled: DistilledSet,
        teachers: tuple[Teacher, ...],
        config: StudentConfig,
        batch_size: int,
        device: torch.device,
        checkpoint: Path | None,
    ) -> None:
        self.distilled, self.teachers, self.config = distilled, teachers, config
        self.batch_size, self.device, self.checkpoint = batch_size, device, checkpoint
        self.draw = ViewDraw(epochs=min(config.epochs, 32_767), batch_size=batch_size)
        self.done = _read(checkpoint)
        self._labels: tuple[tuple[str, bool], SoftLabels] | None = None
        recorded = distilled.labels
        self._recipe = {
            "config": asdict(config),
            "batch_size": batch_size,
            "device": device.type,
            "labels": None if recorded is None else recorded.sha256,
            "teachers": [teacher.sha256 for teacher in teachers],
        }

    def trial(
        self,
        images: DistilledImages,
        network: str,
        labels: LabelKind,
        plain: bool,
        seed: int,
        test: ImageSet,
    ) -> tuple[float, int]:
        """Return the accuracy of a student and the bytes of the labels it was trained on."""
        source = Source.distilled(images)
        judged = Source.real(test, source.mean, source.std).identity
        case = [source.identity, network, labels, plain, seed, judged]
        key = digest({**self._recipe, "case": case})
        if key not in self.done:
            batches, nbytes = self._batches(images, source, labels, plain)
            student = train_student(
                batches,
                network,
                self.config,
                labels=labels,
                size=images.size,
                seed=seed,
                device=self.device,
            )
            self.done[key] = (accuracy(student, test), nbytes)
            if self.checkpoint is not None:
                atomic_write_bytes(self.checkpoint, json.dumps(self.done).encode())
        return self.done[key]

    def _batches(
        self, images: DistilledImages, source: Source, labels: LabelKind, plain: bool
    ) -> tuple[BatchSource, int]:
        recorded = self.distilled.labels
        if labels == "soft":
            soft = self._soft(images, source, plain)
            replayed = ReplayedBatches(source, soft, batch_size=self.batch_size, device=self.device)
            return replayed, soft.nbytes
        if plain or recorded is None:
            draw = replace(self.draw, **_PLAIN) if plain else self.draw
            return DrawnBatches(source, draw, self.device), 0
        hard = HardBatches(source, recorded, batch_size=self.batch_size, device=self.device)
        return hard, 0

    def _soft(self, images: DistilledImages, source: Source, plain: bool) -> SoftLabels:
        recorded = self.distilled.labels
        if recorded is None:
            raise ValueError("this set has no soft labels; make them with distill.relabel")
        if not plain and recorded.header.source == source.identity:
            if recorded.codec.name == "params" and recorded.recompute is None:
                return attach(recorded, images, self.teachers, device=self.device)
            return recorded
        key = (source.identity, plain)
        if self._labels is None or self._labels[0] != key:
            self._labels = None  # two sets of labels at a time may not fit into memory
            made = same_labels(recorded, images, self.teachers, plain=plain, device=self.device)
            self._labels = (key, made)
        return self._labels[1]


def _read(checkpoint: Path | None) -> dict[str, tuple[float, int]]:
    if checkpoint is None or not checkpoint.exists():
        return {}
    try:
        found = json.loads(checkpoint.read_text())
        return {str(key): (float(value), int(n)) for key, (value, n) in found.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise ShardError(
            f"{checkpoint} is no list of students that are done ({error}); remove it, or name "
            "another file"
        ) from error


def _rows(
    bench: _Bench,
    name: str,
    images: Callable[[int], DistilledImages],
    networks: Sequence[str],
    kinds: Sequence[LabelKind],
    plain: bool,
    seeds: Sequence[int],
    test: ImageSet,
    advance: Callable[[int], None],
) -> list[Row]:
    found: dict[tuple[str, LabelKind], list[tuple[float, int]]] = {}
    for seed in seeds:  # outermost: the labels of a random draw are made once for all networks
        shown = images(seed)
        for labels in kinds:
            for network in networks:
                value = bench.trial(shown, network, labels, plain, seed, test)
                found.setdefault((network, labels), []).append(value)
                advance(1)
    size = _image_bytes(images(seeds[0]).pixels)
    return [
        Row(
            name,
            network,
            labels,
            not plain,
            tuple(value for value, _ in values),
            size,
            max(nbytes for _, nbytes in values),
        )
        for (network, labels), values in found.items()
    ]


def _of_teacher(teacher: Teacher, train: ImageSet, test: ImageSet) -> Row:
    value = accuracy(teacher, test)
    nbytes = _image_bytes(train.images)
    return Row("teacher", teacher.network, "hard", True, (value,), nbytes, 0)


def _best_coreset(
    bench: _Bench,
    train: ImageSet,
    methods: Sequence[str],
    network: str,
    seed: int,
    advance: Callable[[int], None],
) -> tuple[str, DistilledImages, dict[str, float]]:
    like = bench.distilled.images
    features = penultimate(bench.teachers[0], train, device=bench.device)
    found = {
        method: coreset_subset(train, features, like, method=method, seed=seed)
        for method in methods
    }
    if len(found) == 1:
        return methods[0], found[methods[0]], {}
    held_out = _held_out(train, list(found.values()), seed)
    trials = {}
    for method, images in found.items():
        trials[method], _ = bench.trial(images, network, "hard", False, seed, held_out)
        advance(1)
    best = max(trials, key=lambda method: trials[method])
    return best, found[best], trials


def _held_out(train: ImageSet, taken: Sequence[DistilledImages], seed: int) -> ImageSet:
    """Return up to 10,000 training images, as many of each class, that are in none of the sets.

    Where a class has no other images, all training images are taken.
    """
    used = np.isin(train.ids, np.concatenate([images.init_id for images in taken]))
    order: NDArray[np.int64] = rng(seed, "coreset-choice").permutation(len(train))
    each = -(-_HELD_OUT // train.classes)
    free = order[~used[order]]
    mine = [free[train.labels[free] == c][:each] for c in range(train.classes)]
    if min(len(rows) for rows in mine) == 0:
        return train
    return train.subset(np.sort(np.concatenate(mine)))


def _image_bytes(pixels: NDArray[np.uint8]) -> int:
    n = len(pixels)
    rows = np.linspace(0, n - 1, min(n, _ENCODED)).astype(np.int64)
    return round(sum(len(encode_image(np.asarray(pixels[row]))) for row in rows) * n / len(rows))


def usual_batch(images: DistilledImages) -> int:
    """Return the images of a batch of views, by images per class (Sun et al. 2024, RDED)."""
    ipc = images.ipc
    return min(len(images), 10 if ipc < 10 else 50 if ipc < 50 else 100)


def _check(
    distilled: DistilledSet,
    train: ImageSet,
    test: ImageSet,
    teachers: tuple[Teacher, ...],
    networks: Sequence[str],
    seeds: Sequence[int],
    methods: Sequence[str],
) -> None:
    images = distilled.images
    if not teachers or not networks or not methods:
        raise ValueError("validate needs at least one teacher, one network and one coreset method")
    if len(set(seeds)) != len(seeds) or len(seeds) < _LEAST_SEEDS:
        raise ValueError(
            f"seeds are {tuple(seeds)}; a mean needs at least {_LEAST_SEEDS} different ones"
        )
    check_real(train, images)
    named = [("test images", test.class_names, test.size)]
    named += [(f"teacher {i}", t.class_names, t.size) for i, t in enumerate(teachers)]
    for what, names, size in named:
        if names != images.class_names:
            raise ValueError(
                f"the classes of {what}, {names[:4]}, are not the distilled set's "
                f"{images.class_names[:4]}, in the same order"
            )
        if size != images.size:
            raise ValueError(
                f"{what}: {size} pixels a side; the distilled images have {images.size}"
            )
    if distilled.labels is not None:
        _check_labels(distilled.labels, images, teachers)


def _check_labels(
    labels: SoftLabels, images: DistilledImages, teachers: tuple[Teacher, ...]
) -> None:
    if labels.header.view_size != images.size:
        raise ValueError(
            f"the views have {labels.header.view_size} pixels a side, and the images "
            f"{images.size}; relabel the images in views of their own size"
        )
    if tuple(teacher.sha256 for teacher in teachers) != labels.header.teachers:
        raise ValueError(
            "these are not the teachers that the soft labels were made with, or not in their "
            "order; real images must be labelled by the same ones"
        )
