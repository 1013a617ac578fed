"""Connected components for every threshold at once: a maximum spanning tree, merged top down."""

from __future__ import annotations

from functools import partial

import numpy as np
from numpy.typing import NDArray

from curate.nearest import Evidence, RankedRows, Ranks

# Edges in the one order that all agree on: similarity, the lower rank, the higher rank.
Edges = tuple[NDArray[np.float32], Ranks, Ranks]


def components(ranked: RankedRows) -> Evidence:
    """Return, for each rank, the first rank of the set it merges into, and the similarity then.

    A component of the graph of pairs more similar than t is one of the maximum spanning tree's
    edges above t. Merged from the most similar edge down, the set whose first row is ranked
    later loses it: below that edge's similarity, that row no longer is the first of its set.
    """
    similarity, low, high = _spanning_tree(ranked)
    first = np.full(ranked.size, -1, dtype=np.int64)
    evidence = np.full(ranked.size, np.nan, dtype=np.float32)
    sets = _Sets(ranked.size)
    for edge in np.lexsort((high, low, -similarity)):
        winner, loser = sets.merge(int(low[edge]), int(high[edge]))
        first[loser], evidence[loser] = winner, similarity[edge]
    return first, evidence


class _Sets:
    """Disjoint sets of ranks, each named by its smallest."""

    def __init__(self, size: int) -> None:
        self.parent = list(range(size))

    def find(self, rank: int) -> int:
        parent = self.parent
        while parent[rank] != rank:
            parent[rank] = parent[parent[rank]]
            rank = parent[rank]
        return rank

    def merge(self, a: int, b: int) -> tuple[int, int]:
        """Unite two sets; return the smaller name, which stays, and the other."""
        winner, loser = sorted((self.find(a), self.find(b)))
        self.parent[loser] = winner
        return winner, loser

    def names(self) -> Ranks:
        """Return the name of each rank's set."""
        names = np.array(self.parent)
        while (names[names] != names).any():
            names = names[names]
        return names


def _spanning_tree(ranked: RankedRows) -> Edges:
    """Return the maximum spanning tree: Boruvka's rounds, without a matrix of all pairs.

    In each round every set takes its best edge to another one. A row's best neighbour outside
    is looked for again only if it has come inside and the similarity it had, a bound on what is
    left, could still beat the best of the set's other rows.
    """
    size = ranked.size
    every = np.arange(size)
    name = every.copy()
    sets = _Sets(size)
    neighbour = np.full(size, -1, dtype=np.int64)
    similarity = np.full(size, np.inf, dtype=np.float32)
    taken: list[Edges] = []
    while name.any():  # until all are in the set of rank 0
        stale = (neighbour < 0) | (name[neighbour] == name)
        known = np.full(size, -np.inf, dtype=np.float32)
        np.maximum.at(known, name[~stale], similarity[~stale])
        wanted = every[stale & (similarity >= known[name])]
        neighbour[wanted], similarity[wanted] = ranked.best(wanted, every, partial(_same_set, name))
        stale[wanted] = False
        taken.append(_best_edges(name, neighbour, similarity, every[~stale], sets))
        name = sets.names()
    similar, low, high = (np.concatenate(column) for column in zip(*taken, strict=True))
    return similar, low, high


def _same_set(name: Ranks, queries: Ranks, columns: Ranks) -> NDArray[np.bool_] | bool:
    same = np.asarray(name[queries][:, None] == name[columns][None, :])
    return True if same.all() else same


def _best_edges(
    name: Ranks,
    neighbour: Ranks,
    similarity: NDArray[np.float32],
    candidates: Ranks,
    sets: _Sets,
) -> Edges:
    """Merge every set along its best edge; return the edges."""
    low = np.minimum(candidates, neighbour[candidates])
    high = np.maximum(candidates, neighbour[candidates])
    order = np.lexsort((high, low, -similarity[candidates], name[candidates]))
    _, first = np.unique(name[candidates][order], return_index=True)
    chosen = order[first]
    new = [i for i in chosen if _unite(sets, int(low[i]), int(high[i]))]
    return similarity[candidates[new]], low[new], high[new]


def _unite(sets: _Sets, a: int, b: int) -> bool:
    if sets.find(a) == sets.find(b):
        return False  # the other set chose the same edge
    sets.merge(a, b)
    return True
