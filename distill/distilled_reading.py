"""Reading the images of a distilled set back, and what their files are made of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from curate.errors import ShardError
from curate.images import decode
from distill.distilled_images import DistilledImages

FORMAT = "distill-set/1"
PROVENANCE = b"distill.provenance"
_MOST_BYTES_PER_PIXEL = 8

#: Of every set; `SOFT_LABEL` is there where the images have static soft labels.
TYPES: dict[str, pa.DataType] = {
    "image": pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
    "label": pa.int64(),
    "image_id": pa.int32(),
    "ipc_rank": pa.int32(),
    "init_kind": pa.string(),
    "init_id": pa.string(),
    "teacher_conf": pa.float32(),
    "recover_loss": pa.float32(),
    "bn_loss": pa.float32(),
}

SOFT_LABEL = "soft_label"


def files_of(folder: Path) -> list[Path]:
    """Return the files NAME-i-of-N.parquet in their order, all N of them."""
    found = sorted(folder.glob("*-of-*.parquet"))
    if not found:
        raise ShardError(f"{folder} holds no Parquet files; is this a distilled set?")
    name, _, count = found[0].stem.rpartition("-of-")
    base = name.rpartition("-")[0]
    expected = [
        folder / f"{base}-{number:05d}-of-{count}.parquet"
        for number in range(int(count) if count.isdigit() else 0)
    ]
    if found != expected:
        lacking = sorted({p.name for p in expected} ^ {p.name for p in found})
        raise ShardError(f"{folder} is not complete, or holds files of two sets: {lacking[:3]}")
    return found


def read_images(folder: Path) -> tuple[DistilledImages, dict[str, Any]]:
    """Read the images of a distilled set and how they came to be.

    Raises
    ------
    ShardError
        If a file is missing or damaged, or an image does not decode.
    """
    tables = []
    for path in files_of(folder / "images"):
        try:
            file = pq.ParquetFile(path)
            static = [SOFT_LABEL] if SOFT_LABEL in file.schema_arrow.names else []
            tables.append(file.read(columns=[*TYPES, *static]))
        except (OSError, pa.ArrowException) as error:
            raise ShardError(f"{path} is damaged: {error}") from error
    where = folder / "images"
    try:
        table = pa.concat_tables(tables)
        facts = json.loads(table.schema.metadata[PROVENANCE])
        features = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
        names = tuple(str(name) for name in features["label"]["names"])
        if facts["format"] != FORMAT:
            raise ValueError(f"format {facts['format']!r}")
        images = _images(table, names, facts)
        return images, dict(facts["provenance"])
    except (KeyError, TypeError, ValueError, pa.ArrowException) as error:
        raise ShardError(f"{where} is no distilled set of format {FORMAT}: {error}") from error


def _images(table: pa.Table, names: tuple[str, ...], facts: dict[str, Any]) -> DistilledImages:
    for name, kind in TYPES.items():
        column = table.column(name)
        if column.type != kind or column.null_count:
            raise ValueError(f"column {name} is not {kind}, or has empty cells")
    n, size = table.num_rows, int(facts["size"])
    if n == 0 or n != int(facts["ipc"]) * len(names):
        raise ValueError(f"{n} images, but {facts['ipc']} for each of {len(names)} classes")
    columns = {name: np.array(table.column(name)) for name in list(TYPES)[1:]}
    if not np.array_equal(columns["image_id"], np.arange(n)):
        raise ValueError("image_id must count the rows from 0")
    return DistilledImages(
        _decoded(table.column("image"), size),
        columns["label"],
        columns["ipc_rank"],
        columns["init_kind"].astype(np.str_),
        columns["init_id"].astype(np.str_),
        columns["teacher_conf"],
        columns["recover_loss"],
        columns["bn_loss"],
        names,
        tuple(float(value) for value in facts["mean"]),
        tuple(float(value) for value in facts["std"]),
        _static(table, len(names)),
    )


def _static(table: pa.Table, classes: int) -> NDArray[np.float16] | None:
    if SOFT_LABEL not in table.column_names:
        return None
    column = table.column(SOFT_LABEL).combine_chunks()
    if column.type != pa.list_(pa.float16(), classes) or column.null_count:
        raise ValueError(f"column {SOFT_LABEL} is not {classes} float16, or has empty cells")
    flat = column.flatten().to_numpy(zero_copy_only=False)
    return np.array(flat, np.float16).reshape(-1, classes)


def _decoded(cells: pa.ChunkedArray, size: int) -> NDArray[np.uint8]:
    pixels: list[NDArray[np.uint8]] = []
    for row, cell in enumerate(cells):
        found = decode(
            cell["bytes"].as_py(),
            max_pixels=size * size,
            max_bytes=_MOST_BYTES_PER_PIXEL * size * size + 65_536,
        )
        if found.image is None:
            raise ValueError(f"image {row} does not decode: {found.detail}")
        if found.image.size != (size, size):
            raise ValueError(f"image {row} is {found.image.size}; it must be ({size}, {size})")
        pixels.append(np.asarray(found.image))
    return np.stack(pixels)
