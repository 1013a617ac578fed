"""The rows of a distilled set, read from its files without decoding more than is asked for."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from curate.errors import PoolError, ShardError
from curate.images import decode
from curate.manifest import read_manifest

SET = "distilled"
STEP = "distill"
_NUMBERS = ("label", "ipc_rank", "init_kind", "teacher_conf", "recover_loss", "bn_loss")
_MOST_BYTES_PER_PIXEL = 8


def is_distilled(run: Path) -> bool:
    """Return whether a folder is a run of `curate distill`, be it complete or not.

    Raises
    ------
    ShardError
        If its manifest is damaged.
    """
    manifest = read_manifest(run) if run.is_dir() else None
    return manifest is not None and manifest["step"] == STEP


@dataclass(frozen=True)
class DistilledRows:
    """The images of a distilled set: their numbers in memory, their pixels in the files.

    Attributes
    ----------
    files : tuple of Path
        In their order.
    class_names : tuple of str
    ipc, size : int
        Images per class; pixels of a side.
    provenance : mapping
        How the set came to be.
    numbers : pyarrow.Table
        A row per image: label, ipc_rank, init_kind, teacher_conf, recover_loss, bn_loss.
    """

    files: tuple[Path, ...]
    class_names: tuple[str, ...]
    ipc: int
    size: int
    provenance: Mapping[str, Any]
    numbers: pa.Table

    @classmethod
    def open(cls, folder: Path) -> DistilledRows:
        """Open what `distill.DistilledSet.write` wrote.

        Raises
        ------
        ShardError
            If a file is missing, damaged, or not of a distilled set.
        """
        folder = Path(folder)
        files = tuple(sorted((folder / "images").glob("train-*-of-*.parquet")))
        try:
            if not files or len(files) != int(files[0].stem.rpartition("-of-")[2]):
                raise ValueError("files of images are missing")
            numbers = pa.concat_tables(
                [pq.ParquetFile(path).read(columns=list(_NUMBERS)) for path in files]
            )
            metadata = numbers.schema.metadata or {}
            facts = json.loads(metadata[b"distill.provenance"])
            features = json.loads(metadata[b"huggingface"])["info"]["features"]
            names = tuple(str(name) for name in features["label"]["names"])
            found = cls(
                files, names, int(facts["ipc"]), int(facts["size"]), facts["provenance"], numbers
            )
            if len(found) != found.ipc * len(names) or len(found) == 0:
                raise ValueError(f"{len(found)} images are not {found.ipc} of each class")
        except (KeyError, TypeError, ValueError, OSError, pa.ArrowException) as error:
            raise ShardError(f"{folder} holds no whole distilled set: {error}") from error
        return found

    def __len__(self) -> int:
        return int(self.numbers.num_rows)

    def values(self, name: str) -> NDArray[np.float64]:
        """Return one of the numbers of all images; NaN where there is none."""
        values: NDArray[np.float64] = self.numbers[name].to_numpy().astype(np.float64)
        return values

    def read(self, rows: Iterable[int], *columns: str) -> Iterator[dict[str, Any]]:
        """Yield some rows, in the order of the set.

        Raises
        ------
        ShardError
            If a file is damaged.
        """
        wanted, first = set(rows), 0
        for path in self.files:
            try:
                file = pq.ParquetFile(path)
                for group in range(file.num_row_groups):
                    last = first + file.metadata.row_group(group).num_rows
                    mine = [row - first for row in range(first, last) if row in wanted]
                    if mine:
                        table = file.read_row_group(group, columns=list(columns) or None)
                        yield from table.take(mine).to_pylist()
                    first = last
            except (OSError, pa.ArrowException) as error:
                raise ShardError(f"{path} is damaged: {error}") from error

    def pixels(self, rows: Iterable[int]) -> NDArray[np.uint8]:
        """Return (m, size, size, 3) uint8 of some rows, in the order of the set.

        Raises
        ------
        ShardError
            If an image does not decode, or has another size.
        """
        size, most = self.size, _MOST_BYTES_PER_PIXEL * self.size**2 + 65_536
        found = []
        for cell in self.read(rows, "image"):
            image = decode(cell["image"]["bytes"], max_pixels=size * size, max_bytes=most).image
            if image is None or image.size != (size, size):
                raise ShardError(
                    f"image {cell['image']['path']} of {self.files[0].parent} is damaged"
                )
            found.append(np.asarray(image))
        return np.stack(found) if found else np.empty((0, size, size, 3), np.uint8)


def explain_image(run: Path, image_id: str) -> dict[str, Any]:
    """Return what is known of one distilled image of a run.

    Parameters
    ----------
    run : Path
        A folder that `curate distill` wrote.
    image_id : str
        Its number in the set, from 0.

    Raises
    ------
    PoolError
        If the set has no such image.
    ShardError
        If the set is missing or damaged.
    """
    rows = DistilledRows.open(run / SET)
    number = int(image_id) if image_id.isascii() and image_id.isdigit() else -1
    if not 0 <= number < len(rows):
        raise PoolError(
            f"no distilled image has the id {image_id!r}: in a run of curate distill --uid is an "
            f"image_id, 0 to {len(rows) - 1}"
        )
    columns = (*_NUMBERS, "image_id", "init_id")
    (row,) = rows.read([number], *columns)
    told = {"image_id": row["image_id"], "class": rows.class_names[row["label"]], **row}
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in told.items()
    }
