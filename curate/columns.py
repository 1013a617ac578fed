"""Which column of a pool plays which role, and the schema in which a pool's rows are exported."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.types as pt

from curate.errors import PoolError

#: Names that mean a role, best first; compared without case. Several match: the first wins.
ALIASES: Mapping[str, tuple[str, ...]] = {
    "image": (
        "image",
        "jpg",
        "jpeg",
        "png",
        "webp",
        "img",
        "image_bytes",
        "image_path",
        "file_name",
        "filename",
        "filepath",
        "file_path",
    ),
    "text": ("text", "caption", "alt_text", "alttext", "title"),
    "url": ("url", "image_url", "img_url"),
    "uid": ("uid",),
    "score": (
        "clip_l14_similarity_score",
        "clip_similarity_vitl14",
        "clip_b32_similarity_score",
        "clip_similarity_vitb32",
        "similarity",
        "clip_score",
        "clip_similarity",
    ),
    "embedding": (
        "embedding",
        "image_embedding",
        "img_emb",
        "image_emb",
        "clip_embedding",
        "emb",
        "embeddings",
    ),
}

#: The struct that `datasets` decodes; with large_binary or large_string inside it does not.
IMAGE_STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


@dataclass(frozen=True, kw_only=True)
class ColumnMapping:
    """The original column that plays each role; None where no column does.

    Examples
    --------
    >>> print(ColumnMapping(image="jpg", text="TEXT", url="URL", score="similarity").describe())
    image=jpg text=TEXT url=URL uid=derived score=similarity
    """

    image: str | None = None
    text: str | None = None
    url: str | None = None
    uid: str | None = None
    score: str | None = None
    embedding: str | None = None

    def describe(self) -> str:
        """Return the mapping in one line, for the log."""
        parts = [f"{role}={getattr(self, role) or 'none'}" for role in ("image", "text", "url")]
        parts.append(f"uid={self.uid or 'derived'}")
        parts += [
            f"{role}={getattr(self, role)}"
            for role in ("score", "embedding")
            if getattr(self, role) is not None
        ]
        return " ".join(parts)


def _is_string(kind: pa.DataType) -> bool:
    if pt.is_dictionary(kind):
        kind = kind.value_type
    return bool(pt.is_string(kind) or pt.is_large_string(kind) or pt.is_string_view(kind))


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pt.is_binary(kind) or pt.is_large_binary(kind) or pt.is_binary_view(kind))


def is_image_struct(kind: pa.DataType) -> bool:
    """Tell whether it is Hugging Face's image struct, in whatever width of its strings."""
    if not pt.is_struct(kind):
        return False
    fields = {field.name: field.type for field in kind}
    checks = {"bytes": _is_binary, "path": _is_string}
    return "bytes" in fields and all(
        check(fields[name]) or pt.is_null(fields[name])
        for name, check in checks.items()
        if name in fields
    )


def is_embedding(kind: pa.DataType) -> bool:
    """Tell whether it is a list of floats."""
    lists = pt.is_list(kind) or pt.is_large_list(kind) or pt.is_fixed_size_list(kind)
    return bool(lists and pt.is_floating(kind.value_type))


_ALLOWED: Mapping[str, tuple[Callable[[pa.DataType], bool], str]] = {
    "image": (
        lambda kind: is_image_struct(kind) or _is_binary(kind) or _is_string(kind),
        "binary (the file's bytes), string (its path) or struct<bytes: binary, path: string>",
    ),
    "text": (_is_string, "string"),
    "url": (_is_string, "string"),
    "uid": (lambda kind: _is_string(kind) or pt.is_integer(kind), "string or integer"),
    "score": (lambda kind: pt.is_floating(kind) or pt.is_integer(kind), "a float or an integer"),
    "embedding": (is_embedding, "list or fixed_size_list of half, float or double"),
}


def _allows(role: str, kind: pa.DataType) -> bool:
    # pandas writes a column of nothing but None as type null: it can be read as any role.
    return bool(pt.is_null(kind) or _ALLOWED[role][0](kind))


def no_such_column(name: str, columns: Sequence[str], what: str) -> PoolError:
    """Return the error for a name that no column has, with the nearest names."""
    lowered = {column.lower(): column for column in columns}
    near = [lowered[n] for n in difflib.get_close_matches(name.lower(), lowered, n=2, cutoff=0.5)]
    hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
    return PoolError(f"{what}: the pool has no column {name!r}{hint} Columns: {', '.join(columns)}")


def _wrong_type(role: str, name: str, kind: pa.DataType) -> PoolError:
    return PoolError(
        f"column {name!r} has type {kind} and cannot be the {role}; allowed: {_ALLOWED[role][1]}. "
        f"Name another column with --{role}-col, or none with --{role}-col ''"
    )


def _candidates(role: str, columns: Sequence[str]) -> list[str]:
    """Return the columns whose name means the role, best first: alias, then the exact case."""
    found: list[str] = []
    for alias in ALIASES[role]:
        matches = [column for column in columns if column.lower() == alias]
        found += sorted(matches, key=lambda column: column != alias)
    return found


def _resolve(role: str, schema: pa.Schema, given: str | None) -> str | None:
    if given == "":
        return None
    if given is not None:
        if given not in schema.names:
            raise no_such_column(given, schema.names, f"--{role}-col")
        if not _allows(role, schema.field(given).type):
            raise _wrong_type(role, given, schema.field(given).type)
        return given
    candidates = _candidates(role, schema.names)
    for name in candidates:
        if _allows(role, schema.field(name).type):
            return name
    # A list of numbers under another name is common, and an embedding is never required.
    if candidates and role != "embedding":
        raise _wrong_type(role, candidates[0], schema.field(candidates[0]).type)
    return None


def map_columns(schema: pa.Schema, *, given: Mapping[str, str | None]) -> ColumnMapping:
    """Find the column of every role.

    Parameters
    ----------
    schema : pyarrow.Schema
        The pool's schema.
    given : mapping of role to column name
        What the user named; None looks for an alias, ``""`` takes no column for the role.

    Returns
    -------
    ColumnMapping

    Raises
    ------
    PoolError
        If a named column is not there, or a column's type cannot play the role.

    Examples
    --------
    >>> schema = pa.schema([("URL", pa.string()), ("TEXT", pa.string())])
    >>> print(map_columns(schema, given={}).describe())
    image=none text=TEXT url=URL uid=derived
    """
    return ColumnMapping(**{role: _resolve(role, schema, given.get(role)) for role in ALIASES})


def _merged_features(metadata: Mapping[bytes, bytes], image: str) -> bytes:
    """Return the `huggingface` key's value with the image feature in it."""
    try:
        described: Any = json.loads(metadata.get(b"huggingface", b"{}"))
    except (ValueError, RecursionError):
        described = {}
    described = described if isinstance(described, dict) else {}
    info = described.get("info")
    info = info if isinstance(info, dict) else {}
    features = info.get("features")
    features = features if isinstance(features, dict) else {}
    old = features.get(image)
    if not (isinstance(old, dict) and old.get("_type") == "Image"):
        features = {**features, image: {"_type": "Image"}}
    return json.dumps({**described, "info": {**info, "features": features}}).encode()


def export_schema(schema: pa.Schema, mapping: ColumnMapping) -> pa.Schema:
    """Return the schema of exported rows: the pool's, with the image as a struct that decodes.

    Parameters
    ----------
    schema : pyarrow.Schema
        The pool's schema.
    mapping : ColumnMapping
        Its roles.

    Returns
    -------
    pyarrow.Schema
        Every column as it is, but the image as ``struct<bytes: binary, path: string>``, and the
        ``huggingface`` metadata key that makes `datasets.load_dataset` decode it. A struct with
        more fields than those two is left as it is, since nothing may be lost.

    Examples
    --------
    >>> schema = pa.schema([("jpg", pa.binary()), ("n", pa.int64())])
    >>> export_schema(schema, ColumnMapping(image="jpg")).field("jpg").type
    StructType(struct<bytes: binary, path: string>)
    """
    if mapping.image is None:
        return schema
    position = schema.get_field_index(mapping.image)
    field = schema.field(position)
    if pt.is_struct(field.type) and not {part.name for part in field.type} <= {"bytes", "path"}:
        return schema
    metadata = dict(schema.metadata or {})
    metadata[b"huggingface"] = _merged_features(metadata, mapping.image)
    image = pa.field(mapping.image, IMAGE_STRUCT, nullable=True, metadata=field.metadata)
    return schema.set(position, image).with_metadata(metadata)


def distinct(*names: str | None) -> list[str]:
    """Return the names that are given, each once, in their order."""
    return list(dict.fromkeys(name for name in names if name is not None))
