"""The checkpoint of recover: one safetensors file, whole or not there."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from curate.errors import FingerprintError, ShardError
from curate.manifest import atomic_path, digest
from distill.image_set import ImageSet
from distill.match_recipes import MatchRecipe
from distill.recipes import Recipe
from distill.teacher import Teacher

_FORMAT = "distill-recover/2"
_SAMPLED = 64
_KINDS = ("finished", "state", "earlier", "student")


@dataclass(frozen=True)
class Saved:
    """Where an interrupted run stood.

    Attributes
    ----------
    batch : int
        Batches of this part that are finished.
    finished : dict of str to tensor
        Results of this part so far; empty before its first batch.
    state : dict of str to tensor
        The batch at hand; empty between batches.
    part : int
        Parts of the ranks that are finished.
    earlier : dict of str to tensor
        Their results.
    student : dict of str to tensor
        Weights of the student of this part; empty before it is trained.
    """

    batch: int = 0
    finished: dict[str, torch.Tensor] = field(default_factory=dict)
    state: dict[str, torch.Tensor] = field(default_factory=dict)
    part: int = 0
    earlier: dict[str, torch.Tensor] = field(default_factory=dict)
    student: dict[str, torch.Tensor] = field(default_factory=dict)


class Checkpoint:
    """The last state that was saved, on disk where there is a path.

    Parameters
    ----------
    path : Path, optional
    wanted : dict
        What decides the result; see `identity`.

    Raises
    ------
    ShardError, FingerprintError
        See `load`.
    """

    def __init__(self, path: Path | None, wanted: dict[str, Any]) -> None:
        self.path, self.wanted = path, wanted
        self.saved = (load(path, wanted) if path else None) or Saved()

    def write(self, **changes: Any) -> None:
        """Replace fields of what is saved."""
        self.saved = replace(self.saved, **changes)
        if self.path is not None:
            save(self.path, self.wanted, self.saved)

    @property
    def beside(self) -> Path | None:
        """Where a student's training is kept while it lasts."""
        return self.path and self.path.with_name(f"{self.path.name}.student")


def identity(
    recipe: Recipe | MatchRecipe,
    teachers: list[Teacher],
    student: Teacher | None,
    images: ImageSet,
    **settings: Any,
) -> dict[str, Any]:
    """Return what decides the result, in plain types; the images by hash of a sample."""
    sampled = np.linspace(0, len(images) - 1, min(_SAMPLED, len(images))).astype(np.int64)
    pixels = torch.from_numpy(np.ascontiguousarray(images.images[sampled]))
    plain: dict[str, Any] = json.loads(
        json.dumps(
            {
                "recipe": asdict(recipe),
                "teachers": [teacher.facts() for teacher in teachers],
                "student": None if student is None else student.facts(),
                "classes": list(images.class_names),
                "images": digest([images.ids.tolist(), images.labels.tolist(), pixels.tolist()]),
                **settings,
            }
        )
    )
    return plain


def save(path: Path, wanted: dict[str, Any], saved: Saved) -> None:
    """Write a checkpoint in place of the last."""
    tensors = {
        f"{kind}.{name}": tensor for kind in _KINDS for name, tensor in getattr(saved, kind).items()
    }
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    header = {"format": _FORMAT, "identity": wanted, "batch": saved.batch, "part": saved.part}
    with atomic_path(path) as temporary:
        save_file(plain, temporary, metadata={"recover": json.dumps(header)})


def load(path: Path, wanted: dict[str, Any]) -> Saved | None:
    """Return the checkpoint of the same run, or None where there is none.

    Raises
    ------
    ShardError
        If the file is not a checkpoint of ours.
    FingerprintError
        If it is that of another run; the message names what differs.
    """
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("recover", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, ValueError, SafetensorError) as error:
        raise ShardError(f"{path} is not a readable checkpoint ({error}); remove it") from error
    if not isinstance(header, dict) or header.get("format") != _FORMAT:
        raise ShardError(f"{path} is not a checkpoint of recover; choose another path")
    found = header["identity"]
    different = sorted(
        key for key in wanted.keys() | found.keys() if wanted.get(key) != found.get(key)
    )
    if different:
        raise FingerprintError(
            f"{path} is the checkpoint of another run; different: {', '.join(different)}. "
            "Remove it, or choose another path"
        )
    parts: dict[str, dict[str, torch.Tensor]] = {kind: {} for kind in _KINDS}
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        parts[part][rest] = tensor
    return Saved(header["batch"], part=header["part"], **parts)
