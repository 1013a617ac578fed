"""`curate export --to image-folder`: the images of a distilled run as files."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Final

from curate.errors import PoolError, ShardError
from curate.manifest import StepFolder, locked, open_step, read_manifest
from distill.distilled import DistilledSet
from distill.export import export
from pipelines.distilled_rows import SET, is_distilled
from pipelines.export_formats import Exported

IMAGE_FOLDER: Final = "image-folder"
_UNFINISHED = ".unfinished"


def distilled_set(run: Path) -> tuple[Path, str]:
    """Return the folder of a run's distilled set, and the fingerprint of that set.

    Raises
    ------
    PoolError
        If `run` is not the folder of a run of `curate distill`.
    ShardError
        If the run is not complete.
    """
    if not is_distilled(run):
        raise PoolError(
            f"{run} is not the folder of a run of curate distill, whose images --to {IMAGE_FOLDER} "
            "writes; of rows that another run kept choose --to parquet, webdataset, datacomp, "
            "img2dataset or uids"
        )
    folder = run / SET
    manifests = [read_manifest(run), read_manifest(folder) if folder.is_dir() else None]
    if not all(manifest is not None and manifest["complete"] for manifest in manifests):
        raise ShardError(f"{run} is not complete; run the same curate command again to finish it")
    return folder, str((manifests[1] or {})["fingerprint"])


def export_images(run: Path, out: str | Path | None, *, overwrite: bool) -> Exported:
    """Write the images of a run as `torchvision.datasets.ImageFolder` reads them.

    Parameters
    ----------
    run : Path
        A folder that `curate distill` wrote.
    out : str or Path, optional
        Where to write; ``RUN/export-image-folder`` if not given.
    overwrite : bool
        Replace an export of another set.

    Raises
    ------
    PoolError
        If `run` is not such a folder.
    ShardError
        If the run is not complete, or its set is damaged.
    FingerprintError
        If the folder holds another export and `overwrite` is off.
    """
    source, fingerprint = distilled_set(run)
    folder = run / f"export-{IMAGE_FOLDER}" if out is None else Path(out)
    with locked(folder):
        step = open_step(
            folder,
            step="export",
            step_version=1,
            params={"to": IMAGE_FOLDER},
            inputs={"distilled": fingerprint},
            overwrite=overwrite,
        )
        if not _is_whole(step):
            step.record(complete=False)
            count = _write(DistilledSet.open(source), step)
            step.finish(rows=count, written=count, notes=[])
    count = int(step.manifest["written"])
    note = f"train       torchvision.datasets.ImageFolder({str(folder.absolute())!r})"
    return Exported(folder, IMAGE_FOLDER, count, count, (note,))


def _is_whole(step: StepFolder) -> bool:
    there = len(list(step.path.glob("*/*.png")))
    classes = (step.path / "classes.json").exists()
    return step.complete and classes and there == step.manifest["written"]


def _write(distilled: DistilledSet, step: StepFolder) -> int:
    """Write all files, those too that an interrupted export has written; return the images."""
    for child in step.path.iterdir():
        if child == step.file:
            continue
        if child.is_dir() and not child.is_symlink():
            shutil.rmtree(child)
        else:
            child.unlink()
    unfinished = step.path / _UNFINISHED  # distill.export wants an empty folder
    count = len(export(distilled, unfinished))
    for child in sorted(unfinished.iterdir()):
        child.rename(step.path / child.name)
    unfinished.rmdir()
    return count
