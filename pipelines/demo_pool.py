"""The demo's pool: real scans of handwritten digits, spoiled as a pool from the web is.

The scans are those that scikit-learn ships (`sklearn.datasets.load_digits`: 1,797 scans of 8 x 8
pixels; Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits", UCI, 1998). They are split
into scans that can be trusted, scans held out for the test, and scans that the pool is made of.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image

from curate.columns import IMAGE_STRUCT
from curate.manifest import StepFolder, open_step
from curate.runtime import rng, row_keys
from curate.shards import missing_parts, write_part

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEMPLATES = (
    "a scan of the digit {}",
    "a handwritten digit {}",
    "handwritten {}",
    "the number {}",
    "a photo of the number {}",
    "{} written by hand",
)
SIDE = 32
TRUSTED_SCANS, HELD_OUT_SCANS = 237, 360
WRONG_CAPTIONS, JUNK_IMAGES, BROKEN_FILES = 0.35, 0.10, 0.005
SHARDS = 4
NO_SCAN = -1
_MOST_SHIFT = 3
_FINE, _WRONG, _JUNK, _BROKEN = range(4)
_ROW_GROUP = 1000

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Scans:
    """Scans of digits.

    Attributes
    ----------
    number : (n,) int64
        Their place in scikit-learn's set.
    images : (n, 32, 32) uint8
        Ink is bright.
    digits : (n,) int64
    """

    number: NDArray[np.int64]
    images: Pixels
    digits: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.number)


@dataclass(frozen=True)
class Contents:
    """What the rows of a set are, by the columns that no stage of the pruning reads.

    Attributes
    ----------
    rows : int
    wrong_captions, junk_images : int
        Rows whose caption names another digit; rows whose image shows nothing.
    distinct_scans : int
        Scans of which there is at least one row.
    """

    rows: int
    wrong_captions: int
    junk_images: int
    distinct_scans: int


def load_scans(seed: int) -> tuple[Scans, Scans, Scans]:
    """Split the scans into trusted ones, held-out ones, and those of the pool.

    Parameters
    ----------
    seed : int
        Decides the split; no scan is in two of the three.

    Returns
    -------
    trusted, held_out, pool : Scans
        237, 360 and 1,200 scans.
    """
    from sklearn.datasets import load_digits

    source = load_digits()
    grey = (source.images * (255 / 16)).astype(np.uint8)
    size = (SIDE, SIDE)
    large = [Image.fromarray(scan).resize(size, Image.Resampling.BICUBIC) for scan in grey]
    images = np.stack([np.asarray(scan) for scan in large])
    order = rng(seed, "demo", "split").permutation(len(images))
    ends = [TRUSTED_SCANS, TRUSTED_SCANS + HELD_OUT_SCANS]
    trusted, held_out, pool = (
        Scans(part, images[part], source.target[part]) for part in np.split(order, ends)
    )
    return trusted, held_out, pool


def captions_for(digits: NDArray[np.int64], seed: int, purpose: str) -> list[str]:
    """Return a caption for each digit, its template drawn at random."""
    chosen = rng(seed, "demo", "captions", purpose).integers(len(TEMPLATES), size=len(digits))
    pairs = zip(chosen.tolist(), digits.tolist(), strict=True)
    return [TEMPLATES[template].format(DIGITS[digit]) for template, digit in pairs]


def build_pool(folder: Path, scans: Scans, *, seed: int, rows: int) -> StepFolder:
    """Write the spoiled pool as Parquet shards; what is there already is left as it is.

    35% of the rows have the caption of another digit, 10% an image that shows nothing, 0.5% bytes
    that are no image; no row has two of these faults. How often a scan occurs follows Zipf's law.
    Its first row is a clean copy; the others are shifted by up to 3 pixels, noisy, brighter or
    darker, and mostly saved as JPEG, like a picture that has been around.

    Parameters
    ----------
    folder : Path
        Where the shards go.
    scans : Scans
        What the rows are made of.
    seed : int
        Decides everything that is drawn; the same seed gives the same bytes.
    rows : int
        Rows of the pool.

    Returns
    -------
    StepFolder
        The columns are uid, image and text; and, for the account afterwards only, scan (int64, the
        scan's number, -1 for junk) and caption_is_wrong (bool, False for junk).
    """
    params = {"seed": seed, "rows": rows}
    step = open_step(
        folder, step="demo-pool", step_version=1, params=params, inputs={}, overwrite=True
    )
    todo = missing_parts(folder, SHARDS)
    if step.complete and not todo:
        return step
    table = _spoiled(scans, seed, rows)
    edges = np.linspace(0, rows, SHARDS + 1).astype(int)
    for part in todo:
        cut = table.slice(edges[part], edges[part + 1] - edges[part])
        write_part(folder, part, cut, row_group_rows=_ROW_GROUP)
    step.finish(rows=rows, parts=SHARDS)
    return step


def count_contents(rows: pa.Table, decoded: NDArray[np.bool_]) -> Contents:
    """Count what the rows of a pool are.

    Parameters
    ----------
    rows : pyarrow.Table
        With the columns scan and caption_is_wrong.
    decoded : (n,) bool
        Whether the image of a row can be decoded.
    """
    scan = rows["scan"].to_numpy()
    shown = scan[decoded & (scan != NO_SCAN)]
    return Contents(
        rows=len(rows),
        wrong_captions=int(rows["caption_is_wrong"].to_numpy().sum()),
        junk_images=int((scan == NO_SCAN).sum()),
        distinct_scans=len(np.unique(shown)),
    )


def _spoiled(scans: Scans, seed: int, rows: int) -> pa.Table:
    draw = rng(seed, "demo", "rows")
    fault = _faults(rows, draw)
    source = draw.choice(len(scans), size=rows, p=_zipf(len(scans)))
    # A wrong digit is one of the nine others, each as likely; junk is captioned as anything is.
    offset = np.where(fault == _WRONG, draw.integers(1, len(DIGITS), size=rows), 0)
    digits = (scans.digits[source] + offset) % len(DIGITS)
    uids = [f"{key:016x}" for key in row_keys(map(str, range(rows)), seed, "demo", "uid").tolist()]
    columns = {
        "uid": pa.array(uids, pa.string()),
        "image": _image_column(uids, scans.images[source], source, fault, draw),
        "text": pa.array(captions_for(digits, seed, "pool"), pa.string()),
        "scan": pa.array(np.where(fault == _JUNK, NO_SCAN, scans.number[source]), pa.int64()),
        "caption_is_wrong": pa.array(fault == _WRONG, pa.bool_()),
    }
    return pa.table(columns).replace_schema_metadata({"huggingface": _FEATURES})


_FEATURES = json.dumps(
    {
        "info": {
            "features": {
                "uid": {"dtype": "string", "_type": "Value"},
                "image": {"_type": "Image"},
                "text": {"dtype": "string", "_type": "Value"},
                "scan": {"dtype": "int64", "_type": "Value"},
                "caption_is_wrong": {"dtype": "bool", "_type": "Value"},
            }
        }
    }
)


def _faults(rows: int, draw: np.random.Generator) -> NDArray[np.int64]:
    """Return each row's fault: exact shares, in random order."""
    shares = {_WRONG: WRONG_CAPTIONS, _JUNK: JUNK_IMAGES, _BROKEN: BROKEN_FILES}
    faults = [np.full(round(share * rows), fault) for fault, share in shares.items()]
    spoiled = np.concatenate(faults)
    fine = np.full(rows - len(spoiled), _FINE)
    return draw.permutation(np.concatenate([spoiled, fine]))


def _zipf(count: int) -> NDArray[np.float64]:
    """Return Zipf's law: the r-th most popular scan occurs in proportion to 1 / r."""
    weight: NDArray[np.float64] = 1 / np.arange(1, count + 1, dtype=np.float64)
    share: NDArray[np.float64] = weight / weight.sum()
    return share


def _image_column(
    uids: list[str],
    images: Pixels,
    source: NDArray[np.int64],
    fault: NDArray[np.int64],
    draw: np.random.Generator,
) -> pa.Array:
    shown = np.flatnonzero((fault == _FINE) | (fault == _WRONG))
    first = np.zeros(len(source), dtype=bool)
    first[shown[np.unique(source[shown], return_index=True)[1]]] = True
    stored = []
    for row, uid in enumerate(uids):
        if fault[row] == _JUNK:
            data, ending = _jpeg(_junk(draw), draw), "jpg"
        elif fault[row] == _BROKEN:
            data, ending = _broken(images[row], draw), "jpg"
        elif first[row]:
            data, ending = _saved(images[row], "PNG"), "png"
        elif draw.random() < 0.2:
            data, ending = _saved(_passed_around(images[row], draw), "PNG"), "png"
        else:
            data, ending = _jpeg(_passed_around(images[row], draw), draw), "jpg"
        stored.append({"bytes": data, "path": f"{uid}.{ending}"})
    return pa.array(stored, IMAGE_STRUCT)


def _passed_around(image: Pixels, draw: np.random.Generator) -> Pixels:
    """Shift an image, change its contrast and add noise."""
    down, right = draw.integers(2 * _MOST_SHIFT + 1, size=2)
    moved = np.pad(image, _MOST_SHIFT)[down : down + SIDE, right : right + SIDE]
    changed = moved * draw.uniform(0.8, 1.0) + draw.normal(0, 8, moved.shape)
    return np.clip(changed, 0, 255).astype(np.uint8)


def _junk(draw: np.random.Generator) -> Pixels:
    """Return an image that shows nothing: noise, stripes, or one flat grey."""
    kinds: tuple[Callable[[], NDArray[np.int64]], ...] = (
        lambda: draw.integers(256, size=(SIDE, SIDE)),
        lambda: np.tile(draw.integers(256, size=SIDE), (SIDE, 1)),
        lambda: np.full((SIDE, SIDE), draw.integers(256)),
    )
    return kinds[draw.choice(len(kinds), p=(0.6, 0.2, 0.2))]().astype(np.uint8)


def _broken(image: Pixels, draw: np.random.Generator) -> bytes:
    """Return bytes that are no image: a download cut short, a page about an error, nothing."""
    kind = draw.integers(3)
    if kind == 0:
        whole = _jpeg(image, draw)
        return whole[: len(whole) // 2]
    return b"<html><head><title>404 Not Found</title></head></html>\n" if kind == 1 else b""


def _jpeg(image: Pixels, draw: np.random.Generator) -> bytes:
    return _saved(image, "JPEG", quality=int(draw.integers(40, 96)))


def _saved(image: Pixels, kind: str, **options: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, kind, **options)
    return buffer.getvalue()
