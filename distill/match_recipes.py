"""The named methods of distribution matching: numbers for `distill.match`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from types import MappingProxyType

from distill.siamese import OPERATIONS, Operation

_FROM = {"iterations": 0, "learning_rate": 0, "batch_real": 1, "power": 1}


@dataclass(frozen=True)
class MatchRecipe:
    """All numbers of a matching method.

    Attributes
    ----------
    name : str
        What it is called.
    iterations : int
        Steps, each with a random network of its own; 0 leaves the images as they began.
    learning_rate, momentum : float
        SGD's, on the normalised pixels; the rate is constant.
    batch_real : int
        Real images of each class in a step; all of them where a class has fewer.
    network : str
        Name for `distill.networks.build`: ``convnet3-in`` or ``convnet4-in``, without batch norm.
    embedding : float
        Weight of the squared distance between the mean embeddings, the features before the head.
    attention : float
        Weight of the squared distances between the mean attention maps of every ReLU block but
        the last; 0 is off.
    power : int
        Power p of the features in an attention map ``sum over channels of |F|^p``. The DataDAM
        paper has 4, its published code 1.
    augment : tuple of str
        Operations of differentiable siamese augmentation; a step takes one of them for each class,
        the same for real and synthetic images. Empty is off.
    mirror : bool
        Append their mirror images to both batches before that (FYI).
    nested : bool
        Match the first m images of every class, with an m drawn for each step, so that prefixes
        are matched too (the aim of MDC). Off, as published, the set is matched as a whole.

    Raises
    ------
    ValueError
        If a number is outside of its range.
    """

    name: str
    iterations: int = 20000
    learning_rate: float = 1.0
    momentum: float = 0.5
    batch_real: int = 256
    network: str = "convnet3-in"
    embedding: float = 1.0
    attention: float = 0.0
    power: int = 4
    augment: tuple[Operation, ...] = OPERATIONS
    mirror: bool = True
    nested: bool = False

    def __post_init__(self) -> None:
        for field, least in _FROM.items():
            if getattr(self, field) < least:
                raise ValueError(f"{field} is {getattr(self, field)}; it must be at least {least}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum is {self.momentum}; it must be in [0, 1)")
        if min(self.embedding, self.attention) < 0 or not self.embedding + self.attention > 0:
            raise ValueError(
                f"embedding is {self.embedding} and attention {self.attention}; they must not be "
                "negative, and one of them above 0"
            )
        for name in self.augment:
            if name not in OPERATIONS:
                raise ValueError(f"augment has {name!r}; use some of {', '.join(OPERATIONS)}")


MATCH_RECIPES: Mapping[str, MatchRecipe] = MappingProxyType(
    {
        "dm": MatchRecipe("dm"),  # Zhao and Bilen 2023
        "datadam": MatchRecipe(  # Sajedi et al. 2023
            "datadam", iterations=8000, batch_real=64, attention=100.0, embedding=1.0
        ),
    }
)


def match_recipe_for(
    method: str | MatchRecipe,
    *,
    size: int,
    ipc: int,
    iterations: int | None = None,
    flip: bool = True,
) -> MatchRecipe:
    """Return the numbers of a matching method.

    Parameters
    ----------
    method : str or MatchRecipe
        A name in `MATCH_RECIPES`; a MatchRecipe is taken as it is.
    size : int
        Pixels of a side: above 48 the network has four blocks, above 112 DataDAM weighs the
        embedding twice.
    ipc : int
        Images per class: above 50 DataDAM takes ten times the learning rate.
    iterations : int, optional
        Other steps than the recipe's.
    flip : bool
        False switches `mirror` off.

    Raises
    ------
    ValueError
        If the name is unknown, or the steps are negative.

    Examples
    --------
    >>> match_recipe_for("datadam", size=64, ipc=10).network
    'convnet4-in'
    """
    recipe = method if isinstance(method, MatchRecipe) else _named(method, size, ipc)
    if not flip:
        recipe = replace(recipe, mirror=False)
    return recipe if iterations is None else replace(recipe, iterations=iterations)


def _named(name: str, size: int, ipc: int) -> MatchRecipe:
    if name not in MATCH_RECIPES:
        near = get_close_matches(name, MATCH_RECIPES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"method {name!r} is not one of {', '.join(MATCH_RECIPES)}{hint}")
    recipe = MATCH_RECIPES[name]
    if size > 48:
        recipe = replace(recipe, network="convnet4-in")
    if name == "datadam" and size > 112:
        recipe = replace(recipe, embedding=2 * recipe.embedding)
    if name == "datadam" and ipc > 50:
        recipe = replace(recipe, learning_rate=10 * recipe.learning_rate)
    return recipe
