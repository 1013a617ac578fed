"""`--dry-run`: the steps, rows and bytes of a run, from footers and headers alone."""

from __future__ import annotations

from pathlib import Path

from curate.embeddings import Embeddings
from curate.pool import Pool
from pipelines.config import CoresetConfig, EmbedConfig, PruneConfig
from pipelines.coreset_params import (
    Inputs,
    check_size,
    checked_method,
    coreset_budget,
    method_options,
    needs_embeddings,
)
from pipelines.distill_config import DistillConfig
from pipelines.embed_workers import EncoderSpec
from pipelines.outputs import default_out
from pipelines.prune_params import clip_fraction, exact_budget, prune_options
from pipelines.source import Source, open_pool, resolve_source
from pipelines.stages import dedup_clusters, prune_clusters_count

_LEDGER_BYTES = 80  # a row of the ledger, roughly, before compression


def describe_embed(config: EmbedConfig) -> str:
    """Return what `curate embed` would do."""
    pool = open_pool(config)
    source = resolve_source(pool, config)
    out = config.out or default_out(config.pool, "embeddings")
    return "\n".join([*_head(pool, config.pool), _embed_line(pool, source), f"writes    {out}"])


def describe_prune(config: PruneConfig) -> str:
    """Return what `curate prune` would do."""
    pool = open_pool(config)
    source = resolve_source(pool, config)
    rows, budget = len(pool), exact_budget(config.keep, len(pool))
    out = config.out or default_out(config.pool, "pruned")
    options = prune_options(config)
    lower = options["lower"] if options["lower_ratio"] is None else options["lower_ratio"]
    lines = [
        *_head(pool, config.pool),
        _index_line(pool),
        _embed_line(pool, source),
        _score_line(pool, source, config),
    ]
    if config.dedup_mode != "none":
        lines.append(
            f"dedup     up to {rows:,} rows in {dedup_clusters(config, rows):,} clusters, "
            f"epsilon {config.epsilon}, {config.dedup_mode}, keeps {config.dedup_keep}"
        )
    lines += [
        f"cluster   k-means, at most {prune_clusters_count(config, rows):,} clusters, "
        f"at most {config.kmeans_iterations} iterations, all rows",
        f"prune     temperature {options['temperature']}, {options['neighbours']} neighbours, "
        f"lower bound {lower}, {config.which} first",
        *_tail(pool, budget, out),
    ]
    return "\n".join(lines)


def describe_coreset(config: CoresetConfig) -> str:
    """Return what `curate coreset` would do."""
    method = checked_method(config)
    pool = open_pool(config)
    out = config.out or default_out(config.pool, "coreset")
    check_size(config, len(pool))
    embed = "embed     nothing to do: the method reads no embeddings"
    if needs_embeddings(config, method):
        embed = _embed_line(pool, resolve_source(pool, config))
    Inputs.read(pool, config)
    inside = f", classes {config.per_class}" if config.per_class else ""
    options = "".join(f", {name} {value}" for name, value in method_options(config).items())
    lines = [
        *_head(pool, config.pool),
        _index_line(pool),
        embed,
        f"coreset   {method.name} ({method.paper}) on {', '.join(method.needs)}{inside}{options}",
        *_tail(pool, min(coreset_budget(config, len(pool)), len(pool)), out),
    ]
    return "\n".join(lines)


def describe_distill(config: DistillConfig) -> str:
    """Return what `curate distill` would do."""
    from pipelines.distill_params import Request

    pool = open_pool(config)
    request = Request(config, pool)
    size, recipe, labels = request.size, request.recipe, request.labels
    images = config.ipc * len(labels.names)
    lines = [
        *_head(pool, config.pool),
        f"classes   {len(labels.names):,} in {labels.column}, {labels.counts.min():,} to "
        f"{labels.counts.max():,} rows each",
        f"decode    {size} x {size} pixels, "
        f"{bytes_text(int(labels.counts.sum()) * size * size * 3)}",
        f"squeeze   {', '.join(config.network)}, {config.squeeze_epochs:,} epochs",
        f"recover   {images:,} images ({config.ipc} per class) by {recipe.name}, "
        f"{recipe.iterations:,} steps",
        f"relabel   {config.label_epochs:,} epochs of {images:,} views",
    ]
    if config.validate_epochs:
        lines.append(f"validate  students of {config.validate_epochs:,} epochs, 3 seeds")
    out = config.out or default_out(config.pool, "distilled")
    return "\n".join([*lines, f"writes    {out}", "nothing was written: this was a dry run"])


def _index_line(pool: Pool) -> str:
    how = "column" if pool.mapping.uid else "derived from the content"
    return f"index     {len(pool):,} uids ({how})"


def _tail(pool: Pool, budget: int, out: Path) -> list[str]:
    return [
        f"export    {budget:,} rows, about {bytes_text(pool.nbytes * budget // len(pool))}",
        f"writes    {out} (ledger about {bytes_text(len(pool) * _LEDGER_BYTES)})",
        "nothing was written: this was a dry run",
    ]


def _head(pool: Pool, name: str) -> list[str]:
    return [
        f"pool      {name}: {len(pool):,} rows in {len(pool.shards):,} shards, "
        f"{bytes_text(pool.nbytes)}",
        f"columns   {pool.mapping.describe()}",
    ]


def _embed_line(pool: Pool, source: Source) -> str:
    if isinstance(source, EncoderSpec):
        tag = f" {source.pretrained}" if source.pretrained else ""
        towers = "images and captions" if pool.mapping.text else "images"
        return (
            f"embed     {len(pool):,} {towers} with {source.model}{tag}, "
            f"{source.precision} on {source.device}"
        )
    if isinstance(source, Embeddings):
        return f"embed     nothing to do: {source.path}"
    width = source.rows_of(pool.shards[0])[0].shape[1]
    size = len(pool) * width * 2
    return (
        f"embed     import {len(pool):,} x {width} embeddings ({source.kind}), {bytes_text(size)}"
    )


def _score_line(pool: Pool, source: Source, config: PruneConfig) -> str:
    fraction = clip_fraction(config)
    if config.score_col or not isinstance(source, EncoderSpec):
        origin = f"column {pool.mapping.score}" if pool.mapping.score else "the embeddings, if any"
    else:
        origin = "image and caption embeddings" if pool.mapping.text else "nothing: no captions"
    return f"score     CLIP score from {origin}; the top {fraction:.3f} of the survivors stays"


def bytes_text(count: int) -> str:
    """Return a size for people.

    Examples
    --------
    >>> bytes_text(900), bytes_text(27_500_000)
    ('900 B', '27.5 MB')
    """
    if count < 1000:
        return f"{count} B"
    power = min((len(str(count)) - 1) // 3, 4)
    return f"{count / 1000**power:.1f} {('kB', 'MB', 'GB', 'TB')[power - 1]}"
