"""The uid of a row: given by a column, or derived from what the row holds."""

from __future__ import annotations

import hashlib

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from curate.bundled import list_values
from curate.columns import ColumnMapping
from curate.errors import PoolError
from curate.rows import clean_strings, image_parts

_DIGEST_BYTES = 16


def derive_uid(*parts: bytes | None) -> str:
    """Return 128 bits of BLAKE2b over the parts, as hex.

    Every part goes in with its length, so that ``("ab", "c")`` and ``("a", "bc")`` differ, and
    None differs from empty.

    Examples
    --------
    >>> derive_uid(b"ab", b"c") == derive_uid(b"a", b"bc")
    False
    """
    state = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    for part in parts:
        state.update((-1 if part is None else len(part)).to_bytes(8, "little", signed=True))
        state.update(part or b"")
    return state.hexdigest()


def _binary(batch: pa.RecordBatch, name: str | None) -> pa.BinaryArray:
    if name is None:
        return pa.nulls(batch.num_rows, pa.binary())
    return clean_strings(batch.column(name)).cast(pa.binary())


def derive_uids(batch: pa.RecordBatch, mapping: ColumnMapping) -> pa.StringArray:
    """Return the uids that follow from what rows hold; equal for rows that hold the same.

    Parameters
    ----------
    batch : pyarrow.RecordBatch
        With the columns of the image, the URL and the text, as far as the mapping names them;
        where it names none of them, with the embedding.
    mapping : ColumnMapping
        The roles.

    Returns
    -------
    pyarrow.StringArray
        The digest of the image's bytes, else its path, else the URL, else the embedding; and of
        the text. One letter tells which of these it was.
    """
    rows = batch.num_rows
    sources: list[tuple[bytes, pa.Array]] = []
    if mapping.image is not None:
        image = image_parts(batch.column(mapping.image))
        sources = [(b"b", image.data), (b"p", image.paths.cast(pa.binary()))]
    sources.append((b"u", _binary(batch, mapping.url)))
    texts = _binary(batch, mapping.text)
    if mapping.embedding is not None and mapping.embedding in batch.schema.names:
        there, values = list_values(batch.column(mapping.embedding), mapping.embedding)
        raw: list[bytes | None] = [None] * rows
        for row, value in zip(np.flatnonzero(there).tolist(), values, strict=True):
            raw[row] = value.astype("<f4").tobytes()
        sources.append((b"e", pa.array(raw, pa.binary())))
    derived = []
    for row in range(rows):
        found = next(
            ((kind, a[row].as_py()) for kind, a in sources if a[row].is_valid), (b"", None)
        )
        derived.append(derive_uid(*found, texts[row].as_py()))
    return pa.array(derived, pa.string())


def given_uids(column: pa.Array, *, name: str, first_row: int) -> pa.StringArray:
    """Return a uid column as strings.

    Raises
    ------
    PoolError
        If a uid is null; the message names the row of the pool.
    """
    if column.null_count:
        row = first_row + int(np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))[0])
        raise PoolError(
            f"uid column {name!r} is null in row {row}; every row needs a uid: fill the column, "
            "name another with --uid-col, or derive uids with --uid-col ''"
        )
    return clean_strings(column)


def _positions(codes: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the rows whose value occurred before, and how many times it did."""
    order = np.argsort(codes, kind="stable")
    ordered = codes[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    lengths = np.diff(np.r_[starts, codes.size])
    occurrence = np.arange(codes.size) - np.repeat(starts, lengths)
    again = occurrence > 0
    rows = order[again]
    back = np.argsort(rows, kind="stable")
    return rows[back], occurrence[again][back]


def unique_uids(uids: pa.ChunkedArray | pa.Array, *, derived: bool) -> pa.LargeStringArray:
    """Return the uids of a whole pool, each of them once.

    Parameters
    ----------
    uids : pyarrow.ChunkedArray or Array of strings
        All rows in pool order.
    derived : bool
        Whether they come from the rows' contents. Rows with the same contents then have the
        same uid, and get ``-1``, ``-2``, ... from the second on, in pool order.

    Returns
    -------
    pyarrow.LargeStringArray

    Raises
    ------
    PoolError
        If given uids repeat; the message names some with their rows.

    Examples
    --------
    >>> unique_uids(pa.array(["a", "b", "a", "a"]), derived=True).to_pylist()
    ['a', 'b', 'a-1', 'a-2']
    """
    whole = uids.cast(pa.large_string())
    if isinstance(whole, pa.ChunkedArray):
        whole = whole.combine_chunks()
        if isinstance(whole, pa.ChunkedArray):
            whole = pa.concat_arrays(whole.chunks) if whole.num_chunks else pa.array([], whole.type)
    suspects = _same_hash(whole)
    codes = whole.take(pa.array(suspects)).dictionary_encode().indices.to_numpy().astype(np.int64)
    places, occurrence = _positions(codes)
    if len(places) == 0:
        return whole
    if not derived:
        raise _repeated(whole, codes, places, suspects)
    return _numbered(whole, suspects[places], occurrence)


def narrow(part: pa.LargeStringArray) -> pa.StringArray:
    """Return a part of a pool's uids as they are stored, wherever in the pool it lies.

    A cast alone fails behind the first 2 GiB, as it takes the offsets of a slice as they are.

    Examples
    --------
    >>> narrow(pa.array(["a", "b"], pa.large_string()).slice(1)).type
    DataType(string)
    """
    return pa.concat_arrays([part]).cast(pa.string())


def _same_hash(uids: pa.LargeStringArray) -> NDArray[np.int64]:
    """Return the rows whose hash is another row's too: four times as fast as comparing them."""
    import polars as pl

    hashes = pl.Series(pl.from_arrow(uids)).hash().to_numpy()
    order = np.argsort(hashes)
    equal = np.diff(hashes[order]) == 0
    again = np.zeros(len(order), dtype=bool)
    again[1:] |= equal
    again[:-1] |= equal
    return np.sort(order[again])


def _repeated(
    uids: pa.Array, codes: NDArray[np.int64], places: NDArray[np.int64], rows: NDArray[np.int64]
) -> PoolError:
    """Return the error; codes and the places of repeats are of some rows of the uids."""
    examples = []
    _, first_repeats = np.unique(codes[places], return_index=True)
    for place in places[np.sort(first_repeats)][:3]:
        row, first = rows[place], rows[np.flatnonzero(codes == codes[place])[0]]
        examples.append(f"{uids[int(row)].as_py()!r} (rows {first} and {row})")
    return PoolError(
        f"{places.size} rows repeat the uid of an earlier row: {', '.join(examples)}. Uids must be "
        "unique: name another column with --uid-col, derive them with --uid-col '', or drop the "
        "repeated rows (with --overwrite for the same --out)"
    )


def _numbered(
    uids: pa.Array, rows: NDArray[np.int64], occurrence: NDArray[np.int64]
) -> pa.LargeStringArray:
    """Append a number to the uids that occurred before, avoiding uids that exist."""
    stems = uids.take(pa.array(rows)).to_pylist()
    proposed = [f"{stem}-{n}" for stem, n in zip(stems, occurrence, strict=True)]
    existing = set(pc.filter(uids, pc.is_in(uids, pa.array(proposed, uids.type))).to_pylist())
    used = set(existing)
    if existing:
        # Somebody's uid already looks like ours: count on from there.
        for position, (stem, n) in enumerate(zip(stems, occurrence, strict=True)):
            number = int(n)
            while f"{stem}-{number}" in used:
                number += 1
            proposed[position] = f"{stem}-{number}"
            used.add(proposed[position])
    mask = np.zeros(len(uids), dtype=bool)
    mask[rows] = True
    return pc.replace_with_mask(uids, pa.array(mask), pa.array(proposed, uids.type))
