"""The parameters of `curate plan`: those of `curate prune`, and of a pool that is not there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_type_hints

from cyclopts import Group, Parameter, Token

from pipelines.config import AT_LEAST_ONE, COUNT, PruneConfig

_PLAN = Group("Plan", sort_key=0)
_POOL = Group("Pool", sort_key=1)

Column = Literal["image", "text", "url", "embedding", "score"]


def _large_number(kind: Any, tokens: Sequence[Token]) -> int:
    """Convert 440e6 and 440_000_000 alike."""
    text = tokens[0].value
    try:
        number = float(text)
    except ValueError:
        number = 0.5
    if number < 1 or number != int(number):
        raise ValueError(f'"{text}" is not a whole number of at least 1, such as 440e6')
    return int(number)


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class PlanConfig(PruneConfig):
    """Say what `curate prune` with the same flags would cost.

    Attributes
    ----------
    pool
        As of curate prune. May be left out where --rows is given.
    rows
        Plan for that many rows like those of --pool, or for a pool that is not there (440e6).
    gpus
        Plan for that many CUDA devices, which this machine must have.
    columns
        Of a pool that is not there: what it holds. With image and without embedding its images
        are embedded.
    dim
        Of a pool that is not there: numbers in an embedding.
    image_bytes
        Of a pool that is not there: bytes of an image file.
    text_bytes
        Of a pool that is not there: bytes of a caption.
    """

    pool: Annotated[str, Parameter(group=_POOL)] = ""
    rows: Annotated[int | None, Parameter(group=_PLAN, converter=_large_number)] = None
    gpus: Annotated[int, Parameter(group=_PLAN), COUNT] = 0
    columns: Annotated[tuple[Column, ...], Parameter(group=_PLAN, consume_multiple=True)] = (
        "embedding",
        "text",
        "url",
        "score",
    )
    dim: Annotated[int, Parameter(group=_PLAN), AT_LEAST_ONE] = 512
    image_bytes: Annotated[int, Parameter(group=_PLAN), AT_LEAST_ONE] = 20_000
    text_bytes: Annotated[int, Parameter(group=_PLAN), AT_LEAST_ONE] = 60

    def __post_init__(self) -> None:
        """Check what the types do not say."""
        super().__post_init__()
        if not self.pool and self.rows is None:
            raise ValueError("give --pool, or --rows for a pool that is not there, such as 440e6")
        if self.rows is not None and self.rows < 1:
            raise ValueError(f"rows must be at least 1, got {self.rows}")
        if not self.pool and not {"image", "embedding"} & set(self.columns):
            raise ValueError("columns must hold image or embedding: there is nothing to prune by")


# The inherited hints are text that only `pipelines.config` can resolve; cyclopts asks this module.
vars(PlanConfig)["__init__"].__annotations__ |= get_type_hints(PlanConfig, include_extras=True)
