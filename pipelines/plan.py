"""`curate plan`: what `curate prune` with the same flags would cost on this machine.

A small part of the pool is pruned in a folder that is removed again, and the functions that compare
rows are timed on it.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from curate.embeddings import image_path
from curate.runtime import resolve_device
from curate.sharded_rows import StoredRows
from pipelines import plan_kernels as kernels
from pipelines.dry_run import bytes_text
from pipelines.embed_workers import EncoderSpec
from pipelines.outputs import default_out
from pipelines.plan_config import PlanConfig
from pipelines.plan_sample import (
    MadeUpRows,
    SampleRun,
    encoder_pool,
    made_up_pool,
    quiet,
    sample_pool,
    sample_run,
    untrained,
)
from pipelines.plan_steps import Rates, Step, Workload, predict, workload
from pipelines.source import open_pool, resolve_source
from pipelines.stages import effective_dedup_keep, ranks_by_distance

_ENCODER_PASSES = 2  # of the rows that are embedded to time it


@dataclass(frozen=True)
class Plan:
    """What a run would cost, on what it was measured, and what was taken for granted."""

    work: Workload
    steps: tuple[Step, ...]
    machine: dict[str, Any]
    assumptions: tuple[str, ...]

    @property
    def whole(self) -> Step:
        """The steps in all."""
        steps = self.steps
        return Step(
            "in all",
            self.work.rows,
            sum(step.read_bytes for step in steps),
            sum(step.written_bytes for step in steps),
            max(step.memory_bytes for step in steps),
            sum(step.seconds for step in steps),
        )

    def to_json(self) -> str:
        """Return the plan for machines: one object."""
        total = {name: value for name, value in asdict(self.whole).items() if name != "step"}
        sizes = {"clusters": self.work.clusters, "dedup_clusters": self.work.dedup_clusters}
        steps = [asdict(step) for step in self.steps]
        notes = {"machine": self.machine, "assumptions": self.assumptions}
        return json.dumps(total | sizes | {"steps": steps} | notes)

    def to_text(self) -> str:
        """Return the plan for people: a table."""
        lines = [("step", "rows", "read", "written", "memory", "time")]
        lines += [_cells(step) for step in (*self.steps, self.whole)]
        widths = [max(len(line[column]) for line in lines) for column in range(6)]
        table = [
            "  ".join(f"{c:{s}{w}}" for c, s, w in zip(line, "<>>>>>", widths, strict=True))
            for line in lines
        ]
        facts = ", ".join(f"{name} {value}" for name, value in self.machine.items())
        notes = [f"- {line}" for line in self.assumptions]
        return "\n".join([*table, "", f"measured on {facts}", *notes, "nothing was written"])


def _cells(step: Step) -> tuple[str, str, str, str, str, str]:
    sizes = (bytes_text(n) for n in (step.read_bytes, step.written_bytes, step.memory_bytes))
    read, written, memory = sizes
    return step.step, f"{step.rows:,}", read, written, memory, duration(step.seconds)


def duration(seconds: float) -> str:
    """Return a time for people.

    Examples
    --------
    >>> duration(0.25), duration(4000), duration(200_000)
    ('0.2 s', '1:06:40', '2 days, 7:33:20')
    """
    return f"{seconds:.1f} s" if seconds < 100 else str(timedelta(seconds=round(seconds)))


def run_plan(config: PlanConfig) -> Plan:
    """Measure, and say what `curate prune` would cost.

    Raises
    ------
    ValueError
        If this machine has not the device, or as many GPUs, as the plan is for.
    PoolError
        If `curate prune` could not use the pool.
    """
    check_gpus(config)
    with tempfile.TemporaryDirectory(prefix=".curate-plan-", dir=_place(config)) as name:
        return _measured(config, Path(name))


def check_gpus(config: PlanConfig) -> None:
    """Refuse to plan for devices that are not here.

    Raises
    ------
    ValueError
    """
    import torch

    device, there = resolve_device(config.device), torch.cuda.device_count()
    if config.gpus > there:
        raise ValueError(
            f"--gpus {config.gpus} asked for, but torch sees {there} CUDA device(s) here; a plan "
            "is measured, not guessed: run the same curate plan on the machine with the GPUs, or "
            "leave --gpus out for this one"
        )
    if config.gpus and device.type != "cuda":
        raise ValueError(f"--gpus {config.gpus} and --device {config.device} contradict each other")


def _place(config: PlanConfig) -> Path | None:
    """Return a folder on the disk of the run's output; None, the system's, if it is read-only."""
    out = config.out or (default_out(config.pool, "pruned") if config.pool else Path("plan"))
    folder = out.absolute().parent
    while not folder.is_dir():
        folder = folder.parent
    return folder if os.access(folder, os.W_OK) else None


def _measured(config: PlanConfig, folder: Path) -> Plan:
    clock = time.perf_counter
    pool = open_pool(config) if config.pool else made_up_pool(config, folder / "made-up")
    source = resolve_source(pool, config)
    small, stand_in = sample_pool(pool), source
    load = encode = 0.0
    if isinstance(source, EncoderSpec):
        rows = min(small.shards[0].rows, _ENCODER_PASSES * source.batch_size)
        few, encoded = encoder_pool(small, rows, folder / "few"), folder / "encoder"
        with quiet():
            load, encode = kernels.time_encoder(untrained(source), few, encoded, clock)
        width = StoredRows(image_path(encoded / "second", 0)).shape[1]
        stand_in = MadeUpRows(width, small.mapping.text is not None)
    run = sample_run(config, small, stand_in, folder)
    if encode:  # the small run's embeddings were made up
        seconds = {step: line for step, line in run.seconds.items() if step != "embed"}
        run = replace(run, seconds=seconds)
    work = workload(config, pool, run, source)
    rates = _rates(config, work, run, folder)
    rates = replace(rates, load_encoder=load, encode=encode)
    memory, disk = kernels.free_memory(), shutil.disk_usage(folder).free
    steps = predict(work, rates, run, memory)
    machine = {
        "device": str(resolve_device(config.device)),
        "cores": os.cpu_count(),
        "free memory": bytes_text(memory),
        "disk": f"{bytes_text(round(rates.disk_read))}/s",
    }
    plan = Plan(work, steps, machine, ())
    notes = (*_shortages(plan.whole, memory, disk), *_found(work, rates, run))
    notes += (*_taken(config, work, memory, made_up=stand_in is not source),)
    return replace(plan, assumptions=notes)


def _rates(config: PlanConfig, work: Workload, run: SampleRun, folder: Path) -> Rates:
    dedup = compare = None
    if work.dedup_clusters:
        keep = effective_dedup_keep(config, scored=run.has_scores)
        dedup = kernels.time_kmeans(
            run.embeddings,
            work.dedup_clusters,
            work.fit_rows,
            config,
            distances=ranks_by_distance(keep),
        )
        size = work.usable / work.dedup_clusters
        compare = kernels.time_compare(run.embeddings, size, config)
    return Rates(
        start_up=kernels.time_start(),
        cluster=kernels.time_kmeans(run.embeddings, work.clusters, work.left, config),
        disk_read=kernels.time_disk(folder, time.perf_counter),
        dedup=dedup,
        compare=compare,
    )


def _shortages(whole: Step, memory: int, disk: int) -> Iterator[str]:
    """Say what this machine has too little of."""
    for needed, free, of in (
        (whole.memory_bytes, memory, "memory"),
        (whole.written_bytes, disk, "disk"),
    ):
        if needed > free:
            needs, has = bytes_text(needed), bytes_text(free)
            yield f"it does not fit: it takes {needs} of {of}, and {has} are free"


def _found(work: Workload, rates: Rates, run: SampleRun) -> Iterator[str]:
    """Say what the small run found that the large one is taken to find too."""
    yield f"the other rows are like the first {run.rows:,}: as many duplicates and broken ones"
    dedup, size = rates.dedup, work.usable / max(work.dedup_clusters, 1)
    iterations = f"{rates.cluster.iterations}"
    if dedup is not None:
        iterations = f"{dedup.iterations} (dedup) and {iterations} (cluster)"
        yield (
            f"dedup: {work.dedup_clusters:,} clusters of {size:,.0f} rows on average, as uneven as "
            "those of that size on the sample (the time goes with the squares of their sizes)"
        )
    yield (
        f"k-means gains too little to go on after {iterations} iterations, as on a sample; more "
        "where clusters are less clear, up to --kmeans-iterations"
    )
    if not run.memory_bytes:
        yield "memory: only what goes with the rows; no peak can be measured on this system"
    yield from (f"curate prune would warn: {warning}" for warning in run.warnings)


def _taken(config: PlanConfig, work: Workload, memory: int, *, made_up: bool) -> Iterator[str]:
    """Say what was not measured at all."""
    if made_up or not config.pool:
        yield "embeddings were made up: a real pool can have more duplicates and skew"
    if not config.pool:
        yield (
            f"the pool is not there: columns {', '.join(config.columns)}; {config.dim} dimensions, "
            f"{config.text_bytes} bytes of text, {bytes_text(config.image_bytes)} an image"
        )
    if work.pass_bytes >= memory:
        yield (
            "the embeddings do not fit in memory: each pass reads them from the disk, reckoned as "
            "if in one go; rows of one cluster are scattered, which a slow disk minds"
        )
    if config.workers > 1:
        yield f"measured with one process, though --workers is {config.workers}"
    if config.gpus:
        yield "all GPUs embed, clustering is reckoned with one; they do not wait for the decoders"
