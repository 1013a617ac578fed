"""Semantic duplicates inside clusters: SemDeDup (Abbas, Tirumala, Simig, Ganguli, Morcos, 2023)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from curate.clusters import check_clusters, rows_of_clusters
from curate.nearest import Each, Evidence, RankedRows, later
from curate.spanning import components
from curate.threads import in_threads, on_stream, one_by_one
from curate.unit_rows import Rows, RowSource, exact_cosine, full_float32, on_grid, row_identity

# Puts the rows of a cluster in the order of their ranks.
Rank = Callable[[NDArray[np.int64]], NDArray[np.int64]]

MODES = ("max-earlier", "connected-components", "greedy")
# Epsilons above 0.2 are rare: they take images that people tell apart at once for the same.
LEAST_SIMILARITY = 0.8
_FEW = 256  # rows of a cluster


def find_duplicates(
    x: RowSource,
    cluster: NDArray[np.int32],
    cosine_distance: NDArray[np.float32],
    *,
    epsilon: float = 0.05,
    mode: str = "max-earlier",
    priority: NDArray[np.float64] | None = None,
    keys: NDArray[np.uint64] | None = None,
    least_similarity: float | None = None,
    device: str | torch.device = "auto",
    block_bytes: int | None = None,
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return which rows are near-copies of a row of their cluster that is ranked before them.

    The rows of a cluster are ranked by ``priority``, the highest first; by default the hardest,
    that is the farthest from the centroid, come first, as in the authors' code. A row is a
    duplicate if its evidence, a cosine similarity, is above 1 - ``epsilon`` (strictly).

    Parameters
    ----------
    x : (n, d) float16 or float32 (float64 is taken as float32)
        Unit rows: NumPy array or memory map, tensor on any device, or lazy shards. Rows whose
        cluster is -1 are not read.
    cluster : (n,) int32
        Cluster of each row; -1 leaves the row out.
    cosine_distance : (n,) float32
        Distance of each row to its centroid.
    epsilon : float
        Tolerated difference, 0 to 2; larger removes more.
    mode : {"max-earlier", "connected-components", "greedy"}
        ``"max-earlier"`` (the authors' code) compares to all rows ranked before, also to those
        that are removed themselves. ``"connected-components"`` (the paper's text; also called
        ``"components"``) keeps one row, the first, of each set of rows that a chain of similar
        pairs links. ``"greedy"`` compares to kept rows only: no removed row is without a kept
        row that is similar to it, and no two kept rows are similar.
    priority : (n,) float64, optional
        Rows of higher priority stay; NaN comes last. ``-cosine_distance`` keeps the easiest.
    keys : (n,) uint64, optional
        What identifies each row, and orders rows of equal priority; default the row's number.
    least_similarity : float, optional
        As for `duplicate_evidence`; default 0.8, or 1 - ``epsilon`` if that is less.
    device : str or torch.device
        Where to compute.
    block_bytes : int, optional
        Memory of a block of rows and its products; results do not depend on it.

    Returns
    -------
    duplicate_of : (n,) int64
        The row that stands for this one, -1 if the row stays. ``"max-earlier"``: the most similar
        row ranked before. ``"connected-components"``: the row of its set that stays.
        ``"greedy"``: the most similar kept row ranked before.
    cosine_similarity : (n,) float32
        The evidence, on multiples of 2^-23: for ``"max-earlier"`` and ``"connected-components"``
        that of `duplicate_evidence`, from which other epsilons follow. ``"greedy"`` is not
        monotone in epsilon: its evidence, the largest similarity to a kept row ranked before,
        holds for this epsilon only. NaN where there is no row to compare to.

    Raises
    ------
    ValueError
        If an argument is out of range, shapes differ, or a row is not finite and unit.

    Examples
    --------
    >>> x = np.eye(2, dtype=np.float32)[[0, 0, 1]]
    >>> zero = np.zeros(3)
    >>> find_duplicates(x, zero.astype(np.int32), zero.astype(np.float32), device="cpu")[0]
    array([-1,  0, -1])
    """
    threshold = _threshold(epsilon)
    least = min(LEAST_SIMILARITY, threshold) if least_similarity is None else least_similarity
    if least > threshold:
        raise ValueError(
            f"least_similarity is {least}; rows are duplicates above 1 - epsilon = {threshold}, so "
            "it must not be above that"
        )
    if _mode(mode) != "greedy":
        nearest, evidence = duplicate_evidence(
            x,
            cluster,
            cosine_distance,
            mode=mode,
            priority=priority,
            keys=keys,
            least_similarity=least,
            device=device,
            block_bytes=block_bytes,
        )
        return threshold_duplicates(nearest, evidence, epsilon=epsilon, mode=mode), evidence
    rows = Rows(x, device, block_bytes)
    members, rank = _ranked(rows.n, cluster, cosine_distance, priority, keys)
    nearest, evidence = _per_cluster(rows, members, rank, lambda ranked: _greedy(ranked, threshold))
    return np.where(evidence > threshold, nearest, -1), evidence


def duplicate_evidence(
    x: RowSource,
    cluster: NDArray[np.int32],
    cosine_distance: NDArray[np.float32],
    *,
    mode: str = "max-earlier",
    priority: NDArray[np.float64] | None = None,
    keys: NDArray[np.uint64] | None = None,
    least_similarity: float = LEAST_SIMILARITY,
    device: str | torch.device = "auto",
    block_bytes: int | None = None,
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return what makes each row a duplicate, for many an epsilon at once.

    Parameters
    ----------
    x, cluster, cosine_distance, priority, keys, device, block_bytes
        As for `find_duplicates`.
    mode : {"max-earlier", "connected-components"}
        Whom a row is compared to. The components of every epsilon come from one maximum spanning
        tree per cluster (Boruvka, 1926), merged from its most similar edge down (Kruskal, 1956).
    least_similarity : float
        For ``"max-earlier"``, evidence below it is not looked for: what is found serves every
        epsilon up to 1 - ``least_similarity``. -1 finds the nearest row of all, which takes
        several times as long.

    Returns
    -------
    nearest_earlier : (n,) int64
        ``"max-earlier"``: the most similar row ranked before, the first one among equals.
        ``"connected-components"``: the first row of the set of rows into which the row's own set
        merges when the row stops being the first of its set. -1 if there is none so similar.
    cosine_similarity : (n,) float32
        The similarity to that row, or at which the sets merge: the row is a duplicate if it is
        above 1 - epsilon. On multiples of 2^-23; NaN if there is none.

    Raises
    ------
    ValueError
        If an argument is out of range, shapes differ, or a row is not finite and unit.

    Examples
    --------
    >>> x = np.eye(2, dtype=np.float32)[[0, 1, 0]]
    >>> zero = np.zeros(3)
    >>> duplicate_evidence(x, zero.astype(np.int32), zero.astype(np.float32), device="cpu")[1]
    array([nan, nan,  1.], dtype=float32)
    """
    methods: dict[str, Callable[[RankedRows], Evidence]] = {
        "max-earlier": partial(_max_earlier, least=least_similarity),
        "connected-components": components,
    }
    if _mode(mode) not in methods:
        raise ValueError(
            f"mode {mode!r} has no evidence that holds for every epsilon; use 'max-earlier' or "
            "'connected-components', or call find_duplicates for one epsilon"
        )
    rows = Rows(x, device, block_bytes)
    members, rank = _ranked(rows.n, cluster, cosine_distance, priority, keys)
    return _per_cluster(rows, members, rank, methods[_mode(mode)])


def threshold_duplicates(
    nearest_earlier: NDArray[np.int64],
    cosine_similarity: NDArray[np.float32],
    *,
    epsilon: float = 0.05,
    mode: str = "max-earlier",
) -> NDArray[np.int64]:
    """Return the duplicates at one epsilon from the evidence that holds for many.

    Parameters
    ----------
    nearest_earlier : (n,) int64
        From `duplicate_evidence`.
    cosine_similarity : (n,) float32
        From `duplicate_evidence`.
    epsilon : float
        Tolerated difference, 0 to 2.
    mode : {"max-earlier", "connected-components"}
        The mode of the evidence.

    Returns
    -------
    (n,) int64
        ``duplicate_of`` as of `find_duplicates`.

    Raises
    ------
    ValueError
        If ``epsilon`` or ``mode`` is out of range.

    Examples
    --------
    >>> nearest = np.array([-1, 0, 1])
    >>> evidence = np.array([np.nan, 0.9, 0.99], dtype=np.float32)
    >>> threshold_duplicates(nearest, evidence, epsilon=0.2)
    array([-1,  0,  1])
    >>> threshold_duplicates(nearest, evidence, epsilon=0.2, mode="connected-components")
    array([-1,  0,  0])
    """
    removed = cosine_similarity > _threshold(epsilon)
    if _mode(mode) == "max-earlier":
        return np.where(removed, nearest_earlier, -1)
    stays = np.where(removed, nearest_earlier, np.arange(len(removed)))
    while True:  # each round doubles how far along the chain of merges every row has looked
        further = stays[stays]
        if (further == stays).all():
            return np.where(removed, stays, -1)
        stays = further


def _threshold(epsilon: float) -> float:
    if not 0 <= epsilon <= 2:
        raise ValueError(
            f"epsilon is {epsilon}; it must lie in 0 ... 2, as 1 - epsilon is the cosine "
            "similarity above which two rows are duplicates; 0.05 is usual"
        )
    return 1.0 - float(epsilon)


def _mode(mode: str) -> str:
    name = "connected-components" if mode == "components" else mode
    if name not in MODES:
        raise ValueError(f"mode {mode!r} is not known; use one of {', '.join(MODES)}")
    return name


def _ranked(
    n: int,
    cluster: NDArray[np.int32],
    cosine_distance: NDArray[np.float32],
    priority: NDArray[np.float64] | None,
    keys: NDArray[np.uint64] | None,
) -> tuple[list[NDArray[np.int64]], Rank]:
    """Return the rows of each cluster of two rows or more, and what ranks them."""
    cluster, cosine_distance = np.asarray(cluster), np.asarray(cosine_distance)
    check_clusters(cluster, cosine_distance)
    score = np.asarray(cosine_distance if priority is None else priority, dtype=np.float64)
    for name, values in (("cluster", cluster), ("priority", score)):
        if values.shape != (n,):
            raise ValueError(
                f"{name} has shape {values.shape}; x has {n} rows, so it must be ({n},)"
            )
    identity = row_identity(keys, n)

    def rank(members: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the rows in their order, the one that stays first; NaN comes last."""
        order = np.lexsort((identity[members], -score[members]))
        return members[order]

    return [rows for rows in rows_of_clusters(cluster) if len(rows) > 1], rank


def _per_cluster(
    rows: Rows,
    clusters: list[NDArray[np.int64]],
    rank: Rank,
    method: Callable[[RankedRows], Evidence],
) -> Evidence:
    nearest = np.full(rows.n, -1, dtype=np.int64)
    evidence = np.full(rows.n, np.nan, dtype=np.float32)

    def work(number: int, each: Each) -> None:
        members = rank(clusters[number])
        device = rows.devices[number % len(rows.devices)]
        with on_stream(device):
            ranks, similarity = method(RankedRows(rows.on(device), members, each))
        nearest[members] = np.where(ranks >= 0, members[ranks], -1)
        evidence[members] = similarity

    most = 8 * rows.block_rows(0)  # above it, one cluster has blocks for many threads
    large = [number for number, members in enumerate(clusters) if len(members) > most]
    with full_float32(), in_threads(*rows.devices) as each:
        # Small clusters side by side; on a CPU, the blocks of a large one.
        small = np.setdiff1d(np.arange(len(clusters)), large).tolist()
        if rows.device.type != "cpu":
            small, large = [*large, *small], []
        each(partial(work, each=one_by_one), small)
        for number in large:
            work(number, each)
    return nearest, evidence


def _max_earlier(ranked: RankedRows, least: float) -> Evidence:
    if ranked.size <= min(_FEW, ranked.rows.block_rows(ranked.size)):
        return _of_few(ranked, least)
    first = ranked.firsts()
    distinct = np.flatnonzero(first == np.arange(ranked.size))
    nearest = np.full(ranked.size, -1, dtype=np.int64)
    similarity = np.full(ranked.size, np.nan, dtype=np.float32)
    nearest[distinct], similarity[distinct] = ranked.best(distinct, distinct, later, least)
    # A copy's nearest is the first of its kind, or what that one is as similar to: a picture that
    # hosts serve in place of a million deleted ones is compared once.
    copies = np.flatnonzero(first != np.arange(ranked.size))
    kind = first[copies]
    nearest[copies] = np.where(similarity[kind] == 1.0, nearest[kind], kind)
    similarity[copies] = 1.0
    return nearest, similarity


def _of_few(ranked: RankedRows, least: float) -> Evidence:
    """Compare all pairs exactly: of few rows that takes less than to propose some."""
    rows = ranked.read(np.arange(ranked.size)).double()
    similar = on_grid(exact_cosine(rows, rows), -1.0).cpu().numpy()
    similar = np.where(np.tri(len(rows), k=-1, dtype=bool), similar, -np.inf)
    nearest = similar.argmax(axis=1)  # the first among equals
    best = similar[np.arange(len(rows)), nearest]
    there = best >= least
    return np.where(there, nearest, -1), np.where(there, best, np.nan).astype(np.float32)


def _greedy(ranked: RankedRows, threshold: float) -> Evidence:
    nearest = np.full(ranked.size, -1, dtype=np.int64)
    evidence = np.full(ranked.size, np.nan, dtype=np.float32)
    kept = np.zeros(ranked.size, dtype=np.bool_)
    for tile in ranked.tiles(np.arange(ranked.size)):
        before = np.flatnonzero(kept[: tile[0]])
        nearest[tile], evidence[tile] = ranked.best(tile, before, later)
        wide = ranked.read(tile).double()
        inside = on_grid(exact_cosine(wide, wide), -1.0).cpu().numpy()
        stays = _keep_greedily(inside > threshold, evidence[tile] > threshold)
        kept[tile] = stays
        inside[:, ~stays] = -np.inf
        inside[np.triu_indices(len(tile))] = -np.inf
        first = inside.argmax(axis=1)
        similarity = inside[np.arange(len(tile)), first]
        # Among equals the one ranked first is the answer: that of the earlier tiles.
        better = similarity > np.where(nearest[tile] >= 0, evidence[tile], -np.inf)
        nearest[tile] = np.where(better, tile[first], nearest[tile])
        evidence[tile] = np.where(better, similarity, evidence[tile])
    return nearest, evidence


def _keep_greedily(similar: NDArray[np.bool_], removed: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return the rows that stay of one tile, given those that earlier tiles remove."""
    kept = ~removed
    for row in np.flatnonzero(kept & np.tril(similar, -1).any(axis=1)):
        kept[row] = not (similar[row, :row] & kept[:row]).any()
    return kept
