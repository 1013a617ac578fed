"""Where a run's rows and embeddings come from: the pool, an encoder, or embeddings made before."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from curate.embeddings import Embeddings
from curate.errors import PoolError
from curate.manifest import StepFolder, digest, read_manifest
from curate.pool import Pool, Shard
from curate.sharded_rows import RowRange, ShardedRows, StoredRows
from curate.sources import SourceFile, fingerprint_files
from pipelines.config import EmbedConfig, PoolConfig, PruneConfig
from pipelines.embed_workers import DEFAULT_MODEL, EncoderSpec, resolve_precision
from pipelines.outputs import default_out

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FolderEmbeddings:
    """A folder of clip-retrieval's layout that belongs to the pool row by row.

    Attributes
    ----------
    path : Path
    rows : int
        Of the pool.
    """

    path: Path
    rows: int

    @cached_property
    def _image(self) -> ShardedRows:
        return _numbered_arrays(self.path, "img_emb", self.rows)

    @cached_property
    def _text(self) -> ShardedRows | None:
        there = (self.path / "text_emb").is_dir()
        return _numbered_arrays(self.path, "text_emb", self.rows) if there else None

    def rows_of(self, shard: Shard) -> tuple[RowRange, RowRange | None]:
        """Return the rows of a shard, as they are stored, which are read in blocks."""
        image, text = self._image, self._text
        ranges = RowRange(image, shard.first_row, shard.rows)
        return ranges, None if text is None else RowRange(text, shard.first_row, shard.rows)

    def files(self) -> list[SourceFile]:
        """Return the files, for the fingerprint."""
        paths = sorted(self.path.glob("img_emb/*.npy")) + sorted(self.path.glob("text_emb/*.npy"))
        return [
            SourceFile(str(path), str(path.relative_to(self.path)), path.stat().st_size)
            for path in paths
        ]

    @property
    def kind(self) -> str:
        """The layout's name."""
        return "clip-retrieval"


def _numbered_arrays(folder: Path, name: str, rows: int) -> ShardedRows:
    paths = list((folder / name).glob(f"{name}_*.npy"))
    if not paths:
        raise PoolError(
            f"{folder} holds no {name}/{name}_0000.npy; --embeddings takes a folder that "
            "curate embed or clip-retrieval wrote"
        )
    paths.sort(key=lambda path: int(re.sub(r"\D", "", path.stem) or 0))
    arrays = []
    for path in paths:
        try:
            arrays.append(StoredRows(path))
        except (OSError, ValueError, EOFError) as error:
            raise PoolError(f"{folder / name} holds a damaged file: {error}") from error
        if arrays[-1].dtype.kind != "f" or arrays[-1].ndim != 2 or arrays[-1].shape[1] == 0:
            raise PoolError(
                f"{path} holds {arrays[-1].dtype} of shape {arrays[-1].shape}; embeddings are a "
                "matrix (rows, dimensions) of floats"
            )
    shapes = {array.shape[1:] for array in arrays}
    if len(shapes) != 1 or len(next(iter(shapes))) != 1:
        raise PoolError(f"{folder / name} holds arrays of different widths: {sorted(shapes)}")
    total = sum(map(len, arrays))
    if total != rows:
        raise PoolError(
            f"{folder / name} holds {total:,} rows, the pool has {rows:,}: they must be of the "
            "same rows in the same order"
        )
    return ShardedRows(arrays)


Source = EncoderSpec | Embeddings | Any


def open_pool(config: PoolConfig) -> Pool:
    """Open the pool that a verb's flags name, and say what was found."""
    pool = Pool.open(
        config.pool,
        image_col=config.image_col,
        text_col=config.text_col,
        url_col=config.url_col,
        uid_col=config.uid_col,
        score_col=config.score_col,
        embedding_col=config.embedding_col,
        image_root=config.image_root,
    )
    logger.info("pool: %s rows in %s shards", f"{len(pool):,}", f"{len(pool.shards):,}")
    logger.info("columns: %s", pool.mapping.describe())
    return pool


def pool_path(pool: Pool) -> str:
    """Return a path that opens a pool again."""
    files = pool.source.files
    alone = len(files) == 1 and pool.source.layout == "files"
    return files[0].path if alone else pool.source.root


def resolve_source(pool: Pool, config: EmbedConfig | PruneConfig) -> Source:
    """Decide between an encoder, the embeddings that the pool brings, and a folder of them.

    Raises
    ------
    PoolError
        If there are only URLs, or the folder is not of this pool.
    """
    if config.embeddings is not None:
        return _folder(pool, config.embeddings)
    asks_for_model = config.model is not None or config.pretrained is not None
    if pool.bundled_embeddings is not None and not asks_for_model:
        return pool.bundled_embeddings
    if pool.mapping.image is None and pool.url_only:
        out = default_out(config.pool, "images")
        raise PoolError(
            f"{config.pool} holds addresses but no images and no embeddings. Download them first: "
            f"curate download --pool {config.pool} --out {out} (runs img2dataset: "
            "pip install 'curate-distill[download]'), or pass --download to curate prune"
        )
    return EncoderSpec(
        model=config.model or DEFAULT_MODEL,
        pretrained=config.pretrained,
        device=config.device,
        precision=resolve_precision(config.precision, config.device),
        batch_size=config.batch_size,
        max_pixels=config.max_pixels,
    )


def _folder(pool: Pool, path: Path) -> Source:
    if not path.is_dir():
        raise PoolError(f"--embeddings {path} is not a folder")
    if (path / "manifest.json").exists():
        manifest = read_manifest(path) or {}
        inner = path / "embeddings"
        if manifest.get("step") in ("prune", "coreset") and inner.is_dir():
            return Embeddings.open(inner)
        return Embeddings.open(path)
    # A wrong length shows here, before anything is written. Another object is handed on: this one
    # holds memory maps, which a worker process must make for itself.
    image, text = FolderEmbeddings(path, len(pool)).rows_of(pool.shards[0])
    if text is not None and text.shape[1] != image.shape[1]:
        raise PoolError(
            f"{path / 'text_emb'} has width {text.shape[1]} and img_emb {image.shape[1]}; both "
            "must be of the same model"
        )
    return FolderEmbeddings(path, len(pool))


def check_embeddings(embeddings: Embeddings, uids: pa.ChunkedArray) -> StepFolder:
    """Check that a folder of embeddings is of these rows, in this order."""
    theirs = embeddings.metadata(["uid"])["uid"]
    if len(theirs) != len(uids):
        raise PoolError(
            f"{embeddings.path} holds {len(theirs):,} embeddings, the pool has {len(uids):,} rows: "
            "they are not of the same pool"
        )
    differs = np.flatnonzero(pa.compute.not_equal(theirs, uids).to_numpy())
    if len(differs):
        row = int(differs[0])
        raise PoolError(
            f"{embeddings.path} is of other rows: row {row} has uid {theirs[row].as_py()!r} there "
            f"and {uids[row].as_py()!r} in the pool"
        )
    manifest = read_manifest(embeddings.path) or {}
    return StepFolder(embeddings.path, manifest, embeddings.path / "manifest.json")


def load_early(source: Source, embeddings: Path) -> None:
    """Load the encoder, if it will be needed, before anything is written.

    A model that is misspelt or cannot be downloaded then leaves no folder behind that would have
    to be overwritten.
    """
    if isinstance(source, EncoderSpec):
        manifest = read_manifest(embeddings) if embeddings.is_dir() else None
        done = manifest is not None and manifest["complete"]
        if not (done and manifest is not None and manifest["params"] == describe_source(source)):
            source.load()


def source_fingerprint(source: Source) -> str:
    """Return the hash of what decides the embeddings."""
    if isinstance(source, Embeddings):
        return str((read_manifest(source.path) or {}).get("fingerprint"))
    if isinstance(source, EncoderSpec):
        return digest(source.params())
    return fingerprint_files(source.files(), source.kind)


def describe_source(source: Source) -> dict[str, Any]:
    """Return what the manifest says about the embeddings."""
    if isinstance(source, EncoderSpec):
        return source.params()
    if isinstance(source, Embeddings):
        return {"embeddings": source.path.name}
    return {"imported": source.kind}
