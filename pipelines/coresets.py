"""`curate coreset`: from a pool to a coreset of exactly the size asked for.

embed -> choose rows by a method of `coreset.METHODS` -> write the ledger with weights and ranks,
the chosen rows and the report.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from coreset.base import Coreset
from coreset.methods import Method
from coreset.selecting import select
from curate.embeddings import OK, Embeddings
from curate.errors import BudgetError, PoolError
from curate.manifest import StepFolder, check_step, locked, open_step
from curate.pool import Pool
from curate.progress import task
from curate.runtime import resolve_device
from curate.selection import LEDGER, Selection
from curate.sharded_rows import ShardedRows
from curate.shards import missing_parts, read_array, write_array
from pipelines.config import CoresetConfig
from pipelines.coreset_params import (
    Inputs,
    check_size,
    checked_method,
    coreset_budget,
    device_option,
    file_fingerprints,
    method_options,
    needs_embeddings,
    read_selected,
    result_params,
    size_flag,
)
from pipelines.executor import Executor, make_executor
from pipelines.ledger import Fates, undecodable
from pipelines.outputs import check_out, default_out, with_paths
from pipelines.pool_rows import PoolRows, nullable, row_set_fingerprint
from pipelines.runs import check_enough, embed_rows, finish_run, index_rows, is_whole
from pipelines.source import (
    Source,
    describe_source,
    load_early,
    open_pool,
    pool_path,
    resolve_source,
    source_fingerprint,
)

logger = logging.getLogger(__name__)

_MOST_CLASSES = 200  # that the manifest counts one by one
_FILES = ("probabilities", "dynamics", "selected")


def select_coreset(
    pool: str | Path | Pool,
    *,
    method: str,
    budget: int | None = None,
    fraction: float | None = None,
    options: Mapping[str, Any] | None = None,
    **flags: Any,
) -> Selection:
    """Select exactly ``budget`` rows of a pool, or ``floor(fraction * rows + 0.5)``.

    Parameters
    ----------
    pool : str, Path or Pool
        What `curate.Pool.open` takes, or a pool that is open.
    method : str
        A name in `coreset.METHODS`.
    budget : int, optional
        Rows to choose; either this or `fraction`.
    fraction : float, optional
        Fraction of the pool's rows to choose, in (0, 1].
    options : mapping, optional
        What the method itself takes: ``{"metric": "cosine"}``.
    **flags
        The other fields of `pipelines.config.CoresetConfig`, which are the flags of
        ``curate coreset``: out, model, embeddings, label_col, per_class, seed, ...

    Returns
    -------
    curate.Selection
        The ledger, with the weight, rank (order of choice) and gain of every row that is kept;
        ``path`` is the run's folder, ``path / "pool"`` holds the kept rows.

    Raises
    ------
    ValueError, TypeError
        If the method or an option is unknown, or what the method needs is not given.
    PoolError
        If the pool cannot be opened, or a column or file does not fit it.
    FingerprintError
        If the output folder holds the result of other parameters and ``overwrite`` is off.
    BudgetError
        If fewer rows can be used than are to be chosen, and ``allow_fewer`` is off.
    """
    opened = pool if isinstance(pool, Pool) else None
    name = pool_path(pool) if isinstance(pool, Pool) else str(pool)
    flags = {k: Path(v) if k in _FILES and v is not None else v for k, v in flags.items()}
    config = CoresetConfig(
        pool=name,
        method=method,
        budget=budget,
        fraction=fraction,
        option=tuple(f"{key}={value}" for key, value in (options or {}).items()),
        **with_paths(flags),
    )
    return run_coreset(config, opened)


def run_coreset(config: CoresetConfig, opened: Pool | None = None) -> Selection:
    """Select as the configuration says; see `select_coreset`."""
    resolve_device(config.device)  # a wrong one is told before hours of work, not after
    method = checked_method(config)
    pool = opened or open_pool(config)
    check_size(config, len(pool))
    out = config.out or default_out(config.pool, "coreset")
    check_out(config.pool, out)
    source = resolve_source(pool, config) if needs_embeddings(config, method) else None
    inputs = Inputs.read(pool, config)
    before = read_selected(config.selected)
    identity = _identity(config, pool, source, before)
    with locked(out):
        check_step(out, **identity, overwrite=config.overwrite)
        if source is not None:
            load_early(source, out / "embeddings")
        run = open_step(out, **identity, overwrite=config.overwrite, keep_content=True)
        if run.complete and is_whole(run):
            check_enough(run.manifest, allow_fewer=config.allow_fewer, lower=size_flag(config))
            logger.info("%s is complete already; nothing to do", out)
        else:
            executor = make_executor(config.executor, config.workers, config.device)
            _Choice(config, method, pool, source, inputs, before, run, executor).run()
    return Selection.open(out)


def _identity(
    config: CoresetConfig, pool: Pool, source: Source | None, before: pa.Array | None
) -> dict[str, Any]:
    inputs = {"pool": pool.fingerprint(), **file_fingerprints(config)}
    described: dict[str, Any] = {}
    if source is not None:
        described = describe_source(source)
        inputs["embeddings"] = source_fingerprint(source)
    if before is not None:
        content = "\n".join(sorted(before.to_pylist()))
        inputs["selected"] = hashlib.sha256(content.encode()).hexdigest()
    params = result_params(config) | described
    return {"step": "coreset", "step_version": 1, "params": params, "inputs": inputs}


class _Choice:
    """One run; the methods are its stages, in their order."""

    def __init__(
        self,
        config: CoresetConfig,
        method: Method,
        pool: Pool,
        source: Source | None,
        inputs: Inputs,
        before: pa.Array | None,
        run: StepFolder,
        executor: Executor,
    ) -> None:
        self.config, self.method, self.pool, self.source = config, method, pool, source
        self.inputs, self.before = inputs, before
        self.step, self.folder, self.executor = run, run.path, executor
        self.asked = self.budget = coreset_budget(config, len(pool))
        self.warnings: list[str] = []

    def run(self) -> None:
        """Run what is not there yet."""
        rows = index_rows(self.pool, self.folder, self.executor)
        fates = Fates(len(rows))
        features, detail = self.embed(rows, fates)
        selected = self.find_selected(rows, fates)
        self.require(fates)
        self.say_what_labels_do()
        step, chosen = self.choose(fates, features, selected)
        kept = np.zeros(len(rows), dtype=bool)
        kept[chosen.indices] = True
        usable = fates.alive.copy()
        fates.drop("coreset", {"over_budget": ~kept})
        fates.keep_the_rest()
        ledger = self.write_ledger(rows, fates, chosen, detail)
        finish_run(
            self.step,
            rows,
            ledger,
            fates,
            self.executor,
            self.config,
            budget=self.asked,
            warnings=self.warnings,
            facts=step.manifest["facts"],
            classes=self.count_classes(usable, kept),
        )

    def embed(
        self, rows: PoolRows, fates: Fates
    ) -> tuple[ShardedRows | None, pa.ChunkedArray | pa.Array]:
        """Return the features, and drop the rows that have none."""
        if self.source is None:
            return None, pa.nulls(len(rows), pa.string())
        _, embeddings = embed_rows(rows, self.folder, self.source, self.executor)
        metadata = embeddings.metadata(["status", "detail", "text_status"])
        causes = undecodable(metadata["status"])
        if self.config.modality == "text":
            causes["no_caption"] = pc.not_equal(metadata["text_status"], OK).to_numpy()
        fates.drop("decode", causes)
        return self.features(embeddings), metadata["detail"]

    def features(self, embeddings: Embeddings) -> ShardedRows:
        """Return the embeddings that are asked for."""
        if self.config.modality == "image":
            return embeddings.image
        if embeddings.text is None:
            raise PoolError(
                "--modality text needs embeddings of captions, and there are none: name the "
                "captions with --text-col, and a model that has a text tower"
            )
        return embeddings.text

    def find_selected(self, rows: PoolRows, fates: Fates) -> NDArray[np.int64]:
        """Return the rows that are selected already, and drop them from the candidates."""
        if self.before is None:
            return np.empty(0, np.int64)
        strange = self.before.filter(pc.invert(pc.is_in(self.before, value_set=rows.uids)))
        if len(strange):
            raise PoolError(
                f"--selected {self.config.selected}: {len(strange):,} of {len(self.before):,} uids "
                f"are not in the pool, the first is {strange[0].as_py()!r}"
            )
        already = pc.is_in(rows.uids, value_set=self.before).to_numpy(zero_copy_only=False)
        usable = np.flatnonzero(already & fates.alive)
        if len(usable) < len(self.before):
            self.warn(f"{len(self.before) - len(usable):,} rows of --selected have no embedding")
        fates.drop("selected", {"already_selected": already})
        return usable

    def require(self, fates: Fates) -> None:
        """Check that enough rows are left for the budget."""
        left = int(fates.alive.sum())
        if left >= self.budget:
            return
        dropped = [f"{count:,} {reason}" for reason, count in fates.counts().items() if reason]
        counts = (
            f"{self.budget:,} of {len(self.pool):,} rows are to be chosen, but only {left:,} can "
            f"be used ({', '.join(dropped) or 'there are no more'})"
        )
        if not self.config.allow_fewer:
            flag = "--budget" if self.config.fraction is None else "--fraction"
            raise BudgetError(
                f"{counts}. Lower {flag}, or pass --allow-fewer to take what there is"
            )
        self.warn(counts)
        self.budget = left

    def warn(self, message: str) -> None:
        """Say it now and in the manifest."""
        logger.warning("%s", message)
        self.warnings.append(message)

    def say_what_labels_do(self) -> None:
        """Warn where classes are given and change nothing."""
        uses = {"labels", "gradients"} & {*self.method.needs}
        if self.config.label_col and not uses and self.config.per_class is None:
            self.warn(
                f"method {self.method.name} does not read --label-col; pass --per-class "
                "proportional or balanced to choose inside each class"
            )

    def choose(
        self, fates: Fates, features: ShardedRows | None, selected: NDArray[np.int64]
    ) -> tuple[StepFolder, Coreset]:
        """Choose the rows, or read what an interrupted run has chosen."""
        folder = self.folder / "coreset"
        step = open_step(
            folder,
            step="choose",
            step_version=1,
            params={"budget": self.budget},
            inputs={"run": self.step.fingerprint, "rows": row_set_fingerprint(fates.alive)},
            overwrite=True,
        )
        rows, weights, gains = (folder / f"{name}.npy" for name in ("rows", "weights", "gains"))
        if not (step.complete and rows.exists() and weights.exists() and gains.exists()):
            chosen = self.select(np.flatnonzero(fates.alive), features, selected)
            write_array(rows, chosen.indices)
            write_array(weights, chosen.weights)
            write_array(gains, chosen.gains)
            facts = {name: float(value) for name, value in chosen.facts.items()}
            step.finish(facts={k: v if math.isfinite(v) else None for k, v in facts.items()})
        return step, Coreset(read_array(rows), read_array(weights), read_array(gains))

    def select(
        self,
        candidates: NDArray[np.int64],
        features: ShardedRows | None,
        selected: NDArray[np.int64],
    ) -> Coreset:
        """Run the method on the rows that can be used; the result has row numbers of the pool."""
        if self.budget == 0:
            return Coreset.of([])
        usable = np.union1d(candidates, selected)
        with task("coreset", total=self.budget) as advance:
            x = features
            if features is not None and len(usable) < len(features):
                x = features.subset(usable)
            try:
                found = select(
                    x,
                    self.budget,
                    method=self.method.name,
                    selected=np.searchsorted(usable, selected),
                    per_class=self.config.per_class,
                    seed=self.config.seed,
                    **self.inputs.of(usable),
                    **method_options(self.config),
                    **device_option(self.config, self.method),
                )
            except (ValueError, TypeError) as error:
                raise ValueError(
                    f"{error} (what is embedded is kept: correct it, and pass --overwrite)"
                ) from error
            advance(self.budget)
        return Coreset(usable[found.indices], found.weights, found.gains, found.facts)

    def write_ledger(
        self, rows: PoolRows, fates: Fates, chosen: Coreset, detail: pa.ChunkedArray | pa.Array
    ) -> StepFolder:
        """Write one row per pool row: its fate, and of the chosen ones weight, rank and gain."""
        folder = self.folder / "selection"
        step = open_step(
            folder,
            step="select",
            step_version=1,
            params={},
            inputs={"run": self.step.fingerprint, "kept": row_set_fingerprint(fates.alive)},
            overwrite=True,
            beside=True,
        )
        if not step.complete or missing_parts(folder, rows.parts):
            rows.write(folder, ledger_columns(fates, chosen, detail))
            step.finish(rows=len(rows), parts=rows.parts, counts=fates.counts())
        return step

    def count_classes(
        self, usable: NDArray[np.bool_], kept: NDArray[np.bool_]
    ) -> list[dict[str, Any]] | None:
        """Return the rows of each class that could be used and that are kept."""
        labels, classes = self.inputs.labels, self.inputs.classes
        if labels is None or len(classes) > _MOST_CLASSES:
            return None
        counts = [np.bincount(labels[mask], minlength=len(classes)) for mask in (usable, kept)]
        return [
            {"class": str(name), "rows": int(rows), "kept": int(chosen)}
            for name, rows, chosen in zip(classes, *counts, strict=True)
        ]


def ledger_columns(
    fates: Fates, chosen: Coreset, detail: pa.ChunkedArray | pa.Array
) -> dict[str, Any]:
    """Return the columns of the ledger but uid: those of `curate.selection.LEDGER`, and gain."""
    n = fates.rows
    kept = fates.alive
    rank, weight = np.zeros(n, np.int32), np.zeros(n, np.float32)
    gain = np.full(n, np.nan)
    rank[chosen.indices] = np.arange(len(chosen), dtype=np.int32)
    weight[chosen.indices] = chosen.weights
    gain[chosen.indices] = chosen.gains
    columns: dict[str, Any] = {
        field.name: pa.nulls(n, field.type) for field in LEDGER if field.name != "uid"
    }
    return columns | {
        "kept": pa.array(kept),
        "weight": pa.array(weight),
        "reason": fates.reason(),
        "detail": detail,
        "rank": nullable(rank, kept, pa.int32()),
        "gain": nullable(gain, np.isfinite(gain), pa.float64()),
    }
