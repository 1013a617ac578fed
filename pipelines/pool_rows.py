"""What the driver holds of a pool: its uids and their order, and how columns of it are stored."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from curate.pool import Pool
from curate.runtime import row_keys
from curate.shards import missing_parts, read_parts, write_part
from curate.uids import narrow
from pipelines.indexing import uid_ranks


@dataclass
class PoolRows:
    """What the driver holds of a pool: a few numbers per row, never an image or a caption.

    Attributes
    ----------
    pool : Pool
    uids : pyarrow.LargeStringArray
        Two thousand million bytes of them, the most of a string array, are 67 million rows.
    ranks : (n,) uint64
        Place of the uid among all uids: what breaks ties.
    """

    pool: Pool
    uids: pa.LargeStringArray
    ranks: NDArray[np.uint64] = field(init=False)

    def __post_init__(self) -> None:
        """Rank the uids."""
        self.ranks = uid_ranks(self.uids)

    def __len__(self) -> int:
        return len(self.ranks)

    def random_keys(self, seed: int, purpose: str) -> NDArray[np.uint64]:
        """Return one random number per row that only the uid and the seed decide."""
        return row_keys((uid.as_py() for uid in self.uids), seed, purpose)

    def shard_uids(self, index: int) -> pa.StringArray:
        """Return the uids of a shard's rows."""
        shard = self.pool.shards[index]
        return narrow(self.uids.slice(shard.first_row, shard.rows))

    def write(self, folder: Path, columns: dict[str, pa.Array | NDArray[Any]]) -> None:
        """Write columns of the whole pool as parts, those that are missing."""
        for index in missing_parts(folder, len(self.pool.shards)):
            shard = self.pool.shards[index]
            span = slice(shard.first_row, shard.first_row + shard.rows)
            cut = {name: column[span] for name, column in columns.items()}
            for name, column in cut.items():
                if isinstance(column, pa.LargeStringArray):  # which only a whole pool needs
                    cut[name] = narrow(column)
            write_part(folder, index, pa.table({"uid": self.shard_uids(index), **cut}))

    def read(self, folder: Path, columns: Sequence[str]) -> pa.Table:
        """Read columns of all parts."""
        return read_parts(folder, len(self.pool.shards), columns)

    @property
    def parts(self) -> int:
        """Number of shards."""
        return len(self.pool.shards)


def floats(column: pa.ChunkedArray) -> NDArray[np.float32]:
    """Return a column as float32, null as NaN."""
    values: NDArray[np.float32] = column.cast(pa.float32()).to_numpy().astype(np.float32)
    return values


def nullable(values: NDArray[Any], there: NDArray[np.bool_], kind: pa.DataType) -> pa.Array:
    """Return an array with null where a row has no value."""
    return pa.array(values, kind, mask=~there)


def row_set_fingerprint(rows: NDArray[np.bool_]) -> str:
    """Return the hash of a set of rows, which is an input of the steps that run on it."""
    return hashlib.sha256(np.packbits(rows).tobytes()).hexdigest()
