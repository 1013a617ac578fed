"""Embeddings on disk, in the layout that clip-retrieval writes: one .npy per shard.

``img_emb/img_emb_0000.npy`` and ``text_emb/text_emb_0000.npy`` are (rows, d) float16 with unit
rows, ``metadata/metadata_0000.parquet`` holds `uid`, `status`, `detail` and `text_status`, row by
row. A row that could not be embedded is a row of zeros with a status that is not ``ok``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from curate.errors import ShardError
from curate.manifest import atomic_path, read_manifest
from curate.sharded_rows import ShardedRows
from curate.shards import write_array, write_blocks, write_parquet

METADATA = pa.schema(
    [
        ("uid", pa.string()),
        ("status", pa.string()),
        ("detail", pa.string()),
        ("text_status", pa.string()),
    ]
)
OK = "ok"
BAD_EMBEDDING = "bad_embedding"
MISSING = "missing"
_BLOCK_ROWS = 2048
_UNIT = 1e-3  # rounding to float16 changes a length by less


def image_path(folder: Path, part: int) -> Path:
    """Return the path of a part's image embeddings."""
    return folder / "img_emb" / f"img_emb_{part:04d}.npy"


def text_path(folder: Path, part: int) -> Path:
    """Return the path of a part's text embeddings."""
    return folder / "text_emb" / f"text_emb_{part:04d}.npy"


def metadata_path(folder: Path, part: int) -> Path:
    """Return the path of a part's metadata."""
    return folder / "metadata" / f"metadata_{part:04d}.parquet"


def part_exists(folder: Path, part: int) -> bool:
    """Return whether a part is there; its metadata is written last, but may outlive the rest."""
    return metadata_path(folder, part).exists() and image_path(folder, part).exists()


def write_embedding_part(
    folder: Path,
    part: int,
    *,
    image: NDArray[np.float16],
    text: NDArray[np.float16] | None,
    metadata: pa.Table,
) -> None:
    """Write one part: the metadata last, since it is what marks the part as whole."""
    for path, array in ((image_path(folder, part), image), (text_path(folder, part), text)):
        if array is not None:
            write_array(path, array)
    write_metadata(folder, part, metadata)


def write_metadata(folder: Path, part: int, metadata: pa.Table) -> None:
    """Write the metadata of a part of which all else is written."""
    with atomic_path(metadata_path(folder, part)) as temporary:
        write_parquet(temporary, metadata.cast(METADATA))


def write_unit_rows(path: Path, x: Any) -> NDArray[np.bool_]:
    """Write what `unit_float16` makes of (n, d) rows, block by block; return which are good.

    Parameters
    ----------
    path : Path
    x : array, or anything of that shape that slices give arrays of
    """
    good = np.empty(x.shape[0], dtype=np.bool_)

    def blocks() -> Iterator[NDArray[np.float16]]:
        for start in range(0, len(good), _BLOCK_ROWS):
            part = slice(start, start + _BLOCK_ROWS)
            rows, good[part] = _unit_block(x[part])
            yield rows

    from curate.threads import one_thread  # and torch with it

    with one_thread():  # blocks are small, and several files are written side by side
        write_blocks(path, blocks(), tuple(x.shape), np.float16)
    return good


def unit_float16(x: NDArray[np.floating]) -> tuple[NDArray[np.float16], NDArray[np.bool_]]:
    """Return rows scaled to length one as float16, and which of them have a direction at all.

    Parameters
    ----------
    x : (n, d) float

    Returns
    -------
    rows : (n, d) float16
        Unit rows; zeros where there is none.
    good : (n,) bool
        False for rows that are zero or not finite.

    Examples
    --------
    >>> unit_float16(np.array([[3.0, 4.0], [0.0, 0.0]]))[1].tolist()
    [True, False]
    """
    rows, good = np.empty(x.shape, dtype=np.float16), np.empty(len(x), dtype=np.bool_)
    # In blocks that stay in a core's cache: ten times as fast, and without a copy in float32.
    for start in range(0, len(x), _BLOCK_ROWS):
        part = slice(start, start + _BLOCK_ROWS)
        rows[part], good[part] = _unit_block(x[part])
    return rows, good


def _unit_block(x: NDArray[np.floating]) -> tuple[NDArray[np.float16], NDArray[np.bool_]]:
    # Float32 holds the square of any embedding that a model makes; what it cannot hold is infinite
    # and hence not good.
    with np.errstate(over="ignore", invalid="ignore"):
        wide = _float32(x)
        norm = np.sqrt(np.einsum("ij,ij->i", wide, wide))
        rows = np.array(x, dtype=np.float16)
    good = np.isfinite(norm) & (norm > 1e-12)
    rows[~good] = 0
    # Row by row, since the result must not depend on which rows share a shard: rows that are of
    # length one already stay as they are, to the bit.
    scale = good & (np.abs(norm - 1) > _UNIT)
    rows[scale] = (wide[scale] / norm[scale, None]).astype(np.float16)
    return rows, good


def _float32(x: NDArray[np.floating]) -> NDArray[np.float32]:
    if x.dtype != np.float16:
        return np.asarray(x, dtype=np.float32)
    import torch  # ten times as fast as NumPy here

    wide: NDArray[np.float32] = torch.from_numpy(np.array(x)).float().numpy()
    return wide


@dataclass(frozen=True)
class Embeddings:
    """Unit embeddings of a pool, row by row, with the status of each row.

    Attributes
    ----------
    path : Path
        The folder.
    parts : int
        Number of parts; part *i* belongs to shard *i* of the pool.
    """

    path: Path
    parts: int

    @classmethod
    def open(cls, path: str | Path) -> Embeddings:
        """Open a folder that `curate embed` or `curate prune` wrote.

        Raises
        ------
        ShardError
            If the folder is not one, or is not complete.
        """
        folder = Path(path)
        manifest = read_manifest(folder) if folder.is_dir() else None
        if manifest is None or manifest.get("step") != "embed":
            raise ShardError(f"{folder} holds no embeddings of this tool; make them: curate embed")
        if not manifest["complete"]:
            raise ShardError(f"{folder} is not complete; run the command that makes it again")
        return cls(folder, int(manifest["parts"]))

    @cached_property
    def image(self) -> ShardedRows:
        """(n, d) float16, unit rows, or zeros where `status` is not ok."""
        return self._rows(image_path)

    @cached_property
    def text(self) -> ShardedRows | None:
        """(n, d) float16 of the captions, or None for an image-only encoder."""
        if not text_path(self.path, 0).exists():
            return None
        return self._rows(text_path)

    def _rows(self, path_of: Callable[[Path, int], Path]) -> ShardedRows:
        paths = [path_of(self.path, part) for part in range(self.parts)]
        return ShardedRows.of_files(paths)

    def metadata(self, columns: Sequence[str] | None = None) -> pa.Table:
        """Return `uid`, `status`, `detail`, `text_status`, or those asked for."""
        paths = [metadata_path(self.path, i) for i in range(self.parts)]
        return pa.concat_tables([_read_metadata(path, columns) for path in paths])

    @cached_property
    def uids(self) -> list[str]:
        """The uid of every row."""
        uids: list[str] = self.metadata(["uid"])["uid"].to_pylist()
        return uids

    @cached_property
    def good(self) -> NDArray[np.int64]:
        """The numbers of the rows that have an embedding: ``image.subset(good)`` are unit rows."""
        status = self.metadata(["status"])["status"].to_numpy(zero_copy_only=False)
        return np.flatnonzero(status == OK)

    def __len__(self) -> int:
        return len(self.image)

    def _repr_html_(self) -> str:
        statuses = self.metadata(["status"])["status"].value_counts().to_pylist()
        rows = "".join(
            f"<tr><td>{entry['values']}</td><td>{entry['counts']:,}</td></tr>" for entry in statuses
        )
        kind = "image and text" if self.text is not None else "image"
        return (
            f"<b>Embeddings</b>: {len(self):,} rows x {self.image.shape[1]} ({kind}, float16)"
            f"<table><tr><th>status</th><th>rows</th></tr>{rows}</table>"
        )


def _read_metadata(path: Path, columns: Sequence[str] | None) -> pa.Table:
    try:
        return pq.read_table(path, columns=columns, partitioning=None)
    except (OSError, pa.ArrowException) as error:
        raise ShardError(
            f"{path} is missing or damaged; remove it and run the same command again"
        ) from error
