"""Where k-means starts: k-means++ and a few iterations on a sample, in any order of the rows."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from curate.codes import exact_int_product, squares_type
from curate.lloyd import Lloyd
from curate.runtime import rng
from curate.threads import one_thread
from curate.unit_rows import ROW_GRID, Rows, mixed_keys, unit_centroids

_SEED_ROWS, _SAMPLE_ROWS = 10, 64  # per cluster
_LEAST_ROWS = 4096
_SAMPLE_ITERATIONS = 10
# More clusters than this are drawn several at a time.
_ROUNDS = 1024
_LEVELS = 127


def start(rows: Rows, k: int, seed: int, identity: NDArray[np.uint64]) -> NDArray[np.float32]:
    """Return starting centroids: those of k-means on a sample, where there are many more rows.

    The sample holds 64 k rows, at least 4096: those of the smallest hashes.
    """
    order = _by_hash(rows.n, max(_LEAST_ROWS, _SAMPLE_ROWS * k), seed, identity)
    centroids = plus_plus(rows, order[: max(_LEAST_ROWS, _SEED_ROWS * k)], k, seed)
    if rows.n < 2 * len(order):
        return centroids
    sample = Rows(_Some(rows, order), rows.device, rows.block_bytes)
    lloyd = Lloyd(sample, centroids)
    lloyd.run(_SAMPLE_ITERATIONS, identity[order])
    return lloyd.centroids


class _Some:
    """Some rows of a source, without a copy."""

    def __init__(self, rows: Rows, index: NDArray[np.int64]) -> None:
        self.rows, self.index = rows, index
        self.shape = (len(index), rows.d)

    def __getitem__(self, rows: slice | NDArray[np.int64]) -> torch.Tensor:
        return self.rows.raw(self.index[rows])


def plus_plus(rows: Rows, sample: NDArray[np.int64], k: int, seed: int) -> NDArray[np.float32]:
    """Return k-means++ starting centroids, drawn from these rows.

    A row is drawn with a probability in proportion to its squared distance to the nearest centroid
    so far. Of 2 + log k draws the one that leaves the smallest sum of distances is taken: the
    greedy variant that Arthur and Vassilvitskii (2007) recommend. Above 1024 clusters a round takes
    several draws, as in Bahmani et al. (2012), and is not greedy.

    The distances are those of the rows rounded to 8 bits. Sums of integers are exact, so that every
    device and row order gives the same centroids.
    """
    with one_thread(rows.device):  # a round is too short for several
        return _plus_plus(rows, sample, k, rng(seed, "kmeans"))


def _plus_plus(
    rows: Rows, sample: NDArray[np.int64], k: int, generator: np.random.Generator
) -> NDArray[np.float32]:
    codes = _integers(rows, sample)
    squares = (codes.int() ** 2).sum(dim=1, dtype=squares_type(rows.d))
    weight = torch.ones_like(squares)  # the first draw is uniform
    chosen: list[int] = []
    first = True
    while len(chosen) < k:
        heap = weight.cumsum(0)
        total = int(heap[-1])
        if total == 0:
            break
        greedy = first or k <= _ROUNDS
        tries = 2 + int(np.log(k)) if greedy else min(-(-k // _ROUNDS), k - len(chosen))
        coins = torch.from_numpy((generator.random(tries) * total).astype(np.int64))
        drawn = torch.searchsorted(heap, coins.to(heap.device), right=True)
        drawn = drawn.clamp(max=len(heap) - 1)
        product = exact_int_product(codes[drawn], codes)
        left = squares[drawn][:, None] + squares - 2 * product
        if greedy:
            left = left if first else torch.minimum(left, weight)
            best = int(left.sum(dim=1).argmin())
            weight = left[best]
            chosen.append(int(drawn[best]))
        else:
            weight = torch.minimum(left.amin(dim=0), weight)
            chosen += np.unique(drawn.cpu().numpy()).tolist()
        first = False
    # Fewer distinct rows than clusters: copies lose every tie, stay empty, and are filled later.
    chosen += chosen[:1] * (k - len(chosen))
    return unit_centroids(rows.read(sample[chosen[:k]]).cpu().numpy())


def _integers(rows: Rows, sample: NDArray[np.int64]) -> torch.Tensor:
    """Return rows less their mean as int8, the same in any order: sums on the grid are exact."""
    parts = np.array_split(sample, -(-len(sample) // rows.block_rows(0)))
    total = torch.zeros(rows.d, dtype=torch.float64, device=rows.device)
    low = torch.full((rows.d,), torch.inf, device=rows.device)
    high = -low
    for part in parts:
        block = rows.read(part, check=True)
        total += block.double().sum(dim=0)
        low, high = torch.minimum(low, block.amin(dim=0)), torch.maximum(high, block.amax(dim=0))
    centre = (torch.round(total / len(sample) * ROW_GRID) / ROW_GRID).float()
    reach = max(float((high - centre).max()), float((centre - low).max()), 1e-6)
    codes = torch.empty((len(sample), rows.d), dtype=torch.int8, device=rows.device)
    at = 0
    for part in parts:
        steps = (rows.read(part) - centre) * (_LEVELS / reach)
        codes[at : at + len(part)] = steps.round_().clamp_(-_LEVELS, _LEVELS).to(torch.int8)
        at += len(part)
    return codes


def _by_hash(n: int, size: int, seed: int, identity: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Return the rows with the smallest hashes, in that order: the same rows in any row order."""
    hashes = mixed_keys(identity, seed, "kmeans sample")
    rows = np.arange(n) if size >= n else np.argpartition(hashes, size)[:size]
    return np.asarray(rows[np.lexsort((rows, hashes[rows]))], dtype=np.int64)
