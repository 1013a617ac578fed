"""Embeddings that a pool brings along: clip-retrieval's, DataComp's, or a column of its own."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.types as pt
from numpy.typing import NDArray

from curate.errors import PoolError, ShardError
from curate.parquet import read_batches
from curate.sources import Shard, Source, SourceFile, embeddings_beside

_NPZ_PREFERENCE = ("l14", "b32")
_BATCH_ROWS = 8192

Embedding = NDArray[Any]


@dataclass(frozen=True)
class BundledEmbeddings:
    """What a pool brings, and how to read it shard by shard.

    Attributes
    ----------
    kind : {"clip-retrieval", "datacomp", "column"}
        Where the embeddings lie: .npy files beside the metadata, .npz files beside each Parquet
        file, or a column.
    name : str
        The folder, the key in the .npz (``l14`` or ``b32``), or the column.
    has_text : bool
        Whether there are text embeddings too.
    image_files, text_files : tuple of (str, str)
        For clip-retrieval and DataComp: the pool's file and its embedding file.
    field : pyarrow.Field or None
        For a column: its name and type.
    """

    kind: Literal["clip-retrieval", "datacomp", "column"]
    name: str
    has_text: bool
    image_files: tuple[tuple[str, str], ...] = ()
    text_files: tuple[tuple[str, str], ...] = ()
    field: pa.Field | None = None

    def files(self) -> list[SourceFile]:
        """Return the embedding files, for the pool's fingerprint."""
        paths = sorted({path for _, path in (*self.image_files, *self.text_files)})
        return [
            SourceFile(
                path, f"{Path(path).parent.name}/{Path(path).name}", Path(path).stat().st_size
            )
            for path in paths
        ]

    def rows_of(self, shard: Shard) -> tuple[Embedding, Embedding | None]:
        """Return the embeddings of a shard's rows, as stored: not normalised.

        Parameters
        ----------
        shard : Shard
            Of the pool.

        Returns
        -------
        image : (r, d) array
            NaN in rows that have none. A memory map where the file allows it.
        text : (r, d) array or None
            None if the pool brings no text embeddings.

        Raises
        ------
        ShardError
            If the file is damaged, or does not fit the pool's rows.
        """
        if self.kind == "column":
            return _column_rows(shard, self.field), None
        text = dict(self.text_files).get(shard.path)
        image = self._slice(dict(self.image_files)[shard.path], shard, "img")
        return image, None if text is None else self._slice(text, shard, "txt")

    def _slice(self, path: str, shard: Shard, side: str) -> Embedding:
        try:
            if self.kind == "datacomp":
                with np.load(path, allow_pickle=False) as opened:
                    array: Embedding = opened[f"{self.name}_{side}"]
            else:
                array = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise ShardError(f"{path} is damaged: {error}") from error
        part = array[shard.file_row : shard.file_row + shard.rows]
        if part.ndim != 2 or len(part) != shard.rows:
            raise ShardError(f"{path} changed since the pool was opened; start again")
        return part


def list_values(array: pa.Array, name: str) -> tuple[NDArray[np.bool_], Embedding]:
    """Return which rows of a list column have an embedding, and those embeddings.

    Parameters
    ----------
    array : pyarrow.Array
        Lists of floats.
    name : str
        What errors call it.

    Returns
    -------
    there : (n,) bool
        False where the row is null.
    values : (there.sum(), d) array
        The rows that are there; a null within one is NaN.

    Raises
    ------
    PoolError
        If the rows differ in length.
    """
    # Nulls go first, since `flatten` drops them and `values` ignores the offset of a slice.
    there = array.is_valid().to_numpy(zero_copy_only=False)
    rows = array.drop_null()
    if not len(rows):
        return there, np.empty((0, 0), dtype=np.float32)
    flat = rows.flatten()
    if not pt.is_fixed_size_list(rows.type):
        lengths = np.unique(rows.value_lengths().to_numpy(zero_copy_only=False))
        if lengths.size != 1:
            raise PoolError(
                f"embedding column {name!r} has rows of {lengths[0]} and of {lengths[-1]} numbers; "
                "all embeddings of a pool need one length: choose another with --embedding-col"
            )
    if flat.null_count:
        flat = flat.cast(pa.float32())
    return there, flat.to_numpy(zero_copy_only=False).reshape(len(rows), -1)


def _column_rows(shard: Shard, field: pa.Field) -> Embedding:
    """Read an embedding column into one array, a batch at a time."""
    result: Embedding | None = None
    start = 0
    for batch in read_batches(shard, pa.schema([field]), _BATCH_ROWS):
        there, values = list_values(batch.column(0), field.name)
        if result is None and len(values):
            result = np.full((shard.rows, values.shape[1]), np.nan, dtype=values.dtype)
        if result is not None and len(values):
            if values.shape[1] != result.shape[1]:
                raise PoolError(
                    f"embedding column {field.name!r} has rows of {result.shape[1]} and of "
                    f"{values.shape[1]} numbers; all embeddings of a pool need one length"
                )
            result[start : start + batch.num_rows][there] = values
        start += batch.num_rows
    if result is None:
        width = field.type.list_size if pt.is_fixed_size_list(field.type) else 0
        result = np.full((shard.rows, width), np.nan, dtype=np.float32)
    return result


_Header = tuple[tuple[int, ...], np.dtype[Any]]


def _check(header: _Header, path: str, file: SourceFile, rows: int) -> None:
    shape, dtype = header
    if len(shape) != 2 or dtype.kind != "f":
        raise PoolError(
            f"{path} holds {dtype} of shape {shape}; embeddings are a matrix (rows, dimensions) "
            "of floats"
        )
    if shape[0] != rows:
        raise PoolError(
            f"{file.name} has {rows} rows but {path} has {shape[0]}; they must belong together row "
            "by row: write or download both again"
        )


def _number(path: str) -> str:
    """Return the number at the end of a clip-retrieval file's name, without leading zeros."""
    found = re.search(r"(\d+)$", Path(path).stem)
    return found.group(1).lstrip("0") or "0" if found else ""


def _npy_files(
    source: Source, rows: Sequence[int], folder: str, *, required: bool
) -> tuple[tuple[str, str], ...]:
    """Pair the metadata files with the .npy files of the same number."""
    by_number = {_number(str(path)): str(path) for path in Path(source.root, folder).glob("*.npy")}
    if not by_number and not required:
        return ()
    pairs = []
    for file, count in zip(source.files, rows, strict=True):
        path = by_number.get(_number(file.path))
        if path is None:
            raise PoolError(
                f"{file.name} has no {folder}/{folder}_{_number(file.path)}.npy; complete the "
                "download, or open the metadata alone with a glob"
            )
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise PoolError(f"{path} cannot be read as .npy: {error}") from error
        _check((array.shape, array.dtype), path, file, count)
        pairs.append((file.path, path))
    return tuple(pairs)


def _npz_headers(path: str) -> dict[str, _Header]:
    """Read the shapes and types of the arrays in an .npz from their headers alone."""
    headers: dict[str, _Header] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in archive.namelist():
                with archive.open(entry) as member:
                    version = np.lib.format.read_magic(member)
                    read = (
                        np.lib.format.read_array_header_1_0
                        if version == (1, 0)
                        else np.lib.format.read_array_header_2_0
                    )
                    shape, _, dtype = read(member)
                    headers[entry.removesuffix(".npy")] = (shape, dtype)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise PoolError(f"{path} cannot be read as .npz: {error}") from error
    return headers


def _datacomp(source: Source, rows: Sequence[int]) -> BundledEmbeddings | None:
    pairs = [(file, str(embeddings_beside(file.path))) for file in source.files]
    headers = [_npz_headers(path) for _, path in pairs]
    common = set.intersection(*(set(found) for found in headers))
    model = next((name for name in _NPZ_PREFERENCE if f"{name}_img" in common), None)
    if not any(name.endswith("_img") for found in headers for name in found):
        return None  # some other .npz that happens to share the name
    if model is None:
        raise PoolError(
            f"{pairs[0][1]} and its neighbours have no array l14_img or b32_img in common; found "
            f"{', '.join(sorted(headers[0])) or 'nothing'}. Move the .npz files away to go without"
        )
    has_text = f"{model}_txt" in common
    for (file, path), found, count in zip(pairs, headers, rows, strict=True):
        for side in ("img", "txt") if has_text else ("img",):
            _check(found[f"{model}_{side}"], path, file, count)
    files = tuple((file.path, path) for file, path in pairs)
    return BundledEmbeddings("datacomp", model, has_text, files, files if has_text else ())


def find_bundled(
    source: Source,
    rows: Sequence[int],
    schema: pa.Schema,
    *,
    column: str | None,
    prefer_column: bool = False,
) -> BundledEmbeddings | None:
    """Return what embeddings a pool brings.

    Parameters
    ----------
    source : Source
        Its files.
    rows : sequence of int
        The rows of each file.
    schema : pyarrow.Schema
        The pool's schema.
    column : str or None
        The embedding column.
    prefer_column : bool
        Whether the user named it, so that it goes before the files.

    Raises
    ------
    PoolError
        If embedding files are missing, damaged, or of another number of rows.
    """
    if column is not None and (prefer_column or source.layout == "files"):
        return BundledEmbeddings("column", column, False, field=schema.field(column))
    if source.layout == "clip-retrieval" and not source.remote:
        images = _npy_files(source, rows, "img_emb", required=True)
        texts = _npy_files(source, rows, "text_emb", required=False)
        return BundledEmbeddings("clip-retrieval", "img_emb", bool(texts), images, texts)
    if source.layout == "datacomp":
        return _datacomp(source, rows)
    return None
