"""The workers that write one shard of embeddings: by an encoder, or from what is there."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from curate.embeddings import (
    BAD_EMBEDDING,
    MISSING,
    OK,
    image_path,
    text_path,
    unit_float16,
    write_embedding_part,
    write_metadata,
    write_unit_rows,
)
from curate.errors import PoolError
from curate.manifest import digest, file_sha256
from curate.pool import Pool
from curate.progress import Advance
from curate.shards import read_part
from pipelines.executor import ShardReport

if TYPE_CHECKING:
    import torch

    from curate.encoder import Encoder

DEFAULT_MODEL = "ViT-B-32"
# Captions are sorted by length before they run; enough of them leave few runs half empty.
_TEXTS_AT_ONCE = 16384


@dataclass(frozen=True)
class EncoderSpec:
    """An encoder by name, so that a worker process can load its own."""

    model: str = DEFAULT_MODEL
    pretrained: str | None = None
    device: str = "auto"
    precision: str = "fp32"
    batch_size: int = 64
    max_pixels: int = 89_478_485

    def params(self) -> dict[str, Any]:
        """Return what changes the result: local files by their content, not by their place."""
        return {
            "model": _name_and_hash(self.model),
            "pretrained": _name_and_hash(self.pretrained),
            "precision": self.precision,
            "max_pixels": self.max_pixels,
        }

    def load(self) -> Encoder:
        """Load the weights, or return them if this process holds them already."""
        return _load(self)


@lru_cache(maxsize=1)
def _load(spec: EncoderSpec) -> Encoder:
    from curate.encoder import load_encoder

    return load_encoder(
        spec.model,
        spec.pretrained,
        device=spec.device,
        precision=spec.precision,
        batch_size=spec.batch_size,
    )


def forget_encoder() -> None:
    """Let go of the weights that this process holds."""
    _load.cache_clear()


def resolve_precision(precision: str, device: str) -> str:
    """Return the precision that auto stands for here, since it changes the result."""
    from curate import encoder
    from curate.runtime import resolve_device

    return str(encoder.resolve_precision(precision, resolve_device(device)))


def _name_and_hash(name: str | None) -> str | None:
    path = Path(name) if name else None
    if path is None or not path.exists():
        return name
    files = sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]
    return f"{path.name} sha256:" + digest([[p.name, file_sha256(p)] for p in files])


def no_advance(rows: int) -> None:
    """Report nothing: a worker in another process tells its rows when the shard is done."""


@dataclass
class EmbedWorker:
    """Decodes and embeds the images and captions of one shard at a time."""

    pool: Pool
    index: Path
    out: Path
    spec: EncoderSpec
    advance: Advance = no_advance
    threads: int = field(default_factory=lambda: os.cpu_count() or 1)

    @cached_property
    def encoder(self) -> Encoder:
        """The encoder, loaded when the first shard needs it."""
        return self.spec.load()

    def __call__(self, shard: int) -> ShardReport:
        """Embed the shard and write its part."""
        rows = self.pool.shards[shard].rows
        image = np.zeros((rows, self.encoder.width), dtype=np.float16)
        status, detail = np.full(rows, MISSING, dtype=object), np.full(rows, None, dtype=object)
        texts: list[str | None] = []
        with ThreadPoolExecutor(self.threads) as threads:
            self._embed_images(shard, threads, image, status, detail, texts)
        text, text_status = self._embed_texts(texts)
        uids = read_part(self.index, shard, ["uid"])["uid"]
        columns = [uids, pa.array(status), pa.array(detail, pa.string()), pa.array(text_status)]
        metadata = pa.table(columns, names=["uid", "status", "detail", "text_status"])
        write_embedding_part(self.out, shard, image=image, text=text, metadata=metadata)
        return ShardReport(shard, rows)

    def _embed_images(
        self,
        shard: int,
        threads: ThreadPoolExecutor,
        image: NDArray[np.float16],
        status: NDArray[np.object_],
        detail: NDArray[np.object_],
        texts: list[str | None],
    ) -> None:
        """Fill the arrays row by row, in full batches of images that could be decoded."""
        import torch

        numbers: list[int] = []
        tensors: list[torch.Tensor] = []
        rows_at_once = self.encoder.rows_at_once

        def flush() -> None:
            vectors, good = unit_float16(self.encoder.encode_images(torch.stack(tensors)))
            image[numbers] = vectors
            for row in np.asarray(numbers)[~good]:
                status[row], detail[row] = BAD_EMBEDDING, "the model returned no finite vector"
            numbers.clear()
            tensors.clear()

        for row, outcome in enumerate(self._decoded(shard, threads, texts)):
            status[row], detail[row], tensor = outcome
            if tensor is not None:
                numbers.append(row)
                tensors.append(tensor)
            if len(numbers) == rows_at_once:
                flush()
            self.advance(1)
        if numbers:
            flush()

    def _decoded(
        self, shard: int, threads: ThreadPoolExecutor, texts: list[str | None]
    ) -> Iterator[tuple[str, str | None, torch.Tensor | None]]:
        """Decode ahead of the encoder by a few batches, never by a whole shard."""
        pending: deque[Future[tuple[str, str | None, torch.Tensor | None]]] = deque()
        rows = min(self.encoder.rows_at_once, 256)
        for batch in self.pool.samples(self.pool.shards[shard], rows=rows):
            texts += batch["text"].to_pylist()
            for data, why in zip(batch["image"], batch["detail"], strict=True):
                pending.append(threads.submit(self._prepare, data.as_py(), why.as_py()))
            while len(pending) > 2 * rows:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()

    def _prepare(
        self, data: bytes | None, why: str | None
    ) -> tuple[str, str | None, torch.Tensor | None]:
        from curate.images import decode

        decoded = decode(data, max_pixels=self.spec.max_pixels)
        if decoded.image is None:
            return decoded.status, why or decoded.detail, None
        return OK, None, self.encoder.preprocess(decoded.image)

    def _embed_texts(self, texts: list[str | None]) -> tuple[NDArray[np.float16] | None, list[str]]:
        there = [row for row, text in enumerate(texts) if text is not None and text.strip()]
        status = [MISSING] * len(texts)
        for row in there:
            status[row] = OK
        if not self.encoder.has_text or self.pool.mapping.text is None:
            return None, status
        out = np.zeros((len(texts), self.encoder.width), dtype=np.float16)
        for start in range(0, len(there), _TEXTS_AT_ONCE):
            rows = there[start : start + _TEXTS_AT_ONCE]
            vectors, good = unit_float16(self.encoder.encode_texts([str(texts[r]) for r in rows]))
            out[rows] = vectors
            for row in np.asarray(rows)[~good]:
                status[row] = BAD_EMBEDDING
        return out, status


@dataclass
class ImportWorker:
    """Copies embeddings that were made elsewhere into our layout, as unit float16 rows."""

    pool: Pool
    source: Any
    index: Path
    out: Path
    in_threads: ClassVar[bool] = True

    @cached_property
    def width(self) -> int:
        """The length of the pool's embeddings: that of the first row that has one."""
        widths = (self.source.rows_of(shard)[0].shape[1] for shard in self.pool.shards)
        return next((width for width in widths if width), 1)

    def __call__(self, shard: int) -> ShardReport:
        """Import the rows of one shard."""
        image, text = self.source.rows_of(self.pool.shards[shard])
        if image.shape[1] == 0:  # every row of the shard is null
            image = np.full((image.shape[0], self.width), np.nan, dtype=np.float32)
        if image.shape[1] != self.width:
            raise PoolError(
                f"{self.pool.shards[shard].label} has embeddings of {image.shape[1]} numbers, "
                f"shards before it of {self.width}; all embeddings of a pool need one length"
            )
        good = write_unit_rows(image_path(self.out, shard), image)
        text_good = np.zeros(len(good), bool)
        if text is not None:
            text_good = write_unit_rows(text_path(self.out, shard), text)
        uids = read_part(self.index, shard, ["uid"])["uid"]
        columns = [
            uids,
            _either(good, OK, BAD_EMBEDDING),
            _either(good, None, "the embedding is zero or not finite"),
            _either(text_good, OK, MISSING),
        ]
        metadata = pa.table(columns, names=["uid", "status", "detail", "text_status"])
        write_metadata(self.out, shard, metadata)
        return ShardReport(shard, len(good))


def _either(which: NDArray[np.bool_], yes: str | None, no: str | None) -> pa.Array:
    """Return a column of two texts."""
    texts = (pa.scalar(text, pa.string()) for text in (yes, no))
    return pc.if_else(pa.array(which), *texts)
