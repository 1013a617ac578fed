"""`curate demo`: prune a small real pool, spoiled as the web is, and train on what is left.

A small CLIP that is trained on a few scans that can be trusted scores and embeds the pool (the idea
of Fang et al., "Data Filtering Networks", 2023); the very same `prune` as on any pool chooses the
rows; then one model is trained from scratch on the full pool, on a random part of it and on what
was kept, for equally many steps, and tested on scans that neither has seen.
"""

from __future__ import annotations

import os
import shlex
import statistics
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from curate.errors import FingerprintError
from curate.images import decode
from curate.manifest import StepFolder, locked, open_step, read_manifest
from curate.progress import task
from curate.runtime import rng
from curate.selection import Selection
from curate.shards import part_path, read_parts
from pipelines import demo_model, demo_pool, demo_text
from pipelines.demo_model import Pairs
from pipelines.demo_pool import Scans
from pipelines.pruning import prune

#: Nearer than this are copies of a scan here; the model has ten things to tell apart, so two scans
#: of a digit are nearer to each other than two photographs of dogs are to a model of the web.
EPSILON = 0.01
_MOST_WORKERS = 8


@dataclass(frozen=True)
class Contents:
    """What the rows of a set are, by the columns that no stage of the pruning reads.

    Attributes
    ----------
    rows : int
    wrong_captions, junk_images : int
        Rows whose caption names another digit; rows whose image shows nothing.
    distinct_scans : int
        Scans of which there is at least one copy.
    """

    rows: int
    wrong_captions: int
    junk_images: int
    distinct_scans: int


@dataclass(frozen=True)
class DemoResult:
    """What came out.

    Attributes
    ----------
    out, report : Path
        The demo's folder, and the report of the pruning.
    command : tuple of str
        The command line that prunes in the same way.
    keep : float
    counts : mapping of str to int
        Rows per reason, from the ledger.
    before, after : Contents
        Of the pool, and of the kept rows.
    steps : int
        Batches that every model was trained for.
    trusted_accuracy : float
        Zero-shot accuracy of the model that scored the pool; accuracies are in [0, 1].
    accuracy : mapping of str to tuple of float
        Of the models trained on the sets ``full``, ``random`` and ``pruned``, one per seed.
    seconds : mapping of str to float
        Per phase, and ``total``; near zero for what was there already.
    """

    out: Path
    report: Path
    command: tuple[str, ...]
    keep: float
    counts: Mapping[str, int]
    before: Contents
    after: Contents
    steps: int
    trusted_accuracy: float
    accuracy: Mapping[str, tuple[float, ...]]
    seconds: Mapping[str, float]


def run_demo(
    out: Path,
    *,
    seed: int = 0,
    keep: float = 0.28,
    rows: int = 12_000,
    steps: int = 300,
    seeds: int = 3,
    stream: TextIO,
) -> DemoResult:
    """Build a spoiled pool, prune it, train on the result, and write down what came out.

    What an earlier run of the same parameters has finished is used again.

    Parameters
    ----------
    out : Path
        The demo's folder: ``pool/``, ``model/``, ``run/`` (what `prune` writes), ``evaluation/``.
    seed : int
        Seed of everything that is drawn.
    keep : float
        Kept fraction of the pool's rows.
    rows : int
        Rows of the pool.
    steps : int
        Batches that every model is trained for.
    seeds : int
        Models per set, at least 1.
    stream : text file
        Where the story goes.

    Returns
    -------
    DemoResult

    Raises
    ------
    ValueError
        If a number is out of range.
    FingerprintError
        If the folder holds something else; it is left alone.
    BudgetError
        If too few rows survive the first stages of the pruning.
    """
    if min(steps, seeds) < 1 or rows < demo_pool.SHARDS or not 0 < keep < 1:
        raise ValueError(
            f"steps, seeds, rows and keep are {steps}, {seeds}, {rows} and {keep}; at least "
            f"1, 1 and {demo_pool.SHARDS} are needed, and a keep between 0 and 1"
        )
    with locked(out):
        params = {"seed": seed, "keep": keep, "rows": rows, "steps": steps, "seeds": seeds}
        step = _open(out, params)
        result = _Demo(out, stream, seed, keep, rows, steps, seeds).run()
        step.finish()
    return result


def _open(out: Path, params: dict[str, float]) -> StepFolder:
    manifest = read_manifest(out)
    if manifest is not None and (manifest["step"], manifest["params"]) != ("demo", params):
        made = manifest["params"] if manifest["step"] == "demo" else manifest["step"]
        raise FingerprintError(
            f"{out} holds another result ({made}), not that of {params}; it is left alone. "
            "Choose another --out"
        )
    return open_step(
        out, step="demo", step_version=1, params=params, inputs={}, keep_content=True
    )


@dataclass
class _Demo:
    """One run; the methods are its phases, in their order."""

    out: Path
    stream: TextIO
    seed: int
    keep: float
    rows: int
    steps: int
    seeds: int

    def __post_init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def run(self) -> DemoResult:
        """Run the phases and tell of each when it is over."""
        start = time.perf_counter()
        self.say(demo_text.opening())
        trusted, held_out, scans = demo_pool.load_scans(self.seed)
        with self.timed("pool"):
            demo_pool.build_pool(self.out / "pool", scans, seed=self.seed, rows=self.rows)
            pool, decoded = _read(self.out / "pool", demo_pool.SHARDS)
        before = _contents(pool)
        self.say(demo_text.pool_built(before, len(scans), self.seconds["pool"]))
        with self.timed("model"), _one_thread():
            trusted_accuracy = self.train_scorer(trusted, held_out)
        self.say(
            demo_text.model_trained(
                len(trusted), len(held_out), self.steps, trusted_accuracy, self.seconds["model"]
            )
        )
        command = self.command()
        self.say(demo_text.prune_command(command))
        with self.timed("prune"):
            selection = self.prune()
        kept, _ = _read(self.out / "run" / "pool", demo_pool.SHARDS)
        after = _contents(kept)
        self.say(
            demo_text.pruned(selection.counts, self.rows, before, after, self.seconds["prune"])
        )
        with self.timed("train"):
            accuracy = self.evaluate(_pairs(pool, decoded), selection, held_out)
        self.seconds["total"] = time.perf_counter() - start
        result = DemoResult(
            out=self.out,
            report=self.out / "run" / "report.html",
            command=command,
            keep=self.keep,
            counts=selection.counts,
            before=before,
            after=after,
            steps=self.steps,
            trusted_accuracy=trusted_accuracy,
            accuracy=accuracy,
            seconds=self.seconds,
        )
        self.say(demo_text.closing(result))
        return result

    def say(self, text: str) -> None:
        """Write a paragraph of the story at once, so that a reader is not left waiting for it."""
        self.stream.write(text + "\n")
        self.stream.flush()

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Take the time of a phase."""
        start = time.perf_counter()
        yield
        self.seconds[phase] = time.perf_counter() - start
