from __future__ import annotations

import os

# As the command does, before torch is loaded: tests share their cores with other programs.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import io
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

REPOSITORY = Path(__file__).resolve().parent.parent
SHARED_DATA = REPOSITORY.parent / "shared" / "data"
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])

MakePool = Callable[..., Path]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Small products on many threads of a busy machine mostly wait for each other.

    And a float32 sum depends on how many threads make it, which tests of equal bytes must not see.
    """
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def back_to_one_thread() -> Iterator[None]:
    """Undo what a test of several threads has set."""
    yield
    torch.set_num_threads(1)


@pytest.fixture
def shared_data() -> Path:
    """Real images that are not part of the repository."""
    if not (SHARED_DATA / "cifar10-test.parquet").exists():
        pytest.skip("the real images are not at hand")
    return SHARED_DATA


def png(rng: np.random.Generator, size: int = 16) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (size, size, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def unit_rows(
    n: int, d: int = 16, *, groups: int = 8, duplicates: float = 0.2, seed: int = 0
) -> np.ndarray:
    """Float16 unit rows in groups, of which some are near-copies of others."""
    rng = np.random.default_rng(seed)
    centers = rng.normal(size=(groups, d))
    x = centers[rng.integers(0, groups, n)] + 0.6 * rng.normal(size=(n, d))
    copies = rng.random(n) < duplicates
    x[copies] = x[rng.integers(0, n, n)[copies]] + 0.002 * rng.normal(size=(copies.sum(), d))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float16)


def embedded_table(n: int, *, seed: int = 0, images: bool = True, **options: object) -> pa.Table:
    """A pool that brings its embeddings: uid, image, text, a score and a column of the user's."""
    rng = np.random.default_rng(seed)
    x = unit_rows(n, seed=seed, **options)  # type: ignore[arg-type]
    embedding = pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), x.shape[1])
    columns = {
        "uid": pa.array([f"{value:032x}" for value in rng.permutation(n)]),
        "text": pa.array([f"caption <{i}> & more" for i in range(n)]),
        "similarity": pa.array(np.round(rng.random(n), 2), pa.float32()),
        "embedding": embedding,
        "extra": pa.array(rng.normal(size=n)),
    }
    if images:
        cells = [{"bytes": png(rng, 8), "path": None} for _ in range(n)]
        columns["image"] = pa.array(cells, IMAGE)
    return pa.table(columns)


def image_table(n: int, *, seed: int = 0) -> pa.Table:
    """A pool of images and captions to decode and embed; every tenth image is broken."""
    rng = np.random.default_rng(seed)
    images = [png(rng, 24) for _ in range(n)]
    broken = [b"", b"<html>not found</html>", images[0][:60], None]
    for number, row in enumerate(range(5, n, 10)):
        images[row] = broken[number % len(broken)]
    captions = [f"picture {i} of {['cat', 'dog', 'bird'][i % 3]}" for i in range(n)]
    captions[n // 2] = ""
    cells = [{"bytes": data, "path": f"{i}.png"} for i, data in enumerate(images)]
    return pa.table({"image": pa.array(cells, IMAGE), "caption": captions})


TINY_CLIP = {
    "embed_dim": 32,
    "vision_cfg": {
        "image_size": 32,
        "layers": 2,
        "width": 32,
        "head_width": 16,
        "patch_size": 8,
    },
    "text_cfg": {
        "context_length": 16,
        "vocab_size": 49408,
        "width": 32,
        "heads": 2,
        "layers": 1,
    },
}


@pytest.fixture
def tiny_clip(tmp_path: Path) -> Path:
    """The configuration of an open_clip model that runs in milliseconds."""
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(TINY_CLIP))
    return path


@pytest.fixture
def make_pool(tmp_path: Path) -> MakePool:
    """Write a table as a pool of one file, or of several."""

    def make(
        table: pa.Table, name: str = "pool", *, shards: int = 1, row_group_rows: int = 64
    ) -> Path:
        if shards == 1:
            path = tmp_path / f"{name}.parquet"
            pq.write_table(table, path, row_group_size=row_group_rows)
            return path
        folder = tmp_path / name
        folder.mkdir()
        bounds = np.linspace(0, table.num_rows, shards + 1).astype(int)
        for number, (start, stop) in enumerate(itertools.pairwise(bounds)):
            part = table.slice(start, stop - start)
            pq.write_table(part, folder / f"{number:05d}.parquet", row_group_size=row_group_rows)
        return folder

    return make


def tree(folder: Path) -> dict[str, object]:
    """Every file of a run by name: its bytes, a manifest without its times."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            continue
        name = path.relative_to(folder).as_posix()
        if path.name.endswith("manifest.json"):
            manifest = json.loads(path.read_text())
            manifest.pop("times")
            found[name] = manifest
        else:
            found[name] = path.read_bytes()
    return found
