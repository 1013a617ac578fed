"""What becomes of each row of a pool, and the ledger that says so."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from curate.embeddings import BAD_EMBEDDING, OK
from curate.manifest import StepFolder, atomic_path, open_step
from curate.prune import Pruning
from curate.selection import LEDGER
from curate.shards import missing_parts, write_parquet, write_part
from pipelines.pool_rows import PoolRows, nullable, row_set_fingerprint
from pipelines.stages import Clustered, Duplicates


@dataclass
class Fates:
    """What has become of each row so far; every drop has a stage and a reason.

    Attributes
    ----------
    rows : int
        Of the pool.
    alive : (n,) bool
    code : (n,) uint8
        What `reasons` calls the row's fate; 0 for rows that are alive.
    reasons : list of str
    stages : list of dict
        Rows in, dropped per reason and out of each stage, for the manifest.
    """

    rows: int
    alive: NDArray[np.bool_] = field(init=False)
    code: NDArray[np.uint8] = field(init=False)
    reasons: list[str] = field(default_factory=lambda: [""])
    stages: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        """All rows are alive."""
        self.code = np.zeros(self.rows, dtype=np.uint8)
        self.alive = np.ones(self.rows, dtype=bool)

    def drop(self, stage: str, causes: dict[str, NDArray[np.bool_]]) -> None:
        """Drop rows; one that has two causes goes by the first."""
        before = int(self.alive.sum())
        dropped = {}
        for reason, rows in causes.items():
            rows = rows & self.alive
            self.code[rows] = self._code(reason)
            self.alive[rows] = False
            dropped[reason] = int(rows.sum())
        after = int(self.alive.sum())
        self.stages.append(
            {"stage": stage, "rows_in": before, "dropped": dropped, "rows_out": after}
        )

    def keep_the_rest(self) -> None:
        """Say of the rows that are alive that they are kept."""
        self.code[self.alive] = self._code("kept")

    def _code(self, reason: str) -> int:
        if reason not in self.reasons:
            self.reasons.append(reason)
        return self.reasons.index(reason)

    def reason(self, rows: slice = slice(None)) -> pa.StringArray:
        """Return the reasons of some rows; empty for those that are alive."""
        return pa.DictionaryArray.from_arrays(self.code[rows], self.reasons).cast(pa.string())

    def counts(self) -> dict[str, int]:
        """Return the rows per reason, the most frequent first."""
        counts = np.bincount(self.code, minlength=len(self.reasons)).tolist()
        pairs = ((name, n) for name, n in zip(self.reasons, counts, strict=True) if n)
        return dict(sorted(pairs, key=lambda pair: (-pair[1], pair[0])))


def undecodable(status: pa.ChunkedArray) -> dict[str, NDArray[np.bool_]]:
    """Return the rows without an embedding, by whether the embedding or the image is at fault."""
    bad = pc.equal(status, BAD_EMBEDDING).to_numpy()
    good = pc.equal(status, OK).to_numpy()
    return {"bad_embedding": bad, "decode_failed": ~(good | bad)}


@dataclass(frozen=True)
class Evidence:
    """The columns of the ledger beside the fate; None where a stage did not run."""

    detail: pa.ChunkedArray
    found: Clustered
    pruning: Pruning | None
    score: NDArray[np.float32] | None
    duplicates: Duplicates | None


def write_ledger(
    rows: PoolRows, run: Path, fates: Fates, evidence: Evidence, *, inputs: Mapping[str, str]
) -> StepFolder:
    """Write one row per pool row, its fate and the evidence, and the summary of the clusters.

    Parameters
    ----------
    rows : PoolRows
    run : Path
        The run's folder: the ledger goes to ``selection/``, the summary to ``clusters/``.
    fates : Fates
    evidence : Evidence
    inputs : mapping of str to str
        Fingerprints of what the choice was made from.
    """
    folder, summary = run / "selection", run / "clusters" / "summary.parquet"
    duplicates = evidence.duplicates
    step = open_step(
        folder,
        step="select",
        step_version=1,
        params={},
        inputs={
            **inputs,
            "kept": row_set_fingerprint(fates.alive),
            "duplicates": "" if duplicates is None else duplicates.step.fingerprint,
        },
        overwrite=True,
        beside=True,
    )
    todo = missing_parts(folder, rows.parts)
    if step.complete and not todo and (summary.exists() or evidence.pruning is None):
        return step
    if evidence.pruning is not None:
        _write_summary(summary, evidence.found, evidence.pruning)
    for shard in todo:
        write_part(folder, shard, _part(rows, fates, evidence, shard))
    step.finish(rows=len(rows), parts=rows.parts, counts=fates.counts())
    return step


def _part(rows: PoolRows, fates: Fates, evidence: Evidence, index: int) -> pa.Table:
    shard = rows.pool.shards[index]
    span = slice(shard.first_row, shard.first_row + shard.rows)
    reason = fates.reason(span)
    kept = pc.equal(reason, "kept").to_numpy(zero_copy_only=False)
    found = evidence.found
    clustered = found.cluster[span] >= 0
    columns = {
        "uid": rows.shard_uids(index),
        "kept": pa.array(kept),
        "weight": pa.array(kept.astype(np.float32)),
        "reason": reason,
        "detail": evidence.detail.slice(shard.first_row, shard.rows),
        "cluster": nullable(found.cluster[span], clustered, pa.int32()),
        "rank": pa.nulls(shard.rows, pa.int32()),
        "cosine_distance": nullable(found.cosine_distance[span], clustered, pa.float32()),
        "clip_score": pa.nulls(shard.rows, pa.float32()),
        "duplicate_of": pa.nulls(shard.rows, pa.string()),
    }
    if evidence.pruning is not None:
        columns["rank"] = nullable(evidence.pruning.rank[span], clustered, pa.int32())
    if evidence.score is not None:
        score = evidence.score[span]
        columns["clip_score"] = nullable(score, np.isfinite(score), pa.float32())
    if evidence.duplicates is not None:
        duplicate = pc.equal(reason, "duplicate").to_numpy(zero_copy_only=False)
        of = np.where(duplicate, evidence.duplicates.duplicate_of[span], 0)
        columns["duplicate_of"] = rows.uids.take(pa.array(of, mask=~duplicate))
    return pa.table(columns).cast(LEDGER)


def _write_summary(path: Path, found: Clustered, pruning: Pruning) -> None:
    sizes = np.bincount(found.cluster[found.cluster >= 0], minlength=len(found.centroids))
    summary = pa.table(
        {
            "cluster": pa.array(np.arange(len(sizes)), pa.int32()),
            "size": pa.array(sizes, pa.int64()),
            "d_intra": pruning.d_intra,
            "d_inter": pruning.d_inter,
            "complexity": pruning.complexity,
            "target": pruning.target,
            "kept": pa.array(pruning.allocated, pa.int64()),
        }
    )
    with atomic_path(path) as temporary:
        write_parquet(temporary, summary)
