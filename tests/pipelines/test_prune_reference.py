"""The whole of `curate prune` against the brute-force references, row by row."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

import pipelines
from tests.conftest import MakePool, embedded_table
from tests.references import clip_score_reference, dedup_reference, prune_reference

KEEP, EPSILON = 0.25, 0.02


@pytest.mark.parametrize("mode", ["max-earlier", "greedy", "connected-components"])
@pytest.mark.parametrize("dedup_keep", ["clip-score", "hard", "easy"])
def test_every_decision(make_pool: MakePool, tmp_path: Path, mode: str, dedup_keep: str) -> None:
    n = 260
    table = embedded_table(n, groups=6, duplicates=0.3, images=False)
    found = pipelines.prune(
        make_pool(table),
        keep=KEEP,
        out=tmp_path / "run",
        epsilon=EPSILON,
        dedup_mode=mode,
        dedup_keep=dedup_keep,
        clusters=6,
        temperature=0.05,
        neighbours=3,
    )
    ledger = found.table.to_pydict()
    reason = np.array(ledger["reason"])
    uids = table["uid"].to_pylist()
    score = table["similarity"].to_pylist()
    x = np.stack(table["embedding"].to_pylist()).astype(np.float64)
    ranks = np.argsort(np.argsort(uids)).astype(np.uint64)

    # Duplicates: this pool is small, so that they are sought in one cluster.
    center = x.sum(axis=0) / np.linalg.norm(x.sum(axis=0))
    distance = 1 - x @ center / np.linalg.norm(x, axis=1)
    priority = {"clip-score": np.array(score, float), "hard": distance, "easy": -distance}
    duplicate_of, _ = dedup_reference.find_duplicates(
        x, np.zeros(n, int), distance, EPSILON, mode, priority[dedup_keep], ranks
    )
    assert set(np.flatnonzero(reason == "duplicate")) == set(np.flatnonzero(duplicate_of >= 0))
    named = [None if other < 0 else uids[other] for other in duplicate_of]
    assert ledger["duplicate_of"] == named

    # CLIP score: the top sqrt(keep) of what is left.
    left = np.flatnonzero(duplicate_of < 0)
    budget = math.floor(KEEP * n + 0.5)
    count = max(budget, math.floor(math.sqrt(KEEP) * len(left) + 0.5))
    best = clip_score_reference.best([score[i] for i in left], [uids[i] for i in left], count)
    survivors = left[sorted(best)]
    low = set(left) - set(survivors)
    assert set(np.flatnonzero(reason == "low_clip_score")) == low

    # Complexity: from the clusters that k-means found.
    cluster = np.array([-1 if c is None else c for c in ledger["cluster"]])
    assert set(np.flatnonzero(cluster >= 0)) == set(survivors)
    centroids = np.load(tmp_path / "run" / "clusters" / "centroids.npy").astype(np.float64)
    own = centroids[cluster[survivors]]
    unit = x[survivors] / np.linalg.norm(x[survivors], axis=1, keepdims=True)
    near = 1 - (unit * own).sum(axis=1) / np.linalg.norm(own, axis=1)
    stored = np.array(ledger["cosine_distance"], float)[survivors]
    np.testing.assert_allclose(stored, near, atol=1e-6)
    nearest = (unit @ (centroids / np.linalg.norm(centroids, axis=1, keepdims=True)).T).argmax(1)
    assert (nearest == cluster[survivors]).all()
    kept = prune_reference.prune(cluster[survivors], stored, centroids, budget, 0.05, 3)
    assert set(survivors[kept]) == set(np.flatnonzero(reason == "kept"))
    assert len(found.kept_uids) == budget
