"""Label maps of real images: the teacher's answer at every place, pooled where a crop lies.

ReLabel (Yun et al. 2021): each image is seen once, whole, and of the classifier's answer at every
cell of the last feature map the few largest entries are kept. A crop's soft label is the RoIAlign
of the map over the crop, so that any number of epochs of new crops has labels for one pass.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from curate import progress
from curate.errors import ShardError
from curate.manifest import StepFolder, atomic_path, open_step, read_manifest
from curate.runtime import resolve_device
from curate.shards import part_path
from distill.codecs import index_type
from distill.dense import dense_logits, region_weights
from distill.image_set import ImageSet
from distill.replay import Source
from distill.teacher import Teacher, normalise

_FORMAT = "distill-label-maps/1"
_KEY = b"distill.label_maps"
_HALF_MAX = float(np.finfo(np.float16).max)
_PART_BYTES, _BATCH = 32 << 20, 64


@dataclass(frozen=True, kw_only=True)
class MapHeader:
    """What every file of the maps says about all of them.

    Attributes
    ----------
    classes, images, k : int
        How many, and how many classes are kept at a cell.
    height, width : int
        Cells of a map.
    size : int
        Pixels of a side of the images.
    rows : int
        Images of a file; the last may have fewer.
    mean, std : tuple of float
        The normalisation of the first teacher.
    source, classes_sha256 : str
        What tells the images and the classes from others.
    teachers : tuple of str
        Hashes of their weights.
    """

    classes: int
    images: int
    k: int
    height: int
    width: int
    size: int
    rows: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    source: str
    classes_sha256: str
    teachers: tuple[str, ...]

    @property
    def entries(self) -> int:
        """Numbers of an image's map."""
        return self.k * self.height * self.width

    @classmethod
    def of(cls, path: Path) -> MapHeader:
        """Read the header of a file.

        Raises
        ------
        ShardError
            If the file is missing, damaged or not ours.
        """
        try:
            metadata = pq.ParquetFile(path).schema_arrow.metadata or {}
            found = json.loads(metadata[_KEY])
            if found.pop("format") != _FORMAT:
                raise ValueError("another format")
            lists = {name: tuple(found[name]) for name in ("mean", "std", "teachers")}
            return cls(**{**found, **lists})
        except (OSError, KeyError, TypeError, ValueError, pa.ArrowException) as error:
            raise ShardError(f"{path} holds no label maps of format {_FORMAT}: {error}") from error


@dataclass(frozen=True)
class LabelMaps:
    """Sparse maps of soft labels, one for each image.

    The numbers of all images are held in memory from their first use on: 3 bytes for each of
    `header.entries` (4 above 256 classes).

    Attributes
    ----------
    header : MapHeader
    parts : tuple of Path
        Parquet files of `header.rows` images each.
    """

    header: MapHeader
    parts: tuple[Path, ...]

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return sum(part.stat().st_size for part in self.parts)

    @cached_property
    def entries(self) -> tuple[NDArray[Any], NDArray[np.float16]]:
        """The classes and values of all images, (n, k, h, w) each.

        Raises
        ------
        ShardError
            If a file is damaged, or does not hold what its header says.
        """
        parts = [_read(part, number, self.header) for number, part in enumerate(self.parts)]
        shape = (self.header.images, self.header.k, self.header.height, self.header.width)
        index, value = (np.concatenate(columns) for columns in zip(*parts, strict=True))
        if len(index) != self.header.images:
            raise ShardError(
                f"{len(index)} label maps of {self.header.images} images; a file is missing"
            )
        return index.reshape(shape), value.reshape(shape)

    def logits(self, image: torch.Tensor, crop: torch.Tensor) -> torch.Tensor:
        """Return the (b, C) float32 logits of crops of images.

        Parameters
        ----------
        image : (b,) int64
        crop : (b, 4) int
            Top, left, height, width in pixels; of what reaches over the border the part inside
            counts.
        """
        header = self.header
        index, value = (torch.from_numpy(part[image.numpy()]) for part in self.entries)
        weight = region_weights(crop, header.size, header.height, header.width)
        share = (value.float() * weight[:, None]).flatten(1)
        found = torch.zeros(len(image), header.classes)
        return found.scatter_add_(1, index.flatten(1).long(), share)

    @classmethod
    def open(cls, folder: Path) -> LabelMaps:
        """Open what `store_label_maps` wrote.

        Raises
        ------
        ShardError
            If it was not written to its end, or files do not belong together.
        """
        manifest = read_manifest(Path(folder))
        if manifest is None or not manifest["complete"] or manifest["step"] != "label-maps":
            raise ShardError(
                f"{folder} holds no label maps, or they were not written to their end; run the "
                "same command again"
            )
        parts = sorted(Path(folder).glob("part-*.parquet"))
        headers = [MapHeader.of(part) for part in parts]
        if not parts or any(header != headers[0] for header in headers):
            raise ShardError(f"{folder} holds files of other label maps, or none")
        return cls(headers[0], tuple(parts))


def store_label_maps(
    images: ImageSet,
    teachers: Sequence[Teacher] | Teacher,
    folder: Path,
    *,
    map_size: int | None = None,
    top_k: int = 5,
    device: str | torch.device = "auto",
) -> LabelMaps:
    """Label every cell of the teachers' feature maps of real images.

    A cell keeps its `top_k` largest logits, less the mean of the others, which stand for zero: a
    softmax does not see the shift, and what is left out is then neither likelier nor less likely
    than it was. Several teachers give their mean.

    Parameters
    ----------
    images : ImageSet
    teachers : Teacher or sequence of Teacher
        Convolutional networks of timm.
    folder : Path
        A run that was stopped goes on after its last file.
    map_size : int, optional
        Cells of a side (ReLabel: 15); images are enlarged for it. By default as many as the
        teacher has for images of its own size.
    top_k : int
    device : str or torch.device

    Raises
    ------
    ValueError
        If a teacher knows other classes or has no such map, or `top_k` is out of range.
    FingerprintError
        If the folder holds other labels.
    """
    judges = (teachers,) if isinstance(teachers, Teacher) else tuple(teachers)
    header = _header(images, judges, map_size, top_k)
    step = open_step(
        Path(folder),
        step="label-maps",
        step_version=1,
        params={"k": header.k, "height": header.height, "width": header.width},
        inputs={
            "images": header.source,
            "classes": header.classes_sha256,
            **{f"teacher {number}": value for number, value in enumerate(header.teachers)},
        },
    )
    if not step.complete:
        _store(step, images, judges, header, resolve_device(device))
        step.finish(images=header.images)
    return LabelMaps.open(Path(folder))


def _header(
    images: ImageSet, teachers: tuple[Teacher, ...], map_size: int | None, top_k: int
) -> MapHeader:
    if not teachers:
        raise ValueError("there are no teachers; label maps need at least one")
    if not 1 <= top_k <= images.classes:
        raise ValueError(f"top_k is {top_k}; it must be between 1 and {images.classes}")
    for teacher in teachers:
        if teacher.class_names != images.class_names:
            raise ValueError(
                f"teacher {teacher.network!r} knows the classes {teacher.class_names[:4]}, the "
                f"images have {images.class_names[:4]}: they must be the same, in the same order"
            )
    first = teachers[0]
    blank = torch.zeros(1, 3, images.size, images.size, device=_place(first))
    height, width = dense_logits(first, blank, map_size).shape[2:]
    source = Source.real(images, first.mean, first.std)
    each = top_k * height * width * (2 + index_type(images.classes).itemsize)
    return MapHeader(
        classes=images.classes,
        images=len(images),
        k=top_k,
        height=height,
        width=width,
        size=images.size,
        rows=max(_PART_BYTES // each, 1),
        mean=tuple(first.mean),
        std=tuple(first.std),
        source=source.identity,
        classes_sha256=source.classes_sha256,
        teachers=tuple(teacher.sha256 for teacher in teachers),
    )


def _place(teacher: Teacher) -> torch.device:
    return next(teacher.model.parameters()).device


def _store(
    step: StepFolder,
    images: ImageSet,
    teachers: tuple[Teacher, ...],
    header: MapHeader,
    device: torch.device,
) -> None:
    from distill.prepared import placed

    judges = [placed(teacher, device) for teacher in teachers]
    with progress.task("label maps", total=header.images, unit="images") as advance:
        for number, start in enumerate(range(0, header.images, header.rows)):
            stop, path = min(start + header.rows, header.images), part_path(step.path, number)
            if not path.exists():
                columns = [
                    _sparse(_maps(images, judges, header, one, min(one + _BATCH, stop)), header.k)
                    for one in range(start, stop, _BATCH)
                ]
                index, value = (np.concatenate(part) for part in zip(*columns, strict=True))
                _write(path, np.arange(start, stop), index, value, header)
            advance(stop - start)


@torch.no_grad()
def _maps(
    images: ImageSet, teachers: Sequence[Teacher], header: MapHeader, start: int, stop: int
) -> torch.Tensor:
    total = torch.zeros(())
    for teacher in teachers:
        pixels = images.batch(slice(start, stop), _place(teacher))
        x = normalise(pixels, teacher.mean, teacher.std)
        total = total + dense_logits(teacher, x, header.height).cpu()
    return total / len(teachers)


def _sparse(maps: torch.Tensor, k: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return the classes and shifted values of the largest k of (b, C, h, w) logits."""
    value, index = maps.topk(k, dim=1)
    others = maps.shape[1] - k
    if others:
        # Summed over the others alone: a difference of large sums would lose digits.
        rest = maps.scatter(1, index, 0.0).sum(dim=1, keepdim=True) / others
        value = value - rest
    return index.numpy(), value.numpy()


def _write(
    path: Path,
    rows: NDArray[np.int64],
    index: NDArray[np.int64],
    value: NDArray[np.float32],
    header: MapHeader,
) -> None:
    half = np.clip(value, -_HALF_MAX, _HALF_MAX).astype(np.float16)
    flat = [index.astype(index_type(header.classes)).ravel(), half.ravel()]
    lists = [pa.FixedSizeListArray.from_arrays(pa.array(one), header.entries) for one in flat]
    table = pa.table(
        {"image_id": pa.array(rows.astype(np.int32)), "top_idx": lists[0], "top_val": lists[1]}
    )
    metadata = json.dumps({"format": _FORMAT, **asdict(header)}).encode()
    with atomic_path(path) as temporary:
        pq.write_table(
            table.replace_schema_metadata({_KEY: metadata}),
            temporary,
            compression="zstd",
            use_dictionary=["top_idx.list.element"],
            use_byte_stream_split=["top_val.list.element"],
            write_page_checksum=True,
        )


def _read(path: Path, number: int, header: MapHeader) -> tuple[NDArray[Any], NDArray[np.float16]]:
    try:
        table = pq.ParquetFile(path, page_checksum_verification=True).read().combine_chunks()
        rows = table.column("image_id").to_numpy()
        parts = [
            table.column(name).combine_chunks().flatten().to_numpy(zero_copy_only=False)
            for name in ("top_idx", "top_val")
        ]
    except (OSError, KeyError, ValueError, pa.ArrowException) as error:
        raise ShardError(f"{path} is missing or damaged: {error}") from error
    index, value = parts
    start = number * header.rows
    expected = np.arange(start, min(start + header.rows, header.images))
    sizes = {index.size, value.size}
    if not np.array_equal(rows, expected) or sizes != {len(rows) * header.entries}:
        raise ShardError(f"{path} does not hold the maps of images {start} and on")
    if index.max(initial=0) >= header.classes or not np.isfinite(value).all():
        raise ShardError(f"{path} names classes that are not there, or is not finite")
    return index.reshape(len(rows), -1), value.reshape(len(rows), -1)
