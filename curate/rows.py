"""A pool's rows in one form: image bytes, the reason where there are none, and clean text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt

from curate.columns import IMAGE_STRUCT, ColumnMapping
from curate.errors import PoolError
from curate.images import MAX_BYTES, ImageFolder
from curate.sources import Source

#: The columns of `Pool.samples`.
SAMPLE_SCHEMA = pa.schema(
    [
        ("image", pa.binary()),
        ("detail", pa.string()),
        ("text", pa.string()),
        ("url", pa.string()),
    ]
)
# Images read from paths are handed on before they hold more memory than this.
_LOADED_BYTES = 256 << 20


def clean_strings(array: pa.Array) -> pa.StringArray:
    r"""Return a string column as valid UTF-8; what is not is replaced, as Parquet checks nothing.

    Examples
    --------
    >>> broken = pa.array([b"caf\xe9", b"tea"]).view(pa.string())
    >>> clean_strings(broken).to_pylist() == ["caf\N{REPLACEMENT CHARACTER}", "tea"]
    True
    """
    if pt.is_dictionary(array.type):
        array = array.dictionary_decode()
    if pt.is_null(array.type):
        return pa.nulls(len(array), pa.string())
    strings = array.cast(pa.string(), safe=False)
    try:
        strings.validate(full=True)
    except pa.ArrowInvalid:
        raw = strings.cast(pa.binary()).to_pylist()
        return pa.array(
            [None if text is None else text.decode("utf-8", "replace") for text in raw],
            pa.string(),
        )
    return strings


@dataclass(frozen=True)
class ImageColumn:
    """An image column taken apart.

    Attributes
    ----------
    data : pyarrow.BinaryArray
        The bytes, null where the row has none.
    paths : pyarrow.StringArray
        The paths, null where the row has none.
    """

    data: pa.BinaryArray
    paths: pa.StringArray


def image_parts(array: pa.Array) -> ImageColumn:
    """Take an image column apart: a struct, plain bytes, or paths.

    Parameters
    ----------
    array : pyarrow.Array
        Of a type that `curate.columns.map_columns` accepts as an image.

    Returns
    -------
    ImageColumn
    """
    none_data, none_paths = pa.nulls(len(array), pa.binary()), pa.nulls(len(array), pa.string())
    if pt.is_struct(array.type):
        names = {field.name for field in array.type}
        # `struct_field` minds the nulls of the struct itself; `.field()` would not.
        data = pc.struct_field(array, "bytes").cast(pa.binary())
        if "path" not in names:
            return ImageColumn(data, none_paths)
        return ImageColumn(data, clean_strings(pc.struct_field(array, "path")))
    if pt.is_null(array.type):
        return ImageColumn(none_data, none_paths)
    if pt.is_binary(array.type) or pt.is_large_binary(array.type) or pt.is_binary_view(array.type):
        return ImageColumn(array.cast(pa.binary()), none_paths)
    return ImageColumn(none_data, clean_strings(array))


def _absent(folder: ImageFolder | None, path: str | None) -> tuple[bytes | None, str]:
    """Read one image that the row holds no bytes of, or tell why that cannot be."""
    if path is None or path == "":
        return None, "the row holds no image"
    if folder is None:
        return None, f"{path[:200]!r} is not in the pool: too large to read, or never stored"
    return folder.read(path)


def load_images(
    column: ImageColumn, folder: ImageFolder | None
) -> Iterator[tuple[int, pa.BinaryArray, pa.StringArray]]:
    """Read what images are named by path, so many at a time as memory allows.

    Parameters
    ----------
    column : ImageColumn
        The rows' images.
    folder : ImageFolder or None
        Where paths are looked up; None where they name nothing that could be read.

    Yields
    ------
    start : int
        The first row of this run of rows.
    images : pyarrow.BinaryArray
        The bytes; null where there are none.
    details : pyarrow.StringArray
        Why there are none; null where there are.
    """
    if not column.data.null_count:
        yield 0, column.data, pa.nulls(len(column.data), pa.string())
        return
    start = size = 0
    images: list[bytes | None] = []
    details: list[str | None] = []
    for row, absent in enumerate(column.data.is_null().to_pylist()):
        data, detail = column.data[row].as_py(), ""
        if absent:
            data, detail = _absent(folder, column.paths[row].as_py())
        if images and size + len(data or b"") > max(_LOADED_BYTES, MAX_BYTES):
            yield start, pa.array(images, pa.binary()), pa.array(details, pa.string())
            start, size, images, details = row, 0, [], []
        images.append(data)
        details.append(detail or None)
        size += len(data or b"")
    yield start, pa.array(images, pa.binary()), pa.array(details, pa.string())


def sample_batches(
    batch: pa.RecordBatch,
    *,
    image: str | None,
    text: str | None,
    url: str | None,
    folder: ImageFolder | None,
) -> Iterator[pa.RecordBatch]:
    """Yield a batch's rows as `SAMPLE_SCHEMA`; several batches where images are large."""
    rows = batch.num_rows
    texts, urls = (
        pa.nulls(rows, pa.string()) if name is None else clean_strings(batch.column(name))
        for name in (text, url)
    )
    if image is None:
        details = pa.array(["the pool holds no images"] * rows, pa.string())
        columns = [pa.nulls(rows, pa.binary()), details, texts, urls]
        yield pa.RecordBatch.from_arrays(columns, schema=SAMPLE_SCHEMA)
        return
    for start, images, details in load_images(image_parts(batch.column(image)), folder):
        stop = len(images)
        columns = [images, details, texts.slice(start, stop), urls.slice(start, stop)]
        yield pa.RecordBatch.from_arrays(columns, schema=SAMPLE_SCHEMA)


def export_batches(
    batch: pa.RecordBatch, schema: pa.Schema, *, image: str | None, folder: ImageFolder | None
) -> Iterator[pa.RecordBatch]:
    """Yield a batch's rows as the export schema, with the bytes of images named by path.

    Parameters
    ----------
    batch : pyarrow.RecordBatch
        All columns of the pool.
    schema : pyarrow.Schema
        From `curate.columns.export_schema`.
    image : str or None
        The image column.
    folder : ImageFolder or None
        Where paths are looked up.

    Yields
    ------
    pyarrow.RecordBatch
    """
    if image is None or schema.field(image).type != IMAGE_STRUCT:
        yield pa.RecordBatch.from_arrays(batch.columns, schema=schema)
        return
    column = image_parts(batch.column(image))
    position = schema.get_field_index(image)
    for start, images, _ in load_images(column, folder):
        part = batch.slice(start, len(images))
        paths = column.paths.slice(start, len(images))
        neither = pc.and_(images.is_null(), paths.is_null())
        arrays = part.columns
        arrays[position] = pa.StructArray.from_arrays(
            [images, paths], fields=list(IMAGE_STRUCT), mask=neither
        )
        yield pa.RecordBatch.from_arrays(arrays, schema=schema)


def find_image_folder(
    source: Source, schema: pa.Schema, mapping: ColumnMapping, given: str | Path | None
) -> ImageFolder | None:
    """Return where image paths are looked up; None where paths name nothing that can be read."""
    if given is not None:
        folder = Path(given).expanduser().absolute()
        if not folder.is_dir():
            raise PoolError(f"--image-root {folder} is not a folder; name the one with the images")
        return ImageFolder(str(folder))
    if source.kind == "tar":
        return None
    if not source.remote:
        return ImageFolder(source.root)
    kind = schema.field(mapping.image).type if mapping.image else pa.binary()
    if pt.is_string(kind) or pt.is_large_string(kind):
        raise PoolError(
            f"column {mapping.image!r} of a remote pool holds paths; copy the images here and "
            "name their folder with --image-root"
        )
    return None
