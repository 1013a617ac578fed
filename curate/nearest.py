"""The most similar row within one cluster, found by fast products and settled by exact ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
        step = min(self.rows.block_rows(0), int((self.rows.block_bytes / 16) ** 0.5), most)
        for start in range(0, len(ranks), max(1, step)):
            yield ranks[start : start + max(1, step)]

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
        found, uncertain = self._fast_best(queries, q, columns, forbidden)
        if uncertain.any():
            wide = q[torch.from_numpy(uncertain).to(q.device)].double()
            found[uncertain] = self._exact_best(queries[uncertain], wide, columns, forbidden)
        similarity = np.full(len(queries), np.nan, dtype=np.float32)
        some = np.flatnonzero(found >= 0)
        if len(some):
            mine = q[torch.from_numpy(some).to(q.device)].double()
            theirs = self.read(found[some]).double()
            similarity[some] = on_grid(exact_row_cosine(mine, theirs), -1.0).cpu().numpy()
        return found, similarity

    def _fast_best(
        self, queries: Ranks, q: torch.Tensor, columns: Ranks, forbidden: Forbidden
    ) -> tuple[Ranks, NDArray[np.bool_]]:
        top = torch.full((len(q),), -torch.inf, device=q.device)
        second = top.clone()
        at = torch.full((len(q),), -1, dtype=torch.int64, device=q.device)
        for tile in self.tiles(columns):
            hidden = forbidden(queries, tile)
            if hidden is not None and hidden.all():
                continue
            c = self.read(tile)
            product = fast_product(q, c / torch.linalg.vector_norm(c, dim=1, keepdim=True))
            if hidden is not None:
                product.masked_fill_(torch.from_numpy(hidden).to(q.device), -torch.inf)
            value, index, next_value = top_two(product)
            better = value > top
            at = torch.where(better, torch.from_numpy(tile).to(q.device)[index], at)
            second = torch.maximum(torch.minimum(top, value), torch.maximum(second, next_value))
            top = torch.maximum(top, value)
        uncertain = (top > -torch.inf) & (top - second < tolerance(q.shape[1]))
        return at.cpu().numpy(), uncertain.cpu().numpy()

    def _exact_best(
        self, queries: Ranks, q: torch.Tensor, columns: Ranks, forbidden: Forbidden
    ) -> Ranks:
        top = torch.full((len(q),), -torch.inf, dtype=torch.float64, device=q.device)
        at = torch.full((len(q),), -1, dtype=torch.int64, device=q.device)
        for tile in self.tiles(columns):
            hidden = forbidden(queries, tile)
            if hidden is not None and hidden.all():
                continue
            product = on_grid(exact_cosine(q, self.read(tile).double()), -1.0)
            if hidden is not None:
                product.masked_fill_(torch.from_numpy(hidden).to(q.device), -torch.inf)
            # argmax returns the first of several maxima, and only a larger one replaces it.
            index = product.argmax(dim=1)
            value = product.gather(1, index[:, None])[:, 0]
            better = value > top
            top = torch.where(better, value, top)
            at = torch.where(better, torch.from_numpy(tile).to(q.device)[index], at)
        return np.asarray(at.cpu().numpy(), dtype=np.int64)


def later(queries: Ranks, columns: Ranks) -> NDArray[np.bool_] | None:
    """Forbid a row to be compared to itself and to those ranked after it."""
    if columns[-1] < queries[0]:
        return None
    return np.asarray(columns[None, :] >= queries[:, None])
