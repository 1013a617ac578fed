"""A distilled set on disk: Parquet that `datasets.load_dataset` decodes, with its provenance.

``images/`` holds a row for every image and ``labels/`` one for every recorded view; README.md
names both as configurations. Nothing in it is a pickle.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from PIL import Image

from curate.errors import ShardError
from curate.manifest import (
    StepFolder,
    atomic_path,
    atomic_write_bytes,
    digest,
    open_step,
    read_manifest,
)
from curate.shards import write_parquet
from distill.card import card
from distill.distilled_images import DistilledImages
from distill.distilled_reading import FORMAT, PROVENANCE, SOFT_LABEL, TYPES, files_of, read_images
from distill.networks import SMALL_IMAGE
from distill.replay import ReplayedBatches, Source
from distill.soft_labels import SoftLabels

_ROWS_PER_FILE, _ROWS_PER_GROUP = 20_000, 256


@dataclass(frozen=True)
class DistilledSet:
    """Distilled images, their soft labels, and how they came to be.

    Attributes
    ----------
    images : DistilledImages
    labels : SoftLabels or None
    provenance : dict
        What JSON can hold: method, configuration, seed, source, teachers.

    Raises
    ------
    ValueError
        If the labels belong to other images or classes, or JSON cannot hold the provenance.
    """

    images: DistilledImages
    labels: SoftLabels | None
    provenance: dict[str, Any]

    def __post_init__(self) -> None:
        try:
            digest(self.provenance)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"the provenance holds what JSON cannot: {error}; use numbers that are finite, "
                "text, lists, dicts and None"
            ) from error
        if self.labels is not None:
            self.source.check(self.labels.header)

    @property
    def source(self) -> Source:
        """The images as views refer to them."""
        return Source.distilled(self.images)

    def prefix(self, ipc: int) -> DistilledSet:
        """Return the set of the first `ipc` images of every class.

        Labels of mixed views show images that are not kept, and a part of a label is none: they
        are left out (relabel the smaller set). Labels of views that are not mixed are kept.

        Raises
        ------
        ValueError
            If there are not as many images.
        """
        if ipc == self.images.ipc:
            return self
        images = self.images.prefix(ipc)
        labels = None
        if self.labels is not None:
            labels = self.labels.prefix(len(images), source=Source.distilled(images).identity)
        return DistilledSet(images, labels, {**self.provenance, "prefix_of_ipc": self.images.ipc})

    def torch_dataset(
        self,
        *,
        epochs: Iterable[int] | None = None,
        batch_size: int | None = None,
        device: str | torch.device = "cpu",
    ) -> ReplayedBatches:
        """Return the recorded views as training batches; see `ReplayedBatches`.

        Raises
        ------
        ValueError
            If there are no soft labels.
        """
        if self.labels is None:
            raise ValueError("this set has no soft labels; make them with distill.relabel")
        return ReplayedBatches(
            self.source, self.labels, epochs=epochs, batch_size=batch_size, device=device
        )

    def write(self, folder: Path, *, overwrite: bool = False) -> Path:
        """Write the folder; the same set again is left as it is.

        Images are lossless: PNG up to 64 pixels of a side, WebP above.

        Parameters
        ----------
        folder : Path
        overwrite : bool
            Replace another result that lies there.

        Raises
        ------
        FingerprintError
            If the folder holds another result, or files that are not ours.
        """
        folder = Path(folder)
        labels = None if self.labels is None else _kept(self.labels, folder)
        step = open_step(
            folder,
            step="distilled-set",
            step_version=1,
            params={"provenance": digest(self.provenance), "facts": digest(_facts(self.images))},
            inputs={"images": self.source.identity, "labels": labels.sha256 if labels else "none"},
            overwrite=overwrite,
        )
        if not step.complete:
            self._write(step, labels)
        return folder

    def _write(self, step: StepFolder, labels: SoftLabels | None) -> None:
        sizes = {"images": _write_images(self, step.path / "images"), "labels": 0}
        if labels is not None:
            labels.write(step.path / "labels")
            sizes["labels"] = labels.nbytes
        text = card(self.images, labels, self.provenance, sizes)
        atomic_write_bytes(step.path / "README.md", text.encode())
        step.finish(bytes=sizes, images=len(self.images), ipc=self.images.ipc)

    @classmethod
    def open(cls, folder: Path) -> DistilledSet:
        """Read and check what `write` wrote.

        Raises
        ------
        ShardError
            If a file is missing or damaged, an image does not decode, or the parts do not belong
            together; the message says which.
        """
        folder = Path(folder)
        manifest = read_manifest(folder)
        if manifest is not None and not manifest["complete"]:
            raise ShardError(f"{folder} was not written to its end; write it again")
        images, provenance = read_images(folder)
        label_files = files_of(folder / "labels") if (folder / "labels").exists() else []
        labels = SoftLabels.open(label_files) if label_files else None
        try:
            return cls(images, labels, provenance)
        except ValueError as error:
            raise ShardError(
                f"{folder / 'labels'} does not fit {folder / 'images'}: {error}"
            ) from error


def sizes(folder: Path) -> dict[str, int]:
    """Return the bytes of the images' and of the labels' files of a distilled set.

    Parameters
    ----------
    folder : Path
        What `DistilledSet.write` wrote.
    """
    return {
        name: sum(path.stat().st_size for path in (Path(folder) / name).glob("*.parquet"))
        for name in ("images", "labels")
    }


def encode_image(pixels: NDArray[np.uint8], kind: str | None = None) -> bytes:
    """Return a lossless image file of (size, size, 3) uint8 pixels: PNG, or WebP when larger.

    Parameters
    ----------
    pixels : (size, size, 3) uint8
    kind : {"PNG", "WEBP"}, optional
        By size by default: PNG up to 64 pixels.

    Examples
    --------
    >>> encode_image(np.zeros((8, 8, 3), np.uint8))[1:4]
    b'PNG'
    """
    kind = kind or ("PNG" if max(pixels.shape[:2]) <= SMALL_IMAGE else "WEBP")
    options: dict[str, Any] = {} if kind == "PNG" else {"lossless": True, "exact": True}
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format=kind, **options)
    return buffer.getvalue()


def _kept(labels: SoftLabels, folder: Path) -> SoftLabels:
    """Hold in memory what is about to be replaced."""
    parts = [
        part.read_bytes() if isinstance(part, Path) and part.is_relative_to(folder) else part
        for part in labels.parts
    ]
    return replace(labels, parts=tuple(parts))


def _facts(images: DistilledImages) -> dict[str, Any]:
    """Return what the metadata says of the images, beside their class names."""
    values = [images.teacher_confidence, images.recover_loss, images.bn_loss]
    return {
        "format": FORMAT,
        "size": images.size,
        "ipc": images.ipc,
        "mean": list(images.mean),
        "std": list(images.std),
        "rows": digest([images.init_kind.tolist(), images.init_id.tolist(), _hex(values)]),
        "classes": digest(list(images.class_names)),
        **_static_facts(images),
    }


def _static_facts(images: DistilledImages) -> dict[str, str]:
    if images.soft_label is None:
        return {}
    return {"soft_label": hashlib.sha256(images.soft_label.tobytes()).hexdigest()}


def _types(images: DistilledImages) -> dict[str, pa.DataType]:
    if images.soft_label is None:
        return TYPES
    return {**TYPES, SOFT_LABEL: pa.list_(pa.float16(), len(images.class_names))}


def _hex(values: list[NDArray[np.float32]]) -> list[str]:
    return [np.ascontiguousarray(value, dtype=np.float32).tobytes().hex() for value in values]


def _schema(data: DistilledSet) -> pa.Schema:
    features: dict[str, Any] = {
        "image": {"_type": "Image"},
        "label": {"names": list(data.images.class_names), "_type": "ClassLabel"},
    }
    for name, kind in TYPES.items():
        dtype = {"float": "float32"}.get(str(kind), str(kind))
        features.setdefault(name, {"dtype": dtype, "_type": "Value"})
    if data.images.soft_label is not None:
        width = len(data.images.class_names)
        value = {"dtype": "float16", "_type": "Value"}
        features[SOFT_LABEL] = {"feature": value, "length": width, "_type": "List"}
    provenance = {**_facts(data.images), "provenance": data.provenance}
    metadata = {
        b"huggingface": json.dumps({"info": {"features": features}}).encode(),
        PROVENANCE: json.dumps(provenance, allow_nan=False).encode(),
    }
    return pa.schema(list(_types(data.images).items()), metadata=metadata)


def _write_images(data: DistilledSet, folder: Path) -> int:
    """Write the images in files of bounded size; return their bytes."""
    n, schema, written = len(data.images), _schema(data), 0
    files = -(-n // _ROWS_PER_FILE)
    for number in range(files):
        path = folder / f"train-{number:05d}-of-{files:05d}.parquet"
        start = number * _ROWS_PER_FILE
        rows = _image_rows(data.images, start, min(start + _ROWS_PER_FILE, n), schema)
        with atomic_path(path) as temporary:
            write_parquet(temporary, rows, schema=schema, row_group_rows=_ROWS_PER_GROUP)
        written += path.stat().st_size
    return written


def _image_rows(
    images: DistilledImages, start: int, stop: int, schema: pa.Schema
) -> Iterator[pa.RecordBatch]:
    for first in range(start, stop, _ROWS_PER_GROUP):
        rows = range(first, min(first + _ROWS_PER_GROUP, stop))
        part = slice(rows.start, rows.stop)
        files = [encode_image(images.pixels[row]) for row in rows]
        kind = "png" if images.size <= SMALL_IMAGE else "webp"
        cells = [
            {"bytes": data, "path": f"{row:06d}.{kind}"}
            for row, data in zip(rows, files, strict=True)
        ]
        columns = [
            cells,
            images.labels[part],
            np.arange(rows.start, rows.stop, dtype=np.int32),
            images.ipc_rank[part],
            images.init_kind[part].tolist(),
            images.init_id[part].tolist(),
            images.teacher_confidence[part],
            images.recover_loss[part],
            images.bn_loss[part],
        ]
        arrays = [
            pa.array(column, kind) for column, kind in zip(columns, TYPES.values(), strict=True)
        ]
        if images.soft_label is not None:
            flat = pa.array(images.soft_label[part].ravel())
            arrays.append(pa.FixedSizeListArray.from_arrays(flat, images.soft_label.shape[1]))
        yield pa.RecordBatch.from_arrays(arrays, schema=schema)
