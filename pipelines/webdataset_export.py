"""The kept rows as WebDataset tars, which open_clip and other training code stream.

A tar is a function of the run and its number alone: fixed order, names, times and owners. Whatever
wrote it, however often it was interrupted, its bytes are the same.
"""

from __future__ import annotations

import io
import json
import math
import tarfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.types as pt

from curate.errors import PoolError
from curate.manifest import atomic_path, atomic_write_json
from curate.progress import task
from curate.rows import clean_strings, image_parts
from curate.shards import write_parquet
from pipelines.executor import Executor, ShardReport
from pipelines.kept_rows import KeptRows
from pipelines.url_list import free_name, is_bulky

_KEY_DIGITS = 9
_ROWS = 256
_SUCCESS, _MISSING, _UNSUPPORTED = "success", "missing_image", "unsupported_format"
_DETAILS = {
    _SUCCESS: None,
    _MISSING: "the row holds no image",
    _UNSUPPORTED: "not JPEG, PNG or WebP, which is what loaders of tars read",
}
_SIDECAR = pa.schema(
    [
        ("key", pa.string()),
        ("uid", pa.string()),
        ("status", pa.string()),
        ("error_message", pa.string()),
    ]
)


def image_extension(data: bytes | None) -> str | None:
    r"""Return the extension that belongs to an image's first bytes; None if it is none of ours.

    Examples
    --------
    >>> image_extension(b"\xff\xd8\xff\xe0..."), image_extension(b"GIF89a"), image_extension(None)
    ('jpg', None, None)
    """
    if not data:
        return None
    if data.startswith(b"\xff\xd8\xff"):
        return "jpg"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "webp"
    return None


def tar_path(folder: Path, number: int) -> Path:
    """Return the path of a tar.

    Examples
    --------
    >>> tar_path(Path("out"), 3).as_posix()
    'out/00003.tar'
    """
    return folder / f"{number:05d}.tar"


def _sidecar_path(folder: Path, number: int) -> Path:
    return tar_path(folder, number).with_suffix(".parquet")


def _holds_json(kind: pa.DataType) -> bool:
    kind = kind.value_type if pt.is_dictionary(kind) else kind
    text = pt.is_string(kind) or pt.is_large_string(kind) or pt.is_string_view(kind)
    return bool(text or pt.is_integer(kind) or pt.is_floating(kind) or pt.is_boolean(kind))


def _json_names(rows: KeptRows) -> dict[str, str]:
    """Return the columns that go into the json members, and their names there."""
    schema, mapping = rows.schema(), rows.mapping
    taken = {"uid", "url", *schema.names}
    names: dict[str, str] = {}
    for field in schema:
        is_uid = field.name == mapping.uid == "uid"
        if is_uid or field.name == mapping.text or is_bulky(field, mapping):
            continue
        if field.name == mapping.url:
            names[field.name] = "url"
        elif _holds_json(field.type):
            reserved = field.name in ("uid", "url")
            names[field.name] = free_name(field.name, taken) if reserved else field.name
    return names


def _plain(column: pa.Array) -> list[Any]:
    """Return values that JSON can hold: text that is valid, and null where a float is not."""
    kind = column.type.value_type if pt.is_dictionary(column.type) else column.type
    number = pt.is_integer(kind) or pt.is_floating(kind) or pt.is_boolean(kind)
    values: list[Any] = (column if number else clean_strings(column)).to_pylist()
    if pt.is_floating(kind):
        return [None if v is None or not math.isfinite(v) else v for v in values]
    return values


class _Sample(NamedTuple):
    uid: str
    image: bytes | None
    text: str
    facts: Mapping[str, Any]


@dataclass(frozen=True)
class TarWorker:
    """Writes one tar and the table of its rows.

    Attributes
    ----------
    rows : KeptRows
    out : Path
    total : int
        Kept rows.
    samples_per_tar : int
    """

    rows: KeptRows
    out: Path
    total: int
    samples_per_tar: int

    def __call__(self, number: int) -> ShardReport:
        """Write a tar; rows that it cannot hold are in the table beside it, with the reason."""
        start = number * self.samples_per_tar
        stop = min(start + self.samples_per_tar, self.total)
        table: dict[str, list[Any]] = {name: [] for name in _SIDECAR.names}
        with (
            atomic_path(tar_path(self.out, number)) as temporary,
            tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as archive,
        ):
            for row, sample in enumerate(self._samples(start, stop), start):
                # Names are numbers: those that archives and tables bring are no safe paths.
                key = f"{row:0{_KEY_DIGITS}d}"
                status = _add(archive, key, sample)
                for name, value in zip(
                    _SIDECAR.names, (key, sample.uid, status, _DETAILS[status]), strict=True
                ):
                    table[name].append(value)
        with atomic_path(_sidecar_path(self.out, number)) as temporary:
            write_parquet(temporary, pa.table(table, schema=_SIDECAR))
        return ShardReport(number, stop - start)

    def _samples(self, start: int, stop: int) -> Iterator[_Sample]:
        image, text = self.rows.mapping.image, self.rows.mapping.text
        if image is None:
            raise TypeError("the rows have no image column")
        names = _json_names(self.rows)
        columns = list(dict.fromkeys([image, *([] if text is None else [text]), *names]))
        for uids, batch in self.rows.batches(columns, start, stop, rows=_ROWS):
            images = image_parts(batch.column(image)).data
            texts = [""] * len(uids) if text is None else _plain(batch.column(text))
            facts = [_plain(batch.column(name)) for name in names]
            for row, uid in enumerate(uids.to_pylist()):
                described = {"uid": uid}
                described |= {
                    new: values[row] for new, values in zip(names.values(), facts, strict=True)
                }
                yield _Sample(uid, images[row].as_py(), texts[row] or "", described)


def _add(archive: tarfile.TarFile, key: str, sample: _Sample) -> str:
    if not sample.image:
        return _MISSING
    extension = image_extension(sample.image)
    if extension is None:
        return _UNSUPPORTED
    facts = json.dumps(sample.facts, ensure_ascii=False, allow_nan=False)
    members = (
        (extension, sample.image),
        ("json", facts.encode("utf-8", "replace")),
        ("txt", sample.text.encode("utf-8", "replace")),
    )
    for name, data in members:
        info = tarfile.TarInfo(f"{key}.{name}")
        info.size, info.mode, info.mtime, info.uid, info.gid = len(data), 0o644, 0, 0, 0
        archive.addfile(info, io.BytesIO(data))
    return _SUCCESS


@dataclass(frozen=True)
class TarCounts:
    """What the tars of an export hold.

    Attributes
    ----------
    sizes : dict of str to int
        Samples by the name of the tar.
    statuses : dict of str to int
        Kept rows by what became of them.
    """

    sizes: dict[str, int]
    statuses: dict[str, int]

    @property
    def samples(self) -> int:
        """Samples in all tars."""
        return sum(self.sizes.values())


def write_tars(
    rows: KeptRows, out: Path, *, samples_per_tar: int, executor: Executor
) -> tuple[int, TarCounts]:
    """Write the tars that are not there yet, and ``sizes.json``.

    Parameters
    ----------
    rows : KeptRows
    out : Path
        A folder of this step.
    samples_per_tar : int
        Kept rows per tar, whatever the pool's shards.
    executor : Executor

    Returns
    -------
    int
        Kept rows.
    TarCounts

    Raises
    ------
    PoolError
        If there are no images to write.
    """
    total = check_images(rows)
    tars = -(-total // samples_per_tar)
    todo = [
        n for n in range(tars) if not (tar_path(out, n).exists() and _sidecar_path(out, n).exists())
    ]
    make_worker: Callable[[], TarWorker] = partial(TarWorker, rows, out, total, samples_per_tar)
    done = total - sum(min(samples_per_tar, total - n * samples_per_tar) for n in todo)
    with task("export", total=total, done=done) as advance:
        for report in executor.map(make_worker, todo):
            advance(report.rows)
    counts = count_tars(out, tars)
    if counts.samples == 0:
        raise PoolError(
            f"none of the {total:,} kept rows of {rows.run} holds a JPEG, PNG or WebP image; "
            "export them with --to parquet, or with --to img2dataset where they have addresses"
        )
    atomic_write_json(out / "sizes.json", counts.sizes)
    return total, counts


def check_images(rows: KeptRows) -> int:
    """Return the number of kept rows.

    Raises
    ------
    PoolError
        If nothing was kept, or the rows hold no images.
    """
    rows.check_pool()
    if rows.mapping.image is None:
        raise PoolError(
            f"the kept rows of {rows.run} hold no images, so there is nothing to put in tars; "
            "export them with --to img2dataset and download them, or with --to parquet or uids"
        )
    total = int(rows.part_rows().sum())
    if total == 0:
        raise PoolError(f"{rows.run} kept no rows; there is nothing to export")
    return total


def count_tars(out: Path, tars: int) -> TarCounts:
    """Count what the tars hold, from the tables beside them."""
    sizes: dict[str, int] = {}
    statuses: dict[str, int] = {}
    for number in range(tars):
        table = pq.read_table(_sidecar_path(out, number), columns=["status"], partitioning=None)
        found = {
            pair["values"]: pair["counts"] for pair in table["status"].value_counts().to_pylist()
        }
        sizes[tar_path(out, number).name] = found.get(_SUCCESS, 0)
        for status, count in found.items():
            statuses[status] = statuses.get(status, 0) + count
    return TarCounts(sizes, statuses)
