"""Tar shards as rows: one column per kind of member, and the roles that the json names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from curate.columns import ALIASES, IMAGE_STRUCT
from curate.errors import PoolError, ShardError
from curate.parquet import BATCH_BYTES, only
from curate.sources import Shard, SourceFile, open_file
from curate.tar import (
    IMAGE_EXTENSIONS,
    MAX_MEMBER_BYTES,
    TarSample,
    TarSummary,
    parse_json,
    read_samples,
    summarise,
)

# Where a caption is looked for, in this order; then the json's `caption` and `text`.
_CAPTION_EXTENSIONS = ("txt", "text", "caption")
#: Other members that are text, and get a column under their extension.
TEXT_EXTENSIONS = ("cls", "csv", "htm", "html", "jsonl", "lang", "md", "tsv", "xml", "yaml", "yml")
_BASE_COLUMNS = ("key", "image", "text", "json")
_JSON_ROLES = ("uid", "url", "score")


def summarise_files(files: Sequence[SourceFile]) -> list[TarSummary]:
    """Walk the headers of all shards.

    Raises
    ------
    PoolError
        If a shard is damaged: a pool that silently lacks rows is worse than none.
    """
    summaries = []
    for file in files:
        try:
            with open_file(file.path) as opened:
                summaries.append(summarise(opened, name=file.path))
        except (ShardError, OSError) as error:
            raise PoolError(f"{error}") from error
    return summaries


def tar_schema(summaries: Sequence[TarSummary]) -> pa.Schema:
    """Return the columns of tar shards.

    Always ``key, image, text, json``; then ``uid``, ``url`` and the score where the first json of
    a shard has them under a known name, and one column per other kind of text member.
    """
    described: dict[str, object] = {}
    extensions: set[str] = set()
    for summary in summaries:
        described = {**(summary.first_json or {}), **described}
        extensions |= summary.extensions
    fields = [
        ("key", pa.string()),
        ("image", IMAGE_STRUCT),
        ("text", pa.string()),
        ("json", pa.string()),
    ]
    for role in _JSON_ROLES:
        lowered = {name.lower(): name for name in described if name.lower() in ALIASES[role]}
        names = [lowered[alias] for alias in ALIASES[role] if alias in lowered]
        for name in names[: None if role == "score" else 1]:
            if name.lower() not in _BASE_COLUMNS:
                fields.append((name, pa.float64() if role == "score" else pa.string()))
    taken = {name for name, _ in fields}
    fields += [(ext, pa.string()) for ext in TEXT_EXTENSIONS if ext in extensions - taken]
    return pa.schema(fields)


def plan_tar_shards(
    files: Sequence[SourceFile], summaries: Sequence[TarSummary]
) -> tuple[Shard, ...]:
    """Return one shard per tar file that holds samples."""
    shards: list[Shard] = []
    first_row = 0
    for file, summary in zip(files, summaries, strict=True):
        if summary.samples:
            shards.append(Shard(len(shards), file.path, None, summary.samples, first_row))
            first_row += summary.samples
    return tuple(shards)


def _clean(text: str) -> str:
    # Lone surrogates from json escapes cannot be stored as UTF-8.
    return text.encode("utf-8", "replace").decode("utf-8")


def _text(data: bytes | None) -> str | None:
    return None if data is None else data.decode("utf-8", "replace")


def _image(sample: TarSample) -> dict[str, Any] | None:
    """Return the image struct; a path without bytes is an image that was too large to read."""
    for extension in IMAGE_EXTENSIONS:
        if extension in sample.members or extension in sample.skipped:
            path = f"{sample.key}.{extension}"
            return {"bytes": sample.members.get(extension), "path": path}
    return None


def _caption(sample: TarSample, described: Mapping[str, object]) -> str | None:
    for extension in _CAPTION_EXTENSIONS:
        if extension in sample.members:
            return _text(sample.members[extension])
    for name in ("caption", "text"):
        value = described.get(name)
        if isinstance(value, str):
            return _clean(value)
    return None


def _described(value: object, kind: pa.DataType) -> str | float | None:
    """Return a json value as the column's type; null where it is something else."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    if pa.types.is_string(kind):
        return _clean(str(value))
    return None if isinstance(value, str) else float(value)


def _row(sample: TarSample, schema: pa.Schema) -> dict[str, Any]:
    described = parse_json(sample.members.get("json")) or {}
    row: dict[str, Any] = {}
    for field in schema:
        if field.name == "key":
            row["key"] = sample.key
        elif field.name == "image":
            row["image"] = _image(sample)
        elif field.name == "text":
            row["text"] = _caption(sample, described)
        elif field.name == "json" or field.name in TEXT_EXTENSIONS:
            row[field.name] = _text(sample.members.get(field.name))
        else:
            row[field.name] = _described(described.get(field.name), field.type)
    return row


def _wanted(schema: pa.Schema) -> frozenset[str]:
    names = set(schema.names)
    wanted: set[str] = names & set(TEXT_EXTENSIONS)
    if "image" in names:
        wanted |= set(IMAGE_EXTENSIONS)
    if "text" in names:
        wanted |= set(_CAPTION_EXTENSIONS)
    if names - {"key", "image"} - set(TEXT_EXTENSIONS):
        wanted.add("json")
    return frozenset(wanted)


def read_tar_batches(
    shard: Shard, schema: pa.Schema, rows: int, kept: NDArray[np.bool_] | None = None
) -> Iterator[pa.RecordBatch]:
    """Read a tar shard as a stream of rows; members that no column needs are passed over.

    Parameters
    ----------
    shard : Shard
        Of a tar file.
    schema : pyarrow.Schema
        The columns to read, some of `tar_schema`'s.
    rows : int
        The most rows of a batch; fewer where images are large.
    kept : (r,) bool, optional
        Which of the shard's rows.

    Yields
    ------
    pyarrow.RecordBatch

    Raises
    ------
    ShardError
        If the file is damaged, or not the one that was opened.
    """
    batches = _tar_batches(shard, schema, rows)
    yield from batches if kept is None else only(batches, kept)


def _tar_batches(shard: Shard, schema: pa.Schema, rows: int) -> Iterator[pa.RecordBatch]:
    held: list[dict[str, Any]] = []
    size = total = 0
    with open_file(shard.path) as opened:
        wanted = _wanted(schema).__contains__
        for sample in read_samples(opened, name=shard.path, wanted=wanted):
            more = sum(map(len, sample.members.values()))
            if held and (len(held) == rows or size + more > max(BATCH_BYTES, MAX_MEMBER_BYTES)):
                yield _batch(held, schema)
                held, size = [], 0
            held.append(_row(sample, schema))
            size, total = size + more, total + 1
    if held:
        yield _batch(held, schema)
    if total != shard.rows:
        raise ShardError(f"{shard.path} changed since the pool was opened; start again")


def _batch(rows: list[dict[str, Any]], schema: pa.Schema) -> pa.RecordBatch:
    arrays = [pa.array([row[f.name] for row in rows], f.type) for f in schema]
    return pa.RecordBatch.from_arrays(arrays, schema=schema)
