"""Curriculum over ranks: later images oppose a student of the earlier ones (CUDD).

Ma et al. 2024, "Curriculum Dataset Distillation". The first ranks begin as images that the teacher
gets right; then a student is trained on what was distilled, and the next ranks begin as images
that it gets wrong and are pulled to where it errs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import suppress

import torch

from curate import progress
from curate.runtime import rng
from distill.networks import build
from distill.recipes import Recipe
from distill.recover_state import Checkpoint
from distill.replay import Source
from distill.student_batches import TaughtBatches
from distill.students import StudentConfig, train_student
from distill.teacher import Teacher
from distill.view_draw import ViewDraw

_BATCH, _TEMPERATURE = 128, 20.0


def parts_of(recipe: Recipe, ipc: int) -> list[tuple[int, int]]:
    """Return the first rank of each part of the images, and the one after its last.

    Examples
    --------
    >>> parts_of(Recipe("x", begin="real", ranges=(20, 50)), 30)
    [(0, 20), (20, 30)]
    """
    ends = [rank for rank in recipe.ranges if rank < ipc]
    return list(zip([0, *ends], [*ends, ipc], strict=True))


def student_of(
    earlier: dict[str, torch.Tensor],
    teachers: Sequence[Teacher],
    recipe: Recipe,
    *,
    seed: int,
    device: torch.device,
    checkpoint: Checkpoint,
) -> Teacher:
    """Return the student of the images so far; trained, or from the checkpoint.

    It has the first teacher's architecture and learns the teachers' soft labels of crops with
    CutMix, in batches of 128, at a temperature of 20.

    Parameters
    ----------
    earlier : dict of str to tensor
        ``pixels``, (n, 3, size, size) uint8, sorted by rank, then by class.
    teachers : sequence of Teacher
    recipe : Recipe
        Says for how many epochs.
    seed : int
    device : torch.device
    checkpoint : Checkpoint
        Keeps the student, and its training while it lasts.
    """
    first = teachers[0]
    if not checkpoint.saved.student:
        found = _trained(earlier["pixels"], teachers, recipe, seed, device, checkpoint)
        checkpoint.write(student={name: v.cpu() for name, v in found.model.state_dict().items()})
    if checkpoint.beside is not None:  # also where a run was killed just before
        with suppress(FileNotFoundError):
            checkpoint.beside.unlink()
    # Built anew in any case, so that a resumed run has it in the same memory layout.
    model = build(first.network, classes=first.classes, size=first.size)
    model.load_state_dict(checkpoint.saved.student)
    return Teacher(
        model.to(device),
        first.network,
        first.size,
        first.class_names,
        first.mean,
        first.std,
        float("nan"),
        recipe.student_epochs,
    )


def _trained(
    pixels: torch.Tensor,
    teachers: Sequence[Teacher],
    recipe: Recipe,
    seed: int,
    device: torch.device,
    checkpoint: Checkpoint,
) -> Teacher:
    first, n = teachers[0], len(pixels)
    number = int(rng(seed, "recover", "student", n).integers(2**31))
    shown = pixels.permute(0, 2, 3, 1).contiguous().numpy()
    labels = (torch.arange(n) % first.classes).numpy()
    identity = hashlib.sha256(shown.data).hexdigest()
    source = Source(shown, labels, first.class_names, first.mean, first.std, identity)
    draw = ViewDraw(epochs=recipe.student_epochs, batch_size=min(_BATCH, n), seed=number)
    config = StudentConfig(
        epochs=recipe.student_epochs, schedule="cosine", temperature=_TEMPERATURE
    )
    with progress.task(f"student of {n // first.classes} ranks", total=1, unit="students") as done:
        student = train_student(
            TaughtBatches(source, draw, teachers, device),
            first.network,
            config,
            labels="soft",
            size=first.size,
            seed=number,
            device=device,
            checkpoint=checkpoint.beside,
        )
        done(1)
    return student


def joined(
    earlier: dict[str, torch.Tensor], part: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return the results of the parts so far and of one more."""
    return {name: torch.cat([earlier[name], new]) if earlier else new for name, new in part.items()}
