"""A labelled pool as a `distill.ImageSet`: decoded once, into a memory map of one step's folder."""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image, ImageOps

from curate.errors import FailedRowsError, PoolError, ShardError
from curate.images import Decoded, decode
from curate.manifest import StepFolder, atomic_path, digest, open_step
from curate.pool import Pool, Shard
from curate.progress import Advance, task
from curate.shards import missing_parts, read_part, write_parquet, write_part
from distill.image_set import ImageSet
from pipelines.executor import LocalExecutor
from pipelines.indexing import index_pool
from pipelines.outputs import default_out
from pipelines.pool_labels import Labels

logger = logging.getLogger(__name__)

_BATCH = 256
_SPLITS = {"train", "training", "test", "validation", "valid", "val", "dev", "eval"}
_PIXELS, _ROWS = "pixels.npy", "rows.parquet"
_SCHEMA = pa.schema(
    {
        "uid": pa.string(),
        "label": pa.int64(),
        "kept": pa.bool_(),
        "reason": pa.string(),
        "detail": pa.string(),
    }
)


def check_images(pool: Pool, name: str) -> None:
    """Check that a pool holds images; warn if it looks like training and test files together.

    Raises
    ------
    PoolError
    """
    if pool.mapping.image is None:
        hint = "name their column with --image-col"
        if pool.url_only:
            out = default_out(name, "images")
            hint = f"download them first: curate download --pool {name} --out {out}"
        raise PoolError(f"{name} holds no images; {hint}")
    files = [file.name for file in pool.source.files]
    splits = {split: file for file in reversed(files) if (split := _split_of(file))}
    if len(splits) > 1:
        one = re.sub(r"\d[^/]*(?=\.)", "*", splits.get("train", files[0]))
        logger.warning(
            "%s holds files of several splits (%s) and all of them are taken; a glob takes one: %r",
            name,
            ", ".join(sorted(splits)),
            f"{pool.source.root}/{one}",
        )


def _split_of(file: str) -> str | None:
    """Return the split that a file belongs to by its name or folder, as Hugging Face reads it."""
    words = [re.split(r"[-_.]", part)[0].lower() for part in Path(file).parts]
    return next((word for word in words if word in _SPLITS), None)


def image_size(pool: Pool, max_pixels: int) -> int:
    """Return the side of the first image that decodes.

    Raises
    ------
    PoolError
        If it is no square, or there is none.
    """
    for shard in pool.shards:
        for batch in pool.samples(shard, rows=16):
            for value in batch["image"]:
                image = decode(value.as_py(), max_pixels=max_pixels).image
                if image is not None and image.width != image.height:
                    raise PoolError(
                        f"the first image is {image.width} x {image.height}, no square; pass "
                        "--size to resize all of them"
                    )
                if image is not None:
                    return image.width
    raise PoolError("no image of the pool can be decoded")


def decode_pool(
    pool: Pool,
    labels: Labels,
    folder: Path,
    *,
    index: Path,
    size: int,
    resize: bool,
    max_pixels: int,
    workers: int = 1,
) -> StepFolder:
    """Decode the images of a pool, unless that is done.

    The folder holds ``pixels.npy``, (n, size, size, 3) uint8, and ``rows.parquet`` with the uid,
    class and fate of every row of the pool; those that are ``kept`` are the images, in their order.
    A run that was stopped goes on after the last shard that it finished.

    Parameters
    ----------
    pool : Pool
    labels : Labels
    folder, index : Path
        Folders of this step and of the uids.
    size : int
        Pixels of a side.
    resize : bool
        Whether images of other sizes are resized, or refused.
    max_pixels : int
        Larger images are not decoded.
    workers : int
        Threads.

    Raises
    ------
    PoolError
        If an image has another size and `resize` is off.
    """
    step = open_step(
        folder,
        step="decode-images",
        step_version=1,
        params={
            "size": size,
            "resize": resize,
            "max_pixels": max_pixels,
            "label_col": labels.column,
            "classes": digest(list(labels.names)),
        },
        inputs={"pool": pool.fingerprint()},
        overwrite=True,
    )
    pixels, rows, parts = folder / _PIXELS, folder / _ROWS, folder / "parts"
    if not (pixels.exists() and rows.exists()):
        index_pool(pool, index, executor=LocalExecutor(), overwrite=True)
        one = partial(_sized, size=size, resize=resize, max_pixels=max_pixels)
        with ThreadPoolExecutor(workers) as threads:
            _Decoding(pool, labels, size, index, folder, parts).run(partial(threads.map, one))
        with atomic_path(rows) as temporary:  # the last file: where it is, the pixels are whole
            found = (read_part(parts, shard.index) for shard in pool.shards)
            batches = (batch for table in found for batch in table.to_batches())
            write_parquet(temporary, batches, schema=_SCHEMA)
    shutil.rmtree(parts, ignore_errors=True)
    if not step.complete:
        counts = Counter(pq.read_table(rows, columns=["reason"])["reason"].to_pylist())
        step.finish(
            rows=len(pool),
            size=size,
            counts={status: counts[status] for status in sorted(counts)},
            class_names=list(labels.names),
        )
    return step


def open_images(step: StepFolder) -> ImageSet:
    """Return the images that `decode_pool` wrote.

    Raises
    ------
    ShardError
        If a file is missing or damaged.
    PoolError
        If a class has no image.
    """
    path = step.path / _ROWS
    try:
        rows = pq.read_table(path)
        # Copy-on-write, not read-only: torch warns about tensors that it may not write to.
        pixels = np.load(step.path / _PIXELS, mmap_mode="c", allow_pickle=False)
    except (OSError, ValueError, EOFError, pa.ArrowException) as error:
        raise ShardError(
            f"{step.path} is damaged ({error}); remove it and run the same command again"
        ) from error
    kept = rows.filter(rows["kept"])
    labels = np.array(kept["label"].to_pylist(), np.int64)  # Arrow's own arrays are read-only
    names = tuple(step.manifest["class_names"])
    try:
        return ImageSet(pixels, labels, names, np.array(kept["uid"].to_pylist(), np.str_))
    except ValueError as error:
        raise PoolError(f"of what could be decoded, {error}") from error


def check_unusable(step: StepFolder, max_failed: float) -> None:
    """Check how many rows could not be used, before hours are spent on the rest.

    Raises
    ------
    FailedRowsError
        If their share is above `max_failed`.
    """
    counts, rows = dict(step.manifest["counts"]), int(step.manifest["rows"])
    unusable = rows - counts.pop("ok", 0)
    said = ", ".join(f"{count:,} {reason}" for reason, count in counts.items())
    if unusable:
        logger.warning("%s of %s rows cannot be used: %s", f"{unusable:,}", f"{rows:,}", said)
    if unusable > max_failed * rows:
        raise FailedRowsError(
            f"{unusable:,} of {rows:,} rows cannot be used ({said}), more than --max-failed "
            f"{max_failed} allows; {step.path / _ROWS} says why"
        )


def _sized(data: bytes | None, *, size: int, resize: bool, max_pixels: int) -> Decoded:
    found = decode(data, max_pixels=max_pixels)
    if found.image is None or found.image.size == (size, size) or not resize:
        return found
    image = ImageOps.fit(found.image, (size, size), Image.Resampling.BICUBIC)
    return Decoded(image, "ok")


@dataclass(frozen=True)
class _Decoding:
    """Writes pixels one after another, and after each shard the fates of its rows.

    A shard whose part of fates is there has all of its pixels on disk; what a killed run wrote
    behind them is cut off.
    """

    pool: Pool
    labels: Labels
    size: int
    index: Path
    folder: Path
    parts: Path

    def run(self, decoded: Callable[[Iterable[bytes | None]], Iterator[Decoded]]) -> None:
        """Decode what is missing; `decoded` maps files to images."""
        pixels, unfinished = self.folder / _PIXELS, self.folder / "pixels.partial"
        if pixels.exists():  # renamed by a run that was killed before it wrote the rows
            pixels.replace(unfinished)
        shards = self.pool.shards
        first = next(iter(missing_parts(self.parts, len(shards))), len(shards))
        kept = sum(self._kept(number) for number in range(first))
        with unfinished.open("r+b" if unfinished.exists() else "w+b") as file:
            start, each = _header(file, 0, self.size), self.size**2 * 3
            if file.seek(0, os.SEEK_END) < start + kept * each:
                first = kept = 0  # the file of an unfinished run was removed
            file.truncate(start + kept * each)
            file.seek(0, os.SEEK_END)
            done = sum(shard.rows for shard in shards[:first])
            with task("decode", total=len(self.pool), unit="images", done=done) as advance:
                for shard in shards[first:]:
                    kept += self._shard(shard, decoded, file, advance)
            if _header(file, kept, self.size) != start:
                raise ShardError("the header of pixels.npy did not keep its length")
            _to_disk(file)
        unfinished.replace(pixels)

    def _kept(self, shard: int) -> int:
        return int(pc.sum(read_part(self.parts, shard, ["kept"])["kept"]).as_py() or 0)

    def _shard(
        self,
        shard: Shard,
        decoded: Callable[[Iterable[bytes | None]], Iterator[Decoded]],
        file: BinaryIO,
        advance: Advance,
    ) -> int:
        """Write the pixels of a shard, then the fates of its rows; return how many are kept."""
        numbers = self.labels.numbers[shard.first_row : shard.first_row + shard.rows]
        fates: list[tuple[str, str]] = []
        for batch in self.pool.samples(shard, rows=_BATCH):
            labelled = numbers[len(fates) : len(fates) + len(batch)] >= 0
            files, details = batch["image"].to_pylist(), batch["detail"].to_pylist()
            wanted = [data if has else None for data, has in zip(files, labelled, strict=True)]
            for found, has, detail in zip(decoded(wanted), labelled, details, strict=True):
                if not has:
                    fates.append(("no_label", "the row has no class"))
                    continue
                if found.image is not None:
                    file.write(self._pixels(found.image, shard.first_row + len(fates)))
                fates.append((found.status, detail or found.detail))
            advance(len(batch))
        _to_disk(file)
        uids = read_part(self.index, shard.index, ["uid"])["uid"]
        write_part(self.parts, shard.index, _rows(uids, numbers, fates))
        return sum(status == "ok" for status, _ in fates)

    def _pixels(self, image: Image.Image, row: int) -> bytes:
        if image.size != (self.size, self.size):
            raise PoolError(
                f"the image of row {row:,} is {image.width} x {image.height} and others are "
                f"{self.size} x {self.size} pixels; pass --size to resize all of them"
            )
        return np.asarray(image, dtype=np.uint8).tobytes()


def _to_disk(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _header(file: BinaryIO, images: int, size: int) -> int:
    """Write the head of a .npy file; numpy leaves room in it for the first axis to grow."""
    file.seek(0)
    shape = (images, size, size, 3)
    facts = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, facts)
    return file.tell()


def _rows(
    uids: pa.ChunkedArray, numbers: NDArray[np.int64], fates: list[tuple[str, str]]
) -> pa.Table:
    status = [status for status, _ in fates]
    columns = [
        uids.combine_chunks().cast(pa.string()),
        pa.array(numbers, pa.int64(), mask=numbers < 0),
        pa.array([one == "ok" for one in status], pa.bool_()),
        pa.array(status, pa.string()),
        pa.array([detail or None for _, detail in fates], pa.string()),
    ]
    return pa.Table.from_arrays(columns, schema=_SCHEMA)
