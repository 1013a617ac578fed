"""Lloyd's iterations over all rows: exact, in threads, and only on rows that may change."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise, zip_longest

import numpy as np
import torch
from numpy.typing import NDArray

from curate.codes import (
    CodedColumns,
    Codes,
    Columns,
    Frame,
    Queries,
    encoded,
    product_type,
)
from curate.search import Exact, Numbers, nearest
from curate.threads import in_threads, on_stream
from curate.unit_rows import Rows, lengths64, on_grid, row_dots, unit_centroids

Progress = Callable[[int, int], None]
Checkpoint = Callable[[int, NDArray[np.float32]], None]

_PART_ROWS = 8192  # of what a thread does at once
_FRAME_ROWS = 1024
CODE_BYTES = 1 << 30  # of a CPU: up to so many the codes are kept, else made again for each look
_LONGEST_ROW = 1.02
_ROUNDING = 1e-6  # of bounds in float32


class _Share:
    """The rows that one device works on, all of them where there is one.

    Parameters
    ----------
    rows : Rows
        All rows, read to this device.
    span : slice
        Which of them are its own.
    k : int
        The number of centroids.
    once : bool
        As for `Lloyd`.

    Attributes
    ----------
    sums : (k, d) float64
        The exact sums of its rows in each cluster.
    """

    def __init__(self, rows: Rows, span: slice, k: int, *, once: bool) -> None:
        self.rows, self.span = rows, span
        self.sums = torch.zeros((k, rows.d), dtype=torch.float64, device=rows.device)
        self._lock = threading.Lock()
        self._frame = _frame(rows)
        self._codes: Codes | None = None
        n = span.stop - span.start
        if not once and self._frame is not None and n * rows.d <= code_bytes(rows.device):
            self._codes = Codes(
                torch.empty((n, rows.d), dtype=torch.int8, device=rows.device),
                torch.empty(n, device=rows.device),
                torch.empty(n, device=rows.device),
            )

    def aim(self, centroids: NDArray[np.float32]) -> None:
        """Take the centroids to look for."""
        c = self._centroids = torch.from_numpy(centroids).to(self.rows.device)
        if self._frame is None:
            self._columns = Columns(len(c), lambda start, stop: c[start:stop])
        else:
            self._columns = encoded(c, self._frame)

    def look(
        self, part: slice | Numbers, before: NDArray[np.int32], *, add: bool, check: bool
    ) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Return the nearest centroid of some rows, and by how much it is nearer than others."""
        rows, c = self.rows, self._centroids
        exact = Exact(partial(self._read, part), partial(_taken, c), rows.query_rows, rounded=False)
        tile = rows.query_rows, rows.tile_columns
        found = nearest(self._columns, self._queries(part, check=check), exact, tile)
        after = found.column.astype(np.int32)
        changed = np.flatnonzero(after != before)
        if add and len(changed):
            came = torch.from_numpy(after[changed]).to(rows.device).long()
            left = torch.from_numpy(before[changed]).to(rows.device).long()
            self._add_up(rows.read(_within(part, changed)), came, left)
        return after, found.gap

    def _read(self, here: slice | Numbers, chosen: Numbers) -> torch.Tensor:
        return self.rows.read(_within(here, chosen))

    def _queries(self, part: slice | Numbers, *, check: bool) -> Queries:
        """Return some rows as queries: by the codes that are kept, or by the rows themselves."""
        columns, kept = self._columns, self._codes
        if not isinstance(columns, CodedColumns):
            return columns.queries(torch.cat(list(self._blocks(part, check=check))))
        at = self._place(part)
        if kept is not None and not check:
            return columns.coded_queries(kept[at])
        blocks = self._blocks(part, check=check)
        codes = Codes.joined([columns.frame.encode(block) for block in blocks])
        if kept is not None:
            kept.values[at], kept.length[at], kept.cut[at] = codes.values, codes.length, codes.cut
        return columns.coded_queries(codes)

    def _place(self, part: slice | Numbers) -> slice | torch.Tensor:
        """Return where its own rows of these numbers lie among them."""
        first = self.span.start
        if isinstance(part, slice):
            return slice(part.start - first, part.stop - first)
        return torch.from_numpy(part - first).to(self.rows.device)

    def _blocks(self, part: slice | Numbers, *, check: bool) -> Iterator[torch.Tensor]:
        """Yield float32 rows in blocks that stay in a core's cache."""
        rows, stored = self.rows, self.rows.raw(part)
        for start in range(0, len(stored), rows.query_rows):
            cut = slice(start, min(start + rows.query_rows, len(stored)))
            yield rows.widen(stored[cut], _within(part, cut) if check else None)

    def _add_up(self, changed: torch.Tensor, after: torch.Tensor, before: torch.Tensor) -> None:
        """Add rows to the sums of their clusters, and take them out of those before.

        The sums are exact: taking a row out leaves what they would be without it.
        """
        had = torch.nonzero(before >= 0)[:, 0]
        target = torch.cat((after, before[had]))
        sign = torch.ones(len(target), dtype=torch.float64, device=changed.device)
        sign[len(after) :] = -1.0
        position = torch.cat((torch.arange(len(changed), device=changed.device), had))
        target, order = target.sort()
        touched, counts = torch.unique_consecutive(target, return_counts=True)
        # Sums of runs of rows: 20 times as fast as index_add_ on a CPU, and exact like it.
        sums = torch.nn.functional.embedding_bag(
            position[order],
            changed.double(),
            counts.cumsum(0) - counts,
            mode="sum",
            per_sample_weights=sign[order],
        )
        with self._lock:
            self.sums[touched] += sums
            if self.rows.device.type == "cuda":  # other threads add on streams of their own
                torch.cuda.current_stream(self.rows.device).synchronize()

    def distance(self, part: slice, cluster: NDArray[np.int32]) -> NDArray[np.float32]:
        """Return the exact cosine distance of some rows to the centroids of these numbers."""
        rows, c = self.rows, self._centroids.double()
        lengths = lengths64(c)
        distance = np.empty(len(cluster), dtype=np.float32)
        stored = rows.raw(part)
        for first in range(0, len(stored), rows.query_rows):
            wide = rows.widen(stored[first : first + rows.query_rows], None).double()
            at = slice(first, first + len(wide))
            own = torch.from_numpy(cluster[at]).to(rows.device).long()
            similarity = row_dots(wide, c.index_select(0, own)) / (lengths64(wide) * lengths[own])
            distance[at] = on_grid(1.0 - similarity, 0.0).cpu().numpy()
        return distance


class Lloyd:
    """Rows, the cluster of each, and by how much its centroid is nearer than the others.

    Parameters
    ----------
    rows : Rows
        Shared evenly between their devices.
    centroids : (k, d) float32
        Unit, on the 2^-24 grid.
    once : bool
        Whether rows are looked at only once: then nothing is kept for later.

    Attributes
    ----------
    cluster : (n,) int32
        Exact, of the centroids last looked at.
    """

    def __init__(self, rows: Rows, centroids: NDArray[np.float32], *, once: bool = False) -> None:
        self.rows, self.centroids = rows, centroids
        self.cluster = np.full(rows.n, -1, dtype=np.int32)
        # By how much, at least, a row is more similar to its centroid than to any other one; below
        # zero for rows that must be looked at.
        self._lead = np.full(rows.n, -1.0, dtype=np.float32)
        self._checked = False
        bounds = np.linspace(0, rows.n, len(rows.devices) + 1).astype(int).tolist()
        self._shares = [
            _Share(rows.on(device), slice(start, stop), len(centroids), once=once)
            for device, (start, stop) in zip(rows.devices, pairwise(bounds), strict=True)
        ]

    def look(self, *, add: bool = True) -> None:
        """Put each row into its nearest cluster; `add` it to the sum of the cluster's rows.

        Rows whose lead is above what the centroids moved since are not looked at (Hamerly, 2010).
        """
        first = not self._checked
        wanted = np.flatnonzero(self._lead < 0)
        if len(wanted) == 0:
            return
        whole = len(wanted) == self.rows.n

        def work(share: _Share, start: int, stop: int) -> None:
            part = slice(start, stop) if whole else wanted[start:stop]
            self.cluster[part], self._lead[part] = share.look(
                part, self.cluster[part], add=add, check=first
            )

        self._each(work, wanted)
        self._checked = True

    def distance(self) -> NDArray[np.float32]:
        """Return the exact cosine distance of each row to its own centroid."""
        distance = np.empty(self.rows.n, dtype=np.float32)

        def work(share: _Share, start: int, stop: int) -> None:
            part = slice(start, stop)
            distance[part] = share.distance(part, self.cluster[part])

        self._each(work, np.arange(self.rows.n))
        return distance

    def _each(self, work: Callable[[_Share, int, int], None], wanted: Numbers) -> None:
        """Work on parts of the wanted rows, which ascend, each within one share."""
        step = self._part_rows(len(wanted))
        parts = []
        for share in self._shares:
            share.aim(self.centroids)
            low, high = np.searchsorted(wanted, (share.span.start, share.span.stop)).tolist()
            parts.append([(share, at, min(at + step, high)) for at in range(low, high, step)])
        # In turn, so that every device has work.
        order = [part for turn in zip_longest(*parts) for part in turn if part is not None]

        def on_device(part: tuple[_Share, int, int]) -> None:
            with on_stream(part[0].rows.device):
                work(*part)

        with in_threads(*self.rows.devices) as each:
            each(on_device, order)

    def _part_rows(self, n: int) -> int:
        """Return the rows of a part: several parts per thread, of whole tiles."""
        most = self.rows.block_rows(0)
        if self.rows.device.type != "cpu":  # there are few threads, and each part is waited for
            return most
        even = n // (4 * torch.get_num_threads()) // 512 * 512
        return min(max(512, even), _PART_ROWS, most)

    def _sums(self) -> NDArray[np.float64]:
        """Return the sums of all devices' rows, which are exact in any order."""
        sums: NDArray[np.float64] = np.zeros(self.centroids.shape)
        for share in self._shares:
            sums += share.sums.cpu().numpy()
        return sums

    def means(self) -> NDArray[np.float32]:
        """Return the directions of the clusters' sums; the centroid where rows cancel or lack."""
        sums = self._sums()
        lost = np.sqrt((sums * sums).sum(axis=1)) < 1e-6
        return unit_centroids(np.where(lost[:, None], self.centroids, sums))

    def _gain(self) -> float:
        """Return the part of the mean distance that moving the centroids takes off."""
        sums = self._sums()
        after = float(np.sqrt((sums * sums).sum(axis=1)).sum())
        before = float((sums * self.centroids).sum())
        return (after - before) / max(self.rows.n - after, 1e-12)

    def move(self, centroids: NDArray[np.float32]) -> None:
        """Put the centroids elsewhere; the leads shrink by no more than what they moved."""
        step = centroids.astype(np.float64) - self.centroids
        moved = np.sqrt((step * step).sum(axis=1)) * _LONGEST_ROW
        moved[moved > 0] += _ROUNDING
        self.centroids = centroids
        if self.cluster.min(initial=0) < 0:  # nobody has looked yet
            return
        farthest = int(moved.argmax())
        others = np.full(len(moved), moved[farthest])
        others[farthest] = np.delete(moved, farthest).max(initial=0.0)
        loss = (moved + others).astype(np.float32)[self.cluster]
        # A near tie, of lead 0, must be looked at again unless nothing moved at all.
        self._lead = np.where((self._lead <= loss) & (loss > 0), np.float32(-1), self._lead - loss)

    def run(
        self,
        iterations: int,
        identity: NDArray[np.uint64],
        progress: Progress | None = None,
        checkpoint: Checkpoint | None = None,
        tolerance: float = 0.0,
    ) -> int:
        """Look and move until little is gained, or so often; return the moves."""
        k = len(self.centroids)
        for done in range(iterations):
            self.look()
            means = self.means()
            if np.bincount(self.cluster, minlength=k).min() == 0:
                self._fill(means, self.distance(), identity)
            elif tolerance > 0 and self._gain() < tolerance:
                return done
            # The sums are exact: centroids that stay are those whose rows stay. Only the centroids
            # decide what comes next, so that a fit can go on from them alone.
            if np.array_equal(means, self.centroids):
                return done
            self.move(means)
            if progress is not None:
                progress(done + 1, iterations)
            if checkpoint is not None:
                checkpoint(done + 1, means)
        return iterations

    def settle(self, identity: NDArray[np.uint64]) -> NDArray[np.float32]:
        """Return the distances; no cluster is empty then while distinct rows are left."""
        self.look(add=False)
        distance = self.distance()
        for _ in range(10):  # a filled cluster can, rarely, take the last rows of another
            centroids = self.centroids.copy()
            if self._fill(centroids, distance, identity) == 0:
                break
            self.move(centroids)
            self.look(add=False)
            distance = self.distance()
        return distance

    def _fill(
        self,
        centroids: NDArray[np.float32],
        distance: NDArray[np.float32],
        identity: NDArray[np.uint64],
    ) -> int:
        """Put empty clusters' centroids, in place, on the farthest rows; return how many were."""
        cluster = self.cluster
        counts = np.bincount(cluster, minlength=len(centroids))
        empty = np.flatnonzero(counts == 0)
        if len(empty) == 0:
            return 0
        # A row at distance 0 equals its centroid: making it one would make the same cluster twice.
        rows_left = np.flatnonzero((distance > 0) & (counts[cluster] > 1))
        order = rows_left[np.lexsort((identity[rows_left], -distance[rows_left]))]
        seen: set[bytes] = set()
        step = 4 * len(empty)
        for start in range(0, len(order), step):
            window = order[start : start + step]
            vectors = self.rows.read(window).cpu().numpy() + np.float32(0)  # -0 and 0 are the same
            for row, vector in zip(window, vectors, strict=True):
                fresh = vector.tobytes() not in seen
                if fresh and counts[cluster[row]] > 1:
                    seen.add(vector.tobytes())
                    counts[cluster[row]] -= 1
                    centroids[empty[len(seen) - 1]] = unit_centroids(vector[None])[0]
                if len(seen) == len(empty):
                    return len(seen)
        return len(seen)


def code_bytes(device: torch.device) -> int:
    """Return how many bytes of codes are kept on a device at most."""
    if device.type != "cuda":
        return CODE_BYTES
    free, _ = torch.cuda.mem_get_info(device)
    return max(CODE_BYTES, free // 2)


def _frame(rows: Rows) -> Frame | None:
    """Return a frame for the codes of rows; none where 8-bit products are not fast."""
    if product_type(rows.device.type) != "int8" or rows.n == 0:
        return None
    count = min(_FRAME_ROWS, rows.block_rows(0))
    some = np.unique(np.linspace(0, rows.n - 1, count).astype(np.int64))
    sample = rows.read(some)
    # Rows that are not unit are an error, which is raised where all rows are read.
    good = sample[(torch.linalg.vector_norm(sample, dim=1) - 1).abs() < 0.1]
    return Frame.of(good) if len(good) else None


def _within(part: slice | Numbers, chosen: slice | Numbers) -> slice | Numbers:
    """Return the numbers of chosen ones of the rows of a part."""
    if isinstance(part, slice):
        if isinstance(chosen, slice):
            return slice(part.start + chosen.start, part.start + chosen.stop)
        return np.asarray(part.start + chosen)
    return np.asarray(part[chosen])


def _taken(vectors: torch.Tensor, numbers: Numbers) -> torch.Tensor:
    return vectors.index_select(0, torch.from_numpy(numbers).to(vectors.device))
