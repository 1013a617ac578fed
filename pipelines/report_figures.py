"""The figures of a report: what the parts of a run folder hold, counted part by part.

A ledger may have 10^8 rows, so nothing here holds more than one part of it: each figure is a pass
over the few columns it needs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from curate.errors import ShardError
from curate.shards import read_part

LEDGER = "selection"
DUPLICATES = "duplicates"
CLUSTERS = "clusters"

_BINS = 48
_SAMPLE = 200_000
_PART = re.compile(r"part-(\d+)\.parquet")

Values = tuple[NDArray[np.float64], NDArray[np.bool_]]
"""Values of one part (NaN where there is none) and whether each row belongs to the first series."""


@dataclass(frozen=True)
class Histogram:
    """Counts of two series over the same bins.

    Attributes
    ----------
    edges : (b + 1,) float64
    first, second : (b,) int64
        Kept and dropped rows, or rows that are no duplicates and rows that are.
    missing : int
        Rows without a value.
    beyond : int
        Rows outside the axis; they are counted in the bins at its ends.
    mark : float or None
        Where the cut was made.
    """

    edges: NDArray[np.float64]
    first: NDArray[np.int64]
    second: NDArray[np.int64]
    missing: int
    beyond: int
    mark: float | None


@dataclass(frozen=True)
class ClusterTable:
    """One row per cluster, in order of the cluster's number; arrays of shape (k,)."""

    cluster: NDArray[np.int64]
    size: NDArray[np.int64]
    kept: NDArray[np.int64]
    d_intra: NDArray[np.float64]
    d_inter: NDArray[np.float64]
    complexity: NDArray[np.float64]
    target: NDArray[np.float64]

    @property
    def share(self) -> NDArray[np.float64]:
        """Kept share of each cluster; NaN for a cluster without rows."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(self.size > 0, self.kept / self.size, np.nan)


@dataclass(frozen=True)
class Figures:
    """What the charts of a report show; None where the run has no such numbers."""

    clip_score: Histogram | None
    cosine_distance: Histogram | None
    similarity: Histogram | None
    clusters: ClusterTable | None


def part_numbers(folder: Path) -> list[int]:
    """Return the numbers of the parts in a folder, in order; none if there is no folder."""
    found = (_PART.fullmatch(path.name) for path in folder.glob("part-*.parquet"))
    return sorted(int(match[1]) for match in found if match)


def reason_codes(table: pa.Table) -> tuple[NDArray[np.int64], list[str]]:
    """Return the reason of each row of a part of the ledger as a code, and what the codes mean.

    Raises
    ------
    ShardError
        If a row has no reason.
    """
    column = table.column("reason")
    if column.null_count:
        raise ShardError(f"{column.null_count:,} row(s) of the ledger have no reason")
    encoded = column.combine_chunks().dictionary_encode()
    return np.asarray(encoded.indices).astype(np.int64), encoded.dictionary.to_pylist()


def floats(table: pa.Table, name: str) -> NDArray[np.float64]:
    """Return a numeric column, NaN where it is null."""
    return np.asarray(table.column(name).cast(pa.float64()).to_numpy(), dtype=np.float64)


def collect_figures(run: Path, *, epsilon: float | None, low_scores: bool) -> Figures:
    """Count what the charts show.

    Parameters
    ----------
    run : Path
        The run folder.
    epsilon : float or None
        Rows at least 1 - `epsilon` similar are duplicates; None if that was not recorded.
    low_scores : bool
        Whether rows were dropped for their CLIP score, so that there is a cut to mark.
    """
    cut = _clip_cut(run) if low_scores else None
    threshold = None if epsilon is None else 1.0 - epsilon
    return Figures(
        clip_score=histogram(lambda: _ledger_values(run, "clip_score"), mark=cut),
        cosine_distance=histogram(lambda: _ledger_values(run, "cosine_distance")),
        similarity=histogram(lambda: _similarities(run), mark=threshold),
        clusters=read_clusters(run),
    )


def read_clusters(run: Path) -> ClusterTable | None:
    """Return the table of clusters, None if the run has none."""
    path = run / CLUSTERS / "summary.parquet"
    if not path.exists():
        return None
    try:
        table = pq.read_table(path, partitioning=None)
        table = table.sort_by("cluster")
        return ClusterTable(
            cluster=_integers(table, "cluster"),
            size=_integers(table, "size"),
            kept=_integers(table, "kept"),
            d_intra=floats(table, "d_intra"),
            d_inter=floats(table, "d_inter"),
            complexity=floats(table, "complexity"),
            target=floats(table, "target"),
        )
    except (OSError, KeyError, pa.ArrowException) as error:
        raise ShardError(
            f"{path} is damaged ({str(error).splitlines()[0]}); "
            "remove it and run the same command again"
        ) from error


def _integers(table: pa.Table, name: str) -> NDArray[np.int64]:
    return np.asarray(table.column(name).to_numpy()).astype(np.int64)


def histogram(
    stream: Callable[[], Iterator[Values]], mark: float | None = None
) -> Histogram | None:
    """Count values in two passes: one for the axis, one for the bins.

    Parameters
    ----------
    stream : callable
        Returns an iterator over the values, part by part; called twice.
    mark : float, optional
        Where a cut was made; the axis includes it if that does not squeeze the values.

    Returns
    -------
    Histogram or None
        None if there is no finite value.
    """
    span = _span(stream)
    if span is None:
        return None
    edges = _edges(*span, mark)
    counts = np.zeros((2, len(edges) - 1), dtype=np.int64)
    missing = beyond = 0
    for values, first in stream():
        finite = np.isfinite(values)
        missing += int(values.size - finite.sum())
        values, first = values[finite], first[finite]
        beyond += int(((values < edges[0]) | (values > edges[-1])).sum())
        bins = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, len(edges) - 2)
        counts[0] += np.bincount(bins[first], minlength=counts.shape[1])
        counts[1] += np.bincount(bins[~first], minlength=counts.shape[1])
    return Histogram(edges, counts[0], counts[1], missing, beyond, mark)


def _span(stream: Callable[[], Iterator[Values]]) -> tuple[float, float] | None:
    """Return the axis that shows nearly all values: a few outliers must not flatten the rest."""
    lowest, highest = math.inf, -math.inf
    samples: list[NDArray[np.float64]] = []
    held, stride = 0, 1
    for values, _ in stream():
        values = values[np.isfinite(values)]
        if not values.size:
            continue
        lowest, highest = min(lowest, float(values.min())), max(highest, float(values.max()))
        samples.append(values[::stride])
        held += samples[-1].size
        while held > _SAMPLE:
            samples = [sample[::2] for sample in samples]
            held, stride = sum(sample.size for sample in samples), stride * 2
    if not samples:
        return None
    low, high = (float(v) for v in np.quantile(np.concatenate(samples), [0.001, 0.999]))
    room = 0.5 * (high - low)
    return (
        lowest if lowest >= low - room else low,
        highest if highest <= high + room else high,
    )


def _edges(low: float, high: float, mark: float | None) -> NDArray[np.float64]:
    """Return edges at round numbers, or around the mark: no bar stands on both sides of a cut."""
    span = high - low
    if mark is not None and low - span <= mark <= high + span:
        low, high = min(low, mark), max(high, mark)
    span = high - low
    if span <= 1e-9 * max(abs(low), abs(high), 1e-3):
        span = max(abs(low), 1e-3) * 0.1
        low, high = low - span, high + span
    step = round_step((high - low) / _BINS)
    origin = mark if mark is not None and low <= mark <= high else 0.0
    start = math.floor((low - origin) / step + 1e-9)
    stop = max(math.ceil((high - origin) / step - 1e-9), start + 1)
    return origin + np.arange(start, stop + 1, dtype=np.float64) * step


def round_step(least: float) -> float:
    """Return the smallest of 1, 2 and 5 times a power of ten that is not below `least`.

    Examples
    --------
    >>> round_step(0.013), round_step(3)
    (0.02, 5.0)
    """
    power = math.floor(math.log10(least))
    for factor in (1, 2, 5, 10):
        step = float(f"{factor}e{power}")
        if step >= least * (1 - 1e-9):
            return step
    raise AssertionError("unreachable: 10 times the power is above any number of its decade")


def _ledger_values(run: Path, name: str) -> Iterator[Values]:
    folder = run / LEDGER
    for index in part_numbers(folder):
        table = read_part(folder, index, [name, "kept"])
        yield floats(table, name), np.asarray(table.column("kept").to_numpy(), dtype=np.bool_)


def _similarities(run: Path) -> Iterator[Values]:
    """Yield the similarity of each row to its nearest, and whether the row is no duplicate."""
    for index in part_numbers(run / DUPLICATES):
        table = read_part(run / DUPLICATES, index, ["cosine_similarity"])
        codes, reasons = reason_codes(read_part(run / LEDGER, index, ["reason"]))
        if len(codes) != table.num_rows:
            raise ShardError(
                f"part {index} of {run / DUPLICATES} has {table.num_rows:,} rows, "
                f"the ledger's has {len(codes):,}; run the same command again with --overwrite"
            )
        is_duplicate = np.array([reason == "duplicate" for reason in reasons], dtype=np.bool_)
        yield floats(table, "cosine_similarity"), ~is_duplicate[codes]


def _clip_cut(run: Path) -> float | None:
    """Return the lowest score that passed: what the cut came to, however it was asked for."""
    lowest = math.inf
    for index in part_numbers(run / LEDGER):
        table = read_part(run / LEDGER, index, ["clip_score", "reason"])
        codes, reasons = reason_codes(table)
        passes = np.array([reason in ("kept", "over_budget") for reason in reasons], dtype=np.bool_)
        scores = floats(table, "clip_score")
        scores = scores[np.isfinite(scores) & passes[codes]]
        lowest = min(lowest, float(scores.min()) if scores.size else math.inf)
    return lowest if math.isfinite(lowest) else None
