"""The most similar row within one cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from curate.codes import CodedColumns, Codes, Columns, Frame, product_type
from curate.runtime import rng
from curate.search import Exact, nearest
from curate.unit_rows import Rows

Ranks = NDArray[np.int64]
# Given ranks of queries and of columns: which pairs must not be looked at, all or none.
Forbidden = Callable[[Ranks, Ranks], NDArray[np.bool_] | bool]
# Ranks (-1 for none) and cosine similarities.
Evidence = tuple[NDArray[np.int64], NDArray[np.float32]]
# Calls a function on each item, maybe several at a time.
Each = Callable[[Callable[[Any], Any], Iterable[Any]], None]

_FRAME_ROWS = 512
_PART_TILES = 8  # of queries that are worked on at once


class RankedRows:
    """One cluster's rows, addressed by rank.

    Parameters
    ----------
    rows : Rows
    members : (m,) int64
        The cluster's rows in the order of their ranks.
    each : callable
        How blocks of queries are worked on.
    """

    def __init__(self, rows: Rows, members: NDArray[np.int64], each: Each) -> None:
        self.rows, self.members, self.each = rows, members, each

    @property
    def size(self) -> int:
        """The number of rows."""
        return len(self.members)

    @cached_property
    def _held(self) -> torch.Tensor | None:
        """All rows of a cluster that fits one block: most do, and are then read only once."""
        if self.size > self.rows.held_rows:
            return None
        return self.rows.read(self.members, check=True)

    @cached_property
    def _coded(self) -> CodedColumns | None:
        """The codes of all rows, where 8-bit products are fast."""
        if product_type(self.rows.device.type) != "int8":
            return None
        some = np.unique(np.linspace(0, self.size - 1, min(_FRAME_ROWS, self._tile)).astype(int))
        frame = Frame.of(_unit(self.read(some)))
        d, device = self.rows.d, self.rows.device
        values = torch.empty((self.size, d), dtype=torch.int8, device=device)
        length, cut = torch.empty(self.size, device=device), torch.empty(self.size, device=device)
        along = torch.empty(self.size, dtype=torch.float64, device=device)
        for start in range(0, self.size, self._tile):
            at = slice(start, min(start + self._tile, self.size))
            block = _unit(self.read(np.arange(at.start, at.stop)))
            codes = frame.encode(block)
            values[at], length[at], cut[at] = codes.values, codes.length, codes.cut
            along[at] = (block @ frame.centre).double()
        coded = CodedColumns(Codes(values, length, cut), along, frame, frame)
        self._row_numbers = coded.row_numbers(coded.codes, along)
        return coded

    @property
    def _tile(self) -> int:
        return self.rows.query_rows

    def tiles(self, ranks: Ranks) -> Iterator[Ranks]:
        """Cut ranks into tiles that suit fast products."""
        for start in range(0, len(ranks), self._tile):
            yield ranks[start : start + self._tile]

    def read(self, ranks: Ranks) -> torch.Tensor:
        """Return the float32 rows of these ranks, checked."""
        if self._held is None:
            return self.rows.read(self.members[ranks], check=True)
        if (np.diff(ranks) == 1).all():  # a tile: no copy
            return self._held[int(ranks[0]) : int(ranks[-1]) + 1]
        return self._held.index_select(0, torch.from_numpy(ranks).to(self._held.device))

    def firsts(self) -> Ranks:
        """Return for each rank the first rank of a row that is equal to its row."""
        codes = np.empty(self.size, dtype=np.uint64)
        for start in range(0, self.size, self._tile):
            tile = np.arange(start, min(start + self._tile, self.size))
            codes[tile] = _hashes(self.read(tile))
        _, first, group = np.unique(codes, return_index=True, return_inverse=True)
        first = first[group]
        copies = np.flatnonzero(first != np.arange(self.size))
        for start in range(0, len(copies), self._tile):
            some = copies[start : start + self._tile]
            equal = (self.read(some) == self.read(first[some])).all(dim=1).cpu().numpy()
            first[some[~equal]] = some[~equal]
        return first

    def best(
        self, queries: Ranks, columns: Ranks, forbidden: Forbidden, least: float = -1.0
    ) -> Evidence:
        """Return the most similar allowed column of each query, the first among equals.

        `columns` ascend. Returns ranks (-1 where none is as similar as `least`) and similarities on
        the 2^-23 grid.
        """
        found = np.full(len(queries), -1, dtype=np.int64)
        similarity = np.full(len(queries), np.nan, dtype=np.float32)
        if len(columns) == 0:
            return found, similarity
        known = self._columns(columns)
        step = min(_PART_TILES * self._tile, self.rows.block_rows(0))

        def work(start: int) -> None:
            at = slice(start, start + step)
            found[at], similarity[at] = self._best(queries[at], columns, known, forbidden, least)

        self.each(work, range(0, len(queries), step))
        return found, similarity

    def _columns(self, columns: Ranks) -> Columns:
        if self._coded is None:
            return Columns(len(columns), lambda start, stop: _unit(self.read(columns[start:stop])))
        first, last = int(columns[0]), int(columns[-1])
        if last - first + 1 == len(columns):
            return self._coded[slice(first, last + 1)]
        return self._coded[torch.from_numpy(columns).to(self.rows.device)]

    def _best(
        self, queries: Ranks, columns: Ranks, known: Columns, forbidden: Forbidden, least: float
    ) -> tuple[Ranks, NDArray[np.float32]]:
        if self._coded is None:
            asked = known.queries(self.read(queries))
        else:
            every = torch.from_numpy(queries).to(self.rows.device)
            asked = self._coded.coded_queries(self._coded.codes[every])
            if least > -1:
                floor = self._coded.floor(asked, self._row_numbers[every], least)
                asked = replace(asked, floor=floor)
        exact = Exact(
            partial(self._taken, queries),
            partial(self._taken, columns),
            self.rows.query_rows,
            self._lengths_of(columns),
            rounded=True,
        )
        # Half tiles along the diagonal: less is computed above it.
        tile = max(1, self._tile // 2) if forbidden is later else self._tile

        def hidden(some: slice, part: slice) -> NDArray[np.bool_] | bool:
            return forbidden(queries[some], columns[part])

        found = nearest(known, asked, exact, (tile, self.rows.tile_columns), hidden)
        best, similarity = found.column, found.similarity
        left = np.flatnonzero((best >= 0) & np.isnan(similarity))
        similarity[left] = exact.pairs(left, best[left])
        there = similarity >= least  # not where it is NaN
        found_similarity = np.where(there, similarity, np.nan).astype(np.float32)
        return np.where(there, columns[best], -1), found_similarity

    def _lengths_of(self, columns: Ranks) -> Callable[[NDArray[np.int64]], torch.Tensor]:
        return lambda chosen: torch.linalg.vector_norm(self.read(columns[chosen]), dim=1)

    def _taken(self, ranks: Ranks, chosen: NDArray[np.int64]) -> torch.Tensor:
        return self.read(ranks[chosen])


def _unit(rows: torch.Tensor) -> torch.Tensor:
    unit: torch.Tensor = rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return unit


def _hashes(rows: torch.Tensor) -> NDArray[np.uint64]:
    """Return one number per row, the same for equal rows, another for nearly all others."""
    words = rows.cpu().numpy().view(np.uint32).astype(np.uint64)
    factors = rng(0, "equal rows").integers(0, 2**64, words.shape[1], dtype=np.uint64)
    return np.asarray(np.einsum("ij,j->i", words, factors))


def later(queries: Ranks, columns: Ranks) -> NDArray[np.bool_] | bool:
    """Forbid a row to be compared to itself and to those ranked after it."""
    if columns[-1] < queries[0]:
        return False
    if columns[0] >= queries[-1]:
        return True
    q, c = len(queries), len(columns)
    if queries[-1] - queries[0] == q - 1 and columns[-1] - columns[0] == c - 1:
        # Both ascend without gaps: every row of the mask is the row before, moved by one.
        line = np.arange(columns[0] - queries[-1], columns[-1] - queries[0] + 1) >= 0
        return np.lib.stride_tricks.sliding_window_view(line, c)[::-1]
    return np.asarray(columns[None, :] >= queries[:, None])
