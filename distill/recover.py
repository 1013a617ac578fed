"""Recover: synthesize images from teachers, by one engine for all methods."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from curate import progress
from curate.runtime import resolve_device
from distill import recover_state
from distill.cudd import joined, parts_of, student_of
from distill.distilled_images import DistilledImages
from distill.engine import Batch
from distill.features import source_features
from distill.groups import Group, merged, plan
from distill.image_set import ImageSet
from distill.initialise import Beginning, check_enough, initialise, names_of
from distill.prepared import Precision, Prepared, ascended, between, placed, resolve_precision
from distill.recipes import Recipe, recipe_for
from distill.recover_state import Checkpoint
from distill.statistics import RealStatistics, real_statistics
from distill.teacher import Teacher, pixel_range, pixels_of

_CHECKPOINT_SECONDS = 30.0
# Images of 32 pixels in a merged batch: enough to fill the processor, and no more.
_MERGED = {"cpu": 100, "cuda": 2048}
_BATCH = 500


def recover(
    teachers: Sequence[Teacher] | Teacher,
    images: ImageSet,
    *,
    ipc: int,
    method: str | Recipe = "default",
    iterations: int | None = None,
    seed: int = 0,
    device: str | torch.device = "auto",
    checkpoint: Path | None = None,
    student: Teacher | None = None,
    precision: Precision = "auto",
    merge: int | None = None,
    graphs: bool = True,
) -> DistilledImages:
    """Synthesize `ipc` images of every class.

    The pixels are optimised so that the teachers see the classes in them and the statistics of
    real images inside; methods differ in their terms, schedules and beginnings (`RECIPES`).
    SRe2L: Yin, Xing, Shen 2023, "Squeeze, Recover and Relabel", NeurIPS.

    Parameters
    ----------
    teachers : Teacher or sequence of Teacher
        Recipes with `round_robin` take them in turn; the others use the first. The result has the
        first one's normalisation.
    images : ImageSet
        Real images, for the beginning and for class-wise and convolution statistics.
    ipc : int
        Images of each class. Every smaller number of ranks is a balanced set too.
    method : str or Recipe
        A name in `distill.recipes.RECIPES`, or numbers of your own.
    iterations : int, optional
        Other steps than the recipe's.
    seed : int
    device : str or torch.device
    checkpoint : Path, optional
        A file that is written about every 30 seconds and at the end; a run that finds it goes on
        from there, to the same result bit for bit. Remove it when the result is stored. While a
        student is trained, a second file lies beside it.
    student : Teacher, optional
        A network trained on what was distilled before, for CUDD: its images oppose this student,
        and no other is trained. By default the recipe's `ranges` say when one is trained on the
        ranks so far.
    precision : {"auto", "bfloat16", "float32", "float64"}
        What networks compute in; ``auto`` is bfloat16 where the processor has it. Pixels, Adam
        and statistics are float32 in any case (float64 in that one).
    merge : int, optional
        The most images of a merged batch of groups. It changes the speed, and the last bits.
    graphs : bool
        Use CUDA graphs where there is CUDA.

    Returns
    -------
    DistilledImages

    Raises
    ------
    ValueError
        If teachers and images do not belong together, or a number is out of range.
    curate.errors.FingerprintError
        If the checkpoint is that of another run.

    Examples
    --------
    >>> from distill.networks import build
    >>> images = ImageSet.of(np.zeros((4, 8, 8, 3), np.uint8), [0, 1, 0, 1])
    >>> model = build("convnet3", classes=2, size=8)
    >>> half = (0.5, 0.5, 0.5)
    >>> teacher = Teacher(model, "convnet3", 8, ("0", "1"), half, half, float("nan"), 0)
    >>> recover([teacher], images, ipc=2, method="sre2l", iterations=1).pixels.shape
    (4, 8, 8, 3)
    """
    teachers = (teachers,) if isinstance(teachers, Teacher) else tuple(teachers)
    _check(teachers, images, ipc, student)
    place = resolve_device(device)
    recipe = recipe_for(method, size=images.size, classes=images.classes, iterations=iterations)
    used = [placed(t, place) for t in (teachers if recipe.round_robin else teachers[:1])]
    dtype = resolve_precision(precision, place)
    most = merge or max(round(_MERGED.get(place.type, 100) * (32 / images.size) ** 2), 1)
    if recipe.begin == "real":
        check_enough(images, ipc)
    wanted = recover_state.identity(
        recipe, used, student, images, ipc=ipc, seed=seed, precision=str(dtype), merge=most
    )
    kept = Checkpoint(checkpoint, wanted)
    run = _Run(recipe, used, images, seed, place, dtype, graphs and not recipe.densify)
    parts = [(0, ipc)] if student is not None else parts_of(recipe, ipc)
    with deterministic(place):
        for first, stop in parts[kept.saved.part :]:
            judge = None if student is None else placed(student, place)
            if first:
                judge = student_of(
                    kept.saved.earlier, used, recipe, seed=seed, device=place, checkpoint=kept
                )
            _optimise_part(run.part(first, stop, judge, kept), most, kept)
        return _result(kept.saved.earlier, run, ipc)


def _check(
    teachers: Sequence[Teacher], images: ImageSet, ipc: int, student: Teacher | None
) -> None:
    if not teachers:
        raise ValueError("no teachers; give at least one, from distill.squeeze")
    if ipc < 1:
        raise ValueError(f"ipc is {ipc}; it must be at least 1")
    if images.classes < 2:
        raise ValueError("the images have one class; distillation needs at least two")
    for teacher in [*teachers, *([student] if student else [])]:
        if teacher.size != images.size:
            raise ValueError(
                f"teacher {teacher.network!r} sees {teacher.size} pixels and the images have "
                f"{images.size}; train it on images of that size"
            )
        if teacher.class_names != images.class_names:
            raise ValueError(_class_difference(teacher, images))


def _class_difference(teacher: Teacher, images: ImageSet) -> str:
    theirs, ours = teacher.class_names, images.class_names
    fix = "bring the images' classes into the teacher's order, or train it on these images"
    if len(theirs) != len(ours):
        return f"teacher {teacher.network!r} has {len(theirs)} classes, the images {len(ours)}"
    place = next(c for c, (a, b) in enumerate(zip(theirs, ours, strict=True)) if a != b)
    return (
        f"class {place} is {theirs[place]!r} to teacher {teacher.network!r} and "
        f"{ours[place]!r} in the images; {fix}"
    )


@contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """Let CUDA take algorithms whose results are the same in every run."""
    if device.type != "cuda":
        yield
        return
    # Else the fastest algorithm of the moment would decide the last bits.
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
        yield


@dataclass(frozen=True)
class _Run:
    recipe: Recipe
    teachers: list[Teacher]
    images: ImageSet
    seed: int
    device: torch.device
    dtype: torch.dtype
    graphs: bool

    def part(self, first: int, stop: int, student: Teacher | None, kept: Checkpoint) -> _Part:
        """Return the work on some ranks; no real image that was used before begins them."""
        begun = initialise(
            self.recipe,
            self.teachers[0],
            self.images,
            ipc=stop - first,
            seed=self.seed,
            device=self.device,
            student=student,
            taken=kept.saved.earlier["sources"].numpy().ravel() if first else None,
        )
        return _Part(**vars(self), student=student, begun=begun, first=first)


@dataclass(frozen=True)
class _Part(_Run):
    student: Teacher | None
    begun: Beginning
    first: int

    def factory(self) -> Callable[[Sequence[Group]], Batch]:
        """Return what makes the batches; teachers are prepared once, adjusted ones each time."""
        features = self._features()
        real = [self._real(teacher) for teacher in self.teachers]
        steady = not self.recipe.ascent_steps
        ready = [self._prepared(t, r) for t, r in zip(self.teachers, real, strict=True)]
        student = self._prepared(self.student, None, tapped=False) if self.student else None

        def make(groups: Sequence[Group]) -> Batch:
            x = self._start(groups)
            networks = ready if steady else self._adjusted(groups[0], x[0], real)
            return Batch(
                groups,
                x,
                recipe=self.recipe,
                networks=networks,
                student=student,
                limits=pixel_range(self.teachers[0].mean, self.teachers[0].std),
                seed=self.seed,
                graphs=self.graphs,
                features=[one[_rows(groups).to(one.device)] for one in features],
            )

        return make

    def _features(self) -> list[torch.Tensor]:
        if not self.recipe.feature_residual:
            return []
        sources = self.begun.sources
        return [source_features(t, self.images, sources, self.device) for t in self.teachers]

    def _start(self, groups: Sequence[Group]) -> torch.Tensor:
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        flat = self.begun.images.flatten(0, 1)
        return flat[_rows(groups).to(flat.device)].to(self.device, wide)

    def _real(self, teacher: Teacher) -> RealStatistics | None:
        recipe = self.recipe
        if not recipe.statistics or not (recipe.class_fraction or recipe.convolution_patch):
            return None
        return real_statistics(
            teacher, self.images, patch=recipe.convolution_patch, device=self.device
        )

    def _prepared(
        self, teacher: Teacher, real: RealStatistics | None, *, tapped: bool = True
    ) -> Prepared:
        return Prepared(
            teacher,
            self.recipe,
            reference=self.teachers[0],
            device=self.device,
            dtype=self.dtype,
            real=real,
            tapped=tapped,
        )

    def _adjusted(
        self, group: Group, x: torch.Tensor, real: list[RealStatistics | None]
    ) -> list[Prepared]:
        labels = torch.from_numpy(group.labels).to(self.device)
        found = []
        for teacher, statistics in zip(self.teachers, real, strict=True):
            affine = between(self.teachers[0], teacher, self.device, torch.float32)
            shown = x.float() if affine is None else x.float() * affine[0] + affine[1]
            adjusted = ascended(
                teacher,
                shown,
                labels,
                steps=self.recipe.ascent_steps,
                radius=self.recipe.ascent_radius,
            )
            found.append(self._prepared(adjusted, statistics))
        return found


def _rows(groups: Sequence[Group]) -> torch.Tensor:
    return torch.from_numpy(np.stack([group.rows for group in groups]))


def _optimise_part(run: _Part, most: int, kept: Checkpoint) -> None:
    """Optimise the images of some ranks, and add them to those that the checkpoint holds."""
    ipc, classes = len(run.begun.images), run.images.classes
    # Adjusted weights belong to one group, so that such groups cannot be merged.
    batches = merged(
        plan(run.recipe, ipc=ipc, classes=classes, first=run.first),
        most_images=1 if run.recipe.ascent_steps else most,
    )
    earlier = joined(kept.saved.earlier, _optimise(run, batches, kept))
    kept.write(
        part=kept.saved.part + 1, earlier=earlier, batch=0, finished={}, state={}, student={}
    )


def _optimise(
    run: _Part, batches: Sequence[Sequence[Group]], kept: Checkpoint
) -> dict[str, torch.Tensor]:
    """Return the pixels and last losses of the images of some ranks."""
    saved = kept.saved
    finished, steps = saved.finished or _unfinished(run), run.recipe.iterations
    make = run.factory() if steps and saved.batch < len(batches) else None
    work = [steps - batch[0].start for batch in batches]
    done = sum(work[: saved.batch])
    if saved.state:
        done += int(saved.state["now"]) - batches[saved.batch][0].start
    with progress.task("recover", total=sum(work), unit="steps", done=done) as advance:
        for number in range(saved.batch, len(batches)):
            if make is not None:
                state = saved.state if number == saved.batch else {}
                keep = _keeper(kept, number, finished)
                _descend(
                    make(batches[number]), batches[number], run, finished, state, keep, advance
                )
    return finished


def _unfinished(run: _Part) -> dict[str, torch.Tensor]:
    begun = run.begun.images.flatten(0, 1)
    first = run.teachers[0]
    pixels = torch.cat(
        [pixels_of(x, first.mean, first.std).cpu() for x in torch.split(begun, _BATCH)]
    )
    missing = torch.full((len(pixels),), torch.nan)
    sources = torch.from_numpy(run.begun.sources)
    return {"pixels": pixels, "loss": missing, "distance": missing.clone(), "sources": sources}


def _keeper(
    kept: Checkpoint, number: int, finished: dict[str, torch.Tensor]
) -> Callable[[Batch], None]:
    last = time.monotonic()

    def keep(batch: Batch) -> None:
        nonlocal last
        if kept.path is None or time.monotonic() - last < _CHECKPOINT_SECONDS:
            return
        kept.write(batch=number, finished=finished, state=batch.state())
        last = time.monotonic()

    return keep


def _descend(
    batch: Batch,
    groups: Sequence[Group],
    run: _Part,
    finished: dict[str, torch.Tensor],
    state: dict[str, torch.Tensor],
    keep: Callable[[Batch], None],
    advance: Callable[[int], None],
) -> None:
    """Take one batch to its end and write what came out into `finished`."""
    if state:
        batch.load(state)
    while batch.next < run.recipe.iterations:
        batch.step()
        advance(1)
        keep(batch)
    rows = torch.from_numpy(np.concatenate([group.rows for group in groups]))
    first, size = run.teachers[0], groups[0].rows.size
    x = batch.x.detach().flatten(0, 1)
    finished["pixels"][rows] = pixels_of(x, first.mean, first.std).cpu()
    finished["loss"][rows] = batch.loss.float().cpu().repeat_interleave(size)
    finished["distance"][rows] = batch.distance.float().cpu().repeat_interleave(size)


@torch.no_grad()
def _result(finished: dict[str, torch.Tensor], run: _Run, ipc: int) -> DistilledImages:
    classes, first = run.images.classes, run.teachers[0]
    n = ipc * classes
    labels = torch.arange(n) % classes
    confidence = []
    for rows in torch.split(torch.arange(n), _BATCH):
        logits = first.model(first.normalise(finished["pixels"][rows].to(run.device)))
        probability = logits.float().softmax(dim=1).cpu()
        confidence.append(probability.gather(1, labels[rows][:, None])[:, 0])
    return DistilledImages(
        finished["pixels"].permute(0, 2, 3, 1).contiguous().numpy(),
        labels.numpy(),
        (np.arange(n) // classes).astype(np.int32),
        np.full(n, run.recipe.begin),
        names_of(run.images, finished["sources"].numpy()),
        torch.cat(confidence).numpy(),
        finished["loss"].numpy(),
        finished["distance"].numpy(),
        run.images.class_names,
        first.mean,
        first.std,
    )
