"""The parameters of the verbs on a finished run, and of the demo; see `pipelines.config`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter
from cyclopts.validators import Number

from pipelines.config import AT_LEAST_ONE


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Write the report of a run again.

    Attributes
    ----------
    run
        Folder that curate prune, curate coreset or curate distill wrote.
    examples
        Example images per cluster and reason, or per class of a distilled set. [default: 6, or 10]
    """

    run: Path
    examples: Annotated[int | None, Parameter(validator=Number(gte=0, lte=12))] = None


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ExplainConfig:
    """Say what happened to rows.

    Attributes
    ----------
    run
        Folder that curate prune, curate coreset or curate distill wrote.
    uid
        The row's uid, or the image_id of a distilled image; may be given several times.
    """

    run: Path
    uid: list[str]


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Write the kept rows of a run, or its distilled images, in another format.

    Attributes
    ----------
    run
        Folder that curate prune, curate coreset or curate distill wrote.
    to
        Of prune and coreset: parquet (the run's pool/, or hard links to it), webdataset (tars that
        open_clip streams), datacomp (subset.npy for its resharder), img2dataset (a list of
        addresses), or uids. Of distill: image-folder (PNG files in a folder for each class).
    out
        Output folder. [default: RUN/export-TO; for parquet RUN/pool, which is there already]
    samples_per_tar
        Kept rows per tar, whatever the pool's shards.
    workers
        Processes that write tars.
    overwrite
        Replace an export of another selection in the same folder.
    """

    run: Path
    to: Literal["parquet", "webdataset", "datacomp", "img2dataset", "uids", "image-folder"]
    out: Path | None = None
    samples_per_tar: Annotated[int, AT_LEAST_ONE] = 10_000
    workers: Annotated[int, AT_LEAST_ONE] = 1
    overwrite: Annotated[bool, Parameter(negative="")] = False


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Prune a small real pool and train on the result.

    Attributes
    ----------
    out
        Output folder.
    seed
        Seed of everything that is drawn.
    """

    out: Path = Path("curate-demo")
    seed: int = 0
