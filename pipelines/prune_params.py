"""What the parameters of `curate prune` mean: presets, counts, what decides the result."""

from __future__ import annotations

import math
from dataclasses import asdict, fields
from typing import Any

from curate.prune import PRESETS
from pipelines.config import ModelConfig, PoolConfig, PruneConfig, RunConfig

# They say where the rows come from and how the run goes, not what comes out.
_NOT_RESULT = {
    field.name for base in (PoolConfig, ModelConfig, RunConfig) for field in fields(base)
} - {"seed"} | {"allow_fewer", "download"}


def result_params(config: PruneConfig) -> dict[str, Any]:
    """Return the parameters that decide the result, presets resolved."""
    # allow_fewer and download are not among them: they decide whether there is a result, not which.
    params = {k: v for k, v in asdict(config).items() if k not in _NOT_RESULT}
    return params | prune_options(config) | {"score_col": config.score_col}


def prune_options(config: PruneConfig) -> dict[str, Any]:
    """Return temperature, neighbours and lower bound: the preset's unless given."""
    given = {k: getattr(config, k) for k in ("temperature", "neighbours", "lower", "lower_ratio")}
    given = {k: v for k, v in given.items() if v is not None}
    preset = dict(PRESETS[config.preset])
    if "lower" in given:
        preset.pop("lower_ratio", None)
    return {"lower": 0, "lower_ratio": None} | preset | given


def exact_budget(keep: float, rows: int) -> int:
    """Return floor(keep * rows + 0.5).

    Examples
    --------
    >>> exact_budget(0.28, 12000), exact_budget(0.5, 3), exact_budget(1.0, 7)
    (3360, 2, 7)
    """
    return math.floor(keep * rows + 0.5)


def clip_fraction(config: PruneConfig) -> float:
    """Return the share of the survivors that the CLIP score lets through."""
    return math.sqrt(config.keep) if config.clip_fraction == "auto" else float(config.clip_fraction)
