"""What is asked of `curate distill`, checked before anything is written."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import nn

from curate.errors import PoolError
from curate.pool import Pool
from distill.match_recipes import MATCH_RECIPES, MatchRecipe, match_recipe_for
from distill.networks import build
from distill.recipes import Recipe, recipe_for
from pipelines.distill_config import DistillConfig
from pipelines.labelled_images import check_images, image_size
from pipelines.pool_labels import Labels, check_classes

# Those that change no result, and those that the pools' fingerprints stand for.
_NOT_RESULT = {"out", "device", "workers", "overwrite", "dry_run", "max_failed", "pool"}
_NOT_RESULT |= {"test_pool", "image_col", "text_col", "url_col", "uid_col", "score_col"}
_NOT_RESULT |= {"embedding_col", "image_root"}


class Request:
    """What is asked for, checked as far as labels, headers and one image can tell.

    Attributes
    ----------
    pool : Pool
    labels : Labels
    test : (Pool, Labels) or None
        In the class order of the pool.
    size : int
        Pixels of a side.
    recipe : Recipe or MatchRecipe
    """

    def __init__(self, config: DistillConfig, pool: Pool) -> None:
        self.config, self.pool = config, pool
        check_images(pool, config.pool)
        self.labels = Labels.read(pool, config.label_col)
        check_classes(self.labels, self.labels.counts, config.ipc)
        self.size = config.size or image_size(pool, config.max_pixels)
        self.recipe = self._recipe()
        self._check_networks()
        self.test = None if config.test_pool is None else self._test(config.test_pool)

    def _recipe(self) -> Recipe | MatchRecipe:
        config, size = self.config, self.size
        if config.method in MATCH_RECIPES:
            return match_recipe_for(
                config.method, size=size, ipc=config.ipc, iterations=config.iterations
            )
        classes = len(self.labels.names)
        return recipe_for(config.method, size=size, classes=classes, iterations=config.iterations)

    def _check_networks(self) -> None:
        """Show each network an image now, rather than after the pool has been decoded."""
        recipe, names = self.recipe, self.config.network
        for name in names:
            self._network(name)
        if isinstance(recipe, MatchRecipe):
            self._network(recipe.network)
        elif recipe.iterations and recipe.statistics:
            for name in names if recipe.round_robin else names[:1]:
                if not any(isinstance(m, nn.BatchNorm2d) for m in self._network(name).modules()):
                    raise ValueError(
                        f"--network {name} has no batch norm, whose statistics --method "
                        f"{recipe.name} matches; use another network, or --method rded"
                    )

    def _network(self, name: str) -> nn.Module:
        size = self.size
        network = build(name, classes=len(self.labels.names), size=size)
        try:
            with torch.inference_mode():
                network.eval()(torch.zeros(1, 3, size, size))
        except (RuntimeError, AssertionError) as error:
            raise ValueError(
                f"--network {name} does not take images of {size} x {size} pixels ({error}); use "
                "another network, or a larger --size"
            ) from error
        return network

    def _test(self, name: str) -> tuple[Pool, Labels]:
        config = self.config
        pool = Pool.open(name, image_col=config.image_col, image_root=config.image_root)
        check_images(pool, name)
        try:
            labels = Labels.read(pool, config.label_col)
        except PoolError as error:
            raise PoolError(f"--test-pool {name}: {error}") from error
        return pool, labels.ordered_as(self.labels.names)

    @property
    def identity(self) -> dict[str, Any]:
        """What `open_step` is to know the result by."""
        config = self.config
        params = {
            field.name: getattr(config, field.name)
            for field in fields(config)
            if field.name not in _NOT_RESULT
        }
        params |= {"label_col": self.labels.column, "size": self.size}
        inputs = {"pool": self.pool.fingerprint()}
        if self.test is not None:
            inputs["test_pool"] = self.test[0].fingerprint()
        return {"step": "distill", "step_version": 1, "params": params, "inputs": inputs}
