"""The named methods: each is one set of numbers for the engine of `distill.recover`.

The numbers are those of the published code or, where marked, what this package fills in. Sizes up
to 48 pixels take the CIFAR numbers, up to 112 those of Tiny ImageNet, above those of ImageNet.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from types import MappingProxyType
from typing import Any, Literal

from distill.curriculum import CROPS, CURRICULA, CropKind, Curriculum
from distill.match_recipes import MATCH_RECIPES

Beginning = Literal["noise", "real", "patch"]
Choice = Literal["random", "lowest", "median", "correct"]
Grouping = Literal["rank", "class"]

_CHOICES: Mapping[str, tuple[str, ...]] = {
    "begin": ("noise", "real", "patch"),
    "choice": ("random", "lowest", "median", "correct"),
    "grouping": ("rank", "class"),
    "crop": CROPS,
    "curriculum": CURRICULA,
}
_COUNTS = ("batch_images", "patch_factor", "patch_crops", "early_late", "stages", "student_epochs")
_SHARES = ("class_fraction", "convolution_drop", "momentum", "stage_keep", "flatness_decay")


@dataclass(frozen=True)
class Recipe:
    """All numbers of a method.

    Attributes
    ----------
    name : str
        What it is called.
    iterations : int
        Steps; 0 leaves the images as they began.
    learning_rate : float
        Adam's, with a cosine to 0 over the steps.
    betas, epsilon : (float, float), float
        Adam's.
    batch_images : int
        The most images of one group: those that share a crop and whose statistics are one.
    grouping : {"rank", "class"}
        A group is one image of each class, or all images of one or more classes.
    begin : {"noise", "real", "patch"}
        What images begin as: N(0, 1), whole real images, or the best crops of real images, put
        together to `patch_factor` squared of them.
    choice : {"random", "lowest", "median", "correct"}
        Which real images or crops: any; by the teacher's loss the lowest, or the middle; those
        that the teacher gets right (and the student, where there is one, wrong).
    patch_factor, patch_crops, patch_candidates, patch_scale : int, int, int, (float, float)
        Patches along a side of an image, crops tried on each real image, real images tried in
        each class, and the area of a crop.
    crop, curriculum, milestone, scale, pad, flip, jitter
        What a step shows: see `distill.curriculum.draw`.
    cross_entropy : float
        Weight of the teacher's cross-entropy.
    statistics, first_multiplier, variance_weight : float
        Weight of the batch-norm statistics; that of the first layer, relative; that of variances
        beside means.
    class_fraction : float
        How much of the statistics term is measured against the statistics of the group's classes
        instead of the running ones, in [0, 1].
    convolution_patch, convolution_drop : int, float
        Side of the patches whose statistics are matched at convolutions (0 is off), and the
        chance that a convolution is left out of a step.
    momentum : float
        Weight of the past in the moving average of the statistics; 0 is off.
    densify, densify_temperature : float
        Weight and temperature of data densification.
    residual : float
        Weight of the squared distance to the image that each began as.
    feature_residual : float
        Weight of the squared distance of the teacher's features from those of the real images that
        each began as.
    flatness, flatness_decay, flatness_temperature : float
        Weight of the divergence from what the teacher says of a moving average of the image, how
        much of that average is the past, and the temperature of both sides.
    adversarial : float
        Weight of the student's ``-log(1 - p(label))``; needs a student.
    ranges : tuple of int
        Ranks at which another part of the images begins: it waits for the ones before, on which a
        student is trained that judges its beginning and that its adversarial term opposes. Empty
        is one part of all ranks.
    student_epochs : int
        Epochs of these students.
    total_variation, image_norm : float
        Weights of the image priors.
    early_late : int
        Parts of the ranks that begin one after another, evenly over the run.
    stages, stage_keep : int, float
        Parts of the run; at the end of each but the last, an image becomes `stage_keep` of itself
        and the rest of what it began as, and Adam begins anew.
    small_view : float
        Every second stage sees views of this fraction of the size; 1 is off.
    round_robin : bool
        Take the teachers in turn; otherwise the first alone.
    ascent_steps, ascent_radius : int, float
        Steps of ascent of each group on its own copy of the teacher's weights, and their length
        in all.

    Raises
    ------
    ValueError
        If a number is outside of its range.
    """

    name: str
    iterations: int = 1000
    learning_rate: float = 0.25
    betas: tuple[float, float] = (0.5, 0.9)
    epsilon: float = 1e-8
    batch_images: int = 100
    grouping: Grouping = "rank"
    begin: Beginning = "noise"
    choice: Choice = "random"
    patch_factor: int = 1
    patch_crops: int = 5
    patch_candidates: int = 300
    patch_scale: tuple[float, float] = (0.08, 1.0)
    crop: CropKind = "resized"
    curriculum: Curriculum = "constant"
    milestone: float = 1.0
    scale: tuple[float, float] = (0.08, 1.0)
    pad: int = 4
    flip: bool = True
    jitter: tuple[int, int] = (0, 0)
    cross_entropy: float = 1.0
    statistics: float = 0.01
    first_multiplier: float = 10.0
    variance_weight: float = 1.0
    class_fraction: float = 0.0
    convolution_patch: int = 0
    convolution_drop: float = 0.0
    momentum: float = 0.0
    densify: float = 0.0
    densify_temperature: float = 4.0
    residual: float = 0.0
    feature_residual: float = 0.0
    flatness: float = 0.0
    flatness_decay: float = 0.99
    flatness_temperature: float = 4.0
    adversarial: float = 0.0
    ranges: tuple[int, ...] = ()
    student_epochs: int = 150
    total_variation: float = 0.0
    image_norm: float = 0.0
    early_late: int = 1
    stages: int = 1
    stage_keep: float = 1.0
    small_view: float = 1.0
    round_robin: bool = False
    ascent_steps: int = 0
    ascent_radius: float = 0.0

    def __post_init__(self) -> None:
        for field, allowed in _CHOICES.items():
            value = getattr(self, field)
            if value not in allowed:
                raise ValueError(f"{field} is {value!r}; use one of {', '.join(allowed)}")
        for field in _COUNTS:
            if getattr(self, field) < 1:
                raise ValueError(f"{field} is {getattr(self, field)}; it must be at least 1")
        for field in _SHARES:
            if not 0 <= getattr(self, field) <= 1:
                raise ValueError(f"{field} is {getattr(self, field)}; it must be in [0, 1]")
        for one in fields(self):
            value = getattr(self, one.name)
            if isinstance(value, int | float) and value < 0:
                raise ValueError(f"{one.name} is {value}; it must not be negative")
        self._check_schedules()
        self._check_beginning()

    def _check_schedules(self) -> None:
        if self.curriculum != "constant" and not 0 < self.milestone <= 1:
            raise ValueError(f"milestone is {self.milestone}; it must be in (0, 1]")
        for field in ("scale", "patch_scale"):
            low, high = getattr(self, field)
            if not 0 < low <= high <= 1:
                raise ValueError(f"{field} is {(low, high)}; it must be 0 < low <= high <= 1")
        if self.jitter[0] > self.jitter[1]:
            raise ValueError(f"jitter is {self.jitter}; the first must not be above the second")
        if not 0 < self.small_view <= 1:
            raise ValueError(f"small_view is {self.small_view}; it must be in (0, 1]")
        for field in ("flatness_temperature", "densify_temperature"):
            if not getattr(self, field) > 0:
                raise ValueError(f"{field} is {getattr(self, field)}; it must be above 0")

    def _check_beginning(self) -> None:
        if self.feature_residual and self.begin == "noise":
            raise ValueError(
                "feature_residual keeps images near real ones, and these begin from noise: use "
                "begin='real' or 'patch', or feature_residual=0"
            )
        steps = zip((0, *self.ranges), self.ranges, strict=False)
        if not all(before < rank for before, rank in steps):
            raise ValueError(f"ranges is {self.ranges}; they must be above 0 and increase")
        if self.ranges and self.begin != "real":
            raise ValueError(
                f"ranges choose real images and begin is {self.begin!r}: use begin='real', or "
                "ranges=()"
            )


_SRE2L = Recipe("sre2l", crop="none", flip=False, jitter=(0, 4))
_CDA = Recipe("cda", curriculum="cosine", jitter=(0, 4))
_MEDIUM: Mapping[str, Any] = {"begin": "patch", "choice": "median"}

# At 32 pixels. The published SRe2L code for CIFAR rolls but neither crops nor flips.
RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {
        # Section 8 of the notes: real patches, cosine crops, residual injection.
        "default": replace(
            _CDA,
            name="default",
            iterations=2000,
            begin="patch",
            choice="lowest",
            stages=4,
            stage_keep=0.5,
            round_robin=True,
        ),
        "sre2l": _SRE2L,  # Yin, Xing, Shen 2023
        "cda": _CDA,  # Yin and Shen 2024
        "g-vbsm": Recipe(  # Shao et al. 2024
            "g-vbsm",
            iterations=4000,
            learning_rate=0.05,
            grouping="class",
            crop="padded",
            # The published roll of up to 32 pixels covers the whole of a 32-pixel image.
            jitter=(0, 32),
            convolution_patch=4,
            convolution_drop=0.4,
            momentum=0.8,
            densify=1.0,
            round_robin=True,
        ),
        "dwa": replace(  # Du et al. 2024
            _SRE2L,
            name="dwa",
            begin="real",
            variance_weight=11.0,
            ascent_steps=12,
            ascent_radius=0.015,
        ),
        "cudd": Recipe(  # Ma et al. 2024
            "cudd",
            iterations=4000,
            begin="real",
            choice="correct",
            residual=1.0,
            adversarial=1.0,
            ranges=(20, 50, 100),
        ),
        "rded": Recipe("rded", iterations=0, begin="patch", choice="lowest"),  # Sun et al. 2024
        # Shao et al. 2024. The published scripts leave flatness off; the paper's weight is 0.25.
        "edc": Recipe(
            "edc",
            iterations=2000,
            learning_rate=0.05,
            grouping="class",
            begin="real",
            crop="padded",
            class_fraction=0.5,
            convolution_patch=4,
            convolution_drop=0.4,
            momentum=0.8,
            round_robin=True,
        ),
        "delt": Recipe(  # Shen et al. 2024
            "delt",
            iterations=4000,
            curriculum="cosine",
            early_late=8,
            **_MEDIUM,
        ),
        "fadrm": Recipe(  # Cui et al. 2025
            "fadrm",
            iterations=2000,
            jitter=(0, 4),
            stages=4,
            stage_keep=0.5,
            round_robin=True,
            **_MEDIUM,
        ),
    }
)

_TINY: Mapping[str, Mapping[str, Any]] = {
    "default": {"jitter": (-4, 4)},
    "sre2l": {
        "iterations": 4000,
        "learning_rate": 0.1,
        "statistics": 1.0,
        "crop": "resized",
        "flip": True,
        "jitter": (-4, 4),
    },
    "cda": {"iterations": 4000, "learning_rate": 0.4, "statistics": 0.05, "jitter": (-4, 4)},
    "dwa": {
        "iterations": 2000,
        "learning_rate": 0.1,
        "batch_images": 200,
        "crop": "resized",
        "flip": True,
        "jitter": (-4, 4),
    },
}
_IMAGENET: Mapping[str, Mapping[str, Any]] = {
    "default": {"jitter": (0, 32), "patch_factor": 2},
    "sre2l": {"iterations": 4000, "crop": "resized", "flip": True, "jitter": (0, 32)},
    "cda": {"iterations": 4000, "jitter": (0, 32)},
    "g-vbsm": {
        "learning_rate": 0.1,
        "batch_images": 80,
        "convolution_patch": 16,
        "convolution_drop": 0.0,
        "momentum": 0.4,
        "crop": "resized",
    },
    "dwa": {
        "iterations": 2000,
        "variance_weight": 2.0,
        "ascent_steps": 15,
        "crop": "resized",
        "flip": True,
        "jitter": (0, 32),
    },
    "rded": {"patch_factor": 2},
    "edc": {
        "batch_images": 80,
        "begin": "patch",
        "choice": "lowest",
        "patch_factor": 2,
        "crop": "resized",
        "scale": (0.5, 1.0),
        "convolution_patch": 16,
        "convolution_drop": 0.0,
        "momentum": 0.4,
    },
    "fadrm": {"jitter": (0, 32), "small_view": 200 / 224},
}


def recipe_for(
    method: str | Recipe, *, size: int, classes: int, iterations: int | None = None
) -> Recipe:
    """Return the numbers of a method for images of a size.

    Parameters
    ----------
    method : str or Recipe
        A name in `RECIPES`; a Recipe is taken as it is.
    size : int
        Pixels of a side.
    classes : int
        Classes of the data set: EDC takes fewer steps for ten of them.
    iterations : int, optional
        Other steps than the recipe's.

    Raises
    ------
    ValueError
        If the name is unknown, or the steps are negative.

    Examples
    --------
    >>> recipe_for("sre2l", size=64, classes=200).learning_rate
    0.1
    """
    recipe = method if isinstance(method, Recipe) else _named(method, size, classes)
    return recipe if iterations is None else replace(recipe, iterations=iterations)


def _named(name: str, size: int, classes: int) -> Recipe:
    if name not in RECIPES:
        near = get_close_matches(name, RECIPES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        if name in MATCH_RECIPES:
            hint = "; distill.match does that one"
        raise ValueError(f"method {name!r} is not one of {', '.join(RECIPES)}{hint}")
    recipe = RECIPES[name]
    if size > 112:
        return replace(recipe, **_IMAGENET.get(name, {}))
    if size > 48:
        return replace(recipe, **_TINY.get(name, {}))
    if name == "edc" and classes <= 10:
        return replace(recipe, iterations=75, batch_images=1_000_000)
    return recipe
