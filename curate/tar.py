"""Read samples from tar shards (WebDataset, img2dataset) without extracting anything.

The headers are parsed here and not by `tarfile`, which takes more than twice as long to walk the
30,000 members of a shard: a pool can have thousands of shards to count before work starts.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import BinaryIO, NamedTuple

from curate.errors import ShardError

logger = logging.getLogger(__name__)

#: A larger member is recorded, not read.
MAX_MEMBER_BYTES = 256 << 20

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")

_BLOCK = 512
# Long names and PAX records are short; a size beyond this is damage or an attack.
_MAX_RECORD_BYTES = 1 << 20
_MAX_JSON_BYTES = 16 << 20
_MAX_KEY_CHARS = 1024
_GNU_LONG_NAME, _GNU_LONG_LINK, _PAX, _PAX_GLOBAL = b"L", b"K", b"x", b"g"
_REGULAR = (b"0", b"\0", b"7")


class _DamagedError(Exception):
    """The archive ends, or stops making sense, at this point."""


class Member(NamedTuple):
    """A regular file in the archive: where its bytes lie."""

    name: bytes
    offset: int
    size: int


@dataclass(frozen=True)
class TarSample:
    """The files that share a key.

    Attributes
    ----------
    key : str
        The name up to the first dot of its last part, with its folders. For people and for
        joining: it comes from the archive and must not be used as a path.
    members : dict of str to bytes
        The contents by extension, in lower case.
    skipped : dict of str to int
        The sizes of the members that were too large to read.
    """

    key: str
    members: dict[str, bytes]
    skipped: dict[str, int] = field(default_factory=dict)


@dataclass
class TarSummary:
    """What the headers of a shard tell.

    Attributes
    ----------
    samples : int
        The number of samples.
    extensions : set of str
        Their extensions; at most the first thousand that occur.
    first_json : dict or None
        The contents of the first json member that parses.
    """

    samples: int = 0
    extensions: set[str] = field(default_factory=set)
    first_json: dict[str, object] | None = None


def _number(raw: bytes) -> int:
    """Return a size field: octal digits, or GNU's binary form for 8 GiB and more."""
    if raw[0] == 0x80:
        return int.from_bytes(raw[1:], "big")
    digits = raw.split(b"\0", 1)[0].strip()
    if not digits:
        return 0
    if not digits.isdigit():
        raise _DamagedError("a size is not a number")
    try:
        return int(digits, 8)
    except ValueError:
        raise _DamagedError("a size is not a number") from None


def _check_sum(block: bytes) -> None:
    claimed = _number(block[148:156])
    actual = sum(block) - sum(block[148:156]) + 8 * ord(" ")
    if claimed != actual:
        raise _DamagedError("a header's checksum is wrong")


def _pax(record: bytes) -> dict[bytes, bytes]:
    """Return the fields of a PAX record: lines of ``length key=value``."""
    fields: dict[bytes, bytes] = {}
    position = 0
    while position < len(record) and record[position] != 0:
        digits, space, _ = record[position : position + 20].partition(b" ")
        if not space or not digits.isdigit() or int(digits) <= len(digits) + 1:
            raise _DamagedError("a PAX header is malformed")
        end = position + int(digits)
        key, equals, value = record[position + len(digits) + 1 : end].partition(b"=")
        if end > len(record) or not equals:
            raise _DamagedError("a PAX header is malformed")
        fields[key] = value.removesuffix(b"\n")
        position = end
    return fields


class _Headers:
    """Walk the headers of an archive, seeking over what lies between them."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._end = file.seek(0, os.SEEK_END)
        self._name: bytes | None = None
        self._size: int | None = None
        self.ended = False

    def __iter__(self) -> Iterator[Member]:
        position = 0
        while position < self._end:
            block = self._read(position, _BLOCK)
            if not any(block):
                self.ended = True
                return
            _check_sum(block)
            kind = block[156:157]
            size = _number(block[124:136])
            if kind in _REGULAR and self._size is not None:
                size = self._size
            start = position + _BLOCK
            position = start + -(-size // _BLOCK) * _BLOCK
            # The padding counts: whoever wrote the member wrote that too.
            if position > self._end:
                raise _DamagedError("it ends within a member")
            if kind in (_GNU_LONG_NAME, _GNU_LONG_LINK, _PAX, _PAX_GLOBAL):
                self._note(kind, start, size)
                continue
            if kind in _REGULAR:
                yield Member(self._name or self._short_name(block), start, size)
            elif kind == b"S":
                raise _DamagedError("it holds a sparse member, which is not supported")
            # Folders, links and devices hold no data of their own and are never followed.
            self._name = self._size = None

    def _read(self, position: int, size: int) -> bytes:
        self._file.seek(position)
        data = self._file.read(size)
        if len(data) < size:
            raise _DamagedError("it ends within a header")
        return data

    def _note(self, kind: bytes, start: int, size: int) -> None:
        """Remember what an extension header says about the member that follows it."""
        if size > _MAX_RECORD_BYTES:
            raise _DamagedError("an extended header is too long")
        if kind == _GNU_LONG_NAME:
            self._name = self._read(start, size).split(b"\0", 1)[0]
        elif kind == _PAX:
            fields = _pax(self._read(start, size))
            self._name = fields.get(b"path", self._name)
            if b"size" in fields:
                if not fields[b"size"].isdigit() or len(fields[b"size"]) > 20:
                    raise _DamagedError("a size is not a number")
                self._size = int(fields[b"size"])

    @staticmethod
    def _short_name(block: bytes) -> bytes:
        name = block[:100].split(b"\0", 1)[0]
        if block[257:263] == b"ustar\0":
            prefix = block[345:500].split(b"\0", 1)[0]
            name = prefix + b"/" + name if prefix else name
        return name


def _split(name: bytes) -> tuple[bytes, str] | None:
    """Return the key and the extension by WebDataset's rule; None for a name without either."""
    folder, slash, base = name.rpartition(b"/")
    stem, _, extension = base.partition(b".")
    if not stem or not extension:
        return None
    return folder + slash + stem, extension.decode("utf-8", "replace").lower()


def _display(key: bytes) -> str:
    """Return the key as text: what is not printable is replaced, so that logs stay readable."""
    text = key.decode("utf-8", "replace")[:_MAX_KEY_CHARS]
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def _groups(headers: _Headers) -> Iterator[tuple[bytes, dict[str, Member]]]:
    """Group consecutive members of the same key; the group at a break is not complete."""
    key: bytes | None = None
    members: dict[str, Member] = {}
    for member in headers:
        parts = _split(member.name)
        if parts is None:
            continue
        # An extension that comes again is the next sample of the same name: nothing is lost.
        if parts[0] != key or parts[1] in members:
            if key is not None:
                yield key, members
            key, members = parts[0], {}
        members[parts[1]] = member
    if key is not None:
        yield key, members


def _error(name: str, samples: int, why: object) -> ShardError:
    return ShardError(
        f"{name} is damaged: {why}; {samples} samples before that are good. "
        "Download the shard again, or leave it out"
    )


def read_samples(
    file: BinaryIO,
    *,
    name: str,
    wanted: Callable[[str], bool] = lambda extension: True,
    max_member_bytes: int = MAX_MEMBER_BYTES,
) -> Iterator[TarSample]:
    """Read the samples of a tar shard in their order.

    Parameters
    ----------
    file : binary file
        Open for reading, and able to seek.
    name : str
        What errors call it.
    wanted : callable
        Told an extension in lower case; what it declines is not read.
    max_member_bytes : int
        A larger member is not read but listed in ``skipped``.

    Yields
    ------
    TarSample
        One per key, also where nothing of it is wanted.

    Raises
    ------
    ShardError
        After the last good sample, if the archive is cut short or damaged.

    Examples
    --------
    >>> import io, tarfile
    >>> buffer = io.BytesIO()
    >>> with tarfile.open(fileobj=buffer, mode="w") as archive:
    ...     info = tarfile.TarInfo("000.txt")
    ...     info.size = 3
    ...     archive.addfile(info, io.BytesIO(b"cat"))
    >>> [(sample.key, sample.members) for sample in read_samples(buffer, name="a.tar")]
    [('000', {'txt': b'cat'})]
    """
    good = 0
    try:
        for key, found in _groups(_Headers(file)):
            members: dict[str, bytes] = {}
            skipped: dict[str, int] = {}
            for extension, member in found.items():
                if not wanted(extension):
                    continue
                if member.size > max_member_bytes:
                    skipped[extension] = member.size
                    continue
                file.seek(member.offset)
                members[extension] = file.read(member.size)
                if len(members[extension]) < member.size:
                    raise _DamagedError("it became shorter while it was read")
            yield TarSample(_display(key), members, skipped)
            good += 1
    except (_DamagedError, OSError) as error:
        raise _error(name, good, error) from error


def parse_json(data: bytes | None) -> dict[str, object] | None:
    """Return a json member as a dict; None if it is absent, damaged or something else."""
    if data is None or len(data) > _MAX_JSON_BYTES:
        return None
    try:
        parsed = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return parsed if isinstance(parsed, dict) else None


def summarise(file: BinaryIO, *, name: str) -> TarSummary:
    """Count a shard's samples from its headers alone.

    Parameters
    ----------
    file : binary file
        Open for reading, and able to seek.
    name : str
        What errors call it.

    Returns
    -------
    TarSummary

    Raises
    ------
    ShardError
        If the archive is cut short or damaged; the message tells how many samples are good.
    """
    summary = TarSummary()
    try:
        headers = _Headers(file)
        for _, members in _groups(headers):
            summary.samples += 1
            if len(summary.extensions) < 1000:
                summary.extensions.update(members)
            described = members.get("json")
            if summary.first_json is None and described and described.size <= _MAX_JSON_BYTES:
                file.seek(described.offset)
                summary.first_json = parse_json(file.read(described.size))
    except (_DamagedError, OSError) as error:
        raise _error(name, summary.samples, error) from error
    if not headers.ended:
        logger.warning(
            "%s has no end mark: it may be cut short after %d samples", name, summary.samples
        )
    return summary
