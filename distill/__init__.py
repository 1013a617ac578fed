"""Distilled datasets: a small set of synthesized images that trains like the whole.

``distill.squeeze`` trains a teacher, ``distill.recover`` synthesizes images from it and
``distill.match`` without one, ``distill.relabel`` records soft labels, ``distill.DistilledSet`` is
the result and ``distill.validate`` its judge.
Names are loaded when they are used.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distill.distilled import DistilledSet, sizes
    from distill.distilled_images import DistilledImages
    from distill.export import export
    from distill.image_set import ImageSet
    from distill.label_maps import LabelMaps, store_label_maps
    from distill.match_recipes import MATCH_RECIPES, MatchRecipe
    from distill.matching import match
    from distill.networks import build
    from distill.randaugment import RandAugment
    from distill.recipes import RECIPES, Recipe, recipe_for
    from distill.recover import recover
    from distill.relabel import attach, relabel
    from distill.replay import ReplayedBatches
    from distill.soft_labels import SoftLabels
    from distill.squeeze import SqueezeConfig, accuracy, squeeze
    from distill.static_labels import with_static_labels
    from distill.stored_labels import store_labels
    from distill.teacher import Teacher
    from distill.validate import Validation, validate
    from distill.view_draw import ViewDraw

__all__ = [
    "MATCH_RECIPES",
    "RECIPES",
    "DistilledImages",
    "DistilledSet",
    "ImageSet",
    "LabelMaps",
    "MatchRecipe",
    "RandAugment",
    "Recipe",
    "ReplayedBatches",
    "SoftLabels",
    "SqueezeConfig",
    "Teacher",
    "Validation",
    "ViewDraw",
    "accuracy",
    "attach",
    "build",
    "export",
    "match",
    "recipe_for",
    "recover",
    "relabel",
    "sizes",
    "squeeze",
    "store_label_maps",
    "store_labels",
    "validate",
    "with_static_labels",
]

_HOMES = {
    "MATCH_RECIPES": "match_recipes",
    "RECIPES": "recipes",
    "DistilledImages": "distilled_images",
    "DistilledSet": "distilled",
    "ImageSet": "image_set",
    "LabelMaps": "label_maps",
    "MatchRecipe": "match_recipes",
    "RandAugment": "randaugment",
    "Recipe": "recipes",
    "ReplayedBatches": "replay",
    "SoftLabels": "soft_labels",
    "SqueezeConfig": "squeeze",
    "Teacher": "teacher",
    "Validation": "validate",
    "ViewDraw": "view_draw",
    "accuracy": "squeeze",
    "attach": "relabel",
    "build": "networks",
    "match": "matching",
    "recipe_for": "recipes",
    "sizes": "distilled",
    "store_label_maps": "label_maps",
    "store_labels": "stored_labels",
    "with_static_labels": "static_labels",
}
_VERBS = ("squeeze", "recover", "relabel", "validate", "export")


class _Verb(ModuleType):
    """A module whose function of the same name is called by calling the module."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return getattr(self, self.__name__.rpartition(".")[2])(*arguments, **options)


class _Package(ModuleType):
    """The package, whose `distill.squeeze` is a module to who imports it and can be called."""

    def __setattr__(self, name: str, value: Any) -> None:
        # Python binds a submodule here whenever it is first imported, over any function.
        if name in _VERBS and isinstance(value, ModuleType):
            value.__class__ = _Verb
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name in _VERBS:
        return import_module(f"distill.{name}")
    if name in _HOMES:
        return getattr(import_module(f"distill.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'distill' has no attribute {name!r}")
