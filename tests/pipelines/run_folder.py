"""Builds the folder of a run by hand, for tests of the report."""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from curate.pool import Pool
from curate.shards import write_parquet, write_part

SCRIPT = "<script>alert('pwned')</script>"
CAPTIONS = [
    SCRIPT,
    '"><img src=x onerror=alert(1)>',
    "it's \"quoted\" & 'single' &lt;b&gt;",
    "👩‍👩‍👧 a family at the sea 🌊",
    "‮שלום עולם‬ قطة على السجادة",
    "long " * 2000,
    None,
    "",
    "null \x00 and bell \x07",
    "http://evil.example/x.png",
    "]]></style></svg></title><script>",
]


def jpeg(number):
    buffer = io.BytesIO()
    rng = np.random.default_rng(number)
    Image.fromarray(rng.integers(0, 255, (20, 30, 3), dtype=np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


def uid_of(row):
    return f'"><i>{row}' if row % 50 == 1 else f"{row:08x}"


def make_pool(folder, rows, shards):
    folder.mkdir()
    for index, block in enumerate(np.array_split(np.arange(rows), shards)):
        table = pa.table(
            {
                "image": pa.array([jpeg(int(row)) for row in block], pa.binary()),
                "caption": pa.array([CAPTIONS[row % len(CAPTIONS)] for row in block], pa.string()),
                "uid": [uid_of(int(row)) for row in block],
            }
        )
        pq.write_table(table, folder / f"{index:03d}.parquet")
    return Pool.open(folder)


def fates(rows, clusters, rng, *, clip, dedup):
    """Decide the fate of each row, as `curate prune` would; returns the ledger's columns."""
    reason = np.full(rows, "over_budget", dtype=object)
    score = rng.normal(0.3, 0.05, rows).astype(np.float32)
    reason[rng.random(rows) < 0.03] = "decode_failed"
    reason[(rng.random(rows) < 0.02) & (reason == "over_budget")] = "filtered:<b>rule</b>"
    if dedup:
        reason[(rng.random(rows) < 0.1) & (reason == "over_budget")] = "duplicate"
    if clip:
        reason[(score < 0.28) & (reason == "over_budget")] = "low_clip_score"
    alive = np.flatnonzero(reason == "over_budget")
    cluster = np.full(rows, -1)
    cluster[alive] = rng.integers(0, clusters, alive.size)
    distance = np.where(cluster >= 0, rng.uniform(0, 0.8, rows), np.nan).astype(np.float32)
    rank = np.full(rows, -1)
    for number in range(clusters):
        inside = np.flatnonzero(cluster == number)
        rank[inside[np.argsort(-distance[inside], kind="stable")]] = np.arange(inside.size)
        # The last of several clusters keeps nothing.
        budget = 0 if number and number == clusters - 1 else inside.size * (number + 1) // clusters
        reason[inside[rank[inside] < budget]] = "kept"
    return reason, score, cluster, distance, rank


def make_run(
    run, *, rows=400, shards=3, clusters=7, clip=True, dedup=True, seed=0, pool=None, **fields
):
    rng = np.random.default_rng(seed)
    reason, score, cluster, distance, rank = fates(rows, clusters, rng, clip=clip, dedup=dedup)
    originals = np.flatnonzero(reason == "kept")
    duplicate_of = [
        uid_of(int(originals[row % originals.size])) if why == "duplicate" else None
        for row, why in enumerate(reason)
    ]
    similarity = np.where(reason == "duplicate", 0.97, rng.uniform(0.2, 0.9, rows))
    for index, part in enumerate(np.array_split(np.arange(rows), shards)):
        kept = reason[part] == "kept"
        uids = [uid_of(int(row)) for row in part]
        table = {
            "uid": uids,
            "kept": kept,
            "weight": kept.astype(np.float32),
            "reason": list(reason[part]),
            "detail": pa.array([f"cannot read {SCRIPT}"] * part.size, pa.string()),
            "cluster": pa.array(cluster[part], pa.int32(), mask=cluster[part] < 0),
            "rank": pa.array(rank[part], pa.int32(), mask=rank[part] < 0),
            "cosine_distance": pa.array(distance[part], mask=np.isnan(distance[part])),
            "clip_score": pa.array(score[part], pa.float32(), mask=np.full(part.size, not clip)),
            "duplicate_of": pa.array([duplicate_of[row] for row in part], pa.string()),
        }
        write_part(run / "selection", index, pa.table(table), row_group_rows=50)
        if dedup:
            near = {"uid": uids, "nearest": uids, "cosine_similarity": np.float32(similarity[part])}
            write_part(run / "duplicates", index, pa.table(near))
    write_clusters(run, clusters, cluster, reason, rng)
    manifest = make_manifest(reason, clusters, pool) | fields
    (run / "manifest.json").write_text(json.dumps(manifest))
    return run


def write_clusters(run, clusters, cluster, reason, rng):
    (run / "clusters").mkdir()
    kept = np.bincount(cluster[reason == "kept"], minlength=clusters)
    d_intra, d_inter = rng.uniform(0.1, 0.5, clusters), rng.uniform(0.2, 0.9, clusters)
    table = {
        "cluster": pa.array(range(clusters), pa.int32()),
        "size": np.bincount(cluster[cluster >= 0], minlength=clusters),
        "d_intra": d_intra,
        "d_inter": d_inter,
        "complexity": d_intra * d_inter,
        "target": kept + 0.25,
        "kept": kept,
    }
    write_parquet(run / "clusters" / "summary.parquet", pa.table(table))


def make_manifest(reason, clusters, pool):
    counts = {str(name): int((reason == name).sum()) for name in np.unique(reason.astype(str))}
    stages, left = [], len(reason)
    plan = {
        "decode": ["decode_failed"],
        "filter": ["filtered:<b>rule</b>"],
        "dedup": ["duplicate"],
        "clip_score": ["low_clip_score", "no_clip_score"],
        "prune": ["over_budget"],
    }
    for stage, names in plan.items():
        dropped = {name: counts.get(name, 0) for name in names}
        after = left - sum(dropped.values())
        stages.append({"stage": stage, "rows_in": left, "dropped": dropped, "rows_out": after})
        left = after
    fingerprint = "ab" * 32 if pool is None else pool.fingerprint()
    source = {"path": "/nowhere/pool.parquet", "mapping": {}}
    if pool is not None:
        source = {
            "path": pool.source.root,
            "mapping": {"image": "image", "text": "caption", "uid": "uid", "url": None},
            "image_root": None,
        }
    return {
        "format": "curate/1",
        "step": "prune",
        "fingerprint": "0f" * 32,
        "complete": True,
        "params": {"keep": 0.28, "epsilon": 0.05, "which": "hard", "model": f"ViT{SCRIPT}"},
        "inputs": {"pool": fingerprint, "embeddings": "cd" * 32},
        "pool": source,
        "source": {"imported": "column"},
        "rows": len(reason),
        "budget": counts.get("kept", 0),
        "counts": counts,
        "stages": stages,
        "clusters": clusters,
        "warnings": [f"mind the gap {SCRIPT} \ud800"],
        "versions": {"torch": "2.13.0"},
        "environment": {"device": "cpu", "precision": None},
        "times": {"seconds": 1.5},
    }
