"""The most similar row within one cluster, found by fast products and settled by exact ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from curate.unit_rows import (
    Rows,
    exact_cosine,
    exact_row_cosine,
    fast_product,
    on_grid,
    tolerance,
    top_two,
)

Ranks = NDArray[np.int64]
# Given ranks of queries and of columns: where the pair must not be looked at; None for nowhere.
Forbidden = Callable[[Ranks, Ranks], NDArray[np.bool_] | None]
# Share of close pairs above which one float64 product beats many single ones: many rows that are
# copies of one, such as the picture that a host serves in place of a deleted one.
_DENSE = 0.01
# A tile of columns, their rows, and the fast products with the queries.
Products = tuple[Ranks, torch.Tensor, torch.Tensor]
# Ranks (-1 for none) and cosine similarities.
Evidence = tuple[NDArray[np.int64], NDArray[np.float32]]


@dataclass(frozen=True)
class RankedRows:
    """One cluster's rows, addressed by rank."""

    rows: Rows
    members: NDArray[np.int64]

    @cached_property
    def _held(self) -> torch.Tensor | None:
        """All rows of a cluster that fits one block: most do, and are then read only once."""
        if len(self.members) > self.rows.block_rows(0):
            return None
        return self.rows.read(self.members, check=True)

    @property
    def size(self) -> int:
        """The number of rows."""
        return len(self.members)

    @property
    def query_rows(self) -> int:
        """The rows of a tile that is just large enough for fast products."""
        return 512 if self.rows.device.type == "cpu" else 4096

    def tiles(self, ranks: Ranks, most: int = 1 << 62) -> Iterator[Ranks]:
        """Cut ranks so that a tile's rows and a square of products fit the block."""
        step = min(self._tile_rows(), most)
        for start in range(0, len(ranks), step):
            yield ranks[start : start + step]

    def _tile_rows(self) -> int:
        return max(1, min(self.rows.block_rows(0), int((self.rows.block_bytes / 16) ** 0.5)))

    def read(self, ranks: Ranks) -> torch.Tensor:
        """Return the float32 rows of these ranks, checked."""
        if self._held is None:
            return self.rows.read(self.members[ranks], check=True)
        if (np.diff(ranks) == 1).all():  # a tile: no copy
            return self._held[int(ranks[0]) : int(ranks[-1]) + 1]
        return self._held[torch.from_numpy(ranks).to(self._held.device)]

    def best(self, queries: Ranks, columns: Ranks, forbidden: Forbidden) -> Evidence:
        """Return the most similar allowed column of each query, the first among equals.

        `columns` ascend. Returns ranks (-1 for none) and similarities on the 2^-23 grid.
        """
        ranks = np.full(len(queries), -1, dtype=np.int64)
        similarity = np.full(len(queries), np.nan, dtype=np.float32)
        start = 0
        for tile in self.tiles(queries):
            stop = start + len(tile)
            ranks[start:stop], similarity[start:stop] = self._best(tile, columns, forbidden)
            start = stop
        return ranks, similarity

    def _best(self, queries: Ranks, columns: Ranks, forbidden: Forbidden) -> Evidence:
        q = self.read(queries)
        products: Iterable[Products] = self._products(queries, q, columns, forbidden)
        in_one_tile = len(columns) <= self._tile_rows()
        if in_one_tile:  # most clusters: then the products are made once
            products = list(products)
        found, top, uncertain = self._fast_best(q, products)
        if len(uncertain):
            which = torch.from_numpy(uncertain).to(q.device)
            close = q[which]
            if in_one_tile:
                products = [(tile, c, product[which]) for tile, c, product in products]
            else:
                products = self._products(queries[uncertain], close, columns, forbidden)
            floor = top[which] - tolerance(q.shape[1])
            found[uncertain] = self._settle(close, floor, products)
        similarity = np.full(len(queries), np.nan, dtype=np.float32)
        some = np.flatnonzero(found >= 0)
        if len(some):
            mine = q[torch.from_numpy(some).to(q.device)].double()
            theirs = self.read(found[some]).double()
            similarity[some] = on_grid(exact_row_cosine(mine, theirs), -1.0).cpu().numpy()
        return found, similarity

    def _fast_best(
        self, q: torch.Tensor, products: Iterable[Products]
    ) -> tuple[Ranks, torch.Tensor, Ranks]:
        """Return the best column by fast products, its value, and the queries that are not sure."""
        top = torch.full((len(q),), -torch.inf, device=q.device)
        second = top.clone()
        at = torch.full((len(q),), -1, dtype=torch.int64, device=q.device)
        for tile, _, product in products:
            value, index, next_value = top_two(product)
            better = value > top
            at = torch.where(better, torch.from_numpy(tile).to(q.device)[index], at)
            second = torch.maximum(torch.minimum(top, value), torch.maximum(second, next_value))
            top = torch.maximum(top, value)
        uncertain = (top > -torch.inf) & (top - second < tolerance(q.shape[1]))
        return at.cpu().numpy(), top, np.flatnonzero(uncertain.cpu().numpy())

    def _products(
        self, queries: Ranks, q: torch.Tensor, columns: Ranks, forbidden: Forbidden
    ) -> Iterator[Products]:
        """Yield tiles of columns, their rows, and the fast products; -inf where forbidden."""
        for tile in self.tiles(columns):
            hidden = forbidden(queries, tile)
            if hidden is not None and hidden.all():
                continue
            c = self.read(tile)
            product = fast_product(q, c / torch.linalg.vector_norm(c, dim=1, keepdim=True))
            if hidden is not None:
                product.masked_fill_(torch.from_numpy(hidden).to(q.device), -torch.inf)
            yield tile, c, product

    def _settle(self, q: torch.Tensor, floor: torch.Tensor, products: Iterable[Products]) -> Ranks:
        """Return the best column by exact products, of those whose fast product reaches `floor`."""
        top = np.full(len(q), -np.inf)
        at = np.full(len(q), -1, dtype=np.int64)
        for tile, c, product in products:
            close = product >= floor[:, None]
            if int(close.sum()) > _DENSE * close.numel():
                product.copy_(on_grid(exact_cosine(q.double(), c.double()), -1.0))
                product.masked_fill_(~close, -torch.inf)
                best = product.max(dim=1)  # the first of several
                _replace(top, at, np.arange(len(q)), best.values, tile[best.indices.cpu().numpy()])
            else:
                for row, value, column in self._exact_pairs(q, c, torch.nonzero(close)):
                    _replace(top, at, row, value, tile[column])
        return at

    def _exact_pairs(
        self, q: torch.Tensor, c: torch.Tensor, pairs: torch.Tensor
    ) -> Iterator[tuple[Ranks, torch.Tensor, Ranks]]:
        """Yield rows of q with the best of their columns in c, in blocks of pairs."""
        most = max(1, self.rows.block_bytes // (32 * q.shape[1]))
        for start in range(0, len(pairs), most):
            block = pairs[start : start + most]
            a, b = q[block[:, 0]].double(), c[block[:, 1]].double()
            values = on_grid(exact_row_cosine(a, b), -1.0)
            row, column = block.cpu().numpy().T
            # The pairs ascend by column within a row: of equal values the first one stays.
            order = np.lexsort((column, -values.cpu().numpy(), row))
            order = order[np.flatnonzero(np.diff(row[order], prepend=-1))]
            yield row[order], values[torch.from_numpy(order).to(values.device)], column[order]


def _replace(
    top: NDArray[np.float64], at: Ranks, row: Ranks, value: torch.Tensor, column: Ranks
) -> None:
    """Take the columns that are better than what the rows have; they come in ascending order."""
    found = value.cpu().numpy()
    better = found > top[row]
    top[row[better]], at[row[better]] = found[better], column[better]


def later(queries: Ranks, columns: Ranks) -> NDArray[np.bool_] | None:
    """Forbid a row to be compared to itself and to those ranked after it."""
    if columns[-1] < queries[0]:
        return None
    return np.asarray(columns[None, :] >= queries[:, None])
