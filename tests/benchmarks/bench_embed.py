"""Embedding on a CPU against open_clip's own float32 loop, in one run.

Prints Markdown for RESULTS.md: ratios of times taken in turn, on ViT-B-32 with random weights, and
what the machine's matrix products allow.
Run on an idle machine: ``python -m tests.benchmarks.bench_embed [images] [captions] [repeats]``.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import io
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import open_clip
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from curate.encoder import TorchEncoder, load_encoder, resolve_precision
from curate.images import decode
from curate.pool import Pool
from pipelines.embed_workers import EmbedWorker, EncoderSpec
from pipelines.executor import LocalExecutor
from pipelines.indexing import index_pool

MODEL, BATCH = "ViT-B-32", 64
WORDS = ("a", "photo", "of", "the", "small", "red", "car", "on", "street", "near", "trees")


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def captions(n: int, seed: int = 0) -> list[str]:
    """Of 5 to 40 tokens, every length as often; captions of the web are mostly shorter."""
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, length - 2)) for length in rng.integers(5, 41, n)]


def photographs(n: int, seed: int = 0) -> list[bytes]:
    """JPEGs of 256 x 340 pixels with detail as of photographs: about 25 kB each."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(n):
        coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((340, 256), Image.Resampling.BICUBIC), dtype=np.float32)
        noisy = smooth + rng.normal(0, 8, smooth.shape)
        buffer = io.BytesIO()
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
        found.append(buffer.getvalue())
    return found


class Plain:
    """The loop of open_clip's documentation: float32, batches in order, texts padded to 77."""

    def __init__(self) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.model = open_clip.create_model(MODEL, pretrained=None).eval()
        self.tokenizer = open_clip.get_tokenizer(MODEL)

    def images(self, pixels: torch.Tensor) -> np.ndarray:
        with torch.inference_mode():
            parts = [self.model.encode_image(part, normalize=True) for part in pixels.split(BATCH)]
        return torch.cat(parts).numpy()

    def texts(self, texts: list[str]) -> np.ndarray:
        with torch.inference_mode():
            tokens = [self.tokenizer(texts[at : at + BATCH]) for at in range(0, len(texts), BATCH)]
            parts = [self.model.encode_text(part, normalize=True) for part in tokens]
        return torch.cat(parts).numpy()


def compare(
    name: str, ours: Callable[[], object], theirs: Callable[[], object], rows: int, repeats: int
) -> None:
    pairs = [(timed(ours), timed(theirs)) for _ in range(repeats)]
    mine, baseline = (rows / statistics.median(times) for times in zip(*pairs, strict=True))
    ratios = sorted(b / a for a, b in pairs)
    vectors, expected = np.asarray(ours()), np.asarray(theirs())
    cosine = float((vectors * expected).sum(axis=1).min())
    middle = statistics.median(ratios)
    say(
        f"| {name} | {mine:.1f}/s | {baseline:.1f}/s | {middle:.2f}x "
        f"| {ratios[0]:.2f}-{ratios[-1]:.2f} | {cosine:.5f} |"
    )


def products() -> str:
    """The rate of the tower's largest product in both types, each on all cores."""
    rates = []
    for dtype in (torch.float32, torch.bfloat16):
        x, w = torch.randn(3200, 768).to(dtype), torch.randn(3072, 768).to(dtype)
        with torch.inference_mode():
            run = partial(torch.nn.functional.linear, x, w)
            rates.append(2 * 3200 * 768 * 3072 / min(timed(run) for _ in range(20)) / 1e9)
    return (
        f"Matrix products here: {rates[0]:.0f} GFLOP/s in float32, {rates[1]:.0f} in bf16, "
        f"{rates[1] / rates[0]:.2f}x"
    )


def whole(encoder: TorchEncoder, rows: int, precision: str) -> None:
    """A shard of JPEGs and captions by the worker of `curate embed`, against its parts alone."""
    files, texts = photographs(rows), captions(rows)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        table = pa.table({"uid": [f"{i:032x}" for i in range(rows)], "image": files, "text": texts})
        pq.write_table(table, place / "pool.parquet")
        pool = Pool.open(place / "pool.parquet")
        index_pool(pool, place / "index", executor=LocalExecutor(1))
        spec = EncoderSpec(MODEL, "random", "cpu", precision, BATCH)
        worker = EmbedWorker(pool, place / "index", place / "out", spec)
        worker.encoder.encode_images(torch.zeros(16, 3, 224, 224))
        total = timed(lambda: worker(0))

    def prepare(data: bytes) -> torch.Tensor:
        image = decode(data).image
        assert image is not None
        return encoder.preprocess(image)

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        start = time.perf_counter()
        pixels = torch.stack(list(threads.map(prepare, files)))
        decoding = time.perf_counter() - start
    parts = decoding + timed(lambda: encoder.encode_images(pixels))
    parts += timed(lambda: encoder.encode_texts(texts))
    say(
        f"\n{rows} JPEGs of 340 x 256 with captions by the worker of `curate embed` ({precision}): "
        f"{total:.1f} s. Decoding alone on all cores {decoding:.1f} s ({rows / decoding:.0f}/s); "
        f"decoding, images and texts one after the other {parts:.1f} s"
    )


def main() -> None:
    logging.disable(logging.WARNING)
    numbers = [int(value) for value in sys.argv[1:]]
    n_images, n_texts, repeats = (*numbers, *(128, 512, 3)[len(numbers) :])
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "open_clip_torch"))
    auto = resolve_precision("auto", torch.device("cpu"))
    say(f"{MODEL}, random weights, {os.cpu_count()} cores, {versions}, median of {repeats}.")
    say(f"`--precision auto` is {auto} here. {products()}.\n")
    say("| what | ours | open_clip float32 | ratio | spread | least cosine |\n" + "|---" * 6 + "|")
    pixels = torch.randn(n_images, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    plain, texts = Plain(), captions(n_texts)
    for precision in ("bf16", "fp32"):
        ours = load_encoder(MODEL, "random", device="cpu", precision=precision)
        for work in (ours.encode_images, plain.images):
            work(pixels[:16])
        compare(
            f"{n_images} images, {precision}",
            partial(ours.encode_images, pixels),
            partial(plain.images, pixels),
            n_images,
            repeats,
        )
        compare(
            f"{n_texts} captions of 5-40 tokens, {precision}",
            partial(ours.encode_texts, texts),
            partial(plain.texts, texts),
            n_texts,
            repeats,
        )
    whole(load_encoder(MODEL, "random", device="cpu"), 2 * n_images, auto)


if __name__ == "__main__":
    main()
