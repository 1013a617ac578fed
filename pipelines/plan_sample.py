"""A small run of `curate prune` in a folder that goes away: what a row costs, what is kept."""

from __future__ import annotations

import io
import logging
import math
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from curate import progress
from curate.columns import IMAGE_STRUCT
from curate.embeddings import Embeddings
from curate.manifest import open_step, read_manifest
from curate.parquet import IMAGE_SHARD_ROWS, METADATA_SHARD_ROWS
from curate.pool import Pool, Shard
from curate.runtime import rng
from curate.sharded_rows import ShardedRows
from curate.shards import write_array, write_parquet
from curate.sources import SourceFile
from pipelines.embed_workers import EncoderSpec
from pipelines.executor import LocalExecutor
from pipelines.indexing import read_uids
from pipelines.plan_config import PlanConfig
from pipelines.plan_kernels import Line, peak_memory, timed
from pipelines.pool_rows import PoolRows
from pipelines.prune_params import result_params
from pipelines.pruning import PruneRun
from pipelines.reporting import write_report
from pipelines.source import Source, describe_source, source_fingerprint

_SAMPLE_ROWS, _SAMPLE_BYTES = 131_072, 512 << 20  # two shards without images, where there are
_PIXELS_PER_BYTE = 3.0  # of a photograph as JPEG, roughly
_CENTERS = 256  # of embeddings that are made up
_PARTS = 4  # of a pool that is made up
FOLDERS = {
    "index": "index",
    "embed": "embeddings",
    "score": "scores",
    "dedup": "duplicates",
    "cluster": "clusters",
    "ledger": "selection",
    "export": "pool",
}


@dataclass(frozen=True)
class MadeUpRows:
    """Embeddings of a pool whose encoder has not run: unit rows around equally frequent centers."""

    width: int
    has_text: bool
    kind: str = "made up"

    def rows_of(self, shard: Shard) -> tuple[NDArray[np.float16], NDArray[np.float16] | None]:
        """Return rows that only the shard's number decides."""
        image = made_up_rows(shard.rows, self.width, shard.index)
        return image, image[::-1].copy() if self.has_text else None

    def files(self) -> list[SourceFile]:
        """Return none."""
        return []


def made_up_rows(rows: int, width: int, number: int) -> NDArray[np.float16]:
    """Return (rows, width) unit rows around equally frequent centers."""
    centers = rng(0, "plan centers").normal(size=(_CENTERS, width)).astype(np.float32)
    draw = rng(0, "plan rows", number)
    x = centers[draw.integers(0, _CENTERS, rows)]
    x += draw.standard_normal(x.shape, dtype=np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    return x.astype(np.float16)


def made_up_pool(config: PlanConfig, folder: Path) -> Pool:
    """Write a pool of a few files as the flags describe it, and open it."""
    image = "image" in config.columns
    most = IMAGE_SHARD_ROWS if image else METADATA_SHARD_ROWS
    rows = min(config.rows or most, most)
    (folder / "metadata").mkdir(parents=True)
    for part in range(min(_PARTS, rows)):
        count = (rows + part) // min(_PARTS, rows)
        table = _made_up_table(config, count, rng(config.seed, "plan pool", part))
        write_parquet(folder / "metadata" / f"metadata_{part:04d}.parquet", table)
        if "embedding" in config.columns:
            x = made_up_rows(count, config.dim, part)
            write_array(folder / "img_emb" / f"img_emb_{part:04d}.npy", x)
    return Pool.open(folder if "embedding" in config.columns else folder / "metadata")


def _made_up_table(config: PlanConfig, rows: int, draw: np.random.Generator) -> pa.Table:
    columns: dict[str, Any] = {"uid": [draw.bytes(16).hex() for _ in range(rows)]}
    if "text" in config.columns:
        words = np.array(["a", "photo", "of", "the", "red", "house", "with", "two", "dogs"])
        captions = words[draw.integers(0, len(words), (rows, config.text_bytes // 2 + 1))]
        columns["text"] = [" ".join(caption)[: config.text_bytes] for caption in captions]
    if "image" in config.columns:
        files = [_jpeg(draw, config.image_bytes) for _ in range(min(rows, 64))]
        cells = [{"bytes": files[row % len(files)], "path": None} for row in range(rows)]
        columns["image"] = pa.array(cells, IMAGE_STRUCT)
    else:
        columns["url"] = [f"https://example.org/{number:040x}.jpg" for number in range(rows)]
    if "score" in config.columns:
        columns["similarity"] = pa.array(draw.normal(0.3, 0.05, rows), pa.float32())
    return pa.table(columns)


def _jpeg(draw: np.random.Generator, size: int) -> bytes:
    """Return a JPEG file of about so many bytes: soft noise, with the density of photographs."""
    from PIL import Image

    side = max(8, round(math.sqrt(size * _PIXELS_PER_BYTE)))
    grain = draw.integers(0, 256, (side // 4 + 1, side // 4 + 1, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(grain).resize((side, side)).save(buffer, "JPEG", quality=75)
    return buffer.getvalue()


def sample_pool(pool: Pool) -> Pool:
    """Return the first shards of a pool: of 131,072 rows or half a gigabyte, at least one."""
    by_bytes = round(_SAMPLE_BYTES / max(pool.nbytes / len(pool), 1))
    return first_shards(pool, min(_SAMPLE_ROWS, by_bytes))


def first_shards(pool: Pool, rows: int) -> Pool:
    """Return a pool of the first shards only: so many that they hold `rows`, at least one."""
    shards: list[Shard] = []
    for shard in pool.shards:
        if shards and sum(s.rows for s in shards) + shard.rows > rows:
            break
        shards.append(shard)
    return replace(pool, shards=tuple(shards), _rows=sum(shard.rows for shard in shards))


@dataclass(frozen=True)
class SampleRun:
    """What small runs did, the largest of `rows` rows.

    Seconds that only the first run of a process takes (`warm_up`), and of the steps whose time goes
    with the rows (of dedup and cluster only for their columns); bytes of each step's folder; rows
    that each stage left; length of a uid; bytes of the process at its peak; the unit rows that have
    an embedding; whether there are CLIP scores, and embeddings of captions.
    """

    rows: int
    warm_up: float
    seconds: Mapping[str, Line]
    written: Mapping[str, int]
    left: Mapping[str, int]
    uid_bytes: float
    memory_bytes: int
    embeddings: ShardedRows
    has_scores: bool
    has_text: bool
    warnings: tuple[str, ...]


def sample_run(config: PlanConfig, pool: Pool, source: Source, folder: Path) -> SampleRun:
    """Prune a small pool, and a quarter of it: seconds that do not grow with the rows show so.

    `source` is that of the whole pool; of an encoder, `MadeUpRows` in its place.
    """
    few = first_shards(pool, len(pool) // 4)
    config = replace(config, allow_fewer=True, workers=1)
    found: list[dict[str, float]] = []
    with quiet():
        # First, when nothing lies about in memory yet.
        memory = peak_memory(lambda: found.append(_run(config, pool, source, folder / "first")))
        small = _run(config, few, source, folder / "small")
        whole = _run(config, pool, source, folder / "run")
    path = folder / "run"
    manifest = read_manifest(path) or {}
    stages = {stage["stage"]: stage["rows_out"] for stage in manifest["stages"]}
    own = _cut(source, pool)
    rows_of = own if isinstance(own, Embeddings) else Embeddings.open(path / "embeddings")
    uids = read_uids(pool, path / "index")
    return SampleRun(
        rows=len(pool),
        warm_up=max(0.0, found[0]["all"] - whole["all"]),
        seconds={
            step: Line.through((len(few), small[step]), (len(pool), whole[step]))
            for step in whole
            if step in small
        },
        written={step: _size(path / name) for step, name in FOLDERS.items()},
        left=stages,
        uid_bytes=float(pc.mean(pc.binary_length(uids)).as_py()),
        memory_bytes=memory,
        embeddings=rows_of.image.subset(rows_of.good),
        has_scores="clip_score" in stages,
        has_text=rows_of.text is not None,
        warnings=tuple(manifest["warnings"]),
    )


def _cut(source: Source, pool: Pool) -> Source:
    """Return the embeddings of the first shards alone; others than ours are asked by shard."""
    parts = len(pool.shards)
    return Embeddings(source.path, parts) if isinstance(source, Embeddings) else source


def _run(config: PlanConfig, pool: Pool, source: Source, folder: Path) -> dict[str, float]:
    """Prune; return the seconds of the steps, and of ``all``."""
    clock, source = time.perf_counter, _cut(source, pool)
    start = clock()
    step = open_step(
        folder,
        step="prune",
        step_version=1,
        params=result_params(config) | describe_source(source),
        inputs={"pool": pool.fingerprint(), "embeddings": source_fingerprint(source)},
    )
    PruneRun(config, pool, source, step, LocalExecutor()).run()
    whole = clock() - start
    manifests = {step: read_manifest(folder / name) for step, name in FOLDERS.items()}
    found = {s: float(m["times"]["seconds"]) for s, m in manifests.items() if m is not None}
    found["report"] = timed(lambda: write_report(folder), clock)
    # What is in no manifest: ranks of the uids, the cut by score, the choice.
    found["choose"] = max(0.0, whole - sum(found.values()))
    rows = PoolRows(pool, read_uids(pool, folder / "index"))
    columns = {
        "dedup": ["nearest", "nearest_row", "cosine_similarity"],
        "cluster": ["cluster", "cosine_distance"],
    }
    for name, names in columns.items():
        if name in found:
            found[name] = _column_seconds(rows, folder / FOLDERS[name], names)
    return found | {"all": whole}


def _column_seconds(rows: PoolRows, folder: Path, names: Sequence[str]) -> float:
    """Return the seconds to write the columns of a step, and to read them."""
    table, again = rows.read(folder, names), folder / "again"
    columns = {name: table[name].combine_chunks() for name in names}

    def work() -> None:
        rows.write(again, columns)
        rows.read(again, names)

    seconds = timed(work, time.perf_counter)
    shutil.rmtree(again)
    return seconds


@contextmanager
def quiet() -> Iterator[None]:
    """Hide the progress and the warnings of the small runs, which are not the user's."""
    shown, level = progress.show("silent"), logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(level)
        progress.show(shown)


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def encoder_pool(pool: Pool, rows: int, folder: Path) -> Pool:
    """Write the first rows of a pool, and open them as a pool."""
    folder.mkdir()
    write_parquet(folder / "pool.parquet", pool.take(range(rows)))
    columns = {f"{role}_col": getattr(pool.mapping, role) or "" for role in ("image", "text")}
    return Pool.open(folder / "pool.parquet", **columns)


def untrained(spec: EncoderSpec) -> EncoderSpec:
    """Return the same network without its weights, which change no time and need a download."""
    return spec if spec.model.startswith("hf-hub:") else replace(spec, pretrained="none")
