"""The parameters of `curate distill`; see `pipelines.config`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Group, Parameter
from cyclopts.validators import Number

from pipelines.config import AT_LEAST_ONE, COUNT, DEFAULT_MAX_PIXELS, PoolConfig

#: Those of `distill.RECIPES` and `distill.MATCH_RECIPES`, which cannot be asked here: they load
#: torch.
RECIPE_NAMES = (
    "default",
    "sre2l",
    "cda",
    "g-vbsm",
    "dwa",
    "cudd",
    "rded",
    "edc",
    "delt",
    "fadrm",
    "datadam",
    "dm",
)

if TYPE_CHECKING:
    RecipeName = str
else:
    RecipeName = Literal[RECIPE_NAMES]

_MOST = 2**62  # torch takes seeds of 64 bits, and teachers and students add to it
_RANGES = {
    "ipc": (1, _MOST),
    "size": (1, _MOST),
    "squeeze_epochs": (1, _MOST),
    "iterations": (0, _MOST),
    "label_epochs": (0, 32_767),  # the numbers of epochs are stored in 16 bits
    "label_bytes": (1, _MOST),
    "validate_epochs": (0, _MOST),
    "seed": (0, _MOST),
    "workers": (1, _MOST),
    "max_pixels": (1, _MOST),
}
_SHARE = Parameter(validator=Number(gte=0, lte=1))
_POOL = Group("Pool", sort_key=1)
_DISTILL = Group("Distillation", sort_key=2)
_VALIDATE = Group("Validation", sort_key=3)
_RUN = Group("Run", sort_key=6)


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class DistillConfig(PoolConfig):
    """Distill a labelled pool.

    Attributes
    ----------
    label_col
        Column of classes (numbers or strings). [default: the ClassLabel of the pool, else by name:
        label, labels, class, target, cls]
    size
        Pixels of a side: larger and smaller images are resized, and cropped to the middle square.
        [default: that of the images, which must then be squares of one size]
    ipc
        Images per class to synthesize.
    method
        Recipe by which images are recovered. datadam and dm match distributions instead; only the
        soft labels are the teacher's then.
    network
        Teacher: convnet3, convnet4 or any timm model; may be given several times.
    squeeze_epochs
        Epochs of each teacher. Short teachers distil better.
    iterations
        Steps of recovery. [default: the recipe's]
    label_epochs
        Epochs of views with soft labels; 0 stores none.
    label_bytes
        Most bytes of the soft labels' files; fewer epochs or a coarser code are taken to fit.
        [default: no limit]
    validate_epochs
        Train students for so many epochs on the result and, beside it, on random and coreset
        images with labels of the same bytes; needs --test-pool. 0 is off.
    test_pool
        Labelled pool of held-out images, for the teachers' accuracy and the validation. The same
        --image-col and --label-col are read; classes go by their names.
    out
        Output folder. [default: NAME-distilled beside the pool]
    seed
        Seed of everything that is drawn.
    device
        auto, cpu, cuda or cuda:1. Auto takes CUDA where there is one.
    workers
        Threads that decode.
    overwrite
        Replace a result of other parameters in the same folder. Steps that are not affected are
        used again.
    dry_run
        Print the steps, rows and bytes, and do nothing.
    max_failed
        Share of rows that may be unusable (broken images, no class) before the command ends with
        exit code 1. They are recorded in any case.
    max_pixels
        Images with more pixels are not decoded.
    """

    label_col: Annotated[str | None, Parameter(group=_POOL)] = None
    test_pool: Annotated[str | None, Parameter(group=_POOL)] = None
    size: Annotated[int | None, Parameter(group=_POOL), AT_LEAST_ONE] = None
    max_pixels: Annotated[int, Parameter(group=_POOL), AT_LEAST_ONE] = DEFAULT_MAX_PIXELS
    ipc: Annotated[int, Parameter(group=_DISTILL), AT_LEAST_ONE]
    method: Annotated[RecipeName, Parameter(group=_DISTILL)] = "default"
    network: Annotated[tuple[str, ...], Parameter(group=_DISTILL, negative="")] = ("resnet18",)
    squeeze_epochs: Annotated[int, Parameter(group=_DISTILL), AT_LEAST_ONE] = 20
    iterations: Annotated[int | None, Parameter(group=_DISTILL), COUNT] = None
    label_epochs: Annotated[int, Parameter(group=_DISTILL), COUNT] = 300
    label_bytes: Annotated[int | None, Parameter(group=_DISTILL), AT_LEAST_ONE] = None
    validate_epochs: Annotated[int, Parameter(group=_VALIDATE), COUNT] = 0
    out: Annotated[Path | None, Parameter(group=_RUN)] = None
    seed: Annotated[int, Parameter(group=_RUN), COUNT] = 0
    device: Annotated[str, Parameter(group=_RUN)] = "auto"
    workers: Annotated[int, Parameter(group=_RUN), AT_LEAST_ONE] = 1
    overwrite: Annotated[bool, Parameter(group=_RUN, negative="")] = False
    dry_run: Annotated[bool, Parameter(group=_RUN, negative="")] = False
    max_failed: Annotated[float, Parameter(group=_RUN), _SHARE] = 0.5

    def __post_init__(self) -> None:
        """Check what the types do not say; Python callers come here without the command line."""
        for name, (least, most) in _RANGES.items():
            value = getattr(self, name)
            if value is not None:  # as int, since the manifest cannot hold NumPy's integers
                object.__setattr__(self, name, _whole_number(name, value, least, most))
        if not 0 <= self.max_failed <= 1:
            raise ValueError(f"max_failed must be a share in [0, 1], got {self.max_failed}")
        if self.size is not None and self.size**2 > self.max_pixels:
            raise ValueError(
                f"--size {self.size} makes images of {self.size**2:,} pixels, more than the "
                f"{self.max_pixels:,} of --max-pixels"
            )
        if self.method not in RECIPE_NAMES:
            raise ValueError(
                f"method must be one of {', '.join(RECIPE_NAMES)}, got {self.method!r}"
            )
        if not self.network:
            raise ValueError("network must name at least one teacher, such as resnet18")
        if self.validate_epochs and self.test_pool is None:
            raise ValueError(
                "--validate-epochs needs --test-pool, the images students are judged on"
            )


def _whole_number(name: str, value: Any, least: int, most: int) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise ValueError(f"{name} must be a whole number, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    if value > most:
        raise ValueError(f"{name} must be at most {most}, got {value}")
    return int(value)
