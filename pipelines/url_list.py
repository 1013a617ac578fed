"""Lists of addresses that img2dataset takes as input, and the command that downloads them.

Two verbs write them: `curate export --to img2dataset` and `curate download`.
"""

from __future__ import annotations

import shlex
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt

from curate.columns import ALIASES, ColumnMapping, is_embedding, is_image_struct
from curate.errors import PoolError
from curate.rows import clean_strings

#: X-Robots-Tag directives that are obeyed: img2dataset's own list, and `noml`.
OPT_OUT_DIRECTIVES = ("noai", "noimageai", "noindex", "noimageindex", "noml")
#: What servers are told who asks.
USER_AGENT_TOKEN = "curate"

# img2dataset refuses these as additional columns, or would write two columns of one name.
_RESERVED = frozenset(
    {"uid", "key", "url", "caption", "status", "error_message", "exif"}
    | {"width", "height", "original_width", "original_height"}
    | {"md5", "sha256", "sha512", "jpg", "png", "webp", "txt", "json"}
)
_PREFIX = "pool_"


@dataclass(frozen=True)
class UrlColumns:
    """Which columns of a pool go into a list of addresses, and under which names.

    Attributes
    ----------
    url : str
        The pool's column that becomes ``url``.
    caption : str or None
        The pool's column that becomes ``caption``.
    others : tuple of (str, str)
        The other columns: the pool's name, and the name in the list.
    """

    url: str
    caption: str | None
    others: tuple[tuple[str, str], ...]

    @property
    def originals(self) -> list[str]:
        """The columns to read from the pool."""
        caption = [] if self.caption is None else [self.caption]
        return list(dict.fromkeys([self.url, *caption, *(name for name, _ in self.others)]))

    @property
    def additional(self) -> list[str]:
        """The columns of the list that img2dataset is asked to copy."""
        return ["uid", *(name for _, name in self.others)]

    def schema(self, pool: pa.Schema) -> pa.Schema:
        """Return the schema of the list."""
        fields = [pa.field("uid", pa.string()), pa.field("url", pa.string())]
        if self.caption is not None:
            fields.append(pa.field("caption", pa.string()))
        fields += [pa.field(name, pool.field(original).type) for original, name in self.others]
        return pa.schema(fields)

    def batch(self, rows: pa.RecordBatch, uids: pa.Array) -> pa.RecordBatch:
        """Return rows of the pool as rows of the list."""
        schema = self.schema(rows.schema)
        arrays = [uids.cast(pa.string()), safe_urls(rows.column(self.url))]
        if self.caption is not None:
            arrays.append(clean_strings(rows.column(self.caption)))
        arrays += [rows.column(original) for original, _ in self.others]
        return pa.RecordBatch.from_arrays(arrays, schema=schema)


def free_name(name: str, taken: Collection[str]) -> str:
    """Return the name, with a prefix where it is taken.

    Examples
    --------
    >>> free_name("width", {"width"}), free_name("score", {"width"})
    ('pool_width', 'score')
    """
    while name in taken:
        name = _PREFIX + name
    return name


def is_bulky(field: pa.Field, mapping: ColumnMapping) -> bool:
    """Tell whether a column holds images or embeddings, which a table of facts leaves out."""
    kind, name = field.type, field.name.lower()
    if field.name in (mapping.image, mapping.embedding) or is_image_struct(kind):
        return True
    binary = pt.is_binary(kind) or pt.is_large_binary(kind) or pt.is_binary_view(kind)
    if binary and name in ALIASES["image"]:
        return True
    return is_embedding(kind) and (pt.is_fixed_size_list(kind) or name in ALIASES["embedding"])


def url_columns(schema: pa.Schema, mapping: ColumnMapping, *, source: str) -> UrlColumns:
    """Decide what goes into a list of addresses: everything but images and embeddings.

    Parameters
    ----------
    schema : pyarrow.Schema
        The pool's columns.
    mapping : ColumnMapping
        Their roles.
    source : str
        What errors call the pool.

    Raises
    ------
    PoolError
        If there is no column of addresses.

    Examples
    --------
    >>> names = ["uid", "URL", "TEXT", "width"]
    >>> schema = pa.schema([(name, pa.string()) for name in names])
    >>> mapping = ColumnMapping(uid="uid", url="URL", text="TEXT")
    >>> url_columns(schema, mapping, source="laion").additional
    ['uid', 'pool_width']
    """
    if mapping.url is None:
        raise PoolError(
            f"{source} has no column of addresses; its columns are {', '.join(schema.names)}. "
            "Name one with --url-col when the pool is opened"
        )
    taken = set(_RESERVED) | set(schema.names)
    others: list[tuple[str, str]] = []
    for field in schema:
        # An integer uid is the uid column of the list as text; under another name it stays too.
        is_role = field.name in (mapping.url, mapping.text)
        is_uid = field.name == mapping.uid == "uid"
        if is_role or is_uid or is_bulky(field, mapping):
            continue
        name = field.name
        if name in _RESERVED:
            name = free_name(name, taken)
            taken.add(name)
        others.append((field.name, name))
    return UrlColumns(mapping.url, mapping.text, tuple(others))


def safe_urls(column: pa.Array) -> pa.StringArray:
    """Return addresses, those that are not of the web marked so that no downloader opens them.

    The list comes from the web, and Python's `urlopen`, which img2dataset calls, would read
    ``file:///...`` of this machine into the data set.

    Examples
    --------
    >>> safe_urls(pa.array(["http://a/1.jpg", "file:///etc/passwd", None])).to_pylist()
    ['http://a/1.jpg', 'refused+file:///etc/passwd', None]
    """
    urls = pc.utf8_trim_whitespace(clean_strings(column))
    good = pc.match_substring_regex(urls, r"(?i)\Ahttps?://")
    marked = pc.binary_join_element_wise("refused+", urls, "")
    return pc.if_else(good, urls, marked)


def img2dataset_arguments(
    url_list: Path, out: Path, columns: UrlColumns, extra: Sequence[tuple[str, object]] = ()
) -> list[str]:
    """Return the arguments with which img2dataset downloads a list.

    Parameters
    ----------
    url_list : Path
        A folder of Parquet files, or one file.
    out : Path
        Where the images go.
    columns : UrlColumns
        What the list holds.
    extra : sequence of (str, object)
        More options; they go last.
    """
    options: list[tuple[str, object]] = [
        # Absolute, since img2dataset's command line would read a bare 2024 as a number.
        ("url_list", url_list.absolute()),
        ("input_format", "parquet"),
        ("url_col", "url"),
        *([] if columns.caption is None else [("caption_col", "caption")]),
        ("save_additional_columns", columns.additional),
        ("output_format", "parquet"),
        ("output_folder", out.absolute()),
        ("enable_wandb", False),
        ("user_agent_token", USER_AGENT_TOKEN),
        ("disallowed_header_directives", list(OPT_OUT_DIRECTIVES)),
        *extra,
    ]
    return [f"--{name}={value}" for name, value in options]


def command_line(program: str, arguments: Sequence[str]) -> str:
    """Return a command to paste into a shell."""
    # The variable stops a look-up of the package index that img2dataset's dependency makes.
    return f"NO_ALBUMENTATIONS_UPDATE=1 {shlex.join([program, *arguments])}"
