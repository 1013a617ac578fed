"""The files of soft labels: one Parquet row group each, a row for every view.

Each file says in its header what all of them hold; what is read is compared with it, since views
out of their order would put labels beside the wrong pixels without a word.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from curate.errors import ShardError
from distill.codecs import Codec, CodecName, Columns
from distill.randaugment import RandAugment
from distill.views import MIX_KINDS, MixKind, Views

_FORMAT = "distill-labels/1"
_KEY = b"distill.labels"
_MAX_ROWS, _MAX_BYTES = 65_536, 128 << 20
_VIEW_BYTES = 36
#: Columns of numbers that hardly repeat: split by bytes they compress, a dictionary is no use.
_SPLIT = ("logits", "top_val", "top_rest", "scale", "zero")


@dataclass(frozen=True, kw_only=True)
class LabelHeader:
    """What every file of the labels says about all of them.

    Attributes
    ----------
    codec, k
        How logits are stored; see `distill.codecs`.
    classes, images : int
        How many.
    source_size, view_size : int
        Pixels of a side of the images and of the views.
    epochs : int
        Epochs that were asked for; fewer may be stored, and are then used again in turn.
    batch_size : int
        Views of a batch; the last one of an epoch may have fewer.
    batches_per_part : int
        Batches of a file.
    mix : {"none", "cutmix", "mixup"}
    mean, std : tuple of float
        The normalisation in which the views are made.
    seed : int
    augment_count, augment_magnitude : int, float
        RandAugment's numbers; a count of 0 is none.
    source : str
        What tells the images from others.
    classes_sha256 : str
        Hash of the class names in their order.
    teachers : tuple of str
        Hashes of their weights.
    """

    codec: CodecName
    k: int
    classes: int
    images: int
    source_size: int
    view_size: int
    epochs: int
    batch_size: int
    batches_per_part: int
    mix: MixKind
    mean: tuple[float, ...]
    std: tuple[float, ...]
    seed: int
    source: str
    classes_sha256: str
    teachers: tuple[str, ...]
    augment_count: int = 0
    augment_magnitude: float = 0.0

    @property
    def randaugment(self) -> RandAugment | None:
        """What else is done to every view."""
        if not self.augment_count:
            return None
        return RandAugment(self.augment_count, self.augment_magnitude)

    @property
    def batches(self) -> int:
        """Batches of an epoch."""
        return -(-self.images // self.batch_size)

    def rows_before(self, batch: int) -> int:
        """Return the views before a batch, counted through all epochs."""
        epoch, inside = divmod(batch, self.batches)
        return epoch * self.images + min(inside * self.batch_size, self.images)

    def metadata(self) -> dict[bytes, bytes]:
        """Return the header as Parquet metadata."""
        return {_KEY: json.dumps({"format": _FORMAT, **asdict(self)}).encode()}

    @classmethod
    def of(cls, metadata: dict[bytes, bytes] | None, where: str) -> LabelHeader:
        """Read a header back.

        Raises
        ------
        ShardError
            If there is none, or it is not of this format.
        """
        try:
            found = json.loads((metadata or {})[_KEY])
            if found.pop("format") != _FORMAT:
                raise ValueError("another format")
            lists = {name: tuple(found[name]) for name in ("mean", "std", "teachers")}
            header = cls(**{**found, **lists})
            header._check()
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ShardError(
                f"{where} holds no soft labels of format {_FORMAT}: {error}"
            ) from error
        return header

    def _check(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if item.type == "int" and (not isinstance(value, int) or value < 0):
                raise ValueError(f"{item.name} is {value!r}")
        least = (self.classes, self.images, self.source_size, self.view_size, self.epochs)
        if min(*least, self.batch_size, self.batches_per_part) < 1 or self.mix not in MIX_KINDS:
            raise ValueError("sizes must be at least 1")
        Codec(self.codec, self.classes, self.k)
        _ = self.randaugment


def batches_per_part(header: LabelHeader) -> int:
    """Return how many batches a file may hold."""
    each = header.batch_size * (_VIEW_BYTES + 2 * header.classes)
    return max(1, min(_MAX_ROWS // header.batch_size, _MAX_BYTES // each))


def view_columns(views: Sequence[Views], epochs: Sequence[int], numbers: Sequence[int]) -> Columns:
    """Return the columns of the parameters of batches, one row for each view."""
    sizes = [len(one) for one in views]

    seeds = [one.augment_seed for one in views if one.augment_seed is not None]

    def repeated(values: Sequence[Any], kind: type) -> NDArray[Any]:
        return np.repeat(np.asarray(values, dtype=kind), sizes, axis=0)

    augmented = {"aug_seed": torch.cat(seeds).numpy()} if seeds else {}
    return {
        "epoch": repeated(epochs, np.int16),
        "batch": repeated(numbers, np.int32),
        "image_id": torch.cat([one.image for one in views]).numpy().astype(np.int32),
        "crop": torch.cat([one.crop for one in views]).numpy(),
        "flip": torch.cat([one.flip for one in views]).numpy(),
        "mix_kind": repeated([MIX_KINDS.index(one.mix_kind) for one in views], np.int8),
        "mix_id": torch.cat([one.image[one.partner] for one in views]).numpy().astype(np.int32),
        "mix_box": repeated([one.mix_box for one in views], np.int16),
        "mix_lam": repeated([one.mix_weight for one in views], np.float32),
        **augmented,
    }


def encode_part(columns: Columns, header: LabelHeader) -> bytes:
    """Return a Parquet file of columns of shape (n,) or (n, w)."""
    arrays = {name: _arrow(values) for name, values in columns.items()}
    table = pa.table(arrays).replace_schema_metadata(header.metadata())
    split = [name for name in _SPLIT if name in columns]
    leaves = {name: f"{name}.list.element" if columns[name].ndim == 2 else name for name in columns}
    sink = pa.BufferOutputStream()
    pq.write_table(
        table,
        sink,
        compression="zstd",
        compression_level=3,
        row_group_size=max(table.num_rows, 1),
        use_dictionary=[leaves[name] for name in columns if name not in split],
        use_byte_stream_split=[leaves[name] for name in split],
        write_statistics=False,
        write_page_checksum=True,
    )
    data: bytes = sink.getvalue().to_pybytes()
    return data


def _arrow(values: NDArray[Any]) -> pa.Array:
    flat = pa.array(np.ascontiguousarray(values).reshape(-1))
    return flat if values.ndim == 1 else pa.FixedSizeListArray.from_arrays(flat, values.shape[1])


def parquet(part: bytes | Path) -> pq.ParquetFile:
    """Open a part.

    Raises
    ------
    ShardError
        If it is missing or damaged.
    """
    try:
        source = pa.BufferReader(part) if isinstance(part, bytes) else part
        return pq.ParquetFile(source, page_checksum_verification=True)
    except (OSError, pa.ArrowException) as error:
        raise ShardError(f"{_name(part)} is missing or damaged: {error}") from error


def _name(part: bytes | Path) -> str:
    return "a part in memory" if isinstance(part, bytes) else str(part)


def header_of(path: Path) -> LabelHeader:
    """Read the header of a file."""
    return LabelHeader.of(parquet(path).schema_arrow.metadata, str(path))


def read_part(part: bytes | Path, header: LabelHeader, number: int) -> Columns:
    """Read all columns of part `number`, and check that they are what its place asks for.

    Raises
    ------
    ShardError
        If it is damaged, or other views belong there.
    """
    try:
        table = parquet(part).read()
    except (OSError, pa.ArrowException) as error:
        raise ShardError(f"{_name(part)} is damaged: {error}") from error
    try:
        columns = {name: _numpy(table.column(name)) for name in _expected(header)}
    except (KeyError, pa.ArrowException, ValueError) as error:
        raise ShardError(f"{_name(part)} lacks a column, or has holes in it: {error}") from error
    problem = _problem(columns, header, number)
    if problem:
        raise ShardError(f"{_name(part)} does not hold what its header says: {problem}")
    return columns


def _expected(header: LabelHeader) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
    codec = Codec(header.codec, header.classes, header.k)
    no_views = torch.zeros(0, dtype=torch.int64)
    none = Views(no_views, torch.zeros(0, 4, dtype=torch.int16), no_views.bool(), no_views)
    none = replace(none, augment_seed=no_views if header.augment_count else None)
    columns = view_columns([none], [0], [0])
    columns |= codec.encode(np.zeros((0, header.classes), np.float32))
    return {name: (values.dtype, values.shape[1:]) for name, values in columns.items()}


def _numpy(column: pa.ChunkedArray) -> NDArray[Any]:
    whole = column.combine_chunks()
    if whole.null_count:
        raise ValueError("empty cells")
    if not pa.types.is_fixed_size_list(whole.type):
        return np.asarray(whole.to_numpy(zero_copy_only=False))
    width = whole.type.list_size
    flat = whole.flatten()
    if flat.null_count:
        raise ValueError("empty cells")
    return np.asarray(flat.to_numpy(zero_copy_only=False)).reshape(-1, width)


def _problem(columns: Columns, header: LabelHeader, number: int) -> str:
    """Return what is wrong with a part, or nothing."""
    for name, (kind, shape) in _expected(header).items():
        if columns[name].dtype != kind or columns[name].shape[1:] != shape:
            return f"column {name} has another type or width"
    first = number * header.batches_per_part
    rows = len(columns["image_id"])
    most = header.rows_before(first + header.batches_per_part) - header.rows_before(first)
    place = header.rows_before(first) + np.arange(rows)
    epoch, inside = place // header.images, place % header.images
    if rows > most or not np.array_equal(columns["epoch"], epoch):
        return "views are missing, or not in the order of the epochs"
    if not np.array_equal(columns["batch"], inside // header.batch_size):
        return "views are not in the order of the batches"
    ids = np.stack([columns["image_id"], columns["mix_id"]])
    if rows and (ids.min() < 0 or ids.max() >= header.images):
        return f"an image number is outside of 0 to {header.images - 1}"
    return _shape_problem(columns, header)


def _shape_problem(columns: Columns, header: LabelHeader) -> str:
    if not (columns["mix_kind"] == MIX_KINDS.index(header.mix)).all():
        return f"views are mixed in another way than {header.mix}"
    box = columns["mix_box"].astype(np.int64)
    if (box < 0).any() or (box[:, :2] + box[:, 2:] > header.view_size).any():
        return "a box to be mixed lies outside of its view"
    if (columns["crop"][:, 2:] < 1).any():
        return "a crop has no height or width"
    weight = columns["mix_lam"]
    return "" if ((weight >= 0) & (weight <= 1)).all() else "a mixing weight is not in [0, 1]"


def views_of(columns: Columns, mix: MixKind) -> Views:
    """Return the views of the rows of one batch.

    Raises
    ------
    ShardError
        If they are not those of one batch.
    """
    image = torch.from_numpy(columns["image_id"].astype(np.int64))
    crop = torch.from_numpy(np.array(columns["crop"]))
    flip = torch.from_numpy(np.array(columns["flip"]))
    order = np.argsort(columns["image_id"], kind="stable")
    ids = columns["image_id"][order]
    found = np.searchsorted(ids, columns["mix_id"]).clip(max=len(ids) - 1)
    if (ids[1:] == ids[:-1]).any() or not np.array_equal(ids[found], columns["mix_id"]):
        raise ShardError("a batch shows an image twice, or lacks the partner of a view")
    partner = torch.from_numpy(order[found].astype(np.int64))
    box = columns["mix_box"]
    if (box != box[0]).any() or (columns["mix_lam"] != columns["mix_lam"][0]).any():
        raise ShardError("the views of a batch are mixed with different boxes or weights")
    top, left, height, width = box[0].tolist()
    weight = float(columns["mix_lam"][0])
    seed = torch.from_numpy(np.array(columns["aug_seed"])) if "aug_seed" in columns else None
    return Views(image, crop, flip, partner, mix, (top, left, height, width), weight, seed)
