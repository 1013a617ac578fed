"""Which images are optimised together: groups that share a crop, and merged batches of groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from distill.recipes import Recipe


@dataclass(frozen=True)
class Group:
    """Images whose statistics are one and that share a crop, flip and roll at every step.

    Attributes
    ----------
    name : (int, int)
        Its first rank and first class: what its random stream is called.
    rows : (B,) int64
        Positions in the distilled set, which is sorted by rank, then by class.
    labels : (B,) int64
        Images of one class lie next to each other.
    per_class : int
        How many those are.
    start : int
        The step at which the group joins.
    """

    name: tuple[int, int]
    rows: NDArray[np.int64]
    labels: NDArray[np.int64]
    per_class: int
    start: int


def plan(recipe: Recipe, *, ipc: int, classes: int, first: int = 0) -> list[Group]:
    """Return the groups of a run; each image is in one.

    Parameters
    ----------
    recipe : Recipe
    ipc, classes : int
    first : int
        The rank of the first image of each class, which names the groups; rows count from 0.

    Examples
    --------
    >>> from distill.recipes import RECIPES
    >>> [group.labels.tolist() for group in plan(RECIPES["sre2l"], ipc=2, classes=3)]
    [[0, 1, 2], [0, 1, 2]]
    """
    parts = min(recipe.early_late, ipc)
    found = []
    for part, ranks in enumerate(np.array_split(np.arange(ipc), parts)):
        start = part * (recipe.iterations // parts)
        for rank_block, class_block in _blocks(recipe, ranks, classes):
            labels = np.repeat(class_block, len(rank_block))
            rows = np.tile(rank_block, len(class_block)) * classes + labels
            name = (first + int(rank_block[0]), int(class_block[0]))
            found.append(Group(name, rows, labels, len(rank_block), start))
    return found


def _blocks(
    recipe: Recipe, ranks: NDArray[np.int64], classes: int
) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    most = recipe.batch_images
    together = len(ranks) if recipe.grouping == "class" else 1
    rank_blocks = np.array_split(ranks, -(-len(ranks) // min(together, most)))
    per_block = max(most // max(map(len, rank_blocks)), 1)
    class_blocks = np.array_split(np.arange(classes), -(-classes // per_block))
    if recipe.grouping == "class":
        return [(r, c) for c in class_blocks for r in rank_blocks]
    return [(r, c) for r in rank_blocks for c in class_blocks]


def merged(groups: Sequence[Group], *, most_images: int) -> list[list[Group]]:
    """Return batches of groups of one shape that start together.

    Parameters
    ----------
    groups : sequence of Group
    most_images : int
        Images of a batch; a group that is larger is a batch alone.
    """
    kinds: dict[tuple[int, int, int], list[Group]] = {}
    for group in groups:
        kinds.setdefault((group.start, len(group.rows), group.per_class), []).append(group)
    batches = []
    for (_, size, _), same in kinds.items():
        together = max(most_images // size, 1)
        count = -(-len(same) // together)
        batches += [[same[i] for i in part] for part in np.array_split(np.arange(len(same)), count)]
    return batches
