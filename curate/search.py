"""Which column is nearest to each row: fast products propose, exact ones settle near ties.

What the fast products are (`curate.codes`) changes no result.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from curate.codes import CodedColumns, Columns, Queries
from curate.unit_rows import exact_cosine, lengths64, on_grid, row_dots, tolerance

Numbers = NDArray[np.int64]
# Given ranges of queries and of columns: which pairs must not be looked at, all or none.
Hidden = Callable[[slice, slice], NDArray[np.bool_] | bool]

_NEVER = -(1 << 30)  # below all integer products, with room for a tolerance below it
# More columns of a tile than this within the tolerance of a row cost less as one exact product.
_DENSE = 16


@dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes
    ----------
    column : (m,) int64
        The best column of each row, -1 for none.
    similarity : (m,) float64
        Its exact cosine similarity where that was needed, else NaN.
    gap : (m,) float32
        By how much, at least, the similarity is above all others'; 0 where that is not known.
    """

    column: Numbers
    similarity: NDArray[np.float64]
    gap: NDArray[np.float32]


Read = Callable[[Numbers], torch.Tensor]


class Exact:
    """Exact cosine similarities of rows and columns.

    Parameters
    ----------
    rows, columns : callable
        Return float32 vectors, on the grid, of these numbers.
    most : int
        How many vectors to take at once.
    lengths : callable, optional
        Returns the float32 lengths of the columns of these numbers; default 1.
    rounded : bool
        Whether to round to the 2^-23 grid.
    """

    def __init__(
        self,
        rows: Read,
        columns: Read,
        most: int,
        lengths: Read | None = None,
        *,
        rounded: bool,
    ) -> None:
        self.rows, self.columns, self.most, self.lengths = rows, columns, most, lengths
        self.rounded = rounded

    def pairs(self, row: Numbers, column: Numbers) -> NDArray[np.float64]:
        """Return the similarity of each pair; rows ascend."""
        found = np.empty(len(row))
        for start in range(0, len(row), self.most):
            part = slice(start, start + self.most)
            a, at = _read_once(self.rows, row[part])
            a, b = a.double(), self.columns(column[part]).double()
            # As in exact_cosine, to the last bit.
            value = row_dots(a.index_select(0, at), b) / (lengths64(a)[at] * lengths64(b))
            found[part] = self._round(value).cpu().numpy()
        return found

    def near_best(self, row: Numbers, column: Numbers) -> NDArray[np.bool_]:
        """Return which pairs float32 products leave as the best of their row; rows ascend."""
        value = np.empty(len(row), dtype=np.float32)
        for start in range(0, len(row), self.most):
            part = slice(start, start + self.most)
            a, at = _read_once(self.rows, row[part])
            along = row_dots(a.index_select(0, at), self.columns(column[part]))
            if self.lengths is not None:
                along /= self.lengths(column[part])
            value[part] = along.cpu().numpy()
        new = np.flatnonzero(np.diff(row, prepend=-1))
        best = np.maximum.reduceat(value, new)
        runs = np.diff(new, append=len(row))
        return np.asarray(value >= np.repeat(best, runs) - tolerance(a.shape[1]))

    def dense(self, row: Numbers, columns: Numbers) -> torch.Tensor:
        """Return the similarities of some rows to some columns."""
        return self._round(exact_cosine(self.rows(row).double(), self.columns(columns).double()))

    def _round(self, value: torch.Tensor) -> torch.Tensor:
        return on_grid(value, -1.0) if self.rounded else value


def _read_once(read: Read, numbers: Numbers) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the vectors of the distinct numbers, which ascend, and where each number's is."""
    new = np.diff(numbers, prepend=-1) != 0
    vectors = read(numbers[new])
    return vectors, torch.from_numpy(np.cumsum(new) - 1).to(vectors.device)


def nearest(
    columns: Columns,
    queries: Queries,
    exact: Exact,
    tile: tuple[int, int],
    hidden: Hidden | None = None,
) -> Found:
    """Return the exact best column of each query, the first among equals.

    Parameters
    ----------
    columns : Columns
    queries : Queries
    exact : Exact
    tile : int, int
        How many queries and columns to multiply at once; results do not depend on it.
    hidden : callable, optional
    """
    coded = isinstance(columns, CodedColumns) and hidden is None and queries.floor is None
    if coded and queries.values.is_cuda and find_spec("triton") is not None:
        return _fused(columns, queries, exact, tile)
    return _tiled(columns, queries, exact, tile, hidden)


def _tiled(
    columns: Columns,
    queries: Queries,
    exact: Exact,
    tile: tuple[int, int],
    hidden: Hidden | None = None,
) -> Found:
    search = _Search(queries)
    for first in range(0, len(queries), tile[0]):
        rows = slice(first, min(first + tile[0], len(queries)))
        some = queries[rows]
        for start in range(0, len(columns), tile[1]):
            part = slice(start, min(start + tile[1], len(columns)))
            mask = False if hidden is None else hidden(rows, part)
            if mask is True:
                continue
            product = columns.products(some, part)
            if mask is not False:
                _hide(product, np.asarray(mask), search.never)
            slack = None if columns.slack is None else columns.slack[part]
            search.add(product, rows, start, slack, exact)
    return search.settle(exact, columns.unit)


def _fused(columns: Columns, queries: Queries, exact: Exact, tile: tuple[int, int]) -> Found:
    """Search by a kernel that returns the best two; only near ties need products in memory."""
    from curate.fused import best_two

    assert isinstance(columns, CodedColumns)
    best = best_two(queries.values, columns.codes.values, columns.bias)
    first, at, second = (part.cpu().numpy() for part in best)
    lead = first.astype(np.int64) - queries.slack - columns.slack[at] - second
    near = np.flatnonzero(lead <= 0)
    some = torch.from_numpy(near).to(queries.values.device)
    left = Queries(queries.values.index_select(0, some), queries.slack[near])
    among = Exact(
        lambda row: exact.rows(near[row]),
        exact.columns,
        exact.most,
        exact.lengths,
        rounded=exact.rounded,
    )
    settled = _tiled(columns, left, among, tile)
    column, known = at.astype(np.int64), np.full(len(at), np.nan)
    column[near], known[near] = settled.column, settled.similarity
    return Found(column, known, _gap(np.maximum(lead, 0), columns.unit))


def _gap(lead: NDArray[Any], unit: float) -> NDArray[np.float32]:
    """Return a lead in products as a difference of similarities: downwards, so it stays a bound."""
    return np.asarray(np.minimum(lead * unit, 4.0) * (1 - 2.0**-20), dtype=np.float32)


def _hide(product: torch.Tensor, mask: NDArray[np.bool_], never: float) -> None:
    if product.device.type == "cpu":  # three times as fast as masked_fill_
        np.copyto(product.numpy(), never, where=mask)
    else:
        product.masked_fill_(torch.from_numpy(mask.copy()).to(product.device), never)


def _not_below(product: torch.Tensor, floor: NDArray[Any]) -> tuple[Numbers, Numbers]:
    """Return the rows and columns of the products that are not below the row's floor."""
    if product.device.type == "cpu":  # several times as fast as torch.nonzero
        return np.divmod(np.flatnonzero(product.numpy() >= floor[:, None]), product.shape[1])
    above = torch.nonzero(product >= torch.from_numpy(floor).to(product.device)[:, None])
    row, column = above.cpu().numpy().T
    return row, column


class _Search:
    """The largest products so far, and the columns that may be the best."""

    def __init__(self, queries: Queries) -> None:
        self.slack = slack = queries.slack
        whole = slack.dtype == np.int32
        self.never = _NEVER if whole else -1e30
        self.top = np.full(len(slack), self.never, dtype=slack.dtype)
        self.second = self.top.copy()
        # What the best column's product is at least: below it, a column is not the best.
        self.floor = self.top + slack.dtype.type(1 if whole else 1e29)
        # Where most rows have no column above a floor, the others are not ranked.
        self.ranks = queries.floor is None
        if queries.floor is not None:
            self.floor = np.maximum(self.floor, queries.floor)
        self.at = np.full(len(slack), -1, dtype=np.int64)
        self.candidates: list[tuple[Numbers, Numbers, NDArray[Any]]] = []

    def add(
        self,
        product: torch.Tensor,
        rows: slice,
        start: int,
        slack: NDArray[Any] | None,
        exact: Exact,
    ) -> None:
        """Look at the products of some rows with the columns from `start` on."""
        if not self.ranks:
            self._collect(product, rows, start, slack, exact, self.floor[rows])
            return
        first, at, following = top_two(product, self.never)
        top, floor = self.top[rows], self.floor[rows]
        better = np.flatnonzero(first > top)
        self.at[rows.start + better] = at[better] + start
        second = np.maximum(np.minimum(top, first), np.maximum(self.second[rows], following))
        least = first - self.slack[rows] - (0 if slack is None else slack[at])
        self.second[rows], self.top[rows] = second, np.maximum(top, first)
        self.floor[rows] = floor = np.maximum(floor, least)
        several = following >= floor
        single = np.flatnonzero((first >= floor) & ~several)
        self.candidates.append((single + rows.start, at[single] + start, first[single]))
        if several.any():
            highest = np.iinfo(np.int32).max
            self._collect(product, rows, start, slack, exact, np.where(several, floor, highest))

    def _collect(
        self,
        product: torch.Tensor,
        rows: slice,
        start: int,
        slack: NDArray[Any] | None,
        exact: Exact,
        floor: NDArray[Any],
    ) -> None:
        """Take the columns of a tile that may be the best."""
        row, column = _not_below(product, floor)
        if len(row) == 0:
            return
        at = (torch.from_numpy(part).to(product.device) for part in (row, column))
        value = product[tuple(at)].cpu().numpy()
        new = np.flatnonzero(np.diff(row, prepend=-1))
        if not self.ranks:  # the tile's best of each row raise the floors
            least = value - (0 if slack is None else slack[column])
            here = row[new]
            found = np.maximum.reduceat(least, new) - self.slack[rows.start + here]
            floor[here] = np.maximum(floor[here], found)  # in place: they are `self.floor`'s
            left = value >= floor[row]
            row, column, value = row[left], column[left], value[left]
            new = np.flatnonzero(np.diff(row, prepend=-1))
        if len(row) > _DENSE * len(new):
            here = row[new]
            close = product[torch.from_numpy(here).to(product.device)]
            far = close < torch.from_numpy(floor[here]).to(close.device)[:, None]
            similar = exact.dense(here + rows.start, start + np.arange(product.shape[1]))
            best = similar.masked_fill_(far, -torch.inf).argmax(dim=1)  # the first of several
            row, column = here, best.cpu().numpy()
            at = (torch.from_numpy(part).to(product.device) for part in (row, column))
            value = product[tuple(at)].cpu().numpy()
        self.candidates.append((row + rows.start, column + start, value))

    def settle(self, exact: Exact, unit: float) -> Found:
        """Decide between the columns that are left."""
        certain = self.floor > self.second if self.ranks else np.zeros(len(self.top), dtype=bool)
        gap = np.zeros(len(self.top), dtype=np.float32)
        lead = self.floor[certain].astype(np.float64) - self.second[certain]
        gap[certain] = _gap(lead, unit)
        known = np.full(len(self.top), np.nan)
        if not certain.all() and self.candidates:
            parts = zip(*self.candidates, strict=True)
            row, column, value = (np.concatenate(part) for part in parts)
            left = ~certain[row] & (value >= self.floor[row])
            row, column = row[left], column[left]
            order = np.lexsort((column, row))
            row, column = row[order], column[order]
            if len(row):
                near = exact.near_best(row, column)
                row, column = row[near], column[near]
                self._decide(row, column, known, exact)
        return Found(self.at, known, gap)

    def _decide(
        self, row: Numbers, column: Numbers, known: NDArray[np.float64], exact: Exact
    ) -> None:
        """Take the best columns of rows of which each has one candidate or more."""
        new = np.flatnonzero(np.diff(row, prepend=-1))
        self.at[row[new]] = column[new]
        tied = np.repeat(np.diff(new, append=len(row)) > 1, np.diff(new, append=len(row)))
        row, column = row[tied], column[tied]
        if len(row) == 0:
            return
        similarity = exact.pairs(row, column)
        best = np.lexsort((column, -similarity, row))
        best = best[np.flatnonzero(np.diff(row[best], prepend=-1))]
        self.at[row[best]], known[row[best]] = column[best], similarity[best]


def top_two(product: torch.Tensor, never: float) -> tuple[NDArray[Any], Numbers, NDArray[Any]]:
    """Return each row's largest product, where it is, and the second, `never` if there is none."""
    if product.device.type == "cpu":
        # NumPy's argmax is vectorised: twice as fast as torch.topk, measured on 2 cores.
        array, every = product.numpy(), np.arange(len(product))
        at = array.argmax(axis=1)
        first = array[every, at]
        array[every, at] = never
        second = array.max(axis=1)
        array[every, at] = first
        return first, at, second
    values, index = product.topk(min(2, product.shape[1]), dim=1)
    host, places = values.cpu().numpy(), index[:, 0].cpu().numpy()
    last = host[:, 1] if host.shape[1] == 2 else np.full(len(host), never, host.dtype)
    return host[:, 0], places, last
