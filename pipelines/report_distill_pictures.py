"""The pictures of a distilled set's report: some of its images, and what each began as."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from curate.manifest import atomic_path, digest, open_step, read_manifest
from distill.initialise import initialise
from distill.teacher import Teacher, pixels_of
from pipelines.distilled_rows import SET, DistilledRows

if TYPE_CHECKING:
    from distill.image_set import ImageSet

BEGINNINGS = "beginnings"
MOST_EXAMPLES = 12
SIDE = 96
_MOST_CLASSES = 30
# Base64 makes four bytes of three: the report stays below 4 MB even if every picture is noise.
_MOST_BYTES = 2_500_000
_BYTES_BESIDE_PIXELS = 600

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Grid:
    """Which images a report shows: the first of some classes, so many that it stays small.

    Attributes
    ----------
    classes : (k,) int64
        Class numbers; where there are many, evenly spaced.
    ranks : int
        Images of each, from rank 0 on.
    count : int
        All classes of the set.
    """

    classes: NDArray[np.int64]
    ranks: int
    count: int

    @classmethod
    def of(cls, rows: DistilledRows, examples: int) -> Grid:
        """Return the grid of at most `examples` images per class."""
        count = len(rows.class_names)
        shown = min(count, _MOST_CLASSES)
        classes = np.linspace(0, count - 1, shown).round().astype(np.int64)
        side = min(rows.size, SIDE)
        pairs = _MOST_BYTES // (2 * (3 * side * side + _BYTES_BESIDE_PIXELS))
        return cls(classes, min(rows.ipc, examples, max(pairs // shown, 1)), count)

    @property
    def rows(self) -> NDArray[np.int64]:
        """Positions in the set, ascending."""
        every = np.arange(self.ranks)[:, None] * self.count + self.classes
        flat: NDArray[np.int64] = every.ravel()
        return flat


@dataclass(frozen=True)
class Picture:
    """One image of the grid.

    Attributes
    ----------
    row : int
        Its position in the set.
    init_kind, init_id : str
        What it began as.
    pixels : (side, side, 3) uint8
    begun : (side, side, 3) uint8 or None
        What it began as; None if the run did not keep it.
    """

    row: int
    init_kind: str
    init_id: str
    pixels: Pixels
    begun: Pixels | None


def keep_beginnings(
    run: Path, train: ImageSet, teachers: Sequence[Teacher], *, recipe: Any, seed: int
) -> None:
    """Keep what the images that a report shows began as, in a folder of the run.

    Whole real images are looked up; noise and patches are made again by the same function of the
    same seed, which costs the choice of the patches but no step of recovery. A recipe without
    steps leaves the images as they began, and nothing is kept.

    Parameters
    ----------
    run : Path
        The run's folder, with its distilled set.
    train : ImageSet
        The real images.
    teachers : sequence of Teacher
    recipe : Recipe
        With the same beginning.
    seed : int
    """
    if not recipe.iterations:
        return
    rows = DistilledRows.open(run / SET)
    wanted = Grid.of(rows, MOST_EXAMPLES).rows
    begun_as = _begun_as(rows, wanted)
    folder = run / BEGINNINGS
    step = open_step(
        folder,
        step="beginnings",
        step_version=1,
        params={"side": min(rows.size, SIDE)},
        inputs={"images": _identity(rows, wanted, begun_as)},
        overwrite=True,
    )
    path = folder / "pixels.npy"
    if step.complete and path.exists():
        return

    found = _looked_up(wanted, begun_as, train)
    missing = [place for place, row in enumerate(wanted.tolist()) if row not in found]
    if missing:
        again = _made_again(train, teachers[0], recipe, wanted[missing], ipc=rows.ipc, seed=seed)
        # Under the kind and the id that the set names, or not at all.
        found |= {
            row: pixels
            for place, (row, (of, pixels)) in zip(missing, again.items(), strict=True)
            if of == begun_as[place]
        }
    found = dict(sorted(found.items()))
    shown = [_thumbnail(pixels) for pixels in found.values()]
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.save(file, np.stack(shown) if shown else np.empty((0, 1, 1, 3), np.uint8))
    step.finish(rows=list(found))


def _begun_as(rows: DistilledRows, wanted: NDArray[np.int64]) -> list[tuple[str, str]]:
    read = rows.read(wanted.tolist(), "init_kind", "init_id")
    return [(row["init_kind"], row["init_id"]) for row in read]


def _identity(
    rows: DistilledRows, wanted: NDArray[np.int64], begun_as: list[tuple[str, str]]
) -> str:
    pixels = hashlib.sha256(rows.pixels(wanted.tolist()).tobytes()).hexdigest()
    return digest([wanted.tolist(), begun_as, pixels])


def _looked_up(
    wanted: NDArray[np.int64], begun_as: list[tuple[str, str]], train: ImageSet
) -> dict[int, Pixels]:
    """Return the whole real images."""
    place = {uid: row for row, uid in enumerate(train.ids.tolist())}
    return {
        row: np.asarray(train.images[place[name]])
        for row, (kind, name) in zip(wanted.tolist(), begun_as, strict=True)
        if kind == "real" and name in place
    }


def _made_again(
    train: ImageSet,
    teacher: Teacher,
    recipe: Any,
    wanted: NDArray[np.int64],
    *,
    ipc: int,
    seed: int,
) -> dict[int, tuple[tuple[str, str], Pixels]]:
    """Return noise or patches, with their kind and id, by their position in the set."""
    device = next(teacher.model.parameters()).device
    if recipe.begin == "noise":  # a rank of which does not depend on those behind it
        ipc = int(wanted.max()) // train.classes + 1
    begun = initialise(recipe, teacher, train, ipc=ipc, seed=seed, device=device)
    chosen = begun.images.flatten(0, 1)[torch.from_numpy(wanted).to(device)]
    pixels = pixels_of(chosen, teacher.mean, teacher.std).permute(0, 2, 3, 1).cpu().numpy()
    return {
        row: ((str(begun.kind[row]), str(begun.ids[row])), image)
        for row, image in zip(wanted.tolist(), pixels, strict=True)
    }


def _thumbnail(pixels: Pixels) -> Pixels:
    if len(pixels) <= SIDE:
        return pixels
    return np.asarray(Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.LANCZOS))


def collect_grid(
    run: Path, rows: DistilledRows, *, examples: int
) -> tuple[Grid, dict[int, Picture]]:
    """Read the images of the grid and, where the run kept it, what each began as.

    Parameters
    ----------
    run : Path
        The run's folder.
    rows : DistilledRows
        Its distilled set.
    examples : int
        The most images per class.

    Returns
    -------
    (Grid, dict of int to Picture)
        The pictures by their position in the set.

    Raises
    ------
    ShardError
        If the set is damaged.
    """
    grid = Grid.of(rows, examples)
    wanted = grid.rows
    begun = _kept(run / BEGINNINGS, rows)
    shown = zip(wanted.tolist(), _begun_as(rows, wanted), rows.pixels(wanted.tolist()), strict=True)
    return grid, {
        row: Picture(row, kind, name, _thumbnail(pixels), begun.get(row))
        for row, (kind, name), pixels in shown
    }


def _kept(folder: Path, rows: DistilledRows) -> dict[int, Pixels]:
    """Return what `keep_beginnings` kept of this set; nothing if it is gone or of another."""
    manifest = read_manifest(folder) if folder.is_dir() else None
    if manifest is None or not manifest["complete"]:
        return {}
    wanted = Grid.of(rows, MOST_EXAMPLES).rows
    identity = _identity(rows, wanted, _begun_as(rows, wanted))
    try:
        pixels = np.load(folder / "pixels.npy", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return {}
    whole = pixels.dtype == np.uint8 and len(pixels) == len(manifest.get("rows", ()))
    if manifest["inputs"] != {"images": identity} or not whole:
        return {}
    return dict(zip(manifest["rows"], pixels, strict=True))
