"""The rows of many .npy files as one array, in bounded memory and without open files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from curate.errors import ShardError

# Files of more bytes than this in all, or more of them, are not mapped: each page that was read
# counts as this process's memory, and each map holds a file open.
MOST_MAPPED, _MOST_FILES = 1 << 30, 128
_DENSE = 4  # of so many rows one is wanted: reading those between costs less than a call for each


class StoredRows:
    """The (n, d) rows of a .npy file, read when they are asked for.

    Parameters
    ----------
    path : Path

    Raises
    ------
    OSError, ValueError, EOFError
        If the file is missing or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        # NumPy reads the header, and checks that the file is as long as that says.
        self._mapped: NDArray[Any] | None = np.load(path, mmap_mode="r", allow_pickle=False)
        self.shape, self.dtype, self.nbytes = (
            self._mapped.shape,
            self._mapped.dtype,
            self._mapped.nbytes,
        )
        self._offset = getattr(self._mapped, "offset", 0)
        if self._mapped.flags.c_contiguous and hasattr(os, "pread"):
            self._mapped = None

    def __len__(self) -> int:
        return int(self.shape[0])

    @property
    def ndim(self) -> int:
        """The number of axes that the file says."""
        return len(self.shape)

    def map(self) -> NDArray[Any]:
        """Return the rows as a memory map."""
        array: NDArray[Any] = np.load(self.path, mmap_mode="r", allow_pickle=False)
        return array

    def __getitem__(self, rows: slice | NDArray[np.int64]) -> NDArray[Any]:
        if self._mapped is not None:  # column by column, or no system to read it otherwise
            return np.asarray(self._mapped[rows])
        if isinstance(rows, slice):
            start, stop, step = rows.indices(len(self))
            if step != 1:
                return self[np.arange(start, stop, step)]
            return self._span(start, max(start, stop))
        if len(rows) == 0:
            return self._span(0, 0)
        low, high = int(rows.min()), int(rows.max()) + 1
        if high - low <= _DENSE * len(rows):
            return self._span(low, high)[rows - low]
        return self._each(rows)

    def _span(self, start: int, stop: int) -> NDArray[Any]:
        out = np.empty((stop - start, *self.shape[1:]), dtype=self.dtype)
        memory, done = out.reshape(-1).view(np.uint8).data, 0
        with self.path.open("rb", buffering=0) as file:
            file.seek(self._offset + start * self._width)
            while done < len(memory):
                count = file.readinto(memory[done:])
                if not count:
                    raise self._changed()
                done += count
        return out

    def _each(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        width = self._width
        offsets = (self._offset + rows * width).tolist()
        with self.path.open("rb", buffering=0) as file:
            number = file.fileno()
            if hasattr(os, "posix_fadvise"):  # do not read on behind each row
                os.posix_fadvise(number, 0, 0, os.POSIX_FADV_RANDOM)
            data = bytearray().join([os.pread(number, width, offset) for offset in offsets])
        if len(data) != len(rows) * width:
            raise self._changed()
        return np.frombuffer(data, self.dtype).reshape(len(rows), *self.shape[1:])

    @property
    def _width(self) -> int:
        return int(np.prod(self.shape[1:]) * self.dtype.itemsize)

    def _changed(self) -> ShardError:
        return ShardError(f"{self.path} is shorter than when it was opened; start again")


class RowRange:
    """A range of the rows of a source, of which slices are read when they are asked for."""

    def __init__(self, rows: ShardedRows, first: int, count: int) -> None:
        self._rows, self._first = rows, first
        self.shape = (count, rows.shape[1])

    def __getitem__(self, part: slice) -> NDArray[Any]:
        start, stop, _ = part.indices(self.shape[0])
        return self._rows[self._first + start : self._first + stop]


class ShardedRows:
    """The rows of several arrays or files, as if they were one array, without a copy.

    Parameters
    ----------
    parts : sequence of (n_i, d) arrays or StoredRows
    index : (n,) int64, optional
        Which rows to show, in ascending order; all of them by default.

    Examples
    --------
    >>> rows = ShardedRows([np.zeros((2, 3)), np.ones((2, 3))])
    >>> rows.shape, rows[1:3, ].tolist()
    ((4, 3), [[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    """

    def __init__(
        self,
        parts: Sequence[NDArray[Any] | StoredRows],
        index: NDArray[np.int64] | None = None,
    ) -> None:
        if not parts:
            raise ValueError("parts must hold at least one array")
        widths = {part.shape[1] for part in parts}
        if len(widths) != 1:
            raise ShardError(
                f"embeddings are of {min(widths)} numbers in one shard and of {max(widths)} in "
                "another; all embeddings of a pool need one length"
            )
        self._parts = list(parts)
        self._starts = np.cumsum([0] + [len(part) for part in parts])
        self._index = index
        self.dtype = parts[0].dtype

    @classmethod
    def of_files(cls, paths: Sequence[Path]) -> ShardedRows:
        """Return the rows of .npy files: a few of them mapped into memory, many read by need.

        Raises
        ------
        ShardError
            If a file is missing or damaged.
        """
        parts: list[NDArray[Any] | StoredRows] = []
        for path in paths:
            try:
                parts.append(StoredRows(path))
            except (OSError, ValueError, EOFError) as error:
                raise ShardError(
                    f"{path} is missing or damaged ({error}); remove it and run the same command "
                    "again"
                ) from error
        if len(parts) <= _MOST_FILES and sum(part.nbytes for part in parts) <= MOST_MAPPED:
            parts = [part.map() for part in parts if isinstance(part, StoredRows)]
        return cls(parts)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and dimensions."""
        rows = int(self._starts[-1]) if self._index is None else len(self._index)
        return rows, int(self._parts[0].shape[1])

    @property
    def ndim(self) -> int:
        """Two."""
        return 2

    def __len__(self) -> int:
        return self.shape[0]

    def subset(self, index: NDArray[np.int64]) -> ShardedRows:
        """Return the rows of these numbers (of all the rows), still without a copy."""
        if self._index is not None:
            index = self._index[index]
        return ShardedRows(self._parts, index)

    def __getitem__(
        self, item: slice | NDArray[np.int64] | tuple[slice | NDArray[np.int64]]
    ) -> NDArray[Any]:
        key = item[0] if isinstance(item, tuple) else item
        if isinstance(key, slice):
            start, stop, step = key.indices(len(self))
            if step != 1:
                return self._gather(np.arange(start, stop, step))
            if self._index is None:
                return self._slice(start, max(start, stop))
            return self._gather_absolute(self._index[start:stop])
        return self._gather(np.asarray(key))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.asarray(self[0 : len(self)], dtype=dtype)

    def __repr__(self) -> str:
        return f"ShardedRows({self.shape[0]:,} x {self.shape[1]}, {self.dtype})"

    def _slice(self, start: int, stop: int) -> NDArray[Any]:
        first = int(np.searchsorted(self._starts, start, side="right")) - 1
        blocks = []
        for part, offset in zip(self._parts[first:], self._starts[first:], strict=False):
            if offset >= stop:
                break
            blocks.append(part[max(0, start - offset) : stop - offset])
        if len(blocks) == 1:
            return blocks[0]
        return np.concatenate(blocks) if blocks else self._parts[0][:0]

    def _gather(self, index: NDArray[np.int64]) -> NDArray[Any]:
        return self._gather_absolute(index if self._index is None else self._index[index])

    def _gather_absolute(self, index: NDArray[np.int64]) -> NDArray[Any]:
        part_of = np.searchsorted(self._starts, index, side="right") - 1
        if len(part_of) == 0 or part_of.min() == part_of.max():  # most blocks lie in one part
            part = int(part_of[0]) if len(part_of) else 0
            return np.asarray(self._parts[part][index - self._starts[part]])
        out = np.empty((len(index), self.shape[1]), dtype=self.dtype)
        order = np.argsort(part_of, kind="stable")
        for here in np.split(order, np.flatnonzero(np.diff(part_of[order])) + 1):
            part = int(part_of[here[0]])
            out[here] = self._parts[part][index[here] - self._starts[part]]
        return out
