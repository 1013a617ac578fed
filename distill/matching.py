"""Distribution matching: images on which random networks see what they see on real images."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from curate import progress
from curate.runtime import resolve_device, rng
from distill import recover_state
from distill.distilled_images import DistilledImages
from distill.image_set import ImageSet
from distill.initialise import check_enough
from distill.match_recipes import MatchRecipe, match_recipe_for
from distill.match_step import Draw, RandomNetwork, class_means, distances, draw_step
from distill.prepared import Precision, resolve_precision
from distill.recover import deterministic
from distill.recover_state import Saved
from distill.siamese import Siamese
from distill.teacher import normalise, pixel_range, pixels_of

_CHECKPOINT_SECONDS = 30.0
# Images of 32 pixels, mirrored ones counted, that go through a network at once.
_TOGETHER = {"cpu": 1024, "cuda": 8192}


def match(
    images: ImageSet,
    *,
    ipc: int,
    method: str | MatchRecipe = "datadam",
    iterations: int | None = None,
    flip: bool = True,
    seed: int = 0,
    device: str | torch.device = "auto",
    checkpoint: Path | None = None,
    precision: Precision = "auto",
) -> DistilledImages:
    """Synthesize `ipc` images of every class by distribution matching, without a teacher.

    Every step draws a random network, a batch of real images of each class and, for each class, an
    augmentation that its real and synthetic images share; then it moves the synthetic images to
    where the network's mean embeddings (DM), and its mean attention maps (DataDAM), are those of
    the real ones. DM: Zhao and Bilen 2023, "Dataset Condensation with Distribution Matching",
    WACV. DataDAM: Sajedi et al. 2023, "Efficient Dataset Distillation with Attention Matching",
    ICCV.

    Unlike the published code, pixels are held in the range that an image file can hold. A prefix
    of the ranks is a balanced set, but what is matched is the whole, unless the recipe is `nested`.

    Parameters
    ----------
    images : ImageSet
        Real images, to begin from and to match; each channel is normalised by their moments.
    ipc : int
        Images of each class.
    method : str or MatchRecipe
        A name in `distill.match_recipes.MATCH_RECIPES`, or numbers of your own.
    iterations : int, optional
        Other steps than the recipe's.
    flip : bool
        Match the images together with their mirror images (FYI). The result has none of them.
    seed : int
    device : str or torch.device
    checkpoint : Path, optional
        A file that is written about every 30 seconds and at the end; a run that finds it goes on
        from there, to the same result bit for bit. Remove it when the result is stored.
    precision : {"auto", "bfloat16", "float32", "float64"}
        What networks compute in; ``auto`` is bfloat16 where the processor has it. Pixels and
        distances are float32 in any case (float64 in that one).

    Returns
    -------
    DistilledImages
        `recover_loss` is the last loss of the image's class; there is no teacher, and so neither
        `teacher_confidence` nor `bn_loss`.

    Raises
    ------
    ValueError
        If a class has fewer images than `ipc`, there is one class only, the network has batch
        norm, or a number is out of range.
    curate.errors.FingerprintError
        If the checkpoint is that of another run.

    Examples
    --------
    >>> pixels = np.random.default_rng(0).integers(0, 255, (8, 8, 8, 3), np.uint8)
    >>> toy = ImageSet.of(pixels, [0, 1] * 4)
    >>> match(toy, ipc=2, method="dm", iterations=1, device="cpu").pixels.shape
    (4, 8, 8, 3)
    """
    _check(images, ipc)
    place = resolve_device(device)
    recipe = match_recipe_for(method, size=images.size, ipc=ipc, iterations=iterations, flip=flip)
    dtype = resolve_precision(precision, place)
    together = max(round(_TOGETHER.get(place.type, 1024) * (32 / images.size) ** 2), 1)
    wanted = recover_state.identity(
        recipe, [], None, images, ipc=ipc, seed=seed, precision=str(dtype), together=together
    )
    run = _Matching(recipe, images, ipc, seed, place, dtype, together)
    with deterministic(place):
        _optimise(run, checkpoint, wanted)
    return run.result()


def _check(images: ImageSet, ipc: int) -> None:
    if ipc < 1:
        raise ValueError(f"ipc is {ipc}; it must be at least 1")
    if images.classes < 2:
        raise ValueError("the images have one class; distillation needs at least two")
    check_enough(images, ipc)


def _optimise(run: _Matching, checkpoint: Path | None, wanted: dict[str, Any]) -> None:
    saved = recover_state.load(checkpoint, wanted) if checkpoint else None
    if saved is not None:
        run.load(saved)
    steps, last = run.recipe.iterations, time.monotonic()
    with progress.task("match", total=steps, unit="steps", done=run.next) as advance:
        while run.next < steps:
            run.step()
            advance(1)
            if checkpoint and time.monotonic() - last >= _CHECKPOINT_SECONDS:
                recover_state.save(checkpoint, wanted, run.saved())
                last = time.monotonic()
    if checkpoint:
        recover_state.save(checkpoint, wanted, run.saved())


class _Matching:
    """The state of a run; `step` moves it on by one.

    What a step draws is a function of the seed and its number, so that the pixels, the velocities
    and the number are all that there is to save.
    """

    def __init__(
        self,
        recipe: MatchRecipe,
        images: ImageSet,
        ipc: int,
        seed: int,
        device: torch.device,
        dtype: torch.dtype,
        together: int,
    ) -> None:
        self.recipe, self.images, self.ipc, self.seed = recipe, images, ipc, seed
        self.device, self.dtype, self.together = device, dtype, together
        self.exact = torch.float64 if dtype == torch.float64 else torch.float32
        self.mean, self.std = images.moments()
        low, high = pixel_range(self.mean, self.std)
        self.limits = low.to(device, self.exact), high.to(device, self.exact)
        self.rows = [np.flatnonzero(images.labels == c) for c in range(images.classes)]
        self.resident = _resident(images, device)
        self.network = RandomNetwork(recipe, images, device, dtype)
        self.chosen = np.stack(
            [rng(seed, "match", "begin", c).permutation(r)[:ipc] for c, r in enumerate(self.rows)]
        )
        shape = (images.classes, ipc, 3, images.size, images.size)
        self.x = self._real(self.chosen.ravel()).contiguous().reshape(shape)
        self.velocity = torch.zeros_like(self.x)
        self.loss = torch.full((images.classes,), torch.nan, device=device, dtype=self.exact)
        self.next = 0

    def step(self) -> None:
        """Take one step."""
        drawn = draw_step(
            self.recipe,
            self.rows,
            size=self.images.size,
            ipc=self.ipc,
            seed=self.seed,
            step=self.next,
        )
        self.network.redraw(drawn.network)
        self.velocity.mul_(self.recipe.momentum)
        for classes in self._blocks(drawn.rows):
            self._block(classes, drawn)
        self.x.sub_(self.velocity, alpha=self.recipe.learning_rate)
        self.x.clamp_(*self.limits)
        self.next += 1

    def _blocks(self, rows: Sequence[NDArray[np.int64]]) -> list[list[int]]:
        """Return the classes that go through the network at once."""
        copies = 2 if self.recipe.mirror else 1
        blocks: list[list[int]] = []
        room = 0
        for c, own in enumerate(rows):
            size = copies * max(len(own), self.ipc)
            if size > room:
                blocks.append([])
                room = self.together
            blocks[-1].append(c)
            room -= size
        return blocks

    def _block(self, classes: list[int], drawn: Draw) -> None:
        some = slice(classes[0], classes[-1] + 1)
        rows = [drawn.rows[c] for c in classes]
        real = self._real(np.concatenate(rows))
        x = self.x[some, : drawn.prefix].detach().requires_grad_(True)
        with torch.no_grad():
            wanted = self._means(real, [len(r) for r in rows], classes, drawn.siamese)
        found = self._means(x.flatten(0, 1), [drawn.prefix] * len(rows), classes, drawn.siamese)
        loss = distances(found, wanted, self.recipe)
        (gradient,) = torch.autograd.grad(loss.sum(), x)
        self.velocity[some, : drawn.prefix] += gradient
        self.loss[some] = loss.detach()

    def _means(
        self, x: torch.Tensor, counts: list[int], classes: list[int], siamese: Siamese | None
    ) -> list[torch.Tensor]:
        """Return the class means of the features of images that lie class by class."""
        owner = np.repeat(np.array(classes), counts)
        if self.recipe.mirror:
            # Class by class again, so that a mean is one of neighbours.
            parts = torch.split(x, counts)
            x = torch.cat([half for part in parts for half in (part, part.flip(-1))])
            counts, owner = [2 * count for count in counts], np.repeat(owner, 2)
        if siamese is not None:
            x = siamese(x, torch.from_numpy(owner).to(self.device, non_blocking=True))
        return [class_means(feature, counts) for feature in self.network(x)]

    def _real(self, rows: NDArray[np.int64]) -> torch.Tensor:
        if self.resident is None:
            pixels = self.images.batch(rows, self.device)
        else:
            pixels = self.resident[torch.from_numpy(rows).to(self.device, non_blocking=True)]
        return normalise(pixels, self.mean, self.std).to(self.exact)

    def saved(self) -> Saved:
        """Return all that a step changes; with `load` the run goes on exactly."""
        return Saved(self.next, {}, {"x": self.x, "velocity": self.velocity, "loss": self.loss})

    def load(self, saved: Saved) -> None:
        """Take up the state of an interrupted run."""
        for name, tensor in self.saved().state.items():
            tensor.copy_(saved.state[name])
        self.next = saved.batch

    def result(self) -> DistilledImages:
        """Return the images as they are now."""
        classes, ipc = self.images.classes, self.ipc
        n = classes * ipc
        by_rank = self.x.transpose(0, 1).flatten(0, 1)
        missing = np.full(n, np.nan, np.float32)
        return DistilledImages(
            pixels_of(by_rank, self.mean, self.std).permute(0, 2, 3, 1).cpu().contiguous().numpy(),
            np.arange(n) % classes,
            (np.arange(n) // classes).astype(np.int32),
            np.full(n, "real"),
            self.images.ids[self.chosen.T.ravel()],
            missing,
            self.loss.float().repeat(ipc).cpu().numpy(),
            missing.copy(),
            self.images.class_names,
            self.mean,
            self.std,
        )


def _resident(images: ImageSet, device: torch.device) -> torch.Tensor | None:
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return images.batch(slice(None), device) if images.images.nbytes < free // 4 else None
