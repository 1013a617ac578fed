"""Captions and thumbnails of the rows that a report shows, read from the pool if it is there."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from curate.errors import CurateError, PoolError

if TYPE_CHECKING:
    from curate.pool import Pool

SIZE = 96
# Base64 makes four bytes of three: the report stays below 3 MB whatever the pictures are.
_MOST_BYTES = 1_600_000

Place = tuple[int, int]


@dataclass(frozen=True)
class Picture:
    """What the pool holds of a row.

    Attributes
    ----------
    caption : str or None
    thumbnail : bytes or None
        A JPEG, at most 96 pixels high and wide.
    problem : str
        Why there is no thumbnail; empty if the row was not read.
    """

    caption: str | None = None
    thumbnail: bytes | None = None
    problem: str = ""


def pool_record(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a manifest says of the pool: path, mapping, image_root and fingerprint."""
    return {"fingerprint": manifest.get("inputs", {}).get("pool"), **manifest.get("pool", {})}


def collect_pictures(
    manifest: Mapping[str, Any],
    uids: Mapping[Place, str],
    part_rows: Mapping[int, int],
    pool: Pool | None,
) -> tuple[dict[Place, Picture], str | None]:
    """Read captions and thumbnails.

    Parameters
    ----------
    manifest : mapping
        The run's manifest, which says where the pool lies.
    uids : mapping of (shard, row) to str
        The rows, and the uids that prove that they are those of the run.
    part_rows : mapping of int to int
        Rows of each part of the ledger.
    pool : Pool or None
        The pool, if it is open already.

    Returns
    -------
    (dict of (shard, row) to Picture, str or None)
        A picture for every row, and why there are none if the pool cannot be read.
    """
    nothing = dict.fromkeys(uids, Picture())
    if not uids:
        return nothing, None
    try:
        opened = _open(manifest) if pool is None else pool
        if {shard.index: shard.rows for shard in opened.shards} != dict(part_rows):
            raise PoolError("it has other rows than the run saw")
        return _read(opened, uids), None
    except (CurateError, OSError, ValueError, LookupError, TypeError, pa.ArrowException) as error:
        # The report of a finished run must not fail because its pool has moved since.
        first = (str(error) or type(error).__name__).splitlines()[0]
        return nothing, f"No pictures and captions: the pool could not be read ({first})."


def _open(manifest: Mapping[str, Any]) -> Pool:
    """Open the pool that the run read, with the columns that it used.

    Raises
    ------
    PoolError
        If it is not there, or holds something else now.
    """
    from curate.pool import Pool

    recorded = pool_record(manifest)
    names = {f"{role}_col": name or "" for role, name in recorded["mapping"].items()}
    # Naming an embedding column is not the same as finding it: the pool may bring embeddings in
    # files of its own. Which of the two it was is not recorded, hence both are tried.
    for embedding in (None, names.get("embedding_col")):
        columns = {**names, "embedding_col": embedding}
        pool = Pool.open(recorded["path"], image_root=recorded.get("image_root"), **columns)
        if recorded.get("fingerprint") in (None, pool.fingerprint()):
            return pool
    raise PoolError("its files are not those that the run read")


def _read(pool: Pool, uids: Mapping[Place, str]) -> dict[Place, Picture]:
    wanted = defaultdict(list)
    for index, row in sorted(uids):
        wanted[index].append(row)
    pictures: dict[Place, Picture] = {}
    left = _MOST_BYTES
    for index, rows in wanted.items():
        for row, values in zip(rows, _rows(pool, index, rows), strict=True):
            uid = values.get(pool.mapping.uid)
            if uid is not None and str(uid) != uids[index, row]:
                raise PoolError(f"row {row:,} of shard {index} is not that of the run")
            picture = _picture(
                _image_bytes(values.get(pool.mapping.image)), values.get(pool.mapping.text), left
            )
            left -= len(picture.thumbnail or b"")
            pictures[index, row] = picture
    return pictures


def _rows(pool: Pool, index: int, rows: list[int]) -> Iterator[dict[str | None, Any]]:
    """Yield some rows of a shard by their original columns, with the images' bytes."""
    shard = pool.shards[index]
    mask = np.zeros(shard.rows, dtype=np.bool_)
    mask[rows] = True
    mapping = pool.mapping
    names = {name for name in (mapping.uid, mapping.image, mapping.text) if name is not None}
    # The export, not `samples`: where images are files, it opens only those of the chosen rows.
    for batch in pool.export_batches(shard, mask, 65_536 if mapping.image is None else 256):
        yield from batch.select(sorted(names)).to_pylist()


def _image_bytes(value: Any) -> bytes | None:
    found = value.get("bytes") if isinstance(value, dict) else value
    return found if isinstance(found, bytes) else None


def _picture(data: bytes | None, caption: Any, most_bytes: int) -> Picture:
    from curate.images import decode, to_thumbnail

    text = caption if isinstance(caption, str) else None
    if not data:
        return Picture(text, problem="no image in the pool")
    decoded = decode(data)
    if decoded.image is None:
        return Picture(text, problem="not decodable")
    thumbnail = to_thumbnail(decoded.image, SIZE)
    if len(thumbnail) > most_bytes:
        return Picture(text, problem="left out: the report would be too large")
    return Picture(text, thumbnail)
